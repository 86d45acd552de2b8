"COCO files as people's tools write them: what is plainly meant is read, what is not is one line."
import copy
import json
import random
import unicodedata
import warnings

import numpy as np
import pytest
from PIL import Image

from helpers import right_or_refused
from synthdet import core
from synthdet.data.annotations import read_detection

W, H = 80, 60
BOX, CORNERS = [20, 15, 40, 30], [20, 15, 60, 45]


def save(path, size=(W, H)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, (90, 120, 60)).save(path, format='PNG')


def data(image=(), annotation=(), category=()):
    "A file of one picture, annotation and category, with changes; None takes a key away."
    change = lambda row, more: {k: v for k, v in {**row, **dict(more)}.items() if v is not Ellipsis}
    return dict(images=[change(dict(id=1, file_name='a.png', width=W, height=H), image)],
                annotations=[change(dict(id=1, image_id=1, category_id=1, bbox=BOX), annotation)],
                categories=[change(dict(id=1, name='bird'), category)])


def written(folder, content, name='set.json', images=('a.png',)):
    for i in images: save(folder / i)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder / name


def refused(*args, **options):
    line = core.refused(*args, **options)
    assert 'set.json' in line and ('; ' in line or ', so ' in line) and line.isprintable(), line
    return line


# ---- what is plainly meant -------------------------------------------------------------------------------------------

PLAIN = [
    dict(image=dict(width='80', height=' 60 ')), dict(image=dict(width=80., height=60.)),
    dict(image=dict(width=0, height=0)), dict(image=dict(width=None, height='')),
    dict(image=dict(width=..., height=...)),
    dict(image=dict(id='1')), dict(image=dict(id=1.), annotation=dict(image_id='01')),
    dict(annotation=dict(image_id=' 1 ')),
    dict(annotation=dict(category_id='1')), dict(category=dict(id='1'), annotation=dict(category_id=1.)),
    dict(category=dict(id='b'), annotation=dict(category_id='b ')), dict(category=dict(name=' bird\n')),
    dict(annotation=dict(id=...)), dict(annotation=dict(bbox=['20', '15.0', ' 40', 30])),
    dict(annotation=dict(bbox='20 15 40 30')), dict(annotation=dict(bbox='[20, 15, 40, 30]')),
    dict(annotation=dict(bbox=dict(x=20, y=15, width=40, height='30'))),
    dict(annotation=dict(bbox=..., segmentation=[[20, 15, 60, 15, 40, 45]])),
    dict(annotation=dict(bbox=[], segmentation=[20, 15, 60, 15, 60, 45, 20, 45])),
    dict(annotation=dict(bbox=None, segmentation=[[20, 15], [60, 20], [40, 45]])),
    dict(image=dict(file_name=..., coco_url='http://images.example.org/val2017/a.png')),
    dict(image=dict(file_name='images\\a.png')), dict(image=dict(file_name='.\\a.png')),
    dict(image=dict(file_name='/data/local-files/?d=birds%2Fa.png')),
    dict(image=dict(file_name='s3://bucket/birds/a.png')),
    dict(image=dict(file_name='C:\\Users\\me\\a.png')), dict(image=dict(file_name='/home/me/a.png')),
    dict(image=dict(file_name='1a2b3c4d-a.png')), dict(image=dict(file_name='A.PNG')),
] + [dict(annotation=dict(iscrowd=v, ignore=v)) for v in (0, '0', False, None, 0., 'false', '')]


@pytest.mark.filterwarnings('ignore:.*found by their names')
@pytest.mark.parametrize('change', PLAIN, ids=str)
def test_what_is_plainly_meant_is_read(tmp_path, change):
    ds = read_detection(written(tmp_path, data(**change)))
    assert ds.classes == (change.get('category', {}).get('name', 'bird').strip(),)
    (target,) = ds.targets
    assert target['boxes'].tolist() == [CORNERS] and target['labels'].tolist() == [1] and target['image_id'] == 1
    assert target.keys() == {'boxes', 'labels', 'image_id'} and ds[0][0].shape == (3, H, W)


