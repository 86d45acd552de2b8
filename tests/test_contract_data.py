"What every entry of the data floor's dicts keeps, and what all labelled sets, parts of a domain and pools of items do."
import pickle
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import Subset
from torchvision import tv_tensors
from torchvision.transforms.v2 import RandomHorizontalFlip

from synthdet.boxes import unwrap
from synthdet.core import digest, generator, named, refused
from synthdet.data.annotations import annotation, DetectionDataset, FORMATS, read_detection, write_annotations
from synthdet.data.annotations import write_detection
from synthdet.data.batches import batches, collate
from synthdet.data.butterflies import background, scene
from synthdet.data.domain import ClassImage, Domain, Drawn, fingerprint, Missing
from synthdet.data.domains import ClassImages
from synthdet.data.facecrops import FaceCrops
from synthdet.data.held import Held, Resized
from synthdet.data.images import write_image
from synthdet.data.walks import image_files, is_image, listing
from synthdet.data.labels import subset, taken
from synthdet.data.public import Crops
from synthdet.data.settings import AUGMENTS, Labels, ORDERS

H, W = 60, 80


def picture(i=0):
    return torch.from_numpy(generator(i, 'picture').integers(0, 255, (H, W, 3), dtype=np.uint8)).permute(2, 0, 1)


def labelled(i, whole=True):
    "A picture with i % 4 boxes of two classes."
    g, k = generator(int(whole), 'boxes', i), i % 4
    corner, side = g.uniform(0, 30, (k, 2)), g.uniform(1, 29, (k, 2))
    boxes = np.concatenate([corner, corner + side], 1)
    if whole: boxes = boxes.round() + [0, 0, 1, 1]
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return picture(i), dict(boxes=boxes, labels=torch.tensor(g.integers(1, 3, k)), image_id=i)


def on_disk(folder, n=5):
    write_detection([labelled(i) for i in range(n)], folder, 'coco', ['moth', 'bee'])
    return read_detection(folder)


# ---- formats ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('format', FORMATS)
@pytest.mark.parametrize('whole', [True, False])
def test_a_format_gives_back_what_was_written(tmp_path, format, whole):
    data = [labelled(i, whole) for i in range(8)]
    write_detection(data, tmp_path, format, ['moth', 'bee'])
    back = read_detection(tmp_path, classes=['moth', 'bee'])
    bound = dict(coco=0, voc=0 if whole else .5, yolo=1.5e-5*W)[format] + 1e-5
    assert len(back) == 8
    for (image, target), (im, t) in zip(data, back):
        assert torch.equal(im, image) and torch.equal(t['labels'], target['labels'])
        assert t['boxes'].shape == target['boxes'].shape and t['boxes'].dtype == torch.float32
        assert not len(t['boxes']) or (t['boxes'] - target['boxes']).abs().max() <= bound


@pytest.mark.parametrize('format', FORMATS)
def test_a_format_is_written_from_rows_and_the_same_rows_give_the_same_bytes(tmp_path, format):
    rows = [annotation(f'{i}.png', *labelled(i)) for i in range(4)]
    for folder, more in (('a', {}), ('b', {}), ('c', dict(recipe='kept for the records'))):
        write_annotations([{**r, **more} for r in rows], tmp_path/folder, format, ['moth', 'bee'])
    files = lambda top: {p.relative_to(top): p.read_bytes() for p in top.rglob('*') if p.is_file()}
    a, b, c = (files(tmp_path/f) for f in 'abc')
    assert a == b == c and a


# ---- orders ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ORDERS)
def test_an_order_holds_every_item_once_and_subsets_are_its_starts(name, tmp_path):
    order = named('order', name, ORDERS)
    for dataset in (range(100), on_disk(tmp_path), Subset(range(100), range(0, 100, 3)), [0]):
        assert sorted(order(dataset, 0)) == list(range(len(dataset)))
        assert list(order(dataset, 0)) == list(order(dataset))
        indices = subset(dataset, 0, order=name).indices
        assert all(type(i) is int for i in indices)
        for n in range(1, len(dataset)): assert subset(dataset, n, order=order).indices == indices[:n]


