"""Seconds that the evaluation of WIDER FACE takes, beside a straightforward port of its protocol, on one set of
detections.

    python benchmarks/widerface.py [DETECTIONS GROUND_TRUTH]    # prints a table, writes results/widerface.json

DETECTIONS is a folder or archive of prediction files, GROUND_TRUTH the folder of the four official .mat files; by
default those of the reference folder. The port goes through settings, images, detections and thresholds in loops, as
the protocol is told, with NumPy for the overlaps of one detection with all faces and for the search of a threshold in
the scores. Both read the same files; reading is timed apart. One core.
"""
import json, sys, time
from pathlib import Path
import numpy as np
from synthdet.machine import run_info, shared
from synthdet.paths import write_atomic
from synthdet.detection.widerface import read_ground_truth, read_predictions, SETTINGS, wider_ap

OUT = Path(__file__).resolve().parents[1]/'results'/'widerface.json'


def overlaps(row, boxes):
    "IoU of x y w h with many, sides one pixel longer."
    w = np.minimum(row[0] + row[2], boxes[:, 0] + boxes[:, 2]) - np.maximum(row[0], boxes[:, 0]) + 1
    h = np.minimum(row[1] + row[3], boxes[:, 1] + boxes[:, 3]) - np.maximum(row[1], boxes[:, 1]) + 1
    both = np.clip(w, 0, None) * np.clip(h, 0, None)
    union = (row[2] + 1) * (row[3] + 1) + (boxes[:, 2] + 1) * (boxes[:, 3] + 1) - both
    return np.where(union > 0, both / np.where(union > 0, union, 1), 0)


def image_states(rows, boxes, counts):
    "After each detection of an image: how many proposals there are, and how many faces are found."
    found, proposals, states = np.zeros(len(boxes), bool), 0, np.zeros((len(rows), 2))
    for k, row in enumerate(rows):
        iou = overlaps(row, boxes)
        best = iou.argmax()
        if iou[best] < .5 or counts[best]:
            proposals += 1
            if iou[best] >= .5: found[best] = True
        states[k] = proposals, found.sum()
    return states


def port(predictions, truth):
    "The three average precisions, one threshold of one image of one setting at a time."
    low, high = min(r[-1, 4] for r in predictions if len(r)), max(r[0, 4] for r in predictions if len(r))
    scores, out = [(r[:, 4] - low) / (high - low) for r in predictions], {}
    for setting in SETTINGS:
        table, total = np.zeros((1000, 2)), 0
        for rows, s, a, b in zip(predictions, scores, truth.first, truth.first[1:]):
            total += truth.counts[setting][a:b].sum()
            if a == b or not len(rows): continue
            states = image_states(rows, truth.boxes[a:b], truth.counts[setting][a:b])
            for i in range(1000):
                passing = np.where(s >= 1 - (i+1)/1000)[0]
                if len(passing): table[i] += states[passing[-1]]
        recall = np.concatenate([[0], table[:, 1] / total, [1]])
        share = np.divide(table[:, 1], table[:, 0], out=np.zeros(1000), where=table[:, 0] > 0)
        precision = np.concatenate([[0], share, [0]])
        for i in range(len(precision) - 1, 0, -1): precision[i-1] = max(precision[i-1], precision[i])
        steps = np.where(recall[1:] != recall[:-1])[0]
        out[setting] = float(np.sum((recall[steps+1] - recall[steps]) * precision[steps+1]))
    return out


def timed(f, *args):
    start = time.perf_counter()
    result = f(*args)
    return result, time.perf_counter() - start


def main():
    place = shared() and shared()/'eval'/'wider_face'
    if len(sys.argv) < 3 and not place: sys.exit(f'usage: {Path(sys.argv[0]).name} DETECTIONS GROUND_TRUTH')
    if len(sys.argv) > 2: source, folder = map(Path, sys.argv[1:3])
    else: source, folder = place/'predictions_retinaface_mnet025.tar.gz', place/'ground_truth'
    truth, t_truth = timed(read_ground_truth, folder)
    predictions, t_read = timed(read_predictions, source, truth.images)
    ours, whole = timed(wider_ap, source, folder)
    theirs, t_port = timed(port, predictions, truth)
    apart = max(abs(ours[s] - theirs[s]) for s in SETTINGS)
    assert apart < 1e-9, (ours, theirs)
    compute = whole - t_truth - t_read
    seconds = dict(whole=whole, reading=t_truth + t_read, evaluation=compute, port=t_port)
    seconds = {k: round(v, 2) for k, v in seconds.items()}
    result = dict(images=len(truth.images), detections=sum(map(len, predictions)), ap=ours, largest_difference=apart,
                  seconds=seconds, ratio=round(t_port / compute, 1), command='python benchmarks/widerface.py',
                  **run_info())
    write_atomic(OUT, json.dumps(result, indent=1) + '\n')
    print(f"{result['images']:,} images, {result['detections']:,} detections; AP",
          {s: round(v, 10) for s, v in ours.items()}, f'; largest difference of the two {apart:.1e}')
    print(f"wider_ap {whole:.2f} s, of which reading {t_truth + t_read:.2f}; evaluation alone {compute:.2f} s, "
          f"the port {t_port:.2f} s: {result['ratio']} times as long")


if __name__ == '__main__': main()