@pytest.mark.parametrize('value', [1, '1', True, 1., 'true', ' True '])
def test_marks_are_read(tmp_path, value):
    for key, mark in (('iscrowd', 'iscrowd'), ('ignore', 'difficult'), ('difficult', 'difficult')):
        (target,) = read_detection(written(tmp_path, data(annotation={key: value}))).targets
        others = {'difficult'} if mark == 'iscrowd' else set() # a crowd is difficult, too
        assert target[mark].tolist() == [True] and target.keys() == {'boxes', 'labels', 'image_id', mark, *others}


ODD = [
    (dict(image=dict(width='wide')), "width is 'wide'; expected a number"),
    (dict(image=dict(height=True)), 'height is True'),
    (dict(image=dict(width='85')), 'is 85 x 60 there'), (dict(image=dict(width=85, height=0)), 'is 85 x ? there'),
    (dict(image=dict(id=True)), 'image id is True'), (dict(image=dict(id=1.5)), 'image id is 1.5'),
    (dict(image=dict(id=None)), 'image id is None'), (dict(image=dict(id=2**70), annotation=dict(image_id=2**70)),
                                                      'not an integer of 64 bits'),
    (dict(image=dict(file_name=7)), 'is no name of a picture'), (dict(image=dict(file_name='a\0.png')), 'is no name'),
    (dict(image=dict(file_name='\ud800.png')), 'is missing'), (dict(image=dict(file_name='b'*5000)), 'is missing'),
    (dict(annotation=dict(image_id=2)), 'image_id 2 is not among the images'),
    (dict(annotation=dict(image_id=[1])), 'image_id is [1]'),
    (dict(annotation=dict(category_id=7)), 'category_id 7 is unknown'),
    (dict(annotation=dict(category_id=None)), 'category_id is None'),
    (dict(annotation=dict(bbox=[1, 2, True, 4])), 'bbox is True'),
    (dict(annotation=dict(bbox=[1, 2, 3])), 'expected four numbers'),
    (dict(annotation=dict(bbox=7)), 'expected four numbers'),
    (dict(annotation=dict(bbox=dict(left=1))), 'expected four numbers'),
    (dict(annotation=dict(iscrowd=2)), 'iscrowd is 2; expected 0 or 1'),
    (dict(annotation=dict(iscrowd='maybe')), 'iscrowd is'),
    (dict(annotation=dict(ignore=[])), 'ignore is []'), (dict(annotation=dict(bbox=...)), 'has no box'),
    (dict(annotation=dict(bbox=..., segmentation=dict(counts='abc', size=[60, 80]))), 'add up to height x width'),
    (dict(annotation=dict(bbox=[.1, .2, .5, .5])), 'all boxes lie within the first pixel'),
] + [(dict(category=dict(name=n)), 'cannot be one') for n in ('', ' ', '.', '..', 'a/b', 'a\\b', 'a\nb', '\0', 'b'*300,
                                                              None, [])]


@pytest.mark.parametrize('change, told', ODD, ids=str)
def test_what_is_not_plain_is_one_line(tmp_path, change, told):
    assert told in refused(read_detection, written(tmp_path, data(**change)))


