"A server that misbehaves, archives that should not be trusted, disks that refuse, and the command as a user types it."
import errno
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from helpers import needs_shared
from synthdet import cli
from synthdet.data import download as module, fetch as fetching
from synthdet.core import refused
from synthdet.machine import shared
from synthdet.data.domains import load_domain
from synthdet.data.fixtures import make_fixture
from synthdet.data.check import _version, check, KNOWN
from synthdet.data.download import download
from synthdet.data.fetch import downloads, fetch, listing
from synthdet.data.unpack import extract
from synthdet.data.catalogue import DataSet, File, SETS

def sha(data): return f'sha256:{hashlib.sha256(data).hexdigest()}'


BODY = bytes(i*7 % 256 for i in range(300_000))
SHA = sha(BODY)
SOON = dict(pause=.01, timeout=1)


class Shop(BaseHTTPRequestHandler):
    "Serves `files` by name; the folder in front says how it misbehaves."
    files, asked = {'body.bin': BODY}, []
    tag = '"a"'

    def log_message(self, *args): pass

    def say(self, code, data=b'', *, length=None, **headers):
        self.send_response(code)
        self.send_header('Content-Length', str(len(data) if length is None else length))
        for k, v in headers.items(): self.send_header(k.replace('_', '-'), v)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        way, name = self.path.strip('/').split('/')
        data, asked = self.files[name], self.headers.get('Range')
        self.asked.append((way, asked))
        fresh = asked and self.headers.get('If-Range') == self.tag
        start = int(asked[6:-1]) if fresh and way != 'ignores-range' else 0
        part = dict(Content_Range=f'bytes {start}-{len(data)-1}/{len(data)}') if start else {}
        code, rest = 206 if start else 200, data[start:]
        first = data[:120_000] if len(self.asked) == 1 else data
        if way == 'gone': self.say(404)
        elif way == 'busy': self.say(503)
        elif way == 'moved': self.say(302, Location=f'/fine/{name}')
        elif way == 'circle': self.say(302, Location=f'/circle/{name}')
        elif way == 'elsewhere': self.say(302, Location='file:///etc/passwd')
        elif way == 'page': self.say(200, b'<html>please wait</html>', Content_Type='text/html')
        elif way == 'wrong': self.say(200, data[::-1])
        elif way == 'short': self.say(200, data[:1000])
        elif way == 'cuts': self.say(code, rest[:120_000], length=len(rest), ETag=self.tag, **part)
        elif way == 'never-more': self.say(200, data[:1000], length=len(data))
        elif way == 'ignores-range': self.say(200, first, length=len(data), ETag=self.tag)
        elif way == 'dated': self.say(code, rest[:120_000], length=len(rest), Last_Modified=self.tag, **part)
        elif way == 'nothing-more' and start == len(data): self.say(416, Content_Range=f'bytes */{len(data)}')
        elif way == 'past-end' and asked: self.say(416)
        elif way == 'past-end': self.say(200, data if len(self.asked) > 1 else data[:10],
                                         length=len(data), ETag=self.tag)
        elif way == 'hangs':
            self.send_response(200)
            self.send_header('Content-Length', '10')
            self.end_headers()
            self.wfile.flush()
            time.sleep(2)
        elif way == 'changes':
            type(self).tag = f'"{len(self.asked)}"'
            self.say(200, first, length=len(data), ETag=self.tag)
        else: self.say(code, rest, ETag=self.tag, **part)


@pytest.fixture
def shop():
    Shop.files, Shop.tag = {'body.bin': BODY}, '"a"'
    Shop.asked.clear()
    server = ThreadingHTTPServer(('127.0.0.1', 0), Shop)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(.02,), daemon=True).start()
    yield lambda way, name='body.bin': f'http://127.0.0.1:{server.server_port}/{way}/{name}'
    server.shutdown()
    server.server_close()


def ways(): return [w for w, _ in Shop.asked]


# ---- what is survived ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('links, calls', [
    (['fine'], ['fine']),
    (['moved'], ['moved', 'fine']),
    (['gone', 'fine'], ['gone', 'fine']),
    (['page', 'fine'], ['page', 'fine']),
    (['busy', 'fine'], ['busy']*4 + ['fine']),
    (['circle', 'fine'], None),
    (['elsewhere', 'fine'], ['elsewhere']*4 + ['fine']),
    (['wrong', 'fine'], ['wrong']*2 + ['fine']),
    (['short', 'fine'], ['short']*2 + ['fine']),
    (['never-more', 'fine'], ['never-more']*4 + ['fine']),
    (['hangs', 'fine'], ['hangs']*4 + ['fine']),
    (['cuts'], ['cuts']*3),
    (['ignores-range'], ['ignores-range']*2),
    (['changes'], ['changes']*2),
    (['past-end'], ['past-end']*3),
])
def test_survived(shop, tmp_path, links, calls):
    timeout = .2 if 'hangs' in links else 2
    path = download([shop(w) for w in links], tmp_path/'x'/'body.bin', SHA, pause=.001, timeout=timeout)
    assert path.read_bytes() == BODY and os.listdir(path.parent) == ['body.bin'], 'whole, and nothing beside it'
    assert calls is None or ways() == calls


