"""What is installed: versions that were tested together, metadata, what leaves the checkout, a wheel in use.

    python tests/test_install.py --record     # writes constraints.txt from what is installed here
"""
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import import_module
from importlib.metadata import distribution, PackageNotFoundError
from pathlib import Path

import pytest
import setuptools
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name as canonical
from packaging.version import Version

from synthdet import __version__
from synthdet.__main__ import COMMANDS
from synthdet.core import refused
from synthdet.evidence.experiments import copy_notebooks, edited, experiment_notebook, experiments, recorded

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"!?\[[^][]*\]\(([^()\s]+)\)")


def packaged():
    "What setup.py hands to setuptools, and its `absolute`."
    found, cwd, usual = {}, Path.cwd(), setuptools.setup
    try:
        os.chdir(ROOT)
        setuptools.setup = lambda **options: found.update(options)
        found["absolute"] = runpy.run_path("setup.py")["absolute"]
    finally:
        os.chdir(cwd)
        setuptools.setup = usual
    return found


@pytest.fixture(scope="module")
def metadata(): return packaged()


# versions


def asked(metadata, *extras):
    "The requirements of the package and some of its extras."
    parts = metadata["install_requires"], *(metadata["extras_require"][x] for x in extras)
    return [Requirement(r) for part in parts for r in part]


def installed(wanted):
    "All that requirements bring along: name -> distribution; raises PackageNotFoundError for what is not installed."
    found, seen = {}, set()
    while wanted:
        r = wanted.pop()
        key = canonical(r.name), frozenset(r.extras)
        if key in seen: continue
        seen.add(key)
        found[key[0]] = distribution(r.name)
        for text in found[key[0]].requires or ():
            more = Requirement(text)
            if any(more.marker is None or more.marker.evaluate(dict(extra=x)) for x in ("", *r.extras)):
                wanted.append(more)
    return found


