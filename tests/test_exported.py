"Exported generators: what a hostile, damaged or odd file does (nothing), and pictures against the network itself."
import io
import os
import pickle
import random
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from helpers import Call
from synthdet.core import UserError
from synthdet.objects import child
from synthdet.objects.exported import load_exported, OPERATIONS
from synthdet.objects.onnx import _checked, OPERATORS

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")


KEPT = {}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    "Starting a process takes seconds, so that the files of these tests are read in the same one while it lives."
    start = child._Process
    def started(path, modules=()):
        kept = KEPT.get(tuple(modules))
        if kept is None or not kept.living(): kept = KEPT[tuple(modules)] = start(path, modules)
        return kept
    monkeypatch.setattr(child, "_Process", started)


class Deep(nn.Module):
    "Layers as generators have them."
    def __init__(self):
        super().__init__()
        self.mapping = nn.Sequential(
            nn.Linear(10, 12), nn.LeakyReLU(.2), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 64), nn.Dropout(.5))
        self.up = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(4, 16, 3, padding=1), nn.PixelShuffle(2),
            nn.InstanceNorm2d(4), nn.SiLU(), nn.ReflectionPad2d(1), nn.Upsample(scale_factor=2), nn.Conv2d(4, 8, 3),
            nn.BatchNorm2d(8), nn.PReLU(), nn.ConvTranspose2d(8, 3, 4, 2, 1))

    def forward(self, z):
        z = z/(z.square().mean(1, keepdim=True) + 1e-8).sqrt()
        w = self.mapping(z).view(-1, 4, 4, 4)
        mixed = torch.einsum("bchw,bdhw->bchw", w, w).softmax(1).roll(1, 2)
        return torch.tanh(mixed + self.up(w)[:, :1, :4, :4]).repeat(1, 1, 2, 2)[:, :3]


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Deep().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def scripted(net, tmp_path_factory):
    torch.jit.script(net).save(path := tmp_path_factory.mktemp("exported")/"script.pt")
    return path


def changed(path, source, **changes):
    "A copy of an archive with parts replaced (double underscores for dots), or added."
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        parts = {n.partition("/")[2]: old.read(n) for n in old.namelist()}
        parts.update({k.replace("__", "."): v for k, v in changes.items()})
        for name, content in parts.items(): new.writestr(f"x/{name}", content)
    return path


def refused(path, *words):
    with pytest.raises(UserError) as e: load_exported(path)(torch.ones(2, 10))
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)


def test_scripted_and_traced_networks_are_the_network(net, scripted, tmp_path):
    torch.jit.trace(net, torch.randn(2, 10)).save(tmp_path/"trace.pt")
    torch.jit.freeze(torch.jit.script(net)).save(tmp_path/"frozen.pt")
    z = torch.randn(3, 10)
    for path in (scripted, tmp_path/"trace.pt", tmp_path/"frozen.pt"):
        G = load_exported(path)
        assert G.nz == 10 and G.flat and torch.allclose(G(z), net(z), atol=1e-5)


