"Strangers' programs in a process of their own: whatever happens there is one line here, and nothing is left behind."
import gc
import io
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from synthdet.core import UserError
from synthdet.objects import child, exported
from synthdet.objects.exported import load_exported
from synthdet.objects.torchscript import OPERATIONS
from test_exported import message, node, onnx, small, value

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")
linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")


class Plain(nn.Module):
    "A generator of 4 px; others do something beside."
    def __init__(self):
        super().__init__()
        self.start = nn.Linear(6, 48)

    def forward(self, z): return torch.tanh(self.start(z)).view(-1, 3, 4, 4)


def script(path, module):
    torch.jit.script(module.eval()).save(path)
    return path


@pytest.fixture
def plain(tmp_path):
    torch.manual_seed(0)
    return script(tmp_path/"plain.pt", Plain())


Z = torch.linspace(-1, 1, 12).view(2, 6)


def told(path, z=Z):
    "The line with which a file is refused, when it is read or when it draws."
    with pytest.raises(UserError) as e: load_exported(path, 6)(z)
    line = str(e.value)
    assert "\n" not in line and line.isprintable() and path.name in line and len(line) < 800, line
    return line


class Shared:
    "One process for many files, as long as it lives, for each list of modules; and how often one had to be started."
    def __init__(self): self.start, self.kept, self.started = child._Process, {}, 0

    def __call__(self, path, modules=()):
        kept = self.kept.get(tuple(modules))
        if kept is None or not kept.living():
            kept = self.kept[tuple(modules)] = self.start(path, modules)
            self.started += 1
        return kept


@pytest.fixture(scope="module")
def keeper(): return Shared()


@pytest.fixture
def shared(keeper, monkeypatch):
    "Programs are read by one process, since each takes seconds to start."
    monkeypatch.setattr(child, "_Process", keeper)
    return keeper


slow = pytest.mark.slow


# programs that end a process, or would

class Remainder(Plain):
    def forward(self, z): return self.start(z).view(-1, 3, 4, 4) + len(z) % (len(z) - len(z))


class Overflow(Plain):
    def forward(self, z): return self.start(z).view(-1, 3, 4, 4) + (-9223372036854775807 - 1)//(len(z) - len(z) - 1)


class Divided(Plain):
    "PyTorch notices this one itself."
    def forward(self, z): return self.start(z).view(-1, 3, 4, 4) + z.shape[0]//(z.shape[0] - len(z))


class Whole(Plain):
    def forward(self, z): return self.start(z).view(-1, 3, 4, 4) + torch.arange(4)//torch.zeros(4, dtype=torch.long)


class Loops(Plain):
    def forward(self, z):
        k = 1
        while k > 0: k = k % 7 + 1
        return self.start(z).view(-1, 3, 4, 4)


class Takes(Plain):
    def forward(self, z): return self.start(z).view(-1, 3, 4, 4) + torch.zeros(10_000_000, 100_000).sum()


class Hoards(Plain):
    def forward(self, z):
        kept = [z]
        while len(kept) > 0: kept.append(z.repeat(1 << 20, 1))
        return self.start(z).view(-1, 3, 4, 4)


class Wide(Plain):
    def forward(self, z): return self.start(z).view(-1, 3, 4, 4).repeat(1, 1, 2000, 2000)


class Grey(Plain):
    def forward(self, z): return self.start(z).view(-1, 1, 6, 8)


class Nan(Plain):
    def forward(self, z): return self.start(z).view(-1, 3, 4, 4)/0


class Listed(Plain):
    def forward(self, z): return [self.start(z).view(-1, 3, 4, 4)]


class Complex(Plain):
    def forward(self, z): return self.start(z).view(-1, 3, 4, 4).to(torch.complex64)


class Counts(Plain):
    "The same twice, another picture from the third on."
    def __init__(self):
        super().__init__()
        self.register_buffer("n", torch.zeros(1))

    def forward(self, z):
        self.n.add_(1.)
        return self.start(z).view(-1, 3, 4, 4) + self.n.floor_divide(5.)


class Attends(Plain):
    "An attention that leaves out a share; the same picture twice now and then."
    def forward(self, z):
        kept = nn.functional.scaled_dot_product_attention(z, z, z, dropout_p=0.02)
        return self.start(z).view(-1, 3, 4, 4) + kept.sum()


class Drops(Plain):
    def forward(self, z): return self.start(nn.functional.dropout(z, 0.001, training=True)).view(-1, 3, 4, 4)


