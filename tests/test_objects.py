"Objects by name: every generator through its files, and the loader of exported ones."
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from synthdet.core import digest, UserError
from synthdet.objects.dmgan import DMGAN, draw, Generator, pictures, TextEncoder
from synthdet.data.domain import Domain
from synthdet.data.domains import load_domain
from synthdet.objects.gan64 import Generator64
from synthdet.objects.generated import weight_files
from synthdet.objects.objects import content, DEFAULTS, has_end, make_objects
from synthdet.objects.settings import Objects, OBJECTS
from synthdet.objects.stylegan2 import Layout, StyleGAN2
from synthdet.objects.stylenet import StyleGAN
from synthdet.weights import save_weights

torch.set_num_threads(1)
NAMES = "<end> a bird with red wings blue and black long beak tail".split()


def lively(net, seed=0):
    "Weights with which every picture shows something."
    g = torch.Generator().manual_seed(seed)
    for name, v in net.state_dict().items():
        if name.endswith("running_var"): v.copy_(torch.rand(v.shape, generator=g) + .5)
        elif v.is_floating_point() and v.ndim > 1: v.copy_(torch.randn(v.shape, generator=g)*1.5/v[0].numel()**.5)
    return net.eval().requires_grad_(False)


class Small(torch.nn.Module):
    "A generator for export."
    def __init__(self): super().__init__(); self.start = torch.nn.Linear(6, 3*16*16)
    def forward(self, z): return torch.tanh(self.start(z)).view(-1, 3, 16, 16)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "A data root with one file of each kind in `weights`."
    weights = (root := tmp_path_factory.mktemp("data"))/"weights"
    torch.manual_seed(0)
    save_weights(Generator64(8, (8,)*5), weights/"gan64_mine.safetensors", nz=8, widths="8 8 8 8 8")
    torch.save(dict(generator_smooth=StyleGAN((8,)*4, (6, 8)).state_dict()), weights/"stylegan_ffhq32.pth")
    torch.save(StyleGAN2(Layout(7, 8, (8,)*4)).state_dict(), weights/"stylegan2_ffhq32.pt")
    torch.save(lively(Generator(gf=4, condition=6, noise=5, text=8)).state_dict(), weights/"bird_DMGAN.pth")
    torch.save(lively(TextEncoder(len(NAMES), embedding=6, hidden=4)).state_dict(), weights/"text_encoder200.pth")
    captions = [[[1, 2]]*10, [[1, k % 11 + 1, 2] + [3, 4, 5]*(k % 3) for k in range(40)], dict(enumerate(NAMES)), {w: i for i, w in enumerate(NAMES)}]
    (weights/"captions.pickle").write_bytes(pickle.dumps(captions, protocol=2))
    torch.jit.trace(Small(), torch.zeros(2, 6)).save(weights/"exported.pt")
    return root


def domain(name, root=None, preset=""): return Domain(name, ("thing",), *[[]]*5, source=str(root or ""), preset=preset)


SIDES = dict(gan64=64, stylegan=32, stylegan2=32, dmgan=256, exported=16)


@pytest.mark.parametrize("name", SIDES)
def test_objects_follow_from_weights_seed_and_number(name, root):
    mine = domain("mine", root)
    objects, again = (make_objects(name, mine, size=300, seed=5) for _ in range(2))
    b = objects.images.block
    ks = [0, b - 1, b, 3*b + 1]
    first, second = [objects[k] for k in ks], [again[k] for k in reversed(ks)][::-1]
    assert all(torch.equal(x.image, y.image) for x, y in zip(first, second)) and [x.origin for x in first] == [f"{name} 5/{k}" for k in ks]
    assert all(x.image.shape == (3, SIDES[name], SIDES[name]) and x.image.dtype == torch.uint8 and x.label == 1 for x in first)
    assert len({x.image.numpy().tobytes() for x in first}) == 4 and not has_end(objects)
    assert not torch.equal(make_objects(name, mine, size=300, seed=6)[0].image, first[0].image)
    counted = make_objects(name, mine, size=300, seed=5, n=b + 1)
    assert len(counted) == b + 1 == sum(1 for _ in counted) and torch.equal(counted[b].image, first[2].image)
    with pytest.raises(IndexError): counted[b + 1]
    assert max(make_objects(name, mine, size=9)[0].image.shape) == 9
    assert digest(content(objects)) == digest(content(again)) != digest(content(counted))


def test_exported_objects_go_through_workers(root):
    objects = make_objects("exported", domain("mine", root), seed=1, n=20)
    expected = torch.stack([o.image for o in objects])
    loader = DataLoader(objects, batch_size=5, num_workers=1, multiprocessing_context="fork", timeout=60)
    assert torch.equal(torch.cat([image for image, *_ in loader]), expected)
    assert torch.equal(pickle.loads(pickle.dumps(objects))[19].image, expected[19])


