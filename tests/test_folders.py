"Going through folders: links, rings, and folders that are no set of data."
import contextlib
import json
import os
import signal
import socket

import pytest
from PIL import Image

from synthdet.core import refused
from synthdet.data import walks
from synthdet.data.annotations import read_detection
from synthdet.data.domains import load_domain
from synthdet.data.folders import tree
from synthdet.data.walks import listing, walk

FORMATS = 'coco', 'voc', 'yolo'


def shown(folder, name):
    (folder/name).parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (40, 30), (90, 120, 60)).save(folder/name)


def text(folder, name, content):
    (folder/name).parent.mkdir(parents=True, exist_ok=True)
    (folder/name).write_text(content if isinstance(content, str) else json.dumps(content))


VOC = ('<annotation><object><name>bird</name><bndbox><xmin>11</xmin><ymin>7</ymin><xmax>30</xmax><ymax>24</ymax>'
       '</bndbox></object></annotation>')


def annotated(folder, format, names, start=''):
    "Annotations of pictures `names`, which COCO tells with `start`."
    if format == 'yolo':
        for n in names: text(folder, f'labels/{os.path.splitext(n)[0]}.txt', '0 .5125 .5 .5 .6\n')
        text(folder, 'data.yaml', 'names: [bird]\n')
    if format == 'voc':
        for n in names: text(folder, f'Annotations/{os.path.splitext(n)[0]}.xml', VOC)
    if format != 'coco': return
    rows = [dict(id=i, image_id=i, category_id=1, bbox=[10.5, 6, 20, 18]) for i in range(len(names))]
    text(folder, 'annotations/instances.json',
         dict(images=[dict(id=i, file_name=start + n) for i, n in enumerate(names)],
              annotations=rows, categories=[dict(id=1, name='bird')]))


@pytest.mark.parametrize('format', FORMATS)
@pytest.mark.parametrize('linked', ['images', 'images/one', 'whole', 'in_the_set'])
@pytest.mark.filterwarnings('ignore')
def test_linked_folders_of_pictures_are_read(tmp_path, format, linked):
    folder, names = tmp_path/'set', ['one/a.png', 'one/b.png', 'two/c.png']
    annotated(folder, format, names, start='/home/other/machine/' if format == 'coco' else '')
    place = dict(images=tmp_path/'disk', whole=folder/'images', in_the_set=folder/'.pool').get(linked, folder/'images')
    for n in names: shown(tmp_path/'disk' if linked == 'images/one' and n < 'two' else place, n)
    if linked in ('images', 'in_the_set'): (folder/'images').symlink_to(place, target_is_directory=True)
    if linked == 'images/one': (folder/'images/one').symlink_to(tmp_path/'disk'/'one')
    if linked == 'whole':
        folder.rename(tmp_path/'elsewhere')
        folder.symlink_to('elsewhere')
    data = read_detection(folder)
    assert [f.name for f in data.files] == ['a.png', 'b.png', 'c.png']
    assert all(len(t['boxes']) == 1 and abs(t['boxes'][0] - t['boxes'].new([10.5, 6, 30.5, 24])).max() <= .5
               for t in data.targets)


@pytest.mark.parametrize('format', FORMATS)
@pytest.mark.filterwarnings('ignore')
def test_rings_of_links_end(tmp_path, format):
    annotated(tmp_path/'set', format, ['a.png'])
    shown(tmp_path/'set'/'images', 'a.png')
    for a, b in (('one', 'two'), ('two', 'three'), ('three', 'one'), ('one', 'one'), ('two', '.'), ('one', '..')):
        (tmp_path/'set'/'images'/a).mkdir(exist_ok=True)
        (tmp_path/'set'/'images'/a/f'to {b}').symlink_to(tmp_path/'set'/'images'/b)
    (tmp_path/'set'/'images'/'self').symlink_to('self')
    assert [f.name for f in read_detection(tmp_path/'set').files] == ['a.png']
    assert len(tree(tmp_path/'set')) < 5


