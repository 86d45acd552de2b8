"Odd parameters and damaged text, drawn by a seed: each is taken as what it means or refused in one line; none hangs."
import json
import math
import os
import random
import shlex
import signal
import stat
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import fields, replace
from operator import attrgetter
from pathlib import Path

import pytest

from synthdet.core import short, takes, UserError
from synthdet.data.catalogue import place_of
from synthdet.data.settings import DataSource, DOMAINS, OPTIONS
from synthdet.evidence.arm import Arm, check_arm, make_arms
from synthdet.evidence.experiments import experiment_notebook, parameters
from synthdet.evidence.notebooks import own_parameters, sorted_out
from synthdet.settings import choices, columns, leaves, MOST, override, to_row

SECONDS = 5  # that one call may take


# ---- odd values ------------------------------------------------------------------------------------------------------
def odd_places(here):
    "Paths of every kind, made in a new folder."
    here.mkdir(parents=True)
    (here/"text").write_text("text")
    (here/"folder").mkdir()
    os.mkfifo(here/"pipe")
    for name, to in (("dangling", "nowhere"), ("loop", "loop")): (here/name).symlink_to(here/to)
    os.mknod(here/"socket", stat.S_IFSOCK | 0o600)
    return [str(here/n) for n in ("text", "folder", "pipe", "dangling", "loop", "socket", "nowhere", "text/below")]


def itself():
    "A list that holds itself."
    found = []
    found.append(found)
    return found


def deep(n=5000):
    "A list in a list in a list ..."
    found = []
    for _ in range(n): found = [found]
    return found


def kinds(here, low, high):
    "Kind of oddness -> values."
    places = odd_places(here)
    return dict(
        type=[None, True, False, 3.5, 1+2j, b"x", object(), int, print,
              {1}, range(3), Path("x"), frozenset(), Ellipsis],
        bound=[low - 1, high + 1, -1, 0, 10**12, -10**12,
               math.nan, math.inf, -math.inf, -0.0, 1.0, 1e-300, 2**63, 2**64],
        huge=[10**5000, -10**400, "9"*5000, "x"*100_000, 1e308, list(range(100_000)), "=" * 70_000, (.1,)*10_000],
        unicode=["１２", "²", "图", "e\u0301", "\ud800", "\u202e", "\u200b", "\xa0", "naïve", "\udcff"],
        control=["a\nb", "\x1b[31mred", "a\0b", "\r", "\t", "\x7f", "1\n2", "\x00"],
        path=[*places, *map(Path, places), "/proc/self/mem", "/dev/zero", "/dev/stdin", "/proc", "~", "~nobody/x", "/",
              ".", "..", "x/"*3000, "x"*300, " ", "text ", " text", "a\\b"],
        nested=[{"a": {"b": 1}}, [[1, 2], [3]], deep(), itself(), {"": 1}, {3: 4},
                [{}], [None], ["x", 1], {"weights": itself()}],
        number=["1_000", "1e3", "0x10", " 12 ", "1.0", "--1", "None", "auto", "nan", "inf", "-0", "True", "yes", "1,2",
                "(1,2", "[.2,.8]", "((((", "1,,2", ",", "1e999", "0.1.2", "١٢", "+5", "1/2", "1 2"],
        empty=["", (), [], {}, "''", "()"])


# ---- what may come of them -------------------------------------------------------------------------------------------
@contextmanager
def limited(what):
    "Raise TimeoutError in a call that hangs."
    def late(*_): raise TimeoutError(f"hangs: {what[:200]}")
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def is_line(e):
    "Is the message of an error one line that a terminal can show?"
    said = str(e)
    return said.isprintable() and 10 < len(said) < 2500 and said.encode()


def is_right(value, field):
    "Is a value of the declared type, within its bounds and choices? Said here anew, without the code under test."
    meta = field.metadata
    if value is None: return field.default is None
    if meta["check"]: return isinstance(value, (int, str, tuple, list))
    if type(value) is not meta["kind"]: return False
    numbers = [x for x in (value if isinstance(value, tuple) else [value]) if not isinstance(x, (str, bool))]
    low, high = (d if b is None else b for b, d in ((meta["low"], -MOST), (meta["high"], MOST)))
    if not all(math.isfinite(x) and low <= x <= high for x in numbers): return False
    if isinstance(value, str) and meta["path"]: return "\0" not in value and len(value) <= 4096
    return not choices(field) or value in choices(field)


def outcome(call, names, judge):
    "'refused' or 'right'; AssertionError for anything else."
    try:
        with limited(str(names)): found = call()
    except UserError as e:
        assert is_line(e), f"not a line: {ascii(str(e))[:300]}"
        assert any(n in str(e) for n in names), f"names neither of {names}: {e}"
        return "refused"
    assert judge(found), f"taken as {found!r:.300}"
    return "right"


def checked_arm(arm):
    "An arm that is right can be written down, and is refused in one line or not at all by what looks at files."
    json.dumps(to_row(arm), allow_nan=False)
    with limited("check_arm"):
        try: check_arm(arm)
        except UserError as e: assert is_line(e), e
    return True


# ---- the ways a value comes in ---------------------------------------------------------------------------------------
def nest(path, v):
    "{'a': {'b': v}} for 'a.b'."
    head, _, rest = path.partition(".")
    return {head: nest(rest, v) if rest else v}


