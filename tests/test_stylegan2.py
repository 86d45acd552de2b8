"StyleGAN2-ADA's files: what a hostile or damaged one can do (nothing), and the network against its equations."
import builtins
import collections
import io
import json
import math
import os
import pickle
import random
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import Call
from synthdet.core import UserError
from synthdet.machine import shared
from synthdet.objects.stylegan2 import _double, _layout_of_arguments, Conv, load_stylegan2, StyleGAN2
from synthdet.checkpoint import NETWORKS, TENSORS
from synthdet.unpickle import read_pickle

torch.set_num_threads(1)


# Files as NVIDIA's scripts write them

class EasyDict(dict):
    "As dnnlib.util has it."


class Network:
    "Stands for the networks of the TensorFlow files."


def _reconstruct_persistent_obj(meta):
    "What the stock reader does."
    exec(meta["module_src"], {})


PLACES = {"torch_utils.persistence": _reconstruct_persistent_obj, "dnnlib.util": EasyDict,
          "dnnlib.tflib.network": Network}


def dumps(x, protocol=4):
    "A pickle that refers to NVIDIA's modules, which exist only while it is written."
    try:
        for place, thing in PLACES.items():
            parts = place.split(".")
            for n in range(1, len(parts) + 1):
                sys.modules.setdefault(".".join(parts[:n]), types.ModuleType(".".join(parts[:n])))
            thing.__module__ = place
            setattr(sys.modules[place], thing.__name__, thing)
        return pickle.dumps(x, protocol)
    finally:
        for name in [m for m in sys.modules if m.split(".")[0] in ("torch_utils", "dnnlib")]: del sys.modules[name]


class Stored:
    "A module as NVIDIA's persistence pickles it."
    def __init__(self, module, source="", **attributes):
        hooks = {k: collections.OrderedDict() for k in ("_forward_hooks", "_backward_hooks", "_state_dict_hooks")}
        inner = collections.OrderedDict((k, Stored(m, source)) for k, m in module.named_children())
        self.source = source
        self.state = dict(training=False, _parameters=collections.OrderedDict(module._parameters),
                          _buffers=collections.OrderedDict(module._buffers), _non_persistent_buffers_set=set(),
                          _modules=inner, weight_gain=np.float64(.5), act_gain=np.sqrt(2), up=1, _init_args=(),
                          **{"_init_kwargs": EasyDict(), **attributes}, **hooks)

    def __reduce__(self):
        meta = EasyDict(type="class", version=6, module_src=self.source, class_name="Generator", state=self.state)
        return _reconstruct_persistent_obj, (meta,)


def small(architecture="skip", c_dim=0, clamp=None, **more):
    "A generator with random weights, all of which matter, and its arguments."
    kwargs = dict(z_dim=7, c_dim=c_dim, w_dim=9, img_resolution=32, img_channels=3,
                  mapping_kwargs=EasyDict(num_layers=3, layer_features=11, embed_features=5),
                  synthesis_kwargs=EasyDict(channel_base=128, channel_max=12, num_fp16_res=4, conv_clamp=clamp,
                                            architecture=architecture, **more))
    G, g = StyleGAN2(_layout_of_arguments(dict(_init_kwargs=kwargs))), torch.Generator().manual_seed(0)
    for k, v in G.state_dict().items():
        if not k.endswith("resample_filter"): v.copy_(torch.randn(v.shape, generator=g)*(100 if ".fc" in k else 1))
    return G, kwargs


def nvidia(G, kwargs, source=""):
    stored = Stored(G, source, _init_kwargs=EasyDict(kwargs))
    return dumps(dict(training_set_kwargs=EasyDict(class_name="training.dataset.ImageFolderDataset"), G=stored,
                      D=Stored(torch.nn.Linear(2, 2), source), G_ema=stored, augment_pipe=None))


def told(f, *arguments):
    "The one line of the UserError."
    with pytest.raises(UserError) as e: f(*arguments)
    assert "\n" not in str(e.value)
    return str(e.value)


# The network again, in double precision, from the equations: weights per sample, zeros inserted, one sample at a time

def fir(x, f, up, before, after):
    C, H, W = x.shape
    z = x.new_zeros(C, H*up + before + after, W*up + before + after)
    z[:, before:before + H*up:up, before:before + W*up:up] = x
    return F.conv2d(z[:, None], f.flip(0, 1)[None, None]*up**2)[:, 0]


