"RetinaFace against plain loops written from its description, and its released files."
import json
import math

import pytest
import torch
from torchvision.ops import box_convert, box_iou

from helpers import needs_shared
from synthdet.core import refused
from synthdet.machine import shared
from synthdet.detection import faceanchors
from synthdet.detection.faceanchors import ANCHORS, decode_points, encode_points, match_faces, priors
from synthdet.detection.retinaface import load_retinaface, retinaface
from synthdet.detection.train import train


pytestmark = pytest.mark.usefixtures('one_thread')


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
        points = torch.rand(n, 5, 2, generator=g) * torch.tensor([w, h])
        out.append(dict(boxes=boxes, labels=torch.ones(n, dtype=torch.int64), landmarks=points,
                        landmarks_valid=torch.arange(n) % 3 != 1))
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
        wrong = sorted(range(len(found)), key=lambda n: -(0 if found[n] >= 0 else ce[n]))
        hard = wrong[:min(ratio*len(positives), len(found) - 1)]
        classes += sum(ce[n] for n in {*positives, *hard})
        for n in positives:
            (x1, y1, x2, y2), (cx, cy, aw, ah) = boxes[found[n]].tolist(), anchors[n]
            place = lambda x, y: [(x - cx)/(.1*aw), (y - cy)/(.1*ah)]
            goal = *place((x1+x2)/2, (y1+y2)/2), math.log((x2-x1)/aw)/.2, math.log((y2-y1)/ah)/.2
            box += sum(smooth(a - b) for a, b in zip(o[n], goal))
            n_box += 1
            if not t["landmarks_valid"][found[n]]: continue
            n_points += 1
            marks = [v for x, y in t["landmarks"][found[n]].tolist() for v in place(x/w, y/h)]
            points_loss += sum(smooth(a - b) for a, b in zip(p[n], marks))
    return dict(bbox_regression=2*box/max(n_box, 1), classification=classes/max(n_box, 1),
                landmarks=points_loss/max(n_points, 1))


@pytest.mark.parametrize("size", [(64, 64), (33, 70), (160, 128)])
@pytest.mark.parametrize("anchors", ANCHORS)
def test_priors(size, anchors):
    torch.testing.assert_close(priors(*size, anchors), torch.tensor(loop_priors(*size, ANCHORS[anchors])))


def random_ious(seed, M, N=60):
    "Overlaps with ties, and with faces out of reach."
    iou = torch.rand(M, N, generator=torch.Generator().manual_seed(seed))**4
    return (iou * 20).round() / 20 * torch.rand(M, 1, generator=torch.Generator().manual_seed(seed + 1))


def test_matching_is_the_loops():
    others = dict(all_claim=False, reach=.15, high=.4, later=False)
    differs = dict.fromkeys(others, 0)
    for seed in range(40):
        ious = [random_ious(seed, M) * (.25 if seed % 5 == 0 else 1) for M in (1, 4, 9)]
        padded = torch.stack([torch.cat([i, torch.zeros(9 - len(i), 60)]) for i in ious])
        present = torch.tensor([[m < len(i) for m in range(9)] for i in ious])
        found = match_faces(padded, present).tolist()
        loops = lambda **rule: [loop_match(i.tolist(), **rule) for i in ious]
        assert found == loops()
        for rule, other in others.items(): differs[rule] += found != loops(**{rule: other})
    assert min(differs.values()) >= 3, "each rule decides some of these cases"


@pytest.mark.parametrize("seed", range(4))
def test_losses_are_the_loops(seed):
    size, targets, g = (160, 128), targets_of(seed, 4), torch.Generator().manual_seed(seed)
    N = len(priors(*size))
    offsets, logits, points = (torch.randn(4, N, n, generator=g) for n in (4, 2, 10))
    torch.manual_seed(0)
    model = retinaface(image_size=size).train()
    model.raw = lambda x: (offsets, logits, points)
    loops = lambda **rules: loop_losses(offsets, logits, points, targets, size, **rules)
    ours, known = model([torch.rand(3, *size)]*4, targets), loops()
    assert {k: v.item() for k, v in ours.items()} == pytest.approx(known, rel=1e-4, abs=1e-4)
    assert known["landmarks"] > 0 and abs(loops(ratio=3)["classification"] - known["classification"]) > .01


