"Scores against independent implementations: plain loops for VOC and the authors, pycocotools, published numbers."
import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torchvision.ops import box_convert

from helpers import needs_shared
from synthdet.boxes import wrap
from synthdet.core import refused
from synthdet.machine import shared
from synthdet.data.held import Resized
from synthdet.detection.evaluate import (
    average_precision, COCO_KEYS, coco_metrics, evaluate, precision_recall, predict, validator)



def overlap(a, b):
    "IoU of two boxes, by the definition."
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union if union > 0 else 0.


def reference(predictions, targets, iou, rule):
    "Average precision of the VOC kit and of the authors as loops over classes, detections and boxes."
    p = [{k: v.tolist() for k, v in d.items()} for d in predictions]
    t = [{k: v.tolist() for k, v in d.items()} for d in targets]
    hard = [[bool(x) and rule != 'authors' for x in d.get('difficult', [0] * len(d['labels']))] for d in t]
    values = []
    for c in sorted({l for d in t for l in d['labels']}):
        n = sum(l == c and not h for d, hs in zip(t, hard) for l, h in zip(d['labels'], hs))
        if not n: continue
        found = [(s, i, b) for i, d in enumerate(p) for b, s, l in zip(d['boxes'], d['scores'], d['labels']) if l == c]
        taken, verdicts = set(), []
        for score, i, box in sorted(found, key=lambda f: -f[0]): # stable
            best, which = -1., None
            for j, (b, l) in enumerate(zip(t[i]['boxes'], t[i]['labels'])):
                if l == c and overlap(box, b) > best: best, which = overlap(box, b), j
            hit = which is not None and best >= iou
            if hit and hard[i][which]: continue
            verdicts.append((score, hit and (i, which) not in taken))
            if hit: taken.add((i, which))
        if rule == 'authors': verdicts.sort(reverse=True) # pairs: at equal scores the true ones first
        points, tp = [], 0
        for k, (_, good) in enumerate(verdicts, 1):
            tp += good
            points.append((tp / n, tp / k))
        if rule == 'voc07':
            values.append(sum(max([q for r, q in points if r >= at], default=0) for at in np.arange(0, 1.1, .1)) / 11)
            continue
        area, last = 0, 0
        for k, (r, _) in enumerate(points):
            area += (r - last) * max(q for _, q in points[k:])
            last = r
        values.append(area)
    return float(np.mean(values)) if values else float('nan')