def replaced(path, v):
    "A tree with a value given to its class."
    head, _, name = path.rpartition(".")
    branch = replace(attrgetter(head)(Arm()) if head else Arm(), **{name: v})
    return override(Arm(), {head: branch}) if head else branch


def ways(path, name):
    "Ways to give a setting a value: name -> function of the value, which gives an `Arm`."
    as_text = lambda v: v if isinstance(v, str) else short(v)
    return dict(
        keyword=lambda v: make_arms("scratch", **{name: v})[0],
        words=lambda v: make_arms("scratch", f"{name}={shlex.quote(as_text(v))}")[0],
        tree=lambda v: make_arms("scratch", **nest(path, v))[0],
        override=lambda v: override(Arm(), {path: v}),
        replace=lambda v: replaced(path, v))


def settings_outcomes(r, here):
    "(kind, outcome) of odd values for every setting, by every way."
    names = columns(Arm())
    for leaf in leaves(Arm()):
        bounds = (leaf.field.metadata["low"], -MOST), (leaf.field.metadata["high"], MOST)
        low, high = (d if b is None else b for b, d in bounds)
        for kind, values in kinds(here/leaf.path, low, high).items():
            way, give = r.choice([*ways(leaf.path, names[leaf.path]).items()])
            v = r.choice(values)
            told = f"{leaf.path} {kind} by {way}: {ascii(short(v))}"
            judge = lambda arm: is_right(attrgetter(leaf.path)(arm), leaf.field) and checked_arm(arm)
            called = leaf.field.name, names[leaf.path], leaf.path, "words", "arms"
            yield kind, told, lambda: outcome(lambda: give(v), called, judge)


def option_outcomes(r, here):
    "The same of every option of every domain."
    for domain in DOMAINS:
        for k in takes(DOMAINS[domain]):
            if k == "root": continue
            field = OPTIONS.get(k) or next(f for f in fields(DataSource) if f.name == k)
            low, high = (field.metadata[b] or 0 for b in ("low", "high"))
            for kind, values in kinds(here/f"{domain}.{k}", low, high).items():
                v = r.choice(values)
                root = "" if domain == "butterflies" else str(here)
                call = lambda: place_of(DataSource(domain, root, options={k: v}))
                told, called = f"{domain}.{k} {kind}: {ascii(short(v))}", (k, "options", str(here), "words")
                yield "option " + kind, told, lambda: outcome(call, called, lambda place: True)


def own_outcomes(r, here):
    "The same of the notebook's own parameters."
    known = parameters(experiment_notebook())
    for name in own_parameters():
        for kind, values in kinds(here/name, 0, 1024).items():
            v = r.choice(values)
            told = f"{name} {kind}: {ascii(short(v))}"
            judge = lambda found: name not in found or type(found[name]) is type(known[name][0])
            shown = (name, "arm", "setting", "characters", "cannot write", "path", str(here))
            yield "own " + kind, told, lambda: outcome(lambda: sorted_out(known, {name: v}), shown, judge)


def odd_parameters(seed, here):
    "Counts of what came of odd parameters, and what was neither right nor refused in a line."
    r, counts, faults = random.Random(seed), Counter(), []
    for make in (settings_outcomes, option_outcomes, own_outcomes):
        for kind, told, call in make(r, here/make.__name__):
            try: counts[f"{kind}: {call()}"] += 1
            except Exception as e: faults.append(f"{told} -> {type(e).__name__}: {ascii(str(e))[:300]}")
    return dict(counts=counts, faults=faults, torch="torch" in sys.modules)


def test_odd_parameters_are_refused_in_a_line_or_right(tmp_path):
    run = subprocess.run([sys.executable, "-X", "faulthandler", __file__, "1"], cwd=tmp_path, capture_output=True,
                         text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert not run.returncode, run.stderr[-2000:]
    found = json.loads(run.stdout)
    print(json.dumps(found["counts"], indent=1))
    assert sum(found["counts"].values()) >= 400 and not found["faults"], "\n".join(found["faults"])
    assert not found["torch"] and not run.stderr, run.stderr[-2000:]


@pytest.mark.parametrize("name", ["a\0b", "x"*300, "x/"*3000, "\ud800", ""],
                         ids=["NUL", "long", "deep", "half", "empty"])
def test_what_cannot_be_a_folder_is_no_output(name, tmp_path, monkeypatch):
    from synthdet.core import refused
    from synthdet.paths import alone, writable, write_atomic
    from synthdet.data.domains import load_domain, write_domain
    from synthdet.evidence.phases import run
    from synthdet.synthesis.disk import write_stream
    from synthdet.synthesis.stream import make_samples
    monkeypatch.chdir(tmp_path)
    domain = load_domain("butterflies", n_class_images=4, n_backgrounds=2, image_size=64)
    samples = make_samples(domain, make_arms("pretrain", "recipe.image_size=64")[0].synthesis, seed=1)
    if name:                                                     # nothing is this folder, as everywhere
        refused(write_domain, domain, name, 1, 1, 1)
        refused(run, make_arms("scratch", "steps=1")[0], name)
    refused(write_stream, samples, name, 1)
    for write in (writable, lambda path: write_atomic(path, "x"), lambda path: alone(path, "waits").__enter__()):
        refused(write, name)
    assert not any(tmp_path.iterdir())


if __name__ == "__main__": print(json.dumps(odd_parameters(int(sys.argv[1]), Path.cwd())))