def pinned():
    "The versions in constraints.txt that are for this Python."
    lines = [Requirement(line) for line in (ROOT/"constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    return {canonical(r.name): r.specifier for r in lines if r.marker is None or r.marker.evaluate()}


def since(dist):
    "A marker for what needs a newer Python than synthdet does, so that an older one takes the version made for it."
    needs = SpecifierSet(dist.metadata["Requires-Python"] or "")
    least = max((Version(s.version) for s in needs if s.operator == ">="), default=Version("3"))
    return f' ; python_full_version >= "{least}"' if least > Version("3.10") else ""


def record(metadata):
    "Write constraints.txt; every extra has to be installed."
    dists = installed(asked(metadata, "dev"))
    lines = [f"{name}=={Version(d.version).public}{since(d)}" for name, d in sorted(dists.items())]
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    head = f"# versions that were tested together, on Python {python}: CONTRIBUTING.md says how to renew them"
    (ROOT/"constraints.txt").write_text("\n".join([head, *lines]) + "\n")


def test_a_version_is_pinned_for_everything_that_is_asked_for(metadata):
    known = pinned()
    for r in asked(metadata, "dev"):
        if r.marker and not r.marker.evaluate(): continue
        if canonical(r.name) not in known and sys.version_info < (3, 11): continue    # for which none was tested
        pin, = known[canonical(r.name)]
        assert pin.operator == "==" and pin.version in r.specifier, f"{r}, and constraints.txt says {pin}"


@pytest.mark.skipif(not os.environ.get("CI"),
                    reason="what is installed is the user's choice; under CI it is constraints.txt's")
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the versions were tested together on Python 3.11")
def test_what_is_installed_is_what_was_tested_together(metadata):
    known = pinned()
    other = {name: d.version for name, d in installed(asked(metadata, "dev")).items()
             if name not in known or not known[name].contains(Version(d.version).public)}
    assert not other, "renew constraints.txt, as CONTRIBUTING.md says"


# metadata


def test_links_survive_a_package_index(metadata):
    readme, shown = (ROOT/"README.md").read_text(), metadata["long_description"]
    assert len(LINK.findall(shown)) == len(LINK.findall(readme)) > 10
    assert all(to.startswith("https://") for to in LINK.findall(shown))
    others = re.search(r"<(img|a) |\]\[|^\[[^]]+\]: ", readme, re.M)
    assert not others, "only [text](link) and ![text](link) are understood"
    absolute, url = metadata["absolute"], metadata["url"]
    assert absolute("![a](nbs/images/b.jpg) [c](nbs/d.ipynb#e), [f](#g)") == \
        f"![a]({url}/raw/main/nbs/images/b.jpg) [c]({url}/blob/main/nbs/d.ipynb#e), [f]({url}#g)"
    assert absolute("[a](../images/b.jpg)", "nbs/experiments") == f"[a]({url}/blob/main/nbs/images/b.jpg)"


def test_links_within_the_checkout_lead_somewhere():
    for path in [*ROOT.glob("*.md"), *(ROOT/"nbs"/"experiments").glob("*.ipynb"), ROOT/"nbs"/"index.ipynb"]:
        text = path.read_text()
        if path.suffix == ".ipynb":
            text = "\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
        places = {h.lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.M)}
        for to in LINK.findall(text):
            if ":" not in to and to[0] != "#": assert (path.parent/to.partition("#")[0]).exists(), f"{path.name}: {to}"
            if to[0] == "#": assert to[1:] in places, f"{path.name}: {to}"


def test_metadata_says_what_there_is(metadata):
    newest = re.search(r"^## (.+)$", (ROOT/"CHANGELOG.md").read_text(), re.M)[1]
    assert metadata["version"] == __version__ == newest and metadata["license_expression"] == "Apache-2.0"
    extras = metadata["extras_require"]
    assert {"dev", "onnx", "cluster", "docs", "track"} <= extras.keys()
    assert all(set(x) <= set(extras["dev"]) for x in extras.values())
    known = [c.rpartition(" ")[2] for c in metadata["classifiers"] if re.search(r":: 3\.\d+$", c)]
    low, high = re.search(r"\((3,\d+)\) <= .* <= \((3,\d+)\)", (ROOT/"Makefile").read_text()).groups()
    assert [known[0], known[-1]] == [low.replace(",", "."), high.replace(",", ".")]
    assert metadata["python_requires"] == f">={known[0]}"
    for line in metadata["entry_points"]["console_scripts"]:
        name, _, place = line.partition("=")
        module, _, function = place.partition(":")
        assert COMMANDS[name.removeprefix("synthdet-")] is getattr(import_module(module), function)
    cite = yaml.safe_load((ROOT/"CITATION.cff").read_text())
    assert cite["license"] == metadata["license_expression"] and cite["repository-code"] == metadata["url"]
    paper, = cite["references"]
    assert f"title     = {{{paper['title']}}}" in (ROOT/"README.md").read_text() and paper["year"] == 2020
    assert [a["family-names"] for a in paper["authors"]] == ["Blanger", "Hirata", "Jiang"]


# experiment notebooks


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    "A checkout with one experiment, committed."
    where = tmp_path/"checkout"/"nbs"/"experiments"
    where.mkdir(parents=True)
    shutil.copy(experiment_notebook("scale"), where)
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *words], cwd=tmp_path/"checkout", check=True, timeout=60)
    for module in ("synthdet.machine", "synthdet.evidence.experiments"):
        monkeypatch.setattr(f"{module}.project", lambda: tmp_path/"checkout")
    return where/"scale.ipynb"


def changed(path, cell=None, **values):
    nb = json.loads(path.read_text())
    for c in nb["cells"] if cell is None else nb["cells"][cell:cell+1]: c.update(values)
    path.write_text(json.dumps(nb))


