"Domains of one's own as people lay them out, parts that are missing, other processes, real photographs."
import shutil
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from helpers import needs_shared
from synthdet.core import digest, generator, refused
from synthdet.machine import shared
from synthdet.data.annotations import read_detection, write_detection
from synthdet.data.butterflies import SPLITS
from synthdet.data.domain import fingerprint
from synthdet.data.domains import load_domain
from synthdet.data.held import Resized
from synthdet.data.labels import subset

PARTS = ('class_images', 'backgrounds', 'train', 'val', 'test')


def picture(*key, h=30, w=40):
    return torch.from_numpy(generator(0, *key).integers(0, 255, (h, w, 3), dtype=np.uint8)).permute(2, 0, 1)


def save(path, colour=(90, 120, 60), size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGBA' if len(colour) == 4 else 'RGB', size, colour).save(path)


def labelled(folder, classes, format='coco', n=3):
    "One box per class in each image."
    boxes = torch.tensor([[2., 3, 12, 13], [20, 5, 33, 29]])[:len(classes)]
    target = dict(boxes=boxes, labels=torch.arange(1, len(classes)+1))
    write_detection([(picture(str(folder.name), i), target) for i in range(n)], folder, format, classes)


def lay_out(root, classes=('bird',), format='coco', splits=('train', 'val', 'test')):
    "A whole domain of small pictures."
    for i in range(3):
        save(root/'backgrounds'/f'{i}.jpg')
        for c in classes: save(root/'class_images'/(c if len(classes) > 1 else '')/f'{i}.png', (200, 30, 60, 255))
    for s in splits: labelled(root/'detection'/s, list(classes), format)
    return root


# ---- butterflies -----------------------------------------------------------------------------------------------------

OPTIONS = dict(n_class_images=20, n_backgrounds=10, image_size=48)


def pixels(domain, n=3):
    "The content of the first items of every part."
    def flat(item):
        if isinstance(item, tuple): return [flat(v) for v in item]
        return [flat(v) for v in item.values()] if isinstance(item, dict) else item
    return digest([[flat(getattr(domain, p)[i]) for i in range(n)] for p in PARTS])


@pytest.mark.slow
def test_butterflies_are_the_same_in_another_process():
    code = ("import sys; sys.path.insert(0, 'tests'); from test_domains import *; "
            "print(pixels(load_domain('butterflies', **OPTIONS)))")
    root = Path(__file__).parents[1]
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root, timeout=300)
    assert out.stdout.strip() == pixels(load_domain('butterflies', **OPTIONS)), out.stderr[-500:]


def test_butterflies_in_worker_processes():
    data = subset(load_domain('butterflies', **OPTIONS).train, 6)
    for workers in (0, 2):
        loaded = DataLoader(data, batch_size=None, num_workers=workers)
        for (image, target), (im, t) in zip(data, loaded, strict=True):
            assert torch.equal(image, im) and torch.equal(target['boxes'], t['boxes'])


def test_butterflies_never_meet_twice():
    "No drawing of one part occurs in another."
    d = load_domain('butterflies', **OPTIONS)
    assert len({seed for seed, _ in SPLITS.values()}) == 3
    items = [getattr(d, p)[i] for p in PARTS[1:] for i in range(5)]
    assert len({digest(item[0] if isinstance(item, tuple) else item) for item in items}) == len(items)


def test_butterflies_can_be_written_on():
    "What is done to an item stays with the caller; memory lies as OpenCV wants it."
    d = load_domain('butterflies', **OPTIONS, class_size=32)
    assert [len(getattr(d, p)) for p in PARTS] == [20, 10, 1000, 200, 400]
    assert d.class_images[-1].image.shape == (4, 32, 32)
    for item in (d.class_images[0].image, d.backgrounds[0], d.test[0][0]): assert item.permute(1, 2, 0).is_contiguous()
    d.class_images[0].image.zero_()
    assert d.class_images[0].image.any() and len(list(d.class_images)) == 20


# ---- folders as people lay them out ----------------------------------------------------------------------------------