def test_a_bad_box_is_left_out_and_named(tmp_path):
    content = data()
    bad = [[29.65, 38.33, 1.03, 0], [90, 5, 9, 9], [5, 5, -3, 9], [float('nan'), 5, 9, 9], [70, 20, 20, 10],
           [-30, 10, 40, 20]]
    content['annotations'] += [dict(id=1, image_id=1, category_id=1, bbox=b) for b in bad]
    path = written(tmp_path, content)
    with pytest.warns(UserWarning) as told: ds = read_detection(path)
    assert len(told) == 1 and 'a.png (x1 y1 x2 y2 = 29.65 38.33 30.68 38.33)' in str(told[0].message)
    assert ds.targets[0]['boxes'].tolist() == [CORNERS, [70, 20, 80, 30], [0, 10, 10, 30]]
    notes = ('2 boxes without area left out', '1 boxes outside their picture left out',
             '1 boxes without finite numbers left out', '1 boxes cut at the border', '1 boxes cut to less than half')
    for note in notes: assert note in repr(ds)
    assert 'has no area' in refused(read_detection, path, strict=True)
    content['annotations'] = content['annotations'][1:5]
    assert 'no box can be used' in refused(read_detection, written(tmp_path, content))


def test_annotations_without_a_box_are_counted(tmp_path):
    content = data()
    content['annotations'] += [dict(id=2, image_id=1, caption='a bird'), dict(id=3, image_id=1, keypoints=[1, 2, 2])]
    path = written(tmp_path, content)
    with pytest.warns(UserWarning, match='2 of 3 annotations have no box and are left out; the first: annotation 2'):
        assert '2 annotations without a box left out' in repr(read_detection(path))
    assert 'annotation 2: has no box' in refused(read_detection, path, strict=True)


# ---- categories ------------------------------------------------------------------------------------------------------

def test_unused_roots_are_no_classes(tmp_path):
    for root in ('birds-x7', 'bird'):
        content = data()
        content['categories'] = [dict(id=0, name=root, supercategory='none'),
                                 dict(id=1, name='bird', supercategory=root)]
        assert read_detection(written(tmp_path, content)).classes == ('bird',)
        content['annotations'] += [dict(id=2, image_id=1, category_id=0, bbox=BOX)] # used: it is one
        if root == 'bird': assert 'category bird occurs 2 times' in refused(read_detection, written(tmp_path, content))
        else: assert read_detection(written(tmp_path, content)).classes == ('birds-x7', 'bird')
    content['annotations'] = []
    assert len(read_detection(written(tmp_path, content)).classes) == 1, 'a set of backgrounds'


def test_other_unused_categories_stay_in_the_order_of_their_numbers(tmp_path):
    content = data()
    content['categories'] = [dict(id=i, name=n, supercategory='none') for i,
                             n in (('10', 'ant'), (9, 'bee'), (0, 'cat'), (1, 'bird'))]
    ds = read_detection(written(tmp_path, content))
    assert ds.classes == ('cat', 'bird', 'bee', 'ant') and ds.targets[0]['labels'].tolist() == [2]


def test_names_that_differ_by_blanks_are_one_class(tmp_path):
    content = data()
    content['categories'] += [dict(id=2, name='bird ')]
    content['annotations'] += [dict(id=2, image_id=1, category_id=2, bbox=BOX)]
    ds = read_detection(written(tmp_path, content))
    assert ds.classes == ('bird',) and ds.targets[0]['labels'].tolist() == [1, 1]


# ---- pictures --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('place', ['val2017/a.png', 'images/val2017/a.png', 'annotations/val2017/a.png',
                                   'images/a.png'])
def test_the_official_layout(tmp_path, place):
    path = written(tmp_path, data(), 'annotations/instances_val2017.json', images=[place, 'train2017/a.png'])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert read_detection(path).files == [tmp_path / place]


def test_of_several_pictures_of_a_name_none_is_guessed(tmp_path):
    path = written(tmp_path, data(image=dict(file_name='/home/me/a.png')), images=['x/a.png', 'y/a.png'])
    told = refused(read_detection, path)
    assert 'x/a.png' in told and 'y/a.png' in told
    path = written(tmp_path, data(image=dict(file_name='/home/me/y/a.png')))
    (tmp_path / 'a.png').unlink()
    with pytest.warns(UserWarning,
                      match='1 pictures are not where the annotations say.*y/a.png'): ds = read_detection(path)
    assert ds.files == [tmp_path / 'y/a.png'] and 'found by their names alone' in repr(ds)


