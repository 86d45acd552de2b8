"Every entry of OBJECTS: what it takes, what it gives, what it refuses; with weights that nobody trained."
import pickle

import pytest
import torch

from synthdet.core import digest, named, refused
from synthdet.paths import hash_file
from synthdet.data.domain import ClassImage, Domain
from synthdet.data.domains import load_domain
from synthdet.data.images import write_image
from synthdet.data.settings import Labels
from synthdet.objects.dmgannet import Generator, TextEncoder
from synthdet.objects.gan64 import Generator64
from synthdet.objects.objects import has_end, make_objects, resolved
from synthdet.objects.settings import DEFAULTS, FILES, LABELLED, OBJECTS, Objects, TRUNCATED, weight_files
from synthdet.objects.stylegan2 import Layout, StyleGAN2
from synthdet.objects.stylenet import StyleGAN
from synthdet.weights import save_weights

torch.set_num_threads(1)
WORDS = "<end> a bird with red wings blue and black long beak tail".split()
SIDES = dict(gan64=64, stylegan=32, stylegan2=32, dmgan=256, exported=16, gan=64)
FINITE = [s for s in OBJECTS if s not in SIDES]
COUNTED = [s for s in OBJECTS if s not in LABELLED]  # of which the first n can be asked for
PICTURES = [ClassImage(torch.randint(0, 256, (3, 30 + k, 40), dtype=torch.uint8), 1, f"{k}.png") for k in range(6)]


def lively(net, seed=0):
    "Weights with which every picture shows something."
    g = torch.Generator().manual_seed(seed)
    for name, v in net.state_dict().items():
        if name.endswith("running_var"): v.copy_(torch.rand(v.shape, generator=g) + .5)
        elif v.is_floating_point() and v.ndim > 1: v.copy_(torch.randn(v.shape, generator=g)*1.5/v[0].numel()**.5)
    return net.eval().requires_grad_(False)


class Small(torch.nn.Module):
    "A generator for export."
    def __init__(self):
        super().__init__()
        self.start = torch.nn.Linear(6, 3*16*16)

    def forward(self, z): return torch.tanh(self.start(z)).view(-1, 3, 16, 16)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "A data root with class images, pictures in `generated` and one file of each kind in `weights`."
    root = tmp_path_factory.mktemp("data")
    weights = root/"weights"
    torch.manual_seed(0)
    save_weights(Generator64(8, (8,)*5), weights/"gan64_mine.safetensors", nz=8, widths=(8,)*5)
    stylegan, stylegan2 = StyleGAN((8,)*4, (6, 8)), StyleGAN2(Layout(7, 8, (8,)*4))
    stylegan.truncation.w_avg.normal_(), stylegan2.mapping.w_avg.normal_()
    torch.save(dict(generator_smooth=stylegan.state_dict()), weights/"stylegan_ffhq32.pth")
    torch.save(stylegan2.state_dict(), weights/"stylegan2_ffhq32.pt")
    torch.save(lively(Generator(gf=4, condition=6, noise=5, text=8)).state_dict(), weights/"bird_DMGAN.pth")
    torch.save(lively(TextEncoder(len(WORDS), embedding=6, hidden=4)).state_dict(), weights/"text_encoder200.pth")
    test = [[1, k % 11 + 1, 2] + [3, 4, 5]*(k % 3) for k in range(40)]
    captions = [[[1, 2]]*10, test, dict(enumerate(WORDS)), {w: i for i, w in enumerate(WORDS)}]
    (weights/"captions.pickle").write_bytes(pickle.dumps(captions, protocol=2))
    torch.jit.trace(Small(), torch.zeros(2, 6)).save(weights/"exported.pt")
    for x in PICTURES: write_image(root/"generated"/x.origin, x.image)
    return root


def labelled(x):
    "A labelled image that shows one object and nothing else."
    h, w = x.image.shape[1:]
    return x.image, {"boxes": torch.tensor([[0., 0, w, h]]), "labels": torch.tensor([1])}


