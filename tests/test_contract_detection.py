"What every detector, optimiser and size takes, gives and refuses; a detector saved to a file and back."
import inspect
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from synthdet.core import named, refused
from synthdet.detection.detectors import detector, save_detector
from synthdet.detection.settings import BACKBONES, DETECTORS, Model, OPTIMIZERS, resolved, Schedule, SIZES
from synthdet.settings import identity, leaves, override
from synthdet.weights import read_note, save_weights

SIDE = 64
SMALL = dict(ssd=dict(backbone='mobilenetv1_025')) # the others have one size


pytestmark = pytest.mark.usefixtures('one_thread')


def built(name, classes=None, **options):
    torch.manual_seed(0)
    classes = classes or (2 if name == 'retinaface' else 3) # it knows faces only
    return detector(name, classes, **{**SMALL.get(name, {}), 'image_size': SIDE, **options}), classes


# -- every detector

@pytest.mark.parametrize('name', DETECTORS)
def test_a_detector_learns_and_detects(name):
    model, classes = built(name)
    images = [torch.rand(3, 64, 64), torch.rand(3, 48, 80)]
    nothing = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    targets = [dict(boxes=torch.tensor([[5., 5, 40, 50]]), labels=torch.tensor([classes - 1])), nothing]
    losses = model.train()(images, targets)
    total = sum(losses.values())
    total.backward()
    assert torch.isfinite(total) and all(v.ndim == 0 for v in losses.values())
    with torch.inference_mode(): found = model.eval()(images)
    assert [set(d) - {'landmarks'} for d in found] == [{'boxes', 'scores', 'labels'}] * 2
    for d in found:
        assert d['boxes'].shape == (len(d['scores']), 4) and len(d['labels']) == len(d['scores']) <= 400
        assert d['labels'].dtype == torch.int64 and ((d['labels'] > 0) & (d['labels'] < classes)).all()
        assert (d['scores'][1:] <= d['scores'][:-1]).all()


@pytest.mark.parametrize('name', DETECTORS)
def test_a_builder_takes_what_settings_say(name):
    parameters = inspect.signature(named('detector', name, DETECTORS)).parameters
    assert {'num_classes', 'image_size', 'weights'} <= parameters.keys()
    torch.manual_seed(0)
    from_settings = detector(Model(detector=name, image_size=SIDE, **SMALL.get(name, {})))
    by_name, _ = built(name, 2)
    state = by_name.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in from_settings.state_dict().items()), 'one seed, one network'


@pytest.mark.parametrize('name', DETECTORS)
def test_a_detector_comes_back_from_its_file(name, tmp_path):
    model, classes = built(name)
    words = ['ant', 'bee'][:classes - 1]
    settings = Model(detector=name, image_size=SIDE, **SMALL.get(name, {}))
    file = save_detector(model, tmp_path/'x.safetensors', settings=settings, classes=words, scores=dict(ap50=.5),
                         licences=['CC0'], seed=3)
    again, x = detector(file), [torch.rand(3, 50, 70)]
    assert again.classes == tuple(words) and again.model_settings == resolved(settings) and not again.training
    assert (again.note['scores'], again.note['licences'], again.note['seed']) == (dict(ap50=.5), ['CC0'], 3)
    with torch.inference_mode(): ours, theirs = model.eval()(x)[0], again(x)[0]
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())
    start = detector(Model(detector=name, weights=str(file), image_size=SIDE, **SMALL.get(name, {})), classes)
    assert all(torch.equal(v, start.state_dict()[k]) for k, v in model.state_dict().items()), 'also as initial weights'


@pytest.mark.parametrize('name', DETECTORS)
@pytest.mark.parametrize('options, says', [
    (dict(classes=1), 'num_classes=1'), (dict(image_size=8), 'image_size=8 is not possible'),
    (dict(image_size=(64, 64, 3)), 'image_size=(64, 64, 3) is not possible'),
    (dict(weights='nowhere.pth'), 'nowhere.pth does not exist')])
