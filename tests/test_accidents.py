"Accidents: two at once, kills at any moment, disks that fill up, names that are no files. Nothing is lost or doubled."
import errno
import os
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from helpers import forked, lasting, python
from synthdet import paths
from synthdet.core import refused
from synthdet.paths import alone, append_jsonl, tidy, writable, write_atomic
from synthdet.data.domains import load_domain, write_domain
from synthdet.evidence.arm import make_arms
from synthdet.evidence.phases import run
from synthdet.files import read_jsonl

TINY = 'domain=folder root={} n_real=4 steps={} pretrain_steps=4 eval_every=2 batch_size=2 model.image_size=64 n_fake=4'


def tree(folder): return {str(p.relative_to(folder)) for p in Path(folder).rglob('*')}


# files

WRITERS = dict(write_atomic=lambda p: write_atomic(p, "new"), writable=writable,
               append_jsonl=lambda p: append_jsonl(p, {}))


@pytest.fixture
def odd(tmp_path):
    "Names that are no files: a pipe, a socket, a folder, a link to itself."
    os.mkfifo(tmp_path/'pipe')
    (tmp_path/'folder').mkdir()
    (tmp_path/'loop').symlink_to(tmp_path/'loop')
    (tmp_path/'to_pipe').symlink_to(tmp_path/'pipe')
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path/'socket'))
        yield [*(tmp_path/k for k in ('pipe', 'folder', 'loop', 'to_pipe', 'socket')), '/dev/null', '/dev/full', 'a\0b']


@pytest.mark.parametrize('write', WRITERS.values(), ids=WRITERS)
def test_what_is_no_file_is_refused_and_left_alone(write, odd, tmp_path):
    before = tree(tmp_path)
    for path in odd: assert 'cannot write' in (line := refused(write, path)) or 'NUL' in line
    assert tree(tmp_path) == before


@pytest.mark.parametrize('write', WRITERS.values(), ids=WRITERS)
def test_names_of_any_allowed_length_can_be_written(write, tmp_path):
    for name in ('a'*255, 'é'*127, '文'*85): write(tmp_path/name)
    assert 'too long' in refused(write, tmp_path/('a'*256))


def test_a_link_stays_a_link_and_permissions_stay(tmp_path):
    for name in ('there', 'new'): (tmp_path/f'{name}.link').symlink_to(Path('below')/name)
    (tmp_path/'below').mkdir()
    (tmp_path/'below/there').write_text('old')
    (tmp_path/'below/there').chmod(0o604)
    for name in ('there', 'new'):
        write_atomic(tmp_path/f'{name}.link', 'text')
        assert (tmp_path/f'{name}.link').is_symlink() and (tmp_path/'below'/name).read_text() == 'text'
    assert (tmp_path/'below/there').stat().st_mode & 0o777 == 0o604
    old = os.umask(0o027)
    try: assert write_atomic(tmp_path/'fresh', 'x').stat().st_mode & 0o777 == 0o640
    finally: os.umask(old)


def test_a_read_only_file_is_told_before_hours_are_spent(tmp_path, monkeypatch):
    write_atomic(tmp_path/'rows.jsonl', '').chmod(0o444)
    monkeypatch.setattr(os, 'access', lambda path, mode: False) # root may write everything
    for write in WRITERS.values(): assert 'it is read-only; choose another' in refused(write, tmp_path/'rows.jsonl')


def test_threads_that_write_one_file_do_not_meet(tmp_path):
    failed = []
    def write(k):
        try:
            for _ in range(60): write_atomic(tmp_path/'file', bytes([k])*200_000)
        except BaseException as e: failed.append(e)
    threads = [threading.Thread(target=write, args=(k,)) for k in range(4)]
    for t in threads: t.start()
    for t in threads: t.join(60)
    assert not failed and len(set((tmp_path/'file').read_bytes())) == 1 and tree(tmp_path) == {'file'}


def test_only_what_the_dead_left_is_tidied_away(tmp_path):
    write = 'import sys, time\nfrom synthdet.paths import write_atomic\n' \
            'write_atomic(sys.argv[1], lambda tmp: tmp.write_text("x") and print(flush=True) or time.sleep(60))'
    living, dead = python(write, tmp_path/'a'), python(write, tmp_path/'b')
    for p in (living, dead): p.stdout.readline()
    dead.kill()
    dead.wait(60)
    (tmp_path/'.yours.tmp').touch()
    assert len(tree(tmp_path)) == 3
    tidy(tmp_path)
    left = tree(tmp_path)
    living.kill()
    living.wait(60)
    assert len(left) == 2 and '.yours.tmp' in left and any(p.startswith('.a.') for p in left)
    tidy(tmp_path, 'b')
    assert tree(tmp_path) == left
    tidy(tmp_path, 'a')
    assert tree(tmp_path) == {'.yours.tmp'}


def test_a_disk_without_locks_is_a_warning_and_works(tmp_path, monkeypatch):
    def no(f, how): raise OSError(errno.ENOLCK, 'No locks available')
    for name in ('flock', 'lockf'): monkeypatch.setattr(paths.fcntl, name, no)
    with pytest.warns(UserWarning, match='a disk without locks.*let no second process work there'):
        append_jsonl(tmp_path/'rows.jsonl', dict(i=1))
    with pytest.warns(UserWarning, match='a disk without locks'), alone(tmp_path/'.lock', 'works'): pass
    write_atomic(tmp_path/'a', 'x')
    (tmp_path/'.a.1f.tmp').touch()
    tidy(tmp_path) # nobody can tell whether it is being written
    assert tree(tmp_path) == {'rows.jsonl', 'a', '.a.1f.tmp'}


