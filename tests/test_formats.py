"What crosses the readers and writers: files of other tools, damaged files, full disks, worker processes."
import io
import json
import os
import random

import numpy as np
import pytest
import supervision as sv
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch.utils.data import DataLoader

from helpers import needs_shared, remedy
from synthdet.core import generator, UserError
from synthdet.machine import shared
from synthdet.data.annotations import FORMATS, read_detection, write_detection
from synthdet.data.held import Resized
from synthdet.data.images import image_size, read_image
from synthdet.data.walks import image_files

H, W = 60, 80


def picture(i=0, h=H, w=W):
    return torch.from_numpy(generator(i, 'picture').integers(0, 255, (h, w, 3), dtype=np.uint8)).permute(2, 0, 1)


def samples(n=5, seed=0):
    "Images with 0 to 3 boxes of two classes."
    out = []
    for i in range(n):
        g = generator(seed, 'sample', i)
        k = i % 4
        corner, side = g.uniform(0, 30, (k, 2)), g.uniform(1, 29, (k, 2))
        boxes = np.concatenate([corner, corner + side], 1).round() + [0, 0, 1, 1]
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        out.append((picture(i), dict(boxes=boxes, labels=torch.tensor(g.integers(1, 3, k)))))
    return out


def save(folder, *names, size=(W, H)):
    for n in names:
        (folder / n).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', size, (90, 120, 60)).save(folder / n)


def coco(folder, images=None, annotations=None, categories=None, name='set.json'):
    "A COCO file over a.png and b.png."
    save(folder, 'a.png', 'b.png')
    usual = dict(images=[dict(id=i, file_name=f, width=W, height=H) for i, f in ((1, 'a.png'), (2, 'b.png'))],
                 annotations=[dict(id=1, image_id=1, category_id=1, bbox=[5, 6, 20, 30])],
                 categories=[dict(id=1, name='bird')])
    given = dict(images=images, annotations=annotations, categories=categories)
    content = {k: v if given[k] is None else given[k] for k, v in usual.items()}
    (folder / name).write_text(json.dumps(content))
    return folder / name


# ---- round trips -----------------------------------------------------------------------------------------------------

def test_chain_of_formats_keeps_whole_pixels(tmp_path):
    data = samples(6)
    write_detection(data, tmp_path / 'coco', 'coco', ['moth', 'bee'])
    chain = ['coco', 'voc', 'yolo', 'voc', 'coco']
    for n, (a, b) in enumerate(zip(chain, chain[1:])):
        source = tmp_path / (a if n == 0 else f'{n}')
        write_detection(read_detection(source, classes=['moth', 'bee']), tmp_path / f'{n+1}', b, ['moth', 'bee'])
    for (image, target), (im, t) in zip(data, read_detection(tmp_path / '4')):
        assert torch.equal(im, image)
        assert torch.equal(t['boxes'], target['boxes']) and torch.equal(t['labels'], target['labels'])


def test_supervision_reads_what_we_write(tmp_path):
    "The library's own loaders are the oracle for all three formats."
    data = samples(5)
    for f in FORMATS: write_detection(data, tmp_path / f, f, ['moth', 'bee'])
    c, v, y = (str(tmp_path / f) for f in ('coco', 'voc', 'yolo'))
    read = dict(coco=sv.DetectionDataset.from_coco(f'{c}/images', f'{c}/annotations.json'),
                voc=sv.DetectionDataset.from_pascal_voc(f'{v}/images', f'{v}/annotations'),
                yolo=sv.DetectionDataset.from_yolo(f'{y}/images', f'{y}/labels', f'{y}/data.yaml'))
    for f, ds in read.items():
        by_name = {os.path.basename(p): a for p, a in ds.annotations.items()}
        for i, (_, target) in enumerate(data):
            theirs = by_name[f'{i:06d}.png']
            assert np.allclose(theirs.xyxy.reshape(-1, 4), target['boxes'].numpy(), atol=.002), f
            assert [ds.classes[k] for k in theirs.class_id] == [('moth', 'bee')[k-1] for k in target['labels']], f


