"The paper's SSD against plain loops written from its description; its backbones."
import math

import pytest
import torch
from safetensors.torch import save_file

from torchvision.ops import box_convert, box_iou

from synthdet.core import refused
from synthdet.machine import shared
from synthdet.detection import backbones
from synthdet.detection.backbones import imagenet_file, make_backbone
from synthdet.detection.settings import BACKBONES
from synthdet.detection.anchors import match, pad_targets
from synthdet.detection.contract import select
from synthdet.detection.ssd import ssd
from synthdet.weights import read_weights


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def small():
    torch.manual_seed(0)
    return ssd('mobilenetv1_025', num_classes=4, image_size=64)


def loop_match(iou):
    "One image, plain lists: greedy pairs, then thresholds; -1 background, -2 ignored."
    M, N = len(iou), len(iou[0])
    iou, rows, columns = [r[:] for r in iou], set(range(M)), set(range(N))
    for _ in range(M):
        pairs = [(iou[m][n], m, n) for m in sorted(rows) for n in sorted(columns)]
        if not pairs: break
        top = max(p[0] for p in pairs)
        _, m, n = next(p for p in pairs if p[0] == top)
        if top < .3: break
        rows.discard(m), columns.discard(n)
        iou[m][n] = 2.
    out = []
    for n in range(N):
        best = max(range(M), key=lambda m: iou[m][n])
        out.append(best if iou[best][n] >= .5 else -1 if iou[best][n] < .3 else -2)
    return out


def loop_loss(logits, offsets, anchors, targets):
    "The authors' classification and localisation loss, one number at a time."
    classification = localisation = positives = 0.
    corners = box_convert(anchors, 'cxcywh', 'xyxy')
    for logit, offset, t, found in zip(logits.tolist(), offsets.tolist(), targets, loop_matches(targets, corners)):
        for n, m in enumerate(found):
            if m == -2: continue
            e = [math.exp(x - max(logit[n])) for x in logit[n]]
            label = int(t['labels'][m]) if m >= 0 else 0
            p = e[label] / sum(e)
            classification -= (1 - p)**2 * math.log(p + 1e-8)
            if m < 0: continue
            positives += 1
            x1, y1, x2, y2 = t['boxes'][m].tolist()
            cx, cy, w, h = anchors[n].tolist()
            centre = ((x1 + x2) / 2 - cx) / w / .1, ((y1 + y2) / 2 - cy) / h / .1
            goal = *centre, math.log((x2 - x1) / w) / .2, math.log((y2 - y1) / h) / .2
            for d in (abs(a - b) for a, b in zip(offset[n], goal)): localisation += .5 * d * d if d < 1 else d - .5
    return classification / max(positives, 1), localisation / max(positives, 1)


def loop_matches(targets, corners):
    "What the loops find for every image of a batch."
    found = lambda boxes: loop_match(box_iou(boxes, corners).tolist()) if len(boxes) else [-1] * len(corners)
    return [found(t['boxes']) for t in targets]


def random_targets(g, n_images, size, classes, most=6):
    out = []
    for _ in range(n_images):
        n = int(torch.randint(0, most + 1, (1,), generator=g))
        wh = torch.rand(n, 2, generator=g) * size * .6 + 1
        xy = torch.rand(n, 2, generator=g) * (size - wh)
        boxes = torch.cat([xy, xy + wh], 1)
        if n > 2: boxes[1] = boxes[0] # two equal boxes compete for the same anchors
        out.append(dict(boxes=boxes, labels=torch.randint(1, classes, (n,), generator=g)))
    return out


def test_matching_equals_the_loops_on_random_overlaps():
    g, seen = torch.Generator().manual_seed(1), set()
    for case in range(300):
        M, N = (int(torch.randint(1, k, (1,), generator=g)) for k in (7, 9))
        iou = torch.rand(4, M, N, generator=g)
        if case % 2: iou = (iou * 8).round() / 8 # full of ties
        if case % 3 == 0: iou = iou * .5         # many boxes are dropped
        want = [loop_match(i.tolist()) for i in iou]
        assert match(iou).tolist() == want
        seen |= {(any(m not in w for m in range(M)), -2 in w, -1 in w) for w in want}
    assert any(dropped for dropped, _, _ in seen) and any(ignored for _, ignored, _ in seen)


