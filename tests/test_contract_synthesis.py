"What every blend, compositor, pool and field of a recipe takes, gives and refuses."
import inspect
from dataclasses import fields, replace

import cv2
import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from synthdet.boxes import chw, masks_to_boxes
from synthdet.core import generator, named, refused
from synthdet.data import butterflies
from synthdet.data.domains import load_domain
from synthdet.settings import leaves, override, text_of
from synthdet.synthesis.compose import compose, style
from synthdet.synthesis.cut import Cutout, cutout
from synthdet.synthesis.free import free
from synthdet.synthesis.pool import Cutouts, Endless, Hand
from synthdet.synthesis.settings import BLENDS, COMPOSERS, MIXED, PAPER, paper_recipe, Recipe, resolved, Synthesis
from synthdet.synthesis.stream import make_samples, Samples


def disc(side=40, r=14):
    "A round object: colour, alpha, and the ground it goes on."
    rng = np.random.default_rng(0)
    ground, colour = (rng.integers(low, low + 60, (side, side, 3), dtype=np.uint8) for low in (20, 160))
    return ground, colour, cv2.circle(np.zeros((side, side), np.uint8), (side//2, side//2), r, 255, -1)


def wholes(n=6, whole=False):
    "Pictures with their masks, as the paper pastes them, of two classes."
    pairs = [butterflies.class_image(i, size=64) for i in range(n)]
    cuts = [cutout(x, m, 1 + i % 2, f'butterfly {i}', tight=False) for i, (x, m) in enumerate(pairs)]
    return [c._replace(whole=whole) for c in cuts]


PLACES = [butterflies.background(i, size=120) for i in range(3)]


# Blends

@pytest.mark.parametrize('name', BLENDS)
def test_a_blend_changes_its_region_and_nothing_else(name):
    ground, colour, alpha = disc()
    canvas = np.pad(ground, ((3, 5), (7, 2), (0, 0)))
    before, given = canvas.copy(), (colour.copy(), alpha.copy())
    assert named('blend', name, BLENDS)(canvas[3:-5, 7:-2], colour, alpha) is None, 'a window of a picture, in place'
    assert (colour == given[0]).all() and (alpha == given[1]).all()
    outside = np.pad(alpha, ((3, 5), (7, 2))) == 0
    assert (canvas[outside] == before[outside]).all() and (canvas[~outside] != before[~outside]).any()


@pytest.mark.parametrize('name', BLENDS)
def test_a_blend_shows_the_object_where_it_covers(name):
    ground, colour, alpha = disc()
    blend, again = named('blend', name, BLENDS), ground.copy()
    region, same = ground.copy(), ground.copy()
    blend(region, colour, alpha)
    blend(again, colour, alpha)
    assert (region == again).all(), 'nothing is random'
    blend(same, colour, 0*alpha)
    assert (same == ground).all(), 'an object that covers nothing changes nothing'
    core = cv2.erode(alpha, np.ones((15, 15))) > 0
    if name != 'poisson': assert (region[core] == colour[core]).all()
    detail = lambda a: np.diff(a.astype(int), axis=1)[core[:, 1:]]
    assert np.corrcoef(detail(region).ravel(), detail(colour).ravel())[0, 1] > .8, 'its detail is there in any case'


@pytest.mark.parametrize('name', BLENDS)
def test_what_a_blend_asks_for_are_fields_of_the_recipe(name):
    asked = list(inspect.signature(named('blend', name, BLENDS)).parameters)
    assert asked[:3] == ['region', 'colour', 'alpha'] and set(asked[3:]) <= {f.name for f in fields(Recipe)}
    compose(PLACES[0], wholes(2), Recipe(blend=name, image_size=64), generator(0))


def test_a_new_blend_is_a_function_and_an_entry(monkeypatch):
    seen = []
    def outlined(region, colour, alpha, feather, max_overlap): seen.append((feather, max_overlap))
    monkeypatch.setitem(BLENDS, 'outlined', outlined)
    recipe = Recipe(blend='outlined', feather=(4, 6), image_size=64, count=(2, 2), distractors=(0, 0), max_overlap=1)
    compose(PLACES[0], wholes(), recipe, generator(0))
    (width, overlap), *rest = seen
    assert 4 <= width <= 6 and overlap == 1 and set(rest) == {(width, overlap)}, 'drawn once for a picture'
    assert 'outlined' not in MIXED, 'streams that exist stay as they are'


def test_recipes_that_differ_in_the_blend_draw_the_same_scenes():
    scenes = [compose(PLACES[0], wholes(), Recipe(blend=b, image_size=64), generator(3))[1]['boxes'] for b in BLENDS]
    assert all(torch.equal(scenes[0], s) for s in scenes)


# Compositors

BASE = dict(free=Recipe(), paper=paper_recipe('faces'), released=paper_recipe('faces', released=True))


def recipe_of(name, **changes): return replace(BASE.get(name, Recipe(compositor=name)), **changes)


@pytest.mark.parametrize('name', COMPOSERS)
@pytest.mark.parametrize('size', [96, (64, 112)], ids=str)
def test_a_compositor_gives_a_labelled_picture_of_the_size_asked_for(name, size):
    recipe, pool = recipe_of(name, image_size=size), wholes()
    for i in range(6):
        image, t = compose(PLACES[i % 3], pool, recipe, generator(i), textures=PLACES, with_masks=True)
        again, _ = compose(PLACES[i % 3], pool, recipe, generator(i), textures=PLACES)
        assert image.dtype == torch.uint8 and image.shape == (3, *recipe.size) and torch.equal(image, again)
        n = len(t['labels'])
        assert t['boxes'].dtype == torch.float32 and t['boxes'].shape == (n, 4) and t['labels'].dtype == torch.int64
        assert t['masks'].dtype == torch.bool and t['masks'].shape == (n, *recipe.size) and t['masks'].sum(0).max() <= 1
        assert isinstance(t['boxes'], tv_tensors.BoundingBoxes) and t['boxes'].canvas_size == recipe.size
        assert isinstance(t['masks'], tv_tensors.Mask) and set(t['labels'].tolist()) <= {1, 2}
        if name != 'released': assert torch.equal(t['boxes'], masks_to_boxes(t['masks'])), 'boxes of what is seen'


@pytest.mark.parametrize('name', COMPOSERS)
def test_a_plan_counts_the_objects_that_are_dealt(name):
    recipe = recipe_of(name, image_size=160)
    look = style(recipe)
    for i in range(20):
        hand = Hand(wholes(), first=0)
        look.composer.arrange(hand, look.drawn, generator(i), PLACES)
        assert hand.next == sum(map(bool, look.composer.plan(look.drawn, generator(i))))


@pytest.mark.parametrize('name', COMPOSERS)
def test_a_compositor_shows_every_object_in_some_picture_and_refuses_an_empty_pool(name):
    recipe, pool = recipe_of(name, image_size=160), wholes()
    samples = Samples(pool, PLACES, recipe)
    assert {o['origin'] for i in range(60) for o in samples.provenance(i)['objects']} == {c.origin for c in pool}
    assert refused(compose, PLACES[0], [], recipe, generator(0)) == refused(Samples, [], PLACES, recipe)


@pytest.mark.parametrize('name', COMPOSERS)
def test_an_object_without_a_pixel_does_no_harm(name):
    clear = [Cutout(torch.zeros(4, 64, 64, dtype=torch.uint8), 1, 'clear')]
    for i in range(4):
        _, t = compose(PLACES[0], clear, recipe_of(name, image_size=96), generator(i), with_masks=True)
        assert len(t['boxes']) == len(t['masks']) and (name == 'released' or not len(t['boxes']))


@pytest.mark.parametrize('name', COMPOSERS)
def test_a_sample_drawn_into_the_memory_of_a_batch_is_the_sample(name):
    samples = Samples(wholes(), PLACES, recipe_of(name, image_size=(64, 112)), with_masks=True)
    memory = np.zeros((3, *samples.draws, 3), np.uint8)
    for i in range(4):
        image, target = samples[i]
        found = samples.draw(i, memory[1])
        assert torch.equal(chw(memory[1]), image) and not memory[[0, 2]].any(), 'this row and no other'
        assert found.keys() == target.keys() and all(type(v) is torch.Tensor for v in found.values())
        assert all(torch.equal(found[k], target[k]) for k in found)


def test_a_new_compositor_is_a_record_and_an_entry(monkeypatch):
    upper = free._replace(box=lambda layer: [0, 0, 7, 9], finish=lambda image, recipe: 255 - image)
    monkeypatch.setitem(COMPOSERS, 'upper', upper)
    image, t = compose(PLACES[0], wholes(), Recipe(compositor='upper', image_size=64), generator(0))
    usual, _ = compose(PLACES[0], wholes(), Recipe(image_size=64), generator(0))
    assert torch.equal(image, 255 - usual) and all(b == [0, 0, 7, 9] for b in t['boxes'].tolist()) and len(t['boxes'])
    domain = load_domain('butterflies', n_class_images=4, n_backgrounds=2)
    assert make_samples(domain, recipe=Recipe(compositor='upper'), masks='alpha')[0][0].shape == (3, 300, 300)


# Pools

def endless():
    cut = lambda members: [(c, None, float('nan')) for c in members]
    pool = wholes()
    class Round:
        def __getitem__(self, k): return pool[k % 6]
    return Endless(Round(), cut, 'mine', content='round and round')


POOLS = dict(finite=lambda: Cutouts(wholes()), endless=endless)


@pytest.mark.parametrize('kind', POOLS)
def test_a_pool_answers_a_stream(kind):
    counts = lambda i: 1 + i % 3
    pool, same = (POOLS[kind]().dealt(counts, 3, reuse=2) for _ in range(2))
    pool.fill()
    deal = lambda pool, i: [pool.hand(i).deal(generator(i)).origin for _ in range(counts(i))]
    assert all(deal(pool, i) == deal(same, i) for i in (40, 3, 1000)), 'a function of the number of the sample'
    assert pool.hand(5).pick(generator(5)).origin.startswith('butterfly')
    assert pool.content == same.content and pool.content and 'cut-outs kept' in pool.report()
    assert pool.forkable is (kind == 'finite')
    for p in (pool, same): p.close()


# Settings

def test_every_number_of_a_recipe_has_bounds_that_are_kept():
    for leaf in leaves(Recipe()):
        low, high = leaf.field.metadata['low'], leaf.field.metadata['high']
        if isinstance(leaf.value, (bool, str)) or leaf.path == 'image_size': continue
        for bad in (low - 1, high + 1):
            value = (bad, bad) if isinstance(leaf.value, tuple) else type(leaf.value)(bad)
            assert refused(Recipe, **{leaf.path: value}).startswith(f'{leaf.path}='), leaf.path


def test_a_recipe_is_what_its_words_say():
    for recipe in (Recipe(), *(paper_recipe(n, released=r) for n in PAPER for r in (False, True))):
        words = {leaf.path: text_of(leaf.value) for leaf in leaves(recipe)}
        assert override(Recipe(), words) == recipe


def test_nothing_is_left_open_when_a_stream_is_resolved():
    left = [leaf.path for leaf in leaves(resolved(Synthesis(), image_size=96)) if leaf.value is None]
    assert not left and resolved(Synthesis(), image_size=96).recipe.size == (96, 96)


def test_a_preset_by_another_name_is_refused():
    assert refused(paper_recipe, 'dogs') == "paper preset 'dogs' is unknown; choose from faces, birds, cars, qrcodes"
