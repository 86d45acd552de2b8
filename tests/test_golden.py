"""Golden values: what the package gives, recorded once, so that a change meant to change nothing can show that it did.

Three parts. HOW a case is built: the only part that knows the package, and follows it wherever it goes. WHAT is kept
of a case, and how closely it is compared: this part and the values in tests/golden stay as they are. And the tests,
with `python tests/test_golden.py --record [KIND ...]`, which writes the values of all or some kinds anew: for a
change of behaviour that is meant, and for nothing else.
"""
import hashlib
import json
import math
import os
import pickle
import platform
import re
import sys
import tempfile
import textwrap
import warnings
import zlib
from collections import namedtuple
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib import metadata
from itertools import count, islice
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from scipy.io import savemat

from synthdet.core import digest, generator
from synthdet.files import read_jsonl
from synthdet.data.annotations import read_detection, write_detection
from synthdet.data.batches import batches, Loop, Mixed
from synthdet.data.catalogue import FACTS
from synthdet.data.butterflies import class_image, SPLITS
from synthdet.data.domain import ClassImage, Drawn
from synthdet.data.domains import load_domain, write_domain
from synthdet.data.public import qr_code
from synthdet.data.facecrops import FaceCrops
from synthdet.data.fixtures import make_fixture
from synthdet.data.held import Resized
from synthdet.data.images import write_image
from synthdet.data.labels import subset
from synthdet.detection.detectors import detector
from synthdet.detection.evaluate import average_precision, coco_metrics, evaluate, precision_recall, predict
from synthdet.detection.settings import Schedule
from synthdet.detection.train import train
from synthdet.detection.widerface import wider_ap, write_wider
from synthdet.evidence.arm import make_arms, resolved
from synthdet.evidence.phases import run
from synthdet.masks.redo import RedoConfig, train_redo
from synthdet.masks.segment import make_segmenter
from synthdet.masks.settings import Gate, Masks, OPEN, own_gate
from synthdet.objects.dmgannet import Generator, TextEncoder
from synthdet.objects.gan64 import Generator64
from synthdet.objects.gantrain import train_gan
from synthdet.objects.generated import Generated
from synthdet.objects.objects import make_objects
from synthdet.objects.settings import DEFAULTS, GanConfig, Objects
from synthdet.objects.stylegan2 import Layout, StyleGAN2
from synthdet.objects.stylenet import StyleGAN
from synthdet.synthesis.compose import compose
from synthdet.synthesis.cut import masks_of, scores_of
from synthdet.synthesis.cutouts import make_cutouts
from synthdet.synthesis.disk import write_stream
from synthdet.synthesis.settings import paper_recipe, Recipe
from synthdet.synthesis.stream import make_samples, Samples
from synthdet.weights import save_weights

torch.set_num_threads(1)  # sums of floats depend on how many threads share them
GOLDEN = Path(__file__).parent/"golden"
SCRATCH = tempfile.TemporaryDirectory(prefix="golden-")  # gone when Python ends


def scratch(name):
    "A new, empty folder."
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=SCRATCH.name))


# ==== HOW a case is built =============================================================================================
# A function for each kind takes the name of a case and returns plain things: tensors, numbers, texts, lists, dicts.

def luck(*keys):
    "Random numbers that owe nothing to the package."
    return np.random.default_rng([zlib.crc32(str(k).encode()) for k in keys])


# Whether AVX-512 computes NumPy's sine moves some of the drawn butterflies by a grey level; these it does not.
STEADY = [i for i in range(39) if i not in (6, 7, 16, 19, 25, 30, 33, 34, 35, 37)]


@lru_cache
def meadow(n=8):
    "The drawn domain: butterflies of 64 px with their masks, backgrounds of 120 px."
    whole = load_domain("butterflies", n_class_images=39, n_backgrounds=5, image_size=120, class_size=64)
    return replace(whole, class_images=[whole.class_images[i] for i in STEADY[:n]])


@lru_cache
def codes():
    "QR codes on meadows."
    return replace(meadow(), name="codes", classes=("code",), class_images=Drawn(qr_code, 6), source="")


@lru_cache
def garden():
    "Three classes: butterflies, QR codes, and butterflies upside down with red and blue exchanged."
    odd = lambda c: ClassImage(c.image[[2, 1, 0, 3]].flip(1).contiguous(), 3, f"odd {c.origin}")
    threes = [(c, qr_code(k)._replace(label=2), odd(c)) for k, c in enumerate(meadow().class_images[:3])]
    names = "butterfly", "code", "odd"
    return replace(meadow(), name="garden", classes=names, class_images=sum(threes, ()), source="")


# -- scenes

STREAMS = {  # name -> fields of the recipe, and preset, domain, segmenter, masks, seed
    "as it comes": {},
    "of another seed": dict(seed=2**33),
    "pasted": dict(blend="paste"),
    "feathered": dict(blend="feather", feather=(2, 6)),
    "much truncation": dict(truncation=.8, min_visible=.1),
    "many distractors": dict(distractors=(4, 8), scale=(.1, .4)),
    "many objects": dict(count=(6, 12), scale=(.1, .3), max_overlap=.6),
    "crowded": dict(count=(5, 9), scale=(.25, .5), max_overlap=.9, min_visible=.5, truncation=.5),
    "no overlap": dict(max_overlap=0, count=(2, 6), scale=(.1, .4)),
    "hard masks": dict(hard_mask=True, mask_threshold=.3),
    "no effects": dict(effects=0),
    "all effects": dict(
        effects=1, shadow=(.3, .9), lighting=.5, image_blur=(.3, 2), image_noise=(5, 20), jpeg=(20, 60)),
    "upright": dict(rotate=(0, 0), shear=(0, 0)),
    "plain": dict(
        rotate=(0, 0), shear=(0, 0), flip=0, aspect=(1, 1), blur_share=0, contrast=(1, 1), multiply=(1, 1), effects=0,
        background_flip=0, background_crop=0, distractors=(0, 0)),
    "every change of an object": dict(
        crop=(0, .2), stretch=(.7, 1.4), rotate=(-180, 180), shear=(-30, 30), blur=(.5, 2), blur_share=.8, flip=.3,
        contrast=(.5, 1.8), noise=(0, 20), noise_colour=.5, multiply=(.5, 1.5), multiply_colour=.6),
    "wide": dict(image_size=(72, 128)),
    "tall": dict(image_size=(144, 80), background_crop=.6),
    "faces of the paper": dict(preset="faces"),
    "birds of the paper": dict(preset="birds"),
    "cars of the paper": dict(preset="cars"),
    "codes of the paper": dict(preset="qrcodes", domain=codes),
    "faces as released": dict(preset="faces", released=True),
    "birds as released": dict(preset="birds", released=True),
    "cars as released": dict(preset="cars", released=True),
    "codes as released": dict(preset="qrcodes", released=True, domain=codes),
    "naive": dict(preset="cars", segmenter="naive"),
    "naive as released": dict(preset="cars", released=True, segmenter="naive"),
    "three classes": dict(domain=garden, count=(2, 5), scale=(.15, .4)),
    "three classes of the paper": dict(domain=garden, preset="faces"),
    "with masks": dict(masks=True, max_overlap=.6, count=(2, 5)),
    "cut by grabcut": dict(segmenter="grabcut"),
    "whole frames": dict(segmenter="frame"),
}
POISSONS = {
    "poisson": dict(blend="poisson"),
    "mixed blends": dict(blend="mixed"),
    "poisson where the paper places": dict(preset="faces", blend="poisson", hard_mask=True),
}
INDICES = (*range(16), 1000, 12345, 10**6, 2**31)


