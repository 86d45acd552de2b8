"From folders to rows: the commands as a user types them, names of results, runs that are killed, and real photographs."
import errno
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from helpers import needs_shared
import synthdet
from synthdet import cli
from synthdet.core import refused, UserError
from synthdet.machine import shared
from synthdet.files import read_jsonl
from synthdet.data.domains import load_domain, write_domain
from synthdet.detection.detectors import detector, save_detector
from synthdet.detection.settings import Model
from synthdet.data.fixtures import make_fixture
from synthdet.evidence.arm import Arm, ARMS, command, make_arms, resolved
from synthdet.evidence import tables
from synthdet.evidence.phases import fit, load, phases, run
from synthdet.evidence.tables import load_rows, table
from synthdet.masks.segment import make_segmenter
from synthdet.masks.settings import OPEN, shipped_weights
from synthdet.settings import choices, leaves, override

BIN = Path(sys.executable).parent
SMALL = {"backbone": "mobilenetv1_025", "model.image_size": 96, "batch_size": 4, "steps": 4, "pretrain_steps": 4,
         "eval_every": 2, "n_real": 5}


@pytest.fixture(scope="module")
def bare(root, tmp_path_factory):
    "A folder with class images and backgrounds, and nothing else."
    folder = tmp_path_factory.mktemp("bare")
    for part in ("class_images", "backgrounds"): shutil.copytree(root/part, folder/part)
    return folder


def plain(row): return json.loads(json.dumps(row))


def words(values, **more): return [f"{k}={v}" for k, v in {**values, **more}.items()]


def small(arms, root, **more): return make_arms(arms, **{**SMALL, "domain": "folder", "root": str(root), **more})


def said(capsys, command, *argv):
    "The one line of a refused command; it must end with exit code 2."
    with pytest.raises(SystemExit) as stop: command([str(a) for a in argv])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1, lines
    return lines[0]


# names


MANY, FEW = load_domain("butterflies"), load_domain("butterflies", n_class_images=3, n_backgrounds=2)
LOADED = load(Arm(), domain=replace(FEW, val=MANY.val, train=MANY.train))._replace(val=None, test=None)
OTHER = {"backbone": "resnet18", "source": "gan64", "weights": "", "domain": "folder"}


def other(leaf, tmp_path):
    "A valid value that differs from a leaf's."
    name, kind = leaf.path.split(".")[-1], leaf.field.metadata["kind"]
    if leaf.path == "model.weights": return str(write(tmp_path/"weights.pth"))
    if leaf.path == "synthesis.masks.weights": return "butterflies"
    if leaf.path == "synthesis.objects.weights": return str(write(tmp_path/"weights.pth"))
    if leaf.path == "synthesis.recipe.image_size": return 64
    if leaf.path == "schedule.precision": return "fp32" if resolved(Arm()).schedule.precision == "bf16" else "bf16"
    if name in OTHER: return OTHER[name]
    words = [w for w in choices(leaf.field) if w != leaf.value]
    if words: return words[-1]
    if kind is bool: return not leaf.value
    if kind is str: return "other"
    if kind is tuple and leaf.value:
        low, high = leaf.value
        step = 1 if isinstance(high, int) else .01
        return (low, high - step) if leaf.field.metadata["high"] == high else (low, high + step)
    if kind is tuple: return (.5,)
    if kind is float: return (leaf.value or 1.)/2
    return (leaf.value or 0) + 64


PARTNERS = {"model.test_size": {"model.detector": "retinaface"}}   # what a value of the first needs


def write(path): path.write_bytes(b"weights"); return path


@lru_cache(maxsize=64)
def keys(arm): return [p.key for p in phases(arm, LOADED)]


def sees(arm, leaf):
    "Which phases of an arm are handed a leaf; the first that is also renames those after it."
    head, used = leaf.path.split(".")[0], []
    for p in ARMS[arm.arm](arm):
        kind = type(p.sees).__name__
        handed = head in ("model", "schedule", "seed")
        handed |= head == "labels" and kind in ("Labels", "Mixture")
        handed |= head == "synthesis" and kind in ("Synthesis", "Mixture")
        handed |= head == "share" and kind == "Mixture"
        handed |= leaf.path == "labels.val"                                  # on what checkpoints are chosen
        handed |= head == "pretrain_steps" and (kind != "Labels" or arm.arm == "scratch_long")
        handed |= head == "steps" and kind != "Synthesis"
        used.append(handed or (bool(used) and used[-1]))
    return used


