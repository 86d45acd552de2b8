"The protocol of WIDER FACE against a port of it in plain loops, on drawn detections and on the known scores."
import tarfile
import warnings

import numpy as np
import pytest
import torch
from scipy.io import savemat

from synthdet.core import shared, UserError
from synthdet.detection.widerface import read_ground_truth, SETTINGS, wider_ap, wider_curves, wider_name, write_wider


def cells(values):
    "A column of MATLAB cells."
    out = np.empty((len(values), 1), object)
    for i, v in enumerate(values): out[i, 0] = v
    return out


def save_truth(folder, events, counts):
    "Write {event: {name: boxes}} and {setting: {event: {name: numbers of faces}}} as the official files are."
    nest = lambda read: cells([cells([read(e, n) for n in events[e]]) for e in events])
    savemat(folder/"wider_face_val.mat", dict(event_list=cells(list(events)), file_list=nest(lambda e, n: n), face_bbx_list=nest(lambda e, n: np.array(events[e][n]).reshape(-1, 4))))
    for s in SETTINGS: savemat(folder/f"wider_{s}_val.mat", dict(gt_list=nest(lambda e, n: np.array(counts[s][e][n]).reshape(-1, 1))))


def overlap(a, b):
    "IoU of x y w h, sides one pixel longer."
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0]) + 1
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1]) + 1
    return w*h / ((a[2]+1)*(a[3]+1) + (b[2]+1)*(b[3]+1) - w*h) if w > 0 and h > 0 else 0.


def loop_ap(predictions, events, counting, *, strict=False, dropped=True, per_image=False, empty_count=False, fallback=False):
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
                last = max((k for k, r in enumerate(rows) if (r[4] - low) / (high - low) >= 1 - (i+1)/1000), default=None)
                if last is not None: table[i] += state[last]
    recall, precision = [0.], [0.]
    for proposals, found in table:
        recall.append(found / total); precision.append(found / proposals if proposals else 0.)
    recall.append(1.); precision.append(0.)
    for i in range(len(precision) - 2, -1, -1): precision[i] = max(precision[i], precision[i+1])
    return sum((recall[i+1] - recall[i]) * precision[i+1] for i in range(len(recall) - 1))


def drawn(seed, n_events=3, n_images=5):
    "Faces, which of them count, and detections near and far; some pictures are empty, and one overlap is exactly one half."
    g, events, counts, predictions = np.random.default_rng(seed), {}, {s: {} for s in SETTINGS}, {}
    for e in range(n_events):
        event = f"{e}--E{e}"; events[event] = {}
        for s in SETTINGS: counts[s][event] = {}
        for k in range(n_images):
            name, n = f"{e}_E{e}_{k}", int(g.integers(0, 7))
            boxes = [[*map(int, g.integers(0, 80, 2)), *map(int, g.integers(4, 40, 2))] for _ in range(n)]
            if n > 2: boxes[1] = list(boxes[0]) # equal faces: the first has it
            if n > 3: boxes[3][2] = 0           # a face without area
            order = g.permutation(n) + 1
            for s, share in zip(SETTINGS, (.3, .6, .9)): counts[s][event][name] = sorted(order[:round(share*n)].tolist())
            rows = [[*(np.array(b) + g.integers(-6, 7, 4)).clip(0).tolist(), float(g.integers(20, 101))/100] for b in boxes for _ in range(3)] + [[*map(int, g.integers(0, 60, 4)), float(g.integers(2, 60))/100] for _ in range(int(g.integers(0, 6)))]
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
        changed += sum(abs(ours[s] - loop_ap(predictions, events, counts[s], **{broken: broken != "dropped"})) > 1e-4 for s in SETTINGS)
    assert changed >= 3


def test_memory_folder_and_archive_agree(tmp_path):
    events, counts, predictions = drawn(0)
    save_truth(tmp_path, events, counts)
    found = detections(predictions)
    for d in found.values(): d["boxes"], d["scores"] = d["boxes"].float() + .7, d["scores"].float() # cut to whole pixels alike
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
    assert [str(w.message) for w in said] == [f"the detections of {n} images were not sorted by descending score; they were sorted"]
    for s in SETTINGS: assert abs(ours[s] - loop_ap({k: sorted(v, key=lambda r: -r[4]) for k, v in backwards.items()}, events, counts[s])) < 1e-12


def test_nothing_found_and_equal_scores(tmp_path):
    events, counts, predictions = drawn(2)
    save_truth(tmp_path, events, counts)
    assert wider_ap(detections({k: [] for k in predictions}), tmp_path) == dict.fromkeys(SETTINGS, 0.)
    perfect = {f"{e}/{n}": [[*b, .5] for b in boxes if b[2] > 0] for e, images in events.items() for n, boxes in images.items()}
    assert all(.5 < v < 1 for v in wider_ap(detections(perfect), tmp_path).values()) # equal faces and those without area stay unfound
    curve = wider_curves(detections(perfect), tmp_path)["hard"]
    assert (curve.recall == curve.recall[0]).all() and curve.recall[0] > 0