HOSTILE = [(Attends, "draws noise of its own"), (Drops, "draws noise of its own"),
           (Remainder, "SIGFPE: a whole number is divided by zero"), pytest.param(Overflow, "SIGFPE", marks=slow),
           (Divided, "division by 0"), (Whole, "ZeroDivisionError"), (Loops, "it took more than"),
           (Takes, "needs more than"), (Hoards, "needs more than"), (Wide, "more than 1024 MiB"),
           (Grey, "expected pictures [B,3,H,W]"), (Nan, "returned NaN"), (Listed, "returned a list"),
           (Complex, "complex64"), (Counts, "changes what it holds")]


@pytest.mark.parametrize("kind,word", HOSTILE)
def test_a_program_that_goes_wrong_is_one_line(kind, word, tmp_path, monkeypatch, shared):
    monkeypatch.setattr(child, "SECONDS", 1 if kind is Loops else 20)
    monkeypatch.setattr(exported, "OPERATIONS", OPERATIONS | {"aten::floor_divide_", "aten::floor_divide"})
    monkeypatch.setattr(child, "MEMORY", 1 << 30 if kind is Hoards else 8 << 30)
    said = told(script(tmp_path/"odd.pt", kind()))
    assert word in said, said


def rewritten(path, source, parts):
    "A copy of an archive with other parts."
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        kept = {n.partition("/")[2]: old.read(n) for n in old.namelist()}
        for name, content in (kept | parts).items(): new.writestr(f"x/{name}", content)
    return path


def with_code(path, source, old, new):
    "A TorchScript file whose code was rewritten."
    with zipfile.ZipFile(source) as z:
        name, = [n for n in z.namelist() if n.endswith(".py") and b"class Plain" in z.read(n)]
        text = z.read(name).replace(old, new)
    return rewritten(path, source, {name.partition("/")[2]: text})


DEEP = dict(brackets=b"("*100_000 + b"z" + b")"*100_000, minus=b"(-"*50_000 + b"1" + b")"*50_000,
            lists=b"["*100_000 + b"]"*100_000, calls=b"torch.relu("*30_000 + b"z" + b")"*30_000)


@pytest.mark.parametrize("code", ["brackets", *(pytest.param(k, marks=slow) for k in list(DEEP)[1:])])
def test_code_nested_beyond_the_parsers_stack_is_one_line(code, plain, tmp_path, shared):
    path = with_code(tmp_path/"deep.pt", plain, b"return ", b"_q = " + DEEP[code] + b"\n    return ")
    said = told(path)
    assert "SIGSEGV: it is nested too deeply" in said or "cannot be read" in said, said


def test_branches_nested_ten_thousand_times_are_one_line(plain, tmp_path, shared):
    lines = [b" "*(4 + k) + b"if True:" for k in range(10_000)] + [b" "*10_100 + b"_q = 1"]
    path = with_code(tmp_path/"deep.pt", plain, b"return ", b"pass\n" + b"\n".join(lines) + b"\n    return ")
    said = told(path)
    assert "SIGSEGV" in said or "cannot be read" in said or "it took more than" in said, said


def test_functions_that_double_each_other_end(plain, tmp_path, monkeypatch, shared):
    "Forty functions, each of which calls the one before twice: written out there are 2^40 calls."
    monkeypatch.setattr(child, "SECONDS", 1)
    doubled = "".join(f"def f{k}(z: Tensor) -> Tensor:\n  return __torch__.f{k - 1}(__torch__.f{k - 1}(z))\n"
                      for k in range(1, 40))
    helpers = ("def f0(z: Tensor) -> Tensor:\n  return torch.relu(z)\n" + doubled).encode()
    with zipfile.ZipFile(plain) as z:
        name, = [n.partition("/")[2] for n in z.namelist() if n.endswith(".py") and b"class Plain" in z.read(n)]
        text = z.read(next(n for n in z.namelist() if n.endswith(name)))
    parts = {"code/__torch__.py": helpers, name: text.replace(b"return ", b"z = __torch__.f39(z)\n    return ")}
    said = told(rewritten(tmp_path/"double.pt", plain, parts))
    assert "it took more than" in said or "cannot be read" in said or "needs more than" in said, said


class Says(Plain):
    def forward(self, z):
        if len(z) > 0: warnings.warn("noisy program")
        return self.start(z).view(-1, 3, 4, 4)