@pytest.mark.parametrize('format', ['coco', 'voc', 'yolo'])
@pytest.mark.parametrize('classes', [('bird',), ('ant', 'bee')])
def test_folder_in_three_formats(tmp_path, format, classes):
    d = load_domain('folder', lay_out(tmp_path/'garden', classes, format))
    assert (d.name, d.classes) == ('garden', classes)
    assert [len(getattr(d, p)) for p in PARTS] == [3*len(classes), 3, 3, 3, 3]
    assert d.class_images[0].image.shape == (4, 30, 40)
    assert [c.label for c in d.class_images] == sorted([1, 2][:len(classes)]*3)
    image, target = d.test[0]
    assert target['labels'].tolist() == [1, 2][:len(classes)] and image.shape == (3, 30, 40)
    for words in ('garden', *classes, '3 backgrounds', '3 train / 3 val / 3 test', 'licence: not stated'):
        assert words in repr(d)


def test_annotations_are_matched_by_name(tmp_path):
    root = lay_out(tmp_path, ('ant', 'bee'), splits=('train',))
    labelled(root/'detection'/'val', ['bee', 'ant'])           # the other order
    labelled(root/'detection'/'test', ['bee'])                 # one of them only
    seen = lambda d: [s[0][1]['labels'].tolist() for s in (d.train, d.val, d.test)]
    d = load_domain('folder', root)
    assert seen(d) == [[1, 2], [2, 1], [2]] and d.val.classes == d.test.classes == ('ant', 'bee')
    for classes in (['bee', 'ant'], 'bee,ant'):
        d = load_domain('folder', root, classes=classes)
        assert seen(d) == [[2, 1], [1, 2], [1]] and d.class_images[0].label == 2


def test_a_picture_moved_to_another_class_makes_another_domain(tmp_path):
    for name in ('ant/a', 'ant/b', 'bee/c'): save(tmp_path/'class_images'/f'{name}.png')
    before = fingerprint(load_domain('folder', tmp_path).class_images)
    (tmp_path/'class_images'/'ant'/'b.png').rename(tmp_path/'class_images'/'bee'/'b.png')
    assert fingerprint(load_domain('folder', tmp_path).class_images) != before


def test_ultralytics_and_roboflow_layouts(tmp_path):
    root = lay_out(tmp_path, splits=())
    for split in ('train', 'val'):
        save(root/'detection'/'images'/split/'a.jpg')
        (root/'detection'/'labels'/split).mkdir(parents=True)
        (root/'detection'/'labels'/split/'a.txt').write_text('0 .5 .5 .5 .5\n')
    (root/'detection'/'data.yaml').write_text('names: [bird]\n')
    assert load_domain('folder', root).val[0][1]['boxes'].tolist() == [[10, 7.5, 30, 22.5]]
    other = lay_out(tmp_path/'other', splits=('train', 'valid'))
    assert len(load_domain('folder', other).val) == 3


def test_backgrounds_beside_the_domain_and_elsewhere(tmp_path):
    root = lay_out(tmp_path/'d')
    (root/'backgrounds').rename(tmp_path/'backgrounds')
    assert len(load_domain('folder', root).backgrounds) == 3
    save(tmp_path/'fields'/'a.png')
    save(tmp_path/'gan'/'b.png')
    where = dict(backgrounds=tmp_path/'fields', class_images=str(tmp_path/'gan'))
    d = load_domain('folder', str(root), licence='CC BY 4.0', **where)
    assert len(d.backgrounds) == len(d.class_images) == 1 and d.licence == 'CC BY 4.0'
    assert d.class_images[0].origin == 'gan/b.png' and d.class_images_from == 'gan'


def test_parts_are_missed_only_when_asked_for(tmp_path):
    root = lay_out(tmp_path/'moths', splits=('train',))
    for f in (root/'backgrounds').iterdir(): f.unlink()
    assert 'holds no image' in refused(load_domain, 'folder', root)      # a folder that is there has to be right
    (root/'backgrounds').rmdir()
    d = load_domain('folder', root)
    assert 'no backgrounds' in repr(d) and '3 train / no val / no test' in repr(d) and len(d.train) == 3
    assert 'give its path as backgrounds=' in refused(len, d.backgrounds)
    assert 'has no val set' in refused(Resized, d.val, 32) and 'has no test set' in refused(subset, d.test, 3)
    (root/'class_images').rename(tmp_path/'elsewhere')
    assert 'class_images: no such folder' in refused(len, load_domain('folder', root).class_images)


