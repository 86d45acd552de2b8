"A training step: matched where batches are made, one graph for any number of boxes, losses and gradients of lists."
import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_convert, box_iou

from synthdet.boxes import resize_boxes
from synthdet.core import refused
from synthdet.data.batches import batches
from synthdet.detection.detectors import detector
from synthdet.detection.faceanchors import encode_points, match_faces, priors
from synthdet.detection.settings import resolved_schedule, Schedule
from synthdet.detection.anchors import encode, match
from synthdet.detection.train import matcher_of, train
from synthdet.precision import autocast

SIDE = 96
OURS = dict(ssd=dict(backbone='mobilenetv1_025', image_size=SIDE), retinaface=dict(image_size=SIDE))


pytestmark = pytest.mark.usefixtures('one_thread')


def built(name):
    torch.manual_seed(0)
    return detector(name, 2, **OURS[name]).train()


def batch_of(counts, side=SIDE, landmarks=True, seed=0):
    "A batch of noise in which picture k has `counts[k]` boxes, some of them equal."
    g, targets = torch.Generator().manual_seed(seed), []
    for n in counts:
        wh = side * (.1 + .6*torch.rand(n, 2, generator=g))
        xy = (side - wh) * torch.rand(n, 2, generator=g)
        boxes = torch.cat([xy, xy + wh], 1)
        if n > 2: boxes[2] = boxes[0]
        points = xy[:, None] + wh[:, None] * torch.rand(n, 5, 2, generator=g)
        marks = dict(landmarks=points, landmarks_valid=torch.arange(n) % 3 != 1) if landmarks else {}
        targets.append(dict(boxes=boxes, labels=torch.ones(n, dtype=torch.int64), **marks))
    return torch.randint(0, 256, (len(counts), 3, side, side), dtype=torch.uint8, generator=g), targets


# -- the losses of plain lists: one picture, one positive anchor at a time; shapes that depend on the data

def listed_ssd(model, images, targets):
    logits, offsets = model.raw(F.interpolate(images, model.size, mode='bilinear', align_corners=False))
    corners, n, classes, boxes = box_convert(model.anchors, 'cxcywh', 'xyxy'), 0, 0, 0
    for l, o, t in zip(logits, offsets, targets):
        known = resize_boxes(t['boxes'], images.shape[-2:], model.size)
        found = match(box_iou(known, corners)[None])[0] if len(known) else torch.full((len(l),), -1)
        truth = torch.where(found >= 0, 1, 0)
        p = l.softmax(-1)[torch.arange(len(l)), truth][found != -2]
        classes = classes - ((1 - p)**2 * (p + 1e-8).log()).sum()
        goal = encode(known[found[found >= 0]], model.anchors[found >= 0])
        boxes, n = boxes + F.smooth_l1_loss(o[found >= 0], goal, reduction='sum'), n + int((found >= 0).sum())
    l2 = 5e-4 * sum(h.weight.square().sum() for h in model.heads)
    return dict(classification=classes/max(n, 1), bbox_regression=boxes/max(n, 1), l2=l2)


def listed_retinaface(model, images, targets):
    offsets, logits, points = model.raw(model.prepare(images, model.size))
    laid, (h, w) = priors(*model.size), images.shape[-2:]
    n, marked, classes, boxes, marks = 0, 0, 0, 0, 0
    for o, l, p, t in zip(offsets, logits, points, targets):
        known = t['boxes'] / torch.tensor([w, h, w, h])
        found = torch.full((len(l),), -1)
        if len(known):
            iou = box_iou(known, box_convert(laid, 'cxcywh', 'xyxy'))
            found = match_faces(iou[None], torch.ones(1, len(known), dtype=torch.bool))[0]
        at = found >= 0
        loss = F.cross_entropy(l, at.long(), reduction='none')
        k = min(7*int(at.sum()), len(l) - 1)
        hard = loss.detach().masked_fill(at, 0).argsort(descending=True, stable=True)[:k]
        chosen = at.index_fill(0, hard, True)
        classes, n = classes + loss[chosen].sum(), n + int(at.sum())
        boxes = boxes + F.smooth_l1_loss(o[at], encode(known[found[at]], laid[at]), reduction='sum')
        if 'landmarks' not in t: continue
        has = t['landmarks_valid'][found[at]]
        goal = encode_points(t['landmarks'][found[at]][has] / torch.tensor([w, h]), laid[at][has])
        marks, marked = marks + F.smooth_l1_loss(p[at][has], goal, reduction='sum'), marked + int(has.sum())
    return dict(bbox_regression=2*boxes/max(n, 1), classification=classes/max(n, 1), landmarks=marks/max(marked, 1))


