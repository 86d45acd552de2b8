"Strangers' notebooks, and whose files a run writes: read or refused in one line, nothing else is touched."
import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
import unicodedata
import warnings
from pathlib import Path

import nbformat
import pytest

from helpers import contents
from synthdet.core import refused, UserError
from synthdet.machine import project
from synthdet.evidence.experiments import parameters
from synthdet.evidence.notebooks import sorted_out, typed
from synthdet.evidence.execute import run_notebook


def cell(source, *tags, kind="code", **more):
    return dict(cell_type=kind, metadata=dict(tags=list(tags)), source=source, **more)


def notebook(path, *cells, **more):
    "A file with a notebook of these cells, written as somebody else's tool would."
    path.write_text(json.dumps({**dict(cells=list(cells), metadata={}, nbformat=4, nbformat_minor=5), **more}))
    return path


def tiny(path, source="print(word, n)"):
    return notebook(path, cell("word:str = 'a'  # which\nn:int = 3", "parameters"), cell(source))


# what is a notebook

P = ["parameters"]
CELLS = {"x = f()": 1, "x: int": 1, "a = b = 1": 1, "a, b = 1, 2": 1, "(y := 3)": 1, "x = (y := 3)": 1, "x += 1": 1,
         "a.b = 1": 1, "x[0] = 1": 1, "ok = 1\n%matplotlib inline": 2, "ok = 1\n!ls": 2, "import os": 1,
         "ok = 1\nfor i in (): pass": 2, "x = 'a": 1, "x = (": 1, "x = " + "("*500 + ")"*500: 1,
         "x = " + "9"*5000: 1, "x = '\0'": 1, "x = '\ud800'": 1, "\tx = 1": 1, "x = f'{1}'": 1, "x = -y": 1}


@pytest.mark.parametrize("source", CELLS, ids=lambda s: repr(s[:20]))
def test_a_parameter_is_a_literal(tmp_path, source):
    line = refused(parameters, notebook(tmp_path/"n.ipynb", cell(source, *P)))
    assert f"n.ipynb, line {CELLS[source]} of its parameters cell is no `name = literal`" in line


@pytest.mark.parametrize("notebook", sorted((project()/"nbs/experiments").glob("*.ipynb")), ids=lambda p: p.stem)
def test_papermill_understands_every_parameter(notebook, caplog):
    from papermill.inspection import inspect_notebook
    found, known = inspect_notebook(str(notebook)), parameters(notebook)
    # papermill cannot show words as a default
    told = [k for k, (default, _) in known.items() if "=" not in str(default)]
    assert set(told) <= set(found) and not any(f"'{k}:" in caplog.text for k in told)


@pytest.mark.parametrize("content, line", [
    ("[]", "is no notebook"), ("3", "is no notebook"), ("{}", "is no notebook"), ('{"cells": []}', "is no notebook"),
    ("", "cannot be read as JSON"),
    ('{"nbformat": 3, "worksheets": []}', "is a notebook of format 3, and 4 is read"),
    ('{"nbformat": "4", "cells": []}', "is a notebook of format '4'"),
    ('{"nbformat": 4}', "is a notebook of format 4"), ('{"nbformat": 4, "cells": {}}', "is a notebook of format 4"),
    ('{"nbformat": 4, "cells": []}', "has no cell tagged `parameters`"),
    ('{"nbformat": 4, "cells": [3]}', "is no notebook"),
    ('{"nbformat": 4, "cells": [{"source": "x = 1"}]}', "is no notebook"),
    ('{"nbformat": 4, "cells": [' + "["*5000, "cannot be read as JSON"),
    (json.dumps(dict(nbformat=4, cells=[cell({"x = 1": 2}, *P)])), "is no notebook"),
    (json.dumps(dict(nbformat=4, cells=[cell([1], *P)])), "is no notebook"),
    (json.dumps(dict(nbformat=4, cells=[cell("x = 1", 3)])), "is no notebook"),
    (json.dumps(dict(nbformat=4, cells=[cell("x = 1", *P)], metadata=[])), "is no notebook"),
    (json.dumps(dict(nbformat=4, cells=[dict(cell("x = 1"), metadata=None)])), "is no notebook"),
    (json.dumps(dict(nbformat=4, cells=[cell("x = 1", *P), cell("x = 2", *P)])), "has 2 cells tagged `parameters`"),
    (json.dumps(dict(nbformat=4, cells=[cell("x = 1", *P, kind="markdown")])),
     "the cell tagged `parameters` holds no code"),
    (json.dumps(dict(nbformat=4, cells=[cell("x = 1", *P)], metadata=dict(kernelspec=dict(language="R")))),
     "is written in r; choose one in Python"),
    (json.dumps(dict(nbformat=4, cells=[cell("x = 1", *P)]))[:60], "cannot be read as JSON"),
    (b"\xff\xd8\xff\xe0", "not a text"),
])
def test_what_is_no_notebook_is_said(tmp_path, content, line):
    path = tmp_path/"n.ipynb"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert line in refused(parameters, path)


