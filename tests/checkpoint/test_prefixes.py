"""Prefixes of all kinds of wrappers: the names of the model decide."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from fastfip.checkpoint import load_checkpoint, save_checkpoint
from fastfip.checkpoint.prefixes import align
from fastfip.cli import main
from fastfip.errors import CheckpointError
from fastfip.testing import nets
from tests.support.checkpoint_files import make_net, refused, same, save


def renamed(net, prefix):
    return OrderedDict((prefix + name, value) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    "prefix", ["net.", "backbone.", "1.", "_module.", "module.model.", "a.b.c.", "module.1.0.", "fc."]
)
def test_any_prefix_that_makes_the_names_meet_is_taken_off(tmp_path, prefix):
    net, other = make_net(), make_net()
    path = save({"state_dict": renamed(net, prefix)}, tmp_path / "m.pth")
    loaded = load_checkpoint(path, other)
    assert same(other.state_dict(), net.state_dict()) and loaded.prefix == prefix and loaded.left_out == []
    save_checkpoint(other, tmp_path / "out.pth", like=loaded)
    assert same(torch.load(tmp_path / "out.pth", weights_only=True)["state_dict"], renamed(net, prefix))


@pytest.mark.parametrize(
    "further", ["criterion.pos_weight", "n_averaged", "ema_model.fc.weight", "loss.weight", "ema_model"]
)
def test_further_names_without_the_prefix_are_left_out_and_listed(tmp_path, further):
    net, other = make_net(), make_net()
    more = renamed(make_net(), "ema_model.") if further == "ema_model" else {further: torch.ones(1)}
    path = save({"state_dict": {**more, **renamed(net, "net.")}}, tmp_path / "m.ckpt")
    loaded = load_checkpoint(path, other)
    assert same(other.state_dict(), net.state_dict())
    assert loaded.left_out == [f"state_dict.{name}" for name in more]


def test_averaged_models_of_torch_are_read(tmp_path):
    net = make_net()
    averaged = torch.optim.swa_utils.AveragedModel(net)
    loaded = load_checkpoint(save(averaged.state_dict(), tmp_path / "m.pth"), make_net())
    assert same(loaded, net.state_dict()) and loaded.left_out == ["n_averaged"]


def test_a_name_too_many_under_the_prefix_is_still_refused(tmp_path):
    state = renamed(make_net(), "net.")
    state["net.extra.weight"] = torch.ones(2)
    refused(save(state, tmp_path / "m.pth"), r"1 unknown to the model: extra\.weight", make_net())
    loaded = load_checkpoint(tmp_path / "m.pth", make_net(), strict=False)
    assert "extra.weight" not in loaded and len(loaded) == len(make_net().state_dict())


def test_what_is_not_strict_takes_what_there_is_under_a_prefix(tmp_path):
    net, other = make_net(), make_net()
    state = renamed(net, "backbone.")
    del state["backbone.fc.bias"]
    state["head.weight"] = torch.ones(2)
    path = save(state, tmp_path / "m.pth")
    refused(path, r"model; 1 missing in the file: fc\.bias", make_net())
    bias = other.fc.bias.clone()
    load_checkpoint(path, other, strict=False)
    assert torch.equal(other.fc.weight, net.fc.weight) and torch.equal(other.fc.bias, bias)


@pytest.mark.parametrize("inside", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_what_wrappers_put_into_names_is_passed_over(tmp_path, inside, prefix):
    net, other = nn.Sequential(make_net(), nn.Linear(3, 3)), nn.Sequential(make_net(), nn.Linear(3, 3))
    state = {prefix + name.replace("0.", f"0.{inside}.", 1): value for name, value in net.state_dict().items()}
    loaded = load_checkpoint(save(state, tmp_path / "m.pth"), other)
    assert same(other.state_dict(), net.state_dict())
    save_checkpoint(other, tmp_path / "out.pth", like=loaded)
    assert list(torch.load(tmp_path / "out.pth", weights_only=True)) == list(state)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by torch
def test_a_compiled_part_of_the_model_takes_a_plain_file(tmp_path):
    net = nn.Sequential(make_net(), nn.Linear(3, 3))
    other = nn.Sequential(torch.compile(make_net()), nn.Linear(3, 3))
    load_checkpoint(save(net.state_dict(), tmp_path / "m.pth"), other)
    assert torch.equal(other[0]._orig_mod.fc.weight, net[0].fc.weight)


def test_two_models_in_one_dict_need_the_users_word(tmp_path):
    student, teacher, other = make_net(), make_net(), make_net()
    path = save({**renamed(student, "student."), **renamed(teacher, "teacher.")}, tmp_path / "m.pth")
    refused(path, r"model under 'student\.' and 'teacher\.': choose one of them with prefix=", make_net())
    for prefix in ("teacher", "teacher."):
        loaded = load_checkpoint(path, other, prefix=prefix)
        assert same(other.state_dict(), teacher.state_dict()) and loaded.prefix == "teacher."
    assert same(load_checkpoint(path, prefix="student"), student.state_dict())
    assert all(name.startswith("student.") for name in loaded.left_out)


def test_the_command_line_takes_a_prefix(tmp_path, capsys):
    path = save({**renamed(make_net(), "student."), **renamed(make_net(), "teacher.")}, tmp_path / "m.pth")
    np.savez(tmp_path / "a.npz", x=np.ones((6, 4), np.float32), y=np.arange(6) % 3)
    arguments = ["evaluate", str(path), "--arch", "tests.support.checkpoint_files:make_net"]
    arguments += ["--test-data", str(tmp_path / "a.npz")]
    assert main(arguments) == 4 and "choose one of them with prefix=" in capsys.readouterr().err
    assert main([*arguments, "--prefix", "teacher"]) == 0


def test_a_prefix_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    path = save({**renamed(make_net(), "student."), "x": torch.ones(1)}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"no names with the prefix 'teacher\.'; they begin with student\."):
        load_checkpoint(path, prefix="teacher")


def test_many_names_are_aligned_in_a_moment():
    names = [f"backbone.layers.{i}.weight" for i in range(30_000)]
    expected = [name.removeprefix("backbone.") for name in names]
    assert align(names, expected) == dict(zip(expected, names))


@pytest.mark.parametrize("prefix", ["", "1.", "module.1."])
def test_both_names_of_the_layers_of_a_vision_transformer_load_and_come_back(tmp_path, prefix):
    """torchvision 0.12 called `mlp.0` and `mlp.3` of a block `mlp.linear_1` and `mlp.linear_2`."""
    net, other = (nets.VisionTransformer(3, 8, 4, 8, 2, 2) for _ in range(2))
    old = OrderedDict()
    for name, value in net.state_dict().items():
        name = name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2.")
        old[prefix + name] = value
    loaded = load_checkpoint(save({"model": old}, tmp_path / "m.pth"), other)
    assert same(other.state_dict(), net.state_dict()) and loaded.prefix == prefix
    save_checkpoint(other, tmp_path / "out.pth", like=loaded)
    assert same(torch.load(tmp_path / "out.pth", weights_only=True)["model"], old)