def test_an_image_without_faces_costs_nothing(model):
    empty = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    losses = model.train()([torch.rand(3, 64, 64)]*2, [empty]*2)
    assert all(v == 0 for v in losses.values())
    sum(losses.values()).backward()


def test_offsets_there_and_back():
    g, anchors = torch.Generator().manual_seed(0), priors(96, 64)
    points = torch.rand(len(anchors), 5, 2, generator=g)
    torch.testing.assert_close(decode_points(encode_points(points, anchors), anchors), points, atol=1e-5, rtol=0)
    (x, y), (cx, cy, w, h) = points[7, 3].tolist(), anchors[7].tolist()
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
    image, (h, w) = torch.rand(3, 70, 120, generator=g), (96, 96) if size == 96 else getattr(faceanchors, size)(70, 120)
    raw = [torch.randn(1, len(priors(h, w)), n, generator=g) * k for n, k in ((4, 2), (2, 0), (10, 1))]
    raw[1][0, :, 1] = torch.randperm(raw[1].shape[1], generator=g) / raw[1].shape[1] * 4 - 2 # no two scores alike
    model.raw = lambda x: seen.append(x) or [r.expand(len(x), -1, -1) for r in raw]
    found = model([image, image])
    x = torch.nn.functional.interpolate(image[None], (h, w), mode="bilinear", align_corners=False)
    x = x[:, [2, 1, 0]]*255 - torch.tensor([104., 117, 123]).view(3, 1, 1) # BGR, mean subtracted
    torch.testing.assert_close(seen[0], torch.cat([x]*2))
    offsets, logits, points = (r[0].tolist() for r in raw)
    boxes, scores, marks = [], [], []
    for (cx, cy, aw, ah), o, l, p in zip(loop_priors(h, w), offsets, logits, points):
        score = 1 / (1 + math.exp(l[0] - l[1]))
        if score <= .4: continue
        x, y, bw, bh = cx + .1*o[0]*aw, cy + .1*o[1]*ah, aw*math.exp(.2*o[2]), ah*math.exp(.2*o[3])
        boxes.append([(x - bw/2)*120, (y - bh/2)*70, (x + bw/2)*120, (y + bh/2)*70])
        scores.append(score)
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
            alone = model.raw(model.prepare(images[k][None], (64, 96)))
            for a, b in zip(together, alone): torch.testing.assert_close(a[k], b[0], atol=1e-4, rtol=1e-4)
        for i, d in zip(images, model(images)): # of several sizes: one at a time
            assert all(torch.equal(d[k], v) for k, v in model([i])[0].items())
        assert [len(d["boxes"]) > 0 for d in model(images[:2])] == [True, True]


def test_faces_without_landmarks_leave_their_head_alone():
    targets, images = targets_of(0, 2, (64, 64)), [torch.rand(3, 64, 64)]*2
    unmarked = [dict(t, landmarks_valid=torch.zeros(len(t["labels"]), dtype=torch.bool)) for t in targets]
    def learn(seen):
        net = retinaface().train()
        losses = net(images, seen)
        sum(losses.values()).backward()
        assert losses["bbox_regression"] > 0 and net.BboxHead[0].conv1x1.weight.grad.abs().sum() > 0
        return losses["landmarks"].item(), net.LandmarkHead[0].conv1x1.weight.grad
    assert learn(bare(targets)) == (0, None), "no landmarks at all: a weight decay, too, passes the head by"
    loss, gradient = learn(unmarked)
    assert loss == 0 and (gradient == 0).all()
    loss, gradient = learn(targets)
    assert loss > 0 and gradient.abs().sum() > 0


def bare(targets): return [{k: t[k] for k in ("boxes", "labels")} for t in targets]


