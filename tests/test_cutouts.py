"The cut-out cache, pools larger than memory, determinism, and real photographs where the reference folder is at hand."
import os
import pickle
import signal
import threading
import tracemalloc
import warnings

import cv2
import numpy as np
import pytest
import torch

from helpers import ended, forked, needs_shared
from synthdet.core import refused
from synthdet.machine import shared
from synthdet.data import butterflies
from synthdet.data.annotations import write_detection
from synthdet.data.batches import batches
from synthdet.data.butterflies import class_image
from synthdet.data.domain import ClassImage
from synthdet.data.domains import load_domain
from synthdet.data.images import write_image
from synthdet.data.settings import Labels
from synthdet.masks.segment import SEGMENTERS
from synthdet.masks.settings import Gate, Masks
from synthdet.objects.objects import make_objects
from synthdet.synthesis import cutouts as module
from synthdet.synthesis.cut import cutout, Cutout
from synthdet.synthesis.cutouts import make_cutouts
from synthdet.synthesis.settings import Recipe
from synthdet.synthesis.stream import make_samples, Samples


def objects(n=10, size=48, first=0):
    return [ClassImage(class_image(first + i, size=size, seed=3)[0], 1, str(i)) for i in range(n)]


BLANK = ClassImage(torch.full((3, 48, 48), 90, dtype=torch.uint8), 1, 'blank')


def same(a, b): return a.content == b.content and a.rejected == b.rejected


def no_cutting(monkeypatch):
    "From here on a call that has to cut anything fails."
    def refuse(*a, **k): raise AssertionError('cut although the cache holds it')
    monkeypatch.setattr(module, '_cut_all', refuse)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('SYNTHDET_CACHE', str(tmp_path/'cache'))


def files(tmp_path): return sorted((tmp_path/'cache').rglob('*.npz'))


# the cache

def test_second_call_reads_the_cache(tmp_path, monkeypatch):
    first = make_cutouts(objects())
    assert len(files(tmp_path)) == 1 and not [p for p in (tmp_path/'cache').rglob('*') if 'tmp' in p.name]
    no_cutting(monkeypatch)
    assert same(first, make_cutouts(objects()))


def test_every_input_is_part_of_the_name(tmp_path, monkeypatch):
    xs = objects(4)
    changed = xs[0].image.clone()
    changed[0, 0, 0] += 1
    calls = [('grabcut', {}), ('frame', {}), (Masks(gate=Gate(min_area=.01)), {}), ('grabcut', dict(size=32)),
             ('grabcut', dict(tight=False)), ('grabcut', dict(scores=True))]
    for masks, options in calls: make_cutouts(xs, masks, **options)
    make_cutouts([xs[0]._replace(image=changed), *xs[1:]])
    make_cutouts([xs[0]._replace(label=2), *xs[1:]])
    assert len(files(tmp_path)) == len(calls) + 2
    for stage in ('objects', 'masks'):
        monkeypatch.setitem(module.VERSIONS, stage, 99)
        make_cutouts(xs)
    assert len(files(tmp_path)) == len(calls) + 4, 'what a stage does is part of the name by its version'


def brighter(than, **more):
    "A segmenter of one's own: three of them look the same from outside."
    def segment(images): return (images.mean(1) > than).float()
    segment.__dict__.update(more)
    return segment


def test_three_thresholds_in_a_closure_give_three_results_and_none_is_kept(tmp_path):
    found = [make_cutouts(objects(), brighter(t)) for t in (.3, .4, .5)]
    assert len({f.content for f in found}) == 3 and not files(tmp_path)


def test_what_has_content_is_kept_by_it(tmp_path, monkeypatch):
    found = [make_cutouts(objects(), brighter(t, content=f'brighter than {t}')) for t in (.3, .4, .5)]
    assert len(files(tmp_path)) == 3
    no_cutting(monkeypatch)
    assert same(found[1], make_cutouts(objects(), brighter(.4, content='brighter than 0.4')))


