"One file that finds what the detector finds, for any batch, where this package is not."
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from synthdet import cli
from synthdet.core import refused
from synthdet.data.butterflies import scene
from synthdet.data.images import write_image
from synthdet.detection.detect import detect, sized
from synthdet.detection.detectors import detector, save_detector
from synthdet.detection.evaluate import predict
from synthdet.detection.export import compared, Deployed, export, runner, survivors
from synthdet.detection.settings import Model
from synthdet.detection.contract import suppress

pytestmark = pytest.mark.usefixtures("one_thread")
pytest.importorskip("onnxscript", reason="pip install 'synthdet[onnx]'")
ort = pytest.importorskip("onnxruntime", reason="pip install 'synthdet[onnx]'")


def stirred(model, by):
    "A detector whose random heads say different things of different places."
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in ("heads", "Head")) and p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=g)*by)
    return model.eval()


def ssd_of_three():
    torch.manual_seed(0)
    model = stirred(detector("ssd", num_classes=4, backbone="resnet_small", image_size=(64, 96)), .05)
    model.classes = "ant", "moth", "größe"
    return model


def faces():
    torch.manual_seed(0)
    model = stirred(detector("retinaface", image_size=(96, 128)), .05)
    model.classes = "face",
    return model


MAKE = dict(ssd=ssd_of_three, retinaface=faces)


@pytest.fixture(scope="module", ids="-".join, params=[
    ("ssd", "onnx"), *(pytest.param((m, k), marks=pytest.mark.slow)
                       for m, k in (("ssd", "torch.export"), ("retinaface", "onnx"), ("retinaface", "torch.export")))])
def made(request, tmp_path_factory):
    "A detector, its file, and what its export said."
    name, kind = request.param
    model = MAKE[name]()
    path = tmp_path_factory.mktemp("export")/("it" + {"onnx": ".onnx", "torch.export": ".pt2"}[kind])
    return model, path, export(model, kind, path)


def test_the_same_boxes_as_the_detector_for_any_batch(made):
    model, path, told = made
    assert told["pictures"] == 50 and told["boxes"] > 1000 and told["worst_px"] < .01 and told["mb"] > .5
    run, size = runner(path), model.size
    images = torch.stack([sized(scene(i)[0], size) for i in range(5)])
    whole = run(images)
    shapes = dict(boxes=(5, 100, 4), scores=(5, 100), labels=(5, 100), counts=(5,))
    if len(model.classes) == 1: shapes["landmarks"] = 5, 100, 5, 2
    assert {k: tuple(v.shape) for k, v in whole.items()} == shapes
    for i in range(5):
        assert all(torch.allclose(run(images[i:i+1])[k][0].double(), v[i].double(), atol=.01) for k, v in whole.items())
    for i, found in enumerate(predict(model, images)):
        n = min(100, len(found["boxes"]))
        assert whole["counts"][i] == n > 0 and whole["labels"].dtype == torch.int64
        assert not whole["boxes"][i, n:].any() and not whole["labels"][i, n:].any()
        assert torch.allclose(whole["scores"][i, :n], found["scores"][:n], atol=1e-4)
        h, w = size
        assert (whole["boxes"][i] >= 0).all() and (whole["boxes"][i] <= torch.tensor([w, h, w, h])).all()


def test_landmarks_go_along(made):
    "Those of each box, whichever of equal ones comes first."
    model, path, _ = made
    if model.classes != ("face",): return
    images = torch.stack([sized(scene(i)[0], model.size) for i in range(2)])
    with torch.no_grad(): own = model(images.float()/255)
    out = runner(path)(images)
    h, w = model.size
    for i, f in enumerate(own):
        boxes = f["boxes"].clamp(min=0).minimum(torch.tensor([w, h, w, h]))
        apart = (out["boxes"][i, :50, None] - boxes[None]).abs().amax(-1) # [50,N]
        alone = (apart < 1).sum(1) == 1
        assert alone.sum() > 5
        assert torch.allclose(out["landmarks"][i, :50][alone], f["landmarks"][apart.argmin(1)][alone], atol=.02)


