"Annotated folders as tools write them: what they hold, what is passed over, and what nobody could know."
import json
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import remedy
from synthdet.core import UserError
from synthdet.data.annotations import read_detection
from synthdet.data.domains import load_domain

W, H = 80, 60
BIRD, CAT = (20, 15, 60, 45), (0, 0, 40, 30)
ROW = {BIRD: '.5 .5 .5 .5', CAT: '.25 .25 .5 .5'}


def picture(path, shade=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (W, H), (shade, 120, 60)).save(path)


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def yolo(path, *boxes, first=0):
    "Label file of boxes of a bird and a cat."
    text(path, ''.join(f'{first + (BIRD, CAT).index(b)} {ROW[b]}\n' for b in boxes))


def coco(path, *pictures):
    "COCO file of (name, boxes), ids from 1."
    images = [dict(id=i, file_name=n, width=W, height=H) for i, (n, _) in enumerate(pictures, 1)]
    each = [(i, b) for i, (_, boxes) in enumerate(pictures, 1) for b in boxes]
    labels = [dict(id=k, image_id=i, category_id=1 + (BIRD, CAT).index(b), bbox=[*b[:2], b[2] - b[0], b[3] - b[1]])
              for k, (i, b) in enumerate(each, 1)]
    kinds = [dict(id=i, name=n) for i, n in ((1, 'bird'), (2, 'cat'))]
    text(path, json.dumps(dict(info={}, images=images, annotations=labels, categories=kinds)))


def voc(path, name, *boxes):
    "Pascal VOC file."
    part = ('<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>'
            '</object>')
    objects = ''.join(part.format(('bird', 'cat')[(BIRD, CAT).index(b)], b[0]+1, b[1]+1, b[2], b[3]) for b in boxes)
    text(path, f'<?xml version="1.0"?>\n<annotation><filename>{name}</filename><size><width>{W}</width><height>{H}'
               f'</height><depth>3</depth></size>{objects}</annotation>')


def held(data, root):
    "What a set holds: file -> its boxes, the bird's first if both are there."
    found = {}
    for file, t in zip(data.files, data.targets):
        boxes = [tuple(b) for b in np.round(t['boxes'].numpy()).astype(int).tolist()]
        assert [data.classes[k-1] for k in t['labels']] == [('bird', 'cat')[(BIRD, CAT).index(b)] for b in boxes]
        found[Path(file).relative_to(root).as_posix()] = boxes
    return found


# ---- one set as each tool writes it ----------------------------------------------------------------------------------

def label_studio(d):
    for n, b in (('1a2b3c4d-a', BIRD), ('99ffee00-b', CAT)):
        picture(d/'images'/f'{n}.jpg')
        yolo(d/'labels'/f'{n}.txt', b)
    text(d/'classes.txt', 'bird\ncat\n')
    notes = dict(categories=[dict(id=0, name='bird'), dict(id=1, name='cat')], info=dict(year=2024, version='1.0'))
    text(d/'notes.json', json.dumps(notes))
    return {'images/1a2b3c4d-a.jpg': [BIRD], 'images/99ffee00-b.jpg': [CAT]}


def cvat_yolo(d):
    text(d/'obj.data', 'classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n')
    text(d/'obj.names', 'bird\ncat\n')
    text(d/'train.txt', 'data/obj_train_data/day/a.png\ndata/obj_train_data/b.png\n')
    for n, b in (('day/a', [BIRD, CAT]), ('b', [])):
        picture(d/'obj_train_data'/f'{n}.png')
        yolo(d/'obj_train_data'/f'{n}.txt', *b)
    return {'obj_train_data/b.png': [], 'obj_train_data/day/a.png': [BIRD, CAT]}


def cvat_ultralytics(d):
    text(d/'data.yaml', 'names:\n  0: bird\n  1: cat\npath: .\ntrain: train.txt\n')
    text(d/'train.txt', 'data/images/train/a.png\ndata/images/train/b.png\n')
    for n, b in (('a', BIRD), ('b', CAT)):
        picture(d/'images'/'train'/f'{n}.png')
        yolo(d/'labels'/'train'/f'{n}.txt', b)
    return {'images/train/a.png': [BIRD], 'images/train/b.png': [CAT]}


def roboflow_yolo(d):
    text(d/'data.yaml', "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\n"
                        "names: ['bird', 'cat']\n\nroboflow:\n  workspace: w\n  license: CC BY 4.0\n")
    for n in ('README.dataset.txt', 'README.roboflow.txt'): text(d/n, 'birds - v1\n\nThe dataset includes 2 images.\n')
    picture(d/'train'/'images'/'a_jpg.rf.0a1b.jpg')
    yolo(d/'train'/'labels'/'a_jpg.rf.0a1b.txt', BIRD)
    return {'train/images/a_jpg.rf.0a1b.jpg': [BIRD]}


def roboflow_darknet(d):
    text(d/'train'/'_darknet.labels', 'bird\ncat\n')
    for n, b in (('a', BIRD), ('b', CAT)):
        picture(d/'train'/f'{n}.jpg')
        yolo(d/'train'/f'{n}.txt', b)
    text(d/'README.roboflow.txt', 'Exported 2 images, 2 classes')
    return {'train/a.jpg': [BIRD], 'train/b.jpg': [CAT]}


def roboflow_coco(d):
    picture(d/'train'/'a.jpg')
    coco(d/'train'/'_annotations.coco.json', ('a.jpg', [BIRD]))
    text(d/'README.dataset.txt', 'birds')
    return {'train/a.jpg': [BIRD]}


def roboflow_voc(d):
    picture(d/'train'/'a.jpg')
    voc(d/'train'/'a.xml', 'a.jpg', BIRD, CAT)
    text(d/'README.dataset.txt', 'birds')
    return {'train/a.jpg': [BIRD, CAT]}


def labelimg(d):
    "labelImg saves beside the pictures."
    for n, b in (('a', BIRD), ('b', CAT)):
        picture(d/f'{n}.JPG')
        yolo(d/f'{n}.txt', b)
    text(d/'classes.txt', 'bird\ncat\n')
    picture(d/'c.JPG')
    return {'a.JPG': [BIRD], 'b.JPG': [CAT], 'c.JPG': []}


def makesense(d):
    picture(d/'images'/'a.png')
    yolo(d/'labels'/'a.txt', CAT)
    text(d/'labels'/'labels.txt', 'bird\ncat')
    return {'images/a.png': [CAT]}


def darknet(d):
    text(d/'cfg'/'obj.data', 'classes=2\n train  = data/train.txt\nvalid = data/none.txt\nnames=data/birds.names\n')
    text(d/'data'/'birds.names', 'bird\ncat\n')
    picture(d/'data'/'obj'/'a.jpg')
    yolo(d/'data'/'obj'/'a.txt', BIRD)
    text(d/'data'/'train.txt', 'data/obj/a.jpg\r\n')
    return {'data/obj/a.jpg': [BIRD]}


def voc_label(d):
    "Darknet's script for Pascal VOC."
    picture(d/'JPEGImages'/'a.jpg')
    yolo(d/'labels'/'a.txt', BIRD)
    text(d/'voc.names', 'bird\ncat\n')
    return {'JPEGImages/a.jpg': [BIRD]}


