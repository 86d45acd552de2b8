"""Time of a bootstrap over test images, beside scoring every drawn set anew.

    python benchmarks/images.py           # prints a table, writes results/images.json

Both give the same numbers to the last bit, which is checked. Anew means `average_precision` of the drawn images.
"""
import json, time
from pathlib import Path
import numpy as np
from evaluate import image
from synthdet.core import generator
from synthdet.machine import run_info
from synthdet.paths import write_atomic
from synthdet.detection.evaluate import average_precision
from synthdet.evidence.images import drawn_counts, resampled_ap50

OUT = Path(__file__).resolve().parents[1]/'results'/'images.json'
IMAGES, DRAWN, ANEW = 400, 300, 20


def timed(f):
    "CPU seconds of a call, and what it gave."
    start = time.process_time()
    found = f()
    return time.process_time() - start, found


def main():
    g = generator(0, 'benchmark')
    found, targets = zip(*(image(g) for _ in range(IMAGES)))
    drawn = [np.repeat(np.arange(IMAGES), c) for c in drawn_counts(IMAGES, ANEW)]
    score = lambda which: 100*average_precision([found[i] for i in which], [targets[i] for i in which])
    ours, scores = timed(lambda: resampled_ap50(found, targets, repeats=DRAWN))
    anew, again = timed(lambda: [score(which) for which in drawn])
    assert list(scores[:ANEW]) == again
    rows = [dict(name='matched once', seconds_per_set=round(ours/DRAWN, 5), of_ours=1.),
            dict(name='every set anew', seconds_per_set=round(anew/ANEW, 5), of_ours=round(anew/ANEW/(ours/DRAWN), 1))]
    for r in rows: print(f"{r['name']:16} {1000*r['seconds_per_set']:8.2f} ms per drawn set {r['of_ours']:6.1f}x")
    result = dict(command='python benchmarks/images.py', images=IMAGES, detections=sum(len(f['scores']) for f in found),
                  drawn=DRAWN, rows=rows, info=run_info())
    write_atomic(OUT, json.dumps(result, indent=1).encode() + b'\n')


if __name__ == '__main__': main()