def test_only_the_shuffled_order_has_folds():
    assert subset(range(50), 9, 1).indices != subset(range(50), 9, 2).indices
    for name in set(ORDERS) - {'shuffled'}: assert 'leave fold 0' in refused(subset, range(50), 9, 1, name)


def test_validation_may_be_paid_from_the_same_labels():
    for n in (2, 3, 20, 0):
        labels = Labels(n_real=n, fold=2, val='budget')
        seen, chooses = taken(labels, range(40))
        assert seen.indices + chooses.indices == taken(replace(labels, val='full'), range(40))[0].indices
        assert len(chooses) == max(1, round((n or 40)/5))


# ---- what is done to a photograph ------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', AUGMENTS)
def test_an_augmentation_makes_a_stream_of_one_size_from_photographs_of_any(name):
    make = named('augment', name, AUGMENTS)
    photographs = [labelled(3), (picture(1)[:, :40], labelled(4)[1]), labelled(1)]
    stream, again, other = make(photographs, 48, 3), make(photographs, size=48, seed=3), make(photographs, 48, 4)
    for i in (40, 0, 7, 10**9):
        image, target = stream[i]
        assert image.shape == (3, 48, 48) and image.dtype == torch.uint8
        assert isinstance(target['boxes'], tv_tensors.BoundingBoxes) and target['boxes'].canvas_size == (48, 48)
        assert len(target['boxes']) == len(target['labels']) and target['image_id'] in (1, 3, 4)
        assert target['boxes'].dtype == torch.float32
        assert (target['boxes'] >= 0).all() and (target['boxes'] < 48.001).all()
    values = lambda s: digest([[s[i][0], unwrap(s[i][1])['boxes']] for i in range(12)])
    assert values(stream) == values(again) != values(other)
    with pytest.raises(TypeError): len(stream)
    alone, forked = (next(batches(stream, 9, workers=w)) for w in (0, 2))
    assert torch.equal(alone[0], forked[0])
    assert all(torch.equal(s['boxes'], t['boxes']) for s, t in zip(alone[1], forked[1]))
    assert 'the set is empty' in refused(make, [], 48, 0)


# ---- labelled sets ---------------------------------------------------------------------------------------------------

SETS = dict(
    read=lambda folder: on_disk(folder), resized=lambda folder: Resized(on_disk(folder), 48),
    subset=lambda folder: Subset(on_disk(folder), [4, 3, 2, 1, 0]),
    drawn=lambda folder: Drawn(labelled, 5, hold=10**6, classes=['moth', 'bee']),
    crops=lambda folder: Subset(FaceCrops(on_disk(folder), 48), range(5)))


@pytest.mark.parametrize('make', SETS.values(), ids=SETS)
def test_boxes_move_with_the_picture_in_transforms_of_torchvision(tmp_path, make):
    data = make(tmp_path)
    for i in range(5):
        image, target = data[i]
        flipped, moved = RandomHorizontalFlip(1.)(image, target)
        x1, y1, x2, y2 = unwrap(target)['boxes'].unbind(1)
        assert torch.equal(flipped, image.flip(-1))
        mirrored = torch.stack([image.shape[2]-x2, y1, image.shape[2]-x1, y2], 1)
        torch.testing.assert_close(unwrap(moved)['boxes'], mirrored)
    image, target = next(s for s in data if len(s[1]['boxes']))
    image.zero_(), target['boxes'].zero_(), target['labels'].zero_()
    assert all(s[0].any() for s in data) and any(s[1]['boxes'].any() for s in data), 'an item belongs to its receiver'


def test_what_is_kept_and_what_is_collated_is_plain(tmp_path):
    read, resized, drawn = (SETS[k](tmp_path/k) for k in ('read', 'resized', 'drawn'))
    _, targets = collate([resized[i] for i in range(5)])
    kept = [*targets, *read.targets, *resized.targets, drawn[1] and drawn.held[1][1]]
    assert {type(v) for t in kept for v in t.values()} == {torch.Tensor, int}


