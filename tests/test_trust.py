"What accidents and strangers do to files: a turned bit is noticed, a bomb is refused, people's checkpoints are read."
import argparse
import collections
import datetime
import enum
import io
import json
import multiprocessing
import os
import pathlib
import pickle
import random
import resource
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import synthdet
from helpers import ended, forked
from synthdet.core import refused, UserError
from synthdet.paths import hash_file
from synthdet.data.annotations import read_detection, write_detection
from synthdet.data.butterflies import class_image
from synthdet.data.domain import ClassImage, Drawn
from synthdet.data.unpack import extract
from synthdet.detection.backbones import make_backbone
from synthdet.detection.detectors import detector, save_detector
from synthdet.detection.settings import Model
from synthdet.detection.train import train
from synthdet.detection.widerface import _texts
from synthdet.evidence.rows import read_rows, write_row
from synthdet.masks.redo import RedoConfig, train_redo
from synthdet.objects.gantrain import GanConfig, train_gan
from synthdet.resume import load_state, save_state
from synthdet.synthesis.cutouts import make_cutouts
from synthdet.unpickle import read_pickle
from synthdet.weights import ASSETS, read_note, read_weights, save_weights, shipped

FLIPS = 100


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))


def plain(x):
    "What was read, to be compared."
    if isinstance(x, torch.Tensor): return [str(x.dtype), list(x.shape), x.detach().cpu().numpy().tobytes()]
    if isinstance(x, nn.Module): return plain(dict(x.state_dict()))
    if isinstance(x, dict): return {k: plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)): return [plain(v) for v in x]
    return x


# One bit

def pictures(n=8):
    return torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def box(n=1): return dict(boxes=torch.tensor([[8., 8., 40., 40.]]), labels=torch.ones(1, dtype=torch.int64), image_id=0)


class Tiny(nn.Module):
    "A detector whose loss is the brightness of a convolution."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 8, 3)

    def forward(self, images, targets=None): return dict(bright=self.layer(torch.stack(list(images))).square().mean())


def feed(start):
    while True: yield pictures(2), [box(), box()]


def trained(out):
    "A training of a detector, as it is read when it is asked for again."
    model = Tiny()
    done = train(model, feed, 3, out, eval_every=3, precision='fp32')
    return plain(model), [{k: v for k, v in r.items()} for r in done['history']]


TINY_REDO = RedoConfig(size=32, masks=2, nf=4, nf_generator=0, nz=4, attention=False, steps=2, batch=4, check_every=2,
                       collapse=0., steady=0.)
TINY_GAN = GanConfig(nz=8, width=.05, batch=4, steps=1, check_every=1)


def redo(out):
    done = train_redo(pictures(), TINY_REDO, out)
    return plain(read_weights(done['path'])), read_note(done['path']), done['history']


def gan(out):
    done = train_gan(pictures(), TINY_GAN, out)
    return plain(read_weights(done['path'])), read_note(done['path']), done['history']


def weights_of(path): return plain(read_weights(path)), read_note(path)


def state_of(path):
    module = net()
    return plain(load_state(path.parent, dict(steps=9, lr=.1), net=module)), plain(module)


def detector_of(path):
    found = detector(path)
    return plain(found), found.classes, found.note


def made(kind, folder):
    "(file, function that reads it) of a kind that the package writes."
    if kind == 'weights': return save_weights(net(), folder/'a.safetensors', step=3, classes=['a']), weights_of
    if kind == 'state':
        done = dict(step=3, rows=[dict(step=k, loss=.5*k) for k in range(3)])
        save_state(folder, done, dict(steps=9, lr=.1), net=net())
        return folder/'state.pt', state_of
    if kind == 'detector':
        settings = Model(backbone='resnet_small', image_size=64)
        path = save_detector(detector(settings, 2), folder/'d.safetensors', settings=settings,
                             classes=['a'], scores=dict(ap50=.5))
        return path, detector_of
    if kind == 'rows':
        for k in range(7): write_row(folder/'results.jsonl', dict(id=f'a{k}', ap50=k/9, curve=[(0, .5)], note='é'))
        return folder/'results.jsonl', read_rows
    name, how = kind.split('/')
    run = dict(train=trained, redo=redo, gan=gan)[name]
    run(folder)
    return folder/how, lambda path: run(path.parent)


