"ReDO's masks through cut-outs: weights by name and by file, scores, rejects, and what bad input is told."
import math
import shutil
import pytest
import torch
from synthdet.synthesis import cutouts as module
from synthdet.data.butterflies import class_image
from synthdet.core import UserError
from synthdet.synthesis.cutouts import make_cutouts
from synthdet.data.domain import ClassImage
from synthdet.masks.redonet import build_redo
from synthdet.masks.quality import gate, Gate, mask_score
from synthdet.masks.segment import domain_weights, segmenter, SEGMENTERS, shipped_weights, weights_file
from synthdet.weights import save_weights


def objects(n=6, size=48): return [ClassImage(class_image(i, size=size, seed=3)[0], 1, str(i)) for i in range(n)]


def batch(n=4, size=40): return torch.stack([class_image(i, size=size, seed=3)[0] for i in range(n)]).float()/255


def files(tmp_path): return sorted((tmp_path/'cache').rglob('*.npz'))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('SYNTHDET_CACHE', str(tmp_path/'cache'))


@pytest.fixture
def untrained(tmp_path):
    "A mask encoder that has learnt nothing; call it with the notes of the file."
    def write(name='own.safetensors', seed=0, **note):
        torch.manual_seed(seed)
        nets = build_redo(dict(sizex=32, nf=8))
        return save_weights(nets.mask_encoder, tmp_path/name, **{**{k: nets.options[k] for k in ('sizex', 'nMasks', 'nResM', 'nf', 'nfM', 'temperature')}, 'object_channel': 0, **note})
    return write


def test_the_shipped_weights_are_small_and_find_butterflies():
    assert 'butterflies' in shipped_weights() and all(p.stat().st_size < 2e6 for p in shipped_weights().values())
    pairs = [class_image(i, seed=34) for i in range(40)]
    found = segmenter('redo')(torch.stack([x for x, _ in pairs]).float()/255)[:, 0] > .5
    truth = torch.stack([m for _, m in pairs])
    assert ((found & truth).sum((1, 2))/(found | truth).sum((1, 2))).mean() > .6


def test_weights_by_name_by_path_and_by_default_are_one_segmenter_and_one_cache_file(tmp_path):
    path = shutil.copy(weights_file('redo', 'butterflies'), tmp_path/'elsewhere.safetensors')
    masks = [segmenter('redo', w)(batch()) for w in (None, 'butterflies', path, str(path))]
    assert all(torch.equal(m, masks[0]) for m in masks)
    for w in ('butterflies', path, str(path)): make_cutouts(objects(), 'redo', limits=Gate.none(), weights=w)
    assert len(files(tmp_path)) == 1


def test_no_picture_is_cut_by_the_butterflies_network_unasked(tmp_path, monkeypatch):
    line = "no ReDO weights are shipped for .*; train them with nbs/experiments/train_redo.ipynb and give "
    with pytest.raises(UserError, match=line + 'weights$'): make_cutouts(objects(2), 'redo')
    monkeypatch.chdir(tmp_path)
    for name in ('butterflies', 'airplanes'):
        shutil.copy(weights_file('redo', 'butterflies'), name) # a file that is called like the domain is not its weights
        with pytest.raises(UserError, match=line + 'mask_weights$'): domain_weights(name, embedded=False)
    with pytest.raises(UserError, match=line): domain_weights('airplanes', embedded=True)
    assert weights_file('redo', 'butterflies') == weights_file('redo') == domain_weights('butterflies', embedded=True) == shipped_weights()['butterflies'], 'the shipped name comes first'
    monkeypatch.setattr('synthdet.segment.shipped_weights', dict)
    for lookup in (lambda: weights_file('redo'), lambda: domain_weights('butterflies', embedded=True)):
        with pytest.raises(UserError, match='shipped'): lookup()


def test_other_weights_cut_again_though_the_file_has_the_same_name(tmp_path, untrained):
    for seed in (0, 1): make_cutouts(objects(3), 'redo', limits=Gate.none(), weights=untrained(seed=seed, object_channel=seed))
    assert len(files(tmp_path)) == 2


def test_the_object_is_the_channel_that_the_file_names(untrained):
    first, second = (segmenter('redo', untrained(f'{k}.safetensors', object_channel=k))(batch()) for k in (0, 1))
    assert torch.allclose(first + second, torch.ones(()), atol=1e-5) and not torch.allclose(first, second)