def test_a_folder_a_pipe_and_a_huge_file_are_no_notebooks(tmp_path):
    os.mkfifo(tmp_path/"pipe.ipynb")
    with open(tmp_path/"huge.ipynb", "wb") as f: f.truncate(1 << 30)
    assert "is a folder; expected a notebook" in refused(parameters, tmp_path)
    assert "is a pipe; expected a notebook" in refused(parameters, tmp_path/"pipe.ipynb")
    assert "larger than 256 MiB; expected a notebook" in refused(parameters, tmp_path/"huge.ipynb")
    assert "NUL" in refused(parameters, "a\0b") and "too long" in refused(parameters, "a"*300 + ".ipynb")


def test_notebooks_of_all_tools_are_read(tmp_path):
    known = dict(x=(1, "of it"), y=([2, 3], ""), z=("a # b", "last"))
    lines = "# of this run\nx = 1 # of it\ny:list = [2,\n    3]\n\nz = 'a # b'  # last"
    for source in (lines, lines.splitlines(keepends=True)):
        for more in ({}, dict(id="a"), dict(execution_count=None, outputs=[])):
            book = notebook(tmp_path/"n.ipynb", dict(cell_type="code"), cell(source, "other", *P, **more))
            assert parameters(book) == known
    book = notebook(tmp_path/"n.ipynb", cell(lines, *P), cell("x = 5", "injected-parameters"))
    assert parameters(book) == known, "what papermill put in is no default"


ODD = [None, True, 3, -1, 1.5, "", "parameters", [], {}, [[]], ["parameters"], {"tags": ["parameters"]}, {"tags": 3},
       "code", 10**400, "\ud800", "x = 1"]
LINES = ["x = 1", "y:float = .5  # half", "z = f()", "s = 'text'", "t = (1, 2)", "u = {'a': [1]}", "v = w = 2", "%time",
         "", "# told", "x: int", "b = not True", "n = None", "x = -3", "raw = b'a'", "p = 'a' 'b'", "q = 1 +",
         "r = '''a\nb'''", "  x = 2", "x = 1; y = 2", "é = 'ü'", "k = 1_000"]


def mutated(g, whole):
    "A notebook with a node replaced, a line of parameters changed, or some bytes flipped or cut off."
    nb, how = copy.deepcopy(whole), g.randrange(4)
    if how == 0: nb["cells"][0]["source"] = "\n".join(g.choices(LINES, k=g.randrange(1, 5)))
    if how == 1:
        at = nb
        while isinstance(at, (dict, list)) and at:
            key = g.choice(list(at)) if isinstance(at, dict) else g.randrange(len(at))
            if g.random() < .4 or not isinstance(at[key], (dict, list)) or not at[key]: break
            at = at[key]
        at[key] = g.choice(ODD)
    data = bytearray(json.dumps(nb).encode())
    if how == 2:
        for _ in range(g.randrange(1, 4)): data[g.randrange(len(data))] = g.randrange(256)
    return bytes(data[:g.randrange(len(data))] if how == 3 else data)


