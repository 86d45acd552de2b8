"""Forward passes of all that is trained, on tensors that say they lie on a GPU: what mixes devices raises here."""
import pytest, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from synthdet.detection.detectors import detector
from synthdet.detection.faceanchors import priors
from synthdet.detection.contract import best
from synthdet.masks.redo import _discriminator_loss, _generator_losses, RedoConfig
from synthdet.masks.redonet import build_redo
from synthdet.objects.gan64 import Generator64
from synthdet.objects.gantrain import differentiable_augment, Discriminator64, widths_of
from synthdet.objects.settings import GanConfig


@pytest.fixture
def gpu():
    "While it lasts, tensors have shapes and devices but no numbers. Gives what puts a network on the GPU."
    def made(build):
        with torch.device('cuda'): return build()
    with FakeTensorMode(): yield made


def asked(model):
    "What the matcher of a detector gives for two pictures, on the GPU."
    n = len(model.anchors) if hasattr(model, 'heads') else len(priors(96, 96))
    zeros = lambda *shape, **how: torch.zeros(2, n, *shape, device='cuda', **how)
    return dict(truth=zeros(dtype=torch.int64), goals=zeros(4), positives=torch.ones(2, device='cuda'), marks=zeros(10),
                marked=zeros(dtype=torch.bool))


@pytest.mark.parametrize('name, options', [
    ('ssd', dict(backbone='mobilenetv1_100')), ('ssd', dict(backbone='resnet_small')), ('retinaface', {})])
def test_detectors(gpu, name, options):
    model = gpu(lambda: detector(name, image_size=96, **options)).train()
    losses = model(torch.rand(2, 3, 96, 96, device='cuda'), asked(model))
    assert {v.device.type for v in losses.values()} == {'cuda'}


@pytest.mark.parametrize('attention', [False, True])
def test_redo(gpu, attention):
    nets = gpu(lambda: build_redo(RedoConfig(size=32, nf=4, attention=attention).options()))
    x, z = torch.rand(2, 3, 32, 32, device='cuda'), torch.rand(2, 2, 32, 1, 1, device='cuda')
    losses = [*_generator_losses(nets, x, z, 5).values(), _discriminator_loss(nets, x, z, x)]
    assert {v.device.type for v in losses} == {'cuda'}


def test_gan(gpu):
    c = GanConfig()
    G, D = gpu(lambda: Generator64(c.nz, widths_of(c))), gpu(lambda: Discriminator64(widths_of(c)))
    z = torch.rand(4, c.nz, device='cuda')
    judged = D(differentiable_augment(G(z), None)) # numbers drawn on the CPU, as always
    assert judged.device.type == 'cuda'


def test_order_of_scores(gpu):
    assert best(torch.rand(8, device='cuda'), torch.zeros(8, dtype=torch.int64, device='cuda')).device.type == 'cuda'


def test_a_mix_is_seen(gpu):
    with pytest.raises(RuntimeError, match='device'): torch.zeros(2, device='cuda') + torch.zeros(2)
