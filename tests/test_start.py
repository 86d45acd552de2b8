"What is mistyped is said at once: words, folders and files are looked at before anything heavy is imported."
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from synthdet.evidence.arm import Arm
from synthdet.evidence.notebooks import own_parameters
from synthdet.settings import find

root = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "torchvision", "timm", "papermill", "nbclient", "matplotlib", "seaborn", "pandas", "cv2", "numpy",
         "scipy", "PIL", "supervision", "pycocotools", "faster_coco_eval", "huggingface_hub")

# command -> lines of words and a part of what is said of them, which may go on in a line that is set in further; HERE
# is a folder with the parts that `here` makes
REFUSED = dict(
    run="""
        arms=pretrian | arm 'pretrian' is unknown; choose from scratch, scratch_long, pretrain
        arms= | arm '' is unknown
        arm=scratch | what is compared is said as arms=, so leave arm out
        arms=mixed | needs the share of photographs
        arms=mixed share=1 | share=1 is one source alone
        detector=sdd | detector 'sdd' is unknown; choose from ssd, retinaface
        backbone=resnet51 | backbone 'resnet51' is unknown; choose from mobilenetv1_100
        weights=imagenet backbone=resnet51.a1_in1k | backbone 'resnet51.a1_in1k' is unknown
        backbone=resnet18 detector=ssdlite320 | backbone 'resnet18' cannot be chosen for ssdlite320
        weights=/nope.pt | model.weights '/nope.pt': no such file; choose none or imagenet or the path of a file
        model.weights=HERE/empty | empty' is no file; choose none or imagenet or the path of a file
        test_size=long640 | test_size='long640' is for detector 'retinaface'
        domain=brids | domain 'brids' is unknown; choose from butterflies, folder
        root=/nope | domain 'butterflies' is drawn by code and reads no folder
        options=split=official | domain 'butterflies': option 'split' is unknown; choose from n_class_images
        options=split | 'split' is no setting; write name=value
        domain=folder | root: no such folder; expected a folder for domain 'folder'
        domain=folder root=/nope | /nope: no such folder; expected a folder for domain 'folder'
        domain=folder root=HERE/empty | holds neither class_images/ nor detection/
        domain=folder root=HERE/mine class_images=/nope | /nope: no such folder; expected class images
        domain=folder root=HERE/mine backgrounds=/nope | /nope: no such folder; expected backgrounds
        domain=folder root=HERE/mine protocol=paper | protocol 'paper' has no recipe for domain 'folder'
        domain=birds | root is empty; domain 'birds' reads public data sets from a folder with CUB_200_2011
            and birds_splits
        domain=birds root=HERE/empty | empty: holds nothing of it; domain 'birds' reads public data sets
        domain=cars root=/nope | /nope: no such folder; domain 'cars' reads public data sets
        domain=birds root=HERE/empty class_images=dm-gan | class_images='dm-gan' is no folder; choose one, or dmgan
        domain=birds root=HERE/empty backgrounds=inriaa | backgrounds='inriaa' is no folder; choose one, or inria
        domain=birds root=HERE/empty options=splot=1 | domain 'birds': option 'splot' is unknown
        objects=real2 | source 'real2' is unknown; choose from real, labelled, both, images, gan
        objects=gan objects.weights=/nope.pt | objects.weights '/nope.pt': no such file
        objects=stylegan | stylegan for domain 'butterflies' needs stylegan[!2]*, and none come with the package
        objects=stylegan objects.weights=HERE/empty | holds 0 stylegan[!2]*
        objects=gan domain=folder root=HERE/mine | gan64 for domain 'mine' needs gan64*.safetensors,
            and there is no folder
        objects=gan64 psi=.5 | psi=0.5 is for stylegan and stylegan2; leave it out for gan64
        psi=.5 | objects=real takes no psi=0.5
        objects=images | objects=images of domain 'butterflies' needs a folder
        objects=images domain=folder root=HERE/mine | generated: no such folder; expected drawn pictures
        segmenter=sam | segmenter 'sam' is unknown; choose from grabcut, redo
        segmenter=redo masks.weights=/nope | masks.weights '/nope': no such file;
            choose butterflies or the path of a file
        segmenter=redo domain=folder root=HERE/mine | no ReDO weights are shipped for domain 'mine'
        masks.weights=butterflies | segmenter 'grabcut' takes no weights; leave masks.weights='butterflies' out
        protocol=papr | protocol 'papr' is unknown; choose from quick, paper, released
        protocol=paper | protocol 'paper' has no recipe for domain 'butterflies'
        preset=brids protocol=paper | paper preset 'brids' is unknown
        n_real=ten | n_real='ten' should be int like the default 25
        n_real=-3 | n_real=-3 should be 0 or more
        n_real | 'n_real' is no setting; write name=value
        lr=0 | lr=0.0 should be 1e-12 to 1000.0
        lr=.1 schedule.lr=.2 | setting 'schedule.lr' is given twice
        lrr=1 | setting 'lrr' is unknown; choose from schedule.lr
        image_size=16 | setting 'image_size' is ambiguous
        workers=x | workers='x' should be int like the default 0
        workers=-1 | workers=-1: expected a whole number
        jobs=-1 | jobs=-1: expected a whole number
        out=/proc/x | cannot write /proc/x/butterflies.ipynb
        results=/proc/x/rows.jsonl | cannot write /proc/x/rows.jsonl
        --output /proc/x/y.ipynb | cannot write /proc/x/y.ipynb
        --notebook /nope.ipynb | /nope.ipynb: no such file; expected a notebook, so give its path, or a name
        --notebook HERE/text.ipynb | text.ipynb: cannot be read as JSON
        --nonsense | unrecognized arguments: --nonsense""",
    preview="""
        blend=x | blend 'x' is unknown; choose from paste, feather
        domain=brids | domain 'brids' is unknown
        domain=folder root=/nope | /nope: no such folder
        arms=scratch | arms are what synthdet-run compares; a stream has none
        objects=stylegan | needs stylegan[!2]*
        segmenter=redo masks.weights=/nope | masks.weights '/nope': no such file
        scale=3,1 | scale=(3, 1) should be a range (lowest, highest)
        -n 0 | -n 0 should be 1 or more
        --output /proc/x/y.png | cannot write /proc/x/y.png""",
    synth="""
        blend=x | the following arguments are required: --output
        --output HERE/new n_real=-3 | n_real=-3 should be 0 or more
        --output HERE/new domain=folder root=/nope | /nope: no such folder
        --output HERE/new --format csv | format 'csv' is unknown; choose from coco, voc, yolo, vocdevkit
        --output HERE/new --val 2 | --val='2': expected the share of images for validation, so choose 0 to 0.5
        --output HERE/new --masks --format voc | --masks: Pascal VOC files are written without; choose --format=coco
        --output HERE/new -n x | -n x should be 1 or more
        --output HERE/new backbone=resnet51 | backbone 'resnet51' is unknown
        --output HERE/text.ipynb | cannot write
        --output /proc/x | cannot write /proc/x/stream.yaml""",
    study="""
        labels_curv | study 'labels_curv' is unknown; choose from labels_curve, mixed_vs_pretrain
        labels_curve --results HERE/none.jsonl | labels_curve: data/airplanes, 
        labels_curve --data /nope | /nope: no such folder; expected a folder of data
        labels_curve --only seeds=1 | axis of study labels_curve 'seeds' is unknown; choose from seed, domain
        labels_curve --only domain=brids | domain of study labels_curve 'brids' is unknown; choose from butterflies
        labels_curve --only birds | 'birds' is no part of a study; write axis=label
        labels_curve --jobs x | --jobs=x: expected a whole number
        labels_curve --jobs 5000 | --jobs=5000: expected a whole number from 0
        labels_curve --resources GPU=1 | resources are those of the workers of a cluster; give --dask ADDRESS
        labels_curve --only domain=butterflies --results HERE/none.jsonl --out /proc/x | cannot write /proc/x/made.jsonl
        labels_curve --only domain=butterflies --results /proc/x/rows | cannot write /proc/x/rows
        labels_curve --results HERE/text.ipynb | text.ipynb: not a row of results
        labels_curve more | unrecognized arguments: more""",
    runs="""
        /nope | /nope: no such folder; expected a folder of artefacts
        HERE/empty --yes | --yes is for --prune; say both
        HERE/empty --pack HERE/new | --pack FOLDER and --study NAME go together
        HERE/empty --pack HERE/new --study nonsense | study 'nonsense' is unknown; choose from labels_curve
        HERE/empty --pack HERE/empty --study naive_paste | empty is there; choose the name of a new folder""",
    data="""
        nonsense | invalid choice: 'nonsense'
        list nonsense | data set 'nonsense' is unknown; choose from fddb, cub
        check | check what? choose from faces, birds
        check butterflies | domain 'butterflies' is unknown; choose from faces, birds
        check birds --options x | 'x' is no setting; write name=value
        fetch nonsense | data set 'nonsense' is unknown
        fetch cub | CUB-200-2011: Caltech-UCSD Birds has terms: non-commercial research and education;
            image rights with their owners (https://www.vision.caltech.edu/datasets/cub_200_2011/);
            read them there, then say so with --accept
        draw nonsense | domain 'nonsense' is unknown""")

