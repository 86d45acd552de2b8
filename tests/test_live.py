"A stream whose objects have no end: the same for any reader, resumed anywhere, stopped cleanly, and honest about errors."
import gc
import itertools
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from synthdet.data import butterflies
from synthdet.synthesis.settings import Recipe
from synthdet.core import UserError
from synthdet.synthesis.cutouts import make_cutouts
from synthdet.data.domains import load_domain
from synthdet.evidence.arm import make_arms
from synthdet.evidence.phases import phase_names, run
from synthdet.objects.gan64 import Generator64
from synthdet.objects.objects import Generated
from synthdet.masks.quality import Gate
from synthdet.data.batches import batches, Loop, Mixed
from synthdet.synthesis.disk import write_stream
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
    yield
    gc.collect()
    until = time.monotonic() + 10
    while (left := [t for t in threading.enumerate() if t not in before and t.name.startswith("bank")]) and time.monotonic() < until: time.sleep(.02)
    assert not left


def live(weights, seed=3, **recipe):
    "Whole frames as objects: nothing is turned down."
    domain = load_domain("butterflies", n_backgrounds=3, image_size=48)
    return make_samples(domain, objects="gan64", segmenter="frame", recipe=Recipe(**{**dict(image_size=48), **recipe}), seed=seed, object_weights=weights, size=24)


def flock(draw=lambda ks, seed: torch.stack([butterflies.class_image(k, size=32)[0] for k in ks]), segmenter="frame", **recipe):
    "Drawn butterflies without an end."
    cuts = make_cutouts(Generated(draw, "flock", key="flock", block=8), segmenter)
    return Samples(cuts, [butterflies.background(i, size=48) for i in range(3)], Recipe(**{**dict(image_size=48), **recipe}), seed=5)


def same(a, b): return torch.equal(a[0], b[0]) and all(torch.equal(s[k], t[k]) for s, t in zip(a[1], b[1], strict=True) for k in s)


def take(n, *args, **options):
    it = batches(*args, **options)
    try: return list(itertools.islice(it, n))
    finally: it.close()


@pytest.mark.parametrize("protocol", ["free", "paper"])
def test_batches_are_the_same_for_any_workers_and_any_start(weights, threads, protocol):
    recipe = dict(protocol=protocol) if protocol == "free" else dict(vars(Recipe.paper("birds")), image_size=48)
    alone = take(14, live(weights, **recipe), 4)
    for workers in (1, 3): assert all(map(same, alone, take(14, live(weights, **recipe), 4, workers=workers)))
    assert all(map(same, alone[9:], take(5, live(weights, **recipe), 4, start=9))) and all(map(same, alone[9:], take(5, live(weights, **recipe), 4, start=9, workers=2)))
    assert not same(alone[0], take(1, live(weights, seed=4, **recipe), 4)[0])


@pytest.mark.parametrize("reuse", [1, 3])
def test_objects_repeat_as_often_as_the_recipe_says(threads, reuse):
    samples = flock(reuse=reuse, max_overlap=1, min_visible=0, truncation=0)
    origins = [[o["origin"] for o in samples.provenance(i)["objects"]] for i in range(100)]
    uses = [o for some in origins for o in some]
    assert all(len(set(some)) == len(some) for some in origins) and max(map(uses.count, uses)) == reuse
    assert samples.recipe.reuse == reuse and flock(reuse=2).signature() != flock(reuse=1).signature() == flock().signature()


def test_much_reuse_does_not_fill_a_scene_with_one_object(threads):
    samples = flock(reuse=10**6, max_overlap=1, min_visible=0, truncation=0)
    for i in range(20):
        origins = [o["origin"] for o in samples.provenance(i)["objects"]]
        assert len(set(origins)) == len(origins)


def test_memory_does_not_grow(threads):
    samples = flock()
    held = samples.cutouts.bank
    for i in range(0, 640, 8): samples[i]
    assert len(held._work.ready) <= held.ahead and samples.cutouts.blocks.cuts.objects._held.cache_info().currsize <= 4


