"""What the package does on a GPU, in one command of a few minutes; nothing is downloaded.

    python benchmarks/gpu.py                         # on the GPU of this machine, at most 8 minutes
    python benchmarks/gpu.py --minutes 4             # what is worth most comes first
    python benchmarks/gpu.py --device cpu --tiny     # the same sections in small sizes: a test of this file

Sections: training steps at 300 px in batches of 32 beside torchvision's detectors (and whether ours wait for the GPU,
by CUDA's sync debug mode); the live stream of generator and ReDO beside ready tensors; ReDO's own training at 128 px;
1,000 + 1,000 steps on butterflies at 300 px with time and AP50; compiled steps. After each, what is known is written
to results/gpu.json; a section that fails says why there, and the next one goes on.
"""
import argparse, gc, json, resource, signal, statistics, sys, tempfile, time
from dataclasses import replace
from functools import partial
from pathlib import Path
import torch
from torch.utils.data import Subset
from synthdet.machine import run_info
from synthdet.paths import write_atomic
from synthdet.data.domains import load_domain
from synthdet.detection.settings import Model, Schedule
from synthdet.evidence.arm import make_arms
from synthdet.evidence.phases import run
from synthdet.masks.redo import RedoConfig, train_redo
import live_stream
import step as steps_file

OUT = Path(__file__).resolve().parents[1]/'results'/'gpu.json'
FULL = dict(side=300, batch=32, backbone='mobilenetv1_100', turns=8, steps=20, live=80, redo=128, redo_steps=100,
            arm='steps=1000 pretrain_steps=1000 eval_every=100 n_real=100')
TINY = dict(side=64, batch=2, backbone='resnet_small', turns=1, steps=1, live=2, redo=32, redo_steps=2,
            arm='steps=2 pretrain_steps=2 eval_every=2 n_real=2')


def waits(do, device):
    "How a step waits for the GPU, in the words of CUDA's sync debug mode; None when it does not."
    if device.type != 'cuda': return None
    torch.cuda.set_sync_debug_mode('error')
    try: do()
    except RuntimeError as e: return f'{e}'[:500]
    finally: torch.cuda.set_sync_debug_mode('default')


def timed(do, a):
    "Milliseconds of a step: the median of some turns, after two that warm up."
    taken = []
    for _ in range(a.size['turns'] + 2):
        if a.device.type == 'cuda': torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(a.size['steps']): do()
        if a.device.type == 'cuda': torch.cuda.synchronize()
        taken.append(1000*(time.perf_counter() - start)/a.size['steps'])
    return statistics.median(taken[2:])


def setup(a):
    "The detector of the steps, as benchmarks/step.py takes it."
    steps_file.SETUPS['here'] = (dict(model='ssd', backbone=a.size['backbone']), a.size['side'], a.size['batch'])
    return 'here'


def steps(a, precision, only=None, compiled=False):
    "Milliseconds and images per second of each kind of step, in one precision; a kind that fails says why."
    found = {}
    for name, do in steps_file.steps_of(setup(a), a.device, precision, compiled).items():
        if only and name != only: continue
        try: ms = timed(do, a)
        except RuntimeError as e:
            found[name] = dict(error=f'{type(e).__name__}: {e}'[:500])
            continue
        found[name] = dict(ms=round(ms, 2), images_per_second=round(1000*a.size['batch']/ms, 1))
        if name.startswith('ours'): found[name].update(waits=waits(do, a.device))
    ours, other = (found.get(k, {}).get('ms') for k in ('ours', 'torchvision SSD'))
    return dict(found, **({'ours_to_torchvision': round(ours/other, 3)} if ours and other else {}))


def live(a):
    "The live stream beside ready tensors."
    model = Model(backbone=a.size['backbone'], image_size=a.size['side'])
    how = dict(model=model, schedule=Schedule(batch_size=a.size['batch']))
    reuses = (1,) if a.tiny else (1, 4)
    rows = live_stream.compared(['redo'], reuses, '', a.size['live'], a.device, **how)
    return dict(rows=rows, goal=live_stream.GOAL, enough=live_stream.enough(rows))


def alone(a):
    "What an object costs in each stage, by how many are made at once."
    sizes = (2, 4) if a.tiny else (32, 64, 128, 256)
    return dict(ms=live_stream.alone('redo', '', sizes, n=max(sizes)))


