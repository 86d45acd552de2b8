"The stream across processes: same bytes anywhere, killed and resumed, read back, and what bad input gets."
import json
import os
import signal
import time
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from helpers import contents, forked, python
from synthdet.boxes import chw, masks_to_boxes
from synthdet.core import digest, generator, refused
from synthdet.files import read_jsonl
from synthdet.data import butterflies
from synthdet.data.annotations import read_detection
from synthdet.data.batches import batches
from synthdet.data.domains import load_domain, write_domain
from synthdet.masks.settings import Masks
from synthdet.objects.settings import Objects
from synthdet.settings import override
from synthdet.synthesis.cut import cutout
from synthdet.synthesis.disk import write_stream
from synthdet.synthesis.settings import paper_recipe, Recipe, Synthesis
from synthdet.synthesis.stream import make_samples, Samples

MAKE = '''
import sys
from synthdet.core import UserError, digest
from synthdet.synthesis.disk import write_stream
from test_stream import make
samples = make()
'''


def make(seed=5, n=4, **options):
    "A stream of butterflies with fields of the recipe changed."
    recipe = {k: options.pop(k) for k in [*options] if k in vars(Recipe())}
    cuts = [cutout(*butterflies.class_image(i, size=64), label=1, origin=str(i)) for i in range(n)]
    places = [butterflies.background(i, size=96) for i in range(3)]
    recipe = Recipe(**{**dict(image_size=96, blend='mixed'), **recipe})
    return Samples([c for c in cuts if c], places, recipe, seed=seed, classes=['butterfly'], **options)


# the same bytes

@pytest.mark.slow
def test_another_process_draws_the_same_bytes():
    p = python(MAKE + "print(digest([samples[i][0] for i in (0, 7, 123456)]))", env={'PYTHONHASHSEED': '77'})
    out, err = p.communicate(timeout=120)
    assert out.strip() == digest([make()[i][0] for i in (0, 7, 123456)]), err


def test_the_pixels_of_backgrounds_are_part_of_the_signature():
    many, cuts = [chw(np.full((16, 16, 3), k % 7, np.uint8)) for k in range(1500)], list(make().pool)
    named = lambda backgrounds: Samples(cuts, backgrounds, Recipe(image_size=16)).signature()
    assert named(many) == named(list(many)) != named([chw(np.full((16, 16, 3), 9, np.uint8)), *many[1:]])
    assert named(many[:3]) != named(many[1:4])


def test_what_is_in_memory_and_in_which_order_it_is_read_changes_nothing():
    samples, bare = make(), make(budget_mb=0)
    samples.fill()
    for i in (9, 2, 2, 4000): assert torch.equal(samples[i][0], bare[i][0])
    assert len(samples.backgrounds.kept) == 3 and not bare.backgrounds.kept


# labels

@pytest.mark.parametrize('compositor', ['free', 'paper', 'released'])
def test_torchvision_moves_boxes_and_masks_with_a_sample(compositor):
    recipe = Recipe(count=(2, 3), image_size=96) if compositor == 'free' else \
        paper_recipe('faces', released=compositor == 'released', image_size=96, count=(2, 3))
    samples = Samples(list(make(n=8).pool), [butterflies.background(0, size=96)], recipe, with_masks=True)
    image, target = samples[3]
    turned, moved = v2.RandomHorizontalFlip(1.)(tv_tensors.Image(image), target)
    assert torch.equal(turned, image.flip(2)) and torch.equal(moved['masks'], target['masks'].flip(2))
    x1, y1, x2, y2 = target['boxes'].unbind(1)
    assert torch.allclose(moved['boxes'], torch.stack([96 - x2, y1, 96 - x1, y2], 1)) and len(x1) >= 2
    if compositor != 'released': assert torch.equal(moved['boxes'], masks_to_boxes(moved['masks']))


