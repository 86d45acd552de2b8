"What a user does with a study: run it, stop it, kill it, run it on a cluster, keep what it made and throw it away."
import gc
import json
import math
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import synthdet
from planted import row as planted_row
from safetensors.torch import save_file
from synthdet import cli
from synthdet.core import refused, UserError
from synthdet.data.domains import load_domain, write_domain
from synthdet.detection.detectors import detector
from synthdet.evidence import artefacts, cluster, jobs, runner
from synthdet.evidence.arm import Arm, ARMS, make_arms, resolved
from synthdet.evidence.claims import CLAIMS
from synthdet.evidence.parts import begun, parts
from synthdet.evidence.rows import named_row, read_rows, run_id, write_row
from synthdet.evidence.studies import STUDIES
from synthdet.evidence.identity import arm_of, phase_keys, run_key, total_steps
from synthdet.evidence.phases import run
from synthdet.evidence.runner import in_turn, placed, run_again
from synthdet.evidence.study import part, Study
from synthdet.machine import run_info
from synthdet.settings import override, to_row

ROOT = Path(__file__).resolve().parents[1]
TINY = ('domain=folder root=world backbone=mobilenetv1_025 model.image_size=64 batch_size=2 steps={0} '
        'pretrain_steps={0} eval_every=5 n_fake=4')
TIMED = ('seconds', 'threads', 'commit', 'digest', 'memory_mb')
# the commands of the package on some cores, with one study of their own: TINY arms, sys.argv[1] steps each
CODE = '''
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(os.environ['CORES'])])
from synthdet import cli
from synthdet.evidence import artefacts
from synthdet.evidence.studies import STUDIES
from tests.test_study import tiny
if __name__ == '__main__':
    STUDIES.clear()
    artefacts.project = lambda: None # what the checkout's own results need is not asked
    STUDIES['tiny'] = tiny(int(sys.argv[1]), seeds=(0,))
    getattr(cli, sys.argv[2])(sys.argv[3:])
'''


def tiny(steps, seeds=(0, 1)):
    over = dict(arm=['scratch', 'pretrain', 'pretrain_only'], n_real=[2])
    return Study('tiny', override(Arm(), TINY.format(steps)), over, seeds)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "A folder of data that holds the one domain that the study names, and the program that runs the study."
    folder = tmp_path_factory.mktemp('data')
    write_domain(load_domain('butterflies', n_class_images=12, n_backgrounds=3), folder/'world', n_labelled=8)
    (folder/'program.py').write_text(CODE)
    return folder


def started(data, *words, steps=10, cores=2, **how):
    "A command in a session of its own, so that whatever it leaves behind can be found."
    env = {**os.environ, 'PYTHONPATH': f"{ROOT}:{ROOT/'tests'}:{os.environ.get('PYTHONPATH', '')}", 'CORES': str(cores),
           'OMP_NUM_THREADS': '1'}
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | how
    return subprocess.Popen([sys.executable, data/'program.py', str(steps), *map(str, words)], text=True, env=env,
                            cwd=data, start_new_session=True, **how)


def done(data, *words, **how):
    "What a command says on standard output; it has to end well."
    process = started(data, *words, **how)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


def at(data, out, *more): return ('study', 'tiny', '--data', data, '--out', out, '--results', out/'rows.jsonl', *more)


def plain(path):
    "Rows in one order, without what two runs of the same differ in."
    rows = [{k: v for k, v in row.items() if k not in TIMED} for row in read_rows(path)]
    return sorted(json.loads(json.dumps(rows)), key=lambda row: row['id'])


def descendants(*pids):
    "The processes below some, and they themselves, that are alive."
    parents = {}
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try: text = stat.read_text()
        except OSError: continue # it has just ended
        state, parent = text.rpartition(')')[2].split()[:2]
        if state != 'Z': parents[int(stat.parent.name)] = int(parent)
    found = {p for p in pids if p in parents}
    while more := {p for p, parent in parents.items() if parent in found} - found: found |= more
    return found


def gone(pids, seconds=20):
    "Do these processes end by themselves?"
    end = time.monotonic() + seconds
    while descendants(*pids) & set(pids):
        if time.monotonic() > end: return False
        time.sleep(.1)
    return True


def until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'it never happens'
        time.sleep(.05)


# who is next

class Slots:
    "Futures that end when somebody says so, as a study that is told of them goes on."
    def __init__(self, *order): self.order, self.running, self.begun = list(order), {}, []

    def submit(self, arm):
        self.begun.append(arm)
        self.running[arm] = Future()
        return self.running[arm]

    def wait(self, running, return_when):
        "In the place of `concurrent.futures.wait`: the next of the order ends."
        arm = next(a for a in self.order if a in self.running)
        self.running.pop(arm).set_result(dict(arm=arm.arm))
        return type('Done', (), dict(done=[f for f in running if f.done()]))


def test_what_shares_a_pretraining_in_progress_waits_while_there_is_something_else(monkeypatch):
    base = override(Arm(), TINY.format(4))
    only, one, two = (override(base, w) for w in ('arm=pretrain_only', 'n_real=1', 'n_real=2'))
    scratch, other = override(base, 'arm=scratch'), override(base, 'seed=1 arm=pretrain_only')
    slots, told = Slots(one, scratch, other, two, only), []
    monkeypatch.setattr(runner, 'wait', slots.wait)
    ended = in_turn([scratch, only, one, two, other], slots.submit, 2, lambda *state: told.append(state))
    # the longest first; then what shares nothing with it, though another is longer; after the pretraining, anything
    assert slots.begun == [one, scratch, two, only, other]
    assert {run_key(a) for a, _ in ended} == {run_key(a) for a in (scratch, only, one, two, other)}
    assert all(len(running) <= 2 for _, running, _ in told) and told[-1][1:] == ([], [])


