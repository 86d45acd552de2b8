"Objects of labelled images, and masks that people have: what is pasted, what names it, what a row says of it."
import shutil

import pytest
import torch

from synthdet.boxes import borders
from synthdet.cli import preview
from synthdet.core import digest, refused
from synthdet.data.domains import load_domain, masked, write_domain
from synthdet.data.images import write_image
from synthdet.data.labels import label_digest, restricted, taken
from synthdet.data.settings import Labels
from synthdet.detection.card import card_of
from synthdet.evidence.arm import make_arms
from synthdet.evidence.phases import load, phases, run
from synthdet.masks.segment import make_segmenter
from synthdet.objects.labelled import Boxed, LabelledObjects
from synthdet.objects.objects import content, make_objects
from synthdet.synthesis.cutouts import make_cutouts
from synthdet.synthesis.stream import make_samples

torch.set_num_threads(1)
SMALL = "backbone=mobilenetv1_025 model.image_size=96 batch_size=4 steps=2 pretrain_steps=2 eval_every=2"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "A folder with boxes and backgrounds, and no class image."
    butterflies = load_domain("butterflies", n_class_images=6, n_backgrounds=4)
    folder = write_domain(butterflies, tmp_path_factory.mktemp("domain")/"mine", n_labelled=8)
    shutil.move(folder/"class_images", folder.parent/"class_images")
    return folder


def arm_of(root, name, more=""):
    return make_arms(name, f"domain=folder root='{root}' {SMALL} {more}", usual="n_real=5")[0]


def keys(root, name, more=""):
    arm = arm_of(root, name, more)
    return [p.key for p in phases(arm, load(arm))]


def test_a_few_boxes_and_nothing_else_make_a_run(root, tmp_path):
    arm, data = arm_of(root, "pretrain", "objects=labelled"), load_domain("folder", root)
    row = run(arm, tmp_path)
    part = taken(arm.labels, data.train)[0]
    assert row["labels"] == label_digest(part) and row["class_images_from"] == "labelled images"
    assert row["boxes_spent"] == sum(len(t["boxes"]) for _, t in part)
    alone = run(arm_of(root, "pretrain_only", "objects=labelled"), tmp_path)
    assert alone["labels"] == row["labels"], "boxes were seen, though no photograph was"
    plain = run(arm_of(root, "scratch", "objects=labelled"), tmp_path)
    assert (plain["class_images_from"], plain["boxes_spent"]) == ("", 0), "it pastes nothing"


def test_cards_tell_of_class_images_that_were_seen(tmp_path):
    domain = load_domain("butterflies", n_class_images=6, n_backgrounds=4)
    for name, seen in dict(scratch=False, pretrain_only=True).items():
        arm, = make_arms(name, SMALL, usual="n_real=5")
        row = run(arm, tmp_path, domain=domain)
        assert row["class_images_from"]
        assert ("class images from" in card_of(tmp_path/row["weights_file"]).read_text()) == seen


def test_only_labels_that_may_be_seen_are_pasted(root):
    data, labels = load_domain("folder", root), Labels(n_real=5, val="budget")
    train, kept = taken(labels, data.train)
    names = lambda part: {data.train.files[i].name for i in part.indices}
    samples = make_samples(data, objects="labelled", labels=labels)
    pasted = {o["origin"].split("#")[0] for i in range(40) for o in samples.provenance(i)["objects"]}
    assert pasted and pasted <= names(train) and not pasted & names(kept)


@pytest.mark.parametrize("source", ["labelled", "both"])
def test_which_labels_are_seen_names_what_is_made_of_them(source, root, tmp_path):
    mine = tmp_path/"mine"
    shutil.copytree(root, mine)
    shutil.copytree(root.parent/"class_images", mine/"class_images")
    asked = f"objects={source}"
    found = [keys(mine, "pretrain_only", f"{asked} {more}")[0]
             for more in ("", "fold=1", "n_real=6", "val=budget", "segmenter=frame")]
    assert len({*found, keys(mine, "pretrain_only")[0]}) == 6 and found[0] == keys(mine, "pretrain_only", asked)[0]
    for name in ("scratch", "scratch_long"): assert keys(mine, name) == keys(mine, name, asked)
    assert keys(mine, "pretrain_only", "fold=1") == keys(mine, "pretrain_only"), "class images know of no labels"
    assert keys(mine, "mixed", f"share=.5 {asked}") != keys(mine, "mixed", "share=.5")


def test_the_bytes_of_a_labelled_image_name_the_pool(root, tmp_path):
    shutil.copytree(root, tmp_path/"mine")
    objects = lambda: make_objects("labelled", load_domain("folder", tmp_path/"mine"), labels=Labels(n_real=0))
    before, found = digest(content(objects())), objects().images
    assert digest(content(objects())) == before
    write_image(found.files[0], 255 - found.part[0][0])
    assert digest(content(objects())) != before


def test_an_object_is_cut_inside_its_box():
    data = load_domain("butterflies", n_class_images=4, n_backgrounds=2)
    objects = make_objects("labelled", data, labels=Labels(n_real=6))
    for o, cut in zip(objects, make_cutouts(objects, "frame", tight=False, cache=False), strict=True):
        rows, columns = borders(o.box, o.image.shape[1:])
        assert torch.equal(cut.rgba[:3], o.image[:, rows, columns]) and cut.whole and cut.label == o.label
    square = Boxed(torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8), 1, "", (16, 16, 48, 40))
    everything = lambda images: torch.ones_like(images[:, 0])
    everything.content = "everything"
    cut, = make_cutouts([square], everything, cache=False)
    assert torch.equal(cut.rgba[:3], square.image[:, 16:40, 16:48]), "another segmenter's mask ends at the box"


