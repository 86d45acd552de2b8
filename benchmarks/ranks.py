"""Two ranks beside one process: how far they drift apart, and how fast they are on the CPU.

    python benchmarks/ranks.py             # prints two tables, writes results/ranks.json; uses two cores

Both train the quick protocol's detector (SSD, small ResNet, 128 px, batches of 16) on the same 64 composed images held
in memory. Drift: the greatest difference of a weight after some steps, beside how far the weights moved and beside
what one process with two threads in place of one differs by, which is the order of the sums alone. Speed: seconds per
step of two ranks with one thread each over those of one process with two threads, in turns in the same run, the
fastest turn of each.
"""
import argparse, json, os, sys, tempfile
os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR') # advice to programmers, once per rank
from pathlib import Path
import torch
import torch.distributed as dist
from safetensors.torch import load_file
import synthdet
from synthdet.boxes import unwrap
from synthdet.machine import run_info
from synthdet.paths import write_atomic
from synthdet.files import read_jsonl
from synthdet.data.batches import batches
from synthdet.detection.train import matcher_of, train
from synthdet.ranks import rank, ranks

OUT = Path(__file__).resolve().parents[1]/'results'/'ranks.json'
BATCH = 16
CASES = {'sgd, frozen batch norm': dict(optimizer='sgd', frozen=True),
         'adam, frozen batch norm': dict(optimizer='adam', frozen=True),
         'adam, trained batch norm': dict(optimizer='adam', frozen=False)}


class Held(list):
    "Samples in memory, round and round."
    def __len__(self): raise TypeError('endless')
    def __getitem__(self, i): return list.__getitem__(self, i % list.__len__(self))


def model_of(frozen):
    torch.manual_seed(0)
    model = synthdet.detector(synthdet.Model())
    for m in model.modules():
        if frozen and isinstance(m, torch.nn.BatchNorm2d):
            m.eval()
            m.train = lambda mode=True, m=m: m
    return model


def learn(held, out, steps, frozen, optimizer):
    "This rank's part of a training."
    model = model_of(frozen)
    def feed(start): return batches(held, BATCH, start, part=(rank(), ranks()), prepare=matcher_of(model))
    train(model, feed, steps, out, batch_size=BATCH, optimizer=optimizer, lr=1e-3, eval_every=10**6,
          precision='fp32', device='cpu')


def of_rank(r, n, threads, folder, steps, case):
    "What each process does."
    torch.set_num_threads(threads)
    if n > 1: dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=r, world_size=n)
    learn(Held(torch.load(folder.parent/'held.pt', weights_only=True)), folder, steps, **CASES[case])
    if n > 1: dist.destroy_process_group()


def trained(place, name, n, threads, steps, case):
    "The folder of a training by `n` processes of so many threads each."
    folder = place/f'{name}-{n}-{threads}'
    folder.mkdir()
    torch.multiprocessing.spawn(of_rank, (n, threads, folder, steps, case), nprocs=n)
    return folder


def far(a, b):
    "The greatest difference of a weight; running averages are none."
    weights = [k for k in a if a[k].is_floating_point() and 'running' not in k]
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in weights)


def drift(place, steps):
    "Rows of differences between one process and two ranks."
    start, rows = model_of(frozen=False).state_dict(), []
    for k, case in enumerate(CASES):
        places = [trained(place, f'drift{k}', *how, steps, case) for how in ((1, 1), (1, 2), (2, 1))]
        one, threads, two = (load_file(f/'last.safetensors') for f in places)
        loss = [read_jsonl(f/'metrics.jsonl')[-1]['loss'] for f in places]
        rows.append(dict(case=case, steps=steps, moved=far(start, one), threads=far(one, threads), ranks=far(one, two),
                         loss=loss[0], loss_threads=loss[1], loss_ranks=loss[2]))
    return rows


def speed(place, steps, rounds):
    "Seconds per step, in turns."
    ways, case = {'one process, two threads': (1, 2), 'two ranks, one thread each': (2, 1)}, 'adam, trained batch norm'
    seconds = {name: [] for name in ways}
    for r in range(rounds):
        for name, (n, threads) in ways.items():
            rows = read_jsonl(trained(place, f'speed{r}', n, threads, steps, case)/'metrics.jsonl')
            seconds[name].append((rows[-1]['seconds'] - rows[4]['seconds'])/(steps - 5))
    best = {name: min(s) for name, s in seconds.items()}
    first = next(iter(best.values()))
    return [dict(name=name, ms_per_step=round(1000*s, 1), of_one_process=round(s/first, 2)) for name, s in best.items()]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--steps', type=int, default=50, help='after which the weights are compared (default: %(default)s)')
    p.add_argument('--rounds', type=int, default=3, help='turns of the clock (default: %(default)s)')
    a = p.parse_args()
    os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')
    with tempfile.TemporaryDirectory() as d:
        place = Path(d)
        samples = synthdet.samples(synthdet.domain('butterflies'), recipe=synthdet.Recipe(image_size=128))
        drawn = [samples[i] for i in range(64)]
        torch.save([(image, unwrap(target)) for image, target in drawn], place/'held.pt')
        found = dict(drift=drift(place, a.steps), speed=speed(place, min(a.steps, 25), a.rounds))
    for r in found['drift']:
        print('{case:26} moved {moved:.1e}  threads {threads:.1e}  ranks {ranks:.1e}  loss {loss:.4f} '
              '{loss_threads:.4f} {loss_ranks:.4f}'.format(**r))
    for r in found['speed']: print('{name:28}{ms_per_step:8} ms/step{of_one_process:6.2f}'.format(**r))
    write_atomic(OUT, json.dumps(dict(command=' '.join(['python', *sys.argv]), **found, run=run_info()), indent=1)+'\n')


if __name__ == '__main__': main()
