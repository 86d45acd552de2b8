"ReDO (Chen, Artières and Denoyer 2019, as released) against an oracle: all of it again, as functions of state dicts."
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from synthdet.masks import redo
from synthdet.data.butterflies import class_image
from synthdet.masks.redo import masks_for, object_channel, redo_losses, redo_step, RedoConfig, redraw, train_redo
from synthdet.masks.redonet import build_redo, NETS, SelfAttention, SNConv2d

torch.set_num_threads(1)
TEMPERATURE, NZ = 1.3, 5


# The oracle: layers

class State(dict):
    "The tensors of a network by name. In training mode every use of a spectral norm moves its u and v."
    def __init__(self, net):
        super().__init__({k: v.detach().clone() for k, v in net.state_dict().items()})
        self.training, self.learned, self.steps = net.training, [k for k, _ in net.named_parameters()], 0
        self.squares = {k: torch.zeros_like(self[k]) for k in self.learned}
        for k in self.learned: self[k].requires_grad_()


def unit(x): return x/x.norm()
def halved(x): return F.avg_pool2d(x, 2)
def doubled(x): return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def standard(x):
    "Each map with mean 0 and variance 1."
    var, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
    return (x - mean)/(var + 1e-5).sqrt()


def plain(s, name, x, **how): return F.conv2d(x, s[f"{name}.weight"], s.get(f"{name}.bias"), **how)
def normed(s, name, x):
    scale, shift = (s[f"{name}.{k}"][:, None, None] for k in ("weight", "bias"))
    return (standard(x)*scale + shift).relu()


