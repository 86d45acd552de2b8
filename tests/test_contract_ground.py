"What the floors above stand on: targets that move with pictures, pictures of any kind, states of killed runs."
import copy
import inspect
import json
import os
import pickle
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

import synthdet
from helpers import ended, forked
from synthdet import machine, resume
from synthdet.boxes import hwc, masks_to_boxes, unwrap, wrap
from synthdet.core import refused
from synthdet.precision import AMP, autocast
from synthdet.resume import as_batch, load_state, pick, save_state
from synthdet.settings import choices, leaves
from synthdet.show import as_picture, captioned, on_checks, outlined, sheet, show, thumbnail

# Boxes


def sample():
    "A picture of two objects and its target."
    masks = torch.zeros(2, 40, 60, dtype=torch.bool)
    masks[0, 5:15, 10:30] = masks[1, 20:32, 35:50] = True
    image = torch.where(masks.any(0), 200, 20).to(torch.uint8).expand(3, 40, 60)
    return image, dict(boxes=masks_to_boxes(masks), masks=masks, labels=torch.tensor([1, 2]), image_id=7)


MOVES = dict(mirror=v2.RandomHorizontalFlip(1.), upside_down=v2.RandomVerticalFlip(1.), double=v2.Resize((80, 120)),
             pad=v2.Pad((3, 7)), crop=v2.CenterCrop((36, 56)), quarter=v2.RandomRotation((90, 90), expand=True))


@pytest.mark.parametrize("move", MOVES)
def test_torchvision_moves_boxes_and_masks_with_the_picture(move):
    image, target = sample()
    picture, moved = MOVES[move](image, wrap(target, (40, 60)))
    assert torch.equal((picture[0] > 100), moved["masks"].any(0)), "masks are where the picture is"
    assert torch.equal(moved["boxes"], masks_to_boxes(moved["masks"])), "boxes are around the masks"
    assert moved["boxes"].canvas_size == tuple(picture.shape[1:]) and moved["labels"].tolist() == [1, 2]


def test_wrapping_copies_nothing_and_unwrapping_is_its_inverse():
    _, target = sample()
    wrapped = wrap(target, (40, 60))
    plain = unwrap(wrapped)
    assert type(wrapped["boxes"]) is tv_tensors.BoundingBoxes and type(wrapped["masks"]) is tv_tensors.Mask
    assert type(plain["boxes"]) is type(plain["masks"]) is type(target["boxes"]) is torch.Tensor
    assert plain.keys() == target.keys() and all(plain[k] is target[k] or plain[k].data_ptr() == target[k].data_ptr()
                                                 for k in ("boxes", "masks", "labels", "image_id"))
    assert wrap(wrapped, (40, 60))["boxes"].data_ptr() == target["boxes"].data_ptr()


def test_a_target_without_boxes_is_one():
    image, _ = sample()
    _, moved = v2.RandomHorizontalFlip(1.)(image, wrap(dict(boxes=torch.zeros(0, 4)), (40, 60)))
    assert moved["boxes"].shape == (0, 4)


def test_wrapped_targets_are_refused_in_states_and_plain_ones_are_not(tmp_path):
    "Why caches and states hold plain tensors."
    _, target = sample()
    save_state(tmp_path, dict(step=1, rows=[], boxes=unwrap(wrap(target, (40, 60)))["boxes"]), dict(steps=1))
    assert torch.equal(load_state(tmp_path, dict(steps=1))["boxes"], target["boxes"])
    save_state(tmp_path, dict(step=1, rows=[], boxes=wrap(target, (40, 60))["boxes"]), dict(steps=1))
    assert "cannot read the state" in refused(load_state, tmp_path, dict(steps=1))


# Pictures

