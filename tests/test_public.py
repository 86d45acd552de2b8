"The paper's domains: real lists and excerpts, damaged and foreign files, and each domain from its drawn tree to a row."
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from execnb.shell import CaptureShell
from scipy.io import loadmat, savemat

from synthdet.boxes import ellipse_to_box
from synthdet.core import read_jsonl, refused, shared
from synthdet.data.domains import load_domain
from synthdet.data.fixtures import make_fixture
from synthdet.data.labels import subset
from synthdet.evidence.arm import make_arms
from synthdet.evidence.phases import label_order, labels, run
from synthdet.data.fixtures import TREES
from synthdet.data.domain import Missing
from synthdet.data.readers import cub_birds, dmgan_names, paper_birds, redo_split
from synthdet.synthesis.settings import paper_recipe
from synthdet.data.catalogue import FACTS

ROOT = Path(__file__).parents[1]
needs_shared = pytest.mark.skipif(shared() is None, reason='the reference folder is not beside the project')


@pytest.fixture(scope='session')
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    for d in TREES: make_fixture(d, root)
    return root


@pytest.fixture
def tree(drawn, tmp_path):
    "A copy to damage."
    return shutil.copytree(drawn, tmp_path/'tree')


# ---- the paper's numbers ---------------------------------------------------------------------------------------------

@needs_shared
def test_fddb_boxes_are_those_of_the_authors_script():
    "The script the paper names finds the extremes of an ellipse from its derivative; 5,171 ellipses, to a hundredth of a pixel."
    lines = [l for f in sorted((shared()/'eval'/'fddb'/'FDDB-folds').glob('*ellipseList.txt')) for l in f.read_text().splitlines()]
    e = np.array([[float(v) for v in l.split()] for l in lines if len(l.split()) == 6])
    assert len(e) == 5171
    a, b, t, cx, cy, _ = e.T
    tan = np.where(np.tan(t) == 0, 1e-4, np.tan(t))
    tx, ty = np.arctan(-b/a*np.tan(t)), np.arctan(b/a/tan)
    X = [cx + a*np.cos(s)*np.cos(t) - b*np.sin(s)*np.sin(t) for s in (tx, tx+np.pi)]
    Y = [cy + b*np.sin(s)*np.cos(t) + a*np.cos(s)*np.sin(t) for s in (ty, ty+np.pi)]
    theirs = np.stack([np.minimum(*X), np.minimum(*Y), np.maximum(*X), np.maximum(*Y)], 1)
    assert np.abs(ellipse_to_box(a, b, t, cx, cy).numpy() - theirs).max() < .01


@needs_shared
def test_birds_split_is_the_authors_list():
    "All 11,788 ids. Names are known for the excerpt; elsewhere only which ids DM-GAN tests on and ReDO did not train on."
    lists = shared()/'reference'/'birds_splits'
    redo, theirs = redo_split(lists/'redo_split.txt'), redo_split(lists/'authors_split.txt')
    known = {p.id: p.file for p in cub_birds(shared()/'data'/'cub200_2011_first10')}
    dmgan = dmgan_names(lists/'dmgan_test_filenames.txt')
    names = {i: known.get(i, f'unknown/{i}.jpg') for i in theirs}
    tested = {n for n in dmgan if f'{n}.jpg' in known.values()} | {f'unknown/{i}' for i in theirs if theirs[i] == 2 and i not in known}
    ours = paper_birds(names, redo, tested)
    assert ours == theirs and [list(ours.values()).count(k) for k in (0, 1, 2)] == list(FACTS['birds'].counts) == [10345, 1000, 443]
    assert {i for i in known if ours[i] == 2} == {i for i in known if theirs[i] == 2} and any(theirs[i] == 2 for i in known)


@needs_shared
def test_counts_are_those_of_the_paper():
    splits = json.loads((shared()/'reference'/'paper_tables.json').read_text())['splits']
    for d, s in splits.items(): assert FACTS[d].counts == (s['train'], s['valid'], s['test']), d