def broken(at):
    def draw(ks, seed):
        if ks.start >= at: raise UserError(f"the generator drew NaN from object {ks.start} on")
        return torch.stack([butterflies.class_image(k, size=32)[0] for k in ks])
    return draw


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_generator_stops_the_training_with_its_own_words(tmp_path, workers):
    model = torch.nn.Linear(1, 1)
    model.forward = lambda images, targets: dict(classification=model.weight.square().sum())
    samples = flock(broken(at=400))
    with pytest.raises(UserError, match="the generator drew NaN from object"):
        train(model, lambda start: batches(samples, 4, start=start, workers=workers), 10_000, tmp_path/"run", validate=None)


def test_a_gate_that_turns_everything_down_is_told(threads):
    flat = lambda ks, seed: torch.stack([torch.arange(32*32).view(1, 32, 32).expand(3, -1, -1).remainder(200).byte() + k % 7 for k in ks])
    samples = Samples(make_cutouts(Generated(flat, "stripes", block=8), "frame", limits=Gate()), [butterflies.background(0, size=48)], Recipe(image_size=48))
    with pytest.raises(UserError, match="of objects 0 to .* only 0 cut-outs passed the gate .*too large"): samples[0]


def test_a_mixture_with_a_live_part_keeps_its_order(weights, threads):
    real = Loop([(torch.full((3, 48, 48), k, dtype=torch.uint8), dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))) for k in range(4)])
    alone = take(6, Mixed(real, live(weights), .5), 4)
    assert not Mixed(real, live(weights), .5).forkable and all(map(same, alone, take(6, Mixed(real, live(weights), .5), 4, workers=2)))


def test_a_live_stream_is_written_and_continued(weights, tmp_path, threads):
    write_stream(live(weights), tmp_path/"a", 6)
    write_stream(live(weights), tmp_path/"b", 3)
    write_stream(live(weights), tmp_path/"b", 6)
    read = lambda d: {p.name: p.read_bytes() for p in (tmp_path/d).rglob("*") if p.is_file()}
    assert read("a") == read("b")
    with pytest.raises(UserError, match="another stream"): write_stream(live(weights, seed=4), tmp_path/"a", 6)


def test_a_number_of_objects_makes_a_pool(weights):
    domain = load_domain("butterflies", n_backgrounds=3, image_size=48)
    pool = make_samples(domain, objects="gan64", segmenter="frame", recipe=Recipe(image_size=48), object_weights=weights, n_objects=10)
    assert not pool.live and len(pool.cutouts) == 10


def test_python_ends_while_a_live_stream_is_read():
    code = """
from tests.test_live import *
it = batches(flock(), 4, workers=1)
next(it); print('read', flush=True)
"""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=root, env={**os.environ, "PYTHONPATH": root})
    assert r.returncode == 0 and r.stdout == "read\n" and not r.stderr, r.stderr


def test_an_arm_is_named_by_its_generator_and_runs_with_it(weights, tmp_path):
    tiny = dict(objects="gan64", segmenter="frame", backbone="mobilenetv1_025", image_size=96, batch_size=2, steps=2, pretrain_steps=4, eval_every=2, n_real=2)
    other = save_weights(Generator64(8, (8,)*5), tmp_path/"other.safetensors", nz=8, widths="8 8 8 8 8")
    arms = [make_arms("pretrain", object_weights=str(w), **{**tiny, **more})[0] for w, more in ((weights, {}), (other, {}), (weights, dict(n_objects=5)), (weights, dict(recipe='{"reuse": 2}')), (weights, dict(seed=1)))]
    assert len({phase_names(a, "data")[0][2] for a in arms}) == 5
    row = run(arms[0], tmp_path/"runs")
    assert (row["objects"], row["object_weights"], row["n_objects"], row["recipe"]["reuse"]) == ("gan64", "gan64.safetensors", 0, 1) and run(arms[0], tmp_path/"runs")["id"] == row["id"]
    with pytest.raises(UserError, match="object_weights 'nowhere'"): make_arms("pretrain", object_weights="nowhere", **tiny)
    with pytest.raises(UserError, match="psi=0.5 is for stylegan"): run(make_arms("pretrain", object_weights=str(weights), psi=.5, **tiny)[0], tmp_path/"runs")
    assert phase_names(make_arms("scratch", **tiny)[0], "data"), "an arm that pastes nothing asks for no weights"