def test_matches_and_losses_equal_the_loops_on_boxes(small):
    g = torch.Generator().manual_seed(2)
    corners = box_convert(small.anchors, 'cxcywh', 'xyxy')
    for case in range(12):
        targets = random_targets(g, 4, 64, 4, most=0 if case == 0 else 6)
        boxes, _ = pad_targets(targets)
        iou = box_iou(boxes.flatten(0, 1), corners).view(*boxes.shape[:2], -1)
        assert match(iou).tolist() == loop_matches(targets, corners)
        logits, offsets = torch.randn(4, len(corners), 4, generator=g) * 3, torch.randn(4, len(corners), 4, generator=g)
        got = small.losses(logits, offsets, small.matcher()(torch.zeros(4, 3, 64, 64), targets)[1])
        got, want = (got['classification'], got['bbox_regression']), loop_loss(logits, offsets, small.anchors, targets)
        torch.testing.assert_close(torch.stack(got), torch.tensor(want), rtol=1e-4, atol=1e-4)


def loop_select(boxes, scores, score_thresh, nms_thresh, candidates, detections):
    "Suppression of one image, class by class and box by box; rows of (score, label, box)."
    rows = []
    for c in range(1, scores.shape[1]):
        order = sorted((i for i in range(len(boxes)) if scores[i, c] >= score_thresh), key=lambda i: -scores[i, c])
        order = order[:candidates]
        while order:
            i = order.pop(0)
            rows.append((scores[i, c].item(), c, boxes[i].tolist()))
            iou = box_iou(boxes[i:i+1].double(), boxes[order].double())[0].tolist()
            order = [j for j, o in zip(order, iou) if o < nms_thresh]
    return sorted(rows, key=lambda r: -r[0])[:detections]


@pytest.mark.parametrize('N, candidates, detections', [(30, None, None), (30, 12, 5), (60, None, 3), (8, 4, 20)])
def test_a_batch_is_chosen_from_as_by_loops_over_images_and_classes(N, candidates, detections):
    g = torch.Generator().manual_seed(4)
    for k in range(12):
        xy = torch.randint(-6, 12, (3, N, 2), generator=g).float() # beyond the border, too
        boxes = torch.cat([xy, xy + torch.randint(1, 9, (3, N, 2), generator=g)], -1) # whole: exact halves occur
        scores = torch.rand(3, N, 4, generator=g)
        if k % 2: scores = (8*scores).round()/8 # ties
        scores[1] *= k % 3 # an image without any
        got = select(boxes, scores, .2, .5, candidates, detections)
        assert len(got) == 3
        for d, b, s in zip(got, boxes, scores):
            rows = list(zip(d['scores'].tolist(), d['labels'].tolist(), d['boxes'].tolist()))
            assert rows == loop_select(b, s, .2, .5, candidates, detections)


def test_a_box_out_of_all_bounds_does_not_disturb_another_image():
    near = torch.tensor([[0., 0, 10, 10], [0, 0, 10, 6], [20, 20, 30, 30], [20, 20, 30, 24]])
    wild = torch.tensor([[-3e37, 0, 3e38, 3e38]]).repeat(4, 1)
    scores = torch.tensor([.9, .8, .7, .6])[:, None].expand(-1, 2)
    alone, = select(near[None], scores[None], .1, .5)
    assert all(torch.equal(v, alone[k]) for k, v in select(torch.stack([wild, near]), scores.expand(2, 4, 2), .1,
                                                           .5)[1].items()) and len(alone['boxes']) == 3