@needs_shared
def test_cub_excerpt(tmp_path):
    "The real excerpt, read as it lies; with the lists it is split as in the whole data set."
    here, lists = shared()/'data'/'cub200_2011_first10', shared()/'reference'/'birds_splits'
    d = load_domain('birds', here, redo=lists/'redo_split.txt', dmgan=lists/'dmgan_test_filenames.txt')
    theirs = redo_split(lists/'authors_split.txt')
    assert {t['image_id'] for t in d.test.targets} == {p.id for p in cub_birds(here) if theirs[p.id] == 2}
    assert len(d.train) + len(d.val) + len(d.test) == 543 and "not all of the paper's images" in repr(d)
    image, target = d.train[0]
    assert image.dtype == torch.uint8 and (target['boxes'][:, 2:] <= torch.tensor(image.shape[:0:-1])).all()
    official = load_domain('birds', here, split='official')
    assert (len(official.train) + len(official.val), len(official.test)) == (300, 243)
    crop = official.class_images[5]
    assert crop.label == 1 and crop.image.shape[0] == 3 and min(crop.image.shape[1:]) > 20


@needs_shared
def test_cars_training_list():
    "Rows of the real .mat: the first 1,000 are for validation."
    path = shared()/'data'/'cars'/'cars_train_annos.mat'
    from synthdet.data.readers import cars_boxes, share
    rows, raw = cars_boxes(path), loadmat(path)['annotations'][0]
    assert len(rows) == 8144 and (share(8144, 1000, 8144), 8144 - share(8144, 1000, 8144)) == (1000, 7144)
    for i in (0, 999, 8143): assert rows[i].file == raw[i]['fname'][0] and rows[i].boxes.tolist() == [[int(raw[i][f'bbox_{k}'][0, 0]) for k in ('x1', 'y1', 'x2', 'y2')]]


def test_readme_tells_the_counts():
    text = (ROOT/'README.md').read_text()
    for name in ('faces', 'birds', 'cars'): assert f"| {' / '.join(f'{c:,}' for c in FACTS[name].counts)} |" in next(l for l in text.splitlines() if l.startswith(f'| `{name}`')), name


def test_every_domain_has_its_preset():
    for facts in FACTS.values(): assert paper_recipe(facts.preset).compositor == 'paper'


# ---- torchvision reads the same trees ---------------------------------------------------------------------------------

def test_wider_as_torchvision_reads_it(drawn):
    root = drawn/'widerface'
    made = [root/'WIDER_test']
    for p in made: p.mkdir(exist_ok=True)                     # torchvision wants all archives unpacked
    for split in ('train', 'val'):
        theirs, ours = torchvision.datasets.WIDERFace(str(drawn), split), getattr(load_domain('wider', drawn, landmarks=False), split)
        assert len(theirs) == len(ours)
        for info, f, t in zip(theirs.img_info, ours.files, ours.targets):
            xywh = info['annotations']['bbox'].float()
            xywh = xywh[(xywh[:, 2:] > 0).all(1)]
            assert Path(info['img_path']).name == f.name and torch.equal(torch.cat([xywh[:, :2], xywh[:, :2]+xywh[:, 2:]], 1), t['boxes'])


def test_cars_as_torchvision_reads_them(drawn):
    for split in ('train', 'test'):
        theirs, d = torchvision.datasets.StanfordCars(str(drawn), split), load_domain('cars', drawn)
        ours = [*d.val.files, *d.train.files] if split == 'train' else d.test.files
        assert [Path(f).name for f, _ in theirs._samples] == [f.name for f in ours]