@pytest.mark.parametrize('blend', ['paste', 'feather', 'poisson', 'truncated'])
def test_every_change_lies_under_a_visible_mask(blend):
    "What is drawn is labelled: outside the masks the image is the background."
    samples = make(blend=blend, distractors=(0, 0), shadow=(0, 0), effects=0, background_crop=0, background_flip=0,
                   max_overlap=.5, count=(2, 4), with_masks=True)
    for i in range(20):
        image, target = samples[i]
        touched = (image != samples.backgrounds[samples.layout(i)[1]]).any(0)
        seen = target['masks'].any(0) if len(target['masks']) else torch.zeros_like(touched)
        soft = cv2.dilate(seen.numpy().astype(np.uint8), np.ones((5, 5)))  # a soft edge reaches a little further
        assert not (touched & ~torch.from_numpy(soft).bool()).any()


def test_thin_objects_are_drawn_in_every_blend():
    samples = make(blend='poisson', image_size=128, scale=(.02, .1), aspect=(.1, 8))
    for i in range(60): samples[i]


# naive pasting, and the release

@pytest.fixture(scope='module')
def flies(): return load_domain('butterflies', n_class_images=12, n_backgrounds=4)


@pytest.mark.parametrize('released', [False, True])
def test_segmenter_frame_is_the_papers_naive_pasting(flies, released):
    "The whole augmented frame replaces the patch, black corners and all, and its box is the placement box."
    recipe = paper_recipe('faces', released=released, rotate=(30, 45))
    samples, masked = (make_samples(flies, masks=m, recipe=recipe, with_masks=True) for m in ('frame', 'alpha'))
    black = 0
    for i in range(12):
        _, background, layers = samples.layout(i)
        image, target = samples[i]
        ground = samples.backgrounds[background]
        placed = torch.tensor([[l.x, l.y, l.x + l.patch.mask.shape[1], l.y + l.patch.mask.shape[0]] for l in layers])
        assert torch.equal(target['boxes'].int(), placed.int())
        for (x1, y1, x2, y2), mask in zip(placed, target['masks']):
            assert mask.sum() == (x2 - x1)*(y2 - y1) == mask[y1:y2, x1:x2].sum(), 'no mask at all'
            patch = image[:, y1:y2, x1:x2]
            assert (patch != ground[:, y1:y2, x1:x2]).any(0).float().mean() > .9
            black += (patch == 0).all(0).sum().item()
        assert not torch.equal(image, masked[i][0])
    assert released or black > 1000, 'corners are black'  # compressed, they are nearly black


def test_what_is_released_is_drawn_at_320_saved_as_jpeg_and_resized(flies):
    recipes = {s: paper_recipe('cars', released=True, image_size=s) for s in (320, 300, (150, 200))}
    at = {s: make_samples(flies, masks='alpha', recipe=r, with_masks=True) for s, r in recipes.items()}
    for i in range(4):
        drawn, target = at[320][i]
        assert (target['boxes'] == target['boxes'].round()).all(), 'boxes are whole pixels of the picture that is drawn'
        for size, (h, w) in (300, (300, 300)), ((150, 200), (150, 200)):
            image, scaled = at[size][i]
            expected = cv2.resize(np.ascontiguousarray(drawn.permute(1, 2, 0)), (w, h), interpolation=cv2.INTER_LINEAR)
            assert torch.equal(image, torch.from_numpy(expected).permute(2, 0, 1))
            assert torch.allclose(scaled['boxes'], target['boxes']*torch.tensor([w/320, h/320, w/320, h/320]))
            assert scaled['masks'].shape[1:] == (h, w) and scaled['boxes'].canvas_size == (h, w)
        row = at[300].provenance(i)
        assert [o['box'] for o in row['objects']] == at[300][i][1]['boxes'].tolist()


def test_the_released_picture_has_been_a_jpeg_of_quality_75(flies):
    samples = make_samples(flies, masks='alpha', recipe=paper_recipe('birds', released=True))
    image = cv2.cvtColor(np.ascontiguousarray(samples[0][0].permute(1, 2, 0)), cv2.COLOR_RGB2BGR)
    lost = {}
    for quality in (60, 75, 90):
        again = cv2.imdecode(cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)
        lost[quality] = np.abs(again.astype(int) - image).mean()
    assert lost[75] < .3*min(lost[60], lost[90]), 'compressed anew at its own quality it hardly changes'


