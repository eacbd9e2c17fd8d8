"""What load_checkpoint finds in sound files, and what save_checkpoint makes of it."""

import argparse
import os
import stat
import sys
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from checkpoint_files import Call, Name, small_state, tensor, write_legacy, write_zip
from torch import nn

import fastfip
from fastfip.checkpoint import Checkpoint, load_arch, load_checkpoint, replacing, save_checkpoint
from fastfip.errors import CheckpointError, ConfigError, ModelError

NESTINGS = ["state_dict", "net", "netC", "model", "model_state_dict", "state_dict_ema"]


def make_net():
    return nn.Sequential(OrderedDict(fc=nn.Linear(4, 3), bn=nn.BatchNorm1d(3)))


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def write(value, path, how="zip"):
    if how == "safetensors":
        from safetensors.torch import save_file

        save_file(value, path)
    else:
        torch.save(value, path, _use_new_zipfile_serialization=how == "zip")
    return path


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("how", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ""])
def test_the_format_is_told_by_the_content(tmp_path, how, suffix):
    loaded = fastfip.load_checkpoint(write(dict(small_state()), tmp_path / f"m{suffix}", how))
    assert loaded.format == how and loaded.nesting == () and loaded.prefix == "" and loaded.left_out == []
    assert set(loaded) == set(small_state()) and all(torch.equal(loaded[k], v) for k, v in small_state().items())


@pytest.mark.parametrize("how", ["zip", "legacy"])
def test_torch_is_always_asked_for_weights_only_on_the_cpu(tmp_path, monkeypatch, how):
    asked = []
    real = torch.load
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: asked.append(kwargs) or real(*args, **kwargs))
    load_checkpoint(write(small_state(), tmp_path / "m.pth", how))
    assert [(call["weights_only"], call["map_location"]) for call in asked] == [(True, "cpu")]


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
    with pytest.raises(CheckpointError, match="tensors only"):
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
    value = {"state_dict": small_state(), "args": argparse.Namespace(lr=1)}
    with pytest.raises(CheckpointError, match=r"argparse\.Namespace.*save only its state dict"):
        load_checkpoint(write(value, tmp_path / "m.pth"))


def test_no_warnings(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for how in ("zip", "legacy", "safetensors"):
            load_checkpoint(write(dict(small_state()), tmp_path / "m.pth", how), None)


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".th", ".pth.tar"])
def test_round_trip(tmp_path, suffix):
    net, other = make_net(), make_net()
    path = fastfip.save_checkpoint(net, tmp_path / f"m{suffix}")
    load_checkpoint(path, other)
    assert same(other.state_dict(), net.state_dict())
    again = save_checkpoint(load_checkpoint(path), tmp_path / f"n{suffix}")
    assert same(load_checkpoint(again), load_checkpoint(path))
    assert sorted(os.listdir(tmp_path)) == [path.name, again.name]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("nesting", ["", "net", "model.state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_form_of_the_input_is_kept(tmp_path, nesting, prefix, suffix):
    net, changed = make_net().half(), make_net()
    root = (nn.DataParallel(net) if prefix else net).state_dict()
    for part in reversed(nesting.split(".") if nesting else []):
        root = {"name": "x", part: root, "acc": torch.tensor(84.5), "optimizer": {"m": torch.ones(3)}}
    loaded = load_checkpoint(write(root, tmp_path / "in.pth"), changed)
    with torch.no_grad():
        changed.fc.weight += 1
    for like in (loaded, tmp_path / "in.pth"):
        path = save_checkpoint(changed, tmp_path / f"out{suffix}", like=like)
        again = load_checkpoint(path)
        assert again.prefix == prefix and again["fc.weight"].dtype == torch.float16
        assert torch.equal(again["fc.weight"], changed.fc.weight.half())
        assert set(again) == set(net.state_dict())
        if suffix == ".pth":
            assert again.nesting == loaded.nesting and again.extras == loaded.extras and again.left_out == []
            raw = torch.load(path, weights_only=True)
            for part in loaded.nesting:
                assert raw["name"] == "x" and raw["acc"] == 84.5 and "optimizer" not in raw
                raw = raw[part]
            assert list(raw) == [prefix + k for k in net.state_dict()]
            assert raw._metadata[prefix + "bn"] == {"version": 2}
    assert loaded.left_out == (["optimizer", "model.optimizer"] if "." in nesting else ["optimizer"] if nesting else [])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_tied_weights_and_views(tmp_path, suffix):
    def tied():
        net = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5))
        net[1].weight = net[0].weight
        net[2].weight = nn.Parameter(torch.randn(50, 5)[:5])  # a part of a larger storage
        return net

    net, other = tied(), tied()
    path = save_checkpoint(net, tmp_path / f"m{suffix}")
    assert path.stat().st_size < 5000  # the larger storage is not in it
    load_checkpoint(path, other)
    assert same(other.state_dict(), net.state_dict()) and other[0].weight is other[1].weight
    if suffix == ".pth":
        raw = torch.load(path, weights_only=True)
        assert raw["0.weight"].data_ptr() == raw["1.weight"].data_ptr()