CODE = """
import contextlib, io, json, sys
from synthdet import cli
def said(command, words):
    out = io.StringIO()
    with contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
        try: code = getattr(cli, command)(words)
        except SystemExit as e: code = e.code
    return dict(code=code, said=out.getvalue(), loaded=[m for m in {heavy!r} if m in sys.modules])
print(json.dumps([said(command, words) for command, words in json.load(sys.stdin)]))
"""


def said(calls, cwd):
    "What each of some commands says, one after another in a process of their own, and what is imported by then."
    done = subprocess.run([sys.executable, "-c", CODE.format(heavy=HEAVY)], input=json.dumps(calls), text=True,
                          capture_output=True, check=True, cwd=cwd, timeout=300)
    return json.loads(done.stdout)


AXES = ("axis", "domain", "n_real", "arm", "seed") # of a cell, by which a study tells it


def no_strange_hint(command, words, text, help):
    "What a message tells to do is an option of the command, or a word that it takes."
    text = re.sub("`[^`]*`", "", text)                              # whole commands, of others
    for option in re.findall(r"(?<![\w-])--[a-z]+", text): assert option in help or option in words, (words, text)
    for name in re.findall(r"(?<![-\w.])([a-z_]+(?:\.[a-z_]+)*)=", text):
        if name in words or name in ("name", "preset") or command == "study" and name in AXES: continue # typed, or any
        assert command in ("run", "preview", "synth"), (words, text)
        assert name in own_parameters() or find(Arm(), name), (words, text)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    (folder/"empty").mkdir()
    (folder/"mine"/"class_images").mkdir(parents=True)
    (folder/"text.ipynb").write_text("no notebook")
    return folder