CARD = torch.arange(4*20*30, dtype=torch.uint8).view(4, 20, 30)
KINDS = dict(tensor=CARD[:3], cutout=CARD, grey=CARD[:1], plane=CARD[0], mask=CARD[0] > 99, soft=CARD[0]/255,
             floats=CARD[:3]/255, array=hwc(CARD[:3]), array_cutout=hwc(CARD), array_mask=(CARD[0] > 99).numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_everything_draws_every_kind_of_picture(kind, monkeypatch):
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    x, target = KINDS[kind], dict(boxes=torch.tensor([[2., 2, 20, 15]]))
    assert as_picture(x).shape == (3, 20, 30) and as_picture(x).dtype == torch.uint8
    assert thumbnail(x, target, cell=(50, 60)).shape == (3, 50, 60)
    assert sheet([x, x, x], [target]*3, [dict(target, scores=torch.tensor([.9]))]*3, cols=2).shape == (3, 326, 326)
    show(x)
    assert captioned([x, x], ["a", "b\nc"], targets=[target, None]).shape == (1, 6)


@pytest.mark.parametrize("x", [CARD[:2], torch.zeros(2, 3, 20, 30), np.zeros(5)], ids=["channels", "batch", "row"])
def test_what_is_no_picture_is_refused(x):
    with pytest.raises(ValueError, match="is not a picture"): as_picture(x)


def test_drawing_leaves_the_picture_as_it_was():
    x, before = CARD.clone(), CARD.clone()
    for draw in (lambda: thumbnail(x[:3], dict(boxes=torch.tensor([[2., 2, 20, 15]])), cell=(20, 30)),
                 lambda: outlined(x[:3], x[0] > 99), lambda: on_checks(x)):
        assert draw().dtype == torch.uint8 and torch.equal(x, before)


# Batches of a step


def test_every_pass_sees_every_picture_once_in_an_order_of_its_own():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 1, 1)
    seen = lambda seed, name: torch.cat([pick(images, seed, name, k, 5)[:, 0, 0, 0] for k in range(4)])
    a = seen(0, "real")
    assert len(a[:10].unique()) == len(a[10:].unique()) == 10 and not torch.equal(a[:10], a[10:])
    assert torch.equal(a, seen(0, "real")) and not torch.equal(a, seen(0, "z")) and not torch.equal(a, seen(1, "real"))


@pytest.mark.parametrize("bad, says", [(CARD[:3]/255, "float32 [3, 20, 30]"), (CARD[:1], "uint8 [1, 20, 30]"),
                                       (CARD[:3, :7], "uint8 [3, 7, 30]"), (hwc(CARD), "ndarray"), ("a.jpg", "str")])
def test_the_first_picture_that_is_none_is_named(bad, says):
    message = refused(as_batch, [CARD, bad], 16)
    assert "image 1 is" in message and says in message


@pytest.mark.parametrize("name", AMP)
def test_a_forward_pass_in_any_precision_leaves_the_weights(name):
    net = nn.Linear(2, 2)
    with autocast("cpu", AMP[name]): y = net(torch.ones(1, 2))
    assert y.dtype == (AMP[name] or torch.float32) and net.weight.dtype == torch.float32


# Where a row was made


@pytest.mark.skipif(not shutil.which("git"), reason="no git here")
def test_rows_that_were_added_are_no_change_of_the_code(tmp_path, monkeypatch):
    git = lambda *words: subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words],
                                        check=True, timeout=60)
    for name in ("code.py", "results/studies/rows.jsonl"):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_text("1")
    git("init", "-q"), git("add", "-A"), git("commit", "-qm", "first")
    monkeypatch.setattr(machine, "project", lambda: tmp_path)
    head = machine._commit()
    (tmp_path/"results/studies/rows.jsonl").write_text("2")
    assert machine._commit() == head and len(head) == 10
    (tmp_path/"code.py").write_text("2")
    assert machine._commit() == f"{head}+"


# States

CONFIG = dict(steps=9, lr=.1, key="a")


def things():
    torch.manual_seed(0)
    net = nn.Linear(2, 2)
    return dict(net=net, optimizer=torch.optim.Adam(net.parameters()), scaler=torch.amp.GradScaler("cpu"))


def stepped():
    "Things after a step, and their record."
    made = things()
    made["net"](torch.ones(1, 2)).sum().backward()
    made["optimizer"].step()
    return made, dict(step=3, rows=[dict(step=3, loss=.5)], best=None)


def test_a_state_brings_everything_back(tmp_path):
    made, at = stepped()
    assert load_state(tmp_path, CONFIG, **things()) is None, "nothing is there yet"
    save_state(tmp_path, at, CONFIG, **made)
    again = things()
    assert load_state(tmp_path, dict(CONFIG, steps=20), **again) == at, "a run may be made longer"
    assert torch.equal(again["net"].weight, made["net"].weight)
    assert again["optimizer"].state_dict()["state"][0]["step"] == 1


@pytest.mark.parametrize("change, says", [
    (dict(lr=.2), "lr is 0.1 there and 0.2 here"), (dict(new=1), "new is None there"),
    (dict(steps=2), "3 steps along and steps is 2"),
    (dict(key="b"), "it saw other pictures or weights (key is 'a' there")])
def test_a_state_of_another_run_is_refused_and_kept(change, says, tmp_path):
    made, at = stepped()
    save_state(tmp_path, at, CONFIG, **made)
    before, again = (tmp_path/"state.pt").read_bytes(), things()
    weight = again["net"].weight.clone()
    message = refused(load_state, tmp_path, dict(CONFIG, **change), **again)
    assert says in message and "choose another folder" in message
    assert (tmp_path/"state.pt").read_bytes() == before and torch.equal(again["net"].weight, weight)


