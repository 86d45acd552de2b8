"Scores against independent implementations: plain loops for VOC and the authors, pycocotools for COCO, published numbers."
import json
import numpy as np, pytest, torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from synthdet.core import shared, UserError
from synthdet.detection.evaluate import (
    average_precision, COCO_KEYS, coco_metrics, evaluate, precision_recall, predict, validator)

needs_shared = pytest.mark.skipif(shared() is None, reason='the reference folder is not beside the project')


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
        if rule == 'voc07': values.append(sum(max([q for r, q in points if r >= at], default=0) for at in np.arange(0, 1.1, .1)) / 11)
        else:
            area, last = 0, 0
            for k, (r, _) in enumerate(points):
                area += (r - last) * max(q for _, q in points[k:]); last = r
            values.append(area)
    return float(np.mean(values)) if values else float('nan')


def case(seed, images=6, classes=3, crowd=False):
    "Integer boxes (so that overlaps tie and hit thresholds exactly), rounded scores, empty images, classes that only one side has."
    g = np.random.default_rng(seed)
    def boxes(n):
        xy = g.integers(0, 30, (n, 2)) * 2; wh = g.integers(0 if seed % 5 == 0 else 1, 20, (n, 2)) * 2
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
        predictions.append(dict(boxes=found, labels=labels, scores=torch.from_numpy(g.random(n).round(1 if seed % 2 else 6)).float()))
        flag = torch.from_numpy(g.random(m) < .25)
        targets.append(dict(truth, **({'iscrowd': flag.long()} if crowd else {'difficult': flag} if seed % 3 == 0 else {})))
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
    assert average_precision(one, truth) == .5 and average_precision(one, truth, rule='authors') == 1, 'false first in file order, true first for the authors'


def padilla(folder, scored):
    out = []
    for f in sorted(folder.glob('*.txt')):
        rows = [l.split()[1:] for l in f.read_text().splitlines() if l.strip()]
        n = torch.tensor([[float(v) for v in r] for r in rows], dtype=torch.float64).reshape(len(rows), -1)
        xy, wh = n[:, -4:-2], n[:, -2:]
        out.append(dict(boxes=torch.cat([xy, xy + wh + 1], 1), labels=torch.ones(len(n), dtype=torch.int64), **({'scores': n[:, 0]} if scored else {})))
    return out


@needs_shared
@pytest.mark.parametrize('folder, iou, area, eleven', [
    ('', .3, .2456866804, .2683982683), ('test_case_1', .1, .3371980676, .3333333333), ('test_case_1', .3, .2456866804, .2683982683),
    ('test_case_1', .5, .0222222222, .0303030303), ('test_case_1', .75, 0, 0)])
def test_published_voc_numbers(folder, iou, area, eleven):
    root = shared()/'eval'/'padilla_voc'/folder
    found, truth = padilla(root/('dets' if folder else 'detections'), scored=True), padilla(root/('gts' if folder else 'groundtruths'), scored=False)
    assert len(found) == len(truth) == 7
    assert average_precision(found, truth, iou=iou) == pytest.approx(area, abs=1e-9)
    assert average_precision(found, truth, iou=iou, rule='voc07') == pytest.approx(eleven, abs=1e-9)


def pycoco(predictions, targets):
    "pycocotools on the same lists; None for -1."
    xywh = lambda b: torch.cat([b[:, :2], b[:, 2:] - b[:, :2]], 1).double().tolist()
    truth, found = COCO(), COCO()
    anns = [dict(image_id=i, category_id=l, bbox=b, area=b[2] * b[3], iscrowd=c) for i, t in enumerate(targets)
            for b, l, c in zip(xywh(t['boxes']), t['labels'].tolist(), t.get('iscrowd', torch.zeros(len(t['labels']), dtype=torch.int64)).tolist())]
    truth.dataset = dict(images=[dict(id=i) for i in range(len(targets))], annotations=[dict(a, id=n) for n, a in enumerate(anns, 1)],
                         categories=[dict(id=c) for c in sorted({l for t in targets for l in t['labels'].tolist()})])
    truth.createIndex()
    rows = [dict(image_id=i, category_id=l, bbox=b, score=s) for i, p in enumerate(predictions) for b, l, s in zip(xywh(p['boxes']), p['labels'].tolist(), p['scores'].tolist())]
    run = COCOeval(truth, truth.loadRes(rows), 'bbox')
    run.evaluate(); run.accumulate(); run.summarize()
    return {k: None if v < 0 else v for k, v in zip(COCO_KEYS, run.stats)}


@pytest.mark.parametrize('crowd', [False, True])
def test_coco_metrics_equal_pycocotools(crowd):
    seen = 0
    for seed in range(24):
        predictions, targets = case(seed, images=8, crowd=crowd)
        for d in predictions + targets: d['boxes'] = d['boxes'] * 3 # so that all three sizes occur
        ours, theirs = coco_metrics(predictions, targets), pycoco(predictions, targets)
        assert {k for k, v in ours.items() if v is None} == {k for k, v in theirs.items() if v is None}, seed
        assert {k: v for k, v in ours.items() if v is not None} == pytest.approx({k: v for k, v in theirs.items() if v is not None}, abs=1e-12), seed
        seen += ours['ap'] is not None and 0 < ours['ap'] < 1
    assert seen > 20


