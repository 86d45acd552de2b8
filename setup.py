"Packaging: every value comes from settings.ini; README.md and the experiment notebooks are made fit to leave the checkout."
import json
import re
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ini = ConfigParser(delimiters=["="])
ini.read("settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
name, url, branch = cfg["lib_name"], cfg["git_url"], cfg["branch"]
EXPERIMENTS = Path("nbs/experiments")
STATUS = ("Planning", "Pre-Alpha", "Alpha", "Beta", "Production/Stable", "Mature", "Inactive")


def words(key): return shlex.split(cfg.get(key, ""))


def absolute(text, folder="."):
    "Markdown from a folder of the checkout with links and pictures that work anywhere: they lead to the repository."
    def there(found):
        picture, told, to = found.groups()
        if re.match(r"[a-z]+:", to): return found[0]
        if to.startswith("#"): return f"[{told}]({url}{to})"
        path = (Path(folder)/to.partition("#")[0]).resolve().relative_to(Path.cwd()).as_posix()
        return f"{picture}[{told}]({url}/{'raw' if picture else 'blob'}/{branch}/{path}{''.join(to.partition('#')[1:])})"
    return re.sub(r"(!?)\[([^][]*)\]\(([^()\s]+)\)", there, text)


def bare(path):
    "The text of an experiment notebook without outputs, with links that work anywhere."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code": cell.update(outputs=[], execution_count=None)
        else: cell["source"] = absolute("".join(cell["source"]), path.parent)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def write_bare(folder):
    "Write the experiment notebooks into a folder; files that are there may be hard links into the checkout."
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(EXPERIMENTS.glob("*.ipynb")):
        text, to = bare(path), folder/path.name
        to.unlink(missing_ok=True)
        to.write_text(text, encoding="utf-8")


class Build(build_py):
    "The modules and, beside them, the experiment notebooks; an editable install runs those of the checkout."
    def run(self):
        super().run()
        if not self.editable_mode: write_bare(Path(self.build_lib)/name/"notebooks")


class Source(sdist):
    "The sources, with experiment notebooks as a wheel has them."
    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        write_bare(Path(base_dir)/EXPERIMENTS)


extras = {key.removesuffix("_requirements"): words(key) for key in cfg if key.endswith("_requirements")}
extras["dev"] = sorted({r for part in extras.values() for r in part})       # tests and pages need all of them

setup(
    name=name, version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    author=cfg["author"], author_email=cfg["author_email"], license_expression="Apache-2.0", url=url,
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"], "Source": url, "Issues": f"{url}/issues",
                  "Changelog": f"{url}/blob/{branch}/CHANGELOG.md"},
    classifiers=[f"Development Status :: {cfg['status']} - {STATUS[int(cfg['status']) - 1]}",
                 "Intended Audience :: Science/Research", "Operating System :: POSIX :: Linux",
                 "Programming Language :: Python :: 3",
                 *(f"Programming Language :: Python :: 3.{n}" for n in range(10, 14)),
                 "Topic :: Scientific/Engineering :: Artificial Intelligence",
                 "Topic :: Scientific/Engineering :: Image Recognition", "Typing :: Typed"],
    long_description=absolute(Path("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    python_requires=">=" + cfg["min_python"], packages=find_packages(include=[name, name + ".*"]),
    package_dir={"": "."},                                      # so an editable install is a line in a .pth file
    package_data={name: ["py.typed", "assets/*"]}, include_package_data=False,
    install_requires=words("requirements"),
    extras_require=extras,
    entry_points={"console_scripts": words("console_scripts"), "nbdev": [f"{name}={name}._modidx:d"]},
    cmdclass=dict(build_py=Build, sdist=Source),
)