def x_anylabeling(d):
    picture(d/'a.png')
    picture(d/'b.png')
    yolo(d/'labels'/'a.txt', BIRD)
    text(d/'labels'/'b.txt', '')
    text(d/'classes.txt', 'bird\ncat')
    text(d/'a.json', json.dumps(dict(version='2.3', flags={}, shapes=[], imagePath='a.png', imageData=None)))
    return {'a.png': [BIRD], 'b.png': []}


def labels_in_each(d):
    "images/ and labels/ in sub-folders."
    for day, b in (('day1', BIRD), ('day2', CAT)):
        picture(d/day/'images'/'a.png')
        yolo(d/day/'labels'/'a.txt', b)
    text(d/'dataset.yaml', 'names: {"1": bird, "2": cat}')
    for day in ('day1', 'day2'): yolo(d/day/'labels'/'a.txt', BIRD if day == 'day1' else CAT, first=1)
    return {'day1/images/a.png': [BIRD], 'day2/images/a.png': [CAT]}


def windows_zip(d):
    "Unpacked by a tool that takes back slashes for letters."
    picture(d/'images\\day1\\a.png')
    yolo(d/'labels\\day1\\a.txt', BIRD)
    text(d/'__MACOSX\\images\\._a.png', b'\0\5')
    text(d/'classes.txt', 'bird\ncat')
    return {'images\\day1\\a.png': [BIRD]}


def linked(d):
    picture(d/'store'/'x'/'a.png')
    yolo(d/'texts'/'a.txt', CAT)
    (d/'set'/'images').mkdir(parents=True)
    (d/'set'/'labels').mkdir()
    (d/'set'/'images'/'day').symlink_to(d/'store'/'x')
    (d/'set'/'labels'/'day').symlink_to(d/'texts')
    (d/'set'/'images'/'round').symlink_to(d/'set')
    text(d/'set'/'data.yml', 'names: [bird, cat]\nnc: 2')
    return {'set/images/day/a.png': [CAT]}


def cvat_voc(d):
    picture(d/'JPEGImages'/'a.png')
    voc(d/'Annotations'/'a.xml', 'a.png', BIRD)
    text(d/'ImageSets'/'Main'/'default.txt', 'a\n')
    text(d/'labelmap.txt', '# label:color_rgb:parts:actions\nbackground:0,0,0::\nbird:128,0,0::\n')
    return {'JPEGImages/a.png': [BIRD]}


def labelme_voc(d):
    picture(d/'JPEGImages'/'a.jpg')
    voc(d/'Annotations'/'a.xml', 'a.jpg', CAT)
    text(d/'class_names.txt', '_background_\nbird\ncat\n')
    for folder in ('SegmentationClass', 'SegmentationClassPNG', 'AnnotationsVisualization'): (d/folder).mkdir()
    picture(d/'AnnotationsVisualization'/'a.jpg')
    return {'JPEGImages/a.jpg': [CAT]}


def official_voc(d):
    d = d/'VOCdevkit'/'VOC2007'
    picture(d/'JPEGImages'/'000005.jpg')
    voc(d/'Annotations'/'000005.xml', '000005.jpg', BIRD)
    for n, line in (('train', '000005\n'), ('bird_train', '000005  1\n')): text(d/'ImageSets'/'Main'/f'{n}.txt', line)
    text(d/'ImageSets'/'Layout'/'train.txt', '000005 1\n')
    return {'VOCdevkit/VOC2007/JPEGImages/000005.jpg': [BIRD]}


def cvat_coco(d):
    picture(d/'images'/'default'/'a.png')
    coco(d/'annotations'/'instances_default.json', ('default/a.png', [BIRD]))
    return {'images/default/a.png': [BIRD]}


def official_coco(d):
    picture(d/'train2017'/'000000000009.jpg')
    coco(d/'annotations'/'instances_train2017.json', ('000000000009.jpg', [BIRD, CAT]))
    coco(d/'annotations'/'person_keypoints_train2017.json', ('000000000009.jpg', []))
    segments = [dict(segments_info=[dict(id=1, bbox=[0, 0, 1, 1])], file_name='x.png')]
    panoptic = dict(images=[], annotations=segments, categories=[])
    text(d/'annotations'/'panoptic_train2017.json', json.dumps(panoptic))
    text(d/'annotations'/'captions_train2017.json', json.dumps(dict(images=[], annotations=[dict(id=1, caption='a')])))
    text(d/'annotations'/'image_info_test-dev2017.json', json.dumps(dict(images=[], categories=[])))
    return {'train2017/000000000009.jpg': [BIRD, CAT]}


def label_studio_coco(d):
    picture(d/'images'/'1a2b3c4d-a.png')
    coco(d/'result.json', ('images\\1a2b3c4d-a.png', [BIRD]))
    return {'images/1a2b3c4d-a.png': [BIRD]}


TOOLS = [label_studio, cvat_yolo, cvat_ultralytics, roboflow_yolo, roboflow_darknet, roboflow_coco, roboflow_voc,
         labelimg, makesense, darknet, voc_label, x_anylabeling, labels_in_each, windows_zip, linked, cvat_voc,
         labelme_voc, official_voc, cvat_coco, official_coco, label_studio_coco]


@pytest.mark.parametrize('tool', TOOLS, ids=lambda t: t.__name__)
def test_a_set_as_the_tool_writes_it(tmp_path, tool):
    wanted = tool(tmp_path)
    data = read_detection(tmp_path/'set' if tool is linked else tmp_path)
    assert held(data, tmp_path) == wanted
    assert [t['image_id'] for t in data.targets][0] in (0, 1)


@pytest.mark.parametrize('tool', TOOLS, ids=lambda t: t.__name__)
def test_what_systems_leave_changes_nothing(tmp_path, tool):
    wanted = tool(tmp_path)
    for folder in [tmp_path] + [p for p in tmp_path.rglob('*') if p.is_dir() and not p.is_symlink()]:
        for p in [p for p in folder.iterdir() if p.is_file() and not p.name.startswith('.')]:
            text(folder/f'._{p.name}', b'\0\5\x16\7')
            text(folder/'__MACOSX'/f'._{p.name}', b'\0\5\x16\7')
            text(folder/'@eaDir'/p.name, b'x')
            text(folder/'.ipynb_checkpoints'/p.name, p.read_bytes())
        for name in ('Thumbs.db', 'desktop.ini', '.DS_Store'): text(folder/name, b'\0x')
    assert held(read_detection(tmp_path/'set' if tool is linked else tmp_path), tmp_path) == wanted


def test_a_folder_of_pictures_or_labels_finds_the_other(tmp_path):
    picture(tmp_path/'images'/'train'/'a.png')
    yolo(tmp_path/'labels'/'train'/'a.txt', BIRD)
    text(tmp_path/'data.yaml', 'names: [bird, cat]')
    for place in ('images/train', 'labels/train', 'images', 'labels', ''):
        assert held(read_detection(tmp_path/place), tmp_path) == {'images/train/a.png': [BIRD]}, place
    elsewhere = read_detection(tmp_path/'labels', images=tmp_path/'images')
    assert held(elsewhere, tmp_path) == {'images/train/a.png': [BIRD]}
    picture(tmp_path/'photos'/'a.png')
    (tmp_path/'images'/'train'/'a.png').unlink()
    assert held(read_detection(tmp_path/'labels', images=tmp_path/'photos'), tmp_path) == {'photos/a.png': [BIRD]}


