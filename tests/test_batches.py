"Batches: the same for any number of workers and any start, mixtures in exact shares, errors of workers in one line."
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from helpers import python, take
from synthdet.core import refused, UserError
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
from test_batches import *
cv2.setNumThreads(4); cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (0, 0), 3)
assert numbers(take(3, Numbers(), 4)) == numbers(take(3, Numbers(), 4, workers=2)) and cv2.getNumThreads() == 4
'''
    p = python(code)
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


# how workers are started, and how they end

class Deadly(Numbers):
    "Its picture 9 kills the process that draws it; picture 4 of a `slow` one is never ready."
    def __getitem__(self, i):
        if i == 9: os.kill(os.getpid(), self.by)
        if i == 4 and getattr(self, 'slow', False): time.sleep(600)
        return super().__getitem__(i)


def started_by(how, code):
    "What a script prints that has said how processes are started."
    script = f"""
import multiprocessing, sys
if __name__ == '__main__':
    multiprocessing.set_start_method({how!r})
    from test_batches import *
    {code}
"""
    return python(script, start_new_session=True)


@pytest.mark.slow
@pytest.mark.parametrize('how', ['spawn', 'forkserver', 'fork'])
def test_workers_give_the_same_however_they_are_started(how):
    code = """from test_stream import make
    for stream in (Mixed(Loop(Numbers(n=4), seed=3), Numbers(100), .25), STREAMS['unforkable']):
        assert numbers(take(3, stream, 2)) == numbers(take(3, stream, 2, workers=1))
    here, there = (take(2, make(), 2, workers=w)[1] for w in (0, 1))
    assert torch.equal(here[0], there[0]) and torch.equal(here[1][0]['boxes'], there[1][0]['boxes'])
    if multiprocessing.get_start_method() != 'fork':
        print(refused(take, 1, type('Mine', (Numbers,), dict(__module__='__main__'))(), 2, workers=1))
        print(refused(take, 1, Numbers(), 2, workers=1, prepare=lambda *both: both))"""
    out, err = started_by(how, code).communicate(timeout=300)
    assert not err or 'Warning' in err, err
    assert len(out.splitlines()) == 2*(how != 'fork')
    for line in out.splitlines(): assert f'cannot go to a process started by {how}' in line


def test_a_script_without_a_guard_is_one_line(tmp_path):
    "Its copies in the workers would start workers, too; that ended in their tracebacks, or hung."
    code = """import multiprocessing
from synthdet import UserError
from synthdet.data.batches import _check_guard
def ask():
    try: print(_check_guard('spawn', 2))
    except UserError as e: print(e)
ask()
if __name__ == '__main__':
    ask()
"""
    (tmp_path/'mine.py').write_text(code)
    done = subprocess.run([sys.executable, 'mine.py'], capture_output=True, text=True, cwd=tmp_path,
                          check=True, timeout=300)
    line, fine = done.stdout.splitlines()
    assert 'workers=2: a process started by spawn runs' in line and 'mine.py again, up to line 7' in line
    assert fine == 'None'
    whole = "import multiprocessing\nmultiprocessing.set_start_method('forkserver')\nfrom tests.test_batches import *\n"
    (tmp_path/'mine.py').write_text(whole + 'print(refused(take, 1, Numbers(), 2, workers=1))\n')
    places = os.pathsep.join([*map(str, Path(__file__).parents[:2]), os.environ.get('PYTHONPATH', '')])
    done = subprocess.run([sys.executable, 'mine.py'], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, 'PYTHONPATH': places}, timeout=300)
    assert 'runs' in done.stdout and 'mine.py again, up to line 4' in done.stdout, done.stderr


@pytest.mark.parametrize('by', [signal.SIGKILL, signal.SIGBUS, signal.SIGTERM])
def test_a_worker_that_dies_is_one_line_at_once(by):
    before = signal.getsignal(signal.SIGCHLD)
    for workers in (1, 3):
        line = refused(take, 9, Deadly(by=by), 2, workers=workers)
        how = 'ended with code 0' if 'code 0' in line and by == signal.SIGTERM else f'was killed by signal {int(by)}'
        assert line == (f'a loader process {how}; free some memory (in a container shared memory, too), or choose '
                        f'fewer than workers={workers}')
    assert signal.getsignal(signal.SIGCHLD) == before and not multiprocessing.active_children()
    assert numbers(take(2, Numbers(), 2, workers=2)) == [0, 1, 2, 3], 'the next ones work'


@pytest.fixture
def no_loader_yet():
    "As in a program that has used no loader of torch's itself: that one's handler stays for good."
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, before)


def test_a_worker_that_dies_while_nobody_asks_leaves_the_reader_alone(no_loader_yet):
    "The error comes where batches are asked for, not in the middle of whatever the program does then."
    made = batches(Numbers(), 2, workers=1)
    next(made)
    worker, = multiprocessing.active_children()
    worker.kill()
    worker.join(60)
    time.sleep(.2) # here torch's handler would raise
    assert 'was killed by signal 9' in refused(lambda: [next(made) for _ in range(9)])


def test_workers_end_when_the_reader_stops_early_even_if_the_error_is_kept():
    made = batches(Numbers(), 2, workers=2)
    next(made)
    assert len(multiprocessing.active_children()) == 2
    made.close()
    assert not multiprocessing.active_children()
    kept = pytest.raises(UserError, take, 9, Deadly(by=signal.SIGKILL), 2, workers=2)
    assert kept.value and not multiprocessing.active_children()


@pytest.mark.parametrize('workers', [-1, 1.5, True, '2', 65_000, 10**6, 10**30])
def test_the_number_of_workers_has_bounds(workers):
    line = refused(batches, Numbers(), 2, workers=workers)
    assert line.startswith('workers=') and 'expected a whole number from 0 to ' in line


@pytest.mark.slow
@pytest.mark.parametrize('how', ['fork', 'spawn'])
def test_ctrl_c_while_workers_draw_is_silent_and_leaves_none(how):
    code = """made = batches(Deadly(slow=True, by=9), 2, workers=2)
    print(len([next(made) for _ in range(2)]), flush=True)
    try: next(made)
    except KeyboardInterrupt: print(len(multiprocessing.active_children()) > 0, flush=True)
    made.close()
    print(len(multiprocessing.active_children()))"""
    p = started_by(how, code)
    assert p.stdout.readline() == '2\n'
    time.sleep(.5)
    os.killpg(p.pid, signal.SIGINT) # what a terminal does: all of them hear it
    out, err = p.communicate(timeout=100)
    assert p.returncode == 0 and out.split()[-1] == '0' and 'Traceback' not in err, err
