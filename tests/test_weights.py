"Weights files from strangers: whatever is in them, tensors come out or one line says why not, and nothing runs."
import argparse
import io
import os
import pickle
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from helpers import Call
from synthdet import archives, core
from synthdet.checkpoint import read_checkpoint
from synthdet.core import UserError
from synthdet.weights import fit_weights, read_note, read_weights, save_weights

FORMATS = dict(legacy=False, zip=True) # name -> value of torch.save's option


class Dtyped(Call):
    "A stand-in for numpy.dtype with a state, as crafted files have it."
    def __init__(self, state, *arguments): self.call = np.dtype, arguments, state


@pytest.fixture(params=FORMATS)
def save(request, tmp_path):
    "Writes an object as a foreign file in one of the two formats; gives the path."
    def write(content, name='foreign.pth'):
        torch.save(content, tmp_path/name, _use_new_zipfile_serialization=FORMATS[request.param])
        return tmp_path/name
    return write


def released(**options):
    "What a released file holds: networks and the options of the script that made it."
    torch.manual_seed(0)
    return dict(net=nn.Conv2d(2, 3, 3).state_dict(), options=argparse.Namespace(sizex=128, dataset='lfw', **options))


def is_released(found): return torch.equal(found['net']['weight'], released()['net']['weight'])


def refused(path, read=read_checkpoint):
    "The message of the `UserError`: one line, without torch's advice to switch the protection off."
    message = core.refused(read, path)
    assert '\n' not in message and 'weights_only' not in message and len(message) < 500
    return message


def test_a_released_file_is_read(save, monkeypatch):
    content = released(bestValIoU=np.float64(.625), device=torch.device('cuda:0'), lrG=1e-4, nfD=None, clean=False)
    monkeypatch.setattr(torch.serialization, 'location_tag', lambda storage: 'cuda:0') # as if they were on a GPU
    path = save(content)
    assert b'cuda:0' in path.read_bytes()
    found = read_checkpoint(path)
    options = dict(vars(content['options']), device=found['options'].state['device'])
    assert found['options'].state == options and type(found['options'].state['bestValIoU']) is float
    assert is_released(found) and all(v.device.type == 'cpu' for v in found['net'].values())


def rename(path, old, new):
    "Exchange the name of a module in a file; a zip's checksums are made anew."
    swap = lambda content: content.replace(b'c' + old + b'\n', b'c' + new + b'\n')
    if not zipfile.is_zipfile(path):
        path.write_bytes(swap(path.read_bytes()))
        return path
    with zipfile.ZipFile(path) as z: entries = {name: z.read(name) for name in z.namelist()}
    with zipfile.ZipFile(path, 'w') as z:
        for name, content in entries.items(): z.writestr(name, swap(content) if name.endswith('data.pkl') else content)
    return path


NUMBERS = (np.float64(-.5), np.float32(3.5), np.int64(-7), np.uint8(200), np.bool_(True), np.dtype('>i4').type(9),
           np.str_('né'), np.complex128(1 - 2j))


@pytest.mark.parametrize('number', NUMBERS, ids=lambda n: n.dtype.name)
@pytest.mark.parametrize('home', ['numpy.core', 'numpy._core'])
def test_numbers_of_any_numpy_are_plain_data(save, number, home):
    path = rename(save([number]), number.__reduce__()[0].__module__.encode(), f'{home}.multiarray'.encode())
    assert f'c{home}.multiarray\n'.encode() in path.read_bytes()
    found, = read_checkpoint(path)
    assert found == number.item() and type(found) is type(number.item())


OTHERS = dict(date=np.datetime64('2020-01-01'), order=Dtyped((3, '@', None), 'f8'),
              void=Dtyped((3, '<', None, None, None, 1 << 40, 1 << 40, 63), 'V8'))


@pytest.mark.parametrize('content', OTHERS.values(), ids=OTHERS)
def test_other_things_of_numpy_are_refused(save, content): assert 'cannot be read' in refused(save(content))


