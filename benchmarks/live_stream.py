"""Step time of training on the live stream, beside the same training on ready tensors, in one run.

    python benchmarks/live_stream.py                              # prints a table, writes results/live_stream.json
    python benchmarks/live_stream.py --weights generator.safetensors   # with another gan64 than the one in the package

Every object of the live stream is drawn by the domain's generator, cut out, and pasted `reuse` times, in threads beside
the trainer; the ready tensors are batches of that very stream, drawn beforehand and kept in memory. The detector, its
batches and its steps are those of the quick protocol. `alone` is what one object costs in each stage, by how many are
drawn or segmented at once, and one picture: milliseconds of a core that does nothing else, or, on a GPU, by the clock.
`enough` is the least of the uses at which the live stream is at most `GOAL` times as slow as ready tensors.
"""
import argparse, itertools, json, sys, tempfile, time
from itertools import cycle, islice
from pathlib import Path
import cv2
import torch
from synthdet.machine import device, run_info
from synthdet.paths import write_atomic
from synthdet.data.batches import batches
from synthdet.data.domains import load_domain
from synthdet.detection.detectors import detector
from synthdet.detection.settings import Model, resolved_schedule, Schedule
from synthdet.detection.train import _start, _step, matcher_of
from synthdet.masks.segment import make_segmenter
from synthdet.masks.settings import Masks
from synthdet.objects.objects import make_objects
from synthdet.objects.settings import Objects
from synthdet.settings import to_row
from synthdet.synthesis.cut import masks_of
from synthdet.synthesis.cutouts import make_cutouts
from synthdet.synthesis.settings import Recipe, Synthesis
from synthdet.synthesis.stream import make_samples, Samples

OUT = Path(__file__).resolve().parents[1]/'results'/'live_stream.json'
MODEL, SCHEDULE = Model(), Schedule() # those of the quick protocol
DOMAIN = load_domain('butterflies', image_size=MODEL.image_size)
GOAL = 1.05


def objects(weights):
    "The settings of the generator."
    return Objects('gan', weights or '')


def stream(segmenter, reuse, weights, side=MODEL.image_size):
    "The live stream of a run."
    made = Synthesis(objects(weights), Masks(segmenter), Recipe(image_size=side), reuse=reuse)
    return make_samples(DOMAIN, made)


def training(where, model=MODEL, schedule=SCHEDULE):
    "A training before its first step."
    torch.manual_seed(0)
    built = detector(model, num_classes=2).to(where, memory_format=torch.channels_last).train()
    about = to_row(resolved_schedule(schedule, where))
    config = dict(about, decay=[], seed=0, key='', steps=10**6, validated=False)
    return _start(built, config, Path(tempfile.mkdtemp()), where)


def seconds_per_step(run, feed, steps, warm=8):
    "Mean wall time of an optimiser step, the waiting for its batch included."
    wait = torch.cuda.synchronize if run.device.type == 'cuda' else lambda: None
    numbers = itertools.count(1)
    for batch in islice(feed, warm): _step(run, batch, next(numbers))
    wait()
    start = time.perf_counter()
    for batch in islice(feed, steps): _step(run, batch, next(numbers))
    wait()
    taken = (time.perf_counter() - start)/steps
    if hasattr(feed, 'close'): feed.close()
    return taken


def ms_of(do, n):
    "Milliseconds of each of n things, the second time they are done."
    gpu = torch.cuda.is_available()
    clock = time.perf_counter if gpu else time.process_time
    do()
    if gpu: torch.cuda.synchronize()
    start = clock()
    do()
    if gpu: torch.cuda.synchronize()
    return round(1000*(clock() - start)/n, 3)


def in_parts(things, n): return [things[k:k + n] for k in range(0, len(things), n)]