@pytest.mark.parametrize('damage', [
    lambda b: b[:len(b)//2], lambda b: b'', lambda b: b'not a zip', lambda b: b[:-30] + b'\xff'*30,
    lambda b: b[:300] + bytes([b[300] ^ 255]) + b[301:]])
def test_damaged_cache_is_reported_and_mended(tmp_path, monkeypatch, damage):
    first = make_cutouts(objects(4))
    path, = files(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match='is damaged'): assert same(first, make_cutouts(objects(4)))
    no_cutting(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert same(first, make_cutouts(objects(4)))


def test_a_pool_that_cannot_be_read_for_once_stays(tmp_path, monkeypatch):
    first, load = make_cutouts(objects(4)), module._load
    def once(*a):
        monkeypatch.setattr(module, '_load', load)
        raise OSError(24, 'Too many open files')
    monkeypatch.setattr(module, '_load', once)
    monkeypatch.setattr(module, '_to_disk', None)
    with pytest.warns(UserWarning, match='Too many open files'): assert same(first, make_cutouts(objects(4)))


def test_a_pickle_in_the_cache_is_not_executed(tmp_path):
    class Trap:
        def __reduce__(self): return (open, (str(tmp_path/'sprung'), 'w'))
    first = make_cutouts(objects(3))
    path, = files(tmp_path)
    with open(path, 'wb') as f:
        np.savez(f, pixels=np.array([Trap()], dtype=object), shapes=[[1, 1]], labels=[1], scores=[0.], text=[0])
    with pytest.warns(UserWarning, match='is damaged'): assert same(first, make_cutouts(objects(3)))
    assert not (tmp_path/'sprung').exists()


def test_a_disk_that_refuses_leaves_no_pool_and_is_gone_on_with(tmp_path, monkeypatch):
    def full(f, **arrays):
        f.write(b'half')
        raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(module.np, 'savez', full)
        assert 'No space left' in refused(make_cutouts, objects(3))
    assert not files(tmp_path) and not [p for p in (tmp_path/'cache').rglob('*') if p.name.endswith('tmp')]
    assert same(make_cutouts(objects(3)), make_cutouts(objects(3), cache=False)) and len(files(tmp_path)) == 1
    monkeypatch.setenv('SYNTHDET_CACHE', '/proc/no/folder')
    assert refused(make_cutouts, objects(3)).endswith('choose another folder by SYNTHDET_CACHE')


def test_pixels_that_cannot_be_written_are_told_in_a_line(tmp_path):
    assert refused(module._append, tmp_path, 0, np.zeros(9, np.uint8)).startswith(f'cannot write {tmp_path}: Is a dir')


# pools larger than memory

def pools(n=12, **options):
    "The same cut-outs held in memory and read from disk."
    return [make_cutouts(objects(n), budget_mb=mb, **options) for mb in (100, 0)]


def test_a_pool_on_disk_gives_what_one_in_memory_gives():
    held, read = pools(scores=True)
    assert isinstance(read.cutouts.pixels, module.OnDisk) and isinstance(held.cutouts.pixels, np.ndarray)
    assert same(held, read) and held.scores == read.scores and held.report() == read.report()
    for a, b in zip(held, read, strict=True): assert torch.equal(a.rgba, b.rgba) and a[1:] == b[1:]
    part = read[2:9:3]
    assert same(held[2:9:3], part) and part.scores == held.scores[2:9:3] and torch.equal(part[-1].rgba, held[8].rgba)
    with pytest.raises(IndexError): read[len(read)]
    back = pickle.loads(pickle.dumps(read))
    assert same(back, read) and torch.equal(back[5].rgba, held[5].rgba), 'a process that is not forked reads, too'


def test_the_stream_has_the_same_bytes_from_memory_and_from_disk_for_any_number_of_workers():
    recipe = Recipe(image_size=64, count=(1, 3))
    made = [Samples(p, [butterflies.background(0, size=64)], recipe, seed=4) for p in pools()]
    held, read = ([next(b)[0] for b in [batches(s, 4, workers=w)] for _ in range(3)] for s, w in zip(made, (0, 2)))
    assert all(torch.equal(a, b) for a, b in zip(held, read, strict=True))
    assert made[0].signature() == made[1].signature()


def test_what_is_known_of_a_large_pool_is_compact(tmp_path):
    x, n = torch.zeros(4, 2, 2, dtype=torch.uint8), 20_000
    part, pixels = module._packed(0, [(Cutout(x, 1, f'{i}.png'), None, .5) for i in range(n)])
    (tmp_path/'x.rgba').write_bytes(pixels)
    module._save(tmp_path/'x.npz', part)
    module._load(tmp_path/'x.npz', '', 0)
    tracemalloc.start()
    pool = module._load(tmp_path/'x.npz', '', 0)
    used, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used/n < 80 and peak/n < 160 and pool[n-1].origin == f'{n-1}.png', 'columns, not objects'


@pytest.mark.parametrize('budget_mb', [100, 0])
def test_a_flipped_bit_of_a_picture_is_never_pasted(tmp_path, budget_mb):
    first = make_cutouts(objects(4))
    path, = (tmp_path/'cache').rglob('*.rgba')
    damaged = bytearray(path.read_bytes())
    damaged[first[0].rgba.numel() + 50] ^= 1
    path.write_bytes(damaged)
    if not budget_mb:
        pool = make_cutouts(objects(4), budget_mb=0)
        assert torch.equal(pool[0].rgba, first[0].rgba)
        assert 'cut-out 1 is damaged; delete the file' in refused(lambda: pool[1])
        path.unlink()
    with pytest.warns(UserWarning, match='is damaged'): assert same(first, make_cutouts(objects(4)))


@pytest.mark.parametrize('damage', [lambda b: b[:-1], lambda b: b + b'0', lambda b: b''])
def test_pixels_of_another_length_are_cut_again(tmp_path, damage):
    first = make_cutouts(objects(4), budget_mb=0)
    path, = (tmp_path/'cache').rglob('*.rgba')
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match='do not fit'): assert same(first, make_cutouts(objects(4), budget_mb=0))


# cutting that is stopped, shared, or done by several

class Told(list):
    "Objects that note in a file which of them are asked for, and one at which the process is killed."
    def __init__(self, items, path, stop=None):
        super().__init__(items)
        self.path, self.stop, self.content = path, stop, 'told'

    def __getitem__(self, i):
        if i == self.stop: os.kill(os.getpid(), signal.SIGKILL)
        with open(self.path, 'a') as f: f.write(f'{i}\n')
        return super().__getitem__(i)


def apart(*functions):
    "How processes that call them end."
    return [*map(ended, [*map(forked, functions)])]


def asked(path): return list(map(int, path.read_text().split()))


@pytest.mark.parametrize('torn', [False, True])
def test_a_killed_cutting_goes_on_after_the_last_whole_block(tmp_path, monkeypatch, torn):
    monkeypatch.setattr(module, '_BLOCK', 4)
    xs, note = objects(11), tmp_path/'asked'
    assert apart(lambda: make_cutouts(Told(xs, note, stop=9), 'frame')) == [-signal.SIGKILL]
    pixels, = (tmp_path/'cache').rglob('*.rgba')
    with open(pixels, 'rb+') as f: f.truncate(pixels.stat().st_size - 1) if torn else f.seek(0, 2) and f.write(b'torn')
    note.unlink()
    whole = make_cutouts(Told(xs, note), 'frame', budget_mb=0)
    assert asked(note)[0] == (4 if torn else 8) and whole.content == make_cutouts(xs, 'frame', cache=False).content
    assert [p.suffix for p in sorted(pixels.parent.iterdir())] == ['.npz', '.rgba']


def test_of_two_processes_one_cuts(tmp_path):
    xs, note = Told(objects(6), tmp_path/'asked'), tmp_path/'asked'
    def cut():
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            cuts = make_cutouts(xs)
        waited = ['waiting for another process' in str(w.message) for w in told]
        os._exit(10*len(cuts) + len(waited) if all(waited) else 99)
    assert sorted(apart(cut, cut)) in ([60, 60], [60, 61]) and asked(note) == list(range(6))


def test_of_several_threads_one_cuts(tmp_path):
    xs, found = Told(objects(12), tmp_path/'asked'), []
    threads = [threading.Thread(target=lambda: found.append(make_cutouts(xs).content)) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join(60)
    assert len(found) == 4 and len(set(found)) == 1 and asked(tmp_path/'asked') == list(range(12))


@pytest.mark.parametrize('masks', ['grabcut', Masks('redo', 'butterflies')], ids=['grabcut', 'redo'])
def test_any_number_of_workers_cuts_the_same(tmp_path, monkeypatch, masks):
    monkeypatch.setattr(module, '_BLOCK', 4)
    alone, several = ([make_cutouts(objects(10), masks, cache=c, workers=w) for c in (False, True)] for w in (0, 2))
    assert all(same(alone[0], other) and other.rejects == alone[0].rejects for other in (alone[1], *several))


def test_what_a_worker_refuses_is_told_in_a_line(monkeypatch):
    monkeypatch.setattr(module, '_BLOCK', 4)
    bad = [*objects(6), ClassImage(torch.zeros(48, 48, dtype=torch.uint8), 1, 'flat.png')]
    assert refused(make_cutouts, bad, workers=2).startswith('flat.png is torch.uint8 [48, 48]; expected')


def test_a_pool_without_a_name_has_to_fit_into_memory():
    told = refused(make_cutouts, objects(6), brighter(.3), budget_mb=.01)
    assert 'the budget is 0.01 MB; raise budget_mb' in told and 'a `content`' in told


# what is cut

def test_same_masks_in_any_company_and_order():
    xs = objects(8)
    whole, back = make_cutouts(xs, cache=False), make_cutouts(xs[::-1], cache=False)
    alone = {c.origin: c for x in xs for c in make_cutouts([x], cache=False)}
    for cuts in (whole, back): assert all(torch.equal(c.rgba, alone[c.origin].rgba) for c in cuts)
    assert [c.origin for c in back] == [c.origin for c in whole][::-1]


def test_threads_do_not_matter(monkeypatch):
    xs = objects(8)
    many = make_cutouts(xs, cache=False)
    monkeypatch.setattr('os.cpu_count', lambda: 1)
    assert same(many, make_cutouts(xs, cache=False))


def test_whole_pictures_pass_the_same_gate_with_the_same_masks():
    xs = [*objects(8), BLANK]
    crops, wholes = make_cutouts(xs), make_cutouts(xs, tight=False)
    images = {x.origin: x.image for x in xs}
    assert crops.rejected == wholes.rejected and [c[1:] for c in crops] == [c[1:] for c in wholes]
    assert any(c.rgba.shape[1:] != (48, 48) for c in crops)
    for crop, whole in zip(crops, wholes):
        assert torch.equal(whole.rgba[:3], images[whole.origin])
        assert (whole.rgba[3] > 127).sum() == (crop.rgba[3] > 127).sum()


def test_rejected_is_counted_and_never_a_full_frame():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 48, 48), dtype=np.uint8)
    cuts = make_cutouts([BLANK, *objects(5), ClassImage(torch.from_numpy(pixels), 1, 'noise')], cache=False)
    assert cuts.rejected.total() + len(cuts) == 7 and cuts.rejected['empty'] >= 1
    assert 'blank' not in [c.origin for c in cuts] and not any(c.rgba[3].float().mean() == 255 for c in cuts)