def test_voc_lists_as_torchvision_reads_them(drawn):
    (drawn/'VOCdevkit'/'VOC2012'/'Annotations').mkdir(exist_ok=True)
    for n in (drawn/'VOCdevkit'/'VOC2012'/'ImageSets'/'Main'/'train.txt').read_text().split(): (drawn/'VOCdevkit'/'VOC2012'/'Annotations'/f'{n}.xml').touch()
    theirs = torchvision.datasets.VOCDetection(str(drawn), '2012', 'train').images
    ours = [str(f) for f in load_domain('qrcodes', drawn, backgrounds='released').backgrounds.files if 'VOC2012' in str(f)]
    assert theirs == ours


# ---- what people have on disk ----------------------------------------------------------------------------------------

def test_trees_are_the_same_everywhere(drawn, tmp_path):
    make_fixture('cars', tmp_path)
    for p in ('stanford_cars/cars_test/00003.jpg', 'lsun_cars/2.jpg'): assert (tmp_path/p).read_bytes() == (drawn/p).read_bytes()


def test_windows_line_ends_and_byte_order_marks(drawn, tree):
    for f in [*(tree/'FDDB'/'FDDB-folds').iterdir(), *(tree/'CUB_200_2011').glob('*.txt'), *(tree/'birds_splits').iterdir(), *(tree/'widerface').rglob('*.txt'), *(tree/'VOCdevkit').rglob('*.txt')]:
        f.write_bytes(b'\xef\xbb\xbf' + f.read_bytes().replace(b'\n', b'\r\n'))
    for d in ('faces', 'birds', 'wider'):
        a, b = load_domain(d, drawn, backgrounds='voc'), load_domain(d, tree, backgrounds='voc')
        assert len(a.backgrounds) == len(b.backgrounds)
        for s in ('train', 'val', 'test'): assert all(torch.equal(x['boxes'], y['boxes']) for x, y in zip(getattr(a, s).targets, getattr(b, s).targets, strict=True))