def test_a_link_is_followed_but_not_back(tmp_path):
    for n in ('a/x', 'b/y', 'c/z'): text(tmp_path, n, '')
    (tmp_path/'a'/'to').symlink_to(tmp_path/'b')
    (tmp_path/'b'/'to').symlink_to(tmp_path/'a')
    (tmp_path/'a'/'up').symlink_to(tmp_path)
    assert list(tree(tmp_path)) == ['a/to/y', 'a/x', 'b/to/x', 'b/y', 'c/z']
    assert list(tree(tmp_path/'a')) == ['to/y', 'x']
    assert sorted(e.name for e in walk(tmp_path, follow=False)) == ['to', 'to', 'up', 'x', 'y', 'z']
    assert len(listing(tmp_path, below=True)[1]) == 6


@pytest.mark.parametrize('how', ['files', 'folders', 'links'])
def test_what_is_no_set_of_data_is_told_by_how_much_it_holds(tmp_path, monkeypatch, how):
    monkeypatch.setattr(walks, 'MAX_FILES', 60)
    monkeypatch.setattr(walks, 'MAX_FOLDERS', 60)
    if how == 'files':
        for i in range(70): text(tmp_path, f'{i % 3}/{i}.dat', '')
    if how == 'folders':
        for i in range(70): (tmp_path/f'{i % 3}'/f'{i}').mkdir(parents=True)
    if how == 'links': # any two of six folders lead to each other: 1,957 ways
        for i in range(6): (tmp_path/f'{i}').mkdir()
        for i in range(36): (tmp_path/f'{i // 6}'/f'{i % 6}').symlink_to(tmp_path/f'{i % 6}')
    told = refused(read_detection, tmp_path)
    assert 'files and' in told and 'folders so far' in told and 'give its own folder' in told
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'detection').symlink_to(tmp_path)
    assert 'give its own folder' in refused(load_domain, 'folder', tmp_path/'mine')


def test_folders_of_the_system_are_not_entered(tmp_path):
    for name in ('proc', 'dev', 'sys/class'): (tmp_path/name.replace('/', ' ')).symlink_to(f'/{name}')
    text(tmp_path, 'a', '')
    assert list(tree(tmp_path)) == ['a']


@contextlib.contextmanager
def within(seconds):
    "Raise `TimeoutError` in what waits longer."
    def late(*_): raise TimeoutError
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def strange(path, kind):
    "A pipe, a socket or a link to a device."
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == 'a pipe': os.mkfifo(path)
    if kind == 'a device': path.symlink_to('/dev/null')
    if kind != 'a socket': return
    with socket.socket(socket.AF_UNIX) as s:
        here = os.getcwd()
        os.chdir(path.parent) # the path of a socket is short
        try: s.bind(path.name)
        finally: os.chdir(here)


@pytest.mark.parametrize('kind, name', [
    ('a pipe', 'labels/p.txt'), ('a socket', 'labels/p.txt'), ('a device', 'labels/p.txt'),
    ('a pipe', 'images/q.png'), ('a device', 'images/p.png'), ('a pipe', 'data.yaml'),
    ('a socket', 'old/agent'), ('a pipe', 'x.json'), ('a pipe', 'Annotations/p.xml')])
def test_a_pipe_among_data_is_named_and_never_waited_for(tmp_path, kind, name):
    "It counted as a picture without label. Where something else of the name is there, it is in its place."
    d = tmp_path/'detection'/'train'
    for n in 'pr': shown(d, f'images/{n}.png')
    text(d, 'labels/r.txt', '0 .5 .5 .5 .5')
    text(d, 'classes.txt', 'bird')
    if name.startswith('images/p'): (d/name).unlink()
    strange(d/name, kind)
    with within(60): told = [refused(read_detection, d), refused(load_domain, 'folder', tmp_path)]
    assert all(f'{d/name}: is {kind}; expected files and folders alone' in line for line in told), told


@pytest.mark.parametrize('name', ['a.xml', 'images/a.png', 'train.json'])
def test_a_pipe_in_another_format_is_named(tmp_path, name):
    entry = dict(images=[dict(id=1, file_name='a.png')], annotations=[], categories=[dict(id=1, name='bird')])
    if name != 'a.xml': text(tmp_path, 'detection/val.json', entry)
    else: shown(tmp_path/'detection', 'a.png')
    strange(tmp_path/'detection'/name, 'a pipe')
    with within(60): assert f'{name}: is a pipe' in refused(load_domain, 'folder', tmp_path)