def padded(pixels, *sides):
    "A photograph in a white margin, uint8 [3,h,w]."
    framed = cv2.copyMakeBorder(pixels, *sides, cv2.BORDER_CONSTANT, value=(255, 255, 255))
    return torch.from_numpy(framed).permute(2, 0, 1)


def lower_strip(images):
    "A mask of what lies between 55 and 90 % of the height."
    y = torch.arange(images.shape[-2])[:, None]/images.shape[-2]
    return ((y >= .55) & (y < .9)).float().expand_as(images[:, 0])


def test_a_margin_hides_no_strip_of_landscape():
    photograph, limits = np.random.default_rng(0).integers(0, 200, (48, 48, 3), dtype=np.uint8), Gate(max_border=.4)
    image, strip = padded(photograph, 6, 6, 0, 0), torch.zeros(60, 48)
    strip[34:54] = 1  # of the photograph, from the left to the right and down to its end
    assert cutout(image[:, 6:54], strip[6:54], limits=limits) is None is cutout(image, strip, limits=limits)
    image[:, -6:] = torch.randint(200, (3, 6, 48), generator=torch.Generator().manual_seed(0))  # it goes on below
    assert cutout(image, strip, limits=limits) is not None
    with pytest.MonkeyPatch.context() as m:
        m.setitem(SEGMENTERS, 'strip', lambda masks: lower_strip)
        square = [ClassImage(padded(photograph, 6, 6, 6, 6), 1, 'padded')]
        assert 'along the border 1' in refused(make_cutouts, square, Masks('strip', gate=limits), cache=False)