def test_safetensors_that_keep_one_name_of_tied_weights(tmp_path):
    from safetensors.torch import save_model

    net, other = (nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)) for _ in range(2))
    for n in (net, other):
        n[1].weight = n[0].weight
    save_model(net, str(tmp_path / "m.safetensors"))
    loaded = load_checkpoint(tmp_path / "m.safetensors", other)
    assert same(other.state_dict(), net.state_dict())
    save_checkpoint(other, tmp_path / "n.safetensors", like=loaded)
    assert len(load_checkpoint(tmp_path / "n.safetensors")) == 3


def test_metadata_of_safetensors_is_kept(tmp_path):
    from safetensors.torch import save_file

    save_file(small_state(), tmp_path / "m.safetensors", metadata={"author": "x"})
    loaded = load_checkpoint(tmp_path / "m.safetensors")
    assert loaded.metadata == {"author": "x"}
    path = save_checkpoint(loaded, tmp_path / "n.safetensors", like=loaded)
    assert load_checkpoint(path).metadata == {"author": "x", "format": "pt"}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.update(x=torch.tensor([float("nan")])), "x holds NaN"),
        (lambda s: s.update(x=torch.eye(2).to_sparse()), "x is sparse"),
        (lambda s: s.update(x=torch.empty(2, device="meta")), "x is a meta tensor"),
        (lambda s: s.update(x=torch.ones(1).expand(9)), "x claims 9 values"),
        (lambda s: s.update(x=3), "x among its weights that is no tensor"),
        (lambda s: s.clear(), "no weights to save"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_not_written(tmp_path, change, match, suffix):
    state = small_state()
    change(state)
    path = tmp_path / f"m{suffix}"
    path.write_bytes(b"old")
    with pytest.raises(CheckpointError, match=match) as caught:
        save_checkpoint(state, path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path))
    assert os.listdir(tmp_path) == [path.name] and path.read_bytes() == b"old"


def test_weights_that_do_not_fit_what_they_should_be_like(tmp_path):
    like = load_checkpoint(write({"net": small_state()}, tmp_path / "m.pth"))
    lacking = small_state()
    del lacking["fc.bias"]
    with pytest.raises(CheckpointError, match=r"lack fc\.bias"):
        save_checkpoint(lacking, tmp_path / "n.pth", like=like)
    with pytest.raises(CheckpointError, match=r"fc\.bias is \[9\], in the input \[3\]"):
        save_checkpoint({**small_state(), "fc.bias": torch.ones(9)}, tmp_path / "n.pth", like=like)
    with pytest.raises(CheckpointError, match=r"fc\.bias holds Inf"):  # too large for the dtype of the input
        half = Checkpoint({k: v.half() if v.is_floating_point() else v for k, v in like.items()})
        half.__dict__.update(like.__dict__)
        save_checkpoint({**small_state(), "fc.bias": torch.full((3,), 1e30)}, tmp_path / "n.pth", like=half)
    assert os.listdir(tmp_path) == ["m.pth"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["write", "sync", "rename"])
