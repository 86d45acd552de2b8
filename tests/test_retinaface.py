"RetinaFace against plain loops written from its description, its released files, and its use by name."
import json
import math

import numpy as np
import pytest
import torch
from torchvision.ops import box_convert, box_iou

from synthdet.boxes import resize_boxes
from synthdet.core import generator, read_jsonl, shared, UserError
from synthdet.detection.detectors import detector
from synthdet.data.domains import load_domain, write_domain
from synthdet.detection.evaluate import average_precision, predict
from synthdet.evidence.arm import Arm, make_arms
from synthdet.evidence.notebooks import experiment_notebook, run_notebook
from synthdet.evidence.phases import fit, phase_names, run
from synthdet.data.facecrops import crop, FaceCrops, find_crop, mirror, recolour, SCALES
from synthdet.data.fixtures import make_fixture
from synthdet.detection.retinaface import (
    ANCHORS, decode_points, encode_points, face_losses, load_retinaface, match_faces, priors, retinaface, SIZES)
from synthdet.detection.train import train
from test_widerface import save_truth


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return retinaface()


def targets_of(seed, n_images, size=(160, 128), most=6):
    "Random faces with and without landmarks: large and tiny ones, equal ones, pictures without any."
    g, (h, w), out = torch.Generator().manual_seed(seed), size, []
    for k in range(n_images):
        n = 0 if k == 1 else int(torch.randint(1, most + 1, (1,), generator=g))
        wh = (torch.rand(n, 2, generator=g) * .7 + .15) * torch.tensor([w, h])
        xy = torch.rand(n, 2, generator=g) * (torch.tensor([w, h]) - wh)
        boxes = torch.cat([xy, xy + wh], 1)
        if n > 2: boxes[2] = boxes[0]               # two equal faces
        if k == 2: boxes[:, 2:] = boxes[:, :2] + 2. # a picture of tiny faces only: no positives
        out.append(dict(boxes=boxes, labels=torch.ones(n, dtype=torch.int64), landmarks=torch.rand(n, 5, 2, generator=g) * torch.tensor([w, h]), landmarks_valid=torch.arange(n) % 3 != 1))
    return out


def loop_priors(h, w, sides=((16, 32), (64, 128), (256, 512))):
    out = []
    for step, pair in zip((8, 16, 32), sides):
        for i in range(math.ceil(h/step)):
            for j in range(math.ceil(w/step)):
                for s in pair: out.append([(j + .5)*step/w, (i + .5)*step/h, s/w, s/h])
    return out


def loop_match(ious, *, all_claim=True, reach=.2, high=.35, later=True):
    "One image, ious[face][anchor]; -1 for background. The options break one rule each."
    if not ious: return []
    N, M = len(ious[0]), len(ious)
    best = [max(range(N), key=lambda n: ious[m][n]) for m in range(M)]
    passing = [m for m in range(M) if ious[m][best[m]] >= reach]
    if not passing: return [-1]*N
    face = [max(range(M), key=lambda m: ious[m][n]) for n in range(N)]
    overlap = [ious[face[n]][n] for n in range(N)]
    for m in passing: overlap[best[m]] = 2
    for m in range(M) if later else reversed(range(M)):
        if all_claim or m in passing: face[best[m]] = m
    return [face[n] if overlap[n] >= high else -1 for n in range(N)]


def smooth(d): return .5*d*d if abs(d) < 1 else abs(d) - .5


