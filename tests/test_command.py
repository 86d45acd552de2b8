"The commands as a shell runs them: words in any order, streams that are closed or full, odd values, others' files."
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import contents
from synthdet import cli
from synthdet.commands.door import word
from synthdet.commands.stream import _picture
from synthdet.core import refused, through, UserError
from synthdet.data.domains import load_domain, write_domain
from synthdet.evidence.arm import make_arms
from synthdet.evidence.phases import run
from synthdet.evidence.studies import PHOTOGRAPHS

BOOK = Path(__file__).resolve().parents[1]/"nbs"/"experiments"/"run_experiment.ipynb"


def shell(line, cwd, **env):
    "A line for a shell, in which $SYNTHDET is `python -m synthdet`."
    return subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], cwd=cwd, capture_output=True, text=True,
                          timeout=200, env={**os.environ, "SYNTHDET": f"{sys.executable} -m synthdet", **env})


def refusal(capsys, command, *argv):
    "The one line with which a command refuses."
    with pytest.raises(SystemExit) as stop: getattr(cli, command)([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and not out, (argv, out, err)
    return err


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "Words for a stream of a tiny domain."
    mine = write_domain(load_domain("butterflies", n_class_images=8, n_backgrounds=3),
                        tmp_path_factory.mktemp("tiny")/"{my} birds $x", n_labelled=2)
    return ["domain=folder", f"root={mine}", "recipe.image_size=64"]


# words


@pytest.mark.parametrize("line, said", [
    ("domain=folder -n 2 root=/nope --output p.png", "/nope: no such folder"),
    ("-n 2 domain=folder --output p.png root=/nope", "/nope: no such folder"),
    ("--output=p.png domain=folder -- root=/nope", "/nope: no such folder"),
    ("-p domain folder -n 2 -p root /nope", "/nope: no such folder"),
    ("-p lr -1e-3", "lr=-0.001 should be"), ("-p lr -3", "lr=-3.0 should be"),
    ("-p root -x -p domain folder", "-x: no such folder"), ("-p lr", "expected 2 arguments"),
    ("-x=3", "unrecognized arguments: -x=3"), ("--outp x", "unrecognized arguments: --outp"),
    ("lr=-1", "lr=-1.0 should be"), ("-n", "expected one argument"),
    ("-n -1", "-n -1 should be 1 or more"), ("-n ²", "-n ² should be"), ("-n 1e3", "-n 1e3 should be"),
    ("-n 1001", "at most 1,000"), ("-n " + "9"*5000, "at most 1,000"),
    ("--output=", "--output is empty"), ("--output p.docx", "choose a name that ends in .png"),
    ("--output /tmp", "choose a name that ends in .png"),
])
def test_words_and_options_in_any_order(capsys, monkeypatch, tmp_path, line, said):
    monkeypatch.chdir(tmp_path)
    assert said in refusal(capsys, "preview", *line.split(" "))
    assert not contents(tmp_path)


def test_options_of_the_others(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for command, line, said in (("run", "--output=", "--output is empty"),
                                ("run", "--notebook= lr=1", "--notebook is empty"),
                                ("run", "--output x.txt lr=1", "no name of a notebook"),
                                ("run", f"--output {BOOK} --notebook {BOOK}", "is the notebook itself"),
                                ("synth", "-n 5", "are required: --output"),
                                ("synth", "--output x -n 9999999999", "at most 1,000,000,000"),
                                ("data", "list --root=", "--root is empty"), ("data", "", "are required: what"),
                                ("data", "--root x list cars --quick nope", "data set 'nope' is unknown"),
                                ("run", "workers=9999", "workers=9999: expected a whole number from 0 to"),
                                ("run", f"out={BOOK}", "is a file; choose a folder")):
        assert said in refusal(capsys, command, *line.split())
    assert not contents(tmp_path)


# streams


@pytest.mark.parametrize("line, code, said", [
    ("$SYNTHDET data list | head -1", (0, 141), ""), ("$SYNTHDET data list | true", (141,), ""),
    ("$SYNTHDET data list >&-", (0,), ""), ("$SYNTHDET data list <&- >&- 2>&-", (0,), ""),
    ("$SYNTHDET data list >/dev/full", (2,), "error: standard output: No space left on device"),
    ("$SYNTHDET run lrr=1 2>/dev/full", (2, 120, 1), ""), ("$SYNTHDET run lrr=1 2>&-", (2,), ""),
    ("$SYNTHDET run domain=folder root=größe", (2,), r"error: gr\xf6\xdfe: no such folder"),
    (r"$SYNTHDET run domain=folder root=$'a\xff'", (2,), r"error: root='a\udcff' holds what is no character"),
])
def test_no_stream_makes_a_traceback(tmp_path, line, code, said):
    done = shell(line, tmp_path, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.returncode in code and said in done.stderr, done.stderr
    assert done.stderr.count("\n") <= 1 and "Traceback" not in done.stderr, done.stderr


# others' files


def test_pictures_and_folders_of_others_stay(capsys, tiny, tmp_path):
    for name in ("thesis.docx", "thesis.png", "notes.jpg"): (tmp_path/name).write_bytes(b"PK years of work")
    (tmp_path/"folder.png").mkdir()
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine"/"notes.txt").write_text("years of work")
    before = contents(tmp_path)
    for name, line in {"thesis.docx": "choose a name that ends in", "thesis.png": "is no picture",
                       "notes.jpg": "is no picture", "folder.png": "cannot write",
                       "thesis.png/a.png": "cannot write"}.items():
        assert line in refusal(capsys, "preview", *tiny, "-n", 2, "--output", tmp_path/name)
    for name in ("mine", "thesis.docx"): assert refusal(capsys, "synth", *tiny, "-n", 2, "--output", tmp_path/name)
    assert contents(tmp_path) == before


def test_a_sheet_is_the_kind_its_name_says(capsys, tiny, tmp_path):
    for name, begins in {"a.png": b"\x89PNG", "b {x} ü.jpg": b"\xff\xd8\xff", "a\nb.webp": b"RIFF"}.items():
        for _ in range(2): cli.preview([*tiny, "-n", "2", "--output", str(tmp_path/name)])
        assert (tmp_path/name).read_bytes().startswith(begins)
    assert len(contents(tmp_path)) == 3


# odd values through the real thing

NAMES = ("{birds}", "my birds $x", "100%", "it's \"so\"", "größe", "gro\u0308ße", "a\\b", "-x", "2024", "007", "1e5",
         "true", "null", "~nobody", "{0.__class__}", "a,b", "[x]", "%(prog)s", "a=b", "")
PAIRS = [("n_real", "ten"), ("n_real", "1.5"), ("seed", "9"*400), ("workers", "-1"), ("jobs", "True"), ("arms", "1"),
         ("fold", "[1]"), ("lr", "nan"), ("steps", "-3"), ("LR", "3"), ("objects", "{}"), ("segmenter", "None"),
         ("out", "1.5"), ("protocol", "pa\nper"), ("weights", "/nope"), ("more", "'"), ("scale", "1"),
         ("blend", "ü"), ("n_real", "")]
YAML = ["recipe: {scale: [.9, .2]}", "recipe: {scael: 1}", "arms: [scratch, 3]", "lr: null", "lr: true", "root: null",
        "n_real: [1]", "more: {lrr: 1}", "seed: 1.5", "workers: .inf", "out: {a: b}"]


def odd(g):
    "A folder that is not there, and how more is given: (flag, what)."
    how = g.choice(("word", "-p", "-r", "-y", "-f"))
    return f"nope {g.choice(NAMES)}", how, g.choice(YAML) if how in ("-y", "-f") else g.choice(PAIRS)


@pytest.fixture
def bystanders(tmp_path):
    "A folder of somebody's files, which stay as they are."
    for name in ("notes.ipynb", "runs/butterflies.ipynb", "runs/rows.txt", "preview.png", "{birds}.ipynb"):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_text("years of work")
    before = contents(tmp_path)
    yield tmp_path
    after = {k: v for k, v in contents(tmp_path).items() if not k.startswith("out ")}
    assert after == before, "what was there is as it was, and nothing is left"


def test_odd_values_through_the_command(bystanders):
    g = random.Random(0)
    for _ in range(20):
        root, how, more = odd(g)
        pair = more if isinstance(more, tuple) else more.split(": ", 1)
        words = [f"{pair[0]}={pair[1]}"] if how == "word" else ["-p", *pair]
        own = [] if pair[0] == "root" else [f"root={root}"]
        command = [sys.executable, "-m", "synthdet", g.choice(("run", "preview")), "domain=folder", *own, *words]
        done = subprocess.run(command, cwd=bystanders, capture_output=True, text=True, timeout=100)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done


PAPERMILLS = """
import json, os, sys, traceback
from papermill.cli import papermill
for name, words in json.load(sys.stdin):
    if os.fork(): os.wait()
    else:
        os.dup2(os.open(f"{name}.stderr", os.O_WRONLY | os.O_CREAT), 2)
        try: papermill(words)
        except SystemExit as e: os._exit(bool(e.code))
        except BaseException: traceback.print_exc()
        os._exit(1)
"""


@pytest.mark.slow
def test_odd_values_through_papermill(bystanders):
    "Its command in a process of its own for each, forked from one that has imported it; each with a kernel of its own."
    g, calls = random.Random(1), []
    for k in range(20):
        root, how, more = odd(g)
        if how == "-f": (bystanders/f"out {k}.yaml").write_text(more)
        words = {"word": ["-p", *more], "-f": ["-f", f"out {k}.yaml"], "-y": ["-y", more]}.get(how, [how, *more])
        usual = ["--no-progress-bar", str(BOOK), f"out {k}.ipynb", "-p", "domain", "folder", "-p", "root", root]
        calls.append((f"out {k}", [*usual, *words]))
    subprocess.run([sys.executable, "-c", PAPERMILLS], input=json.dumps(calls), cwd=bystanders, text=True,
                   timeout=600, check=True)
    for name, words in calls:
        said = [l for l in (bystanders/f"{name}.stderr").read_text().splitlines() if l.strip()]
        assert said[-1].startswith("UserError: "), (words, said[-20:])
        told = json.loads((bystanders/f"{name}.ipynb").read_text())
        ran = [c for c in told["cells"] if c["cell_type"] == "code" and c["execution_count"]]
        assert not any("torch" in "".join(c["source"]) for c in ran), "said before torch is imported"


# what a command says beside its result, and where rows go


def test_a_warning_is_one_line_without_the_place_in_the_code(tmp_path):
    mine = write_domain(load_domain("butterflies", n_class_images=8, n_backgrounds=3), tmp_path/"mine", n_labelled=2)
    (mine/"backgrounds"/"read\nme.txt").write_text("notes")
    done = shell('$SYNTHDET preview domain=folder root=mine recipe.image_size=64 -n 1', tmp_path)
    said = [line for line in done.stderr.splitlines() if line]
    told = "warning: mine/backgrounds: 1 is no picture and passed over: read\\nme.txt"
    assert done.returncode == 0 and said == [told], done.stderr


@pytest.mark.parametrize("held", [
    "buy milk", '{\n "cells": []\n}\n', '{"cells": [], "nbformat": 4}', "a,b\n1,2\n", '["x"]\n'])
def test_rows_are_added_to_no_file_of_somebody_else(capsys, tiny, tmp_path, monkeypatch, held):
    monkeypatch.chdir(tmp_path)
    Path("notes").write_text(held)
    words = [*tiny[:2], "arms=scratch", "results=notes", "protocol=quick"]
    assert "notes" in refusal(capsys, "run", *words) and Path("notes").read_text() == held
    with pytest.raises(UserError, match="notes"):
        run(make_arms("scratch", "", domain="folder", root=tiny[1][5:])[0], results="notes")
    assert Path("notes").read_text() == held


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full disk here")
@pytest.mark.parametrize("command", ["run", "preview", "synth", "data", ""])
def test_help_that_is_lost_is_an_error(command):
    "argparse keeps silent of it."
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "synthdet", *filter(None, [command]), "--help"], stdout=full,
                              stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr == "error: standard output: No space left on device\n"


def test_names_end_in_capitals_too(tmp_path, capsys):
    "Cameras write .JPG."
    from synthdet.evidence.execute import own_output
    assert _picture(tmp_path/"a.JPG") == tmp_path/"a.JPG"
    assert own_output(tmp_path/"a.IPYNB", tmp_path/"b").name == "a.IPYNB"
    from synthdet.data.images import read_image, write_image
    image = torch.full((3, 8, 8), 90, dtype=torch.uint8)
    for name in ("a.PNG", "a.JPG", "a.WebP"):
        assert read_image(write_image(tmp_path/name, image)).shape == (3, 8, 8)


def test_an_arm_that_is_named_twice_is_refused():
    "It stood in the table twice."
    for arms in ("scratch,scratch", "pretrain, scratch,pretrain ", ["scratch", "scratch"]):
        assert "twice; name each arm once" in refused(make_arms, arms)


def test_it_is_said_where_settings_with_a_dot_go():
    "papermill writes `-p model.image_size 96` as a line of Python, which fails before the notebook can say anything."
    from synthdet.evidence.experiments import experiment_notebook, parameters
    assert "with a dot" in parameters(experiment_notebook())["more"][1]


def test_what_is_written_over_is_said(tiny, tmp_path, capsys):
    said = []
    for _ in range(2):
        cli.preview([*tiny, "-n", "2", "--output", str(tmp_path/"a.png")])
        said.append(capsys.readouterr().out.splitlines()[-1])
    assert said == [f"{tmp_path/'a.png'}", f"{tmp_path/'a.png'}, replaced"]


def test_notebooks_are_copied_into_a_folder(tmp_path, capsys):
    "README.md became the name of a folder, and a second copy did not say that it changed nothing."
    (tmp_path/"notes").write_text("years of work")
    for name, line in {"README.md": "looks like a file", "notes": "is a file"}.items():
        assert line in refusal(capsys, "notebooks", tmp_path/name)
    assert sorted(contents(tmp_path)) == ["notes"]
    cli.notebooks([str(tmp_path/"v1.2")])
    new = capsys.readouterr().out.splitlines()
    (tmp_path/"v1.2"/"scale.ipynb").unlink()
    cli.notebooks([str(tmp_path/"v1.2")])
    told = f"{len(new) - 1} of {len(new)} are there already, unchanged"
    assert capsys.readouterr().out.splitlines() == [str(tmp_path/"v1.2"/"scale.ipynb"), told]


def test_all_that_a_study_lacks_is_said_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit): cli.study(["labels_curve", "--dry", "--results", "none.jsonl", "--out", "out"])
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("error: study labels_curve: data/airplanes, ")
    assert all(f"data/{d}" in line for d in PHOTOGRAPHS), "it was a line for each"
    assert line.endswith("not there; say --data=FOLDER, below which they lie, or --only domain=butterflies")


def test_trainings_that_nobody_ended_can_be_deleted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("synthdet.evidence.artefacts.results_files", lambda out: [])
    (tmp_path/"artefacts"/"0123456789abcdef").mkdir(parents=True)
    told = []
    for words in ([], ["--prune"], ["--prune", "all"], ["--prune", "all", "--yes"]):
        cli.runs([str(tmp_path), *words])
        told.append(capsys.readouterr().out)
    assert "--prune all lists these, too" in told[0] and "0 in" in told[1] and "add --yes" in told[2]
    assert "deleted" in told[3]
    assert not any((tmp_path/"artefacts").iterdir())
    assert "choose from made, all" in refusal(capsys, "runs", tmp_path, "--prune", "some")


def test_many_cutouts_that_fill_their_frame_are_pointed_at():
    from synthdet.data.butterflies import class_image
    from synthdet.synthesis.cut import cutout
    from synthdet.synthesis.pool import Cutouts
    cuts = [cutout(*class_image(i, size=64, seed=7)) for i in range(12)]
    filled = [c._replace(rgba=torch.cat([c.rgba[:3], torch.full_like(c.rgba[3:], 255)])) if i < 5 else c
              for i, c in enumerate(cuts)]
    told = ("grabcut: 12 of 12 cut-outs kept; 5 of 12 kept fill their frame as ground does: "
            "look at them, or try max_border=0.3")
    before = through(word)
    try: assert Cutouts(filled, name="grabcut").report() == told
    finally: through(before)
    for pool in (Cutouts(cuts, name="grabcut"), Cutouts(filled, name="alpha"), Cutouts(filled)):
        assert pool.report().endswith("12 of 12 cut-outs kept")


def test_the_module_tells_what_it_is(capsys):
    from synthdet import __version__
    from synthdet.__main__ import COMMANDS, main
    for word in ("--version", "--help"): main([word])
    version, _, *lines = capsys.readouterr().out.splitlines()
    assert version == f"synthdet {__version__}"
    assert sorted(line.split()[0] for line in lines if line) == sorted(COMMANDS)