# ---- names that mean nothing, or something ---------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['test', 'train', 'classes', 'labels', 'readme', 'notes', 'data', 'license', 'val'])
@pytest.mark.parametrize('beside', [True, False])
def test_no_name_is_special(tmp_path, name, beside):
    picture(tmp_path/('' if beside else 'images')/f'{name}.png')
    yolo(tmp_path/('' if beside else 'labels')/f'{name}.txt', CAT)
    text(tmp_path/'obj.names', 'bird\ncat')
    assert list(held(read_detection(tmp_path), tmp_path).values()) == [[CAT]]


@pytest.mark.parametrize('names', ['bird\ncat\n', '0\n1\n2\n'])
def test_a_list_of_classes_is_no_label(tmp_path, names):
    "Beside a picture of the same name, too, and when the names are digits."
    for n in ('classes', 'b'): picture(tmp_path/f'{n}.png')
    yolo(tmp_path/'b.txt', BIRD)
    text(tmp_path/'classes.txt', names)
    data = read_detection(tmp_path)
    assert data.classes == tuple(names.split()) and [len(t['boxes']) for t in data.targets] == [1, 0]


def simple(d, *boxes):
    picture(d/'images'/'a.png')
    yolo(d/'labels'/'a.txt', *boxes)
    return d


NAMES = {  # file -> its text -> the classes
    'data.yaml': [('names: [no, on]', 'no on'), ('names: ["1", 2024-01-01]', '1 2024-01-01'),
                  ('names: bird, cat', 'bird cat'), ('names: {bird: 0, cat: 1}', 'bird cat'),
                  ("names: \"['bird', 'cat']\"", 'bird cat'), ('names:\n  1: cat\n  0: bird\n', 'bird cat'),
                  ('names:\n- " bird "\n- cat\nnc: 2', 'bird cat'), ('\ufeffnames: [Vögel, 猫]', 'Vögel 猫')],
    'birds.yml': [('nc: 2\nnames: ["bird", "cat"]', 'bird cat')],
    'dataset.yaml': [('names:\n  "0": a\n  "1": b', 'a b')],
    'labels/classes.txt': [('bird\r\ncat\r\n', 'bird cat')], 'images/labels.txt': [('bird\ncat', 'bird cat')],
    'labels/predefined_classes.txt': [('bird\ncat', 'bird cat')], '../classes.txt': [('bird\ncat', 'bird cat')],
    '../../coco.names': [('bird\ncat', 'bird cat')], '_darknet.labels': [('bird\ncat', 'bird cat')],
    'notes.json': [(json.dumps(dict(categories=[dict(id=1, name='cat'), dict(id=0, name='bird')])), 'bird cat')]}


@pytest.mark.parametrize('file, content, classes', [(f, *case) for f, cases in NAMES.items() for case in cases])
def test_class_names_wherever_tools_put_them(tmp_path, file, content, classes):
    d = simple(tmp_path/'above'/'set', CAT)
    text(d/file, content)
    data = read_detection(d)
    assert data.classes == tuple(classes.split()) and data.targets[0]['labels'].tolist() == [2]


def test_names_from_one(tmp_path):
    d = simple(tmp_path)
    yolo(d/'labels'/'a.txt', BIRD, CAT, first=1)
    text(d/'data.yaml', 'names: {1: bird, 2: cat}')
    assert held(read_detection(d), d) == {'images/a.png': [BIRD, CAT]}
    yolo(d/'labels'/'a.txt', BIRD)
    assert 'class 0 is unknown; choose from 1 (bird), 2 (cat)' in remedy(read_detection, d)


BAD_NAMES = {
    'data.yaml': [('names: [bird]\nnc: 3', 'nc is'), ('names: {0: bird, 2: cat}', 'expected `names:`'),
                  ('names: []', 'expected `names:`'), ('names: [[a], b]', 'expected `names:`'),
                  ('names: [bird, bird]', "class 'bird' is named 2 times"), ('names: [a/b, c]', 'cannot be one'),
                  ('names: [bird', 'cannot be read as YAML'), ('nc: 1', 'no class names'),
                  ('names: [""]', 'cannot be one'), ('a: &a [*a]', 'YAML'),
                  ('names: [bird]\ntrain: {a: b}', 'expected a path or a list')],
    'notes.json': [('{"categories": 3}', 'no class names'), ('{', 'cannot be read as JSON')]}


@pytest.mark.parametrize('file, content, told', [(f, *case) for f, cases in BAD_NAMES.items() for case in cases])
def test_class_names_that_are_none(tmp_path, file, content, told):
    text(simple(tmp_path, BIRD)/file, content)
    assert told in remedy(read_detection, tmp_path)


def test_class_names_that_differ(tmp_path):
    d = simple(tmp_path/'set', BIRD)
    text(d/'classes.txt', 'bird\ncat')
    text(d/'labels'/'classes.txt', 'bird\ncat')
    text(tmp_path/'data.yaml', 'names: [dog, horse]')          # farther away
    assert read_detection(d).classes == ('bird', 'cat')
    text(d/'data.yaml', 'names: [cat, bird]')
    line = remedy(read_detection, d)
    assert 'data.yaml' in line and 'classes.txt' in line and 'cat' in line


# ---- rows ------------------------------------------------------------------------------------------------------------

def rows_set(d, *texts, names='classes.txt'):
    for i, t in enumerate(texts):
        picture(d/'images'/f'{i}.png')
        text(d/'labels'/f'{i}.txt', t)
    text(d/names, 'bird\ncat' if names.endswith('txt') else 'names: [bird, cat]\n')
    return d


B = '0 .5 .5 .5 .5'
SPELLINGS = [B + ' \t', B + '\r\n\r\n', '\n\n' + B, '\ufeff' + B, '0.0 .5 .5 .5 .5', '0 5e-1 5.0E-01 +.5 0.5',
             B.replace(' ', '\t'), B.replace(' ', ','), B.replace(' ', ', '), '# a comment\n' + B + ' # another',
             B + ' .93', B + ' 1', B + ' 0', B + ' 361', (B + '\n').encode('utf-16'),
             B.replace('.', '0.') + '000000000000']


@pytest.mark.parametrize('row', SPELLINGS, ids=range(len(SPELLINGS)))
def test_rows_as_tools_spell_them(tmp_path, row):
    assert held(read_detection(rows_set(tmp_path, row)), tmp_path) == {'images/0.png': [BIRD]}


POLYGON = '0 .25 .25 .75 .25 .75 .75 .25 .75'
KINDS = {  # texts of a set -> rows whose box is BIRD
    'outlines': ['0 .5 .25 .75 .5 .5 .75 .25 .5', '0 .25 .25 .75 .75 .25 .75'],
    'outlines and boxes': [B, POLYGON, B + '\n0 .25 .25 .75 .25 .75 .75 .25 .75 .3 .7'],
    'oriented boxes': [POLYGON, '0 .75 .25 .75 .75 .25 .75 .25 .25'],
    'outlines with confidence': [POLYGON + ' .9', POLYGON + ' .3 .6 .8'],
    'outlines with confidence and track': [POLYGON + ' .9 4', POLYGON + ' .9 1'],
    'boxes with confidence and track': [B + ' .9 3', B + ' .5 1'],
    'boxes with confidence or not': [B, B + ' .5'],
    'keypoints with visibility': [B + ' .4 .4 2 .6 .6 1', B + ' .4 .4 2 0 0 0'],
    'seventeen keypoints': [B + ' .5 .5 2'*17, B + ' .5 .5 1'*16 + ' 0 0 0']}