def test_pycocotools_reads_what_we_write(tmp_path, capsys):
    write_detection(samples(5), tmp_path, 'coco', ['moth', 'bee'])
    c = COCO(tmp_path / 'annotations.json')
    assert len(c.imgs) == 5 and len(c.anns) == 0 + 1 + 2 + 3 + 0
    assert [c.cats[k]['name'] for k in (1, 2)] == ['moth', 'bee']


def test_voc_counts_from_one(tmp_path):
    "The first column is 1 and the last is inclusive, as in the development kit."
    image = picture()
    target = dict(boxes=torch.tensor([[0., 0, W, H]]), labels=torch.tensor([1]))
    write_detection([(image, target)], tmp_path, 'voc', ['bird'])
    text = (tmp_path / 'annotations' / '000000.xml').read_text()
    for tag, value in dict(xmin=1, ymin=1, xmax=W, ymax=H).items(): assert f'<{tag}>{value}</{tag}>' in text


# ---- files of other tools --------------------------------------------------------------------------------------------

def test_coco_variants(tmp_path):
    images = [dict(id=7, file_name='a.png'), dict(id=3, file_name='b.png', width=W, height=H)]
    labels = [dict(image_id=3, category_id=8, bbox=[0, 0, W, H + .9]),
              dict(image_id=7, category_id=8, bbox=[1, 2, 3, 4], iscrowd=1)]
    path = coco(tmp_path, images, labels, categories=[dict(id=8, name='bird'), dict(id=0, name='animals')])
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())  # some tools mark UTF-8
    ds = read_detection(path, classes=['bird'])
    assert [t['image_id'] for t in ds.targets] == [7, 3]
    assert ds[0][1]['iscrowd'].tolist() == [True] and ds[1][1]['iscrowd'].tolist() == [False]
    assert ds[1][1]['boxes'].tolist() == [[0, 0, W, H]]
    assert '1 iscrowd' in repr(ds) and '1 boxes cut at the border' in repr(ds) and ds.classes == ('bird',)


def test_places_of_coco_images(tmp_path):
    for n, place in enumerate(['images', '', 'set', '../images']):
        folder = tmp_path / str(n)
        path = coco(folder / 'annotations')
        for f in ('a.png', 'b.png'): (folder / 'annotations' / f).rename(folder / f)
        save(folder / 'annotations' / place, 'a.png', 'b.png')
        for f in ('a.png', 'b.png'): (folder / f).unlink()
        assert len(read_detection(path)) == len(read_detection(folder)) == 2, place
    save(tmp_path / 'elsewhere', 'a.png', 'b.png')
    assert read_detection(path, images=tmp_path / 'elsewhere').files[0].parent.name == 'elsewhere'


def test_yolo_places_and_names(tmp_path):
    save(tmp_path, 'train/images/a.png', 'train/images/b.png')
    (tmp_path / 'train' / 'labels').mkdir()
    text = '1 .5 .5 .5 .5\n0 0.1 0.1 0.3 0.1 0.3 0.4 0.1 0.4\n' # a box and a polygon
    (tmp_path / 'train' / 'labels' / 'a.txt').write_text(text)
    (tmp_path / 'data.yaml').write_text('names: {0: bee, 1: moth}\n')
    ds = read_detection(tmp_path / 'train')
    target = ds[0][1]
    assert torch.allclose(target['boxes'], torch.tensor([[20., 15, 60, 45], [8, 6, 24, 24]]), atol=1e-4)
    assert target['labels'].tolist() == [2, 1] and ds.classes == ('bee', 'moth')
    assert '1 images without a label file' in repr(ds)


