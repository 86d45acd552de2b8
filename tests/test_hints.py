"Hints name the option of the door the user came through: a function's argument, a word, or a command's option."
import ast
import re
import shutil
import warnings
from pathlib import Path

import pytest

import synthdet
from synthdet import cli, core
from synthdet.core import option, refused, through, UserError
from synthdet.data.annotations import read_detection
from synthdet.data.domains import load_domain, write_domain
from synthdet.evidence.arm import Arm, as_word
from synthdet.evidence.notebooks import own_parameters
from synthdet.settings import find

PACKAGE = Path(synthdet.__file__).parent
TOLD = ('UserError', 'Missing', 'NotHere', 'warn', 'choose', 'not_here', '_Failed')
IN_PYTHON = { # module -> arguments of functions that no command and no domain calls
    'annotations.py': {'classes'}, 'study.py': {'axis', 'base', 'claims', 'over', 'seeds'},
    'statistics.py': {'margin', 'on'}, 'stream.py': {'n_fake', 'recipe'}, 'cutouts.py': {'cache'},
    'gantrain.py': {'amp', 'batch'}, 'redo.py': {'amp', 'collapse'}, 'parts.py': {'data', 'quick', 'run'},
    'stylegan2.py': {'c_dim', 'embed_features'}, 'anchors.py': {'num_classes'},
    'contract.py': {'image_size', 'num_classes'}, 'retinaface.py': {'num_classes', 'weights'},
    'detectors.py': {'num_classes'}, 'segment.py': {'masks'}, 'domain.py': {'part'}, 'settings.py': {'name'},
    'public.py': {'name'}, 'door.py': {'name'}, 'detect.py': {'bad', 'classes'}}


def hints(path):
    "(line, name) of what messages of a module write as NAME= themselves, not through `option`."
    for call in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        name = getattr(getattr(call, 'func', None), 'id', getattr(getattr(call, 'func', None), 'attr', ''))
        if not isinstance(call, ast.Call) or name not in TOLD: continue
        by_door = [n for c in ast.walk(call) if isinstance(c, ast.Call) and getattr(c.func, 'id', '') == 'option'
                   for n in ast.walk(c)]
        for n in ast.walk(call):
            if n in by_door or not isinstance(n, ast.Constant) or not isinstance(n.value, str): continue
            for found in re.findall(r'(?<![-\w.{])([a-z_]+(?:\.[a-z_]+)*)=(?!=)', n.value): yield call.lineno, found


def is_setting(name):
    try: return bool(find(Arm(), name))
    except UserError: return False


def test_every_hint_is_a_word_or_asks_the_door():
    "A message of the package names a setting by a word that all commands of settings take, or through `option`."
    known = {*own_parameters(), 'arms', 'preset', 'protocol'}
    odd = [f'{p.name}, line {line}: {name}=' for p in sorted(PACKAGE.rglob('*.py')) for line, name in hints(p)
           if name not in known and name not in IN_PYTHON.get(p.name, ()) and not is_setting(name)]
    assert not odd, '; '.join(odd)