def test_what_no_detector_takes(name, options, says): assert says in refused(built, name, **options)


@pytest.mark.parametrize('name', [n for n in DETECTORS if n != 'ssd'])
def test_a_backbone_is_for_ssd_alone(name):
    assert f"backbone 'resnet18' cannot be chosen for {name}" in refused(built, name, backbone='resnet18')
    assert 'no ImageNet weights' in refused(built, name, weights='imagenet') # none lie in the cache of a test


@pytest.fixture(autouse=True)
def no_weights_at_hand(tmp_path, monkeypatch): monkeypatch.setenv('TORCH_HOME', str(tmp_path/'torch'))


# -- names, settings, builders, things

def test_a_builder_of_ones_own(tmp_path):
    seen = []
    def mine(num_classes, **options):
        seen.append((num_classes, options))
        return torch.nn.Linear(1, num_classes)
    assert isinstance(detector(mine), torch.nn.Linear) and isinstance(detector(mine, 5, image_size=96), torch.nn.Linear)
    assert seen == [(2, {}), (5, dict(image_size=96))]
    assert "backbone 'x' cannot be chosen for mine" in refused(detector, mine, backbone='x')
    file = save_detector(torch.nn.Linear(1, 2), tmp_path/'own.safetensors', settings=None, classes=['ant'])
    assert 'does not say how its network is built' in refused(detector, file)


def test_an_entry_of_ones_own_is_a_detector_everywhere(monkeypatch, tmp_path):
    def mine(num_classes, image_size, weights): return built('ssd', num_classes, image_size=image_size)[0]
    monkeypatch.setitem(DETECTORS, 'mine', mine)
    settings = Model(detector='mine', image_size=SIDE)
    model = detector(settings, 4)
    file = save_detector(model, tmp_path/'x.safetensors', settings=settings, classes='abc')
    assert detector(file).size == model.size == (SIDE, SIDE)
    monkeypatch.delitem(DETECTORS, 'mine')
    assert "detector 'mine' is unknown" in refused(detector, file)


def test_a_built_detector_is_given_back():
    model, _ = built('ssd')
    assert detector(model) is model


def test_options_win_over_settings_and_names_have_defaults():
    assert detector(Model(backbone='mobilenetv1_025', image_size=96), image_size=SIDE).size == (SIDE, SIDE)
    assert detector('ssd', backbone='mobilenetv1_025').size == (300, 300), "the paper's size"
    assert detector(Model(detector='retinaface', test_size='long320')).size == 'long320'
    assert built('ssd', score_thresh=.5)[0].selection['score_thresh'] == .5
    assert detector(name='retinaface', image_size='original').size == 'original', 'as in version 0.1'


@pytest.mark.parametrize('name', ['ssd', 'retinaface'])
def test_options_that_a_builder_does_not_have(name):
    assert f"option 'depth' is unknown to {name}; choose from" in refused(built, name, depth=3)


def test_unknown_names_and_files():
    told = refused(detector, 'yolo')
    assert "detector 'yolo' is unknown; choose from ssd, " in told and 'the path of a saved detector' in told
    assert refused(detector, 'nowhere.safetensors').startswith('nowhere.safetensors: no such file; give the path of')


# -- files

def saved(path, **changes):
    about = dict(settings=Model(backbone='mobilenetv1_025', image_size=SIDE), classes=['ant'], scores=dict(ap50=.5))
    return save_detector(built('ssd', 2)[0], path, **{**about, **changes})


def test_a_file_is_never_replaced_by_another(tmp_path):
    file = saved(tmp_path/'x.safetensors')
    before, time = file.read_bytes(), file.stat().st_mtime_ns
    assert saved(file) == file and file.stat().st_mtime_ns == time, 'the same again is no change'
    assert 'is there and holds another detector' in refused(saved, file, scores=dict(ap50=.6))
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['x.safetensors']


def test_a_file_says_how_many_classes_there_are(tmp_path):
    file = saved(tmp_path/'x.safetensors')
    assert detector(file, 2).num_classes == 2 and detector(str(file)).classes == ('ant',)
    assert 'num_classes=4, but' in refused(detector, file, 4)


