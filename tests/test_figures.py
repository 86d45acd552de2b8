"Figures and the README follow from what is in results/, in seconds, without training; what is wrong there stops them."
import json
from pathlib import Path

import papermill
import pytest
from planted import plant, row, run_here

from synthdet.core import refused, VERSIONS
from synthdet.evidence.identity import run_key
from synthdet.evidence.parts import shown, studies_file
from synthdet.evidence.experiments import parameters
from synthdet.evidence.rows import read_rows, write_row
from synthdet.evidence.studies import STUDIES

root = Path(__file__).resolve().parents[1]
PUBLISHED = ["fig3_published", "fig4_published"]
MADE = dict(curves=["fig3", "fig4", *PUBLISHED], claims=["claims"], pictures=["fig1", "fig2"],
            segmentation=["segmentation"],
            tables=[*(f"table{k}" for k in range(1, 6)), "class_images", "masks", "reuse", "transfer", "val_budget"])


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    for name in STUDIES: plant(folder, name)
    return folder


def notebook(name): return root/"paper_figures"/f"{name}.ipynb"


@pytest.mark.parametrize("name", sorted(p.stem for p in notebook("").parent.glob("*.ipynb")))
def test_figure_is_drawn_from_results(name, tmp_path, studies):
    given = dict(out=str(tmp_path/"out"))
    if "studies" in parameters(notebook(name)) and name != "readme": given["studies"] = str(studies)
    if name != "curves": run_here(notebook(name), **given)
    else: papermill.execute_notebook(str(notebook(name)), str(tmp_path/"out.ipynb"), given, kernel_name="python3")
    assert any(p.stat().st_size > 1000 for p in (tmp_path/"out").rglob("*") if p.is_file())
    for made in MADE.get(name, ()):
        assert all((tmp_path/"out"/f"{made}.{kind}").stat().st_size > 1000 for kind in ("svg", "png")), made
    if name == "readme":
        assert (tmp_path/"out"/"README.md").read_text() == (root/"README.md").read_text(), "run `make figures`"


def test_the_readme_shows_the_studies(tmp_path, studies):
    run_here(notebook("readme"), out=str(tmp_path/"out"), studies=str(studies))
    text = (tmp_path/"out"/"README.md").read_text()
    block = lambda name: text.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]
    assert "| 25 | " in block("butterflies") and "(n=5)" in block("butterflies")
    assert "commit planted" in block("butterflies")
    assert "| kangaroos | " in block("photographs") and "(n=3)" in block("photographs")
    assert block("photographs").count("| kangaroos |") == 2
    assert "| faces | 20 | " in block("objects") and all(f"| {c} | " in block("claims") for c in ("C1", "C4", "C8"))
    assert "direction only" in block("claims")


@pytest.mark.parametrize("name", ["curves", "tables", "claims", "segmentation"])
def test_a_study_without_rows_is_passed_over_aloud(name, tmp_path, capsys):
    (tmp_path/"none").mkdir()
    run_here(notebook(name), out=str(tmp_path/"out"), studies=str(tmp_path/"none"))
    drawn = sorted(p.stem for p in (tmp_path/"out").glob("*.svg"))
    assert "ot run" in capsys.readouterr().out and drawn == (PUBLISHED if name == "curves" else [])


def test_a_part_that_is_whole_is_shown_though_others_were_not_run(tmp_path, capsys):
    plant(tmp_path/"studies", "labels_curve", STUDIES["labels_curve"].only(domain="butterflies", n_real=[25, 100]))
    run_here(notebook("curves"), out=str(tmp_path/"out"), studies=str(tmp_path/"studies"))
    said = capsys.readouterr().out
    assert "Not run: study labels_curve on airplanes, birds, cars, faces, kangaroos, 20 labels; butterflies," in said
    assert (tmp_path/"out"/"fig4.png").stat().st_size > 1000


def fault(kind, folder):
    "A study's file with one mistake; what the error names."
    study = STUDIES["labels_curve"].only(domain="butterflies", n_real=[25, 100])
    file, runs = plant(folder, "labels_curve", study), study.missing([])
    rows = read_rows(file)
    file.unlink()
    if kind == "twice": rows = [*rows, rows[3]]
    if kind == "older": rows[3] = rows[3] | dict(versions=VERSIONS | dict(train=0))
    if kind == "missing": del rows[3]
    for r in rows: write_row(file, r)
    return f"{runs[3].arm.arm}-{run_key(runs[3].arm)}" if kind == "missing" else row(runs[3])["id"]


@pytest.mark.parametrize("kind", ["twice", "older", "missing"])
def test_a_mistake_in_the_rows_stops_the_figures(kind, tmp_path):
    named = fault(kind, tmp_path/"studies")
    for name in ("curves", "claims"):
        told = refused(run_here, notebook(name), out=str(tmp_path/"out"), studies=str(tmp_path/"studies"))
        assert named in told and not list((tmp_path/"out").glob("*.svg"))
    first = studies_file("labels_curve", tmp_path/"studies").read_text().splitlines()[0]
    assert json.loads(first)["commit"] == "planted"


@pytest.mark.parametrize("name", STUDIES)
def test_a_row_that_is_missing_is_named_in_every_study(name, studies, tmp_path):
    rows = read_rows(studies_file(name, studies))
    for r in rows[:len(rows)//2] + rows[len(rows)//2 + 1:]: write_row(studies_file(name, tmp_path), r)
    lost, = STUDIES[name].missing(read_rows(studies_file(name, tmp_path)))
    told = refused(shown, name, tmp_path)
    assert f"has no row of {lost.arm.arm}-{run_key(lost.arm)}" in told and f"seed {lost.at['seed']}" in told
