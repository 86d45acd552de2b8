"Strangers' pictures and names: what is read, what is refused in a line, and what is only text."
import io, os, random, struct, subprocess, threading, warnings, zlib
from collections import Counter
from dataclasses import replace
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.text import Text
import numpy as np
import pandas as pd
from PIL import Image, ImageFile
import pytest
import torch
from helpers import ended, forked
from synthdet.core import refused, UserError
from synthdet.data.domain import Domain, fingerprint
from synthdet.data.domains import butterflies, folder, load_domain
from synthdet.data.images import cut_short, image_size, read_image, write_image
from synthdet.data.walks import is_image, leftover
from synthdet.data.labelled import DetectionDataset
from synthdet.data.labels import taken
from synthdet.data.settings import DataSource, Labels
from synthdet.evidence.arm import Arm
from synthdet.evidence.phases import load, run
from synthdet.evidence.plots import learning_curves, masks_against_detection, score_dots
from synthdet.settings import override
from synthdet.show import captioned, show

H, W = 20, 24
y, x = np.mgrid[:H, :W]
TRUTH = np.stack([10*x, 12*y, 200 - 5*x + 0*y], -1).astype(np.uint8)


# ---- the reader ------------------------------------------------------------------------------------------------------

def encoded(image, kind, **options):
    b = io.BytesIO()
    more = [im.copy() for im in options.get("append_images", ())]  # saving leaves its options in a picture
    image.copy().save(b, kind, **options | (dict(append_images=more) if more else {}))
    return b.getvalue()


def kinds():
    "dict name -> a small picture in each kind of file, with tags, as animation, of several depths."
    rgb, grey16 = Image.fromarray(TRUTH), Image.fromarray(TRUTH[..., 0].astype(np.uint16)*257)
    tags = Image.Exif()
    tags[0x0112], tags[0x010e], tags[0x829a] = 6, "note", (1, 3)
    two = dict(save_all=True, append_images=[rgb.rotate(90)])
    made = dict(
        jpeg=(rgb, "JPEG", dict(exif=tags, comment=b"hi")),
        progressive=(rgb, "JPEG", dict(progressive=True, exif=tags)),
        cmyk=(rgb.convert("CMYK"), "JPEG", {}), mpo=(rgb, "MPO", two), png=(rgb, "PNG", dict(exif=tags)),
        palette=(rgb.quantize(8), "PNG", dict(transparency=bytes(range(8)))), la=(rgb.convert("LA"), "PNG", {}),
        grey16=(grey16, "PNG", {}), bits=(rgb.convert("1"), "PNG", {}), apng=(rgb, "PNG", two),
        webp=(rgb, "WEBP", dict(exif=tags)), lossless=(rgb, "WEBP", dict(lossless=True)), moving=(rgb, "WEBP", two),
        bmp=(rgb, "BMP", {}), bmp8=(rgb.quantize(9), "BMP", {}), tiff=(rgb, "TIFF", dict(exif=tags)),
        lzw=(rgb, "TIFF", dict(compression="tiff_lzw", exif=tags)), tiff16=(grey16, "TIFF", {}),
        deflate=(rgb, "TIFF", dict(compression="tiff_adobe_deflate")), pages=(rgb, "TIFF", two),
        fax=(rgb.convert("1"), "TIFF", dict(compression="group4")), gif=(rgb, "GIF", {}), agif=(rgb, "GIF", two),
        ppm=(rgb, "PPM", {}), pgm=(rgb.convert("L"), "PPM", {}), pbm=(rgb.convert("1"), "PPM", {}))
    return {k: encoded(im, kind, **options) for k, (im, kind, options) in made.items()}