KINDS = ['weights', 'state', 'detector', 'rows', 'train/best.safetensors', 'train/last.safetensors', 'train/state.pt',
         'redo/mask_encoder.safetensors', 'redo/state.pt', 'gan/generator.safetensors', 'gan/state.pt']


def noticed(path, read, changes):
    "(noticed, harmless, silent) of changed contents of a file: an error or a warning, the right values, other values."
    right, whole, count = read(path), path.read_bytes(), collections.Counter()
    for content in changes(whole):
        path.write_bytes(content)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            try: found = read(path)
            except UserError as e:
                assert '\n' not in str(e)
                count['noticed'] += 1
            else: count['harmless' if found == right else 'noticed' if told else 'silent'] += 1
    path.write_bytes(whole)
    return count


def flips(whole, n=FLIPS):
    "The file with one bit turned over, all over it."
    luck = random.Random(0)
    for k in range(n):
        at, content = (k*len(whole) + luck.randrange(len(whole)))//n, bytearray(whole)
        content[at] ^= 1 << luck.randrange(8)
        yield bytes(content)


@pytest.mark.parametrize('kind', KINDS)
def test_one_bit_is_noticed(kind, tmp_path):
    count = noticed(*made(kind, tmp_path), flips)
    print(kind, dict(count))
    assert count['noticed'] >= 99*count['silent'] and count['noticed'] > FLIPS//4


