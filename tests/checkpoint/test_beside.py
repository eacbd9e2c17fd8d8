"""What stands beside the weights: plain data is kept, what is harmless is left out by name, the rest is refused."""

import argparse
import collections
import datetime
import pathlib

import numpy as np
import pytest
import torch
from torch import nn

from fastfip.checkpoint import load_checkpoint, save_checkpoint
from fastfip.errors import CheckpointError
from tests.support.checkpoint_files import Call, Name, make_net, same, save, small_state, tensor, write, write_zip


class AttributeDict(dict):
    """As Lightning has one for hyperparameters."""


def test_backdoorbench_results_are_read(tmp_path):
    """The `attack_result.pt` of BackdoorBench: poisoned images by index, and what they were."""
    from PIL import Image

    picture = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    container = {np.int64(3): {"img": picture, "label": 0}, np.int64(7): {"img": picture, "label": 0}}
    value = {
        "model_name": "preactresnet18",
        "num_classes": 10,
        "model": make_net().state_dict(),
        "img_size": (32, 32, 3),
        "clean_data": "cifar10",
        "bd_train": {
            "bd_data_container": {"data_dict": container, "save_folder_path": "record/x"},
            "getitem_all": True,
            "original_index_array": np.arange(5),
            "poison_indicator": np.zeros(5),
        },
        "poisoned": {np.int64(3): np.int64(1)},
    }
    net = make_net()
    loaded = load_checkpoint(save(value, tmp_path / "attack_result.pt"), net)
    assert same(net.state_dict(), value["model"]) and loaded.nesting == ("model",)
    assert loaded.left_out == ["bd_train"] and loaded.extras["poisoned"] == {3: 1}
    assert type(next(iter(loaded.extras["poisoned"]))) is int and loaded.extras["img_size"] == (32, 32, 3)
    save_checkpoint(net, tmp_path / "out.pt", like=loaded)
    assert torch.load(tmp_path / "out.pt", weights_only=True)["num_classes"] == 10