def mutated(g, data):
    "Bits turned, bytes taken out and put in, sizes made absurd, ends cut off."
    b = bytearray(data)
    for _ in range(g.choice([1, 1, 2, 5, 20])):
        at = g.randrange(max(1, min(len(b), g.choice([32, 200, 10**6]))))
        how = g.randrange(6)
        if how == 0 and b: b[at] ^= 1 << g.randrange(8)
        if how == 1 and b: b[at] = g.choice([0, 255, 127, 128, g.randrange(256)])
        if how == 2: del b[at:at + g.choice([1, 4, 50])]
        if how == 3: b[at:at] = g.randbytes(g.choice([1, 4, 50]))
        if how == 4:
            b[at:at + 4] = g.choice([b"\xff"*4, bytes(4), b"\x7f\xff\xff\xff", b"\0\0\xff\xff", b"\xff\xff\0\0"])
        if how == 5: del b[at:]
    return bytes(b)


def test_pictures_are_known_by_content_and_the_first_of_several_is_taken(tmp_path):
    for name, data in kinds().items():
        path = tmp_path/name
        path.write_bytes(data)
        image = read_image(path)
        assert is_image(path) and tuple(image.shape[1:]) == image_size(path), name
        assert {*image.shape[1:]} == {H, W}, name
        if name in ("mpo", "apng", "moving", "pages", "agif"):
            assert (image.permute(1, 2, 0).int() - torch.from_numpy(TRUTH).int()).abs().float().mean() < 12, name


def test_mutated_pictures_end_in_a_line_or_a_picture(tmp_path):
    g, made, path, found = random.Random(14), kinds(), tmp_path/"odd", Counter()
    for i in range(2000):
        path.write_bytes(mutated(g, made[list(made)[i % len(made)]]))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for how in ("error", "keep"):
                try: image = read_image(path, alpha=bool(i % 2), truncated=how)
                except UserError as e:
                    assert "\n" not in str(e) and str(path) in str(e)
                    found["refused"] += 1
                else:
                    assert image.dtype == torch.uint8 and image.shape[0] in (3, 4)
                    assert image_size(path) == tuple(image.shape[1:]), i
                    found["read"] += 1
            is_image(path)
        assert not told, told[0].message
    assert found["read"] > 500 and found["refused"] > 500


def test_other_parsers_are_out_of_reach(tmp_path, monkeypatch):
    "An EPS would start Ghostscript, whatever the file is called."
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a program was started"))
    monkeypatch.setattr(subprocess, "call", lambda *a, **k: pytest.fail("a program was started"))
    rgb = Image.fromarray(TRUTH)
    for kind in ("EPS", "TGA", "PCX", "ICO", "SGI", "PDF", "DDS", "IM", "MSP"):
        data = encoded(rgb.convert("1") if kind == "MSP" else rgb, kind)
        for name in ("a.jpg", f"a.{kind.lower()}", "a.png"):
            (tmp_path/name).write_bytes(data)
            assert "cannot be read" in refused(read_image, tmp_path/name) and not is_image(tmp_path/name)
            assert "cannot be read" in refused(image_size, tmp_path/name)


