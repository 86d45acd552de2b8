"Several processes train one detector: the same step as one, one line when they differ, the same bits after a kill."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from synthdet import cli
from synthdet.core import refused
from synthdet.files import read_jsonl
from synthdet.data.batches import batches
from synthdet.detection import train as train_module
from synthdet.detection.detectors import detector
from synthdet.detection.evaluate import predict, predict_together, validator
from synthdet.detection.train import matcher_of, train
from synthdet.evidence.arm import make_arms
from synthdet.evidence.notebooks import run_plan
from synthdet.evidence.phases import fit, load
from synthdet.ranks import (agree, equal_share, gathered, heard, launched, mean,
                            on_one_disk, one_first, rank, ranks, total)

TORCHRUN = Path(sys.executable).parent/'torchrun'
SIDE, BATCH = 64, 8


class Plain(nn.Module):
    "A detector as torchvision's are: no matcher, losses that are means over what it is given."
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 4), nn.ReLU(),
                                  nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))

    def forward(self, images, targets=None):
        boxes = self.body(torch.stack(images)) * 8
        if not self.training:
            return [dict(boxes=b[None], scores=b.new_ones(1), labels=b.new_ones(1).long()) for b in boxes]
        return dict(box=(boxes - torch.stack([t['boxes'].sum(0) for t in targets])).abs().mean())


def frozen(model):
    "The model with batch norms that stay in evaluation mode."
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.eval()
            m.train = lambda mode=True, m=m: m
    return model


def built(name):
    torch.manual_seed(0)
    if name == 'plain': return Plain()
    options = dict(backbone='resnet_small') if name == 'ssd' else {}
    return frozen(detector(name, 2, image_size=SIDE, **options))


def pictures(name, n=2*BATCH):
    "Noise with 0 to 3 boxes; the first half of the first batch has none, and no landmarks."
    g, found = torch.Generator().manual_seed(0), []
    for k in range(n):
        many = 0 if k < BATCH//2 and name != 'plain' else k % 3 + 1
        xy, wh = torch.rand(many, 2, generator=g)*SIDE*.4, SIDE*(.2 + .4*torch.rand(many, 2, generator=g))
        target = dict(boxes=torch.cat([xy, xy + wh], 1), labels=torch.ones(many, dtype=torch.int64))
        if name == 'retinaface' and k >= BATCH//2:
            target['landmarks'] = xy[:, None] + wh[:, None]*torch.rand(many, 5, 2, generator=g)
        found.append((torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8, generator=g), target))
    return found


class InOrder(list):
    "An endless stream that gives its pictures round and round."
    def __len__(self): raise TypeError('endless')
    def __getitem__(self, i): return list.__getitem__(self, i % list.__len__(self))


def trained(name, out, steps, lr=1e-2, **change):
    "A short training of this rank's part: the model after it, gradients of its last step and all."
    torch.set_num_threads(1)
    model, seen = built(name), InOrder(pictures(name))
    def feed(start): return batches(seen, BATCH, start, part=(rank(), ranks()), prepare=matcher_of(model))
    given = {**dict(lr=lr, optimizer='sgd', batch_size=BATCH, precision='fp32', eval_every=100, device='cpu'), **change}
    return model, train(model, feed, steps, out, **given)


CASES = [('ssd', 1), ('ssd', 10), ('retinaface', 1), ('retinaface', 10), ('plain', 1), ('plain', 10)]


def results(folder):
    found = {}
    for name, steps in CASES:
        model, done = trained(name, folder/f'{name}-{steps}', steps, lr=1e-3)
        rows = [{k: v for k, v in r.items() if k != 'seconds'} for r in done['history']]
        weights = torch.load(folder/f'{name}-{steps}'/'state.pt', weights_only=True)['model']
        gradients = {k: p.grad for k, p in model.named_parameters()}
        found[f'{name}-{steps}'] = dict(gradients=gradients, weights=weights, rows=rows)
    return found