@pytest.mark.parametrize(
    "value",
    [
        argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("x")),
        pathlib.PurePosixPath("x/y"),
        datetime.datetime(2026, 1, 2, 3, 4),
        datetime.timedelta(seconds=3),
        collections.Counter("abca"),
        collections.defaultdict(list, a=[1]),
        collections.deque([1, 2]),
        AttributeDict(lr=0.1),
        {1, 2},
        {pathlib.PurePosixPath("x"): 1},
        {(1, (2, 3)): 1},
        {"inside": [argparse.Namespace()]},
        torch.float32,
        torch.device("cpu"),
        slice(3),
        "x" * 100_000,
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("how", ["zip", "legacy"])
def test_what_is_harmless_is_left_out_by_name(tmp_path, value, how):
    loaded = load_checkpoint(write({"net": small_state(), "epoch": 3, "what": value}, tmp_path / "m.pth", how))
    assert same(loaded, small_state())
    assert loaded.extras == {"net": None, "epoch": 3} and loaded.left_out == ["what"]


def test_bytes_beside_the_weights_are_kept_up_to_64_kilobytes(tmp_path):
    """Protocol 2 writes them as texts, of which the long ones are not copied while the file is followed."""
    values = bytes(range(256)) * 100
    path = save({"net": small_state(), "a": values, "b": [values], "c": {b"x" * 2000: 1}}, tmp_path / "m.pth")
    extras = load_checkpoint(path).extras
    assert extras["a"] == values and extras["b"] == [values] and extras["a"] is extras["b"][0]
    assert extras["c"] == {b"x" * 2000: 1}
    assert load_checkpoint(save({"net": small_state(), "a": values * 4}, path)).left_out == ["a"]


@pytest.mark.parametrize(
    "name",
    [
        ("pytorch_lightning.utilities.parsing", "AttributeDict"),
        ("lightning.fabric.utilities.data", "AttributeDict"),
        ("omegaconf.dictconfig", "DictConfig"),
        ("omegaconf.base", "ContainerMetadata"),
        ("easydict", "EasyDict"),
        ("yacs.config", "CfgNode"),
        ("PIL.PngImagePlugin", "PngImageFile"),
        ("numpy.random._pickle", "__randomstate_ctor"),
        ("pathlib._local", "PosixPath"),
    ],
)
def test_settings_of_the_usual_packages_need_not_be_installed(tmp_path, name):
    write_zip(tmp_path / "m.pth", {"net": {"w": tensor()}, "cfg": Call(Name(*name), (), {"lr": 0.1})})
    assert load_checkpoint(tmp_path / "m.pth").left_out == ["cfg"]


@pytest.mark.parametrize(
    "name",
    [
        ("os", "system"),
        ("collections", "abc"),
        ("argparse", "ArgumentParser"),
        ("pathlib", "os.system"),
        ("builtins", "getattr"),
        ("datetime", "sys.exit"),
        ("evil.AttributeDict", "run"),
    ],
)
def test_names_that_only_look_harmless_are_refused(tmp_path, name):
    write_zip(tmp_path / "m.pth", {"net": {"w": tensor()}, "x": Call(Name(*name), ("true",))})
    with pytest.raises(CheckpointError, match="unsafe pickle"):
        load_checkpoint(tmp_path / "m.pth")


@pytest.mark.parametrize("how", ["zip", "legacy"])
def test_attributes_of_parameters_do_not_hide_their_methods(tmp_path, how):
    weight = nn.Parameter(torch.ones(3))
    weight.detach = 3
    weight.note = "x"
    loaded = load_checkpoint(write({"w": weight}, tmp_path / "m.pth", how))
    assert type(loaded["w"]) is torch.Tensor and not vars(loaded["w"]) and loaded["w"].detach().sum() == 3


def test_files_of_the_other_byte_order_are_read(tmp_path):
    values = np.arange(4, dtype=">f4")
    write_zip(tmp_path / "m.pth", {"w": tensor((2, 2), (2, 1))}, {"0": values.tobytes()})
    content = (tmp_path / "m.pth").read_bytes()
    write_zip(tmp_path / "m.pth", {"w": tensor((2, 2), (2, 1))}, {"0": values.tobytes()}, order=b"big")
    assert content != (tmp_path / "m.pth").read_bytes()
    assert load_checkpoint(tmp_path / "m.pth")["w"].tolist() == [[0, 1], [2, 3]]


def test_blocks_of_the_other_byte_order_without_a_width_are_refused(tmp_path):
    claim = tensor((2,), kind=Name("torch.storage", "UntypedStorage"), numel=16)
    ident = claim.args[0]
    typed = Call(
        Name("torch._utils", "_rebuild_tensor_v3"), (ident, 0, (2,), (1,), False, None, Name("torch", "uint16"))
    )
    write_zip(tmp_path / "m.pth", {"w": typed}, {"0": bytes(16)}, order=b"big")
    with pytest.raises(CheckpointError, match="other byte order"):
        load_checkpoint(tmp_path / "m.pth")
    write_zip(tmp_path / "m.pth", {"w": typed}, {"0": bytes([1, 0, 2, 0] * 4)})
    assert load_checkpoint(tmp_path / "m.pth")["w"].tolist() == [1, 2]


@pytest.mark.parametrize("size", [(0,), (0, 2**62), (2**62, 0, 2**62), (1,) * 64])
@pytest.mark.parametrize("stride", [0, 1, 2**62])
@pytest.mark.parametrize("offset", [0, 3, 2**62])
def test_sizes_at_the_edge_are_read_or_refused(tmp_path, size, stride, offset):
    write_zip(tmp_path / "m.pth", {"w": tensor(size, (stride,) * len(size), offset)})
    try:
        assert load_checkpoint(tmp_path / "m.pth")["w"].shape == size
    except CheckpointError as error:
        assert "\n" not in str(error)


def test_conjugates_that_are_not_computed_yet_are_refused(tmp_path):
    path = save({"w": torch.ones(2, dtype=torch.complex64).conj()}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="w is conjugated"):
        load_checkpoint(path)


def test_flags_are_true_or_false_whatever_bytes_say(tmp_path):
    flags = tensor(kind=Name("torch", "BoolStorage"))
    write_zip(tmp_path / "m.pth", {"w": flags}, {"0": bytes([0, 1, 2, 255])})
    assert load_checkpoint(tmp_path / "m.pth")["w"].view(torch.uint8).tolist() == [0, 1, 1, 1]


def test_extra_state_of_modules_is_plain_data_with_tensors(tmp_path):
    scale = {"scale": torch.ones(5), "history": collections.OrderedDict(a=(1, [torch.zeros(2)]))}
    path = save({"net": {**small_state(), "fc._extra_state": scale}}, tmp_path / "m.pth")
    loaded = load_checkpoint(path)
    assert loaded["fc._extra_state"]["scale"].sum() == 5 and loaded["fc._extra_state"]["history"]["a"][0] == 1
    save_checkpoint(loaded, tmp_path / "out.pth", like=loaded)
    written = torch.load(tmp_path / "out.pth", weights_only=True)["net"]["fc._extra_state"]
    assert torch.equal(written["history"]["a"][1][0], torch.zeros(2))
    path = save({"net": {**small_state(), "fc._extra_state": argparse.Namespace()}}, tmp_path / "n.pth")
    with pytest.raises(CheckpointError, match=r"entry fc\._extra_state that is not plain data"):
        load_checkpoint(path)


def test_notes_on_versions_that_are_no_plain_data_are_not_kept(tmp_path):
    state = make_net().state_dict()
    state._metadata["bn"] = {"version": argparse.Namespace()}
    loaded = load_checkpoint(save(state, tmp_path / "m.pth"), make_net())
    assert "bn" not in loaded._metadata and loaded._metadata["fc"] == {"version": 1}
    save_checkpoint(loaded, tmp_path / "out.pth", like=loaded)
    assert torch.load(tmp_path / "out.pth", weights_only=True)._metadata["fc"] == {"version": 1}