def chunk(kind, body): return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def giants():
    "dict name -> a small file that claims to be a large picture."
    png = lambda w, h: (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0))
                        + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b""))
    jpeg = bytearray(encoded(Image.fromarray(TRUTH), "JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5:at + 9] = b"\xea\x60\xea\x60"
    return {"a.png": png(60000, 60000), "b.png": png(1, 10**9), "c.png": png(13400, 13400), "d.jpg": bytes(jpeg),
            "e.gif": b"GIF89a\xff\xff\xff\xff\0\0\0;", "f.ppm": b"P6 60000 60000 255\n", "g.pbm": b"P4 999999 99999\n"}


@pytest.mark.parametrize("name", giants())
def test_pixels_have_a_bound(name, tmp_path):
    (tmp_path/name).write_bytes(giants()[name])
    for read in (read_image, image_size):
        told = refused(read, tmp_path/name)
        assert name in told and "178,956,970 pixels" in told


def test_nothing_to_see(tmp_path):
    for name, data in {"a.png": b"", "b.ppm": b"P6 0 5 255\n", "c.gif": b"GIF89a" + bytes(7)}.items():
        (tmp_path/name).write_bytes(data)
        assert name in refused(read_image, tmp_path/name)
    for size in ((1, 3000), (3000, 1), (1, 1)):
        Image.new("RGB", size, (9, 8, 7)).save(tmp_path/"thin.png")
        assert read_image(tmp_path/"thin.png").shape == (3, size[1], size[0])


DAMAGED = [b"MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\x03"*9, b"II*\0\xff\xff\xff\xff", b"", b"XX", bytes(40),
           b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",
           b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abc\0\0\0\0\0",
           b"MM\0*\0\0\0\x08\0\x01\x87\x69\0\x04\0\0\0\x01\xff\xff\xff\xff\0\0\0\0"]


@pytest.mark.parametrize("tags", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_exif_turns_nothing_and_stops_nothing(tags, tmp_path, recwarn):
    rgb = Image.fromarray(TRUTH)
    for name, options in (("a.jpg", dict(quality=95)), ("a.png", {}), ("a.webp", dict(lossless=True))):
        rgb.save(tmp_path/name, exif=b"Exif\0\0" + tags, **options)
        image = read_image(tmp_path/name)
        assert image_size(tmp_path/name) == (H, W)
        assert (image.permute(1, 2, 0).int() - torch.from_numpy(TRUTH).int()).abs().float().mean() < 6
    assert not [w for w in recwarn if "PIL" in w.filename]


def test_damage_beside_the_pixels_of_a_png(tmp_path):
    png = encoded(Image.fromarray(TRUTH), "PNG")
    bomb, torn = zlib.compress(bytes(80*10**6)), zlib.compress(bytes(999))[:9]
    notes = [chunk(b"zTXt", b"note\0\0" + bomb), chunk(b"iTXt", b"n\0\1\0\0\0" + bomb), chunk(b"iCCP", b"p\0\0" + bomb),
             chunk(b"zTXt", b"note\0\0" + torn), chunk(b"iCCP", b"p\0\0" + torn), chunk(b"zTXt", b"note\0\7x"),
             chunk(b"eXIf", b"?"), chunk(b"pHYs", b"1"), chunk(b"tIME", b"")]
    for k, note in enumerate(notes):
        for at in (33, len(png) - 12):                             # behind the header, behind the pixels
            (tmp_path/"a.png").write_bytes(png[:at] + note + png[at:])
            assert torch.equal(read_image(tmp_path/"a.png").permute(1, 2, 0), torch.from_numpy(TRUTH)), (k, at)
            assert image_size(tmp_path/"a.png") == (H, W)


def test_a_tag_behind_the_pixels_turns_size_and_picture(tmp_path):
    png, tags = encoded(Image.fromarray(TRUTH), "PNG"), Image.Exif()
    tags[0x0112] = 6
    (tmp_path/"a.png").write_bytes(png[:-12] + chunk(b"eXIf", tags.tobytes()[6:]) + png[-12:])
    assert image_size(tmp_path/"a.png") == (W, H) == tuple(read_image(tmp_path/"a.png").shape[1:])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "PPM"])
def test_what_is_there_of_a_file_that_ends_too_early(kind, tmp_path):
    big = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 90, 3), np.uint8))
    data, path = encoded(big, kind, **dict(quality=95) if kind == "JPEG" else {}), tmp_path/"a"
    path.write_bytes(data)
    whole = read_image(path)
    assert torch.equal(read_image(path, truncated="keep"), whole) and not cut_short(path)
    path.write_bytes(data[:len(data)*7//10])
    assert path.name in refused(read_image, path) and cut_short(path)
    rows = slice(-8, None) if kind == "BMP" else slice(8)          # which is written from below
    assert torch.equal(read_image(path, truncated="keep")[:, rows], whole[:, rows])
    path.write_bytes(data[:60])
    assert path.name in refused(read_image, path, truncated="keep")


def test_keeping_is_nobody_elses_business(tmp_path):
    "Two threads, one that keeps and one that does not: Pillow's own switch would be thrown for both."
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 90, 3), np.uint8)), "JPEG")
    (tmp_path/"a").write_bytes(data[:len(data)//2])
    kept = []
    def keep(): kept.extend(read_image(tmp_path/"a", truncated="keep") for _ in range(60))
    keeping = threading.Thread(target=keep)
    keeping.start()
    while keeping.is_alive(): assert "truncated" in refused(read_image, tmp_path/"a")
    assert len(kept) == 60 and not ImageFile.LOAD_TRUNCATED_IMAGES


# ---- folders ---------------------------------------------------------------------------------------------------------

LEFT = ["._0.png", ".DS_Store", "Thumbs.db", "desktop.ini", "Icon\r", "__MACOSX/bee/._0.png", "@eaDir/bee/0.png",
        ".ipynb_checkpoints/0-checkpoint.png", "$RECYCLE.BIN/0.png", "System Volume Information/x", "lost+found/0.png",
        ".Trash-1000/0.png", ".thumbnails/0.png", ".git/0.png", "0.png.part", "0.png.crdownload",
        "0.png~", "#recycle/0.png"]


def own(root, n=3, classes=("bee", "moth"), size=16):
    for k, c in enumerate(classes or [""]):
        for i in range(n):
            image = torch.full((3, size, size), 40*k + 20*i, dtype=torch.uint8)
            write_image(root/"class_images"/c/f"{i}.png", image)
            write_image(root/"backgrounds"/f"{i}.png", image)
    return root


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("classes", [("bee", "moth"), ()])
def test_leftovers_are_neither_pictures_nor_classes(left, classes, tmp_path, recwarn):
    "At the top, in the sub-folders of classes, among the backgrounds: as if they were not there."
    root = own(tmp_path/"set", classes=classes)
    before = folder(root)
    for place in ("class_images", *(f"class_images/{c}" for c in classes), "backgrounds"):
        put(root/place/left, encoded(Image.fromarray(TRUTH), "PNG"))
    d = folder(root)
    assert leftover(left) and d.classes == before.classes and not len(recwarn)
    assert [c.origin for c in d.class_images] == [c.origin for c in before.class_images] and len(d.backgrounds) == 3


def test_what_is_no_picture_is_told_and_what_should_be_one_is_refused(tmp_path):
    root = own(tmp_path/"set")
    for name in ("README.md", "LICENSE", "bee/notes.txt", "bee/photo.heic"):
        put(root/"class_images"/name, b"some words")
    put(root/"backgrounds"/"list.csv", b"a,b")
    with pytest.warns(UserWarning) as told: d = folder(root)
    assert sorted(str(w.message).partition(": ")[2] for w in told) == [
        "1 is no picture and passed over: list.csv",
        "4 are no picture and passed over: LICENSE, README.md, bee/notes.txt, ..."]
    assert d.classes == ("bee", "moth") and len(d.class_images) == 6 and len(d.backgrounds) == 3
    put(root/"class_images"/"bee"/"web.jpg", b"<!DOCTYPE html>")
    assert "web.jpg: a web page" in refused(folder, root)


def test_pictures_by_content_in_a_domain(tmp_path):
    root, made = own(tmp_path/"set", classes=()), kinds()
    for name, kind in (("a.jfif", "jpeg"), ("b.jpe", "progressive"), ("c.pgm", "pgm"), ("D.JPG", "mpo"), ("e", "webp"),
                       ("f.dat", "tiff"), ("g.png", "jpeg")): put(root/"class_images"/name, made[kind])
    d = folder(root)
    assert len(d.class_images) == 10 and all(len(c.image) == 3 for c in d.class_images)


def test_truncated_pictures_of_a_domain(tmp_path):
    root = own(tmp_path/"set")
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)), "PNG")
    for place in ("class_images/bee", "backgrounds"): put(root/place/"torn.png", data[:len(data)*2//3])
    d = load_domain("folder", root)
    assert "torn.png" in refused(lambda i: d.class_images[i], 3)
    assert "torn.png" in refused(lambda i: d.backgrounds[i], 3)
    asked = (DataSource("folder", str(root), truncated="keep"),
             DataSource("folder", str(root), options="truncated=keep"))
    for source in asked:
        with pytest.warns(UserWarning, match="2 of 11 picture files end too early"): d = load_domain(source)
        assert d.class_images[3].image.shape == (3, 40, 40) and d.backgrounds[3].any() and "2 of 11" in repr(d)
    put(root/"backgrounds"/"torn.png", data[:50])
    assert "torn.png" in refused(load_domain, "folder", root, truncated="keep")


# ---- pictures without boxes ------------------------------------------------------------------------------------------

def labelled(tmp_path, n, bare):
    files = [write_image(tmp_path/f"{i}.png", torch.full((3, 32, 32), 9*i, dtype=torch.uint8)) for i in range(n)]
    box = lambda k: dict(boxes=torch.tensor([[4., 4, 20, 20]])[:k], labels=torch.ones(k, dtype=torch.int64))
    return DetectionDataset(files, [dict(**box(int(i >= bare)), image_id=i) for i in range(n)], ["bee"])


@pytest.mark.parametrize("bare", [0, 3, 6])
def test_pictures_without_a_box_are_part_of_a_set(bare, tmp_path):
    data = labelled(tmp_path, 6, bare)
    d = Domain("bees", ("bee",), train=data, val=data)
    assert (f"({2*bare} of them without any)" in repr(d)) == bool(bare)
    part, val = taken(Labels(n_real=5, val="budget"), d.train)
    assert len(part) == 4 and len(val) == 1 and fingerprint(part) != fingerprint(val)
    image, target = data[0]
    assert target["boxes"].shape == (int(not bare), 4) and image.shape == (3, 32, 32)


@pytest.mark.parametrize("bare", [2, 6])
def test_pictures_without_a_box_train_and_are_scored(bare, tmp_path, one_thread):
    "Some of them in every set, or all that are trained on; a validation set of nothing else can rank no model."
    parts = {s: labelled(tmp_path/s, 6, n) for s, n in (("train", bare), ("val", 2), ("test", 3))}
    d = replace(butterflies(image_size=64, n_class_images=8, n_backgrounds=3), **parts)
    arm = override(Arm(), "arm=mixed steps=2 pretrain_steps=2 n_real=6 n_fake=4 batch_size=2 recipe.image_size=64 "
                          "model.image_size=64")
    row = run(arm, tmp_path/"out", loaded=load(arm, domain=d))
    assert 0 <= row["ap50"] <= 1
    none = replace(d, val=labelled(tmp_path/"none", 4, 4))
    assert "holds no box" in refused(run, arm, tmp_path/"other", loaded=load(arm, domain=none))


# ---- names -----------------------------------------------------------------------------------------------------------

NAMES = ["50$_cats", r"a_b$c$ \frac{", "_hidden^2", r"C:\new\$5", "$", "%d & #1 ~", "évêque 木\n$$", "caf\udce9"]


def arms(*names): return {n: [(s, s/1000) for s in (-10, 0, 10, 20)] for n in names}


def rows(domain="d", arm="pretrain", segmenter="redo"):
    runs = [dict(id=f"{arm}-{f}", fold=f, ap50=.3 + f/10) for f in range(4)]
    return pd.DataFrame([dict(domain=domain, arm=arm, segmenter=segmenter, **r) for r in runs])


CHARTS = dict(
    curves=lambda n: learning_curves(arms("scratch", n), title=f"{n}, 25 labels"),
    groups=lambda n: score_dots(rows(domain=n), "domain", "arm"),
    arms=lambda n: score_dots(pd.concat([rows(arm=n), rows(arm="scratch")]), "domain", "arm"),
    masks=lambda n: masks_against_detection({n: .5}, rows(segmenter=n)),
    show=lambda n: show(torch.zeros(3, 9, 9, dtype=torch.uint8), n),
    captions=lambda n: captioned([torch.zeros(3, 9, 9, dtype=torch.uint8)]*2, [n, "b"], title=n, cols=2))


@pytest.fixture
def figures():
    plt.close("all")
    yield lambda: [plt.figure(n) for n in plt.get_fignums()]
    plt.close("all")


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize("name", NAMES)
def test_names_are_text_and_no_formulas(chart, name, figures, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: None)
    CHARTS[chart](name)
    figure, = figures()
    figure.canvas.draw()
    told = [t for t in figure.findobj(Text) if name.replace("\udce9", "?") in t.get_text()]
    assert told, "the name is shown as it is"
    assert not any(t.get_parse_math() or t.get_usetex() for t in told)


# ---- what strangers' folders hold, too -------------------------------------------------------------------------------

def bitmap(alpha):
    "A bitmap of 32 bits whose header says that the fourth byte is transparency."
    pixels = np.dstack([TRUTH[::-1, :, ::-1], np.full((H, W), alpha, np.uint8)]).tobytes()
    info = struct.pack("<IiiHHIIiiII4I", 108, W, H, 1, 32, 3, len(pixels), 0, 0, 0, 0,
                       0xff0000, 0xff00, 0xff, 0xff000000)
    info = info.ljust(108, b"\0")
    return b"BM" + struct.pack("<IHHI", 14 + len(info) + len(pixels), 0, 0, 14 + len(info)) + info + pixels


@pytest.mark.parametrize("alpha", [0, 255])
def test_a_bitmap_whose_transparency_nobody_wrote_is_no_white_picture(alpha, tmp_path):
    (tmp_path/"a.bmp").write_bytes(bitmap(alpha))
    assert np.array_equal(read_image(tmp_path/"a.bmp").permute(1, 2, 0).numpy(), TRUTH)


def test_a_truncated_picture_says_how_to_have_what_is_there_and_a_lost_one_does_not(tmp_path):
    data = encoded(Image.fromarray(TRUTH), "BMP")
    (tmp_path/"half").write_bytes(data[:len(data)//2])
    (tmp_path/"lost").write_bytes(data[:60])
    assert refused(read_image, tmp_path/"half").endswith("or take what is there with truncated=keep")
    assert "keep" not in refused(read_image, tmp_path/"lost")


def test_files_that_cannot_be_read_say_why_and_nothing_waits_for_a_pipe(tmp_path):
    for name, make, line in (("pipe", os.mkfifo, "is a pipe"),
                             ("gone", lambda p: os.symlink("nowhere", p), "a link to what is not there"),
                             ("self", lambda p: os.symlink(p.name, p), "a link that leads to itself"),
                             ("zero", lambda p: os.symlink("/dev/zero", p), "is a device")):
        root = own(tmp_path/name)
        make(root/"backgrounds"/"z.jpg")
        assert line in refused(folder, root) and not is_image(root/"backgrounds"/"z.jpg")


def as_somebody(f, line):
    "Run `f` in a process that is not root's, as a user; where the tests are not root's either, they are that."
    def they():
        if not os.getuid(): os.setuid(65534)
        assert line in refused(f)
    return ended(forked(they)) == 0


@pytest.mark.parametrize("locked", ["class_images/bee/0.png", "class_images/bee", "class_images", "."])
def test_what_may_not_be_read_is_said_to_be_so(locked, tmp_path):
    for above in (tmp_path, *tmp_path.parents[:3]): os.chmod(above, 0o755)
    root = own(tmp_path/"set")
    folder(root)                                                   # imports what it needs
    os.chmod(root/locked, 0o444 if locked == "class_images" else 0)
    try: assert as_somebody(lambda: folder(root), "cannot be read (Permission denied)")
    finally: os.chmod(root/locked, 0o755)


@pytest.mark.parametrize("names, found", [((" bee ", "moth"), ("bee", "moth")), (("$x_{", "a#b"), ("$x_{", "a#b")),
                                         (("recycled", "CVS"), ("CVS", "recycled"))])
def test_folders_of_classes_are_called_as_annotations_call_them(names, found, tmp_path):
    assert folder(own(tmp_path/"set", classes=names)).classes == found


def test_a_class_that_is_given_twice_is_refused(tmp_path):
    assert "the class bee occurs 2 times" in refused(folder, own(tmp_path/"set"), classes="bee,moth,bee")
