"ReDO: the layout of the released files, reading them safely, resuming, collapse."
import argparse
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from synthdet.masks import redo
from synthdet.data.butterflies import class_image
from synthdet.core import refused, UserError
from synthdet.machine import shared
from synthdet.masks.redo import redo_losses, RedoConfig, train_redo
from synthdet.masks.redonet import build_redo, load_redo, NETS
from synthdet.weights import read_note, save_weights

torch.set_num_threads(1)
tiny = RedoConfig.small(nf=4, nz=4, steps=8, batch=4, check_every=2, average=.9, amp="none") # looks after 2, 4, 6, 8


@pytest.fixture(scope="module")
def flock(): return [class_image(i, size=48)[0] for i in range(24)]


@pytest.fixture(scope="module")
def nets():
    torch.manual_seed(0)
    made = build_redo(dict(sizex=32, nf=8, useSelfAttG=True, useSelfAttD=True))
    for n in NETS: getattr(made, n).eval()
    return made


def released(nets, **more):
    "The dictionary of a released file."
    known = {k: v for k, v in nets.options.items() if k != "object_channel"}
    options = argparse.Namespace(**known, device="cuda:0", dataset="lfw", **more)
    return {**{theirs: getattr(nets, ours).state_dict() for ours, theirs in NETS.items()}, "options": options}


def outputs(nets):
    g = torch.Generator().manual_seed(1)
    x, z = torch.rand(2, 3, 32, 32, generator=g)*2 - 1, torch.randn(2, 2, 32, 1, 1, generator=g)
    with torch.no_grad():
        m = nets.mask_encoder(x)
        losses = redo_losses(nets, x, z, x.flip(0))
        return [m, nets.region_generators(m, z), nets.discriminator(x), nets.z_encoder(x), *losses.values()]


def same(a, b, atol=1e-6): # relative to the largest value: networks that were never trained give large ones
    return all((x - y).abs().max() <= atol*max(1, x.abs().max()) for x, y in zip(outputs(a), outputs(b), strict=True))


@pytest.mark.parametrize("name, options", [("redo_lfw_default", {}), ("redo_nfX32", dict(nfX=32))])
def test_layout_is_that_of_the_released_files(name, options):
    if shared() is None: pytest.skip("no reference layout beside the project")
    keys = json.loads((shared()/"spec"/"keys"/f"{name}.json").read_text())
    with torch.device("meta"): made = build_redo(dict(options, useSelfAttG=True, useSelfAttD=True))
    for ours, theirs in NETS.items():
        assert {k: list(v.shape) for k, v in getattr(made, ours).state_dict().items()} == keys[theirs]


def test_the_released_size_runs_end_to_end():
    made = build_redo(dict(nf=8, useSelfAttG=True, useSelfAttD=True))
    losses = redo_losses(made, torch.rand(2, 3, 128, 128), torch.randn(2, 2, 32, 1, 1), torch.rand(2, 3, 128, 128))
    assert list(losses) == ["generator_adversarial", "z_reconstruction", "generator_total", "discriminator"]
    assert all(v.isfinite() and v.dim() == 0 for v in losses.values())


@pytest.mark.parametrize("zipped", [True, False])
def test_a_released_file_gives_its_networks_back(nets, tmp_path, zipped):
    torch.save(released(nets), tmp_path/"nets.pth", _use_new_zipfile_serialization=zipped)
    back = load_redo(tmp_path/"nets.pth")
    assert same(nets, back) and not back.mask_encoder.training
    assert back.options["dataset"] == "lfw" and back.options["object_channel"] == 0


@pytest.mark.parametrize("only", list(NETS.values()))
def test_any_subset_is_read(nets, tmp_path, only):
    whole = released(nets)
    torch.save({k: whole[k] for k in (only, "options")}, tmp_path/"one.pth")
    back = load_redo(tmp_path/"one.pth")
    assert [NETS[k] for k in NETS if getattr(back, k) is not None] == [only]


