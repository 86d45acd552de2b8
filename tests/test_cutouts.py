"The cut-out cache, determinism, and real photographs where the reference folder is at hand."
import warnings
import cv2
import numpy as np
import pytest
import torch
from synthdet.synthesis import cutouts as module
from synthdet.data.butterflies import class_image
from synthdet.core import shared, UserError
from synthdet.synthesis.cutouts import cutout, Cutout, Cutouts, make_cutouts
from synthdet.data.domain import ClassImage
from synthdet.data.domains import load_domain
from synthdet.objects.objects import make_objects
from synthdet.masks.quality import Gate
from synthdet.masks.segment import SEGMENTERS

def objects(n=10, size=48, first=0):
    return [ClassImage(class_image(first + i, size=size, seed=3)[0], 1, str(i)) for i in range(n)]

def same(a, b): return len(a) == len(b) and a.rejected == b.rejected and all(torch.equal(x.rgba, y.rgba) and x[1:] == y[1:] for x, y in zip(a, b))

def no_cutting(monkeypatch):
    "From here on a call that has to cut anything fails."
    def refuse(*a, **k): raise AssertionError('cut although the cache holds it')
    monkeypatch.setattr(module, '_cut_all', refuse)

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('SYNTHDET_CACHE', str(tmp_path/'cache'))

def files(tmp_path): return sorted((tmp_path/'cache').rglob('*.npz'))

def test_second_call_reads_the_cache(tmp_path, monkeypatch):
    first = make_cutouts(objects())
    assert len(files(tmp_path)) == 1 and not [p for p in (tmp_path/'cache').rglob('*') if 'tmp' in p.name]
    no_cutting(monkeypatch)
    assert same(first, make_cutouts(objects()))

def test_every_input_is_part_of_the_name(tmp_path):
    xs = objects(4)
    changed = xs[0].image.clone(); changed[0, 0, 0] += 1
    calls = [dict(), dict(size=32), dict(limits=Gate(min_area=.01)), dict(segmenter='frame'), dict(tight=False)]
    for k in calls: make_cutouts(xs, **k)
    make_cutouts([xs[0]._replace(image=changed), *xs[1:]]); make_cutouts([xs[0]._replace(label=2), *xs[1:]])
    assert len(files(tmp_path)) == len(calls) + 2

def test_changed_code_cuts_again(tmp_path, monkeypatch):
    make_cutouts(objects(3))
    source = module._source
    monkeypatch.setattr(module, '_source', lambda f: source(f) + '# another version')
    make_cutouts(objects(3))
    assert len(files(tmp_path)) == 2

@pytest.mark.parametrize('damage', [lambda b: b[:len(b)//2], lambda b: b'', lambda b: b'not a zip', lambda b: b[:300] + bytes([b[300] ^ 255]) + b[301:],
                                    lambda b: b[:-30] + b'\xff'*30])
def test_damaged_cache_is_reported_and_mended(tmp_path, monkeypatch, damage):
    first = make_cutouts(objects(4)); path, = files(tmp_path); path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match='is damaged'): assert same(first, make_cutouts(objects(4)))
    no_cutting(monkeypatch)
    with warnings.catch_warnings(): warnings.simplefilter('error'); assert same(first, make_cutouts(objects(4)))

def test_a_pickle_in_the_cache_is_not_executed(tmp_path):
    class Trap:
        def __reduce__(self): return (open, (str(tmp_path/'sprung'), 'w'))
    first = make_cutouts(objects(3)); path, = files(tmp_path)
    with open(path, 'wb') as f: np.savez(f, pixels=np.array([Trap()], dtype=object), shapes=[[1, 1]], labels=[1], text=[0])
    with pytest.warns(UserWarning, match='is damaged'): assert same(first, make_cutouts(objects(3)))
    assert not (tmp_path/'sprung').exists()

def test_a_disk_that_refuses_leaves_nothing(tmp_path, monkeypatch):
    def full(f, **arrays): f.write(b'half'); raise OSError(28, 'No space left on device')
    monkeypatch.setattr(module.np, 'savez', full)
    with pytest.raises(UserError, match='No space left'): make_cutouts(objects(3))
    assert not [p for p in (tmp_path/'cache').rglob('*') if p.is_file()]

def test_same_masks_in_any_company_and_order():
    xs = objects(8)
    whole, back = make_cutouts(xs, cache=False), make_cutouts(xs[::-1], cache=False)
    alone = {c.origin: c for x in xs for c in make_cutouts([x], cache=False)}
    for cuts in (whole, back): assert all(torch.equal(c.rgba, alone[c.origin].rgba) for c in cuts)
    assert [c.origin for c in back] == [c.origin for c in whole][::-1]

def test_threads_do_not_matter(monkeypatch):
    xs = objects(8); many = make_cutouts(xs, cache=False)
    monkeypatch.setattr('synthdet.segment.os.cpu_count', lambda: 1)
    assert same(many, make_cutouts(xs, cache=False))