def test_batched_equals_single_and_padding_does_not_matter(small):
    g = torch.Generator().manual_seed(5)
    targets = [dict(t, boxes=t['boxes'][:2], labels=t['labels'][:2]) for t in random_targets(g, 5, 64, 4)]
    images = torch.rand(5, 3, 64, 64, generator=g)
    small.eval()
    with torch.inference_mode():
        together, alone = small(list(images)), [small([i])[0] for i in images]
        logits, offsets = small.raw(images)
    for a, b in zip(together, alone): torch.testing.assert_close(a['scores'], b['scores'], atol=1e-5, rtol=1e-4)
    match_all, nothing = small.matcher(), dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    many = dict(boxes=targets[0]['boxes'][:1].repeat(9, 1), labels=torch.ones(9, dtype=torch.int64)) # others are padded
    padded = match_all(torch.cat([images, images[:1]]), [*targets, many])[1]
    for k, v in match_all(images, targets)[1].items():
        if k != 'positives': assert torch.equal(padded[k][:5], v)
    assert match_all(images, [nothing]*5)[1]['positives'] == 0


def test_detections_come_in_the_pixels_of_each_image(small):
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(6))
    resize = lambda x, size, **how: torch.nn.functional.interpolate(x[None], size, **how)[0]
    wide = resize(image, (64, 128), mode='nearest')
    squashed = resize(wide, (64, 64), mode='bilinear', align_corners=False)
    small.eval()
    with torch.inference_mode(): a, b, same = (small([i])[0] for i in (image, wide, squashed))
    assert a['boxes'].shape[1] == b['boxes'].shape[1] == 4 and a['labels'].dtype == torch.int64
    torch.testing.assert_close(b['boxes'], same['boxes'] * torch.tensor([2., 1, 2, 1]), atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize('size, maps', [(300, [(18, 18), (18, 18), (9, 9), (9, 9)]),
                                        ((320, 400), [(20, 25), (20, 25), (10, 12), (10, 12)])])
def test_mobilenet_maps(size, maps):
    model = ssd('mobilenetv1_025', image_size=size)
    assert [s[1:] for s in model.backbone.shapes(*model.size)] == maps
    assert len(model.anchors) == 3 * sum(h * w for h, w in maps) and model.anchors.dtype == torch.float32


def test_the_authors_numbers():
    model = ssd()
    assert model.anchors.shape == (2430, 4)
    count = lambda m: sum(v.numel() for k, v in m.state_dict().items() if not k.endswith('num_batches_tracked'))
    assert (count(model), count(model.heads)) == (3_726_600, 497_736) # with running statistics, as Keras counts
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 27 and {(m.eps, m.momentum) for m in norms} == {(1e-3, .01)}
    resnet = ssd('resnet50')
    assert resnet.anchors.shape == (4149, 4)
    assert [s[1:] for s in resnet.backbone.shapes(320, 400)] == [(20, 25)] * 3 + [(10, 13)] * 3
    assert count(resnet.heads) == 1_493_100


def test_every_backbone_makes_a_detector():
    target = dict(boxes=torch.tensor([[5., 5, 40, 50]]), labels=torch.tensor([1]))
    for name in set(BACKBONES) - {'mobilenetv1_100', 'resnet50'}:
        losses = ssd(name, image_size=64)([torch.rand(3, 64, 64)] * 2, [target] * 2)
        assert all(torch.isfinite(v) for v in losses.values()), name


def test_the_same_seed_gives_the_same_weights():
    a, b, c = (torch.manual_seed(s) and ssd('mobilenetv1_025', image_size=64).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a['heads.0.weight'], c['heads.0.weight'])


def test_a_checkpoint_survives_the_round_trip(small, tmp_path):
    save_file(small.state_dict(), tmp_path/'model.safetensors')
    torch.save(dict(model=small.state_dict()), tmp_path/'model.pth')
    for name in ('model.safetensors', 'model.pth'):
        other = ssd('mobilenetv1_025', tmp_path/name, num_classes=4, image_size=96) # the file fits any size
        assert all(torch.equal(v, small.state_dict()[k]) for k, v in other.state_dict().items())
    body = {k: v for k, v in small.backbone.body.state_dict().items() if not k.endswith('num_batches_tracked')}
    save_file(dict(body, **{'classifier.weight': torch.zeros(3, 3)}), tmp_path/'body.safetensors')
    other = ssd('mobilenetv1_025', tmp_path/'body.safetensors', num_classes=2, image_size=64)
    assert torch.equal(other.backbone.body.conv_stem.weight, small.backbone.body.conv_stem.weight)


def test_weights_that_do_not_fit(small, tmp_path):
    state = small.state_dict()
    def attempt(name, what, **options):
        save_file(what, tmp_path/name)
        return refused(ssd, 'mobilenetv1_025', tmp_path/name, image_size=64, **dict(dict(num_classes=4), **options))
    turned = {k: v.transpose(0, 1).contiguous() if k == 'heads.0.weight' else v for k, v in state.items()}
    assert "'heads.0.weight' is [128, 24, 3, 3], expected [24, 128, 3, 3]" in attempt('turned.safetensors', turned)
    missing = attempt('missing.safetensors', {k: v for k, v in state.items() if k != 'heads.3.bias'})
    assert "'heads.3.bias' is missing" in missing
    assert "'heads.9.bias' is unexpected" in attempt('more.safetensors', {**state, 'heads.9.bias': torch.zeros(1)})
    assert 'missing' in attempt('foreign.safetensors', dict(layer=torch.zeros(1)))


@pytest.mark.parametrize("before", ["", "module._orig_mod."])
@pytest.mark.parametrize("classes", [2, 5])
def test_a_detector_of_other_classes_is_a_start(classes, before, tmp_path):
    "Its backbone, and where its heads put boxes; which class it is is learned anew, and that is said."
    kind = dict(backbone="mobilenetv1_025", image_size=64)
    other = ssd(num_classes=4, **kind)
    with torch.no_grad():
        for head in other.heads: head.bias.uniform_()
    torch.save({before + k: v for k, v in other.state_dict().items()}, tmp_path/"mine.pt")
    with pytest.warns(UserWarning, match="another number of classes.*learned anew"):
        model = ssd(weights=str(tmp_path/"mine.pt"), num_classes=classes, **kind)
    for mine, its in zip(model.heads, other.heads):
        offsets = mine.split[1]
        assert all(torch.equal(getattr(mine, k)[-offsets:], getattr(its, k)[-offsets:]) for k in ("weight", "bias"))
        assert not mine.bias[:-offsets].any() and len(mine.bias) == 3*(classes + 4)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items() if "heads" not in k)
    kind = dict(backbone="mobilenetv1_050", image_size=64)
    assert "does not fit" in refused(ssd, weights=str(tmp_path/"mine.pt"), num_classes=4, **kind)


