"""What save_checkpoint writes, and what a failure leaves."""

import os
import stat

import pytest
import torch
from torch import nn

import fastfip
from fastfip.checkpoint import Checkpoint, load_checkpoint, replacing, save_checkpoint
from fastfip.errors import CheckpointError
from tests.support.checkpoint_files import make_net, same, small_state, write


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
        (lambda s: s.update(x=3), "x among its weights that is not a tensor"),
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


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, None])
def test_a_file_keeps_its_mode_and_a_new_one_has_that_of_the_umask(tmp_path, suffix, mode):
    path = tmp_path / f"m{suffix}"
    before = os.umask(0o027)
    try:
        if mode is not None:
            path.write_bytes(b"")
            path.chmod(mode)
        save_checkpoint(make_net(), path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == (0o640 if mode is None else mode)


@pytest.mark.parametrize("name", ["x" * 5000 + ".pth", "a\0b.pth"])
def test_names_that_no_system_takes_are_refused_in_one_line(tmp_path, name):
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(make_net(), tmp_path / name)
    with pytest.raises(CheckpointError, match="cannot be read|does not exist"):
        load_checkpoint(tmp_path / name)


def test_the_longest_name_is_written(tmp_path):
    path = tmp_path / ("x" * 251 + ".pth")
    save_checkpoint(make_net(), path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
