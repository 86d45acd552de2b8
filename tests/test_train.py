"Training across processes: killed anywhere, it ends with the same bytes; refused disks leave the old files."
import csv, itertools, json, os, resource, signal, subprocess, sys, time
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file
from torch import nn

from helpers import ended, forked
from synthdet.core import generator, refused
from synthdet.files import read_jsonl
from synthdet.detection import train as train_module
from synthdet.detection.settings import Schedule
from synthdet.detection.train import train


class Tiny(nn.Module):
    "Batch norm, dropout and a dict of losses: all that a training step can depend on."
    def __init__(self, last=nn.Linear):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(.3),
                                  nn.AdaptiveAvgPool2d(1), nn.Flatten(), last(6, 4))

    def forward(self, images, targets=None):
        boxes = self.body(torch.stack(images)).float() * 8
        one = torch.ones(1)
        if not self.training: return [dict(boxes=b[None], scores=one, labels=one.long()) for b in boxes]
        error = boxes - torch.stack([t['boxes'][0] for t in targets])
        return dict(box=error.abs().mean(), size=error[:, 2:].square().mean())


def batches(start):
    while True:
        g = generator(0, 'batch', start)
        images = torch.from_numpy(g.integers(0, 256, (4, 3, 16, 16), dtype='uint8'))
        yield images, [dict(boxes=torch.from_numpy(g.uniform(0, 9, (1, 4))).float()) for _ in range(4)]
        start += 1


def validate(model):
    "A score that goes up and down, in evaluation mode only."
    assert not model.training
    with torch.no_grad(): boxes = model([torch.full((3, 16, 16), .5)])[0]['boxes']
    return dict(ap50=float(boxes.sin().abs().mean()))


def new_model(seed=0):
    torch.manual_seed(seed)
    return Tiny()


SETTINGS = dict(schedule=Schedule(lr=1e-2, eval_every=4, precision='fp32'),
                save_every=3, validate=validate, device='cpu')
STEPS = 22


def arguments(out, **change):
    return {**dict(model=new_model(), batches=batches, steps=STEPS, out=out, **SETTINGS), **change}


def run(out, **change): return train(**arguments(out, **change))


def told(out, **change): return refused(train, **arguments(out, **change))


def outcome(out):
    "All that must not depend on kills: weights as bytes, metrics without seconds."
    rows = [json.dumps({k: v for k, v in r.items() if k != 'seconds'}) for r in read_jsonl(out/'metrics.jsonl')]
    return (out/'best.safetensors').read_bytes(), (out/'last.safetensors').read_bytes(), rows


pytestmark = pytest.mark.usefixtures('one_thread')


def die(*_): os.kill(os.getpid(), signal.SIGKILL)


def half_a_line(path, *rows, **_):
    with open(path, 'a') as f: f.write(json.dumps(rows[0])[:9])
    die()


def nth(n, function, before=None, after=None):
    "`function`, with something done before or after its n-th call."
    calls = itertools.count(1)
    def wrapped(*args, **how):
        now = next(calls) == n
        if now and before: before(*args)
        result = function(*args, **how)
        if now and after: after(*args)
        return result
    return wrapped


def doomed(out, kind, n):
    "Train in `out`, dying by SIGKILL at the n-th event of a kind."
    change = {}
    if kind == 'before-rename': os.replace = nth(n, os.replace, before=die)
    if kind == 'after-rename': os.replace = nth(n, os.replace, after=die)
    if kind == 'rows': train_module.append_jsonl = nth(n, train_module.append_jsonl, before=half_a_line)
    if kind == 'validate': change['validate'] = nth(n, validate, before=die)
    run(out, **change)


def in_child(function, *args, kill_after=None):
    "Run in a forked process; the signal that ended it, 0 when it came to its end."
    child = forked(function, *args)
    if kill_after is not None:
        time.sleep(kill_after)
        child.kill()
    return -ended(child)


def drive(root, points):
    "Main of the process that forks: every kill point in a folder of its own, then kills from outside at growing times."
    torch.set_num_threads(1)
    signals = {f'{kind}-{n}': in_child(doomed, Path(root)/f'{kind}-{n}', kind, n) for kind, n in points}
    storm = [in_child(run, Path(root)/'storm', kill_after=.02 * (1 + i)) for i in range(8)]
    print(json.dumps(dict(signals=signals, storm=storm)))