def test_names_beyond_ascii(tree):
    "A class folder and a picture with names from elsewhere."
    base = tree/'CUB_200_2011'
    (base/'images'/'001.Round_Tern').rename(base/'images'/'001.Flußseeschwälbe')
    for f in (base/'images.txt', tree/'birds_splits'/'dmgan_test_filenames.txt'): f.write_text(f.read_text().replace('001.Round_Tern', '001.Flußseeschwälbe'), encoding='utf-8')
    assert len(load_domain('birds', tree).train) == 16


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize('domain, damage, words', [
    ('faces', lambda t: (t/'FDDB/FDDB-folds/FDDB-fold-07-ellipseList.txt').unlink(), 'FDDB-fold-07-ellipseList.txt: cannot be read'),
    ('faces', lambda t: [p.unlink() for p in (t/'FDDB/originalPics').rglob('img_5*.jpg')], 'nor 2 more of the 15 that'),
    ('faces', lambda t: edit(t/'FDDB/FDDB-folds/FDDB-fold-02-ellipseList.txt', '  1\n', '  1\nstray\n'), "expected the number of faces of 'stray'"),
    ('faces', lambda t: (t/'FDDB/FDDB-folds/FDDB-fold-03-ellipseList.txt').write_text('2002/04/11/big/img_30\n1\n20 10 0 900 40  1\n'), 'has no area inside its picture of 120 x 90'),
    ('faces', lambda t: (t/'FDDB/originalPics/2002/02/11/big/img_11.jpg').write_bytes(b'no'), 'img_11.jpg: cannot be read (not an image)'),
    ('birds', lambda t: edit(t/'CUB_200_2011/bounding_boxes.txt', '\n2 ', '\n2000 '), 'is in only one of images.txt and bounding_boxes.txt'),
    ('birds', lambda t: edit(t/'CUB_200_2011/images.txt', '1 001', '1 ../001'), 'leads out of the folder of the pictures'),
    ('birds', lambda t: edit(t/'birds_splits/redo_split.txt', '5 0', '5 7'), "'5 7'; expected image id, 0 (train)"),
    ('birds', lambda t: (t/'birds_splits/dmgan_test_filenames.txt').unlink(), "has no lists of the paper's birds split"),
    ('birds', lambda t: edit(t/'CUB_200_2011/bounding_boxes.txt', '1 ', '1 500'), 'has no area inside its picture'),
    ('cars', lambda t: (t/'stanford_cars/devkit/cars_train_annos.mat').write_bytes(b'MATLAB 5.0 MAT-file' + bytes(200)), 'cars_train_annos.mat: cannot be read'),
    ('cars', lambda t: savemat(t/'stanford_cars/devkit/cars_train_annos.mat', dict(annotations=np.array([('a.jpg', 1)], dtype=[('relative_im_path', 'O'), ('class', 'O')]))), 'has no annotations with the field fname'),
    ('faces', lambda t: (t/'FDDB/FDDB-folds/FDDB-fold-02-ellipseList.txt').write_text('\n'), 'FDDB-fold-02-ellipseList.txt: is empty'),
    ('wider', lambda t: (t/'widerface/train/label.txt').write_text(''), 'label.txt: is empty'),
    ('wider', lambda t: (t/'widerface/wider_face_split/wider_face_val_bbx_gt.txt').write_text(''), 'val_bbx_gt.txt: is empty'),
    ('wider', lambda t: (t/'widerface/train/label.txt').write_text('# a.jpg\n1 2 3\n'), 'label.txt, line 2'),
    ('wider', lambda t: (t/'widerface/wider_face_split/wider_face_val_bbx_gt.txt').write_text('a.jpg\n3\n1 2 3 4 0 0 0 0 0 0\n'), 'the list ends after 1; it is torn'),
    ('qrcodes', lambda t: (t/'qrcodes/Annotations/qr_003.xml').write_text('<annotation><object>'), 'qr_003.xml: not a Pascal VOC annotation'),
    ('qrcodes', lambda t: edit(t/'qrcodes/Annotations/qr_003.xml', 'qr_code', 'bar_code'), 'holds the classes bar_code, qr_code; expected one'),
    ('qrcodes', lambda t: edit(t/'qrcodes/ImageSets/Main/test.txt', 'qr_002', 'qr_999'), 'the picture qr_999 of a list is not there'),
    ('qrcodes', lambda t: edit(t/'qrcodes/Annotations/qr_003.xml', '<xmax>', '<xmax>9'), 'reaches more than a pixel outside its image'),
    ('cars', lambda t: (t/'VOCdevkit/VOC2007/JPEGImages/2007_000001.jpg').unlink(), '2007_000001.jpg: no such picture, but a list names it'),
])
def test_what_is_damaged_is_said_in_a_line(tree, domain, damage, words):
    damage(tree)
    assert words in refused(load_domain, domain, tree, backgrounds='voc')


def test_the_text_list_is_taken_before_the_pickle_and_nothing_else(drawn, tree):
    want = [f.name for f in load_domain('birds', drawn).test.files]
    for k in ('bak', 'pickle', 'csv'): (tree/'birds_splits'/f'dmgan_test_filenames.{k}').write_text('no list')
    assert [f.name for f in load_domain('birds', tree).test.files] == want
    (tree/'birds_splits'/'dmgan_test_filenames.txt').unlink()
    (tree/'birds_splits'/'dmgan_test_filenames.pickle').unlink()
    assert "has no lists of the paper's birds split" in refused(load_domain, 'birds', tree)


def test_what_is_not_there_is_said_when_it_is_needed(tree):
    shutil.rmtree(tree/'stanford_cars'/'cars_test')
    shutil.rmtree(tree/'lsun_cars'); shutil.rmtree(tree/'INRIAPerson')
    d = load_domain('cars', tree, backgrounds='inria')
    assert len(d.train) == 16 and all(isinstance(p, Missing) for p in (d.test, d.class_images, d.backgrounds))
    assert 'Stanford Cars' in refused(len, d.test) and 'licence' in refused(len, d.test) and 'lsun_cars' in refused(len, d.class_images)
    assert 'INRIAPerson.tar' not in refused(len, d.backgrounds) and 'synthdet-data fetch inria' in refused(len, d.backgrounds)


