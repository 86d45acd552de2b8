"""Seconds to score 1,000 images of 100 detections each, beside pycocotools, faster-coco-eval and a plain loop.

    python benchmarks/evaluate.py           # prints a table, writes results/evaluate.json

All start from what a detector returns, lists of tensors, and end with AP at IoU 0.5. COCO's programs read the curve at
101 recalls and let a detection fall back to its second-best box, so their number differs a little; the loop follows the
VOC rule to the letter and its number is the same. `ours, both rules` is what a validation computes: VOC's AP50 and the
authors'.
"""
import contextlib, io, json, sys, time
from pathlib import Path
import faster_coco_eval
import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_convert, box_iou
from synthdet.machine import run_info
from synthdet.paths import write_atomic
from synthdet.detection.evaluate import _both, average_precision

OUT = Path(__file__).resolve().parents[1]/'results'/'evaluate.json'
IMAGES, DETECTIONS, BOXES, CLASSES = 1000, 100, 5, 2


def image(g):
    "Boxes, and detections of which half lie near one of them; scores tell near from far, but not always."
    xy, wh = g.uniform(0, 250, (BOXES, 2)), g.uniform(20, 60, (BOXES, 2))
    truth, labels = np.hstack([xy, xy + wh]), g.integers(1, CLASSES + 1, BOXES)
    which, near = g.integers(0, BOXES, DETECTIONS), g.random(DETECTIONS) < .5
    xy, wh = g.uniform(0, 250, (DETECTIONS, 2)), g.uniform(20, 60, (DETECTIONS, 2))
    boxes = np.where(near[:, None], truth[which] + g.normal(0, 4, (DETECTIONS, 4)), np.hstack([xy, xy + wh]))
    found = np.where(near, labels[which], g.integers(1, CLASSES + 1, DETECTIONS))
    scores = np.where(near, g.beta(3, 2, DETECTIONS), g.beta(1, 6, DETECTIONS))
    tensor = lambda x: torch.from_numpy(x).float()
    return (dict(boxes=tensor(boxes), labels=torch.from_numpy(found), scores=tensor(scores)),
            dict(boxes=tensor(truth), labels=torch.from_numpy(labels)))


def loop(predictions, targets):
    "The VOC rule as most write it: one comparison per image, then detection by detection down the scores."
    values = []
    for c in range(1, CLASSES + 1):
        rows, n = [], 0
        for i, (p, t) in enumerate(zip(predictions, targets)):
            found, truth = p['labels'] == c, t['boxes'][t['labels'] == c]
            n += len(truth)
            if not found.any(): continue
            overlaps = torch.full((int(found.sum()), len(truth) + 1), -1.).double() # the last column: no box at all
            overlaps[:, :-1] = box_iou(p['boxes'][found].double(), truth.double())
            best, which = overlaps.max(1)
            rows += zip(p['scores'][found].tolist(), [i]*len(best), which.tolist(), best.tolist())
        taken, good = set(), []
        for _, i, w, b in sorted(rows, key=lambda r: -r[0]):
            good.append(b >= .5 and (i, w) not in taken)
            if b >= .5: taken.add((i, w))
        tp = np.cumsum(good)
        recall, precision = tp/n, tp/np.arange(1, len(tp) + 1)
        values.append(np.sum(np.diff(recall, prepend=0)*np.maximum.accumulate(precision[::-1])[::-1]))
    return float(np.mean(values))


def rows_of(items):
    "Annotations as COCO's programs take them."
    rows = []
    for i, d in enumerate(items, 1):
        xywh, scores = box_convert(d['boxes'], 'xyxy', 'xywh').tolist(), d.get('scores', d['labels']).tolist()
        for box, label, score in zip(xywh, d['labels'].tolist(), scores):
            rows.append(dict(image_id=i, category_id=label, bbox=box, score=score, area=box[2]*box[3], iscrowd=0,
                             id=len(rows) + 1))
    return rows


def coco(index, evaluation, predictions, targets):
    "AP50 alone by one of COCO's programs."
    truth = dict(images=[dict(id=i + 1) for i in range(len(targets))], annotations=rows_of(targets),
                 categories=[dict(id=c + 1, name=str(c)) for c in range(CLASSES)])
    with contextlib.redirect_stdout(io.StringIO()):
        gt = index()
        gt.dataset = truth
        gt.createIndex()
        run = evaluation(gt, gt.loadRes(rows_of(predictions)), 'bbox')
        run.params.iouThrs, run.params.maxDets = np.array([.5]), [100]
        run.params.areaRng, run.params.areaRngLbl = run.params.areaRng[:1], run.params.areaRngLbl[:1]
        run.evaluate()
        run.accumulate()
    precision = np.asarray(run.eval['precision'])
    return float(precision[precision > -1].mean())


RUNS = {
    'ours': average_precision,
    'ours, both rules': lambda p, t: _both(p, t)['ap50'],
    'plain loop': loop,
    'faster-coco-eval': lambda p, t: coco(faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster, p, t),
    'pycocotools': lambda p, t: coco(COCO, COCOeval, p, t),
}


def main(rounds=5):
    torch.set_num_threads(1)
    g = np.random.default_rng(0)
    predictions, targets = map(list, zip(*[image(g) for _ in range(IMAGES)]))
    seconds, values = {name: [] for name in RUNS}, {}
    for _ in range(rounds): # in turns, the fastest of each, since other programs can only add time
        for name, score in RUNS.items():
            start = time.process_time()
            values[name] = score(predictions, targets)
            seconds[name].append(time.process_time() - start)
    best = {name: min(s) for name, s in seconds.items()}
    rows = [dict(name=name, ap50=round(values[name], 5), seconds=round(s, 3), of_ours=round(s/best['ours'], 1))
            for name, s in best.items()]
    for r in rows: print('{name:18}AP50 {ap50:.5f}{seconds:9.3f} s{of_ours:7.1f} times ours'.format(**r))
    assert values['ours'] == values['ours, both rules'] and abs(values['ours'] - values['plain loop']) < 1e-12
    about = dict(command=' '.join(['python', *sys.argv]), images=IMAGES, detections=DETECTIONS, rows=rows,
                 run=run_info())
    write_atomic(OUT, json.dumps(about, indent=1) + '\n')


if __name__ == '__main__': main()
