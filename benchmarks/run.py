"""What a whole run costs beside its bare steps, and a validation beside its bare forward passes, in one process.

    python benchmarks/run.py            # CPU, one thread: prints a table, writes results/run.json
    python benchmarks/run.py --threads 2

The run is `synthdet.run`'s on the embedded domain: 200 steps on synthesised scenes, 100 on 25 photographs, a validation
of 200 images every 50. Its parts are timed from within; `bare` is the same model, precision and number of steps on one
batch that lies ready, and the same number of forward passes over the validation images as one tensor. CPU seconds, so
other programs disturb little.
"""
import argparse, json, sys, tempfile, time
from contextlib import contextmanager
from pathlib import Path
import torch
from synthdet.machine import run_info
from synthdet.paths import write_atomic
from synthdet.precision import autocast, TYPES
from synthdet.data.batches import batches
from synthdet.detection import train as training
from synthdet.evidence import phases
from synthdet.evidence.arm import make_arms, resolved

OUT = Path(__file__).resolve().parents[1]/'results'/'run.json'
SETTINGS = 'n_real=25 pretrain_steps=200 steps=100 eval_every=50'


class Clock:
    "CPU seconds by part; a part within another counts as itself alone."
    def __init__(self): self.seconds, self.inside, self.last = {}, ['everything else'], time.process_time()

    def turn(self):
        now = time.process_time()
        self.seconds[self.inside[-1]] = self.seconds.get(self.inside[-1], 0) + now - self.last
        self.last = now

    @contextmanager
    def part(self, name):
        self.turn()
        self.inside.append(name)
        try: yield
        finally:
            self.turn()
            self.inside.pop()

    def timed(self, name, f):
        def call(*args, **options):
            with self.part(name): return f(*args, **options)
        return call

    def feeding(self, name, source):
        "An iterator whose items are timed."
        items = iter(source)
        while True:
            with self.part(name): item = next(items)
            yield item


def timed_run(arm, loaded, out):
    "CPU seconds of a run, by part."
    clock, kept = Clock(), {}
    def replace(module, name, part):
        kept[module, name] = getattr(module, name)
        setattr(module, name, clock.timed(part, kept[module, name]))
    replace(training, '_step', 'steps')
    replace(training, '_validate', 'validation')
    replace(training, '_save', 'state and weights')
    replace(training, 'digest', 'digest of weights')
    replace(phases, '_scores', 'test')
    kept[phases, 'batches'], kept[phases, 'stream'] = phases.batches, phases.stream
    def filled(*args):
        with clock.part('objects and backgrounds, once'):
            made = kept[phases, 'stream'](*args)
            made.fill()
            return made
    def fed(*args, prepare, **options):
        prepare = clock.timed('matching', prepare)
        return clock.feeding('stream', kept[phases, 'batches'](*args, prepare=prepare, **options))
    phases.stream, phases.batches = filled, fed
    try:
        row = phases.run(arm, out, loaded=loaded)
        clock.turn()
    finally:
        for (module, name), f in kept.items(): setattr(module, name, f)
    return clock.seconds, row


def bare(arm, loaded, steps, validations):
    "CPU seconds of the steps on a ready batch, and of the forward passes over the validation images."
    model = phases.build(arm, loaded)
    feed = batches(phases.stream(arm.labels, arm, loaded), arm.schedule.batch_size, prepare=training.matcher_of(model))
    batch = next(feed)
    with tempfile.TemporaryDirectory() as out:
        step, clock = training._step, Clock()
        training._step = clock.timed('steps', step)
        try: training.train(model, lambda start: iter(lambda: batch, None), steps, out, arm.schedule, eval_every=steps)
        finally: training._step = step
    images, dtype, start = loaded.val.images, TYPES[arm.schedule.precision], time.process_time()
    with torch.no_grad(), autocast('cpu', dtype):
        for _ in range(validations):
            for i in range(0, len(images), 16): model.eval().raw(images[i:i+16]/255)
    return clock.seconds['steps'], time.process_time() - start


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--threads', type=int, default=1)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    arm = resolved(make_arms('pretrain', SETTINGS)[0])
    start = time.process_time()
    loaded = phases.load(arm)
    reading = time.process_time() - start
    steps, validations = arm.steps + arm.pretrain_steps, (arm.steps + arm.pretrain_steps)//arm.schedule.eval_every
    before = bare(arm, loaded, steps, validations)
    with tempfile.TemporaryDirectory() as out: parts, _ = timed_run(arm, loaded, out)
    after = bare(arm, loaded, steps, validations) # again: the machine may have changed its pace
    bare_steps, forward = ((a + b)/2 for a, b in zip(before, after))
    test = parts.pop('test')
    parts = dict(parts, reading=reading)
    rows = [dict(part=k, seconds=round(v, 2)) for k, v in sorted(parts.items(), key=lambda kv: -kv[1])]
    for r in rows: print('{part:32}{seconds:8.2f} s'.format(**r))
    training_ = sum(parts.values()) - parts['reading']
    ratios = dict(step=round(parts['steps']/bare_steps, 3), validation=round(parts['validation']/forward, 3),
                  run=round((training_ - parts['validation'])/bare_steps, 3),
                  run_with_validation=round(training_/(bare_steps + forward), 3))
    print(f'bare steps{bare_steps:30.2f} s\nbare forward{forward:28.2f} s\ntest of 400{test:29.2f} s')
    for k, v in ratios.items(): print(f'{k:32}{v:8.3f} of bare')
    about = dict(command=' '.join(['python', *sys.argv]), precision=arm.schedule.precision, rows=rows, ratios=ratios,
                 bare_steps=round(bare_steps, 2), bare_forward=round(forward, 2), test=round(test, 2), run=run_info())
    write_atomic(OUT, json.dumps(about, indent=1) + '\n')


if __name__ == '__main__': main()