@pytest.mark.parametrize("path", [l.path for l in leaves(Arm()) if not l.path.startswith("data.") and l.path != "arm"])
def test_a_setting_renames_exactly_the_phases_that_are_handed_it(path, tmp_path):
    for name in ARMS:
        arm = override(Arm(name, share=.5), PARTNERS.get(path, {}))
        leaf = next(l for l in leaves(arm) if l.path == path)
        changed = override(arm, {path: other(leaf, tmp_path)})
        if path in ("synthesis.objects.weights", "synthesis.masks.weights"): continue       # what they hold is below
        renamed = [a != b for a, b in zip(keys(arm), keys(changed))]
        assert renamed == (sees(arm, leaf) if leaf.field.metadata["names"] else [False]*len(renamed)), name


@pytest.mark.parametrize("leaf", leaves(Arm()), ids=lambda l: l.path)
def test_every_setting_is_reached_by_its_name(leaf, tmp_path):
    value = other(leaf, tmp_path)
    partners = "".join(f"{k}={v} " for k, v in PARTNERS.get(leaf.path, {}).items())
    arm = override(Arm(), f"{partners}'{leaf.path}={','.join(map(str, value)) if isinstance(value, tuple) else value}'")
    assert next(l for l in leaves(arm) if l.path == leaf.path).value == value


def test_files_are_named_by_what_they_hold(tmp_path):
    shipped = shipped_weights()["butterflies"]
    copy, damaged = tmp_path/"copy.safetensors", tmp_path/"other.safetensors"
    copy.write_bytes(shipped.read_bytes())
    a, b = tmp_path/"a.pth", tmp_path/"b.pth"
    a.write_bytes(b"1"), b.write_bytes(b"2")
    name = lambda **k: keys(make_arms("pretrain_only", **k)[0])[0]
    redo = [name(segmenter="redo", **({"masks.weights": str(w)} if w else {})) for w in ("", "butterflies", copy)]
    assert redo[0] == redo[1] == redo[2] != name(), "by content, not by path"
    assert name(**{"model.weights": str(a)}) != name(**{"model.weights": str(b)})
    b.write_bytes(b"1")
    keys.cache_clear()
    assert name(**{"model.weights": str(a)}) == name(**{"model.weights": str(b)})


def test_the_share_of_a_mixture_is_part_of_its_name():
    assert keys(Arm("mixed", share=.5)) != keys(Arm("mixed", share=.3))


def test_a_behaviour_version_renames_what_passes_through_its_stage(monkeypatch):
    from synthdet.core import VERSIONS
    before = {a: keys(Arm(a, share=.5)) for a in ARMS}
    monkeypatch.setitem(VERSIONS, "masks", 99)
    keys.cache_clear()
    after = {a: keys(Arm(a, share=.5)) for a in ARMS}
    keys.cache_clear()
    assert before["scratch"] == after["scratch"] and before["pretrain"][0] != after["pretrain"][0]
    assert before["mixed"] != after["mixed"]


def test_the_class_of_an_image_is_part_of_what_names_a_result(tmp_path):
    for k, name in enumerate(("disc", "star")):
        for i in range(3): synthetic(tmp_path/"two"/"class_images"/name/f"{k}{i}.png", 40*k + 10*i)
    synthetic(tmp_path/"two"/"backgrounds"/"0.png", 100)
    arm, = make_arms("pretrain_only", domain="folder", root=str(tmp_path/"two"))
    before = phases(arm, load(arm))[0].key
    os.rename(tmp_path/"two/class_images/disc/02.png", tmp_path/"two/class_images/star/02.png")
    assert phases(arm, load(arm))[0].key != before


def synthetic(path, level):
    from synthdet.data.images import write_image
    image = torch.full((3, 40, 40), level, dtype=torch.uint8)
    image[:, 10:30, 10:30] = 255 - level
    return write_image(path, image)