def test_scratch_needs_neither_class_images_nor_backgrounds(tree, tmp_path):
    for p in ('lsun_cars', 'INRIAPerson', 'VOCdevkit'): shutil.rmtree(tree/p)
    few = dict(domain='cars', root=str(tree), image_size=64, steps=2, pretrain_steps=2, eval_every=2, batch_size=2, backbone='mobilenetv1_025', n_real=4)
    scratch, pretrain = make_arms('scratch,pretrain', **few)
    assert run(scratch, tmp_path/'out')['n_real'] == 4
    assert "has no backgrounds for 'cars'" in refused(run, pretrain, tmp_path/'out')


# ---- labels ----------------------------------------------------------------------------------------------------------

def test_released_labels(drawn):
    "One permutation for all runs, and the first of the list where a finite set of synthesised images is used."
    arms = dict(domain='birds', root=str(drawn), n_real=5)
    d = load_domain('birds', drawn)
    plain, = make_arms('pretrain', 'released', **arms)
    assert label_order(plain) == 'released' and labels(plain)[0].indices == np.random.RandomState(2020).permutation(len(d.train))[:5].tolist()
    few, = make_arms('pretrain', 'released', n_fake=40, **arms)
    assert labels(few)[0].indices == [0, 1, 2, 3, 4]
    assert 'leave fold 0 and change the seed' in refused(make_arms, 'pretrain', 'released', fold=1, **arms)
    assert json.loads(plain.options) == {'backgrounds': 'released'} and plain.recipe.released and (plain.steps, plain.pretrain_steps) == (1000, 1000)
    paper, = make_arms('pretrain', 'paper', options='{"split": "official"}', **arms)
    assert json.loads(paper.options) == {'backgrounds': 'inria', 'split': 'official'} and (paper.steps, paper.pretrain_steps, paper.batch_size) == (2000, 2000, 32)


def test_stratified_subsets_are_nested(drawn):
    for fold in range(3):
        data = load_domain('wider', drawn).train
        assert subset(data, 5, fold).indices == subset(data, 9, fold).indices[:5]


# ---- from the tree to a row ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('domain', TREES)
def test_run_experiment(drawn, tmp_path, domain):
    "Every cell of the notebook, in this process."
    values = dict(domain=domain, root=str(drawn), arms='scratch,pretrain', out=str(tmp_path), n_real=6, val_labels='budget' if domain == 'cars' else 'full', image_size=64, batch_size=2, steps=2, pretrain_steps=2, eval_every=2,
                  backbone='mobilenetv1_025', weights='none', protocol='released' if domain == 'birds' else 'paper', segmenter='alpha' if domain == 'qrcodes' else 'frame')
    more = {'n_class_images': 24} if domain == 'qrcodes' else {}
    values['options'] = json.dumps(more) if more else ''
    nb = json.loads((ROOT/'nbs'/'experiments'/'run_experiment.ipynb').read_text())
    shell = CaptureShell()
    for c in (c for c in nb['cells'] if c['cell_type'] == 'code'):
        shell.run(''.join(c['source']) + (f'\nglobals().update({values!r})' if 'parameters' in c['metadata'].get('tags', ()) else ''))
        assert not shell.exc, shell.exc
    rows = read_jsonl(tmp_path/'results.jsonl')
    assert [r['arm'] for r in rows] == ['scratch', 'pretrain'] and all(r['domain'] == domain and 0 <= r['ap50'] <= 1 for r in rows)
    assert rows[0]['labels'] == rows[1]['labels'] and rows[0]['label_order'] == ('released' if domain == 'birds' else 'shuffled')
    assert rows[0]['options'] == {'backgrounds': 'released' if domain == 'birds' else 'inria', **more} and str(drawn) not in json.dumps(rows)
