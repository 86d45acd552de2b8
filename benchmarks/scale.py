"""What grows with the size of a run: memory, disk, start and speed against cut-outs, files, classes, samples and steps.

    python benchmarks/scale.py                       # all parts: some minutes, 5 GB of disk; writes results/scale.json
    python benchmarks/scale.py classes cutting       # only these parts; the others stay in the file as they were
    python benchmarks/scale.py pools --cutouts 20000 --folder /scratch

Cut-outs are 24 to 40 px of RGBA. Those of a pool read from disk and those held in memory are pasted in turns in one
run, so their rates can be compared; the file has just been written, so reads come from the cache of the operating
system unless it is smaller than the file. Seconds are of processor time but for `cutting` and where `wall` is said.
"""
import argparse, gc, json, os, resource, shutil, sys, tempfile, time
from functools import partial
from pathlib import Path
import cv2
import numpy as np
import torch
from synthdet.boxes import chw, hwc
from synthdet.core import digest
from synthdet.machine import run_info
from synthdet.paths import append_jsonl, write_atomic
from synthdet.data import butterflies
from synthdet.data.batches import batches, Loop, Mixed
from synthdet.data.domain import ClassImage
from synthdet.data.domains import ClassImages, Images
from synthdet.data.images import write_image
from synthdet.data.walks import image_files
from synthdet.detection.detectors import detector
from synthdet.detection.evaluate import evaluate, validator
from synthdet.detection.settings import Model
from synthdet.detection.contract import select
from synthdet.detection.ssd import focal, ssd
from synthdet.detection.train import train
from synthdet.objects.objects import content
from synthdet.synthesis import cutouts as store
from synthdet.synthesis.cut import Cutout
from synthdet.synthesis.settings import Recipe
from synthdet.synthesis.stream import Samples

OUT = Path(__file__).resolve().parents[1]/'results'/'scale.json'
SIZE, MB = 300, 2**20


def rss():
    "Resident memory in MB."
    gc.collect()
    return int(Path('/proc/self/statm').read_text().split()[1])*resource.getpagesize()/MB


def timed(f, clock=time.process_time):
    "What `f()` gives, its seconds, and the MB of memory it left."
    memory, start = rss(), clock()
    made = f()
    return made, clock() - start, rss() - memory


def in_turns(runs, n, rounds=5):
    "Seconds per call of each of some functions of a number: all in turns, the fastest turn of each."
    best = dict.fromkeys(runs, float('inf'))
    for r in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            for i in range(n): run(r*n + i)
            best[name] = min(best[name], (time.process_time() - start)/n)
    return best


# pools of cut-outs

class Drawn:
    "Objects that are cut out already: 64 butterflies of 24 to 40 px, again and again under names of their own."
    def __init__(self, n):
        self.n, self.kinds = n, [self.rgba(i) for i in range(64)]

    def rgba(self, i):
        image, mask = butterflies.class_image(i, size=24 + i % 17)
        return chw(np.dstack([hwc(image), np.asarray(mask, np.uint8)*255]))

    def __len__(self): return self.n
    def __getitem__(self, i): return ClassImage(self.kinds[i % 64], 1 + i % 10, f'class {i % 10}/{i:08d}.png')


def given(members):
    "Objects as their own cut-outs."
    return [(Cutout(*x), None, float('nan')) for x in members]


def stream(pool):
    "The stream of a pool on one background."
    return Samples(pool, [butterflies.background(0, size=SIZE)], Recipe(image_size=SIZE))


def pool_row(folder, n):
    "A pool of n cut-outs: what it takes to write, to open and to read."
    path = folder/f'{n}.npz'
    _, write, _ = timed(lambda: store._cut_all(Drawn(n), given, 'given', path, 0), time.perf_counter)
    read, opened, memory = timed(lambda: store._load(path, 'given', 0))
    _, named, _ = timed(lambda: read.content)
    held, loaded, in_memory = timed(lambda: store._load(path, 'given', 1e9))
    images = in_turns({'disk': stream(read).__getitem__, 'memory': stream(held).__getitem__}, 100)
    picks = np.random.default_rng(0).integers(n, size=10_000).tolist()
    cuts = in_turns({'disk': lambda i: read[picks[i]], 'memory': lambda i: held[picks[i]]}, 2000)
    rates = {f'images_per_second_{k}': round(1/v, 1) for k, v in images.items()}
    costs = {f'us_per_cutout_{k}': round(v*1e6, 1) for k, v in cuts.items()}
    return dict(cutouts=n, write_wall_s=round(write, 2),
                pixels_mb=round(path.with_suffix('.rgba').stat().st_size/MB, 1),
                table_mb=round(path.stat().st_size/MB, 2), open_s=round(opened, 3), content_s=round(named, 3),
                open_mb=round(memory, 1), load_s=round(loaded, 2), load_mb=round(in_memory, 1), **rates, **costs,
                disk_of_memory=round(images['memory']/images['disk'], 3))


