"The paper's domains: real lists and excerpts, what other libraries read, damaged and foreign files."
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from scipy.io import loadmat, savemat

from helpers import needs_shared
from synthdet.boxes import ellipse_to_box
from synthdet.core import refused
from synthdet.machine import shared
from synthdet.data.catalogue import FACTS
from synthdet.data.domain import Missing
from synthdet.data.domains import load_domain
from synthdet.data.fixtures import make_fixture
from synthdet.data.labels import subset
from synthdet.data.readers import cars_boxes, cub_birds, dmgan_names, paper_birds, redo_split, share
from synthdet.synthesis.settings import paper_recipe

ROOT = Path(__file__).parents[1]
SPLITS = ('train', 'val', 'test')


@pytest.fixture
def tree(drawn, tmp_path):
    "A copy to damage."
    return shutil.copytree(drawn, tmp_path/'tree')


# ---- the paper's numbers ---------------------------------------------------------------------------------------------

@needs_shared
def test_fddb_boxes_are_those_of_the_authors_script():
    "The script the paper names finds the extremes of an ellipse from its derivative; they agree to .01 pixels."
    lists = sorted((shared()/'eval'/'fddb'/'FDDB-folds').glob('*ellipseList.txt'))
    rows = [[float(v) for v in line.split()] for f in lists for line in f.read_text().splitlines()
            if len(line.split()) == 6]
    assert len(rows) == 5171
    a, b, t, cx, cy, _ = np.array(rows).T
    tan = np.where(np.tan(t) == 0, 1e-4, np.tan(t))
    tx, ty = np.arctan(-b/a*np.tan(t)), np.arctan(b/a/tan)
    X = [cx + a*np.cos(s)*np.cos(t) - b*np.sin(s)*np.sin(t) for s in (tx, tx+np.pi)]
    Y = [cy + b*np.sin(s)*np.cos(t) + a*np.cos(s)*np.sin(t) for s in (ty, ty+np.pi)]
    theirs = np.stack([np.minimum(*X), np.minimum(*Y), np.maximum(*X), np.maximum(*Y)], 1)
    assert np.abs(ellipse_to_box(a, b, t, cx, cy).numpy() - theirs).max() < .01


@needs_shared
def test_birds_split_is_the_authors_list():
    "All 11,788 ids. Names are known for the excerpt; elsewhere only which ids DM-GAN tests on and ReDO left out."
    lists = shared()/'reference'/'birds_splits'
    redo, theirs = redo_split(lists/'redo_split.txt'), redo_split(lists/'authors_split.txt')
    known = {p.id: p.file for p in cub_birds(shared()/'data'/'cub200_2011_first10')}
    dmgan = dmgan_names(lists/'dmgan_test_filenames.txt')
    names = {i: known.get(i, f'unknown/{i}.jpg') for i in theirs}
    tested = {n for n in dmgan if f'{n}.jpg' in known.values()}
    tested |= {f'unknown/{i}' for i in theirs if theirs[i] == 2 and i not in known}
    ours = paper_birds(names, redo, tested)
    assert ours == theirs
    assert [list(ours.values()).count(k) for k in (0, 1, 2)] == list(FACTS['birds'].counts) == [10345, 1000, 443]
    assert any(theirs[i] == 2 for i in known)


@needs_shared
def test_counts_are_those_of_the_paper():
    splits = json.loads((shared()/'reference'/'paper_tables.json').read_text())['splits']
    for d, s in splits.items(): assert FACTS[d].counts == (s['train'], s['valid'], s['test']), d


@needs_shared
def test_cub_excerpt():
    "The real excerpt, read as it lies; with the lists it is split as in the whole data set."
    here, lists = shared()/'data'/'cub200_2011_first10', shared()/'reference'/'birds_splits'
    d = load_domain('birds', here, redo=lists/'redo_split.txt', dmgan=lists/'dmgan_test_filenames.txt')
    theirs = redo_split(lists/'authors_split.txt')
    assert {t['image_id'] for t in d.test.targets} == {p.id for p in cub_birds(here) if theirs[p.id] == 2}
    assert len(d.train) + len(d.val) + len(d.test) == 543 and "not all of the paper's images" in repr(d)
    image, target = d.train[0]
    assert image.dtype == torch.uint8 and (target['boxes'][:, 2:] <= torch.tensor(image.shape[:0:-1])).all()