def test_what_was_handed_over_must_say_what_it_is():
    arm = Arm("pretrain_only")
    def cut(images): return (images[:, :3].mean(1) > .5).float()
    with pytest.raises(UserError, match="carries no `content`"): phases(arm, LOADED._replace(masks=cut))
    named = []
    for content in ("above .5", "above .5", "above .6"):
        cut.content = content
        named.append(phases(arm, LOADED._replace(masks=cut))[0].key)
    assert named[0] == named[1] != named[2] != phases(arm, LOADED)[0].key
    cut.content = "above .5"
    gates = [make_segmenter(cut), replace(make_segmenter(cut), gate=OPEN)]
    assert len({phases(arm, LOADED._replace(masks=m))[0].key for m in gates}) == 2, "the gate of a thing, too"


def test_pictures_that_were_handed_over_are_named_by_what_they_show():
    one, two = ([torch.full((3, 16, 16), v, dtype=torch.uint8)] for v in (1, 2))
    names = [phases(Arm("pretrain_only"), LOADED._replace(objects=o))[0].key for o in (one, list(one), two)]
    assert names[0] == names[1] != names[2]


# commands


@pytest.mark.slow
def test_run_from_another_folder_then_again(root, tmp_path):
    command = [BIN/"synthdet-run", *words(SMALL, domain="folder", root=root, arms="scratch,pretrain", out="here")]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    rows = read_jsonl(tmp_path/"here"/"results.jsonl")
    assert sorted(r["arm"] for r in rows) == ["pretrain", "scratch"], "the second call found both rows"
    weights = next(r["weights_file"] for r in rows if r["arm"] == "pretrain")
    assert {"learning_curves.png", "synthesised.png", "detections.png"} <= set(os.listdir(tmp_path/"here"/"figures"))
    assert "here/birds.ipynb" in done.stdout and weights in done.stdout
    assert f"\n{len(rows)} of {len(rows)} runs were there already\n" in done.stdout
    assert re.search("(?m)^birds .*class images", done.stdout)
    assert all(0 <= r["ap50"] <= 1 and r["torch"] and str(tmp_path) not in json.dumps(r) for r in rows)
    model = synthdet.detector(tmp_path/"here"/weights)
    assert model.classes == ("butterfly",)
    assert model(list(torch.rand(1, 3, 96, 96)))[0].keys() == {"boxes", "scores", "labels"}


@pytest.mark.slow
def test_papermill_without_our_command(root, tmp_path):
    notebook = Path(__file__).parents[1]/"nbs"/"experiments"/"run_experiment.ipynb"
    plain = {k: v for k, v in SMALL.items() if "." not in k}
    given = dict(plain, domain="folder", root=root, arms="pretrain_only", out=tmp_path/"out",
                 more="model.image_size=96")
    pairs = [w for k, v in given.items() for w in ("-p", k, str(v))]
    papermill = lambda *more: subprocess.run([BIN/"papermill", notebook, tmp_path/"out.ipynb", *pairs, *more],
                                             capture_output=True, text=True, timeout=300)
    done = papermill()
    assert done.returncode == 0, done.stderr[-2000:]
    row, = read_jsonl(tmp_path/"out"/"results.jsonl")
    assert row["settings"]["schedule"]["batch_size"] == 4, "a setting the notebook has no parameter for"
    refused = papermill("-p", "lrr", "3")
    assert refused.returncode and "setting 'lrr' is unknown" in refused.stderr


@pytest.mark.parametrize("values, line", [
    (dict(n_reel=5), "setting 'n_reel' is unknown; choose from "),
    (dict(n_real="five"), "n_real='five' should be int like the default 25"),
    (dict(arm="scratch"), "what is compared is said as arms=, so leave arm out"),
    (dict(arms="scratch,pretrian"), "arm 'pretrian' is unknown; choose from scratch, "),
    (dict(domain="brids"), "domain 'brids' is unknown; choose from butterflies, folder"),
    (dict(detector="yolo"), "detector 'yolo' is unknown; choose from ssd, "),
    ({"recipe.blend": "glue"}, "blend 'glue' is unknown; choose from paste, "),
    (dict(weights="/nowhere.pth"),
     "weights '/nowhere.pth': no such file; choose none or imagenet or the path of a file"),
    (dict(steps=-3), "steps=-3 should be 1 or more"),
    (dict(protocol="paper"), "protocol 'paper' has no recipe for domain 'butterflies'; choose one of the paper's"),
    (dict(arms="mixed"), "arm 'mixed' of an endless stream needs the share of photographs"),
    (dict(lr=".1", **{"schedule.lr": ".2"}), "setting 'schedule.lr' is given twice"),
])
def test_run_refuses_before_anything_is_written(capsys, tmp_path, values, line):
    assert line in said(capsys, cli.run, *words(values, out=tmp_path/"out"))
    assert not (tmp_path/"out").exists()