def test_what_a_caller_checks_is_told_with_the_rest(tmp_path):
    made, at = stepped()
    save_state(tmp_path, at, CONFIG, **made)
    message = refused(load_state, tmp_path, dict(CONFIG, lr=.2), check=lambda at: [f"best is {at['best']}"], **made)
    assert "lr is 0.1 there and 0.2 here; best is None" in message


def test_a_record_alone_is_enough_for_a_finished_run(tmp_path):
    _, at = stepped()
    save_state(tmp_path, at, dict(CONFIG, steps=3))
    assert load_state(tmp_path, dict(CONFIG, steps=3), **things()) == at
    assert "only the record of its 3 steps was kept" in refused(load_state, tmp_path, CONFIG, **things())


@pytest.mark.parametrize("content", [b"", b"torn", b"PK\x03\x04 torn"])
def test_a_damaged_state_is_one_line_and_stays(content, tmp_path):
    (tmp_path/"state.pt").write_bytes(content)
    assert "delete the file to start over" in refused(load_state, tmp_path, CONFIG)
    assert (tmp_path/"state.pt").read_bytes() == content


def test_a_run_killed_between_state_and_rows_shows_all_its_rows(tmp_path):
    "The last rows of a finished run were missing from metrics.jsonl for ever, since nothing wrote them again."
    made, at = stepped()
    def doomed():
        resume._write_rows = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        save_state(tmp_path, at, CONFIG, **made)
    assert ended(forked(doomed)) == -signal.SIGKILL
    (tmp_path/".metrics.jsonl.99.tmp").write_text('{"step"') # of another process that was killed
    load_state(tmp_path, CONFIG, **things())
    assert [json.loads(r) for r in (tmp_path/"metrics.jsonl").read_text().splitlines()] == at["rows"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "state.pt"]


def test_reading_a_run_again_writes_nothing(tmp_path):
    made, at = stepped()
    save_state(tmp_path, at, CONFIG, **made)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    load_state(tmp_path, CONFIG, **things())
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before


def test_blanks_that_belong_to_a_path_stay(tmp_path, monkeypatch):
    "Text of settings is stripped, and a folder called 'my pictures ' was not found."
    from synthdet.data.settings import DataSource
    from synthdet.settings import override
    monkeypatch.chdir(tmp_path)
    for name in ("last ", " first", " both "):
        (tmp_path/name).mkdir()
        for root in (name, str(tmp_path/name)):
            assert override(DataSource(), dict(domain="folder", root=root)).root == root
            assert override(DataSource(), f"domain=folder root='{root}'").root == root
    assert override(DataSource(), "root=' none '").root == "none"


@pytest.mark.parametrize("name", ["predict", "evaluate", "detect", "domain", "detector", "export", "samples", "run"])
def test_help_of_the_face_says_what_goes_in_what_comes_out_and_what_is_refused(name):
    f = getattr(synthdet, name)
    told, signature = inspect.getdoc(f), inspect.signature(f)
    assert all(f"{section}\n---" in told for section in ("Parameters", "Returns", "Raises"))
    documented = {w.lstrip("*") for line in told.splitlines() if " : " in line and line[0] != " "
                  for w in line.split(" : ")[0].split(", ")}
    assert set(signature.parameters) <= documented and len(str(signature)) < 500, "defaults of whole branches are short"


def test_help_of_settings_says_what_they_may_be():
    for path, field in [(l.path, l.field) for l in leaves(synthdet.Arm())]:
        branch = synthdet.Arm()
        for part in path.split(".")[:-1]: branch = getattr(branch, part)
        line, = (l for l in type(branch).__doc__.splitlines() if l.startswith(f"{field.name} : "))
        assert all(str(w) in line for w in choices(field)) and field.metadata["help"] in line
        low = field.metadata["low"]
        assert low is None or f"{low} or more" in line or f"{low} to " in line
    assert repr(synthdet.Recipe(blend="paste")) == "Recipe(blend='paste')"
    assert eval(repr(synthdet.Recipe(blend="paste")), vars(synthdet)) == synthdet.Recipe(blend="paste")
    arm = synthdet.Arm(seed=3)
    assert pickle.loads(pickle.dumps(arm)) == copy.deepcopy(arm) == arm != synthdet.Arm()


def test_a_misspelt_setting_in_python_is_one_line_and_a_type_error():
    assert refused(synthdet.Recipe, scael=1) == "Recipe has no setting 'scael'; choose from scale"
    assert "choose from segmenter, weights, gate" in refused(synthdet.Masks, x=1)
    with pytest.raises(TypeError): synthdet.Model(detektor="ssd")