def test_a_type_that_is_endless_when_written_out_is_one_line(save):
    "Lists that hold the list before twice: small in a file, 2**100 entries in a message."
    endless = []
    for _ in range(100): endless = [endless, endless]
    for content in (Call(np.dtype, endless), Dtyped((3, endless), 'f8')):
        assert 'cannot be read' in refused(save(content))


def test_names_that_would_fool_a_terminal_are_cut(tmp_path):
    (tmp_path/'a.pth').write_bytes(b'\x80\x02cos\x1b[31m' + b'x' * 9999 + b'\nsystem\n.')
    message = refused(tmp_path/'a.pth')
    assert 'asks for os?[31mxxx' in message and message.isprintable()


def test_byte_order_is_kept(save):
    f = np.array([2.5], '>f8')
    assert read_checkpoint(save(Call(np.float64(0).__reduce__()[0], np.dtype('>f8'), f.tobytes()))) == 2.5


def attacks(marker, victim):
    "name -> (what Python's reader would call, its arguments, the name in the message)."
    touch = f'touch {marker}'
    return dict(system=(os.system, (touch,), 'posix.system'), open=(open, (str(marker), 'w'), 'io.open'),
                eval=(eval, (f'open({str(marker)!r}, "w")',), 'builtins.eval'),
                unlink=(os.unlink, (str(victim),), 'posix.unlink'),
                save=(torch.save, (1, str(marker)), 'torch.serialization.save'),
                loads=(pickle.loads, (pickle.dumps(Call(os.system, touch)),), 'pickle.loads'),
                getattr=(getattr, (argparse.ArgumentParser, 'parse_args'), 'builtins.getattr'))


@pytest.mark.parametrize('attack', attacks('', ''))
@pytest.mark.parametrize('packed', [False, True], ids=['bare', 'packed'])
def test_nothing_is_executed(save, attack, packed, tmp_path):
    marker, victim = tmp_path/'marker', tmp_path/'victim'
    victim.touch()
    f, arguments, name = attacks(marker, victim)[attack]
    path = save(dict(released(), extra=Call(f, *arguments)))
    if packed: path = pack(tmp_path/'a.tar.gz', path)
    message = refused(path)
    assert f' {name},' in message and 'nothing was executed' in message
    assert victim.exists() and not marker.exists()
    pickle.loads(pickle.dumps(Call(f, *arguments))) # the attack is a real one
    assert attack == 'getattr' or marker.exists() or not victim.exists()


