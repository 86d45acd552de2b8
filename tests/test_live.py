"A stream whose objects have no end: the same for any reader, resumed anywhere, stopped cleanly, honest about errors."
import gc
import threading
import time
import weakref
from contextlib import nullcontext

import pytest
import torch

from helpers import python, take
from synthdet.core import refused, UserError
from synthdet.data import butterflies
from synthdet.data.batches import batches, Loop, Mixed
from synthdet.data.domains import load_domain
from synthdet.masks.segment import Segmenter
from synthdet.masks.settings import Masks, USUAL
from synthdet.objects.gan64 import Generator64
from synthdet.objects.generated import Generated
from synthdet.objects.settings import Objects
from synthdet.synthesis import pool
from synthdet.synthesis.cutouts import make_cutouts
from synthdet.synthesis.disk import write_stream
from synthdet.synthesis.settings import paper_recipe, Recipe, Synthesis
from synthdet.synthesis.stream import make_samples, Samples
from synthdet.detection.train import train
from synthdet.weights import save_weights

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "A generator that was never trained: its pictures are of no use, and are pictures."
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("gan")/"gan64.safetensors"
    return save_weights(Generator64(8, (8,)*5), path, nz=8, widths="8 8 8 8 8")


@pytest.fixture
def threads():
    "What a test starts ends with it."
    before = set(threading.enumerate())
    left = lambda: [t for t in threading.enumerate() if t not in before]
    yield
    gc.collect()
    until = time.monotonic() + 10
    while left() and time.monotonic() < until: time.sleep(.02)
    assert not left()


def live(weights, seed=3, recipe=Recipe(image_size=48)):
    "Whole frames as objects: nothing is turned down."
    domain = load_domain("butterflies", n_backgrounds=3, image_size=48)
    made = Synthesis(Objects("gan64", str(weights), size=24), Masks("frame"), recipe)
    return make_samples(domain, made, seed=seed)


def drawn(ks, seed): return torch.stack([butterflies.class_image(k, size=32)[0] for k in ks])


def flock(draw=drawn, segmenter="frame", reuse=1, **recipe):
    "Drawn butterflies without an end."
    cuts = make_cutouts(Generated(draw, "flock", key="flock", block=8), segmenter)
    places = [butterflies.background(i, size=48) for i in range(3)]
    return Samples(cuts, places, Recipe(**{**dict(image_size=48), **recipe}), seed=5, reuse=reuse)


def same(a, b): return torch.equal(a[0], b[0]) and all(torch.equal(s[k], t[k]) for s, t in zip(a[1], b[1]) for k in s)


def origins(samples, i): return [o["origin"] for o in samples.provenance(i)["objects"]]


@pytest.mark.parametrize("recipe", [Recipe(image_size=48), paper_recipe("birds", image_size=48)], ids=["free", "paper"])
def test_batches_are_the_same_for_any_workers_and_any_start(weights, threads, recipe):
    alone = take(14, live(weights, recipe=recipe), 4)
    for workers in (1, 3): assert all(map(same, alone, take(14, live(weights, recipe=recipe), 4, workers=workers)))
    for workers in (0, 2):
        assert all(map(same, alone[9:], take(5, live(weights, recipe=recipe), 4, start=9, workers=workers)))
    assert not same(alone[0], take(1, live(weights, 4, recipe), 4)[0])


@pytest.mark.parametrize("reuse", [1, 3])
def test_objects_repeat_as_often_as_is_asked_for(threads, reuse):
    samples = flock(reuse=reuse, max_overlap=1, min_visible=0, truncation=0)
    found = [origins(samples, i) for i in range(100)]
    uses = [o for some in found for o in some]
    assert all(len(set(some)) == len(some) for some in found) and max(map(uses.count, uses)) == reuse
    assert flock(reuse=2).signature() != flock(reuse=1).signature() == flock().signature()


def test_a_rank_draws_on_its_own_gpu(monkeypatch):
    "A thread starts on the first GPU, whatever the GPU of its process."
    made = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: made.append(device))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(pool, "_OWN", threading.local())
    for _ in range(2): pool._beside()
    assert made == [torch.device("cuda:1")]


