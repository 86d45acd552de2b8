"RetinaFace in experiments: arms by name, and the notebook of Table V on a drawn set."
import math
import re

import pytest
from torchvision.ops import box_convert

from synthdet.core import UserError
from synthdet.files import read_jsonl
from synthdet.data.domains import load_domain, write_domain
from synthdet.data.fixtures import make_fixture
from synthdet.detection.detectors import detector
from synthdet.detection.settings import check_model, OWN
from synthdet.evidence.arm import make_arms, resolved
from synthdet.evidence.experiments import experiment_notebook
from synthdet.evidence.execute import run_notebook
from synthdet.evidence.phases import run
from test_widerface import save_truth


@pytest.mark.parametrize("protocol", ["paper", "released"])
def test_a_detector_with_a_backbone_of_its_own_runs_under_a_protocol(protocol):
    arm, = make_arms("pretrain", domain="wider", protocol=protocol, detector="retinaface", **{"model.weights": "none"})
    assert check_model(resolved(arm).model).backbone == OWN


@pytest.mark.slow
def test_retinaface_in_arms(tmp_path):
    butterflies = load_domain("butterflies", n_class_images=12, n_backgrounds=4)
    root = write_domain(butterflies, tmp_path/"butterflies", n_labelled=6)
    common = ("detector=retinaface model.image_size=64 batch_size=2 steps=3 pretrain_steps=2 eval_every=2 n_real=4 "
              "lr=1e-3")
    recipe = f"{common} optimizer=sgd decay=.5 augment=retinaface test_size=long320"
    place = dict(domain="folder", root=str(root))
    arms = *make_arms("scratch,pretrain", common, **place), *make_arms("scratch", recipe, **place)
    rows = [run(a, tmp_path/"out") for a in arms]
    assert len({r["id"] for r in rows}) == 3 and all(0 <= r["ap50"] <= 1 for r in rows)
    loaded = detector(tmp_path/"out"/rows[2]["weights_file"])
    assert loaded.size == "long320" and loaded.note["row"] == rows[2]["id"]


@pytest.mark.slow
def test_table_v_on_a_drawn_set(tmp_path):
    home = make_fixture("wider", tmp_path/"data")
    test = load_domain("wider", home).test
    boxes, faces = lambda i: box_convert(test.targets[i]["boxes"], "xyxy", "xywh").tolist(), {}
    for i, f in enumerate(test.files): faces.setdefault(f.parent.name, {})[f.stem] = boxes(i)
    (tmp_path/"truth").mkdir()
    first = lambda share: {e: {n: list(range(1, 1 + math.ceil(share*len(b)))) for n, b in images.items()}
                           for e, images in faces.items()}
    save_truth(tmp_path/"truth", faces, dict(easy=first(.3), medium=first(.6), hard=first(1)))
    values = dict(root=str(home), ground_truth=str(tmp_path/"truth"), n_real="2,0", epochs=2,
                  more="model.image_size=64 batch_size=2 pretrain_steps=2", out=str(tmp_path/"out"))
    for _ in range(2): run_notebook(experiment_notebook("wider"), tmp_path/"wider.ipynb", values)
    rows = read_jsonl(tmp_path/"out"/"results.jsonl")
    assert len(rows) == len({r["id"] for r in rows}) == 4, "the second call added nothing"
    seen = {(r["arm"], r["settings"]["labels"]["n_real"], r["settings"]["steps"]) for r in rows}
    assert seen == {(a, n, s) for a in ("scratch", "pretrain") for n, s in ((2, 2), (0, 12))}
    for r in rows:
        of = r["settings"]
        assert of["model"]["test_size"] == "original" and of["schedule"]["decay"] == [.76, .88]
        assert r["best_step"] == of["steps"], "the last step is tested"
    shown = re.findall("easy': ([0-9.]+), 'medium': ([0-9.]+), 'hard': ([0-9.]+)", (tmp_path/"wider.ipynb").read_text())
    assert len(shown) == 4 and all(0 <= float(score) <= 100 for run in shown for score in run)
    assert (tmp_path/"out"/"figures"/"detections.png").exists()
    phases = [read_jsonl(p) for p in (tmp_path/"out"/"artefacts").glob("*/metrics.jsonl")]
    assert sorted(len(p) for p in phases) == [2, 2, 2, 12, 12]
    silent = [p for p in phases if all(r["landmarks"] == 0 for r in p)]
    assert len(silent) == 1, "landmarks are learned from WIDER FACE, not from synthesised faces"
    elsewhere = {**values, "ground_truth": str(tmp_path)}
    with pytest.raises(UserError, match="wider_face_val.mat: no such file"):
        run_notebook(experiment_notebook("wider"), tmp_path/"b.ipynb", elsewhere)
