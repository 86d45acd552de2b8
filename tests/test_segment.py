"Masks: ReDO's weights by name, file and domain; segmenters of one's own; scores and the gate; what bad input is told."
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from synthdet.core import refused
from synthdet.data.butterflies import class_image
from synthdet.data.domain import ClassImage
from synthdet.masks.quality import gate, mask_score
from synthdet.masks.redonet import build_redo
from synthdet.masks.segment import make_segmenter, Segmenter
from synthdet.masks.settings import Gate, mask_weights, Masks, OPEN, resolved, SEGMENTERS, shipped_weights, USUAL
from synthdet.synthesis import cutouts as module
from synthdet.synthesis.cutouts import make_cutouts
from synthdet.weights import save_weights

FLIES = SimpleNamespace(name='butterflies', source='synthdet.butterflies')


def batch(n=4, size=40): return torch.stack([class_image(i, size=size, seed=3)[0] for i in range(n)]).float()/255


@pytest.fixture
def untrained(tmp_path):
    "A mask encoder that has learnt nothing; call it with the notes of the file; its path as text."
    def write(name='own.safetensors', seed=0, **note):
        torch.manual_seed(seed)
        nets = build_redo(dict(sizex=32, nf=8))
        options = {k: nets.options[k] for k in ('sizex', 'nMasks', 'nResM', 'nf', 'nfM', 'temperature')}
        return str(save_weights(nets.mask_encoder, tmp_path/name, **{**options, 'object_channel': 0, **note}))
    return write


# ReDO's weights

def test_the_shipped_weights_are_small_and_find_butterflies():
    assert 'butterflies' in shipped_weights() and all(p.stat().st_size < 2e6 for p in shipped_weights().values())
    pairs = [class_image(i, seed=34) for i in range(40)]
    found = make_segmenter('redo', FLIES)(torch.stack([x for x, _ in pairs]).float()/255)[:, 0] > .5
    truth = torch.stack([m for _, m in pairs])
    assert ((found & truth).sum((1, 2))/(found | truth).sum((1, 2))).mean() > .6


def test_weights_by_name_by_path_and_of_the_domain_are_one_segmenter(tmp_path):
    path = shutil.copy(shipped_weights()['butterflies'], tmp_path/'elsewhere.safetensors')
    made = [make_segmenter(Masks('redo', w), FLIES) for w in ('', 'butterflies', str(path))]
    assert len({s.content for s in made}) == 1
    assert all(torch.equal(s(batch()), made[0](batch())) for s in made)


def test_no_picture_is_cut_by_the_butterflies_network_unasked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('butterflies', 'airplanes'):
        shutil.copy(shipped_weights()['butterflies'], name) # a file that is called like the domain is not its weights
        for source in (str(tmp_path/name), ''):
            told = refused(mask_weights, Masks('redo'), SimpleNamespace(name=name, source=source))
            assert told.startswith(f"no ReDO weights are shipped for domain '{name}', and ") and '\n' not in told
            assert told.endswith("give a file (weights=FILE), train one with synthdet-run --notebook train_redo, "
                                 "or choose segmenter=grabcut")
    assert mask_weights(Masks('redo', 'butterflies')) == shipped_weights()['butterflies'], 'the name comes first'


@pytest.mark.parametrize('name', ['mask_encoder.safetensors', 'redo_birds.safetensors', 'nets_state.pth', 'redo.pth',
                                  'cub_nets_state.pth', 'lfw_nets_state.tar.gz', 'cub_netM_state.pth'])
def test_weights_lie_with_the_data_by_the_names_of_training_and_of_the_release(tmp_path, name):
    birds = SimpleNamespace(name='birds', source=str(tmp_path))
    (tmp_path/'weights').mkdir()
    for other in ('stylegan.pt', name): (tmp_path/'weights'/other).touch()
    assert mask_weights(Masks('redo'), birds) == tmp_path/'weights'/name
    assert resolved(Masks('redo'), birds).weights == str(tmp_path/'weights'/name)
    assert mask_weights(Masks('redo', 'butterflies'), birds).name == 'redo_butterflies.safetensors'
    (tmp_path/'weights'/'redo_more.safetensors').touch()
    assert 'holds several' in refused(mask_weights, Masks('redo'), birds)


