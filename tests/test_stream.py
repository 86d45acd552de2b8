"The stream across processes: same bytes anywhere, killed and resumed, read back, and what bad input gets."
import os, signal, subprocess, sys, time
from pathlib import Path
import cv2
import numpy as np
import pytest
import torch
from synthdet.data import butterflies
from synthdet.synthesis.settings import Recipe
from synthdet.boxes import chw
from synthdet.core import digest, read_jsonl, UserError
from synthdet.synthesis.cutouts import cutout
from synthdet.data.domain import Domain
from synthdet.data.domains import load_domain, write_domain
from synthdet.data.annotations import read_detection
from synthdet.objects.objects import make_objects
from synthdet.data.batches import batches
from synthdet.synthesis.disk import write_stream
from synthdet.synthesis.stream import make_samples, Samples

MAKE = '''
import sys
from synthdet import butterflies
from synthdet.compose import Recipe
from synthdet.core import UserError, digest
from synthdet.cutouts import cutout
from synthdet.stream import Samples, batches, write_stream
cuts = [cutout(*butterflies.class_image(i, size=64), label=1, origin=str(i)) for i in range(4)]
samples = Samples([c for c in cuts if c], [butterflies.background(i, size=96) for i in range(3)], Recipe(image_size=96, blend='mixed'), seed=5, classes=['butterfly'])
'''


def make(seed=5, **recipe):
    cuts = [cutout(*butterflies.class_image(i, size=64), label=1, origin=str(i)) for i in range(4)]
    return Samples([c for c in cuts if c], [butterflies.background(i, size=96) for i in range(3)], Recipe(**{**dict(image_size=96, blend='mixed'), **recipe}), seed=seed, classes=['butterfly'])


def python(code, *args, **options):
    return subprocess.Popen([sys.executable, '-c', MAKE + code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob('*')) if p.is_file()}


def test_another_process_draws_the_same_bytes():
    p = python("print(digest([samples[i][0] for i in (0, 7, 123456)]))", env={**os.environ, 'PYTHONHASHSEED': '77'})
    out, err = p.communicate(timeout=120)
    assert out.strip() == digest([make()[i][0] for i in (0, 7, 123456)]), err


def test_a_killed_writer_resumes_to_the_same_files(tmp_path):
    n = 60
    write_stream(make(), tmp_path/'whole', n, format='voc')
    code = f"write_stream(samples, sys.argv[1], {n}, format='voc')"
    p = python(code, tmp_path/'killed')
    for _ in range(2000): # until some images are there
        if len(list((tmp_path/'killed').glob('images/*.jpg'))) >= 5: break
        time.sleep(.01)
    p.send_signal(signal.SIGKILL); p.communicate()
    assert 5 <= len(list((tmp_path/'killed').glob('images/*.jpg'))) < n, 'killed midway'
    with open(tmp_path/'killed/provenance.jsonl', 'a') as f: f.write('{"torn')
    with pytest.warns(UserWarning, match='torn'): write_stream(make(), tmp_path/'killed', n, format='voc')
    killed = {k: v for k, v in tree(tmp_path/'killed').items() if not k.endswith('.tmp')} # a killed process cannot clear its temporary file
    assert killed == tree(tmp_path/'whole')


@pytest.mark.parametrize('format', ['coco', 'voc', 'yolo'])
def test_what_is_written_reads_back(tmp_path, format):
    samples = make()
    write_stream(samples, tmp_path, 6, format=format, suffix='.png')
    d = read_detection(tmp_path)
    found = {f.name: d[i] for i, f in enumerate(d.files)}
    assert d.classes == ('butterfly',)
    for i, row in enumerate(read_jsonl(tmp_path/'provenance.jsonl')):
        image, target = found[f'{i:06d}.png']
        assert torch.equal(image, samples[i][0]), 'png keeps every pixel'
        assert torch.allclose(target['boxes'], samples[i][1]['boxes'], atol=.01) and torch.equal(target['labels'], samples[i][1]['labels'])
        assert [o['box'] for o in row['objects']] == samples[i][1]['boxes'].tolist() and row['sample'] == i


def test_a_longer_stream_continues_a_shorter_one(tmp_path):
    write_stream(make(), tmp_path/'a', 3); write_stream(make(), tmp_path/'a', 5); write_stream(make(), tmp_path/'b', 5)
    assert tree(tmp_path/'a') == tree(tmp_path/'b')


def test_a_full_disk_is_one_line_and_no_torn_file(tmp_path):
    code = '''
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)) # bytes: an image of 96 x 96 as PNG does not fit
try: write_stream(samples, sys.argv[1], 3, suffix='.png')
except UserError as e: print(e); sys.exit(2)
'''
    p = python(code, tmp_path/'s')
    out, err = p.communicate(timeout=120)
    assert p.returncode == 2 and len(out.strip().splitlines()) == 1 and 'cannot write' in out, err
    assert not list((tmp_path/'s').rglob('*.png')) and not list((tmp_path/'s').rglob('*.tmp'))