@needs_shared
def test_cub_excerpt_with_the_official_split():
    "Without a generator's pictures the class images are crops, and some of the photographs are grey."
    d = load_domain('birds', shared()/'data'/'cub200_2011_first10', split='official')
    assert (len(d.train) + len(d.val), len(d.test)) == (300, 243)
    assert d.class_images_from == 'crops' and d.boxes_spent == len(d.class_images) <= len(d.train)
    crop = d.class_images[5]
    assert crop.label == 1 and crop.image.shape[0] == 3 and min(crop.image.shape[1:]) > 20


@needs_shared
def test_cars_training_list():
    "Rows of the real .mat: the first 1,000 are for validation."
    path = shared()/'data'/'cars'/'cars_train_annos.mat'
    rows, raw = cars_boxes(path), loadmat(path)['annotations'][0]
    assert len(rows) == 8144 and share(8144, 1000, 8144) == 1000
    for i in (0, 999, 8143):
        assert rows[i].file == raw[i]['fname'][0]
        assert rows[i].boxes.tolist() == [[int(raw[i][f'bbox_{k}'][0, 0]) for k in ('x1', 'y1', 'x2', 'y2')]]


def test_readme_tells_the_counts():
    lines = (ROOT/'README.md').read_text().splitlines()
    for name in ('faces', 'birds', 'cars'):
        row = next(line for line in lines if line.startswith(f'| `{name}`'))
        assert f"| {' / '.join(f'{c:,}' for c in FACTS[name].counts)} |" in row


def test_every_domain_has_its_preset():
    for facts in FACTS.values(): assert paper_recipe(facts.preset).compositor == 'paper'


# ---- torchvision reads the same trees --------------------------------------------------------------------------------

@pytest.mark.parametrize('split', ['train', 'val'])
def test_wider_as_torchvision_reads_it(drawn, split):
    (drawn/'widerface'/'WIDER_test').mkdir(exist_ok=True)      # torchvision wants all archives unpacked
    theirs = torchvision.datasets.WIDERFace(str(drawn), split)
    ours = getattr(load_domain('wider', drawn, landmarks=False), split)
    for info, f, t in zip(theirs.img_info, ours.files, ours.targets, strict=True):
        xywh = info['annotations']['bbox'].float()
        xywh = xywh[(xywh[:, 2:] > 0).all(1)]
        assert Path(info['img_path']).name == f.name
        assert torch.equal(torch.cat([xywh[:, :2], xywh[:, :2]+xywh[:, 2:]], 1), t['boxes'])


def test_cars_as_torchvision_reads_them(drawn):
    d = load_domain('cars', drawn)
    for split, ours in dict(train=[*d.val.files, *d.train.files], test=d.test.files).items():
        theirs = torchvision.datasets.StanfordCars(str(drawn), split)
        assert [Path(f).name for f, _ in theirs._samples] == [f.name for f in ours]


def test_voc_lists_as_torchvision_reads_them(drawn):
    base = drawn/'VOCdevkit'/'VOC2012'
    (base/'Annotations').mkdir(exist_ok=True)
    for n in (base/'ImageSets'/'Main'/'train.txt').read_text().split(): (base/'Annotations'/f'{n}.xml').touch()
    theirs = torchvision.datasets.VOCDetection(str(drawn), '2012', 'train').images
    ours = load_domain('qrcodes', drawn, backgrounds='released').backgrounds.files
    assert theirs == [str(f) for f in ours if 'VOC2012' in str(f)]


# ---- what people have on disk ----------------------------------------------------------------------------------------