def test_goes_on_where_it_stopped(shop, tmp_path):
    download([shop('cuts')], tmp_path/'body.bin', SHA, **SOON)
    assert [r for _, r in Shop.asked] == [None, 'bytes=120000-', 'bytes=240000-']


def test_another_day(shop, tmp_path):
    "What an earlier call left is not fetched again, and without a published hash two versions are not joined."
    refused(download, [shop('cuts')], tmp_path/'body.bin', tries=1)
    assert (tmp_path/'body.bin.part').stat().st_size == 120_000
    assert download([shop('cuts')], tmp_path/'body.bin', tries=2, pause=.01).read_bytes() == BODY
    refused(download, [shop('cuts')], tmp_path/'again.bin', tries=1)
    Shop.files, Shop.tag = {'body.bin': BODY[::-1]}, '"b"'
    assert download([shop('fine')], tmp_path/'again.bin').read_bytes() == BODY[::-1]
    refused(download, [shop('cuts')], tmp_path/'third.bin', tries=1)
    Shop.tag = '"c"'
    Shop.files = {'body.bin': BODY}
    assert download([shop('cuts')], tmp_path/'third.bin', tries=3, pause=.01).read_bytes() == BODY


@pytest.mark.slow
def test_killed_and_started_again(shop, tmp_path):
    "SIGKILL in the middle; the next process brings the rest."
    code = ("import os, synthdet.data.download as d\n"
            "d.os.fsync = lambda *a: os.kill(os.getpid(), 9)\n"
            f"d.download([{shop('cuts')!r}], {str(tmp_path/'body.bin')!r}, bar=False)")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, timeout=300).returncode == -9
    assert [p.name for p in tmp_path.iterdir() if p.suffix != '.tag'] == ['body.bin.part']
    assert download([shop('cuts')], tmp_path/'body.bin', SHA, **SOON).read_bytes() == BODY
    assert [r for _, r in Shop.asked] == [None, 'bytes=120000-', 'bytes=240000-']


def test_a_tag_never_stands_beside_other_bytes(shop, tmp_path, monkeypatch):
    "Another version begins to come, and the disk is full: what is left is not taken for the beginning of the new one."
    refused(download, [shop('cuts')], tmp_path/'body.bin', tries=1)
    Shop.files, Shop.tag = {'body.bin': BODY[::-1]}, '"b"'
    monkeypatch.setattr(module.shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10**9, 10**9-1000, 1000))
    refused(download, [shop('fine')], tmp_path/'body.bin', tries=1)
    monkeypatch.undo()
    assert download([shop('fine')], tmp_path/'body.bin').read_bytes() == BODY[::-1]


def test_goes_on_by_date(shop, tmp_path):
    "A server without tags says when a file was changed."
    Shop.tag = 'Fri, 01 May 2020 10:00:00 GMT'
    download([shop('dated')], tmp_path/'body.bin', SHA, **SOON)
    assert [r for _, r in Shop.asked] == [None, 'bytes=120000-', 'bytes=240000-']


def test_the_part_is_the_whole(shop, tmp_path):
    "Stopped between the last byte and the renaming."
    (tmp_path/'body.bin.part').write_bytes(BODY)
    (tmp_path/'body.bin.tag').write_text(f"{shop('nothing-more')}\n{Shop.tag}")
    assert download([shop('nothing-more')], tmp_path/'body.bin', SHA, tries=1).read_bytes() == BODY
    assert len(Shop.asked) == 1
    (tmp_path/'other.bin.part').write_bytes(BODY[::-1])
    (tmp_path/'other.bin.tag').write_text(f"{shop('nothing-more')}\n{Shop.tag}")
    said = refused(download, [shop('nothing-more')], tmp_path/'other.bin', SHA, tries=1)
    assert 'its content is not the known one' in said


