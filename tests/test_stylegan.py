"StyleGAN from files: both layouts against references written from the definitions, and files that must not be read."
import json
import pickle
import sys
import types

import numpy as np
import pytest
import torch

from synthdet.core import UserError
from synthdet.machine import shared
from synthdet.objects.stylegan import load_stylegan
from synthdet.objects.stylenet import StyleGAN

WIDTHS, DIMS = (10, 10, 8, 8, 6, 6), (12, 14, 14, 9) # 128 px: block 5 is fused


def genforce(widths=WIDTHS, dims=DIMS, seed=0):
    "The entries of a genforce file, all of them random."
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g)
    s = {'truncation.w_avg': draw(dims[-1])*.3, 'synthesis.lod': torch.zeros(())}
    blur = torch.tensor([1., 2, 1])[:, None]*torch.tensor([1., 2, 1])/16
    for k, (i, o) in enumerate(zip(dims, dims[1:])):
        s |= {f'mapping.dense{k}.weight': draw(o, i)*100, f'mapping.dense{k}.bias': draw(o)*20}
    for b, c in enumerate(widths):
        for i in (2*b, 2*b + 1):
            p, r = f'synthesis.layer{i}.', 4*2**b
            s |= {p + 'bias': draw(c)*.5, p + 'apply_noise.weight': draw(c)*.2,
                  p + 'apply_noise.noise': draw(1, 1, r, r),
                  p + 'style.weight': draw(2*c, dims[-1])*.3, p + 'style.bias': draw(2*c)*.3}
            if i == 0: s[p + 'const'] = draw(1, c, 4, 4)
            else: s[p + 'weight'] = draw(c, widths[b - 1] if i == 2*b else c, 3, 3)
            if i == 2*b > 0: s[p + 'blur.kernel'] = blur.repeat(c, 1, 1, 1)
        s |= {f'synthesis.output{b}.weight': draw(3, c, 1, 1), f'synthesis.output{b}.bias': draw(3)*.2}
    return s


def rosinality(widths=WIDTHS, dims=DIMS, fused_from=128, seed=1):
    "The entries of a rosinality file, all of them random."
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g)
    s, blur = {}, (torch.tensor([1., 2, 1])[:, None]*torch.tensor([1., 2, 1])/16)
    for k, (i, o) in enumerate(zip(dims, dims[1:])):
        s |= {f'style.{2*k + 1}.linear.weight_orig': draw(o, i), f'style.{2*k + 1}.linear.bias': draw(o)*.2}
    for b, c in enumerate(widths):
        p, fused = f'generator.progression.{b}.', 4*2**b >= fused_from
        if b == 0: s[p + 'conv1.input'] = draw(1, c, 4, 4)
        elif fused: s |= {p + 'conv1.0.weight': draw(widths[b - 1], c, 3, 3), p + 'conv1.0.bias': draw(c)*.5}
        else: s |= {p + 'conv1.1.conv.weight_orig': draw(c, widths[b - 1], 3, 3), p + 'conv1.1.conv.bias': draw(c)*.5}
        for n in ('weight', 'weight_flip') if b else ():
            s[f'{p}conv1.{1 if fused else 2}.{n}'] = blur.repeat(c, 1, 1, 1)
        s |= {p + 'conv2.conv.weight_orig': draw(c, c, 3, 3), p + 'conv2.conv.bias': draw(c)*.5}
        for n in (1, 2):
            s |= {f'{p}noise{n}.weight_orig': draw(1, c, 1, 1)*.3,
                  f'{p}adain{n}.style.linear.weight_orig': draw(2*c, dims[-1])*.3,
                  f'{p}adain{n}.style.linear.bias': draw(2*c)*.3 + torch.tensor([1.]*c + [0.]*c)}
        s |= {f'generator.to_rgb.{b}.conv.weight_orig': draw(3, c, 1, 1), f'generator.to_rgb.{b}.conv.bias': draw(3)*.2}
    return s


# The references: numpy in double precision, one picture at a time, the definitions spelled out.

def lrelu(x): return np.where(x > 0, x, .2*x)
def pixel_norm(z): return z/np.sqrt((z**2).mean() + 1e-8)


def conv(x, k):
    "x [C,H,W] and k [D,C,3,3] with a border of zeros."
    _, H, W = x.shape
    p = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    return sum(np.einsum('dc,chw->dhw', k[:, :, u, v], p[:, u:u + H, v:v + W]) for u in range(3) for v in range(3))