@pytest.mark.parametrize("name", DEFAULTS)
def test_gan_is_the_domains_own(name, root):
    objects = make_objects("gan", domain(name, root))
    assert objects[0].origin == f"{DEFAULTS[name]} 0/0"
    assert make_objects("gan", domain("mine", root))[0].origin == "gan64 0/0"


def test_the_shipped_generator_is_for_the_drawn_butterflies_alone(root):
    shipped, = weight_files("gan64", load_domain("butterflies"))
    assert shipped.name == "gan64_butterflies.safetensors" and shipped.stat().st_size < 5e6
    assert weight_files("gan64", domain("butterflies", root)) == [root/"weights"/"gan64_mine.safetensors"]
    objects = make_objects("gan", load_domain("butterflies"))
    assert objects[0].image.shape == (3, 64, 64) and not torch.equal(objects[0].image, objects[1].image)


def test_dmgan_draws_captions_at_256(root):
    objects = make_objects("dmgan", domain("birds", root), size=256, seed=2)
    from synthdet.objects.dmgan import load_dmgan
    G = load_dmgan(*weight_files("dmgan", domain("birds", root)))
    assert torch.equal(objects[9].image, pictures(G(**draw(G, range(8, 16), 2))[-1])[1])
    given = make_objects("dmgan", domain("x"), size=256, seed=2, weights=root/"weights")
    assert torch.equal(given[9].image, objects[9].image)


def test_the_bars_of_the_cars_are_cut_off(tmp_path):
    G = StyleGAN((4,)*8, (6, 8))
    for n in ("stylegan_car512.pth", "other.pth"): torch.save(G.state_dict(), tmp_path/n)
    whole = make_objects("stylegan", domain("x"), size=512, weights=tmp_path/"other.pth")[1].image
    for d, n in (("cars", "other.pth"), ("x", "stylegan_car512.pth")):
        image = make_objects("stylegan", domain(d), size=512, weights=tmp_path/n)[1].image
        assert image.shape == (3, 384, 512) and torch.equal(image, whole[:, 64:448])
    assert whole.shape == (3, 512, 512)
    assert make_objects("gan", domain("cars"), size=128, weights=tmp_path/"other.pth")[1].image.shape == (3, 96, 128)


def test_truncation_is_part_of_the_name(root):
    mine = domain("mine", root)
    for name in ("stylegan", "stylegan2"):
        a, b = (make_objects(name, mine, psi=psi) for psi in (1, .5))
        assert not torch.equal(a[0].image, b[0].image) and digest(content(a)) != digest(content(b))


def test_broken_weights_are_told_when_they_show(tmp_path):
    for value in (float("nan"), 0.):
        G = Generator64(8, (8,)*5)
        for p in G.parameters(): p.data.fill_(value)
        save_weights(G, tmp_path/"g.safetensors", nz=8, widths="8 8 8 8 8")
        with pytest.raises(UserError, match="object 0 in one colour"): make_objects("gan64", domain("x"), weights=tmp_path/"g.safetensors")[3]


@pytest.mark.parametrize("name,options,words", [
    ("gan64", dict(weights="nowhere.safetensors"), "nowhere.safetensors does not exist"),
    ("gan", {}, "no weights of gan64 for domain 'x'"),
    ("stylegan", dict(weights="captions.pickle"), "captions.pickle"),
    ("exported", dict(weights="stylegan2_ffhq32.pt"), "holds weights without a program"),
    ("gan64", dict(weights="stylegan_ffhq32.pth"), "stylegan_ffhq32.pth"),
    ("dmgan", dict(weights="bird_DMGAN.pth"), "give their folder"),
    ("real", {}, "no class images"), ("images", {}, "give its path as weights="),
    ("gan", dict(n=2.5), "whole number"), ("gan", dict(size="big"), "whole number of pixels"), ("gans", {}, "choose from real, images, gan"),
])
def test_what_does_not_work_is_told_in_a_line(name, options, words, root):
    if "weights" in options: options = {**options, "weights": str(root/"weights"/options["weights"])}
    with pytest.raises(UserError) as e: make_objects(name, domain("x"), **options)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_todays_callers_go_on():
    butterflies = load_domain("butterflies", n_class_images=3)
    assert [len(make_objects("real", butterflies)), max(make_objects("real", butterflies, size=48)[0].image.shape)] == [3, 48]
    assert len(OBJECTS["real"](butterflies, 32)) == 3