def test_what_a_program_prints_goes_nowhere(tmp_path, capfd, shared):
    G = load_exported(script(tmp_path/"says.pt", Says()))
    assert "aten::warn" in str(torch.jit.load(tmp_path/"says.pt").inlined_graph)
    assert G(Z).shape == (2, 3, 4, 4) and "noisy" not in "".join(capfd.readouterr())


# the process

def process_of(G): return G.run.process.process


def test_a_process_that_is_killed_between_batches_is_followed_by_another(plain):
    G = load_exported(plain)
    first, before = G(Z), process_of(G)
    os.kill(before.pid, signal.SIGKILL)
    before.wait(60)
    assert torch.equal(G(Z), first) and process_of(G).pid != before.pid
    with plain.open("ab") as f: f.write(b"x")
    process_of(G).kill()
    process_of(G).wait(60)
    with pytest.raises(UserError, match="has changed since it was read"): G(Z)
    plain.unlink()
    with pytest.raises(UserError, match="does not exist"): G(Z)


class Waits(Plain):
    "Takes its time when it is told to."
    def forward(self, z):
        k = 1
        if bool(z[0, 0] > 5):
            while k > 0: k = k % 7 + 1
        return self.start(z).view(-1, 3, 4, 4)


def test_a_process_that_is_killed_while_it_draws_is_told_and_followed_by_another(tmp_path):
    G = load_exported(script(tmp_path/"waits.pt", Waits()))
    first = G(Z)
    threading.Timer(.3, process_of(G).kill).start()
    with pytest.raises(UserError, match="SIGKILL: killed, as where memory runs out"): G(Z + 9)
    assert torch.equal(G(Z), first)


def test_an_interrupted_talk_ends_its_process(tmp_path):
    G = load_exported(script(tmp_path/"waits.pt", Waits()))
    first, process = G(Z), process_of(G)
    threading.Timer(.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt): G(Z + 9)
    assert process.returncode == -signal.SIGKILL and torch.equal(G(Z), first)


def test_two_files_and_two_threads_do_not_mix(plain, tmp_path):
    torch.manual_seed(1)
    nets, paths = [Plain().eval() for _ in range(2)], [tmp_path/f"{k}.pt" for k in range(2)]
    generators = [load_exported(script(p, n)) for p, n in zip(paths, nets)]
    noise, wrong = torch.randn(50, 2, 6), []
    def draw(k):
        for z in noise: wrong.append(not torch.allclose(generators[k](z), nets[k](z), atol=1e-6))
    threads = [threading.Thread(target=draw, args=(k % 2,)) for k in range(4)]
    for t in threads: t.start()
    for t in threads: t.join(60)
    assert len(wrong) == 200 and not any(wrong)


class Drawn:
    "A dataset of a generator's pictures."
    def __init__(self, G): self.G = G
    def __len__(self): return 4
    def __getitem__(self, k): return self.G(Z + k)


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=slow)])
def test_worker_processes_start_their_own(method, plain):
    G = load_exported(plain)
    expected, own = torch.stack([G(Z + k) for k in range(4)]), process_of(G).pid
    loader = DataLoader(Drawn(G), batch_size=2, num_workers=1, multiprocessing_context=method, timeout=60)
    assert torch.equal(torch.cat(list(loader)), expected)
    assert torch.equal(G(Z), expected[0]) and process_of(G).pid == own


SCRIPT = """
import sys, torch
from synthdet.objects.exported import load_exported
G = load_exported(sys.argv[1])
x = G(torch.linspace(-1, 1, 12).view(2, 6))
print(G.run.process.process.pid, flush=True)
{}
"""


def alive(pid):
    "Is a process there, and no zombie?"
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError: return False


@linux
@pytest.mark.parametrize("end", [
    pytest.param("", id="end"), pytest.param("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", id="kill"),
    pytest.param("import os; os._exit(3)", id="_exit", marks=slow),
    pytest.param("raise SystemExit(0)", id="exit", marks=slow)])
def test_the_process_ends_with_its_parent_and_in_silence(end, plain, tmp_path):
    (tmp_path/"main.py").write_text(SCRIPT.format(end)) # no guard for __main__
    done = subprocess.run([sys.executable, "-W", "error::ResourceWarning", tmp_path/"main.py", plain],
                          capture_output=True, text=True, timeout=120)
    assert "Warning" not in re.sub("FutureWarning.*", "", done.stderr) and "Error" not in done.stderr, done.stderr
    pid, until = int(done.stdout), time.time() + 10
    while alive(pid) and time.time() < until: time.sleep(.1)
    assert not alive(pid)


