"Drawn test sets score as they would if they were tested."
import numpy as np
import pytest
import torch

from synthdet.core import refused
from synthdet.detection.evaluate import average_precision
from synthdet.evidence.images import ap50_of, drawn_counts, image_noise, matched, resampled_ap50


def made(seed, n=30, classes=1, difficult=False):
    "Boxes of some pictures, some without any, and detections of them; scores differ within a picture."
    g, targets, found = torch.Generator().manual_seed(seed), [], []
    for i in range(n):
        k = int(torch.randint(0, 4, (1,), generator=g))
        corner = torch.rand(k, 2, generator=g)*50
        t = dict(boxes=torch.cat([corner, corner + 10 + 20*torch.rand(k, 2, generator=g)], 1),
                 labels=torch.randint(1, classes + 1, (k,), generator=g))
        if difficult: t["difficult"] = torch.rand(k, generator=g) < .3
        targets.append(t)
        boxes = torch.cat([t["boxes"] + 3*torch.randn(k, 4, generator=g), t["boxes"], torch.rand(3, 4, generator=g)*20])
        labels = torch.cat([t["labels"], t["labels"], torch.randint(1, classes + 2, (3,), generator=g)])
        keep = torch.rand(len(boxes), generator=g) < .8
        found.append(dict(boxes=boxes[keep], labels=labels[keep], scores=torch.rand(int(keep.sum()), generator=g)))
    return found, targets


def anew(found, targets, counts):
    "The score of a drawn set, tested as any other."
    which = np.repeat(np.arange(len(targets)), counts)
    return 100*average_precision([found[i] for i in which], [targets[i] for i in which])


@pytest.mark.parametrize("how", [{}, dict(classes=3), dict(difficult=True), dict(classes=2, difficult=True)], ids=str)
def test_a_drawn_set_scores_as_if_it_were_tested(how):
    found, targets = made(1, **how)
    scores = resampled_ap50(found, targets, repeats=40)
    right = [anew(found, targets, c) for c in drawn_counts(len(targets), 40)]
    assert list(scores) == right and len(set(right)) > 30


def test_equal_scores_of_different_pictures_keep_the_order_of_pictures():
    found, targets = made(2)
    found = [dict(f, scores=torch.full_like(f["scores"], .5) if len(f["scores"]) < 2 else f["scores"]) for f in found]
    for c in drawn_counts(len(targets), 20): assert ap50_of(matched(found, targets), c) == anew(found, targets, c)


def test_a_class_that_a_drawn_set_lacks_does_not_count():
    box = dict(boxes=torch.tensor([[0., 0, 10, 10]]))
    targets = [dict(box, labels=torch.tensor([c])) for c in (1, 2)]
    found = [dict(t, scores=torch.tensor([.5])) for t in (targets[0], dict(box, labels=torch.tensor([1])))]
    m = matched(found, targets)
    assert ap50_of(m, np.array([2, 0])) == 100 and ap50_of(m, np.array([0, 2])) == 0
    assert ap50_of(m, np.array([1, 1])) == 50
    assert np.isnan(ap50_of(m, np.array([0, 0])))


def test_pictures_without_detections_count():
    found, targets = made(3)
    found = [{k: v[:0] for k, v in f.items()} if i % 2 else f for i, f in enumerate(found)]
    for c in drawn_counts(len(targets), 10): assert ap50_of(matched(found, targets), c) == anew(found, targets, c)
    nothing = [{k: v[:0] for k, v in f.items()} for f in found]
    assert (resampled_ap50(nothing, targets, repeats=5) == 0).all()


def test_draws_are_those_of_the_seed_and_the_same_for_every_arm():
    assert (drawn_counts(9, 5) == drawn_counts(9, 5)).all() and (drawn_counts(9, 5) != drawn_counts(9, 5, seed=1)).any()
    assert (drawn_counts(9, 50).sum(1) == 9).all() and (drawn_counts(9, 50)[:5] == drawn_counts(9, 5)).all()
    share = np.mean(drawn_counts(200, 200) == 0)
    assert abs(share - (1 - 1/200)**200) < .01, "pictures that are not drawn"


def test_noise_of_pictures_stands_beside_that_of_seeds():
    runs, targets = [made(4)[0], made(5)[0]], made(4)[1]
    one, same = image_noise(runs[:1], targets, repeats=200), image_noise([runs[0]]*3, targets, repeats=200)
    assert one["dots"] == [anew(runs[0], targets, 1)] and np.isnan(one["sd"]) and one["images"] == 30
    assert same["sd"] == pytest.approx(0, abs=1e-9) and same["image_sd"] == pytest.approx(one["image_sd"])
    assert one["low"] < one["dots"][0] < one["high"] and one["image_sd"] > 0
    drawn = resampled_ap50(runs[0], targets, repeats=200)
    assert (one["low"], one["high"]) == pytest.approx(tuple(np.quantile(drawn, [.025, .975])))


def test_a_set_that_cannot_be_drawn_from_is_said():
    found, targets = made(6, n=3)
    empty = [{k: v[:0] for k, v in t.items()} for t in targets]
    assert "20 of 20 sets drawn from 3 images hold no box" in refused(resampled_ap50, found, empty, repeats=20)
    assert "2 predictions for 3 targets" in refused(resampled_ap50, found[:2], targets)
