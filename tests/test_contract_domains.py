"What every entry of DOMAINS takes, gives and refuses; those that read public data on drawn trees."
import inspect
import pickle
import shlex
from dataclasses import replace

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from synthdet.core import named, refused
from synthdet.data.catalogue import FACTS
from synthdet.data.domain import ClassImage, Domain, fingerprint, Missing
from synthdet.data.domains import butterflies, load_domain, write_domain
from synthdet.data.fixtures import make_fixture, TREES
from synthdet.data.public import CentreCropped
from synthdet.data.settings import DataSource, DOMAINS

PARTS = ('class_images', 'backgrounds', 'train', 'val', 'test')
FEW = {'butterflies': 'n_class_images=8 n_backgrounds=4 image_size=48', 'qrcodes': 'n_class_images=8'}


@pytest.fixture(scope='session')
def roots(tmp_path_factory):
    "Where each domain finds its data."
    drawn = tmp_path_factory.mktemp('drawn')
    for name in TREES: make_fixture(name, drawn, n=2)
    own = write_domain(butterflies(n_class_images=4, n_backgrounds=3, image_size=48), drawn/'birds', n_labelled=3)
    return {name: str(drawn) for name in TREES} | dict(butterflies='', folder=str(own))


@pytest.fixture(params=DOMAINS, scope='session')
def source(request, roots):
    "The settings of each domain."
    return DataSource(request.param, root=roots[request.param], options=FEW.get(request.param, ''))


@pytest.fixture(scope='session')
def domain(source): return load_domain(source)


def options(source):
    "Names and defaults of what a domain can be told beside its root."
    known = inspect.signature(named('domain', source.domain, DOMAINS)).parameters
    return {k: p.default for k, p in known.items() if k != 'root'}


# ---- gives -----------------------------------------------------------------------------------------------------------

def test_class_images(domain):
    c = domain.class_images[len(domain.class_images)-1]
    assert isinstance(c, ClassImage) and c.image.dtype == torch.uint8 and c.image.dim() == 3 and len(c.image) in (3, 4)
    assert 1 <= c.label <= len(domain.classes) and c.origin
    with pytest.raises(IndexError): domain.class_images[len(domain.class_images)]


def test_backgrounds(domain):
    image = domain.backgrounds[len(domain.backgrounds)-1]
    assert image.dtype == torch.uint8 and image.dim() == 3 and len(image) == 3


@pytest.mark.parametrize('split', PARTS[2:])
def test_labelled_sets(domain, split):
    part = getattr(domain, split)
    assert len(part) and tuple(part.classes) == tuple(domain.classes)
    image, target = part[len(part)-1]
    h, w = image.shape[1:]
    assert image.dtype == torch.uint8 and len(image) == 3 and isinstance(target['image_id'], int)
    boxes, labels = target['boxes'], target['labels']
    assert isinstance(boxes, tv_tensors.BoundingBoxes)
    assert boxes.dtype == torch.float32 and boxes.shape == (len(labels), 4)
    assert labels.dtype == torch.int64 and ((labels >= 1) & (labels <= len(domain.classes))).all()
    assert (boxes >= 0).all() and (boxes[:, 2:] > boxes[:, :2]).all() and (boxes <= torch.tensor([w, h, w, h])).all()


def test_transforms_move_boxes_with_pictures(domain):
    image, target = domain.test[0]
    mirrored, moved = v2.RandomHorizontalFlip(1.)(image, target)
    w, x1, x2 = image.shape[2], target['boxes'][:, 0], target['boxes'][:, 2]
    assert torch.equal(mirrored, image.flip(-1)) and torch.allclose(moved['boxes'][:, 0], w - x2)
    assert torch.allclose(moved['boxes'][:, 2], w - x1)


def test_the_same_again_and_in_another_process(domain, source):
    names = {part: fingerprint(getattr(domain, part)) for part in PARTS}
    for again in (load_domain(source), pickle.loads(pickle.dumps(domain))):
        assert names == {part: fingerprint(getattr(again, part)) for part in PARTS}
        assert torch.equal(again.class_images[0].image, domain.class_images[0].image)
        assert torch.equal(again.train[1][0], domain.train[1][0])


def test_parts_are_told_apart(domain):
    if domain.name == 'wider': assert domain.val is domain.test, 'the official test set has no public boxes'
    assert len({fingerprint(getattr(domain, part)) for part in PARTS}) == 5 - (domain.name == 'wider')


def test_what_is_said_of_it(domain, source):
    facts = FACTS.get(source.domain)
    assert domain.preset == (facts.preset if facts else '') and domain.counts == (facts.counts if facts else ())
    assert domain.class_images_from and domain.boxes_spent == 0 and domain.classes and domain.licence
    line = repr(domain)
    assert '\n' not in line and domain.name in line and f'{len(domain.class_images)} class images' in line
    assert f'({domain.class_images_from})' in line


# ---- takes -----------------------------------------------------------------------------------------------------------

def test_name_settings_function_and_the_thing_itself(source, domain):
    how = dict(word.split('=') for word in source.options.split())
    for way in (source.domain, named('domain', source.domain, DOMAINS)):
        other = load_domain(way, source.root, **how)
        for part in PARTS: assert fingerprint(getattr(other, part)) == fingerprint(getattr(domain, part))
    assert load_domain(domain) is domain


