"What several files of tests use."
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from synthdet import core
from synthdet.core import UserError
from synthdet.machine import shared
from synthdet.data.annotations import read_detection
from synthdet.data.batches import batches

needs_shared = pytest.mark.skipif(shared() is None, reason='the reference folder is not beside the project')
ROOT, PIPE = Path(__file__).resolve().parents[1], subprocess.PIPE
LEFT_OUT = '.*(left out|less than half|found by their names).*'


def contents(folder):
    "What lies in a folder: name -> bytes."
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob('*')) if p.is_file()}


def lasting(row):
    "A row as it is read, without what differs from one time to the next."
    passing = ('seconds', 'memory_mb', 'threads', 'commit', 'data_val', 'digest')
    return json.loads(json.dumps({k: v for k, v in row.items() if k not in passing}))


def remedy(f, *args, **options):
    "The one line with which a call refuses, and which says what to do."
    line = core.refused(f, *args, **options)
    assert line.isprintable() and ('; ' in line or ', so ' in line), line
    return line


def bounded(f, seconds=100):
    """A function for a fork, which the system ends after some seconds, whatever it waits for.

    Locks that other threads held stay locked in a fork; and one that hangs keeps the pipes of the tests open.
    """
    def run(*args):
        signal.alarm(seconds)
        f(*args)
    return run


def forked(f, *args):
    "A process that does something with all that is here; it ends within a time."
    p = multiprocessing.get_context('fork').Process(target=bounded(f), args=args)
    p.start()
    return p


def ended(process, seconds=250):
    "How a process ended: 0, its code, or less the signal."
    process.join(seconds)
    return process.exitcode


def python(code, *args, env=(), **options):
    "A Python of its own that runs some code, and can import the tests; the system ends it after some minutes."
    env = {**os.environ, 'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT/"tests"}', 'OMP_NUM_THREADS': '1', **dict(env)}
    return subprocess.Popen([sys.executable, '-c', f'import signal; signal.alarm(250)\n{code}', *map(str, args)],
                            stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True, cwd=ROOT, env=env, **options)


def take(n, *args, **options):
    "The first batches of a stream, which is closed again."
    it = batches(*args, **options)
    try: return list(itertools.islice(it, n))
    finally: it.close()


def right_or_refused(path, w, h):
    "Is a damaged set of pictures of one size read? What is read holds together; else there is one line, no other word."
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', category=UserWarning, message=LEFT_OUT)
        try: ds = read_detection(path)
        except UserError as e:
            assert str(e).isprintable() and len(str(e)) < 1500, str(e)
            return False
    for t in ds.targets:
        b, n = t['boxes'], len(t['boxes'])
        assert (b >= 0).all() and (b <= torch.tensor([w, h, w, h])).all() and (b[:, 2:] > b[:, :2]).all()
        assert all(1 <= l <= len(ds.classes) for l in t['labels'].tolist()) and type(t['image_id']) is int
        assert all(len(t[k]) == n for k in ('labels', 'difficult', 'iscrowd') if k in t)
    return True


class Call:
    "Calls `f(*arguments)` in whoever unpickles it."
    def __init__(self, f, *arguments): self.call = f, arguments
    def __reduce__(self): return self.call