def case(seed, images=6, classes=3, crowd=False):
    "Integer boxes (overlaps tie and hit thresholds exactly), rounded scores, empty images, classes of one side only."
    g = np.random.default_rng(seed)
    def boxes(n):
        xy, wh = g.integers(0, 30, (n, 2)) * 2, g.integers(0 if seed % 5 == 0 else 1, 20, (n, 2)) * 2
        return torch.from_numpy(np.concatenate([xy, xy + wh], 1)).float()
    predictions, targets = [], []
    for _ in range(images):
        m, n = g.integers(0, 6), g.integers(0, 14)
        truth = dict(boxes=boxes(m), labels=torch.from_numpy(g.integers(1, classes + 1, m)))
        which = torch.from_numpy(g.integers(0, m, n // 2)) if m else torch.zeros(0, dtype=torch.int64)
        near = truth['boxes'][which] + torch.from_numpy(g.integers(-2, 3, (len(which), 4))).float()
        near[:, 2:] = torch.maximum(near[:, 2:], near[:, :2] + 1)
        found = torch.cat([near, boxes(n - len(near))])
        labels = torch.cat([truth['labels'][which], torch.from_numpy(g.integers(1, classes + 2, n - len(near)))])
        scores = torch.from_numpy(g.random(n).round(1 if seed % 2 else 6)).float()
        predictions.append(dict(boxes=found, labels=labels, scores=scores))
        flag = torch.from_numpy(g.random(m) < .25)
        if crowd: truth['iscrowd'] = flag.long()
        elif seed % 3 == 0: truth['difficult'] = flag
        targets.append(truth)
    return predictions, targets


@pytest.mark.parametrize('rule', ['voc', 'voc07', 'authors'])
def test_average_precision_equals_plain_loops(rule):
    values = []
    for seed in range(60):
        for iou in (.5, .3, .75):
            ours, theirs = average_precision(*case(seed), iou=iou, rule=rule), reference(*case(seed), iou, rule)
            assert ours == pytest.approx(theirs, abs=1e-12, nan_ok=True), (seed, iou)
            values.append(ours)
    assert len({round(v, 6) for v in values}) > 120, "the cases differ"


def test_ties_and_difficult_boxes_tell_the_rules_apart():
    cases = [case(s) for s in range(60)]
    differ = lambda a, b: sum(abs(average_precision(*c, rule=a) - average_precision(*c, rule=b)) > 1e-9 for c in cases)
    assert differ('voc', 'authors') > 10 and differ('voc', 'voc07') > 40
    box = torch.tensor([[0., 0, 8, 8], [20, 20, 28, 28]])
    one = [dict(boxes=box, labels=torch.ones(2, dtype=torch.int64), scores=torch.tensor([.5, .5]))]
    truth = [dict(boxes=box[1:], labels=torch.ones(1, dtype=torch.int64))]
    assert average_precision(one, truth) == .5, 'false first, in the order of the file'
    assert average_precision(one, truth, rule='authors') == 1, 'true first, for the authors'


def padilla(folder, scored):
    out = []
    for f in sorted(folder.glob('*.txt')):
        rows = [[float(v) for v in l.split()[1:]] for l in f.read_text().splitlines() if l.strip()]
        n = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), -1)
        xy, wh = n[:, -4:-2], n[:, -2:]
        out.append(dict(boxes=torch.cat([xy, xy + wh + 1], 1), labels=torch.ones(len(n), dtype=torch.int64)))
        if scored: out[-1]['scores'] = n[:, 0]
    return out


@needs_shared
@pytest.mark.parametrize('folder, iou, area, eleven', [
    ('', .3, .2456866804, .2683982683), ('test_case_1', .1, .3371980676, .3333333333),
    ('test_case_1', .3, .2456866804, .2683982683),
    ('test_case_1', .5, .0222222222, .0303030303), ('test_case_1', .75, 0, 0)])
def test_published_voc_numbers(folder, iou, area, eleven):
    root = shared()/'eval'/'padilla_voc'/folder
    dets, gts = ('dets', 'gts') if folder else ('detections', 'groundtruths')
    found, truth = padilla(root/dets, scored=True), padilla(root/gts, scored=False)
    assert len(found) == len(truth) == 7
    assert average_precision(found, truth, iou=iou) == pytest.approx(area, abs=1e-9)
    assert average_precision(found, truth, iou=iou, rule='voc07') == pytest.approx(eleven, abs=1e-9)


def pycoco(predictions, targets):
    "pycocotools on the same lists; None for -1."
    def rows(d, image, **more):
        xywh = box_convert(d['boxes'].double(), 'xyxy', 'xywh')
        columns = dict(bbox=xywh, category_id=d['labels'], area=xywh[:, 2:].prod(1), **more)
        return [dict(zip(columns, v), image_id=image) for v in zip(*(c.tolist() for c in columns.values()))]
    crowd = lambda t: t.get('iscrowd', torch.zeros_like(t['labels']))
    anns = [a for i, t in enumerate(targets) for a in rows(t, i, iscrowd=crowd(t))]
    truth = COCO()
    truth.dataset = dict(images=[dict(id=i) for i in range(len(targets))],
                         annotations=[dict(a, id=n) for n, a in enumerate(anns, 1)],
                         categories=[dict(id=c) for c in sorted({a['category_id'] for a in anns})])
    truth.createIndex()
    return scored(truth, [r for i, p in enumerate(predictions) for r in rows(p, i, score=p['scores'])])


def scored(truth, found):
    "What pycocotools says of the rows `found`."
    run = COCOeval(truth, truth.loadRes(found), 'bbox')
    run.evaluate()
    run.accumulate()
    run.summarize()
    return {k: None if v < 0 else v for k, v in zip(COCO_KEYS, run.stats)}


