"Every notebook of a study runs in small, by one command, on what needs no data and on a folder of photographs."
import json
import re
from dataclasses import replace

import pytest
from planted import run_here

from synthdet.core import refused
from synthdet.machine import shared
from synthdet.data import butterflies
from synthdet.evidence.claims import CLAIMS, claims_table, judge_all
from synthdet.evidence.experiments import experiment_notebook
from synthdet.evidence.execute import run_notebook
from synthdet.evidence.parts import made_by, shown
from synthdet.evidence.studies import STUDIES

HERE = [n for n in STUDIES if n != "wider"]


def said(path):
    "What the cells of an executed notebook printed and showed, as text."
    outputs = [o for c in json.loads(path.read_text())["cells"] for o in c.get("outputs", ())]
    return "\n".join("".join(o.get("text", "") or o.get("data", {}).get("text/plain", "")) for o in outputs)


def check(name, text):
    "What the notebook of a study says where there are no photographs."
    assert "butterflies" in text and "minutes by the clock on cpu" in text
    photographs = {d for g in STUDIES[name].over if isinstance(g, dict) for d in g["domain"]} - {"butterflies"}
    for d in photographs: assert re.search(f"{d}, 20 labels[^:\n]*: not run, because data/{d}", text)
    for c in STUDIES[name].claims: assert f"{c}: " in text


def few(over):
    "What varies in a study, with fewer objects: each of them is cut out."
    if isinstance(over, str): return over.replace("n_objects=1000", "n_objects=40")
    if isinstance(over, dict):
        return {k: few(v or "options=n_class_images=40" if k == "butterflies" else v) for k, v in over.items()}
    return [*map(few, over)] if isinstance(over, list) else over


@pytest.fixture
def few_butterflies(monkeypatch):
    for split, n in dict(train=120, val=10, test=20).items():
        monkeypatch.setitem(butterflies.SPLITS, split, (butterflies.SPLITS[split][0], n))


@pytest.mark.parametrize("name", HERE)
def test_a_study_in_small(name, few_butterflies, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(STUDIES, name, replace(STUDIES[name], over=few(STUDIES[name].over)))
    run_here(experiment_notebook(name), quick=True)
    check(name, capsys.readouterr().out)
    assert not any(tmp_path.iterdir()), "thrown away"


def test_table_v_in_small(few_butterflies, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_here(experiment_notebook("wider"), quick=True)
    text = capsys.readouterr().out
    assert all(re.search(rf"{arm} +4 +0 +original +[0-9.]+ +2 ", text) for arm in ("scratch", "pretrain"))
    assert not any(tmp_path.iterdir()), "thrown away"


def test_by_one_command(tmp_path):
    given = dict(quick=True, only="arm=scratch n_real=20,25")
    run_notebook(experiment_notebook("labels_curve"), tmp_path/"out.ipynb", given)
    check("labels_curve", said(tmp_path/"out.ipynb"))


def test_what_has_no_data_says_so(tmp_path):
    told = refused(run_notebook, experiment_notebook("transfer"), tmp_path/"out.ipynb",
                   dict(quick=True, only="domain=birds"))
    assert "none of its data are there; say data=FOLDER" in told


@pytest.mark.slow
@pytest.mark.skipif(shared() is None, reason="the reference photographs are not beside the project")
@pytest.mark.parametrize("name, domain, some", [("class_images_matter", "kangaroos", ""), ("transfer", "kangaroos", ""),
                                                ("masks_matter", "cars", " masks=supervised arm=pretrain")])
def test_a_study_of_photographs_in_small(name, domain, some, tmp_path):
    run_notebook(experiment_notebook(name), tmp_path/"out.ipynb",
                 dict(quick=True, data=str(shared()), only=f"domain={domain}{some}"))
    text = said(tmp_path/"out.ipynb")
    assert domain in text
    if name == "transfer":
        assert "from coco and coco + synthdet: not run, because weights/ssd_mobilenetv1_100_coco" in text


def test_hours_of_work_are_asked_for(tmp_path, monkeypatch):
    "A notebook of a study began to train all that had no row."
    monkeypatch.chdir(tmp_path)
    said = refused(run_notebook, experiment_notebook("labels_curve"), tmp_path/"out.ipynb",
                   dict(results="none.jsonl", only="domain=butterflies"))
    assert "50 runs have no row" in said and "synthdet-study labels_curve --dry" in said and "run=True" in said
    assert not any(tmp_path.glob("**/artefacts"))


@pytest.mark.parametrize("name", STUDIES)
def test_what_a_notebook_shows_is_of_the_rows_that_are_there(name):
    (rows, _), shows = shown(name, tell=list), said(experiment_notebook(name))
    right = " minutes by the clock on " not in shows if rows is None else made_by(rows) in shows
    assert right, f"execute nbs/experiments/{name}.ipynb"


def test_the_claims_are_shown_as_the_rows_have_them():
    shows, table = said(experiment_notebook("claims")), claims_table(judge_all())
    assert all(gain in shows for gain in table.gain)
    assert all(f"\n{name}: " in "\n" + shows for name in STUDIES if name in {c.study for c in CLAIMS.values()})