# ---- mistakes --------------------------------------------------------------------------------------------------------

def test_class_names_that_differ(tmp_path):
    root = lay_out(tmp_path, ('ant', 'bee'))
    (root/'class_images'/'bee').rename(root/'class_images'/'bees')
    said = refused(load_domain, 'folder', root, classes=['ant', 'bee'])
    assert "'bees' of the class_images is unknown; choose from ant, bee" in said


def test_empty_folders(tmp_path):
    (tmp_path/'class_images').mkdir()
    assert 'class_images: holds no image' in refused(load_domain, 'folder', tmp_path)


def test_damaged_class_image_names_its_file(tmp_path):
    root = lay_out(tmp_path)
    path = root/'class_images'/'1.png'
    path.write_bytes(path.read_bytes()[:50])
    d = load_domain('folder', root)
    assert d.class_images[0].image.any()
    assert 'class_images/1.png: cannot be read' in refused(lambda: d.class_images[1])


# ---- subsets ---------------------------------------------------------------------------------------------------------

def test_subsets_are_nested_and_frozen():
    "The few labels of an experiment must be the same next year."
    assert subset(range(200), 8).indices == [18, 82, 53, 142, 110, 153, 48, 29]
    assert subset(range(200), 8, fold=1).indices == [47, 57, 81, 197, 137, 153, 42, 128]
    for fold in range(3):
        orders = [subset(range(120), n, fold=fold).indices for n in (5, 20, 120, 0)]
        for a, b in zip(orders, orders[1:]): assert b[:len(a)] == a
        assert sorted(orders[-1]) == list(range(120))
    assert len({tuple(subset(range(120), 20, fold=f).indices) for f in range(10)}) == 10


def test_subsets_larger_than_the_set():
    for n in (201, -1): assert f'a subset of {n} was asked for, and the set holds 200' in refused(subset, range(200), n)


# ---- real photographs ------------------------------------------------------------------------------------------------

REAL = dict(faces=(1500, 664, 200, 80, 155), birds=(514, 664, 220, 80, 243), cars=(1000, 664, 500, 144, 300),
            airplanes=(400, 664, 200, 80, 120))


@needs_shared
@pytest.mark.parametrize('name', REAL)
def test_real_domains(name):
    d = load_domain('folder', shared()/'data'/name)
    assert (d.name, d.classes) == (name, (name[:-1],)) and tuple(len(getattr(d, p)) for p in PARTS) == REAL[name]
    assert {len(t['boxes']) for s in (d.train, d.val, d.test) for t in s.targets} == {1} and not d.train.notes.total()
    train, val, test = (set(map(str, s.files)) for s in (d.train, d.val, d.test))
    assert not (train & val or train & test or val & test)
    image, label, origin = d.class_images[0]
    assert image.shape[0] == 3 and label == 1 and origin.startswith('class_images/')
    small = Resized(subset(d.train, 3), 160)
    assert small[0][0].shape == (3, 160, 160) and small.classes == d.classes and (small[0][1]['boxes'] <= 160).all()


@needs_shared
def test_real_gan_images():
    root = shared()/'data'/'faces'
    d = load_domain('folder', root, class_images=root/'gan_images')
    assert len(d.class_images) == 1500 and d.class_images_from == 'gan_images'
    assert d.class_images[0].image.shape == (3, 128, 128) and d.class_images[0].origin.startswith('gan_images/')


