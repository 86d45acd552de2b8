"The bank: threads, errors, and processes that come and go."
import gc
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from helpers import ended, forked
from synthdet.data.ahead import Bank
from synthdet.core import generator, UserError

torch.set_num_threads(1)


def block(b):
    "Three numbers, made with torch and at an uneven pace."
    time.sleep(.01*generator(0, b).random())
    return torch.from_numpy(generator(1, b).standard_normal(3))


@pytest.fixture
def threads():
    "Nothing that a test starts may outlive it."
    before = set(threading.enumerate())
    yield
    gc.collect()
    for t in set(threading.enumerate()) - before:
        t.join(5)
        assert not t.is_alive()


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("start", [0, 10**12])
def test_blocks_do_not_depend_on_threads_or_where_one_starts(workers, start, threads):
    with Bank(block, ahead=4, workers=workers) as bank:
        for b in range(start, start + 15): assert torch.equal(bank[b], block(b))


@pytest.mark.parametrize("ahead,workers", [(1, 1), (2, 3), (4, 2)])
def test_no_more_than_ahead_blocks_are_there(ahead, workers, threads):
    class Thing: pass
    alive = weakref.WeakSet()

    def make(b):
        alive.add(t := Thing())
        return [t]

    most = 0
    with Bank(make, ahead=ahead, workers=workers) as bank:
        for b in range(30):
            bank[b]
            time.sleep(.003)
            most = max(most, len(alive))
        assert set(bank._pool.window) == set(range(b, b + ahead))
    assert 1 <= most <= ahead + 1  # one more where a given-up block is still on its way out
    gc.collect()
    assert not alive


def test_what_was_made_for_another_place_is_thrown_away(threads):
    with Bank(lambda b: time.sleep(.1*(b > 10)) or b, ahead=4, workers=2) as bank:
        bank[100]
        assert bank[0] == 0 # while 101 and 102 are being made
        time.sleep(.3)
        assert sorted(k for k, made in bank._pool.window.items() if made.done()) == [0, 1, 2, 3]


def test_a_slow_make_is_waited_for_once(threads):
    made = []
    with Bank(lambda b: time.sleep(.1) or made.append(b) or b, ahead=2) as bank:
        assert bank[0] == 0
        while len(made) < 2: time.sleep(.01)
        assert bank[1] == 1 and made.count(1) == 1 and made[0] == 0, "it was ready"


class Odd(Exception):
    "Not an error of this package."


ERRORS = [UserError("no object was found"), Odd("x"), MemoryError(), SystemExit(3), KeyError("k")]


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_comes_as_it_is_and_where_it_belongs(error, threads):
    def make(b):
        if b == 3: raise error
        return b

    with Bank(make, ahead=8, workers=2) as bank:
        time.sleep(.02)
        assert [bank[b] for b in range(3)] == [0, 1, 2]
        for _ in range(2):
            with pytest.raises(type(error)) as e: bank[3]
            assert e.value is error
        assert bank[4] == 4


def test_two_readers_both_get_what_they_ask_for(threads):
    with Bank(lambda b: time.sleep(.02) or b, ahead=2) as bank:
        seen = []
        others = [threading.Thread(target=lambda k=k: seen.extend(bank[k + j] for j in range(3))) for k in (5, 50)]
        for t in others: t.start()
        assert [bank[b] for b in range(4)] == [0, 1, 2, 3]
        for t in others: t.join(10)
        assert sorted(seen) == [5, 6, 7, 50, 51, 52]


def test_what_failed_once_can_be_asked_for_again(threads):
    tries = []

    def make(b):
        tries.append(b)
        if b == 1 and tries.count(1) == 1: raise MemoryError("no room on the device")
        return b

    with Bank(make, ahead=3) as bank:
        assert bank[0] == 0
        with pytest.raises(MemoryError): bank[1]
        assert [bank[b] for b in (1, 2, 3)] == [1, 2, 3]