@pytest.mark.parametrize('kind', KINDS[:4])
def test_shortened_and_extended_files_are_noticed(kind, tmp_path):
    def changes(whole):
        for n in (1, 2, 7, 50, len(whole)//2, len(whole) - 1): yield whole[:-n]
        for n in (1, 50, 5000): yield whole + bytes(n)
    count = noticed(*made(kind, tmp_path), changes)
    print(kind, dict(count))
    assert not count['silent']


@pytest.mark.parametrize('kind', ['train/best.safetensors', 'train/last.safetensors', 'redo/mask_encoder.safetensors',
                                  'gan/generator.safetensors'])
def test_the_file_of_another_run_is_noticed_and_can_be_made_anew(kind, tmp_path):
    path, read = made(kind, tmp_path)
    right = read(path)
    other = {k: v + 1 if v.is_floating_point() else v for k, v in read_weights(path).items()}
    save_weights(other, path, **read_note(path))
    told = refused(read, path)
    assert path.name in told and 'delete it' in told
    path.unlink()
    assert read(path) == right, 'made anew from the state'


def test_states_of_before_are_read(tmp_path):
    "They have no digest."
    path, read = made('state', tmp_path)
    right, content = read(path), path.read_bytes()
    at = content.rfind(b'synthdet blake2b ')
    path.write_bytes(content[:at - 2] + b'\0\0')
    assert read(path) == right


def test_shipped_files_are_those_in_the_list(monkeypatch, tmp_path):
    assets = Path(synthdet.__file__).parent/'assets'
    assert ASSETS == {p.name: hash_file(p, 'sha256') for p in assets.glob('*')}
    (tmp_path/'assets').mkdir()
    for name in ASSETS:
        content = bytearray((assets/name).read_bytes())
        content[-1] ^= 1
        (tmp_path/'assets'/name).write_bytes(content)
    monkeypatch.setattr(synthdet, '__file__', str(tmp_path/'__init__.py'))
    for name in ASSETS:
        if name.endswith('.safetensors'):
            for read in (read_note, read_weights):
                assert 'install synthdet again' in refused(read, tmp_path/'assets'/name)
        assert 'is damaged or was changed' in refused(shipped, name)
        (tmp_path/'assets'/name).unlink()
        assert 'is missing; install synthdet again' in refused(shipped, name)
    assert "shipped file 'other' is unknown" in refused(shipped, 'other')


# People's checkpoints

class Phase(enum.Enum):
    warm = 1


BODY = 'resnet_small'


def body(): return {k: torch.full_like(v, .5) for k, v in make_backbone(BODY).body.state_dict().items()}


def under(prefix, state=None): return {prefix + k: v for k, v in (state or body()).items()}


def within(part, wrapper):
    "Names as they are when a part of the network is wrapped."
    return {k.replace(f'{part}.', f'{part}.{wrapper}.'): v for k, v in body().items()}


def an_optimizer():
    "One that has made a step, whole: its state has parameters for keys."
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([p], .1, momentum=.9)
    p.sum().backward()
    optimizer.step()
    return optimizer


def zeros(): return {k: torch.zeros_like(v) for k, v in body().items()}


METADATA = dict(args=argparse.Namespace(lr=.1, output=pathlib.PurePosixPath('/a'), seed=None), epoch=3, arch='resnet',
                optimizer=dict(state={0: dict(step=torch.ones(()), exp_avg=torch.ones(3))}, param_groups=[dict(lr=.1)]),
                when=datetime.datetime(2026, 1, 1), phase=Phase.warm, best=np.float32(.5), rng=np.random.get_state(),
                seen=collections.defaultdict(list, {'a': [1]}), counts=collections.Counter('ab'))
PEOPLE = dict(
    bare=body(), state_dict=dict(state_dict=body()), model=dict(model=body(), **METADATA),
    timm=dict(METADATA, state_dict=body(), version=2, metric=.7), ddp=dict(METADATA, state_dict=under('module.')),
    compiled=under('_orig_mod.'), both=under('module._orig_mod.'), nested=under('module._orig_mod.model.backbone.'),
    lightning=dict(state_dict=under('model.'), hyper_parameters=dict(lr=.1), callbacks={}, loops={},
                   **{'pytorch-lightning_version': '2.1'}),
    encoder=under('encoder.'), net=dict(net=under('net.')),
    ema=dict(METADATA, state_dict=zeros(), state_dict_ema=body()),
    model_ema=dict(model=zeros(), model_ema=under('module.')), ema_only=dict(ema=body()),
    swa={**under('module.'), 'n_averaged': torch.ones(())},
    inner_ema=dict(state_dict={**under('model.', zeros()), **under('model_ema.')}),
    half_ema=dict(model=body(), ema={k: torch.zeros_like(v) for k, v in body().items() if 'running' not in k}),
    heads={**body(), 'fc.weight': torch.ones(7, 128), 'fc.bias': torch.ones(7)},
    wrapped_heads={**under('module.'), 'module.fc.weight': torch.ones(7, 128), 'module.fc.bias': torch.ones(7)},
    detector={**under('backbone.body.'), 'head.weight': torch.ones(3), 'rpn.bias': torch.ones(2)},
    several=dict(backbone=body(), head=dict(weight=torch.ones(3)), optimizer=METADATA['optimizer']),
    fp16={k: v.half() if v.is_floating_point() else v for k, v in body().items()},
    bf16={k: v.bfloat16() if v.is_floating_point() else v for k, v in body().items()},
    untracked={k: v for k, v in body().items() if 'num_batches' not in k},
    compiled_parts=within('layer1', '_orig_mod'), fsdp=within('layer2', '_fsdp_wrapped_module'),
    checkpointed=within('layer2.0', '_checkpoint_wrapped_module'),
    ddp_parts=under('model.', within('layer2', 'module')),
    fsdp_both=under('_fsdp_wrapped_module.', within('layer1', '_checkpoint_wrapped_module')),
    twice=dict(METADATA, state_dict=body(), model=body()), whole_optimizer=dict(model=body(), optimizer=an_optimizer()),
    odd_values=dict(model=body(), crop=(..., NotImplemented), devices={torch.device('cpu'): 1}))


def as_file(content, how, folder):
    "A file of one format, under a name that may say another."
    names = dict(zip='a.pth', legacy='a.pth.tar', misnamed='a.safetensors', safetensors='b.safetensors', wrong='b.pth')
    path = folder/names[how]
    if how in ('safetensors', 'wrong'): save_weights(content, path)
    else: torch.save(content, path, _use_new_zipfile_serialization=how != 'legacy')
    return path


def ways(content):
    "The formats that can hold it: safetensors hold tensors only."
    flat = all(isinstance(v, torch.Tensor) for v in content.values())
    return ['zip', 'legacy', 'misnamed', *(['safetensors', 'wrong'] if flat else [])]


@pytest.mark.parametrize('name, how', [(name, how) for name, content in PEOPLE.items() for how in ways(content)])
@pytest.mark.filterwarnings('ignore')
def test_people_s_checkpoints_are_read(name, how, tmp_path):
    found = make_backbone(BODY, as_file(PEOPLE[name], how, tmp_path)).body.state_dict()
    right = body()
    for k, v in found.items():
        if k.endswith('weight') and v.dim() == 1: continue  # gains are corrected from one eps to another
        if not k.endswith('num_batches_tracked'): assert torch.equal(v, right[k]), k


SAID = dict(ema="below 'state_dict_ema.' is taken", inner_ema="below 'model_ema.' is taken",
            detector="'head.weight', are left out")


@pytest.mark.parametrize('name', SAID)
def test_what_was_chosen_is_said(name, tmp_path):
    with pytest.warns(UserWarning, match='taken') as told: make_backbone(BODY, as_file(PEOPLE[name], 'zip', tmp_path))
    assert SAID[name] in str(told[0].message)


UNCLEAR = {
    'several times': dict(state_dict={**under('encoder_q.'), **under('encoder_k.', zeros())}),
    'two students': dict(a=body(), b=zeros()),
    'is missing': under('model.', {k: v for k, v in body().items() if k != 'conv1.weight'}),
    'expected [': {**under('module.'), 'module.conv1.weight': torch.ones(1)},
    'whole pickled network (torch.nn.modules.container.Sequential)': net(),
    'whole pickled network': dict(model=net(), epoch=3), 'does not hold a dictionary of tensors': dict(epoch=3)}


@pytest.mark.parametrize('words', UNCLEAR)
def test_what_cannot_be_decided_is_one_line(words, tmp_path):
    for how in ('zip', 'legacy'):
        told = refused(make_backbone, BODY, as_file(UNCLEAR[words], how, tmp_path))
        assert ('several times' if words == 'two students' else words) in told


def test_a_detector_in_people_s_form_is_read(tmp_path):
    model = detector('ssd', 2, backbone=BODY, image_size=64)
    torch.save(dict(METADATA, state_dict=under('module.', model.state_dict())), tmp_path/'a.pth')
    with torch.no_grad():
        for p in (twin := detector('ssd', 2, backbone=BODY, image_size=64)).parameters(): p.zero_()
    twin = detector('ssd', 2, backbone=BODY, image_size=64, weights=str(tmp_path/'a.pth'))
    assert plain(twin) == plain(model)


# Arrays

def arrays(): return {k: v.numpy() for k, v in body().items()}


def pickled(content, protocol, core='numpy._core'):
    "As NumPy of another age writes it."
    data = pickle.dumps(content, protocol)
    return data.replace(b'numpy._core', core.encode()) if protocol < 4 else data


@pytest.mark.parametrize('protocol,core', [(2, 'numpy.core'), (2, 'numpy._core'), (4, ''), (5, '')])
def test_zoos_of_arrays_are_read(protocol, core, tmp_path):
    "Detectron2's files are a pickled dictionary."
    content = dict(model=arrays(), __author__='A', matching_heuristics=True)
    (tmp_path/'a.pkl').write_bytes(pickled(content, protocol, core))
    found = read_weights(tmp_path/'a.pkl')
    assert plain(found) == plain(body()) and plain(make_backbone(BODY, tmp_path/'a.pkl').body.layer1) is not None
    torch.save(content, tmp_path/'a.pth')
    assert plain(read_weights(tmp_path/'a.pth')) == plain(body())
    odd = dict(columns=np.asfortranarray(np.arange(6.).reshape(2, 3)), big=np.arange(3, dtype='>i4'),
               none=np.zeros((0, 3)), one=np.array(2, np.float32), flags=np.array([True, False]),
               half=np.ones(2, np.float16))
    (tmp_path/'b.pkl').write_bytes(pickled(odd, protocol, core or 'numpy._core'))
    for k, v in read_weights(tmp_path/'b.pkl').items():
        assert np.array_equal(v.numpy(), odd[k]) and v.shape == odd[k].shape, k


def test_npz_are_read(tmp_path):
    for save in (np.savez, np.savez_compressed):
        save(tmp_path/'a.npz', **arrays())
        assert plain(read_weights(tmp_path/'a.npz')) == plain(body())
    np.savez(tmp_path/'b.npz', a=np.array([dict()], dtype=object))
    assert 'cannot be read' in refused(read_weights, tmp_path/'b.npz')


def test_arrays_of_objects_and_lies_about_sizes_are_refused(tmp_path):
    for k, content in enumerate((dict(a=np.array([print], dtype=object)), dict(a=np.zeros(2, [('x', 'f4')])))):
        (tmp_path/f'{k}.pkl').write_bytes(pickle.dumps(content, 2))
        assert 'cannot be read' in refused(read_weights, tmp_path/f'{k}.pkl')
    good = pickle.dumps(dict(a=np.arange(7, dtype='u1')), 2)
    assert good.count(b'K\x07\x85') == 1
    (tmp_path/'c.pkl').write_bytes(good.replace(b'K\x07\x85', b'J\xff\xff\xff\x7f\x85'))
    assert 'bytes for an array' in refused(read_weights, tmp_path/'c.pkl')


def zipped(*names):
    with zipfile.ZipFile(f := io.BytesIO(), 'w') as z:
        for n in names: z.writestr(n, '{}')
    return f.getvalue()


KINDS_OF_OTHERS = { # name -> (content, what is said of it)
    'a.h5': (b'\x89HDF\r\n\x1a\n' + bytes(600), 'Keras'), 'a.gguf': (b'GGUF' + bytes(99), 'GGUF'),
    'a.tflite': (bytes(4) + b'TFL3' + bytes(99), 'TensorFlow Lite'), 'config.json': (b' {"a": 1}', 'JSON'),
    'a.pt2': (zipped('a/archive_format', 'a/models/model.json'), 'torch.export'),
    'old.pt2': (zipped('serialized_exported_program.json'), 'torch.export'),
    'a.keras': (zipped('metadata.json', 'config.json'), 'Keras'), 'pytorch_model.bin': (b'\1\2\3'*99, '.bin'),
    'pointer.pth': (b'version https://git-lfs.github.com/spec/v1', 'git lfs pull'),
    'page.safetensors': (b'<!DOCTYPE html><html>', 'web page'), 'a.npy': (b'\x93NUMPY\1\0', 'np.savez'),
    'a.onnx': (b'\x08\x08\x12\x01', 'ONNX'), 'a.pb': (b'\x08\1', 'TensorFlow'), 'a.MSGPACK': (b'\x81', 'Flax')}


@pytest.mark.parametrize('name', KINDS_OF_OTHERS)
def test_files_of_other_programs_say_what_they_are(name, tmp_path):
    content, word = KINDS_OF_OTHERS[name]
    (tmp_path/name).write_bytes(content)
    line = refused(read_weights, tmp_path/name)
    assert line.startswith(f'{tmp_path/name} is ') and word in line and '; ' in line


# Bombs

def limited(calls):
    "name -> (what a process of little memory says of a call, MiB that it took)."
    code = f'''
import json, resource, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_trust import *
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
peak, told = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024, dict()
for name, call in {calls!r}.items():
    before = peak()
    told[name] = eval(call), peak() - before
print(json.dumps(told))
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def texts(path): return len(list(_texts(Path(path))))


def torch_zip(path, **members):
    "A checkpoint, packed, with other members."
    torch.save(dict(w=torch.zeros(4)), f := io.BytesIO())
    with zipfile.ZipFile(f) as z: parts = {n: z.read(n) for n in z.namelist()}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for k, v in parts.items():
            own = members.pop(k.partition('/')[2], v)
            with z.open(k, 'w') as out:
                for part in own if not isinstance(own, bytes) else [own]: out.write(part)
        for k, v in members.items(): z.writestr(f'archive/{k}', v)
    return path


def tar_gz(path, blocks):
    import gzip
    with gzip.open(path, 'wb', 1) as f:
        for b in blocks: f.write(b)
    return path


def header(name='a.pth', size=0, kind=tarfile.REGTYPE):
    m = tarfile.TarInfo(name)
    m.size, m.type = size, kind
    return m.tobuf(tarfile.GNU_FORMAT if kind != tarfile.XHDTYPE else tarfile.USTAR_FORMAT)


def many_entries(path, n=3_000_000):
    "A zip whose directory is one entry again and again."
    with zipfile.ZipFile(f := io.BytesIO(), 'w') as z: z.writestr('a/data.pkl', b'N.')
    content = f.getvalue()
    at = content.rfind(b'PK\1\2')
    end = content.rfind(b'PK\5\6')
    entry = content[at:end]
    path.write_bytes(content[:at] + entry*n + b'PK\5\6' + bytes(4) + b'\xff\xff'*2
                     + (len(entry)*n).to_bytes(4, 'little') + at.to_bytes(4, 'little') + bytes(2))
    return path


def zip64_lie(path):
    "A directory of 2**60 bytes, as a zip64 record says."
    path.write_bytes(b'PK\3\4' + bytes(60)
                     + b'PK\6\6' + (44).to_bytes(8, 'little') + bytes(12) + (2**60).to_bytes(8, 'little')*4
                     + b'PK\6\7' + bytes(4) + (64).to_bytes(8, 'little') + (1).to_bytes(4, 'little')
                     + b'PK\5\6' + bytes(4) + b'\xff'*12 + bytes(2))
    return path


def expanded(path):
    torch.save(dict(w=torch.zeros(1).expand(10**12)), path)
    return path


def claimed(path, legacy):
    torch.save(dict(w=torch.zeros(4)), f := io.BytesIO(), _use_new_zipfile_serialization=not legacy)
    huge = b'\x8a\x06' + (10**12).to_bytes(6, 'little')
    if legacy: path.write_bytes(f.getvalue().replace(b'K\x04', huge))
    else:
        with zipfile.ZipFile(f) as z: pkl = z.read('archive/data.pkl')
        torch_zip(path, **{'data.pkl': pkl.replace(b'K\x04', huge)})
    return path


def safetensors_of(path, header, n=None, body=b''):
    path.write_bytes((len(header) if n is None else n).to_bytes(8, 'little') + header + body)
    return path


MIB = bytes(2**20)
BOMBS = dict(
    deflated=(lambda p: torch_zip(p, **{'data/0': [MIB]*500}), 'read_weights', 'refused'),
    lists=(lambda p: torch_zip(p, **{'data.pkl': [b'\x80\x02'] + [b']'*2**20]*40}), 'read_weights', 'refused'),
    members=(many_entries, 'read_weights', 'refused'), zip64=(zip64_lie, 'read_weights', 'cannot be read|refused'),
    expanded=(expanded, 'read_weights', '1000000000000 elements'),
    claimed=(lambda p: claimed(p, False), 'read_weights', 'claimed'),
    legacy=(lambda p: claimed(p, True), 'read_weights', 'claimed'),
    gz=(lambda p: tar_gz(p, [header(size=200 << 20), *[MIB]*200]), 'read_weights', 'refused|cannot be read'),
    headers=(lambda p: tar_gz(p, [header()*2048]*100), 'read_weights', 'members'),
    long_name=(lambda p: tar_gz(p, [header('x', 200 << 20, tarfile.GNUTYPE_LONGNAME), *[MIB]*200]),
               'read_weights', 'refused'),
    pax=(lambda p: tar_gz(p, [header('x', 200 << 20, tarfile.XHDTYPE), *[MIB]*200]), 'read_weights', 'refused'),
    sparse=(lambda p: tar_gz(p, [header('a.pth', 0, tarfile.GNUTYPE_SPARSE), MIB]),
            'read_weights', 'holes|cannot be read'),
    nested_names=(lambda p: tar_gz(p, [header('x', 5, tarfile.GNUTYPE_LONGNAME) + b'name\0' + bytes(507)]*5000),
                  'read_weights', 'cannot be read'),
    long_header=(lambda p: safetensors_of(p, b'{' + b' '*(90 << 20)), 'read_weights', 'header'),
    beyond=(lambda p: safetensors_of(p, b'{"a":{"dtype":"F32","shape":[1000000000000],'
                                        b'"data_offsets":[0,4000000000000]}}'), 'read_weights', 'cannot be read'),
    depth=(lambda p: safetensors_of(p, b'{"a":' + b'['*100000), 'read_weights', 'cannot be read'),
    predictions=(lambda p: tar_gz(p, [header('a/b.txt', 200 << 20), *[MIB]*200]), 'texts', 'unpacks|cannot be read'),
    images=(lambda p: tar_gz(p, [header('a/b.jpg', 200 << 20), *[MIB]*200]),
            'lambda p: extract(p, p.parent/"out")', 'unpack'),
    captions=(lambda p: p.write_bytes(b'\x80\x04\x95' + (2**40).to_bytes(8, 'little') + b'.') and p,
              'read_pickle', 'cannot be read'))


@pytest.mark.slow
def test_bombs_are_refused_before_they_unfold(tmp_path):
    calls = {}
    for name, (build, read, _) in BOMBS.items():
        (tmp_path/name).mkdir()
        calls[name] = f'refused({read}, Path({str(build(tmp_path/name/"a.pth"))!r}))'
    told = limited(calls)
    for name, (line, memory) in told.items():
        print(f'{name}: {memory} MiB: {line[line.index("a.pth"):][:120]}')
        assert any(w in line for w in BOMBS[name][2].split('|')), (name, line)
        assert memory < 600, (name, memory)


# Fuzz

def mutated(whole, luck):
    "The file with bytes changed, dropped, repeated, cut off, or another part of itself in their place."
    content = bytearray(whole)
    for _ in range(luck.randint(1, 4)):
        i, n = luck.randrange(len(content)), luck.choice([1, 1, 2, 4, 8, 64])
        what = luck.randrange(5)
        if what == 0: content[i:i + n] = luck.randbytes(n)
        elif what == 1: del content[i:i + n]
        elif what == 2: content[i:i] = content[i:i + n]
        elif what == 3: content[i:i + n] = whole[(j := luck.randrange(len(whole))):j + n]
        elif luck.random() < .2: del content[i:]
        else: content[i:i + 4] = luck.choice([b'\xff'*4, bytes(4), b'\x7f\xff\xff\xff', b'\0\0\0\x80'])
        if not content: content = bytearray(b'x')
    return bytes(content)


def fuzzed(name, folder):
    "(file, function that reads it)"
    small = dict(w=torch.arange(6.).reshape(2, 3), b=torch.ones(2))
    whole = dict(state_dict=small, args=argparse.Namespace(lr=.1), best=np.float64(.5), note='text')
    path = folder/'a.pth'
    if name == 'safetensors': return save_weights(small, folder/'a.safetensors', step=3), weights_of
    if name == 'state': return made('state', folder)
    if name == 'npz':
        np.savez(folder/'a.npz', **{k: v.numpy() for k, v in small.items()})
        return folder/'a.npz', lambda p: plain(read_weights(p))
    if name == 'arrays':
        path.write_bytes(pickle.dumps(dict(model={k: v.numpy() for k, v in small.items()}, best=np.float64(.5)), 2))
        return path, lambda p: plain(read_weights(p))
    torch.save(whole, path, _use_new_zipfile_serialization=name != 'legacy')
    if name == 'tar':
        with tarfile.open(folder/'a.tar', 'w') as tar: tar.add(path, 'm/a.pth')
        path = folder/'a.tar'
    return path, lambda p: plain(read_weights(p))


@pytest.mark.parametrize('name', ['safetensors', 'zip', 'legacy', 'state', 'tar', 'arrays', 'npz'])
def test_two_thousand_mutations_end_in_one_line_or_in_values(name, tmp_path):
    "Files with a digest or checksums give the right values or an error; others may give other numbers, never worse."
    path, read = fuzzed(name, tmp_path)
    luck = random.Random(1)
    count = noticed(path, read, lambda whole: (mutated(whole, luck) for _ in range(2000)))
    print(name, dict(count))
    assert sum(count.values()) == 2000 and count['noticed'] > 500
    assert name in ('legacy', 'tar', 'zip', 'arrays', 'npz') or not count['silent']


# What is kept to be used again

def seen(i):
    "A drawn picture with marked boxes."
    return pictures(8)[i], dict(boxes=box()['boxes'] + i, labels=torch.ones(1, dtype=torch.int64),
                                difficult=torch.tensor([i % 2 > 0]), image_id=i)


def drawn_again():
    data = Drawn(seen, 5, 10**7, ['moth'], source='a text')
    data.fill()
    return plain(list(data))


def cut_again(budget_mb=100):
    images = [ClassImage(class_image(i, size=40, seed=3)[0], 1, str(i)) for i in range(3)]
    pool = make_cutouts(images, budget_mb=budget_mb)
    return [(plain(c.rgba), c.label, c.origin) for c in pool], pool.content, dict(pool.rejected)


KEPT = dict(drawn=('*.safetensors', drawn_again), rows_of_a_pool=('*.npz', cut_again),
            pixels_of_a_pool=('*.rgba', cut_again), pixels_read_from_disk=('*.rgba', lambda: cut_again(0)))


@pytest.mark.parametrize('kind', KEPT)
def test_one_bit_of_what_is_kept_is_never_used(kind, tmp_path, monkeypatch):
    "It is made again, with the right values, or refused in a line."
    monkeypatch.setenv('SYNTHDET_CACHE', str(tmp_path))
    name, use = KEPT[kind]
    use()
    path, = tmp_path.rglob(name)
    count = noticed(path, lambda _: use(), lambda whole: flips(whole, 30))
    print(kind, dict(count))
    assert count.total() == 30 and not count['silent']


def written(folder, format, *more, **how):
    write_detection([*(seen(i) for i in range(5)), *more], folder/'set', format, ['moth'], **how)


CROWDED = (torch.zeros(3, 9, 9, dtype=torch.uint8), dict(
    boxes=torch.tensor([[0., 0., 5., 5.]]).repeat(300, 1), labels=torch.ones(300, dtype=torch.int64)))
FULL = dict(
    pool=(2000, lambda folder: cut_again()),
    row=(900, lambda folder: [write_row(folder/'r.jsonl', dict(id=f'{k}', ap50=k/99)) for k in range(99)]),
    coco=(600, lambda folder: written(folder, 'coco', suffix='.jpg')),
    voc=(20000, lambda folder: written(folder, 'voc', CROWDED)))


@pytest.mark.parametrize('kind', FULL)
def test_a_full_disk_is_one_line_and_leaves_nothing_that_reads_as_whole(kind, tmp_path, monkeypatch):
    "Files may grow to some size only: the system says so as for a full disk."
    monkeypatch.setenv('SYNTHDET_CACHE', str(tmp_path/'cache'))
    limit, write = FULL[kind]
    def child(told):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try: write(tmp_path)
        except UserError as e: told.send(str(e))
        else: told.send('')
    here, there = multiprocessing.Pipe(duplex=False)
    p = forked(child, there)
    assert here.poll(60)
    line = here.recv()
    assert ended(p) == 0
    assert 'cannot write' in line and 'free some space' in line and '\n' not in line
    assert not list(tmp_path.rglob('*.tmp'))
    if kind == 'row': assert 1 < len(read_rows(tmp_path/'r.jsonl')) < 99
    if kind in ('coco', 'voc'): assert 'is not written to its end' in refused(read_detection, tmp_path/'set')
    write(tmp_path)
    if kind in ('coco', 'voc'): assert len(read_detection(tmp_path/'set')) == 5 + (kind == 'voc')