def test_a_notebook_says_that_it_was_edited(checkout, tmp_path):
    assert experiment_notebook("scale") == checkout and not edited(checkout)
    other = shutil.copy(checkout, tmp_path/"other.ipynb")
    changed(checkout, execution_count=3, metadata={})
    assert not edited(checkout), "what it shows is not what it does"
    changed(checkout, 0, source="# Mine")
    assert edited(checkout) == f"{checkout} is run as it was edited: it differs from synthdet's own"
    assert not edited(other), "another notebook"
    mine = shutil.copy(checkout, tmp_path/"scale.ipynb")
    assert not edited(mine)
    changed(mine, 0, source="# Theirs")
    assert edited(mine)
    shutil.rmtree(checkout.parents[2]/".git")
    assert not edited(checkout), "nobody knows"


def test_copies_replace_no_file_that_differs(checkout, tmp_path):
    shutil.copy(checkout, checkout.with_name("another.ipynb"))
    copies = copy_notebooks(tmp_path/"mine")
    assert [p.name for p in copies] == ["another.ipynb", "scale.ipynb"]
    assert copies[1].read_bytes() == checkout.read_bytes()
    (tmp_path/"half").mkdir()
    changed(Path(shutil.copy(checkout, tmp_path/"half")), 0, source="# Mine")
    before = (tmp_path/"half"/"scale.ipynb").read_bytes()
    told = refused(copy_notebooks, tmp_path/"half")
    assert "half/scale.ipynb is there and differs from synthdet's; choose another folder, or move it away" in told
    assert [p.name for p in (tmp_path/"half").iterdir()] == ["scale.ipynb"]
    assert (tmp_path/"half"/"scale.ipynb").read_bytes() == before
    copies[0].unlink()
    copies[0].mkdir()
    assert "another.ipynb: is a folder" in refused(copy_notebooks, tmp_path/"mine")


def test_the_commands_say_which_version_they_are(metadata, capsys):
    for line in metadata["entry_points"]["console_scripts"]:
        with pytest.raises(SystemExit) as end: COMMANDS[line.partition("=")[0].removeprefix("synthdet-")](["--version"])
        assert (end.value.code, capsys.readouterr()) == (0, (f"synthdet {__version__}\n", ""))


def test_before_any_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SYNTHDET_CACHE", str(tmp_path))
    COMMANDS["runs"]([])
    assert capsys.readouterr().out == (f"nothing in {tmp_path/'studies'}, where synthdet-study keeps what it makes; "
                                       "name another folder: synthdet-runs runs\n")


def test_names_and_what_is_only_in_a_checkout(monkeypatch):
    told = refused(experiment_notebook, "run_experimnt")
    assert "notebook 'run_experimnt' is unknown; choose from augment_matters, claims, " in told
    assert "results/nope.json: no such file; expected recorded results" in refused(recorded, "nope.json")
    monkeypatch.setattr("synthdet.evidence.experiments.project", lambda: None)
    told = refused(recorded, "scale.json")
    assert "results/scale.json: recorded results are in a checkout of synthdet, and this is none; clone one" in told


# a wheel


def tracked():
    "The files of the checkout, as they are now."
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if listed.returncode: pytest.skip("no git checkout, so nobody knows which files are the project's")
    return [f for f in listed.stdout.split("\0") if f and (ROOT/f).is_file()]


