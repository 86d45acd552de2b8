"The pages: every notebook has its place, and what would mislead a reader stops the build."
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

import synthdet.files

root = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("build", root/"nbs"/"pages"/"build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

PICTURE = dict(output_type="display_data", metadata={}, data={"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"})


def notebook(*cells):
    "Cells: text, or (source, outputs)."
    code = dict(cell_type="code", execution_count=None, metadata={})
    made = [dict(cell_type="markdown", metadata={}, source=c) if isinstance(c, str)
            else dict(code, source=c[0], outputs=c[1]) for c in cells]
    kernel = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    return dict(cells=[dict(c, id=f"cell{i}") for i, c in enumerate(made)],
                metadata=kernel, nbformat=4, nbformat_minor=5)


def test_every_notebook_is_in_the_table_of_contents():
    names = build.notebooks()
    assert build.unlisted(names) == [] and build.unlisted([*names, "pages/new", "new/one"]) == ["new/one", "pages/new"]
    listed = [f"pages/{p}" for pages in build.CHAPTERS.values() for p in pages]
    assert set(listed) <= set(names) and len(listed) == len(set(listed))
    floors = {n.split("/")[0] for n in names} - {"index", "pages", "experiments"}
    assert floors == set(build.FLOORS)


@pytest.mark.parametrize("source, shown", [
    ("show(sheet(x))", True), ("plt.plot(x)\nplt.show()", True), ("a = 1\ncaptioned(x);", True), ("ax.imshow(x)", True),
    ("for x in y: show(x)", True), ("with a: show(x)", True), ("if rows: show(x)", False), ("def f(): show(x)", False),
    ("f = lambda: show(x)", False), ("print(show)", False), ("%magic", False)])
def test_a_cell_that_shows_a_picture_must_carry_one(source, shown):
    text = dict(output_type="stream", name="stdout", text="so")
    for outputs in ([], [text]): assert build.not_made(notebook((source, outputs))) == [source.split("\n")[0]]*shown
    assert build.not_made(notebook((source, [text, PICTURE]))) == []


def test_committed_notebooks_carry_their_pictures_and_live_pages_carry_nothing():
    nbs = build.notebooks()
    assert build.lacking({n: nb for n, nb in nbs.items() if n not in build.LIVE}) == []
    assert build.LIVE <= set(nbs) and not [n for n in build.LIVE for _, outs in build.outputs(nbs[n]) if outs]


GOOD = ["there.html", "there.html#place", "#here", "there.html#a%20b", "https://example.org/a?b=c#d", "mailto:a@b.org",
        "pic.png", "data:image/png;base64,aa", "sub/../there.html"]
BAD = {"gone.html": "no such page", "there.html#gone": "no such place", "#gone": "no such place",
       "https://": "no address", "https:/example.org": "no address", "http://exa mple.org": "no address",
       "htps://example.org": "no address", "gone.png": "no such page", "//example.org/a": "no address",
       "file:///etc/passwd": "no address"}


def test_broken_links_are_found(tmp_path):
    (tmp_path/"pic.png").write_bytes(b"")
    (tmp_path/"sub").mkdir()
    (tmp_path/"there.html").write_text('<h1 id="place">x</h1><a name="a b"></a>')
    for link in [*GOOD, *BAD]:
        (tmp_path/"index.html").write_text(f'<p id="here"><a href="{link}">x</a><img src="{link}"></p>')
        expected = [f"index.html: {link}: {BAD[link]}"] if link in BAD else []
        assert build.broken(tmp_path) == expected, link


@pytest.mark.slow
def test_a_broken_link_and_a_picture_that_was_not_made_stop_the_build(tmp_path, capfd):
    for name in ("sphinx", "myst_nb", "furo"): pytest.importorskip(name, reason="pip install -e '.[docs]'")
    tree = tmp_path/"tree"
    shutil.copytree(root/"nbs"/"pages"/"_static", tree/"nbs"/"pages"/"_static")
    shutil.copy(root/"nbs"/"pages"/"conf.py", tree/"nbs"/"pages")
    (tree/"nbs"/"images").mkdir()
    (tree/"nbs"/"0_ground").mkdir()
    floor = notebook("# files\n\n> a in, b out", ("#| default_exp files", []), ("show(x)", [PICTURE]))
    def write(name, nb): (tree/"nbs"/f"{name}.ipynb").write_text(json.dumps(nb))
    write("index", notebook("# Home\n\nSee [files](0_ground/01_files.ipynb)."))
    write("0_ground/01_files", floor)
    assert build.build(tree, tmp_path/"out") == [], capfd.readouterr().err
    html = (tmp_path/"out"/"html"/"reference"/"synthdet.files.html").read_text()
    assert synthdet.files.__all__ and all(f"synthdet.files.{name}" in html for name in synthdet.files.__all__)
    write("index", notebook("# Home\n\nSee [files](0_ground/02_gone.ipynb), [here](https:/example.org)."))
    printed = "print(1)", [dict(output_type="stream", name="stdout", text="1")]
    floor = notebook("# files\n\n> a in, b out", printed, ("#| default_exp files", []), ("show(x)", []))
    write("0_ground/01_files", floor)
    wrong = build.build(tree, tmp_path/"out")
    assert "0_ground/01_files: no picture under: show(x)" in wrong
    assert "index.html: https:/example.org: no address" in wrong
    assert any("02_gone" in line for line in wrong + [capfd.readouterr().err])
    assert not (tmp_path/"out"/"doctrees").exists(), "or the next build would be silent about it"