@pytest.mark.parametrize('size', [8, 31, 32, 100])
def test_any_size_comes_back_at_its_own(untrained, size):
    masks = segmenter('redo', untrained())(batch(2, size))
    assert masks.shape == (2, 1, size, size) and 0 <= masks.min() and masks.max() <= 1 and masks.dtype == torch.float32


def test_weights_that_cannot_be_are_said_in_a_line(tmp_path, untrained):
    with pytest.raises(UserError, match="weights '/nowhere.pth': no such file, and shipped are only those of .*butterflies.*train with nbs/experiments/train_redo.ipynb, or give a path"): segmenter('redo', '/nowhere.pth')
    torch.save({'netGenX': build_redo(dict(sizex=32, nf=8)).region_generators.state_dict(), 'options': dict(sizex=32, nf=8)}, tmp_path/'half.pth')
    with pytest.raises(UserError, match='half.pth holds no mask encoder'): segmenter('redo', tmp_path/'half.pth')
    whole = untrained().read_bytes()
    (tmp_path/'torn.safetensors').write_bytes(whole[:len(whole)//2])
    with pytest.raises(UserError) as e: segmenter('redo', tmp_path/'torn.safetensors')
    assert 'torn.safetensors' in str(e.value) and '\n' not in str(e.value)
    for name in ('grabcut', 'frame', 'alpha'):
        with pytest.raises(UserError, match='takes no weights'): make_cutouts(objects(2), name, weights=untrained())


@pytest.mark.parametrize('kind', [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', [n for n in SEGMENTERS])
def test_pictures_of_any_float_give_float32_masks(name, kind):
    x = torch.cat([batch(2), batch(2)[:, :1]], 1)
    masks = segmenter(name)(x.to(kind))
    assert masks.dtype == torch.float32 and (masks - segmenter(name)(x)).abs().mean() < .05


@pytest.mark.parametrize('change, line', [
    (lambda x: x.masked_fill(torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < .01, math.nan), 'values from nan to nan'),
    (lambda x: x[:, :1], r'\[4, 1, 40, 40\]; a segmenter takes float images \[B,3 or 4,S,S\]'),
    (lambda x: x[..., :3, :3], 'S of 8 pixels or more'), (lambda x: x*math.inf, 'values from'), (lambda x: x*2 - 1, r'finite ones in 0\.\.1'), (lambda x: x[0], r'\[3, 40, 40\]')])
@pytest.mark.parametrize('name', [n for n in SEGMENTERS])
def test_what_is_not_a_batch_of_pictures_is_said_in_a_line(name, change, line):
    with pytest.raises(UserError, match=line) as e: segmenter(name)(change(batch()))
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('image, line', [
    (torch.zeros(1, 48, 40, dtype=torch.uint8), r'bad.jpg is torch.uint8 \[1, 48, 40\]; expected a uint8 tensor'), (torch.zeros(48, 48, dtype=torch.uint8), r'bad.jpg is torch.uint8 \[48, 48\]'),
    (torch.full((3, 48, 48), math.nan), 'bad.jpg is torch.float32'), (torch.zeros(3, 0, 48, dtype=torch.uint8), r'bad.jpg is torch.uint8 \[3, 0, 48\]'),
    (torch.zeros(3, 4, 5, dtype=torch.uint8), 'S of 8 pixels or more')])
@pytest.mark.parametrize('name', ['grabcut', 'redo'])
def test_a_picture_that_is_none_is_named(name, image, line):
    with pytest.raises(UserError, match=line): make_cutouts([*objects(2), ClassImage(image, 1, 'bad.jpg')], name, weights='butterflies' if name == 'redo' else None)


def test_a_network_whose_every_mask_is_rejected_says_what_to_do(tmp_path, untrained):
    with pytest.raises(UserError) as e: make_cutouts(objects(3), 'redo', limits=Gate(min_score=1., min_largest=0.), weights=untrained())
    assert str(e.value) == ("every mask was rejected (redo: 0 of 3 cut-outs kept; 3 rejected (poor score 3)); look at the class images, loosen the limits (Gate), "
                            "give weights trained on such pictures, or choose another segmenter")
    assert not files(tmp_path)


def test_the_mirrored_picture_is_only_looked_at_where_scores_are_asked_for(monkeypatch):
    seen = []
    def counted(weights=None):
        def segment(images): seen.append(len(images)); return images[:, :1]*0 + (torch.arange(images.shape[-1]) < images.shape[-1]//2)
        return segment
    monkeypatch.setitem(SEGMENTERS, 'half', counted)
    plain = make_cutouts(objects(), 'half', cache=False)
    assert seen == [6] and all(map(math.isnan, plain.scores)) and plain.rejects == []
    scored = make_cutouts(objects(), 'half', scores=True, cache=False)
    assert seen == [6, 6, 6] and scored.scores == [0.]*6, 'the left half of the picture and of its mirror image are not the same object'
    with pytest.raises(UserError, match='poor score 6'): make_cutouts(objects(), 'half', limits=Gate(min_score=.1))


def test_scores_and_rejects_come_out_of_the_cache_as_they_went_in(monkeypatch):
    blank = ClassImage(torch.full((3, 48, 48), 90, dtype=torch.uint8), 1, 'blank')
    xs = [*objects(3), blank, *objects(2)]
    first = make_cutouts(xs, 'grabcut', limits=Gate(min_score=.3))
    assert [(r.index, r.reason, r.score) for r in first.rejects] == [(3, 'empty', 0.)] and first.rejected == {'empty': 1} and len(first.scores) == len(first) == 5
    monkeypatch.setattr(module, '_cut_all', None)
    again = make_cutouts(xs, 'grabcut', limits=Gate(min_score=.3))
    assert again.scores == first.scores and again.rejects == first.rejects and again[1:3].scores == first.scores[1:3]


@pytest.mark.parametrize('change, line', [(lambda m: 20*m - 10, 'from -10 to 10; expected 0..1'), (lambda m: 255*m, 'from 0 to 255'), (lambda m: m*math.nan, 'from nan to nan'), (lambda m: m[None], r'\[1, 48, 48\]')])
def test_what_is_no_mask_is_neither_scored_nor_pasted(change, line):
    x, m = class_image(0, size=48, seed=3)
    bad = change(m.float())
    for call in (lambda: mask_score(bad), lambda: mask_score(m, bad), lambda: gate(bad), lambda: gate(bad, score=1., image=x)):
        with pytest.raises(UserError, match=line) as e: call()
        assert '\n' not in str(e.value)


def test_what_does_not_fit_the_mask_is_said_in_a_line():
    x, m = class_image(0, size=48, seed=3)
    for call in (lambda: mask_score(m, m[1:]), lambda: mask_score(m, m, x[:, 1:]), lambda: mask_score(m, image=x[:2]), lambda: mask_score(m, image=x.float()), lambda: gate(m, image=x[:, 1:]), lambda: mask_score(m, image='a.jpg')):
        with pytest.raises(UserError, match='expected (the same size|uint8)') as e: call()
        assert '\n' not in str(e.value)


def test_a_mask_that_still_learns_and_a_score_that_is_none():
    x, m = class_image(0, size=48, seed=3)
    soft = m.float().requires_grad_()
    assert mask_score(soft, soft.flip(1), x) == mask_score(m, m.flip(1), x) and gate(soft)[1] is None
    assert gate(m, Gate(min_score=.01), score=math.nan)[1] == 'poor score' and gate(m, Gate(min_score=.01), score=.02)[1] is None


def test_a_score_follows_the_picture_into_the_mirror():
    x, m = class_image(0, size=48, seed=3)
    here, there = mask_score(m, m.flip(1), x), mask_score(m.flip(1), m, x.flip(2))
    assert here.agreement == there.agreement == 1 and here.total == pytest.approx(there.total)


@pytest.mark.parametrize('value', [0, 90, 255])
@pytest.mark.parametrize('box', [(8, 0, 64, 56), (0, 6, 50, 64), (5, 7, 60, 52)])
def test_the_border_is_that_of_the_photograph_inside_its_margins(box, value):
    l, t, r, b = box
    x, inside = torch.full((3, 64, 64), value, dtype=torch.uint8), torch.zeros(64, 64, dtype=torch.bool)
    x[:, t:b, l:r] = torch.randint(256, (3, b - t, r - l), generator=torch.Generator().manual_seed(0)); inside[t:b, l:r] = True
    speck = torch.zeros(64, 64); speck[30:36, 30:36] = 1
    assert mask_score(inside, image=x).border == 0 and mask_score(speck, image=x).border == 1 and mask_score(inside).border > .2
    assert gate(inside, Gate(max_area=1.), image=x)[1] == 'along the border' and gate(inside, Gate(max_area=1.))[1] is None
    assert mask_score(inside, inside.flip(1), x) == mask_score(inside.flip(1), inside, x.flip(2))