def scored(folder):
    "Predictions of both ranks, a training with validation, and what of it each rank holds."
    model, images = built('ssd').eval(), pictures('ssd', 7)
    both, alone = predict_together(model, images, 2), predict(model, images, 2)
    same = len(both) == 7 and all(torch.allclose(a[k], b[k], atol=1e-4) for a, b in zip(both, alone) for k in a)
    model, done = trained('ssd', folder/'validated', 4, eval_every=2, validate=validator(images))
    return [same, done['ranks'], done['best_step'], [r.get('ap50') for r in done['history']],
            [v.sum().item() for v in model.state_dict().values()]]


def lines(folder):
    "What is refused on every rank."
    feeble = folder/('seen' if rank() == 0 else 'elsewhere')
    trained('ssd', folder/'ten', 2)
    return dict(agree=refused(agree, rank(), 'the data'), share=refused(equal_share, 9),
                disk=refused(on_one_disk, feeble),
                schedule=refused(trained, 'ssd', folder/'lr', 2, lr=1e-3*(1 + rank())),
                odd=refused(trained, 'ssd', folder/'odd', 2, batch_size=9),
                nan=refused(spoiled, folder/'nan'), one=refused(trained, 'ssd', folder.parent/'one', 4))


def spoiled(out):
    "A batch that is spoiled on one rank alone."
    def bad(images, targets):
        images, matched = built('ssd').matcher()(images, targets)
        if rank() == 1: matched['goals'][:] = float('nan')
        return images, matched
    model = built('ssd')
    def feed(start): return batches(InOrder(pictures('ssd')), BATCH, start, part=(rank(), ranks()), prepare=bad)
    train(model, feed, 2, out, batch_size=BATCH, precision='fp32', device='cpu')


def averages(folder):
    "Running averages of batch norms that learn."
    torch.manual_seed(0)
    model = detector('ssd', 2, image_size=SIDE, backbone='resnet_small')
    seen = InOrder(pictures('ssd'))
    def feed(start): return batches(seen, BATCH, start, part=(rank(), ranks()), prepare=matcher_of(model))
    train(model, feed, 3, folder/'bn', batch_size=BATCH, precision='fp32', device='cpu')
    return [b.double().sum().item() for k, b in model.named_buffers() if 'running' in k]


def of_rank(r, n, folder):
    "What each process does."
    os.environ['GLOO_SOCKET_IFNAME'] = 'lo'
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=r, world_size=n)
    with one_first(): order = time.monotonic()
    said = dict(rank=rank(), ranks=ranks(), heard=heard(r), total=total(torch.tensor([r + 1.])).item(), order=order,
                mean=mean(torch.tensor([float(r)])).item(), scored=scored(folder), averages=averages(folder),
                lines=lines(folder))
    said, found = gathered(said), results(folder)
    if r == 0: torch.save(dict(said=said, found=found), folder/'found.pt')
    dist.destroy_process_group()


def joined(running, seconds=300):
    "Wait for processes, which an error of one ends; when they wait for each other, it ends them."
    end = time.monotonic() + seconds
    while not running.join(1):
        if time.monotonic() < end: continue
        for p in running.processes: p.kill()
        pytest.fail('the ranks wait for each other')


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    "What two processes gave, and what one gives."
    place, threads = tmp_path_factory.mktemp('ranks'), torch.get_num_threads()
    (place/'two').mkdir()
    trained('ssd', place/'one', 2)
    running = torch.multiprocessing.spawn(of_rank, (2, place/'two'), nprocs=2, join=False)
    one = results(place/'alone')
    joined(running)
    yield torch.load(place/'two'/'found.pt', weights_only=True), one, place
    torch.set_num_threads(threads)


def far(a, b): return max(float((a[k].double() - b[k].double()).abs().max()) for k in a if a[k] is not None)