@pytest.mark.slow
def test_killed_anywhere_and_resumed_ends_with_the_same_bytes(tmp_path, monkeypatch):
    renames, replace = [], os.replace
    monkeypatch.setattr(os, 'replace', lambda *a: (renames.append(a), replace(*a)))
    whole = run(tmp_path/'whole')
    last = len(renames)
    points = [('after-rename', n) for n in range(1, last + 1)] + [('before-rename', n) for n in range(1, last + 1, 3)]
    points += [('rows', n) for n in (1, 9, 22)] + [('validate', n) for n in (1, 4, 6)]
    assert 4 < whole['best_step'] < STEPS, 'the best step lies inside, so that files before and after it differ'
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')])
    code = f'import test_train; test_train.drive({str(tmp_path)!r}, {points!r})'
    driver = subprocess.run([sys.executable, '-c', code], env=dict(os.environ, PYTHONPATH=path), capture_output=True,
                            text=True, timeout=300)
    assert driver.returncode == 0, driver.stderr
    seen = json.loads(driver.stdout)
    assert set(seen['signals'].values()) == {signal.SIGKILL}, seen
    assert signal.SIGKILL in seen['storm'] and set(seen['storm']) <= {0, signal.SIGKILL}
    for folder in [f'{kind}-{n}' for kind, n in points] + ['storm']:
        unfinished = not (tmp_path/folder/'last.safetensors').exists()
        result = run(tmp_path/folder)
        assert outcome(tmp_path/folder) == outcome(tmp_path/'whole'), folder
        assert all(result[k] == whole[k] for k in ('best_step', 'best_ap50', 'steps'))
        assert unfinished or folder in ('storm', f'after-rename-{last}'), folder
        files = sorted(f.name for f in (tmp_path/folder).iterdir())
        assert files == ['best.safetensors', 'last.safetensors', 'metrics.jsonl', 'state.pt'], folder


def never(start): raise AssertionError('a finished run was started again')


def test_a_finished_run_is_read_and_nothing_is_written(tmp_path):
    first = run(tmp_path)
    before = {f.name: f.stat().st_mtime_ns for f in tmp_path.iterdir()}
    model = new_model()
    assert run(tmp_path, model=model, batches=never) == first
    assert {f.name: f.stat().st_mtime_ns for f in tmp_path.iterdir()} == before
    best = load_file(tmp_path/'best.safetensors')
    assert all(torch.equal(v, best[k]) for k, v in model.state_dict().items()) and not model.training


def test_more_steps_of_a_finished_run_equal_one_long_run(tmp_path):
    run(tmp_path/'parts', steps=8)
    run(tmp_path/'parts')
    run(tmp_path/'whole')
    assert outcome(tmp_path/'parts') == outcome(tmp_path/'whole')
    assert 'ended with a validation after 22 steps' in told(tmp_path/'parts', steps=40)