def redo(a):
    "Images per second of ReDO's training; the start is taken out by a second run that is three times as long."
    side, n = a.size['redo'], a.size['redo_steps']
    images = load_domain('butterflies', class_size=side, n_class_images=8 if a.tiny else 512).class_images
    pictures = torch.stack([images[i].image[:3] for i in range(len(images))])
    def seconds(n, precision):
        small = dict(nf=4, batch=2) if a.tiny else {}
        config = RedoConfig(size=side, steps=n, check_every=n, amp=precision, collapse=0., **small)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as out: train_redo(pictures, config, out, device=a.device)
        return time.perf_counter() - start, config.batch
    found = {}
    for precision in ('none', 'bf16'):
        (short, batch), (long, _) = seconds(n, precision), seconds(3*n, precision)
        found[precision] = dict(images_per_second=round(2*n*batch/max(long - short, 1e-9), 1), size=side, batch=batch)
    return found


def arm(a):
    "The paper's number of steps on its two kinds of pictures, objects drawn and cut out as it goes."
    words = (f"backbone={a.size['backbone']} model.image_size={a.size['side']} batch_size={a.size['batch']} "
             f"objects=gan segmenter=redo reuse=4 {a.size['arm']}")
    planned, = make_arms('pretrain', words, options=f"image_size={a.size['side']} n_backgrounds={8 if a.tiny else 300}")
    domain = load_domain(planned.data)
    if a.tiny: domain = smaller(domain)
    with tempfile.TemporaryDirectory() as out: row = run(planned, out, domain=domain, workers=1)
    return dict(settings=words, **{k: row.get(k) for k in ('ap50', 'ap', 'val_ap50', 'best_step', 'seconds')})


def smaller(domain):
    "A domain with few validation and test images."
    return replace(domain, val=Subset(domain.val, [0, 1]), test=Subset(domain.test, [0, 1]))


SECTIONS = {  # in order of worth
    'steps, bf16': partial(steps, precision='bf16'), 'live stream': live,
    'steps, fp32': partial(steps, precision='fp32'), 'ReDO training': redo,
    'pretrain and fine-tune': arm, 'objects alone': alone,
    'steps, compiled': partial(steps, precision='bf16', only='ours, compiled', compiled=True)}


def peak(device):
    "The most memory in use since it was asked last, MB; on a CPU, of the whole process."
    if device.type != 'cuda': return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**10)
    most = round(torch.cuda.max_memory_allocated()/2**20)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return most


def _late(*_): raise TimeoutError('the minutes are over')


def guarded(section, a, until):
    "What a section finds, or why it finds nothing."
    left, start = until - time.monotonic(), time.perf_counter()
    if left < 5: return dict(skipped='no minutes left')
    signal.setitimer(signal.ITIMER_REAL, left)
    try: found = section(a)
    except Exception as e: found = dict(error=f'{type(e).__name__}: {e}'[:500])
    finally: signal.setitimer(signal.ITIMER_REAL, 0)
    gc.collect()
    return dict(found, seconds=round(time.perf_counter() - start, 1), peak_mb=peak(a.device))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--minutes', type=float, default=8., help='at most so long (default: %(default)s)')
    p.add_argument('--device', default='cuda', help='cuda, or cpu for a test of this file')
    p.add_argument('--tiny', action='store_true', help='small sizes: they test this file, not the machine')
    p.add_argument('--out', default=str(OUT), help='file of the numbers (default: results/gpu.json)')
    a = p.parse_args()
    until = time.monotonic() + 60*a.minutes
    if a.device == 'cuda' and not torch.cuda.is_available():
        print('no GPU here; run this where there is one, or try the file itself: --device cpu --tiny', file=sys.stderr)
        sys.exit(2)
    a.device, a.size = torch.device(a.device), TINY if a.tiny else FULL
    torch.set_num_threads(1)
    if a.tiny: torch.compiler.set_stance('force_eager') # a compiler's minutes tell nothing of this file
    signal.signal(signal.SIGALRM, _late)
    about = dict(command=' '.join(['python', 'benchmarks/gpu.py', *sys.argv[1:]]),
                 tiny=a.tiny, sizes=a.size, **run_info())
    about = dict(about, sections={})
    for name, section in SECTIONS.items():
        about['sections'][name] = guarded(section, a, until)
        print(f"{name}: {json.dumps(about['sections'][name])}", flush=True)
        write_atomic(a.out, json.dumps(about, indent=1) + '\n')


if __name__ == '__main__': main()