@pytest.mark.parametrize('name', ['ssd', 'retinaface', 'plain'])
def test_the_first_step_of_two_ranks_has_the_gradients_of_one(both, name):
    two, one = (found[f'{name}-1']['gradients'] for found in (both[0]['found'], both[1]))
    assert {k for k in two if two[k] is None} == {k for k in one if one[k] is None}
    assert far(one, two) < 1e-5 and max(g.abs().max() for g in one.values() if g is not None) > 1e-3


@pytest.mark.parametrize('name', ['ssd', 'retinaface', 'plain'])
def test_ten_steps_of_two_ranks_end_with_the_weights_and_losses_of_one(both, name):
    two, one = (found[f'{name}-10'] for found in (both[0]['found'], both[1]))
    assert far(one['weights'], two['weights']) < 1e-5
    assert far(both[1][f'{name}-1']['weights'], one['weights']) > 1e-4, 'it has learnt'
    for a, b in zip(one['rows'], two['rows'], strict=True): assert a == pytest.approx(b, abs=1e-4)


def test_ranks_tell_each_other(both):
    zero, first = both[0]['said']
    assert (zero['rank'], first['rank'], zero['ranks'], first['ranks']) == (0, 1, 2, 2)
    assert (zero["heard"], first["heard"]) == (0, 0) and zero['total'] == first['total'] == 3 and zero['mean'] == .5
    assert zero['order'] < first['order']


def test_every_rank_holds_the_same_scores_weights_and_running_averages(both):
    zero, first = both[0]['said']
    assert zero['scored'] == first['scored'] and zero['averages'] == first['averages']
    same, n, _, curve, _ = zero['scored']
    assert same and n == 2 and [v is None for v in curve] == [True, False, True, False]


def test_what_would_mix_two_runs_is_one_line_on_every_rank(both):
    zero, first = (said['lines'] for said in both[0]['said'])
    assert {k: v for k, v in zero.items() if k != 'disk'} == {k: v for k, v in first.items() if k != 'disk'}
    assert zero['agree'].startswith('the data is 1 on rank 1 and 0 on rank 0; give all machines')
    assert zero['share'] == 'batch_size=9 cannot be shared equally by 2 ranks; choose a multiple of 2'
    assert all('rank 1 does not see' in l['disk'] and 'all machines share' in l['disk'] for l in (zero, first))
    assert zero['schedule'].startswith('lr is 0.002 on rank 1 and 0.001 on rank 0')
    assert 'cannot be shared' in zero['odd'] and 'not finite at step 1' in zero['nan']
    assert 'begun by 1 ranks' in zero['one']


def test_a_run_goes_on_with_as_many_ranks_and_once_finished_is_found_by_any(both):
    place = both[2]/'two'/'ten'
    before = (place/'state.pt').read_bytes()
    assert trained('ssd', place, 2)[1]['ranks'] == 2
    line = refused(trained, 'ssd', place, 4)
    assert 'begun by 2 ranks and goes on with as many, here are 1' in line and (place/'state.pt').read_bytes() == before


def test_gpus_synchronise_their_batch_norms_and_timms_keep_their_activations(monkeypatch):
    monkeypatch.setattr(train_module, 'ranks', lambda: 2)
    model = detector('ssd', 2, image_size=SIDE, backbone='mobilenetv1_025').eval()
    x = torch.rand(1, 3, SIDE, SIDE)
    before = model.raw(x)
    for _ in range(2): train_module._share_statistics(model, torch.device('cuda'))
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    for a, b in zip(before, model.raw(x)): torch.testing.assert_close(a, b)


def test_torchrun_is_recognised_and_takes_no_notebook(monkeypatch, capsys):
    assert not launched()
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'here')
    assert launched()
    with pytest.raises(SystemExit): cli.run(['--notebook', 'my.ipynb'])
    assert capsys.readouterr().err == 'error: --notebook my.ipynb: under torchrun the arms are trained; leave it out\n'