def test_class_folders_are_named_as_the_annotations_mean(tmp_path):
    "Archives from a Mac spell accents in two signs; blanks around a name are nobody's intention."
    labelled(tmp_path/'detection'/'train', ['Käfer', 'cat'])
    save(tmp_path/'class_images'/unicodedata.normalize('NFD', 'Käfer')/'0.png')
    save(tmp_path/'class_images'/'cat '/'0.png')
    domain = load_domain('folder', tmp_path)
    assert set(domain.classes) == {'Käfer', 'cat'} == {domain.classes[i.label-1] for i in domain.class_images}
    save(tmp_path/'class_images'/'cat'/'0.png')
    assert 'cat occurs 2 times' in refused(load_domain, 'folder', tmp_path)


def test_a_training_picture_can_be_left_out(tmp_path):
    root = lay_out(tmp_path/"birds")
    whole, name = load_domain("folder", root), lambda f: Path(f).name
    first = name(whole.train.files[0])
    less = load_domain("folder", root, leave_out=first)
    assert [name(f) for f in less.train.files] == [name(f) for f in whole.train.files][1:]
    assert len(less.train.targets) == len(less.train) and len(less.val) == len(whole.val)
    assert "leave_out=none.jpg: no training picture" in refused(load_domain, "folder", root, leave_out="none.jpg")


# ---- one split in several places, and one set without splits ---------------------------------------------------------

SQUARES = [torch.tensor([[2., 3, 12, 13]]), torch.tensor([[20., 5, 33, 29]])]


def pictures(n, *key):
    "Labelled pictures that no other key has."
    return [(picture(*key, i), dict(boxes=SQUARES[i % 2], labels=torch.tensor([1]))) for i in range(n)]


def split_yolo(root, n=5, more=('train', 'val', 'test'), yaml='names: [bird]\n'):
    "YOLO in splits: images/train, labels/train."
    for split in more:
        write_detection(pictures(n, 'ours', split), root/'new', 'yolo', ['bird'])
        for part in ('images', 'labels'):
            (root/part).mkdir(parents=True, exist_ok=True)
            (root/'new'/part).rename(root/part/split)
    (root/'new'/'data.yaml').unlink()
    (root/'new').rmdir()
    (root/'data.yaml').write_text(yaml)


def split_coco(root, n=5, more=('train', 'val', 'test')):
    "COCO: train.json beside images/."
    for split in more:
        write_detection(pictures(n, 'ours', split), root/'new', 'coco', ['bird'])
        (root/'new'/'images').rename(root/split)
        (root/'new'/'annotations.json').rename(root/f'{split}.json')
        (root/'new').rmdir()
        (root/'images').mkdir(exist_ok=True)
        (root/split).rename(root/'images'/split)
        text = (root/f'{split}.json').read_text().replace('"file_name": "', f'"file_name": "{split}/')
        (root/f'{split}.json').write_text(text)


PATHS = 'train: images/train\nval: images/val\nnames: [bird]\n'
OURS = {'yolo': split_yolo, 'coco': split_coco,
        'yolo with paths': lambda root, **how: split_yolo(root, yaml=PATHS, **how)}


@pytest.mark.parametrize('added', ['yolo', 'coco', 'voc'])
@pytest.mark.parametrize('ours', OURS)
def test_corrected_labels_in_a_folder_of_their_own_are_read_with_the_others(tmp_path, ours, added):
    "What README says of `--prelabel`: cp -r found/labelled mine/detection/train. They, or the others, were gone."
    mine = tmp_path/'detection'
    OURS[ours](mine, more=['train'])
    write_detection(pictures(2, 'added'), mine/'train', added, ['bird'])
    with pytest.warns(UserWarning, match=r'\(5 images\) and .*detection/train\S* \(2 images\) are read as one set'):
        train = load_domain('folder', tmp_path).train
    assert (len(train), train.classes, [t['image_id'] for t in train.targets]) == (7, ('bird',), list(range(7)))
    assert len({str(f) for f in train.files}) == 7
    for image, target in train: # each with its own boxes
        assert any(torch.equal(image, im) and torch.allclose(target['boxes'], t['boxes'], atol=.01)
                   for im, t in pictures(5, 'ours', 'train') + pictures(2, 'added'))
    with pytest.warns(UserWarning, match='read as one set'): parts = read_detection(mine, split='train')
    if added == 'yolo' or ours != 'coco':
        with pytest.warns(UserWarning, match='read as one set'):
            assert set(read_detection(mine).files) == set(parts.files)