def domain(root="", classes=("thing",), preset=""):
    train = [labelled(x) for x in PICTURES]
    return Domain("mine", classes, PICTURES, [], train, [], [], source=str(root), preset=preset)


@pytest.mark.parametrize("source", OBJECTS)
def test_settings_in_class_images_out(source, root):
    objects = make_objects(Objects(source, size=300), domain(root), 5, Labels(n_real=0, order="first"))
    side = SIDES.get(source)
    for k in (0, 5):
        image, label, origin = objects[k][:3]
        assert image.dtype == torch.uint8 and label == 1 and isinstance(origin, str)
        assert tuple(image.shape) == ((3, side, side) if side else PICTURES[k].image.shape)
    assert has_end(objects) == (source in FINITE) and digest(objects.content)
    assert max(make_objects(Objects(source, size=9), domain(root), 5, Labels(n_real=0))[0].image.shape) == 9


@pytest.mark.parametrize("source", COUNTED)
def test_the_first_n_are_a_sequence_with_an_end(source, root):
    objects, first = (make_objects(Objects(source, n_objects=n), domain(root)) for n in (0, 3))
    assert len(first) == 3 == sum(1 for _ in first) and digest(first.content) != digest(objects.content)
    assert all(torch.equal(x.image, objects[k].image) for k, x in enumerate(first))
    assert torch.equal(first[-1].image, first[2].image)
    with pytest.raises(IndexError): first[3]


@pytest.mark.parametrize("source", [s for s in COUNTED if s in FINITE])
def test_pictures_that_are_there_have_a_length_and_no_seed(source, root):
    a, b = (make_objects(source, domain(root), seed=s) for s in (0, 1))
    assert len(a) == 6 and all(torch.equal(x.image, y.image) for x, y in zip(a, b))
    assert digest(a.content) == digest(b.content)
    told = refused(make_objects, Objects(source, n_objects=7), domain(root))
    assert "there are 6 class images and n_objects=7" in told
    assert f"objects={source} takes no psi=0.0" in refused(make_objects, Objects(source, psi=0), domain(root))


@pytest.mark.parametrize("source", SIDES)
def test_generators_draw_from_weights_seed_and_number(source, root):
    mine = domain(root)
    objects, again, other = (make_objects(source, mine, seed=s) for s in (5, 5, 6))
    with pytest.raises(TypeError): len(objects)
    b, kind = objects.images.block, resolved(Objects(source), mine).source
    ks = [0, b - 1, b, 3*b + 1]
    first, second = [objects[k] for k in ks], [again[k] for k in reversed(ks)][::-1]
    assert all(torch.equal(x.image, y.image) for x, y in zip(first, second))
    assert [x.origin for x in first] == [f"{kind} 5/{k}" for k in ks]
    assert len({x.image.numpy().tobytes() for x in [*first, other[0]]}) == 5
    assert digest(objects.content) == digest(again.content) != digest(other.content)
    hashes = [hash_file(f) for f in weight_files(kind, mine)]
    assert hashes in objects.images.key, "named by what is in its files, not by where they lie"


@pytest.mark.parametrize("source", SIDES)
def test_generators_refuse_what_they_cannot_do(source, root, tmp_path):
    name = resolved(Objects(source), domain(root)).source
    files = f"{name} for domain 'mine' needs {FILES[name][0]}"
    advice = "give a path as objects.weights=, or ask for objects=real"
    for told in (refused(make_objects, source, domain(tmp_path)), refused(make_objects, source, domain())):
        assert files in told and told.endswith(advice) and "\n" not in told
    assert "draws one class, domain 'mine' has 2" in refused(make_objects, source, domain(root, ("a", "b")))
    if name not in TRUNCATED:
        assert f"leave it out for {name}" in refused(make_objects, Objects(source, psi=.7), domain(root))