# from a domain

def test_every_part_may_be_settings_a_name_or_the_thing_itself(flies):
    same = lambda a, b: torch.equal(a[3][0], b[3][0])
    small, masks = Recipe(image_size=64), Masks('alpha')
    whole = make_samples(flies, Synthesis(Objects('real', size=48), masks, small, n_fake=7, reuse=2), seed=4)
    parts = make_samples(flies, Synthesis(Objects(size=48)), masks=masks, recipe=small, seed=4)
    assert len(whole) == 7 and same(whole, parts)
    named = make_samples(flies, masks='alpha', recipe=small)
    given = [flies.class_images[i] for i in range(12)]
    for objects in ('real', Objects(), given):
        assert same(named, make_samples(flies, objects=objects, masks='alpha', recipe=small))
    def mine(images): return images[:, 3]
    assert same(named, make_samples(flies, masks=mine, recipe=small))
    birds = [make_samples(flies, masks='alpha', recipe=r) for r in ('birds', paper_recipe('birds'))]
    assert same(*birds)
    words = 'segmenter=alpha recipe.image_size=64'
    assert same(named, make_samples(flies, override(Synthesis(), words)))


def test_a_stream_of_a_domain_feeds_batches(flies):
    samples = make_samples(flies, masks='alpha', recipe=Recipe(image_size=128), n_fake=3)
    images, targets = next(batches(samples, 6))  # two passes over the three
    assert images.shape == (6, 3, 128, 128) and images.is_contiguous(memory_format=torch.channels_last)
    first = sorted(digest(i) for i in images[:3])
    assert first == sorted(digest(i) for i in images[3:]) == sorted(digest(samples[i][0]) for i in range(3))
    assert samples.classes == ('butterfly',) and len(samples) == 3
    assert 'no background' in refused(make_samples, replace(flies, backgrounds=[]), masks='alpha')


def test_a_folder_called_butterflies_does_not_get_the_network_of_the_drawn_ones(tmp_path, monkeypatch):
    drawn = load_domain('butterflies', n_class_images=8, n_backgrounds=2)
    named = load_domain('folder', write_domain(drawn, tmp_path/'butterflies', n_labelled=1))
    monkeypatch.chdir(tmp_path)  # where a folder is called like the domain
    assert "no ReDO weights are shipped for domain 'butterflies'" in refused(make_samples, named, masks='redo')
    asked = (drawn, Masks('redo')), (drawn, Masks('redo', 'butterflies')), (named, Masks('redo', 'butterflies'))
    kept = [len(make_samples(d, masks=m).pool) for d, m in asked]
    assert kept[0] == kept[1] == kept[2] > 0


# files

@pytest.mark.parametrize('format', ['coco', 'voc', 'yolo'])
def test_what_is_written_reads_back(tmp_path, format):
    samples = make()
    write_stream(samples, tmp_path, 6, format=format, suffix='.png')
    d = read_detection(tmp_path)
    found = {f.name: d[i] for i, f in enumerate(d.files)}
    assert d.classes == ('butterfly',)
    for i, row in enumerate(read_jsonl(tmp_path/'provenance.jsonl')):
        (image, target), (drawn, true) = found[f'{i:06d}.png'], samples[i]
        assert torch.equal(image, drawn), 'png keeps every pixel'
        assert torch.allclose(target['boxes'], true['boxes'], atol=.01)
        assert torch.equal(target['labels'], true['labels'])
        assert [o['box'] for o in row['objects']] == true['boxes'].tolist() and row['sample'] == i


def test_a_longer_stream_continues_a_shorter_one(tmp_path):
    for place, n in (('a', 3), ('a', 5), ('b', 5)): write_stream(make(), tmp_path/place, n)
    assert contents(tmp_path/'a') == contents(tmp_path/'b')