BAD = [("", "is empty or cut short"), ("0_E0_0\n", "is empty or cut short"), ("0_E0_0\n2\n1 2 3 4 .5\n", "announces 2 detections and holds 1"), ("0_E0_0\n1\n1 2 3 .5\n", "not 'x y width height score'"),
       ("0_E0_0\n1\n1 2 x 4 .5\n", "not 'x y width height score'"), ("0_E0_0\n1\n1 2 3 4 1.5\n", "scores lie in 1.5..1.5"), ("0_E0_0\n1\n1 2 3 4 -.1\n", "scores lie in -0.1"),
       ("0_E0_0\n1\nnan 2 3 4 .5\n", "not made of finite numbers"), ("elsewhere\n0\n", "'0--E0/elsewhere' is not an image of the ground truth")]


@pytest.mark.parametrize("text, says", BAD)
def test_bad_prediction_files(tmp_path, text, says):
    events, counts, predictions = drawn(0)
    save_truth(tmp_path, events, counts)
    folder = write_wider(detections(predictions), tmp_path/"out")
    (folder/"0--E0"/"0_E0_0.txt").write_text(text)
    with pytest.raises(UserError, match="0_E0_0.txt") as e: wider_ap(folder, tmp_path)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_missing_predictions(tmp_path):
    events, counts, predictions = drawn(0)
    save_truth(tmp_path, events, counts)
    found = detections(predictions)
    with pytest.raises(UserError, match=r"event folder '1--E1' is missing \(5 of 15"): wider_ap({k: d for k, d in found.items() if k[0] != "1"}, tmp_path)
    with pytest.raises(UserError, match=r"'2--E2/2_E2_4' is missing \(1 of 15"): wider_ap({k: d for k, d in found.items() if k != "2--E2/2_E2_4"}, tmp_path)
    with pytest.raises(UserError, match="'9--X/y' is not an image"): wider_ap({**found, "9--X/y": found["0--E0/0_E0_0"]}, tmp_path)
    with pytest.raises(UserError, match="cannot be read"): wider_ap(tmp_path/"nowhere.tar.gz", tmp_path)
    (tmp_path/"cut.tar.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(UserError, match="cannot be read"): wider_ap(tmp_path/"cut.tar.gz", tmp_path)
    nan = dict(boxes=torch.tensor([[0., 0, float("nan"), 1]]), scores=torch.tensor([.5]))
    for f in (lambda: wider_ap({**found, "0--E0/0_E0_0": nan}, tmp_path), lambda: write_wider({"0--E0/0_E0_0": nan}, tmp_path/"nan")):
        with pytest.raises(UserError, match="0--E0/0_E0_0: a detection is not made of finite numbers"): f()
    assert not (tmp_path/"nan"/"0--E0").exists()


def test_ground_truth_of_another_version(tmp_path):
    events, counts, _ = drawn(0)
    with pytest.raises(UserError, match="wider_face_val.mat: no such file"): read_ground_truth(tmp_path)
    save_truth(tmp_path, events, counts)
    good = (tmp_path/"wider_easy_val.mat").read_bytes()
    savemat(tmp_path/"wider_easy_val.mat", dict(faces=np.zeros(3)))
    with pytest.raises(UserError, match="wider_easy_val.mat: has no 'gt_list'"): read_ground_truth(tmp_path)
    savemat(tmp_path/"wider_easy_val.mat", dict(gt_list=np.zeros(3)))
    with pytest.raises(UserError, match="should be lists of lists"): read_ground_truth(tmp_path)
    (tmp_path/"wider_easy_val.mat").write_bytes(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM" + b"\x89HDF\r\n\x1a\n")
    with pytest.raises(UserError, match="cannot be read as a MATLAB 5 file"): read_ground_truth(tmp_path)
    (tmp_path/"wider_easy_val.mat").write_bytes(good[:300])
    with pytest.raises(UserError, match="cannot be read as a MATLAB 5 file"): read_ground_truth(tmp_path)
    save_truth(tmp_path, events, {**counts, "easy": {e: {n: [99] for n in counts["easy"][e]} for e in counts["easy"]}})
    with pytest.raises(UserError, match="wider_easy_val.mat: does not belong to wider_face_val.mat"): read_ground_truth(tmp_path)


@pytest.mark.skipif(not shared(), reason="needs the reference folder beside the project")
def test_known_scores():
    place = shared()/"eval"/"wider_face"
    scores = wider_ap(place/"predictions_retinaface_mnet025.tar.gz", place/"ground_truth")
    assert all(abs(scores[s] - v) < 1e-9 for s, v in dict(easy=.8978665260, medium=.8732664855, hard=.7594359399).items())