def test_other_weights_have_other_content_though_the_file_has_the_same_name(untrained):
    a, b = (make_segmenter(Masks('redo', untrained(seed=seed, object_channel=seed))) for seed in (0, 1))
    assert a.content != b.content


def test_the_object_is_the_channel_that_the_file_names(untrained):
    files = [untrained(f'{k}.safetensors', object_channel=k) for k in (0, 1)]
    first, second = (make_segmenter(Masks('redo', f))(batch()) for f in files)
    assert torch.allclose(first + second, torch.ones(()), atol=1e-5) and not torch.allclose(first, second)


def test_weights_that_cannot_be_are_said_in_a_line(tmp_path, untrained):
    assert "weights '/nowhere.pth': no such file; choose butterflies or" in refused(Masks, 'redo', '/nowhere.pth')
    nets = build_redo(dict(sizex=32, nf=8))
    half = {'netGenX': nets.region_generators.state_dict(), 'options': dict(sizex=32, nf=8)}
    torch.save(half, tmp_path/'half.pth')
    assert 'half.pth holds no mask encoder' in refused(make_segmenter, Masks('redo', str(tmp_path/'half.pth')))
    (tmp_path/'torn.safetensors').write_bytes(open(untrained(), 'rb').read()[:9000])
    told = refused(make_segmenter, Masks('redo', str(tmp_path/'torn.safetensors')))
    assert 'torn.safetensors' in told and '\n' not in told


# Segmenters of one's own

@pytest.mark.parametrize('give', [lambda x: x[:, 0], lambda x: x[:, :1], lambda x: x[:, 0] > .5,
                                  lambda x: x[:, :1].double()])
def test_a_mask_may_come_with_or_without_an_axis_for_its_channel(give):
    found = make_segmenter(give)(batch())
    assert found.shape == (4, 1, 40, 40) and torch.equal(found, give(batch()).float().reshape(4, 1, 40, 40))


@pytest.mark.parametrize('give, line', [
    (list, 'gave list for images [4, 3, 40, 40]; expected a tensor [4,1,40,40] or [4,40,40]'),
    (lambda x: None, 'gave NoneType'), (lambda x: x[:, 0].numpy(), 'gave ndarray'),
    (lambda x: x, 'gave torch.float32 [4, 3, 40, 40]'), (lambda x: x[:1, 0], 'gave torch.float32 [1, 40, 40]'),
    (lambda x: x[:, 0, :8, :8], '[4, 8, 8]'), (lambda x: x[:, 0]*math.nan, 'gave values from nan to nan'),
    (lambda x: 20*x[:, 0] - 10, 'expected 0..1, so put logits through a sigmoid'),
    (lambda x: 255*x[:, 0], 'divide 0..255 by 255')])
def test_what_is_no_mask_of_each_picture_is_refused(give, line):
    told = refused(make_segmenter(give), batch())
    assert line in told and told.startswith("segmenter '") and '\n' not in told


def test_a_network_that_still_learns_gives_masks_that_do_not():
    weight = torch.ones((), requires_grad=True)
    assert not make_segmenter(lambda x: x[:, 0]*weight)(batch()).requires_grad


def brighter(threshold, content=None):
    def segment(x): return x.mean(1) > threshold
    if content: segment.content = content
    return segment


def test_a_callable_is_named_by_what_it_says_of_itself():
    assert make_segmenter(brighter(.4)).content is None, 'thresholds in a closure look the same from outside'
    made = [make_segmenter(brighter(t, f'brighter than {t}')) for t in (.3, .4, .5)]
    assert [s.content for s in made] == ['brighter than 0.3', 'brighter than 0.4', 'brighter than 0.5']
    assert {s.name for s in made} == {'segment'} and not made[0].whole and made[0].gate == USUAL


def test_a_segmenter_is_taken_as_it_is_and_nothing_else_is_guessed():
    mine = Segmenter('mine', brighter(.4), Gate(min_area=0))
    assert make_segmenter(mine) is mine and mine.gate.min_area == 0 and mine.gate.max_area == .9
    for bad in (7, None, ['grabcut']): assert 'is no segmenter; give Masks(...)' in refused(make_segmenter, bad)
    assert "segmenter 'redoo' is unknown; choose from grabcut, redo" in refused(make_segmenter, 'redoo')


