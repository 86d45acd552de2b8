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
from synthdet.synthesis.settings import Recipe
from synthdet.core import device, run_info, write_atomic
from synthdet.synthesis.cutouts import make_cutouts
from synthdet.detection.detectors import detector
from synthdet.data.domains import load_domain
from synthdet.evidence.arm import PROTOCOLS
from synthdet.objects.objects import make_objects
from synthdet.objects.settings import Objects
from synthdet.data.batches import batches
from synthdet.synthesis.stream import make_samples, Samples
from synthdet.detection.train import as_floats

OUT = Path(__file__).resolve().parents[1]/'results'/'live_stream.json'
QUICK = PROTOCOLS['quick']
DOMAIN = load_domain('butterflies', image_size=QUICK['image_size'])


def stream(segmenter, reuse, weights):
    "The live stream of a run."
    return make_samples(DOMAIN, objects='gan', object_weights=weights, segmenter=segmenter, recipe=Recipe(image_size=QUICK['image_size'], reuse=reuse))


def seconds_per_step(feed, steps, warm=8):
    "Mean wall time of an optimiser step, the waiting for its batch included."
    where = device()
    torch.manual_seed(0)
    model = detector('ssd', num_classes=2, image_size=QUICK['image_size'], backbone=QUICK['backbone'], weights='none').to(where).train()
    optimizer = torch.optim.Adam(model.parameters(), QUICK['lr'])
    for step, (images, targets) in enumerate(islice(feed, warm + steps)):
        if step == warm:
            if where.type == 'cuda': torch.cuda.synchronize()
            start = time.perf_counter()
        losses = model(as_floats(images, where), [{k: v.to(where) for k, v in t.items()} for t in targets])
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        optimizer.step()
    if where.type == 'cuda': torch.cuda.synchronize()
    feed.close() if hasattr(feed, 'close') else None
    return (time.perf_counter() - start)/steps


def alone(segmenter, weights, n=64):
    "Milliseconds of processor time that a batch costs without reuse: drawing its objects, cutting them out, composing."
    samples, objects = stream(segmenter, 1, weights), make_objects(Objects('gan', str(weights or '')), DOMAIN)
    needed = QUICK['batch_size']*sum(map(samples.cutouts.blocks.counts, range(200)))/200 # objects of a batch, mean
    clock, times = time.perf_counter if torch.cuda.is_available() else time.process_time, {}
    start = clock(); drawn = [objects[k] for k in range(n)]; times['draw'] = (clock() - start)/n*needed
    class Drawn:
        content = []
        def __len__(self): return len(objects)
        def __getitem__(self, k): return drawn[k % n]
    endless = make_cutouts(Drawn(), segmenter, weights='butterflies' if segmenter == 'redo' else None)
    start = clock(); kept = endless.some(0, n//2, n); times['segment'] = (clock() - start)/(n//2)*needed
    pool = Samples(kept, DOMAIN.backgrounds, samples.recipe); pool.fill()
    start = clock(); [pool[i] for i in range(n)]; times['compose'] = (clock() - start)/n*QUICK['batch_size']
    return {k: round(1000*v, 1) for k, v in times.items()}


def main(steps, reuses, weights):
    rows, parts = [], {s: alone(s, weights) for s in ('redo', 'grabcut')}
    for s, p in parts.items(): print(f'{s}: one batch alone, ms of a core:', p, flush=True)
    kept = list(islice(batches(stream('redo', 4, weights), QUICK['batch_size']), 16))
    for threads in (1, torch.get_num_threads()) if not torch.cuda.is_available() else (1,):
        torch.set_num_threads(threads); cv2.setNumThreads(1)
        ready = [seconds_per_step(cycle(kept), steps)]
        for segmenter in parts:
            for reuse in reuses:
                live = seconds_per_step(batches(stream(segmenter, reuse, weights), QUICK['batch_size'], workers=1), steps)
                rows.append(dict(segmenter=segmenter, reuse=reuse, trainer_threads=threads, live_ms=round(1000*live, 1)))
                print(rows[-1], flush=True)
        ready.append(seconds_per_step(cycle(kept), steps)) # again at the end: the machine may have changed its pace
        for r in rows:
            if r['trainer_threads'] == threads: r.update(ready_ms=round(500*sum(ready), 1), ratio=round(r['live_ms']/(500*sum(ready)), 2))
        print(f'{threads} trainer threads, ready tensors: {" and ".join(f"{1000*t:.1f}" for t in ready)} ms per step', flush=True)
    write_atomic(OUT, json.dumps(dict(command=' '.join(['python', 'benchmarks/live_stream.py', *sys.argv[1:]]), weights=Path(weights or '').name, protocol='quick', steps=steps, batch_size=QUICK['batch_size'], alone_ms=parts, rows=rows, **run_info()), indent=1) + '\n')
    for r in rows: print(*(f'{k} {v}' for k, v in r.items()))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=40, help='timed steps of each run')
    parser.add_argument('--reuse', type=int, nargs='+', default=[1, 2, 4, 8, 16], help='uses of each object')
    parser.add_argument('--weights', help='of gan64 (default: those in the package)')
    main(*vars(parser.parse_args()).values())