def command(capsys, name, *argv):
    "What a command says that refuses, or finds something missing."
    with pytest.raises(SystemExit) as stop: getattr(cli, name)([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert stop.value.code in (1, 2)
    return out + err


def test_the_same_mistake_at_every_door(capsys, drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = shutil.copytree(drawn, tmp_path/'tree')
    shutil.rmtree(tree/'birds_splits')
    assert 'give them as redo=FILE dmgan=FILE, or choose split=official' in refused(load_domain, 'birds', tree)
    lines = command(capsys, 'preview', 'domain=birds', f'root={tree}').splitlines()
    assert "give them as options='redo=FILE dmgan=FILE', or choose options='split=official'" in lines[0]
    assert lines[1:] == ['to try it without: `synthdet-data draw birds --root drawn`, then root=drawn',
                         'sizes, terms, and what has to be got by hand: `synthdet-data list birds`']
    told = command(capsys, 'data', 'check', 'birds', '--root', tree)
    assert "give them as --options 'redo=FILE dmgan=FILE', or choose --options split=official" in told
    official = "options='split=official'", 'recipe.image_size=64', '-n', '1'
    cli.preview(['domain=birds', f'root={tree}', *official])        # what was told, works
    for part in ('INRIAPerson', 'VOCdevkit', 'backgrounds'): shutil.rmtree(tree/part, ignore_errors=True)
    told = command(capsys, 'preview', 'domain=birds', f'root={tree}', *official)
    assert 'any folder without the class as backgrounds=' in told


def test_what_only_python_takes_is_told_in_python_alone(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = write_domain(load_domain('butterflies', n_class_images=4, n_backgrounds=2), tmp_path/'mine',
                        n_labelled=2, format='yolo')
    (mine/'detection'/'train'/'images'/'000001.png').unlink()
    inside = refused(read_detection, mine/'detection'/'train')
    outside = command(capsys, 'preview', 'domain=folder', f'root={mine}')
    assert 'say where they lie with images=' in inside and 'images=' not in outside and 'so add' in outside


def test_a_set_without_parts_is_told_how_it_is_divided(capsys, tmp_path, monkeypatch):
    "And what was told, works."
    monkeypatch.chdir(tmp_path)
    mine = write_domain(load_domain('butterflies', n_class_images=4, n_backgrounds=2, image_size=64), tmp_path/'mine',
                        n_labelled=10, format='yolo')
    (mine/'detection'/'train').rename(tmp_path/'flat')
    shutil.rmtree(mine/'detection')
    (tmp_path/'flat').rename(mine/'detection')
    (mine/'detection'/'data.yaml').write_text('names: [butterfly]')
    few = 'domain=folder', f'root={mine}', 'recipe.image_size=64', '-n', '1'
    with pytest.warns(UserWarning, match='holds a labelled set without parts.*it is left out'):
        cli.preview([*few, '--output', 'bare.png'])
    assert (tmp_path/'bare.png').exists(), 'no box is needed for scenes'
    told = command(capsys, 'preview', *few, 'objects=labelled')
    assert "so divide it with options='split=70/15/15', or into folders train, val and test" in told
    cli.preview([*few, 'options=split=70/15/15'])
    assert (tmp_path/'preview.png').exists()


def test_a_set_that_grows_is_told_by_its_options(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = 'n_class_images=8 n_backgrounds=2 image_size=64'
    synth = [f'options={words}', 'recipe.image_size=64', '--output', 'out', '--format', 'yolo']
    cli.synth([*synth, '-n', '4', '--val', '.5', '--masks'])
    assert len(read_detection('out', split='val')) == 2
    assert (tmp_path/'out'/'labels'/'val'/'000000.txt').read_text().count(' ') > 20
    capsys.readouterr()
    assert 'was begun with another --masks (see' in command(capsys, 'synth', *synth, '-n', '4', '--val', '.5')
    assert 'was begun with another --val (see' in command(capsys, 'synth', *synth, '-n', '4', '--masks')
    assert '-n 2: out holds 4 images' in command(capsys, 'synth', *synth, '-n', '2', '--val', '.5', '--masks')
    monkeypatch.setattr('synthdet.commands.stream._samples', None)  # what follows is said before anything is drawn
    (tmp_path/'full').mkdir()
    (tmp_path/'full'/'notes.txt').write_text('mine')
    assert 'was begun with another --format, --masks, --val (see' in command(capsys, 'synth', *synth[:-1], 'voc')
    assert 'full is not an empty folder and holds no stream' in command(capsys, 'synth', *synth, '--output', 'full')
    assert core._DOOR == [core._argument], 'and the door is closed behind it'


def test_doors(capsys):
    before = through(as_word)
    try: assert option('model.weights') == 'model.weights=' and option('read.strict=True', ', or leave {} away') == ''
    finally: through(before)
    assert option('model.weights') == 'weights=' and option('read.strict=True') == 'strict=True'


def test_a_notebook_shows_the_line_and_what_helps():
    with pytest.raises(UserError) as e: load_domain('birds', '')
    shown, helped = e.value._render_traceback_(), e.value.__notes__
    assert shown == [f'NotHere: {e.value}', *helped] and len(shown) == 3
    assert '`synthdet-data fetch cub --root data --accept`, then root=data' in helped[0]
    assert '`synthdet-data draw birds --root drawn`, then root=drawn' in helped[0]


@pytest.mark.parametrize('domain', ['faces', 'birds', 'cars', 'wider', 'qrcodes'])
def test_what_helps_helps(domain, drawn):
    "The drawn tree is read under the name that the hint says."
    line = refused(load_domain, domain, '')
    assert f'domain {domain!r} reads public data sets from a folder with ' in line
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert len(load_domain(domain, drawn).train)
