"""Test AP50 of a constant box: how much of a score the places of the objects give away, domain by domain, and how many
training, validation and test images a domain has.

    python benchmarks/constant_box.py --data /data     # the domains of the study labels_curve, their images at its size

The box is the median of the validation boxes. Writes results/constant_box.json, which figures and tables show.
"""
import argparse, json
from pathlib import Path
from synthdet.machine import run_info
from synthdet.paths import write_atomic
from synthdet.data.domain import fingerprint
from synthdet.detection.constant import constant_score
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
        score = constant_score(loaded.val, loaded.test)
        counts = dict(train=len(loaded.domain.train), val=len(loaded.domain.val), images=len(loaded.test))
        found[cell.at['domain']] = dict(ap50=round(score, 6), **counts, image_size=cell.arm.model.image_size,
                                        data_test=fingerprint(loaded.domain.test))
        print(f"{cell.at['domain']} AP50 {100*score:.1f}", flush=True)
    told = dict(command='python benchmarks/constant_box.py --data FOLDER', domains=found, run=run_info())
    write_atomic(Path(a.out), json.dumps(told, indent=1) + '\n')


if __name__ == '__main__': main()