LISTED = dict(ssd=listed_ssd, retinaface=listed_retinaface)


def with_gradients(leaves, losses):
    grads = torch.autograd.grad(sum(losses.values()), list(leaves), allow_unused=True)
    return {k: v.detach() for k, v in losses.items()}, grads


@pytest.mark.parametrize('name', OURS)
@pytest.mark.parametrize('counts, side', [((0, 0), 96), ((1, 0, 7, 3), 96), ((60, 2), 96), ((5, 4), 128)])
def test_losses_and_gradients_are_those_of_plain_lists(name, counts, side):
    model, (images, targets) = built(name), batch_of(counts, side)
    images = images / 255
    asked, at = model.matcher()(images, targets)[1], model.size
    with torch.no_grad(): said = model.raw(F.interpolate(images, at) if name == 'ssd' else model.prepare(images, at))
    said = [s.clone().requires_grad_() for s in said] # what the network says: rounding does not grow on its way back
    model.raw = lambda x: said
    want, slopes = with_gradients(said, LISTED[name](model, images, targets))
    for given in (asked, targets):
        got, ours = with_gradients(said, model(images, given))
        for k, v in want.items(): torch.testing.assert_close(got[k], torch.as_tensor(v), rtol=1e-5, atol=1e-5)
        for a, b in zip(ours, slopes):
            if b is not None: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            assert b is not None or a is None or (a == 0).all()


@pytest.mark.parametrize('name', OURS)
def test_one_graph_serves_any_number_of_boxes(name):
    torch._dynamo.reset()
    model, counters = built(name), torch._dynamo.utils.counters
    counters.clear()
    compiled, asked = torch.compile(copy.deepcopy(model), fullgraph=True, backend='aot_eager'), model.matcher()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (7, 0, 1, 60):
            images, targets = asked(*batch_of((n, n//2)))
            got, ours = with_gradients(compiled.parameters(), compiled(images / 255, targets))
            want, slopes = with_gradients(model.parameters(), model(images / 255, targets))
            for k in want: torch.testing.assert_close(got[k], want[k], rtol=1e-5, atol=1e-5)
            for a, b in zip(ours, slopes):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5*max(1, float(b.abs().max())))
    assert counters['stats']['unique_graphs'] == 1 and not counters['graph_break']


# -- the contract of a matcher

@pytest.mark.parametrize('name', OURS)
def test_a_matcher_travels_and_keeps_shapes(name):
    asked = pickle.loads(pickle.dumps(matcher_of(built(name))))
    shapes = []
    for counts in ((0, 0, 0), (1, 0, 60), (2, 2, 2)):
        images, given = batch_of(counts)
        same, matched = asked(images, given)
        assert same is images and all(v.device.type == 'cpu' and v.isfinite().all() for v in matched.values())
        assert matched['positives'].dtype == torch.float32
        assert matched['positives'][0] == (matched['truth'] > 0).sum()
        assert (matched['goals'][matched['truth'] <= 0] == 0).all()
        shapes.append({k: (v.shape, v.dtype) for k, v in matched.items()})
    assert shapes[0] == shapes[1] == shapes[2]


def test_boxes_without_a_size_give_finite_numbers():
    for name in OURS:
        model, (images, targets) = built(name), batch_of((3, 2))
        for t in targets: t['boxes'][-1, 2:] = t['boxes'][-1, :2]
        losses, grads = with_gradients(model.parameters(), model(images / 255, targets))
        assert all(v.isfinite() for v in losses.values()) and all(g.isfinite().all() for g in grads), name


def test_labels_are_checked_where_batches_are_made():
    images, (target,) = batch_of((2,), landmarks=False)
    for labels in (torch.tensor([1, 2]), torch.tensor([0, 1]), torch.tensor([1., 1])):
        assert 'labels must lie in 1..1' in refused(matcher_of(built('ssd')), images, [dict(target, labels=labels)])
    assert 'labels must all be 1' in refused(matcher_of(built('retinaface')), images,
                                             [dict(target, labels=torch.tensor([1, 2]))])


class Pictures(torch.utils.data.Dataset):
    "Noise with boxes, endless."
    def __getitem__(self, i):
        images, targets = batch_of((i % 4,), landmarks=False, seed=i)
        return images[0], targets[0]

    def __len__(self): raise TypeError


HOW = dict(schedule=Schedule(lr=1e-3, eval_every=2, precision='fp32'), device='cpu')


def weights(folder): return (folder/'last.safetensors').read_bytes()


@pytest.mark.parametrize('name', OURS)
def test_matched_in_workers_here_or_by_train_it_is_one_run(name, tmp_path):
    model = built(name)
    feeds = dict(lists=partial(batches, Pictures(), 4), here=partial(batches, Pictures(), 4, prepare=model.matcher()),
                 workers=partial(batches, Pictures(), 4, workers=2, prepare=model.matcher()))
    for k, feed in feeds.items(): train(built(name), feed, 4, tmp_path/k, **HOW)
    assert weights(tmp_path/'lists') == weights(tmp_path/'here') == weights(tmp_path/'workers')


def test_a_detector_without_a_matcher_gets_lists(tmp_path):
    assert matcher_of(torch.nn.Linear(1, 1)) is None
    seen = []
    class Plain(torch.nn.Module):
        def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.ones(()))
        def forward(self, images, targets):
            seen.append((type(images), type(targets), set(targets[0])))
            return dict(w=self.w**2)
    train(Plain(), partial(batches, Pictures(), 2), 1, tmp_path, **HOW)
    assert seen == [(list, list, {'boxes', 'labels'})]


# -- precision, compilation, random state

def test_auto_becomes_what_the_processor_has(monkeypatch):
    for has, says in ((True, 'bf16'), (False, 'fp32')):
        monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: has)
        native = lambda including_emulation: has and not including_emulation
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', native)
        assert all(resolved_schedule(Schedule(), d).precision == says for d in ('cpu', 'cuda'))
        assert resolved_schedule(Schedule(precision='fp32'), 'cpu').precision == 'fp32'
    assert resolved_schedule(Schedule(), 'meta').precision == 'fp32'


