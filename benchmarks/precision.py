"""Test AP50 of trainings in bf16 beside the same trainings in fp32: the same initial weights, labels and stream.

    python benchmarks/precision.py                 # butterflies, three seeds, arms scratch and pretrain
    python benchmarks/precision.py --seeds 5       # more of them; what is finished is found again

Seed k has initial weights, stream and subset of labels (fold k) of its own, so the noise is that of a whole experiment.
Rows go to results/precision.jsonl. The two are equal within `statistics.MARGIN` points when two one-sided t-tests of
the pairs say so at 5%, that is when the 90% interval of their mean difference lies inside.
"""
import argparse
from pathlib import Path
from synthdet.evidence.arm import make_arms
from synthdet.evidence.phases import load, run
from synthdet.evidence.statistics import equivalence, pairs
from synthdet.evidence.tables import load_rows, plus_minus

OUT = Path(__file__).resolve().parents[1]/'results'/'precision.jsonl'


def compared(rows):
    "A line per arm: both precisions, their mean paired difference with its 90% interval, points, and are they equal?"
    for arm, some in rows.groupby('arm'):
        kinds = {p: some[some.precision == p] for p in ('fp32', 'bf16')}
        d = equivalence(pairs(*kinds.values(), differ=('precision',)).gain)
        yield dict(arm=arm, **{p: plus_minus(of.ap50) for p, of in kinds.items()}, difference=round(d['mean'], 2),
                   low=round(d['low'], 2), high=round(d['high'], 2), n=d['n'], equal=d['holds'])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, default=3,
                   help='seeds, each with its fold of the labels (default: %(default)s)')
    p.add_argument('--arms', default='scratch,pretrain', help='arms (default: %(default)s)')
    p.add_argument('--out', default='runs/precision', help='folder of artefacts (default: %(default)s)')
    p.add_argument('--results', default=str(OUT), help='file of the rows (default: %(default)s)')
    p.add_argument('--more', default='', help='other settings, as words')
    a = p.parse_args()
    for seed in range(a.seeds):
        for precision in ('fp32', 'bf16'):
            for arm in make_arms(a.arms, a.more, precision=precision, seed=seed, fold=seed):
                row = run(arm, a.out, a.results, loaded=load(arm))
                told = f"AP50 {100*row['ap50']:.1f}, {row['seconds']} s"
                print(f'{arm.arm:14} {precision} seed {seed}: {told}', flush=True)
    for line in compared(load_rows(a.results)): print(*(f'{k} {v}' for k, v in line.items()), sep='; ')


if __name__ == '__main__': main()
