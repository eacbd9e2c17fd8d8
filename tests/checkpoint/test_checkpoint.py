"""What load_checkpoint finds in sound files."""

import pickle
import random
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import fastfip
from fastfip.checkpoint import load_checkpoint, save_checkpoint
from fastfip.errors import CheckpointError
from tests.support.checkpoint_files import (
    Call,
    Name,
    make_net,
    same,
    small_state,
    tensor,
    write,
    write_legacy,
    write_zip,
)

NESTINGS = ["state_dict", "net", "netC", "model", "model_state_dict", "state_dict_ema"]


@pytest.mark.parametrize("how", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ""])
def test_the_format_is_told_by_the_content(tmp_path, how, suffix):
    loaded = fastfip.load_checkpoint(write(dict(small_state()), tmp_path / f"m{suffix}", how))
    assert loaded.format == how and loaded.nesting == () and loaded.prefix == "" and loaded.left_out == []
    assert set(loaded) == set(small_state()) and all(torch.equal(loaded[k], v) for k, v in small_state().items())


@pytest.mark.parametrize("how", ["zip", "legacy"])
def test_no_unpickler_ever_sees_the_file(tmp_path, monkeypatch, how):
    path = write({"net": small_state(), "epoch": 3}, tmp_path / "m.pth", how)

    def never(*args, **kwargs):
        raise AssertionError("an unpickler was called")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, never)
    assert same(load_checkpoint(path), small_state())


