"Arms side by side: the same rows and weights as one after the other, shared phases trained once, errors in one line."
import json
import shutil
import subprocess
import sys

import pytest
import torch

from helpers import lasting
from synthdet.core import refused
from synthdet.paths import hash_file
from synthdet.files import read_jsonl
from synthdet.evidence import jobs
from synthdet.evidence.arm import make_arms
from synthdet.evidence.phases import load

TINY = 'n_real=4 steps=2 pretrain_steps=2 eval_every=2 batch_size=2 model.image_size=64 n_fake=4'




@pytest.mark.slow
def test_side_by_side_equals_one_after_the_other(root, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, 'cores', lambda: 2) # one thread each
    before, _ = torch.get_num_threads(), torch.set_num_threads(1)
    # the second pretraining is the first one's: made once, by whoever comes first
    words = f'domain=folder root={root} {TINY}'
    arms, told = [*make_arms('scratch,pretrain', words), *make_arms('pretrain_only', words)], []
    loaded = load(arms[0])
    try: one = jobs.run_all(arms, tmp_path/'one', loaded=loaded)
    finally: torch.set_num_threads(before)
    two = jobs.run_all(arms, tmp_path/'two', jobs=3, loaded=loaded, tell=told.append)
    assert [lasting(r) for r in one] == [lasting(r) for r in two] and [r['arm'] for r in two] == [a.arm for a in arms]
    assert sorted(r['arm'] for r in told) == sorted(r['arm'] for r in two)
    for a, b in zip(one, two):
        assert hash_file(tmp_path/'one'/a['weights_file']) == hash_file(tmp_path/'two'/b['weights_file'])
    names = lambda out: sorted(p.name for p in (tmp_path/out/'artefacts').iterdir())
    assert names('one') == names('two') and len(names('two')) == 3
    assert len(read_jsonl(tmp_path/'two'/'results.jsonl')) == 3


@pytest.mark.slow
def test_an_error_is_one_line_and_stops_the_others(root, tmp_path, monkeypatch):
    words = f'domain=folder root={root} {TINY}'
    long, = make_arms('scratch_long', words.replace('pretrain_steps=2', 'pretrain_steps=100000'))
    wrong, = make_arms('scratch', words.replace('n_real=4', 'n_real=2000'))
    monkeypatch.setattr(jobs, 'ready', lambda *_, **__: None)     # what cannot be known before
    told = refused(jobs.run_all, [long, wrong], tmp_path, jobs=2)
    assert told.startswith('scratch: n_real=2000: the training set holds 8')
    assert read_jsonl(tmp_path/'results.jsonl') == []


def test_things_that_cannot_travel_are_told(root, tmp_path, monkeypatch):
    arms = make_arms('scratch,scratch_long', f'domain=folder root={root} {TINY}')
    assert 'jobs=2: what was handed over cannot go to another process' in refused(
        jobs.run_all, arms, tmp_path, jobs=2, detector=lambda n: None)
    loaded = load(arms[0], detector=lambda n: None)
    assert 'jobs=2: what was handed over cannot go' in refused(jobs.run_all, arms, tmp_path, jobs=2, loaded=loaded)
    mine = type('Mine', (), dict(__module__='__main__', content='mine'))
    monkeypatch.setattr(sys.modules['__main__'], 'Mine', mine, raising=False)
    assert 'it is defined in a notebook or script' in refused(jobs.run_all, arms, tmp_path, jobs=2, objects=mine())


def test_how_many_arms_at_a_time(monkeypatch):
    monkeypatch.setattr(jobs, 'cores', lambda: 6)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert [jobs.usual_jobs(n) for n in (0, 1, 3, 60)] == [1, 1, 3, 6]
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert jobs.usual_jobs(60) == 1


def test_one_job_is_this_process(tmp_path, monkeypatch):
    seen, told = [], []
    monkeypatch.setattr(jobs, 'run', lambda arm, out, results, **more: seen.append((arm, more)) or dict(arm=arm))
    monkeypatch.setattr(jobs, 'ready', lambda arm, **_: None)
    assert jobs.run_all(['a', 'b'], tmp_path, jobs=1, loaded=7, tell=told.append, workers=2) == told
    assert seen == [(a, dict(loaded=7, workers=2)) for a in 'ab']


def test_a_killed_process_is_told(monkeypatch):
    killed = [sys.executable, '-c', 'import os, signal; os.kill(os.getpid(), signal.SIGKILL)']
    start = lambda threads: subprocess.Popen(killed, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    monkeypatch.setattr(jobs, '_start', start)
    assert ': its process ended with -9; free some memory, or choose fewer jobs' in refused(
        jobs.run_all, make_arms('scratch,scratch_long', TINY), jobs=2)


@pytest.mark.parametrize('wrong, says', [
    ('n_real=99', 'n_real=99: the training set holds 8 images'), ('root={noback}', 'no such folder'),
    ('model.weights=imagenet', "no ImageNet weights for 'resnet_small'"),
    ('root={notrain}', 'has no train set'), ('root={noboxes}', 'hold no box, and a checkpoint is chosen by them'),
    ('masks.gate.min_score=1', 'every mask of butterfly was rejected')])
def test_what_can_be_known_is_said_before_anything_is_trained(root, tmp_path, wrong, says, monkeypatch):
    "The last arm was found to lack something when the others had been trained."
    for name, lost in dict(noback='backgrounds', notrain='detection/train', noboxes='').items():
        to = shutil.copytree(root, tmp_path/name)
        if lost: shutil.rmtree(to/lost) if (to/lost).is_dir() else (to/f'{lost}.json').unlink()
    for file in (tmp_path/'noboxes'/'detection').glob('**/val*/*.json'):
        file.write_text(json.dumps({**json.loads(file.read_text()), 'annotations': []}))
    words = {w.partition('=')[0]: w for w in f'root={root} domain=folder {TINY}'.split()}
    words.pop(wrong.partition('=')[0], None)
    wrong = wrong.format(**{d: tmp_path/d for d in ('noback', 'notrain', 'noboxes')})
    arms = make_arms('scratch,pretrain', ' '.join([*words.values(), wrong]))
    monkeypatch.setattr(jobs, 'run', lambda *_, **__: pytest.fail('it was trained'))
    told = refused(jobs.run_all, arms, tmp_path/'out', jobs=1, loaded=load(arms[0]))
    assert says in told and not told.startswith(('scratch', 'pretrain'))