def test_imagenet_without_a_network(monkeypatch, tmp_path):
    monkeypatch.delenv('SYNTHDET_WEIGHTS', raising=False)
    monkeypatch.setattr(backbones, 'try_to_load_from_cache', lambda *a: None)
    monkeypatch.setattr(backbones, '_reachable', lambda url: False)
    for name in ('mobilenetv1_100', 'mobilenetv1_050'):
        told = refused(ssd, name, 'imagenet')
        assert 'no ImageNet weights for' in told and 'SYNTHDET_WEIGHTS' in told
    file = tmp_path/'mobilenetv1_050_imagenet.safetensors'
    save_file(make_backbone('mobilenetv1_050').body.state_dict(), file)
    monkeypatch.setenv('SYNTHDET_WEIGHTS', str(tmp_path))
    assert imagenet_file('mobilenetv1_050') == file
    assert len(ssd('mobilenetv1_050', 'imagenet', image_size=64).anchors) == 120


def test_reference_weights_compute_what_timm_computes():
    if shared() is None: pytest.skip('the reference folder shared/ is not beside the project')
    import timm
    path = shared()/'weights'/'mobilenetv1_100_imagenet.safetensors'
    torch.manual_seed(3)
    model, random = ssd(weights=path, image_size=128).eval(), torch.manual_seed(3) and ssd(image_size=128)
    same = zip(model.heads.parameters(), random.heads.parameters())
    assert all(torch.equal(a, b) for a, b in same), 'heads stay random'
    reference = timm.create_model('mobilenetv1_100', num_classes=0, pad_type='same').eval()
    reference.load_state_dict({k: v for k, v in read_weights(path).items()}, strict=False)
    x = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(): a, b = model.backbone(x)[-1], reference.forward_features(x * 2 - 1)
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3) # even sizes: both pad alike; eps is made up for


