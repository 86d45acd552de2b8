"The protocol of WIDER FACE against a port of it in plain loops, on drawn detections and on the known scores."
import tarfile
import warnings

import numpy as np
import pytest
import torch
from scipy.io import savemat

from helpers import needs_shared
from synthdet.core import refused
from synthdet.machine import shared
from synthdet.detection.widerface import (
    read_ground_truth, SETTINGS, wider_ap, wider_curves, wider_name, write_wider)


def cells(values):
    "A column of MATLAB cells."
    out = np.empty((len(values), 1), object)
    for i, v in enumerate(values): out[i, 0] = v
    return out


def save_truth(folder, events, counts):
    "Write {event: {name: boxes}} and {setting: {event: {name: numbers of faces}}} as the official files are."
    nest = lambda read: cells([cells([read(e, n) for n in events[e]]) for e in events])
    boxes = nest(lambda e, n: np.array(events[e][n]).reshape(-1, 4))
    faces = dict(event_list=cells(list(events)), file_list=nest(lambda e, n: n), face_bbx_list=boxes)
    savemat(folder/"wider_face_val.mat", faces)
    for s in SETTINGS:
        which = nest(lambda e, n: np.array(counts[s][e][n]).reshape(-1, 1))
        savemat(folder/f"wider_{s}_val.mat", dict(gt_list=which))


def overlap(a, b):
    "IoU of x y w h, sides one pixel longer."
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0]) + 1
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1]) + 1
    return w*h / ((a[2]+1)*(a[3]+1) + (b[2]+1)*(b[3]+1) - w*h) if w > 0 and h > 0 else 0.


def loop_ap(predictions, events, counting, *, strict=False, dropped=True, per_image=False, empty_count=False,
            fallback=False):
    "One setting, one number at a time; the options break one rule each."
    scores = [r[4] for rows in predictions.values() for r in rows]
    low, high = min([1, *scores]), max([0, *scores])
    total, table = 0, np.zeros((1000, 2))
    for event, images in events.items():
        for name, boxes in images.items():
            keep, rows = set(counting[event][name]), predictions[f"{event}/{name}"]
            total += len(keep)
            if not rows or (not boxes and not empty_count): continue
            if per_image: low, high = rows[-1][4], rows[0][4] + 1e-9
            found, state = set(), [] # after each detection: proposals, faces found
            proposals = 0
            for row in rows:
                ious = [overlap(row, b) for b in boxes]
                if fallback: ious = [0 if m in found else v for m, v in enumerate(ious)]
                best = max(range(len(boxes)), key=lambda m: ious[m], default=None)
                hit = best is not None and (ious[best] > .5 if strict else ious[best] >= .5)
                if hit and best + 1 in keep: found.add(best)
                proposals += not (hit and best + 1 not in keep and dropped)
                state.append((proposals, len(found)))
            for i in range(1000):
                stretched = [(r[4] - low) / (high - low) for r in rows]
                last = max((k for k, s in enumerate(stretched) if s >= 1 - (i+1)/1000), default=None)
                if last is not None: table[i] += state[last]
    recall, precision = [0.], [0.]
    for proposals, found in table:
        recall.append(found / total); precision.append(found / proposals if proposals else 0.)
    recall.append(1.); precision.append(0.)
    for i in range(len(precision) - 2, -1, -1): precision[i] = max(precision[i], precision[i+1])
    return sum((recall[i+1] - recall[i]) * precision[i+1] for i in range(len(recall) - 1))


def drawn(seed, n_events=3, n_images=5):
    "Faces, which of them count, and detections near and far; some pictures are empty, one overlap is exactly a half."
    g, events, counts, predictions = np.random.default_rng(seed), {}, {s: {} for s in SETTINGS}, {}
    for e in range(n_events):
        event = f"{e}--E{e}"
        events[event] = {}
        for s in SETTINGS: counts[s][event] = {}
        for k in range(n_images):
            name, n = f"{e}_E{e}_{k}", int(g.integers(0, 7))
            boxes = [[*map(int, g.integers(0, 80, 2)), *map(int, g.integers(4, 40, 2))] for _ in range(n)]
            if n > 2: boxes[1] = list(boxes[0]) # equal faces: the first has it
            if n > 3: boxes[3][2] = 0           # a face without area
            order = g.permutation(n) + 1
            for s, share in zip(SETTINGS, (.3, .6, .9)):
                counts[s][event][name] = sorted(order[:round(share*n)].tolist())
            shifted = lambda b: (np.array(b) + g.integers(-6, 7, 4)).clip(0).tolist()
            rows = [[*shifted(b), float(g.integers(20, 101))/100] for b in boxes for _ in range(3)]
            many = int(g.integers(0, 6))
            rows += [[*map(int, g.integers(0, 60, 4)), float(g.integers(2, 60))/100] for _ in range(many)]
            if n: rows.append([boxes[0][0], boxes[0][1], boxes[0][2], 2*(boxes[0][3]+1) - 1, .5])
            events[event][name], predictions[f"{event}/{name}"] = boxes, sorted(rows, key=lambda r: -r[4])
    return events, counts, predictions


