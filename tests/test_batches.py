"Batches: the same for any number of workers and any start, mixtures in exact shares, errors of workers in one line."
import itertools
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from synthdet.core import UserError
from synthdet.data.annotations import DetectionDataset
from synthdet.data.batches import batches, forkable, Loop, Mixed
from synthdet.data.butterflies import background
from synthdet.data.images import write_image

pytestmark = pytest.mark.filterwarnings('ignore:This DataLoader will create')


class Numbers(Dataset):
    "Item i is a picture of the number `first + i`, drawn by whichever process; `n` of them, or no end."
    def __init__(self, first=0, n=0, **more):
        self.__dict__.update(more, first=first, n=n)

    def __len__(self):
        if self.n: return self.n
        raise TypeError('no end')

    def __getitem__(self, i):
        image = torch.full((3, 4, 6), self.first + i, dtype=torch.uint8)
        return image, dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), process=os.getpid())


def take(n, *args, **options):
    it = batches(*args, **options)
    try: return list(itertools.islice(it, n))
    finally: it.close()


def numbers(found): return [image[0, 0, 0].item() for images, _ in found for image in images]


STREAMS = dict(
    endless=Numbers(), finite=Numbers(n=5), loop=Loop(Numbers(n=4), seed=3),
    mixed=Mixed(Loop(Numbers(n=4), seed=3), Numbers(100), .25, seed=3), unforkable=Numbers(forkable=False))


@pytest.mark.parametrize('stream', STREAMS.values(), ids=STREAMS)
def test_batches_are_the_same_for_any_workers_and_any_start(stream):
    alone = numbers(take(6, stream, 4))
    assert alone[:4] == [int(stream[i][0].max()) for i in range(4)] or stream is STREAMS['finite']
    for workers in (1, 3): assert numbers(take(6, stream, 4, workers=workers)) == alone
    for workers in (0, 2): assert numbers(take(2, stream, 4, start=4, workers=workers)) == alone[16:]


def test_what_workers_hand_over_is_what_is_made_here():
    "Small tensors travel as arrays, and arrive as tensors that can be changed; everything else arrives as it is."
    def made(images, targets):
        few, many = torch.arange(6).view(2, 3).bool(), torch.arange(10_000, dtype=torch.float64)
        rest = ('text', 3, None, np.float32(2))
        return images, dict(few=few, none=torch.zeros(0, 4), many=many, rest=rest, targets=targets)
    (images, here), (same, there) = (take(1, Numbers(7), 2, workers=w, prepare=made)[0] for w in (0, 1))
    assert torch.equal(images, same) and images.stride() == same.stride() and images.stride(1) == 1
    assert here['rest'] == there['rest'] and here.keys() == there.keys()
    for k in ('few', 'none', 'many'): assert here[k].dtype == there[k].dtype and torch.equal(here[k], there[k])
    there['few'][0, 0] = True
    assert [sorted(t) for t in here['targets']] == [sorted(t) for t in there['targets']]


def test_the_global_generator_of_torch_is_left_alone():
    state = torch.get_rng_state()
    take(2, Numbers(), 4, workers=1)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize('share', [.5, .3, 1/3, .01, .999, Fraction(2, 7)])
def test_a_mixture_is_never_off_by_a_whole_image(share):
    mixed = Mixed(['real'], ['fake'], share)
    real = [mixed[i] == 'real' for i in range(1000)]
    assert all(abs(sum(real[:n]) - share*n) < 1 for n in range(1, 1000))


def test_a_mixture_is_a_function_of_seed_and_index():
    make = lambda seed: Mixed(range(10), range(100, 130), .4, seed=seed)
    order = [3, 999, 0, 3, 12, 10**9]
    assert [make(1)[i] for i in order] == [make(1)[i] for i in reversed(order)][::-1]
    assert [make(1)[i] for i in range(40)] != [make(2)[i] for i in range(40)]
    assert {make(1)[i] for i in range(60)} == {*range(10), *range(100, 130)}, 'all are reached'


FINITE_OR_MIXED = [
    lambda s: s, lambda s: Loop(s), lambda s: Mixed(Numbers(n=3), s, .5), lambda s: Mixed(Loop(s), Numbers(), .5)]


@pytest.mark.parametrize('build', FINITE_OR_MIXED, ids=['finite', 'loop', 'fake', 'real'])
def test_what_cannot_be_forked_stays_in_this_process(build):
    "A finite set of a live generator was forked before: what went around it did not pass it on."
    stream = build(Numbers(n=4, forkable=False))
    found = take(3, stream, 4, workers=2)
    assert {t['process'] for _, targets in found for t in targets} == {os.getpid()}
    assert os.getpid() not in {t['process'] for _, ts in take(1, build(Numbers(n=4)), 4, workers=2) for t in ts}
    assert forkable(build(Numbers(n=4)))


@pytest.mark.slow
def test_workers_start_after_opencv_has_used_its_threads():
    code = '''
import cv2, numpy as np
from tests.test_batches import *
cv2.setNumThreads(4); cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (0, 0), 3)
assert numbers(take(3, Numbers(), 4)) == numbers(take(3, Numbers(), 4, workers=2)) and cv2.getNumThreads() == 4
'''
    p = subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True)
    try: _, err = p.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        p.kill()
        pytest.fail('the workers hang')
    assert p.returncode == 0, err


@pytest.mark.parametrize('workers', [0, 1])
def test_a_torn_photograph_is_one_line_also_from_a_worker(tmp_path, workers):
    write_image(tmp_path/'a.jpg', background(0, size=64))
    (tmp_path/'b.jpg').write_bytes((tmp_path/'a.jpg').read_bytes()[:300])
    target = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    with pytest.raises(UserError, match='b.jpg') as e:
        take(1, DetectionDataset([tmp_path/'b.jpg'], [target], ['butterfly']), 2, workers=workers)
    assert '\n' not in str(e.value)