# ---- what is reported ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('way, words', [
    ('gone', 'HTTP 404 Not Found'), ('busy', 'HTTP 503'), ('page', 'a web page came instead of the file'),
    ('wrong', 'its content is not the known one'), ('short', 'its content is not the known one'),
    ('never-more', 'broke off after 1,000 of 300,000 bytes'), ('hangs', 'timed out'), ('circle', 'redirect'),
    ('elsewhere', 'not allowed')])
def test_reported(shop, tmp_path, way, words):
    said = refused(download, [shop(way)], tmp_path/'body.bin', SHA, tries=2, pause=.001, timeout=.3)
    assert words in said and shop(way) in said and 'put it at' in said
    assert not (tmp_path/'body.bin').exists()


def test_no_server_and_no_such_address(tmp_path):
    said = refused(download, ['http://127.0.0.1:9/x', 'nonsense'], tmp_path/'x', tries=1)
    assert 'refused' in said and 'nonsense: unknown url type' in said


def test_a_users_file_is_never_touched(shop, tmp_path):
    (tmp_path/'body.bin').write_bytes(b'mine')
    said = refused(download, [shop('fine')], tmp_path/'body.bin', SHA)
    assert 'is there, but its content is not the known one' in said
    assert (tmp_path/'body.bin').read_bytes() == b'mine' and not Shop.asked
    assert download([shop('fine')], tmp_path/'body.bin').read_bytes() == b'mine'


def test_full_disk(shop, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10**9, 10**9-1000, 1000))
    said = refused(download, [shop('fine')], tmp_path/'body.bin', SHA, **SOON)
    assert 'has 0 MB left' in said and not (tmp_path/'body.bin').exists() and len(Shop.asked) == 1
    monkeypatch.undo()
    real = open

    class Full(io.BytesIO):
        def write(self, data): raise OSError(errno.ENOSPC, 'No space left on device')
    opened = lambda p, mode='r', **kw: Full() if 'w' in mode or 'a' in mode else real(p, mode, **kw)
    monkeypatch.setattr(module, 'open', opened, raising=False)
    said = refused(download, [shop('fine')], tmp_path/'body.bin', SHA, **SOON)
    assert 'No space left on device; free some space' in said


def test_read_only_folder(shop, tmp_path):
    "A file where the folder should be refuses everybody, the superuser too."
    (tmp_path/'file').write_text('x')
    assert 'cannot write' in refused(download, [shop('fine')], tmp_path/'file'/'body.bin', SHA)
    assert 'cannot write' in refused(extract, make_tar(tmp_path/'a.tgz', {'x': b'x'}), tmp_path/'file')


# ---- archives --------------------------------------------------------------------------------------------------------

def make_tar(path, members):
    "A tar from name -> bytes, or (type, target)."
    with tarfile.open(path, 'w:gz') as t:
        for k, v in members.items():
            m = tarfile.TarInfo(k)
            if isinstance(v, tuple): m.type, m.linkname, v = *v, b''
            m.size = len(v)
            t.addfile(m, io.BytesIO(v))
    return path


def make_zip(path, members, *links):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for k, v in members.items():
            info = zipfile.ZipInfo(k)
            info.compress_type = zipfile.ZIP_DEFLATED
            if k in links: info.external_attr = 0o120777 << 16
            z.writestr(info, v)
    return path


BAD = {
    'up': (dict({'ok.txt': b'x', 'a/../../out': b'x'}), 'leads out'),
    'absolute': ({'/abs': b'x'}, 'leads out'),
    'drive': ({'C:/x': b'x'}, 'leads out'),
    'backslash': ({'..\\out': b'x'}, 'leads out'),
    'link out': ({'ok.txt': b'x', 'd/l': (tarfile.SYMTYPE, '../../x')}, 'outside the folder'),
    'link absolute': ({'l': (tarfile.SYMTYPE, '/etc/passwd')}, 'outside the folder'),
    'hard link out': ({'l': (tarfile.LNKTYPE, '../x')}, 'leads out'),
    'device': ({'ok.txt': b'x', 'null': (tarfile.CHRTYPE, '')}, 'neither file nor folder'),
    'pipe': ({'p': (tarfile.FIFOTYPE, '')}, 'neither file nor folder'),
    'nothing': ({'d': (tarfile.DIRTYPE, '')}, 'holds no file'),
}


@pytest.mark.parametrize('name', BAD)
def test_tar_that_should_not_be_trusted(tmp_path, name):
    members, words = BAD[name]
    out = tmp_path/'in'/'out'
    assert words in refused(extract, make_tar(tmp_path/'bad.tgz', members), out)
    assert sorted(p.name for p in tmp_path.rglob('*')) == ['bad.tgz', 'in', 'out'], 'nothing stays, inside or outside'


