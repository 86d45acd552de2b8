"Packaging: every value comes from settings.ini."
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=["="])
ini.read("settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
name = cfg["lib_name"]


def words(key): return shlex.split(cfg.get(key, ""))


setup(
    name=name, version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    author=cfg["author"], author_email=cfg["author_email"], license="Apache-2.0", url=cfg["git_url"],
    classifiers=["Programming Language :: Python :: 3", "Intended Audience :: Science/Research",
                 "Topic :: Scientific/Engineering :: Image Recognition"],
    long_description=Path("README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    python_requires=">=" + cfg["min_python"], packages=find_packages(include=[name, name + ".*"]), include_package_data=True,
    install_requires=words("requirements"),
    extras_require={k: words(f"{k}_requirements") for k in ("dev", "onnx", "cluster", "track")},
    entry_points={"console_scripts": words("console_scripts"), "nbdev": [f"{name}={name}._modidx:d"]},
)
