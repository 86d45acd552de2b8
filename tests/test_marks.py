"Difficult boxes and crowds on their way from files to scores; what learns does not see them."
import contextlib
import io
import warnings

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import ConcatDataset, Subset

from synthdet.boxes import unwrap
from synthdet.core import generator, refused
from synthdet.data.ahead import Bank
from synthdet.data.annotations import FORMATS, read_detection, write_detection
from synthdet.data.batches import batches, collate, forked, Loop, Mixed
from synthdet.data.domain import Drawn
from synthdet.data.facecrops import FaceCrops
from synthdet.data.held import Held, Resized
from synthdet.data.labelled import DetectionDataset, trainable
from synthdet.data.labels import subset, taken
from synthdet.data.public import Crops
from synthdet.data.settings import Labels
from synthdet.detection.evaluate import (average_precision, coco_metrics, COCO_KEYS,
                                         evaluate, match_detections, validator)

SIZE = 96


def boxes(g, n, whole=False):
    corner, side = g.uniform(0, 60, (n, 2)), g.uniform(6, 36, (n, 2))
    found = np.concatenate([corner, corner + side], 1)
    return torch.tensor(found.round() if whole else found, dtype=torch.float32).reshape(-1, 4)


def world(seed, n=12, difficult=.3, crowd=.2):
    "Random targets with marks, and predictions: some near boxes, some inside crowds, some anywhere."
    g, targets, found = generator(seed, 'marks'), [], []
    for _ in range(n):
        b = boxes(g, int(g.integers(0, 7)))
        labels = torch.tensor(g.integers(1, 3, len(b)))
        many = torch.tensor(g.random(len(b)) < crowd)
        hard = torch.tensor(g.random(len(b)) < difficult) | many # as the reader gives crowds
        targets.append(dict(boxes=b, labels=labels, difficult=hard, iscrowd=many))
        near = b.repeat(2, 1) + torch.tensor(g.normal(0, 2.5, (2*len(b), 4)), dtype=torch.float32)
        near[:, 2:] = torch.maximum(near[:, 2:], near[:, :2] + 1)
        small = torch.cat([b[:, :2] + 1, b[:, :2] + 5], 1)[many]
        p = torch.cat([near, small, boxes(g, 4)])
        pl = torch.cat([labels, labels, labels[many], torch.tensor(g.integers(1, 3, 4))])
        found.append(dict(boxes=p, labels=pl, scores=torch.tensor(g.permutation(len(p)) + 1.)/(len(p) + 1)
                          + torch.tensor(g.random(len(p)))*1e-3))
    return found, targets


def reference(found, targets, crowds=True):
    "pycocotools' twelve numbers."
    gt, dt = COCO(), []
    images = [dict(id=i + 1, width=SIZE, height=SIZE) for i in range(len(targets))]
    rows = []
    for i, t in enumerate(targets, 1):
        for k in range(len(t['boxes'])):
            x1, y1, x2, y2 = t['boxes'][k].double().tolist()
            rows.append(dict(id=len(rows) + 1, image_id=i, category_id=int(t['labels'][k]), bbox=[x1, y1, x2-x1, y2-y1],
                             area=(x2-x1)*(y2-y1), iscrowd=int(t['iscrowd'][k]) * crowds))
    for i, p in enumerate(found, 1):
        for b, s, c in zip(p['boxes'].double().tolist(), p['scores'].tolist(), p['labels'].tolist()):
            dt.append(dict(image_id=i, category_id=c, bbox=[b[0], b[1], b[2]-b[0], b[3]-b[1]], score=s))
    with contextlib.redirect_stdout(io.StringIO()):
        gt.dataset = dict(images=images, annotations=rows, categories=[dict(id=c, name=str(c)) for c in (1, 2)])
        gt.createIndex()
        run = COCOeval(gt, gt.loadRes(dt), 'bbox')
        run.evaluate()
        run.accumulate()
        run.summarize()
    return {k: None if v < 0 else float(v) for k, v in zip(COCO_KEYS, run.stats)}


