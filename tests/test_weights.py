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

from synthdet import weights as module
from synthdet.core import UserError
from synthdet.weights import fit_weights, read_checkpoint, read_note, read_weights, save_weights

FORMATS = dict(legacy=False, zip=True) # name -> value of torch.save's option


class Call:
    "Calls `f(*arguments)` in whoever unpickles it."
    def __init__(self, f, *arguments): self.call = f, arguments

    def __reduce__(self): return self.call


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


def refused(path, allowed=(argparse.Namespace,), read=None):
    "The message of the `UserError`: one line, without torch's advice to switch the protection off."
    with pytest.raises(UserError) as e: read(path) if read else read_checkpoint(path, allowed)
    message = str(e.value)
    assert '\n' not in message and 'weights_only' not in message and len(message) < 500
    return message


def test_a_released_file_is_read(save, monkeypatch):
    content = released(bestValIoU=np.float64(.625), device=torch.device('cuda:0'), lrG=1e-4, temperature=1, nfD=None, clean=False)
    monkeypatch.setattr(torch.serialization, 'location_tag', lambda storage: 'cuda:0') # as if the storages were on a GPU
    path, before = save(content), torch.serialization.get_safe_globals()
    assert b'cuda:0' in path.read_bytes()
    found = read_checkpoint(path, allowed=(argparse.Namespace,))
    assert vars(found['options']) == vars(content['options']) and type(found['options'].bestValIoU) is float
    assert all(torch.equal(found['net'][k], v) and found['net'][k].device.type == 'cpu' for k, v in content['net'].items())
    assert 'argparse.Namespace' in refused(path, ())
    assert set(torch.serialization.get_safe_globals()) == set(before), 'what was let through once is not let through for ever'


def rename(path, old, new):
    "Exchange the name of a module in a file; a zip's checksums are made anew."
    swap = lambda content: content.replace(b'c' + old + b'\n', b'c' + new + b'\n')
    if not zipfile.is_zipfile(path): path.write_bytes(swap(path.read_bytes())); return path
    with zipfile.ZipFile(path) as z: entries = {name: z.read(name) for name in z.namelist()}
    with zipfile.ZipFile(path, 'w') as z:
        for name, content in entries.items(): z.writestr(name, swap(content) if name.endswith('data.pkl') else content)
    return path


@pytest.mark.parametrize('number', [np.float64(-.5), np.float32(3.5), np.int64(-7), np.uint8(200), np.bool_(True), np.dtype('>i4').type(9), np.str_('né'), np.complex128(1 - 2j)], ids=lambda n: n.dtype.name)
@pytest.mark.parametrize('home', ['numpy.core', 'numpy._core'])
def test_numbers_of_any_numpy_are_plain_data(save, number, home, tmp_path):
    path = rename(save([number]), number.__reduce__()[0].__module__.encode(), f'{home}.multiarray'.encode())
    assert f'c{home}.multiarray\n'.encode() in path.read_bytes()
    found, = read_checkpoint(path)
    assert found == number.item() and type(found) is type(number.item())


@pytest.mark.parametrize('content', [np.datetime64('2020-01-01'), Dtyped((3, '<', None, None, None, 1 << 40, 1 << 40, 63), 'V8'), Dtyped((3, '@', None), 'f8'), np.ones(3)], ids=['date', 'void', 'order', 'array'])
def test_other_things_of_numpy_are_refused(save, content): assert 'cannot be read' in refused(save(content))


def test_names_that_would_fool_a_terminal_are_cut(tmp_path):
    (tmp_path/'a.pth').write_bytes(b'\x80\x02cos\x1b[31m' + b'x' * 9999 + b'\nsystem\n.')
    message = refused(tmp_path/'a.pth')
    assert 'asks for os?[31mxxx' in message and message.isprintable()


def test_what_the_program_lets_through_stays_so(save):
    with torch.serialization.safe_globals([argparse.Namespace]):
        path = save(released())
        for allowed in ((argparse.Namespace,), ()): assert read_checkpoint(path, allowed)['options'].sizex == 128


def test_byte_order_is_kept(save):
    f = np.array([2.5], '>f8')
    assert read_checkpoint(save(Call(np.float64(0).__reduce__()[0], np.dtype('>f8'), f.tobytes()))) == 2.5


ATTACKS = dict(system=(os.system, 'posix.system'), eval=(eval, 'builtins.eval'), open=(open, 'io.open'), unlink=(os.unlink, 'posix.unlink'),
               save=(torch.save, 'torch.serialization.save'), loads=(pickle.loads, 'pickle.loads'), getattr=(getattr, 'builtins.getattr'))