def test_changed_notebooks_are_read_rightly_or_refused(tmp_path):
    g, path, read = random.Random(0), tmp_path/"n.ipynb", 0
    whole = json.loads(tiny(path).read_text())
    for _ in range(2000):
        path.write_bytes(mutated(g, whole))
        try: found = parameters(path)
        except UserError as e:
            assert "\n" not in str(e)
            continue
        read += 1
        tagged, = (c for c in json.loads(path.read_text())["cells"]
                   if "parameters" in c.get("metadata", {}).get("tags", ()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            names = {}
            code = "from __future__ import annotations\n" + "".join(tagged.get("source", ""))
            exec(code, {}, names)   # types are not looked at
        for k in ("__annotations__", "annotations"): names.pop(k, None)
        assert {k: v for k, (v, _) in found.items()} == names
    assert 200 < read < 1800


# values

KNOWN = dict(s=("a", ""), i=(3, ""), f=(.5, ""), b=(True, ""))
GOOD = [("s", 2024, "2024"), ("s", "007", "007"), ("s", ["a", 3], "a,3"),
        ("s", {"lr": .1, "scale": [1, 2]}, "lr=0.1 scale=1,2"), ("s", Path("x y"), "x y"),
        ("s", "{a} $b \"c\" 'd' %e \\f\n", "{a} $b \"c\" 'd' %e \\f\n"), ("i", "12", 12), ("i", 5., 5), ("f", 2, 2.),
        ("f", "1e-3", .001), ("b", "true", True), ("b", 0, False), ("b", "False", False)]
BAD = [("s", None), ("s", True), ("s", 1.5), ("s", "\udcff"), ("s", [None]), ("i", 5.5), ("i", True), ("i", "x"),
       ("i", None), ("i", [3]), ("i", "9"*5000), ("i", float("nan")), ("f", float("inf")), ("f", "nan"),
       ("f", 10**400), ("f", False), ("f", {}), ("b", "yes"), ("b", 2), ("b", None)]


def test_values_are_what_they_plainly_mean_or_refused():
    for k, v, right in GOOD:
        for found in (sorted_out(KNOWN, {k: v}), typed(dict(In=["", "s = 'a'\ni = 3\nf = .5\nb = True"]) | {k: v})):
            assert found[k] == right and type(found[k]) is type(right), (k, v)
    for k, v in BAD: assert refused(sorted_out, KNOWN, {k: v}).startswith(f"{k}="), (k, v)
    assert "parameter 'sS' is unknown; choose from s, i, f, b" in refused(sorted_out, KNOWN, dict(sS=1))


def test_own_parameters_have_bounds(tmp_path):
    (tmp_path/"file").touch()
    for given, line in ((dict(workers=10**6), "workers=1000000: expected a whole number from 0"),
                        (dict(jobs=10**30), "jobs="), (dict(workers=-1), "workers=-1: expected"),
                        (dict(out=str(tmp_path/"file")), "is a file; choose a folder")):
        k, = given
        assert line in refused(sorted_out, {k: (type(given[k])(), "")}, given)


# one run


def test_names_that_papermill_would_fill_in(tmp_path):
    for name in ("{a}", "my birds $x", "100% {", "it's \"so\"", "a\nb", "café", unicodedata.normalize("NFD", "café"),
                 "{{}}", "{0.__class__}", "-x", "s3:"):
        folder = tmp_path/name
        folder.mkdir()
        book = tiny(folder/f"{name}.in.ipynb", "print(ascii(word), n)")
        before = contents(folder)
        assert run_notebook(book, folder/f"{name}.ipynb", dict(word=name, n="4")) == f"{ascii(name)} 4\n"
        assert contents(folder).keys() - before.keys() == {f"{name}.ipynb"}
        assert before.items() <= contents(folder).items()
        assert nbformat.read(folder/f"{name}.ipynb", 4).metadata.papermill.output_path == f"{name}.ipynb"


@pytest.mark.parametrize("spec", [None, "/opt/gone/bin/python", "/bin/false"])
def test_the_kernel_is_this_interpreter(tmp_path, monkeypatch, spec):
    for key in ("JUPYTER_DATA_DIR", "JUPYTER_PATH"): monkeypatch.setenv(key, str(tmp_path/key))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    for key in ("JUPYTER_DATA_DIR", "JUPYTER_PATH") if spec else ():
        (tmp_path/key/"kernels"/"python3").mkdir(parents=True)
        told = dict(argv=[spec, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                    display_name="Python 3", language="python")
        (tmp_path/key/"kernels"/"python3"/"kernel.json").write_text(json.dumps(told))
    book = tiny(tmp_path/"n.ipynb", "import sys; print(sys.executable)")
    assert run_notebook(book, tmp_path/"out.ipynb", {}).strip() == sys.executable


def test_what_is_not_installed_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel.kernelspec", None)
    told = refused(run_notebook, tiny(tmp_path/"n.ipynb"), tmp_path/"new"/"out.ipynb", {})
    assert "pip install papermill ipykernel" in told
    assert contents(tmp_path).keys() == {"n.ipynb"} and not (tmp_path/"new").exists()


def test_cells_without_ids_metadata_or_outputs_run_and_what_they_say_is_said(tmp_path, recwarn, capfd):
    pasted = dict(cell("![](attachment:a.png)", kind="markdown"), attachments={"a.png": {"image/png": "aaaa"}})
    loud = ("import warnings\nfrom synthdet.evidence.notebooks import typed\n"
            "typed(globals())\nprint('counts')\nwarnings.warn('of data')")
    book = notebook(tmp_path/"n.ipynb", cell(["n = 1\n", "m = 2"], *P), pasted, dict(cell_type="raw", source="x"),
                    cell(loud), dict(cell_type="code", source=["print(n+m)"]))
    assert run_notebook(book, tmp_path/"out.ipynb", dict(n=5)) == "7\n"
    assert capfd.readouterr() == ("counts\n7\n", "warning: of data\n"), "only a terminal was told"
    assert nbformat.read(tmp_path/"out.ipynb", 4).cells[2].attachments
    assert not [w for w in recwarn if "id" in str(w.message)]
    again = run_notebook(tmp_path/"out.ipynb", tmp_path/"again.ipynb", {})
    assert again == "3\n", "an executed one starts from its defaults"


# whose files


def test_what_was_not_written_here_is_not_replaced(tmp_path):
    book = tiny(tmp_path/"n.ipynb")
    (tmp_path/"thesis.docx").write_bytes(b"PK years of work")
    (tmp_path/"thesis.ipynb").write_bytes(b"PK years of work")
    tiny(tmp_path/"by_hand.ipynb")
    run_notebook(book, tmp_path/"ours.ipynb", {})
    (tmp_path/"copy.ipynb").write_bytes((tmp_path/"ours.ipynb").read_bytes())       # and changed since, who knows
    (tmp_path/"folder.ipynb").mkdir()
    (tmp_path/"link.ipynb").symlink_to("n.ipynb")
    (tmp_path/"other.ipynb").symlink_to("by_hand.ipynb")
    os.link(book, tmp_path/"hard.ipynb")
    (tmp_path/"loop.ipynb").symlink_to("loop.ipynb")
    before = contents(tmp_path)
    for name, line in {"thesis.docx": "is no name of a notebook", "thesis.ipynb": "was not written by a run",
                       "by_hand.ipynb": "was not written by a run", "copy.ipynb": "was not written by a run",
                       "folder.ipynb": "was not written by a run", "n.ipynb": "is the notebook itself",
                       "link.ipynb": "is the notebook itself", "hard.ipynb": "is the notebook itself",
                       "other.ipynb": "was not written by a run",
                       f"../{tmp_path.name}/n.ipynb": "is the notebook itself", "loop.ipynb": "cannot write",
                       "thesis.docx/n.ipynb": "cannot write", "/dev/null": "is no name of a notebook"}.items():
        assert line in refused(run_notebook, book, tmp_path/name, {}), name
    assert contents(tmp_path) == before


def test_an_earlier_notebook_stays_until_the_new_one_is_whole(tmp_path):
    good, bad, out = tiny(tmp_path/"good.ipynb"), tiny(tmp_path/"bad.ipynb", "print(1)\n1/0"), tmp_path/"out.ipynb"
    wrong = tiny(tmp_path/"wrong.ipynb", "from synthdet.core import UserError\nraise UserError('n is wrong')")
    assert run_notebook(good, out, {}) == "a 3\n"
    before = contents(tmp_path)
    assert refused(run_notebook, wrong, out, {}) == "n is wrong"
    assert contents(tmp_path) == before
    line = refused(run_notebook, bad, out, {})
    assert line.startswith("ZeroDivisionError: division by zero (cell 2 of ") and line.endswith("out.running.ipynb)")
    assert contents(tmp_path).keys() - before.keys() == {"out.running.ipynb"}
    assert before.items() <= contents(tmp_path).items()
    assert run_notebook(good, out, dict(n=7)) == "a 7\n"
    assert contents(tmp_path).keys() == before.keys() and "a 7" in out.read_text()


def test_leftovers_are_used_again_and_what_is_somebodys_is_not(tmp_path):
    book, out, running = tiny(tmp_path/"n.ipynb"), tmp_path/"out.ipynb", tmp_path/"out.running.ipynb"
    run_notebook(book, out, {})
    for n in (0, 100): 
        running.write_bytes(out.read_bytes()[:n])
        run_notebook(book, out, {})
        assert contents(tmp_path).keys() == {"n.ipynb", "out.ipynb"}
    tiny(running)
    before = running.read_bytes()
    run_notebook(book, out, {})
    assert contents(tmp_path).keys() == {"n.ipynb", "out.ipynb", "out.running.ipynb"} and running.read_bytes() == before


def test_an_output_that_is_a_link_stays_one(tmp_path):
    (tmp_path/"there").mkdir()
    (tmp_path/"out.ipynb").symlink_to(tmp_path/"there"/"real.ipynb")
    for _ in range(2): run_notebook(tiny(tmp_path/"n.ipynb"), tmp_path/"out.ipynb", {})
    assert (tmp_path/"out.ipynb").is_symlink() and contents(tmp_path/"there").keys() == {"real.ipynb"}


CALL = "import sys; from synthdet.evidence.execute import run_notebook; print(run_notebook(*sys.argv[1:3], {}), end='')"


@pytest.mark.slow
def test_killed_or_two_at_once(tmp_path):
    gate, out = tmp_path.with_name("gate"), tmp_path/"out.ipynb"
    first = "import os, time\nprint(os.getpid(), flush=True)"
    then = f"while not os.path.exists({str(gate)!r}): time.sleep(.1)"
    book = notebook(tmp_path/"n.ipynb", cell("word:str = 'a'  # which", "parameters"),
                    cell(first), cell(then), cell("print(os.getpid())"))
    start = lambda: subprocess.Popen([sys.executable, "-c", CALL, book, out],
                                     stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running = lambda: sorted(p.name for p in tmp_path.glob("out.running*") if '"text": [' in p.read_text())

    def wait(names):
        for _ in range(600):
            if running() == names: return
            time.sleep(.1)
        raise AssertionError(running())
    killed = start()
    wait(["out.running.ipynb"])
    kernel = int(json.loads((tmp_path/"out.running.ipynb").read_text())["cells"][1]["outputs"][0]["text"][0])
    killed.send_signal(signal.SIGTERM)
    killed.communicate(timeout=60)
    assert contents(tmp_path).keys() == {"n.ipynb", "out.running.ipynb"}
    for _ in range(100):
        if not Path(f"/proc/{kernel}").exists(): break
        time.sleep(.1)
    else: raise AssertionError("the kernel goes with the command")
    two = [start(), start()]
    wait(["out.running.ipynb", "out.running1.ipynb"])
    gate.touch()
    said = [p.communicate(timeout=300) for p in two]
    assert [p.returncode for p in two] == [0, 0] and said[0][0] != said[1][0], said
    assert contents(tmp_path).keys() == {"n.ipynb", "out.ipynb"} and nbformat.read(out, 4).metadata.papermill.end_time