# two at once

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "A small domain in a folder."
    root = tmp_path_factory.mktemp('world')/'flies'
    return write_domain(load_domain('butterflies', n_class_images=12, n_backgrounds=3), root, n_labelled=8)


def arm(world, steps=4, kind='pretrain'): return make_arms(kind, TINY.format(world, steps))[0]


RUN = '''
import sys, torch
from synthdet.evidence.phases import run
from test_accidents import arm
torch.set_num_threads(1)
print(flush=True)
sys.stdin.readline()
run(arm(sys.argv[1], int(sys.argv[2]), sys.argv[5]), sys.argv[3], sys.argv[4])
'''


def runs(*asked):
    "Processes that run arms at the same time: (world, steps, out, results, kind) of each; their standard error."
    started = [python(RUN, *a) for a in asked]
    for p in started: p.stdout.readline() # all have imported what they need
    for p in started: print(file=p.stdin, flush=True)
    said = [p.communicate(timeout=300)[1] for p in started]
    assert [p.returncode for p in started] == [0]*len(started), said
    return said


@pytest.mark.slow
def test_three_processes_on_one_arm_give_one_row(world, tmp_path, one_thread):
    results = tmp_path/'rows.jsonl'
    said = runs(*((world, 20, tmp_path/out, results, 'pretrain') for out in ('a', 'a', 'b')))
    row, = read_jsonl(results)
    assert lasting(row) == lasting(run(arm(world, 20), tmp_path/'alone'))
    assert [step for step, _ in row['curve']] == [-2, 0, *range(2, 21, 2)]
    assert sum((tmp_path/out/'artefacts').exists() for out in 'ab') == 1, 'one has trained, in its own folder'
    assert sum('waiting for another process that runs the same arm (process ' in s for s in said) >= 1
    assert not [p for p in tree(tmp_path) if '.tmp' in p or '.lock' in p]


@pytest.mark.slow
def test_arms_that_share_a_pretraining_train_it_once(world, tmp_path, one_thread):
    said = runs(*((world, 20, tmp_path/'out', tmp_path/'rows.jsonl', kind) for kind in ('pretrain', 'pretrain_only')))
    assert len(read_jsonl(tmp_path/'rows.jsonl')) == 2 and len([*(tmp_path/'out/artefacts').iterdir()]) == 2
    assert 'waiting for another process that trains in the same folder' in ''.join(said)


@pytest.mark.slow
def test_who_is_waited_for_is_told_and_taken_over_from_when_killed(world, tmp_path, one_thread):
    out, results = tmp_path/'out', tmp_path/'rows.jsonl'
    first = python(RUN, world, 120, out, results, 'scratch')
    print(file=first.stdin, flush=True)
    while not [*out.rglob('state.pt')]:
        assert first.poll() is None
        time.sleep(.05)
    first.send_signal(signal.SIGSTOP)
    second = python(RUN, world, 120, out, results, 'scratch')
    print(file=second.stdin, flush=True)
    told = next(line for line in second.stderr if 'waiting for another' in line)
    assert f'(process {first.pid} on ' in told and '.lock' in told and first.poll() is None
    first.kill()
    first.wait(60)
    assert second.communicate(timeout=300) and second.returncode == 0
    row, = read_jsonl(results)
    assert [s for s, _ in row['curve']] == [*range(2, 121, 2)]
    assert not [p for p in tree(tmp_path) if '.tmp' in p or '.lock' in p]


# kills and full disks

def weights(out): return {str(p.relative_to(out)): p.read_bytes() for p in Path(out).rglob('*.safetensors')}


def trained(world, out):
    "In a fork: what a killed process was doing is gone with it."
    run(arm(world, 40), out)
    os._exit(0)


@pytest.mark.slow
def test_a_training_killed_at_any_moment_ends_with_the_same_weights_and_one_row(world, tmp_path, one_thread):
    g, killed = np.random.default_rng(0), 0
    start = time.monotonic()
    wanted = run(arm(world, 40), tmp_path/'whole')
    usual = time.monotonic() - start
    for turn in range(4):
        out = tmp_path/f'{turn}'
        for _ in range(4):
            p = forked(trained, world, out)
            p.join(usual*g.uniform(.02, .4))
            killed += p.is_alive()
            p.kill()
            p.join(60)
        row = run(arm(world, 40), out)
        assert lasting(row) == lasting(wanted) and len(read_jsonl(out/'results.jsonl')) == 1
        assert tree(out) == tree(tmp_path/'whole'), 'no lock, no temporary file'
        assert weights(out) == weights(tmp_path/'whole')
    assert killed >= 4


FULL = '''
import resource, sys, torch
from synthdet.core import UserError
from synthdet.evidence.phases import run
from test_accidents import arm
torch.set_num_threads(1)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try: run(arm(sys.argv[1]), sys.argv[2])
except UserError as e: sys.exit(f'refused: {e}')
'''


@pytest.mark.slow
@pytest.mark.parametrize('limit', [50, 3_000_000]) # bytes: nothing fits; weights do (1.9 MB), a state (5.7 MB) does not
def test_a_disk_that_is_full_in_the_middle_of_a_training_is_one_line_and_it_goes_on(world, tmp_path, limit, one_thread):
    p = python(FULL, world, tmp_path/'out', limit)
    err = p.communicate(timeout=200)[1]
    lines = [l for l in err.splitlines() if 'refused: ' in l]
    assert p.returncode == 1 and len(lines) == 1 and 'cannot write' in lines[0] and 'free some space' in lines[0], err
    assert not [f for f in tree(tmp_path) if '.tmp' in f or '.lock' in f]
    assert lasting(run(arm(world), tmp_path/'out')) == lasting(run(arm(world), tmp_path/'whole'))
    assert weights(tmp_path/'out') == weights(tmp_path/'whole')
