"Pickles from strangers: programs made at random of every instruction do nothing but build data."
import ast
import copyreg
import io
import os
import pickle
import pickletools
import random
import resource
import subprocess
import sys

import pytest
import torch

from synthdet.checkpoint import NETWORKS
from synthdet.core import refused, UserError
from synthdet.unpickle import Inert, read_pickle, Reader


def text(x): return b"\x8c" + bytes([len(x)]) + x.encode()


def name_of(dotted):
    "The instructions that put a name on the stack."
    module, _, name = dotted.rpartition(".")
    return text(module) + text(name) + b"\x93"


@pytest.mark.parametrize("name", NETWORKS)
def test_an_allowed_name_can_only_be_called(name):
    "Nothing can be attached to it, it makes no class, and whatever it gives cannot be called in turn."
    for rest in (b"}" + text("x") + b"K\x01sb.", b"N}" + text("stand_in") + b"K\x01s\x86b.", b"K\x01a.",
                 b"K\x01K\x02s.", b"(K\x01\x90.", b")R)R."):
        assert "cannot be read" in refused(read_pickle, b"\x80\x04" + name_of(name) + rest, NETWORKS)


def test_what_was_made_cannot_be_changed():
    numbers = pickle.dumps(torch.ones(2), 4)[:-1]
    for rest in (b"}b.", b"(NNNtb.", b"K\x00K\x05s.", b"(K\x01\x90.", b"K\x01a.", b"(K\x01e."):
        assert "cannot be read" in refused(read_pickle, numbers + rest, NETWORKS)
    device = b"\x80\x04" + name_of("torch.device") + text("cpu") + b"\x85R"
    for rest in (b"K\x01a.", b"(K\x01e.", b"K\x01K\x02s.", b")R."):
        assert "cannot be read" in refused(read_pickle, device + rest, NETWORKS)
    made = read_pickle(device + b"}" + text("__class__") + b"K\x01sb.", NETWORKS)
    assert type(made) is Inert and made.arguments == ("cpu",) and made.state == {"__class__": 1}


def test_the_registry_of_extensions_is_not_asked():
    "A name that some module has registered comes from a cache of Python's readers, which do not ask `find_class`."
    class Advised(pickle.Unpickler):
        def find_class(self, module, name): raise pickle.UnpicklingError("asked")
    copyreg.add_extension("os", "system", 0xF0)
    try:
        pickle.loads(b"\x80\x02\x82\xf0.")
        assert Advised(io.BytesIO(b"\x80\x02\x82\xf0.")).load() is os.system, "find_class was not asked"
        assert "EXT1" in refused(read_pickle, b"\x80\x02\x82\xf0.", {"os.system": Inert})
    finally:
        copyreg.remove_extension("os", "system", 0xF0)
        copyreg.clear_extension_cache()


@pytest.mark.parametrize("size", [2**31 - 1, 2**40, 2**63 - 1])
@pytest.mark.parametrize("code", ["BINUNICODE8", "BINBYTES8", "BYTEARRAY8", "FRAME"])
def test_lengths_that_are_not_there_reserve_nothing(code, size):
    content = b"\x80\x05" + getattr(pickle, code) + size.to_bytes(8, "little") + b"abc."
    before = peak()
    assert "cannot be read" in refused(read_pickle, content)
    assert peak() - before < 2**24


def peak():
    "Bytes of memory that the process has had at most."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024


def test_numbers_of_a_million_digits_do_not_take_for_ever():
    assert "cannot be read" in refused(read_pickle, b"I" + b"9"*10**6 + b"\n.")
    number = read_pickle(b"\x80\x02\x8b" + (10**6).to_bytes(4, "little") + b"\x7f"*10**6 + b".")
    assert number.bit_length() == 8*10**6 - 1


def test_deep_data_end_in_data_or_an_error():
    deep = read_pickle(b"\x80\x02" + b"]"*10**5 + b"a"*(10**5 - 1) + b".")
    for _ in range(10**5 - 1): deep, = deep
    assert deep == []
    assert "cannot be read" in refused(read_pickle, b"("*10**6)


LENGTHS = {"1": 1, "4": 4, "8": 8}
PLAIN = dict(uint1=1, uint2=2, int4=4, uint4=4, uint8=8, float8=8)


def argument(op, luck):
    "The argument of an instruction, or something near one."
    kind = op.arg.name if op.arg else ""
    if not kind: return b""
    if "pair" in kind: return luck.choice([b"os\nsystem\n", b"builtins\nset\n", b"collections\nOrderedDict\n"])
    if "nl" in kind: return luck.choice([b"'a'\n", b"1\n", b"0\n", b"1.5\n"])
    if kind in PLAIN: return bytes([luck.randrange(4)]) + bytes(PLAIN[kind] - 1)
    size = luck.choice([0, 1, 3])
    return size.to_bytes(LENGTHS.get(kind[-1], 4), "little") + b"abc"[:size]


def program(luck):
    "Instructions at random, names among them."
    names = [*map(name_of, NETWORKS), name_of("os.system"), name_of("builtins.eval")]
    steps = []
    for _ in range(luck.randint(1, 30)):
        op = luck.choice(pickletools.opcodes)
        steps.append(luck.choice(names) if luck.random() < .2 else op.code.encode("latin-1") + argument(op, luck))
        if luck.random() < .2: steps.append(b")R")
    return b"\x80\x04" + b"".join(steps) + b"."


def programs(seed, n=3000):
    "How many of `n` random programs were read and refused; any other error, warning or system call ends it."
    events, luck, told = [], random.Random(seed), dict(read=0, refused=0)
    b"x".decode("raw-unicode-escape") # Python loads this encoding when it is first used
    sys.addaudithook(lambda event, a: events.append(event))
    for _ in range(n):
        content = program(luck)
        del events[:]
        try: read_pickle(content, NETWORKS)
        except UserError as e:
            told["refused"] += 1
            assert "\n" not in str(e)
        else: told["read"] += 1
        assert not events, (events, content)
    return told


def test_random_programs_build_data_or_are_refused():
    code = "import test_unpickle; print(test_unpickle.programs(0))"
    done = subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(__file__),
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert min(ast.literal_eval(done.stdout).values()) > 20, done.stdout


def test_every_instruction_is_decided():
    "Also one that a later Python may add: it is refused until somebody has looked at it."
    assert set(Reader.dispatch) == {ord(op.code) for op in pickletools.opcodes}
