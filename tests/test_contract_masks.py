"Every segmenter: what it takes, what it gives, what it refuses."
import math
import pickle
from dataclasses import dataclass

import pytest
import torch

from synthdet.core import refused
from synthdet.data.butterflies import class_image
from synthdet.masks.segment import make_segmenter
from synthdet.settings import opt
from synthdet.masks.settings import Gate, Masks, OPEN, own_gate, SEGMENTERS, USUAL

WEIGHTS = dict(redo='butterflies')


@pytest.fixture(params=SEGMENTERS)
def masks(request): return Masks(request.param, WEIGHTS.get(request.param, ''))


@pytest.fixture
def segmenter(masks): return make_segmenter(masks)


def batch(n=3, size=40):
    "Pictures with their true masks as the fourth channel, float [n,4,size,size]."
    pairs = [class_image(i, size=size, seed=3) for i in range(n)]
    return torch.stack([torch.cat([x/255, m[None].float()]) for x, m in pairs])


@pytest.mark.parametrize('kind', [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('size', [8, 31, 40])
def test_it_gives_a_mask_per_picture(segmenter, size, kind):
    found = segmenter(batch(size=size).to(kind))
    assert found.shape == (3, 1, size, size) and found.dtype == torch.float32
    assert 0 <= found.min() and found.max() <= 1 and not found.requires_grad


def test_any_precision_gives_about_the_same(segmenter):
    assert (segmenter(batch().half()) - segmenter(batch())).abs().mean() < .05


def test_neither_company_nor_order_matter(segmenter):
    x, found = batch(), segmenter(batch())
    assert torch.allclose(segmenter(x.flip(0)).flip(0), found, atol=1e-4)
    for i in range(3): assert torch.allclose(segmenter(x[i:i+1])[0], found[i], atol=1e-4)


def test_it_leaves_its_pictures_alone(segmenter):
    x = batch()
    segmenter(x).fill_(7)
    assert torch.equal(x, batch())


def test_three_channels_do_unless_the_fourth_is_the_mask(segmenter):
    if segmenter.name == 'alpha': assert 'needs images with an alpha channel' in refused(segmenter, batch()[:, :3])
    else: assert torch.allclose(segmenter(batch()[:, :3]), segmenter(batch()), atol=1e-4)


@pytest.mark.parametrize('change, line', [
    (lambda x: x.masked_fill(x < .1, math.nan), 'values from nan to nan'), (lambda x: x*math.inf, 'values from'),
    (lambda x: 255*x, 'from 0 to 255; a segmenter takes finite ones in 0..1'), (lambda x: x - 1, 'values from -1 to'),
    (lambda x: x[:, :1], '[3, 1, 40, 40]; a segmenter takes float images [B,3 or 4,S,S] with S of 8 pixels or more'),
    (lambda x: x[0], '[4, 40, 40]'), (lambda x: x[:0], '[0, 4, 40, 40]'), (lambda x: x[..., :32], '[3, 4, 40, 32]'),
    (lambda x: x[..., :4, :4], '[3, 4, 4, 4]'), (lambda x: (255*x).byte(), 'torch.uint8'), (list, 'got list')])
def test_it_refuses_what_is_no_batch_of_pictures(segmenter, change, line):
    told = refused(segmenter, change(batch()))
    assert line in told and '\n' not in told


def test_another_process_can_have_it(segmenter):
    assert torch.equal(pickle.loads(pickle.dumps(segmenter))(batch()), segmenter(batch()))


def test_it_comes_with_numbers_for_limits_and_a_name_for_its_results(masks, segmenter):
    assert all(type(v) is float for v in vars(segmenter.gate).values())
    assert segmenter.gate == own_gate(masks.segmenter) == make_segmenter(masks).gate
    assert segmenter.content == make_segmenter(masks).content and isinstance(segmenter.content, str)
    assert segmenter.whole == (masks.segmenter == 'frame') and segmenter.name == masks.segmenter


def test_every_one_has_another_name_for_its_results():
    made = [make_segmenter(Masks(n, WEIGHTS.get(n, ''))) for n in SEGMENTERS]
    assert len({s.content for s in made}) == len(made)


def test_limits_that_are_given_stay(masks):
    given = Masks(masks.segmenter, masks.weights, Gate(min_area=0, max_border=.5))
    gate = make_segmenter(given).gate
    assert (gate.min_area, gate.max_border) == (0, .5) and gate.keep == own_gate(masks.segmenter).keep
    assert make_segmenter(given).content == make_segmenter(masks).content, 'limits are no part of the mask'


def test_a_name_is_its_settings_and_weights_are_only_for_those_that_read_some(masks):
    name = masks.segmenter
    if name == 'redo': assert 'are shipped for pictures of just anything' in refused(make_segmenter, name)
    else:
        assert torch.equal(make_segmenter(name)(batch()), make_segmenter(masks)(batch()))
        said = refused(make_segmenter, Masks(name, 'butterflies'))
        assert 'takes no weights; leave' in said or "are those of segmenter 'redo'" in said


def test_what_is_true_by_definition_has_no_limits():
    assert own_gate('frame') == own_gate('alpha') == OPEN and own_gate('grabcut') == own_gate() == USUAL
    assert own_gate('redo').min_score == .65


@dataclass(frozen=True)
class Tomorrow(Masks):
    "Settings with one more."
    threshold:float = opt(.5, "what a mask is cut at", low=0, high=1)


def test_a_setting_of_tomorrow_is_part_of_what_names_a_mask():
    a, b = (make_segmenter(Tomorrow(threshold=t)).content for t in (.5, .3))
    assert a != b and make_segmenter(Masks()).content not in (a, b)


def test_weights_of_redo_are_nobody_elses():
    SEGMENTERS["bright"] = lambda masks: lambda images: images[:, 0]
    try: assert "are those of segmenter 'redo'" in refused(make_segmenter, Masks("bright", "butterflies"))
    finally: del SEGMENTERS["bright"]