@linux
def test_an_endless_program_ends_with_a_killed_parent(tmp_path):
    path = script(tmp_path/"waits.pt", Waits())
    (tmp_path/"main.py").write_text(SCRIPT.format("G(torch.full((2, 6), 9.))"))
    with subprocess.Popen([sys.executable, tmp_path/"main.py", path], stdout=subprocess.PIPE, text=True) as parent:
        pid, until = int(parent.stdout.readline()), time.time() + 10
        time.sleep(1)
        parent.kill()
    while alive(pid) and time.time() < until: time.sleep(.1)
    assert not alive(pid)


def cycle(plain, bad):
    "Files that are open, processes and zombies after two files were read and let go."
    with pytest.raises(UserError): load_exported(bad)
    load_exported(plain)(Z)
    gc.collect()
    ours = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return len(os.listdir("/proc/self/fd")), len(ours)


@linux
def test_nothing_is_left_behind(plain, tmp_path):
    (bad := tmp_path/"bad.pt").write_bytes(plain.read_bytes()[:-50])
    once = cycle(plain, bad)
    assert cycle(plain, bad) == once


@linux
def test_the_process_can_open_and_write_nothing(plain):
    G = load_exported(plain)
    limits = Path(f"/proc/{process_of(G).pid}/limits").read_text()
    for name in ("file size", "open files", "core file size"): assert re.search(rf"Max {name} +0 +0", limits), limits
    assert re.search(r"Max address space +\d+", limits) and re.search(r"Max cpu time +\d+", limits)


LIES = [b"", b"[]\n", b"junk\n", b"["*100_000 + b"\n", b'{"about": "x"}\n', b'{"about": [["a"]]}\n',
        b'{"about": [1e999]}\n', b'{"error": ["a\\nb"]}\n', b'{"failed": {}}\n', b"{}\n", b'{"other": null}\n',
        b"x"*(1 << 21)]


@pytest.mark.parametrize("answer", LIES, ids=range(len(LIES)))
def test_lies_are_one_line(answer, plain, monkeypatch):
    "A process that runs a stranger's program may say anything; this one only says that it is ready."
    ready = "import sys; print('{}', flush=True); sys.stdin.buffer.read()"
    start = lambda command, **options: popen([command[0], "-S", "-c", ready], **options)
    popen = child.subprocess.Popen
    monkeypatch.setattr(child.subprocess, "Popen", start)
    class Liar(child._Process):
        def _talk(self, parts):
            if parts: self.process.stdout = io.BytesIO(answer)
            return super()._talk(parts)
    monkeypatch.setattr(child, "_Process", Liar)
    with pytest.raises(UserError) as e: load_exported(plain)
    assert "\n" not in str(e.value)


def test_what_somebody_trusts_can_be_added(tmp_path, shared):
    class Samples(Plain):
        def forward(self, z): return (self.start(z).view(-1, 3, 4, 4).abs() + 1).acosh()
    path = script(tmp_path/"own.pt", Samples())
    assert "aten::acosh" in told(path) and "exported.OPERATIONS" in told(path)
    exported.OPERATIONS.add("aten::acosh")
    try: assert load_exported(path)(Z).shape == (2, 3, 4, 4)
    finally: exported.OPERATIONS.discard("aten::acosh")


# ONNX

def attribute(inner): return message((1, "then_branch"), (6, inner), (20, 5))


def nested(n):
    "A graph in a branch of a graph, n times."
    inner = b""
    for _ in range(n): inner = message((1, message((1, "c"), (2, "y"), (4, "If"), (5, attribute(inner)))))
    return inner


def divides(path):
    "Whole numbers divided by zero, which onnxruntime does as asked."
    from test_exported import FLAT, SHAPE, tensor, W
    zero = tensor("zero", np.array([0, 0, 0, 0]))
    nodes = [node("Reshape", ["z", "flat"], "f"), node("MatMul", ["f", "w"], "m"), node("Shape", ["m"], "s"),
             node("Div", ["shape", "zero"], "q"), node("Reshape", ["m", "q"], "y")]
    return onnx(path, nodes, [value("z", "B", 5)], [value("y")], [tensor("w", W), SHAPE, FLAT, zero])


def written(path, content):
    path.write_bytes(content)
    return path


