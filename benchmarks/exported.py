"""A batch of an exported generator through its process, beside the same program in this process, in one run.

    python benchmarks/exported.py            # prints a table, writes results/exported.json

The generator is the package's own, exported to TorchScript; `ratio` is the time of a batch through the process over
that of the same compiled program here, the two taken in turns, medians of the clock. `start_s` is how long it takes
until a file is read and a length of noise is found. Another one, with the picture's side of 128 px and wide layers,
tells what a real generator needs: `resident_gib` and `mapped_gib` are the most that its process has held and mapped,
imports and the shared block of 1 GiB included.
"""
import argparse, json, statistics, sys, tempfile, time, warnings
from pathlib import Path
import torch
from torch import nn
from synthdet.machine import run_info
from synthdet.paths import write_atomic
from synthdet.objects.exported import load_exported
from synthdet.objects.gan64 import load_gan64
from synthdet.objects.torchscript import compiled
import synthdet

ROOT = Path(__file__).resolve().parents[1]


def wide(nz=128, c=1024):
    "A generator of 128 px with the layers of DCGAN, twice as wide."
    layers = [nn.Unflatten(1, (nz, 1, 1)), nn.ConvTranspose2d(nz, c, 4)]
    for _ in range(4): layers, c = layers + [nn.BatchNorm2d(c), nn.ReLU(), nn.ConvTranspose2d(c, c//2, 4, 2, 1)], c//2
    return nn.Sequential(*layers, nn.ReLU(), nn.ConvTranspose2d(c, 3, 4, 2, 1), nn.Tanh()), nz


def status(pid, name):
    "GiB of a process, as Linux tells them."
    line, = [l for l in Path(f'/proc/{pid}/status').read_text().splitlines() if l.startswith(name)]
    return int(line.split()[1])/2**20


def seconds(f, z):
    start = time.perf_counter()
    f(z)
    return time.perf_counter() - start


def compared(name, net, nz, batch, rounds, folder):
    "A row: medians of a batch through the process and in this one."
    torch.jit.trace(net.eval().requires_grad_(False), torch.randn(2, nz)).save(path := folder/f'{name}.pt')
    start = time.perf_counter()
    G = load_exported(path)
    taken, z = time.perf_counter() - start, torch.randn(batch, nz)
    here, _ = compiled(path.read_bytes(), path)
    with torch.no_grad():
        for f in (here, G)*3: f(z)
        assert torch.equal(G(z), here(z)), 'the same bytes'
        pairs = [(seconds(G, z), seconds(here, z)) for _ in range(rounds)]
    through, alone = (1000*statistics.median(x) for x in zip(*pairs))
    pid = G.run.process.process.pid
    return dict(generator=name, batch=batch, mb=round(path.stat().st_size/2**20, 1), start_s=round(taken, 2),
                through_ms=round(through, 2), here_ms=round(alone, 2), ratio=round(through/alone, 3),
                resident_gib=round(status(pid, 'VmHWM'), 2), mapped_gib=round(status(pid, 'VmPeak'), 2))


def main(rounds, out):
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    torch.manual_seed(0)
    own = load_gan64(Path(synthdet.__file__).parent/'assets'/'gan64_butterflies.safetensors')
    with tempfile.TemporaryDirectory() as folder:
        rows = [compared(name, net, nz, batch, rounds, Path(folder)) for name, net, nz, batch in (
            ('gan64', own, own.nz, 8), ('gan64', own, own.nz, 64), ('wide, 128 px', *wide(), 8))]
    for r in rows: print(*(f'{k} {v}' for k, v in r.items()))
    about = dict(command=' '.join(['python', 'benchmarks/exported.py', *sys.argv[1:]]), rows=rows, **run_info())
    if out: write_atomic(out, json.dumps(about, indent=1) + '\n')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=20, help='timed batches of each')
    parser.add_argument('--out', default=str(ROOT/'results'/'exported.json'),
                        help="where the numbers go; '' writes none")
    main(*vars(parser.parse_args()).values())