def test_boxes_follow_the_turned_picture(tmp_path):
    "A photograph that EXIF turns is measured as it is shown; annotations made on the unturned one are refused."
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (W, H)).save(tmp_path / 'a.jpg', exif=exif)
    entry = lambda w, h: [dict(id=1, file_name='a.jpg', width=w, height=h)]
    assert read_detection(coco(tmp_path, entry(H, W)))[0][0].shape == (3, W, H)
    told = remedy(read_detection, coco(tmp_path, entry(W, H)))
    assert f'a.jpg is {W} x {H} there, but {H} x {W} as a picture' in told


# ---- mistakes --------------------------------------------------------------------------------------------------------

ann = lambda **k: [dict(dict(id=1, image_id=1, category_id=1, bbox=[5, 6, 20, 30]), **k)]
img = lambda **k: [dict(dict(id=1, file_name='a.png', width=W, height=H), **k)]
two = lambda a, b: dict(categories=[dict(id=1, name='bird'), dict(id=a, name=b)])
COCO_MISTAKES = {
    'outside': (dict(annotations=ann(bbox=[80, 6, 20, 30])), 'no box can be used: 1 boxes outside their picture'),
    'zero area': (dict(annotations=ann(bbox=[5, 6, 0, 30])), 'no box can be used: 1 boxes without area'),
    'negative': (dict(annotations=ann(bbox=[5, 6, 20, -3])), '1 boxes without area'),
    'not a number': (dict(annotations=ann(bbox=[5, 6, 20, float('nan')])), '1 boxes without finite numbers'),
    'shares': (dict(annotations=ann(bbox=[.1, .2, .5, .5])), 'all boxes lie within the first pixel'),
    'words': (dict(annotations=ann(bbox=['left', 6, 20, 3])), "bbox is 'left'; expected a number"),
    'text box': (dict(annotations=ann(bbox='1234')), 'expected four numbers'),
    'short box': (dict(annotations=ann(bbox=[1, 2, 3])), 'expected four numbers'),
    'no box at all': (dict(annotations=ann(bbox=None)), 'has no box, as 1 of 1 annotations'),
    'unknown category': (dict(annotations=ann(category_id=4)), 'category_id 4 is unknown; choose from 1 (bird)'),
    'double image id': (dict(images=img() + img(file_name='b.png')), 'image id 1 occurs 2 times'),
    'double file': (dict(images=img() + img(id=2)), 'file_name a.png occurs 2 times'),
    'double category id': (two(1, 'bee'), 'category id 1 occurs 2 times'),
    'double category': (two(2, 'bird'), 'category bird occurs 2 times'),
    'dangling': (dict(annotations=ann(image_id=9)), 'image_id 9 is not among the images'),
    'missing file': (dict(images=img(file_name='sub/gone.png')), 'the image sub/gone.png is missing'),
    'other size': (dict(images=img(width=W + 5)), 'is 85 x 60 there, but 80 x 60 as a picture'),
    'text id': (dict(images=img(id='first'), annotations=[]), "image id 'first' of 'a.png' is not an integer"),
    'no box': (dict(annotations=[dict(id=1, image_id=1)]), 'annotation 1: has no box'),
    'no category': (dict(annotations=[dict(id=1, image_id=1, bbox=[1, 2, 3, 4])]),
                    'expected an object with category_id'),
    'no name': (dict(categories=[dict(id=1)]), 'expected an object with id, name'),
    'no file name': (dict(images=[dict(id=1)]), 'expected an object with id, file_name'),
    'no lists': (dict(images={}), 'expected lists'),
    'no images': (dict(images=[], annotations=[]), 'lists no image'),
}


@pytest.mark.parametrize('mistake', COCO_MISTAKES)
def test_coco_mistakes(tmp_path, mistake):
    change, expected = COCO_MISTAKES[mistake]
    message = remedy(read_detection, coco(tmp_path, **change))
    assert 'set.json' in message and expected in message, message