def stopped(r, n, folder):
    "Of `n` processes: a training, and one that stops between two saves and goes on."
    os.environ['GLOO_SOCKET_IFNAME'] = 'lo'
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=r, world_size=n)
    saves = dict(save_every=3, eval_every=3)
    trained('ssd', folder/'whole', 6, **saves)
    step = train_module._step
    def until(run, batch, k):
        if k == 5: raise KeyboardInterrupt
        return step(run, batch, k)
    train_module._step = until
    with pytest.raises(KeyboardInterrupt): trained('ssd', folder/'stopped', 6, **saves)
    train_module._step = step
    trained('ssd', folder/'stopped', 6, **saves)
    dist.destroy_process_group()


@pytest.mark.slow
def test_four_ranks_sum_in_the_same_order_after_a_stop(tmp_path):
    joined(torch.multiprocessing.spawn(stopped, (4, tmp_path), nprocs=4, join=False))
    whole, again = ((tmp_path/k/'last.safetensors').read_bytes() for k in ('whole', 'stopped'))
    assert whole == again


# -- torchrun itself

def words(root, out, **change):
    return {**dict(backbone='mobilenetv1_025', batch_size=4, steps=10, pretrain_steps=10, eval_every=2, n_real=5,
                   arms='pretrain', precision='fp32', domain='folder', root=str(root), out=str(out)),
            'model.image_size': 96, **change}


def torchrun(values, restarts=0):
    "The command of two ranks on this machine, under way."
    command = [TORCHRUN, '--standalone', '--nproc-per-node', '2', '--max-restarts', f'{restarts}',
               '-m', 'synthdet', 'run', *(f'{k}={v}' for k, v in values.items())]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=dict(os.environ, OMP_NUM_THREADS='1', GLOO_SOCKET_IFNAME='lo'))


def ended(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def workers(process):
    return [int(p) for p in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()]


@pytest.mark.slow
def test_a_rank_that_is_killed_changes_no_bit(root, tmp_path, monkeypatch):
    code, said, err = ended(torchrun(words(root, tmp_path/'whole')))
    assert code == 0 and 'pretrain       test AP50' in said and said.count('\n') == 2, err
    process = torchrun(words(root, tmp_path/'killed'), restarts=2)
    for states, victim in ((1, 1), (2, 0)):                 # while pretraining, and while fine-tuning
        while len(list((tmp_path/'killed').rglob('state.pt'))) < states and process.poll() is None: time.sleep(.02)
        os.kill(workers(process)[victim], signal.SIGKILL)
        time.sleep(1)
    code, said, err = ended(process)
    assert code == 0 and err.count('exitcode: -9') == 2 and 'Traceback' not in err, err
    weights = [{p.parent.name: p.read_bytes() for p in (tmp_path/d).rglob('best.safetensors')}
               for d in ('whole', 'killed')]
    assert len(weights[0]) == 2 and weights[0] == weights[1]
    a, b = (read_jsonl(tmp_path/d/'results.jsonl') for d in ('whole', 'killed'))
    assert len(a) == len(b) == 1 and a[0]['ranks'] == [2, 2]
    assert all(a[0][k] == b[0][k] for k in ('id', 'ap50', 'curve', 'settings', 'best_step'))
    monkeypatch.setattr(train_module, '_fit', None)         # one process, as the notebook: found, and nothing trained
    assert run_plan(words(root, tmp_path/'whole')) == a
    arm, = make_arms('pretrain', **{k: v for k, v in words(root, '').items() if k not in ('arms', 'out')})
    assert [d['ranks'] for d in fit(arm, tmp_path/'whole', load(arm))[1]] == [2, 2]


@pytest.mark.slow
def test_a_mistake_is_said_once(root, tmp_path):
    code, said, err = ended(torchrun(words(root, tmp_path, batch_size=3)))
    line = 'error: batch_size=3 cannot be shared equally by 2 ranks; choose a multiple of 2'
    assert code and err.splitlines().count(line) == 1 and not said and 'synthdet/' not in err
