"""Images per second of the stream on one core, beside a minimal loop and beside torchvision-style copy-paste.

    python benchmarks/stream.py             # speed, stages, workers: prints tables, writes results/stream.json
    python benchmarks/stream.py --memory    # resident memory over 20,000 samples, added to the same file

All of it runs on 300 x 300 images with three feathered objects and assets in memory. `floor` is the least that draws
such images with NumPy and OpenCV: resize, soften the mask, blend, note the box. `floor, augmented` turns and recolours
the objects as well. Both know no occlusion, nothing beyond the border, and draw no reproducible stream.
`stream, same pastes` has everything switched off that the floor does not do; `stream, augmented` adds flip, rotation,
shear, colours, truncation and the rules of visibility, and is held against the floor that does the same to its
objects; `default recipe` is what training uses: all of it, and distractors, shadows, light, blur, noise and JPEG;
`in batches` the same drawn straight into the memory of batches of 32, as training reads it. The stages are those of
the default recipe, in batches: `rest` is what is in none of them, and `inside OpenCV` the part of all of them that no
change of Python's could save.
"""
import argparse, contextlib, importlib, inspect, json, resource, sys, time
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from unittest.mock import patch
import cv2
import numpy as np
import torch
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2 import functional as F
from synthdet.data import butterflies
from synthdet.synthesis.settings import Recipe
from synthdet.boxes import chw, hwc
from synthdet.machine import run_info
from synthdet.paths import write_atomic
from synthdet.data.batches import batches
from synthdet.synthesis.cut import cutout
from synthdet.synthesis.stream import Samples

OUT = Path(__file__).resolve().parents[1]/'results'/'stream.json'
SIZE, OBJECTS, SCALE, FEATHER = 300, 3, (.15, .7), 2


def assets(n_cutouts=64, n_backgrounds=32):
    "Cut-outs from 128 px class images, and backgrounds of the final size."
    cuts = [cutout(*butterflies.class_image(i, size=128), origin=str(i)) for i in range(n_cutouts)]
    return [c for c in cuts if c is not None], [butterflies.background(i, size=SIZE) for i in range(n_backgrounds)]


def floor_loop(cutouts, backgrounds, augmented=False):
    "The minimal loop; augmented, it turns and recolours the objects, too."
    cutouts, backgrounds = [hwc(c.rgba) for c in cutouts], [hwc(b) for b in backgrounds]
    rng = np.random.default_rng(0)
    def draw(i):
        image, boxes = backgrounds[rng.integers(len(backgrounds))].copy(), []
        for _ in range(OBJECTS):
            rgba = cutouts[rng.integers(len(cutouts))]
            side = SIZE*rng.uniform(*SCALE)/(rgba.shape[0]*rgba.shape[1])**.5
            if augmented:
                matrix = cv2.getRotationMatrix2D((rgba.shape[1]/2, rgba.shape[0]/2), rng.uniform(-20, 20), side)
                w, h = (min(SIZE, int(v)) for v in np.abs(matrix[:, :2]) @ rgba.shape[1::-1])
                matrix[:, 2] += w/2 - rgba.shape[1]/2, h/2 - rgba.shape[0]/2
                patch = cv2.warpAffine(rgba, matrix, (w, h))
                patch = cv2.transform(patch, np.diag([*rng.uniform(.75, 1.25, 3), 1.]))
            else:
                w, h = min(SIZE, int(rgba.shape[1]*side)), min(SIZE, int(rgba.shape[0]*side))
                patch = cv2.resize(rgba, (w, h))
            x, y = rng.integers(SIZE-w+1), rng.integers(SIZE-h+1)
            colour, alpha = cv2.cvtColor(patch, cv2.COLOR_RGBA2RGB), cv2.extractChannel(patch, 3)
            alpha = cv2.cvtColor(cv2.blur(alpha, (2*FEATHER+1,)*2), cv2.COLOR_GRAY2RGB)
            region = image[y:y+h, x:x+w]
            drawn = cv2.multiply(colour, alpha, scale=1/255)
            kept = cv2.multiply(region, cv2.bitwise_not(alpha), scale=1/255)
            cv2.add(drawn, kept, dst=region)
            boxes.append((x, y, x+w, y+h))
        return image, np.array(boxes, np.float32)
    return draw


def numpy_loop(cutouts, backgrounds):
    "The same loop as most people write it: resize, and one line of floating point for the blend."
    cutouts, backgrounds = [hwc(c.rgba) for c in cutouts], [hwc(b) for b in backgrounds]
    rng = np.random.default_rng(0)
    def draw(i):
        image, boxes = backgrounds[rng.integers(len(backgrounds))].copy(), []
        for _ in range(OBJECTS):
            rgba = cutouts[rng.integers(len(cutouts))]
            side = SIZE*rng.uniform(*SCALE)/(rgba.shape[0]*rgba.shape[1])**.5
            w, h = min(SIZE, int(rgba.shape[1]*side)), min(SIZE, int(rgba.shape[0]*side))
            x, y = rng.integers(SIZE-w+1), rng.integers(SIZE-h+1)
            patch = cv2.resize(rgba, (w, h))
            a = cv2.blur(patch[..., 3], (2*FEATHER+1,)*2)[..., None].astype(np.float32)/255
            image[y:y+h, x:x+w] = patch[..., :3]*a + image[y:y+h, x:x+w]*(1-a)
            boxes.append((x, y, x+w, y+h))
        return image, np.array(boxes, np.float32)
    return draw