def loop_losses(offsets, logits, points, targets, size, ratio=7, **rules):
    "The reference's three losses, one number at a time."
    (h, w), anchors = size, loop_priors(*size)
    corners = box_convert(torch.tensor(anchors), "cxcywh", "xyxy")
    box = points_loss = classes = n_box = n_points = 0
    for o, l, p, t in zip(offsets.tolist(), logits.tolist(), points.tolist(), targets):
        boxes = t["boxes"] / torch.tensor([w, h, w, h])
        found = loop_match(box_iou(boxes, corners).tolist(), **rules) if len(boxes) else [-1]*len(anchors)
        ce = [math.log(sum(math.exp(x - max(v)) for x in v)) + max(v) - v[int(m >= 0)] for v, m in zip(l, found)]
        positives = [n for n, m in enumerate(found) if m >= 0]
        hard = sorted((n for n in range(len(found))), key=lambda n: -(0 if found[n] >= 0 else ce[n]))[:min(ratio*len(positives), len(found) - 1)]
        classes += sum(ce[n] for n in {*positives, *hard})
        for n in positives:
            (x1, y1, x2, y2), (cx, cy, aw, ah) = boxes[found[n]].tolist(), anchors[n]
            goal = ((x1+x2)/2 - cx)/(.1*aw), ((y1+y2)/2 - cy)/(.1*ah), math.log((x2-x1)/aw)/.2, math.log((y2-y1)/ah)/.2
            box += sum(smooth(a - b) for a, b in zip(o[n], goal)); n_box += 1
            if not t["landmarks_valid"][found[n]]: continue
            n_points += 1
            for k, (x, y) in enumerate(t["landmarks"][found[n]].tolist()): points_loss += smooth(p[n][2*k] - (x/w - cx)/(.1*aw)) + smooth(p[n][2*k+1] - (y/h - cy)/(.1*ah))
    return dict(bbox_regression=2*box/max(n_box, 1), classification=classes/max(n_box, 1), landmarks=points_loss/max(n_points, 1))


@pytest.mark.parametrize("size", [(64, 64), (33, 70), (160, 128)])
@pytest.mark.parametrize("anchors", ANCHORS)
def test_priors(size, anchors):
    torch.testing.assert_close(priors(*size, anchors), torch.tensor(loop_priors(*size, ANCHORS[anchors])))


def random_ious(seed, M, N=60):
    iou = torch.rand(M, N, generator=torch.Generator().manual_seed(seed))**4
    return (iou * 20).round() / 20 * torch.rand(M, 1, generator=torch.Generator().manual_seed(seed + 1)) # ties, and faces out of reach


def test_matching_is_the_loops():
    differs = dict.fromkeys(("all_claim", "reach", "high", "later"), 0)
    for seed in range(40):
        ious = [random_ious(seed, M) * (.25 if seed % 5 == 0 else 1) for M in (1, 4, 9)]
        padded, present = torch.stack([torch.cat([i, torch.zeros(9 - len(i), 60)]) for i in ious]), torch.tensor([[m < len(i) for m in range(9)] for i in ious])
        found = match_faces(padded, present).tolist()
        assert found == [loop_match(i.tolist()) for i in ious]
        for rule, other in dict(all_claim=False, reach=.15, high=.4, later=False).items(): differs[rule] += found != [loop_match(i.tolist(), **{rule: other}) for i in ious]
    assert min(differs.values()) >= 3, "each rule decides some of these cases"


@pytest.mark.parametrize("seed", range(4))
def test_losses_are_the_loops(seed):
    size, targets, g = (160, 128), targets_of(seed, 4), torch.Generator().manual_seed(seed)
    N = len(priors(*size))
    offsets, logits, points = (torch.randn(4, N, n, generator=g) for n in (4, 2, 10))
    torch.manual_seed(0)
    model = retinaface(image_size=size).train()
    model.raw = lambda x: (offsets, logits, points)
    ours, known = model([torch.rand(3, *size)]*4, targets), loop_losses(offsets, logits, points, targets, size)
    assert ours.keys() == known.keys() and all(abs(ours[k].item() - known[k]) < 1e-4 * max(1, known[k]) for k in ours), (ours, known)
    assert known["landmarks"] > 0 and abs(loop_losses(offsets, logits, points, targets, size, ratio=3)["classification"] - known["classification"]) > .01


def test_an_image_without_faces_costs_nothing(model):
    empty = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    losses = model.train()([torch.rand(3, 64, 64)]*2, [empty]*2)
    assert all(v == 0 for v in losses.values())
    sum(losses.values()).backward()


def test_offsets_there_and_back():
    g, anchors = torch.Generator().manual_seed(0), priors(96, 64)
    points = torch.rand(len(anchors), 5, 2, generator=g)
    torch.testing.assert_close(decode_points(encode_points(points, anchors), anchors), points, atol=1e-5, rtol=0)
    x, y = points[7, 3].tolist(); cx, cy, w, h = anchors[7].tolist()
    torch.testing.assert_close(encode_points(points, anchors)[7, 6:8], torch.tensor([(x - cx)/w/.1, (y - cy)/h/.1]))