def test_mixed_sizes_and_channels():
    narrow = [torch.cat([x.image[:, :, 4:40], torch.zeros(1, 48, 36, dtype=torch.uint8)]) for x in objects(2, first=20)]
    xs = objects(3) + [ClassImage(x, 2, 'rgba') for x in narrow]
    cuts = make_cutouts(xs, cache=False)
    assert all(c.rgba.dtype == torch.uint8 and len(c.rgba) == 4 for c in cuts) and {c.label for c in cuts} <= {1, 2}
    assert 'alpha channel' in refused(make_cutouts, xs, 'alpha', cache=False)


def test_a_picture_that_is_none_is_named():
    bad = [*objects(2), ClassImage(torch.zeros(48, 48, dtype=torch.uint8), 1, 'flat.png')]
    assert refused(make_cutouts, bad).startswith('flat.png is torch.uint8 [48, 48]; expected')


def test_an_embedded_domain_goes_all_the_way():
    domain = load_domain('butterflies', n_class_images=12)
    cuts = make_cutouts(make_objects('real', domain), 'alpha')
    assert len(cuts) == 12 and all(c.rgba[3].max() == 255 for c in cuts)


@needs_shared
@pytest.mark.parametrize('name', ['airplanes', 'birds', 'cars', 'faces'])
def test_real_photographs_are_mostly_accepted(name):
    paths = sorted((shared()/'data'/name/'class_images').glob('*.jpg'))[::40][:12]
    images = [cv2.cvtColor(cv2.imread(str(p)), cv2.COLOR_BGR2RGB) for p in paths]
    xs = [ClassImage(torch.from_numpy(x).permute(2, 0, 1), 1, p.name) for x, p in zip(images, paths)]
    cuts = make_cutouts(xs, cache=False)
    assert len(cuts) >= 9 and .1 < np.mean([(c.rgba[3] > 127).float().mean() for c in cuts]) < .95


