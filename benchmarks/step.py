"""Milliseconds of a training step, beside the network alone and beside torchvision's detectors.

    python benchmarks/step.py                                # CPU on one thread, and the GPU when there is one
    python benchmarks/step.py --only resnet_small --rounds 3 # shorter
    python benchmarks/step.py --compile                      # compiled steps on the CPU, too (the GPU's always are)

`ours` is the step of `synthdet.train`: uint8 batch and matched targets in, losses, gradients, optimiser.
`network alone` is the least a step can cost: backbone and heads on floats, the mean square of what they say as loss,
gradients, the same optimiser. `matching` is what `ours` does where batches are made, in worker processes;
torchvision's detectors do it inside the step. `torchvision SSD` is torchvision's SSD on the same backbone (four
anchors per cell where ours has three, as it cannot have three), `ssdlite320` its small detector at this size; both run
in the same loop with the same optimiser. All of them take turns; a CPU's number is the fastest turn in CPU time, since
other programs can only add time, a GPU's the median turn by the clock. Rates are left out of it: batches are made
beforehand.
"""
import argparse, itertools, json, statistics, sys, tempfile, time
from collections import OrderedDict
from contextlib import ExitStack
from functools import partial
from pathlib import Path
import torch
from torch import nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from synthdet.machine import device as default_device, run_info
from synthdet.paths import write_atomic
from synthdet.data.butterflies import scene
from synthdet.detection.detectors import detector
from synthdet.detection.settings import Schedule
from synthdet.detection.train import _arrived, _start, _step, _without_slow_kernels
from synthdet.precision import autocast, TYPES
from synthdet.settings import to_row

OUT = Path(__file__).resolve().parents[1]/'results'/'step.json'
RUNNING = ExitStack()
SETUPS = {  # name -> detector, side, batch
    'MobileNetV1, 160 px': (dict(model='ssd', backbone='mobilenetv1_100'), 160, 8),
    'MobileNetV1, 300 px': (dict(model='ssd', backbone='mobilenetv1_100'), 300, 8),
    'resnet_small, 128 px': (dict(model='ssd', backbone='resnet_small'), 128, 16),
    'RetinaFace, 320 px': (dict(model='retinaface'), 320, 8)}


class Maps(nn.Module):
    "The maps of one of our detectors as torchvision's SSD takes them."
    def __init__(self, ours):
        super().__init__()
        self.ours = nn.ModuleDict({k: m for k, m in ours.named_children() if 'ead' not in k})

    def forward(self, x):
        parts = self.ours
        if 'backbone' in parts: maps = parts['backbone'](x)
        else: maps = [parts[f'ssh{k}'](m) for k, m in enumerate(parts['fpn'](parts['body'](x)), 1)]
        return OrderedDict((str(k), m) for k, m in enumerate(maps))


def torchvision_ssd(ours, side):
    "torchvision's SSD on the backbone of one of our detectors."
    maps = Maps(ours)
    with torch.no_grad(): n = len(maps.eval()(torch.zeros(1, 3, side, side)))
    boxes = DefaultBoxGenerator([[2]]*n, scales=[.1*2**k for k in range(n + 1)])
    maps.out_channels = [m.shape[1] for m in maps(torch.zeros(1, 3, side, side)).values()]
    return SSD(maps.train(), boxes, (side, side), 2, image_mean=[0., 0, 0], image_std=[1., 1, 1])


def batch_of(side, n):
    "A batch of scenes: uint8 [n,3,side,side], targets."
    scenes = [scene(i, size=side) for i in range(n)]
    images = torch.stack([i for i, _, _ in scenes]).contiguous(memory_format=torch.channels_last)
    return images, [dict(boxes=b.float(), labels=torch.ones(len(b), dtype=torch.int64)) for _, b, _ in scenes]


def run_of(model, device, precision, compile=False):
    "A training of a model, ready for its first step."
    schedule = Schedule(lr=1e-5, precision=precision, compile=compile)
    config = dict(to_row(schedule), decay=[], seed=0, key='', steps=10**6, validated=False)
    run = _start(model.to(device, memory_format=torch.channels_last).train(), config, Path(tempfile.mkdtemp()), device)
    RUNNING.enter_context(_without_slow_kernels(run)) # as in `train`
    return run