def test_auto_is_stored_as_what_it_became(tmp_path):
    train(built('ssd'), partial(batches, Pictures(), 2), 1, tmp_path, eval_every=1)
    config = torch.load(tmp_path/'state.pt', weights_only=True)['config']
    assert config['precision'] == resolved_schedule(Schedule()).precision and config['compile'] is False


def test_a_compiled_run_resumes_and_learns_the_same(tmp_path, monkeypatch):
    torch._dynamo.reset()
    seen, whole = [], torch.compile
    monkeypatch.setattr(torch, 'compile', lambda m: seen.append(m) or whole(m, backend='aot_eager'))
    def cut(start): return (b for k, b in zip(range(start, 3), batches(Pictures(), 2, start)))
    assert 'ended before step 4' in refused(train, built('ssd'), cut, 5, tmp_path/'cut', compile=True, **HOW)
    feed = partial(batches, Pictures(), 2)
    for folder in ('cut', 'whole'): train(built('ssd'), feed, 5, tmp_path/folder, compile=True, **HOW)
    assert weights(tmp_path/'cut') == weights(tmp_path/'whole') and len(seen) == 3
    plain = train(built('ssd'), feed, 5, tmp_path/'plain', **HOW)['history']
    compiled = train(built('ssd'), feed, 5, tmp_path/'whole', compile=True, **HOW)['history']
    assert [r['loss'] for r in compiled] == pytest.approx([r['loss'] for r in plain], rel=1e-3)


def test_bf16_without_instructions_is_the_same_compiled(monkeypatch):
    monkeypatch.setattr('synthdet.precision.native_bf16', lambda kind: False)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
    x = torch.rand(2, 3, 9, 9)
    def computed(net):
        with autocast('cpu', torch.bfloat16): y = net(x)
        return y, *torch.autograd.grad(y.float().square().sum(), list(net.parameters()))
    torch._dynamo.reset()
    plain, compiled = computed(net), computed(torch.compile(net, backend='aot_eager'))
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled)) and plain[0].dtype == torch.bfloat16
    assert not torch.equal(plain[0].float(), net(x))


def test_layers_that_a_cpu_is_slow_at_compute_in_float32(tmp_path):
    seen, model = {}, built('ssd')
    layers = {k: m for k, m in model.backbone.named_modules() if isinstance(m, torch.nn.Conv2d)}
    for k, m in layers.items(): m.register_forward_hook(lambda m, i, o, k=k: seen.update({k: o.dtype}))
    train(model, partial(batches, Pictures(), 2), 1, tmp_path, **HOW | dict(precision='bf16'))
    strided = [k for k, m in layers.items() if m.groups > 1 and m.stride == (2, 2)]
    assert len(strided) == 4 and all(seen[k] == torch.float32 for k in strided)
    assert all(seen[k] == torch.bfloat16 for k in layers if k not in strided)
    assert not any('forward' in vars(m) for m in layers.values()), 'the model is given back as it was'


def test_the_callers_random_state_is_left_alone(tmp_path):
    torch.manual_seed(5)
    want = torch.rand(3)
    model = built('ssd')
    torch.manual_seed(5)
    train(model, partial(batches, Pictures(), 2), 2, tmp_path, **HOW)
    assert torch.equal(torch.rand(3), want)
