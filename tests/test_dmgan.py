"DM-GAN: the layout of the released files, the network against plain loops, files and captions that must be refused."
import itertools
import json
import os
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

from synthdet.core import refused
from synthdet.machine import shared
from synthdet.objects.dmgan import draw, load_dmgan, pictures, read_vocabulary, say
from synthdet.objects.dmgannet import DMGAN, Generator, TextEncoder

torch.set_num_threads(1)
SIZES = dict(gf=4, condition=6, noise=5, text=8, blocks=2)
NAMES = "<end> a bird with red wings blue and black long beak tail".split()
CAPTIONS = torch.tensor([[3, 1, 4, 0, 0, 0], [1, 5, 9, 2, 6, 0], [5, 0, 0, 0, 0, 0], [7, 7, 8, 2, 1, 0]])
LENGTHS = torch.tensor([3, 5, 1, 5])


def made(seed=0, words=len(NAMES), **sizes):
    "A network whose parts all matter: statistics, scales and biases are random too."
    g = torch.Generator().manual_seed(seed)
    net = DMGAN(Generator(**{**SIZES, **sizes}), TextEncoder(words, embedding=6, hidden=4))
    for name, v in net.state_dict().items():
        if not v.is_floating_point(): continue
        if name.endswith("running_var"): v.copy_(torch.rand(v.shape, generator=g) + .5)
        elif v.ndim > 1: v.copy_(torch.randn(v.shape, generator=g)*1.5/v[0].numel()**.5)
        else: v.copy_(torch.randn(v.shape, generator=g)*.3 + name.endswith("weight"))
    return net


@pytest.fixture(scope="module")
def net(): return made()


@pytest.fixture(scope="module")
def noise():
    g = torch.Generator().manual_seed(7)
    return torch.randn(4, 5, generator=g), torch.randn(4, 6, generator=g)


@pytest.fixture
def files(net, tmp_path):
    "Paths of generator, text encoder and captions."
    torch.save(net.generator.state_dict(), tmp_path/"G.pth")
    torch.save(net.text_encoder.state_dict(), tmp_path/"E.pth")
    (tmp_path/"captions.pickle").write_bytes(pickle.dumps(vocabulary(), protocol=2))
    return [tmp_path/n for n in ("G.pth", "E.pth", "captions.pickle")]


def vocabulary():
    test = [[1, k % 11 + 1, 2] + [3, 4, 5]*(k % 3) for k in range(40)]
    return [[[1, 2]]*10, test, dict(enumerate(NAMES)), {w: i for i, w in enumerate(NAMES)}]


# The whole network once more, in numpy and with loops, from the paper's equations

def sigmoid(x): return 1/(1 + np.exp(-x))


def relu(x): return np.maximum(x, 0)


