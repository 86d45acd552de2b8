"A trained detector on people's pictures: what comes out is theirs to look at, to count, to correct and to score again."
import contextlib
import csv
import io
import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from pycocotools.coco import COCO
from PIL import Image
from torch import nn

import synthdet
from helpers import contents
from synthdet import cli
from synthdet.core import refused
from synthdet.data.annotations import read_detection
from synthdet.data.butterflies import scene
from synthdet.data.held import Resized
from synthdet.data.images import write_image
from synthdet.data.labelled import DetectionDataset
from synthdet.detection.card import card_of
from synthdet.detection.detect import detect
from synthdet.detection.detectors import detector, save_detector
from synthdet.detection.evaluate import evaluate, predict
from synthdet.detection.scores import same_classes, scores_on
from synthdet.detection.settings import Model
from synthdet.evidence.arm import make_arms
from synthdet.evidence.phases import run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    "A detector of two classes; its random weights find something everywhere, at scores around a third."
    torch.manual_seed(0)
    settings = Model(image_size=64)
    return save_detector(detector(settings, num_classes=3), tmp_path_factory.mktemp("detector")/"of two.safetensors",
                         settings=settings, classes=["butterfly", "größe"])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Pictures of one name, one stem, in folders; some that cannot be read; what is no picture."
    place = tmp_path_factory.mktemp("mine")/"photos"
    for i, name in enumerate(("a.jpg", "a.png", "b/a.jpg", "c/a.jpg", "c/wide, one.png")):
        image = scene(i)[0]
        write_image(place/name, image[:, :60] if "wide" in name else image)
    (place/"b"/"cut.jpg").write_bytes((place/"a.jpg").read_bytes()[:3000])
    (place/"c"/"page.jpg").write_text("<html>")
    (place/"gone.png").symlink_to("/nope/gone.png")
    (place/"notes.txt").write_text("no picture")
    return place


READ = ["a.jpg", "a.png", "b/a.jpg", "c/a.jpg", "c/wide, one.png"]


def test_one_record_for_each_picture_and_a_line_for_those_that_cannot_be_read(file, photos):
    lines = []
    found = list(synthdet.detect(file, photos, bad=lines.append))
    assert [f["file"].relative_to(photos).as_posix() for f in found] == READ
    assert len(lines) == 3 and all(line.isprintable() for line in lines)
    assert [n for n in ("cut.jpg", "page.jpg", "gone.png") if not any(n in line for line in lines)] == []
    for f in found:
        h, w = f["size"]
        assert (f["boxes"] >= 0).all() and (f["boxes"] <= torch.tensor([w, h, w, h])).all()
        assert (f["scores"] >= .3).all()
        assert f["names"] == [("butterfly", "größe")[k - 1] for k in f["labels"]]
    with pytest.warns(UserWarning, match="cut.jpg: cannot be read"): assert len(list(detect(file, photos/"b"))) == 1


def test_boxes_are_those_of_the_test_brought_back_and_cut(file, photos):
    "The detector sees what `Resized` shows it in a run, in blocks of any size, from files and from memory."
    files = [photos/n for n in READ]
    data = DetectionDataset(files, [dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0).long())]*5, ["a"])
    model = detector(file)
    scored = predict(model, Resized(data, 64).images)
    for size in (1, 2, 16):
        for f, p in zip(detect(model, [str(n) for n in files], 0, batch_size=size), scored, strict=True):
            (h, w), boxes = f["size"], p["boxes"]*torch.tensor([f["size"][1], f["size"][0]]*2)/64
            inside = boxes.clamp(min=0).minimum(torch.tensor([w, h, w, h]))
            kept = (inside[:, 2:] > inside[:, :2]).all(1)
            assert torch.allclose(f["boxes"], inside[kept], atol=1e-3)
            assert torch.allclose(f["scores"], p["scores"][kept], atol=1e-5)
            assert (boxes != inside).any(), "this detector reaches beyond the border"
    memory = list(detect(model, [data[i] for i in range(5)], 0))
    assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(memory, detect(model, files, 0)))
    assert memory[0]["file"] is None
    held, read = (next(iter(detect(model, x))) for x in (data[0][0], photos/"a.jpg"))
    assert torch.equal(held["boxes"], read["boxes"])