def make_stream(name):
    "The stream of a recipe."
    how = dict(image_size=96, domain=meadow, segmenter="alpha", preset=None, masks=False, seed=5)
    how |= {**STREAMS, **POISSONS}[name]
    domain, preset = how.pop("domain")(), how.pop("preset")
    options = {k: how.pop(k) for k in ("segmenter", "masks", "seed")}
    recipe = paper_recipe(preset, **how) if preset else Recipe(**how)
    cut = cutter(options["segmenter"])
    return make_samples(domain, objects=Objects(size=56), masks=cut, recipe=recipe, seed=options["seed"],
                        with_masks=options["masks"])


def cutter(name):
    "A segmenter; one that cuts along given masks is naive when the compositor is told so."
    if name != "naive": return make_segmenter(name)
    return replace(make_segmenter("alpha"), whole=True, content=None)


def stream(name):
    "Samples, and where the first come from."
    samples = make_stream(name)
    return [samples[i] for i in INDICES], [samples.provenance(i) for i in INDICES[:6]]


def provenance(name):
    "Whole rows that say where samples come from."
    samples = make_stream(name)
    return [samples.provenance(i) for i in (0, 3, 10**6)]


def one_scene(name):
    "Scenes composed one by one, with textures of their own for the distractors."
    cuts, places = make_cutouts(make_objects("real", meadow()), "alpha", cache=False), meadow().backgrounds
    recipe, how = Recipe(image_size=96, distractors=(2, 4)), dict(textures=[places[1], places[2]], with_masks=True)
    return [compose(places[0], cuts, recipe, generator(k, "scene"), **how) for k in range(4)], []


def written_stream(name):
    "A stream as files, read again; and the rows that say where its images come from."
    samples = make_samples(garden(), masks="alpha", recipe=Recipe(image_size=96), seed=4, with_masks=True)
    place = write_stream(samples, scratch("stream"), 5, format=name, suffix=".png")
    rows = [{k: v for k, v in row.items() if k != "digest"} for row in read_jsonl(place/"provenance.jsonl")]
    return list(read_detection(place)), rows


def live(name):
    "A stream whose objects a network draws as it goes."
    recipe, place = Recipe(image_size=48, effects=0), load_domain("butterflies", n_backgrounds=3, image_size=48)
    drawn = Objects("gan64", weights=str(crafted()/"gan64.safetensors"), size=24)
    uses = 3 if "three times" in name else 1
    samples = make_samples(place, objects=drawn, masks="frame", recipe=recipe, seed=3, reuse=uses)
    found = [(samples[i], samples.provenance(i)) for i in (0, 1, 2, 5, 31, 32, 33, 700)]
    samples.close()
    return zip(*found)


def live_drawn(name):
    "A stream whose objects are drawn and cut out as it goes; some are turned down."
    flock = lambda ks, seed: torch.stack([class_image(k, size=32, seed=seed)[0] for k in ks])
    cuts = make_cutouts(Generated(flock, "flock", key="flock", seed=2, block=8), Masks(gate=Gate(min_area=.16)))
    samples = Samples(cuts, [meadow().backgrounds[k] for k in range(3)], Recipe(image_size=64), seed=5, reuse=6)
    found = [(samples[i], samples.provenance(i)) for i in range(10)]
    samples.close()
    return zip(*found)


# -- objects and cut-outs

def pictures(name):
    "Drawn pictures, which much else starts from."
    place = meadow()
    return dict(butterflies=[c.image for c in place.class_images], codes=[qr_code(i).image for i in range(4)],
                backgrounds=list(place.backgrounds), train=[place.train[i][0] for i in range(4)]), \
        [place.train[i][1] for i in range(4)]


CUTS = {  # name -> options of the cutting
    "grabcut": dict(segmenter="grabcut"),
    "grabcut, whole pictures": dict(segmenter="grabcut", tight=False),
    "grabcut, a strict gate": dict(segmenter="grabcut", limits=Gate(min_score=.8)),
    "grabcut, a narrow gate": dict(
        segmenter="grabcut", limits=Gate(min_area=.2, max_area=.4, max_border=.02, min_largest=.9)),
    "grabcut, shrunk": dict(segmenter="grabcut", size=40),
    "grabcut, scored": dict(segmenter="grabcut", scores=True),
    "frame": dict(segmenter="frame"),
    "frame, scored": dict(segmenter="frame", scores=True),
    "alpha": dict(segmenter="alpha"),
    "alpha, whole pictures": dict(segmenter="alpha", tight=False),
    "alpha, scored": dict(segmenter="alpha", scores=True),
}
SOFT_CUTS = {
    "redo": dict(segmenter="redo"),
    "redo, whole pictures": dict(segmenter="redo", tight=False),
    "redo, a strict gate": dict(segmenter="redo", limits=Gate(min_score=.7)),
    "redo, no gate": dict(segmenter="redo", limits=OPEN, scores=True),
}


def cut_outs(name):
    "Cut-outs of 24 butterflies with their scores, and what was turned down."
    how = dict(size=64) | {**CUTS, **SOFT_CUTS}[name]
    weights = "butterflies" if name.startswith("redo") else ""
    masks = Masks(how.pop("segmenter"), weights=weights, gate=how.pop("limits", Gate()))
    cuts = make_cutouts(make_objects(Objects(size=64), meadow(24)), masks, cache=False, **how)
    return [c[:3] for c in cuts], cuts.scores, cuts.rejects


def mask_scores(name):
    "The masks of some butterflies, and all that speaks for them."
    images = [c.image for c in meadow().class_images]
    segment = make_segmenter(Masks(name, weights="butterflies" if name == "redo" else ""))
    masks = masks_of(images, segment)
    return [s._asdict() for s in scores_of(images, masks, segment)], masks


def made(net, wide=lambda name, v: 1., seed=0):
    "A network with weights that every torch draws alike and all of which matter; `wide` scales those of layers."
    for name, v in net.state_dict().items():
        if not v.is_floating_point() or name.endswith(("kernel", "resample_filter", "lod")): continue
        x = torch.from_numpy(luck(seed, name).standard_normal(tuple(v.shape), dtype=np.float32))
        if name.endswith("running_var"): v.copy_(.5 + x.abs())
        elif v.ndim > 1: v.copy_(x*wide(name, v))
        else: v.copy_(.2*x + float(name.endswith(("style.bias", "affine.bias", "1.weight"))))
    return net.eval().requires_grad_(False)