def test_trees_are_the_same_everywhere(drawn, tmp_path):
    make_fixture('cars', tmp_path)
    for p in ('stanford_cars/cars_test/00003.jpg', 'lsun_cars/2.jpg', 'VOCdevkit/VOC2007/ImageSets/Main/car_test.txt'):
        assert (tmp_path/p).read_bytes() == (drawn/p).read_bytes()


def test_windows_line_ends_and_byte_order_marks(drawn, tree):
    texts = [*(tree/'FDDB'/'FDDB-folds').iterdir(), *(tree/'CUB_200_2011').glob('*.txt')]
    for folder in ('birds_splits', 'widerface', 'VOCdevkit'): texts += (tree/folder).rglob('*.txt')
    for f in texts: f.write_bytes(b'\xef\xbb\xbf' + f.read_bytes().replace(b'\n', b'\r\n'))
    for d in ('faces', 'birds', 'wider'):
        a, b = load_domain(d, drawn, backgrounds='voc'), load_domain(d, tree, backgrounds='voc')
        assert len(a.backgrounds) == len(b.backgrounds)
        for s in SPLITS:
            for x, y in zip(getattr(a, s).targets, getattr(b, s).targets, strict=True):
                assert torch.equal(x['boxes'], y['boxes'])


def edit(path, old, new):
    text = path.read_text(encoding='utf-8')
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding='utf-8')


def test_names_beyond_ascii(tree):
    "A class folder and a picture with names from elsewhere."
    base = tree/'CUB_200_2011'
    (base/'images'/'001.Round_Tern').rename(base/'images'/'001.Flußseeschwälbe')
    for f in (base/'images.txt', tree/'birds_splits'/'dmgan_test_filenames.txt'):
        f.write_text(f.read_text().replace('001.Round_Tern', '001.Flußseeschwälbe'), encoding='utf-8')
    assert len(load_domain('birds', tree).train) == 16


FOLDS, CUB, WIDER, CODES = 'FDDB/FDDB-folds', 'CUB_200_2011', 'widerface', 'qrcodes'
DEVKIT, OFFICIAL = 'stanford_cars/devkit/cars_train_annos.mat', 'widerface/wider_face_split/wider_face_val_bbx_gt.txt'
def lose(path): return lambda t: (t/path).unlink()
def fill(path, content): return lambda t: (t/path).write_bytes(content)
def change(path, old, new): return lambda t: edit(t/path, old, new)
def lose_fold(t): [p.unlink() for p in (t/'FDDB/originalPics').rglob('img_5*.jpg')]


def other_version(t):
    row = np.array([('a.jpg', 1)], dtype=[('relative_im_path', 'O'), ('class', 'O')])
    savemat(t/DEVKIT, dict(annotations=row))