def detections(predictions):
    rows = {k: torch.tensor(v, dtype=torch.float64).reshape(-1, 5) for k, v in predictions.items()}
    return {k: dict(boxes=torch.cat([r[:, :2], r[:, :2] + r[:, 2:4]], 1), scores=r[:, 4]) for k, r in rows.items()}


@pytest.mark.parametrize("seed", range(8))
def test_the_same_numbers_as_plain_loops(tmp_path, seed):
    events, counts, predictions = drawn(seed)
    save_truth(tmp_path, events, counts)
    ours = wider_ap(detections(predictions), tmp_path)
    for s in SETTINGS: assert abs(ours[s] - loop_ap(predictions, events, counts[s])) < 1e-12


@pytest.mark.parametrize("broken", ["strict", "per_image", "empty_count", "fallback", "dropped"])
def test_every_rule_is_seen_by_the_test_above(tmp_path, broken):
    changed = 0
    for seed in range(4):
        events, counts, predictions = drawn(seed)
        save_truth(tmp_path, events, counts)
        ours = wider_ap(detections(predictions), tmp_path)
        rule = {broken: broken != "dropped"}
        changed += sum(abs(ours[s] - loop_ap(predictions, events, counts[s], **rule)) > 1e-4 for s in SETTINGS)
    assert changed >= 3


def test_memory_folder_and_archive_agree(tmp_path):
    events, counts, predictions = drawn(0)
    save_truth(tmp_path, events, counts)
    found = detections(predictions)
    for d in found.values(): d.update(boxes=d["boxes"].float() + .7, scores=d["scores"].float()) # cut to whole pixels
    folder = write_wider(found, tmp_path/"out")
    with tarfile.open(tmp_path/"out.tar.gz", "w:gz") as tar: tar.add(folder, "anything")
    truth = read_ground_truth(tmp_path)
    assert wider_ap(found, tmp_path) == wider_ap(folder, truth) == wider_ap(tmp_path/"out.tar.gz", truth)
    assert (folder/"0--E0"/"0_E0_0.txt").read_text().splitlines()[0] == "0_E0_0"
    assert wider_name("/data/WIDER_val/images/0--E0/0_E0_0.jpg") == "0--E0/0_E0_0"


def test_unsorted_detections_are_sorted_and_said(tmp_path):
    events, counts, predictions = drawn(1)
    save_truth(tmp_path, events, counts)
    backwards = {k: sorted(v, key=lambda r: r[4]) for k, v in predictions.items()}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = wider_ap(detections(backwards), tmp_path)
    n = sum(len({r[4] for r in v}) > 1 for v in predictions.values())
    told = f"the detections of {n} images were not sorted by descending score; they were sorted"
    assert [str(w.message) for w in said] == [told]
    forwards = {k: sorted(v, key=lambda r: -r[4]) for k, v in backwards.items()}
    for s in SETTINGS: assert abs(ours[s] - loop_ap(forwards, events, counts[s])) < 1e-12


def test_nothing_found_and_equal_scores(tmp_path):
    events, counts, predictions = drawn(2)
    save_truth(tmp_path, events, counts)
    assert wider_ap(detections({k: [] for k in predictions}), tmp_path) == dict.fromkeys(SETTINGS, 0.)
    faces = {f"{e}/{n}": boxes for e, images in events.items() for n, boxes in images.items()}
    perfect = {name: [[*b, .5] for b in boxes if b[2] > 0] for name, boxes in faces.items()}
    scores = wider_ap(detections(perfect), tmp_path).values()
    assert all(.5 < v < 1 for v in scores), "equal faces and those without area stay unfound"
    curve = wider_curves(detections(perfect), tmp_path)["hard"]
    assert (curve.recall == curve.recall[0]).all() and curve.recall[0] > 0