@pytest.mark.parametrize('attack', ATTACKS)
@pytest.mark.parametrize('packed', [False, True], ids=['bare', 'packed'])
def test_nothing_is_executed(save, attack, packed, tmp_path):
    marker, victim = tmp_path/'marker', tmp_path/'victim'
    victim.touch()
    arguments = dict(system=(f'touch {marker}',), eval=(f'open({str(marker)!r}, "w")',), open=(str(marker), 'w'), unlink=(str(victim),), save=(1, str(marker)),
                     loads=(pickle.dumps(Call(os.system, f'touch {marker}')),), getattr=(argparse.ArgumentParser, 'parse_args'))[attack]
    f, name = ATTACKS[attack]
    path = save(dict(released(), extra=Call(f, *arguments)))
    if packed: path = pack(tmp_path/'a.tar.gz', path)
    message = refused(path, read=None)
    assert f' {name},' in message and 'nothing was executed' in message
    assert f' {name},' in refused(path, (argparse.Namespace, os.system)) or attack != 'system', 'not even when a caller would let it'
    assert victim.exists() and not marker.exists()
    pickle.loads(pickle.dumps(Call(f, *arguments))) # the attack is a real one
    assert attack == 'getattr' or marker.exists() or not victim.exists()


@pytest.mark.parametrize('packed', [False, True], ids=['bare', 'packed'])
def test_what_is_cut_short_is_refused(save, packed, tmp_path):
    path = save(released())
    if packed: path = pack(tmp_path/'a.tar.gz', path)
    whole, cut = path.read_bytes(), tmp_path/'cut.pth'
    lengths = {0, 1, 2, 3, 5, 10, 50, 100, 200, len(whole)//3, len(whole)//2, len(whole)*3//4, len(whole) - 9, len(whole) - 1}
    for n in sorted(l for l in lengths if l < len(whole)):
        cut.write_bytes(whole[:n])
        try: found = read_checkpoint(cut, (argparse.Namespace,))
        except UserError as e: assert 'cut.pth' in str(e) and '\n' not in str(e)
        else: assert packed and n > len(whole) - 10 and torch.equal(found['net']['weight'], released()['net']['weight']), f'{n} bytes of {len(whole)} were read'


def test_damage_is_an_error_or_harmless(save, tmp_path):
    "Single bytes are changed all over the file: it is read or refused, and never anything else."
    whole, bad = save(released(bestValIoU=np.float64(.5))).read_bytes(), tmp_path/'bad.pth'
    g, seen = np.random.default_rng(0), []
    for at in g.integers(0, len(whole), 150):
        changed = bytearray(whole); changed[at] ^= int(g.integers(1, 256)); bad.write_bytes(changed)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try: read_checkpoint(bad, (argparse.Namespace,)); seen.append('read')
            except UserError as e: seen.append('refused'); assert '\n' not in str(e)
    assert {'read', 'refused'} == set(seen)


@pytest.mark.parametrize('name, content, says', [
    ('empty.pth', b'', 'EOFError'), ('page.pth', b'<html>quota exceeded</html>', 'expected a file of torch.save'), ('text.tar.gz', b'hello', 'expected a file of torch.save'),
    ('gz.tar.gz', b'\x1f\x8b' + bytes(60), 'cut short'), ('zip.pth', b'PK\x03\x04' + bytes(60), 'cut short'), ('noise.pth', bytes(range(128, 256)), 'UnpicklingError'),
    ('protocol.pth', pickle.dumps(dict(a=1), 4), 'cannot be read')])
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_files_of_another_kind(name, content, says, tmp_path):
    (tmp_path/name).write_bytes(content)
    for read in (None, read_weights):
        message = refused(tmp_path/name, read=read)
        assert says in message and name in message


def test_no_file(tmp_path):
    os.mkfifo(tmp_path/'pipe.pth')
    for read in (read_checkpoint, read_weights, read_note):
        assert 'does not exist' in refused(tmp_path/'nowhere.pth', read=read) and 'not a regular file' in refused(tmp_path, read=read)
        assert 'not a regular file' in refused(tmp_path/'pipe.pth', read=read), 'a pipe is not waited for'


def test_a_file_of_someone_else(tmp_path, monkeypatch):
    torch.save(released(), tmp_path/'a.pth')
    def denied(*_, **__): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(module, 'open', denied, raising=False)
    assert 'PermissionError' in refused(tmp_path/'a.pth')


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


@pytest.mark.parametrize('name, mode', [('a.tar.gz', 'w:gz'), ('a.tgz', 'w:gz'), ('a.tar', 'w:'), ('named_wrong.pth', 'w:gz')])
def test_the_one_checkpoint_in_an_archive(save, name, mode, tmp_path):
    folder = tmp_path/'in'
    folder.mkdir()
    path = pack(folder/name, save(released()), mode=mode, extra=[member('models', tarfile.DIRTYPE), member('models/README', size=5), member('models/._foreign.pth', size=9)])
    assert torch.equal(read_checkpoint(path, (argparse.Namespace,))['net']['weight'], released()['net']['weight'])
    assert [p.name for p in folder.iterdir()] == [name], 'nothing is unpacked to the disk'
    weights = pack(folder/f'weights_{name}', save(released()['net']), mode=mode)
    assert list(read_weights(weights)) == ['weight', 'bias']


@pytest.mark.parametrize('extra, says', [
    ([member('b.pt')], '2 checkpoints'), ([member('link.pth', tarfile.SYMTYPE, link='/etc/passwd')], "'link.pth' is a link"), ([member('hard', tarfile.LNKTYPE, link='models/foreign.pth')], "'hard' is a link"),
    ([member('dev', tarfile.CHRTYPE)], "'dev' is"), ([member('pipe', tarfile.FIFOTYPE)], "'pipe' is"), ([member('../up.txt')], "'../up.txt' is"), ([member('/etc/x')], "'/etc/x' is"), ([member('big', size=2**20)], "with 'big'")])
def test_archives_that_are_refused(extra, says, tmp_path, monkeypatch):
    torch.save(released(), tmp_path/'foreign.pth')
    monkeypatch.setattr(module, '_LIMIT', 2**19)
    assert says in refused(pack(tmp_path/'a.tar.gz', tmp_path/'foreign.pth', extra=extra))


def test_an_archive_without_a_checkpoint(tmp_path):
    assert 'holds 0 checkpoints (none)' in refused(pack(tmp_path/'a.tar.gz', extra=[member('README')]))
    assert 'holds 0 checkpoints (none)' in refused(pack(tmp_path/'b.tar.gz', extra=[member('folder.pth', tarfile.DIRTYPE)]))


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
    a, b = (save_weights(dict(w=torch.full((4,), float(k))), tmp_path/f'{k}.safetensors').read_bytes() for k in range(2))
    (tmp_path/'mixed.safetensors').write_bytes(a[:-16] + b[-16:])
    assert 'damaged or was changed' in refused(tmp_path/'mixed.safetensors', read=read_weights)


def test_files_of_before_and_of_others_are_read(tmp_path):
    weights = dict(w=torch.ones(2))
    save_file(weights, tmp_path/'old.safetensors', dict(note='{"nz": "64"}'))
    save_file(weights, tmp_path/'other.safetensors', dict(format='pt'))
    save_file(weights, tmp_path/'bare.safetensors')
    assert [read_note(tmp_path/f'{k}.safetensors') for k in ('old', 'other', 'bare')] == [dict(nz='64'), dict(format='pt'), {}]
    assert all(torch.equal(read_weights(tmp_path/f'{k}.safetensors')['w'], weights['w']) for k in ('old', 'other', 'bare'))


def test_the_first_that_does_not_fit_is_named():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    state, before = net.state_dict(), {k: v.clone() for k, v in net.state_dict().items()}
    other = {k: v + 1 for k, v in state.items()}
    for change, says in ((dict(other, extra=torch.ones(1)), "'extra' is unexpected (0 missing, 1 unexpected"), ({k: v for k, v in other.items() if k[0] == '1'}, "'0.weight' is missing (2 missing"),
                         ({**other, '1.bias': torch.ones(4)}, "'1.bias' is [4], expected [3] (0 missing, 0 unexpected, 1 mis-shaped of 7)"), ({**other, '0.bias': 'x'}, "'0.bias' is str, expected [3]"),
                         ([1], 'list, expected a dictionary')):
        with pytest.raises(UserError, match='file.pth does not fit this network') as e: fit_weights(net, change, 'file.pth')
        assert says in str(e.value)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), 'nothing is copied before all fits'
    fit_weights(net, {k: v for k, v in other.items() if 'num_batches' not in k}, 'file.pth')
    assert torch.equal(net[0].bias, before['0.bias'] + 1)