@pytest.mark.parametrize('names', ['classes.txt', 'data.yaml'])
@pytest.mark.parametrize('kind', KINDS)
def test_rows_are_understood_over_the_set(tmp_path, kind, names):
    found = held(read_detection(rows_set(tmp_path, *KINDS[kind], names=names)), tmp_path)
    assert all(b == BIRD for boxes in found.values() for b in boxes) and all(found.values()), found


def test_what_nobody_could_know_is_refused_until_it_is_said(tmp_path):
    "The same seven numbers: a triangle, or a box with a keypoint."
    row = '0 .3 .35 .5 .3 .45 .4'
    line = remedy(read_detection, rows_set(tmp_path, row))
    assert 'outlines or boxes with keypoints of x, y' in line and 'kpt_shape' in line and '0.txt, line 1' in line
    (tmp_path/'classes.txt').unlink()
    box = lambda: read_detection(tmp_path).targets[0]['boxes'][0].tolist()
    text(tmp_path/'data.yaml', 'names: [bird, cat]')                # nobody wrote of which kind it is
    assert 'outlines or boxes with keypoints of x, y' in remedy(read_detection, tmp_path)
    for task in ('segment', 'obb'):
        text(tmp_path/'data.yaml', f'names: [bird, cat]\ntask: {task}')
        assert np.allclose(box(), [24, 18, 40, 24])
    text(tmp_path/'data.yaml', 'names: [bird, cat]\ntask: pose')
    assert np.allclose(box(), [4, 12, 44, 30])
    text(tmp_path/'data.yaml', 'kpt_shape: [1, 2]')                 # the names are elsewhere
    text(tmp_path/'classes.txt', 'bird\ncat')
    assert np.allclose(box(), [4, 12, 44, 30])
    (tmp_path/'classes.txt').unlink()
    text(tmp_path/'data.yaml', 'names: [bird, cat]\nkpt_shape: [1, 2]')
    assert np.allclose(box(), [4, 12, 44, 30])
    text(tmp_path/'data.yaml', 'names: [bird, cat]\nkpt_shape: [17, 3]')
    assert '5 numbers, or 56 as kpt_shape says' in remedy(read_detection, tmp_path)
    for odd in ('17', '[17, 4]', '[x, 3]', '[99999999, 3]'):
        text(tmp_path/'data.yaml', f'names: [bird, cat]\nkpt_shape: {odd}')
        assert 'kpt_shape is' in remedy(read_detection, tmp_path)


BAD_ROWS = ['0 .5 .5 .2', '0 .5 .5 .2 high', 'bird .5 .5 .2 .2', '-1 .5 .5 .2 .2', '.5 .5 .5 .2 .2', 'nan .5 .5 .2 .2',
            '0 .5 inf .2 .2', '0 0,5 0,5 0,2 0,2 1 1', '0 .5 .5 .2 .2 -3', '0 .5 .5 .2 .2 1.5', '0 1_0 .5 .2 .2',
            '9 .5 .5 .2 .2', '1e300 .5 .5 .2 .2', '0 320 240 100 80', '0 0 0 40 30', '0 10 10 50 10 50 40 10 40',
            'Car 0.00 0 -1.57 599.41 156.40 629.75 189.25 2.85 2.63 12.34 0.47 1.49 69.44 -1.56',
            '10 20 30 20 30 40 10 40 plane 0']


@pytest.mark.parametrize('row', BAD_ROWS)
def test_a_row_that_is_none_is_named(tmp_path, row):
    line = remedy(read_detection, rows_set(tmp_path, '', row))
    assert '1.txt, line 1' in line, line


def test_label_files_in_capitals(tmp_path):
    "As cameras and Windows name them; passed over they would make negatives of everything."
    d = rows_set(tmp_path, B, B)
    (d/'labels'/'0.txt').rename(d/'labels'/'0.TXT')
    assert held(read_detection(d), d) == {'images/0.png': [BIRD], 'images/1.png': [BIRD]}
    text(d/'labels'/'2.TXT', B)
    assert '2.TXT: its image is missing' in remedy(read_detection, d)


@pytest.mark.parametrize('names', ['classes.txt', 'data.yaml'])
def test_a_single_track_is_no_corner_of_an_outline(tmp_path, names):
    "Of one animal followed through a film each row ends in 1."
    line = remedy(read_detection, rows_set(tmp_path, B + ' .9 1', B + ' .8 1', names=names))
    assert 'outlines' in line and 'boxes with confidence and track' in line and '0.txt, line 1' in line
    box = B + ' .9 1\n' + B + ' .4 2'                              # another track decides
    assert held(read_detection(rows_set(tmp_path, box, B + ' .8 1', names=names)), tmp_path)['images/1.png'] == [BIRD]


@pytest.mark.parametrize('shape', ['[2, 3]', '"[2, 3]"', '"2,3"'])
@pytest.mark.parametrize('behind', ['', ' .87', ' .87 3'])
def test_predicted_keypoints_have_confidences_and_tracks(tmp_path, shape, behind):
    d = rows_set(tmp_path, B + ' .3 .3 .91 .6 .6 .12' + behind, names='data.yaml')
    text(d/'data.yaml', f'names: [bird, cat]\nkpt_shape: {shape}\n')
    assert held(read_detection(d), d) == {'images/0.png': [BIRD]}
    text(d/'labels'/'0.txt', B + ' .3 .3 2 .6 .6 1 .4 .4')          # neither three keypoints nor a track
    assert 'or 11 as kpt_shape says' in remedy(read_detection, d)


@pytest.mark.parametrize('names', ['classes.txt', 'data.yaml'])
def test_keypoints_may_lie_outside_their_box(tmp_path, names):
    far = ' .05 .9 1 .95 .1 0 .5 .5 1 .4 .6 1'                      # hands and feet; all numbers are at most 1
    assert held(read_detection(rows_set(tmp_path, B + far, names=names)), tmp_path) == {'images/0.png': [BIRD]}


SPREAD = [(.2, .25), (.7, .3), (.5, .6), (.8, .8), (.3, .75), (.6, .2), (.25, .5), (.75, .55), (.45, .35), (.55, .85)]


def posed(x, y, k, seen=''):
    "A small box with `k` keypoints in it."
    points = [(x + .03*(i % 3 - 1), y + .04*(i % 2) - .02) for i in range(k)]
    return f'0 {x} {y} .1 .12' + ''.join(f' {a:.4f} {b:.4f}{seen}' for a, b in points)


def turned(x, y, s=1.):
    "The corners of a rectangle that is turned."
    corners = (-.06, .02), (.02, -.06), (.06, -.02), (-.02, .06)
    return '0' + ''.join(f' {x + s*a:.4f} {y + s*b:.4f}' for a, b in corners)