@pytest.mark.parametrize('packed', [False, True], ids=['bare', 'packed'])
def test_what_is_cut_short_is_refused(save, packed, tmp_path):
    path = save(released())
    if packed: path = pack(tmp_path/'a.tar.gz', path)
    whole, cut = path.read_bytes(), tmp_path/'cut.pth'
    n = len(whole)
    for length in sorted({0, 1, 2, 3, 5, 10, 50, 100, 200, n//3, n//2, n*3//4, n - 9, n - 1} & set(range(n))):
        cut.write_bytes(whole[:length])
        try: found = read_checkpoint(cut)
        except UserError as e: assert 'cut.pth' in str(e) and '\n' not in str(e)
        else: assert packed and length > n - 10 and is_released(found), f'{length} bytes of {n} were read'


def test_damage_is_an_error_or_harmless(save, tmp_path):
    "Single bytes are changed all over the file: it is read or refused, and never anything else."
    whole, bad = save(released(bestValIoU=np.float64(.5))).read_bytes(), tmp_path/'bad.pth'
    g, seen = np.random.default_rng(0), set()
    for at in g.integers(0, len(whole), 150):
        changed = bytearray(whole)
        changed[at] ^= int(g.integers(1, 256))
        bad.write_bytes(changed)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try: read_checkpoint(bad)
            except UserError as e:
                seen.add('refused')
                assert '\n' not in str(e)
            else: seen.add('read')
    assert seen == {'read', 'refused'}


FOREIGN = {
    'empty.pth': (b'', 'EOFError'), 'page.pth': (b'quota exceeded', 'expected a file of torch.save'),
    'text.tar.gz': (b'hello', 'expected a file of torch.save'), 'gz.tar.gz': (b'\x1f\x8b' + bytes(60), 'cut short'),
    'zip.pth': (b'PK\x03\x04' + bytes(60), 'cut short'),
    'noise.pth': (bytes(range(128, 256)), 'unsupported pickle protocol'),
    'protocol.pth': (pickle.dumps(dict(a=1), 4) + b'x', 'cannot be read')}


@pytest.mark.parametrize('name', FOREIGN)
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_files_of_another_kind(name, tmp_path):
    content, says = FOREIGN[name]
    (tmp_path/name).write_bytes(content)
    for read in (read_checkpoint, read_weights):
        message = refused(tmp_path/name, read=read)
        assert says in message and name in message


@pytest.mark.parametrize('read', [read_checkpoint, read_weights, read_note])
def test_no_file(read, tmp_path):
    os.mkfifo(tmp_path/'pipe.pth')
    assert 'does not exist' in refused(tmp_path/'nowhere.pth', read=read)
    assert 'not a regular file' in refused(tmp_path, read=read)
    assert 'not a regular file' in refused(tmp_path/'pipe.pth', read=read), 'a pipe is not waited for'


def test_a_file_of_someone_else(tmp_path, monkeypatch):
    torch.save(released(), tmp_path/'a.pth')
    def denied(*_, **__): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(archives, 'open', denied, raising=False)
    assert 'PermissionError' in refused(tmp_path/'a.pth')


# Archives

def pack(archive, *files, mode='w:gz', extra=()):
    "A tar archive of files, and of members made by hand."
    with tarfile.open(archive, mode) as tar:
        for f in files: tar.add(f, f'models/{f.name}')
        for m in extra: tar.addfile(m, io.BytesIO(bytes(m.size)))
    return archive


def member(name, kind=tarfile.REGTYPE, size=0, link=''):
    m = tarfile.TarInfo(name)
    m.type, m.size, m.linkname = kind, size, link
    return m


MODES = {'a.tar.gz': 'w:gz', 'a.tgz': 'w:gz', 'a.tar': 'w:', 'named_wrong.pth': 'w:gz'}


@pytest.mark.parametrize('name', MODES)
def test_the_one_checkpoint_in_an_archive(save, name, tmp_path):
    folder = tmp_path/'in'
    folder.mkdir()
    others = [member('models', tarfile.DIRTYPE), member('models/README', size=5),
              member('models/._foreign.pth', size=9)]
    path = pack(folder/name, save(released()), mode=MODES[name], extra=others)
    assert is_released(read_checkpoint(path))
    assert [p.name for p in folder.iterdir()] == [name], 'nothing is unpacked to the disk'
    weights = pack(folder/f'weights_{name}', save(released()['net']), mode=MODES[name])
    assert list(read_weights(weights)) == ['weight', 'bias']


BAD = {'2 checkpoints': member('b.pt'), "'link.pth' is a link": member('link.pth', tarfile.SYMTYPE, link='/etc/passwd'),
       "'hard' is a link": member('hard', tarfile.LNKTYPE, link='models/foreign.pth'),
       "'dev' is": member('dev', tarfile.CHRTYPE), "'pipe' is": member('pipe', tarfile.FIFOTYPE),
       "'../up.txt' is": member('../up.txt'), "'/etc/x' is": member('/etc/x'), "with 'big'": member('big', size=2**20)}


@pytest.mark.parametrize('says', BAD)
def test_archives_that_are_refused(says, tmp_path, monkeypatch):
    torch.save(released(), tmp_path/'foreign.pth')
    monkeypatch.setattr(archives, 'LIMIT', 2**19)
    assert says in refused(pack(tmp_path/'a.tar.gz', tmp_path/'foreign.pth', extra=[BAD[says]]))


@pytest.mark.parametrize('other', [member('README'), member('folder.pth', tarfile.DIRTYPE)], ids=lambda m: m.name)
def test_an_archive_without_a_checkpoint(other, tmp_path):
    assert 'holds 0 checkpoints (none)' in refused(pack(tmp_path/'a.tar.gz', extra=[other]))


# What is written here

NOTE = dict(sizex=32, mean=(.5, .25), classes=['bird'], model=dict(detector='ssd', weights=None), flipped=True)


def test_saved_weights_come_back_with_their_note(tmp_path):
    path = save_weights(nn.Conv2d(2, 3, 3), tmp_path/'a.safetensors', **NOTE, ap=np.float32(.5), source=tmp_path)
    assert read_note(path) == dict(NOTE, mean=[.5, .25], ap=.5, source=str(tmp_path))
    assert read_note(save_weights(nn.Conv2d(2, 3, 3), tmp_path/'b.safetensors')) == {}
    path.write_bytes(path.read_bytes()[:-5])
    assert all('cannot be read' in refused(path, read=read) for read in (read_note, read_weights))


@pytest.mark.parametrize('kind', [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64])
def test_one_bit_that_turned_is_found(kind, tmp_path):
    state = dict(a=torch.ones(3, 2).to(kind), scalar=torch.zeros(()).to(kind), none=torch.zeros(0, 4).to(kind))
    path = save_weights(state, tmp_path/'a.safetensors', step=1)
    assert all(torch.equal(v, state[k]) and v.dtype == kind for k, v in read_weights(path).items())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert 'damaged or was changed' in refused(path, read=read_weights) and read_note(path) == dict(step=1)


def test_a_digest_of_other_weights_is_found(tmp_path):
    "The header of one file with the numbers of another, as of a file that was tampered with."
    a, b = (save_weights(dict(w=torch.full((4,), k)), tmp_path/f'{k}.safetensors').read_bytes() for k in (0., 1.))
    (tmp_path/'mixed.safetensors').write_bytes(a[:-16] + b[-16:])
    assert 'damaged or was changed' in refused(tmp_path/'mixed.safetensors', read=read_weights)


@pytest.mark.parametrize('metadata, note', [(dict(note='{"nz": "64"}'), dict(nz='64')), (dict(format='pt'),)*2,
                                            (None, {})], ids=['before', 'others', 'bare'])
def test_files_of_before_and_of_others_are_read(metadata, note, tmp_path):
    save_file(dict(w=torch.ones(2)), tmp_path/'a.safetensors', metadata)
    assert read_note(tmp_path/'a.safetensors') == note
    assert torch.equal(read_weights(tmp_path/'a.safetensors')['w'], torch.ones(2))


def changed(state, **changes): return {**state, **changes}


MISFITS = {
    "'extra' is unexpected (0 missing, 1 unexpected": lambda s: changed(s, extra=torch.ones(1)),
    "'0.weight' is missing (2 missing": lambda s: {k: v for k, v in s.items() if k[0] == '1'},
    "'1.bias' is [4], expected [3] (0 missing, 0 unexpected, 1 mis-shaped of 7)":
        lambda s: changed(s, **{'1.bias': torch.ones(4)}),
    "'0.bias' is str, expected [3]": lambda s: changed(s, **{'0.bias': 'x'}),
    'list, expected a dictionary': lambda s: [1]}


@pytest.mark.parametrize('says', MISFITS)
def test_the_first_that_does_not_fit_is_named(says):
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    other = {k: v + 1 for k, v in before.items()}
    message = core.refused(fit_weights, net, MISFITS[says](other), 'file.pth')
    assert 'file.pth does not fit this network' in message and says in message
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), 'nothing is copied before all fits'
    fit_weights(net, {k: v for k, v in other.items() if 'num_batches' not in k}, 'file.pth')
    assert torch.equal(net[0].bias, before['0.bias'] + 1)