def test_an_entry_is_a_builder_that_is_handed_the_settings(monkeypatch, untrained):
    seen = []
    def build(masks):
        seen.append(masks)
        return brighter(.4, 'mine 1' if masks.weights else None)
    monkeypatch.setitem(SEGMENTERS, 'mine', build)
    file = untrained()
    bare, weighed = make_segmenter('mine'), make_segmenter(Masks('mine', file, Gate(keep=0)))
    assert [m.weights for m in seen] == ['', file] and seen[1].gate.keep == 0 and seen[0].gate.keep == .2
    assert bare.content is None, 'what comes from elsewhere and does not say what it does is not kept'
    other = make_segmenter(Masks('mine', untrained(seed=1)))
    assert None != weighed.content != other.content, 'its weights name it, too'


# Scores and the gate

@pytest.mark.parametrize('change, line', [
    (lambda m: 20*m - 10, 'from -10 to 10; expected 0..1'), (lambda m: 255*m, 'from 0 to 255'),
    (lambda m: m*math.nan, 'from nan to nan'), (lambda m: m[None], 'is [1, 48, 48]'), (lambda m: m[:0], 'is [0, 48]')])
def test_what_is_no_mask_is_neither_scored_nor_pasted(change, line):
    x, m = class_image(0, size=48, seed=3)
    bad = change(m.float())
    for call in ((mask_score, bad), (mask_score, m, bad), (gate, bad), (gate, bad, USUAL, 1., x)):
        assert line in refused(*call) and '\n' not in refused(*call)


def test_what_does_not_fit_the_mask_is_said_in_a_line():
    x, m = class_image(0, size=48, seed=3)
    assert 'the mirrored mask is [47, 48] and the mask [48, 48]' in refused(mask_score, m, m[1:])
    for image in (x[:, 1:], x[:2], x.float(), 'a.jpg'):
        for told in (refused(mask_score, m, m, image), refused(gate, m, image=image)):
            assert told.startswith('the image is ') and "expected uint8 [3 or 4,H,W] of the mask's" in told


def test_a_mask_that_still_learns_and_a_score_that_is_none():
    x, m = class_image(0, size=48, seed=3)
    soft = m.float().requires_grad_()
    assert mask_score(soft, soft.flip(1), x) == mask_score(m, m.flip(1), x) and gate(soft)[1] is None
    least = Gate(min_score=.01)
    assert gate(m, least, score=math.nan)[1] == 'poor score' and gate(m, least, score=.02)[1] is None


def test_a_score_follows_the_picture_into_the_mirror():
    x, m = class_image(0, size=48, seed=3)
    here, there = mask_score(m, m.flip(1), x), mask_score(m.flip(1), m, x.flip(2))
    assert here.agreement == there.agreement == 1 and here.total == pytest.approx(there.total)


@pytest.mark.parametrize('value', [0, 90, 255])
@pytest.mark.parametrize('box', [(8, 0, 64, 56), (0, 6, 50, 64), (5, 7, 60, 52)])
def test_the_border_is_that_of_the_photograph_inside_its_margins(box, value):
    l, t, r, b = box
    x, inside = torch.full((3, 64, 64), value, dtype=torch.uint8), torch.zeros(64, 64, dtype=torch.bool)
    x[:, t:b, l:r] = torch.randint(256, (3, b - t, r - l), generator=torch.Generator().manual_seed(0))
    inside[t:b, l:r] = True
    speck = torch.zeros(64, 64)
    speck[30:36, 30:36] = 1
    assert mask_score(inside, image=x).border == 0 < .2 < mask_score(inside).border
    assert mask_score(speck, image=x).border == 1
    whole = Gate(max_area=1.)
    assert gate(inside, whole, image=x)[1] == 'along the border' and gate(inside, whole)[1] is None
    assert mask_score(inside, inside.flip(1), x) == mask_score(inside.flip(1), inside, x.flip(2))


# Through cut-outs

def objects(n=6): return [ClassImage(class_image(i, size=48, seed=3)[0], 1, str(i)) for i in range(n)]


@pytest.fixture
def files(tmp_path, monkeypatch):
    "The files of a cache of one's own: a function."
    monkeypatch.setenv('SYNTHDET_CACHE', str(tmp_path/'cache'))
    return lambda: sorted((tmp_path/'cache').rglob('*.npz'))


