"Exports as other tools read them: parts, masks, outlines, the development kit's layout; grown, killed, asked for anew."
import contextlib
import io

import cv2
import numpy as np
import pytest
import supervision as sv
import torch
from pycocotools.coco import COCO
from torchvision.datasets import CocoDetection, VOCDetection, wrap_dataset_for_transforms_v2

from helpers import contents
from synthdet.boxes import masks_to_boxes
from synthdet.core import refused, UserError
from synthdet.data import butterflies
from synthdet.data.annotations import annotation, read_detection, write_annotations
from synthdet.synthesis import disk
from synthdet.synthesis.cut import cutout
from synthdet.synthesis.disk import write_stream
from synthdet.synthesis.settings import EXPORTS, paper_recipe, Recipe
from synthdet.synthesis.stream import Samples

N, VAL = 12, .25
SPLITS = dict(val=[0, 4, 8], train=[1, 2, 3, 5, 6, 7, 9, 10, 11])
HOW = dict(coco=dict(format='coco'), yolo=dict(format='yolo'), voc=dict(format='voc'),
           vocdevkit=dict(format='vocdevkit'), outlines=dict(format='yolo', outlines=True))
LINES = 60 # pixels of the lines that join parts, in objects of up to six
RECIPE = Recipe(image_size=96, count=(1, 4), max_overlap=.8, min_visible=.1) # much is hidden: parts and holes


@pytest.fixture(scope='module')
def pool():
    found = [cutout(*butterflies.class_image(i, size=48), origin=f'butterfly {i}') for i in range(8)]
    return [c for c in found if c]


@pytest.fixture(scope='module')
def make(pool):
    backgrounds = [butterflies.background(i, size=96) for i in range(4)]
    return lambda recipe=RECIPE, with_masks=True: Samples(pool, backgrounds, recipe, with_masks=with_masks,
                                                          classes=('butterfly',))


@pytest.fixture(scope='module')
def sets(make, tmp_path_factory):
    place = tmp_path_factory.mktemp('sets')
    return {name: write_stream(make(), place/name, N, val=VAL, **how) for name, how in HOW.items()}


@pytest.fixture(scope='module')
def truth(make):
    samples = make()
    return [samples[i][1] for i in range(N)]


def by_number(ds):
    "What supervision read: sample -> its annotations."
    return {int(path[-10:-4]): a for path, a in ds.annotations.items()}


def same_boxes(theirs, target, atol): return np.allclose(np.reshape(theirs, (-1, 4)), target['boxes'], atol=atol)


@pytest.mark.parametrize('recipe', [RECIPE, paper_recipe('birds', image_size=96)], ids=['free', 'paper'])
def test_boxes_are_the_extents_of_masks(make, recipe):
    samples = make(recipe)
    for i in range(8):
        target = samples[i][1]
        assert torch.equal(target['boxes'].as_subclass(torch.Tensor), masks_to_boxes(target['masks']))


def test_coco_is_read_with_its_masks(sets, truth):
    for split, numbers in SPLITS.items():
        with contextlib.redirect_stdout(io.StringIO()):
            c, own = COCO(sets['coco']/f'{split}.json'), sets['coco']/f'{split}.json'
            theirs = wrap_dataset_for_transforms_v2(CocoDetection(sets['coco']/'images', own),
                                                    target_keys=('boxes', 'masks', 'labels'))
        assert [int(c.imgs[k]['file_name'][:6]) for k in c.getImgIds()] == numbers
        for k, i, (_, target) in zip(c.getImgIds(), numbers, theirs):
            masks = truth[i]['masks'].numpy()
            assert np.array_equal([c.annToMask(a) for a in c.loadAnns(c.getAnnIds(k))], masks)
            assert np.array_equal(target['masks'], masks) and same_boxes(target['boxes'], truth[i], 0)
    ds = sv.DetectionDataset.from_coco(f"{sets['coco']}/images", f"{sets['coco']}/train.json", force_masks=True)
    for i, a in by_number(ds).items():
        assert np.array_equal(a.mask, truth[i]['masks']) and same_boxes(a.xyxy, truth[i], 0)


@pytest.mark.parametrize('name', ['yolo', 'outlines'])
def test_yolo_is_read_by_its_folders(sets, truth, name):
    "Boxes to five decimals; an outline has the box as its extent, and filled it is the mask but for its border."
    for split, numbers in SPLITS.items():
        parts = [str(sets[name]/part/split) for part in ('images', 'labels')]
        masks = name == 'outlines'
        read = by_number(sv.DetectionDataset.from_yolo(*parts, f'{sets[name]}/data.yaml', force_masks=masks))
        assert sorted(read) == numbers
        for i, a in read.items():
            assert same_boxes(a.xyxy, truth[i], 1e-3)
            if not masks: continue
            for theirs, ours in zip(a.mask.astype(np.uint8), truth[i]['masks'].numpy().astype(np.uint8)):
                inner, outer = cv2.erode(ours, np.ones((3, 3))), cv2.dilate(ours, np.ones((3, 3)))
                missed, more = inner > theirs, theirs > outer
                assert not missed.any() and more.sum() <= LINES, 'only borders, and lines between parts'