@pytest.mark.parametrize("source", TRUNCATED)
def test_psi_is_kept_whatever_it_is(source, root):
    "Psi 0 is the average picture for any noise; it once became 1 on the way."
    drawn = {psi: make_objects(Objects(source, psi=psi), domain(root)) for psi in (0, .5, 1)}
    images = {psi: [x[k].image.float() for k in range(3)] for psi, x in drawn.items()}
    spread = {psi: (v[0] - v[2]).abs().mean() for psi, v in images.items()}
    assert spread[0] < 1 < spread[.5] < spread[1] and len({digest(x.content) for x in drawn.values()}) == 3


@pytest.mark.parametrize("preset", [*DEFAULTS, "qrcodes", ""])
def test_gan_is_the_papers_generator_of_a_preset(preset, root):
    kind = DEFAULTS.get(preset, "gan64")
    objects = make_objects("gan", domain(root, preset=preset))
    assert objects[0].origin == f"{kind} 0/0"
    assert digest(objects.content) == digest(make_objects(kind, domain(root, preset=preset)).content)


def test_a_source_of_ones_own_is_one_more_entry(root, monkeypatch):
    monkeypatch.setitem(OBJECTS, "first three", lambda objects, domain, seed: domain.class_images[:3])
    assert len(make_objects("first three", domain())) == 3 and Objects("first three").size == 128
    assert all(callable(named("objects", source, OBJECTS)) for source in OBJECTS)


class Data(torch.utils.data.Dataset):
    "A data set of pictures."
    def __init__(self, items): self.items = items
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]


TENSORS = [x.image for x in PICTURES]


@pytest.mark.parametrize("given", [
    PICTURES, tuple(PICTURES), TENSORS, Data(PICTURES), Data(TENSORS), [tuple(x) for x in PICTURES],
    [torch.cat([x, x[:1]]) for x in TENSORS]], ids=range(7))
def test_ones_own_pictures_stay_as_they_are(given):
    objects = make_objects(given, domain())
    assert len(objects) == 6
    assert all(torch.equal(objects[k].image[:3], x) and objects[k].label == 1 for k, x in enumerate(TENSORS))
    fewer = given[:5] if isinstance(given, (list, tuple)) else Data(given.items[:5])
    again, other = make_objects(given, domain()), make_objects(fewer, domain())
    assert digest(objects.content) == digest(again.content) != digest(other.content)


def test_a_thing_that_names_itself_is_not_read_to_be_named():
    class Named(Data):
        content = "birds, version 2"
        def __getitem__(self, i): raise AssertionError("read")
    assert make_objects(Named(TENSORS), domain()).content == ["birds, version 2", 0, 0]


def test_a_function_draws_without_an_end_and_has_the_name_it_carries():
    def draw(ks, seed): return torch.stack([TENSORS[k % 6][:, :30, :] + seed for k in ks])
    nameless = make_objects(draw, domain(), seed=1)
    assert not has_end(nameless) and nameless.content is None
    assert torch.equal(nameless[100].image, TENSORS[4][:, :30] + 1)
    draw.content = "mine"
    assert digest(make_objects(draw, domain(), seed=1).content) != digest(make_objects(draw, domain(), seed=2).content)


def test_the_middle_of_a_picture_is_an_object_too():
    "As the released code takes its cars: brought to 256 x 256, the middle 128 x 128 kept; from a generator as well."
    pictures = load_domain("butterflies", n_class_images=2)
    whole, middle = (make_objects(Objects(centre_crop=side), pictures) for side in (0, 256))
    assert middle[0].image.shape == (4, 128, 128) and middle[0].origin == whole[0].origin
    assert middle.content != whole.content
    drawn = make_objects(Objects("gan64", centre_crop=64), pictures)
    assert drawn[10**6].image.shape == (3, 32, 32)
    with pytest.raises(TypeError): len(drawn)