@pytest.mark.parametrize("values, line", [
    (dict(root="/nowhere"), "/nowhere: no such folder"),
    (dict(n_real=9), "n_real=9: the training set holds 8 images"),
    (dict(detector="retinanet", backbone="resnet_small"), "backbone 'resnet_small' cannot be chosen"),
])
def test_an_arm_that_cannot_be_run_is_said_in_one_line(root, tmp_path, values, line):
    with pytest.raises(UserError) as e:
        for arm in small("scratch", **{"root": root, **values}): run(arm, tmp_path/"out")
    assert line in str(e.value) and "\n" not in str(e.value)
    assert not list(tmp_path.rglob("*.safetensors")) and not (tmp_path/"out"/"results.jsonl").exists()


@pytest.mark.slow
def test_an_error_inside_the_notebook_is_one_line_too(capsys, root, tmp_path):
    values = words(SMALL, domain="folder", root=root, out=tmp_path/"out", n_real=9)
    line = said(capsys, cli.run, *values)
    assert line.startswith("error: n_real=9: the training set holds 8 images")
    assert not list(tmp_path.rglob("*.ipynb"))


def test_streams_are_refused_in_one_line(capsys, root, tmp_path):
    tiny = ("domain=folder", f"root={root}", "recipe.image_size=96")
    assert "segmenter 'sam' is unknown" in said(capsys, cli.preview, *tiny, "segmenter=sam")
    assert "-n 0 should be 1 or more" in said(capsys, cli.preview, *tiny, "-n", 0)
    assert "a stream has none" in said(capsys, cli.preview, *tiny, "arms=pretrain")
    told = said(capsys, cli.synth, *tiny, "-n", 2, "--format", "csv", "--output", tmp_path/"set")
    assert "format 'csv' is unknown" in told
    assert not (tmp_path/"set").exists()


README = (Path(__file__).parents[1]/"README.md").read_text()


@pytest.mark.parametrize("line", [l.split("#")[0].strip() for l in README.splitlines()
                                  if re.match(r"    synthdet-(run|preview|synth) (?!--notebook)", l)])
def test_the_words_of_the_readme_are_settings(line):
    own = ("arms", "jobs", "more", "out", "results", "workers", "...")
    words = [w for w in shlex.split(line)[1:] if "=" in w]
    given = dict(w.split("=", 1) for w in words)
    make_arms(given.get("arms", "pretrain"), **{k: v for k, v in given.items() if k not in own and "weights" not in k})