class Whole(nn.Module):
    "A detector that sizes nothing itself, finds the whole picture, and takes no picture below 100 px."
    classes = "thing",
    def forward(self, images):
        if min(images[0].shape[-2:]) < 100: raise synthdet.UserError("this picture is too small; enlarge it")
        box = [torch.tensor([[-5., 0, i.shape[-1] + 5, i.shape[-2]], [-9, 0, -2, 5]]) for i in images]
        return [dict(boxes=b, scores=torch.tensor([.9, .8]), labels=torch.tensor([1, 7])) for b in box]


def test_any_detector_in_the_contract_and_one_that_does_not_take_a_picture(photos):
    lines = []
    found = list(detect(Whole(), photos, bad=lines.append))
    assert [f["file"].name for f in found] == ["a.jpg", "a.png", "a.jpg", "a.jpg"]
    assert any("wide, one.png: this picture is too small" in line for line in lines) and len(lines) == 4
    assert all(f["boxes"].tolist() == [[0, 0, f["size"][1], f["size"][0]]] and f["names"] == ["thing"] for f in found)
    assert next(iter(detect(Whole(), photos/"a.jpg", clip=False)))["names"] == ["thing", "7"]


def said(capsys, command, *argv):
    "Exit code, lines of standard output and of standard error."
    code = 0
    try: getattr(cli, command)([str(a) for a in argv])
    except SystemExit as e: code = e.code
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


def test_the_command_leaves_files_for_people_and_programs(file, photos, tmp_path, capsys):
    code, out, err = said(capsys, "detect", file, photos, "--output", tmp_path/"found", "--score", ".35", "--prelabel")
    assert code == 1 and len(err) == 3 and all(line.startswith("error: ") for line in err)
    assert "3 more could not be read" in out[0]
    assert any(line.endswith("or take what is there with --truncated keep") for line in err), "as this command takes it"
    found = tmp_path/"found"
    assert sorted(p.relative_to(found/"pictures").as_posix() for p in (found/"pictures").rglob("*.*")) == sorted(
        ["a.jpg", "a-2.png", "b/a.jpg", "c/a.jpg", "c/wide, one.png"]), "of one stem, and all there"
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(found/"images.json").loadRes(str(found/"detections.json"))
    records = list(detect(file, photos, .35, bad=lambda line: None))
    assert [i["file_name"] for i in coco.loadImgs(coco.getImgIds())] == READ
    assert len(coco.anns) == sum(len(r["boxes"]) for r in records) > 0
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == ["butterfly", "größe"]
    rows = list(csv.DictReader((found/"detections.csv").open(encoding="utf-8", newline="")))
    below = lambda f: f.relative_to(photos).as_posix()
    assert [(r["file"], r["class"]) for r in rows] == [(below(r["file"]), n) for r in records for n in r["names"]]
    assert json.loads((found/"images.json").read_text())["info"] == {"folder": str(photos)}
    cut, beyond = sum(int(r["cut"].sum()) for r in records), sum(len(r["outside"]) for r in records)
    assert cut and f"; {cut:,} cut at the border by more than a pixel" in out[0]
    assert (f"{beyond} beyond it left out" in out[0]) == bool(beyond)
    told = next(line for line in out if line.startswith("labelled"))
    assert f"5 pictures to be corrected (yolo), {len(rows)} boxes; {cut:,} cut at the border" in told
    order = list(csv.DictReader((found/"label_first.csv").open(encoding="utf-8", newline="")))
    assert [float(r["uncertainty"]) for r in order] == sorted((float(r["uncertainty"]) for r in order), reverse=True)
    assert {r["file"] for r in order} == set(READ), "as the table and images.json call them"
    again = read_detection(found/"labelled")
    at = {f.name: t for f, t in zip(again.files, again.targets)}
    for r in records:
        name = "__".join(r["file"].relative_to(photos).parts)
        t = at[{"a.png": "a-2.png"}.get(name, name)]
        assert torch.allclose(t["boxes"], r["boxes"], atol=2e-3) and t["labels"].tolist() == r["labels"].tolist()


