"Rows of runs that never were, to try what reads rows (scores from a seeded generator, never a result), and who reads."
import ast
import json

import matplotlib.pyplot as plt
from synthdet.core import digest, generator, VERSIONS
from synthdet.evidence.parts import studies_file
from synthdet.evidence.rows import named_row, run_id
from synthdet.evidence.identity import run_key
from synthdet.evidence.studies import STUDIES
from synthdet.paths import append_jsonl
from synthdet.settings import to_row

WORTH = dict(scratch=30, scratch_long=40, pretrain=60, pretrain_only=25, mixed=55)


def row(cell, points=None, **more):
    "The row of a cell; AP50 in points."
    at, run, g = cell.at, run_key(cell.arm), generator(0, run_key(cell.arm))
    arm, n = cell.arm.arm, dict(all=500).get(at.get("n_real"), at.get("n_real", 20))
    points = WORTH[arm] + float(g.normal(0, 2)) if points is None else points
    steps = [*range(-900, 0, 300), *range(0, 301, 100)] if arm.startswith("pretrain") else range(0, 301, 100)
    test = digest(at["domain"])
    about = dict(id=run_id(arm, run, test, VERSIONS["score"]), arm=arm, domain=at["domain"], data_test=test)
    about |= dict(settings=json.loads(json.dumps(to_row(cell.arm))), weights_file=f"{about['id']}.safetensors")
    if arm != "pretrain_only": about |= dict(labels=digest(at["domain"], n, at["seed"]), n_labels=n)
    found = dict(ap50=round(points/100, 6),
                 curve=[[s, round(points/100*(k + 1)/len(steps), 6)] for k, s in enumerate(steps)])
    where = dict(versions=VERSIONS, torch="2", device="cpu", commit="planted", class_images_from="planted",
                 boxes_spent=0, handed=[])
    left = dict(seconds=60, memory_mb=400, best_step=300, predictions=f"{run}.npz", artefacts=[run])
    return about | found | where | left | more


def plant(folder, name, study=None):
    "Rows of a study, or of a part of it, in its results file in a folder; the file."
    path = studies_file(name, folder)
    append_jsonl(path, *(named_row(row(cell)) for cell in (study or STUDIES[name]).missing([])), sync=False)
    return path


def run_here(notebook, **given):
    "Run the cells of a notebook in this process, and print what each ends with: a kernel of its own takes seconds."
    space = dict(__name__="__main__", display=print)
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] != "code": continue
        body = ast.parse("".join(cell["source"])).body
        shown = [body.pop()] if isinstance(body[-1], ast.Expr) else []
        exec(compile(ast.Module(body, []), str(notebook), "exec"), space)
        for last in shown: print(eval(compile(ast.Expression(last.value), str(notebook), "eval"), space))
        if "parameters" in cell["metadata"].get("tags", ()): space.update(given)
    plt.close("all")