def test_pretraining_leaves_the_landmark_head_as_it_was(tmp_path):
    def batches(start):
        for step in range(start, 9):
            images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
            yield images, bare(targets_of(step, 1, (64, 64)))*2
    net = retinaface()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    train(net, batches, 3, tmp_path, optimizer="sgd", lr=1e-2)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items() if "Landmark" in k)
    assert not torch.equal(net.BboxHead[0].conv1x1.weight, before["BboxHead.0.conv1x1.weight"])


def test_files_of_all_kinds(model, tmp_path):
    state = model.state_dict()
    torch.save(state, tmp_path/"bare.pth")
    prefixed = {f"module.{k}": v for k, v in state.items()}
    torch.save(prefixed, tmp_path/"prefixed.pth")
    torch.save(dict(epoch=3, state_dict=prefixed), tmp_path/"wrapped.tar")
    for name in ("bare.pth", "prefixed.pth", "wrapped.tar"):
        assert all(torch.equal(v, state[k]) for k, v in load_retinaface(tmp_path/name).state_dict().items())
    body = {f"module.{k}": v + 1 for k, v in model.body.state_dict().items()}
    fc = {"module.fc.weight": torch.zeros(1000, 256), "module.fc.bias": torch.zeros(1000)}
    torch.save(dict(state_dict={**body, **fc}), tmp_path/"classifier.tar")
    started = retinaface(tmp_path/"classifier.tar")
    assert all(torch.equal(v, body[f"module.{k}"]) for k, v in started.body.state_dict().items())
    assert "holds only a backbone" in refused(load_retinaface, tmp_path/"classifier.tar")


@pytest.mark.parametrize("change, says", [
    ({"fpn.output1.0.weight": None, "extra": torch.zeros(1)}, "'fpn.output1.0.weight' is missing (1 missing, 1 unexp"),
    ({"extra": torch.zeros(1)}, "'extra' is unexpected"),
    ({"ClassHead.0.conv1x1.bias": torch.zeros(2)}, "'ClassHead.0.conv1x1.bias' is [2], expected [4]")])
def test_files_that_do_not_fit(model, tmp_path, change, says):
    torch.save({k: v for k, v in {**model.state_dict(), **change}.items() if v is not None}, tmp_path/"odd.pth")
    assert says in refused(load_retinaface, tmp_path/"odd.pth")


@needs_shared
def test_names_and_shapes_of_released_files(model):
    read = lambda name: json.loads((shared()/"spec"/"keys"/name).read_text())
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == read("retinaface_mnet025.json")
    backbone = read("mobilenetV1X0.25_pretrain.json")
    ours = {f"module.{k}": list(v.shape) for k, v in model.body.state_dict().items()}
    assert ours == {k: v for k, v in backbone.items() if ".fc." not in k}


@pytest.mark.parametrize("options, says", [
    (dict(image_size=16), "image_size=16 is not possible"), (dict(anchors="tiny"), "anchors 'tiny' is unknown"),
    (dict(image_size="big"), "image_size 'big' is unknown; choose from original, "),
    (dict(num_classes=3), "num_classes=3 is not possible"), (dict(weights="imagenet"), "no ImageNet weights")])
def test_impossible_arguments(options, says): assert says in refused(retinaface, **options)


def test_wrong_input_is_told(model):
    box, image = dict(boxes=torch.tensor([[1., 2, 30, 40]]), labels=torch.tensor([1])), torch.rand(3, 64, 64)
    assert "an image of 90 x 31 pixels is smaller" in refused(model.eval(), [torch.rand(3, 31, 90)])
    long = retinaface(image_size="long320").eval()
    assert "an image of 320 x 14 pixels is smaller" in refused(long, [torch.rand(3, 40, 900)])
    assert "expected float in 0..1" in refused(model, [torch.zeros(3, 64, 64, dtype=torch.uint8)])
    assert "needs targets" in refused(model.train(), [image])
    assert "labels must all be 1" in refused(model, [image], [dict(box, labels=torch.tensor([2]))])
    assert "images of 2 sizes" in refused(model, [image, torch.rand(3, 64, 96)], [box, box])
