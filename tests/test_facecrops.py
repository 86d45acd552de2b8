"The training samples of RetinaFace: which squares are cut, what moves with them, and that seed and number decide."
import numpy as np
import torch

from synthdet.core import generator
from synthdet.data.facecrops import crop, FaceCrops, find_crop, mirror, recolour, SCALES
from test_retinaface import targets_of


def test_crops_hold_whole_faces_and_centres():
    boxes, seen = np.array([[10, 10, 30, 40], [60, 20, 64, 25], [70, 70, 99, 99]], np.float32), set()
    for k in range(300):
        x, y, side = find_crop(boxes, (120, 100), generator(0, k))
        seen.add(side)
        assert 0 <= x and 0 <= y and x + side <= 100 and y + side <= 120
        assert any(x <= a and y <= b and c <= x + side and d <= y + side for a, b, c, d in boxes)
        target = dict(boxes=boxes, labels=np.ones(3), landmarks=np.repeat(boxes.reshape(3, 2, 2), [3, 2], axis=1))
        image, t = crop(np.zeros((120, 100, 3), np.uint8), target, generator(0, k))
        inside = [b for b in boxes if x < (b[0] + b[2])/2 < x + side and y < (b[1] + b[3])/2 < y + side]
        assert image.shape == (side, side, 3) and len(t["labels"]) == len(inside)
        assert np.allclose(t["boxes"], np.clip(np.array(inside) - [x, y, x, y], 0, side))
        assert np.allclose(t["landmarks"][:, 0], t["boxes"][:, :2])
        assert np.allclose(t["landmarks"][:, 4], t["boxes"][:, 2:])
    assert seen == {int(s*100) for s in SCALES}


def test_a_picture_that_no_square_suits_is_padded():
    assert find_crop(np.array([[0, 0, 100, 101.]]), (120, 100), generator(0)) is None
    whole = dict(boxes=np.array([[0, 0, 100, 60.]]), labels=np.ones(1))
    image, t = crop(np.zeros((60, 100, 3), np.uint8), whole, generator(0))
    assert image.shape == (100, 100, 3) and image[:60].max() == 0 and (image[60:] == (123, 117, 104)).all()
    assert t["boxes"].tolist() == [[0, 0, 100, 60]]


def test_colours():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    before, many = image.copy(), [recolour(image, generator(0, k)) for k in range(200)]
    shift = np.array([m.mean() - image.mean() for m in many])
    assert all(m.dtype == np.uint8 and m.shape == image.shape for m in many)
    assert shift.min() < -40 and shift.max() > 40 and len({m.tobytes() for m in many}) > 150
    assert np.array_equal(image, before), "the picture itself stays"


def test_mirror():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    points = np.float32([[[4, 5], [9, 5], [6, 8], [4, 11], [9, 11]]])
    turned, t = mirror(image, dict(boxes=np.float32([[2, 3, 12, 14]]), landmarks=points))
    assert np.array_equal(turned, image[:, ::-1]) and t["boxes"].tolist() == [[18, 3, 28, 14]]
    assert t["landmarks"].tolist() == [[[21, 5], [26, 5], [24, 8], [21, 11], [26, 11]]], "left and right are exchanged"


def test_samples_follow_from_seed_and_number():
    pictures = [torch.randint(0, 256, (3, 90 + 10*k, 120), dtype=torch.uint8) for k in range(4)]
    photos = list(zip(pictures, targets_of(3, 4, (90, 120))))
    small = [FaceCrops(photos, 64, seed=1, budget_mb=b) for b in (0, 100)] # decoded anew, or held
    for i in (11, 2, 7):
        (a, s), (b, t) = small[0][i], small[1][i]
        assert torch.equal(a, b) and a.shape == (3, 64, 64)
        assert s.keys() == t.keys() == {"boxes", "labels", "landmarks", "landmarks_valid", "image_id"}
        assert all(torch.equal(torch.as_tensor(s[k]), torch.as_tensor(t[k])) for k in s)
        assert s["landmarks_valid"].dtype == torch.bool and s["labels"].dtype == torch.int64
    assert not torch.equal(FaceCrops(photos, 64, seed=2)[2][0], small[0][2][0])