def checked_notebook(text):
    "A notebook that left the checkout shows nothing, and leads nowhere beside itself but to others like it."
    for cell in json.loads(text)["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        if cell["cell_type"] == "markdown":
            assert all(to.startswith("https://") for to in LINK.findall("".join(cell["source"])))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "A copy of the checkout's files, and the folder with the sdist and the wheel that were built of it."
    source = tmp_path_factory.mktemp("source")/"synthdet"
    for f in tracked():
        (source/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/f, source/f)
    (source/"runs").mkdir()
    (source/"runs"/"mine.jpg").write_bytes(b"somebody's")
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation", str(source)], capture_output=True,
                          text=True, timeout=300, cwd=source, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    assert "Warning: " not in done.stderr and "is absent from" not in done.stdout + done.stderr
    return source


@pytest.mark.slow
def test_wheel_and_sdist_hold_what_they_should(built):
    wheel, = (built/"dist").glob("*.whl")
    source, = (built/"dist").glob("*.tar.gz")
    package = {f for f in tracked() if f.startswith("synthdet/")}
    names = {f"{name}.ipynb" for name in experiments()}
    with zipfile.ZipFile(wheel) as z:
        inside = {n for n in z.namelist() if ".dist-info/" not in n}
        assert inside == package | {f"synthdet/notebooks/{n}" for n in names}
        for n in names: checked_notebook(z.read(f"synthdet/notebooks/{n}"))
        about, = (n for n in z.namelist() if n.endswith("METADATA"))
        assert all(to.startswith("https://") for to in LINK.findall(z.read(about).decode().partition("\n\n")[2]))
    with tarfile.open(source) as t:
        files = {m.name.partition("/")[2]: m for m in t.getmembers() if m.isfile()}
        for n in names: checked_notebook(t.extractfile(files[f"nbs/experiments/{n}"]).read())
    top = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "README.md", "PKG-INFO",
           "constraints.txt", "pyproject.toml", "settings.ini", "setup.cfg", "setup.py"}
    wanted = package | {f"nbs/experiments/{n}" for n in names} | top
    assert {f for f in files if not f.startswith("synthdet.egg-info/")} == wanted
    assert wheel.stat().st_size < 6e6 and source.stat().st_size < 6e6
    copied, own = (place/"nbs"/"experiments"/"run_experiment.ipynb" for place in (built, ROOT))
    assert copied.read_bytes() == own.read_bytes()


TINY = ["options=n_class_images=12 n_backgrounds=4", "arms=scratch,pretrain", "n_real=4", "steps=4",
        "pretrain_steps=4", "eval_every=2", "recipe.image_size=64", "model.image_size=64", "batch_size=4", "jobs=1"]


@pytest.mark.slow
def test_the_main_experiment_from_an_empty_folder(built, tmp_path):
    """With the wheel in an environment of its own, and no checkout. Its dependencies are those of the environment
    that runs the tests: which ones a wheel brings along, and whether they fit together, is not tried here."""
    wheel, = (built/"dist").glob("*.whl")
    home, work = tmp_path/"venv", tmp_path/"empty"
    work.mkdir()
    quiet = dict(capture_output=True, text=True, cwd=work, timeout=300,
                 env={**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "HOME": str(tmp_path/"home")})
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True, **quiet)
    site, = home.glob("lib/python*/site-packages")
    parents = [p for p in sys.path if p.endswith("site-packages")]
    (site/"dependencies.pth").write_text("\n".join(parents) + "\n")        # .pth files within them are not followed
    pip = [sys.executable, "-m", "pip", "--python", home/"bin"/"python"]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", wheel], check=True, **quiet)
    def said(command, *words):
        done = subprocess.run([home/"bin"/f"synthdet-{command}", *words], **quiet)
        return done.returncode, done.stdout, done.stderr
    assert said("run", "--help")[0] == 0
    code, out, err = said("run", *TINY)
    assert code == 0 and not err, err
    told = dict(line.split(None, 1) for line in out.splitlines()[-6:])
    assert all((work/told[k]).exists() for k in ("figures", "picture", "detector", "card", "notebook"))
    assert told["use"] == f"synthdet-detect {told['detector']} photos/"
    assert {p.name for p in work.iterdir()} == {"runs"}
    assert said("notebooks", "mine")[0] == 0
    changed(work/"mine"/"scale.ipynb", 0, source="# Mine")
    assert said("notebooks", "mine")[2].startswith("error: mine/scale.ipynb is there and differs")
    code, out, err = said("run", "--notebook", "mine/scale.ipynb")
    assert code == 2 and out.startswith("mine/scale.ipynb is run as it was edited")
    assert "recorded results are in a checkout" in err


if __name__ == "__main__" and sys.argv[1:] == ["--record"]: record(packaged())