def trained(run, batch):
    "A step of `synthdet.train`."
    steps = itertools.count(1)
    return lambda: _step(run, batch, next(steps))


def network_alone(run, batch):
    "A step of backbone and heads with next to no loss."
    model, optimizer, dtype = run.model, run.optimizer, TYPES[run.config['precision']]
    x = _arrived(run, batch)[0]
    ready = partial(model.prepare, size=tuple(x.shape[-2:])) if hasattr(model, 'prepare') else lambda x: x
    def step():
        with autocast(run.device, dtype): said = model.raw(ready(x))
        loss = sum(s.square().mean() for s in said)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return step


def steps_of(setup, device, precision, compiled):
    "name -> function that does one step."
    options, side, n = SETUPS[setup]
    def new(): return torch.manual_seed(0) and detector(num_classes=2, image_size=side, **options)
    batch, run = batch_of(side, n), lambda model, **how: run_of(model, device, precision, **how)
    ours = run(new())
    asked = ours.matcher(*batch)
    steps = {'ours': trained(ours, asked), 'network alone': network_alone(run(new()), asked)}
    if compiled: steps['ours, compiled'] = trained(run(new(), compile=True), asked)
    steps['torchvision SSD'] = trained(run(torchvision_ssd(new(), side)), batch)
    steps['ssdlite320'] = trained(run(detector('ssdlite320', 2, image_size=side)), batch)
    return dict(steps, matching=lambda: ours.matcher(*batch))


def seconds_of(step, device, steps):
    "What a step takes, of several."
    clock = time.perf_counter if device.type == 'cuda' else time.process_time
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    wait()
    start = clock()
    for _ in range(steps): step()
    wait()
    return (clock() - start)/steps


def measured(setup, device, precision, *, rounds, steps, compiled):
    "Rows of one setup; the first turns warm up."
    runs, best = steps_of(setup, device, precision, compiled), statistics.median if device.type == 'cuda' else min
    seconds = {k: [] for k in runs}
    for r in range(-2, rounds):
        for k, step in runs.items():
            taken = seconds_of(step, device, steps)
            if r >= 0: seconds[k].append(taken)
    ms = {k: 1000*best(v) for k, v in seconds.items()}
    about = dict(setup=setup, device=device.type, precision=precision)
    return [dict(about, name=k, ms=round(v, 2), of_network=round(v/ms['network alone'], 3),
                 of_torchvision=round(v/ms['torchvision SSD'], 3)) for k, v in ms.items()]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', default='', help='setups whose name holds this')
    p.add_argument('--device', default='', help='cpu or cuda; empty: both where there are both')
    p.add_argument('--rounds', type=int, default=8, help='turns of each')
    p.add_argument('--steps', type=int, default=0, help='steps of a turn; 0: 1 on a CPU, 20 on a GPU')
    p.add_argument('--compile', action='store_true', help='compiled steps on the CPU, too')
    p.add_argument('--out', default=OUT, help='file of the rows')
    a = p.parse_args()
    torch.set_num_threads(1)
    devices = [a.device] if a.device else sorted({'cpu', default_device().type})
    rows = []
    for d, setup, precision in itertools.product(devices, SETUPS, ('fp32', 'bf16')):
        if a.only not in setup: continue
        gpu = d == 'cuda'
        rows += measured(setup, torch.device(d), precision, rounds=a.rounds, steps=a.steps or (20 if gpu else 1),
                         compiled=gpu or a.compile)
        for r in rows[-6 if gpu or a.compile else -5:]:
            print('{setup:22}{device:6}{precision:6}{name:18}{ms:9.2f} ms{of_network:8.3f} of the network'
                  '{of_torchvision:8.3f} of torchvision'.format(**r), flush=True)
    about = dict(command=' '.join(['python', *map(str, sys.argv)]), rows=rows, run=run_info())
    write_atomic(Path(a.out), json.dumps(about, indent=1)+'\n')


if __name__ == '__main__': main()