def test_where_all_share_one_pretraining_nobody_waits_for_a_lock(monkeypatch):
    base = override(Arm(), TINY.format(4))
    arms = [override(base, f'n_real={k}') for k in range(1, 5)]
    slots = Slots(*arms)
    monkeypatch.setattr(runner, 'wait', slots.wait)
    most = []
    in_turn(arms, slots.submit, 4, lambda ended, running, todo: most.append(len(running)))
    assert slots.begun[0] == arms[0] and len(slots.begun) == 4
    assert most == [0, 2, 1, 0], 'after the pretraining all others run beside each other'


def test_an_arm_that_fails_is_told_at_the_end_and_the_others_run(tmp_path, data, monkeypatch):
    class Here:
        def __init__(self, jobs, threads=0): pass
        def __enter__(self): return self
        def __exit__(self, *_): pass
        def submit(self, arm, **_):
            future = Future()
            if arm.seed: future.set_exception(ValueError('no luck'))
            else: future.set_result(write_row(tmp_path/'rows.jsonl', dict(id=arm.arm)))
            return future
    monkeypatch.setattr('synthdet.evidence.jobs.Processes', Here)
    monkeypatch.setattr(runner, 'plan', lambda *_: runner.Plan(6, 1, 1, 1))
    told = refused(tiny(4).run, tmp_path, tmp_path/'rows.jsonl', data=data, jobs=2, tell=lambda _: None)
    assert told == 'study tiny: 3 runs failed, the first: no luck' and len(read_rows(tmp_path/'rows.jsonl')) == 3


def test_what_arms_share_is_not_left_twice():
    first, after, other = make_arms('pretrain,pretrain_only,scratch', steps=10, pretrain_steps=30)
    assert runner._left([first], [after]) == 0 and runner._left([first], [after, other]) == 10/40


def test_a_client_tries_a_run_again_three_times_unless_told_otherwise():
    class Client:
        def get_executor(self, **how): asked.append(how); return ThreadPoolExecutor(1)
    asked = []
    for how in ({}, dict(retries=0, resources=dict(GPU=1))):
        with runner._beside(1, 1, Client(), how): pass
    assert asked == [dict(pure=False, retries=3), dict(pure=False, retries=0, resources=dict(GPU=1))]


def test_parts_of_a_study():
    s = tiny(4)
    assert [c.at['seed'] for c in part(s, ['seed=1', 'arm=scratch']).cells()] == [1]
    assert len(part(s, ['arm=scratch', 'arm=pretrain']).cells()) == 4 and part(s, []) is s
    assert 'write axis=label' in refused(part, s, ['seed'])
    assert "axis of study tiny 'sead' is unknown; choose from seed, arm, n_real" in refused(part, s, ['sead=1'])
    assert "arm of study tiny 'scrtch' is unknown; choose from scratch, pretrain" in refused(part, s, ['arm=scrtch'])
    assert 'axis of study tiny' in refused(s.only, sead=1)


def test_whole_parts_are_taken_out_of_rows_of_any_runs(tmp_path, monkeypatch, capsys):
    "Also with rows that another study has; what is not whole stays where it is, and nothing is taken twice."
    monkeypatch.setattr(artefacts, 'usual_results', lambda name, out: tmp_path/f'{name}.jsonl')
    cells = {(c.at['domain'], c.at['n_real'], run_key(c.arm)): c
             for c in STUDIES['labels_curve'].cells()}
    mixed = [planted_row(c) for (domain, n, _), c in cells.items()
             if domain == 'butterflies' or n == 20 and c.at['seed'] == 0]
    older = [{k: v for k, v in r.items() if k != 'artefacts'} if i % 2 else r for i, r in enumerate(mixed)]
    for r in {r['id']: r for r in older}.values(): write_row(tmp_path/'mixed.jsonl', r)
    for words in (['--dry'], [], []):
        cli.study(['labels_curve', '--rows', str(tmp_path/'mixed.jsonl'), *words])
        said = capsys.readouterr().out
        if words: assert '50 rows would be added' in said and not (tmp_path/'labels_curve.jsonl').exists()
    assert 'added' not in said and 'labels_curve: kangaroos, 20 labels: 4 of 12 runs, not taken' in said
    rows, rest = begun(STUDIES['labels_curve'], tmp_path/'labels_curve.jsonl')
    assert set(rows.domain) == {'butterflies'} and len(rest) == len(parts(STUDIES['labels_curve'])) - 3
    assert len(read_rows(tmp_path/'labels_curve.jsonl')) == 50
    naive = [planted_row(c) for c in STUDIES['naive_paste'].only(domain='butterflies', masks='frame').cells()]
    for r in naive: write_row(tmp_path/'frames.jsonl', r)
    cli.study(['--rows', str(tmp_path/'frames.jsonl')])
    assert '20 rows are added to' in capsys.readouterr().out, 'ten of them are rows of labels_curve'
    with pytest.raises(SystemExit): cli.study(['--rows', str(tmp_path/'frames.jsonl'), '--only', 'seed=0'])


# what is known, and what others have