def torch_copy_paste(cutouts, backgrounds):
    "Copy-paste as in torchvision's detection reference: full-size masks, blended edges, boxes of what is left of them."
    cutouts, backgrounds = [c.rgba.contiguous() for c in cutouts], [b.contiguous() for b in backgrounds]
    g = torch.Generator().manual_seed(0)
    randint = lambda high: int(torch.randint(high, (1,), generator=g))
    def draw(i):
        image, pasted = backgrounds[randint(len(backgrounds))], torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
        masks = torch.zeros(OBJECTS, SIZE, SIZE, dtype=torch.bool)
        for k in range(OBJECTS):
            rgba = cutouts[randint(len(cutouts))]
            scale = SCALE[0] + (SCALE[1]-SCALE[0])*float(torch.rand(1, generator=g))
            side = SIZE*scale/(rgba.shape[1]*rgba.shape[2])**.5
            w, h = min(SIZE, int(rgba.shape[2]*side)), min(SIZE, int(rgba.shape[1]*side))
            y, x = randint(SIZE-h+1), randint(SIZE-w+1)
            patch = F.resize(rgba, [h, w], antialias=False)
            mask = torch.zeros(SIZE, SIZE, dtype=torch.bool); mask[y:y+h, x:x+w] = patch[3] > 127
            full = torch.zeros_like(pasted); full[:, y:y+h, x:x+w] = patch[:3]
            pasted, masks[:k] = torch.where(mask, full, pasted), masks[:k] & ~mask
            masks[k] = mask
        alpha = F.gaussian_blur(masks.any(0)[None].float(), kernel_size=[5, 5], sigma=[2.])
        image = (image*(1-alpha) + pasted*alpha).to(torch.uint8)
        seen = masks[masks.flatten(1).any(1)]
        return image, masks_to_boxes(seen)
    return draw


def streams(cutouts, backgrounds):
    "The stream under three recipes."
    base = Recipe(image_size=SIZE, count=(OBJECTS, OBJECTS), scale=SCALE, blend='feather', feather=(FEATHER, FEATHER),
                  distractors=(0, 0), shadow=(0, 0), effects=0, background_crop=0, background_flip=0)
    plain = replace(base, aspect=(1, 1), flip=0, rotate=(0, 0), shear=(0, 0), blur_share=0, contrast=(1, 1),
                    multiply=(1, 1), truncation=0, max_overlap=1, min_visible=0)
    usual = Recipe(image_size=SIZE)
    recipes = {'stream, same pastes': plain, 'stream, augmented': base, 'stream, default recipe': usual}
    draw = {name: Samples(cutouts, backgrounds, recipe).__getitem__ for name, recipe in recipes.items()}
    return {**draw, 'stream, in batches': batched(cutouts, backgrounds)}


def batched(cutouts, backgrounds, size=32):
    "The default recipe, a batch at every 32nd call."
    made = batches(Samples(cutouts, backgrounds, Recipe(image_size=SIZE)), size)
    calls = count()
    return lambda i: next(calls) % size or next(made)


def speed(n=128, rounds=20):
    "Rows of images per second: all in turns, the fastest turn of each, since other programs can only add time."
    made = assets()
    runs = {'floor': floor_loop(*made), 'floor, augmented': floor_loop(*made, augmented=True),
            'NumPy floats': numpy_loop(*made), **streams(*made), 'torch copy-paste': torch_copy_paste(*made)}
    seconds = {name: [] for name in runs}
    for r in range(-1, rounds): # the first turn warms up
        for name, draw in runs.items():
            start = time.process_time()
            for i in range(n): draw(i)
            if r >= 0: seconds[name].append((time.process_time() - start)/n)
    rate = {name: 1/min(s) for name, s in seconds.items()}
    floor = lambda name: rate['floor, augmented' if name.startswith('stream') and 'same' not in name else 'floor']
    torch_ = rate['torch copy-paste']
    return [dict(name=name, images_per_second=round(v), of_floor=round(v/floor(name), 2), of_torch=round(v/torch_, 2))
            for name, v in rate.items()]


