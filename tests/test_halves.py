"What is killed while it writes a set of data leaves nothing that reads as one."
import os
import signal
from functools import lru_cache

import pytest
import torch

from helpers import ended, forked
from synthdet.core import refused, UserError
from synthdet.paths import finished, half, whole_folder
from synthdet.data import butterflies
from synthdet.data.annotations import FORMATS, read_detection, write_detection
from synthdet.data.domain import Domain
from synthdet.data.domains import load_domain, write_domain
from synthdet.synthesis.cut import cutout
from synthdet.synthesis.disk import write_stream
from synthdet.synthesis.settings import Recipe
from synthdet.synthesis.stream import Samples


def labelled(i):
    image = torch.full((3, 24, 32), 9*i, dtype=torch.uint8)
    return image, dict(boxes=torch.tensor([[2., 3., 12. + i, 20.]]), labels=torch.tensor([1 + i % 2]), image_id=i)


class Sets(list):
    classes = 'moth', 'bee'


def some(n): return Sets(labelled(i) for i in range(n))


def killed_at(k, write, *args):
    "Was a process that writes ended by SIGKILL before the k-th file or folder got its name?"
    def child():
        left = iter(range(k))
        def slain(f):
            def instead(*args, **how):
                if next(left, None) is None: os.kill(os.getpid(), signal.SIGKILL)
                return f(*args, **how)
            return instead
        os.replace, os.rename = slain(os.replace), slain(os.rename)
        write(*args)
    code = ended(forked(child))
    assert code in (0, -signal.SIGKILL)
    return code != 0