@pytest.mark.parametrize('k, seen', [(1, ''), (2, ''), (5, ''), (3, ' 2'), (4, ' 1')])
@pytest.mark.parametrize('yaml', ['names: [bird, cat]', 'names: [bird, cat]\nkpt_shape: [{}, {}]'])
def test_keypoints_of_which_no_word_is_said_are_no_outlines(tmp_path, k, seen, yaml):
    "Many rows tell: width and height, taken for a corner, stay where they are and lie apart from the others."
    rows_set(tmp_path, *(posed(x, y, k, seen) for x, y in SPREAD))
    text(tmp_path/'data.yaml', yaml.format(k, 3 if seen else 2))
    for (x, y), t in zip(SPREAD, read_detection(tmp_path).targets):
        assert np.allclose(t['boxes'][0], [(x-.05)*W, (y-.06)*H, (x+.05)*W, (y+.06)*H], atol=.02)


@pytest.mark.parametrize('row', [
    posed(.3, .4, 1), posed(.3, .4, 2), posed(.3, .4, 8), B + ' .05 .9 .95 .1', posed(.3, .4, 1, ' 1'),
    posed(.3, .4, 2, ' 1')])
def test_few_rows_of_keypoints_or_outlines_are_refused(tmp_path, row):
    line = remedy(read_detection, rows_set(tmp_path, '', row, row, names='data.yaml'))
    assert '1.txt, line 1' in line and 'keypoints' in line and 'outlines' in line
    assert 'kpt_shape: [number, 2 or 3]' in line


def test_one_box_drawn_out_of_its_picture_makes_no_outlines_of_all_others(tmp_path):
    rows = [posed(.5, .5, 2).replace('.1 .12', '.5 .5', 1)]*20 + [posed(.95, .5, 2).replace('.1 .12', '.2 .2', 1)]
    line = remedy(read_detection, rows_set(tmp_path, '\n'.join(rows), names='data.yaml'))
    assert 'may be outlines or boxes with keypoints of x, y' in line


@pytest.mark.parametrize('behind', ['', ' .9', ' 0.9 7'])
def test_corners_of_rotated_boxes_are_corners(tmp_path, behind):
    "One tells; they are exact, and no keypoints."
    rows_set(tmp_path, *(turned(x, y) + behind for x, y in [(.5, .5), *SPREAD[3:5]]), names='data.yaml')
    assert np.allclose(read_detection(tmp_path).targets[0]['boxes'][0], [.44*W, .44*H, .56*W, .56*H], atol=.02)


def test_small_outlines_of_one_length_in_the_middle_are_outlines(tmp_path):
    "A second corner moves with the first, as no width and height do."
    corners = (0, -.05), (.05, -.02), (.03, .05), (-.03, .05), (-.05, -.01)
    five = lambda x, y: '0' + ''.join(f' {x+a:.3f} {y+b:.3f}' for a, b in corners)
    rows_set(tmp_path, *(five(.45 + .02*i, .45 + .02*i) for i in range(10)), names='data.yaml')
    assert np.allclose(read_detection(tmp_path).targets[0]['boxes'][0], [.4*W, .4*H, .5*W, .5*H], atol=.02)


def sixth(d, *files, names='data.yaml'):
    "A set with boxes whose sixth numbers are given, file by file."
    return rows_set(d, *('\n'.join(f'{B} {v}' for v in values) for values in files), names=names)


ANGLES = {'degrees': [[30], [90, 45]], 'of one picture': [[17]], 'level ones': [[0], [0, 90], [45]],
          'twice in a picture': [[1, 2, 2], [3]], 'all of them': [[v] for v in (7, 3, 9, 1, 8, 2, 6, 5, 4)],
          'fractions, too': [[.5], [90]], 'none': [[0], [.7854]]}


@pytest.mark.parametrize('kind', ANGLES)
def test_a_sixth_number_that_may_be_an_angle_is_refused_until_it_is_said(tmp_path, kind):
    line = remedy(read_detection, sixth(tmp_path, *ANGLES[kind]))
    assert 'boxes with a track, or rotated boxes, class x y w h angle' in line and '.txt, line ' in line
    assert 'task: detect' in line
    text(tmp_path/'data.yaml', 'names: [bird, cat]\ntask: detect')
    assert held(read_detection(tmp_path), tmp_path)['images/0.png'] == [BIRD]*len(ANGLES[kind][0])


@pytest.mark.parametrize('row', [B + ' -30', B + ' 22.5', B + ' 1.5708'])
def test_a_sixth_number_that_is_an_angle_is_refused(tmp_path, row):
    assert 'of rotated boxes the four corners' in remedy(read_detection, rows_set(tmp_path, row))


def test_confidences_are_said_to_be_taken_for_such_until_data_yaml_says_it(tmp_path):
    "Small angles in radians look the same."
    d = sixth(tmp_path/'d', [.3, .9], [.25])
    told = 'the sixth number of 3 rows is taken for a confidence; put task: detect.*the four corners'
    with pytest.warns(UserWarning, match=told) as said: read_detection(d)
    assert len(said) == 1
    text(d/'data.yaml', 'names: [bird, cat]\ntask: detect')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(read_detection(d)) == 2
        for k in (0, 1): assert len(read_detection(sixth(tmp_path/f'{k}', [k], [k]))) == 2, 'not known, or one track'


TRACKS = [[[1], [1, 2], [2, 3], [3]], [[0, 1], [1, 2]], [[400], [7]], [[i, i+1] for i in range(1, 14)], [[1]]*3,
          [[.9, 1], [.3]]]


@pytest.mark.parametrize('n', range(len(TRACKS)))
def test_tracks_count_up_and_stand_once_in_a_picture(tmp_path, n):
    "Frame 10 comes behind frame 9; a track of more than 360 is no angle; confidences end at 1."
    found = held(read_detection(sixth(tmp_path, *TRACKS[n])), tmp_path)
    assert found == {f'images/{i}.png': [BIRD]*len(v) for i, v in enumerate(TRACKS[n])}


def test_a_word_that_is_no_number_is_shown_as_it_stood(tmp_path):
    line = remedy(read_detection, rows_set(tmp_path, B, '0 .5 .5 wide .2'))
    assert "('0 .5 .5 wide .2'); expected numbers, class x y w h (word 4 is no finite number)" in line


# ---- pictures and labels without each other --------------------------------------------------------------------------

def test_pictures_without_labels_count_and_labels_without_pictures_do_not(tmp_path):
    d = rows_set(tmp_path, B, '', names='data.yaml')
    picture(d/'images'/'night'/'c.png')                             # a folder of negatives
    data = read_detection(d)
    assert held(data, d) == {'images/0.png': [BIRD], 'images/1.png': [], 'images/night/c.png': []}
    assert '1 images without a label file' in repr(data)
    for n in 'efgh': yolo(d/'labels'/f'{n}.txt', BIRD)
    line = remedy(read_detection, d)
    assert '4 label files' in line and 'e.txt, f.txt, g.txt' in line and 'h.txt' not in line
    for n in 'efgh': (d/'labels'/f'{n}.txt').rename(d/'labels'/f'._{n}.txt')
    assert len(read_detection(d)) == 3


