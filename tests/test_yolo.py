"Annotated folders as tools write them: what they hold, what is passed over, and what nobody could know."
import json
import os
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synthdet import core
from synthdet.core import UserError
from synthdet.data.annotations import read_detection
from synthdet.data.domain import Missing
from synthdet.data.domains import load_domain

W, H = 80, 60
BIRD, CAT = (20, 15, 60, 45), (0, 0, 40, 30)
ROW = {BIRD: '.5 .5 .5 .5', CAT: '.25 .25 .5 .5'}


def refused(*args, **options):
    "The line of a refusal, which says what to do."
    line = core.refused(*args, **options)
    assert '\n' not in line and ('; ' in line or ', so ' in line), line
    return line


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
    segments = dict(images=[], annotations=[dict(segments_info=[dict(id=1, bbox=[0, 0, 1, 1])], file_name='x.png')], categories=[])
    text(d/'annotations'/'panoptic_train2017.json', json.dumps(segments))
    text(d/'annotations'/'captions_train2017.json', json.dumps(dict(images=[], annotations=[dict(id=1, caption='a')])))
    text(d/'annotations'/'image_info_test-dev2017.json', json.dumps(dict(images=[], categories=[])))
    return {'train2017/000000000009.jpg': [BIRD, CAT]}


def label_studio_coco(d):
    picture(d/'images'/'1a2b3c4d-a.png')
    coco(d/'result.json', ('images\\1a2b3c4d-a.png', [BIRD]))
    return {'images/1a2b3c4d-a.png': [BIRD]}


TOOLS = [label_studio, cvat_yolo, cvat_ultralytics, roboflow_yolo, roboflow_darknet, roboflow_coco, roboflow_voc, labelimg,
         makesense, darknet, voc_label, x_anylabeling, labels_in_each, windows_zip, linked, cvat_voc, labelme_voc,
         official_voc, cvat_coco, official_coco, label_studio_coco]


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