def test_the_development_kit_is_opened_by_its_year(sets, truth):
    for split, numbers in dict(SPLITS, trainval=range(N)).items():
        ds = VOCDetection(sets['vocdevkit'], year='2012', image_set=split)
        assert [int(a['annotation']['filename'][:6]) for _, a in ds] == list(numbers)
        for i, (image, a) in zip(numbers, ds):
            boxes = [[int(o['bndbox'][k]) for k in ('xmin', 'ymin', 'xmax', 'ymax')] for o in a['annotation']['object']]
            assert same_boxes(np.array(boxes) - [1, 1, 0, 0], truth[i], 0) and image.size == (96, 96)


@pytest.mark.parametrize('name', HOW)
def test_we_read_what_we_write(sets, truth, name):
    place = sets[name]/'VOCdevkit'/'VOC2012' if name == 'vocdevkit' else sets[name]
    for split, numbers in SPLITS.items():
        ds = read_detection(place, split=split)
        assert [int(f.stem) for f in ds.files] == numbers and ds.classes == ('butterfly',)
        for i, t in zip(numbers, ds.targets): assert same_boxes(t['boxes'], truth[i], 1e-3)


def test_a_set_without_parts_is_as_it_was(make, tmp_path):
    "No option, no other file: the development kit alone is new."
    for format in EXPORTS: write_stream(make(with_masks=False), tmp_path/format, 2, format)
    top = {f: sorted(p.name for p in (tmp_path/f).iterdir()) for f in EXPORTS}
    shared = ['images', 'provenance.jsonl', 'stream.yaml']
    assert top['coco'] == ['annotations.json', *shared] and top['voc'] == ['annotations', *shared]
    assert top['yolo'] == sorted(['data.yaml', 'labels', *shared])
    assert [len(VOCDetection(tmp_path/'vocdevkit', '2012', s)) for s in ('train', 'trainval')] == [2, 2]
    with pytest.raises(FileNotFoundError): VOCDetection(tmp_path/'vocdevkit', '2012', 'val')


@pytest.mark.parametrize('name', HOW)
def test_grown_or_stopped_an_export_keeps_its_parts(sets, make, tmp_path, monkeypatch, name):
    "Begun with 5 images, stopped at the eighth, gone on: the files of one that was written at once."
    whole, write = contents(sets[name]), disk.write_image
    write_stream(make(), tmp_path, 5, val=VAL, **HOW[name])
    before = contents(tmp_path)
    assert {k for k in before if k.endswith('.jpg')} < whole.keys()

    def stopped(path, image):
        if path.stem == '000008': raise KeyboardInterrupt
        return write(path, image)
    monkeypatch.setattr(disk, 'write_image', stopped)
    with pytest.raises(KeyboardInterrupt): write_stream(make(), tmp_path, N, val=VAL, **HOW[name])
    assert 'is not written to its end' in refused(read_detection, tmp_path)
    monkeypatch.undo()
    write_stream(make(), tmp_path, N, val=VAL, **HOW[name])
    assert contents(tmp_path) == whole


def test_what_is_asked_for_otherwise_is_told(sets, make):
    before = contents(sets['outlines'])
    for how, told in (
            (dict(val=.1), 'another val'), (dict(val=0, outlines=False), 'another val, outlines'),
            (dict(format='coco', outlines=False), 'another format, outlines'), (dict(suffix='.png'), 'another suffix')):
        line = refused(write_stream, make(), sets['outlines'], N, **{**dict(val=VAL), **HOW['outlines'], **how})
        assert told in line and 'ask for the same' in line, line
    plain = refused(write_stream, make(with_masks=False), sets['coco'], N, val=VAL)
    assert 'another masks' in plain
    other = refused(write_stream, make(RECIPE.__class__(image_size=96)), sets['coco'], N, val=VAL)
    assert 'holds another stream' in other
    assert contents(sets['outlines']) == before


def test_what_cannot_be_written_is_told(make, tmp_path):
    for told, how in {
            'val=0.7: expected the share': dict(val=.7), "val='half': expected": dict(val='half'),
            'val=nan': dict(val=float('nan')), 'n=1: expected at least 2 images': dict(n=1, val=.5),
            'outlines: format coco has no outlines': dict(format='coco', outlines=True),
            "suffix '.png' is unknown; choose from .jpg": dict(format='vocdevkit', suffix='.png')}.items():
        assert told in refused(write_stream, make(), tmp_path/'never', **{**dict(n=4), **how})
    said = refused(write_stream, make(with_masks=False), tmp_path/'never', 4, 'yolo', outlines=True)
    assert 'the samples have no masks' in said
    released = make(paper_recipe('birds', released=True, image_size=96))
    assert 'has boxes that are not those of its masks' in refused(
        write_stream, released, tmp_path/'never', 4, 'yolo', outlines=True)
    assert not (tmp_path/'never').exists()
    row = annotation('a.jpg', torch.zeros(3, 9, 9), dict(boxes=torch.tensor([[1., 1, 5, 5]]), labels=torch.tensor([1])))
    with pytest.raises(UserError, match='has no masks; expected one for each box'):
        write_annotations([row], tmp_path, 'yolo', ['bird'], outlines=True)