def test_zip_that_should_not_be_trusted(tmp_path):
    up, link = make_zip(tmp_path/'up.zip', {'../x': b'x'}), make_zip(tmp_path/'link.zip', {'l': b'/etc/passwd'}, 'l')
    out = tmp_path/'in'/'out'
    assert 'leads out' in refused(extract, up, out) and 'outside the folder' in refused(extract, link, out)
    assert os.listdir(out) == [] and os.listdir(out.parent) == ['out']


def test_bombs(tmp_path):
    big = make_zip(tmp_path/'bomb.zip', {'a/zeros': bytes(150_000_000)})
    assert 'it unpacks to' in refused(extract, big, tmp_path/'out')
    raw = bytearray(big.read_bytes())                         # a header that promises ten bytes
    for at in (raw.find(b'PK\x01\x02') + 24, 22): raw[at:at+4] = (10).to_bytes(4, 'little')
    (tmp_path/'liar.zip').write_bytes(raw)
    assert refused(extract, tmp_path/'liar.zip', tmp_path/'out') and os.listdir(tmp_path/'out') == []


def test_torn_archives(tmp_path):
    good = make_tar(tmp_path/'good.tgz', {'a': os.urandom(5000), 'b': os.urandom(5000)}).read_bytes()
    packed = make_zip(tmp_path/'good.zip', {'a': os.urandom(5000)}).read_bytes()
    broken = bytearray(packed)
    broken[2000] ^= 255
    for k, data in enumerate((good[:7000], good[:40], b'', b'hello', packed[:3000], bytes(broken))):
        (tmp_path/f'torn{k}').write_bytes(data)
        assert 'download it again' in refused(extract, tmp_path/f'torn{k}', tmp_path/'out')
        assert os.listdir(tmp_path/'out') == [], k


def test_files_of_the_user_stop_an_archive_before_it_starts(tmp_path):
    tar = make_tar(tmp_path/'a.tgz', {'s/new': b'new', 's/old': b'theirs'})
    (tmp_path/'out'/'s').mkdir(parents=True)
    (tmp_path/'out'/'s'/'old').write_bytes(b'mine')
    assert 'is there already, with another content' in refused(extract, tar, tmp_path/'out')
    assert os.listdir(tmp_path/'out'/'s') == ['old'] and (tmp_path/'out'/'s'/'old').read_bytes() == b'mine'


def tar_bytes(members, mode='w'):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as t:
        for k, v in members.items():
            m = tarfile.TarInfo(k)
            m.size = len(v)
            t.addfile(m, io.BytesIO(v))
    return bytearray(out.getvalue())


@pytest.mark.parametrize('kind', ['header', 'cut', 'bz2', 'crc', 'xz'])
def test_damage_that_looks_like_the_end(tmp_path, kind):
    members = {k: os.urandom(5000 if kind in ('header', 'cut') else 700_000) for k in 'abc'}
    data = tar_bytes(members, {'bz2': 'w:bz2', 'crc': 'w:gz', 'xz': 'w:xz'}.get(kind, 'w'))
    if kind == 'header': data[5632 + 3] ^= 255               # the header of b
    if kind == 'cut': data = data[:2*5632]
    if kind in ('bz2', 'xz'): data[len(data)*2//3] ^= 255
    if kind == 'crc': data[-6] ^= 255
    (tmp_path/'bad.tar').write_bytes(data)
    assert 'cannot be unpacked' in refused(extract, tmp_path/'bad.tar', tmp_path/'out')
    assert os.listdir(tmp_path/'out') == []


def test_a_file_in_the_place_of_a_folder(tmp_path):
    "Nothing is moved, and the message names it."
    tar = make_tar(tmp_path/'a.tgz', {'a': b'a', 'b/c/d': b'c'})
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'b').write_bytes(b'mine')
    assert refused(extract, tar, tmp_path/'out').startswith(f"{tmp_path/'out'/'b'}: is there already")
    assert os.listdir(tmp_path/'out') == ['b'] and (tmp_path/'out'/'b').read_bytes() == b'mine'


def test_no_archive_and_a_name_no_disk_takes(tmp_path):
    assert 'no such file' in refused(extract, tmp_path/'none.tgz', tmp_path/'out')
    for k in ('x'*300, f"{'x'*300}/a"):
        assert 'holds a name of 30' in refused(extract, make_tar(tmp_path/'long.tgz', {k: b'x'}), tmp_path/'out')