@pytest.mark.slow
def test_a_command_with_a_live_generator_ends_well(tmp_path):
    command = [BIN/"synthdet-preview", "objects=gan", "segmenter=redo", "-n", "2", "--output", tmp_path/"sheet.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and (tmp_path/"sheet.png").exists(), done.stderr


# a domain without boxes


def test_class_images_and_backgrounds_are_enough_to_look_write_and_pretrain(capsys, bare, tmp_path):
    tiny = ("domain=folder", f"root={bare}", "recipe.image_size=96")
    cli.preview([*tiny, "-n", "2", "--output", str(tmp_path/"sheet.png")])
    cli.synth([*tiny, "-n", "2", "--output", str(tmp_path/"set")])
    assert (tmp_path/"sheet.png").exists() and len(list((tmp_path/"set").rglob("*.jpg"))) == 2
    row = run(*small("pretrain_only", bare), tmp_path/"out")
    assert "ap50" not in row and row["best_step"] == 4, "no test, and the last weights"
    assert detector(tmp_path/"out"/row["weights_file"]).classes == (bare.name,)
    with pytest.raises(UserError, match="has no train set"): run(*small("pretrain", bare), tmp_path/"out")


def test_a_folder_called_birds_is_a_folder(root):
    assert root.name == "birds"
    arm, plain = small("pretrain", root)[0], make_arms("pretrain", **SMALL)[0]
    assert (arm.synthesis, arm.steps, arm.data.backgrounds) == (plain.synthesis, plain.steps, "")


def test_no_checkpoint_is_chosen_on_test_images(root):
    arm, = small("scratch", root)
    domain = load_domain(arm.data)
    same = load(arm, domain=replace(domain, test=domain.val))
    with pytest.raises(UserError, match="are its test images, and a checkpoint chosen on them would flatter"):
        fit(arm, "never", same)
    assert make_arms("scratch", domain="wider")[0].schedule.select == "last"


def test_zero_is_zero():
    assert make_arms("pretrain", psi=0)[0].synthesis.objects.psi == 0
    assert make_arms("pretrain", seed=0, n_real=0)[0].labels.n_real == 0


# the paper's pipeline


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    "Drawn trees in the layout of the paper's data, without weights; the birds have no drawn ones."
    folder = tmp_path_factory.mktemp("data")
    for name in ("birds", "cars", "qrcodes"): make_fixture(name, folder)
    shutil.rmtree(folder/"dmgan_birds")
    return folder


TINY = {**SMALL, "model.weights": "none", "batch_size": 2, "steps": 2, "pretrain_steps": 2}


@pytest.mark.parametrize("values, lines", [
    (dict(domain="birds"), ("dmgan for domain 'birds' needs", "objects=real")),
    (dict(domain="birds", objects="real"), ("no ReDO weights", "segmenter=grabcut")),
    (dict(domain="birds", objects="real", segmenter="grabcut"),
     ("has no class images of 'birds'", "class_images=crops")),
])
def test_the_papers_protocols_stop_and_name_what_can_be_had_instead(trees, tmp_path, values, lines):
    for protocol in ("paper", "released"):
        with pytest.raises(UserError) as e:
            run(*make_arms("pretrain_only", root=str(trees), protocol=protocol, **TINY, **values), tmp_path)
        assert all(line in str(e.value) for line in lines) and "\n" not in str(e.value)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_was_taken_instead_is_in_the_row(trees, tmp_path):
    asked = dict(domain="birds", objects="real", segmenter="grabcut", class_images="crops", root=str(trees), **TINY)
    row = run(*make_arms("pretrain_only", protocol="paper", **asked), tmp_path)
    assert row["class_images_from"] == "crops"
    assert row["boxes_spent"] == sum(len(t["boxes"]) for t in load_domain("birds", trees).train.targets)
    assert row["settings"]["synthesis"]["recipe"]["compositor"] == "paper"
    gate = row["settings"]["synthesis"]["masks"]["gate"]
    assert not any(gate[k] for k in ("min_area", "min_score", "keep")), "every mask is believed"


def test_codes_are_drawn_with_their_masks(trees, tmp_path):
    row = run(*make_arms("pretrain_only", domain="qrcodes", root=str(trees), protocol="released", **TINY), tmp_path)
    assert row["settings"]["synthesis"]["masks"]["segmenter"] == "alpha" and row["boxes_spent"] == 0


def test_the_released_ablation_pretrains_half_as_long_on_the_first_labels():
    mixed, = make_arms("mixed", domain="faces", protocol="released", n_fake=100)
    pretrain, = make_arms("pretrain", domain="faces", protocol="released", n_fake=100)
    assert [p.steps for p in ARMS["mixed"](mixed)] == [1000]
    assert [p.steps for p in ARMS["pretrain"](pretrain)] == [500, 500]
    assert (mixed.labels.order, mixed.schedule.select) == ("first", "ap50_authors")
    assert make_arms("pretrain", domain="faces", protocol="released")[0].labels.order == "released"
    assert make_arms("pretrain", domain="cars", protocol="released")[0].synthesis.objects.centre_crop == 256


def test_a_finite_mixture_pools_what_there_is():
    assert resolved(make_arms("mixed", n_real=20, n_fake=80)[0]).share == .2
    assert resolved(make_arms("mixed", n_real=20, n_fake=80, share=.5)[0]).share == .5


# rows


def test_a_full_disk_costs_no_row_and_no_training(root, tmp_path, monkeypatch):
    first, second = (small("scratch", root, fold=fold)[0] for fold in (0, 1))
    row = run(first, tmp_path)
    fit(second, tmp_path, load(second))                     # trained, but not yet a row

    def full(fd): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device; free some space"): run(second, tmp_path)
    assert read_jsonl(tmp_path/"results.jsonl") == [plain(row)], "the old row is whole, the new one absent"
    new = run(second, tmp_path)
    assert read_jsonl(tmp_path/"results.jsonl") == [plain(row), plain(new)]


def test_a_torn_last_row_is_run_again_from_its_artefacts(root, tmp_path):
    arm, = small("scratch", root)
    row = run(arm, tmp_path)
    results = tmp_path/"results.jsonl"
    results.write_bytes(results.read_bytes()[:-20])
    with pytest.warns(UserWarning, match="torn"): again = run(arm, tmp_path)
    same = [k for k in row if k not in ("seconds", "memory_mb", "digest")]
    assert [plain(row)[k] for k in same] == [plain(again)[k] for k in same] and len(read_jsonl(results)) == 1


def test_a_row_says_where_objects_came_from_and_what_they_cost(root, tmp_path):
    row = run(*small("pretrain_only", root), tmp_path)
    assert row["boxes_spent"] == 0 and row["class_images_from"] and row["versions"]["stream"] >= 1


def test_rows_of_experiments_that_share_a_file_all_arrive(tmp_path):
    call = ("from synthdet.paths import append_jsonl\n"
            f"for i in range(100): append_jsonl({str(tmp_path/'rows.jsonl')!r}, dict(id=i))")
    for process in [subprocess.Popen([sys.executable, "-c", call]) for _ in range(3)]: assert process.wait(300) == 0
    assert len(read_jsonl(tmp_path/"rows.jsonl")) == 300


@pytest.mark.slow
def test_killed_and_started_again_ends_with_the_same_weights(root, tmp_path):
    longer = {**SMALL, "steps": 12, "pretrain_steps": 12, "eval_every": 3, "domain": "folder", "root": str(root)}
    call = f"from synthdet import make_arms, run; run(make_arms('pretrain', **{longer!r})[0], OUT)"
    start = lambda out: subprocess.Popen([sys.executable, "-c", call.replace("OUT", repr(str(out)))],
                                         stderr=subprocess.PIPE)
    whole = start(tmp_path/"whole")
    assert whole.wait(300) == 0, whole.stderr.read()
    killed = 0
    for states in (1, 2):                                   # once while pretraining, once while fine-tuning
        process = start(tmp_path/"killed")
        while process.poll() is None:
            if len(list((tmp_path/"killed").rglob("state.pt"))) >= states: process.send_signal(signal.SIGKILL)
            time.sleep(.02)
        killed += process.returncode == -signal.SIGKILL
    assert killed == 2 and start(tmp_path/"killed").wait(300) == 0
    weights = [{p.parent.name: p.read_bytes() for p in (tmp_path/d).rglob("best.safetensors")}
               for d in ("whole", "killed")]
    assert len(weights[0]) == 2 and weights[0] == weights[1]
    a, b = (read_jsonl(tmp_path/d/"results.jsonl") for d in ("whole", "killed"))
    assert len(a) == len(b) == 1 and a[0]["ap50"] == b[0]["ap50"] and a[0]["curve"] == b[0]["curve"]


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize("name", ["airplanes", "faces"])
def test_real_photographs_in_small(name, tmp_path):
    photographs = load_domain("folder", shared()/"data"/name)
    root = write_domain(photographs, tmp_path/name, n_class_images=12, n_backgrounds=6, n_labelled=6)
    weights = str(shared()/"weights"/"mobilenetv1_100_imagenet.safetensors")
    arms = small("scratch,pretrain,mixed", root, backbone="mobilenetv1_100", share=.5, **{"model.weights": weights})
    rows = [run(arm, tmp_path/"runs") for arm in arms]
    assert [r["arm"] for r in rows] == ["scratch", "pretrain", "mixed"] and {r["domain"] for r in rows} == {name}
    assert all(r["settings"]["model"]["weights"] == "mobilenetv1_100_imagenet.safetensors" for r in rows)


def test_redo_from_a_command_to_rows(capsys, root, tmp_path):
    tiny = ("domain=folder", f"root={root}", "recipe.image_size=96", "segmenter=redo")
    assert "ReDO weights" in said(capsys, cli.preview, *tiny), "a name says nothing about the pictures in a folder"
    cli.preview([*tiny, "masks.weights=butterflies", "min_score=.1", "-n", "2", "--output", str(tmp_path/"sheet.png")])
    assert "redo: " in capsys.readouterr().out
    assert "setting 'min_scor' is unknown; choose from " in said(capsys, cli.preview, *tiny, "min_scor=.1")
    values = {"segmenter": "redo", "masks.weights": "butterflies", "min_score": .1}
    row = run(*small("pretrain_only", root, **values), tmp_path/"runs")
    masks = row["settings"]["synthesis"]["masks"]
    assert masks["weights"] == "butterflies" and masks["gate"]["min_score"] == .1 and masks["segmenter"] == "redo"


def test_things_instead_of_names(root, tmp_path):
    def cut(images): return (images[:, :3].mean(1) > .5).float()
    cut.content = "brighter than one half"
    objects = [torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8) for _ in range(4)]
    domain = load_domain("folder", root)
    samples = synthdet.samples(domain, masks=cut, objects=objects, recipe=synthdet.Recipe(image_size=64))
    assert samples[0][0].shape == (3, 64, 64)

    def build(num_classes, **options):
        return detector("ssd", num_classes=num_classes, image_size=96, backbone="mobilenetv1_025")
    build.content = "a small one"
    row = run(*small("pretrain_only", root), tmp_path, masks=cut, detector=build)
    assert row["ap50"] >= 0 and row["id"] != run(*small("pretrain_only", root), tmp_path)["id"]


