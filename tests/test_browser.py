"""Notebooks in JupyterLab and a real browser: all cells run, nothing is red, pictures can be judged, widgets are there.

It needs a Chromium and a Python with playwright, which is no requirement of the project:

    apt-get install chromium; python3 -m venv /tmp/pw; /tmp/pw/bin/pip install playwright
    SYNTHDET_PLAYWRIGHT=/tmp/pw/bin/python pytest tests/test_browser.py

The screenshots lie in pytest's folder, or in SYNTHDET_SHOTS.
"""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from helpers import ROOT

PLAYWRIGHT = os.environ.get("SYNTHDET_PLAYWRIGHT", sys.executable)
TINY = dict(arms="'scratch,pretrain'", n_real="4", jobs="1", steps="'2'", domain="'folder'",
            more="'pretrain_steps=2 model.image_size=64 batch_size=2 eval_every=2'")


def lacking():
    "What is not on this machine; '' when a browser can be driven."
    if not shutil.which("chromium"): return "no chromium: apt-get install chromium"
    done = subprocess.run([PLAYWRIGHT, "-c", "import playwright.sync_api"], capture_output=True, timeout=60)
    return "no playwright: name a Python that has it as SYNTHDET_PLAYWRIGHT" if done.returncode else ""


def with_parameters(path, **values):
    "Change literals in the parameters cell of a notebook."
    nb = json.loads(path.read_text())
    cell = next(c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", []))
    source = "".join(cell["source"])
    for name, value in values.items():
        source = re.sub(rf"^({name}:\w+ = ).*$", lambda m: m[1] + value, source, flags=re.M)
    cell["source"] = source
    path.write_text(json.dumps(nb))


@pytest.fixture
def lab(root, tmp_path):
    "JupyterLab on a copy of the notebooks, all of whose cells are in the page: (URL, token)."
    if why := lacking(): pytest.skip(why)
    for name in ("index.ipynb", "experiments/playground.ipynb", "experiments/run_experiment.ipynb"):
        shutil.copy(ROOT/"nbs"/name, tmp_path)
    with_parameters(tmp_path/"run_experiment.ipynb", root=repr(str(root)), out=repr(str(tmp_path/"runs")), **TINY)
    for name, said in (("notebook-extension/tracker", '{"windowingMode": "none"}'),
                       ("apputils-extension/notification", '{"fetchNews": "false"}')):
        path = tmp_path/f"settings/@jupyterlab/{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(said)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k not in ("SYNTHDET_QUIET", "IN_TEST")}
    env.update(JUPYTERLAB_SETTINGS_DIR=str(tmp_path/"settings"), PYTHONPATH=str(ROOT),
               JUPYTER_CONFIG_DIR=str(tmp_path/"config"))
    told = ("--allow-root", "--no-browser", "--expose-app-in-browser", f"--port={port}",
            "--IdentityProvider.token=token", "--ServerApp.port_retries=0")
    with open(tmp_path/"lab.log", "wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *told], cwd=tmp_path, env=env,
                                  stdout=log, stderr=log)
        try:
            yield _answering(f"http://127.0.0.1:{port}/lab", server, tmp_path/"lab.log"), "token"
        finally:
            server.terminate()
            server.wait(20)


def _answering(url, server, log):
    "The URL, once somebody answers there."
    for _ in range(300):
        assert server.poll() is None, log.read_text()[-2000:]
        try: urllib.request.urlopen(f"{url}?token=token", timeout=5).close()
        except OSError: time.sleep(.2)
        else: return url
    raise AssertionError(log.read_text()[-2000:])


@pytest.mark.slow
def test_notebooks_in_a_browser_run_show_and_can_be_moved(lab, tmp_path):
    shots = Path(os.environ.get("SYNTHDET_SHOTS", tmp_path/"shots"))
    shots.mkdir(exist_ok=True)
    names = "index.ipynb", "playground.ipynb", "run_experiment.ipynb"
    done = subprocess.run([PLAYWRIGHT, str(ROOT/"tests/browser.py"), *lab, str(shots), *names],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    print(json.dumps(seen, indent=1))
    for name, found in seen.items():
        assert not found["errors"] and not found["red"], name
        assert found["pictures"] and all(wide >= 800 for _, wide in found["pictures"]), (name, found["pictures"])
    assert seen["playground.ipynb"]["widgets"] > 40 and seen["playground.ipynb"]["words"].startswith("count=2,3")
