"""Open notebooks in JupyterLab as a user does, run all their cells, and tell what is seen; not a test itself.

    python tests/browser.py http://127.0.0.1:8888/lab TOKEN FOLDER_OF_SCREENSHOTS index.ipynb ...

Run by a Python that has playwright, with a Chromium of the machine. Prints JSON: notebook -> errors, red (text on
stderr), pictures (natural width, shown width) and widgets, each as found on the page when all cells are through.
"""
import json
import sys
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

SEEN = """() => {
    const here = document.querySelector('.jp-NotebookPanel:not(.lm-mod-hidden)');
    const all = (what) => [...here.querySelectorAll(what)];
    return {
        errors: all('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]').map(e => e.innerText),
        red: all('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]').map(e => e.innerText),
        pictures: all('.jp-OutputArea-output img').map(
            e => [e.naturalWidth, Math.round(e.getBoundingClientRect().width)]),
        widgets: all('.jupyter-widgets').length}
}"""


IDLE = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'"
HIGH = """() => {
    const here = document.querySelector('.jp-NotebookPanel:not(.lm-mod-hidden)');
    const cells = [...here.querySelectorAll('.jp-Cell')].map(e => e.getBoundingClientRect());
    return Math.ceil(Math.max(...cells.map(c => c.bottom)) - Math.min(...cells.map(c => c.top)))
}"""
TOP = "() => document.querySelectorAll('.jp-WindowedPanel-outer').forEach(e => e.scrollTop = 0)"
MOVED = "() => document.querySelector('.jupyter-widgets textarea').value"


def run(page, url, name, shots):
    "What is seen of a notebook when all its cells have run; a screenshot of it from top to bottom."
    page.goto(f"{url}/tree/{name}?reset")
    page.wait_for_selector(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Cell")
    page.wait_for_function(IDLE)
    start = time.time()
    page.evaluate("() => jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_function(IDLE)
    page.wait_for_timeout(700)                                  # widgets draw themselves a moment later
    found = dict(page.evaluate(SEEN), seconds=round(time.time() - start, 1))
    if found["widgets"] > 40: found["words"] = move(page)
    page.set_viewport_size(dict(width=1440, height=min(page.evaluate(HIGH) + 200, 9000)))
    page.evaluate(TOP)
    page.wait_for_timeout(500)
    page.screenshot(path=str(Path(shots)/f"{Path(name).stem}.png"))
    page.set_viewport_size(dict(width=1440, height=900))
    return found


def move(page):
    "Move the first slider that shows by a step; the words that come of it."
    page.locator(".noUi-handle:visible").first.press("ArrowRight")
    page.wait_for_function(MOVED)
    return page.evaluate(MOVED)


def main(url, token, shots, *names):
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport=dict(width=1440, height=900))
        page.set_default_timeout(120_000)
        page.goto(f"{url}?token={token}")
        print(json.dumps({name: run(page, url, name, shots) for name in names}))
        browser.close()


if __name__ == "__main__": main(*sys.argv[1:])