def test_a_disk_that_fills_up_in_the_provenance_is_one_line_and_resumes(tmp_path):
    code = '''
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)) # bytes: images as JPEG fit, the rows of provenance do not
try: write_stream(samples, sys.argv[1], 60)
except UserError as e: print(e); sys.exit(2)
'''
    p = python(code, tmp_path/'s')
    out, err = p.communicate(timeout=120)
    assert p.returncode == 2 and len(out.strip().splitlines()) == 1 and 'cannot write' in out and 'provenance.jsonl' in out and not err, err
    text = (tmp_path/'s/provenance.jsonl').read_text()
    assert 5 < len(text.splitlines()) < 60 and text.endswith('\n') and not list((tmp_path/'s').rglob('*.tmp'))
    write_stream(make(), tmp_path/'s', 60); write_stream(make(), tmp_path/'whole', 60)
    assert tree(tmp_path/'s') == tree(tmp_path/'whole')


def test_fewer_images_than_are_there_are_refused(tmp_path):
    write_stream(make(), tmp_path/'s', 5)
    before = tree(tmp_path/'s')
    with pytest.raises(UserError, match='holds 5 images of this stream already; ask for at least 5, or choose'): write_stream(make(), tmp_path/'s', 3)
    assert tree(tmp_path/'s') == before


def test_thin_objects_are_drawn_in_every_blend():
    samples = make(blend='poisson', image_size=128, scale=(.02, .1), aspect=(.1, 8))
    for i in range(60): samples[i]


def test_the_pixels_of_backgrounds_are_part_of_the_signature():
    many = [chw(np.full((16, 16, 3), k % 7, np.uint8)) for k in range(1500)]
    named = lambda backgrounds: Samples(make().cutouts.items, backgrounds, Recipe(image_size=16)).signature()
    assert named(many) == named(list(many)) != named([chw(np.full((16, 16, 3), 9, np.uint8)), *many[1:]])
    assert named(many[:3]) != named(many[1:4])


def test_the_butterflies_domain_makes_a_stream(tmp_path, monkeypatch):
    monkeypatch.setenv('SYNTHDET_CACHE', str(tmp_path))
    domain = load_domain('butterflies', n_class_images=24, n_backgrounds=4)
    samples = make_samples(domain, segmenter='alpha', recipe=Recipe(image_size=128), n_fake=3)
    assert samples.classes == ('butterfly',) and len(samples) == 3
    images, targets = next(batches(samples, 6)) # two passes over the three
    assert images.shape == (6, 3, 128, 128) and images.is_contiguous(memory_format=torch.channels_last)
    first = sorted(digest(i) for i in images[:3])
    assert first == sorted(digest(i) for i in images[3:]) == sorted(digest(samples[i][0]) for i in range(3))
    paper = make_samples(domain, segmenter='alpha', recipe=Recipe.paper('faces'))
    assert all(torch.equal(c.rgba[:3], o.image[:3]) for c, o in zip(paper.cutouts.items, make_objects('real', domain))), 'the paper pastes whole pictures'
    assert any(c.rgba.shape != o.image.shape for c, o in zip(samples.cutouts.items, make_objects('real', domain))), 'the default crops'
    bare = Domain(**{**domain.__dict__, 'backgrounds': []})
    with pytest.raises(UserError, match='no background'): make_samples(bare, segmenter='alpha')


def test_a_folder_called_butterflies_does_not_get_the_network_of_the_drawn_ones(tmp_path, monkeypatch):
    drawn = load_domain('butterflies', n_class_images=8, n_backgrounds=2)
    named = load_domain('folder', write_domain(drawn, tmp_path/'butterflies', n_labelled=1))
    monkeypatch.chdir(tmp_path) # where a folder is called like the domain
    with pytest.raises(UserError, match="no ReDO weights are shipped for domain 'butterflies'; train them with nbs/experiments/train_redo.ipynb and give weights"): make_samples(named, segmenter='redo')
    kept = [len(make_samples(d, segmenter='redo', **k).cutouts) for d, k in ((drawn, {}), (drawn, dict(weights='butterflies')), (named, dict(weights='butterflies')))]
    assert kept[0] == kept[1] == kept[2] > 0


@pytest.mark.parametrize('blend', ['paste', 'feather', 'poisson'])
def test_every_change_lies_under_a_visible_mask(blend):
    "What is drawn is labelled: outside the masks the image is the background."
    quiet = dict(distractors=(0, 0), shadow=(0, 0), effects=0, background_crop=0, background_flip=0, max_overlap=.5, objects=(2, 4))
    samples = make(blend=blend, **quiet); samples.masks = True
    for i in range(20):
        image, target = samples[i]
        ground = samples.backgrounds[samples.layout(i)[1]]
        touched = (image != ground).any(0)
        seen = target['masks'].any(0) if len(target['masks']) else torch.zeros_like(touched)
        soft = torch.from_numpy(cv2.dilate(seen.numpy().astype(np.uint8), np.ones((5, 5)))).bool() # a soft edge reaches a little beyond the mask
        assert not (touched & ~soft).any()