@pytest.mark.parametrize("text, says", [
    ("", "is empty or cut short"), ("0_E0_0\n", "is empty or cut short"),
    ("0_E0_0\n2\n1 2 3 4 .5\n", "announces 2 detections and holds 1"),
    ("0_E0_0\n1\n1 2 3 .5\n", "not 'x y width height score'"),
    ("0_E0_0\n1\n1 2 x 4 .5\n", "not 'x y width height score'"),
    ("0_E0_0\n1\n1 2 3 4 1.5\n", "scores lie in 1.5..1.5"), ("0_E0_0\n1\n1 2 3 4 -.1\n", "scores lie in -0.1"),
    ("0_E0_0\n1\nnan 2 3 4 .5\n", "not made of finite numbers"),
    ("elsewhere\n0\n", "'0--E0/elsewhere' is not an image of the ground truth")])
def test_bad_prediction_files(tmp_path, text, says):
    events, counts, predictions = drawn(0)
    save_truth(tmp_path, events, counts)
    folder = write_wider(detections(predictions), tmp_path/"out")
    (folder/"0--E0"/"0_E0_0.txt").write_text(text)
    told = refused(wider_ap, folder, tmp_path)
    assert "0_E0_0.txt" in told and says in told and "\n" not in told


def test_missing_predictions(tmp_path):
    events, counts, predictions = drawn(0)
    save_truth(tmp_path, events, counts)
    found = detections(predictions)
    without = lambda gone: refused(wider_ap, {k: d for k, d in found.items() if not gone(k)}, tmp_path)
    assert "event folder '1--E1' is missing (5 of 15" in without(lambda k: k[0] == "1")
    assert "'2--E2/2_E2_4' is missing (1 of 15" in without(lambda k: k == "2--E2/2_E2_4")
    assert "'9--X/y' is not an image" in refused(wider_ap, {**found, "9--X/y": found["0--E0/0_E0_0"]}, tmp_path)
    assert "cannot be read" in refused(wider_ap, tmp_path/"nowhere.tar.gz", tmp_path)
    (tmp_path/"cut.tar.gz").write_bytes(b"\x1f\x8b broken")
    assert "cannot be read" in refused(wider_ap, tmp_path/"cut.tar.gz", tmp_path)


def test_detections_that_are_not_numbers_are_not_written(tmp_path):
    events, counts, predictions = drawn(0)
    save_truth(tmp_path, events, counts)
    odd = {"0--E0/0_E0_0": dict(boxes=torch.tensor([[0., 0, float("nan"), 1]]), scores=torch.tensor([.5]))}
    says = "0--E0/0_E0_0: a detection is not made of finite numbers"
    assert says in refused(wider_ap, {**detections(predictions), **odd}, tmp_path)
    assert says in refused(write_wider, odd, tmp_path/"nan") and not (tmp_path/"nan"/"0--E0").exists()


def test_ground_truth_of_another_version(tmp_path):
    events, counts, _ = drawn(0)
    told, easy = lambda: refused(read_ground_truth, tmp_path), tmp_path/"wider_easy_val.mat"
    assert "wider_face_val.mat: no such file" in told()
    save_truth(tmp_path, events, counts)
    good = easy.read_bytes()
    savemat(easy, dict(faces=np.zeros(3)))
    assert "wider_easy_val.mat: has no 'gt_list'" in told()
    savemat(easy, dict(gt_list=np.zeros(3)))
    assert "should be lists of lists" in told()
    easy.write_bytes(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM" + b"\x89HDF\r\n\x1a\n")
    assert "cannot be read as a MATLAB 5 file" in told()
    easy.write_bytes(good[:300])
    assert "cannot be read as a MATLAB 5 file" in told()
    wrong = {e: {n: [99] for n in images} for e, images in counts["easy"].items()}
    save_truth(tmp_path, events, {**counts, "easy": wrong})
    assert "wider_easy_val.mat: does not belong to wider_face_val.mat" in told()


@needs_shared
def test_known_scores():
    place = shared()/"eval"/"wider_face"
    scores = wider_ap(place/"predictions_retinaface_mnet025.tar.gz", place/"ground_truth")
    assert scores == pytest.approx(dict(easy=.8978665260, medium=.8732664855, hard=.7594359399), abs=1e-9)