def test_one_picture_under_two_names_is_refused(tmp_path):
    content = data(annotation=dict(image_id=1))
    content['images'] += [dict(id=2, file_name='./a.png')]
    assert 'are one picture' in refused(read_detection, written(tmp_path, content))
    content['images'][1]['file_name'] = 'other/a.png'
    assert 'are one picture' in refused(read_detection, written(tmp_path, content))


def test_unicode_forms_of_a_name_are_one(tmp_path):
    name = unicodedata.normalize('NFD', 'Bläuling.png')
    path = written(tmp_path, data(image=dict(file_name=unicodedata.normalize('NFC', name))), images=[name])
    with pytest.warns(UserWarning, match='found by their names'): assert len(read_detection(path)) == 1


def test_pictures_without_a_box_count_as_such(tmp_path):
    content = data()
    content['images'] += [dict(id=i, file_name=f'{i}.png') for i in (2, 3)]
    ds = read_detection(written(tmp_path, content, images=['a.png', '2.png', '3.png']))
    assert '3 images (2 without a box) with 1 bird' == repr(ds) and ds[2][1]['boxes'].shape == (0, 4)


# ---- fuzz ------------------------------------------------------------------------------------------------------------

JUNK = [None, True, False, 0, -1, 1, 2**80, 10**290, 1e308, -1e308, float('nan'), float('inf'), .5, '', ' ', '1', '-3',
        'x',
        '\0', '\ud800', 'a.png', 'a'*300, '..', [], [1, 2], [[]], [[1, 2, 3, 4, 5, 6]], {}, {'id': 1}, {'x': 1}, 'nan',
        '1e400']


def mutated(g, content):
    "A value somewhere replaced, taken away, doubled or moved."
    content, place = copy.deepcopy(content), None
    for _ in range(g.choice([1, 1, 1, 2, 4])):
        node = content
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys: break
            place, key = node, g.choice(keys)
            if not isinstance(node[key], (dict, list)) or g.random() < .2: break
            node = node[key]
        if place is None or (key not in place if isinstance(place, dict) else key >= len(place)): continue
        how = g.random()
        if how < .6: place[key] = copy.deepcopy(g.choice(JUNK))
        elif how < .75: del place[key]
        elif how < .85 and isinstance(place, list): place.append(copy.deepcopy(place[key]))
        else: place[key] = [place[key]] if how < .95 else str(place[key])
    return content


def whole():
    content = data()
    content['images'] += [dict(id='2', file_name='b.png', width='80', height=60., coco_url='http://x/b.png')]
    content['annotations'] += [dict(id=2, image_id='2', category_id=2, bbox=['1', 2, 30, 20.5], iscrowd='1', area=5),
                               dict(id=3, image_id=2, category_id=1, segmentation=[[20, 15, 60, 15, 40, 45]], ignore=0),
                               dict(id=4, image_id=1, category_id=2, bbox=[70, 50, 20, 20], difficult=True)]
    content['categories'] += [dict(id=2, name='bee ', supercategory='insect'),
                              dict(id=0, name='insect', supercategory='none')]
    return content


def test_any_structure_is_read_or_refused(tmp_path):
    g, content = random.Random(0), whole()
    path = written(tmp_path, content, images=['a.png', 'b.png'])
    assert right_or_refused(path, W, H)
    read = 0
    for _ in range(2000):
        path.write_text(json.dumps(mutated(g, content)))
        read += right_or_refused(path, W, H)
    assert 200 < read < 1900, read