@pytest.mark.filterwarnings('ignore:.*train .5 images., val .5 images. are read as one set')
def test_of_sets_with_several_parts_all_is_read_or_it_is_said(tmp_path):
    split_coco(tmp_path/'c')
    write_detection(pictures(2, 'added'), tmp_path/'c'/'train', 'yolo', ['bird'])
    assert 'holds 3 JSON files' in refused(read_detection, tmp_path/'c')
    split_coco(tmp_path/'d', more=['val'])
    write_detection(pictures(2, 'added'), tmp_path/'d'/'train', 'yolo', ['bird'])
    assert 'holds the sets val.json, train; expected one' in refused(read_detection, tmp_path/'d')
    split_yolo(tmp_path/'y', yaml=PATHS)
    write_detection(pictures(2, 'added'), tmp_path/'y'/'train', 'coco', ['bird'])
    with pytest.warns(UserWarning, match='y/train/annotations.json .2 images. are read as one set'):
        whole = read_detection(tmp_path/'y')
    assert len(whole) == 12, 'data.yaml names train and val'
    for name in ('train', 'valid'): labelled(tmp_path/'r'/name, ['bird'], dict(train='coco', valid='yolo')[name])
    assert 'holds the sets train, valid; expected one' in refused(read_detection, tmp_path/'r')


def test_a_picture_in_two_places_is_an_error_that_names_both(tmp_path):
    "Labelled by hand and by the detector; by its content, for names say nothing."
    split_yolo(tmp_path/'detection')
    added = [*pictures(1, 'added'), *pictures(2, 'ours', 'train')[1:]]
    write_detection(added, tmp_path/'detection'/'train', 'yolo', ['bird'])
    told = refused(load_domain, 'folder', tmp_path)
    assert 'detection/images/train/000001.png of ' in told and 'detection/train/images/000001.png of ' in told
    assert told == refused(read_detection, tmp_path/'detection', split='train') and 'keep the better labels' in told


@pytest.mark.parametrize('yaml', ['', 'train: images/train\nval: images/val\n', 'train: old/images\nval: images/val\n'])
def test_what_another_split_reads_is_not_said_to_be_left_out(tmp_path, yaml):
    "The folder that was added to the training pictures was, by the reader of val."
    split_yolo(tmp_path, more=['train', 'val'], yaml=f'{yaml}names: [bird]\n')
    write_detection(pictures(2, 'added'), tmp_path/'train', 'yolo', ['bird'])
    if 'old' in yaml:
        (tmp_path/'old').mkdir()
        for part in ('images', 'labels'): (tmp_path/part/'train').rename(tmp_path/'old'/part)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        assert [len(read_detection(tmp_path, split=s)) for s in ('train', 'val')] == [7, 5]
    told = [str(w.message).partition(' images) ')[2] for w in said]
    assert told == [f'and {tmp_path}/train (2 images) are read as one set']


def test_of_what_a_data_yaml_names_in_part_the_rest_is_left_out_with_a_word(tmp_path):
    split_yolo(tmp_path, more=['train', 'val'],
               yaml='train: [images/train, train/images]\nval: images/val\nnames: [bird]\n')
    write_detection(pictures(2, 'added'), tmp_path/'train', 'yolo', ['bird'])
    write_detection(pictures(1, 'more'), tmp_path/'train_2', 'yolo', ['bird'])
    for split, n in dict(train=7, val=5).items():
        with pytest.warns(UserWarning, match='1 labelled pictures are for no split and left out, the first: train_2/'):
            assert len(read_detection(tmp_path, split=split)) == n


def test_what_a_data_yaml_names_is_not_read_twice(tmp_path):
    split_yolo(tmp_path, yaml='train: [images/train, train/images]\nval: images/val\nnames: [bird]\n')
    write_detection(pictures(2, 'added'), tmp_path/'train', 'yolo', ['bird'])
    assert len(read_detection(tmp_path, split='train')) == 7 and len(read_detection(tmp_path, split='val')) == 5