def test_a_drawn_set_is_drawn_once_and_is_whole(tmp_path, monkeypatch):
    monkeypatch.setenv('SYNTHDET_CACHE', str(tmp_path))
    drawn = []
    def draw(i):
        drawn.append(i)
        return labelled(i)
    draw.content = 'these'
    def made(source='a', n=5):
        drawn.clear()
        data = Drawn(draw, n, 10**6, ['moth', 'bee'], source)
        data.fill()
        return data, len(drawn)
    first, n = made()
    file, = (tmp_path/'drawn').iterdir()
    again, none = made()
    assert (n, none) == (5, 0)
    for (im, t), (im2, t2) in zip([first[i] for i in range(5)], [again[i] for i in range(5)]):
        assert torch.equal(im, im2) and im.stride() == im2.stride() and t.keys() == t2.keys()
        assert all(torch.equal(torch.as_tensor(t[k]), torch.as_tensor(t2[k])) for k in t)
    assert made('b')[1] == 5 and made(n=4)[1] == 4, 'other code and other sizes are other files'
    files = len([*(tmp_path/'drawn').iterdir()])
    Drawn(lambda i: labelled(i), 5, 10**6, ['moth', 'bee'], 'a').fill()
    assert len([*(tmp_path/'drawn').iterdir()]) == files, 'a closure has no name, so what it draws has none'
    whole = file.read_bytes()
    for torn in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b''):
        file.write_bytes(torn)
        assert made()[1] == 5 and file.read_bytes() == whole
    monkeypatch.setenv('SYNTHDET_CACHE', '/proc/no/folder')
    assert made()[1] == 5 and not Drawn(draw, 5, 10**6, ['moth', 'bee']).fill()


# ---- parts of a domain -----------------------------------------------------------------------------------------------

def class_images(folder, **labels):
    "Class images `name=label`, all of them one picture."
    files = [write_image(folder/f'{name}.png', picture()) for name in labels]
    return ClassImages(files, labels.values(), folder)


def test_a_class_image_that_moves_to_another_class_renames_what_is_made_of_it(tmp_path):
    "Names and sizes stay as they are: the label alone tells, and was left out before."
    one, other = (class_images(tmp_path, a=1, b=k) for k in (1, 2))
    assert fingerprint(one) == fingerprint(class_images(tmp_path, a=1, b=1)) != fingerprint(other)
    crops = Crops(on_disk(tmp_path/'d'))
    before = fingerprint(crops)
    crops.labels[0] += 1
    assert fingerprint(crops) != before


def test_a_fingerprint_is_of_values_as_read(tmp_path):
    data = on_disk(tmp_path/'a')
    base = fingerprint(data)
    assert base == fingerprint(on_disk(tmp_path/'b')) == fingerprint(read_detection(tmp_path/'a')), 'wherever it lies'
    own = dict(files=data.files, targets=data.targets, classes=data.classes)
    change = lambda **new: DetectionDataset(**{**own, **new})
    target = data.targets[3]
    others = dict(
        boxes=change(targets=[*data.targets[:3], {**target, 'boxes': target['boxes'] + 1}, data.targets[4]]),
        labels=change(targets=[*data.targets[:3], {**target, 'labels': 3 - target['labels']}, data.targets[4]]),
        order=change(files=data.files[::-1], targets=data.targets[::-1]),
        name=change(files=data.files[:4] + data.files[:1]),
        fewer=change(files=data.files[:4], targets=data.targets[:4]), part=Subset(data, range(4)))
    names = {k: fingerprint(v) for k, v in others.items()}
    assert base not in names.values() and names['fewer'] == names['part'] and len(set(names.values())) == len(names) - 1
    assert fingerprint(Subset(Subset(data, [4, 3, 1]), [2, 0])) == fingerprint(Subset(data, [1, 4]))
    write_image(data.files[0], picture(99)[:, :30])
    assert fingerprint(data) != base, 'another size in bytes'