@pytest.mark.parametrize('cache', [True, False])
def test_a_class_that_lost_all_its_cut_outs_is_named(cache):
    made = [*objects(5), BLANK._replace(label=2)]
    lost = r'no cut-out of bee, so no scene shows one \(grabcut: . of 6 cut-outs kept; .*empty'
    with pytest.warns(UserWarning, match=lost):
        assert {c.label for c in make_cutouts(made, cache=cache, classes=('ant', 'bee'))} == {1}
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        make_cutouts(made[:5], cache=cache, classes=('ant',))
    told = refused(make_cutouts, [BLANK, BLANK._replace(label=2)], cache=cache, classes=('ant', 'bee'))
    assert told.startswith('every mask of ant, bee was rejected (grabcut: 0 of 2 cut-outs kept')


def test_a_class_whose_labelled_objects_are_all_rejected_is_named(tmp_path):
    "Of few labels one class has one, and nothing is to be seen in its box."
    image = torch.full((3, 64, 96), 120, dtype=torch.uint8)
    image[:, 12:36, 12:36] = torch.tensor([220, 30, 40], dtype=torch.uint8)[:, None, None]
    target = dict(boxes=torch.tensor([[10., 10, 38, 38], [60, 20, 90, 50]]), labels=torch.tensor([1, 2]))
    write_detection([(image, target)], tmp_path/'mine'/'detection'/'train', 'coco', ['ant', 'bee'])
    write_image(tmp_path/'mine'/'backgrounds'/'0.png', image[:, :10, :])
    domain = load_domain('folder', tmp_path/'mine')
    with pytest.warns(UserWarning, match='no cut-out of bee'):
        make_samples(domain, objects='labelled', recipe='image_size=64', labels=Labels(n_real=1))
    target['labels'] = torch.tensor([2, 2])
    target['boxes'] = target['boxes'][[1, 1]]
    write_detection([(image, target)], tmp_path/'other'/'detection'/'train', 'coco', ['bee', 'bee2'])
    write_image(tmp_path/'other'/'backgrounds'/'0.png', image[:, :10, :])
    told = refused(make_samples, load_domain('folder', tmp_path/'other'), objects='labelled', labels=Labels(n_real=1))
    assert 'every mask of bee2 was rejected' in told