@needs_shared
def test_published_coco_numbers():
    folder = shared()/'eval'/'coco100'
    truth, found = (json.loads((folder/f'instances_val2014_{n}.json').read_text()) for n in ('100', 'fakebbox100_results'))
    def by_image(rows, *keys):
        groups = {i: [] for i in sorted(i['id'] for i in truth['images'])}
        for r in rows: groups[r['image_id']].append(r)
        for g in groups.values():
            b = torch.tensor([r['bbox'] for r in g], dtype=torch.float64).reshape(-1, 4)
            yield dict(boxes=torch.cat([b[:, :2], b[:, :2] + b[:, 2:]], 1), labels=torch.tensor([r['category_id'] for r in g], dtype=torch.int64),
                       **{('scores' if k == 'score' else k): torch.tensor([r[k] for r in g], dtype=torch.float64) for k in keys})
    lists = list(by_image(found, 'score')), list(by_image(truth['annotations'], 'iscrowd', 'area'))
    scores = coco_metrics(*lists)
    assert {k: scores[k] for k in ('ap', 'ap50', 'ap75', 'ar100')} == pytest.approx(dict(ap=.5045807, ap50=.6969727, ap75=.5729817, ar100=.5953530), abs=5e-8)
    index = COCO(); index.dataset = truth; index.createIndex()
    run = COCOeval(index, index.loadRes(found), 'bbox')
    run.evaluate(); run.accumulate(); run.summarize()
    assert list(scores.values()) == pytest.approx(list(run.stats), abs=1e-12), 'sizes are those of the masks, by `area`'


def test_nothing_found_is_zero_and_nothing_to_find_is_undefined():
    none = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), scores=torch.zeros(0))
    some = dict(boxes=torch.tensor([[0., 0, 9, 9]]), labels=torch.ones(1, dtype=torch.int64), scores=torch.ones(1))
    found, missed, undefined = evaluate([some], [some]), evaluate([none], [some]), evaluate([some], [none])
    assert all(found[k] == pytest.approx(1) for k in ('ap50', 'ap50_authors', 'ap50_coco', 'ap'))
    assert {v for v in missed.values() if v is not None} == {0} and missed['ap_large'] is None and missed['ap'] == 0
    assert set(undefined.values()) == {None} == set(evaluate([], []).values())
    assert average_precision([none, some], [none, some]) == 1 and average_precision([some, some], [none, some]) == .5
    assert np.isnan(average_precision([some], [none]))


def test_wrong_input_is_one_clear_line():
    some = dict(boxes=torch.tensor([[0., 0, 9, 9]]), labels=torch.ones(1, dtype=torch.int64), scores=torch.ones(1))
    for call, says in ((lambda: average_precision([some], []), '1 predictions for 0 targets'), (lambda: coco_metrics([some], []), '1 predictions for 0 targets'),
                       (lambda: average_precision([some], [some], rule='coco'), "rule 'coco' is unknown; choose from voc, voc07, authors"),
                       (lambda: average_precision([dict(some, scores=torch.ones(2))], [some]), 'image 0: 2 scores for 1 boxes'),
                       (lambda: precision_recall([some], [some], label=4), r'no box of class 4; its classes are \[1\]'), (lambda: validator([]), 'holds no box')):
        with pytest.raises(UserError, match=says) as e: call()
        assert '\n' not in str(e.value)


class Corner(nn.Module):
    "Detects the corner pixel's brightness; batch norm tells evaluation from training mode."
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images):
        values = [float(self.norm(i[None])[0, 0, 0, 0]) for i in images]
        return [dict(boxes=torch.tensor([[0., 0, v, v]]), scores=torch.ones(1), labels=torch.ones(1, dtype=torch.int64), masks='kept by nobody') for v in values]


@pytest.mark.parametrize('training', [False, True])
def test_predict_keeps_mode_and_statistics_for_any_batch_size(training):
    g = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, 5 + i % 2, 7), dtype=torch.uint8, generator=g) for i in range(7)]
    model = Corner().train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    runs = [predict(model, images, batch_size=n) for n in (1, 3, 16)] + [predict(model, [(i, {}) for i in images])]
    assert model.training == training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(a['boxes'], b['boxes']) for r in runs for a, b in zip(r, runs[0])) and [len(r) for r in runs] == [7] * 4
    assert all(float(d['boxes'][0, 2]) == pytest.approx(float(i[0, 0, 0]) / 255, abs=1e-4) for d, i in zip(runs[0], images))
    assert set(runs[0][0]) == {'boxes', 'scores', 'labels'} and not runs[0][0]['boxes'].requires_grad
    assert predict(model, []) == []


def test_predict_restores_the_mode_when_the_model_fails():
    class Broken(nn.Module):
        def forward(self, images): raise RuntimeError('broken')
    model = Broken().train()
    with pytest.raises(RuntimeError, match='broken'): predict(model, [torch.zeros(3, 4, 4, dtype=torch.uint8)])
    assert model.training
