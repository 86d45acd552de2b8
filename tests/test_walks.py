"The notebooks that look at masks: on a plain folder of pictures, and on drawn butterflies."
import json
import re

import pytest
import torch

from synthdet.data.annotations import write_detection
from synthdet.data.butterflies import class_image
from synthdet.core import UserError
from synthdet.evidence.experiments import experiment_notebook, parameters
from synthdet.evidence.notebooks import sorted_out
from synthdet.evidence.execute import run_notebook
from synthdet.data.images import write_image


@pytest.mark.slow
def test_a_plain_folder_is_walked_through_and_told_its_layout(tmp_path):
    pictures = tmp_path/"mine"
    for i in range(6): write_image(pictures/f"{i}.png", class_image(i, size=64)[0])
    said = run_notebook(experiment_notebook("own_class"), tmp_path/"walk.ipynb",
                        dict(root=str(pictures), out=str(tmp_path/"out"), gate="", options="classes=moth"))
    assert re.search(r"[1-6] of 6 pictures passed", said) and f"mv {pictures} {pictures}.new/class_images" in said
    assert f"root={pictures} options=classes=moth" in said.replace("segmenter=grabcut ", "")
    assert "the commands take" not in said
    assert {p.name for p in (tmp_path/"out").iterdir()} >= {"accepted.jpg", "scenes.jpg"}
    walk = (tmp_path/"walk.ipynb").read_text()
    assert "drawn ones stand in" in walk and "random cut-outs of" in walk and "judged by eye: {" in walk
    assert not re.search(r"judged by eye: \d", walk), "nobody has judged these pictures"


def test_the_judgement_is_of_the_settings_the_walk_comes_with():
    notebook = experiment_notebook("own_class")
    lines = (line for cell in json.loads(notebook.read_text())["cells"] for line in cell["source"])
    as_judged, = (line for line in lines if line.startswith("as_judged = "))
    comes_with = tuple(parameters(notebook)[k][0] for k in ("root", "segmenter", "gate", "n_images", "seed"))
    assert as_judged.strip().endswith(repr(comes_with))


def test_the_walk_takes_the_words_of_the_others_and_speaks_of_no_aeroplanes(tmp_path):
    "`domain=folder` was refused, and under somebody's kangaroos it spoke of wings and tails."
    notebook = experiment_notebook("own_class")
    write_image(tmp_path/"class_images"/"a.png", class_image(0, size=64)[0])
    assert sorted_out(parameters(notebook), dict(domain="folder", root=str(tmp_path)))["domain"] == "folder"
    prose = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "markdown"]
    assert not [cell["id"] for cell in prose if "eroplane" in str(cell["source"])]


@pytest.mark.slow
def test_the_commands_do_not_hand_out_a_gate_that_leaves_hardly_any(tmp_path):
    "Three kangaroos of forty passed, and the command trained on them; boxes without parts, not needed, stopped it."
    mine = tmp_path/"mine"
    for i in range(6): write_image(mine/"class_images"/f"{i}.png", class_image(i, size=64)[0])
    boxes = dict(boxes=torch.tensor([[4., 4, 40, 40]]), labels=torch.tensor([1]))
    write_detection([(class_image(i, size=64)[0], boxes) for i in range(6, 9)], mine/"detection", "coco", ["mine"])
    values = dict(domain="folder", root=str(mine), out=str(tmp_path/"out"), gate="min_score=0.995 max_border=0.9")
    said = run_notebook(experiment_notebook("own_class"), tmp_path/"walk.ipynb", values)
    limit, = set(re.findall(r"min_score=(\S+) max_border=0.9", said))
    assert f"the commands take min_score={limit}," in said and float(limit) < .99
    assert f"min_score={limit} would keep about 3" in (tmp_path/"walk.ipynb").read_text()
    assert "options='split=70/15/15'" in said


@pytest.mark.slow
def test_segmentation_quality_measures_what_it_is_asked_for(tmp_path):
    values = dict(measured=str(tmp_path/"s.json"), segmenters="frame,alpha", n_images=12, first=0)
    run_notebook(experiment_notebook("segmentation_quality"), tmp_path/"b.ipynb", values)
    found = json.loads((tmp_path/"s.json").read_text())["segmenters"]
    assert set(found) == {"frame", "alpha"} and found["alpha"]["iou"] == 1 > found["frame"]["iou"] > 0


@pytest.mark.slow
def test_a_gan_is_trained_on_a_folder_and_drawn_from(tmp_path):
    for i in range(12): write_image(tmp_path/"mine"/"class_images"/f"{i}.png", class_image(i, size=40 + i)[0])
    values = dict(domain="folder", root=str(tmp_path/"mine"), out=str(tmp_path/"gan"),
                  steps=2, batch=4, width=.1, check_every=1)
    assert "gan/generator.safetensors" in run_notebook(experiment_notebook("train_gan"), tmp_path/"gan.ipynb", values)
    row = json.loads((tmp_path/"gan"/"gan.jsonl").read_text())
    assert (row["domain"], row["images"], row["step"]) == ("mine", 12, 2)
    for k in "ab":
        (tmp_path/"two"/"class_images"/k).mkdir(parents=True)
        write_image(tmp_path/"two"/"class_images"/k/"0.png", class_image(0, size=40)[0])
    with pytest.raises(UserError, match="two has 2 classes and a generator draws one"):
        run_notebook(experiment_notebook("train_gan"), tmp_path/"gan.ipynb", values | dict(root=str(tmp_path/"two")))
