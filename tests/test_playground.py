"The playground: a control for every setting, words that give back the choice, nothing cut twice; no front end needed."
from dataclasses import replace

import pytest

from synthdet.core import generator
from synthdet.evidence.arm import Arm, make_arms
from synthdet.playground import Bench, Panel, Playground
from synthdet.settings import choices, difference, leaves, override
from synthdet.synthesis.settings import PAPER


@pytest.fixture(scope="module")
def arm(root):
    made, = make_arms("pretrain", "recipe.image_size=64", domain="folder", root=str(root))
    return made


@pytest.fixture(scope="module")
def bench(arm): return Bench(arm, 8, 4)


def other(leaf, g):
    "Another value that a setting may have."
    meta, words = leaf.field.metadata, choices(leaf.field)
    low, high = (v if v is not None else d for v, d in ((meta["low"], -999), (meta["high"], 999)))
    whole = meta["kind"] is int or isinstance(leaf.value, tuple) and all(type(v) is int for v in leaf.value)
    drawn = lambda: int(g.integers(max(low, 0), min(high, 10**6) + 1)) if whole else float(g.uniform(low, high))
    if leaf.path.endswith("recipe.image_size"):
        return int(g.integers(32, 99)) if g.random() < .5 else (64, int(g.integers(32, 99)))
    if meta["path"]: return leaf.value
    if words: return words[g.integers(len(words))]
    if meta["kind"] is bool: return not leaf.value
    if meta["kind"] is str: return "it's a \"name\" = 'x'"
    if meta["kind"] is tuple: return tuple(sorted((drawn(), drawn())))
    return drawn()


def free(leaf):
    "May it take any value, whatever others are?"
    return not leaf.path.startswith(("model.", "data.root", "data.options", "data.class_images"))


@pytest.mark.parametrize("seed", range(20))
def test_the_words_of_a_difference_give_back_what_was_chosen(seed):
    "Of every setting there is, so of one of tomorrow too; and they name those alone that differ."
    g, base = generator(seed, "base"), Arm()
    known = [l for l in leaves(base) if free(l)]
    if seed % 2: base = override(base, {l.path: other(l, g) for l in known if g.random() < .3})
    chosen = override(base, {l.path: other(l, g) for l in known if g.random() < .5})
    words = difference(base, chosen)
    assert override(base, words) == chosen and difference(chosen, chosen) == ""
    differ = [a.path for a, b in zip(leaves(base), leaves(chosen)) if a.value != b.value]
    assert len(differ) > 5 and words.count("=") - words.count(" = ") == len(differ)


def test_every_setting_of_a_stream_has_a_control_that_says_it(arm, bench):
    for start in (arm, override(arm, dict(min_score=.5, min_area=.1)), *_presets(arm)):
        play = Playground(arm, start, bench=bench, n=1)
        panel = Panel(play)
        asked = {l.path: l for l in leaves(start.synthesis) if "." in l.path}
        assert panel.controls.keys() == asked.keys() >= {"recipe.blend", "masks.segmenter", "masks.gate.min_score"}
        for path, control in panel.controls.items():
            assert override(start.synthesis, {path: control.value}) == start.synthesis, path
            assert control.part.tooltip == asked[path].help


def _presets(arm):
    from synthdet.synthesis.settings import paper_recipe
    for name in PAPER: yield replace(arm, synthesis=replace(arm.synthesis, recipe=paper_recipe(name, image_size=64)))


def test_a_move_draws_and_gives_words_that_name_it_alone(arm, bench):
    play = Playground(arm, bench=bench, n=2)
    panel, first = Panel(play), play.picture
    panel.controls["recipe.scale"].part.value = .30000000000000004, .5
    panel.controls["recipe.blend"].part.value = "paste"
    panel.controls["recipe.image_size"].part.value = "48,96"
    assert sorted(panel.more.value.split()) == ["blend=paste", "recipe.image_size=48,96", "scale=0.3,0.5"]
    assert override(arm, panel.more.value).synthesis == play.synthesis and play.picture.shape != first.shape
    assert panel.image.value[:2] == b"\xff\xd8" and "of 8 cut-outs kept" in panel.told.value
    panel.put(panel.start)
    assert panel.more.value == "" and (play.picture == first).all()


def test_a_limit_follows_the_segmenter_until_it_is_given(arm, bench):
    panel = Panel(Playground(arm, bench=bench, n=1))
    border = panel.controls["masks.gate.max_border"]
    assert (border.part.value, border.part.disabled, border.value) == (.65, True, None)
    panel.controls["masks.segmenter"].part.value = "frame"
    assert (border.part.value, border.part.disabled) == (1, True) and panel.more.value == "segmenter=frame"
    border.auto.value = False
    assert not border.part.disabled and panel.more.value.split() == ["segmenter=frame", "max_border=1.0"]


def test_nothing_is_cut_twice(arm):
    bench = Bench(arm, 8, 4)
    panel = Panel(Playground(arm, bench=bench, n=1))
    looked, cut = bench.masks.cache_info().misses, bench.pool.cache_info().misses
    for low in (.2, .3): panel.controls["recipe.scale"].part.value = low, .6
    panel.controls["recipe.blend"].part.value = "paste"
    assert (bench.masks.cache_info().misses, bench.pool.cache_info().misses) == (looked, cut) == (1, 1)
    panel.controls["masks.gate.max_border"].auto.value = False
    for limit in (.5, .4, .5): panel.controls["masks.gate.max_border"].part.value = limit
    assert (bench.masks.cache_info().misses, bench.pool.cache_info().misses) == (1, 3)    # .65 is the usual one
    for name in ("frame", "grabcut"): panel.controls["masks.segmenter"].part.value = name
    assert bench.masks.cache_info().misses == 2


def test_what_cannot_be_drawn_is_said_and_can_be_mended(arm, bench):
    play = Playground(arm, bench=bench, n=1)
    panel, before = Panel(play), (play.synthesis, play.picture)
    panel.controls["objects.source"].part.value = "gan"
    assert "gan64 for domain" in panel.told.value and (play.synthesis, play.picture) == before
    panel.controls["recipe.image_size"].part.value = "3"
    assert "gan64" in panel.told.value or "image_size" in panel.told.value
    panel.controls["objects.source"].part.value = "real"
    assert "image_size=(3,) should be a whole number of pixels" in panel.told.value
    panel.controls["recipe.image_size"].part.value = "64"
    assert "cut-outs kept" in panel.told.value and panel.more.value == ""


def test_scenes_are_those_of_the_stream(arm, bench):
    from synthdet.synthesis.stream import make_samples
    everything = Bench(arm, 999, 999)
    ours, theirs = everything.samples(arm.synthesis), make_samples(everything.domain, arm.synthesis, seed=arm.seed)
    for i in range(3): assert (ours[i][0] == theirs[i][0]).all()