def test_links_inside(tmp_path):
    "A hard link is its file once more; a symbolic link is left out, and counted."
    members = {'d/a': b'bytes', 'd/hard': (tarfile.LNKTYPE, 'd/a'), 'd/soft': (tarfile.SYMTYPE, 'a'), 'e/b': b'more'}
    tar = make_tar(tmp_path/'a.tgz', members)
    with pytest.warns(UserWarning, match='a.tgz: left out 1 symbolic links'): files = extract(tar, tmp_path/'out')
    found = {p.relative_to(tmp_path/'out').as_posix(): p.read_bytes() for p in files}
    assert found == {'d/a': b'bytes', 'd/hard': b'bytes', 'e/b': b'more'}
    lost = make_tar(tmp_path/'b.tgz', {'a': b'x', 'hard': (tarfile.LNKTYPE, 'none')})
    assert 'cannot be unpacked' in refused(extract, lost, tmp_path/'b')


def test_what_takes_long_is_done_once(tmp_path, monkeypatch):
    "A packed tar is read once, whatever its links stand for, and new folders are moved whole."
    members = {f'd/{k}': b'x' for k in range(50)} | {f'e/{k}': (tarfile.LNKTYPE, 'd/0') for k in range(50)}
    tar, back, moved = make_tar(tmp_path/'a.tgz', members), [], []
    rewind, replace = gzip._GzipReader._rewind, os.replace
    monkeypatch.setattr(gzip._GzipReader, '_rewind', lambda f: back.append(1) or rewind(f))
    monkeypatch.setattr(os, 'replace', lambda a, b: moved.append(b) or replace(a, b))
    assert len(extract(tar, tmp_path/'out')) == 100
    assert len(back) < 10 and moved == [tmp_path/'out'/'d', tmp_path/'out'/'e']
    assert extract(tar, tmp_path/'out')[0].read_bytes() == b'x' and len(moved) == 2, 'what is there stays'


def test_a_hard_link_to_a_symbolic_one_is_one(tmp_path):
    tar = make_tar(tmp_path/'a.tgz', {'a': b'x', 'soft': (tarfile.SYMTYPE, 'a'), 'hard': (tarfile.LNKTYPE, 'soft')})
    with pytest.warns(UserWarning, match='left out 2 symbolic links'):
        assert extract(tar, tmp_path/'out') == [tmp_path/'out'/'a']


def test_more_members_than_bytes_for_them(tmp_path):
    "110,000 empty files in 700 kB took half a minute to unpack."
    tar = make_tar(tmp_path/'a.tgz', {str(k): b'' for k in range(10_001)})
    assert 'more than 10000 members' in refused(extract, tar, tmp_path/'out') and os.listdir(tmp_path/'out') == []
    deep = make_tar(tmp_path/'b.tgz', {'a/'*900 + 'x': b''})
    assert 'folders in folders, 900 deep' in refused(extract, deep, tmp_path/'out') and os.listdir(tmp_path/'out') == []


# ---- a data set, end to end ------------------------------------------------------------------------------------------

@pytest.fixture
def birds(shop, tmp_path, monkeypatch):
    "CUB as a drawn tree on the server: a tar of tables and a zip of pictures, the second without a published hash."
    made = make_fixture('birds', tmp_path/'made')/'CUB_200_2011'
    tar, pics = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode='w:gz') as t:
        for p in sorted(made.glob('*.txt')): t.add(p, f'CUB_200_2011/{p.name}')
    with zipfile.ZipFile(pics, 'w') as z:
        for p in sorted((made/'images').rglob('*.jpg')): z.write(p, f'images/{p.relative_to(made/"images").as_posix()}')
    Shop.files = {'tables.tgz': tar.getvalue(), 'pictures.zip': pics.getvalue()}
    links, tables = (shop('gone', 'tables.tgz'), shop('cuts', 'tables.tgz')), sha(tar.getvalue())
    files = (File('tables.tgz', links, hash=tables, marks=('images.txt', 'bounding_boxes.txt')),
             File('pictures.zip', (shop('fine', 'pictures.zip'),), 'CUB_200_2011', marks=('images',)))
    monkeypatch.setitem(SETS, 'cub', SETS['cub']._replace(files=files))
    return tmp_path/'data'


def test_fetch_then_load(birds):
    assert 'accept=True' in refused(fetch, 'cub', birds) and not birds.exists() and not Shop.asked
    assert fetch('cub', birds, accept=True, **SOON) == birds/'CUB_200_2011'
    assert sorted(os.listdir(birds)) == ['.downloads.lock', 'CUB_200_2011', 'downloads.json'], 'archives are gone'
    assert {k: r['unpacked'] for k, r in downloads(birds).items()} == {'tables.tgz': True, 'pictures.zip': True}
    assert downloads(birds)['pictures.zip']['sha256'] == sha(Shop.files['pictures.zip'])
    assert len(load_domain('birds', birds, split='official').train) == 10
    n = len(Shop.asked)
    fetch('cub', birds, **SOON)
    assert len(Shop.asked) == n, 'what is here is not asked for again'