def test_an_export_without_its_pictures(tmp_path):
    cvat_yolo(tmp_path)
    for p in tmp_path.rglob('*.png'): p.unlink()
    assert 'missing' in remedy(read_detection, tmp_path)
    for n in 'ab': picture(tmp_path.parent/'photos'/f'{n}.png')
    with pytest.raises(UserError): read_detection(tmp_path, images=tmp_path.parent/'nowhere')
    data = read_detection(tmp_path, images=tmp_path.parent/'photos')
    assert held(data, tmp_path.parent) == {'photos/a.png': [BIRD, CAT], 'photos/b.png': []}
    assert '1 labels found by their names alone' in repr(data)


def test_other_files_are_told_once(tmp_path):
    label_studio(tmp_path)
    for n in ('README.md', 'x.csv', 'results.json', 'labels/train.cache'): text(tmp_path/n, 'words 1 2')
    assert '4 other files ignored (README.md, train.cache, results.json, ...)' in repr(read_detection(tmp_path))
    roboflow_coco(tmp_path/'c')
    text(tmp_path/'c'/'train'/'captions_val.json', '{"images": [], "annotations": []}')
    assert '1 other files ignored (captions_val.json)' in repr(read_detection(tmp_path/'c'/'train'))


def test_two_whole_formats_are_an_error_that_names_both(tmp_path):
    cvat_voc(tmp_path)
    yolo(tmp_path/'labels'/'a.txt', BIRD)
    text(tmp_path/'classes.txt', 'bird\ncat')
    line = remedy(read_detection, tmp_path)
    assert 'Pascal VOC XML (Annotations/a.xml)' in line and 'YOLO labels (labels/a.txt)' in line
    assert 'give the path' in line
    assert held(read_detection(tmp_path/'labels'), tmp_path) == {'JPEGImages/a.png': [BIRD]}
    coco(tmp_path/'set.json', ('JPEGImages/a.png', [BIRD]))
    assert 'COCO JSON (set.json)' in remedy(read_detection, tmp_path)
    assert held(read_detection(tmp_path/'set.json'), tmp_path) == {'JPEGImages/a.png': [BIRD]}


def test_two_labels_of_one_picture(tmp_path):
    picture(tmp_path/'images'/'a.png')
    yolo(tmp_path/'labels'/'a.txt', BIRD)
    text(tmp_path/'images'/'a.txt', 'a bird on a meadow')           # somebody's caption
    text(tmp_path/'classes.txt', 'bird\ncat')
    assert held(read_detection(tmp_path), tmp_path) == {'images/a.png': [BIRD]}
    yolo(tmp_path/'images'/'a.txt', CAT)
    assert 'labels a.png, too, and differs' in remedy(read_detection, tmp_path)


# ---- parts of sets ---------------------------------------------------------------------------------------------------

PARTS = dict(train=[BIRD], val=[CAT], test=[BIRD, CAT])


def domain_of(root):
    for p in (root/'detection').rglob('*'): assert p.exists() or p.is_symlink()
    picture(root/'class_images'/'bird'/'a.png')
    picture(root/'class_images'/'cat'/'a.png')
    return load_domain('folder', root)


def ultralytics(d):
    text(d/'data.yaml',
         'path: ../datasets/birds\ntrain: images/train\nval: images/val\ntest: images/test\nnames: [bird, cat]')
    for s, b in PARTS.items():
        picture(d/'images'/s/'a.png')
        yolo(d/'labels'/s/'a.txt', *b)


def ultralytics_bare(d):
    ultralytics(d)
    (d/'data.yaml').rename(d/'labels'/'data.yaml')
    text(d/'labels'/'data.yaml', 'names: [bird, cat]')


def lists(d):
    text(d/'dataset.yaml', 'path: .\ntrain: [one, two]\nval: val.txt\ntest: C:\\me\\test.txt\nnames: {0: bird, 1: cat}')
    for s, place in dict(train='one', val='x', test='y').items():
        picture(d/place/'images'/f'{s}.png')
        yolo(d/place/'labels'/f'{s}.txt', *PARTS[s])
    picture(d/'two'/'images'/'n.png')
    text(d/'val.txt', '/content/birds/x/images/val.png\n')
    text(d/'test.txt', './y/images/test.png\n\n')


def roboflow_parts(d):
    text(d/'data.yaml', 'train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 2\nnames: [bird, cat]')
    for s, place in dict(train='train', val='valid', test='test').items():
        picture(d/place/'images'/'a.jpg')
        yolo(d/place/'labels'/'a.txt', *PARTS[s])


def darknet_parts(d):
    text(d/'obj.names', 'bird\ncat')
    text(d/'obj.data', 'classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names')
    for s, name in dict(train='train', val='valid', test='test').items():
        picture(d/'obj'/f'{s}.jpg')
        yolo(d/'obj'/f'{s}.txt', *PARTS[s])
        text(d/f'{name}.txt', f'data/obj/{s}.jpg')


def coco_parts(d):
    for s, b in PARTS.items():
        picture(d/f'{s}2017'/'1.jpg')
        coco(d/'annotations'/f'instances_{s}2017.json', ('1.jpg', b))
        coco(d/'annotations'/f'person_keypoints_{s}2017.json', ('1.jpg', []))


def roboflow_coco_parts(d):
    for s, place in dict(train='train', val='valid', test='test').items():
        picture(d/place/'a.jpg')
        coco(d/place/'_annotations.coco.json', ('a.jpg', PARTS[s]))


def roboflow_voc_parts(d):
    for s, place in dict(train='train', val='valid', test='test').items():
        picture(d/place/'a.jpg')
        voc(d/place/'a.xml', 'a.jpg', *PARTS[s])


def voc_parts(d):
    for s, b in PARTS.items():
        picture(d/'JPEGImages'/f'{s}.jpg')
        voc(d/'Annotations'/f'{s}.xml', f'{s}.jpg', *b)
        text(d/'ImageSets'/'Main'/f'{s}.txt', f'{s}\n')


def in_an_archive(d): ultralytics(d/'birds-v3'/'birds')


@pytest.mark.filterwarnings('ignore:.*read as one set')
@pytest.mark.parametrize('tool', [
    ultralytics, ultralytics_bare, lists, roboflow_parts, darknet_parts, coco_parts, roboflow_coco_parts,
    roboflow_voc_parts, voc_parts, in_an_archive], ids=lambda t: t.__name__)
def test_the_parts_of_a_set_wherever_the_tool_puts_them(tmp_path, tool):
    tool(tmp_path/'detection')
    domain = domain_of(tmp_path)
    assert domain.classes == ('bird', 'cat')
    for s, wanted in PARTS.items():
        data = read_detection(tmp_path/'detection', split=s)
        for part in (data, getattr(domain, s)):
            found = sorted(b for boxes in held(part, tmp_path).values() for b in boxes)
            assert found == sorted(wanted), s