def test_options_as_words(source):
    "Its defaults, written out, are no change."
    words = ' '.join(shlex.quote(f'{k}={v}') for k, v in options(source).items() if v != '')
    plain = load_domain(source.domain, source.root)
    told = load_domain(DataSource(source.domain, root=source.root, options=words))
    assert [len(getattr(told, part)) for part in PARTS] == [len(getattr(plain, part)) for part in PARTS]


def test_a_domain_of_ones_own(monkeypatch):
    def mine(root, size:int=32): return butterflies(image_size=size)
    monkeypatch.setitem(DOMAINS, 'mine', mine)
    assert load_domain(DataSource('mine', options='size=40')).train[0][0].shape == (3, 40, 40)


# ---- refuses ---------------------------------------------------------------------------------------------------------

def test_unknown_options(source):
    said = refused(load_domain, source, colour='red')
    assert "option 'colour' is unknown; choose from " + ', '.join(options(source)) in said


def test_options_of_another_type(source):
    for k, v in options(source).items():
        if type(v) not in (int, bool): continue
        assert f"{k}='much' should be " in refused(load_domain, replace(source, options=f'{k}=much'))


@pytest.mark.parametrize('root', ['', '/nowhere'])
def test_a_root_that_is_no_folder(source, root):
    if not source.root: assert 'reads no folder' in refused(load_domain, source.domain, '/nowhere')
    else: assert any(w in refused(load_domain, source.domain, root) for w in ('no such folder', 'root is empty'))


def test_folders_that_are_not_there(source):
    for k in {'class_images', 'backgrounds'} & options(source).keys():
        assert 'nowhere' in refused(load_domain, source, **{k: '/nowhere'})


# ---- what boxes are spent on -----------------------------------------------------------------------------------------

def test_without_a_fallback_no_box_is_spent(source): assert load_domain(source, fallback=False).boxes_spent == 0


@pytest.fixture
def photographs(tmp_path):
    "Birds without a generator's pictures."
    root = make_fixture('birds', tmp_path/'tree', n=2)
    (root/'dmgan_birds').rename(tmp_path/'elsewhere')
    return root


def test_crops_are_the_last_source_and_say_so(photographs):
    d = load_domain('birds', photographs)
    assert d.class_images_from == 'crops' and d.boxes_spent == len(d.class_images) == len(d.train)
    assert f'(crops, which spend {d.boxes_spent} boxes)' in repr(d)


def test_crops_are_refused_where_boxes_count(photographs, tmp_path):
    "Only what needs class images is refused, and the line names what can be asked for."
    d = load_domain(DataSource('birds', root=str(photographs)), fallback=False)
    assert len(d.train) and len(d.backgrounds) and isinstance(d.class_images, Missing)
    for said in (refused(len, d.class_images), refused(lambda: d.class_images[0])):
        assert 'expected dmgan, or any folder as class_images=' in said
        assert 'or ask for class_images=crops, which spends the boxes of the training images' in said
    asked = load_domain(DataSource('birds', root=str(photographs), class_images='crops'), fallback=False)
    assert asked.boxes_spent == len(asked.class_images)
    other = load_domain('birds', photographs, class_images=tmp_path/'elsewhere', fallback=False)
    assert (other.class_images_from, other.boxes_spent) == ('elsewhere', 0)


# ---- a name decides nothing, and parts are enough --------------------------------------------------------------------

@pytest.mark.parametrize('name', TREES)
def test_a_folder_called_like_a_domain_is_a_folder(name, tmp_path):
    d = butterflies(n_class_images=2, n_backgrounds=2, image_size=32)
    d = load_domain('folder', write_domain(d, tmp_path/name, n_labelled=2))
    assert (d.name, d.preset, d.counts, d.class_images_from) == (name, '', (), 'class_images')


@pytest.mark.parametrize('name', ['folder', 'faces', 'qrcodes'])
def test_class_images_and_backgrounds_are_enough(name, roots, tmp_path):
    "To look at synthesised images and to pretrain on them."
    needed = ('class_images', 'backgrounds') if name == 'folder' else ('lfw', 'INRIAPerson')
    for k in needed: (tmp_path/k).symlink_to(f'{roots[name]}/{k}')
    d = load_domain(name, tmp_path)
    assert d.class_images[0].image.any() and d.backgrounds[0].any()
    assert all(isinstance(getattr(d, split), Missing) for split in PARTS[2:])
    assert isinstance(Domain(d.name, d.classes, d.class_images, d.backgrounds).train, Missing)


# ---- cars as released ------------------------------------------------------------------------------------------------

def test_cars_are_scaled_and_the_middle_is_kept(roots):
    "256 x 256 and its middle 128 x 128, whatever the size, with a mask or without: against Pillow's own calls."
    from PIL import Image
    plain = load_domain('cars', roots['cars']).class_images
    cropped = CentreCropped(plain)
    assert len(plain) == len(cropped) and fingerprint(plain) != fingerprint(cropped)
    for i in range(3):
        image, label, origin = plain[i]
        scaled = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((256, 256), Image.BICUBIC)
        middle = torch.tensor(list(scaled.crop((64, 64, 192, 192)).tobytes()), dtype=torch.uint8).view(128, 128, 3)
        assert torch.equal(cropped[i].image, middle.permute(2, 0, 1)) and cropped[i][1:] == (label, origin)
    whole = [ClassImage(torch.full((4, h, w), 200, dtype=torch.uint8), 1, 'x') for h, w in ((300, 500), (60, 40))]
    for c in CentreCropped(whole): assert c.image.shape == (4, 128, 128) and (c.image == 200).all()