def test_a_fingerprint_of_what_is_drawn_or_in_memory(tmp_path):
    above = lambda low: Drawn(lambda i: torch.full((2,), i).clamp(min=low), 9)
    pixels = [picture(i) for i in range(3)]
    parts = [
        Drawn(background, 9), Drawn(background, 8), Drawn(partial(background, size=64), 9),
        Drawn(partial(scene, size=64), 9), above(1), above(2), pixels, pixels[:2], [ClassImage(pixels[0], 1, 'a')],
        [ClassImage(pixels[0], 2, 'a')], Subset(Drawn(background, 9), [0, 1]), Resized([labelled(1)], 20),
        Resized([labelled(1)], 21), Missing('none')]
    names = [fingerprint(p) for p in parts]
    assert len(set(names)) == len(names) and fingerprint(above(2)) == names[5] and fingerprint(list(pixels)) == names[6]
    assert fingerprint(None) == names[-1] and fingerprint(*parts) != fingerprint(*parts[:-1])


class Named(list):
    content = 'mine, version 2'
    def __getitem__(self, i): raise AssertionError('its content names it')


def test_what_carries_content_is_named_by_it(tmp_path):
    assert fingerprint(Named('ab')) == fingerprint(Named('abc')) != fingerprint('abc')


def test_a_domain_of_class_images_and_backgrounds_alone_fails_when_more_is_asked_for():
    d = Domain('kites', ('kite',), [ClassImage(picture(), 1, 'a')], [picture(1)])
    assert '1 class images, 1 backgrounds, no train / no val / no test' in repr(d)
    assert isinstance(d.val, Missing) and fingerprint(d.train, d.val, d.test)
    assert "domain 'kites' has no part 'train'; expected one, so give train=" == refused(subset, d.train, 3)


# ---- items in memory -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('budget, kept', [(None, 6), (10**6, 6), (3*H*W*3, 3), (0, 0)])
def test_held_items_are_those_that_were_read(budget, kept):
    items, reads = [picture(i) for i in range(6)], []
    held = Held(range(6), lambda i: reads.append(i) or items[i], budget)
    held.fill()
    assert len(held.kept) == kept and len(reads) == min(kept + 1, 6)
    assert all(torch.equal(a, b) for a, b in zip(held, items, strict=True)) and torch.equal(held[-1], items[5])
    with pytest.raises(IndexError): held[6]
    plain = Held(items, budget=budget)
    plain.fill()
    again = pickle.loads(pickle.dumps(plain))
    assert not again.kept and again.used == 0 and torch.equal(again[2], items[2])


def test_what_is_a_picture(tmp_path):
    "By content: a name decides nothing, but what ends like a picture and is none is an error."
    for folder in ('sub', 'folder.png', '__MACOSX', '@eaDir', '.git'): (tmp_path/folder).mkdir()
    png = write_image(tmp_path/'b.PNG'.lower(), torch.zeros(3, 4, 6, dtype=torch.uint8)).read_bytes()
    for name in ('a.jfif', 'd', '._a.png', 'sub/c.tif', 'sub/._c.tif', '__MACOSX/b.png', '@eaDir/b.png', '.git/b.png',
                 'e.png.part', 'Thumbs.db', 'desktop.ini'): (tmp_path/name).write_bytes(png)
    for name in ('notes.txt', 'classes.yaml'): (tmp_path/name).write_text('P1 of BMW')
    assert [p.name for p in image_files(tmp_path)] == ['a.jfif', 'b.png', 'd']
    assert [p.name for p in image_files(tmp_path, below=True)] == ['a.jfif', 'b.png', 'd', 'c.tif']
    assert [p.name for p in listing(tmp_path)[1]] == ['classes.yaml', 'folder.png', 'notes.txt', 'sub']
    assert is_image(tmp_path/'d') and is_image(tmp_path/'a.jfif') and not is_image(tmp_path/'notes.txt')
    assert not is_image(tmp_path/'folder.png') and not is_image(tmp_path/'gone.png')
    assert not is_image(tmp_path/'._a.png')
    for content, told in ((b'', 'empty'), (b'<html>', 'a web page'), (b'%!PS-Adobe', 'PostScript'),
                          (b'BMW', 'not an image')):
        (tmp_path/'f.JPG').write_bytes(content)
        assert told in refused(image_files, tmp_path) and 'f.JPG' in refused(image_files, tmp_path)
    (tmp_path/'f.JPG').unlink()
    (tmp_path/'f.jpg').symlink_to('nowhere')
    assert 'f.jpg: ' in refused(image_files, tmp_path)
