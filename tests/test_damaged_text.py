"Text and tables of other people, damaged at random by a seed: read as they are or refused in one line; nothing hangs."
import json
import pickle
import random
import signal

import numpy as np
import pytest
from scipy.io import savemat

from synthdet.core import UserError
from synthdet.data.readers import (cars_boxes, cub_birds, cub_official, dmgan_names, fddb_faces, Listed, redo_split,
                                   retinaface_faces, voc_names, wider_faces)
from synthdet.detection.widerface import read_predictions
from synthdet.evidence.experiments import parameters
from synthdet.files import read_json, read_jsonl, read_text, read_yaml
from synthdet.settings import words

NASTY = [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"9"*400, b"-1", b"1e999", b"nan", b"[" * 3000, b"{\"a\":" * 3000,
         b"&a *a", b"\n", b"\r\n", b"..", b"/", b" ", b"\t", b"\"", b"'", b":", b",", b"- ", b"? ", b"!!x ", b"<<: ",
         b"\x1b[31m", b"\xd9\xa1", b"\x80", b"1_0"]
JSON = json.dumps(dict(images=[dict(id=i, file_name=f"{i}.jpg", width=64, height=48) for i in range(3)],
                       categories=[dict(id=1, name="é")],
                       annotations=[dict(id=1, image_id=0, bbox=[1.5, 2, 30, 20], iscrowd=0)],
                       info=None, licenses=[True, False]))
YAML = ("path: ../data\ntrain: images/train\nnames:\n  0: &a no\n  1: 'on'\n  2: *a\nkpt_shape: [17, 3]\n"
        "b: &b {x: 1}\nc: {<<: *b, y: 2}\n")
ROWS = "".join(json.dumps(dict(step=i, ap50=.5)) + "\n" for i in range(4))
FDDB = ("2002/01/img_1\n2\n67.3 44.5 -1.47 105.2 87.2 1\n41.0 23.5 1.39 290.1 80.4 1\n"
        "2002/01/img_2\n1\n30 20 0 50 50 1\n")
WIDER = "0--P/a.jpg\n2\n1 2 30 40 0 0 0 0 0 0\n5 5 9 9 1 0 0 0 2 0\n0--P/b.jpg\n0\n0 0 0 0 0 0 0 0 0 0\n"
RETINA = "# 0--P/a.jpg\n" + "1 2 30 40 " + "5 6 0 "*5 + ".9\n# 0--P/b.jpg\n"
TABLE = dict(images="1 001.B/a.jpg\n2 001.B/b.jpg\n", bounding_boxes="1 60.0 27.0 325.0 304.0\n2 1 2 3 4\n",
             train_test_split="1 0\n2 1\n")
PREDICTED = "a.jpg\n2\n1 2 30 40 0.9\n5 6 7 8 .1\n"
NOTEBOOK = json.dumps(dict(nbformat=4, nbformat_minor=5, metadata={}, cells=[
    dict(cell_type="code", id="a", metadata=dict(tags=["parameters"]),
         source=["n:int = 3  # how many\n", "root = 'x'\n"], outputs=[], execution_count=None)]))