def test_a_run_starts_from_ones_own_detector_of_other_classes(root, tmp_path):
    kind = Model(backbone="mobilenetv1_025", image_size=96)
    file = save_detector(detector(kind, 4), tmp_path/"mine.safetensors", settings=kind, classes=["a", "b", "c"])
    with pytest.warns(UserWarning, match="another number of classes"):
        row = run(*small("scratch", root, **{"model.weights": str(file)}), tmp_path/"runs")
    assert row["settings"]["model"]["weights"] == "mine.safetensors" and 0 <= row["ap50"] <= 1
    assert detector(tmp_path/"runs"/row["weights_file"]).classes == load_domain("folder", root).classes


# what a row of the first version said, shortened
FIRST = dict(id="scratch-1522626f5b4de47f", arm="scratch", domain="airplanes", objects="real", segmenter="grabcut",
             recipe=dict(image_size=160, protocol="free", objects=[1, 2], scale=[.4, .9], naive=False, released=False),
             n_real=20, n_fake=0, fold=0, seed=0, backbone="mobilenetv1_100", image_size=160, steps=300, ap50=.416078,
             weights="mobilenetv1_100_imagenet.safetensors", class_images="", data="0f93b0b48112bdef", synthdet="0.1.0")


def test_rows_of_the_first_version_are_still_read(tmp_path):
    new = {**FIRST, "id": "new", "fold": 99, "mask_weights": "", "gate": {"min_area": .03}}
    (tmp_path/"rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (FIRST, new)))
    rows = load_rows(tmp_path/"rows.jsonl")
    assert len(rows) == 2 and not table(rows).empty
    first = rows.iloc[0]
    assert first["count"] == [1, 2] and first["source"] == "real" and first["model.image_size"] == 160
    assert first["recipe.image_size"] == 160 and first["model.weights"].startswith("mobilenet")
    assert first["min_area"] == .03


@pytest.mark.parametrize("has", [True, False])
def test_rows_from_before_precision_are_fp32_on_any_machine(has, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
        m.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
        row = importlib.reload(tables).flat_row(FIRST)
        assert row["precision"] == "fp32" and row["compile"] is False
    importlib.reload(tables)


def test_an_arm_of_a_gpu_is_named_without_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arm = resolved(override(Arm("pretrain"), dict(precision="fp16")))
    assert "precision=fp16" in command(arm)
    assert "precision='fp16' is for GPUs" in refused(run, arm)
