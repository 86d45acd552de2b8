"Every notebook of a study runs in small, by one command, on what needs no data and on a folder of photographs."
import json
from pathlib import Path

import pytest

from synthdet.core import refused, shared
from synthdet.evidence.notebooks import experiment_notebook, run_notebook
from synthdet.evidence.studies import STUDIES


def said(path):
    "What the cells of an executed notebook printed and showed, as text."
    outputs = [o for c in json.loads(path.read_text())["cells"] for o in c.get("outputs", ())]
    return "\n".join("".join(o.get("text", "") or o.get("data", {}).get("text/plain", "")) for o in outputs)


@pytest.mark.parametrize("name", [n for n in STUDIES if n not in ("transfer", "wider")])
def test_a_study_in_small(name, tmp_path):
    run_notebook(experiment_notebook(name), tmp_path/"out.ipynb", dict(quick=True))
    text = said(tmp_path/"out.ipynb")
    assert "butterflies" in text and "minutes on cpu" in text
    photographs = {d for g in STUDIES[name].over if isinstance(g, dict) for d in g["domain"]} - {"butterflies"}
    for d in photographs: assert f"{d}, 20 labels: not run, because data/{d}" in text
    for c in STUDIES[name].claims: assert f"{c}: " in text


def test_what_has_no_data_says_so(tmp_path):
    assert "none of its data are there; say data=FOLDER" in refused(run_notebook, experiment_notebook("transfer"), tmp_path/"out.ipynb", dict(quick=True))


@pytest.mark.slow
@pytest.mark.skipif(shared() is None, reason="the reference photographs are not beside the project")
@pytest.mark.parametrize("name, domain", [("class_images_matter", "kangaroos"), ("masks_matter", "cars"),
                                          ("transfer", "faces")])
def test_a_study_of_photographs_in_small(name, domain, tmp_path):
    run_notebook(experiment_notebook(name), tmp_path/"out.ipynb", dict(quick=True, data=str(shared()), only=f"domain={domain}"))
    text = said(tmp_path/"out.ipynb")
    assert domain in text
    if name == "transfer": assert "from coco and coco + synthdet: not run, because weights/ssd_mobilenetv1_100_coco" in text