@pytest.mark.parametrize("how", ["zip", "legacy"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod."])
@pytest.mark.parametrize("nesting", ["", *NESTINGS])
def test_nestings_and_prefixes(tmp_path, nesting, prefix, how):
    net, other = make_net(), make_net()
    state = OrderedDict((prefix + k, v) for k, v in net.state_dict().items())
    path = write({nesting: state, "epoch": 3, "args": {"lr": 0.1}} if nesting else state, tmp_path / "m.pth", how)
    for loaded in (load_checkpoint(path), load_checkpoint(path, other)):
        assert same(loaded, net.state_dict())
        assert (loaded.nesting, loaded.prefix) == ((nesting,) if nesting else (), prefix)
    assert same(other.state_dict(), net.state_dict())


def test_a_prefix_that_not_all_names_carry_stays(tmp_path):
    state = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert list(load_checkpoint(write(state, tmp_path / "m.pth"))) == list(state)


def test_a_prefix_that_belongs_to_the_model_stays(tmp_path):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = make_net()

    net, other = Wrapper(), Wrapper()
    loaded = load_checkpoint(write(net.state_dict(), tmp_path / "m.pth"), other)
    assert same(other.state_dict(), net.state_dict()) and loaded.prefix == ""


def test_a_prefix_that_only_the_model_has(tmp_path):
    net, other = make_net(), nn.DataParallel(make_net())
    loaded = load_checkpoint(write({"net": net.state_dict()}, tmp_path / "m.pth"), other)
    assert same(other.module.state_dict(), net.state_dict()) and next(iter(loaded)) == "module.fc.weight"
    save_checkpoint(other, tmp_path / "out.pth", like=loaded)
    assert same(torch.load(tmp_path / "out.pth", weights_only=True)["net"], net.state_dict())


def test_of_several_the_one_that_fits_the_model(tmp_path):
    nets = {"netC": make_net(), "netG": nn.Linear(2, 2), "net": nn.Linear(9, 9)}
    path = write({k: v.state_dict() for k, v in nets.items()}, tmp_path / "m.pth")
    net = make_net()
    assert load_checkpoint(path, net).nesting == ("netC",) and same(net.state_dict(), nets["netC"].state_dict())
    assert load_checkpoint(path).nesting == ("net",)
    assert load_checkpoint(path, nn.Linear(2, 2), key="netG").nesting == ("netG",)


def test_deeper_nestings(tmp_path):
    state = small_state()
    path = write({"model": {"state_dict": state, "name": "x"}, "a.b": {"c": {"w": torch.ones(1)}}}, tmp_path / "m.pth")
    assert load_checkpoint(path).nesting == ("model", "state_dict")
    assert load_checkpoint(path, key="model.state_dict").nesting == ("model", "state_dict")


def test_state_dict_comes_before_its_average(tmp_path):
    value = {"state_dict_ema": {"w": torch.ones(1)}, "state_dict": {"w": torch.zeros(1)}}
    path = write(value, tmp_path / "m.pth")
    assert load_checkpoint(path)["w"] == 0 and load_checkpoint(path, key="state_dict_ema")["w"] == 1
    assert load_checkpoint(path).left_out == ["state_dict_ema"]


@pytest.mark.parametrize("writer", [write_zip, write_legacy])
def test_cuda_storages_are_read_to_the_cpu(tmp_path, writer):
    legacy = writer is write_legacy
    for kind in (Name("torch", "FloatStorage"), Name("torch.cuda", "FloatStorage")):
        writer(tmp_path / "m.pth", {"w": tensor((2, 2), (1, 2), location="cuda:3", kind=kind, legacy=legacy)})
        value = load_checkpoint(tmp_path / "m.pth")["w"]
        assert value.device.type == "cpu" and value.tolist() == [[1, 3], [2, 4]]


@pytest.mark.parametrize("how", ["zip", "legacy"])
def test_parameters_views_ties_and_dtypes(tmp_path, how):
    base = torch.arange(12.0)
    state = OrderedDict(
        parameter=nn.Parameter(torch.ones(2)),
        view=base[3:9].view(2, 3).t(),
        tied=base[3:9].view(2, 3).t(),
        half=torch.ones(2, dtype=torch.bfloat16),
        complex=torch.ones(2, dtype=torch.complex64),
        flag=torch.tensor(True),
        nothing=torch.empty(0, 3),
        number=torch.tensor(3),
    )
    if how == "zip":  # the old format has no such storages
        state["small"] = torch.ones(3).to(torch.float8_e4m3fn)
        state["wide"] = torch.ones(2).to(torch.uint16)
    loaded = load_checkpoint(write(state, tmp_path / "m.pth", how))
    assert same(loaded, {k: v.detach() for k, v in state.items()})
    assert all(type(v) is torch.Tensor and not v.requires_grad for v in loaded.values())


def test_extra_state_of_modules(tmp_path):
    class Extra(nn.Linear):
        seen = None

        def get_extra_state(self):
            return {"calls": 3}

        def set_extra_state(self, state):
            self.seen = state

    net = Extra(2, 2)
    load_checkpoint(write(Extra(2, 2).state_dict(), tmp_path / "m.pth"), net)
    assert net.seen == {"calls": 3}
    assert load_checkpoint(save_checkpoint(net, tmp_path / "n.pth"))["_extra_state"] == {"calls": 3}
    with pytest.raises(CheckpointError, match="only tensors"):
        save_checkpoint(net, tmp_path / "n.safetensors")


def test_files_without_batch_counters_fit(tmp_path):
    """Torch before 0.4.1 did not write num_batches_tracked."""
    net, other = make_net(), make_net()
    state = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    other.bn.num_batches_tracked.fill_(5)
    loaded = load_checkpoint(write(state, tmp_path / "m.pth"), other)
    assert torch.equal(other.fc.weight, net.fc.weight) and other.bn.num_batches_tracked == 5
    save_checkpoint(other, tmp_path / "out.pth", like=loaded)
    assert list(load_checkpoint(tmp_path / "out.pth")) == list(state)


def test_model_keeps_its_dtype_and_identity(tmp_path):
    net = make_net().double()
    weight = net.fc.weight
    load_checkpoint(write(make_net().half().state_dict(), tmp_path / "m.pth"), net)
    assert net.fc.weight is weight and weight.dtype == torch.float64 and weight.requires_grad


@pytest.mark.parametrize("names", [("numpy.core.multiarray", "numpy"), ("numpy._core.multiarray", "numpy")])
def test_numpy_numbers_and_arrays_beside_the_weights(tmp_path, names):
    before = set(torch.serialization.get_safe_globals())
    data = Call(Name("_codecs", "encode"), (np.float64(93.5).tobytes().decode("latin1"), "latin1"))
    kind = Call(Name("numpy", "dtype"), ("f8", False, True), (3, "<", None, None, None, -1, -1, 0))
    write_zip(tmp_path / "m.pth", {"net": {"w": tensor()}, "acc": Call(Name(names[0], "scalar"), (kind, data))})
    assert load_checkpoint(tmp_path / "m.pth").extras["acc"] == 93.5
    value = {"model": small_state(), "acc": np.float32(0.5), "poisoned": np.arange(5), "flags": np.zeros(3, bool)}
    loaded = load_checkpoint(write(value, tmp_path / "n.pth"))
    assert loaded.extras == {"model": None, "acc": 0.5} and loaded.left_out == ["poisoned", "flags"]
    assert set(torch.serialization.get_safe_globals()) == before


def test_numpy_arrays_of_objects_are_refused(tmp_path):
    value = {"model": small_state(), "x": np.array([print, None], dtype=object)}
    with pytest.raises(CheckpointError, match="unsafe pickle|objects"):
        load_checkpoint(write(value, tmp_path / "m.pth"))


def test_other_objects_are_refused_with_the_remedy(tmp_path):
    value = {"state_dict": small_state(), "args": random.Random(0)}
    with pytest.raises(CheckpointError, match=r"random\.Random.*save only its state dict"):
        load_checkpoint(write(value, tmp_path / "m.pth"))


def test_no_warnings(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for how in ("zip", "legacy", "safetensors"):
            load_checkpoint(write(dict(small_state()), tmp_path / "m.pth", how), None)