def test_the_best_is_the_first_of_equals_and_the_model_holds_it(tmp_path):
    scores, seen = iter([.2, .7, .7, .1, .7, .3]), {}
    def scripted(model):
        seen[len(seen)] = {k: v.clone() for k, v in model.state_dict().items()}
        return dict(ap50=next(scores), other=1)
    model = new_model()
    result = run(tmp_path, model=model, validate=scripted)
    assert result['best_step'] == 8 and result['best_ap50'] == .7
    assert [r['step'] for r in result['history'] if 'ap50' in r] == [4, 8, 12, 16, 20, 22]
    assert all(torch.equal(v, seen[1][k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, seen[5][k]) for k, v in load_file(tmp_path/'last.safetensors').items())


@pytest.mark.parametrize('select, step, ap50', [('ap50', 8, .7), ('ap50_authors', 16, .1), ('last', 22, .3)])
def test_the_schedule_says_which_weights_are_kept(tmp_path, select, step, ap50):
    scores = iter(zip([.2, .7, .7, .1, .7, .3], [.1, .2, .3, .9, .8, .1]))
    result = run(tmp_path, validate=lambda m: dict(zip(('ap50', 'ap50_authors'), next(scores))), select=select)
    assert (result['best_step'], result['best_ap50']) == (step, ap50)
    same = (tmp_path/'best.safetensors').read_bytes() == (tmp_path/'last.safetensors').read_bytes()
    assert same == (select == 'last')


def test_without_validation_the_last_weights_are_kept(tmp_path):
    result = run(tmp_path, validate=None)
    assert (result['best_step'], result['best_ap50']) == (STEPS, None)
    assert not any('ap50' in r for r in result['history'])
    assert (tmp_path/'best.safetensors').read_bytes() == (tmp_path/'last.safetensors').read_bytes()


def test_a_schedule_and_its_settings_one_by_one_are_the_same_run(tmp_path):
    named = dict(lr=3e-3, optimizer='sgd', decay=(.5,), eval_every=11, select='last', precision='fp32')
    run(tmp_path/'whole', schedule=Schedule(**named))
    run(tmp_path/'apart', **named)
    assert outcome(tmp_path/'whole') == outcome(tmp_path/'apart')


@pytest.mark.parametrize('change, says', [
    (dict(lr=.1), 'lr is 0.01 there and 0.1 here'), (dict(steps=8), 'it is 22 steps along and steps is 8'),
    (dict(eval_every=2), 'eval_every is 4 there'), (dict(select='last'), "select is 'ap50' there"),
    (dict(precision='bf16'), "precision is 'fp32' there"), (dict(compile=True), 'compile is False there'),
    (dict(seed=1), 'seed is 0 there'), (dict(key='birds'), 'birds'), (dict(validate=None), 'validated is True there'),
    (dict(batch_size=3), 'batch_size is 16 there'),
    (dict(decay=(.5,)), 'decay is [] there and [11] here'), (dict(model=new_model(1)), 'other weights')])
def test_a_state_of_another_run_is_refused_and_kept(tmp_path_factory, change, says):
    place = tmp_path_factory.getbasetemp()/'of another run' # the run is made once
    if not (place/'last.safetensors').exists(): run(place)
    before = outcome(place), (place/'state.pt').read_bytes()
    line = told(place, **change)
    assert says in line and str(place) in line and 'choose another folder' in line and '\n' not in line
    assert before == (outcome(place), (place/'state.pt').read_bytes())


@pytest.mark.parametrize('content', [b'', b'not a state', b'PK\x03\x04 torn'])
def test_an_unreadable_state_is_one_clear_line(tmp_path, content):
    (tmp_path/'state.pt').write_bytes(content)
    line = told(tmp_path)
    assert 'state.pt: cannot read the state' in line and 'delete the file' in line
    assert (tmp_path/'state.pt').read_bytes() == content


def test_the_state_of_another_training_is_refused(tmp_path):
    from synthdet.resume import save_state
    save_state(tmp_path, dict(step=3, rows=[]), dict(steps=9, nz=4))
    assert 'is the state of another run: batch_size is None there and 16 here; lr is None' in told(tmp_path)


def test_a_loss_or_weight_that_is_not_finite_stops_the_run_and_leaves_the_files(tmp_path):
    def spoiled(start):
        for step, (images, targets) in enumerate(batches(start), start + 1):
            if step == 11: targets[2]['boxes'][0, 0] = float('nan')
            yield images, targets
    line = told(tmp_path/'mended', batches=spoiled)
    assert 'not finite at step 11 (loss, box)' in line and 'lower lr (now 0.01)' in line
    state = torch.load(tmp_path/'mended'/'state.pt', weights_only=True)
    assert state['at']['step'] == 9 and all(v.isfinite().all() for v in state['model'].values())
    assert not (tmp_path/'mended'/'last.safetensors').exists()
    run(tmp_path/'mended')
    run(tmp_path/'whole')
    assert outcome(tmp_path/'mended') == outcome(tmp_path/'whole'), 'mended batches continue the same run'

    class Poison(nn.Linear):
        "A layer whose gradient is not finite although the loss is."
        def forward(self, x):
            y = super().forward(x)
            if self.training: y.register_hook(lambda g: g * float('nan'))
            return y
    line = told(tmp_path/'poison', model=Tiny(Poison), save_every=1, steps=1, validate=None)
    assert 'weights are not finite after step 1' in line
    assert not (tmp_path/'poison'/'state.pt').exists()


def test_a_full_disk_is_one_line_and_the_old_state_stays(tmp_path):
    run(tmp_path/'whole')
    room = (tmp_path/'whole'/'state.pt').stat().st_size - 200 # rows make it grow: it fits at first, then no more
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try: line = told(tmp_path/'full')
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 'cannot write' in line and 'state.pt: File too large; free some space' in line and '\n' not in line
    assert not list((tmp_path/'full').glob('.*'))
    assert 0 < torch.load(tmp_path/'full'/'state.pt', weights_only=True)['at']['step'] < STEPS
    run(tmp_path/'full')
    assert outcome(tmp_path/'full') == outcome(tmp_path/'whole')


def test_metrics_that_cannot_be_written_are_one_line(tmp_path):
    (tmp_path/'metrics.jsonl').mkdir()
    line = told(tmp_path)
    assert 'cannot write' in line and 'metrics.jsonl' in line


def test_half_precision_resumes_too_and_keeps_float32_weights(tmp_path):
    run(tmp_path/'whole', precision='bf16')
    def cut(start): return itertools.islice(batches(start), 10)
    assert 'batches ended before step 11 of 22' in told(tmp_path/'cut', precision='bf16', batches=cut)
    run(tmp_path/'cut', precision='bf16')
    assert outcome(tmp_path/'cut') == outcome(tmp_path/'whole')
    kept = load_file(tmp_path/'whole'/'last.safetensors')
    assert {v.dtype for v in kept.values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize('wrong, says', [
    (dict(steps=0), 'steps is 0; expected more than 0'), (dict(save_every=0), 'save_every is 0'),
    (dict(lr=-1), 'lr=-1.0 should be'), (dict(eval_every=0), 'eval_every=0 should be 1 or more'),
    (dict(precision='int8'), "precision 'int8' is unknown; choose from auto, fp32, bf16, fp16"),
    (dict(precision='fp16'), "precision='fp16' is for GPUs"), (dict(amp='bf16'), "setting 'amp' is unknown"),
    (dict(optimizer='lion'), "optimizer 'lion' is unknown; choose from adam, sgd"),
    (dict(learning_rate=1), "setting 'learning_rate' is unknown; choose from batch_size, lr, "),
    (dict(validate=lambda m: {}), 'validation gave ap50=None at step 4'),
    (dict(select='ap50_authors'), 'validation gave ap50_authors=None at step 4')])
def test_wrong_arguments_are_one_clear_line(tmp_path, wrong, says): assert says in told(tmp_path, **wrong)


def test_only_the_seed_chooses_the_dropout_and_it_changes_from_step_to_step(tmp_path):
    masks = []
    def watched(seed):
        model = new_model()
        torch.manual_seed(len(masks)) # what the caller draws must not matter
        dropped = []
        note = lambda m, i, o: dropped.append((o[0] == 0).flatten().tolist()) if m.training else None
        model.body[3].register_forward_hook(note)
        masks.append(dropped)
        run(tmp_path/f'{len(masks)}', model=model, seed=seed)
    for seed in (0, 0, 1): watched(seed)
    assert outcome(tmp_path/'1') == outcome(tmp_path/'2') != outcome(tmp_path/'3')
    assert masks[0] == masks[1] != masks[2] and len({tuple(m) for m in masks[0]}) == STEPS


def test_lists_of_images_and_the_batch_give_the_same_run(tmp_path):
    def listed(start):
        for images, targets in batches(start): yield list(images), targets
    run(tmp_path/'listed', batches=listed)
    run(tmp_path/'stacked')
    assert outcome(tmp_path/'listed') == outcome(tmp_path/'stacked')


def test_nothing_is_printed_when_nobody_watches(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv('SYNTHDET_QUIET', '1')
    run(tmp_path)
    assert capfd.readouterr() == ('', '')


def scalars(out):
    "Tag -> steps, as TensorBoard's own reader finds them, every event counted."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = EventAccumulator(str(out/'tensorboard'), size_guidance=dict(scalars=0), purge_orphaned_data=False).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()['scalars']}


def columns(rows):
    float32 = lambda v: torch.tensor(v).item()
    return {k: [(r['step'], float32(r[k])) for r in rows if k in r] for k in ('loss', 'box', 'size', 'ap50')}


def test_a_tracker_holds_every_step_once_however_often_a_training_is_killed(tmp_path):
    pytest.importorskip('torch.utils.tensorboard', reason='tensorboard is not installed: pip install synthdet[track]')
    heard = tmp_path/'heard'
    def tell(row):
        with open(heard, 'a') as f: print(row['step'], file=f)
    for name in ('tensorboard', 'csv', tell):
        out = tmp_path/getattr(name, '__name__', name)
        for n in (2, 3): assert in_child(lambda: run(out, track=name, validate=nth(n, validate, before=die))) == 9
        run(out, track=name)
        rows = list(read_jsonl(out/'metrics.jsonl'))
        assert [r['step'] for r in rows] == list(range(1, STEPS + 1))
        if name == 'tensorboard': assert scalars(out) == columns(rows)
        if name == 'csv':
            with open(out/'metrics.csv') as f:
                found = [{k: float(v) for k, v in r.items() if v} for r in csv.DictReader(f)]
            assert found == rows
    assert heard.read_text().split() == [str(k) for k in range(1, STEPS + 1)]


def test_a_tracker_changes_nothing_and_can_be_asked_for_afterwards(tmp_path):
    run(tmp_path/'a')
    run(tmp_path/'b', track='csv')
    assert outcome(tmp_path/'a') == outcome(tmp_path/'b') and not (tmp_path/'a/metrics.csv').exists()
    run(tmp_path/'a', track='csv')
    assert len((tmp_path/'a/metrics.csv').read_text().splitlines()) == STEPS + 1


def test_a_tracker_that_is_not_there_is_said_before_a_step(tmp_path, monkeypatch):
    assert "tracker 'wandb' is unknown; choose from none, csv, tensorboard" in told(tmp_path, track='wandb')
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    assert "pip install 'synthdet[track]', or choose track=csv" in told(tmp_path, track='tensorboard')
    assert not list(read_jsonl(tmp_path/'metrics.jsonl'))