def loop_nms(boxes, scores, thresh):
    "Suppression that counts pixels, in plain numbers."
    order, keep = sorted(range(len(scores)), key=lambda i: -scores[i]), []
    for i in order:
        a = boxes[i]
        for j in keep:
            b = boxes[j]
            w, h = min(a[2], b[2]) - max(a[0], b[0]) + 1, min(a[3], b[3]) - max(a[1], b[1]) + 1
            both = max(w, 0)*max(h, 0)
            if both / ((a[2]-a[0]+1)*(a[3]-a[1]+1) + (b[2]-b[0]+1)*(b[3]-b[1]+1) - both) > thresh: break
        else: keep.append(i)
    return keep


@pytest.mark.parametrize("size", ["original", "long320", 96])
def test_detections_are_decoded_and_suppressed_as_described(size):
    model, g, seen = retinaface(image_size=size, score_thresh=.4).eval(), torch.Generator().manual_seed(1), []
    image, (h, w) = torch.rand(3, 70, 120, generator=g), (96, 96) if size == 96 else SIZES[size](70, 120)
    raw = [torch.randn(1, len(priors(h, w)), n, generator=g) * k for n, k in ((4, 2), (2, 0), (10, 1))]
    raw[1][0, :, 1] = torch.randperm(raw[1].shape[1], generator=g) / raw[1].shape[1] * 4 - 2 # no two scores alike
    model.raw = lambda x: seen.append(x) or [r.expand(len(x), -1, -1) for r in raw]
    found = model([image, image])
    x = torch.nn.functional.interpolate(image[None], (h, w), mode="bilinear", align_corners=False)
    torch.testing.assert_close(seen[0], torch.cat([x[:, [2, 1, 0]]*255 - torch.tensor([104., 117, 123]).view(3, 1, 1)]*2)) # BGR, mean subtracted
    offsets, logits, points = (r[0].tolist() for r in raw)
    boxes, scores, marks = [], [], []
    for (cx, cy, aw, ah), o, l, p in zip(loop_priors(h, w), offsets, logits, points):
        score = 1 / (1 + math.exp(l[0] - l[1]))
        if score <= .4: continue
        x, y, bw, bh = cx + .1*o[0]*aw, cy + .1*o[1]*ah, aw*math.exp(.2*o[2]), ah*math.exp(.2*o[3])
        boxes.append([(x - bw/2)*120, (y - bh/2)*70, (x + bw/2)*120, (y + bh/2)*70]); scores.append(score)
        marks.append([[(cx + .1*p[2*k]*aw)*120, (cy + .1*p[2*k+1]*ah)*70] for k in range(5)])
    keep = loop_nms(boxes, scores, .4)
    assert 3 < len(keep) < len(boxes) and len(found) == 2
    for d in found:
        torch.testing.assert_close(d["boxes"], torch.tensor([boxes[i] for i in keep]), atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(d["scores"], torch.tensor([scores[i] for i in keep]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(d["landmarks"], torch.tensor([marks[i] for i in keep]), atol=1e-3, rtol=1e-4)
        assert d["labels"].tolist() == [1]*len(keep)


def test_a_batch_is_its_images(model):
    images = [torch.rand(3, 64, 96), torch.rand(3, 64, 96), torch.rand(3, 80, 50)]
    model.eval()
    with torch.inference_mode():
        together = model.raw(model.prepare(torch.stack(images[:2]), (64, 96)))
        for k in range(2):
            for a, b in zip(together, model.raw(model.prepare(images[k][None], (64, 96)))): torch.testing.assert_close(a[k], b[0], atol=1e-4, rtol=1e-4)
        for i, d in zip(images, model(images)): # of several sizes: one at a time
            assert all(torch.equal(d[k], v) for k, v in model([i])[0].items())
        assert [len(d["boxes"]) > 0 for d in model(images[:2])] == [True, True]


def test_landmarks_off(model):
    targets, images = targets_of(0, 2, (64, 64)), [torch.rand(3, 64, 64)]*2
    bare = [{k: t[k] for k in ("boxes", "labels")} for t in targets]
    unmarked = [dict(t, landmarks_valid=torch.zeros(len(t["labels"]), dtype=torch.bool)) for t in targets]
    for on, seen in ((False, targets), (True, bare), (True, unmarked)):
        net = retinaface(landmarks=on).train()
        losses = net(images, seen); sum(losses.values()).backward()
        assert losses["landmarks"].item() == 0 and losses["bbox_regression"] > 0
        assert all(p.grad is None for p in net.LandmarkHead.parameters()) and net.BboxHead[0].conv1x1.weight.grad.abs().sum() > 0
    net = retinaface().train()
    sum(net(images, targets).values()).backward()
    assert net.LandmarkHead[0].conv1x1.weight.grad.abs().sum() > 0
    assert "landmarks" not in retinaface(landmarks=False).eval()([torch.rand(3, 64, 64)])[0]


def test_pretraining_leaves_the_landmark_head_as_it_was(tmp_path):
    def batches(start):
        for step in range(start, 9): yield torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), [{k: t[k] for k in ("boxes", "labels")} for t in targets_of(step, 1, (64, 64))]*2
    net = retinaface()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    train(net, batches, 3, tmp_path, optimizer="sgd", lr=1e-2)
    for k, v in net.state_dict().items():
        if "Landmark" in k: assert torch.equal(v, before[k])
    assert not torch.equal(net.BboxHead[0].conv1x1.weight, before["BboxHead.0.conv1x1.weight"])


def test_files_of_all_kinds(model, tmp_path):
    state = {k: v for k, v in model.state_dict().items()}
    torch.save(state, tmp_path/"bare.pth")
    torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path/"prefixed.pth")
    torch.save(dict(epoch=3, state_dict={f"module.{k}": v for k, v in state.items()}), tmp_path/"wrapped.tar")
    body = {f"module.{k}": v + 1 for k, v in model.body.state_dict().items()}
    torch.save(dict(state_dict={**body, "module.fc.weight": torch.zeros(1000, 256), "module.fc.bias": torch.zeros(1000)}), tmp_path/"classifier.tar")
    for name in ("bare.pth", "prefixed.pth", "wrapped.tar"):
        assert all(torch.equal(v, state[k]) for k, v in load_retinaface(tmp_path/name).state_dict().items())
    started = retinaface(tmp_path/"classifier.tar")
    assert all(torch.equal(v, body[f"module.{k}"]) for k, v in started.body.state_dict().items())
    with pytest.raises(UserError, match="holds only a backbone"): load_retinaface(tmp_path/"classifier.tar")
    torch.save({**{k: v for k, v in state.items() if k != "fpn.output1.0.weight"}, "extra": torch.zeros(1)}, tmp_path/"odd.pth")
    with pytest.raises(UserError, match=r"'fpn.output1.0.weight' is missing and 'extra' is unexpected \(1 and 1"): load_retinaface(tmp_path/"odd.pth")
    torch.save({**state, "extra": torch.zeros(1)}, tmp_path/"odd.pth")
    with pytest.raises(UserError, match="'extra' is unexpected"): load_retinaface(tmp_path/"odd.pth")
    torch.save({**state, "ClassHead.0.conv1x1.bias": torch.zeros(2)}, tmp_path/"odd.pth")
    with pytest.raises(UserError, match=r"'ClassHead.0.conv1x1.bias' is \[2\], expected \[4\]"): load_retinaface(tmp_path/"odd.pth")
    with pytest.raises(UserError, match="does not exist"): load_retinaface(tmp_path/"nowhere.pth")


@pytest.mark.skipif(not shared(), reason="needs the reference folder beside the project")
def test_names_and_shapes_of_released_files(model):
    read = lambda name: json.loads((shared()/"spec"/"keys"/name).read_text())
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == read("retinaface_mnet025.json")
    backbone = {k.removeprefix("module."): v for k, v in read("mobilenetV1X0.25_pretrain.json").items() if ".fc." not in k}
    assert {k: list(v.shape) for k, v in model.body.state_dict().items()} == backbone


@pytest.mark.skipif(not shared(), reason="needs the reference folder beside the project")
def test_known_average_precision():
    trained = load_retinaface(shared()/"weights"/"retinaface_mobilenet0.25_wider.pth")
    photos = load_domain("folder", shared()/"data"/"faces").test
    assert abs(average_precision(predict(trained, photos, 1), [photos[i][1] for i in range(len(photos))]) - .413) < .01


def test_what_cannot_be(model):
    box = dict(boxes=torch.tensor([[1., 2, 30, 40]]), labels=torch.tensor([1]))
    image = torch.rand(3, 64, 64)
    for f, says in ((lambda: retinaface(image_size=16), "image_size=16 is not possible"), (lambda: retinaface(image_size="big"), "image_size 'big' is unknown; choose from original, "),
                    (lambda: retinaface(anchors="tiny"), "anchors 'tiny' is unknown"), (lambda: retinaface(num_classes=3), "num_classes=3 is not possible"), (lambda: retinaface("imagenet"), "no ImageNet weights"),
                    (lambda: detector("retinaface", backbone="resnet50"), "backbone 'resnet50' cannot be chosen for retinaface"),
                    (lambda: model.eval()([torch.rand(3, 31, 90)]), "an image of 90 x 31 pixels is smaller"), (lambda: retinaface(image_size="long320").eval()([torch.rand(3, 40, 900)]), "an image of 320 x 14 pixels is smaller"),
                    (lambda: model.eval()([torch.zeros(3, 64, 64, dtype=torch.uint8)]), "expected float in 0..1"), (lambda: model.train()([image]), "needs targets"),
                    (lambda: model.train()([image], [dict(box, labels=torch.tensor([2]))]), "labels must all be 1"), (lambda: model.train()([image, torch.rand(3, 64, 96)], [box, box]), "images of 2 sizes"),
                    (lambda: Arm(test_size="original"), "test_size='original' is for detector 'retinaface'"), (lambda: Arm(detector="retinaface", test_size="big"), "test_size 'big' is unknown"),
                    (lambda: Arm(decay=(95.,)), "decay=(95.0,) should be shares"), (lambda: Arm(optimizer="lion"), "optimizer 'lion' is unknown"), (lambda: Arm(augment="flip"), "augment 'flip' is unknown")):
        with pytest.raises(UserError) as e: f()
        assert says in str(e.value) and "\n" not in str(e.value)


def test_crops_hold_whole_faces_and_centres():
    boxes = np.array([[10, 10, 30, 40], [60, 20, 64, 25], [70, 70, 99, 99]], np.float32)
    seen = set()
    for k in range(300):
        found = find_crop(boxes, (120, 100), generator(0, k))
        x, y, side = found
        seen.add(side)
        assert 0 <= x and 0 <= y and x + side <= 100 and y + side <= 120
        assert any(x <= a and y <= b and c <= x + side and d <= y + side for a, b, c, d in boxes)
        target = dict(boxes=boxes, labels=np.ones(3), landmarks=np.repeat(boxes.reshape(3, 2, 2), [3, 2], axis=1))
        image, t = crop(np.zeros((120, 100, 3), np.uint8), target, generator(0, k))
        inside = [b for b in boxes if x < (b[0] + b[2])/2 < x + side and y < (b[1] + b[3])/2 < y + side]
        assert image.shape == (side, side, 3) and len(t["labels"]) == len(inside)
        assert np.allclose(t["boxes"], [[*np.clip([b[0] - x, b[1] - y, b[2] - x, b[3] - y], 0, side)] for b in inside])
        assert np.allclose(t["landmarks"][:, 0], t["boxes"][:, :2]) and np.allclose(t["landmarks"][:, 4], t["boxes"][:, 2:])
    assert seen == {int(s*100) for s in SCALES}
    assert find_crop(np.array([[0, 0, 100, 101.]]), (120, 100), generator(0)) is None # no square holds it
    image, t = crop(np.zeros((60, 100, 3), np.uint8), dict(boxes=np.array([[0, 0, 100, 60.]]), labels=np.ones(1)), generator(0))
    assert image.shape == (100, 100, 3) and image[59].max() == 0 and (image[60:] == (123, 117, 104)).all() and t["boxes"].tolist() == [[0, 0, 100, 60]]


def test_colours_and_mirror():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    many = [recolour(image, generator(0, k)) for k in range(200)]
    shift = np.array([m.mean() - image.mean() for m in many])
    assert all(m.dtype == np.uint8 and m.shape == image.shape for m in many) and shift.min() < -40 and shift.max() > 40 and len({m.tobytes() for m in many}) > 150
    assert np.array_equal(image, np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)), "the picture itself stays"
    points = np.float32([[[4, 5], [9, 5], [6, 8], [4, 11], [9, 11]]])
    turned, t = mirror(image, dict(boxes=np.float32([[2, 3, 12, 14]]), landmarks=points))
    assert t["boxes"].tolist() == [[18, 3, 28, 14]] and t["landmarks"].tolist() == [[[21, 5], [26, 5], [24, 8], [21, 11], [26, 11]]] and np.array_equal(turned, image[:, ::-1])