def test_options_that_are_missing_are_read_off_the_weights(nets, tmp_path):
    torch.save({**released(nets), "options": argparse.Namespace(sizex=32)}, tmp_path/"old.pth")
    assert same(nets, load_redo(tmp_path/"old.pth"))


def test_spectral_norm_of_every_age_is_read(nets, tmp_path):
    file = released(nets)
    for net in list(NETS.values())[1:]:
        state = dict(file[net])
        for k in [k for k in state if k.endswith("weight_v")]:
            stem = k.removesuffix("_v")
            w = state[f"{stem}_orig"]
            state[stem] = w/(state[f"{stem}_u"] @ (w.flatten(1) @ state.pop(k))) # as torch 0.4 stored it
        file[net] = state
    torch.save(file, tmp_path/"oldest.pth")
    assert same(nets, load_redo(tmp_path/"oldest.pth"), atol=1e-4)


def test_gpu_storages_are_read_without_a_gpu(nets, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    for zipped in (True, False):
        torch.save(released(nets), tmp_path/f"{zipped}.pth", _use_new_zipfile_serialization=zipped)
    monkeypatch.undo()
    assert same(nets, load_redo(tmp_path/"True.pth")) and same(nets, load_redo(tmp_path/"False.pth"))


class Evil:
    def __init__(self, marker): self.marker = marker
    def __reduce__(self): return (open, (str(self.marker), "w"))


def test_a_file_that_wants_to_run_code_is_refused_by_name(nets, tmp_path):
    for zipped in (True, False):
        file = {**released(nets), "more": Evil(tmp_path/"ran")}
        torch.save(file, tmp_path/"evil.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=r"open"): load_redo(tmp_path/"evil.pth")
        assert not (tmp_path/"ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0, .01, .5, .99])
def test_a_truncated_file_is_one_line(nets, tmp_path, share, zipped):
    torch.save(released(nets), tmp_path/"whole.pth", _use_new_zipfile_serialization=zipped)
    data = (tmp_path/"whole.pth").read_bytes()
    (tmp_path/"cut.pth").write_bytes(data[:int(len(data)*share)])
    told = refused(load_redo, tmp_path/"cut.pth")
    assert "cut.pth" in told and "\n" not in told


def test_another_architecture_is_named_by_its_first_key(nets, tmp_path):
    file = released(nets)
    gone = {k: v for k, v in file["netGenX"].items() if k != "net.1.dense.bias"}
    torch.save({**file, "netGenX": gone}, tmp_path/"gap.pth")
    told = refused(load_redo, tmp_path/"gap.pth")
    assert "netGenX" in told and "'net.1.dense.bias' is missing" in told
    torch.save({**file, "netEncM": {**file["netEncM"], "cnn.9.extra": torch.zeros(1)}}, tmp_path/"more.pth")
    assert "'cnn.9.extra' is unexpected" in refused(load_redo, tmp_path/"more.pth")
    torch.save(file["netEncM"], tmp_path/"bare.pth")
    assert "holds none of netEncM" in refused(load_redo, tmp_path/"bare.pth")


def cut_at(monkeypatch, n):
    "A power cut at the n-th step from now; the list grows with every step that is begun."
    step, done = redo._Run.step, []

    def cut(self, images):
        done.append(1)
        if len(done) == n: raise KeyboardInterrupt
        return step(self, images)

    monkeypatch.setattr(redo._Run, "step", cut)
    return done


def test_a_run_cut_off_goes_on_to_the_same_bytes(flock, tmp_path, monkeypatch):
    whole, done = train_redo(flock, tiny, tmp_path/"whole"), cut_at(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt): train_redo(flock, tiny, tmp_path/"cut")
    again = train_redo(flock, tiny, tmp_path/"cut")
    untimed = lambda rows: [{k: v for k, v in r.items() if k != "seconds"} for r in rows]
    assert untimed(again["history"]) == untimed(whole["history"]) and len(done) == 6 + 4
    assert again["path"].read_bytes() == whole["path"].read_bytes()


def test_more_steps_go_on_where_the_run_ended(flock, tmp_path):
    train_redo(flock, replace(tiny, steps=4), tmp_path/"grown")
    grown, whole = train_redo(flock, tiny, tmp_path/"grown"), train_redo(flock, tiny, tmp_path/"whole")
    a, b = load_file(grown["path"]), load_file(whole["path"])
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_a_run_can_be_ended_at_a_look(flock, tmp_path, monkeypatch):
    done = cut_at(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt): train_redo(flock, tiny, tmp_path/"run")
    result = train_redo(flock, replace(tiny, steps=4), tmp_path/"run")
    assert (result["ended"], result["step"], len(done)) == ("steps", 4, 6)


def test_a_collapsed_run_begins_again_and_says_so(flock, tmp_path, monkeypatch):
    look, looks = redo._look, []

    def gone_at_first(*args):
        row, solid = look(*args)
        looks.append(row)
        return {**row, "smaller": .01 if len(looks) <= 3 else .3}, solid # collapsed at the first look, three times

    monkeypatch.setattr(redo, "_look", gone_at_first)
    result = train_redo(flock, tiny, tmp_path/"run")
    assert result["restarts"] == 3 and result["step"] == 8
    assert [r["restart"] for r in result["history"]] == [0, 1, 2, 3, 3, 3, 3]
    first = [r["generator_total"] for r in result["history"][:4]]
    assert len(set(first)) == 4, "every restart has other weights"


def test_six_collapses_are_an_error(flock, tmp_path, monkeypatch):
    look = redo._look
    monkeypatch.setattr(redo, "_look", lambda *a: ({**look(*a)[0], "smaller": 0.}, None))
    assert "ReDO collapsed 6 times" in refused(train_redo, flock, tiny, tmp_path/"run")
    assert not (tmp_path/"run"/"mask_encoder.safetensors").exists()


def test_a_late_collapse_keeps_the_weights_before_it(flock, tmp_path, monkeypatch):
    look, looks = redo._look, []

    def late(*args):
        row, solid = look(*args)
        looks.append(1)
        return {**row, "smaller": .3 if len(looks) < 3 else 0.}, solid

    monkeypatch.setattr(redo, "_look", late)
    result = train_redo(flock, replace(tiny, collapse_until=3), tmp_path/"run")
    assert result["ended"] == "collapsed" and result["step"] == 6 and read_note(result["path"])["step"] == 4


def test_steady_masks_end_the_run(flock, tmp_path):
    result = train_redo(flock, replace(tiny, steady=.01, patience=2), tmp_path/"run")
    assert result["ended"] == "steady" and result["step"] < 8


def test_bad_pictures_are_named(flock, tmp_path):
    grey, tiny_one = torch.zeros(1, 32, 32, dtype=torch.uint8), torch.zeros(3, 2, 32, dtype=torch.uint8)
    for bad in (grey, tiny_one, torch.full((3, 32, 32), float("nan"))):
        assert "image 24 is" in refused(train_redo, [*flock, bad], tiny, tmp_path/"run")
    assert "batch of images at least: 3 given" in refused(train_redo, flock[:3], tiny, tmp_path/"run")
    assert not (tmp_path/"run").exists()


def test_a_damaged_state_and_another_run_are_refused(flock, tmp_path):
    train_redo(flock, replace(tiny, steps=2), tmp_path/"run")
    assert "nf is 4 there and 8 here" in refused(train_redo, flock, replace(tiny, nf=8), tmp_path/"run")
    assert "it saw other pictures" in refused(train_redo, flock[:20], tiny, tmp_path/"run")
    (tmp_path/"run"/"state.pt").write_bytes(b"torn")
    assert "state.pt: cannot read the state" in refused(train_redo, flock, tiny, tmp_path/"run")


def test_attention_many_masks_and_64_pixels_train(flock, tmp_path):
    c = RedoConfig(size=64, masks=3, nf=4, nz=4, attention=True, steps=2, batch=4, check_every=1, collapse=0.)
    result = train_redo(flock, c, tmp_path/"run")
    m = load_redo(result["path"]).mask_encoder(torch.rand(1, 3, 64, 64))
    assert m.shape == (1, 3, 64, 64) and torch.allclose(m.sum(1), torch.ones(1, 64, 64), atol=1e-5)


@pytest.mark.parametrize("options, words", [
    ("lfw", "its options are a str"), (dict(sizex="big"), "the option sizex is 'big'"),
    (dict(sizex=float("nan")), "the option sizex is 'nan'"), (dict(sizex=10**400), "the option sizex is '1000"),
    (dict(sizex=32.5), "the option sizex is '32.5'"), (dict(sizex=True), "the option sizex is 'True'"),
    (dict(temperature=[1]), "the option temperature"), (dict(sizex=torch.ones(2)), "the option sizex"),
    (dict(useSelfAttG=1), "the option useSelfAttG is '1'; expected true or false"),
    (dict(sizex=32, object_channel=5), "object_channel is 5 and there are 2 masks"),
    (dict(sizex=32, object_channel=-1), "the option object_channel is '-1'"),
])
def test_options_are_not_believed(nets, tmp_path, options, words):
    torch.save({"netEncM": nets.mask_encoder.state_dict(), "options": options}, tmp_path/"odd.pth")
    told = refused(load_redo, tmp_path/"odd.pth")
    assert words in told and "\n" not in told


@pytest.mark.parametrize("key, value, words", [
    (7, torch.zeros(1), "the entry '7' is not a dense tensor"),
    ("psp.0.1.bias", "text", "'psp.0.1.bias' is not a dense tensor"),
    ("psp.0.1.bias", torch.zeros(1).to_sparse(), "asks for torch._utils._rebuild_sparse_tensor"),
    ("psp.0.1.bias", torch.full((1,), float("nan")), "'psp.0.1.bias' holds values that are not finite"),
    ("cnn.0.mods.7.weight", torch.zeros(1).expand(10**6, 4, 3, 3), "the option nfM is '1000000'"),
    ("cnn.0.mods.7.weight", torch.zeros(()), "'cnn.0.mods.7.weight' is [], expected [8, 4, 3, 3]"),
])
def test_entries_are_not_believed(nets, tmp_path, key, value, words):
    state = {**nets.mask_encoder.state_dict(), key: value}
    torch.save({"netEncM": state, "options": dict(sizex=32, nf=8)}, tmp_path/"odd.pth")
    assert words in refused(load_redo, tmp_path/"odd.pth")


def test_a_weight_of_another_rank_is_named(nets, tmp_path):
    state = {**nets.region_generators.state_dict(), "net.0.convOut.weight_orig": torch.zeros(3)}
    torch.save({"netGenX": state, "options": dict(sizex=32, nf=8)}, tmp_path/"odd.pth")
    assert "'net.0.convOut.weight_orig' is [3], expected [3, 9, 3, 3]" in refused(load_redo, tmp_path/"odd.pth")


def test_a_small_file_cannot_ask_for_much_memory(tmp_path):
    torch.save({"netGenX": {"net.0.convOut.weight_orig": torch.zeros(1).expand(3, 4001, 1, 1)}}, tmp_path/"bomb.pth")
    assert "is missing" in refused(load_redo, tmp_path/"bomb.pth")


@pytest.mark.parametrize("only", list(NETS))
def test_three_masks_and_size_are_read_off_the_weights(tmp_path, only):
    made = build_redo(dict(sizex=64, nMasks=3, nf=4))
    unsaid = dict(nMasks=3) if only == "z_encoder" else {}
    state = getattr(made, only).state_dict()
    torch.save({NETS[only]: state, "options": argparse.Namespace(**unsaid)}, tmp_path/"one.pth")
    back = load_redo(tmp_path/"one.pth")
    assert getattr(back, only) is not None
    assert only == "discriminator" or back.options["nMasks"] == 3
    assert only == "mask_encoder" or back.options["sizex"] == 64


def test_notes_of_the_first_version_were_texts(tmp_path):
    nets = build_redo(dict(sizex=32, nf=8))
    note = {k: str(v) for k, v in nets.options.items() if v is not None}
    back = load_redo(save_weights(nets.mask_encoder, tmp_path/"old.safetensors", **note))
    assert back.options["sizex"] == 32 and back.options["temperature"] == 1 and back.options["useSelfAttG"] is False
    for note in ({}, dict(nf=8)):
        path = save_weights(nets.mask_encoder, tmp_path/"bare.safetensors", **note)
        assert "does not say what mask encoder it holds" in refused(load_redo, path)


@pytest.mark.parametrize("change, words", [
    (dict(collapse=.5), "collapse=0.5 should be below 1/2"), (dict(masks=3, collapse=.4), "should be below 1/3"),
    (dict(nf=2), "nf=2 should be 4 to 4096"), (dict(z_weight=float("nan")), "z_weight=nan"), (dict(lr=0), "lr=0.0"),
    (dict(weight_decay=-1), "weight_decay=-1.0"), (dict(size=100), "size 100 is unknown; choose from 32, 64, 128"),
    (dict(steps=0), "steps=0"), (dict(amp="fp8"), "amp 'fp8' is unknown"), (dict(average=1), "average=1.0"),
])
def test_a_configuration_that_cannot_be_is_refused(change, words):
    assert words in refused(replace, tiny, **change)


def test_what_is_not_a_set_of_pictures_is_refused(flock, tmp_path):
    assert "images as generator; expected a list" in refused(train_redo, (x for x in flock), tiny, tmp_path/"run")
    for masks in (torch.ones(3, 8, 8), [torch.ones(8, 8)]*2):
        told = refused(train_redo, flock, tiny, tmp_path/"run", val=(flock[:2], masks))
        assert told.startswith("val holds 2 images and masks ")
    (tmp_path/"file").write_text("")
    assert "cannot write" in refused(train_redo, flock, tiny, tmp_path/"file"/"run")
    assert not (tmp_path/"run").exists()


def test_a_run_without_weights_says_so_or_writes_them(flock, tmp_path, monkeypatch):
    first = train_redo(flock, replace(tiny, steps=2), tmp_path/"run")
    before = first["path"].read_bytes()
    first["path"].unlink()
    assert train_redo(flock, replace(tiny, steps=2), tmp_path/"run")["path"].read_bytes() == before
    look = redo._look
    monkeypatch.setattr(redo, "_look", lambda *a: ({**look(*a)[0], "smaller": 0.}, None))
    for _ in range(2):
        told = refused(train_redo, flock, replace(tiny, collapse_until=0), tmp_path/"gone")
        assert "collapsed at step 2, before there were weights" in told


def test_losses_want_four_networks_and_noise_that_fits(nets):
    x, z = torch.zeros(2, 3, 32, 32), torch.zeros(2, 2, 32, 1, 1)
    for bad in (z[:, :1], z*float("nan")): assert "ReDO got noise" in refused(redo_losses, nets, x, bad, x)
    alone = build_redo(dict(sizex=32, nf=8), only=["mask_encoder"])
    assert "missing: region_generators, discriminator, z_encoder" in refused(redo_losses, alone, x, z, x)
    for bad in (x[:, :1], x.byte(), x*float("nan")): assert "ReDO got images" in refused(redo_losses, nets, bad, z, x)


def test_a_loss_that_is_not_finite_keeps_the_last_state(flock, tmp_path, monkeypatch):
    step = redo._Run.step
    def broken(self, images):
        losses = step(self, images)
        return {k: v*float("nan") if self.at["step"] > 2 else v for k, v in losses.items()}
    monkeypatch.setattr(redo._Run, "step", broken)
    assert "ReDO's loss is not finite at step 4" in refused(train_redo, flock, tiny, tmp_path/"run")
    monkeypatch.undo()
    assert train_redo(flock, tiny, tmp_path/"run")["step"] == 8