def test_the_file_says_what_it_is(made):
    model, path, _ = made
    if path.suffix == ".onnx": about = ort.InferenceSession(str(path)).get_modelmeta().custom_metadata_map
    else:
        extra = {"synthdet.json": ""}
        torch.export.load(path, extra_files=extra)
        about = {k: v if isinstance(v, str) else json.dumps(v) for k, v in json.loads(extra["synthdet.json"]).items()}
    h, w = model.size
    assert json.loads(about["classes"]) == list(model.classes) and about["input"] == f"uint8 RGB [batch,3,{h},{w}]"
    assert (about["height"], about["width"]) == (str(h), str(w))
    assert "bilinear" in about["resize"] and f"{w} x {h}" in about["resize"] and "INTER_LINEAR" in about["resize"]
    assert about["score_shown"] == "0.3"
    told = json.loads(about["outputs"])
    assert list(told) == ["boxes", "scores", "labels", "counts", *["landmarks"]*(model.classes == ("face",))]
    assert "[batch,100,4]" in told["boxes"]
    assert float(about["score_threshold"]) == (.02 if model.classes == ("face",) else .01) and about["most"] == "100"


def test_onnx_needs_no_operator_of_its_own(made):
    import onnx
    _, path, _ = made
    if path.suffix != ".onnx": return
    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    assert {n.domain for n in graph.graph.node} <= {""} and not graph.functions
    assert [n.op_type for n in graph.graph.node].count("NonMaxSuppression") == 1


def test_suppression_is_that_of_the_detectors():
    "One class and picture never takes a box from another, and wild boxes blur nothing."
    g = torch.Generator().manual_seed(2)
    boxes = torch.rand(3, 200, 4, generator=g)*40
    boxes[..., 2:] += boxes[..., :2]
    boxes[0, 0] = 1e9
    scores = torch.rand(3, 2, 200, generator=g)*(torch.rand(3, 2, 200, generator=g) > .3)
    left = survivors(boxes, scores, .4)
    for i in range(3):
        for c in range(2):
            there = scores[i, c].nonzero()[:, 0]
            kept = there[suppress(boxes[i, there], scores[i, c, there], torch.zeros_like(there), .4, inclusive=False)]
            assert left[i, c].nonzero()[:, 0].tolist() == kept.tolist()
    assert not survivors(boxes, torch.zeros(3, 2, 200), .4).any()


def test_a_picture_without_anything_and_few_anchors(tmp_path):
    model = ssd_of_three()
    images = torch.zeros(2, 3, 64, 96, dtype=torch.uint8)
    model.selection = {**model.selection, "score_thresh": .99}
    with torch.no_grad(): boxes, scores, labels, counts = Deployed(model)(images)
    assert counts.tolist() == [0, 0] and not boxes.any() and not scores.any() and not labels.any()
    with torch.no_grad(): found = Deployed(ssd_of_three(), most=100_000)(images)
    assert found[0].shape == (2, 100_000, 4) and 0 < found[3][0] < 10_000


def test_a_file_that_finds_other_boxes_is_not_handed_over(tmp_path):
    model = ssd_of_three()
    export(model, "torch.export", tmp_path/"a.pt2", pictures=[scene(0)[0]])
    with torch.no_grad(): model.heads[0].bias += .1
    line = refused(compared, model, tmp_path/"a.pt2", [scene(0)[0]])
    assert "boxes are not those of the detector; the file is not to be used" in line