def test_a_set_of_parts_is_not_one_set_without_a_word(tmp_path):
    ultralytics(tmp_path/'y')
    for place in ('y', 'y/data.yaml'):
        with pytest.warns(UserWarning, match='train .1 images., val .1 images., test .1 images. are read as one set'):
            assert len(read_detection(tmp_path/place)) == 3
    coco_parts(tmp_path/'c')
    assert 'holds 3 JSON files' in remedy(read_detection, tmp_path/'c')
    roboflow_coco_parts(tmp_path/'r')
    assert 'holds the sets test, train, valid' in remedy(read_detection, tmp_path/'r')
    text(tmp_path/'y'/'data.yaml', 'train: /a/images/train\nval: /a/b/train\nnames: [bird, cat]')
    for s in ('val', 'test'):
        for part in ('images', 'labels'):
            for p in (tmp_path/'y'/part/s).iterdir(): p.unlink()
            (tmp_path/'y'/part/s).rmdir()
    assert "split 'x' is unknown; choose from train, val, test" in remedy(read_detection, tmp_path, split='x')
    assert 'has no val set' in remedy(read_detection, tmp_path/'y', split='val')


def test_an_export_of_another_name_is_told(tmp_path):
    cvat_coco(tmp_path/'detection')
    picture(tmp_path/'class_images'/'a.png')
    told = 'annotations/instances_default.json: holds a labelled set without parts'
    with pytest.warns(UserWarning, match=f'{told}.*split=70/15/15'): d = load_domain('folder', tmp_path)
    assert told in remedy(len, d.train)
    (tmp_path/'class_images'/'a.png').unlink()
    (tmp_path/'class_images').rmdir()
    with pytest.warns(UserWarning):
        assert 'holds a labelled set without parts' in remedy(load_domain, 'folder', tmp_path)


def test_lists_of_the_same_pictures_are_what_somebody_wrote(tmp_path):
    "Darknet's paths count from where it is run; its sets are often validated on what they are trained on."
    d = tmp_path/'data'
    picture(d/'obj'/'a.jpg')
    yolo(d/'obj'/'a.txt', BIRD)
    text(d/'obj.names', 'bird\ncat\n')
    for name in ('train', 'test'): text(d/f'{name}.txt', 'data/obj/a.jpg\n')
    text(d/'obj.data', 'classes=2\ntrain=data/train.txt\nvalid=data/test.txt\nnames=data/obj.names\n')
    for place, split in ((d, None), (d, 'train'), (d, 'val'), (d/'obj.data', 'val')):
        assert held(read_detection(place, split=split), d) == {'obj/a.jpg': [BIRD]}
    for name in ('/x/train', '/y/val'): assert not Path(name).exists()
    text(d/'data.yaml', 'train: /x/obj\nval: /y/obj\nnames: [bird, cat]\n')
    assert 'would be the same pictures' in remedy(read_detection, d/'data.yaml', split='val')


def test_a_path_that_is_not_there_leads_nowhere(tmp_path):
    "Taken by letters, `nowhere/..` is a folder that is there: a stranger's, or the whole disk."
    d = simple(tmp_path/'a'/'set', BIRD)
    yolo(tmp_path/'strangers'/'c.txt', CAT)
    picture(tmp_path/'strangers'/'c.png')
    text(d/'data.yaml', f'path: {tmp_path}/nowhere\ntrain: ../strangers\nval: images\nnames: [bird, cat]')
    assert held(read_detection(d), d) == {'images/a.png': [BIRD]}
    assert 'has no train set; found val' in remedy(read_detection, d/'data.yaml', split='train')


def test_a_picture_has_one_name_wherever_a_path_comes_from(tmp_path):
    d = simple(tmp_path/'up'/'set', BIRD)
    text(d/'data.yaml', 'train: images\nval: ..\nnames: [bird, cat]')
    assert held(read_detection(d/'data.yaml'), d) == {'images/a.png': [BIRD]}
    assert len(read_detection(d/'data.yaml').files) == 1


def test_names_with_back_slashes_are_found_in_any_format(tmp_path):
    "Unpacked by a tool that takes them for letters."
    picture(tmp_path/'images\\day\\a.png')
    coco(tmp_path/'set.json', ('/home/me/day/a.png', [BIRD]))
    with pytest.warns(UserWarning, match='found by their names alone'): data = read_detection(tmp_path)
    assert held(data, tmp_path) == {'images\\day\\a.png': [BIRD]}


@pytest.mark.parametrize('n', [2, 5])
def test_json_files_of_other_tools_are_no_annotations(tmp_path, n):
    for i in range(n):
        picture(tmp_path/f'{i}.jpg')
        text(tmp_path/f'{i}.json', json.dumps(dict(version='5.4', shapes=[], imagePath=f'{i}.jpg')))
    line = remedy(read_detection, tmp_path)
    assert 'holds no annotations' in line and '0.json' in line and 'export in one of these formats' in line


def test_a_set_without_any_label_is_told(tmp_path):
    for i in range(2): picture(tmp_path/'images'/f'{i}.png')
    text(tmp_path/'data.yaml', 'names: [bird, cat]')
    with pytest.warns(UserWarning, match='none of 2 pictures has a label file.* 0.txt'): data = read_detection(tmp_path)
    assert held(data, tmp_path) == {'images/0.png': [], 'images/1.png': []}
    for i in range(2): text(tmp_path/'labels'/f'{i}.txt', '')       # backgrounds, as somebody meant
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(read_detection(tmp_path)) == 2


# ---- fuzz ------------------------------------------------------------------------------------------------------------

PIECES = ['0', '1', '-1', '2', '.5', '1.0004', 'nan', 'inf', '1e400', '9'*400, '#', ',', ' ', '\t', '\n', '\r', '\0',
          '\ufeff', 'é', '{', '}', '[', ']', ':', '- ', '&a', '*a', '!!python/object', '"', 'names: ', 'train: ',
          'path: ', '../', '/', '\\', 'C:', 'null', '~', 'yes']


def mutated(g, content):
    "A text with a few pieces put in, taken out or doubled."
    for _ in range(g.choice([1, 1, 2, 5])):
        at, end = sorted(g.randrange(len(content) + 1) for _ in range(2))
        piece = g.choice([g.choice(PIECES), '', content[at:end]])
        content = content[:at] + piece + content[g.choice([at, at, min(at + 1, len(content)), end]):]
    return content


SOURCES = {'labels/a.txt': B + '\n1 .25 .25 .5 .5\n' + POLYGON + '\n', 'classes.txt': 'bird\ncat\n',
           'images.txt': 'images/a.png\nimages/b.png\n',
           'data.yaml': 'path: .\ntrain: images\nval: [images]\ntest: images.txt\nnc: 2\nnames:\n  0: bird\n  1: cat\n',
           'obj.data': 'classes = 2\ntrain = images.txt\nnames = classes.txt\n'}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('seed, n', [(1, 200), pytest.param(14, 2000, marks=pytest.mark.slow)])
