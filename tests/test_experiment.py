"From folders to rows: the commands as a user types them, runs that are killed, and real photographs."
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from synthdet import cli
from synthdet.core import read_jsonl, shared, UserError
from synthdet.detection.detectors import detector
from synthdet.data.domains import load_domain, write_domain
from synthdet.evidence.arm import make_arms
from synthdet.evidence.phases import fit, phase_names, run
from synthdet.evidence.statistics import load_rows, table
from synthdet.masks.segment import weights_file

BIN = Path(sys.executable).parent
SMALL = dict(backbone="mobilenetv1_025", image_size=96, batch_size=4, steps=4, pretrain_steps=4, eval_every=2, n_real=5)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    butterflies = load_domain("butterflies", n_class_images=16, n_backgrounds=6)
    return write_domain(butterflies, tmp_path_factory.mktemp("domain")/"butterflies", n_labelled=8)


def plain(row): return json.loads(json.dumps(row))


def words(**values): return [w for k, v in values.items() for w in ("-p", k, str(v))]


def said(capsys, command, *argv):
    "The one line of a refused command; it must end with exit code 2."
    with pytest.raises(SystemExit) as stop: command([str(a) for a in argv])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def test_run_from_another_folder_then_again(root, tmp_path):
    command = [BIN/"synthdet-run", *words(**SMALL, domain="folder", root=root, arms="scratch,pretrain", out="here")]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    rows = read_jsonl(tmp_path/"here"/"results.jsonl")
    assert [r["arm"] for r in rows] == ["scratch", "pretrain"], "the second call found both rows"
    assert {"learning_curves.png", "synthesised.png", "detections.png"} <= set(os.listdir(tmp_path/"here"/"figures"))
    assert "here/butterflies.ipynb" in done.stdout and "pretrain" in done.stdout
    assert all(0 <= r["ap50"] <= 1 and r["data"] and r["torch"] and str(tmp_path) not in json.dumps(r) for r in rows)