def test_what_cannot_be_exported_is_one_line(tmp_path, monkeypatch):
    model = ssd_of_three()
    for args, told in (((detector("ssdlite320"), "onnx", tmp_path/"a.onnx"),
                        "cannot be exported here; expected detector ssd or retinaface"),
                       ((detector("retinaface", image_size="original"), "onnx", tmp_path/"a.onnx"),
                        "sizes pictures by rule (original); say at which size the file takes them: image_size=640"),
                       ((model, "torchscript", tmp_path/"a.pt"),
                        "kind of export 'torchscript' is unknown; choose from onnx, torch.export"),
                       ((model, "onnx", tmp_path/"a.pt2"), "choose a name that ends in .onnx"),
                       ((model, "onnx"), "path is missing"),
                       (("ssd", "onnx", tmp_path/"a.onnx"), "has learned nothing")):
        assert told in refused(export, *args)
    assert "score=-1" in refused(export, model, "onnx", tmp_path/"a.onnx", score=-1)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "pip install 'synthdet[onnx]'" in refused(export, model, "onnx", tmp_path/"a.onnx")
    assert not list(tmp_path.iterdir())


README = (Path(__file__).parents[1]/"README.md").read_text()
LINES = next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "onnxruntime" in b)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_the_lines_of_the_readme_find_what_detect_finds(made, tmp_path, monkeypatch, suffix):
    "They know ONNX Runtime and OpenCV alone, and pictures of any size."
    model, path, _ = made
    if path.suffix != ".onnx": return
    monkeypatch.chdir(tmp_path)
    picture = write_image(tmp_path/f"photos/a{suffix}", sized(scene(3)[0], (333, 217)))
    here = {}
    exec(LINES.replace("birds.onnx", str(path)).replace("photos/a.jpg", str(picture)), here)
    (wanted,) = detect(model, picture, .3)
    assert not {m.split(".")[0] for m in re.findall(r"import (.*)", LINES)[0].split(", ")} & {"synthdet", "torch"}
    n = min(len(wanted["names"]), 100)                                              # more a file does not give
    assert [name for name, *_ in here["found"]] == wanted["names"][:n] and n > 3
    assert [score for _, score, _ in here["found"]] == pytest.approx(wanted["scores"][:n].tolist(), abs=1e-4)
    boxes = torch.tensor(np.array([box for *_, box in here["found"]])).float()
    apart = (boxes[:, None] - wanted["boxes"][None]).abs().amax(2).amin(1)          # equal scores come in any order
    assert apart.max() < .05, "in pixels of the picture"


def test_a_wrong_name_is_said_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    (tmp_path/"file").write_text("no folder")
    file = tmp_path/"it.safetensors"
    monkeypatch.setitem(sys.modules, "synthdet.detection.export", None)                    # not even imported
    for argv, told in (((file, "onnx", "--output", tmp_path/"a.pt2"), "--output "),
                       ((file, "onnx", "--output", tmp_path/"file"/"a.onnx"), "cannot write below "),
                       ((file, "tflite"), "kind of export 'tflite' is unknown"), (("onnx", file), "onnx and ")):
        with pytest.raises(SystemExit) as e: cli.export([str(a) for a in argv])
        err = capsys.readouterr().err
        assert e.value.code == 2 and told in err and err.count("\n") == 1, err


ALONE = """
import sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
boxes, _, _, counts = session.run(None, {"images": numpy.zeros((3, 3, 64, 64), numpy.uint8)})
print(boxes.shape, counts.shape, "torch" in sys.modules, "synthdet" in sys.modules)
"""


@pytest.mark.slow
def test_the_command_and_a_process_that_knows_onnxruntime_alone(tmp_path, capsys):
    torch.manual_seed(0)
    settings = Model(image_size=64)
    file = save_detector(detector(settings), tmp_path/"it.safetensors", settings=settings, classes=["a"])
    cli.export([str(file), "onnx", "--score", ".2"])
    out = capsys.readouterr().out
    assert str(tmp_path/"it.onnx") in out and "images/s" in out and "on 50 pictures" in out
    done = subprocess.run([sys.executable, "-c", ALONE, tmp_path/"it.onnx"], capture_output=True, text=True,
                          timeout=100, cwd=tmp_path)
    assert done.stdout == "(3, 100, 4) (3,) False False\n", done.stderr
    with pytest.raises(SystemExit): cli.export([str(file), "tflite"])
    told = "error: kind of export 'tflite' is unknown; choose from onnx, torch.export"
    assert capsys.readouterr().err.startswith(told)