@pytest.mark.parametrize('domain, damage, words', [
    ('faces', lose(f'{FOLDS}/FDDB-fold-07-ellipseList.txt'), 'FDDB-fold-07-ellipseList.txt: no such file'),
    ('faces', lose_fold, 'nor 2 more of the 15 that'),
    ('faces', change(f'{FOLDS}/FDDB-fold-02-ellipseList.txt', '  1\n', '  1\nstray\n'),
     "expected the number of faces of 'stray'"),
    ('faces', fill(f'{FOLDS}/FDDB-fold-03-ellipseList.txt', b'2002/04/11/big/img_30\n1\n20 10 0 900 40  1\n'),
     'has no area inside its picture of 120 x 90'),
    ('faces', fill('FDDB/originalPics/2002/02/11/big/img_11.jpg', b'no'), 'img_11.jpg: cannot be read (not an image)'),
    ('faces', fill(f'{FOLDS}/FDDB-fold-02-ellipseList.txt', b'\n'), 'FDDB-fold-02-ellipseList.txt: is empty'),
    ('birds', change(f'{CUB}/bounding_boxes.txt', '\n2 ', '\n2000 '), 'in only one of images.txt and bounding_boxes'),
    ('birds', change(f'{CUB}/images.txt', '1 001', '1 ../001'), 'leads out of the folder of the pictures'),
    ('birds', change(f'{CUB}/bounding_boxes.txt', '1 ', '1 500'), 'has no area inside its picture'),
    ('birds', change('birds_splits/redo_split.txt', '5 0', '5 7'), "'5 7'; expected image id, 0 (train)"),
    ('birds', lose('birds_splits/dmgan_test_filenames.txt'), "has no lists of the paper's birds split"),
    ('cars', fill(DEVKIT, b'MATLAB 5.0 MAT-file' + bytes(200)), 'cars_train_annos.mat: cannot be read'),
    ('cars', other_version, 'has no annotations with the field fname'),
    ('cars', lose('VOCdevkit/VOC2007/JPEGImages/2007_000001.jpg'), '2007_000001.jpg: no such picture, but a list'),
    ('wider', fill(f'{WIDER}/train/label.txt', b''), 'label.txt: is empty'),
    ('wider', fill(f'{WIDER}/train/label.txt', b'# a.jpg\n1 2 3\n'), 'label.txt, line 2'),
    ('wider', fill(OFFICIAL, b''), 'val_bbx_gt.txt: is empty'),
    ('wider', fill(OFFICIAL, b'a.jpg\n3\n1 2 3 4 0 0 0 0 0 0\n'), 'the list ends after 1; it is torn'),
    ('qrcodes', fill(f'{CODES}/Annotations/qr_003.xml', b'<annotation><object>'),
     'qr_003.xml: not XML'),
    ('qrcodes', change(f'{CODES}/Annotations/qr_003.xml', 'qr_code', 'bar_code'),
     'holds the classes bar_code, qr_code; expected one'),
    ('qrcodes', change(f'{CODES}/ImageSets/Main/test.txt', 'qr_002', 'qr_999'),
     'the picture qr_999 of a list is not there'),
])
def test_what_is_damaged_is_said_in_a_line(tree, domain, damage, words):
    damage(tree)
    assert words in refused(load_domain, domain, tree, backgrounds='voc')


def test_a_box_that_leads_far_out_is_cut_and_told(tree):
    change(f'{CODES}/Annotations/qr_003.xml', '<xmax>', '<xmax>9')(tree)
    with pytest.warns(UserWarning, match='1 boxes cut to less than half at the border.*qr_003.jpg'):
        d = load_domain('qrcodes', tree, backgrounds='voc')
    boxes = torch.cat([t['boxes'] for part in (d.train, d.test) for t in part.targets])
    assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.max() < 1000


def test_the_text_list_is_taken_before_the_pickle_and_nothing_else(drawn, tree):
    want, lists = [f.name for f in load_domain('birds', drawn).test.files], tree/'birds_splits'
    for k in ('bak', 'pickle', 'csv'): (lists/f'dmgan_test_filenames.{k}').write_text('no list')
    assert [f.name for f in load_domain('birds', tree).test.files] == want
    for k in ('txt', 'pickle'): (lists/f'dmgan_test_filenames.{k}').unlink()
    assert "has no lists of the paper's birds split" in refused(load_domain, 'birds', tree)


def test_what_is_not_there_is_said_when_it_is_needed(tree):
    for k in ('stanford_cars/cars_test', 'lsun_cars', 'INRIAPerson'): shutil.rmtree(tree/k)
    d = load_domain('cars', tree, backgrounds='inria')
    assert len(d.train) == 16 and all(isinstance(p, Missing) for p in (d.test, d.class_images, d.backgrounds))
    assert 'Stanford Cars' in refused(len, d.test) and 'licence' in refused(len, d.test)
    assert 'lsun_cars' in refused(len, d.class_images) and d.class_images_from == ''
    assert 'synthdet-data fetch inria' in refused(len, d.backgrounds)


def test_stratified_subsets_are_nested(drawn):
    data = load_domain('wider', drawn).train
    for fold in range(3): assert subset(data, 5, fold).indices == subset(data, 9, fold).indices[:5]