def test_much_reuse_does_not_fill_a_scene_with_one_object(threads):
    samples = flock(reuse=10**6, max_overlap=1, min_visible=0, truncation=0)
    for i in range(20): assert len(set(origins(samples, i))) == len(origins(samples, i))


def test_an_object_does_not_come_back_in_the_next_pictures(threads):
    samples = flock(reuse=8, max_overlap=1, min_visible=0, truncation=0)
    dealt = [o for i in range(24) for o in origins(samples, i)]
    assert len(set(dealt)) == len(dealt), "a block is as many samples as use the objects of 32 without reuse"


def test_memory_does_not_grow(threads):
    samples = flock(reuse=8)
    blocks = [weakref.ref(samples.pool.hand(i).cutouts[0].rgba) for i in range(0, 20*32*8, 32*8)]
    gc.collect()
    assert sum(r() is not None for r in blocks) <= 2, 'blocks that were read are let go'
    assert samples.pool.cuts.objects._held.cache_info().currsize <= 4


def broken(at):
    def draw(ks, seed):
        if ks.start >= at: raise UserError(f"the generator drew NaN from object {ks.start} on")
        return drawn(ks, seed)
    return draw


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_generator_stops_the_training_with_its_own_words(tmp_path, workers):
    model = torch.nn.Linear(1, 1)
    model.forward = lambda images, targets: dict(classification=model.weight.square().sum())
    samples = flock(broken(at=400))
    feed = lambda start: batches(samples, 4, start=start, workers=workers)
    with pytest.raises(UserError, match="the generator drew NaN from object"):
        train(model, feed, 10_000, tmp_path/"run", validate=None)


def stripes(ks, seed):
    "Nothing that could be an object."
    grey = torch.arange(32*32).view(1, 32, 32).expand(3, -1, -1).remainder(200).byte()
    return torch.stack([grey + k % 7 for k in ks])


def test_a_gate_that_turns_everything_down_is_told(threads):
    strict = Segmenter("frame", lambda images: torch.ones_like(images[:, 0]), USUAL)
    told = refused(flock(stripes, strict).__getitem__, 0)
    assert told.startswith("of objects 0 to ") and "only 0 cut-outs passed the gate" in told and "too large" in told


def test_a_mixture_with_a_live_part_keeps_its_order(weights, threads):
    plain = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    real = Loop([(torch.full((3, 48, 48), k, dtype=torch.uint8), plain) for k in range(4)])
    alone, ahead = (take(6, Mixed(real, live(weights), .5), 4, workers=w) for w in (0, 2))
    assert not Mixed(real, live(weights), .5).forkable and all(map(same, alone, ahead))


def test_a_live_stream_is_written_and_continued(weights, tmp_path, threads):
    for place, n in (("a", 6), ("b", 3), ("b", 6)): write_stream(live(weights), tmp_path/place, n)
    read = lambda d: {p.name: p.read_bytes() for p in (tmp_path/d).rglob("*") if p.is_file()}
    assert read("a") == read("b")
    assert "another stream" in refused(write_stream, live(weights, seed=4), tmp_path/"a", 6)


def test_what_has_no_name_streams_and_is_not_written(tmp_path, threads):
    nameless = Samples(make_cutouts(Generated(drawn, "flock"), "frame"), [butterflies.background(0, size=48)])
    assert nameless[0][0].shape == (3, 300, 300)
    told = refused(write_stream, nameless, tmp_path, 2)
    assert "give the generator and the segmenter of your own a `content`" in told
    assert not list(tmp_path.iterdir())


def test_a_number_of_objects_makes_a_pool(weights):
    domain = load_domain("butterflies", n_backgrounds=3, image_size=48)
    pool = make_samples(domain, objects=Objects("gan64", str(weights), n_objects=10), masks="frame")
    assert pool.forkable and len(pool.pool) == 10


@pytest.mark.slow
def test_python_ends_while_a_live_stream_is_read():
    code = """
from test_live import *
it = batches(flock(), 4, workers=1)
next(it); print('read', flush=True)
"""
    process = python(code)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out == "read\n" and not err, err
