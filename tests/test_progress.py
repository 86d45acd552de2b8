"Where bars show, and as what: widgets in a front end, lines where somebody reads them, nothing elsewhere."
import io
import json
import os
import subprocess
import sys

import pytest
from jupyter_client.manager import start_new_kernel

from helpers import ROOT
from synthdet.evidence.notebooks import typed
from synthdet.evidence.execute import run_notebook

BAR = """
from synthdet.machine import front_end, interactive, progress
for _ in progress(range(3), 'counting', delay=0): pass
print(front_end(), interactive())
"""


@pytest.fixture(scope="module")
def kernel():
    env = {k: v for k, v in os.environ.items() if k not in ("SYNTHDET_QUIET", "IN_TEST")}
    manager, client = start_new_kernel(env=dict(env, PYTHONPATH=str(ROOT)))
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def ran(client, code, **options):
    "What a cell leaves in a notebook: (kinds of what is displayed, stdout, stderr)."
    shown, text = [], dict(stdout="", stderr="")
    def note(message):
        content = message["content"]
        if message["msg_type"] == "stream": text[content["name"]] += content["text"]
        elif message["msg_type"] in ("display_data", "error"): shown.append(sorted(content.get("data", content)))
    client.execute_interactive(code, output_hook=note, timeout=60, **options)
    return shown, text["stdout"], text["stderr"]


def test_a_bar_is_a_widget_where_a_front_end_answers_and_nothing_elsewhere(kernel):
    shown, told, red = ran(kernel, BAR, allow_stdin=True)
    assert "application/vnd.jupyter.widget-view+json" in shown[0] and (told, red) == ("True True\n", "")
    assert ran(kernel, BAR, allow_stdin=False) == ([], "False False\n", "")   # papermill, nbconvert


def test_who_reads_a_run_in_a_terminal_sees_lines(kernel):
    loud = "import os; os.environ['SYNTHDET_QUIET'] = '{}'" + BAR
    shown, told, red = ran(kernel, loud.format(0), allow_stdin=False)
    assert not shown and told == "False True\n" and "counting: 100%" in red
    assert ran(kernel, loud.format(1), allow_stdin=True) == ([], "False False\n", "")


def test_a_pipe_sees_nothing_and_every_bar_is_made_in_one_place():
    env = {k: v for k, v in os.environ.items() if k not in ("SYNTHDET_QUIET", "IN_TEST")}
    done = subprocess.run([sys.executable, "-c", BAR], capture_output=True, text=True, timeout=60, cwd=ROOT, env=env)
    assert (done.stdout, done.stderr) == ("False False\n", "")
    sources = [p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    cells = {p: ["".join(c["source"]) for c in json.loads(p.read_text())["cells"] if c["cell_type"] == "code"]
             for p in sources}
    assert [p.stem for p in sources if any("import tqdm" in c for c in cells[p])] == ["02_machine"]


class Screen(io.StringIO):
    "A terminal to look at."
    def isatty(self): return True


SLOW = """
import time
from synthdet.machine import progress
with progress(what='scratch', total=30, delay=0) as bar:
    for k in range(30):
        bar.update(1)
        bar.set_postfix(loss='0.5')
        time.sleep(.1)
"""


def test_a_terminal_shows_how_far_a_notebook_is_and_each_line_once(tmp_path, monkeypatch):
    "Nothing was to be seen while arms trained in processes of their own, and the table at the end stood there twice."
    import nbformat
    cells = [nbformat.v4.new_code_cell("n:int = 1  # '=' in a comment", metadata=dict(tags=["parameters"])),
             *map(nbformat.v4.new_code_cell, ("print('counts')" + SLOW, "print('the table')"))]
    kernel = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path/"a.ipynb")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    screen = Screen()
    for name in ("stdout", "stderr"): monkeypatch.setattr(sys, name, screen)
    text = run_notebook(tmp_path/"a.ipynb", tmp_path/"out.ipynb", dict(n=2))
    monkeypatch.undo()
    seen = screen.getvalue()
    assert "/30, loss=0.5, " in seen and "scratch " in seen and " left" in seen and "Unable to parse" not in seen
    assert seen.count("the table") == seen.count("counts") == 1 and text == "the table\n"
    assert "SYNTHDET_BARS" not in os.environ
    left = json.loads((tmp_path/"out.ipynb").read_text())["cells"]
    assert "scratch" not in json.dumps([c.get("outputs") for c in left])


def test_a_default_is_called_one():
    from synthdet.core import option, through
    before = through(str)
    cells = ["domain:str = 'butterflies'\nn_real:int = 25\nfold:int = 0", "# Parameters\nfold = 0"]
    try:
        typed(dict(In=cells, domain="butterflies", n_real=25, fold=0))
        told = {"n_real=25": "n_real=25 (the default)", "n_real=9": "n_real=9", "fold=0": "fold=0", "n_real": "n_real="}
        for word, line in told.items(): assert option(f"labels.{word}") == line
    finally: through(before)