def along(folder, n, samples):
    "Resident memory along a stream whose pool lies on disk."
    made, rows = stream(store._load(folder/f'{n}.npz', 'given', 0)), []
    for i in range(samples):
        made[i]
        if (i + 1) % (samples//10) == 0: rows.append(dict(samples=i + 1, rss_mb=round(rss(), 1)))
    return rows


def ways(folder, n, reads=20_000):
    "One read of the file for each cut-out beside a map of the file: seconds, and the memory that is counted."
    pool = store._load(folder/f'{n}.npz', 'given', 0).cutouts
    mapped = store.Stored(pool.rows, pool.text, np.memmap(folder/f'{n}.rgba', mode='r+')) # not written to
    picks, rows = np.random.default_rng(1).integers(n, size=reads).tolist(), []
    for name, way in (('read', pool), ('memory map', mapped)):
        _, seconds, memory = timed(lambda: [way[i].rgba.sum() for i in picks] and None)
        rows.append(dict(way=name, us=round(seconds/reads*1e6, 1), mb=round(memory, 1)))
    return rows


def pools(a):
    "Rows about pools of a hundredth, a tenth and all of the cut-outs."
    sizes = [max(1000, a.cutouts//k) for k in (100, 10, 1)]
    store._BLOCK = 4096 # no masks are looked for here: fewer parts, so fewer waits for the disk
    need, free = a.cutouts*5000*1.2/MB, shutil.disk_usage(a.folder).free/MB
    if free < need: sys.exit(f'{a.folder} has {free:.0f} MB free and {need:.0f} are needed; see --cutouts and --folder')
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        folder = Path(folder)
        rows = [pool_row(folder, n) for n in sizes]
        return dict(pools=rows, along=along(folder, sizes[-1], a.samples), ways=ways(folder, sizes[-1]))


# files, cutting, backgrounds

def files_row(folder, n):
    "What a folder of n class images costs at a start: to list, to name the first time and again."
    (folder/str(n)).mkdir()
    first = write_image(folder/f'{n}.jpg', butterflies.class_image(0, size=64)[0])
    for i in range(n): os.link(first, folder/str(n)/f'{i:07d}.jpg')
    time.sleep(2.5) # times so new are not trusted
    listed, listing, memory = timed(lambda: image_files(folder/str(n)))
    images = ClassImages(listed, [1]*n, folder)
    _, read, _ = timed(lambda: content(images))
    _, again, _ = timed(lambda: content(images))
    return dict(files=n, list_s=round(listing, 2), list_mb=round(memory, 1), name_s=round(read, 2),
                name_again_s=round(again, 2))


def files(a):
    "Rows about folders of class images."
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        os.environ['SYNTHDET_CACHE'] = f'{folder}/cache'
        return dict(files=[files_row(Path(folder), n) for n in (1000, 10_000, 40_000)])


def cutting(a):
    "Cut-outs per second of wall time with GrabCut, in this process and in two."
    objects, rows = [ClassImage(butterflies.class_image(i, size=64)[0], 1, str(i)) for i in range(512)], []
    for workers in (0, 2):
        _, seconds, _ = timed(lambda: store.make_cutouts(objects, cache=False, workers=workers), time.perf_counter)
        rows.append(dict(workers=workers, cutouts_per_second=round(512/seconds, 1)))
    return dict(cutting=rows)


def backgrounds(a):
    "Images per second with backgrounds in memory, and with those read again from JPEG files at every use."
    pool = [c for c, _, _ in given(Drawn(64)[i] for i in range(64))]
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        scene = lambda i: butterflies.background(i, size=640)
        listed = [write_image(Path(folder)/f'{i}.jpg', scene(i)) for i in range(16)]
        made = {k: Samples(pool, Images(listed), Recipe(image_size=SIZE), budget_mb=mb)
                for k, mb in (('in memory', 100), ('read again', 0))}
        made['in memory'].fill()
        seconds = in_turns({k: s.__getitem__ for k, s in made.items()}, 60)
    return dict(backgrounds=[dict(backgrounds=k, images_per_second=round(1/s, 1)) for k, s in seconds.items()])


# classes

def scored(classes, n, g):
    "Detections and truth of n images: ten boxes each, found a little off, and ninety of any class beside them."
    found, truth = [], []
    for _ in range(n):
        corner = torch.from_numpy(g.uniform(0, 200, (100, 2)).astype(np.float32))
        boxes, labels = torch.cat([corner, corner + 60], 1), torch.from_numpy(g.integers(1, classes + 1, 100))
        truth.append(dict(boxes=boxes[:10] + 4, labels=labels[:10]))
        found.append(dict(boxes=boxes, labels=labels, scores=torch.from_numpy(g.random(100).astype(np.float32))))
    return found, truth


def loss_of(n, classes):
    "Forward and backward pass of the classification loss of one image."
    logits, truth = torch.zeros(1, n, classes + 1, requires_grad=True), torch.zeros(1, n, dtype=torch.int64)
    return lambda: focal(logits, truth).backward()


def chosen(n, classes, g):
    "The choice among the anchors of one image, each sure of some class."
    scores = torch.full((1, n, classes + 1), .1/classes)
    scores[0, torch.arange(n), torch.from_numpy(g.integers(1, classes + 1, n))] = .4
    corner = torch.from_numpy(g.uniform(0, 250, (1, n, 2)).astype(np.float32))
    return lambda: select(torch.cat([corner, corner + 40], -1), scores, .01, .5)


def classes_row(classes, images=300):
    "What a detector of so many classes weighs, and what its losses, its choice of boxes and its scores cost."
    g = np.random.default_rng(0)
    with torch.device('meta'): model = ssd('mobilenetv1_100', 'none', classes + 1, SIZE) # sizes without memory
    params, n = sum(p.numel() for p in model.parameters()), len(model.anchors)
    found, truth = scored(classes, images, g)
    runs = dict(loss=loss_of(n, classes), choice=chosen(n, classes, g), scores=partial(evaluate, found, truth))
    seconds = {f'{k}_s': round(timed(run)[1], 3) for k, run in runs.items()}
    return dict(classes=classes, anchors=n, parameters=params, head_parameters=sum(p.numel() for p in
                model.heads.parameters()), logits_mb=round(n*(classes + 1)*4/MB, 2), scored_images=images, **seconds)


def classes(a):
    "Rows about 10, 1,000 and 10,000 classes."
    return dict(classes=[classes_row(n) for n in (10, 1000, 10_000)])


# samples, steps, results

def random_access(a):
    "Milliseconds of a sample against its number, and microseconds of what hands numbers on."
    made = stream([c for c, _, _ in given(Drawn(64)[i] for i in range(64))])
    at = (0, 10**3, 10**6, 10**9, 10**12)
    seconds = in_turns({k: lambda i, k=k: made[k + i] for k in at}, 60)
    mixed, loop = Mixed(range(1000), made, .1), Loop(range(a.cutouts))
    order = {k: lambda i, k=k: loop.index(k + i) for k in at}
    share = {k: lambda i, k=k: (int((k + i)*mixed.share), int((k + i + 1)*mixed.share)) for k in at}
    costs = in_turns(order, 2000), in_turns(share, 2000)
    new = timed(lambda: loop.index(10**13))[1]
    rows = [dict(sample=k, ms=round(seconds[k]*1e3, 3), pass_us=round(costs[0][k]*1e6, 1),
                 mixture_us=round(costs[1][k]*1e6, 1)) for k in at]
    return dict(samples=rows, passes=[dict(items=a.cutouts, new_order_ms=round(new*1e3, 1))])


def records(a):
    "What a training leaves behind: bytes of its state and of a step, and the cost of a line in a long file."
    where, steps = Model(), 24
    scenes = [butterflies.scene(i, size=where.image_size)[:2] for i in range(8)]
    data = [(x, dict(boxes=boxes, labels=torch.ones(len(boxes), dtype=torch.int64))) for x, boxes in scenes]
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        folder, model = Path(folder), detector(where, num_classes=2)
        train(model, lambda start: batches(data, 2, start), steps, folder/'run', validate=validator(data), save_every=8)
        size = lambda name: (folder/'run'/name).stat().st_size
        row = dict(run=digest('x'), **{f'setting {i}': .5 for i in range(60)})
        lines = []
        for n in (100, 100_000):
            write_atomic(folder/f'{n}.jsonl', (json.dumps(row) + '\n')*n)
            seconds = min(timed(lambda: append_jsonl(folder/f'{n}.jsonl', row), time.perf_counter)[1] for _ in range(9))
            lines.append(dict(rows=n, append_wall_ms=round(seconds*1e3, 2)))
        about = dict(parameters=sum(p.numel() for p in model.parameters()), steps=steps,
                     metrics_bytes_per_step=round(size('metrics.jsonl')/steps, 1),
                     state_mb=round(size('state.pt')/MB, 1), weights_mb=round(size('last.safetensors')/MB, 1))
    results = [line for f in (OUT.parent/'studies').glob('*.jsonl') for line in f.read_text().splitlines()]
    return dict(training=[about], lines=lines,
                results=[dict(rows=len(results), bytes_per_row=round(sum(map(len, results))/len(results)))])


PARTS = dict(pools=pools, files=files, cutting=cutting, backgrounds=backgrounds, classes=classes,
             random_access=random_access, records=records)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('parts', nargs='*', help=f"which: {', '.join(PARTS)}; none: all")
    p.add_argument('--cutouts', type=int, default=1_000_000, help='of the largest pool')
    p.add_argument('--samples', type=int, default=10_000, help='over which memory is looked at')
    p.add_argument('--folder', default=tempfile.gettempdir(), help='where there is disk space')
    a = p.parse_args()
    cv2.setNumThreads(1); torch.set_num_threads(1)
    known = json.loads(OUT.read_text()) if OUT.exists() else {}
    for name in a.parts or PARTS:
        start = time.perf_counter()
        rows = PARTS[name](a)
        for table, found in rows.items(): print(f'{table}:', *found, sep='\n  ')
        command = ' '.join(['python', *map(str, sys.argv)])
        known[name] = dict(command=command, seconds=round(time.perf_counter() - start, 1), rows=rows, run=run_info())
        write_atomic(OUT, json.dumps(known, indent=1) + '\n')


if __name__ == '__main__': main()