def test_two_files_for_one_split_are_told(tmp_path):
    split_coco(tmp_path, more=['val', 'train'])
    (tmp_path/'train.json').rename(tmp_path/'valid.json')
    assert 'val.json and valid.json are for val; expected one' in refused(read_detection, tmp_path, split='val')


def flat(root, n=30, format='yolo'):
    "Labelled photographs without a word of splits."
    write_detection(pictures(n, 'flat'), root/'detection', format, ['kangaroo'])
    if format == 'yolo': (root/'detection'/'data.yaml').write_text('names: [kangaroo]\n')
    for i in range(3): save(root/'class_images'/f'{i}.png', (200, 30, 60, 255))
    return root


@pytest.mark.parametrize('format', ['yolo', 'coco', 'voc'])
def test_a_set_without_splits_is_divided_where_it_is_said_into_what(tmp_path, format):
    hint = 'holds a labelled set without parts; expected train, val and test, so divide it with split=70/15/15'
    with pytest.warns(UserWarning, match=f'{hint}.*it is left out') as said:
        d = load_domain('folder', flat(tmp_path/'mine', format=format))
    assert len(said) == 1 and len(d.class_images) == 3
    assert all(hint in refused(len, getattr(d, s)) for s in ('train', 'val', 'test'))
    d = load_domain('folder', tmp_path/'mine', split='70/15/15')
    assert d.classes == ('kangaroo',) and [len(p) for p in (d.train, d.val, d.test)] == [21, 5, 4]
    content = lambda part: {digest(image) for image, _ in part}
    parts = [content(p) for p in (d.train, d.val, d.test)]
    assert len(set().union(*parts)) == 30
    named = {digest(image): target['boxes'] for image, target in pictures(30, 'flat')}
    assert all(torch.allclose(t['boxes'], named[digest(i)], atol=.01) for p in (d.train, d.val, d.test) for i, t in p)
    write_detection(pictures(2, 'added'), tmp_path/'mine'/'detection'/'train', 'yolo', ['kangaroo'])
    both = r'\(30 images\) and .*detection/train \(2 images\) are read as one set'
    with pytest.warns(UserWarning, match=both) as said:
        e = load_domain('folder', tmp_path/'mine', split='70/15/15')
    assert len(said) == 1 and [content(p) for p in (e.val, e.test)] == parts[1:], 'as without what was added'
    assert content(e.train) == parts[0] | {digest(image) for image, _ in pictures(2, 'added')} and len(e.train) == 23
    shutil.copytree(tmp_path/'mine'/'detection'/'train', tmp_path/'mine'/'detection'/'train_2026')
    assert 'are the same picture' in refused(load_domain, 'folder', tmp_path/'mine', split='70/15/15')
    reverse = pictures(30, 'flat')[::-1] # other names and order
    write_detection(reverse, tmp_path/'other'/'detection', 'yolo', ['kangaroo'])
    e = load_domain('folder', tmp_path/'other')
    assert e.train.files == e.val.files, 'as its data.yaml says'
    e = load_domain('folder', tmp_path/'other', split='70/15/15')
    assert [content(p) for p in (e.train, e.val, e.test)] == parts
    e = load_domain('folder', tmp_path/'other', split='9/1/0')
    assert (len(e.train), len(e.val)) == (27, 3) and 'has no test set' in refused(len, e.test)
    assert 'has no val set' in refused(len, load_domain('folder', tmp_path/'other', split='9/0/1').val)