def test_the_mark_carries_what_names_the_stream(tmp_path):
    write_stream(make(), tmp_path/'s', 2)
    text = (tmp_path/'s/stream.yaml').read_text()
    assert make().signature() in text and '"blend": "mixed"' in text and str(tmp_path) not in text
    for other in (make(seed=6), make(blend='paste'), make(n=3)):
        assert 'holds another stream' in refused(write_stream, other, tmp_path/'s', 2)
    assert 'was begun with another masks' in refused(write_stream, make(with_masks=True), tmp_path/'s', 2)


@pytest.mark.slow
def test_a_killed_writer_resumes_to_the_same_files(tmp_path):
    n = 60
    write_stream(make(), tmp_path/'whole', n, format='voc')
    p = python(MAKE + f"write_stream(samples, sys.argv[1], {n}, format='voc')", tmp_path/'killed')
    written = lambda: len(list((tmp_path/'killed').glob("images*/*.jpg")))
    for _ in range(3000):  # until some images are there
        if written() >= 5: break
        time.sleep(.01)
    p.send_signal(signal.SIGKILL)
    p.communicate(timeout=60)
    assert 5 <= written() < n, 'killed midway'
    with open(tmp_path/'killed/provenance.jsonl', 'a') as f: f.write('{"torn')
    write_stream(make(), tmp_path/'killed', n, format='voc')
    assert contents(tmp_path/'killed') == contents(tmp_path/'whole')


@pytest.mark.slow
def test_killed_at_any_moment_any_number_of_times_it_ends_with_the_same_files(tmp_path):
    "By forks, which are there at once: most kills come while files are written, some while they are checked."
    g, n, format, kills = generator(0, 'kills'), 24, 'yolo', 0
    start = time.monotonic()
    write_stream(make(), tmp_path/'whole', n, format=format)
    usual, wanted = time.monotonic() - start, contents(tmp_path/'whole')
    for turn in range(8):
        folder = tmp_path/f'{turn}'
        for _ in range(3):
            p = forked(write_stream, make(), folder, n, format)
            p.join(usual*g.uniform(0, .6))
            kills += p.is_alive()
            p.kill()
            p.join(60)
        write_stream(make(), folder, n, format=format)
        assert contents(folder) == wanted
    assert kills > 8


def lines_of(folder): return (folder/'provenance.jsonl').read_bytes().splitlines(keepends=True)
def put(folder, lines): (folder/'provenance.jsonl').write_bytes(b''.join(lines))


DAMAGE = dict(
    image_gone=lambda f, g: (f/'images/000002.jpg').unlink(),
    image_empty=lambda f, g: (f/'images/000002.jpg').write_bytes(b''),
    image_torn=lambda f, g: os.truncate(f/'images/000002.jpg', int(g.integers(1, 900))),
    image_of_another=lambda f, g: (f/'images/000002.jpg').write_bytes((f/'images/000004.jpg').read_bytes()),
    all_images_gone=lambda f, g: [p.unlink() for p in (f/'images').iterdir()],
    line_lost=lambda f, g: put(f, [l for i, l in enumerate(lines_of(f)) if i != 2]),
    line_torn=lambda f, g: put(f, [l[:int(g.integers(1, 90))] + b'\n'*(i < 5) if i in (2, 5) else l
                                   for i, l in enumerate(lines_of(f))]),
    lines_run_together=lambda f, g: put(f, [l[:-1] if i == 2 else l for i, l in enumerate(lines_of(f))]),
    lines_doubled=lambda f, g: put(f, [*lines_of(f), *lines_of(f)[:3]]),
    lines_out_of_order=lambda f, g: put(f, lines_of(f)[::-1]),
    line_changed=lambda f, g: put(f, [l.replace(b'"seed": 5', b'"seed": 6') for l in lines_of(f)]),
    keys_out_of_order=lambda f, g: put(f, [json.dumps(json.loads(l), sort_keys=True).encode() + b'\n'
                                           for l in lines_of(f)]),
    lines_of_others=lambda f, g: put(f, [b'[1]\n', b'\xff\xfe\n', b'\n', b'{"sample": "x", "digest": 1}\n',
                                         *lines_of(f)]),
    no_lines=lambda f, g: (f/'provenance.jsonl').unlink(),
    annotations_gone=lambda f, g: [p.unlink() for p in f.glob('*.json')],
    left_over=lambda f, g: [(f/p).touch() for p in ('.lock', '.stream.yaml.1f.tmp', 'images/.000002.jpg.1f.tmp')])


