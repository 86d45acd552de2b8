"What single generators do: through worker processes, from the package, between bars, with broken weights."
import os
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from synthdet.core import digest, refused
from synthdet.paths import hash_file
from synthdet.data.domain import Domain
from synthdet.data.domains import ClassImages, load_domain
from synthdet.data.images import write_image
from synthdet.objects.dmgan import draw, load_dmgan, pictures
from synthdet.objects.gan64 import Generator64
from synthdet.objects import objects as module
from synthdet.objects.objects import content, make_objects
from synthdet.objects.settings import Objects, weight_files
from synthdet.objects.stylenet import StyleGAN
from synthdet.weights import save_weights
from test_contract_objects import domain, root # noqa: F401 (a fixture)

torch.set_num_threads(1)


def test_exported_objects_go_through_workers(root):
    objects = make_objects(Objects("exported", n_objects=20), domain(root), seed=1)
    expected = torch.stack([o.image for o in objects])
    loader = DataLoader(objects, batch_size=5, num_workers=1, multiprocessing_context="fork", timeout=60)
    assert torch.equal(torch.cat([image for image, *_ in loader]), expected)
    assert torch.equal(pickle.loads(pickle.dumps(objects))[19].image, expected[19])


def test_the_shipped_generator_is_for_the_drawn_butterflies_alone(root):
    shipped, = weight_files("gan64", load_domain("butterflies"))
    assert shipped.name == "gan64_butterflies.safetensors" and shipped.stat().st_size < 5e6
    called_so = Domain("butterflies", ("moth",), *[[]]*5, source=str(root))
    assert weight_files("gan64", called_so) == [root/"weights"/"gan64_mine.safetensors"]
    objects = make_objects("gan", load_domain("butterflies"))
    assert objects[0].image.shape == (3, 64, 64) and not torch.equal(objects[0].image, objects[1].image)


def test_dmgan_draws_captions_at_256(root):
    objects = make_objects(Objects("dmgan", size=256), domain(root), seed=2)
    G = load_dmgan(*weight_files("dmgan", domain(root)))
    assert torch.equal(objects[9].image, pictures(G(**draw(G, range(8, 16), 2))[-1])[1])
    given = make_objects(Objects("dmgan", weights=root/"weights", size=256), domain(), seed=2)
    assert torch.equal(given[9].image, objects[9].image) and given.content == objects.content


def test_the_bars_of_the_cars_are_cut_off(tmp_path):
    G = StyleGAN((4,)*8, (6, 8))
    for n in ("stylegan_car512.pth", "other.pth"): torch.save(G.state_dict(), tmp_path/n)
    def drawn(source, file, preset=""):
        return make_objects(Objects(source, tmp_path/file, size=512), domain(preset=preset))[1].image
    whole = drawn("stylegan", "other.pth")
    assert whole.shape == (3, 512, 512)
    for source, file, preset in (("stylegan", "other.pth", "cars"), ("stylegan", "stylegan_car512.pth", ""),
                                 ("gan", "other.pth", "cars")):
        assert torch.equal(drawn(source, file, preset), whole[:, 64:448])


@pytest.mark.parametrize("source,value,words", [
    ("gan64", float("nan"), "gan64 drew object 0 in one colour"), ("gan64", 0., "in one colour"),
    ("stylegan", float("nan"), "does not hold finite numbers"),
    ("stylegan", 0., "stylegan drew object 0 in one colour")])
def test_broken_weights_are_told_when_they_show(source, value, words, tmp_path):
    broken = dict(gan64=Generator64(8, (8,)*5), stylegan=StyleGAN((8,)*4, (6, 8)))[source]
    for p in broken.parameters(): p.data.fill_(value)
    path = save_weights(broken, tmp_path/f"{source}.safetensors", nz=8, widths=(8,)*5)
    told = refused(lambda: make_objects(Objects(source, path), domain())[3])
    assert words in told and "\n" not in told


def test_a_generator_that_draws_nan_is_told(root):
    objects = make_objects("dmgan", domain(root))
    objects.images.draw.args[0].generator.img_net3.img[0].weight.data.fill_(float("nan"))
    assert "dmgan drew NaN or infinity; its weights are damaged" in refused(lambda: objects[0])


@pytest.mark.parametrize("source,file,words", [
    ("stylegan", "captions.pickle", "captions.pickle"),
    ("exported", "stylegan2_ffhq32.pt", "holds weights without a program"),
    ("gan64", "stylegan_ffhq32.pth", "stylegan_ffhq32.pth"), ("dmgan", "bird_DMGAN.pth", "there is no folder")])
def test_a_file_of_another_generator_is_told_in_a_line(source, file, words, root):
    told = refused(make_objects, Objects(source, root/"weights"/file), domain())
    assert words in told and "\n" not in told


def test_files_are_read_once_for_their_name_and_again_when_one_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("SYNTHDET_CACHE", str(tmp_path/"cache"))
    files, read = [tmp_path/f"{i}.bmp" for i in range(9)], []
    for f in files: write_image(f, torch.zeros(3, 8, 8, dtype=torch.uint8))
    def hashed(f):
        read.append(f)
        return hash_file(f)
    monkeypatch.setattr(module, "hash_file", hashed)
    name = lambda: digest(content(ClassImages(files, [1]*9, tmp_path)))
    first, fresh = name(), name()
    assert first == fresh
    assert len(read) == 18, "what has just been written may be written again within a tick of the clock"
    monkeypatch.setattr(module.time, "time_ns", lambda: files[0].stat().st_mtime_ns + 10**10)
    assert name() == name() == first and len(read) == 27
    old = files[4].stat()
    write_image(files[4], torch.full((3, 8, 8), 9, dtype=torch.uint8))
    os.utime(files[4], ns=(old.st_atime_ns, old.st_mtime_ns))
    assert files[4].stat().st_size == old.st_size and name() != first, "even one that hides its time"