@pytest.mark.parametrize('crowd', [False, True])
def test_coco_metrics_equal_pycocotools(crowd):
    seen = 0
    for seed in range(24):
        predictions, targets = case(seed, images=8, crowd=crowd)
        for d in predictions + targets: d['boxes'] = d['boxes'] * 3 # so that all three sizes occur
        ours, theirs = coco_metrics(predictions, targets), pycoco(predictions, targets)
        assert ours == {k: v if v is None else pytest.approx(v, abs=1e-12) for k, v in theirs.items()}, seed
        seen += ours['ap'] is not None and 0 < ours['ap'] < 1
    assert seen > 20


@needs_shared
def test_published_coco_numbers():
    folder = shared()/'eval'/'coco100'
    read = lambda name: json.loads((folder/f'instances_val2014_{name}.json').read_text())
    truth, found = read('100'), read('fakebbox100_results')
    def by_image(rows, *keys):
        groups = {i: [] for i in sorted(i['id'] for i in truth['images'])}
        for r in rows: groups[r['image_id']].append(r)
        for g in groups.values():
            boxes = torch.tensor([r['bbox'] for r in g], dtype=torch.float64).reshape(-1, 4)
            columns = {k: torch.tensor([r[k] for r in g], dtype=torch.float64) for k in ('category_id', *keys)}
            yield dict(boxes=box_convert(boxes, 'xywh', 'xyxy'), labels=columns.pop('category_id').long(),
                       scores=columns.pop('score', None), **columns)
    scores = coco_metrics(list(by_image(found, 'score')), list(by_image(truth['annotations'], 'iscrowd', 'area')))
    published = dict(ap=.5045807, ap50=.6969727, ap75=.5729817, ar100=.5953530)
    assert {k: scores[k] for k in published} == pytest.approx(published, abs=5e-8)
    index = COCO()
    index.dataset = truth
    index.createIndex()
    assert scores == pytest.approx(scored(index, found), abs=1e-12), 'sizes are those of the masks, by `area`'


def test_nothing_found_is_zero_and_nothing_to_find_is_undefined():
    none = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), scores=torch.zeros(0))
    some = dict(boxes=torch.tensor([[0., 0, 9, 9]]), labels=torch.ones(1, dtype=torch.int64), scores=torch.ones(1))
    found, missed, undefined = evaluate([some], [some]), evaluate([none], [some]), evaluate([some], [none])
    assert all(found[k] == pytest.approx(1) for k in ('ap50', 'ap50_authors', 'ap50_coco', 'ap'))
    assert {v for v in missed.values() if v is not None} == {0} and missed['ap_large'] is None and missed['ap'] == 0
    assert set(undefined.values()) == {None} == set(evaluate([], []).values())
    assert average_precision([none, some], [none, some]) == 1 and average_precision([some, some], [none, some]) == .5
    assert np.isnan(average_precision([some], [none]))


def test_wrapped_targets_score_as_plain_ones():
    predictions, targets = case(3)
    wrapped = [wrap(t, (100, 100)) for t in targets]
    assert evaluate(predictions, wrapped) == evaluate(predictions, targets)


def test_wrong_input_is_one_clear_line():
    some = dict(boxes=torch.tensor([[0., 0, 9, 9]]), labels=torch.ones(1, dtype=torch.int64), scores=torch.ones(1))
    assert '1 predictions for 0 targets' in refused(average_precision, [some], [])
    assert '1 predictions for 0 targets' in refused(coco_metrics, [some], [])
    unknown = "rule 'coco' is unknown; choose from voc, voc07, authors"
    assert unknown in refused(average_precision, [some], [some], rule='coco')
    assert 'image 0: 2 scores for 1 boxes' in refused(average_precision, [dict(some, scores=torch.ones(2))], [some])
    assert 'no box of class 4; its classes are [1]' in refused(precision_recall, [some], [some], label=4)
    assert 'holds no box' in refused(validator, [])


class Corner(nn.Module):
    "Detects the corner pixel's brightness; batch norm tells evaluation from training mode."
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images):
        values = [float(self.norm(i[None])[0, 0, 0, 0]) for i in images]
        one = torch.ones(1)
        return [dict(boxes=torch.tensor([[0., 0, v, v]]), scores=one, labels=one.long(), masks='kept by nobody')
                for v in values]