def test_fetch_goes_on_after_a_failure(birds, shop, monkeypatch):
    whole = SETS['cub']
    lost = whole.files[1]._replace(urls=(shop('gone', 'pictures.zip'),))
    monkeypatch.setitem(SETS, 'cub', whole._replace(files=(whole.files[0], lost), marks=('images.txt', 'images')))
    assert 'HTTP 404' in refused(fetch, 'cub', birds, accept=True, **SOON)
    (birds/'.unpack-old').mkdir()
    monkeypatch.setitem(SETS, 'cub', whole._replace(marks=('images.txt', 'images')))
    n = ways().count('cuts')
    fetch('cub', birds, accept=True, **SOON)
    assert ways().count('cuts') == n and not (birds/'.unpack-old').exists(), 'tables came once, scratch folders go'


def test_another_file_than_the_first_time(birds):
    fetch('cub', birds, accept=True, **SOON)
    rows = downloads(birds)
    rows['pictures.zip']['unpacked'] = False
    (birds/'downloads.json').write_text(json.dumps(rows))
    shutil.rmtree(birds/'CUB_200_2011')
    rows['tables.tgz']['unpacked'] = False
    (birds/'downloads.json').write_text(json.dumps(rows))
    Shop.files['pictures.zip'] += b'more'
    assert 'its content is not the known one' in refused(fetch, 'cub', birds, accept=True, **SOON)


def test_another_version_and_no_archive(birds, shop, monkeypatch):
    Shop.files['pictures.zip'] = b'Service unavailable'
    said = refused(fetch, 'cub', birds, accept=True, **SOON)
    assert 'damaged or no archive; try again later, or get it by hand: CUB-200-2011' in said
    assert 'pictures.zip' not in downloads(birds) and not (birds/'.downloads'/'pictures.zip').exists()
    other = io.BytesIO()
    with zipfile.ZipFile(other, 'w') as z: z.writestr('CUB_200/x.txt', 'x')
    Shop.files['other.zip'] = other.getvalue()
    files = (File('other.zip', (shop('fine', 'other.zip'),)),)
    monkeypatch.setitem(SETS, 'new', DataSet('New', 'http://home', 'free', 'x', ('new',), ('x.txt',), files=files))
    assert 'was unpacked, but x.txt are not in new' in refused(fetch, 'new', birds, **SOON)


@pytest.mark.parametrize('lost', ['images', 'images.txt', ''])
def test_what_was_deleted_is_fetched_again(birds, lost):
    "Whatever the record says, what is not there is not there."
    here, path = fetch('cub', birds, accept=True, **SOON), birds/'CUB_200_2011'/lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    fetch('cub', birds, accept=True, **SOON)
    assert (here/'images.txt').is_file() and any((here/'images').rglob('*.jpg'))


def test_half_a_set_is_not_here(birds, monkeypatch):
    "The tables came, and the machine was switched off: once while the pictures came, once while they were unpacked."
    real, state = fetching.extract, lambda: next(r['state'] for r in listing(birds) if r['set'] == 'cub')

    def dies(archive, folder):
        if archive.name == 'tables.tgz': return real(archive, folder)
        (folder/'images').mkdir()
        raise KeyboardInterrupt
    monkeypatch.setattr(fetching, 'extract', dies)
    with pytest.raises(KeyboardInterrupt): fetch('cub', birds, accept=True, **SOON)
    assert state().startswith('begun')
    (birds/'.downloads'/'pictures.zip').unlink()
    assert state() == f"in part: {birds/'CUB_200_2011'} lacks pictures.zip"
    monkeypatch.undo()


@pytest.mark.parametrize('name, first, second', [
    ('voc2007', 'VOC2007/ImageSets/Main/train.txt', 'VOC2007/ImageSets/Main/test.txt'),
    ('fddb', 'FDDB-folds/FDDB-fold-01-ellipseList.txt', 'originalPics/2002/x.jpg'),
    ('wider', 'train/label.txt', 'WIDER_val/images/x.jpg')])