def dense(s, name, x): return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def spectral(s, name, x):
    "A convolution that keeps the side, with weight W/(u^T W v)."
    w, u, v = (s[f"{name}.weight_{k}"] for k in ("orig", "u", "v"))
    rows = w.flatten(1)
    if s.training:
        with torch.no_grad():
            s[f"{name}.weight_v"] = v = unit(rows.T @ u)
            s[f"{name}.weight_u"] = u = unit(rows @ v)
    return F.conv2d(x, w/(u @ rows @ v), s.get(f"{name}.bias"), padding=w.shape[-1]//2)


def attention(s, name, x):
    "Every place of x adds a mean of the pooled h, weighted by a softmax over the pooled places."
    f = spectral(s, f"{name}.f", x).flatten(2)
    g, h = (F.max_pool2d(spectral(s, f"{name}.{k}", x), 2).flatten(2) for k in "gh")
    scores = torch.einsum("bck,bcq->bqk", g, f)
    mean = torch.einsum("bqk,bck->bcq", scores.softmax(-1), h)
    return spectral(s, f"{name}.o", mean.reshape(len(x), -1, *x.shape[2:]))*s[f"{name}.gamma"] + x


# The oracle: networks

def features(s, x):
    x = normed(s, "cnn.0.mods.2", plain(s, "cnn.0.mods.1", F.pad(x, [3]*4, mode="reflect")))
    for k in (4, 7): x = normed(s, f"cnn.0.mods.{k + 1}", plain(s, f"cnn.0.mods.{k}", x, stride=2, padding=1))
    for k in (1, 2, 3):
        y = normed(s, f"cnn.{k}.blocs.1", plain(s, f"cnn.{k}.blocs.0", x, padding=1))
        x = normed(s, f"cnn.{k}.activationF.0", x + plain(s, f"cnn.{k}.blocs.3", y, padding=1))
    return x


def pyramid(s, x):
    "The features and their means over whole, half, third and sixth of the side."
    side = x.shape[-1]
    pooled = [plain(s, f"psp.{i}.1", F.avg_pool2d(x, side//parts)) for i, parts in enumerate((1, 2, 3, 6))]
    wide = lambda p: F.interpolate(p, size=(side, side), mode="bilinear", align_corners=False)
    return torch.cat([x, *map(wide, pooled)], 1)


def mask_encoder(s, x):
    x = pyramid(s, features(s, x))
    for k in (1, 5): x = normed(s, f"out.mods.{k + 1}", plain(s, f"out.mods.{k}", doubled(x), padding=1))
    logits = plain(s, "out.mods.9", F.pad(x, [3]*4, mode="reflect"))/TEMPERATURE
    if logits.shape[1] > 1: return logits.exp()/logits.exp().sum(1, keepdim=True)
    return torch.cat([1/(1 + (-logits).exp()), 1/(1 + logits.exp())], 1)


def region_generator(s, net, mask, z):
    "One region: noise makes the first 4 x 4 maps and sets every norm; the mask enters before every doubling and last."
    def modulated(x, name):
        return (standard(x)*plain(s, f"{net}.gamma{name}", z) + plain(s, f"{net}.beta{name}", z)).relu()
    side, j = mask.shape[-1], 0
    x = dense(s, f"{net}.dense", z.flatten(1)).reshape(len(z), -1, 4, 4)
    while x.shape[-1] < side:
        if x.shape[-1] == side//2: x = attention(s, f"{net}.selfAtt", x)
        y = torch.cat([modulated(x, f"A.{j}"), F.avg_pool2d(mask, side//x.shape[-1])], 1)
        y = spectral(s, f"{net}.convA.{j}.1", doubled(y))
        x = spectral(s, f"{net}.convB.{j}", modulated(y, f"B.{j}")) + spectral(s, f"{net}.sc.{j}.1", doubled(x))
        j += 1
    return spectral(s, f"{net}.convOut", torch.cat([modulated(x, "Out"), mask], 1)).tanh()*mask


def region_generators(s, masks, z):
    drawn = [region_generator(s, f"net.{k}", masks[:, k, None], z[:, k]) for k in range(masks.shape[1])]
    return torch.stack(drawn, 1)


def first_block(s, bloc, shortcut, x):
    y = spectral(s, f"{bloc}.2", spectral(s, f"{bloc}.0", x).relu())
    return halved(y) + spectral(s, f"{shortcut}.1", halved(x))


def tower(s, net, k, x):
    "Blocks from the k-th on down to 4 x 4, one that keeps the side, then a dense layer of the sums."
    def bloc(x): return spectral(s, f"{net}blocs.{k}.3", spectral(s, f"{net}blocs.{k}.1", x.relu()).relu())
    while x.shape[-1] > 4:
        x = halved(bloc(x)) + spectral(s, f"{net}sc.{k}.1", halved(x))
        k += 1
    return dense(s, f"{net}dense", (x + bloc(x)).sum((2, 3)))


def discriminator(s, x): return tower(s, "", 0, attention(s, "selfAtt", first_block(s, "bloc0", "sc0", x)))


def z_encoder(s, x):
    x = first_block(s, "net.blocs.0", "net.sc.0", x)
    return tower(s, "net.", 1, x).reshape(len(x), -1, NZ, 1, 1)


# The oracle: training

def draw(s, x, z):
    "(regions, pictures with one region redrawn each)."
    masks = mask_encoder(s.mask_encoder, x)
    regions = region_generators(s.region_generators, masks, z)
    return regions, torch.cat([regions[:, k] + (1 - masks[:, k, None])*x for k in range(masks.shape[1])])


def generating(s, x, z):
    regions, fakes = draw(s, x, z)
    adversarial = -discriminator(s.discriminator, fakes).mean()
    reconstruction = (z - z_encoder(s.z_encoder, sum(regions.unbind(1)))).square().mean()
    return dict(generator_adversarial=adversarial, z_reconstruction=reconstruction,
                generator_total=adversarial + 5*reconstruction)


def judging(s, x, z, real):
    with torch.no_grad(): fakes = draw(s, x, z)[1]
    judge = lambda pictures: discriminator(s.discriminator, pictures)
    return dict(discriminator=(1 - judge(real)).clamp(min=0).mean() + (1 + judge(fakes)).clamp(min=0).mean())


def adam(s, grads, lr, eps, decay=0.):
    "Adam with betas 0 and 0.9; weight decay joins the gradient."
    s.steps += 1
    for name, g in zip(s.learned, grads, strict=True):
        g = g + decay*s[name].detach()
        s.squares[name] = .9*s.squares[name] + .1*g**2
        size = (s.squares[name]/(1 - .9**s.steps)).sqrt()
        s[name] = (s[name].detach() - lr*g/(size + eps)).requires_grad_()


def descend(loss, states, config, eps):
    "One step of Adam for each of the states."
    grads = torch.autograd.grad(loss, [s[k] for s in states for k in s.learned])
    for s in states:
        mine, grads = grads[:len(s.learned)], grads[len(s.learned):]
        encoder = "psp.0.1.weight" in s
        adam(s, mine, config.lr_mask if encoder else config.lr, eps, config.weight_decay if encoder else 0.)


def step(s, x, z, real, config, eps):
    "The generators' side first; the discriminator then sees what the new generators draw."
    losses = generating(s, x, z)
    descend(losses["generator_total"], [s.mask_encoder, s.region_generators, s.z_encoder], config, eps)
    losses |= judging(s, x, z, real)
    descend(losses["discriminator"], [s.discriminator], config, eps)
    return losses


# What is compared

CASES = [(32, 8, 2), (32, 4, 3), (128, 4, 2)] # side, nf, masks


@pytest.fixture(autouse=True)
def double(monkeypatch):
    "Networks stay in double precision where they return to single, so that what differs is not rounding."
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def networks(size, nf, masks):
    "Networks in training mode in which no part is idle, and u and v are on their way to where they belong."
    torch.manual_seed(1)
    options = dict(sizex=size, nMasks=masks, nf=nf, nz=NZ, temperature=TEMPERATURE)
    nets = build_redo(dict(options, useSelfAttG=True, useSelfAttD=True))
    for m in (m for k in NETS for m in getattr(nets, k).train().modules()):
        if isinstance(m, torch.nn.InstanceNorm2d): m.weight.data.uniform_(.5, 1.5); m.bias.data.normal_()
        if isinstance(m, SelfAttention): m.gamma.data.fill_(.7)
        if isinstance(m, SNConv2d):
            w = m.weight_orig # an orthogonal one is there after one pass
            w.data *= torch.empty_like(w).uniform_(.2, 1.8)
            m(torch.zeros(1, m.weight_orig.shape[1], 1, 1))
    for k in NETS: getattr(nets, k).double()
    return nets


def batch(size, masks, seed=0):
    "Pictures, noise, real pictures."
    how = dict(generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    picture = lambda n: torch.rand(n, 3, size, size, **how)*2 - 1
    return picture(2), torch.randn(2, masks, NZ, 1, 1, **how), picture(1)


@pytest.fixture(scope="module", params=CASES, ids=lambda c: "{}px-nf{}-{}masks".format(*c))
def case(request): return request.param, networks(*request.param)


def agrees(theirs, ours): torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def compare(net, oracle, *inputs):
    "Outputs agree with norms at rest and moving, and so do the norms afterwards."
    for training in (False, True):
        s = State(net.train(training))
        agrees(net(*inputs), oracle(s, *inputs))
        agrees(dict(net.state_dict()), {k: v.detach() for k, v in s.items()})


def test_masks_are_those_of_the_oracle(case):
    (size, _, masks), nets = case
    compare(nets.mask_encoder, mask_encoder, batch(size, masks)[0])


def test_regions_are_those_of_the_oracle(case):
    (size, _, masks), nets = case
    noise = torch.randn(2, masks, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    compare(nets.region_generators, region_generators, noise.softmax(1), batch(size, masks)[1])


def test_the_discriminator_is_that_of_the_oracle(case):
    (size, _, masks), nets = case
    compare(nets.discriminator, discriminator, batch(size, masks)[0])


def test_the_noise_read_back_is_that_of_the_oracle(case):
    (size, _, masks), nets = case
    compare(nets.z_encoder, z_encoder, batch(size, masks)[0])


@pytest.mark.parametrize("size, nf, masks", CASES[:2])
def test_losses_are_those_of_the_oracle(size, nf, masks):
    nets, (x, z, real) = networks(size, nf, masks), batch(size, masks, seed=3)
    s = SimpleNamespace(**{k: State(getattr(nets, k)) for k in NETS})
    agrees(redo_losses(nets, x, z, real), {**generating(s, x, z), **judging(s, x, z, real)})


def test_the_hinge_ignores_what_is_well_judged():
    nets, (x, z, real) = networks(*CASES[0]), batch(32, 2)
    nets.discriminator.dense.weight.data.zero_()
    for bias, loss in ((-3., 4.), (0., 2.), (3., 4.)): # real costs 1 - bias, drawn 1 + bias, neither below 0
        nets.discriminator.dense.bias.data.fill_(bias)
        assert redo_losses(nets, x, z, real)["discriminator"].item() == loss


def test_redrawing_keeps_what_lies_outside_the_region():
    x, m = torch.full((1, 3, 2, 2), 5.), torch.tensor([1., 0.]).expand(2, 2)
    masks = torch.stack([m, 1 - m])[None]
    drawn = redraw(x, masks, masks[:, :, None].expand(1, 2, 3, 2, 2)*7)
    assert drawn[:, 0, 0].tolist() == [[7, 5], [5, 7]]


@pytest.mark.parametrize("size, nf, masks", CASES[:2])
def test_two_steps_are_those_of_the_oracle(size, nf, masks):
    nets, c = networks(size, nf, masks), RedoConfig(lr=.01, lr_mask=.02, weight_decay=.5)
    s, optimizers, eps = SimpleNamespace(**{k: State(getattr(nets, k)) for k in NETS}), redo._optimizers(nets, c), .1
    for group in (g for o in optimizers for g in o.param_groups): group["eps"] = eps # smooth where a gradient is zero
    for seed in (4, 5):
        x, z, real = batch(size, masks, seed)
        agrees(redo_step(nets, optimizers, x, z, real), {k: v.detach() for k, v in step(s, x, z, real, c, eps).items()})
    for k in NETS: agrees(dict(getattr(nets, k).state_dict()), {n: v.detach() for n, v in getattr(s, k).items()})


def test_the_discriminators_loss_teaches_nobody_else():
    nets = networks(*CASES[0])
    redo_losses(nets, *batch(32, 2))["discriminator"].backward()
    taught = {k for k in NETS for p in getattr(nets, k).parameters() if p.grad is not None}
    assert taught == {"discriminator"}


def test_the_schedule_is_the_released_one():
    c = RedoConfig()
    assert (c.size, c.masks, c.nf, c.nz, c.batch) == (128, 2, 64, 32, 20)
    assert (c.lr, c.lr_mask, c.weight_decay, c.z_weight) == (1e-4, 1e-5, 1e-4, 5)


def test_only_the_mask_encoder_has_weight_decay():
    nets = networks(*CASES[0])
    groups = [g for o in redo._optimizers(nets, RedoConfig()) for g in o.param_groups]
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(p) for p in nets.mask_encoder.parameters()}
    assert all(g["betas"] == (0, .9) and g["eps"] == 1e-8 for g in groups)
    assert sum(len(g["params"]) for g in groups) == sum(len(list(getattr(nets, k).parameters())) for k in NETS)


@pytest.mark.parametrize("name", NETS)
def test_fresh_weights_are_orthogonal_with_gain_four_fifths(name):
    net = getattr(build_redo(dict(sizex=32, nf=8, nz=NZ, useSelfAttG=True, useSelfAttD=True), only=[name]), name)
    for key, w in net.named_parameters():
        if w.dim() > 1: agrees(values := torch.linalg.svdvals(w.detach().flatten(1)), torch.full_like(values, .8))
        elif key.endswith("gamma"): assert w.item() == 0


# What a run hands to the steps and keeps of them

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "Batches and mask encoders of three steps over twelve pictures, and the weights kept."
    flock, taken, encoders = [class_image(i, size=48)[0] for i in range(12)], [], []

    def spy(nets, optimizers, images, z, real, *more):
        if not encoders: encoders.append(State(nets.mask_encoder))
        losses = redo_step(nets, optimizers, images, z, real, *more)
        taken.append((images, real, z, more)); encoders.append(State(nets.mask_encoder))
        return losses

    c = RedoConfig.small(nf=4, nz=NZ, steps=3, batch=4, check_every=3, average=.2, lr_mask=.1, collapse=0., z_weight=3.,
                         amp="none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redo, "redo_step", spy)
        kept = load_file(train_redo(flock, c, tmp_path_factory.mktemp("redo"))["path"])
    return SimpleNamespace(taken=taken, encoders=encoders, kept=kept)


def test_redrawn_and_real_batches_are_two_orders_of_the_same_pictures(run):
    name = lambda pictures: [p.double().sum().item() for p in pictures]
    redrawn, real = ([name(t[k]) for t in run.taken] for k in (0, 1))
    assert all(set(a) != set(b) for a, b in zip(redrawn, real))
    assert len(set(sum(redrawn, []))) == 12 and set(sum(redrawn, [])) == set(sum(real, []))


def test_noise_is_normal_and_new_at_every_step(run):
    z = torch.cat([t[2] for t in run.taken])
    assert len(z.unique()) == z.numel() and abs(z.mean()) < .3 and abs(z.std() - 1) < .2
    assert all(t[3] == (3.,) for t in run.taken), "the weight of its reconstruction is the configuration's"


def test_the_running_average_keeps_a_share_that_grows_to_its_decay(run):
    mean = dict(run.encoders[0])
    for k, now in enumerate(run.encoders[1:]):
        share = min(.2, (k + 1)/(k + 11)) # 1/11, 2/12, then .2
        mean = {n: share*mean[n] + (1 - share)*now[n] for n in mean}
    agrees(run.kept, {n: v.detach() for n, v in mean.items()})


@pytest.mark.parametrize("flipped", [False, True])
def test_a_large_object_off_the_border_is_still_the_object(flipped):
    m = torch.zeros(2, 2, 16, 16)
    m[:, 0, 1:-1, 1:-1] = .9
    m[:, 1] = 1 - m[:, 0]
    assert m[:, 0].mean() > m[:, 1].mean() and object_channel(m.flip(1) if flipped else m) == int(flipped)


def test_every_side_of_the_border_counts():
    inner = slice(1, -1)
    sides = (inner, 0), (inner, -1), (0, inner), (-1, inner)
    for rows, columns in sides:
        m = torch.zeros(1, 3, 16, 16)
        m[0, :2, rows, columns] = 1
        m[0, 2, 4:12, 4:12] = 1
        assert object_channel(m) == 2


@pytest.mark.parametrize("training", [True, False])
def test_looking_at_masks_leaves_the_mode(training):
    encoder = build_redo(dict(sizex=32, nf=4), only=["mask_encoder"]).mask_encoder.double().train(training)
    masks_for(encoder, torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert encoder.training == training


def test_a_collapse_up_to_step_7000_begins_again():
    verdict = lambda step: redo._verdict([dict(step=step, smaller=.01)], RedoConfig(), restarts=0)
    assert (verdict(7000), verdict(7001)) == ("again", "collapsed")