def alone(segmenter, weights, sizes, n=64):
    "Milliseconds that an object costs: drawn and segmented so many at once, cut out; and that a picture costs."
    made, segment = make_objects(objects(weights), DOMAIN), make_segmenter(Masks(segmenter), DOMAIN)
    n = max(n, *sizes)
    drawn = [made[k] for k in range(n)]
    images, draw = [x.image for x in drawn], made.images.draw
    rows = dict(draw={k: ms_of(lambda: [draw(part, 0) for part in in_parts(range(n), k)], n) for k in sizes},
                segment={k: ms_of(lambda: [masks_of(part, segment) for part in in_parts(images, k)], n) for k in sizes})
    class Drawn:
        "The same objects again and again."
        def __len__(self): raise TypeError('no end')
        def __getitem__(self, k): return drawn[k % n]
    endless = make_cutouts(Drawn(), segment)
    rows['cut, all in all'] = ms_of(lambda: endless.cut(drawn), n)
    pool = Samples(endless.some(0, n//2, n), DOMAIN.backgrounds, Recipe(image_size=MODEL.image_size))
    pool.fill()
    rows['compose a picture'] = ms_of(lambda: [pool[i] for i in range(n)], n)
    return rows


def compared(segmenters, reuses, weights, steps, where, model=MODEL, schedule=SCHEDULE):
    "Rows: the live stream of each segmenter and reuse beside ready tensors, which are timed before and after."
    run = training(where, model, schedule)
    ready_made = dict(batch_size=schedule.batch_size, workers=1, prepare=matcher_of(run.model))
    feed = lambda s, reuse: batches(stream(s, reuse, weights, model.image_size), **ready_made)
    made = feed('redo', 4)
    kept = list(islice(made, 16))
    made.close()
    ready, rows = [seconds_per_step(run, cycle(kept), steps)], []
    for s, reuse in itertools.product(segmenters, reuses):
        block = 2*min(reuse, 32) # steps that a block of objects lasts; the first is waited for
        live = seconds_per_step(run, feed(s, reuse), max(steps, 2*block), warm=8 + block)
        rows.append(dict(segmenter=s, reuse=reuse, trainer_threads=1, live_ms=round(1000*live, 1)))
        print(rows[-1], flush=True)
    ready.append(seconds_per_step(run, cycle(kept), steps)) # again at the end: the machine may have changed its pace
    mean = 500*sum(ready)
    print('ready tensors:', *(f'{1000*t:.1f} ms' for t in ready), flush=True)
    return [dict(r, ready_ms=round(mean, 1), ratio=round(r['live_ms']/mean, 2)) for r in rows]


def enough(rows):
    "Segmenter -> the least reuse that reaches the goal; None where none does."
    reach = lambda s: [r['reuse'] for r in rows if r['segmenter'] == s and r['ratio'] <= GOAL]
    return {s: min(reach(s), default=None) for s in dict.fromkeys(r['segmenter'] for r in rows)}


def main(steps, reuses, weights, out):
    where = device()
    sizes = (32, 64, 128, 256) if where.type == 'cuda' else (8, 16, 32, 64)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    parts = {s: alone(s, weights, sizes) for s in ('redo', 'grabcut')}
    for s, p in parts.items(): print(f'{s}, ms alone:', p, flush=True)
    rows = compared(parts, reuses, weights, steps, where)
    about = dict(command=' '.join(['python', 'benchmarks/live_stream.py', *sys.argv[1:]]), protocol='quick',
                 steps=steps, weights=Path(weights or '').name, batch_size=SCHEDULE.batch_size, goal=GOAL,
                 enough=enough(rows), object_ms=parts, rows=rows, **run_info())
    if out: write_atomic(out, json.dumps(about, indent=1) + '\n')
    for r in rows: print(*(f'{k} {v}' for k, v in r.items()))
    print(f'at most {GOAL} times ready tensors with reuse of at least', about['enough'])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=40, help='timed steps of each run')
    parser.add_argument('--reuse', type=int, nargs='+', default=[1, 2, 4, 8, 16], help='uses of each object')
    parser.add_argument('--weights', help='of gan64 (default: those in the package)')
    parser.add_argument('--out', default=str(OUT), help="where the numbers go; '' writes none")
    main(*vars(parser.parse_args()).values())