def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch, suffix, error, step):
    import safetensors.torch

    path = tmp_path / f"m{suffix}"
    path.write_bytes(b"old")

    def half_written(*args, **kwargs):
        for name in os.listdir(tmp_path):
            assert name == path.name or name.endswith(".tmp")
        target = args[1]
        if hasattr(target, "write"):
            target.write(b"half")
        else:
            target.write_bytes(b"half")
        raise error

    def fails(*args, **kwargs):
        raise error

    if step == "write":
        monkeypatch.setattr(torch, "save", half_written)
        monkeypatch.setattr(safetensors.torch, "save_file", half_written)
    else:
        monkeypatch.setattr(os, {"sync": "fsync", "rename": "replace"}[step], fails)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt):
        save_checkpoint(small_state(), path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == [path.name]


def test_the_file_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda *a: (order.append("replace"), replace(*a))[1])
    save_checkpoint(small_state(), tmp_path / "m.pth")
    assert order[:2] == ["fsync", "replace"]


def test_permissions_and_links(tmp_path):
    old = os.umask(0o027)
    try:
        path = save_checkpoint(small_state(), tmp_path / "m.pth")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    link = tmp_path / "link.pth"
    link.symlink_to(path)
    before = path.stat().st_ino
    save_checkpoint(small_state(), link)
    assert link.is_symlink() and path.stat().st_ino != before


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "d.pth").mkdir()
    for name, match in (("m.txt", "suffix"), ("none/m.pth", "folder .*none does not exist"), ("d.pth", "is a folder")):
        with pytest.raises(CheckpointError, match=match):
            save_checkpoint(small_state(), tmp_path / name)


def test_replacing_leaves_nothing_behind(tmp_path):
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a.json") as temporary:
        temporary.write_text("x")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
    with replacing(tmp_path / "a.json") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "a.json").read_text() == "x"


# ---------------------------------------------------------------- architectures

ARCH = """
from torch import nn
class Net(nn.Linear):
    @classmethod
    def small(cls):
        return cls(2, 2)
def make(classes=3): return nn.Linear(4, classes)
def number(): return 3
def broken(): raise RuntimeError("no weights")
net = nn.Linear(1, 1)
text = "x"
"""


@pytest.fixture
def arch(tmp_path, monkeypatch):
    (tmp_path / "my_archs.py").write_text(ARCH)
    (tmp_path / "my_bad_arch.py").write_text("import nowhere_at_all")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("my_archs", "my_bad_arch"):
        sys.modules.pop(name, None)


def test_load_arch(arch):
    assert load_arch("my_archs:make").out_features == 3
    assert load_arch("my_archs:make", {"classes": 7}).out_features == 7
    assert load_arch("my_archs:Net.small").in_features == 2
    assert load_arch("torch.nn:Linear", {"in_features": 1, "out_features": 2}).out_features == 2


@pytest.mark.parametrize(
    ("spec", "error", "match"),
    [
        ("my_archs", ConfigError, "module:factory"),
        (":make", ConfigError, "module:factory"),
        ("my_archs:", ConfigError, "module:factory"),
        ("my_archs:a b", ConfigError, "module:factory"),
        ("sub/my_archs.py:make", ConfigError, "not a file: sub.my_archs:make"),
        ("my_nothing:make", ModelError, "cannot be imported: there is none here"),
        ("my_bad_arch:make", ModelError, "cannot be imported: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("my_archs:none", ModelError, "has no none"),
        ("my_archs:text", ModelError, "is a str, not a function"),
        ("my_archs:number", ModelError, "returned a int"),
        ("my_archs:broken", ModelError, "failed: RuntimeError: no weights"),
        ("my_archs:Net", ConfigError, "does not take {}"),
    ],
)
def test_load_arch_refuses(arch, spec, error, match):
    with pytest.raises(error, match=match):
        load_arch(spec)


def test_load_arch_refuses_arguments(arch):
    with pytest.raises(ConfigError, match=r"does not take {'klasses': 3}"):
        load_arch("my_archs:make", {"klasses": 3})