def test_one_of_two_archives(tmp_path, shop, monkeypatch, name, first, second):
    "What the first brought is here; only the second, whose mark is not, is fetched."
    s, tar = SETS[name], io.BytesIO()
    brings = lambda f: any(Path(second).match(m.split('|')[0] + k) for m in f.marks for k in ('', '/*'))
    f = next(filter(brings, s.files))
    with tarfile.open(fileobj=tar, mode='w:gz') as t: t.addfile(tarfile.TarInfo(f"{s.places[0]}/{second}"))
    Shop.files = {f.name: tar.getvalue()}
    files = [g._replace(marks=(first,)) for g in s.files if g != f]
    files.append(f._replace(urls=(shop('fine', f.name),), hash='', size=0, into=''))
    monkeypatch.setitem(SETS, name, s._replace(ask=False, files=tuple(files)))
    path = tmp_path/s.places[0]/first
    path.parent.mkdir(parents=True)
    path.touch()
    fetch(name, tmp_path, **SOON)
    assert (tmp_path/s.places[0]/second).exists() and len(Shop.asked) == 1


@pytest.mark.slow
def test_two_downloads_into_one_folder(birds):
    "The second is told to wait, and what it recorded meanwhile is not lost."
    birds.mkdir()
    with fetching._alone(birds):
        code = (f"from synthdet.data.fetch import _alone\nfrom pathlib import Path\n"
                f"with _alone(Path({str(birds)!r})): pass")
        out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
        assert 'another download into this folder is under way' in out.stderr
        assert 'under way' in refused(fetch, 'cub', birds, accept=True, **SOON) and not Shop.asked
    fetch('cub', birds, accept=True, **SOON)
    fetching._note(birds, 'a', dict(sha256='x'))
    fetching._note(birds, 'b', dict(sha256='y'))
    fetching._note(birds, 'a', dict(unpacked=True))
    assert downloads(birds)['a'] == dict(sha256='x', unpacked=True) and len(downloads(birds)) == 4


def test_state_on_disk(birds):
    state = lambda: next(r['state'] for r in listing(birds) if r['set'] == 'cub')
    assert state() == 'not here'
    (birds/'.downloads').mkdir(parents=True)
    (birds/'.downloads'/'tables.tgz.part').write_bytes(bytes(2_000_000))
    assert state() == 'begun: 2 MB'
    shutil.rmtree(birds)
    fetch('cub', birds, accept=True, **SOON)
    assert state() == f"here: {birds/'CUB_200_2011'}"


@needs_shared
def test_known_versions(tmp_path):
    "The lists with which the counts were checked are known, whatever their line ends; an edited one is not."
    root = tmp_path/'FDDB'/'FDDB-folds'
    shutil.copytree(shared()/'eval'/'fddb'/'FDDB-folds', root)
    os.chmod(root, 0o755)
    assert set(KNOWN) <= set(SETS) and _version('fddb', tmp_path) is None
    f = root/'FDDB-fold-03-ellipseList.txt'
    os.chmod(f, 0o644)
    f.write_bytes(f.read_bytes().replace(b'\n', b'\r\n'))
    assert _version('fddb', tmp_path) is None
    f.write_bytes(f.read_bytes().replace(b'1', b'2', 1))
    assert 'differ from the files' in _version('fddb', tmp_path)


def test_check_counts_what_was_damaged(tmp_path):
    root = make_fixture('faces', tmp_path)
    rows = check('faces', root)
    states = dict.fromkeys(('train', 'val', 'test', 'version'), 'differs') | dict(class_images='ok', backgrounds='ok')
    assert {part: state for part, state, _ in rows} == states and len(rows) == len(states)
    picture = root/'FDDB'/'originalPics'/'2002'/'02'/'11'/'big'/'img_11.jpg'
    picture.write_bytes(picture.read_bytes()[:-300])
    told = lambda **options: ' '.join(t for _, _, t in check('faces', root, **options))
    assert 'img_11.jpg: cannot be read' in told() and 'img_11' not in told(decode=False)
    picture.unlink()
    (part, state, told), = check('faces', root)
    assert (part, state) == ('domain', 'refused') and 'no such picture' in told


# ---- the command -----------------------------------------------------------------------------------------------------

def run(capsys, *argv):
    code = 0
    try: cli.data([str(a) for a in argv])
    except SystemExit as e: code = e.code
    out = capsys.readouterr()
    return code, out.out, out.err


