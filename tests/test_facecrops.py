"The training samples of RetinaFace and of SSD: what is cut, what moves with it, and that seed and number decide."
import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import RandomIoUCrop

from synthdet.core import generator
from synthdet.data.facecrops import crop, FaceCrops, find_crop, mirror, recolour, SCALES
from synthdet.data.patches import find_patch, Patches
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


def white(left, top, right, bottom, size=(120, 200)):
    "A black picture whose only object is white, and its box."
    image = np.zeros((*size, 3), np.uint8)
    image[top:bottom, left:right] = 255
    return image, dict(boxes=np.float32([[left, top, right, bottom]]), labels=np.ones(1, np.int64))


def bounds(image):
    "The box of what is white."
    rows, columns = (np.flatnonzero((image > 160).all(2).any(k)) for k in (1, 0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def looked(image, target, k, size=64):
    "What `Patches` shows of a picture, without other colours, and its boxes."
    with pytest.MonkeyPatch.context() as m:
        m.setattr("synthdet.data.patches.recolour", lambda image, g: image)
        return Patches([(torch.zeros(3, 9, 9, dtype=torch.uint8), {})], size).look(image, target, generator(0, k))


def test_a_patch_shows_objects_where_their_boxes_are():
    image, target = white(60, 30, 120, 80)
    sizes, grounds = [], []
    for k in range(200):
        seen, t = looked(image, target, k)
        assert seen.shape == (64, 64, 3) and len(t["boxes"]) == len(t["labels"]) == 1
        assert np.abs(t["boxes"][0] - bounds(seen)).max() < 2, "whole pixels, and a wide interpolation"
        sizes.append(t["boxes"][0, 2] - t["boxes"][0, 0])
        grounds.append((seen == (123, 117, 104)).all(2).mean())
    assert min(sizes) < 7 and max(sizes) > 45, "a quarter of the picture's, and larger than in it"
    grew = np.mean(np.array(grounds) > .1)
    assert .3 < grew < .6, "around about half of them the ground grew, and is the mean colour"


def test_boxes_go_with_the_patch_that_holds_their_centres():
    image = white(60, 30, 120, 80)[0]
    two = dict(boxes=np.float32([[60, 30, 120, 80], [150, 80, 200, 120]]), labels=np.array([1, 2]))
    found = [looked(image, two, k)[1]["labels"].tolist() for k in range(100)]
    assert [1, 2] in found and [1] in found and [2] in found and [] not in found
    beyond = dict(boxes=np.float32([[150, 80, 230, 130], [300, 200, 320, 220]]), labels=np.array([1, 2]))
    assert all(looked(image, beyond, k)[1]["labels"].tolist() == [1] for k in range(40)), "cut at the border first"


def test_pictures_of_any_size_and_none_with_boxes():
    for h, w in (1, 1), (2, 3), (40, 600), (3000, 4000):
        for boxes in np.zeros((0, 4), np.float32), np.float32([[0, 0, w, h]]):
            seen, t = looked(np.zeros((h, w, 3), np.uint8), dict(boxes=boxes, labels=np.ones(len(boxes))), 3)
            assert seen.shape == (64, 64, 3) and len(t["boxes"]) == len(boxes)


def test_patches_are_drawn_as_torchvision_draws_them():
    boxes, (h, w) = np.float32([[20, 20, 80, 70], [120, 60, 190, 110]]), (120, 200)
    ours = [find_patch(boxes, (h, w), generator(0, k), tries=40) for k in range(1500)]
    assert min((r - l)/(b - t) for l, t, r, b in ours) >= .5 and max((r - l)/(b - t) for l, t, r, b in ours) <= 2
    torch.manual_seed(0)
    theirs, seen = RandomIoUCrop(), []
    for _ in range(1500):
        p = theirs.make_params([tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(h, w))])
        seen.append((p["left"], p["top"], p["left"] + p["width"], p["top"] + p["height"]) if p else (0, 0, w, h))
    whole = lambda found: np.mean([p == (0, 0, w, h) for p in found])
    assert abs(whole(ours) - whole(seen)) < .05
    for k in range(4): assert abs(np.mean(ours, 0)[k] - np.mean(seen, 0)[k]) < 6, "px"
    assert np.abs(np.std(ours, 0) - np.std(seen, 0)).max() < 6