def test_damage_ends_in_one_line_or_in_a_set(tmp_path, seed, n):
    "Mutations of texts and of the tree."
    g, read = random.Random(seed), 0
    for stem in 'ab': picture(tmp_path/'images'/f'{stem}.png')
    names = [*SOURCES, 'labels/b.txt', 'labels/train.txt', 'x/labels/a.txt', 'README.txt',
             'annotations/a.xml', 'a.json']
    for _ in range(n):
        for name, content in SOURCES.items(): text(tmp_path/name, content)
        for name in g.sample(list(SOURCES), g.choice([1, 1, 2])): text(tmp_path/name, mutated(g, SOURCES[name]))
        more = tmp_path/g.choice(names) if g.random() < .3 else None
        if more: text(more, mutated(g, SOURCES[g.choice(list(SOURCES))]))
        if g.random() < .1: (tmp_path/g.choice(list(SOURCES))).unlink()
        try: data = read_detection(tmp_path/g.choice(['', '', 'data.yaml', 'images.txt', 'obj.data', 'labels']))
        except UserError as e: assert '\n' not in str(e) and len(str(e)) < 1500, e
        else:
            read += 1
            for t in data.targets:
                b = t['boxes'].numpy()
                assert (b[:, :2] >= 0).all() and (b[:, 2:] <= (W, H)).all() and (b[:, 2:] > b[:, :2]).all()
                assert (t['labels'] > 0).all() and (t['labels'] <= len(data.classes)).all()
        for p in [p for p in tmp_path.rglob('*') if p.is_file() and p.suffix != '.png']: p.unlink()
    assert read > n/5


TAILS = {' .3 .3 .91 .6 .6 .12': ('', ' .87', ' 3', ' .87 3'), ' .3 .3 .6 .6': (' .87', ' .87 3'),
         ''.join(f' .{40+k} .5 .{99-k}' for k in range(17)): ('', ' .87', ' .87 3'), ' 0 0 .2 .5 .5 .9': ('',)}
POSES = [(points, tail) for points, tails in TAILS.items() for tail in tails]


@pytest.mark.parametrize('points, behind', POSES)
def test_predicted_keypoints_are_no_outline_until_it_is_said(tmp_path, points, behind):
    "They were read as outlines around box and keypoints, without a word."
    d = rows_set(tmp_path, B + points + behind, '')
    told = remedy(read_detection, d)
    assert 'predicted keypoints' in told and 'kpt_shape' in told and '0.txt, line 1' in told
    k = 3 if ' .3 .3 .6' not in points else 2
    (d/'classes.txt').unlink()
    text(d/'data.yaml', f'names: [bird, cat]\nkpt_shape: [{len(points.split())//k}, {k}]\n')
    if behind != ' 3': assert held(read_detection(d), d)['images/0.png'] == [BIRD]


OTHER_ROWS = {  # rows of a set that would be boxes elsewhere -> what is said
    'corners': (['0 .4 .3 .6 .7', '0 .8 .1 .95 .3', '0 .1 .7 .3 .9', '0 .7 .7 .9 .9'], 'these look like two corners'),
    'confidence in front': (['0 .93 .5 .5 .2 .4', '0 .88 .2 .2 .1 .1', '0 .9 .5 .4 .5 .4'],
                            'these look like class confidence')}


@pytest.mark.parametrize('kind', OTHER_ROWS)
def test_rows_of_another_order_are_no_boxes(tmp_path, kind):
    rows, said = OTHER_ROWS[kind]
    assert said in remedy(read_detection, rows_set(tmp_path, *rows))


def test_boxes_that_reach_out_are_still_boxes(tmp_path):
    "Half of them by a fifth of the picture, with confidences; small ones in the corner, with centre and size in order."
    rows_set(tmp_path/'a', '0 .9 .5 .6 .5 .9', '0 .2 .3 .2 .3 .8', '0 .5 .5 .2 .2 .7')
    rows_set(tmp_path/'b', '0 .03 .03 .06 .06', '0 .05 .04 .12 .1')
    assert [len(read_detection(tmp_path/n)) for n in 'ab'] == [3, 2]


LFS = 'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 12345\n'


@pytest.mark.parametrize('content', [LFS, '<!DOCTYPE html><html>404 Not Found</html>', '{"bbox": "none"}', 'None'])
def test_a_label_file_without_rows_is_not_an_empty_one(tmp_path, content):
    for n in 'pq': picture(tmp_path/'images'/f'{n}.png')
    yolo(tmp_path/'labels'/'p.txt', BIRD)
    text(tmp_path/'classes.txt', 'bird\ncat')
    text(tmp_path/'labels'/'q.txt', content)
    assert 'q.txt: ' in remedy(read_detection, tmp_path)
    text(tmp_path/'labels'/'q.txt', '')
    assert [len(t['boxes']) for t in read_detection(tmp_path).targets] == [1, 0]


def test_pointers_of_git_lfs_are_named_in_every_format(tmp_path):
    for name in ('a.json', 'p.xml', 'p.txt'):
        folder = tmp_path/name[-3:]
        picture(folder/'p.png')
        text(folder/name, LFS)
        if name == 'p.txt': text(folder/'classes.txt', 'bird')
        assert 'Git LFS' in remedy(read_detection, folder)


@pytest.mark.parametrize('lost', ['labels/q.txt', 'images/q.png'])
def test_a_link_to_nothing_is_no_empty_label(tmp_path, lost):
    "As git-annex leaves files that were not fetched."
    for n in 'pq': picture(tmp_path/'images'/f'{n}.png')
    for n in 'pq': yolo(tmp_path/'labels'/f'{n}.txt', BIRD)
    text(tmp_path/'classes.txt', 'bird\ncat')
    (tmp_path/'notes.md').symlink_to('/nowhere')
    assert len(read_detection(tmp_path)) == 2
    (tmp_path/lost).unlink()
    (tmp_path/lost).symlink_to('../.git/annex/objects/aa/bb/x')
    assert f'{lost}: a link to ' in remedy(read_detection, tmp_path)


@pytest.mark.parametrize('line', ['labels/p.txt', 'train.txt', './data.yaml'])
def test_a_list_names_pictures_and_nothing_else(tmp_path, line):
    picture(tmp_path/'images'/'p.png')
    yolo(tmp_path/'labels'/'p.txt', BIRD)
    text(tmp_path/'train.txt', line)
    text(tmp_path/'data.yaml', 'train: train.txt\nnames: [bird, cat]')
    assert f'1 of its pictures are missing ({line})' in remedy(read_detection, tmp_path)


def test_an_empty_kpt_shape_says_nothing(tmp_path):
    text(rows_set(tmp_path, B)/'classes.txt', '')
    (tmp_path/'classes.txt').unlink()
    text(tmp_path/'data.yaml', 'kpt_shape:\nnames: [bird, cat]')
    assert held(read_detection(tmp_path), tmp_path)


@pytest.mark.parametrize('folder', ['xmls', 'labels', 'a/b'])
def test_pascal_voc_files_lie_in_folders_of_any_name(tmp_path, folder):
    picture(tmp_path/'images'/'p.png')
    voc(tmp_path/folder/'p.xml', 'p.png', BIRD)
    text(tmp_path/folder/'notes.txt', 'nothing')
    assert list(held(read_detection(tmp_path), tmp_path).values()) == [[BIRD]]


def test_empty_labels_beside_a_stray_voc_file_are_undecided(tmp_path):
    "Backgrounds of a YOLO set, and one file of another tool deep below: neither is meant for sure."
    picture(tmp_path/'images/a.png'); text(tmp_path/'labels/a.txt', '')
    text(tmp_path/'old/export/a.xml', '<annotation><filename>a.png</filename></annotation>')
    assert 'holds Pascal VOC XML (old/export/a.xml) and YOLO labels (labels/a.txt)' in remedy(read_detection, tmp_path)