@pytest.mark.parametrize("part", ["data__pkl", "constants__pkl"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_pythons_reader_would_run_runs_nothing(part, protocol, scripted, tmp_path):
    marker = tmp_path/"marker"
    content = pickle.dumps(Call(os.system, f"touch {marker}"), protocol)
    refused(changed(tmp_path/"bad.pt", scripted, **{part: content}), "posix.system", "nothing was executed")
    assert not marker.exists()
    pickle.loads(content)
    assert marker.exists(), "it would have"


class Save(nn.Module):
    def __init__(self, path):
        super().__init__()
        self.path, self.start = path, nn.Linear(10, 48)

    def forward(self, z):
        torch.save(z, self.path)
        return self.start(z).view(-1, 3, 4, 4)


class Read(nn.Module):
    def __init__(self, path):
        super().__init__()
        self.path = path

    def forward(self, z): return torch.from_file(self.path, True, 96).view(-1, 3, 4, 4)


class Later(nn.Module):
    "Hides it in a branch, a submodule and a loop."
    def __init__(self, path):
        super().__init__()
        self.inner = nn.ModuleList([nn.Identity(), Save(path)])

    def forward(self, z):
        x = z
        for k, m in enumerate(self.inner):
            if k == 1: x = m(z)
        return x


class Interface(nn.Module):
    "Calls through an interface, which is resolved when it runs."
    def __init__(self, path):
        super().__init__()
        self.m: Face = Save(path)

    def forward(self, z): return self.m.forward(z)


@torch.jit.interface
class Face(nn.Module):
    def forward(self, z: torch.Tensor) -> torch.Tensor: pass


class Fork(nn.Module):
    def __init__(self, path):
        super().__init__()
        self.m = Save(path)

    def forward(self, z): return torch.jit.wait(torch.jit.fork(self.m, z))


KINDS = [(Save, "aten::save"), (Read, "aten::from_file"), (Later, "aten::save"), (Interface, "aten::save"),
         (Fork, "prim::fork")]


@pytest.mark.parametrize("kind,word", KINDS)
def test_operations_that_reach_outside_are_refused_before_they_run(kind, word, tmp_path):
    marker = tmp_path/"marker"
    torch.jit.script(kind(str(marker))).save(tmp_path/"bad.pt")
    refused(tmp_path/"bad.pt", word, "nothing was executed")
    assert not marker.exists()
    torch.jit.load(tmp_path/"bad.pt")(torch.ones(2, 10))
    assert marker.exists(), "PyTorch alone does it"


def test_nothing_that_names_a_file_or_a_process_is_on_the_list():
    schemas = torch._C._jit_get_all_schemas()
    of_file = lambda a: "str" in str(a.type) and ("file" in a.name or "path" in a.name)
    names = {s.name for s in schemas if any(map(of_file, s.arguments))}
    assert {"aten::save", "aten::from_file"} <= names and not names & OPERATIONS
    assert {n for n in OPERATIONS if n.startswith("aten")} <= {s.name for s in schemas}, "a name with a slip in it"
    assert not [n for n in OPERATIONS if "rand" in n or "normal" in n or "bernoulli" in n or "empty" in n]


class Setstate(nn.Module):
    def __init__(self, path):
        super().__init__()
        self.path = path

    def forward(self, z): return z
    @torch.jit.export
    def __getstate__(self): return self.path, self.training
    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        torch.save(torch.ones(1), state[0])
        self.path, self.training = state


def test_nothing_runs_while_it_is_loaded(tmp_path):
    marker = tmp_path/"marker"
    torch.jit.script(Setstate(str(marker))).save(tmp_path/"bad.pt")
    refused(tmp_path/"bad.pt", "__setstate__", "nothing was executed")
    assert not marker.exists()
    torch.jit.load(tmp_path/"bad.pt")
    assert marker.exists(), "PyTorch alone does it"


def test_two_readers_of_a_zip_cannot_be_told_two_things(scripted, tmp_path):
    (path := tmp_path/"bad.pt").write_bytes(scripted.read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(path, "a") as z: z.writestr("script/data.pkl", b"x")
    refused(path, "a part twice")
    changed(path, scripted)
    command = pickle.dumps(Call(os.system, "false"), 2)
    with zipfile.ZipFile(path, "a") as z: z.writestr("elsewhere/attributes.pkl", command)
    assert load_exported(path).nz == 10, "parts that are not needed are left behind"


def test_a_key_that_overflows_the_stack_is_refused(scripted, tmp_path):
    "A million nested tuples as a key: Python's own dict would end the process, and no `except` would catch it."
    key = b")" + b"\x85"*10**6
    called = b"\x80\x02ccollections\nOrderedDict\n]](" + key + b"K\x01ea\x85R."
    plain = b"\x80\x02}" + key + b"K\x01s."
    for content in (called, plain): refused(changed(tmp_path/"bad.pt", scripted, data__pkl=content), "tuple as a key")


def test_damage_is_told_and_never_crashes(scripted, tmp_path):
    whole, rng = scripted.read_bytes(), random.Random(0)
    for n in (0, 3, 10, 100, len(whole)//2, len(whole) - 1):
        (tmp_path/"half.pt").write_bytes(whole[:n])
        with pytest.raises(UserError): load_exported(tmp_path/"half.pt")
    with zipfile.ZipFile(scripted) as z: data = z.read("script/data.pkl")
    for _ in range(60): # bytes of the pickle turned over: refused, or read as something harmless
        bad = bytearray(data)
        for _ in range(rng.choice((1, 2, 8))): bad[rng.randrange(len(bad))] = rng.randrange(256)
        try: load_exported(changed(tmp_path/"bad.pt", scripted, data__pkl=bytes(bad)))
        except UserError as e: assert "\n" not in str(e)


OTHERS = dict(empty=b"", junk=b"junk", pickle=b"\x80\x02}q\x00.", zip=b"PK\x03\x04" + b"\0"*60,
              message=b"\x08\x08:\x02\x00\x00")


@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS)
def test_other_files_are_told(content, tmp_path):
    (tmp_path/"x.onnx").write_bytes(content)
    refused(tmp_path/"x.onnx", "x.onnx")
    refused(tmp_path/"none.onnx", "does not exist")
    refused(tmp_path, "not a regular file")


def test_without_onnxruntime_it_is_said_what_to_install(tmp_path, monkeypatch):
    (tmp_path/"x.onnx").write_bytes(b"\x08\x08")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refused(tmp_path/"x.onnx", "pip install 'synthdet[onnx]'")


# ONNX, written by hand

def varint(n): return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def field(k, v):
    "A field of a message of protocol buffers: a number, text or bytes."
    if isinstance(v, int): return varint(k << 3) + varint(v)
    v = v.encode() if isinstance(v, str) else v
    return varint(k << 3 | 2) + varint(len(v)) + v


def message(*fields): return b"".join(field(*f) for f in fields)


def value(name, *shape, kind=1):
    sizes = message(*((1, message((1, n) if isinstance(n, int) else (2, n))) for n in shape))
    return message((1, name), (2, message((1, message((1, kind), *([(2, sizes)] if shape else []))))))


def node(op, inputs, outputs):
    return message(*((1, i) for i in inputs), *((2, o) for o in outputs), (4, op))


def tensor(name, x):
    kind = {"float32": 1, "float64": 11, "int64": 7, "float16": 10}[str(x.dtype)]
    return message(*((1, n) for n in x.shape), (2, kind), (8, name), (9, x.tobytes()))


def onnx(path, nodes, inputs, outputs, tensors=()):
    graph = message(*((1, n) for n in nodes), (2, "g"), *((5, t) for t in tensors), *((11, i) for i in inputs),
                    *((12, o) for o in outputs))
    path.write_bytes(message((1, 8), (7, graph), (8, message((1, ""), (2, 13)))))
    return path


W = np.random.default_rng(0).standard_normal((5, 48)).astype(np.float32)
SHAPE, FLAT = tensor("shape", np.array([-1, 3, 4, 4])), tensor("flat", np.array([-1, 5]))


def small(path, *batch, dtype=np.float32, kind=1, tail=("Tanh", "r", "y"), four=False):
    nodes = [node("Reshape", ["z", "flat"], "f"), node("MatMul", ["f", "w"], "m"),
             node("Reshape", ["m", "shape"], "r"), node(*tail)]
    noise = value("z", *(batch or ("B",)), 5, *((1, 1) if four else ()), kind=kind)
    weights = [tensor("w", W.astype(dtype)), SHAPE, FLAT]
    return onnx(path, nodes, [noise], [value("y", "B", 3, 4, 4, kind=kind)], weights)


@pytest.mark.parametrize("four", [False, True])
@pytest.mark.parametrize("dtype,kind", [(np.float32, 1), (np.float64, 11)])
@pytest.mark.parametrize("batch", ["B", 2])
def test_onnx_is_computed(four, dtype, kind, batch, tmp_path):
    pytest.importorskip("onnxruntime")
    G = load_exported(small(tmp_path/"g.onnx", batch, dtype=dtype, kind=kind, four=four))
    z = torch.randn(5, 5)
    expected = torch.tanh((z @ torch.from_numpy(W)).view(-1, 3, 4, 4))
    assert (G.nz, G.flat) == (5, not four)
    for noise in (z, z[..., None, None]): assert torch.allclose(G(noise), expected, atol=1e-6)
    with pytest.raises(UserError, match=r"expected floats \[B,5\]"): G(torch.randn(2, 6))
    with pytest.raises(UserError, match="of length 5, not 6"): load_exported(tmp_path/"g.onnx", 6)
    assert torch.equal(pickle.loads(pickle.dumps(G))(z), G(z))


Z, Y = value("z", "B", 5), value("y")
NO_GENERATORS = dict(
    nan=(lambda p: small(p, tail=("Sqrt", "r", "y")), ["returned NaN"]),
    kind=(lambda p: onnx(p, [node("Shape", "z", "y")], [Z], [value("y", kind=7)]), ["expected pictures [B,3,H,W]"]),
    two=(lambda p: onnx(p, [node("Neg", "z", "y")], [Z, value("c", "B", 3)], [Y]),
         ["takes 2 inputs", "z tensor(float)", "c tensor(float)"]),
    numbers=(lambda p: onnx(p, [node("Neg", "z", "y")], [value("z", "B", 5, kind=7)], [value("y", kind=7)]),
             ["z tensor(int64)"]),
    picture=(lambda p: onnx(p, [node("Neg", "z", "y")], [value("z", "B", 3, 8, 8)], [Y]), ["expected noise [B,nz]"]),
    outputs=(lambda p: onnx(p, [node("Neg", "z", "y"), node("Abs", "z", "x")], [Z], [Y, value("x")]),
             ["gives 2 outputs (y, x)"]),
    random=(lambda p: small(p, tail=("RandomNormalLike", "r", "y")), ["draws noise of its own"]),
    long=(lambda p: small(p, 10**9), ["takes noise [1000000000, 5]"]),
    unknown=(lambda p: small(p, tail=("Nothing", "r", "y")), ["is refused: it uses Nothing"]))


def flag(name, on): return message((2, 9), (8, name), (9, bytes([on])))
def constant(name, on):
    return node("Constant", [], [name]) + message((5, message((1, "value"), (5, flag("", on)), (20, 4))))
NOT = node("Not", ["off"], ["on"])
CALL = node("Drop", ["r", "", "on"], "y") + message((7, "somebody"))
FUNCTION = message((1, "Drop"), (10, "somebody"), *((4, k) for k in ("x", "p", "off")), (5, "d"),
                   (7, node("Dropout", ["x", "p", "off"], "d")))
# name -> (nodes, tensors, functions, does it draw noise?)
DROPS = dict(
    initializer=([], [flag("on", 1)], [], True), off=([], [flag("on", 0)], [], False),
    node=([constant("on", 1)], [], [], True),
    node_off=([constant("on", 0)], [], [], False), computed=([NOT], [flag("off", 0)], [], True),
    twice=([constant("on", 1)], [flag("on", 0)], [], True),
    function=([CALL], [flag("on", 1), flag("off", 0)], [FUNCTION], True))


@pytest.mark.parametrize("name", DROPS)
def test_dropout_in_training_mode_is_seen_in_the_graph(name):
    from synthdet.core import refused
    nodes, tensors, functions, draws = DROPS[name]
    last = [] if functions else [node("Dropout", ["r", "", "on"], "y")]
    start = [node("MatMul", "zw", "m"), node("Reshape", ["m", "shape"], "r")]
    graph = message(*((1, n) for n in (*start, *nodes, *last)), *((5, t) for t in (tensor("w", W), SHAPE, *tensors)))
    content = message((7, graph), *((25, f) for f in functions))
    if draws: assert "Dropout in training mode" in refused(_checked, content, "a.onnx", OPERATORS)
    else: _checked(content, "a.onnx", OPERATORS)


@pytest.mark.parametrize("make,words", NO_GENERATORS.values(), ids=NO_GENERATORS)
def test_onnx_that_is_no_generator_is_told(make, words, tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(UserError) as e: load_exported(make(tmp_path/"g.onnx"))(torch.randn(2, 5))
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value), str(e.value)


def test_onnx_reads_no_other_file(tmp_path, monkeypatch):
    runtime = pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    W.tofile("secret.bin")
    place = message((1, "location"), (2, "secret.bin"))
    outside = message((1, 5), (1, 48), (2, 1), (8, "w"), (13, place), (14, 1))
    nodes = [node("MatMul", "zw", "m"), node("Reshape", ["m", "shape"], "y")]
    path = onnx(tmp_path/"g.onnx", nodes, [value("z", "B", 5)], [value("y")], [outside, SHAPE])
    session = runtime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    assert session.run(None, dict(z=np.ones((1, 5), np.float32))), "onnxruntime alone does"
    refused(path, "refers to other files")


def test_damaged_onnx_never_crashes(tmp_path):
    pytest.importorskip("onnxruntime")
    whole, rng = small(tmp_path/"g.onnx").read_bytes(), random.Random(1)
    for k in range(60):
        bad = bytearray(whole[:rng.randrange(len(whole))] if k % 3 == 0 else whole)
        for _ in range(k % 3): bad[rng.randrange(len(bad))] = rng.randrange(256)
        (tmp_path/"bad.onnx").write_bytes(bytes(bad))
        try: load_exported(tmp_path/"bad.onnx")
        except UserError as e: assert "\n" not in str(e)