def test_any_bytes_are_read_or_refused(tmp_path):
    g = random.Random(1)
    path = written(tmp_path, whole(), images=['a.png', 'b.png'])
    text, read = path.read_bytes(), 0
    for _ in range(2000):
        bad = bytearray(text)
        for _ in range(g.choice([1, 1, 2, 8])):
            at = g.randrange(len(bad))
            how = g.random()
            if how < .5: bad[at] = g.choice(b'0123456789[]{}",:. -eE\\u\x00\xff' if how < .4 else bytes(range(256)))
            elif how < .7: del bad[at:at + g.choice([1, 3, 40])]
            else: bad[at:at] = bad[at:at + g.choice([1, 5, 60])]
        path.write_bytes(bytes(bad))
        read += right_or_refused(path, W, H)
    assert 50 < read < 1900, read


def test_the_folder_data_of_fiftyone_is_a_usual_place(tmp_path):
    written(tmp_path, data(), 'labels.json', ['data/a.png'])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert read_detection(tmp_path).files == [tmp_path / 'data' / 'a.png']


# ---- masks -----------------------------------------------------------------------------------------------------------

def masked(counts, size=(H, W), **more):
    return data(annotation=dict(bbox=..., segmentation=dict(size=list(size), counts=counts), **more))


def lengths(mask):
    "The uncompressed run lengths of a mask, one by one."
    flat, runs, value = mask.T.reshape(-1).tolist(), [0], 0
    for v in flat:
        if v != value: runs, value = [*runs, 0], v
        runs[-1] += 1
    return runs


def masks(g):
    "Masks of every kind: empty, full, spots, a box, a line across the columns, noise."
    for k in range(60):
        mask = np.zeros((H, W), np.uint8)
        y, x, h, w = (int(v) for v in g.integers((0, 0, 1, 1), (H, W, H, W)))
        if k % 6 == 1: mask[:] = 1
        if k % 6 == 2: mask[y, x] = 1
        if k % 6 == 3: mask[y:y+h, x:x+w] = 1
        if k % 6 == 4: mask.T.reshape(-1)[x*H+y:x*H+y+h+7] = 1
        if k % 6 == 5: mask[:] = g.random((H, W)) < (.5, .002)[k % 4 > 1]
        yield mask


def test_the_box_of_a_mask_is_that_of_pycocotools(tmp_path):
    from pycocotools import mask as coco_mask
    for mask in masks(np.random.default_rng(0)):
        run = coco_mask.encode(np.asfortranarray(mask))
        x, y, w, h = coco_mask.toBbox(run).tolist()
        for counts in (run['counts'].decode(), lengths(mask)):
            content = masked(counts, iscrowd=1)
            content['annotations'].append(dict(id=2, image_id=1, category_id=1, bbox=BOX))
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                target = read_detection(written(tmp_path, content)).targets[0]
            assert target['boxes'].tolist() == [[x, y, x+w, y+h]]*bool(mask.any()) + [CORNERS]
            assert not mask.any() or target['iscrowd'].tolist() == [True, False]


GOOD = [0, 5, H*W-5]


@pytest.mark.parametrize('counts, size', [
    (GOOD, (W, H)), (GOOD, (10**9, 10**9)), (GOOD, (-H, -W)), (GOOD, (0, 0)), (GOOD, (H,)), (GOOD, 'x'),
    (GOOD, (True, H*W)), ([0, 5], (H, W)), ([0, 5, H*W], (H, W)), ([5, -5, H*W], (H, W)), ([.5, H*W-.5], (H, W)),
    (['5', 'a'], (H, W)), ([], (H, W)), ({}, (H, W)), (None, (H, W)), ('', (H, W)), ('ooooooooooooooo0', (H, W)),
    ('1P', (H, W)), ('é', (H, W)), ('0'*99, (H, W)), ('Pl\x000', (H, W)), ([2**70, 1], (H, W)), ([2*H*W], (2*H, W))])
def test_a_mask_that_is_none_is_one_line(tmp_path, counts, size):
    content = masked(counts, () if size == 'x' else size)
    if size == 'x': content['annotations'][0]['segmentation']['size'] = 'large'
    told = refused(read_detection, written(tmp_path, content))
    assert 'annotation 1: ' in told and 'so export it again' in told and len(told) < 500
