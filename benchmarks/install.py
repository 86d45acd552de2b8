"""Megabytes that an installation takes, and which part of them only a GPU needs.

    python benchmarks/install.py           # of the environment it runs in; prints a line, writes results/install.json

Files are those that each package says it has installed, on this system and processor; a build of torch without CUDA
brings none of the packages that are counted as CUDA's, and leaves a library of its own out.
"""
import json, platform, re, sys
from importlib.metadata import distributions
from pathlib import Path
from synthdet.machine import run_info
from synthdet.paths import write_atomic

OUT = Path(__file__).resolve().parents[1]/'results'/'install.json'
CUDA = re.compile(r'nvidia|cuda|triton')


def megabytes(files): return sum(f.stat().st_size for f in files if f.is_file())/1e6


def measure():
    "Megabytes of all packages, of those for CUDA, and of torch's own libraries for it."
    files = {d.name: [Path(d.locate_file(f)) for f in d.files or ()] for d in distributions()}
    sizes = {name: megabytes(found) for name, found in files.items()}
    own = megabytes([f for f in files['torch'] if f.name.startswith('libtorch_cuda')])
    return dict(packages=len(sizes), mb=round(sum(sizes.values())), cuda_mb=round(own + sum(
        mb for name, mb in sizes.items() if CUDA.match(name))))


if __name__ == '__main__':
    found = dict(command='python benchmarks/install.py', system=f'{platform.system()}, {platform.machine()}',
                 **measure(), run=run_info())
    print(f"{found['packages']} packages, {found['mb']} MB, {found['cuda_mb']} MB of them for CUDA")
    write_atomic(OUT, json.dumps(found, indent=1) + '\n')