STAGES = {  # function, where it is looked up -> the stage it is; what it calls counts as its own, unless it is one, too
    'stream.generator': 'chance', 'free.arrange': 'layout', 'free.free_patch': 'layout', 'free.warp': 'warp',
    'free.photometric': 'photometric', 'free.place': 'place', 'compose.backdrop': 'background',
    'compose.cast_shadow': 'shadow', 'pixels.feather': 'blend', 'compose.lit': 'effect: light',
    'compose.blur': 'effect: blur', 'compose.noise': 'effect: noise', 'compose.jpeg': 'effect: JPEG',
    'stream.target': 'target'}


TICK = min(-time.process_time() + time.process_time() for _ in range(1000))  # what looking at the clock costs


def timed(spent, open_, stage, f):
    "A function whose time is added to its stage, less what inner stages took."
    def run(*args, **options):
        open_.append(0.)
        start = time.process_time()
        try: return f(*args, **options)
        finally:
            took = time.process_time() - start
            spent[stage] += took - open_.pop() - TICK
            if open_: open_[-1] += took + TICK
    return run


def shares(stages, n, rounds):
    "Microseconds per image in each stage of the default recipe, in the fastest of some rounds of every batch."
    found = [[] for _ in range(n)]
    with contextlib.ExitStack() as stack:
        spent, open_ = Counter(), []
        for name, stage in stages.items():
            where, function = name.rsplit('.', 1)
            where = importlib.import_module(where)
            stack.enter_context(patch.object(where, function, timed(spent, open_, stage, getattr(where, function))))
        samples = Samples(*assets(), Recipe(image_size=SIZE))
        for _ in range(rounds):
            draw = timed(spent, open_, 'rest', partial(next, batches(samples, 32)))
            for k in range(n):
                spent.clear()
                draw()
                found[k].append(Counter(spent))
    best = sum((min(rounds, key=lambda f: f.total()) for rounds in found), Counter())
    return {stage: 1e6*best[stage]/(32*n) for stage in dict.fromkeys([*stages.values(), 'rest'])}


def stages(n=8, rounds=12):
    "Rows of microseconds per image: every stage, and what of all of them is spent inside OpenCV."
    places = {f'synthdet.synthesis.{name}': stage for name, stage in STAGES.items()}
    opencv = {f'cv2.{name}': 'inside OpenCV' for name in dir(cv2) if inspect.isbuiltin(getattr(cv2, name))}
    found = {**shares(places, n, rounds), 'inside OpenCV': shares(opencv, n, rounds)['inside OpenCV']}
    return [dict(stage=stage, microseconds=round(v, 1)) for stage, v in found.items()]


def workers(n=30, rounds=2):
    "Rows of images per second by the clock, drawn here and by worker processes; the fastest of some rounds."
    samples, found = Samples(*assets(), Recipe(image_size=SIZE)), {}
    samples.fill()
    for number in [0, 1, 2]*rounds:
        made = batches(samples, 32, workers=number)
        for _ in range(4): next(made) # what was made ahead while the workers started
        start = time.perf_counter()
        for _ in range(n): next(made)
        found[number] = max(found.get(number, 0), 32*n/(time.perf_counter() - start))
        made.close()
    return [dict(workers=number, images_per_second=round(v)) for number, v in found.items()]


def rss():
    "Resident memory in MB."
    return int(Path('/proc/self/statm').read_text().split()[1])*resource.getpagesize()/2**20


def memory(n=20_000):
    "Resident memory along a stream whose backgrounds exceed the budget."
    cutouts, _ = assets(n_backgrounds=1)
    class Many: # drawn when asked for, as files would be read
        def __len__(self): return 400
        def __getitem__(self, i): return chw(np.full((SIZE, SIZE, 3), i % 256, np.uint8))
    samples = Samples(cutouts, Many(), Recipe(image_size=SIZE, count=(OBJECTS, OBJECTS), blend='feather'), budget_mb=64)
    rows = []
    for i in range(n):
        samples[i]
        if (i+1) % (n//10) == 0: rows.append(dict(samples=i+1, rss_mb=round(rss(), 1)))
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--memory', action='store_true', help='measure memory instead of speed')
    a = p.parse_args()
    cv2.setNumThreads(1); torch.set_num_threads(1)
    old = json.loads(OUT.read_text()) if OUT.exists() else {}
    told = dict(memory='{samples:6} samples  {rss_mb:.1f} MB', stages='{stage:24}{microseconds:8.1f} us an image',
                workers='{workers} workers               {images_per_second:6} images/s by the clock',
                speed='{name:24}{images_per_second:6} images/s{of_floor:8.2f} of its floor{of_torch:8.2f} of torch')
    every = dict(speed=speed, stages=stages, workers=workers)
    for name, measure in dict(memory=memory).items() if a.memory else every.items():
        rows = measure()
        for r in rows: print(told[name].format(**r))
        old[name] = dict(command=' '.join(['python', *map(str, sys.argv)]), rows=rows, run=run_info())
        write_atomic(OUT, json.dumps(old, indent=1)+'\n')


if __name__ == '__main__': main()