def test_three_thresholds_are_three_sets_of_cutouts_and_nothing_unnamed_is_kept(files):
    made = [make_cutouts(objects(), Segmenter('mine', brighter(t), OPEN)) for t in (.3, .4, .5)]
    areas = [sum(int(c.rgba[3].sum()) for c in cuts) for cuts in made]
    assert areas == sorted(areas, reverse=True) and len(set(areas)) == 3 and files() == []
    for t in (.3, .4, .4): make_cutouts(objects(), Segmenter('mine', brighter(t), OPEN, content=f'brighter than {t}'))
    assert len(files()) == 2


def test_other_weights_cut_again_though_the_file_has_the_same_name(files, untrained):
    for seed in (0, 1): make_cutouts(objects(3), Masks('redo', untrained(seed=seed), OPEN))
    make_cutouts(objects(3), Masks('redo', untrained(seed=1, name='again.safetensors'), OPEN))
    assert len(files()) == 2


@pytest.mark.parametrize('image, line', [
    (torch.zeros(1, 48, 40, dtype=torch.uint8), 'bad.jpg is torch.uint8 [1, 48, 40]; expected a uint8 tensor'),
    (torch.zeros(48, 48, dtype=torch.uint8), 'bad.jpg is torch.uint8 [48, 48]'),
    (torch.full((3, 48, 48), math.nan), 'bad.jpg is torch.float32'),
    (torch.zeros(3, 0, 48, dtype=torch.uint8), 'bad.jpg is torch.uint8 [3, 0, 48]')])
@pytest.mark.parametrize('masks', ['grabcut', Masks('redo', 'butterflies')], ids=['grabcut', 'redo'])
def test_a_picture_that_is_none_is_named(files, masks, image, line):
    assert line in refused(make_cutouts, [*objects(2), ClassImage(image, 1, 'bad.jpg')], masks)


def test_a_picture_of_a_few_pixels_is_turned_down_and_counted(files):
    pool = make_cutouts([*objects(2), *(ClassImage(torch.zeros(3, *hw, dtype=torch.uint8), 1, 'dot.gif')
                                        for hw in ((1, 1), (4, 7)))], Masks('grabcut', gate=OPEN))
    assert pool.report().endswith('2 rejected (empty 2)'), pool.report()


def test_a_network_whose_every_mask_is_rejected_says_what_to_do(files, untrained):
    told = refused(make_cutouts, objects(3), Masks('redo', untrained(), Gate(min_score=1., min_largest=0.)))
    assert told.startswith('every mask was rejected (redo: 0 of 3 cut-outs kept; 3 rejected (poor score 3)); look at ')
    assert 'loosen the limits (Gate)' in told and 'another segmenter' in told and not files()


def test_the_mirrored_picture_is_only_looked_at_where_scores_are_asked_for(files):
    seen = []
    def half(images):
        seen.append(len(images))
        return images[:, 0]*0 + (torch.arange(images.shape[-1]) < images.shape[-1]//2)
    plain = make_cutouts(objects(), half)
    assert seen == [6] and all(map(math.isnan, plain.scores)) and plain.rejects == []
    scored = make_cutouts(objects(), half, scores=True)
    assert seen == [6, 6, 6] and scored.scores == [0.]*6, 'its left half and that of the mirror are not the same object'
    assert 'poor score 6' in refused(make_cutouts, objects(), Segmenter('half', half, Gate(min_score=.1)))


def test_scores_and_rejects_come_out_of_the_cache_as_they_went_in(files, monkeypatch):
    blank = ClassImage(torch.full((3, 48, 48), 90, dtype=torch.uint8), 1, 'blank')
    xs, masks = [*objects(3), blank, *objects(2)], Masks('grabcut', gate=Gate(min_score=.3))
    first = make_cutouts(xs, masks)
    assert [(r.index, r.reason, r.score) for r in first.rejects] == [(3, 'empty', 0.)]
    assert first.rejected == {'empty': 1} and len(first.scores) == len(first) == 5
    monkeypatch.setattr(module, '_cut_all', None)
    again = make_cutouts(xs, masks)
    assert again.scores == first.scores and again.rejects == first.rejects and again[1:3].scores == first.scores[1:3]