def test_samples_follow_from_seed_and_number():
    photos = [(torch.randint(0, 256, (3, 90 + 10*k, 120), dtype=torch.uint8), t) for k, t in enumerate(targets_of(3, 4, (90, 120)))]
    small = [FaceCrops(photos, 64, seed=1, budget_mb=b) for b in (0, 100)] # decoded anew or held
    for i in (11, 2, 7):
        (a, s), (b, t) = small[0][i], small[1][i]
        assert torch.equal(a, b) and a.shape == (3, 64, 64) and s.keys() == t.keys() == {"boxes", "labels", "landmarks", "landmarks_valid", "image_id"}
        assert all(torch.equal(s[k], t[k]) for k in s if k != "image_id") and s["landmarks_valid"].dtype == torch.bool and s["labels"].dtype == torch.int64
    assert len(small[1].held) == len({small[1].loop.index(i) for i in (11, 2, 7)}) and not small[0].held
    assert not torch.equal(FaceCrops(photos, 64, seed=2)[2][0], small[0][2][0])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    butterflies = load_domain("butterflies", n_class_images=12, n_backgrounds=4)
    return write_domain(butterflies, tmp_path_factory.mktemp("domain")/"butterflies", n_labelled=6)


def test_arms_by_name(root, tmp_path):
    common = dict(domain="folder", root=str(root), detector="retinaface", image_size=64, batch_size=2, steps=3, pretrain_steps=2, eval_every=2, n_real=4, lr=1e-3)
    rows = [run(a, tmp_path) for a in (*make_arms("scratch,pretrain", **common), *make_arms("scratch", optimizer="sgd", decay=(.5,), augment="retinaface", test_size="long320", **common))]
    assert len({r["id"] for r in rows}) == 3 and [r["test_size"] for r in rows] == ["", "", "long320"] and rows[2]["optimizer"] == "sgd"
    names = lambda **k: [n for *_, n in phase_names(Arm(**{"detector": "retinaface", **k}), "data")]
    assert names()[0] == names(augment="retinaface")[0] and names()[1] != names(augment="retinaface")[1]    # synthesised images are not augmented by it
    assert all(names()[0] != names(**k)[0] for k in (dict(optimizer="sgd"), dict(decay=(.5,)), dict(test_size="original")))