@pytest.mark.parametrize("format", ["coco", "voc"])
def test_only_the_pictures_most_worth_labelling(file, photos, tmp_path, capsys, format):
    code, out, _ = said(capsys, "detect", file, photos/"c", photos/"a.jpg", f"{photos}/b/a*", "--output", tmp_path/"f",
                        "--prelabel", "--most", 2, "--format", format, "--no-pictures")
    order = list(csv.DictReader((tmp_path/"f"/"label_first.csv").open(encoding="utf-8", newline="")))
    assert code == 1 and len(order) == 4 and not (tmp_path/"f"/"pictures").exists()
    names = {"__".join(p["file"].split("/")) for p in order[:2]}
    assert {f.name for f in read_detection(tmp_path/"f"/"labelled").files} == names


@pytest.mark.parametrize("line, told", [
    ("nope.safetensors photos", "nope.safetensors: no such file"),
    ("ssd photos", "'ssd' is a kind of detector, and has learned nothing"),
    ("nope photos", "nope: no such file; give the .safetensors file"),
    ("a.onnx photos", "a.onnx is for other programs; give the .safetensors"),
    ("FILE photos --output FILE", "it is no folder; choose another"),
    ("photos empty", "photos is a folder; give the .safetensors file that a run has left"),
    ("photos FILE", "of two.safetensors look swapped; the .safetensors file that a run has left comes first"),
    ("photos/a.jpg empty FILE", "photos/a.jpg and "),
    ("FILE nowhere", "nowhere: no such file or folder"),
    ("FILE photos --score 1.1", "--score=1.1: expected a number from 0 to 1"),
    ("FILE photos --score nan", "--score=nan"), ("FILE photos --most 3", "--most and --format are for --prelabel"),
    ("FILE", "are required: PICTURES"),
    ("FILE photos --prelabel --format pdf", "format 'pdf' is unknown; choose from"),
    ("FILE photos --output photos/found", "whose pictures are looked at"),
    ("FILE . --output found", "lies in ., whose pictures"),
    ("FILE photos --output full", "--output full holds something already"),
    ("FILE photos --batch-size 0", "batch_size=0: expected"),
    ("FILE photos --truncated maybe", "--truncated 'maybe' is unknown"), ("FILE empty", "empty: holds no picture"),
])
def test_what_cannot_be_done_is_one_line_and_nothing_is_written(
        file, photos, tmp_path, monkeypatch, capsys, line, told):
    monkeypatch.chdir(tmp_path)
    for name in ("full", "empty"): (tmp_path/name).mkdir()
    (tmp_path/"full"/"corrected.txt").write_text("hours of work")
    (tmp_path/"photos").symlink_to(photos)
    before = contents(tmp_path)
    code, out, err = said(capsys, "detect", *(str(file) if w == "FILE" else w for w in line.split()))
    assert code == 2 and not out and len(err) == 1 and told in err[0], err
    assert contents(tmp_path) == before


# scores on another set


def labelled(folder, names, n=3):
    "A labelled set of scenes, in which each picture's boxes are of the classes in turn."
    from synthdet.data.annotations import write_detection
    items = [(image, dict(boxes=boxes, labels=torch.arange(len(boxes)) % len(names) + 1))
             for image, boxes, _ in map(scene, range(n))]
    write_detection(items, folder, "coco", classes=names)
    return folder


def test_a_saved_detector_on_another_set_class_by_name(file, tmp_path, capsys):
    place = labelled(tmp_path/"set", ["wasp", "größe", "Falter"])
    with pytest.warns(UserWarning, match="the detector does not know wasp"):
        code, out, _ = said(capsys, "evaluate", file, place, "--class", "Falter=butterfly",
                            "--output", tmp_path/"scores.json")
    assert code == 0
    data, model = read_detection(place), detector(file)
    number = {2: 2, 3: 1}
    targets = [{k: v for k, v in t.items() if k in ("boxes", "labels")} for t in data.targets]
    keep = [torch.tensor([k in number for k in t["labels"].tolist()], dtype=torch.bool) for t in targets]
    targets = [dict(boxes=t["boxes"][k],
                    labels=torch.tensor([number[l] for l in t["labels"][k].tolist()], dtype=torch.int64))
               for t, k in zip(targets, keep)]
    expected = evaluate(list(detect(model, data, 0, clip=False)), targets)
    told = json.loads((tmp_path/"scores.json").read_text())
    assert {k: told[k] for k in expected} == expected and told["boxes"] == sum(len(t["boxes"]) for t in targets)
    assert told["classes"] == ["butterfly", "größe"]
    assert out[-1] == ("small, medium, large: areas in the pictures' own pixels "
                       "(--areas seen: in pictures brought to 64 x 64 px, as the detector sees them)")
    known = [k for k, v in expected.items() if v is not None and k.startswith("ap")]
    assert sum(line.startswith("ap") for line in out) == len(known)


