"""How long a playground takes to draw after a slider moved, beside making the stream anew for each move.

    python benchmarks/playground.py            # prints a table, writes results/playground.json

Eight scenes of 300 px with the default recipe, as the notebook shows them, JPEG for the browser included. `anew` is
what one would write without it: `synthdet.samples` for every move, whose cut-outs come from the cache on disk where
the gate is the same; the cache is one of its own, empty at first. Each figure is the median of processor times in one
process, ms; `within` is the share of moves that took less than 300 ms of it.
"""
import json, os, statistics, tempfile, time
from pathlib import Path
import synthdet
from synthdet.machine import run_info
from synthdet.paths import write_atomic
from synthdet.evidence.arm import make_arms
from synthdet.playground import Bench, Panel, Playground
from synthdet.settings import override
from torchvision.io import encode_jpeg
from synthdet.show import sheet

OUT = Path(__file__).resolve().parents[1]/'results'/'playground.json'
MOVES = dict(recipe=[('recipe.scale', (.15 + k/50, .7)) for k in range(10)],
             gate=[('masks.gate.max_border', .3 + k/50) for k in range(10)])


def timed(f, *args):
    "Processor time of a call, ms."
    start = time.process_time()
    f(*args)
    return 1000*(time.process_time() - start)


def moved(panel, path, value):
    "Move a slider."
    panel.controls[path].part.value = value


def anew(domain, synthesis):
    "The same picture from a stream made for it."
    samples = synthdet.samples(domain, synthesis)
    images, targets = zip(*(samples[i] for i in range(8)))
    encode_jpeg(sheet(images, targets, cols=4, cell=240), quality=85)


def main():
    os.environ['SYNTHDET_CACHE'] = tempfile.mkdtemp()
    arm, = make_arms('pretrain')
    domain, found = synthdet.domain('butterflies', n_class_images=48, n_backgrounds=24), {}
    panel = Panel(Playground(arm, bench=Bench(arm)))
    panel.controls['masks.gate.max_border'].auto.value = False
    anew(domain, arm.synthesis)                                  # cut-outs lie in the cache now
    for kind, moves in MOVES.items():
        took = [timed(moved, panel, *move) for move in moves]
        plain = [timed(anew, domain, override(arm.synthesis, {path: value})) for path, value in moves]
        ms, anew_ms = statistics.median(took), statistics.median(plain)
        found[kind] = dict(ms=ms, anew_ms=anew_ms, within=sum(t < 300 for t in took)/len(took), ratio=anew_ms/ms)
        print(f"{kind:8} {ms:6.0f} ms   anew {anew_ms:6.0f} ms   {anew_ms/ms:.1f} x")
    write_atomic(OUT, json.dumps(dict(moves=found, **run_info()), indent=1) + '\n')


if __name__ == '__main__': main()