def mat():
    "Bytes of a devkit's list."
    import io
    out = io.BytesIO()
    kind = [(k, object) for k in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    rows = np.array([[(1, 2, 30, 40, 1, "0.jpg"), (3, 4, 50, 60, 1, "1.jpg")]], kind)
    savemat(out, dict(annotations=rows), do_compression=True)
    return out.getvalue()


def listed(found): return all(isinstance(p, Listed) and p.boxes.ndim == 2 and p.boxes.shape[1] == 4 for p in found)


def plain(found, depth=0):
    "Is this made of dicts, lists, texts and numbers?"
    if isinstance(found, dict): return all(isinstance(k, str) and plain(v, depth + 1) for k, v in found.items())
    if isinstance(found, list): return all(plain(v, depth + 1) for v in found)
    return found is None or isinstance(found, (str, int, float)) and depth < 900


# reader -> (name of its file, its content, how it is read, what it gives when it gives something)
READERS = dict(
    json=("a.json", JSON, read_json, plain),
    yaml=("data.yaml", YAML, read_yaml, lambda f: plain(f) and not isinstance(f, (int, float))),
    jsonl=("rows.jsonl", ROWS, read_jsonl, lambda f: all(isinstance(r, dict) and plain(r) for r in f)),
    words=("words.txt", "blend=paste scale=.2,.7 root='my pictures' lr=1e-3", lambda p: words(read_text(p)), plain),
    notebook=("a.ipynb", NOTEBOOK, parameters, lambda f: all(isinstance(k, str) and len(v) == 2 for k, v in f.items())),
    fddb=("f.txt", FDDB, fddb_faces, listed),
    wider=("w.txt", WIDER, wider_faces, listed),
    retinaface=("label.txt", RETINA, retinaface_faces, listed),
    cub_images=("images.txt", TABLE["images"], lambda p: cub_birds(p.parent), listed),
    cub_boxes=("bounding_boxes.txt", TABLE["bounding_boxes"], lambda p: cub_birds(p.parent), listed),
    cub_split=("train_test_split.txt", TABLE["train_test_split"], lambda p: cub_official(p.parent),
               lambda f: {*f.values()} <= {0, 1}),
    redo_split=("redo.txt", "1 0\n2 1\n3 2\n", redo_split, lambda f: {*f.values()} <= {0, 1, 2}),
    dmgan=("names.txt", "001.B/a\n001.B/b\n", dmgan_names, lambda f: all(isinstance(n, str) for n in f)),
    pickled=("names.pickle", pickle.dumps(["001.B/a", "001.B/b"], 2), dmgan_names,
             lambda f: all(isinstance(n, str) for n in f)),
    cars=("cars.mat", mat(), cars_boxes, listed),
    voc=("VOC/ImageSets/Main/person_train.txt", "a -1\nb  1\nc  0\n",
         lambda p: voc_names(p.parents[2], "train", "person"), lambda f: all(isinstance(n, str) for n in f)),
    predictions=("p/0--P/a.txt", PREDICTED, lambda p: read_predictions(p.parents[1], ["0--P/a"]),
                 lambda f: len(f) == 1))


def damaged(r, data):
    "Bytes changed in one to four places."
    data = bytearray(data)
    for _ in range(r.randint(1, 4)):
        a, n = r.randrange(len(data) + 1), r.randint(1, 12)
        kind = r.randrange(5)
        if kind == 0 and a < len(data): data[a] ^= 1 << r.randrange(8)
        elif kind == 1: del data[a:a+n]
        elif kind == 2: data[a:a] = r.choice(NASTY)
        elif kind == 3: data[a:a] = data[a:a+n]*r.randint(1, 3)
        else: data[a:a+1] = r.randbytes(1)
    return bytes(data)


def late(*_): raise TimeoutError


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_text_is_refused_in_a_line_or_read(name, tmp_path):
    file, whole, read, right = READERS[name]
    whole = whole.encode() if isinstance(whole, str) else whole
    for k, v in TABLE.items(): (tmp_path/f"{k}.txt").write_text(v)
    path = tmp_path/file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(whole)
    assert read(path) and right(read(path)), "whole it is read"
    r, refused, before = random.Random(f"damage {name}"), 0, signal.signal(signal.SIGALRM, late)
    try:
        for i in range(2000):
            path.write_bytes(damaged(r, whole))
            signal.setitimer(signal.ITIMER_REAL, 5)
            try: assert right(read(path)), (i, path.read_bytes()[:300])
            except UserError as e:
                assert str(e).isprintable() and 10 < len(str(e)) < 2500, (i, str(e)[:300])
                refused += 1
            except Exception as e:
                raise AssertionError(f"{i}: {type(e).__name__} {e!s:.300} for {path.read_bytes()[:300]}") from e
            finally: signal.setitimer(signal.ITIMER_REAL, 0)
    finally: signal.signal(signal.SIGALRM, before)
    print(f"{name}: {refused} of 2,000 refused in a line, the others read")
    assert 0 < refused <= 2000