@pytest.mark.parametrize('training', [False, True])
def test_predict_keeps_mode_and_statistics_for_any_batch_size(training):
    g = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, 5 + i % 2, 7), dtype=torch.uint8, generator=g) for i in range(7)]
    model = Corner().train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    runs = [predict(model, images, batch_size=n) for n in (1, 3, 16)] + [predict(model, [(i, {}) for i in images])]
    even = predict(model, torch.stack(images[::2]), batch_size=3)
    assert all(torch.equal(a['boxes'], b['boxes']) for a, b in zip(even, runs[0][::2])) and len(even) == 4
    assert model.training == training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    found = [[float(d['boxes'][0, 2]) for d in r] for r in runs]
    corners = [float(i[0, 0, 0])/255 for i in images]
    assert found[0] == found[1] == found[2] == found[3] == pytest.approx(corners, abs=1e-4)
    assert set(runs[0][0]) == {'boxes', 'scores', 'labels'} and not runs[0][0]['boxes'].requires_grad
    assert predict(model, []) == []


def test_predictions_can_be_learned_from():
    found = predict(Corner(), torch.full((2, 3, 4, 4), 255, dtype=torch.uint8))
    weight = torch.ones(1, requires_grad=True)
    (weight*found[1]['boxes']).sum().backward()
    assert float(weight.grad) == pytest.approx(2, abs=1e-4)


@pytest.mark.parametrize('seed', [0, 1, 3])
def test_validation_and_test_compare_once_what_the_rules_compare_apart(seed):
    predictions, targets = case(seed, images=9)
    confident = [{k: d[k][d['scores'] >= .5] for k in ('boxes', 'scores', 'labels')} for d in predictions]
    want = average_precision(predictions, targets), average_precision(confident, targets, rule='authors')
    scores = evaluate(predictions, targets)
    assert (scores['ap50'], scores['ap50_authors']) == want and want[0] != want[1]


def test_a_crowded_image_is_compared_in_parts(monkeypatch):
    from synthdet.detection import evaluate as module
    whole = [average_precision(*case(s)) for s in range(8)]
    pairs = module._pairs
    monkeypatch.setattr(module, '_pairs', lambda *n: pairs(*n, most=5))
    assert [average_precision(*case(s)) for s in range(8)] == whole


def test_images_of_one_size_are_validated_from_one_tensor():
    images = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    images[:, :, 0, 0] = torch.arange(5)[:, None]*50
    target = dict(boxes=torch.tensor([[0., 0, 1, 1]]), labels=torch.ones(1, dtype=torch.int64))
    data = Resized([(i, target) for i in images], 8)
    seen = []
    class Sees(Corner):
        def forward(self, images):
            seen.extend(int(255*i[0, 0, 0] + .5) for i in images)
            return super().forward(images)
    plain, held = (validator(d)(Sees()) for d in ([*data], data))
    assert plain == held and seen == [0, 50, 100, 150, 200]*2


def test_validation_is_computed_in_the_precision_of_the_training():
    class Asks(Corner):
        def forward(self, images):
            types.add(torch.nn.functional.linear(images[0][0, :1], torch.ones(1, images[0].shape[2])).dtype)
            return super().forward(images)
    target = dict(boxes=torch.tensor([[0., 0, 1, 1]]), labels=torch.ones(1, dtype=torch.int64))
    data = [(torch.full((3, 4, 4), 255, dtype=torch.uint8), target)]*2
    for precision, dtype in dict(fp32=torch.float32, bf16=torch.bfloat16).items():
        types = set()
        assert validator(data, precision=precision)(Asks())['ap50'] == 1 and types == {dtype}
    assert "precision 'fp64' is unknown" in refused(predict, Corner(), [], precision='fp64')


def test_predict_restores_the_mode_when_the_model_fails():
    class Broken(nn.Module):
        def forward(self, images): raise RuntimeError('broken')
    model = Broken().train()
    with pytest.raises(RuntimeError, match='broken'): predict(model, [torch.zeros(3, 4, 4, dtype=torch.uint8)])
    assert model.training