def test_shares_that_cannot_be(tmp_path):
    root = flat(tmp_path/'mine', n=3)
    assert [len(getattr(load_domain('folder', root, split='98/1/1'), s)) for s in ('train', 'val', 'test')] == [1, 1, 1]
    for odd in ('70', '70/30', '0/50/50', 'a/b/c', '70/15/-15', '.7/.2/.1', 'official', '70/15/15/0'):
        told = refused(load_domain, 'folder', root, split=odd)
        assert "shares of train, val and test for a folder: '70/15/15'" in told, odd
    told = refused(load_domain, 'folder', flat(tmp_path/'few', n=2), split='1/1/1')
    assert 'holds 2 pictures, too few for train and val and test' in told
    whole = lay_out(tmp_path/'whole')
    told = refused(load_domain, 'folder', whole, split='70/15/15')
    assert 'no labelled set without parts that could be divided, found train, val, test' in told
    write_detection(pictures(6, 'flat'), tmp_path/'flat', 'yolo', ['bird'])
    (tmp_path/'flat'/'data.yaml').write_text('names: [bird]')
    for f in (tmp_path/'flat').iterdir(): f.rename(whole/'detection'/f.name)
    for s in ('train', 'val'): (whole/'detection'/s).rename(tmp_path/s)
    assert 'has a test set already' in refused(load_domain, 'folder', whole, split='70/15/15')
    d = load_domain('folder', whole, split='70/30/0')
    assert [len(p) for p in (d.train, d.val, d.test)] == [4, 2, 3]
    with pytest.warns(UserWarning, match='holds a labelled set without parts.*it is left out'):
        assert '3 test' in repr(load_domain('folder', whole))


def kit(root, year, n, lists=('train', 'val', 'test')):
    "Pascal VOC's layout."
    write_detection(pictures(n, year), root/'new', 'voc', ['bird'])
    place = root/'VOCdevkit'/f'VOC{year}'
    (place/'ImageSets'/'Main').mkdir(parents=True)
    (root/'new'/'images').rename(place/'JPEGImages')
    (root/'new'/'annotations').rename(place/'Annotations')
    (root/'new').rmdir()
    for k, name in enumerate(lists):
        (place/'ImageSets'/'Main'/f'{name}.txt').write_text(''.join(f'{i:06d}\n' for i in range(k, n, len(lists))))


def test_the_layout_of_the_development_kit_is_a_domain(tmp_path):
    "As `--format vocdevkit` writes it, its provenance beside; two years are read as one set."
    kit(tmp_path/'detection', 2012, 9)
    (tmp_path/'detection'/'provenance.jsonl').write_text('{}\n')
    d = load_domain('folder', tmp_path)
    assert [len(p) for p in (d.train, d.val, d.test)] == [3, 3, 3] and d.classes == ('bird',)
    assert d.train[0][1]['boxes'].tolist() == pictures(1, 2012)[0][1]['boxes'].tolist()
    kit(tmp_path/'detection', 2007, 4, ['train', 'val'])
    with pytest.warns(UserWarning, match='VOC2007 .2 images. and .*VOC2012 .3 images. are read as one set'):
        d = load_domain('folder', tmp_path)
    assert [len(p) for p in (d.train, d.val, d.test)] == [5, 5, 3]


def test_a_folder_of_your_own_that_is_called_like_a_public_set(tmp_path):
    root = lay_out(tmp_path/'birds')
    told = refused(load_domain, 'birds', root)
    assert 'holds class_images/ and detection/, as a folder of your own pictures does' in told
    assert 'choose domain=folder' in told


def test_labels_in_other_folders_are_not_left_out_without_a_word(tmp_path):
    "`cp -r` into a folder that is there puts the set into it; `labelled` is the name of no split."
    for name, format in dict(y='yolo', c='coco').items():
        train = tmp_path/name/'detection'/'train'
        write_detection(pictures(3, 'ours'), train, format, ['bird'])
        write_detection(pictures(2, 'added'), train/'labelled', format, ['bird'])
    left = '2 labelled pictures are for no split and left out, the first: labelled/images/000000.png'
    with pytest.warns(UserWarning, match=left):
        assert len(load_domain('folder', tmp_path/'y').train) == 3
    with pytest.warns(UserWarning, match='holds another set, labelled/annotations.json, which is left out'):
        assert len(load_domain('folder', tmp_path/'c').train) == 3
    split_yolo(tmp_path/'s'/'detection')
    write_detection(pictures(2, 'added'), tmp_path/'s'/'detection'/'labelled', 'yolo', ['bird'])
    with pytest.warns(UserWarning, match='2 labelled pictures are for no split'): load_domain('folder', tmp_path/'s')