def test_papermill_without_our_command(root, tmp_path):
    notebook = Path(__file__).parents[1]/"nbs"/"experiments"/"run_experiment.ipynb"
    values = words(**SMALL, domain="folder", root=root, arms="pretrain_only", out=tmp_path/"out")
    done = subprocess.run([BIN/"papermill", notebook, tmp_path/"out.ipynb", *values], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [r["arm"] for r in read_jsonl(tmp_path/"out"/"results.jsonl")] == ["pretrain_only"]


@pytest.mark.parametrize("values, line", [
    (dict(n_reel=5), "parameter 'n_reel' is unknown; choose from "),
    (dict(n_real="five"), "n_real='five' should be int like the default 25"),
])
def test_run_refuses_before_anything_is_written(capsys, tmp_path, values, line):
    assert line in said(capsys, cli.run, *words(**values, out=tmp_path/"out"))
    assert not (tmp_path/"out").exists()


@pytest.mark.parametrize("values, line", [
    (dict(arms="scratch,pretrian"), "arm 'pretrian' is unknown; choose from scratch, "),
    (dict(domain="brids", root=""), "domain 'brids' is unknown; choose from butterflies, folder"),
    (dict(detector="yolo"), "detector 'yolo' is unknown; choose from ssd, "),
    (dict(recipe='{"blend": "glue"}'), "blend 'glue' is unknown; choose from paste, "),
    (dict(root="/nowhere"), "/nowhere: no such folder"),
    (dict(n_real=9), "a subset of 9 was asked for, and the set holds 8"),
    (dict(detector="retinanet", backbone="resnet_small"), "backbone 'resnet_small' cannot be chosen"),
    (dict(protocol="paper"), "protocol 'paper' has recipes for faces, birds, cars, qrcodes, and this is 'butterflies'"),
    (dict(weights="/nowhere.pth"), "weights '/nowhere.pth': no such file; choose none, imagenet or the path of a file"),
    (dict(steps=-3), "steps=-3 should be above 0 and finite"),
])
def test_an_arm_that_cannot_be_is_said_in_one_line(root, tmp_path, values, line):
    with pytest.raises(UserError) as e:
        for arm in make_arms(**{**SMALL, "arms": "scratch", "domain": "folder", "root": str(root), **values}): run(arm, tmp_path/"out")
    assert line in str(e.value) and "\n" not in str(e.value)
    assert not list(tmp_path.rglob("*.safetensors")) and not (tmp_path/"out"/"results.jsonl").exists()


def test_an_error_inside_the_notebook_is_one_line_too(capsys, root, tmp_path):
    values = words(**{**SMALL, "n_real": 9}, domain="folder", root=root, out=tmp_path/"out")
    assert said(capsys, cli.run, *values).startswith("error: a subset of 9 was asked for")
    assert not list(tmp_path.rglob("*.ipynb"))


def test_a_wrong_word_on_the_command_line_leaves_nothing(root, tmp_path):
    done = subprocess.run([BIN/"synthdet-run", *words(domain="brids", out="here")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: domain 'brids' is unknown; choose from butterflies, folder, faces, birds, cars, wider, qrcodes\n"
    assert not list(tmp_path.iterdir())


def test_streams_are_refused_in_one_line(capsys, root, tmp_path):
    tiny = ("--domain", "folder", "--root", root, "--image-size", 96)
    assert "segmenter 'sam' is unknown" in said(capsys, cli.preview, *tiny, "--segmenter", "sam")
    assert "-n 0 should be 1 or more" in said(capsys, cli.preview, *tiny, "-n", 0)
    assert "format 'csv' is unknown" in said(capsys, cli.synth, *tiny, "-n", 2, "--format", "csv", tmp_path/"set")
    assert not (tmp_path/"set").exists()


def test_a_stream_needs_no_labelled_picture(capsys, root, tmp_path):
    bare = tmp_path/"bare"
    for part in ("class_images", "backgrounds"): shutil.copytree(root/part, bare/part)
    cli.preview([str(a) for a in ("--domain", "folder", "--root", bare, "--image-size", 96, "-n", 2, "--output", tmp_path/"sheet.png")])
    assert (tmp_path/"sheet.png").exists()
    assert "has no" in said(capsys, cli.run, *words(**SMALL, domain="folder", root=bare, out=tmp_path/"out"))


def test_a_full_disk_costs_no_row_and_no_training(root, tmp_path, monkeypatch):
    first, second = (make_arms("scratch", domain="folder", root=str(root), **SMALL, fold=fold)[0] for fold in (0, 1))
    row = run(first, tmp_path)
    fit(second, tmp_path)                                   # trained, but not yet a row

    def full(fd): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="results.jsonl: No space left on device; free some space"): run(second, tmp_path)
    assert read_jsonl(tmp_path/"results.jsonl") == [plain(row)], "the old row is whole, the new one absent"
    new = run(second, tmp_path)
    assert read_jsonl(tmp_path/"results.jsonl") == [plain(row), plain(new)]


def test_a_torn_last_row_is_run_again_from_its_artefacts(root, tmp_path):
    arm, = make_arms("scratch", domain="folder", root=str(root), **SMALL)
    row = run(arm, tmp_path)
    results = tmp_path/"results.jsonl"
    results.write_bytes(results.read_bytes()[:-20])
    with pytest.warns(UserWarning, match="torn"): again = run(arm, tmp_path)
    same = [k for k in row if k != "seconds"]
    assert [row[k] for k in same] == [again[k] for k in same] and len(read_jsonl(results)) == 1


def test_rows_of_experiments_that_share_a_file_all_arrive(tmp_path):
    call = f"from synthdet.core import append_jsonl\nfor i in range(100): append_jsonl({str(tmp_path/'rows.jsonl')!r}, dict(id=i))"
    for process in [subprocess.Popen([sys.executable, "-c", call]) for _ in range(3)]: assert process.wait() == 0
    assert len(read_jsonl(tmp_path/"rows.jsonl")) == 300


def test_another_detector_brings_its_own_backbone():
    arm, = make_arms("scratch", detector="ssdlite320")
    assert detector(arm.detector, image_size=320, backbone=arm.backbone)


def test_killed_and_started_again_ends_with_the_same_weights(root, tmp_path):
    longer = {**SMALL, "steps": 12, "pretrain_steps": 12, "eval_every": 3}
    call = f"from synthdet.experiment import *; run(make_arms('pretrain', domain='folder', root={str(root)!r}, **{longer!r})[0], OUT)"
    start = lambda out: subprocess.Popen([sys.executable, "-c", call.replace("OUT", repr(str(out)))], stderr=subprocess.PIPE)
    whole = start(tmp_path/"whole")
    assert whole.wait() == 0, whole.stderr.read()
    killed = 0
    for states in (1, 2):                                   # once while pretraining, once while fine-tuning
        process = start(tmp_path/"killed")
        while process.poll() is None:
            if len(list((tmp_path/"killed").rglob("state.pt"))) >= states: process.send_signal(signal.SIGKILL)
            time.sleep(.02)
        killed += process.returncode == -signal.SIGKILL
    assert killed == 2 and start(tmp_path/"killed").wait() == 0
    weights = [{p.parent.name: p.read_bytes() for p in (tmp_path/d).rglob("best.safetensors")} for d in ("whole", "killed")]
    assert len(weights[0]) == 2 and weights[0] == weights[1]
    a, b = (read_jsonl(tmp_path/d/"results.jsonl") for d in ("whole", "killed"))
    assert len(a) == len(b) == 1 and a[0]["ap50"] == b[0]["ap50"] and a[0]["curve"] == b[0]["curve"]


@pytest.mark.skipif(shared() is None, reason="the reference photographs are not beside the project")
@pytest.mark.parametrize("name", ["airplanes", "faces"])
def test_real_photographs_in_small(name, tmp_path):
    photographs = load_domain("folder", shared()/"data"/name)
    root = write_domain(photographs, tmp_path/name, n_class_images=12, n_backgrounds=6, n_labelled=6)
    values = {**SMALL, "backbone": "mobilenetv1_100", "weights": str(shared()/"weights"/"mobilenetv1_100_imagenet.safetensors")}
    rows = [run(arm, tmp_path/"runs") for arm in make_arms("scratch,pretrain,mixed", domain="folder", root=str(root), **values)]
    assert [r["arm"] for r in rows] == ["scratch", "pretrain", "mixed"] and {r["domain"] for r in rows} == {name}
    assert all(r["weights"] == "mobilenetv1_100_imagenet.safetensors" for r in rows)


def test_mask_weights_and_gate_are_part_of_what_is_synthesised_and_of_nothing_else(tmp_path):
    names = lambda arm="pretrain_only", **k: phase_names(make_arms(arm, **k)[0], "data")[0][-1]
    shipped = weights_file("redo", "butterflies")
    other = tmp_path/"other.safetensors"
    other.write_bytes(shipped.read_bytes() + b"\0")
    redo = [names(segmenter="redo", mask_weights=str(w)) for w in ("", "butterflies", shipped, other)]
    assert redo[0] == redo[1] == redo[2] != redo[3], "by content, not by path"
    assert len({names(), names(gate='{"min_score": 0.1}'), names(gate='{"keep": 0.5}'), redo[0]}) == 4 and names() == names(gate='{"min_score": 0}')
    assert names("scratch", segmenter="redo") == names("scratch", gate='{"keep": 0.5}') == names("scratch")


def test_redo_from_a_command_to_rows(capsys, root, tmp_path):
    none = "no ReDO weights are shipped for domain '{}'; train them with nbs/experiments/train_redo.ipynb and give mask_weights"
    assert none.format("butterflies") in said(capsys, cli.preview, "--domain", "folder", "--root", root, "--segmenter", "redo"), "a name says nothing about the pictures in a folder"
    tiny = ("--domain", "folder", "--root", root, "--image-size", 96, "--segmenter", "redo", "--mask-weights", "butterflies")
    cli.preview([str(a) for a in (*tiny, "--gate", '{"min_score": 0.1}', "-n", 2, "--output", tmp_path/"sheet.png")])
    assert "redo: " in capsys.readouterr().out
    elsewhere = shutil.copytree(root, tmp_path/"airships")
    assert none.format("airships") in said(capsys, cli.preview, "--domain", "folder", "--root", elsewhere, "--segmenter", "redo")
    assert "takes no weights" in said(capsys, cli.preview, "--mask-weights", "butterflies")
    assert "gate limit 'min_scor' is unknown; choose from " in said(capsys, cli.preview, *tiny, "--gate", '{"min_scor": 0.1}')
    assert "write it like" in said(capsys, cli.synth, *tiny, "--gate", "min_score=.1", tmp_path/"set")
    row = run(make_arms("pretrain_only", domain="folder", root=str(elsewhere), segmenter="redo", mask_weights="butterflies", gate='{"min_score": 0.1}', **SMALL)[0], tmp_path/"runs")
    assert row["mask_weights"] == "redo_butterflies.safetensors" and row["gate"]["min_score"] == .1 and row["segmenter"] == "redo"


def test_rows_from_before_these_columns_are_still_read(tmp_path):
    old = (Path(__file__).parents[1]/"results"/"results.jsonl").read_text()
    row = json.loads(old.splitlines()[0])
    new = {**row, "id": "new", "fold": 99, "mask_weights": "", "gate": {"min_area": .03}}
    (tmp_path/"rows.jsonl").write_text(old + json.dumps(new) + "\n")
    rows = load_rows(tmp_path/"rows.jsonl")
    assert len(rows) == len(load_rows(Path(__file__).parents[1]/"results"/"results.jsonl")) + 1
    assert not table(rows[rows.domain == row["domain"]]).empty and load_rows(tmp_path/"rows.jsonl", mask_weights="").shape[0] >= 1