def test_it_closes_early_twice_and_by_error(threads):
    started = threading.Event()

    def make(b):
        started.set()
        time.sleep(.05)
        return b

    with pytest.raises(Odd):
        with Bank(make, ahead=50, workers=3) as bank:
            bank[0]
            raise Odd
    assert not any(t.is_alive() for t in bank._pool.threads)
    bank.close()
    with pytest.raises(UserError, match="the bank is closed"): bank[0]
    never = Bank(make)
    never.close()
    with pytest.raises(UserError, match="the bank is closed"): never[0]


def test_close_wakes_a_reader_that_waits(threads):
    release, seen = threading.Event(), []
    bank = Bank(lambda b: release.wait(5))

    def read():
        try: bank[0]
        except UserError as e: seen.append(str(e))

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(.05)
    closer = threading.Thread(target=bank.close)
    closer.start()
    reader.join(2)
    assert seen == ["the bank is closed; make a new one"]
    release.set()
    closer.join(2)
    assert not closer.is_alive()


def test_a_forgotten_bank_is_collected_while_it_works(threads):
    bank = Bank(lambda b: time.sleep(.02) or [b], ahead=100, workers=2)
    bank[0]
    gone, ts = weakref.ref(bank), bank._pool.threads
    del bank
    gc.collect()
    assert gone() is None
    for t in ts: t.join(2)
    assert not any(t.is_alive() for t in ts)


SCRIPT = """
import time
import synthdet.data.ahead as bank_module
from synthdet.data.ahead import Bank
{body}
print('done', flush=True)
"""


ASLEEP = """
bank_module._stop.__defaults__ = (.5,)
bank = Bank(lambda b: time.sleep(b*600), ahead=3)
bank[0]
"""
FAILED = """
import torch
busy = Bank(lambda b: torch.randn(300, 300) @ torch.randn(300, 300), ahead=1000, workers=2)
busy[0]
busy.cycle = busy
bank = Bank(lambda b: 1/(b - 1), ahead=3)
bank[0], bank[1]
"""


@pytest.mark.slow
@pytest.mark.parametrize("body,code", [(ASLEEP, 0), (FAILED, 1)], ids=["asleep", "computing and failed"])
def test_python_ends(body, code):
    r = subprocess.run([sys.executable, "-c", SCRIPT.format(body=body)], capture_output=True, text=True, timeout=60)
    assert r.returncode == code and ("done" in r.stdout) == (code == 0), r.stderr
    assert "ZeroDivisionError" in r.stderr.strip().splitlines()[-1] if code else not r.stderr, r.stderr


class Served(Dataset):
    "Item i is taken from a bank, as a stream would."
    def __init__(self): self.bank = Bank(block, ahead=3)
    def __len__(self): return 24
    def __getitem__(self, i):
        b, k = divmod(i, 3)
        return self.bank[b][k], os.getpid()


def test_workers_of_a_loader_have_banks_of_their_own(threads):
    data = Served()
    assert data.bank[0] is data.bank[0], "threads are at work here when the loader forks"
    loader = DataLoader(data, batch_size=6, num_workers=2, multiprocessing_context="fork", timeout=60)
    values, pids = zip(*loader)
    assert torch.equal(torch.cat(values), torch.cat([block(b) for b in range(8)]))
    assert len({int(p) for x in pids for p in x}) == 2 and os.getpid() not in {int(p) for x in pids for p in x}
    assert torch.equal(data.bank[1], block(1)), "and the one here goes on"


def test_a_fork_that_drops_the_bank_does_not_wait_for_its_lock():
    bank = Bank(block)
    bank[0]
    def drops():
        nonlocal bank
        del bank
        gc.collect()
    with bank._pool.reading: process = forked(drops) # as if another thread held it at the moment of the fork
    assert ended(process) == 0
    bank.close()


def test_a_pickled_bank_starts_afresh(threads):
    bank = Bank(block, ahead=7, workers=2)
    bank[4]
    copy = pickle.loads(pickle.dumps(bank))
    assert copy._pool is None and (copy.ahead, copy.workers) == (7, 2) and torch.equal(copy[4], bank[4])
    bank.close()
    assert torch.equal(copy[5], block(5))
    with pytest.raises(UserError, match="bank is closed"): pickle.loads(pickle.dumps(bank)).close() or bank[0]
    copy.close()