def test_crowds_and_difficult_boxes_are_no_objects():
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    boxes = torch.tensor([[0., 0, 9, 9], [10, 10, 30, 30], [20, 5, 30, 30]])
    marks = {"difficult": torch.tensor([True, False, False]), "iscrowd": torch.tensor([False, False, True])}
    found = LabelledObjects([(image, {"boxes": boxes, "labels": torch.tensor([1, 2, 1]), **marks})])
    assert len(found) == 1 and found[0].label == 2 and found[0].box == (5, 5, 25, 25)
    assert found[0].image.shape == (3, 30, 30)


@pytest.mark.parametrize("words,told", [
    ("objects=labelled psi=.5", "objects=labelled takes no psi=0.5"),
    ("objects=both n_objects=3", "objects=both takes no n_objects=3"),
    ("objects=labelled n_real=99", "n_real=99: the training set holds 8"),
    ("objects=both n_real=5", "class_images: no such folder"),
    ("objects=labelled n_real=5 segmenter=alpha", "needs images with an alpha channel")])
def test_what_cannot_be_is_a_line(words, told, root, tmp_path, capsys):
    with pytest.raises(SystemExit):
        preview([*f"domain=folder root={root} {words}".split(), "--output", str(tmp_path/"a.png")])
    line, = capsys.readouterr().err.strip().splitlines()
    assert told in line


def test_without_labelled_images_or_boxes(root, tmp_path):
    shutil.copytree(root.parent/"class_images", tmp_path/"bare"/"class_images")
    shutil.copytree(root/"backgrounds", tmp_path/"bare"/"backgrounds")
    bare = load_domain("folder", tmp_path/"bare")
    assert "detection" in refused(make_samples, bare, objects="labelled")
    assert "train" in refused(restricted, bare, Labels())


def test_preview_of_a_folder_without_class_images(root, tmp_path, capsys):
    preview([*f"domain=folder root={root} n_real=5 objects=labelled -n 2 --output {tmp_path/'a.png'}".split()])
    assert (tmp_path/"a.png").is_file() and "cut-outs kept" in capsys.readouterr().out


def test_protocols_of_cars_crop_no_labelled_object():
    arms = {source: make_arms("pretrain", f"domain=cars protocol=released root=nowhere {source}")[0]
            for source in ("", "objects=labelled")}
    assert [a.synthesis.objects.centre_crop for a in arms.values()] == [256, 0]


# class_masks


@pytest.fixture
def own(root, tmp_path):
    "A folder of grey class images without transparency, each with its mask."
    mine = tmp_path/"mine"
    shutil.copytree(root, mine)
    for k, c in enumerate(load_domain("butterflies", n_class_images=4, n_backgrounds=1).class_images):
        write_image(mine/"class_images"/f"{k}.png", c.image[:3])
        write_image(mine/"class_masks"/f"{k}.png", c.image[3:].expand(3, -1, -1))
    return mine


def test_masks_beside_class_images_are_cut_along(own):
    data, drawn = load_domain("folder", own), load_domain("butterflies", n_class_images=4, n_backgrounds=1)
    assert len(data.class_images[0].image) == 3, "who does not ask reads none"
    pool = make_samples(data, masks="alpha").pool
    for cut, want in zip(pool, make_cutouts(drawn.class_images, "alpha", cache=False), strict=True):
        assert torch.equal(cut.rgba, want.rgba)
    assert make_segmenter("alpha").given and not make_segmenter("grabcut").given


def test_masks_name_what_is_cut_with_them_and_nothing_else(own):
    before = {s: keys(own, "pretrain_only", f"segmenter={s}") for s in ("alpha", "grabcut")}
    write_image(own/"class_masks"/"1.png", torch.randint(0, 256, (1, 64, 64), dtype=torch.uint8).expand(3, -1, -1))
    after = {s: keys(own, "pretrain_only", f"segmenter={s}") for s in before}
    assert after["grabcut"] == before["grabcut"] and after["alpha"] != before["alpha"]
    shutil.rmtree(own/"class_masks")
    assert keys(own, "pretrain_only", "segmenter=grabcut") == before["grabcut"]


def test_pictures_without_a_mask_are_left_out_aloud(own):
    data = load_domain("folder", own)
    (own/"class_masks"/"2.png").unlink()
    with pytest.warns(UserWarning, match=r"1 of 4 class images have no mask there and are left out: 2.png"):
        left = masked(data)
    assert [c.origin for c in left.class_images] == [f"class_images/{k}.png" for k in (0, 1, 3)]
    shutil.copy(own/"class_images"/"0.png", own/"class_images"/"0.jpg")
    assert "0.png: is the mask of 0.jpg and of 0.png; rename one" in refused(masked, load_domain("folder", own))
    shutil.rmtree(own/"class_masks"), (own/"class_masks").mkdir()
    told = refused(masked, load_domain("folder", own))
    assert "holds no mask of a class image; expected NAME.png for NAME.jpg" in told