def doubled(x): return x[:, np.arange(2*x.shape[1])//2][:, :, np.arange(2*x.shape[2])//2]


def transposed(x, k):
    "Each pixel (i, j) stamps the 4 x 4 sum of shifted kernels onto rows 2i - 1 to 2i + 2 (k is [D,C,3,3])."
    D, (_, H, W) = len(k), x.shape
    stamp = np.zeros((*k.shape[:2], 4, 4))
    for a in (0, 1):
        for b in (0, 1): stamp[:, :, a:a + 3, b:b + 3] += k
    out = np.zeros((D, 2*H + 2, 2*W + 2))
    for u in range(4):
        for v in range(4): out[:, u:u + 2*H:2, v:v + 2*W:2] += np.einsum('dc,chw->dhw', stamp[:, :, u, v], x)
    return out[:, 1:-1, 1:-1]


def blurred(x): return np.stack([conv(c[None], np.outer([1, 2, 1], [1, 2, 1])[None, None]/16)[0] for c in x])


def normal(x, eps):
    x = x - x.mean((1, 2), keepdims=True)
    return x/np.sqrt((x**2).mean((1, 2), keepdims=True) + eps)


def reference_genforce(s, z, psi=1, cutoff=None, noise=True):
    s = {k: v.double().numpy() for k, v in s.items()}
    w = pixel_norm(z.double().numpy())
    for k in range(sum('mapping' in k for k in s)//2):
        weight = s[f'mapping.dense{k}.weight']
        w = lrelu(weight @ w*np.sqrt(2/weight.shape[1])*.01 + s[f'mapping.dense{k}.bias']*.01)
    layers = sum(k.endswith('style.bias') for k in s)
    for i in range(layers):
        p = f'synthesis.layer{i}.'
        v = s['truncation.w_avg'] + psi*(w - s['truncation.w_avg']) if cutoff is None or i < cutoff else w
        if i == 0: x = s[p + 'const'][0]
        else:
            k = s[p + 'weight']; k = k*np.sqrt(2)/np.sqrt(k[0].size)
            if i % 2: x = conv(x, k)
            else: x = blurred(transposed(x, k) if 4*2**(i//2) >= 128 else conv(doubled(x), k))
        if noise: x = x + s[p + 'apply_noise.noise'][0]*s[p + 'apply_noise.weight'][:, None, None]
        x = normal(lrelu(x + s[p + 'bias'][:, None, None]), 1e-8)
        y = s[p + 'style.weight'] @ v/np.sqrt(len(v)) + s[p + 'style.bias']
        x = x*(y[:len(x), None, None] + 1) + y[len(x):, None, None]
    o = f'synthesis.output{layers//2 - 1}.'
    return np.einsum('dc,chw->dhw', s[o + 'weight'][..., 0, 0]/np.sqrt(len(x)), x) + s[o + 'bias'][:, None, None]


def reference_rosinality(s, z, maps=None, step=None):
    "`maps`: one noise map per block; `step`: the block whose colours are shown."
    s = {k: v.double().numpy() for k, v in s.items()}
    used = lambda k: s[k]*np.sqrt(2/s[k][0].size)
    w = pixel_norm(z.double().numpy())
    for k in range(sum(k.startswith('style.') for k in s)//2):
        w = lrelu(used(f'style.{2*k + 1}.linear.weight_orig') @ w + s[f'style.{2*k + 1}.linear.bias'])
    blocks = sum('to_rgb' in k for k in s)//2 if step is None else step + 1
    for b in range(blocks):
        p = f'generator.progression.{b}.'
        for n in (1, 2):
            if n == 2: x = conv(x, used(p + 'conv2.conv.weight_orig')) + s[p + 'conv2.conv.bias'][:, None, None]
            elif b == 0: x = s[p + 'conv1.input'][0]
            elif p + 'conv1.0.weight' in s:
                k = s[p + 'conv1.0.weight'].transpose(1, 0, 2, 3) # stored inputs first
                x = blurred(transposed(x, k*np.sqrt(2/k[0].size)/4) + s[p + 'conv1.0.bias'][:, None, None])
            else:
                x = conv(doubled(x), used(p + 'conv1.1.conv.weight_orig'))
                x = blurred(x + s[p + 'conv1.1.conv.bias'][:, None, None])
            if maps is not None: x = x + used(f'{p}noise{n}.weight_orig')[0]*maps[b]
            x = normal(lrelu(x), 1e-5)
            y = used(f'{p}adain{n}.style.linear.weight_orig') @ w + s[f'{p}adain{n}.style.linear.bias']
            x = x*y[:len(x), None, None] + y[len(x):, None, None]
    o = f'generator.to_rgb.{blocks - 1}.conv.'
    return np.einsum('dc,chw->dhw', used(o + 'weight_orig')[..., 0, 0], x) + s[o + 'bias'][:, None, None]


def save(content, path, **options):
    torch.save(content, path, **options)
    return path


def close(found, expected): return np.abs(found.numpy() - expected).max() < 1e-3


@pytest.fixture(scope='module')
def z(): return torch.randn(2, DIMS[0], generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize('wrapped', [True, False], ids=['checkpoint', 'bare'])
def test_genforce_equals_the_definition(tmp_path, z, wrapped, zipped):
    s = genforce()
    content = dict(generator=genforce(seed=9), discriminator={}, generator_smooth=s) if wrapped else s
    G = load_stylegan(save(content, tmp_path/'g.pth', _use_new_zipfile_serialization=zipped))
    for options in (dict(), dict(psi=.5), dict(psi=.7, cutoff=8), dict(psi=-1, cutoff=1), dict(psi=0, cutoff=0)):
        for k, image in enumerate(G(z, **options)): assert close(image, reference_genforce(s, z[k], **options)), options
    assert close(G(z, noise='none')[1], reference_genforce(s, z[1], noise=False))
    assert not close(G(z)[1], reference_genforce(s, z[1], noise=False))


@pytest.mark.parametrize('fused_from', [128, 8, 9999])
def test_rosinality_equals_the_definition(tmp_path, z, fused_from):
    s = rosinality(fused_from=fused_from)
    path = save(dict(generator={}, discriminator={}, g_running=s), tmp_path/'train_step-5.model')
    G = load_stylegan(path)
    maps = [getattr(G.synthesis, f'layer{2*b}').apply_noise.noise[0, 0].numpy() for b in range(len(WIDTHS))]
    for k in range(2):
        assert close(G(z, noise='none')[k], reference_rosinality(s, z[k]))
        assert close(G(z)[k], reference_rosinality(s, z[k], maps))
    small = load_stylegan(path, size=32)
    assert small.size == 32 and small.layers == 8
    assert close(small(z, noise='none')[0], reference_rosinality(s, z[0], step=3))
    average = G.mapping(torch.randn(30000, DIMS[0], generator=torch.Generator().manual_seed(0))).mean(0)
    assert (G.truncation.w_avg - average).norm() < .03*average.norm()
    w = G.mapping(z); pulled = G.truncation.w_avg + .7*(w - G.truncation.w_avg)
    assert torch.allclose(G(z, psi=.7), G.synthesis(pulled), atol=1e-4)


def test_other_sizes_colours_and_types(tmp_path, z):
    s = genforce(widths=(6, 4), dims=(12, 5))
    s |= {'synthesis.output1.weight': torch.randn(1, 4, 1, 1), 'synthesis.output1.bias': torch.zeros(1),
          'synthesis.output0.weight': torch.randn(1, 6, 1, 1), 'synthesis.output0.bias': torch.zeros(1)}
    G = load_stylegan(save(s, tmp_path/'grey.pth'))
    assert G(z).shape == (2, 1, 8, 8) and (G.size, G.layers, G.z_dim) == (8, 4, 12)
    half = load_stylegan(save({k: v.half() for k, v in s.items()}, tmp_path/'half.pth'))
    assert half(z).dtype == torch.float32 and (half(z) - G(z)).abs().max() < .1
    assert not G(z.double().requires_grad_()).requires_grad
    import safetensors.torch
    safetensors.torch.save_file(s, tmp_path/'g.safetensors')
    assert torch.equal(load_stylegan(tmp_path/'g.safetensors')(z), G(z))


def test_random_noise_is_of_the_seed_the_picture_and_the_layer(tmp_path, z):
    seen = {}
    for name, s in dict(genforce=genforce(WIDTHS[:3]), rosinality=rosinality(WIDTHS[:3])).items():
        G = load_stylegan(save(s, tmp_path/name)); maps = []
        for i in range(G.layers):
            noise = getattr(G.synthesis, f'layer{i}').apply_noise
            noise.register_forward_pre_hook(lambda m, given: maps.append(given[1]))
        first = G(z, noise='random', seed=3)
        assert torch.equal(first, G(z, noise='random', seed=3)) and not torch.equal(first, G(z, noise='random', seed=4))
        assert torch.allclose(G(z[1:], noise='random', seed=[8]), G(z, noise='random', seed=[3, 8])[1:], atol=1e-5)
        assert torch.allclose(G(z[:1], noise='random', seed=3), first[:1], atol=1e-5)
        assert all(not torch.equal(m[0], m[1]) for m in maps[:6])
        seen[name] = [torch.equal(maps[2*b], maps[2*b + 1]) for b in range(3)]
    assert seen == dict(genforce=[False]*3, rosinality=[True]*3)
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    G(z, noise='random'); load_stylegan(tmp_path/'rosinality')
    assert torch.equal(torch.get_rng_state(), state[0]), 'no global randomness is touched'
    assert np.random.get_state()[1].tolist() == state[1], 'no global randomness is touched'


@pytest.mark.parametrize('name', ['genforce_car_512', 'genforce_ffhq_1024', 'rosinality_1024'])
def test_a_file_of_the_released_layout_is_read(tmp_path, name):
    if shared() is None: pytest.skip('no reference layouts beside the project')
    keys = json.loads((shared()/'spec'/'keys'/f'stylegan1_{name}.json').read_text())
    path = save({k: torch.full(s, .5, dtype=torch.bfloat16) for k, s in keys.items()}, tmp_path/'full.pth')
    try: G = load_stylegan(path)
    finally: path.unlink()
    assert G.size == int(name.split('_')[-1]) and G.z_dim == 512
    if 'genforce' in name: assert {k: list(v.shape) for k, v in G.state_dict().items()} == keys
    fused = [b for b in range(1, G.layers//2) if getattr(G.synthesis, f'layer{2*b}').up == 'fused']
    assert fused == list(range(5, G.layers//2))


def refused(path, *words, **options):
    with pytest.raises(UserError) as e: load_stylegan(path, **options)
    message = str(e.value)
    assert '\n' not in message and str(path) in message and len(message) < 700, message
    assert all(w in message for w in words), message


@pytest.mark.parametrize('protocol', [0, 2, 3, 4])
def test_nvidias_pickles_are_not_opened(tmp_path, monkeypatch, protocol):
    marker = tmp_path/'marker'
    names = [('dnnlib.tflib.network', 'Network'), ('torch_utils.persistence', '_reconstruct_persistent_obj')]
    for module, name in names:
        for part in range(len(module.split('.'))):
            monkeypatch.setitem(sys.modules, '.'.join(module.split('.')[:part + 1]), types.ModuleType(module))
        class Network:
            def __reduce__(self): return open, (str(marker), 'w')
        plain = type(name, (), dict(__module__=module, __qualname__=name))
        setattr(sys.modules[module], name, plain)
        content = (plain(), plain(), plain(), Network()) if 'tflib' in module else dict(G=plain(), run=Network())
        path = tmp_path/f'{name}.pkl'; path.write_bytes(pickle.dumps(content, protocol))
        for whole in (path.read_bytes(), path.read_bytes()[:-20]):
            path.write_bytes(whole)
            if 'tflib' in module:
                refused(path, 'TensorFlow pickle, which is not supported', 'genforce .pth', 'rosinality .model')
            else: refused(path, 'StyleGAN2-ADA pickle', 'load_stylegan2')
    assert not marker.exists()


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
def test_a_cut_file_or_a_forbidden_name_is_refused(tmp_path, zipped):
    marker = tmp_path/'marker'
    class Asks:
        def __reduce__(self): return open, (str(marker), 'w')
    path = save(dict(generator_smooth=genforce(WIDTHS[:3])), tmp_path/'g.pth', _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for n in (0, 1, 100, len(whole)//2, len(whole) - 10):
        path.write_bytes(whole[:n]); refused(path, 'cannot be read')
    content = dict(generator_smooth=genforce(WIDTHS[:3]), options=Asks())
    refused(save(content, path, _use_new_zipfile_serialization=zipped), 'asks for', 'open')
    assert not marker.exists()
    refused(tmp_path/'nowhere.pth', 'does not exist')
    refused(tmp_path, 'not a regular file')


def fault(s, key, value):
    s = dict(s)
    if value is None: del s[key]
    else: s[key] = value
    return s


WRONG = {
    'gap': ('genforce', 'synthesis.layer3.style.bias', None, 'is missing'),
    'gap in a size': ('genforce', 'synthesis.layer3.bias', None, 'is missing'),
    'gap in the mapping': ('genforce', 'mapping.dense1.weight', None, 'is missing'),
    'last layer': ('genforce', 'synthesis.layer5.weight', None, 'is missing'),
    'average': ('genforce', 'truncation.w_avg', None, 'is missing'),
    'blur': ('genforce', 'synthesis.layer2.blur.kernel', None, 'is missing'),
    'extra': ('genforce', 'synthesis.layer6.bias', torch.zeros(4), 'is unexpected'),
    'label': ('genforce', 'mapping.label_weight', torch.zeros(4), 'is unexpected'),
    'far output': ('genforce', 'synthesis.output12.bias', torch.zeros(3), 'is unexpected'),
    'shape': ('genforce', 'synthesis.layer4.weight', torch.zeros(8, 10, 1, 1),
              'is [8, 10, 1, 1], expected [8, 10, 3, 3]'),
    'noise': ('genforce', 'synthesis.layer4.apply_noise.noise', torch.zeros(1, 1, 8, 8), 'expected [1, 1, 16, 16]'),
    'number': ('genforce', 'synthesis.layer3.bias', 3, 'is int'),
    'matrix': ('genforce', 'synthesis.layer3.bias', torch.zeros(10, 2), 'is [10, 2]'),
    'nothing': ('genforce', 'synthesis.layer3.bias', torch.zeros(0), 'is [0]'),
    'text': ('genforce', 'synthesis.layer4.weight', 'text', "is str"),
    'huge': ('genforce', 'synthesis.layer3.bias', torch.zeros(1).expand(10**8), 'is [100000000]'),
    'long': ('genforce', 'synthesis.layer3.bias', torch.zeros(1).expand(60000), 'mis-shaped'),
    'nan': ('genforce', 'synthesis.layer4.weight', torch.full((8, 10, 3, 3), float('nan')), 'finite numbers'),
    'claimed': ('genforce', 'synthesis.layer4.weight', torch.zeros(1).expand(8, 10, 3, 3), 'finite numbers'),
    'complex': ('genforce', 'synthesis.layer4.weight', torch.zeros(8, 10, 3, 3)*1j, 'finite numbers'),
    'sparse': ('genforce', 'truncation.w_avg', torch.ones(9).to_sparse(),
               'asks for torch._utils._rebuild_sparse_tensor'),
    'rosinality gap': ('rosinality', 'generator.progression.1.noise2.weight_orig', None, 'is missing'),
    'rosinality flip': ('rosinality', 'generator.progression.2.conv1.2.weight_flip', None, 'is missing'),
    'rosinality extra': ('rosinality', 'generator.progression.3.conv1.0.bias', torch.zeros(3), 'is unexpected'),
    'rosinality shape': ('rosinality', 'generator.progression.1.noise1.weight_orig', torch.zeros(10),
                         'is [10], expected [1, 10, 1, 1]'),
    'rosinality mapping': ('rosinality', 'style.3.linear.weight_orig', None, 'is missing'),
    'rosinality nan': ('rosinality', 'style.3.linear.bias', torch.full((14,), float('inf')), 'finite numbers'),
}


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize('case', WRONG)
def test_what_does_not_fit_is_named(tmp_path, case):
    kind, key, value, words = WRONG[case]
    s = fault(dict(genforce=genforce, rosinality=rosinality)[kind](WIDTHS[:3]), key, value)
    path = save({'generator_smooth' if kind == 'genforce' else 'g_running': s}, tmp_path/'g.pth')
    refused(path, {'long': 'synthesis.', 'sparse': ''}.get(case, repr(key)), words)


@pytest.mark.parametrize('content', [
    [], {}, dict(generator=genforce(WIDTHS[:1])), dict(generator_smooth={}), dict(generator_smooth=3), torch.zeros(3),
    {'conv.weight': torch.zeros(3)}, {1: torch.zeros(1)}, 'text'], ids=range(9))
def test_a_file_of_something_else_is_refused(tmp_path, content):
    refused(save(content, tmp_path/'g.pth'), 'holds no StyleGAN generator')


def test_a_size_that_the_file_lacks_is_refused(tmp_path):
    path = save(genforce(WIDTHS[:3]), tmp_path/'g.pth')
    for size in (32, 12, 0): refused(path, f'size {size}', 'choose from 4, 8, 16', size=size)