def tree(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def as_read(data):
    return [(f.name, t['labels'].tolist(), t['boxes'].round(decimals=2).tolist())
            for f, t in zip(data.files, data.targets)]


def read_all(folder):
    "What any way of reading a set gives; the ways that are refused give nothing."
    found, places = [], [folder, *folder.glob('*.json'), *folder.glob('*.yaml'), folder/'labels', folder/'annotations']
    for place in places:
        try: found.append(as_read(read_detection(place)))
        except UserError as e: assert '\n' not in str(e)
    return found


def ends(write, folder, *args):
    "Kill at every file in turn; what could be read then, and how often a process was killed."
    for k in range(1000):
        place = folder/f'{k}'
        if not killed_at(k, write, place, *args): return k
        yield place


@pytest.mark.parametrize('format', FORMATS)
@pytest.mark.filterwarnings('ignore')
def test_a_set_killed_while_it_is_written_is_none(tmp_path, format):
    write = lambda folder, n: write_detection(some(n), folder, format)
    write(tmp_path/'whole', 4)
    n = 0
    for n, place in enumerate(ends(write, tmp_path/'new', 4), 1):
        assert read_all(place) == []
        write(place, 4)
        assert tree(place) == tree(tmp_path/'whole')
    assert n >= 6


@pytest.mark.parametrize('format', FORMATS)
@pytest.mark.filterwarnings('ignore')
def test_a_set_written_over_another_is_the_one_or_the_other(tmp_path, format):
    other = lambda n: Sets((255-image, dict(target, boxes=target['boxes'] + 1)) for image, target in some(n))
    def write(folder, n):
        if not folder.exists(): return write_detection(some(n), folder, format)
        write_detection(other(n), folder, format)
    write_detection(some(4), tmp_path/'before', format)
    write_detection(other(4), tmp_path/'after', format)
    right = [as_read(read_detection(tmp_path/k)) for k in ('before', 'after')]
    for k in range(1000):
        place = tmp_path/f'{k}'
        write(place, 4)
        if not killed_at(k, write, place, 4): break
        assert k == 0 and all(found == right[0] for found in read_all(place)) or read_all(place) == []
        write(place, 4)
        assert tree(place) == tree(tmp_path/'after')
    assert k >= 6


@pytest.mark.filterwarnings('ignore')
def test_a_domain_killed_while_it_is_written_is_none(tmp_path):
    domain = load_domain('butterflies', n_class_images=3, n_backgrounds=2, image_size=48)
    write = lambda root: write_domain(domain, root, n_labelled=2, format='yolo')
    write(tmp_path/'whole')
    for n, place in enumerate(ends(write, tmp_path/'new'), 1):
        refused(load_domain, 'folder', place)
        for split in ('train', 'val', 'test'):
            if n % 4 == 0: refused(read_detection, place/'detection'/split)
        if n % 6: continue
        write(place)
        assert tree(place) == tree(tmp_path/'whole')
    assert n > 20


@lru_cache
def stream():
    pool = [cutout(*butterflies.class_image(i, size=32), origin=f'{i}') for i in range(8)]
    backgrounds = [butterflies.background(i, size=48) for i in range(3)]
    return Samples([c for c in pool if c], backgrounds, Recipe(image_size=48), seed=5)


@pytest.mark.parametrize('format', FORMATS)
@pytest.mark.filterwarnings('ignore')
def test_an_export_killed_while_it_is_written_or_continued_is_none(tmp_path, format):
    write = lambda folder, n: write_stream(stream(), folder, n, format)
    first, wanted = (tree(write(tmp_path/k, n)) for k, n in (('first', 3), ('whole', 5)))
    right = as_read(read_detection(tmp_path/'first'))
    for begun in (False, True):
        for k in range(1000):
            place = tmp_path/f'{begun}{k}'
            if begun: write(place, 3)
            if not killed_at(k, write, place, 5): break
            assert read_all(place) == [] or begun and tree(place)['images/000002.jpg'] == first['images/000002.jpg'] \
                and all(found == right for found in read_all(place)) and k == 0
            write(place, 5)
            assert tree(place) == wanted
        assert k >= 5
        assert not half(place/'images').exists()


def test_an_export_that_is_whole_keeps_its_name_while_it_is_looked_at(tmp_path, monkeypatch):
    write_stream(stream(), tmp_path, 3, 'yolo')
    def never(*_): raise AssertionError('nothing is to be drawn')
    monkeypatch.setattr(os, 'rename', never)
    write_stream(stream(), tmp_path, 3, 'yolo')


def test_what_is_not_whole_says_so_and_what_to_do(tmp_path):
    write_detection(some(3), tmp_path/'detection'/'train', 'yolo')
    (tmp_path/'detection'/'train'/'images').rename(tmp_path/'detection'/'train'/'images.part')
    for path in ('', 'detection/train', 'detection/train/data.yaml'):
        told = refused(load_domain, 'folder', tmp_path) if not path else refused(read_detection, tmp_path/path)
        assert 'images.part: is not written to its end' in told and 'run again' in told
    assert 'is not written to its end' in refused(read_detection, tmp_path/'detection', split='train')
    (tmp_path/'detection'/'train'/'images').mkdir()
    assert 'delete one of them' in refused(write_detection, some(3), tmp_path/'detection'/'train', 'yolo')


def test_pictures_of_another_set_do_not_become_part_of_one(tmp_path):
    write_detection(some(4), tmp_path, 'yolo')
    before = tree(tmp_path)
    for n, how in ((3, {}), (4, dict(suffix='.jpg'))):
        told = refused(write_detection, some(n), tmp_path, 'yolo', **how)
        assert 'belongs to another set; choose a new folder' in told and '.png' in told
    assert tree(tmp_path) == before


def test_a_folder_gets_its_name_back_when_nothing_was_changed(tmp_path):
    for change in (False, True):
        (tmp_path/'a').mkdir()
        (tmp_path/'a'/'x').write_text('1')
        with pytest.raises(KeyError), whole_folder(tmp_path/'a') as place:
            if change: (place/'y').write_text('2')
            raise KeyError('no')
        assert os.listdir(tmp_path) == ['a.part' if change else 'a']
        if not change: (tmp_path/'a'/'x').unlink(), (tmp_path/'a').rmdir()
    assert 'expected a whole folder a' in refused(finished, tmp_path/'b', tmp_path/'a')
    (tmp_path/'file').touch()
    with pytest.raises(UserError, match='is a file'), whole_folder(tmp_path/'file'): pass