def test_whole_pictures_pass_the_same_gate_with_the_same_masks():
    xs = objects(8) + [ClassImage(torch.full((3, 48, 48), 90, dtype=torch.uint8), 1, 'blank')]
    crops, wholes = make_cutouts(xs), make_cutouts(xs, tight=False)
    images = {x.origin: x.image for x in xs}
    assert crops.rejected == wholes.rejected and [c[1:] for c in crops] == [c[1:] for c in wholes] and any(c.rgba.shape[1:] != (48, 48) for c in crops)
    for crop, whole in zip(crops, wholes):
        assert torch.equal(whole.rgba[:3], images[whole.origin]) and (whole.rgba[3] > 127).sum() == (crop.rgba[3] > 127).sum()

def test_rejected_is_counted_and_never_a_full_frame():
    blank = ClassImage(torch.full((3, 48, 48), 90, dtype=torch.uint8), 1, 'blank')
    noise = ClassImage(torch.from_numpy(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)).permute(2, 0, 1), 1, 'noise')
    cuts = make_cutouts([blank, *objects(5), noise], cache=False)
    assert cuts.rejected.total() + len(cuts) == 7 and cuts.rejected['empty'] >= 1 and 'blank' not in [c.origin for c in cuts]
    assert not any(c.rgba[3].float().mean() == 255 for c in cuts)
    with pytest.raises(UserError, match=r'every mask was rejected .*empty 2'): make_cutouts([blank, blank])

def test_a_margin_hides_no_strip_of_landscape(monkeypatch):
    photograph = np.random.default_rng(0).integers(0, 200, (48, 48, 3), dtype=np.uint8)
    padded = torch.from_numpy(cv2.copyMakeBorder(photograph, 6, 6, 0, 0, cv2.BORDER_CONSTANT, value=(255, 255, 255))).permute(2, 0, 1)
    strip = torch.zeros(60, 48); strip[34:54] = 1 # of the photograph, from the left to the right and down to its end
    limits = Gate(max_border=.4)
    assert cutout(padded[:, 6:54], strip[6:54], limits=limits) is None is cutout(padded, strip, limits=limits)
    padded[:, -6:] = torch.randint(200, (3, 6, 48), generator=torch.Generator().manual_seed(0)) # the photograph goes on below
    assert cutout(padded, strip, limits=limits) is not None
    monkeypatch.setitem(SEGMENTERS, 'strip', lambda weights=None: lambda x: torch.ones_like(x[:, :1]) * (torch.arange(x.shape[-2])[:, None] >= x.shape[-2]*.55) * (torch.arange(x.shape[-2])[:, None] < x.shape[-2]*.9))
    square = torch.from_numpy(cv2.copyMakeBorder(photograph, 6, 6, 6, 6, cv2.BORDER_CONSTANT, value=(255, 255, 255))).permute(2, 0, 1)
    with pytest.raises(UserError, match='along the border 1'): make_cutouts([ClassImage(square, 1, 'padded')], 'strip', limits=limits, cache=False)

def test_a_new_segmenter_is_one_dict_entry(monkeypatch):
    monkeypatch.setitem(SEGMENTERS, 'half', lambda weights=None: lambda x: torch.ones_like(x[:, :1]) * (torch.arange(x.shape[-1]) < x.shape[-1]//2))
    assert {tuple(c.rgba.shape) for c in make_cutouts(objects(3), 'half', cache=False)} == {(4, 48, 24)}

def test_mixed_sizes_and_channels():
    xs = objects(3) + [ClassImage(torch.cat([x.image[:, :, 4:40], torch.zeros(1, 48, 36, dtype=torch.uint8)]), 2, 'rgba') for x in objects(2, first=20)]
    cuts = make_cutouts(xs, cache=False)
    assert all(isinstance(c, Cutout) and c.rgba.dtype == torch.uint8 and len(c.rgba) == 4 for c in cuts) and {c.label for c in cuts} <= {1, 2}
    with pytest.raises(UserError, match='alpha channel'): make_cutouts(xs, 'alpha', cache=False)

def test_an_embedded_domain_goes_all_the_way():
    domain = load_domain('butterflies', n_class_images=12)
    cuts = make_cutouts(make_objects('real', domain), 'alpha')
    assert len(cuts) == 12 and all(c.rgba[3].max() == 255 for c in cuts)

def test_a_thousand_cached_cutouts_are_views_of_one_block(tmp_path):
    x = torch.zeros(4, 40, 50, dtype=torch.uint8)
    module._save(tmp_path/'x.npz', Cutouts([Cutout(x, 1, 'a')]*1000, {}, 'frame'))
    back = module._load(tmp_path/'x.npz')
    assert len(back) == 1000 and back[1].rgba.data_ptr() - back[0].rgba.data_ptr() == x.numel()

@pytest.mark.skipif(shared() is None, reason='the reference photographs are not beside the project')
@pytest.mark.parametrize('name', ['airplanes', 'birds', 'cars', 'faces'])
def test_real_photographs_are_mostly_accepted(name):
    paths = sorted((shared()/'data'/name/'class_images').glob('*.jpg'))[::40][:12]
    images = [cv2.cvtColor(cv2.imread(str(p)), cv2.COLOR_BGR2RGB) for p in paths]
    cuts = make_cutouts([ClassImage(torch.from_numpy(x).permute(2, 0, 1), 1, p.name) for x, p in zip(images, paths)], cache=False)
    assert len(cuts) >= 9 and .1 < np.mean([(c.rgba[3] > 127).float().mean() for c in cuts]) < .95