class Small(torch.nn.Module):
    "A generator for export."
    def __init__(self): super().__init__(); self.start = torch.nn.Linear(6, 3*16*16)
    def forward(self, z): return torch.tanh(self.start(z)).view(-1, 3, 16, 16)


@lru_cache
def crafted():
    "A folder with weights for every generator: their pictures are of nothing, but they are pictures."
    place, words = scratch("weights"), "<end> a bird with red wings blue and black long beak tail".split()
    mapped, fair = lambda name, v: 100. if "mapping" in name else 1., lambda name, v: 1.5/v[0].numel()**.5
    save_weights(made(Generator64(8, (8,)*5), mapped), place/"gan64.safetensors", nz=8, widths="8 8 8 8 8")
    torch.save(made(StyleGAN((8,)*4, (6, 8)), mapped).state_dict(), place/"stylegan_ffhq32.pth")
    torch.save(made(StyleGAN2(Layout(7, 8, (8,)*4)), mapped).state_dict(), place/"stylegan2_ffhq32.pt")
    torch.save(made(Generator(gf=4, condition=6, noise=5, text=8), fair).state_dict(), place/"bird_DMGAN.pth")
    torch.save(made(TextEncoder(len(words), embedding=6, hidden=4), fair).state_dict(), place/"text_encoder200.pth")
    said = [[1, k % 11 + 1, 2] + [3, 4, 5]*(k % 3) for k in range(40)]
    captions = [[[1, 2]]*10, said, dict(enumerate(words)), {w: i for i, w in enumerate(words)}]
    (place/"captions.pickle").write_bytes(pickle.dumps(captions, protocol=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(made(Small(), lambda name, v: .5), torch.zeros(2, 6)).save(place/"exported.pt")
    return place


OBJECTS = {  # name -> generator, file of its crafted weights (None: those that are shipped), more options
    "gan64, as shipped": ("gan64", None, {}),
    "the generator of a domain": ("gan", None, dict(seed=1)),
    "gan64": ("gan64", "gan64.safetensors", {}),
    "stylegan": ("stylegan", "stylegan_ffhq32.pth", {}),
    "stylegan, truncated": ("stylegan", "stylegan_ffhq32.pth", dict(psi=.5)),
    "stylegan2": ("stylegan2", "stylegan2_ffhq32.pt", {}),
    "stylegan2, truncated": ("stylegan2", "stylegan2_ffhq32.pt", dict(psi=.5)),
    "dmgan": ("dmgan", "", {}),
    "dmgan, shrunk": ("dmgan", "", dict(size=64)),
    "exported": ("exported", "exported.pt", {}),
}


def objects(name):
    "Some objects of a generator, and how many there are."
    kind, file, options = OBJECTS[name]
    weights = None if file is None else crafted()/file
    how = dict(size=256, seed=5) | options
    seed, block = how.pop("seed"), dict(gan64=32, gan=32, stylegan=4, stylegan2=4)
    drawn = Objects(kind, weights="" if weights is None else str(weights), **how)
    found, n = make_objects(drawn, meadow(), seed=seed), block.get(kind, 8)
    return [found[k] for k in (0, 1, n, 3*n + 1, 100_000)], ENDLESS


ENDLESS = 2**31  # what the length of a generator without an end was recorded as


def own_objects(name):
    "The domain's own pictures, or those of a folder."
    if name == "real": found = make_objects(Objects(size=40), meadow())
    if name == "real, the first": found = make_objects(Objects(size=50, n_objects=5), garden())
    if name == "images":
        place = scratch("images")
        for c in meadow().class_images: write_image(place/f"{c.origin.replace('/', '-')}.png", c.image)
        found = make_objects(Objects("images", weights=str(place), size=40, n_objects=6), meadow())
    return list(found), len(found)


# -- learning

def noise_batches(size, batch, landmarks=False):
    "Endless batches that NumPy alone decides: noise with light rectangles to be found."
    def batch_of(k):
        g = luck("batch", size, k)
        images, targets = g.integers(0, 120, (batch, 3, size, size), dtype=np.uint8), []
        for image in images:
            n = int(g.integers(1, 4))
            corner, side = g.integers(0, size//2, (n, 2)), g.integers(size//5, size//2, (n, 2))
            for (x, y), (w, h) in zip(corner, side): image[:, y:y+h, x:x+w] += 100
            boxes = torch.from_numpy(np.concatenate([corner, corner + side], 1)).float()
            points = torch.from_numpy(corner[:, None] + side[:, None]*g.random((n, 5, 2))).float()
            marked = dict(landmarks=points, landmarks_valid=torch.from_numpy(g.random(n) < .7)) if landmarks else {}
            targets.append(dict(boxes=boxes, labels=torch.ones(n, dtype=torch.int64), **marked))
        return torch.from_numpy(images), targets
    return lambda start: map(batch_of, count(start))


# Where batches are small, batch norm and Adam's first steps turn the last digits of a CPU's kernels into percents
# within 20 steps at the usual rate of 1e-4; at 1e-5 they stay below the tolerance. The small ResNet needs no such care.
TRAININGS = {  # name -> detector, batch, options of the training
    "ssd on mobilenet": (dict(backbone="mobilenetv1_100", image_size=96), 4, dict(steps=20, lr=1e-5)),
    "ssd on mobilenet, usual rate": (dict(backbone="mobilenetv1_100", image_size=96), 4, dict(steps=3)),
    "ssd on a small resnet": (dict(backbone="resnet_small", image_size=64), 4, dict(steps=20, lr=1e-3)),
    "ssd, sgd": (
        dict(backbone="resnet_small", image_size=64), 2, dict(steps=4, lr=1e-4, optimizer="sgd", decay=(2, 3))),
    "a model that draws lots": (dict(image_size=32), 4, dict(steps=3, lr=1e-3, seed=2)),
    "retinaface": (dict(model="retinaface", image_size=96), 2, dict(steps=5, lr=1e-5, optimizer="sgd", decay=(3,))),
}


class Lots(torch.nn.Module):
    "A detector with dropout."
    def __init__(self): super().__init__(); self.scale = torch.nn.Parameter(torch.ones(3, 32, 32))

    def forward(self, images, targets=None):
        x = torch.nn.functional.dropout(torch.stack(list(images))*self.scale, .5, self.training).mean((1, 2, 3))
        none = [dict(boxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0, dtype=torch.int64))]
        return dict(classification=x.square().mean()) if self.training else none*len(x)


def training(name):
    "The losses of each step, the weights after them, and what the detector then finds in two pictures."
    options, batch, how = TRAININGS[name]
    feed = noise_batches(options["image_size"], batch, landmarks=name == "retinaface")
    torch.manual_seed(how.get("seed", 0))
    model = Lots() if "lots" in name else detector(num_classes=2, **options)
    steps, seed, rest = how["steps"], how.get("seed", 0), {k: v for k, v in how.items() if k not in ("steps", "seed")}
    if "decay" in rest: rest["decay"] = tuple((d + .5)/steps for d in rest["decay"])   # shares of the steps
    schedule = Schedule(**dict(lr=1e-4, precision="fp32") | rest)              # what any CPU can do
    done = train(model, feed, steps, scratch("train"), schedule, device="cpu", seed=seed)
    return done["history"], [p.detach() for p in model.parameters()], predict(model, next(feed(1000))[0][:2])


def redo_learning(name):
    "The losses of the first steps of ReDO."
    config = RedoConfig.small(nf=4, nz=4, steps=3, batch=4, check_every=1, average=.9, amp="none")
    return train_redo([c.image[:3] for c in meadow().class_images], config, scratch("redo"), device="cpu")["history"]


def gan_learning(name):
    "The losses of the first steps of the small GAN."
    config = GanConfig(nz=8, width=.1, steps=3, batch=4, check_every=1, amp="none")
    return train_gan([c.image[:3] for c in meadow().class_images], config, scratch("gan"), device="cpu")["history"]


# -- scores

EVALUATIONS = {
    "one class": dict(seed=1, classes=1),
    "three classes": dict(seed=2),
    "ties": dict(seed=3, ties=True),
    "difficult boxes": dict(seed=4, flag="difficult"),
    "difficult boxes and ties": dict(seed=5, flag="difficult", ties=True),
    "crowds": dict(seed=6, flag="iscrowd"),
    "large pictures": dict(seed=7, scale=12),
    "halves": dict(seed=10, halves=True),
    "nothing found": dict(seed=8, most=1),
    "nothing there": dict(seed=9, there=1),
}


def verdicts(seed, classes=3, ties=False, halves=False, flag=None, scale=1, most=14, there=6, images=8):
    "Random detections, half of them near boxes that are there, or exactly one half of them."
    g = luck("verdicts", seed)
    def boxes(n):
        corner, side = 2*g.integers(0, 30, (n, 2)), 2*g.integers(1, 20, (n, 2))
        return torch.from_numpy(np.concatenate([corner, corner + side], 1)).float()*scale
    predictions, targets = [], []
    for _ in range(images):
        m, n = int(g.integers(0, there)), int(g.integers(0, most))
        truth = dict(boxes=boxes(m), labels=torch.from_numpy(g.integers(1, classes + 1, m)))
        which = torch.from_numpy(g.integers(0, m, n//2)) if m else torch.zeros(0, dtype=torch.int64)
        aim, miss = truth["boxes"][which], torch.from_numpy(g.integers(-2, 3, (len(which), 4))).float()
        near = aim + scale*miss
        near[:, 2:] = torch.maximum(near[:, 2:], near[:, :2] + 1)
        if halves: near = torch.cat([aim[:, :3], aim[:, [1, 3]].mean(1, keepdim=True)], 1)
        rest = n - len(which)
        labels = torch.cat([truth["labels"][which], torch.from_numpy(g.integers(1, classes + 2, rest))])
        scores = torch.from_numpy(g.random(n).round(1 if ties else 6)).float()
        predictions.append(dict(boxes=torch.cat([near, boxes(rest)]), labels=labels, scores=scores))
        flagged = torch.from_numpy(g.random(m) < .3)
        targets.append(truth | ({flag: flagged.long() if flag == "iscrowd" else flagged} if flag else {}))
    return predictions, targets


def evaluation(name):
    "Every score by every rule."
    p, t = verdicts(**EVALUATIONS[name])
    rules = [(rule, iou) for rule in ("voc", "voc07", "authors") for iou in (.3, .5, .75)]
    curve = precision_recall(p, t, label=1) if name != "nothing there" else ()
    sums = {k: float(v.sum()) for k, v in enumerate(curve)}
    rules = {f"{r} {i}": average_precision(p, t, i, r) for r, i in rules}
    return dict(evaluate=evaluate(p, t), coco=coco_metrics(p, t), curve=sums, rules=rules)


def cells(values):
    "A column of MATLAB cells."
    out = np.empty((len(values), 1), object)
    for i, v in enumerate(values): out[i, 0] = v
    return out


def wider_score(name):
    "WIDER FACE's three scores of drawn faces, from memory and through files."
    g, place, faces, shown, found = luck("wider", name), scratch("wider"), {}, {}, {}
    for e, k in ((e, k) for e in range(3) for k in range(5)):
        n, key = int(g.integers(0, 7)), (f"{e}--E{e}", f"{e}_E{e}_{k}")
        boxes = np.concatenate([g.integers(0, 80, (n, 2)), g.integers(4, 40, (n, 2))], 1)
        if n > 2: boxes[1] = boxes[0]
        faces[key], shown[key] = boxes, g.permutation(n) + 1
        near = (np.repeat(boxes, 3, 0) + g.integers(-6, 7, (3*n, 4))).clip(0)
        half = boxes[:2]*[1, 1, 1, 2] + [0, 0, 0, 1]  # sides count as one pixel longer, so these are twice the face
        rows = np.concatenate([near, half, g.integers(0, 60, (int(g.integers(0, 6)), 4))]).astype(float)
        scores = np.sort(g.integers(2, 101, len(rows))/100)[::-1].copy()
        rows = torch.from_numpy(rows[g.permutation(len(rows))])
        corners = torch.cat([rows[:, :2], rows[:, :2] + rows[:, 2:]], 1)
        found["/".join(key)] = dict(boxes=corners, scores=torch.from_numpy(scores))
    events = sorted({e for e, _ in faces})
    nest = lambda of: cells([cells([of((e, k)) for event, k in faces if event == e]) for e in events])
    lists = dict(event_list=cells(events), file_list=nest(lambda key: key[1]), face_bbx_list=nest(faces.get))
    savemat(place/"wider_face_val.mat", lists)
    for setting, share in dict(easy=.3, medium=.6, hard=.9).items():
        counted = nest(lambda key: np.sort(shown[key][:round(share*len(shown[key]))]).reshape(-1, 1))
        savemat(place/f"wider_{setting}_val.mat", dict(gt_list=counted))
    return dict(memory=wider_ap(found, place), files=wider_ap(write_wider(found, scratch("detections")), place))


# -- data

READERS = {  # name -> domain, its options
    "faces": ("faces", {}),
    "birds": ("birds", {}),
    "cars": ("cars", {}),
    "wider": ("wider", {}),
    "qrcodes": ("qrcodes", dict(n_class_images=4)),
    "faces, other sources": ("faces", dict(class_images="lfw", backgrounds="voc")),
    "faces, backgrounds as released": ("faces", dict(backgrounds="released")),
    "birds, official split": ("birds", dict(split="official")),
    "birds, crops": ("birds", dict(class_images="crops")),
    "wider without landmarks": ("wider", dict(landmarks=False)),
}
PARTS = ("train", "val", "test")


@lru_cache
def tree(kind): return make_fixture(kind, scratch(kind), n=2)


def reader(name):
    "A domain as it is read from a drawn tree in the layout of its public data sets."
    kind, options = READERS[name]
    return load_domain(kind, tree(kind), **options)


def folder(name):
    "A domain of files, its boxes in one of the formats."
    some = replace(garden(), **{s: labelled(3)[:k] for s, k in zip(PARTS, (5, 3, 2))})
    return load_domain("folder", write_domain(some, scratch(name)/"garden", format=name))


def labelled(classes):
    "Six small pictures with boxes of several classes; two have none."
    g, out = luck("labelled"), []
    for i in range(6):
        n = i % 4
        corner, side = g.integers(0, 20, (n, 2)), g.integers(4, 20, (n, 2))
        boxes = torch.from_numpy(np.concatenate([corner, corner + side], 1)).float() + (.25 if i > 3 else 0)
        image = torch.from_numpy(g.integers(0, 256, (40, 50 + i, 3), dtype=np.uint8)).permute(2, 0, 1)
        labels = torch.from_numpy(g.integers(1, classes + 1, n))
        out.append((image, dict(boxes=boxes, labels=labels, image_id=10 + i)))
    return out


def round_trip(name):
    "A labelled set written in a format and read again, and its annotation files."
    place = scratch(name)
    write_detection(labelled(3), place, name, classes=("ant", "bee", "cat"))
    texts = [p for p in sorted(place.rglob("*")) if p.suffix in (".json", ".xml", ".txt", ".yaml")]
    return read_detection(place), {p.relative_to(place).as_posix(): p.read_bytes() for p in texts}


def resized(name):
    "A labelled set at a smaller and at a larger size."
    return [x for size in (32, 64) for x in Resized(labelled(3), size, antialias=name == "averaged")]


def face_crops(name):
    "Training samples of RetinaFace."
    images, targets = next(noise_batches(80, 4, landmarks=True)(0))
    samples = FaceCrops(list(zip(images, targets)), 64, seed=2)
    return [samples[i] for i in (*range(12), 10**6)]


def numbered(k):
    "A picture that is its number."
    target = dict(boxes=torch.tensor([[1., 2, 3, 4 + k % 3]]), labels=torch.tensor([1 + k % 4]), image_id=k)
    return torch.full((3, 8, 8), k % 251, dtype=torch.uint8), target


class Numbered:
    "An endless stream of pictures with numbers from 1000 on."
    def __getitem__(self, i): return numbered(1000 + i)


LOOKS = {f"{what}, seed {seed}": (what, seed) for seed in (0, 3) for what in
         ("loop", "loop over the first five", "half real", "0.3 real", "0.3 of few real and few others")}


def order(name):
    "Images and labels in the order of the batches: with and without processes, from the first and from the eighth."
    (what, seed), real, few = LOOKS[name], [numbered(k) for k in range(7)], [numbered(1000 + k) for k in range(4)]
    if what == "loop": samples = Loop(real, seed=seed)
    if what == "loop over the first five": samples = Loop(real[:5], seed=seed)
    if what == "half real": samples = Mixed(real, Numbered(), share=.5, seed=seed)
    if what == "0.3 real": samples = Mixed(real, Numbered(), share=.3, seed=seed)
    if "few" in what: samples = Mixed(Loop(real[:5], seed=seed), few, share=.3, seed=seed)
    look = lambda image, target: (target["image_id"], *target["labels"].tolist(), int(image[0, 0, 0]))
    def read(workers, start):
        return [[*map(look, *b)] for b in islice(batches(samples, 5, start=start, workers=workers), 5)]
    return {f"{workers} processes from batch {start}": read(workers, start) for workers in (0, 2) for start in (0, 7)}


class Known(list):
    "A set that knows its labels in advance."
    @property
    def targets(self): return [t for _, t in self]


def subset_order(name):
    "Which items the subsets of an order are: of plain things, and of pictures whose labels are known."
    labels = [[1]]*14 + [[1, 2]]*4 + [[3], [3, 1], [2, 2]] + [[]]*3
    known = Known((None, dict(labels=torch.tensor(ls))) for ls in labels)
    parts = [("plain", range(50), 0), ("plain", range(50), 8), ("known", known, 0), ("known", known, 6)]
    return {f"{what}, {n} of fold {fold}": subset(of, n, fold, name).indices
            for fold in ((0, 1, 5) if name == "shuffled" else (0,)) for what, of, n in parts}


@dataclass(frozen=True)
class Things:
    "Something to be named."
    a:int = 3
    b:tuple = (1., "two", None)


def names(name):
    "Things by the names that their content gives them."
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    return {k: digest(*v) for k, v in dict(
        nothing=[], literals=[1, "two", 3.5, None, True, [1, (2, 3)]], tables=[dict(b=1, a=[2], c=dict(d=0))],
        bytes=[b"abc", b""], arrays=[array, array.T, array.astype(np.int64)], paths=[Path("a/b")],
        tensors=[torch.arange(5), torch.ones(2, 2).bool()], things=[Things(), Things(a=4)]).items()}


def numbers(name):
    "The first numbers of generators: whole ones, and others."
    keys = dict(plain=(0,), word=(0, "sample"), both=(3, "sample", 12), large=(2**40, "pass", 2**31), below=(-1, 5))
    whole = lambda g: [g.integers(0, 1000, 5), g.integers(3, endpoint=True), g.permutation(8), g.integers(2**62)]
    real = lambda g: [g.random(3), g.standard_normal(3), g.standard_normal(2, dtype=np.float32), g.uniform(-2, 5)]
    return [{k: [np.ravel(x).tolist() for x in some(generator(*v))] for k, v in keys.items()} for some in (whole, real)]


def as_recorded(settings, renamed):
    "A settings object as a dict under the names that were recorded; fields that were added since are left out."
    return {renamed.get(k, k): v for k, v in asdict(settings).items() if renamed.get(k, k)}


def recipe_of(recipe):
    "A recipe with the fields it was recorded with."
    released, composed = recipe.compositor == "released", recipe.compositor != "free"
    kept = as_recorded(recipe, dict(count="objects", compositor=""))
    kept["image_size"] = 300 if kept["image_size"] is None else kept["image_size"]
    if released: kept["blend"] = "paste"
    kept |= dict(protocol="paper" if composed else "free", naive=False, released=released, reuse=1)
    return {k: v for k, v in kept.items() if k in recorded("settings")["cases"]["recipes"]["always"]["default"]}


def arm_of(a):
    "An arm as the flat fields it was recorded with."
    s, gate = a.synthesis, asdict(a.synthesis.masks.gate)
    options = json.dumps(dict(backgrounds=a.data.backgrounds)) if a.data.backgrounds else ""
    top = {k: getattr(a, k) for k in ("arm", "steps", "pretrain_steps", "seed", "protocol")}
    data = {k: getattr(a.data, k) for k in ("domain", "root", "class_images")} | dict(options=options)
    labels = {k: getattr(a.labels, k) for k in ("n_real", "fold", "augment")} | dict(val_labels=a.labels.val)
    made = dict(objects=s.objects.source, object_weights=s.objects.weights, n_objects=s.objects.n_objects,
                n_fake=s.n_fake, psi=s.objects.psi, segmenter=s.masks.segmenter, mask_weights=s.masks.weights)
    schedule = {k: v for k, v in asdict(a.schedule).items() if k not in ("select", "precision", "compile")}
    usual = None if gate == asdict(own_gate(s.masks.segmenter)) else gate
    return dict(top, **data, **labels, **made, gate=usual, **asdict(a.model), **schedule)


def settings(name):
    "What defaults and presets are."
    presets = [(n, r) for n in ("faces", "birds", "cars", "qrcodes") for r in (False, True)]
    arms = [("butterflies", "quick"), *[(d, p) for d in ("faces", "birds", "qrcodes") for p in ("paper", "released")]]
    return dict(
        recipes=lambda: dict(default=recipe_of(Recipe())) | {
            f"{n}{' as released' if r else ''}": recipe_of(paper_recipe(n, released=r)) for n, r in presets},
        gates=lambda: dict(none=asdict(OPEN)) | {s: asdict(own_gate(s)) for s in ("grabcut", "redo", "frame", "alpha")},
        redo=lambda: dict(default=asdict(RedoConfig()), small=asdict(RedoConfig.small())),
        gan64=lambda: dict(default=asdict(GanConfig())),
        data=lambda: dict(default=dict(splits=SPLITS, generators={
            d: DEFAULTS.get(FACTS[d].preset if d in FACTS else d, "gan64")
            for d in ("butterflies", "faces", "wider", "cars", "birds")})),
        arms=lambda: {f"{d}, {p}": arm_of(resolved(make_arms(domain=d, protocol=p)[0])) for d, p in arms})[name]()


# -- whole arms

def row(name):
    "The row of an arm, and the metrics of its phases one after the other."
    place, few = scratch("row"), "n_class_images=6 n_backgrounds=6"
    arm, = make_arms(name, "model.image_size=96 eval_every=6 share=.5 precision=fp32",
                     options=few, steps=12, pretrain_steps=12)
    found = run(arm, place)
    phases = sorted(place.rglob("metrics.jsonl"), key=lambda p: p.stat().st_mtime_ns)
    return found, [r for p in phases for r in read_jsonl(p)]


# ==== WHAT is kept of it ==============================================================================================
# A function for each kind takes what was built and gives three groups: `always` is compared exactly, on any machine;
# `exact` where the libraries are those it was recorded with; `near` there too, and with the tolerances of `NEAR`.

def mark(x):
    "Twelve digits that name the content of a tensor, of bytes, or of plain things."
    if isinstance(x, torch.Tensor): x = str(tuple(x.shape)).encode() + x.contiguous().numpy().tobytes()
    elif not isinstance(x, bytes): x = json.dumps(x, sort_keys=True).encode()
    return hashlib.blake2b(x, digest_size=6).hexdigest()


def plain(x, digits=7):
    "Literals as JSON gives them back; floats in some digits."
    if isinstance(x, (torch.Tensor, np.ndarray, np.generic)): x = x.tolist()
    if isinstance(x, dict): return {str(k): plain(v, digits) for k, v in x.items()}
    if isinstance(x, (list, tuple)): return [plain(v, digits) for v in x]
    return float(f"{x:.{digits}g}") if isinstance(x, float) else x


def boxes_of(target):
    "Label and corners of each box in a text; to a hundredth of a pixel."
    rows = zip(target["labels"].tolist(), target["boxes"].tolist())
    return [" ".join(f"{round(v, 2):g}" for v in (label, *box)) for label, box in rows]


def numbers_of(row):
    "The numbers of the objects in a row of provenance."
    return " ".join(o["origin"].split("/")[-1] for o in row["objects"])


def keep_samples(found):
    samples, rows = found
    exact = dict(images=[mark(i) for i, _ in samples], boxes=[boxes_of(t) for _, t in samples])
    if rows: exact["origins"] = [numbers_of(r) for r in rows]
    if "masks" in samples[0][1]: exact["masks"] = [mark(t["masks"]) for _, t in samples]
    return dict(always=dict(backgrounds=[r["background"] for r in rows]), exact=exact)


def keep_live(found):
    samples, rows = found
    tiles = [torch.nn.functional.avg_pool2d(i.float(), 12).flatten() for i, _ in samples]
    exact = dict(boxes=[boxes_of(t) for _, t in samples], origins=[numbers_of(r) for r in rows])
    return dict(always=dict(backgrounds=[r["background"] for r in rows]), exact=exact, near=dict(tiles=plain(tiles, 4)))


def keep_exact(found): return dict(exact=dict(values=plain(found)))


def keep_always(found): return dict(always=plain(found))


def keep_pictures(found):
    images, targets = found
    marks = {k: [mark(x) for x in v] for k, v in images.items()}
    return dict(exact=marks | dict(boxes=[boxes_of(t) for t in targets]))


def keep_cut_outs(found):
    cuts, scores, rejects = found
    near = {} if math.isnan(scores[0]) else dict(scores=plain(dict(kept=scores, not_kept=[r[2] for r in rejects]), 5))
    exact = dict(origins=[int(o.split("/")[-1]) for _, _, o in cuts], labels=sorted({l for _, l, _ in cuts}),
                 turned_down=[[r[0], r[1]] for r in rejects], cuts=[mark(c) for c, _, _ in cuts])
    return dict(exact=exact, near=near)


def keep_soft_cut_outs(found):
    kept, (cuts, *_) = keep_cut_outs(found), found
    def box(alpha):
        rows, columns = (alpha > 127).any(1).nonzero(), (alpha > 127).any(0).nonzero()
        return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1, alpha.shape[1], alpha.shape[0]]
    del kept["exact"]["cuts"]
    kept["near"].update(alpha=[plain(c[3].float().mean(), 5) for c, _, _ in cuts], box=[box(c[3]) for c, _, _ in cuts])
    return kept


def keep_scores(found):
    scores, masks = found
    known = [k for k in scores[0] if not math.isnan(scores[0][k])]
    alpha = [255*m.mean() for m in masks]
    return dict(near=dict(scores={k: plain([s[k] for s in scores], 5) for k in known}, alpha=plain(alpha, 5)))


def keep_drawn(found):
    things, n = found
    few = lambda x: x[:, ::(x.shape[1] + 2)//3, ::(x.shape[2] + 2)//3].flatten().tolist()
    always = dict(n=n, origins=[o for _, _, o in things], labels=[l for _, l, _ in things],
                  shapes=[list(x.shape) for x, _, _ in things])
    brightness = [[x.float().mean(), x.float().std()] for x, _, _ in things]
    return dict(always=always, near=dict(brightness=plain(brightness, 5), pixels=[few(x) for x, _, _ in things]))


def keep_objects(found):
    things, n = found
    always = dict(n=n, labels=[l for _, l, _ in things], origins=[o for _, _, o in things])
    return dict(always=always, exact=dict(images=[mark(x) for x, _, _ in things]))


def losses(history, but=()):
    return {k: plain([r[k] for r in history]) for k in history[0] if k not in ("step", "seconds", *but)}


def keep_training(found):
    history, weights, detections = found
    size = math.sqrt(sum(float(w.double().square().sum()) for w in weights)/sum(w.numel() for w in weights))
    top = [(d["scores"].tolist() + [0.]*5)[:5] for d in detections]
    near = dict(loss=losses(history), weights=plain([size]), confidence=plain(top))
    return dict(always=dict(steps=[r["step"] for r in history]), near=near)


def keep_learning(history):
    whole = ("step", "object_channel", "restart")
    always = {k: [r[k] for r in history] for k in whole if k in history[0]}
    return dict(always=always, near=dict(loss=losses(history, whole)))


def keep_evaluation(scores):
    every = {f"{part}, {k}": v for part, of in scores.items() for k, v in of.items()}
    none = [k for k, v in every.items() if v is None or math.isnan(v)]
    return dict(always=dict(undefined=none), near=dict(ap={k: plain(v, 12) for k, v in every.items() if k not in none}))


def of_target(target, but=()):
    "All there is in a target, in hundredths."
    flat = lambda v: v if isinstance(v, int) else [round(float(x), 2) for x in v.flatten()]
    return {k: flat(v) for k, v in sorted(target.items()) if k not in but}


def keep_set(part):
    files = [Path(f).name for f in part.files]
    boxes, keys = sum(len(t["boxes"]) for t in part.targets), " ".join(sorted(part.targets[0]))
    return dict(n=len(part), files=mark(files), first=files[0], targets=mark([of_target(t) for t in part.targets]),
                boxes=boxes, keys=keys, notes=dict(part.notes))


def keep_domain(d):
    images, parts = [d.class_images[i] for i in range(len(d.class_images))], {s: getattr(d, s) for s in PARTS}
    always = dict(name=d.name, classes=d.classes, counts=d.counts, preset=d.preset)
    always.update({s: keep_set(p) for s, p in parts.items()})
    always["class_images"] = dict(n=len(images), labels=mark([c.label for c in images]),
                                  origins=mark([c.origin for c in images]), first=images[0].origin)
    grounds = [Path(f).name for f in d.backgrounds.files]
    always["backgrounds"] = dict(n=len(grounds), files=mark(grounds), first=grounds[0])
    pixels = {s: p[0][0] for s, p in parts.items()} | dict(class_image=images[0].image, background=d.backgrounds[0])
    return dict(always=plain(always), exact={k: mark(v) for k, v in pixels.items()})


def keep_round_trip(found):
    data, texts = found
    of = dict(classes=data.classes, each=[boxes_of(t) for _, t in data], images=[mark(i) for i, _ in data])
    return dict(always=plain(keep_set(data) | of), exact={k: mark(v) for k, v in texts.items()})


def keep_labelled(samples):
    rest = [mark(of_target(t, but=("boxes", "labels"))) for _, t in samples]
    always = dict(boxes=[boxes_of(t) for _, t in samples], rest=rest)
    return dict(always=always, exact=dict(images=[mark(i) for i, _ in samples]))


def keep_order(seen):
    assert all(pixel == number % 251 for read in seen.values() for b in read for number, _, pixel in b)
    said = lambda batch: " ".join(f"{number}:{label}" for number, label, _ in batch)
    return dict(always={k: [said(b) for b in read] for k, read in seen.items()})


def keep_numbers(found):
    whole, real = found
    return dict(always=whole, near=dict(number=plain(real, 9)))


def keep_settings(found):
    "The first whole, of the others what differs."
    first, *others = found
    other = lambda k: {f: v for f, v in found[k].items() if v != found[first].get(f)}
    return dict(always=plain({first: found[first]} | {k: other(k) for k in others}))


def keep_row(found):
    row, history = found
    always = dict(arm=row["arm"], labels=row["labels"], steps=[r["step"] for r in history])
    always["curve"], curve = [[*column] for column in zip(*row["curve"])]
    scores = {k: row[k] for k in ("ap50", "ap50_authors", "ap50_coco", "ap", "val_ap50")}
    near = dict(row_ap=scores | dict(curve=curve), row_loss=losses(history, ("ap50", "ap50_authors")))
    return dict(always=always, near=plain(near))


# Relative and absolute tolerances. Those of what a network computes are for the kernels of other processors: with those
# of AVX2 in place of AVX-512 the losses of a training stay within 7e-4, and those of a whole arm within 1e-2.
NEAR = dict(
    tiles=(0, 1.), pixels=(0, 2), brightness=(0, .5),              # grey levels
    alpha=(0, 1.), box=(0, 1), scores=(0, .002),                   # of masks: grey levels, pixels, shares
    loss=(2e-3, 1e-4), weights=(1e-4, 0), confidence=(0, .002),    # of a training
    row_loss=(1e-2, 1e-4), row_ap=(0, .002),                       # of a whole arm
    ap=(0, 1e-9), number=(1e-6, 1e-9))

DRAWN = ("machine", "opencv", "drawing")  # what decides the pixels that OpenCV draws and warps
FLOAT = ("machine", "torch")              # what decides the numbers of a network
Kind = namedtuple("Kind", "build keep cases exact near slow", defaults=((), (), False))
KINDS = {  # kind -> how it is built, what is kept, cases, what decides the groups `exact` and `near`, slow?
    "pictures": Kind(pictures, keep_pictures, ["drawn"], DRAWN),
    "stream": Kind(stream, keep_samples, STREAMS, DRAWN),
    "poisson": Kind(stream, keep_samples, POISSONS, (*DRAWN, "ipp")),
    "provenance": Kind(provenance, keep_exact, ["as it comes", "three classes of the paper", "naive"], DRAWN),
    "scene": Kind(one_scene, keep_samples, ["own textures"], DRAWN),
    "written": Kind(written_stream, keep_samples, ["coco", "voc", "yolo"], DRAWN),
    "live": Kind(live, keep_live, ["each object once", "each object three times"], DRAWN, FLOAT),
    "live_drawn": Kind(live_drawn, keep_samples, ["butterflies"], DRAWN),
    "cutouts": Kind(cut_outs, keep_cut_outs, CUTS, DRAWN, DRAWN),
    "soft_cutouts": Kind(cut_outs, keep_soft_cut_outs, SOFT_CUTS, DRAWN + FLOAT, DRAWN + FLOAT),
    "mask_scores": Kind(mask_scores, keep_scores, ["grabcut", "redo", "frame", "alpha"], near=DRAWN + FLOAT),
    "objects": Kind(objects, keep_drawn, OBJECTS, near=FLOAT),
    "own_objects": Kind(own_objects, keep_objects, ["real", "real, the first", "images"], DRAWN),
    "training": Kind(training, keep_training, TRAININGS, near=FLOAT),
    "redo": Kind(redo_learning, keep_learning, ["three steps"], near=DRAWN + FLOAT),
    "gan64": Kind(gan_learning, keep_learning, ["three steps"], near=DRAWN + FLOAT),
    "evaluation": Kind(evaluation, keep_evaluation, EVALUATIONS),
    "wider": Kind(wider_score, keep_evaluation, ["drawn faces", "other faces"]),
    "readers": Kind(reader, keep_domain, READERS, (*DRAWN, "pillow")),
    "folders": Kind(folder, keep_domain, ["coco", "voc", "yolo"], DRAWN),
    "formats": Kind(round_trip, keep_round_trip, ["coco", "voc", "yolo"], ("supervision",)),
    "resized": Kind(resized, keep_labelled, ["bilinear", "averaged"], DRAWN),
    "face_crops": Kind(face_crops, keep_labelled, ["64 px"], DRAWN),
    "order": Kind(order, keep_order, LOOKS),
    "subset": Kind(subset_order, keep_always, ["shuffled", "released", "first"]),
    "names": Kind(names, keep_always, ["digests"]),
    "numbers": Kind(numbers, keep_numbers, ["generators"]),
    "settings": Kind(settings, keep_settings, ["recipes", "gates", "redo", "gan64", "data", "arms"]),
    "rows": Kind(row, keep_row, ["scratch", "pretrain", "mixed"], near=DRAWN + FLOAT, slow=True),
}


# ==== The tests =======================================================================================================

def surroundings():
    "What values hang on besides the package: versions, and the kind of code that runs on this processor."
    ipp = cv2.ipp.getIppVersion().split(" 20")[0] if cv2.ipp.useIPP() else "none"
    avx2 = "*AVX2 " in cv2.getCPUFeaturesLine() + " "
    return dict(torch=torch.__version__.split("+")[0], numpy=np.__version__, opencv=cv2.__version__,
                pillow=metadata.version("pillow"), supervision=metadata.version("supervision"),
                machine=platform.machine(), cpu=torch.backends.cpu.get_cpu_capability(), ipp=ipp,
                drawing=f"{'no ' if ipp == 'none' else ''}IPP, {'' if avx2 else 'no '}AVX2")


@lru_cache(maxsize=None)
def found(kind, case):
    "The values of a case as the package gives them now."
    groups = KINDS[kind].keep(KINDS[kind].build(case))
    return json.loads(json.dumps({g: v for g, v in groups.items() if v}, allow_nan=False))


@lru_cache(maxsize=None)
def recorded(kind): return json.loads((GOLDEN/f"{kind}.json").read_text())


def apart(kept, now, tolerance=None, where=""):
    "Where two trees of values differ, in words."
    if isinstance(kept, dict) and isinstance(now, dict) and kept.keys() == now.keys():
        for k in kept: yield from apart(kept[k], now[k], tolerance, f"{where}/{k}")
    elif isinstance(kept, list) and isinstance(now, list) and len(kept) == len(now):
        for k, (a, b) in enumerate(zip(kept, now)): yield from apart(a, b, tolerance, f"{where}/{k}")
    elif not same(kept, now, tolerance): yield f"{where}: {str(kept)[:200]} was recorded, {str(now)[:200]} is found"


def same(kept, now, tolerance):
    if not tolerance or {type(kept), type(now)} - {int, float}: return kept == now
    return abs(kept - now) <= tolerance[0]*abs(kept) + tolerance[1]


def cases():
    "Every kind, case and group that is recorded."
    for kind in (k for k in KINDS if (GOLDEN/f"{k}.json").exists()):
        for case, groups in recorded(kind)["cases"].items():
            marks = [pytest.mark.slow]*KINDS[kind].slow
            for group in groups: yield pytest.param(kind, case, group, id=f"{kind}-{case}-{group}", marks=marks)


@pytest.mark.parametrize("kind, case, group", cases())
def test_what_is_recorded_is_found(kind, case, group):
    then, here = recorded(kind)["taken_with"], surroundings()
    for k in getattr(KINDS[kind], group, ()):
        if then[k] != here[k]: pytest.skip(f"recorded with {k} {then[k]}, and here is {k} {here[k]}")
    kept, now = recorded(kind)["cases"][case][group], found(kind, case)[group]
    assert kept.keys() == now.keys()
    wrong = [w for k in kept for w in apart(kept[k], now[k], NEAR[k] if group == "near" else None, k)]
    assert not wrong, f"{len(wrong)} values differ:\n" + "\n".join(wrong[:10])


def test_every_case_is_recorded():
    there = {p.stem: list(recorded(p.stem)["cases"]) for p in GOLDEN.glob("*.json")}
    assert there == {kind: list(k.cases) for kind, k in KINDS.items()}


def as_text(values, width=120):
    "JSON in lines of at most `width` characters, each case a paragraph."
    guarded = lambda v: re.sub(r'"(?:[^"\\]|\\.)*"', lambda m: m[0].replace(" ", "\0"), json.dumps(v))
    lines = lambda d: ",\n".join(f"{guarded(k)}: {guarded(v)}" for k, v in d.items())
    text = f'{{"taken_with": {guarded(values["taken_with"])},\n"cases": {{\n{lines(values["cases"])}}}}}\n'
    wrap = lambda line: textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
    text = "\n".join(map(wrap, text.split("\n"))).replace("\0", " ")
    assert json.loads(text) == values
    return text


def record(kinds):
    "Write the values of kinds anew."
    for kind in kinds:
        values = dict(taken_with=surroundings(), cases={case: found(kind, case) for case in KINDS[kind].cases})
        (GOLDEN/f"{kind}.json").write_text(as_text(values))


if __name__ == "__main__":
    if sys.argv[1:2] != ["--record"] or set(sys.argv[2:]) - KINDS.keys():
        sys.exit(f"usage: python tests/test_golden.py --record [KIND ...], with kinds from {', '.join(KINDS)}")
    os.environ.update(SYNTHDET_QUIET="1", SYNTHDET_CACHE=str(scratch("cache")))
    GOLDEN.mkdir(exist_ok=True)
    record(sys.argv[2:] or KINDS)