def dense(s, name, x, lr=1., lrelu=False):
    x = s[name + ".weight"]*lr/math.sqrt(len(x)) @ x + s[name + ".bias"]*lr
    return torch.where(x > 0, x, .2*x)*math.sqrt(2) if lrelu else x


def unit(x): return x/(x.square().mean() + 1e-8).sqrt()


def layer(s, name, x, w, up, noise, gain, clamp):
    weight = s[name + ".weight"]*dense(s, name + ".affine", w)[None, :, None, None]
    weight = weight/(weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
    if up:
        x = F.conv_transpose2d(x[None], weight.transpose(0, 1), stride=2)[0]
        x = fir(x, s[name + ".resample_filter"]*4, 1, 1, 1)
    else: x = F.conv2d(x[None], weight, padding=1)[0]
    if noise: x = x + s[name + ".noise_const"]*s[name + ".noise_strength"]
    x = x + s[name + ".bias"][:, None, None]
    x = torch.where(x > 0, x, .2*x)*math.sqrt(2)*gain
    return x if clamp is None else x.clamp(-clamp*gain, clamp*gain)


def reference(s, z, c, psi, cutoff, architecture, clamp, noise=True, lr=.01):
    "One picture."
    x = unit(z)
    if c is not None: x = torch.cat([x, unit(dense(s, "mapping.embed", c))])
    for k in range(3): x = dense(s, f"mapping.fc{k}", x, lr, True)
    ws = [s["mapping.w_avg"] + psi*(x - s["mapping.w_avg"]) if cutoff is None or i < cutoff else x for i in range(8)]
    image, at = None, 0
    for r in (4, 8, 16, 32):
        b, root = f"synthesis.b{r}.", math.sqrt(.5)
        f = s[b + "resample_filter"]
        if r == 4: x = layer(s, b + "conv1", s[b + "const"], ws[at], False, noise, 1, clamp); at += 1
        else:
            h = layer(s, b + "conv0", x, ws[at], True, noise, 1, clamp)
            h = layer(s, b + "conv1", h, ws[at + 1], False, noise, root if architecture == "resnet" else 1, clamp)
            if architecture == "resnet":
                skip = s[b + "skip.weight"][..., 0, 0]/math.sqrt(len(x))
                h = h + root*fir(torch.einsum("oi,ihw->ohw", skip, x), f, 2, 2, 1)
            x, at = h, at + 2
        if architecture == "skip" or r == 32:
            style = dense(s, b + "torgb.affine", ws[at])/math.sqrt(len(x))
            y = torch.einsum("oi,ihw->ohw", s[b + "torgb.weight"][..., 0, 0]*style, x)
            y = y + s[b + "torgb.bias"][:, None, None]
            if clamp is not None: y = y.clamp(-clamp, clamp)
            image = y if image is None else fir(image, f, 2, 2, 1) + y
    return image


@pytest.mark.parametrize("clamp", [None, 1.5])
@pytest.mark.parametrize("c_dim", [0, 4])
@pytest.mark.parametrize("architecture", ["skip", "orig", "resnet"])
def test_pictures_are_those_of_the_equations(tmp_path, architecture, c_dim, clamp):
    G, kwargs = small(architecture, c_dim, clamp)
    (tmp_path/"net.pkl").write_bytes(nvidia(G, kwargs))
    torch.save(G.state_dict(), tmp_path/"net.pt")
    loaded, plain = load_stylegan2(tmp_path/"net.pkl"), load_stylegan2(tmp_path/"net.pt", conv_clamp=clamp)
    g = torch.Generator().manual_seed(1)
    z, c = torch.randn(3, 7, generator=g), torch.eye(4)[[0, 2, 2]] if c_dim else None
    s = {k: v.double() for k, v in G.state_dict().items()}
    for psi, cutoff, noise in ((1, None, "const"), (.6, None, "none"), (.3, 3, "const"), (0, 5, "none")):
        expected = torch.stack([reference(s, z[i].double(), None if c is None else c[i].double(), psi, cutoff,
                                          architecture, clamp, noise == "const") for i in range(3)])
        got = loaded(z, c, psi, cutoff, noise)
        assert expected.std() > .1 and (got - expected).abs().max() < 1e-4*max(1, expected.abs().max())
        assert torch.equal(got, plain(z, c, psi=psi, cutoff=cutoff, noise=noise))
        assert torch.equal(got, loaded.synthesis(loaded.mapping(z, c, psi, cutoff), noise))


def test_the_bound_and_the_options_matter(tmp_path):
    z = torch.randn(1, 7, generator=torch.Generator().manual_seed(2))
    G, H = small(clamp=None)[0], small(clamp=1.5)[0]
    assert not torch.allclose(G(z), H(z)) and not torch.allclose(G(z), small(activation="relu")[0](z))
    silent, kwargs = small(use_noise=False)
    (tmp_path/"net.pkl").write_bytes(nvidia(silent, kwargs))
    torch.save(silent.state_dict(), tmp_path/"net.pth")
    assert torch.equal(load_stylegan2(tmp_path/"net.pkl")(z), load_stylegan2(tmp_path/"net.pth")(z))
    odd, kwargs = small(resample_filter=[1, 2, 1])
    (tmp_path/"net.pkl").write_bytes(nvidia(odd, kwargs))
    torch.save(odd.state_dict(), tmp_path/"net.pth")
    assert torch.equal(load_stylegan2(tmp_path/"net.pkl")(z), load_stylegan2(tmp_path/"net.pth")(z))
    assert odd(z).shape == (1, 3, 32, 32)


def test_early_pictures_are_the_sums_so_far():
    G, _ = small()
    z = torch.randn(2, 7)
    for m in ("b16", "b32"):
        torgb = getattr(G.synthesis, m).torgb
        torgb.weight.zero_(); torgb.bias.zero_()
    early = _double(G(z, resolution=8), G.synthesis.b16.resample_filter)
    assert torch.allclose(_double(early, G.synthesis.b32.resample_filter), G(z), atol=1e-5)


@pytest.mark.parametrize("name, more", [
    ("ffhq_1024", dict(img_resolution=1024)), ("512_channelbase32768", dict(img_resolution=512)),
    ("paper256", dict(img_resolution=256, synthesis_kwargs=dict(channel_base=16384)))])
def test_layouts_are_the_released_ones(name, more):
    if shared() is None: pytest.skip("the lists of names are not here")
    listed = json.loads((shared()/f"spec/keys/sg2ada_{name}.json").read_text())
    given = dict(z_dim=512, c_dim=0, w_dim=512, img_channels=3, **more)
    with torch.device("meta"): G = StyleGAN2(_layout_of_arguments(dict(_init_kwargs=given)))
    assert [(k, list(v.shape)) for k, v in G.state_dict().items()] == list(listed.items())


# What a file may not do

class Nested:
    "Asks for storage made of `content`."
    def __init__(self, content): self.content = content
    def __reduce__(self): return torch.storage._load_from_bytes, (self.content,)


class Elsewhere(pickle.Pickler):
    "Refers to text by persistent ids."
    def persistent_id(self, x): return "here" if x == "elsewhere" else None


def hostile(marker):
    "Name -> (pickle, the word its message must hold)."
    G, kwargs = small()
    touch, legacy, zipped, elsewhere = f"open({str(marker)!r}, 'w')", io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(Call(os.system, f"touch {marker}"), legacy, _use_new_zipfile_serialization=False)
    torch.save([Call(eval, touch)], zipped)
    Elsewhere(elsewhere, 4).dump(dict(G_ema="elsewhere"))
    system = f"{os.name}.system"
    inside = Stored(G, _init_kwargs=EasyDict(kwargs))
    inside.state["_modules"]["mapping"].state["weight_gain"] = Call(os.system, f"touch {marker}")
    return dict(system=(dumps(dict(G_ema=Call(os.system, f"touch {marker}"))), system),
                eval=(dumps(Call(eval, touch)), "builtins.eval"), exec=(dumps([Call(exec, touch)], 0), "builtins.exec"),
                inside=(dumps(dict(G_ema=inside)), system), nested=(dumps(dict(D=Nested(legacy.getvalue()))), system),
                zipped=(dumps(dict(G_ema=Nested(zipped.getvalue()))), "builtins.eval"),
                attribute=(dumps(dict(a=Call(builtins.getattr, 1, "real"))), "builtins.getattr"),
                persistent=(elsewhere.getvalue(), "persistent id"),
                loads=(dumps(Call(pickle.loads, dumps(Call(eval, touch)))), "_pickle.loads"),
                load=(dumps(Call(torch.load, "x")), "torch.serialization.load"),
                inst=(b"(S'touch %b'\nios\nsystem\n." % str(marker).encode(), "os.system"),
                tensorflow=(dumps((Network(),)*3), "TensorFlow"), extension=(b"\x80\x02\x82\x01.", "EXT1"),
                list=(dumps([]), "holds no network"),
                own=(b"\x80\x04\x8c\x1asynthdet.objects.stylegan2\x8c\x0eload_stylegan2\x93)R.",
                     "synthdet.objects.stylegan2.load_stylegan2"),
                dotted=(b"\x80\x04\x8c\x0etorch_utils\n.x\x8c\x01y\x93.", "torch_utils?.x.y"),
                page=(b"<html>Too many users</html>", "cannot be read"), empty=(b"", "cannot be read"))


def test_nothing_is_executed(tmp_path):
    for name, (content, word) in hostile(tmp_path/"marker").items():
        path = tmp_path/f"{name}.pkl"
        path.write_bytes(content)
        assert word in told(load_stylegan2, path), name
        path.with_suffix(".pt").write_bytes(content)
        told(load_stylegan2, path.with_suffix(".pt"))
    assert not (tmp_path/"marker").exists()
    pickle.loads(hostile(tmp_path/"marker")["eval"][0])
    assert (tmp_path/"marker").exists(), "Python's own reader does run them"


def test_embedded_source_is_not_executed_and_nothing_is_imported(tmp_path):
    marker = tmp_path/"marker"
    path = tmp_path/"net.pkl"
    path.write_bytes(nvidia(*small(), source=f"open({str(marker)!r}, 'w')"))
    theirs = (f"open({str(marker)!r}, 'w')\nclass EasyDict(dict): pass\n"
              "def _reconstruct_persistent_obj(meta): exec(meta['module_src'])")
    for place in ("torch_utils/persistence.py", "dnnlib/util.py"): # importable here, and would leave the marker too
        (tmp_path/place).parent.mkdir()
        for file in (tmp_path/place, (tmp_path/place).parent/"__init__.py"): file.write_text(theirs)
    code = ("import sys, torch; torch.set_num_threads(1); from synthdet.objects.stylegan2 import load_stylegan2\n"
            "before = set(sys.modules)\nexecuted = []; sys.addaudithook(lambda event, a: executed.append(event) "
            "if event in ('exec', 'compile', 'os.system', 'subprocess.Popen') else None)\n"
            f"G = load_stylegan2({str(path)!r})\nnew = set(sys.modules) - before\n"
            "assert G(torch.zeros(1, 7) + 1).shape == (1, 3, 32, 32) "
            "and not {m.split('.')[0] for m in new} & {'torch_utils', 'dnnlib'}, new\n"
            "assert 'os.system' not in executed and 'subprocess.Popen' not in executed, executed\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], cwd=tmp_path, env=env,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and not marker.exists()


def test_a_name_on_the_list_is_not_a_way_in():
    "Stand-ins cannot be changed, taken apart or handed to each other."
    def op(text): return b"\x8c" + bytes([len(text)]) + text
    name = op(b"torch._utils") + op(b"_rebuild_parameter") + b"\x93"
    for content in (name + b"}" + op(b"__globals__") + b"Ksb.", name + b"}b.",
                    name + b"N}" + op(b"__code__") + b"K\x01s\x86b.",
                    op(b"torch.storage") + op(b"_load_from_bytes") + b"\x93" + name + b"\x85R.",
                    name + name + b"R.", b"K\x01)R.", name + b")" + b"\x81.", b"]" + name + b"b.",
                    op(b"torch.storage") + op(b"_load_from_bytes.__globals__") + b"\x93."):
        assert "cannot be read" in told(read_pickle, b"\x80\x04" + content, NETWORKS)
    kept = dict(TENSORS)
    assert torch.equal(read_pickle(dumps(torch.ones(2)), TENSORS), torch.ones(2)) and kept == TENSORS


def test_a_module_within_itself_is_refused(tmp_path):
    def op(text): return b"\x8c" + bytes([len(text)]) + text
    call = op(b"torch_utils.persistence") + op(b"_reconstruct_persistent_obj") + b"\x93"
    # state = {}; network = call({'state': state}); state['_modules'] = {'m': network}; {'G_ema': network}
    content = (b"\x80\x04}\x94" + call + b"}" + op(b"state") + b"h\x00s\x85R\x94" + b"0" + op(b"_modules")
               + b"}" + op(b"m") + b"h\x01ss" + b"0}" + op(b"G_ema") + b"h\x01s.")
    (tmp_path/"net.pkl").write_bytes(content)
    assert "occurs twice" in told(load_stylegan2, tmp_path/"net.pkl")


def test_truncated_files(tmp_path):
    whole, path = nvidia(*small()), tmp_path/"net.pkl"
    for part in [0, 1, 2, 3, 11, 100, *(int(len(whole)*k/40) for k in range(1, 40)), len(whole) - 2, len(whole) - 1]:
        path.write_bytes(whole[:part])
        assert "cannot be read" in told(load_stylegan2, path), part
    assert "does not exist" in told(load_stylegan2, tmp_path/"nowhere.pkl")
    assert "not a regular file" in told(load_stylegan2, tmp_path)


def test_damaged_files(tmp_path):
    "Whatever the damage: a generator or a UserError."
    whole, path, luck, outcome = nvidia(*small()), tmp_path/"net.pkl", random.Random(0), collections.Counter()
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(luck.randint(1, 3)):
            i = luck.randrange(len(content))
            content[i:i + luck.randint(0, 2)] = bytes(luck.randrange(256) for _ in range(luck.randint(0, 2)))
        path.write_bytes(content)
        try: load_stylegan2(path); outcome["read"] += 1
        except UserError as e: assert "\n" not in str(e); outcome["refused"] += 1
    assert min(outcome["read"], outcome["refused"]) > 10, outcome


@pytest.mark.parametrize("change, word", [
    (dict(img_resolution=64), "synthesis.b64"), (dict(img_resolution=33), "img_resolution"),
    (dict(z_dim=8), "mapping.fc0.weight"), (dict(w_dim=2**40), "w_dim"), (dict(c_dim=4), "mapping.embed"),
    (dict(img_channels=4), "torgb.weight"), (dict(synthesis_kwargs=dict(architecture="resnet")), "synthesis.b8.skip"),
    (dict(synthesis_kwargs=dict(architecture="mine")), "architecture"),
    (dict(synthesis_kwargs=dict(margin_size=10)), "margin_size"),
    (dict(mapping_kwargs=dict(num_layers=9)), "mapping.fc3"),
    (dict(mapping_kwargs=dict(activation="sine")), "activation"),
    (dict(synthesis_kwargs=None, mapping_kwargs=None), "mapping.fc3")])
def test_arguments_that_do_not_fit(tmp_path, change, word):
    G, kwargs = small()
    change = {k: {**kwargs[k], **v} if isinstance(v, dict) else v for k, v in change.items()}
    (tmp_path/"net.pkl").write_bytes(nvidia(G, {**kwargs, **change}))
    message = told(load_stylegan2, tmp_path/"net.pkl")
    assert word in message and "net.pkl" in message, message


def test_every_entry_is_needed(tmp_path):
    G, kwargs = small("resnet", 3)
    state, path = G.state_dict(), tmp_path/"net.pt"
    for k in list(state)[::2]:
        torch.save({n: v for n, v in state.items() if n != k}, path)
        if k.endswith("skip.resample_filter"): load_stylegan2(path)
        else: assert f"'{k}' is missing" in told(load_stylegan2, path), k
        torch.save({**state, k: torch.cat([state[k]]*2) if state[k].ndim else state[k][None]}, path)
        assert f"'{k.rsplit('.', 1)[0]}." in told(load_stylegan2, path), k
    torch.save({**state, "synthesis.b8.more": torch.ones(1)}, path)
    assert "'synthesis.b8.more' is unexpected" in told(load_stylegan2, path)
    for odd in ({}, {"a": torch.ones(1)}, [1], {"mapping.fc0.weight": torch.ones(())},
                {**state, "mapping.w_avg": state["mapping.w_avg"]*math.nan}):
        torch.save(odd, path)
        told(load_stylegan2, path)


def test_noise_in_the_file_belongs_to_the_layer_it_lies_beside():
    G, _ = small()
    z = torch.randn(1, 7)
    full = G(z)
    for m in G.synthesis.modules():
        if not isinstance(m, Conv): continue
        before = m.noise_const.clone()
        m.noise_const.zero_()
        assert not torch.allclose(G(z), full, atol=1e-3)
        m.noise_const.copy_(before)
    assert torch.equal(G(z), full)
