"""Test AP50 of a constant box: how much of a score the places of the objects give away, domain by domain.

    python benchmarks/constant_box.py --data /data     # the domains of the study labels_curve, their images at its size

The box is the median of the validation boxes. Writes results/constant_box.json, which figures and tables show.
"""
import argparse, json
from pathlib import Path
from synthdet.detection.constant import constant_scores
from synthdet.evidence.phases import load
from synthdet.evidence.runner import placed
from synthdet.evidence.studies import STUDIES

OUT = Path(__file__).resolve().parents[1]/'results'/'constant_box.json'


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', default='', help='folder below which data/NAME lie')
    p.add_argument('--out', default=str(OUT), help='file of the result (default: %(default)s)')
    a = p.parse_args()
    found = {}
    for cell in STUDIES['labels_curve'].only(arm='scratch', seed=0).cells():
        if cell.at['domain'] in found: continue
        loaded = load(placed(cell.arm, a.data))
        scores = constant_scores(loaded.val, loaded.test)
        found[cell.at['domain']] = dict({k: round(v, 6) for k, v in scores.items()}, images=len(loaded.test))
        print(cell.at['domain'], *(f'{k} {100*v:.1f}' for k, v in scores.items()), flush=True)
    told = dict(command='python benchmarks/constant_box.py --data FOLDER', domains=found)
    Path(a.out).write_text(json.dumps(told, indent=1) + '\n')


if __name__ == '__main__': main()