def test_boxes_that_the_reader_cut_are_counted(file, tmp_path, capsys):
    place = labelled(tmp_path/"set", ["größe"], 1)
    rows = json.loads((place/"annotations.json").read_text())
    rows["annotations"][0]["bbox"] = [-9, 5, 40, 40]
    (place/"annotations.json").write_text(json.dumps(rows))
    with pytest.warns(UserWarning, match="has no class butterfly"): code, out, _ = said(capsys, "evaluate", file, place)
    assert code == 0 and out[0].startswith("1 image, ") and out[0].endswith("; boxes cut at the border: 1"), out[0]


@pytest.mark.parametrize("line, told", [
    ("FILE SET", "the set has ant, and the detector finds butterfly, größe: no name is in both; "
                 "say which is which: ant=butterfly"),
    ("FILE SET --class ant", "--class ant: expected THEIRS=OURS"),
    ("FILE SET --class bee=butterfly", "class of the set 'bee' is unknown; choose from ant"),
    ("FILE SET --class ant=bee", "class of the detector 'bee' is unknown"),
    ("FILE SET --output a.txt", "choose a name that ends in .json"),
    ("FILE SET --split val", "has no val set"), ("FILE nowhere", "nowhere: no such file or folder"),
    ("FILE SET --areas mine", "--areas 'mine' is unknown; choose from picture, seen"), ("SET FILE", "look swapped"),
    ("FILE PARTS", "holds 2 JSON files (train.json, val.json); expected one, so give the path of the one you mean, "
                   "or --split train for one called so"),
])
def test_what_cannot_be_scored_is_one_line(file, tmp_path, monkeypatch, capsys, line, told):
    monkeypatch.chdir(tmp_path)
    place, parts = (labelled(tmp_path/name, ["ant"], 1) for name in ("set", "parts"))
    for split in ("train", "val"): shutil.copy(parts/"annotations.json", parts/f"{split}.json")
    (parts/"annotations.json").unlink()
    known = {"FILE": file, "SET": place, "PARTS": parts}
    code, out, err = said(capsys, "evaluate", *(known.get(w, w) for w in line.split()))
    assert code == 2 and not out and len(err) == 1 and told in err[0], err


def test_a_run_leaves_a_card_and_its_detector_scores_as_its_row(tmp_path):
    "On its own test pictures the saved detector has the scores of the row; a card that was lost is written again."
    from synthdet.data.domains import load_domain
    arm, = make_arms("scratch", "steps=4 eval_every=4 batch_size=4 n_real=4 model.image_size=64 val=budget")
    few = load_domain("butterflies", n_class_images=2, n_backgrounds=2)
    few = replace(few, test=Scenes([few.test[i] for i in range(6)]))
    n_boxes = sum(len(t["boxes"]) for _, t in few.test)
    for _ in range(2):
        row = run(arm, tmp_path, domain=few)
        file = tmp_path/row["weights_file"]
        card = card_of(file).read_text()
        for told in ("finds: butterfly", few.licence, f"learned from: {row['n_labels']}",
                     "chosen on: labelled pictures of the same budget, put aside (1)",
                     f"Of 6 test pictures with {n_boxes} boxes to find.", "brought to 64 x 64 px, as it sees them",
                     f"| ap50 | {100*row['ap50']:.1f} |", row["id"], "synthdet-run arms=scratch", "steps=4",
                     f"synthdet-detect {file.name} photos/"):
            assert told in card, told
        card_of(file).unlink()
    scores, seen = scores_on(file, few.test), scores_on(file, few.test, areas="seen")
    assert all(scores[k] == pytest.approx(row[k], abs=1e-5) for k in ("ap50", "ap50_authors", "ap", "ap75", "ar100"))
    every = [k for k in seen if k.startswith(("ap", "ar")) and k != "areas"]
    assert len(every) == 14 and [seen[k] for k in every] == [row[k] and pytest.approx(row[k], abs=1e-5) for k in every]
    lacking, in_row = ([k for k in every if found[k] is None] for found in (scores, row))
    assert lacking != in_row, "the pictures are larger than what it sees"