@pytest.mark.parametrize("command", REFUSED)
def test_what_is_wrong_is_said_before_anything_heavy_is_imported(command, here):
    text = re.sub(r"\n {12}", " ", REFUSED[command]).replace("HERE", str(here))
    rows = [[part.strip() for part in line.split("|")] for line in text.split("\n")[1:]]
    found = said([*((command, words.split()) for words, _ in rows), (command, ["--help"])], here)
    for (words, line), row in zip(rows, found):
        assert row["code"] == 2 and line in row["said"], (words, row)
        told, lines = row["said"], 3 if "public data sets" in line else 1
        assert told.startswith("error: ") and told.count("\n") == lines or "usage: " in told, (words, row)
        no_strange_hint(command, words, told, found[-1]["said"])
        assert row["loaded"] == [], words
    assert not (here/"new").exists() and not (here/"runs").exists(), "and nothing is written"


def test_help_and_lists_cost_nothing(here):
    calls = [*((c, ["--help"]) for c in REFUSED), ("data", ["list"]), ("study", ["--results", str(here/"no.jsonl")]),
             ("data", ["list", "birds"]), ("data", ["check", "birds"])]
    for (command, words), row in zip(calls, said(calls, here), strict=True):
        assert row["code"] in (None, 0) or words[0] == "check" and row["code"] == 1, row
        assert row["loaded"] == [] and len(row["said"]) > 100


@pytest.mark.parametrize("words, code, line", [
    ([], 2, "error: which command? choose from run, preview, synth, notebooks, study, runs, data"),
    (["nonsense"], 2, "error: which command?"), (["--help"], 0, "commands of synthdet"),
    (["run", "arms=pretrian"], 2, "error: arm 'pretrian' is unknown"),
    (["preview", "blend=x"], 2, "error: blend 'x' is unknown"),
    (["data", "check", "brids"], 2, "error: domain 'brids' is unknown"),
])
def test_the_module_says_the_same(words, code, line, tmp_path):
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "synthdet", *words], text=True,
                          capture_output=True, cwd=tmp_path, timeout=300)
    told = [l for l in done.stderr.splitlines() if not l.startswith("import time:")]
    assert done.returncode == code and (done.stdout + "\n".join(told)).startswith(line)
    loaded = {l.rsplit("|", 1)[1].strip() for l in done.stderr.splitlines() if l.startswith("import time:")}
    assert "synthdet.cli" in loaded and not loaded & set(HEAVY)
