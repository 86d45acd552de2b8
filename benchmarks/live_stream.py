"""Step time of training on the live stream, beside the same training on ready tensors, in one run.

    python benchmarks/live_stream.py                              # prints a table, writes results/live_stream.json
    python benchmarks/live_stream.py --weights generator.safetensors   # with another gan64 than the one in the package

Every object of the live stream is drawn by the domain's generator, cut out, and pasted `reuse` times, in threads beside
the trainer; the ready tensors are batches of that very stream, drawn beforehand and kept in memory. The detector and its
batches are those of the quick protocol. `alone` is what making one batch costs a core that does nothing else.
"""
import argparse, json, sys, time
from itertools import cycle, islice
from pathlib import Path
import cv2
import torch
from synthdet.core import device, run_info, write_atomic
from synthdet.data.batches import batches
from synthdet.data.domains import load_domain
from synthdet.detection.detectors import detector
from synthdet.detection.settings import Model, Schedule
from synthdet.detection.train import as_floats
from synthdet.masks.segment import make_segmenter
from synthdet.masks.settings import Masks
from synthdet.objects.objects import make_objects
from synthdet.objects.settings import Objects
from synthdet.synthesis.cutouts import make_cutouts
from synthdet.synthesis.settings import Recipe, Synthesis
from synthdet.synthesis.stream import make_samples, Samples

OUT = Path(__file__).resolve().parents[1]/'results'/'live_stream.json'
MODEL, SCHEDULE = Model(), Schedule() # those of the quick protocol
DOMAIN = load_domain('butterflies', image_size=MODEL.image_size)


def objects(weights):
    "The settings of the generator."
    return Objects('gan', weights or '')


def stream(segmenter, reuse, weights):
    "The live stream of a run."
    made = Synthesis(objects(weights), Masks(segmenter), Recipe(image_size=MODEL.image_size), reuse=reuse)
    return make_samples(DOMAIN, made)


def seconds_per_step(feed, steps, warm=8):
    "Mean wall time of an optimiser step, the waiting for its batch included."
    where = device()
    torch.manual_seed(0)
    model = detector(MODEL, num_classes=2).to(where).train()
    optimizer = torch.optim.Adam(model.parameters(), SCHEDULE.lr)
    for step, (images, targets) in enumerate(islice(feed, warm + steps)):
        if step == warm:
            if where.type == 'cuda': torch.cuda.synchronize()
            start = time.perf_counter()
        losses = model(as_floats(images, where), [{k: v.to(where) for k, v in t.items()} for t in targets])
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        optimizer.step()
    if where.type == 'cuda': torch.cuda.synchronize()
    if hasattr(feed, 'close'): feed.close()
    return (time.perf_counter() - start)/steps


def alone(segmenter, weights, n=64):
    "Milliseconds of processor time that a batch costs without reuse: drawing its objects, cutting them out, composing."
    samples, made = stream(segmenter, 1, weights), make_objects(objects(weights), DOMAIN)
    needed = SCHEDULE.batch_size*sum(map(samples.pool.counts, range(200)))/200 # objects of a batch, mean
    clock, times = time.perf_counter if torch.cuda.is_available() else time.process_time, {}
    start = clock()
    drawn = [made[k] for k in range(n)]
    times['draw'] = (clock() - start)/n*needed
    class Drawn:
        "The same objects again and again."
        def __len__(self): raise TypeError('no end')
        def __getitem__(self, k): return drawn[k % n]
    endless = make_cutouts(Drawn(), make_segmenter(Masks(segmenter), DOMAIN))
    start = clock()
    kept = endless.some(0, n//2, n)
    times['segment'] = (clock() - start)/(n//2)*needed
    pool = Samples(kept, DOMAIN.backgrounds, samples.recipe)
    pool.fill()
    start = clock()
    for i in range(n): pool[i]
    times['compose'] = (clock() - start)/n*SCHEDULE.batch_size
    samples.close()
    return {k: round(1000*v, 1) for k, v in times.items()}


def main(steps, reuses, weights, out):
    rows, parts = [], {s: alone(s, weights) for s in ('redo', 'grabcut')}
    for s, p in parts.items(): print(f'{s}: one batch alone, ms of a core:', p, flush=True)
    kept = list(islice(batches(stream('redo', 4, weights), SCHEDULE.batch_size), 16))
    for threads in (1, torch.get_num_threads()) if not torch.cuda.is_available() else (1,):
        torch.set_num_threads(threads); cv2.setNumThreads(1)
        ready = [seconds_per_step(cycle(kept), steps)]
        for segmenter in parts:
            for reuse in reuses:
                made = batches(stream(segmenter, reuse, weights), SCHEDULE.batch_size, workers=1)
                live = round(1000*seconds_per_step(made, steps), 1)
                rows.append(dict(segmenter=segmenter, reuse=reuse, trainer_threads=threads, live_ms=live))
                print(rows[-1], flush=True)
        ready.append(seconds_per_step(cycle(kept), steps)) # again at the end: the machine may have changed its pace
        mean = 500*sum(ready)
        for r in rows:
            if r['trainer_threads'] == threads: r.update(ready_ms=round(mean, 1), ratio=round(r['live_ms']/mean, 2))
        both = ' and '.join(f'{1000*t:.1f}' for t in ready)
        print(f'{threads} trainer threads, ready tensors: {both} ms per step', flush=True)
    about = dict(command=' '.join(['python', 'benchmarks/live_stream.py', *sys.argv[1:]]), protocol='quick', steps=steps,
                 weights=Path(weights or '').name, batch_size=SCHEDULE.batch_size, alone_ms=parts, rows=rows, **run_info())
    if out: write_atomic(out, json.dumps(about, indent=1) + '\n')
    for r in rows: print(*(f'{k} {v}' for k, v in r.items()))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=40, help='timed steps of each run')
    parser.add_argument('--reuse', type=int, nargs='+', default=[1, 2, 4, 8, 16], help='uses of each object')
    parser.add_argument('--weights', help='of gan64 (default: those in the package)')
    parser.add_argument('--out', default=str(OUT), help="where the numbers go; '' writes none")
    main(*vars(parser.parse_args()).values())