def test_command(birds, capsys, monkeypatch):
    code, out, _ = run(capsys, 'list', '--root', birds)
    assert code == 0 and len(out.splitlines()) == len(SETS) + 3 and max(map(len, out.splitlines())) < 250
    code, out, err = run(capsys, 'fetch', 'birds', '--root', birds)
    assert code == 2 and len(err.splitlines()) == 1 and '--accept' in err
    code, out, err = run(capsys, 'fetch', 'birds', '--root', birds, '--accept')
    assert code == 1 and f"cub: {birds/'CUB_200_2011'}" in out, err
    assert 'bird_splits: cannot be fetched by a command' in out
    code, out, _ = run(capsys, 'check', 'birds', '--root', birds, '--options', 'split=official')
    assert code == 1 and 'birds backgrounds   missing' in out
    assert 'birds train         differs  10 of 10,345 images, 10 boxes' in out
    for argv, words in ((('fetch',), 'fetch what?'),
                        (('list', 'dogs'), "data set 'dogs' is unknown"),
                        (('check', 'lfw'), "domain 'lfw' is unknown; choose from faces"),
                        (('draw', 'dogs'), "domain 'dogs' is unknown"),
                        (('check', 'birds', '--options', 'official'), 'is no setting'),
                        (('draw', 'birds', '--root', birds), 'is there already, and')):
        code, _, err = run(capsys, *argv)
        assert code == 2 and words in err and len(err.splitlines()) == 1, err


def test_fetched_when_all_is_here(birds, capsys):
    fetch('cub', birds, accept=True, **SOON)
    shutil.copytree(birds.parent/'made'/'birds_splits', birds/'birds_splits')
    assert run(capsys, 'fetch', 'birds', '--root', birds)[0] == 0


def test_list_of_a_domain(birds, capsys):
    "What it is made of and what of it is here, class images and backgrounds too."
    (birds/'INRIAPerson'/'Train'/'neg').mkdir(parents=True)
    code, out, _ = run(capsys, 'list', 'birds', '--root', birds)
    parts = ('boxes', 'class images', 'backgrounds')
    lines = [(p, line) for line in out.splitlines()[1:8] for p in parts if line.startswith(p)]
    rows = {(p, line.removeprefix(p).split()[0]): line for p, line in lines}
    assert code == 0 and sorted(part for part, _ in rows) == ['backgrounds']*3 + ['boxes']*2 + ['class images']*2
    assert 'not here' in rows['boxes', 'cub'] and 'not here' in rows['class images', 'dmgan']
    assert f"here: {birds/'INRIAPerson'}" in rows['backgrounds', 'inria']


def test_more_pictures_than_are_listed_do_no_harm(tmp_path):
    "FDDB's pictures are mostly not in its folds."
    root = make_fixture('faces', tmp_path)
    big = root/'FDDB'/'originalPics'/'2002'/'02'/'11'/'big'
    shutil.copy(big/'img_11.jpg', big/'img_999.jpg')
    (state, told), = [(s, t) for p, s, t in check('faces', root, decode=False) if p == 'extra']
    assert state == 'ok' and '1 more pictures' in told and 'img_999.jpg' in told


def test_only_what_is_missing_is_called_missing(tmp_path):
    root = make_fixture('birds', tmp_path/'x')
    state = lambda where=root, **options: check('birds', where, decode=False, **options)[0][:2]
    assert state(tmp_path/'no') == ('domain', 'missing')
    for wrong in (dict(splits='x'), dict(split='x'), dict(backgrounds='no folder')):
        assert state(**wrong) == ('domain', 'refused')
    (root/'CUB_200_2011'/'images.txt').write_text('torn')
    assert state() == ('domain', 'refused')


def test_draw_spares_what_is_there(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'data'/'lfw').mkdir(parents=True)
    (tmp_path/'data'/'lfw'/'mine.jpg').write_bytes(b'mine')
    assert 'it has no DRAWN.txt' in refused(make_fixture, 'faces', tmp_path/'data')
    code, out, _ = run(capsys, 'draw', 'qrcodes')
    assert code == 0 and out == 'drawn\n' and (tmp_path/'drawn'/'qrcodes').is_dir()
    assert make_fixture('cars', tmp_path/'drawn'), 'domains may share a drawn tree'
    assert [p.name for p in (tmp_path/'data').rglob('*')] == ['lfw', 'mine.jpg']


def test_terms_are_asked_for(birds, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdin, 'isatty', lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
    monkeypatch.setattr('builtins.input', lambda text: 'n')
    code, _, err = run(capsys, 'fetch', 'cub', '--root', birds)
    assert code == 2 and 'terms: non-commercial research' in err and not birds.exists()
    monkeypatch.setattr(sys.stdin, 'isatty', lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
    monkeypatch.setattr('builtins.input', lambda text: 'yes')
    code, out, _ = run(capsys, 'fetch', 'cub', '--root', birds)
    assert code == 0 and (birds/'CUB_200_2011'/'images.txt').is_file()