class Timed:
    "In the place of `Processes`: ten steps of .2 s after a start of 60 s, validations of 5 s; a run of 100 s."
    jobs = None
    def __init__(self, jobs): Timed.jobs = jobs
    def __enter__(self): return self
    def __exit__(self, *_): pass

    def submit(self, arm, out):
        every, future = arm.schedule.eval_every, Future()
        (Path(out)/'artefacts'/'a').mkdir(parents=True)
        at = [60 + .2*k + 5*(k//every) for k in range(arm.steps)]
        rows = [dict(step=k + 1, seconds=s) for k, s in enumerate(at)]
        (Path(out)/'artefacts'/'a'/'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
        future.set_result(dict(seconds=100., memory_mb=800))
        return future


def test_a_start_is_no_validation(monkeypatch):
    monkeypatch.setattr('synthdet.evidence.jobs.Processes', Timed)
    cell, = tiny(1000).only(arm='scratch', seed=0).cells()
    found = runner.plan([cell], [], jobs=3)
    assert Timed.jobs == 3, 'with as many threads as each run will have'
    assert found.steps == 1000 and found.memory == 800 and found.minutes == pytest.approx(1000*(.2 + 5/5)/60)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    "Results files of all studies, which are planted; trying a step is an error."
    monkeypatch.setattr(artefacts, 'usual_results', lambda name, out: tmp_path/f'{name}.jsonl')
    monkeypatch.setattr('synthdet.evidence.jobs.Processes', None)
    info = run_info()
    def plant(name, cells, **more):
        made = {k: info[k] for k in ('torch', 'device')} | dict(seconds=30, memory_mb=512) | more
        for cell in cells: write_row(tmp_path/f'{name}.jsonl', planted_row(cell, **made))
    return plant


def on_flies(name, **at): return STUDIES[name].only(domain='butterflies', **at)


def test_a_study_knows_what_others_have(checkout, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    curve, words = partial(on_flies, 'labels_curve'), ['naive_paste', '--only', 'domain=butterflies', '--out', 'out']
    checkout('naive_paste', on_flies('naive_paste', seed=0, n_real=25, masks='frame').cells())
    checkout('labels_curve', curve(n_real=25, arm=['scratch', 'pretrain'], seed=[0, 1, 2]).cells())
    checkout('transfer', curve(n_real=100, arm='pretrain', seed=1).cells(), versions=dict(data=0))
    checkout('reuse', curve(n_real=100, arm='pretrain', seed=2).cells(), torch='1')
    checkout('wider', curve(n_real=100, arm='scratch').cells(), device='another', seconds=9e5)
    cli.study([*words, '--dry', '--jobs', '1'])
    *_, copied, cost = capsys.readouterr().out.splitlines()
    assert copied == 'naive_paste: 3 of 19 missing runs are rows of other studies, copied and not trained'
    lacking = on_flies('naive_paste').missing([r for f in ('naive_paste', 'labels_curve') for r in
                                               read_rows(tmp_path/f'{f}.jsonl')])
    parts = {k: p.steps for c in lacking for k, p in zip(phase_keys(c.arm), ARMS[c.arm.arm](c.arm))}
    scratch, = {total_steps(c.arm) for c in curve(n_real=25, arm='scratch').cells()}
    minutes = 30/scratch*sum(parts.values())/60                         # of scratch rows, which another study has
    assert cost.startswith(f'naive_paste: 16 runs, {sum(parts.values()):,} steps, about {minutes:.0f} minutes with 1 ')
    assert len(read_rows(tmp_path/'naive_paste.jsonl')) == 1, 'only looked at'
    cli.study([*words, '--dry', '--results', 'mine.jsonl'])
    said = capsys.readouterr().out
    assert 'copied' not in said and '20 runs' in said, 'whoever names a file runs all'


def test_rows_of_others_are_copied_for_what_is_asked_for_alone(checkout, tmp_path):
    mine, path = on_flies('naive_paste', masks='grabcut', n_real=25, seed=[0, 1]), tmp_path/'own.jsonl'
    checkout('own', mine.only(seed=0).cells())
    checkout('labels_curve', on_flies('labels_curve').cells())
    for _ in range(2):
        told, also = [], [tmp_path/'labels_curve.jsonl']
        assert len(mine.run(tmp_path/'out', path, also=also, tell=told.append)) == len(read_rows(path)) == 2
    assert not told and read_rows(path)[-1] in read_rows(also[0]), 'once, and as it is there'


def test_only_rows_that_would_stand_beside_those_made_here_are_taken(checkout, tmp_path):
    study = on_flies('naive_paste', masks='grabcut', n_real=25, seed=[0, 1])
    def left(*names):
        also = [tmp_path/f'{name}.jsonl' for name in names]
        return [*map(len, runner.prepared(study, tmp_path/'out', tmp_path/'no.jsonl', '', also))]
    here = [c._replace(arm=resolved(c.arm)) for c in study.cells()]      # in the precision of this machine
    checkout('right', here)
    checkout('device', here, device='another')
    checkout('precision', [c._replace(arm=override(c.arm, 'precision=fp16')) for c in here])
    assert left() == left('device') == left('precision') == [2, 2, 0]
    assert left('right') == left('right', 'device') == [0, 0, 2]
    checkout('of_other_data', here[:1], id='pretrain-of-other-data')
    assert left('right', 'of_other_data') == [1, 1, 1], 'nobody knows which of the two is meant'


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_a_study_goes_on_in_the_precision_of_its_rows_on_any_machine(precision, checkout, tmp_path, monkeypatch):
    mine, path = on_flies('naive_paste', masks='grabcut', n_real=25, seed=[0, 1, 2]), tmp_path/'own.jsonl'
    made = [c._replace(arm=override(c.arm, dict(precision=precision))) for c in mine.cells()]
    other = 'fp32' if precision == 'bf16' else 'bf16'
    monkeypatch.setattr('synthdet.precision.native_bf16', lambda kind: other == 'bf16')
    checkout('labels_curve', made[:2])
    def left(also):
        lacking, arms, there = runner.prepared(mine, tmp_path/'out', path, '', also)
        assert {c.arm.schedule.precision for c in lacking} == {a.schedule.precision for a in arms}
        return len(there), [a.schedule.precision for a in arms]
    assert left([]) == (0, ['auto']*3), 'nothing is there: the machine chooses'
    assert left([tmp_path/'labels_curve.jsonl']) == (2, [precision]), 'that of what is copied'
    checkout('own', made[:1])
    assert left([]) == (0, [precision]*2), 'that of what is there'


@pytest.mark.parametrize('made, wanted', [([], 0), ([2], 2), ([2, 3], 0)])
def test_a_study_goes_on_with_the_threads_of_its_rows(made, wanted, checkout, tmp_path, monkeypatch):
    mine, given = on_flies('naive_paste', masks='grabcut', n_real=25, seed=[0, 1, 2]), []
    for seed, threads in enumerate(made): checkout('own', mine.only(seed=seed).cells(), threads=threads)
    def processes(jobs, threads): raise UserError(given.append(threads))
    monkeypatch.setattr('synthdet.evidence.jobs.Processes', processes)
    monkeypatch.setattr(runner, 'plan', lambda *_: runner.Plan(0, 0, 0, 0))
    with pytest.raises(UserError): mine.run(tmp_path/'out', tmp_path/'own.jsonl', tell=str)
    assert given == [wanted]


def test_rows_of_other_threads_are_not_copied(checkout, tmp_path):
    mine, also = on_flies('naive_paste', masks='grabcut', n_real=25, seed=[0, 1]), [tmp_path/'labels_curve.jsonl']
    copied = lambda: len(runner.prepared(mine, tmp_path/'out', tmp_path/'own.jsonl', '', also)[2])
    here = [c._replace(arm=resolved(c.arm)) for c in mine.cells()]
    checkout('labels_curve', here, threads=2)
    assert copied() == 2, 'nothing is there that differs'
    checkout('own', here[:1], threads=1)
    assert copied() == 0


def test_each_process_has_the_threads_that_are_asked_for_or_its_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(jobs, 'cores', lambda: 6)
    assert jobs.Processes(2, 1).threads == 1 and jobs.Processes(2).threads == 3 and jobs.Processes(9).threads == 1


@pytest.mark.parametrize('what, other', [('torch', '1.0'), ('device', 'another'), ('versions', dict(data=0))])
def test_what_could_not_stand_beside_the_rows_is_refused_before_it_is_run(what, other, checkout, tmp_path):
    mine = on_flies('naive_paste', masks='grabcut', n_real=25, seed=[0, 1])
    checkout('own', mine.only(seed=0).cells(), **{what: other})
    with pytest.raises(UserError, match=f'was made with {what} .* choose another results file'):
        mine.run(tmp_path/'out', tmp_path/'own.jsonl', tell=str)


def test_the_part_that_can_be_run_is_named_on_the_axes_that_part_it(tmp_path, capsys, monkeypatch):
    starts = ['random', 'imagenet', 'synthdet', 'coco', 'coco + synthdet']
    monkeypatch.setitem(STUDIES, 'transfer', STUDIES['transfer'].only(domain=['birds', 'cars'], start=starts))
    def hint(*there):
        for name in there: (tmp_path/name).mkdir(parents=True)
        words = ['--data', tmp_path, '--out', tmp_path/'out', '--results', tmp_path/'none.jsonl']
        with pytest.raises(SystemExit): cli.study(['transfer', *map(str, words)])
        words = shlex.split(capsys.readouterr().err.partition(', or --only ')[2])
        if words: runner.prepared(part(STUDIES['transfer'], words), tmp_path/'out', tmp_path/'none.jsonl', tmp_path)
        return words
    weights, coco = (tmp_path/f'weights/{name}.safetensors' for name in
                     ('mobilenetv1_100_imagenet', 'ssd_mobilenetv1_100_coco'))
    assert hint() == []
    assert hint('data/birds/class_images/class_images_free', 'data/birds/class_images_free', 'weights') == [
        'domain=birds', 'start=random']
    weights.write_bytes(b'x')
    assert hint() == ['domain=birds', 'start=random,imagenet,synthdet']
    assert hint('data/cars/class_images') == ['start=random,imagenet,synthdet']
    weights.rename(coco)
    assert hint() == ['start=random,coco,coco + synthdet']


class Here:
    "In the place of `Processes`: this one."
    def __init__(self, jobs, threads=0): pass
    def __enter__(self): return self
    def __exit__(self, *_): pass

    def submit(self, arm, out, results=None):
        future = Future()
        future.set_result(run_again(arm, out, results))
        return future


def test_the_study_of_the_readme(data, tmp_path, monkeypatch):
    "In small: on another domain, with two labels."
    blocks = re.findall(r'```python\n(.*?)```', (ROOT/'README.md').read_text(), re.S)
    code, = (b for b in blocks if 'synthdet.Study' in b)
    for whole, small in {'domain=butterflies': TINY.format(2), '[25]': '[2]', 'runs/mine': str(tmp_path/'out')}.items():
        assert code.count(whole) == 1
        code = code.replace(whole, small)
    monkeypatch.chdir(data)
    monkeypatch.setattr('synthdet.evidence.jobs.Processes', Here)
    space = dict(synthdet=synthdet)
    exec(code, space)
    rows = space['rows']
    assert [*rows.arm] == ['scratch']*2 + ['pretrain']*2 and [*rows.seed] == [0, 1]*2
    assert not space['mine'].missing(read_rows(tmp_path/'out/results.jsonl'))


# what is no evidence

SOME = STUDIES['labels_curve'].only(domain='butterflies', arm=['pretrain', 'pretrain_only'], n_real=25)


def renamed(row, **changes):
    "A row with changes, and the id that fits them, as somebody would plant it who knows how ids are made."
    row = row | changes
    name = run_id(row['arm'], row['artefacts'][-1], row['data_test'], 1)
    return row | dict(id=name, weights_file=f'{name}.safetensors')


def posing(a, b): return renamed(b, artefacts=a['artefacts']) | {k: a[k] for k in ('ap50', 'curve')}


def bare(row): return {k: v for k, v in row.items() if k not in ('artefacts', 'data_test')}


# what is planted in the row of seed 1, made of those of seeds 0 and 1; and the words that name it
PLANTED = {
    'the row of another seed': (lambda a, b: a | dict(settings=b['settings']),
                                '{a} (seed 0) and {a} (seed 1) have the same id'),
    'the training of another seed': (posing, '{a} (seed 0) and {a} (seed 1) have the same id'),
    'a shared pretraining': (lambda a, b: b | dict(artefacts=[*a['artefacts'], *b['artefacts']]),
                             '{a} (seed 0) and {b} (seed 1) have the same artefacts'),
    'the predictions of another seed': (lambda a, b: b | dict(predictions=a['predictions']),
                                        '{a} (seed 0) and {b} (seed 1) have the same predictions'),
    'the labels of another seed': (lambda a, b: b | dict(labels=a['labels']),
                                   '{a} (seed 0) and {b} (seed 1) have the same labels'),
    'the weights of another seed': (lambda a, b: b | dict(weights_file=a['weights_file']),
                                    'row {b}: its weights_file is {a}.safetensors, of'),
    'an id of no run': (lambda a, b: b | dict(id='mine'), 'row mine: the id is not that of a run of arm pretrain'),
    'the id of nothing': (lambda a, b: b | dict(id='pretrain-' + '0'*16, weights_file=''),
                          'row pretrain-0000000000000000: the id of its training and test images is {b}'),
    'another arm': (lambda a, b: b | dict(arm='scratch'), 'row {b}: its arm is scratch, in its settings pretrain'),
    'another domain': (lambda a, b: b | dict(domain='faces'),
                       'row {b}: its domain is faces, in its settings butterflies'),
    'more labels': (lambda a, b: b | dict(n_labels=500), 'row {b}: it saw 500 labels, in its settings 25'),
    'no score': (lambda a, b: {k: v for k, v in b.items() if k != 'ap50'},
                 'row {b}: ap50 is None, expected a number in 0..1'),
    'a score that is null': (lambda a, b: b | dict(ap50=None), 'row {b}: ap50 is None'),
    'a score that is no number': (lambda a, b: b | dict(ap50=math.nan), 'row {b}: ap50 is nan'),
    'points': (lambda a, b: b | dict(ap50=93.), 'row {b}: ap50 is 93.0, expected a number in 0..1'),
    'points of small boxes': (lambda a, b: b | dict(ap_small=-1), 'row {b}: ap_small is -1'),
    'points of a curve': (lambda a, b: b | dict(curve=[[0, .5], [50, 50.]]), 'row {b}: ap50 of step 50 is 50.0'),
    'other test images': (lambda a, b: renamed(b, data_test='0'*16),
                          '{a} and {new} of butterflies differ in data_test'),
    'other training images': (lambda a, b: b | dict(data_train='0'*16),
                              '{a} and {b} of butterflies differ in data_train'),
    'other threads': (lambda a, b: b | dict(threads=2),
                      "its rows differ in threads: 1 ({a}...), 2 ({b}...); run those of one number"),
    'a number that is text': (lambda a, b: b | dict(n_labels='25'), "row {b}: n_labels is '25', expected int"),
    'no names': (lambda a, b: b | dict(artefacts=[]), 'row {b}: artefacts is [], expected names'),
    'no digest': (lambda a, b: b | dict(ap50=.99),
                  'row {b}: it has no digest, so nobody knows whether it is what was written'),
}


@pytest.mark.parametrize('kind', PLANTED)
def test_what_is_no_evidence_is_refused_with_its_id(kind, tmp_path):
    "Also in a part of which no claim speaks; the same rows without it are taken."
    change, words = PLANTED[kind]
    rows = [planted_row(c, threads=1) for c in SOME.missing([])]
    k = next(i for i, r in enumerate(rows) if r['arm'] == 'pretrain' and r['settings']['seed'] == 1)
    a, b = rows[k - 1], rows[k]
    assert (a['arm'], a['settings']['seed']) == ('pretrain', 0)
    path, rows[k] = tmp_path/'rows.jsonl', (new := change(a, b))
    lines = [named_row(r) for r in rows]
    if kind == 'no digest': del lines[k]['digest']
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines)) # as somebody's own program would, with NaN
    told = refused(begun, SOME, path)
    assert words.format(a=a['id'], b=b['id'], new=new.get('id')) in told and '\n' not in told


def test_two_files_of_one_name_are_not_one_setting(tmp_path):
    "Where rows say what was in them: those of before do not."
    rows = [planted_row(cell, threads=1) for cell in SOME.missing([])]
    def found(*contents):
        path = tmp_path/f'{len([*tmp_path.iterdir()])}.jsonl'
        for row, content in zip(rows, contents + ('',)*len(rows)):
            write_row(path, row | (dict(files={'model.weights': content}) if content else {}))
        return begun(SOME, path)
    told = refused(found, 'one', 'other')
    assert f"rows {rows[0]['id']} and {rows[1]['id']} had different files as model.weights=" in told
    assert all(len(found(*same)[0]) == len(SOME.cells()) for same in (('one', 'one'), ('one',), ()))


def test_a_row_says_what_was_in_its_files(data, tmp_path):
    arm, file, rows = placed(tiny(2).cells()[0].arm, data), tmp_path/'start.safetensors', []
    for width in (0, 1):
        save_file({k: v + width for k, v in detector(arm.model, num_classes=2).state_dict().items()}, file)
        rows.append(run(override(arm, {'model.weights': str(file)}), tmp_path/str(width)))
    one, other = rows
    assert run_key(arm_of(one)) == run_key(arm_of(other)) and one['files'].keys() == other['files'].keys()
    assert one['files']['model.weights'] != other['files']['model.weights'] and 'files' not in run(arm, tmp_path/'none')


def test_what_is_evidence_is_taken(tmp_path):
    "Rows of before that do not name their trainings; arms of one seed that found the same; runs that found nothing."
    for r in [bare(planted_row(c, threads=1)) for c in SOME.missing([])]:
        seed = r['settings']['seed']
        r.update(predictions='nothing' if seed < 2 else f'seed {seed}', ap50=0 if seed < 2 else .5,
                 ap_large=None, val_ap50=None)
        write_row(tmp_path/'rows.jsonl', r)
    assert len(begun(SOME, tmp_path/'rows.jsonl')[0]) == len(SOME.cells()) == 10


# what is no study

@pytest.mark.parametrize('words, over, more', [
    ('n_real=[]; expected a list of one or more', dict(n_real=[]), {}),
    ('n_real=2; expected a list', dict(n_real=2), {}),
    ("n_real='25'; expected a list", dict(n_real='25'), {}),
    ('decay=[[0.1, 0.2]]; expected a list of one or more numbers, texts or tuples', dict(decay=[[.1, .2]]), {}),
    ('seeds=3; expected a list', dict(n_real=[2]), dict(seeds=3)),
    ('seeds=(); expected a list', dict(n_real=[2]), dict(seeds=())),
    ("base='n_real=2'; expected an Arm", dict(n_real=[2]), dict(base='n_real=2')),
    ('over=[]; expected a dict', [], {}),
    ("over='arm=scratch'; expected a dict", 'arm=scratch', {}),
    ("claims='C1'; expected a list of their names", dict(n_real=[2]), dict(claims='C1')),
    ('fold=0 sets the seed or the fold, and run k has seed k and fold k', dict(fold=[0, 1]), {}),
    ('labels.fold=3 sets the seed', {'labels.fold': [3]}, {}),
    ('how=a sets the seed', dict(how=dict(a='n_real=2 seed=7')), {}),
    ("{'domain': 'a', 'seed': 0} and {'domain': 'b', 'seed': 0} are declared twice, as the same arm",
     dict(domain=dict(a='', b='')), {}),
    ("{'precision': 'bf16', 'seed': 0} and {'precision': 'fp32', 'seed': 0} are declared twice",
     dict(precision=['bf16', 'fp32']), {}),
    ("are declared twice, as the same arm", dict(domain={k: f'domain=folder root={k}/cars' for k in 'ab'}), {})])
def test_a_study_that_is_none_is_a_line(words, over, more):
    told = refused(lambda: Study(**dict(dict(name='mine', base=Arm(), over=over), **more)).cells())
    assert told.startswith('study mine: ') and words in told and '\n' not in told


def test_studies_are_of_claims_that_there_are():
    assert {c for s in STUDIES.values() for c in s.claims} <= CLAIMS.keys()
    for name, c in CLAIMS.items(): assert {name, name.partition('_')[0]} & {*STUDIES[c.study].claims}, name


# mistakes, in one line, before anything is started

def test_what_cannot_be_run_is_told_before_anything_is_started(data, tmp_path, monkeypatch):
    monkeypatch.setattr('synthdet.evidence.jobs.Processes', None)
    told = refused(tiny(4).run, tmp_path/'out', data=tmp_path/'nope')
    assert 'nope: no such folder; expected a folder of data' in told
    told = refused(tiny(4).run, tmp_path/'out', data=tmp_path)
    assert told.startswith('study tiny, arm=scratch, n_real=2, seed=0: world: no such folder') and 'below data=' in told
    assert 'cannot write' in refused(tiny(4).run, '/proc/x', data=data)
    assert 'jobs=-1: expected a whole number' in refused(tiny(4).run, tmp_path/'out', data=data, jobs=-1)
    assert not (tmp_path/'out/artefacts').exists()


def test_a_cluster_that_there_cannot_be_is_told(monkeypatch):
    assert 'give --dask ADDRESS' in refused(cluster.check_cluster, None, resources=dict(GPU=1))
    monkeypatch.setattr(cluster, 'find_spec', lambda name: None)
    assert "pip install 'distributed>=2024.4.2'" in refused(cluster.check_cluster, 'local')
    monkeypatch.setattr(cluster, 'find_spec', lambda name: name)
    assert 'leave it out' in refused(cluster.check_cluster, 'tcp://127.0.0.1:8786', jobs=2)


def test_nobody_who_answers_is_told_and_nothing_is_left_of_the_try(monkeypatch):
    distributed = pytest.importorskip('distributed')
    monkeypatch.setattr(cluster, '_PATIENCE', 1)
    gc.disable() # what is left is collected at any moment, and ends in a deadlock where Dask holds its lock just then
    try:
        for address, line in (('nonsense', 'no scheduler answers'), ('tcp://127.0.0.1:1', 'tcp://HOST:8786')):
            assert line in refused(cluster.cluster(address).__enter__)
            assert not distributed.Client._instances
    finally: gc.enable()


# what runs leave

KEYS = [c*16 for c in 'abcd']


@pytest.fixture
def left(tmp_path):
    "Artefacts: of a published run, of one whose row is gone, of one that was killed; and somebody's own files."
    out = tmp_path/'out'
    for key in KEYS[:3]:
        (out/'artefacts'/key).mkdir(parents=True)
        (out/'artefacts'/key/'state.pt').write_bytes(bytes(2**20))
    (out/'predictions').mkdir()
    for name in ('predictions/predictions-' + 'a'*16, 'flies-pretrain-' + 'b'*16):
        (out/f'{name}.safetensors').write_bytes(b'x')
    for mine in ('artefacts/mine/notes', 'mine.safetensors', 'notes.txt', 'predictions/mine.txt'):
        (out/mine).parent.mkdir(exist_ok=True)
        (out/mine).write_text('mine')
    write_row(out/'made.jsonl', dict(id='pretrain-' + 'b'*16, artefacts=KEYS[:2],
                                     weights_file=f"flies-pretrain-{'b'*16}.safetensors"))
    write_row(tmp_path/'rows.jsonl', dict(id='a', artefacts=KEYS[:1], predictions=f"predictions-{'a'*16}.safetensors"))
    return out


def test_what_no_row_needs_can_go_and_nothing_else(left, tmp_path):
    results = [tmp_path/'rows.jsonl']
    found = artefacts.kept(left, results)
    assert {k.path.name[:20]: (len(k.rows), k.needed) for k in found} == {
        KEYS[0]: (2, ('rows.jsonl',)), KEYS[1]: (1, ()), KEYS[2]: (0, ()), 'predictions-aaaaaaaa': (1, ('rows.jsonl',)),
        'flies-pretrain-bbbbb': (1, ())}
    assert all(abs(k.mb - 1) < .1 for k in found[:3]) and all(0 <= k.days < 1 for k in found)
    before = {p for p in left.rglob('*') if p.is_file()}
    old = artefacts.prunable(left, results)
    assert {p for p in left.rglob('*') if p.is_file()} == before, 'saying it deletes nothing'
    artefacts.remove(old)
    lost = before - {p for p in left.rglob('*') if p.is_file()}
    assert lost == {left/'artefacts'/KEYS[1]/'state.pt', left/f"flies-pretrain-{'b'*16}.safetensors"}


def test_rows_of_before_keep_every_training(left, tmp_path, monkeypatch, capsys):
    write_row(tmp_path/'old.jsonl', dict(id='of-before'))
    results = [tmp_path/'rows.jsonl', tmp_path/'old.jsonl']
    old = artefacts.prunable(left, results)
    assert [k.path.name for k in old] == [f"flies-pretrain-{'b'*16}.safetensors"]
    monkeypatch.setattr(artefacts, 'project', lambda: None)
    cli.runs([str(left), '--prune', *(w for f in results for w in ('--results', str(f)))])
    assert 'which trainings they need (1 in old.jsonl) may need any' in capsys.readouterr().out
    write_row(left/'made.jsonl', dict(id='of-before', artefacts=KEYS[2:3]))
    assert {k.path.name for k in artefacts.prunable(left, results)} > {KEYS[1]}, 'made.jsonl says what it was made of'


def test_pruning_asks_first(left, tmp_path):
    words = ('runs', left, '--results', tmp_path/'rows.jsonl')
    (tmp_path/'program.py').write_text(CODE)
    before = sorted(left.rglob('*'))
    assert 'add --yes to delete them' in done(tmp_path, *words, '--prune') and sorted(left.rglob('*')) == before
    assert 'MB are free' in done(tmp_path, *words, '--prune', '--yes') and len([*left.rglob('*')]) == len(before) - 3


def test_rows_beside_artefacts_count(left):
    write_row(left/'results.jsonl', dict(id='b', artefacts=KEYS[1:2]))
    assert left/'results.jsonl' in artefacts.results_files(left)
    assert left/'made.jsonl' not in artefacts.results_files(left)
    found = artefacts.kept(left, artefacts.results_files(left))
    assert {k.path.name: k.needed for k in found}[KEYS[1]] == ('results.jsonl',)


# real runs

@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):
    "The study as it is when nothing happens to it: one arm after the other."
    out = tmp_path_factory.mktemp('whole')
    said = done(data, *at(data, out, '--jobs', 1), cores=1) # sums of floats depend on how many threads share them
    return out, said


def finished(out): return {p: p.stat().st_mtime_ns for p in [*Path(out).glob('artefacts/*/last.safetensors')]}


@pytest.mark.slow
def test_a_study_runs_and_tells_how_far_it_is(whole, data):
    out, said = whole
    lines = said.splitlines()
    assert lines[0].startswith('tiny: 3 runs, 30 steps, about ') and lines[0].endswith(' GB')
    assert [line.split(',')[0] for line in lines[1:4]] == [f'tiny: {k} of 3 done' for k in range(1, 4)]
    assert lines[4:] == [f'tiny: all 3 rows are in {out}/rows.jsonl']
    rows, made = read_rows(out/'rows.jsonl'), read_rows(out/'made.jsonl')
    assert {r['id']: r['artefacts'] for r in rows} == {r['id']: r['artefacts'] for r in made}
    assert {k for r in rows for k in r['artefacts']} == {p.name for p in (out/'artefacts').iterdir()}
    assert done(data, *at(data, out)) == f'tiny: all 3 rows are in {out}/rows.jsonl\n', 'there is nothing left to do'


@pytest.mark.slow
def test_a_dry_run_says_what_it_costs_and_leaves_nothing(whole, data, tmp_path):
    said = done(data, *at(data, tmp_path/'new', '--dry', '--only', 'arm=pretrain'))
    lines = said.splitlines()
    assert len(lines) == 3 and lines[0].split() == ['arm', 'n_real', 'seed']
    assert lines[-1].startswith('tiny: 1 runs, 20')
    assert [p.name for p in (tmp_path/'new').iterdir()] == [], 'only looked at'
    rows = tmp_path/'rows.jsonl'
    for row in read_rows(whole[0]/'rows.jsonl'):
        if row['arm'] == 'scratch': write_row(rows, row)
    words = ('study', 'tiny', '--data', data, '--out', tmp_path/'new', '--results', rows, '--dry')
    assert 'tiny: 2 runs, 20 steps, about ' in done(data, *words)
    assert 'nothing is missing' in done(data, *at(data, whole[0], '--dry'))


@pytest.mark.slow
def test_a_study_that_is_killed_twice_ends_with_the_same_rows(whole, data, tmp_path):
    g = np.random.default_rng(0)
    for kill in range(2):
        process = started(data, *at(data, tmp_path, '--jobs', 2))
        until(lambda: len(finished(tmp_path)) > kill and [*tmp_path.glob('artefacts/*/state.pt')])
        time.sleep(g.uniform(0, 2))
        below = descendants(process.pid)
        process.kill()
        process.communicate(timeout=60)
        assert gone(below), 'they end with it'
        before, rows = finished(tmp_path), plain(tmp_path/'rows.jsonl')
    assert before, 'something was finished'
    done(data, *at(data, tmp_path, '--jobs', 2))
    assert plain(tmp_path/'rows.jsonl') == plain(whole[0]/'rows.jsonl')
    assert finished(tmp_path).items() >= before.items(), 'what was finished is not done again'
    assert all(row in plain(tmp_path/'rows.jsonl') for row in rows)
    left = [p.name for p in tmp_path.rglob('.*')]
    assert not [p for p in left if p.endswith(('.tmp', '.lock'))], left


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_leaves_no_process(data, tmp_path):
    terminal, inside = pty.openpty()
    process = started(data, *at(data, tmp_path, '--jobs', 2), steps=2000, stdin=inside, stderr=inside)
    until(lambda: [*tmp_path.glob('artefacts/*/state.pt')])
    below = descendants(process.pid)
    assert len(below) >= 3
    os.killpg(process.pid, signal.SIGINT) # as a terminal does: all of them
    assert process.wait(60) == 130 and gone(below)
    os.close(inside)
    said = os.read(terminal, 1 << 20).decode().replace('\r', '\n')
    assert 'stopped; the same command goes on from here' in said and 'Traceback' not in said


@pytest.mark.slow
def test_what_is_packed_goes_on_elsewhere(whole, data, tmp_path):
    half = tmp_path/'half'
    done(data, *at(data, half, '--only', 'arm=pretrain_only'), cores=1)
    words = ('runs', half, '--study', 'tiny', '--data', data, '--results', half/'rows.jsonl', '--pack', tmp_path/'pack')
    said = done(data, *words)
    assert said.startswith(f"{tmp_path}/pack: go on with synthdet-study tiny --out {tmp_path}/pack --results ")
    before = finished(tmp_path/'pack')
    assert len(before) == 1 and len(read_rows(tmp_path/'pack/tiny.jsonl')) == 1
    done(data, 'study', 'tiny', '--data', data, '--out', tmp_path/'pack', '--results', tmp_path/'pack/tiny.jsonl',
         cores=1)
    assert plain(tmp_path/'pack/tiny.jsonl') == plain(whole[0]/'rows.jsonl')
    assert finished(tmp_path/'pack').items() >= before.items()
    found = artefacts.kept(tmp_path/'pack', [tmp_path/'pack/tiny.jsonl'])
    assert len(found) == 3 + 3 + 3 and all(k.needed for k in found)
    process = started(data, *words)
    assert 'choose the name of a new folder' in process.communicate(timeout=300)[1] and process.returncode == 2


@pytest.mark.slow
def test_a_cluster_that_loses_a_worker_ends_with_the_same_rows(whole, data, tmp_path):
    distributed = pytest.importorskip('distributed')
    killed = []
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, host='127.0.0.1', dashboard_address=None,
                                  memory_limit=None) as here, distributed.Client(here) as client:
        def kill(line):
            "As soon as one run is there, while another is under way."
            if killed or ' done, ' not in line: return
            until(lambda: any(client.processing().values()))
            busy = next(address for address, tasks in client.processing().items() if tasks)
            killed.append(next(w for w in here.workers.values() if w.worker_address == busy).pid)
            until(lambda: len(descendants(killed[0])) > 1)
            os.kill(killed[0], signal.SIGKILL)
        tiny(10, seeds=(0,)).run(tmp_path, tmp_path/'rows.jsonl', data=data, client=client, tell=kill)
    assert killed and plain(tmp_path/'rows.jsonl') == plain(whole[0]/'rows.jsonl')
    assert len(read_rows(tmp_path/'rows.jsonl')) == 3, 'one row for each cell'


@pytest.mark.slow
def test_the_command_starts_a_cluster_of_its_own(whole, data, tmp_path):
    pytest.importorskip('distributed')
    words = '--dask', 'local', '--jobs', 1, '--resources', 'GPU=1', '--only', 'arm=scratch'
    said = done(data, *at(data, tmp_path, *words), cores=1)
    row, = plain(tmp_path/'rows.jsonl')
    assert row in plain(whole[0]/'rows.jsonl') and said.count(' of 1 done') == 1


def test_rows_know_the_run_of_a_cell_whatever_folder_its_data_are_in(data):
    s = tiny(4)
    arm = s.cells()[0].arm
    row = dict(id='a', settings=json.loads(json.dumps(to_row(placed(arm, data)))))
    assert len(s.missing([row])) == len(s.cells()) - 1