class Scenes(list):
    "Some scenes in memory."
    classes = ("butterfly",)


@pytest.mark.slow
def test_ctrl_c_says_that_nothing_is_whole(file, photos, tmp_path):
    import signal
    import time
    code = f"import synthdet.cli as c; c.detect({[str(file), *[str(photos/'a.jpg')], f'--output={tmp_path}/f']!r})"
    slow = ("import synthdet.data.pictures as i, time; r = i.read_image; "
            f"i.read_image = lambda *a, **k: (print('reading', flush=True), time.sleep(3)); {code}")
    p = subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "reading\n"
    time.sleep(.2)
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=60)[1]
    assert p.returncode == 130 and err.startswith("stopped; what was written is not whole"), err
    assert "Traceback" not in err, err


def test_what_is_plainly_a_picture_is_taken_by_predict_and_detect(file, photos):
    "A path, Pillow's, an array, a tensor, one or several: the same boxes; anything else is one line."
    image = scene(0)[0]
    path, array, model = photos/"a.png", image.permute(1, 2, 0).numpy(), detector(file)
    write_image(photos.parent/"one.png", image)
    pillow, path = Image.fromarray(array), photos.parent/"one.png"
    read_only = array.copy()
    read_only.flags.writeable = False
    wanted, (named,) = predict(model, [image]), detect(model, [image], 0)
    ways = [str(path), path, [path], pillow, [pillow], array, [array], read_only, array[None], image, image[None],
            (image, dict(boxes=None)), [(image, {})]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in ways:
            (found,), (record,) = predict(model, x), detect(model, x, 0)
            assert torch.equal(found["boxes"], wanted[0]["boxes"]), type(x)
            assert torch.equal(record["boxes"], named["boxes"]), type(x)
    assert torch.equal(synthdet.predict(file, path)[0]["scores"], wanted[0]["scores"]), "the file of a detector, too"
    for f in (predict, lambda m, x: [*detect(m, x, bad=lambda line: (_ for _ in ()).throw(synthdet.UserError(line)))]):
        for x in (None, 5, {"a": image}, [None], image[:2], [image.long()],
                  torch.zeros(2, 8, 8, 3, dtype=torch.uint8), "no such.jpg"):
            assert "expected" in refused(f, model, x) or "no such file" in refused(f, model, x), x
        assert "give the .safetensors file" in refused(f, 5, image)
        assert "has learned nothing" in refused(f, "ssd", image)


def test_how_it_is_computed_is_checked_before_and_is_no_fault_of_a_picture(file, photos):
    for wrong, told in ((dict(precision="fp8"), "precision 'fp8' is unknown; choose from fp32"),
                        (dict(device="gpu"), "device 'gpu' is unknown"), (dict(batch_size=0), "batch_size=0")):
        for f in (predict, detect): assert told in refused(f, file, photos/"a.jpg", **wrong)
    for wrong, told in ((dict(bad="warn"), "bad='warn': expected a function"),
                        (dict(classes=5), "classes=5: expected a list"), (dict(score="x"), "score='x'")):
        assert told in refused(detect, file, photos/"a.jpg", **wrong)


def test_a_warning_names_the_line_of_the_user(file, photos):
    with pytest.warns(UserWarning, match="cut.jpg") as told:
        for _ in detect(file, photos/"b"): pass
    assert [w.filename for w in told] == [__file__]
    with pytest.warns(UserWarning, match="does not know wasp") as told: same_classes(["ant"], ["ant", "wasp"])
    assert [w.filename for w in told] == [__file__]
    both = Scenes([(scene(0)[0], dict(boxes=scene(0)[1], labels=torch.ones(len(scene(0)[1])).long()))])
    both.classes = "butterfly", "wasp", "größe"
    with pytest.warns(UserWarning, match="does not know wasp") as told: scores_on(file, both)
    assert {w.filename for w in told} == {__file__}


def test_a_name_is_refused_where_a_trained_detector_is_needed():
    assert "has learned nothing" in refused(detect, "retinaface", [])