@pytest.mark.parametrize('options, says', [
    (dict(backbone='mobilnet'), "backbone 'mobilnet' is unknown"), (dict(image_size=8), 'image_size=8 is not possible'),
    (dict(image_size=(1, 2, 3)), 'image_size=(1, 2, 3)'), (dict(image_size='128'), "image_size='128'"),
    (dict(num_classes=1), 'num_classes=1 leaves nothing to detect')])
def test_impossible_arguments(options, says): assert says in refused(ssd, **options)


def test_wrong_input_is_told(small):
    image, box = torch.rand(3, 64, 64), torch.tensor([[1., 1, 30, 30]])
    assert 'float in 0..1' in refused(small.train(), [(image * 255).byte()], [])
    assert 'labels must lie in 1..3' in refused(small, [image], [dict(boxes=box, labels=torch.tensor([4]))])
    assert 'needs targets' in refused(small, [image])


# -- any network of timm

TINY = 'test_resnet', 'test_efficientnet', 'test_vit'


@pytest.mark.parametrize('name', TINY)
def test_any_network_of_timm_makes_a_detector(name):
    torch.manual_seed(0)
    model = ssd(name, image_size=64, num_classes=3)
    maps = model.backbone.shapes(64, 64)
    assert len(maps) == 4 and len(model.anchors) == 3 * sum(h * w for _, h, w in maps)
    assert [64 // h for _, h, _ in maps] == ([16] * 4 if name == 'test_vit' else [8, 16, 16, 32])
    target = dict(boxes=torch.tensor([[5., 5, 40, 50]]), labels=torch.tensor([2]))
    losses = model([torch.rand(3, 64, 64)] * 2, [target] * 2)
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    assert all(p.grad is not None for p in model.heads.parameters())
    with torch.inference_mode(): assert set(model.eval()([torch.rand(3, 50, 70)])[0]) == {'boxes', 'scores', 'labels'}


@pytest.mark.parametrize('name', TINY[:2])
def test_published_weights_of_any_network(name, tmp_path):
    import timm
    whole = timm.create_model(name).eval()
    for m in whole.modules(): # as if trained
        if isinstance(m, torch.nn.BatchNorm2d): torch.nn.init.uniform_(m.running_var, .5, 2)
    save_file(whole.state_dict(), tmp_path/'published.safetensors')
    ours = make_backbone(name, tmp_path/'published.safetensors').eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode(): maps, want = ours(x), whole.forward_intermediates((x - ours.mean) / ours.std)[1]
    assert all(any(m.shape == w.shape and torch.allclose(m, w, atol=1e-5) for w in want) for m in maps)
    detector = ssd(name, tmp_path/'published.safetensors', image_size=64) # the same from a whole detector's file
    save_file(detector.state_dict(), tmp_path/'detector.safetensors')
    again = ssd(name, tmp_path/'detector.safetensors', image_size=64)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in detector.state_dict().items())


def test_maps_with_channels_last_are_turned():
    maps = make_backbone('swin_tiny_patch4_window7_224').shapes(224, 224)
    assert maps == [(192, 28, 28), (384, 14, 14), (384, 14, 14), (768, 7, 7)]


def test_networks_that_cannot_be_backbones(tmp_path, monkeypatch):
    assert 'does not take images of 128 x 96 pixels' in refused(ssd, 'vit_tiny_patch16_224', image_size=(96, 128))
    save_file(dict(layer=torch.zeros(1)), tmp_path/'foreign.safetensors')
    told = refused(make_backbone, 'test_resnet', tmp_path/'foreign.safetensors')
    assert 'foreign.safetensors does not fit' in told and '\n' not in told
    def none(*a, **k): raise RuntimeError('no features here\nand more')
    monkeypatch.setattr(backbones.timm, 'create_model', none)
    assert "'test_resnet' gives no feature maps (no features here); choose" in refused(make_backbone, 'test_resnet')


def test_a_backbone_of_ones_own_is_a_thing(small):
    mine = make_backbone('mobilenetv1_025')
    assert ssd(mine, image_size=64).backbone is mine and make_backbone(mine) is mine