def test_coco_never_fails_without_a_word(tmp_path):
    "Random damage to a COCO file is either harmless or a UserError."
    g, junk = random.Random(0), [None, -1, 1e9, 'x', [], {}, [1, 2], True]
    good = coco(tmp_path).read_text()
    for _ in range(150):
        data = json.loads(good)
        part = g.choice(list(data))
        if g.random() < .2: data[part] = g.choice(junk)
        elif g.random() < .3: data[part][0] = g.choice(junk)
        else: data[part][0][g.choice(list(data[part][0]))] = g.choice(junk)
        (tmp_path / 'set.json').write_text(json.dumps(data))
        try: read_detection(tmp_path / 'set.json')
        except UserError: pass


def test_damaged_text(tmp_path):
    path = coco(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert 'cannot be read as JSON' in remedy(read_detection, path)
    path.write_bytes(b'\xff\xfe\x00')
    assert 'not a text in UTF-16' in remedy(read_detection, path)
    path.write_text('[1, 2]')
    assert 'expected an object with images, annotations, categories' in remedy(read_detection, path)


VOC = ('<annotation><size><width>{w}</width><height>60</height></size><object><name>bird</name>'
       '<bndbox><xmin>{x}</xmin><ymin>5</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object></annotation>')
good = VOC.format(w=80, x=3)
VOC_MISTAKES = [
    (VOC.format(w=80, x='left'), "xmin is 'left'; expected a number"),
    (VOC.format(w=70, x=3), 'a.png is 70 x 60 there'),
    (VOC.format(w='wide', x=3), "width is 'wide'; expected a number"),
    (good[:-20], 'not XML'),
    ('<html/>', "the root element is 'html'"),
    (good.replace('bird', ''), "the class name '' cannot be one"),
    (good.replace('bndbox', 'box'), 'has neither bndbox nor polygon'),
    ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', 'not XML')]


@pytest.mark.parametrize('text, expected', VOC_MISTAKES)
def test_voc_mistakes(tmp_path, text, expected):
    save(tmp_path, 'a.png')
    (tmp_path / 'a.xml').write_text(text)
    message = remedy(read_detection, tmp_path)
    assert 'a.xml' in message and expected in message


YOLO_MISTAKES = [
    ('0 .5 .5 .2\n', 'expected at least 5 numbers'), ('0 .5 .5 .2 high\n', 'not a YOLO annotation'),
    ('bird .5 .5 .2 .2\n', 'word 1 is no finite number'),
    ('3 .5 .5 .2 .2\n', 'class 3 is unknown; choose from 0 (bird)'),
    ('0 .5 .5 0 .2\n', '1 boxes without area'), ('0 .5 .5 -.2 .2\n', '1 boxes without area'),
    ('0 40 30 20 20\n', 'these look like pixels'), ('0 nan .5 .1 .1\n', 'not a YOLO annotation')]


@pytest.mark.parametrize('text, expected', YOLO_MISTAKES)
def test_yolo_mistakes(tmp_path, text, expected):
    save(tmp_path, 'a.png')
    (tmp_path / 'classes.txt').write_text('bird\n')
    (tmp_path / 'a.txt').write_text(text)
    message = remedy(read_detection, tmp_path)
    assert 'a.txt' in message and expected in message


def test_sets_that_do_not_fit_together(tmp_path):
    save(tmp_path / 'v', 'a.png', 'b.png')
    (tmp_path / 'v' / 'a.xml').write_text(VOC.format(w=80, x=3))
    assert 'b.png: has no b.xml' in remedy(read_detection, tmp_path / 'v', strict=True)
    save(tmp_path / 'y', 'a.png')
    (tmp_path / 'y' / 'gone.txt').write_text('0 .5 .5 .2 .2\n')
    assert 'gone.txt: its image is missing' in remedy(read_detection, tmp_path / 'y')
    (tmp_path / 'y' / 'gone.txt').unlink()
    (tmp_path / 'y' / 'a.txt').write_text('0 .5 .5 .2 .2\n')
    assert 'no class names; expected a data.yaml or classes.txt' in remedy(read_detection, tmp_path / 'y')
    (tmp_path / 'y' / 'classes.txt').write_text('bird')
    save(tmp_path / 'y', 'a.jpg')
    assert 'image name (without suffix) a occurs 2 times' in remedy(read_detection, tmp_path / 'y')


def test_missing_and_empty(tmp_path):
    assert 'no such file or folder' in remedy(read_detection, tmp_path / 'none')
    assert 'expected annotations in COCO JSON' in remedy(read_detection, tmp_path / 'none.json')
    assert 'no annotations' in remedy(read_detection, tmp_path)
    assert 'no such folder' in remedy(image_files, tmp_path / 'none')
    assert 'found nothing' in remedy(image_files, tmp_path)
    (tmp_path / 'photo.heic').touch()
    assert 'found photo.heic' in remedy(image_files, tmp_path)
    told = remedy(read_detection, coco(tmp_path / 'c'), classes=['bee'])
    assert "category 'bird' is unknown; choose from bee" in told
    assert 'list the class names' in remedy(write_detection, samples(1), tmp_path / 'w')
    told = remedy(write_detection, samples(1), tmp_path / 'w', 'csv', ['moth', 'bee'])
    assert "format 'csv' is unknown; choose from coco, voc, yolo" in told and not (tmp_path / 'w').exists()


# ---- images ----------------------------------------------------------------------------------------------------------

def encoded(format, **options):
    b = io.BytesIO()
    Image.fromarray(picture().permute(1, 2, 0).numpy()).save(b, format, **options)
    return b.getvalue()


@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'WEBP', 'BMP', 'TIFF', 'GIF', 'PPM'])
def test_truncated_files_are_refused(tmp_path, format):
    data, path = encoded(format), tmp_path / f'torn.{format.lower()}'
    path.write_bytes(data)
    assert read_image(path).shape == (3, H, W)
    for share in (0, .05, .3, .6, .9):
        path.write_bytes(data[:int(len(data) * share)])
        assert 'torn' in remedy(read_image, path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'WEBP', 'TIFF', 'GIF', 'PPM'])