@pytest.mark.parametrize('seed', range(12))
def test_coco_ignores_crowds_as_pycocotools_does(seed):
    found, targets = world(seed)
    wanted, scores = reference(found, targets), coco_metrics(found, targets)
    for k in COCO_KEYS: assert scores[k] == pytest.approx(wanted[k], abs=1e-9), k
    assert scores != pytest.approx(reference(found, targets, crowds=False)), 'the marks matter here'


def overlap(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    area = lambda x: (x[2] - x[0]) * (x[3] - x[1])
    return shared / (area(a) + area(b) - shared)


def voc_ap(found, targets, label, iou=.5):
    "One detection after the other, as the development kit does."
    lines = sorted(((float(s), i, k) for i, p in enumerate(found) for k, s in enumerate(p['scores'])
                    if p['labels'][k] == label), reverse=True)
    usable = lambda t, k: t['labels'][k] == label
    n = sum(bool(usable(t, k) and not t["difficult"][k]) for t in targets for k in range(len(t["boxes"])))
    taken_, tp, fp, points = set(), 0, 0, []
    for _, i, k in lines:
        box, t = found[i]['boxes'][k].tolist(), targets[i]
        best, which = max(((overlap(box, t['boxes'][j].tolist()), -j) for j in range(len(t['boxes'])) if usable(t, j)),
                          default=(-1, 0))
        j = -which
        if best >= iou and t['difficult'][j]: continue
        if best >= iou and (i, j) not in taken_:
            taken_.add((i, j))
            tp += 1
        else: fp += 1
        points.append((tp/n, tp/(tp + fp)))
    area, last = 0, 0
    for m, (r, _) in enumerate(points):
        area, last = area + (r - last)*max(p for _, p in points[m:]), r
    return area


@pytest.mark.parametrize('seed', range(12))
def test_voc_neither_hits_nor_misses_marked_boxes(seed):
    found, targets = world(seed)
    wanted = np.mean([voc_ap(found, targets, c) for c in (1, 2)])
    assert average_precision(found, targets) == pytest.approx(wanted, abs=1e-9)
    assert evaluate(found, targets)['ap50'] == pytest.approx(wanted, abs=1e-9)
    bare = [{k: v for k, v in t.items() if k not in ('difficult', 'iscrowd')} for t in targets]
    assert average_precision(found, bare) != pytest.approx(wanted, abs=1e-6)


def test_a_crowd_takes_any_number_of_detections():
    crowd = dict(boxes=torch.tensor([[0., 0, 90, 90], [0, 0, 20, 20]]), labels=torch.ones(2, dtype=torch.int64),
                 iscrowd=torch.tensor([True, False]), difficult=torch.tensor([True, False]))
    found = dict(boxes=torch.tensor([[0., 0, 20, 20], [30, 30, 40, 40], [0, 0, 90, 88], [0, 0, 88, 90]]),
                 labels=torch.ones(4, dtype=torch.int64), scores=torch.tensor([.6, .9, .8, .7]))
    m = match_detections([found], [crowd])
    assert m.positives == {1: 1} and m.tp.sum() == 1 and m.ignored.sum() == 2
    assert evaluate([found], [crowd])['ap50_coco'] == 1
    assert evaluate([found], [dict(crowd, labels=torch.tensor([2, 1]))])['ap50_coco'] < 1, 'a crowd of another class'


def sample(i, n, marks=()):
    g = generator(i, 'sample')
    image = torch.from_numpy(g.integers(0, 255, (3, SIZE, SIZE), dtype=np.uint8))
    target = dict(boxes=boxes(g, n, whole=True), labels=torch.tensor(g.integers(1, 3, n)), image_id=i)
    return image, target | {m: torch.tensor([k % 2 == j for k in range(n)], dtype=torch.bool) for j,
                            m in enumerate(marks)}


def marked(marks=('difficult',)): return [sample(i, n, marks) for i, n in enumerate((3, 0, 1, 4))]


@pytest.mark.parametrize('chain', [('coco', 'coco'), ('voc', 'coco'), ('coco', 'voc')])
def test_marks_survive_writing_and_reading(tmp_path, chain):
    data = marked(('difficult', 'iscrowd') if set(chain) == {'coco'} else ('difficult',))
    for _, target in data: # a crowd is difficult, too
        if 'iscrowd' in target: target['difficult'] = target['difficult'] | target['iscrowd']
    back = data
    for k, f in enumerate(chain):
        write_detection(back, tmp_path / str(k), f, ['moth', 'bee'])
        back = read_detection(tmp_path / str(k), classes=['moth', 'bee'])
    assert ('5 difficult' if len(data[0][1]) == 4 else '8 difficult') in repr(back)
    assert '(1 without a box)' in repr(back)
    for (image, target), (im, t) in zip(data, back):
        for m in target.keys() - {'image_id'}: assert torch.equal(t[m].as_subclass(torch.Tensor), target[m]), m
        small = Resized(back, 32)
    assert [t['difficult'].tolist() for t in small.targets] == [t['difficult'].tolist() for _, t in data]


def test_what_a_format_cannot_say_is_said(tmp_path):
    data = marked(('difficult', 'iscrowd'))
    with pytest.warns(UserWarning, match='3 crowd regions are written as difficult'):
        write_detection(data, tmp_path / 'v', 'voc', ['moth', 'bee'])
    assert '8 difficult' in repr(read_detection(tmp_path / 'v'))
    with pytest.warns(UserWarning, match='8 boxes marked difficult or iscrowd are left out'):
        write_detection(data, tmp_path / 'y', 'yolo', ['moth', 'bee'])
    assert '0 moth, 0 bee' in repr(read_detection(tmp_path / 'y'))


@pytest.mark.parametrize('format', FORMATS)
def test_sets_without_marks_have_no_column(tmp_path, format):
    write_detection([sample(i, 2) for i in range(2)], tmp_path, format, ['moth', 'bee'])
    assert all(t.keys() == {'boxes', 'labels', 'image_id'} for t in read_detection(tmp_path).targets)


def test_what_learns_does_not_see_marked_boxes(tmp_path):
    write_detection(marked(), tmp_path, 'coco', ['moth', 'bee'])
    ds = read_detection(tmp_path)
    wanted = {t['image_id']: t['boxes'][~t['difficult']] for t in ds.targets}
    assert [len(b) for b in wanted.values()] == [1, 0, 0, 2]
    resized = Resized(ds, SIZE)
    for source in (resized, Mixed(resized, resized, .5), Subset(resized, [3, 2, 1, 0])):
        stream = batches(source, 4)
        for _, (_, targets) in zip(range(3), stream):
            for t in targets:
                assert torch.equal(t['boxes'], wanted[t['image_id']]) and 'difficult' not in t
    crops = FaceCrops(ds, 64)
    for i in range(24):
        t = crops[i][1]
        assert len(t['boxes']) <= len(wanted[t['image_id']]) and 'difficult' not in t
    part, _ = taken(Labels(n_real=3), ds)
    assert all('difficult' in t for _, t in part), 'a test needs them'


def test_a_set_of_marked_boxes_alone_ranks_no_model():
    image, target = sample(0, 2, ('difficult',))
    hard = dict(target, difficult=torch.tensor([True, True]))
    assert 'holds no box' in refused(validator, [(image, hard)])
    assert callable(validator([(image, target)]))
    assert evaluate([dict(target, scores=torch.ones(2))], [hard])['ap50'] is None


def test_strata_know_what_can_be_learned():
    targets = [dict(boxes=torch.zeros(1, 4), labels=torch.tensor([1]), difficult=torch.tensor([i % 2 == 1]))
               for i in range(40)]
    ds = DetectionDataset(['a.png']*40, targets, ['bird'])
    for n in (10, 20): assert sum(len(trainable(ds.targets[i])['labels']) for i in subset(ds, n).indices) == n//2


def test_reading_marks_makes_no_noise(tmp_path):
    write_detection(marked(), tmp_path, 'coco', ['moth', 'bee'])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        read_detection(tmp_path)


def marked_everywhere(i):
    "A drawn scene whose targets hold all that a target can hold, some of them without a box."
    g, n = generator(i, 'everything'), i % 3
    image = torch.tensor(g.integers(0, 255, (3, SIZE, SIZE)), dtype=torch.uint8)
    hard = torch.arange(n) % 2 == i % 2
    return image, dict(boxes=boxes(g, n, whole=True), labels=torch.ones(n, dtype=torch.int64), image_id=70 + i,
                       difficult=hard, iscrowd=~hard, landmarks=torch.tensor(g.random((n, 5, 2))))


def kept_drawn(tmp_path, monkeypatch):
    "A drawn set that is read from where an earlier one was kept."
    monkeypatch.setenv('SYNTHDET_CACHE', str(tmp_path))
    first, again = (Drawn(marked_everywhere, 6, 10**8, ['moth'], 'source') for _ in range(2))
    first.fill()
    assert len([*tmp_path.glob('drawn/*')]) == 1
    monkeypatch.setattr(again.held, 'prepare', None)
    again.fill()
    return again


WRAPPERS = dict(
    drawn=lambda data: data,
    dataset=lambda data: DetectionDataset(['a.png']*6, [unwrap(t) for _, t in data], data.classes),
    resized=lambda data: Resized(data, 48), subset=lambda data: Subset(data, range(6)),
    first=lambda data: subset(data, 0, order='first'), held=Held,
    joined=lambda data: ConcatDataset([data, Subset(data, [])]),
    loop=lambda data: Loop(Subset(data, range(6))), mixed=lambda data: Mixed(data, data, .5),
    resized_subset=lambda data: Resized(Subset(data, range(6)), 48), collated=lambda data: list(zip(*collate([*data]))),
    ahead=lambda data: Bank(data.__getitem__, ahead=2), forked=lambda data: list(forked(data.__getitem__, range(6), 1)))


@pytest.mark.parametrize('name', WRAPPERS)
def test_no_wrapper_drops_a_mark(name, tmp_path, monkeypatch):
    data = kept_drawn(tmp_path, monkeypatch)
    if name == 'dataset':
        monkeypatch.setattr('synthdet.data.labelled.read_image', lambda *_, **__: marked_everywhere(0)[0])
    wrapped = WRAPPERS[name](data)
    found = {t['image_id']: t for _, t in (wrapped[i] for i in range(12 if name == 'mixed' else 6))}
    assert sorted(found) == [70 + i for i in range(6)], 'the numbers of images, too'
    for i in range(6):
        right, t = marked_everywhere(i)[1], found[70 + i]
        for m in ('difficult', 'iscrowd'): assert torch.equal(t[m], right[m]) and t[m].dtype == torch.bool
        assert torch.allclose(torch.as_tensor(t['boxes']), right['boxes']*(.5 if 'resized' in name else 1))
        assert 'resized' in name or torch.equal(t['landmarks'], right['landmarks'])


def test_what_cannot_be_kept_as_columns_is_drawn_anew(tmp_path, monkeypatch):
    monkeypatch.setenv('SYNTHDET_CACHE', str(tmp_path))
    odd = dict(text=lambda i, t: {**t, 'note': 'a'},
               some=lambda i, t: t if i else {k: t[k] for k in ('boxes', 'labels')},
               whole=lambda i, t: {**t, 'size': torch.tensor([1, 2, 3, 4, 5])})
    for name, change in odd.items():
        def draw(i):
            image, target = marked_everywhere(i)
            return image, change(i, target)
        draw.content = name
        data = Drawn(draw, 6, 10**8, ['moth'], 'source')
        data.fill()
        assert [t.keys() for _, t in data] == [draw(i)[1].keys() for i in range(6)]
    assert not [*tmp_path.glob('drawn/*')]


def test_what_learns_from_crops_sees_no_marked_boxes(tmp_path):
    write_detection(marked(), tmp_path, 'coco', ['moth', 'bee'])
    data = read_detection(tmp_path)
    whole = [(i, k) for i, t in enumerate(data.targets) for k in range(len(t['boxes'])) if not t['difficult'][k]]
    assert sorted(Crops(data).items) == whole