def test_table_v_on_a_drawn_set(tmp_path):
    home = make_fixture("wider", tmp_path/"data")
    test = load_domain("wider", home).test
    boxes, faces = lambda i: box_convert(test.targets[i]["boxes"], "xyxy", "xywh").tolist(), {}
    for i, f in enumerate(test.files): faces.setdefault(f.parent.name, {})[f.stem] = boxes(i)
    (tmp_path/"truth").mkdir()
    save_truth(tmp_path/"truth", faces, {s: {e: {n: list(range(1, 1 + math.ceil(k*len(b)))) for n, b in images.items()} for e, images in faces.items()} for s, k in zip(("easy", "medium", "hard"), (.3, .6, 1))})
    values = dict(root=str(home), ground_truth=str(tmp_path/"truth"), n_real="2,0", image_size=64, batch_size=2, epochs=2, pretrain_steps=2, out=str(tmp_path/"out"))
    for _ in range(2): run_notebook(experiment_notebook("wider"), tmp_path/"wider.ipynb", values)
    rows = read_jsonl(tmp_path/"out"/"results.jsonl")
    kept = {r["id"]: r for r in rows}
    assert len(rows) == 8 and len(kept) == 4, "the second call added nothing; the scores of WIDER FACE are in the last row of each run"
    assert {(r["arm"], r["n_real"], r["steps"]) for r in kept.values()} == {(a, n, s) for a in ("scratch", "pretrain") for n, s in ((2, 2), (0, 12))}
    assert all(r["test_size"] == "original" and r["decay"] == [.76, .88] and r["best_step"] == r["steps"] and all(0 <= r[s] <= 1 for s in ("easy", "medium", "hard")) for r in kept.values())
    assert (tmp_path/"out"/"figures"/"detections.png").exists()
    phases = [read_jsonl(p) for p in (tmp_path/"out"/"artefacts").glob("*/metrics.jsonl")]
    assert sorted(len(p) for p in phases) == [2, 2, 2, 12, 12] and sum(all(r["landmarks"] == 0 for r in p) for p in phases) == 1, "landmarks are learned from WIDER FACE, not from synthesised faces"
    with pytest.raises(UserError, match="wider_face_val.mat: no such file"): run_notebook(experiment_notebook("wider"), tmp_path/"b.ipynb", {**values, "ground_truth": str(tmp_path)})