def test_damaged_files_never_fail_without_a_word(tmp_path, format, capfd):
    g, data, path = random.Random(1), encoded(format), tmp_path / 'damaged.img'
    for _ in range(60):
        bad = bytearray(data)
        for _ in range(g.choice([1, 5, 30])):
            until = min(len(bad), g.choice([40, 400, 10**6]))
            bad[g.randrange(until)] = g.randrange(256)
        path.write_bytes(bytes(bad))
        for read in (read_image, image_size):
            try: read(path)
            except UserError as e: assert '\n' not in str(e)


@pytest.mark.parametrize('turn', range(1, 9))
def test_all_eight_exif_turns(tmp_path, turn):
    "Every orientation shows the same picture."
    shown = np.zeros((24, 16, 3), np.uint8)
    shown[:12, :8], shown[12:, 8:] = (250, 20, 20), (20, 20, 250)
    undo = [lambda a: a, lambda a: a[:, ::-1], lambda a: a[::-1, ::-1], lambda a: a[::-1],
            lambda a: a.transpose(1, 0, 2), np.rot90, lambda a: a[::-1, ::-1].transpose(1, 0, 2),
            lambda a: np.rot90(a, -1)][turn - 1]
    stored = Image.fromarray(np.ascontiguousarray(undo(shown)))
    exif = Image.Exif()
    exif[0x0112] = turn
    for name in ('a.png', 'a.tif', 'a.jpg'):
        stored.save(tmp_path / name, exif=exif, **dict(quality=100, subsampling=0) if name == 'a.jpg' else {})
        image = read_image(tmp_path / name)
        assert image.shape == (3, 24, 16) and image_size(tmp_path / name) == (24, 16), name
        assert (image.permute(1, 2, 0).int() - torch.from_numpy(shown).int()).abs().max() < 8, name