def test_a_file_is_loaded_at_another_size(tmp_path):
    assert detector(saved(tmp_path/'x.safetensors'), image_size=(96, 64)).size == (96, 64)
    wide = save_detector(built('ssd', 2, image_size=(64, 96))[0], tmp_path/'wide.safetensors',
                         settings=Model(backbone='mobilenetv1_025'), classes=['ant'], image_size=(64, 96))
    assert detector(wide).size == (64, 96)


def test_a_file_keeps_how_test_images_are_sized(tmp_path):
    settings = Model(detector='retinaface', image_size=SIDE, test_size='long320')
    file = save_detector(detector(settings), tmp_path/'x.safetensors', settings=settings, classes=['face'],
                         image_size=SIDE)
    assert detector(file).size == 'long320'


def test_a_damaged_file_is_told(tmp_path):
    file = saved(tmp_path/'x.safetensors')
    note, state = read_note(file), load_file(file)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    (tmp_path/'changed.safetensors').write_bytes(data)
    assert 'digest' in refused(detector, tmp_path/'changed.safetensors')
    save_weights({k: v for k, v in state.items() if k != 'heads.0.bias'}, tmp_path/'less.safetensors', **note)
    assert "'heads.0.bias' is missing" in refused(detector, tmp_path/'less.safetensors')
    for name, odd in dict(none={}, newer={**note, 'model': {**note['model'], 'depth': 3}}).items():
        save_weights(state, tmp_path/f'{name}.safetensors', **odd)
        assert 'does not say how its network is built' in refused(detector, tmp_path/f'{name}.safetensors')
    save_file(state, tmp_path/'bare.safetensors')
    assert 'does not say how its network is built' in refused(detector, tmp_path/'bare.safetensors')


# -- the other dicts

@pytest.mark.parametrize('name', OPTIMIZERS)
def test_an_optimiser_follows_the_gradient(name):
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = named('optimizer', name, OPTIMIZERS)([weight], .1, True)
    (weight**2).sum().backward()
    optimizer.step()
    assert weight < 1 and optimizer.param_groups[0]['lr'] == .1


@pytest.mark.parametrize('name', SIZES)
def test_a_size_keeps_the_shape_of_an_image(name):
    h, w = named('image_size', name, SIZES)(480, 640)
    assert (type(h), type(w)) == (int, int) and abs(h/w - .75) < .01


def test_layouts_have_a_scale_for_each_tap():
    assert all(len(l.taps) == len(l.scales) and sorted(l.scales) == list(l.scales) for l in BACKBONES.values())


# -- settings

def test_settings_refuse_what_cannot_be():
    assert "test_size='original' is for detector 'retinaface'; ssd sees" in refused(Model, test_size='original')
    assert "test_size 'big' is unknown" in refused(Model, detector='retinaface', test_size='big')
    assert "detector 'yolo' is unknown" in refused(Model, detector='yolo')
    assert "select 'loss' is unknown; choose from ap50, ap50_authors, last" in refused(Schedule, select='loss')
    assert 'decay=(0.5, 95.0) should be 0 to 1' in refused(Schedule, decay=(.5, 95.))


def test_auto_is_filled_and_a_given_backbone_is_kept():
    assert resolved(Model()).backbone == 'resnet_small' and resolved(Model(backbone='resnet18')).backbone == 'resnet18'
    assert all(resolved(Model(detector=n)).backbone == 'its own' for n in DETECTORS if n != 'ssd')


def test_settings_are_plain_data():
    for s in (Model(), resolved(Model()), Schedule()): assert json.loads(json.dumps(identity(s)))
    assert {l.path for l in leaves(Schedule())} == {'batch_size', 'lr', 'optimizer', 'decay', 'eval_every', 'select',
                                                    'precision', 'compile'}
    assert override(Model(), 'detector=retinaface test_size=long640').test_size == 'long640'