def glu(x): return x[:len(x)//2]*sigmoid(x[len(x)//2:])


def norm(s, name, x):
    a, b, m, v = (s[f"{name}.{k}"].reshape(-1, *[1]*(x.ndim - 1))
                  for k in ("weight", "bias", "running_mean", "running_var"))
    return (x - m)/np.sqrt(v + 1e-5)*a + b


def conv(s, name, x):
    w, (c, h, b) = s[f"{name}.weight"], x.shape
    padded = np.zeros((c, h + 2, b + 2)); padded[:, 1:-1, 1:-1] = x
    return sum(np.tensordot(w[:, :, i, j], padded[:, i:i + h, j:j + b], 1) for i in range(3) for j in range(3))


def double(s, name, x): return glu(norm(s, f"{name}.2", conv(s, f"{name}.1", x.repeat(2, 1).repeat(2, 2))))


def read_text(s, ids):
    def direction(ids, suffix):
        w_i, w_h, b_i, b_h = (s[f"rnn.{k}_l0{suffix}"] for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        h = c = np.zeros(w_h.shape[1]); outs = []
        for k in ids:
            i, f, g, o = np.split(w_i @ s["encoder.weight"][k] + b_i + w_h @ h + b_h, 4)
            c = sigmoid(f)*c + sigmoid(i)*np.tanh(g); h = sigmoid(o)*np.tanh(c); outs.append(h)
        return outs
    there, back = direction(ids, ""), direction(ids[::-1], "_reverse")
    return [np.concatenate(p) for p in zip(there, back[::-1])], np.concatenate([there[-1], back[-1]])


def stage(s, h, words, row_mask):
    "One memory stage for one caption; `row_mask(p)` says which words place p must not read."
    dense = lambda name, x: relu(s[f"{name}.0.weight"][:, :, 0] @ x + s[f"{name}.0.bias"])
    avg, keys, values = h.mean((1, 2)), [], []
    for word in words:
        g = sigmoid(s["A.weight"][0] @ word + s["B.weight"][0] @ avg)
        m = g*dense("M_w", word) + (1 - g)*dense("M_r", avg)
        keys.append(dense("key", m)); values.append(dense("value", m))
    new = np.zeros_like(h)
    for p, (y, x) in enumerate(itertools.product(range(h.shape[1]), range(h.shape[2]))):
        e = np.exp([h[:, y, x] @ k for k in keys])*~row_mask(p)
        answer = sum(w*v for w, v in zip(e/e.sum(), values))
        both = np.concatenate([h[:, y, x], answer])
        r = sigmoid(s["response_gate.0.weight"][0, :, 0, 0] @ both + s["response_gate.0.bias"][0])
        new[:, y, x] = (1 - r)*h[:, y, x] + r*answer
    x = np.concatenate([new, new])
    for k in range(len({k.split(".")[1] for k in s if k.startswith("residual.")})):
        b = f"residual.{k}.block"
        x = x + norm(s, f"{b}.4", conv(s, f"{b}.3", glu(norm(s, f"{b}.1", conv(s, f"{b}.0", x)))))
    return double(s, "upsample", x)


def by_hand(net, captions, lengths, z, eps, *, quirk):
    "64 and 128 px of every caption; the third stage is the second one with other weights and sizes."
    state = {k: v.double().numpy() for k, v in net.state_dict().items()}
    s = lambda prefix: {k[len(prefix) + 1:]: v for k, v in state.items() if k.startswith(f"{prefix}.")}
    t, out = int(lengths.max()), []
    padding = captions[:, :t].numpy() == 0
    for n, length in enumerate(lengths.tolist()):
        words, sentence = read_text(s("text_encoder"), captions[n, :length].tolist())
        words += [np.zeros_like(sentence)]*(t - length)
        fc = s("generator.ca_net.fc")
        mu, logvar = np.split(glu(fc["weight"] @ sentence + fc["bias"]), 2)
        first = s("generator.h_net1")
        x = first["fc.0.weight"] @ np.concatenate([mu + np.exp(logvar/2)*eps[n].numpy(), z[n].numpy()])
        x = glu(norm(first, "fc.1", x)).reshape(-1, 4, 4)
        for k in range(4): x = double(first, f"upsample{k + 1}", x)
        h2 = stage(s("generator.h_net2"), x, words, lambda p: padding[(n*64*64 + p) % len(captions) if quirk else n])
        heads = [np.tanh(conv(s(f"generator.img_net{k}.img"), "0", h)) for k, h in ((1, x), (2, h2))]
        third = stage(s("generator.h_net3"), h2[:, :16, :16], words, lambda p: padding[n])
        out.append((*heads, third))
    return out


@pytest.mark.parametrize("quirk", [False, True])
def test_the_network_is_what_the_equations_say(net, noise, quirk):
    images, others = (net(CAPTIONS[:3], LENGTHS[:3], *(x[:3] for x in noise), batch_mask_quirk=q)
                      for q in (quirk, not quirk))
    for n, hand in enumerate(by_hand(net, CAPTIONS[:3], LENGTHS[:3], *noise, quirk=quirk)):
        for a, b in zip(images[:2], hand): assert np.abs(a[n].numpy() - b).max() < 1e-4
    assert images[0].std() > .2 and images[1].std() > .2, "the comparison would see nothing in grey pictures"
    assert (others[1] - images[1]).abs().max() > .05, "nor where the memory is not listened to"


def test_the_third_stage_is_what_the_equations_say(net, noise):
    words, _ = net.text_encoder(CAPTIONS[:3], LENGTHS[:3])
    h = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    padding = CAPTIONS[:3, :5] == 0
    out = net.generator.h_net3(h, words, padding[:, None])
    s = {k: v.double().numpy() for k, v in net.generator.h_net3.state_dict().items()}
    for n in range(3):
        hand = stage(s, h[n].numpy(), list(words[n].T.numpy()), lambda p: padding[n].numpy())
        assert np.abs(out[n].numpy() - hand).max() < 1e-4


def test_a_caption_does_not_depend_on_its_batch(noise):
    net, (z, eps) = made().double(), noise # in float32 another order of sums shows, with weights as lively as these
    images, unsaid = net(CAPTIONS, LENGTHS, z, eps), net(CAPTIONS, LENGTHS, z)
    for order in ([2, 0], [3, 1, 0], [1]):
        for a, b in zip(net(CAPTIONS[order], LENGTHS[order], z[order], eps[order]), images):
            assert torch.allclose(a, b[order], atol=1e-9)
        assert torch.allclose(net(CAPTIONS[order, :5], LENGTHS[order], z[order])[-1], unsaid[-1][order], atol=1e-9)
    same = [1, 3] # of equal length
    for a, b in zip(net(CAPTIONS[same], LENGTHS[same], z[same], eps[same], batch_mask_quirk=True), images):
        assert torch.allclose(a, b[same], atol=1e-9)
    assert (net(CAPTIONS, LENGTHS, z, eps, batch_mask_quirk=True)[-1] - images[-1]).abs().max() > .01


def test_layout_is_that_of_the_released_files():
    if shared() is None: pytest.skip("no reference layout beside the project")
    with torch.device("meta"): nets = dict(netG=Generator(), text_encoder=TextEncoder(5450))
    for name, made in nets.items():
        keys = json.loads((shared()/"spec"/"keys"/f"dmgan_bird_{name}.json").read_text())
        assert [(k, list(v.shape)) for k, v in made.state_dict().items()] == list(keys.items())


def test_the_released_size_runs_end_to_end(tmp_path):
    torch.manual_seed(0)
    torch.save(Generator().state_dict(), tmp_path/"G.pth")
    torch.save({k: v for k, v in TextEncoder(50).state_dict().items()}, tmp_path/"E.pth",
               _use_new_zipfile_serialization=False) # as old as the released ones
    state = torch.get_rng_state()
    G = load_dmgan(tmp_path/"G.pth", tmp_path/"E.pth")
    images = G(torch.tensor([[4, 9, 49, 0]]), [3], torch.randn(1, 100, generator=torch.Generator()))
    assert [tuple(x.shape) for x in images] == [(1, 3, s, s) for s in (64, 128, 256)] and not G.training
    assert torch.equal(state, torch.get_rng_state()) and not any(x.requires_grad for x in (*images, *G.parameters()))


def test_files_of_other_sizes_and_without_counters(net, noise, files, tmp_path):
    for a, b in zip(load_dmgan(*files)(CAPTIONS, LENGTHS, *noise), net(CAPTIONS, LENGTHS, *noise)):
        assert torch.equal(a, b)
    other = made(1, gf=3, blocks=3)
    old = {k: v for k, v in other.generator.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(old, tmp_path/"old.pth")
    loaded = load_dmgan(tmp_path/"old.pth", files[1])
    assert all(torch.equal(v, other.generator.state_dict()[k]) for k, v in loaded.generator.state_dict().items())


CHANGES = [
    ({"ca_net.fc.bias": None}, "'ca_net.fc.bias' is missing (1 missing"),
    ({"h_net2.A.weight": None}, "'h_net2.A.weight' is missing"),
    ({"h_net3.key.0.weight": torch.zeros(3, 3, 1)}, "'h_net3.key.0.weight' is [3, 3, 1]"),
    ({"module.img": torch.zeros(3)}, "'module.img' is unexpected"),
    ({"h_net1.fc.0.weight": torch.zeros(7)}, "does not fit")]


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("change, words", CHANGES)
def test_the_first_key_that_does_not_fit_is_named(net, files, tmp_path, released, change, words):
    state = net.generator.state_dict()
    if released: # of full size, without its weight in memory or on disk
        with torch.device("meta"):
            state = {k: torch.zeros((), device="cpu").expand(v.shape) for k, v in Generator().state_dict().items()}
    torch.save({k: v for k, v in {**state, **change}.items() if v is not None}, tmp_path/"bad.pth")
    told = refused(load_dmgan, tmp_path/"bad.pth", files[1])
    assert words in told and "bad.pth" in told and "\n" not in told


class Touch:
    "Makes a file when it is unpickled by a reader that follows instructions."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


def test_weights_that_must_be_refused(net, files, tmp_path):
    g, e, captions = files
    state = net.generator.state_dict()
    for content, words in (({**state, "x": Touch(tmp_path/"done")}, "mkdir"),
                           ([1, 2], "does not hold a dictionary of tensors"),
                           ({**state, "img_net1.img.0.weight": torch.full((3, 4, 3, 3), torch.inf)},
                            "'img_net1.img.0.weight' holds NaN or infinity")):
        torch.save(content, tmp_path/"bad.pth")
        assert words in refused(load_dmgan, tmp_path/"bad.pth", e)
    (tmp_path/"short.pth").write_bytes(g.read_bytes()[:5000])
    for first, second, words in ((tmp_path/"short.pth", e, "cut short"), (tmp_path/"none.pth", e, "does not exist"),
                                 (g, captions, "captions.pickle"),
                                 (e, g, "E.pth does not fit this network: 'ca_net.fc.weight' is missing"),
                                 (g, g, "G.pth does not fit this network: 'encoder.weight' is missing")):
        assert words in refused(load_dmgan, first, second)
    assert not (tmp_path/"done").exists()
    for reader, words in ((TextEncoder(12, embedding=6, hidden=5), "E2.pth gives 10 numbers per word"),
                          (TextEncoder(13, embedding=6, hidden=4), "has 12 words")):
        torch.save(reader.state_dict(), tmp_path/"E2.pth")
        assert words in refused(load_dmgan, g, tmp_path/"E2.pth", captions)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_vocabularies_that_must_be_refused(tmp_path, protocol):
    path, (train, test, words, ids) = tmp_path/"captions.pickle", vocabulary()
    write = lambda content: path.write_bytes(pickle.dumps(content, protocol=protocol))
    write([train, test, words, ids])
    assert list(read_vocabulary(path)) == [train, test, words, ids]
    whole = path.read_bytes()
    nest = deep = []
    for _ in range(300): nest.append([]); nest = nest[0]
    said = {"is not a vocabulary": [[train, test, words], {1: 2}, [train, tuple(test), words, ids]],
            "mkdir": [[train, test, words, {**ids, "x": Touch(tmp_path/"done")}]],
            "print": [[train, test, {0: print}, ids]],
            "test caption 40 is [1, 12]": [[train, [*test, [1, 12]], words, ids]],
            "train caption 1 is []": [[[[1], []], test, words, ids]],
            "do not mirror": [[train, test, {**words, 3: "of"}, ids],
                              [train, test, {**words, 99: "of"}, {**ids, "of": 99}],
                              [train, test, {}, {}], [train, test, {**words, 3: [1]}, ids]],
            "refuse" if protocol in (0, 2) else "mirror": [[train, test, {**words, 3: b"of"}, {**ids, "of": 3}]],
            "test caption 0": [[train, [odd], words, ids] for odd in ([1, "a"], [True], 5, deep)]}
    for word, contents in said.items():
        for content in contents:
            write(content)
            assert word in refused(read_vocabulary, path)
    for n in (0, 1, 20, len(whole)//2, len(whole) - 1):
        path.write_bytes(whole[:n])
        assert "cut short" in refused(read_vocabulary, path)
    assert "does not exist" in refused(read_vocabulary, tmp_path/"none.pickle")
    assert not (tmp_path/"done").exists()


def test_a_vocabulary_written_by_python_2(tmp_path):
    "Its texts are bytes: opcodes U (short) and T."
    short = lambda w: b"U" + bytes([len(w)]) + w
    content = (b"\x80\x02]q\x00(]q\x01]q\x02K\x01aa]q\x03](K\x01K\x02eae}q\x04("
               + b"K\x00" + short(b"<end>") + b"K\x01" + short(b"bird") + b"K\x02T" + struct.pack("<i", 4)
               + b"ros\xe9u}q\x05("
               + short(b"<end>") + b"K\x00" + short(b"bird") + b"K\x01" + short(b"ros\xe9") + b"K\x02u")
    content = content.replace(b"]q\x03](K\x01K\x02eae", b"]q\x03](K\x01K\x02ea") + b"e."
    (tmp_path/"captions.pickle").write_bytes(content)
    words, ids = {0: "<end>", 1: "bird", 2: "rosé"}, {"<end>": 0, "bird": 1, "rosé": 2}
    assert list(read_vocabulary(tmp_path/"captions.pickle")) == [[[1]], [[1, 2]], words, ids]


def test_captions_and_noise_are_looked_at(net, noise):
    "What is wrong with captions is told in the notebook, what with noise in that of stylenet."
    z, eps = noise
    for given, word in (((CAPTIONS, LENGTHS, z[:3], eps), "z has 3 rows, expected 4"),
                        ((CAPTIONS, LENGTHS, z, eps[:, :5]), "eps is [4, 5]"),
                        ((CAPTIONS, LENGTHS, z, eps/0), "eps holds NaN"),
                        ((CAPTIONS - 1, LENGTHS, z), "caption 0 does not fit"),
                        ((CAPTIONS, None, z), "cannot be made tensors"), ((CAPTIONS[:0], LENGTHS[:0], z), "[0, 6]")):
        assert word in refused(net, *given)
    assert len(net(CAPTIONS, [3, 6, 1, 5], z, eps)) == 3, "0 within a caption is read as the word it is"


def test_objects_belong_to_seed_and_number(files):
    G = load_dmgan(*files)
    first, again = draw(G, range(12), seed=3), draw(G, [11, 4], seed=3)
    for j, k in enumerate((11, 4)):
        length = again["lengths"][j]
        assert length == first["lengths"][k]
        assert torch.equal(again["captions"][j, :length], first["captions"][k, :length])
        assert torch.equal(again["z"][j], first["z"][k]) and torch.equal(again["eps"][j], first["eps"][k])
    assert len({tuple(z.tolist()) for z in first["z"]}) == 12
    assert pictures(G(**again)[-1]).shape == (2, 3, 256, 256)
    code = ("import sys, hashlib, torch; from synthdet.objects.dmgan import *; "
            "G = load_dmgan(*sys.argv[1:]); torch.manual_seed(9)\n"
            "d = {**draw(G, range(12), seed=3)}; "
            "print(hashlib.sha256(b''.join(d[k].numpy().tobytes() for k in sorted(d))).hexdigest())")
    import hashlib
    done = subprocess.run([sys.executable, "-c", code, *map(str, files)], capture_output=True, text=True,
                          check=True, timeout=300)
    ours = hashlib.sha256(b"".join(first[k].numpy().tobytes() for k in sorted(first))).hexdigest()
    assert done.stdout.strip() == ours, "another process draws the same"


def test_sentences(files):
    G = load_dmgan(*files)
    with pytest.warns(UserWarning, match="left out: small"):
        asked = say(G, ["A small BIRD, with red wings!", "beak"], seed=1)
    assert asked["captions"].tolist() == [[1, 2, 3, 4, 5], [10, 0, 0, 0, 0]] and asked["lengths"].tolist() == [5, 1]
    assert len(G(**asked)) == 3
    assert "no word that the vocabulary knows" in refused(say, G, ["größe"])