def test_kinds_of_pixels(tmp_path):
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / '16.png')
    assert torch.equal(read_image(tmp_path / '16.png')[0], torch.arange(256, dtype=torch.uint8).reshape(16, 16))
    Image.fromarray(ramp).save(tmp_path / '16.tif')
    assert torch.equal(read_image(tmp_path / '16.tif'), read_image(tmp_path / '16.png'))
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / 'float.tif')
    assert 'pixels of 32 bits' in remedy(read_image, tmp_path / 'float.tif')
    kinds = dict(CMYK='jpg', YCbCr='jpg', PA='tif')
    for mode in ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'CMYK', 'YCbCr'):
        name = tmp_path / f"{mode}.{kinds.get(mode, 'png')}"
        white = Image.new('RGB', (16, 16), (255, 255, 255))
        white.convert('RGBA' if mode == 'PA' else 'RGB').convert(mode).save(name)
        image = read_image(name)
        assert image.shape == (3, 16, 16) and image.dtype == torch.uint8 and image.min() > 250, mode
        assert read_image(name, alpha=True).shape[0] == (4 if mode in ('LA', 'PA', 'RGBA') else 3), mode


def test_colour_key_is_transparency(tmp_path):
    Image.new('P', (8, 8), 0).save(tmp_path / 'p.png', transparency=0)
    assert read_image(tmp_path / 'p.png').min() == 255 and read_image(tmp_path / 'p.png', alpha=True)[3].max() == 0


# ---- disks and processes ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('format', FORMATS)
def test_full_disk_leaves_no_half_file(tmp_path, monkeypatch, format):
    data = samples(3)
    write_detection(data, tmp_path, format, ['moth', 'bee'])
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}

    def full(fd): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    told = remedy(write_detection, samples(3, seed=5), tmp_path, format, ['bee', 'moth'])
    assert 'No space left on device' in told
    assert {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()} == before


def test_items_are_the_same_in_worker_processes(tmp_path):
    write_detection(samples(6), tmp_path, 'coco', ['moth', 'bee'])
    ds = read_detection(tmp_path)
    for data in (ds, Resized(ds, 32)):
        for workers in (0, 2):
            for (image, target), (im, t) in zip(data, DataLoader(data, batch_size=None, num_workers=workers)):
                assert torch.equal(image, im) and torch.equal(target['boxes'], t['boxes'])
                assert target['image_id'] == t['image_id']


def test_resized_is_the_same_one_by_one():
    data = samples(4)
    ds = Resized(data, 40)
    for i in range(4):
        assert torch.equal(ds[i][0], Resized(data[i:i+1], 40)[0][0])
        assert torch.allclose(ds[i][1]['boxes'] * torch.tensor([W / 40, H / 40] * 2), data[i][1]['boxes'], atol=1e-4)
    averaged = Resized(data, 40, antialias=True)
    assert averaged[0][0].float().std() < ds[0][0].float().std(), 'averaging takes the noise away'
    assert ds[0][0].permute(1, 2, 0).is_contiguous() and len(Resized([], 40)) == 0


# ---- real photographs ------------------------------------------------------------------------------------------------

REAL = dict(faces=(200, 80, 155), birds=(220, 80, 243), cars=(500, 144, 300), airplanes=(200, 80, 120))


@needs_shared
@pytest.mark.parametrize('name', REAL)
def test_real_annotations(name, tmp_path):
    folder = shared() / 'data' / name / 'detection'
    for split, n in zip(('train', 'val', 'test'), REAL[name]):
        ds, raw = read_detection(folder / f'{split}.json'), json.loads((folder / f'{split}.json').read_text())
        assert len(ds) == n and ds.classes == (name[:-1],)
        c = {a['image_id']: a['bbox'] for a in raw['annotations']}
        for t in ds.targets:
            x, y, w, h = c[t['image_id']]
            assert (t['boxes'][0] - torch.tensor([x, y, x + w, y + h])).abs().max() < 1
        image, target = ds[0]
        assert tuple(image.shape[1:]) == image_size(ds.files[0]) and len(target['labels']) == 1