@pytest.mark.parametrize('damage', DAMAGE.values(), ids=DAMAGE)
def test_what_was_damaged_or_lost_is_mended(damage, tmp_path):
    samples, g = make(), generator(0, 'damage')
    wanted = contents(write_stream(samples, tmp_path, 6))
    damage(tmp_path, g)
    assert contents(tmp_path) != wanted
    write_stream(samples, tmp_path, 6)
    assert contents(tmp_path) == wanted


def test_only_what_is_damaged_is_drawn_again(tmp_path):
    folder = write_stream(make(), tmp_path, 6)
    (folder/'images/000002.jpg').unlink()
    put(folder, lines_of(folder)[:4])
    samples, drawn = make(), []
    layout = samples.layout
    samples.layout = lambda i: drawn.append(i) or layout(i)
    write_stream(samples, folder, 7)
    assert drawn == [2, 4, 5, 6]


@pytest.mark.slow
def test_two_that_write_one_folder_do_not_meet(tmp_path):
    both = [python(MAKE + "write_stream(samples, sys.argv[1], 40, format='voc')", tmp_path/'both') for _ in range(2)]
    assert [p.wait(300) for p in both] == [0, 0]
    assert contents(tmp_path/'both') == contents(write_stream(make(), tmp_path/'one', 40, format='voc'))


def test_a_folder_that_holds_something_else_is_refused_and_stays(tmp_path):
    (tmp_path/'text').write_text('mine')
    for folder in (tmp_path, tmp_path/'text'):
        assert 'is not an empty folder and holds no stream' in refused(write_stream, make(), folder, 2)
    assert contents(tmp_path) == {'text': b'mine'}
    (tmp_path/'new').mkdir()
    (tmp_path/'new/.DS_Store').touch() # an empty one, to whoever looks into it
    assert len(list((write_stream(make(), tmp_path/'new', 2)/'images').iterdir())) == 2


FULL = '''
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)) # bytes
try: write_stream(samples, sys.argv[1], 60, suffix=sys.argv[2])
except UserError as e: print(e); sys.exit(2)
'''


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_no_torn_file(tmp_path):
    p = python(MAKE + FULL, tmp_path/'s', '.png')  # an image of 96 x 96 as PNG does not fit
    out, err = p.communicate(timeout=120)
    assert p.returncode == 2 and len(out.strip().splitlines()) == 1 and 'cannot write' in out, err
    assert not list((tmp_path/'s').rglob('*.png')) and not list((tmp_path/'s').rglob('*.tmp'))


@pytest.mark.slow
def test_a_disk_that_fills_up_in_the_provenance_is_one_line_and_resumes(tmp_path):
    p = python(MAKE + FULL, tmp_path/'s', '.jpg')  # images as JPEG fit, the rows of provenance do not
    out, err = p.communicate(timeout=120)
    assert p.returncode == 2 and len(out.strip().splitlines()) == 1 and not err, err
    assert 'cannot write' in out and 'provenance.jsonl' in out
    text = (tmp_path/'s/provenance.jsonl').read_text()
    assert 5 < len(text.splitlines()) < 60 and text.endswith('\n') and not list((tmp_path/'s').rglob('*.tmp'))
    for place in 's', 'whole': write_stream(make(), tmp_path/place, 60)
    assert contents(tmp_path/'s') == contents(tmp_path/'whole')


def test_fewer_images_than_are_there_are_refused(tmp_path):
    write_stream(make(), tmp_path/'s', 5)
    before = contents(tmp_path/'s')
    assert 'holds 5 images of this stream already; ask for at least 5' in refused(write_stream, make(), tmp_path/'s', 3)
    assert contents(tmp_path/'s') == before
