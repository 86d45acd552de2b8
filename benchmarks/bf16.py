"""Milliseconds of a training step in bf16 beside fp32, and beside bf16 with PyTorch's own kernels.

    python benchmarks/bf16.py              # one CPU thread
    python benchmarks/bf16.py --rounds 3   # shorter

`fp32` and `bf16` are steps of `synthdet.train` (benchmarks/step.py); `bf16, torch` is the second with nothing in the
place of PyTorch's kernels. Where the processor has instructions for bf16 that is the same step twice. The three take
turns; a number is the fastest turn in CPU time. Writes results/bf16.json.
"""
import argparse, json, sys
from pathlib import Path
import torch
from synthdet import precision
from synthdet.machine import run_info
from synthdet.paths import write_atomic
from synthdet.detection.detectors import detector
from step import batch_of, run_of, seconds_of, SETUPS, trained

OUT = Path(__file__).resolve().parents[1]/'results'/'bf16.json'
CPU, SMALL = torch.device('cpu'), ('MobileNetV1, 160 px', 'resnet_small, 128 px')


def as_native(step):
    "A step that takes the processor for one with instructions for bf16."
    def run():
        known, precision.native_bf16 = precision.native_bf16, lambda kind: True
        try: step()
        finally: precision.native_bf16 = known
    return run


def measured(setup, rounds):
    "Rows of one setup; the first turn warms up."
    options, side, n = SETUPS[setup]
    def step(kind):
        torch.manual_seed(0)
        run = run_of(detector(num_classes=2, image_size=side, **options), CPU, kind)
        return trained(run, run.matcher(*batch_of(side, n)))
    steps = dict(fp32=step('fp32'), bf16=step('bf16'))
    steps['bf16, torch'] = as_native(step('bf16'))
    turns = [{k: seconds_of(s, CPU, 1) for k, s in steps.items()} for _ in range(1 + rounds)]
    ms = {k: 1000*min(turn[k] for turn in turns[1:]) for k in steps}
    return [dict(setup=setup, name=k, ms=round(v, 1), of_fp32=round(v/ms['fp32'], 3)) for k, v in ms.items()]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rounds', type=int, default=5, help='turns of each (default: %(default)s)')
    p.add_argument('--out', default=str(OUT), help='file of the rows (default: %(default)s)')
    a = p.parse_args()
    torch.set_num_threads(1)
    rows = []
    for setup in SMALL:
        rows += measured(setup, a.rounds)
        for row in rows[-3:]: print('{setup:22}{name:14}{ms:9.1f} ms{of_fp32:8.3f} of fp32'.format(**row), flush=True)
    about = dict(command=' '.join(['python', *map(str, sys.argv)]), native=precision.native_bf16('cpu'), rows=rows)
    write_atomic(Path(a.out), json.dumps(dict(about, run=run_info()), indent=1) + '\n')


if __name__ == '__main__': main()