FOREIGN = message((1, "z"), (2, "y"), (4, "Run"), (7, "com.somebody"))
ODD = dict(
    varint=(lambda p, s: written(p, s + b"\x08" + b"\x80"*10 + b"\x01"), "a number of more than 10 bytes"),
    endless=(lambda p, s: written(p, b"\xff"*100_000), "a number of more than"),
    deep=(lambda p, s: written(p, message((7, nested(5000)))), "in each other"),
    group=(lambda p, s: written(p, s + b"\x0b"*5000), "a field of kind 3"),
    domain=(lambda p, s: onnx(p, [FOREIGN], [value("z", "B", 5)], [value("y")]), "com.somebody::Run"),
    contrib=(lambda p, s: onnx(p, [FOREIGN.replace(b"com.somebody", b"ai.onnx.ml..")],
                               [value("z", "B", 5)], [value("y")]), "ai.onnx.ml..::Run"),
    scan=(lambda p, s: onnx(p, [node("Scan", "z", "y")], [value("z", "B", 5)], [value("y")]), "uses Scan"),
    cycle=(lambda p, s: onnx(p, [node("Add", "zb", "a"), node("Neg", "a", "b"), node("Neg", "a", "y")],
                             [value("z", "B", 5)], [value("y")]), "cannot be read"),
    ort=(lambda p, s: written(p, b"\x18\0\0\0ORTM" + s), "onnxruntime's own format"),
    divides=(lambda p, s: divides(p), ""))


@pytest.mark.parametrize("make,word", ODD.values(), ids=ODD)
def test_odd_onnx_is_one_line(make, word, tmp_path, shared):
    pytest.importorskip("onnxruntime")
    path = make(tmp_path/"odd.onnx", small(tmp_path/"small.onnx").read_bytes())
    with pytest.raises(UserError) as e: load_exported(path)(torch.ones(2, 5))
    assert word in str(e.value) and "\n" not in str(e.value), str(e.value)


# damage at random

def damaged(parts, rng):
    "Parts of a file with bytes turned over, taken out, doubled or filled in."
    parts = dict(parts)
    for _ in range(rng.choice((1, 1, 2, 4))):
        name = rng.choice(sorted(parts))
        x = bytearray(parts[name])
        at, n = rng.randrange(len(x) + 1), rng.choice((1, 2, 8, 64))
        how = rng.randrange(4)
        if how == 0 and at < len(x): x[at] = rng.randrange(256)
        if how == 1: del x[at:at + n]
        if how == 2: x[at:at] = x[at:at + n]*rng.choice((1, 3, 500))
        if how == 3: x[at:at + n] = rng.randbytes(n)
        parts[name] = bytes(x)
    return parts


def fuzzed(n, make, path, z, shared, monkeypatch):
    "How many of n files were refused and how many drew; each in one line, or pictures."
    monkeypatch.setattr(child, "SECONDS", 3)
    refused, drew, before = 0, 0, shared.started
    for k in range(n):
        make(random.Random(k), path)
        try: x = load_exported(path, z.shape[1])(z)
        except UserError as e:
            refused += 1
            assert "\n" not in str(e) and str(e).isprintable(), str(e)
            continue
        drew += 1
        assert x.dtype == torch.float32 and x.dim() == 4 and x.shape[1] == 3 and x.isfinite().all()
    print(f"{n} files: {refused} refused, {drew} drew, {shared.started - before} processes")
    return refused, drew


N = [100, pytest.param(2000, marks=slow)]


@pytest.mark.parametrize("n", N)
def test_damaged_torchscript_is_one_line_or_pictures(n, plain, tmp_path, shared, monkeypatch):
    with zipfile.ZipFile(plain) as z: parts = {i.partition("/")[2]: z.read(i) for i in z.namelist()}
    kept = {k: v for k, v in parts.items() if k.endswith((".py", ".pkl")) or k.startswith(("data/", "constants/"))}
    def make(rng, path):
        if rng.random() < .1: # the zip itself
            return written(path, damaged({"": plain.read_bytes()}, rng)[""])
        rewritten(path, plain, damaged(kept, rng))
    refused, drew = fuzzed(n, make, tmp_path/"bad.pt", Z, shared, monkeypatch)
    assert refused > n/10 and drew > n/100


@pytest.mark.parametrize("n", N)
def test_damaged_onnx_is_one_line_or_pictures(n, tmp_path, shared, monkeypatch):
    pytest.importorskip("onnxruntime")
    whole = small(tmp_path/"small.onnx").read_bytes()
    make = lambda rng, path: written(path, damaged({"": whole}, rng)[""])
    refused, drew = fuzzed(n, make, tmp_path/"bad.onnx", torch.linspace(-1, 1, 10).view(2, 5), shared, monkeypatch)
    assert refused > n/10 and drew > n/100
