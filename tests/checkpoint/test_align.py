"""Checkpoints that do not fit the model: both sides are named, nothing is loaded."""

import pytest
import torch
from torch import nn

from fastfip.checkpoint import load_checkpoint
from fastfip.errors import CheckpointError, ModelError
from tests.support.checkpoint_files import Net, bare, refused, save, small_state


def test_missing_and_unknown_names_are_named_on_both_sides(tmp_path):
    state = small_state()
    state["fc.wieght"] = state.pop("fc.weight")
    path = save(state, tmp_path / "m.pth")
    missing = r"1 missing in the file: fc\.weight \(there: fc\.wieght\)"
    refused(path, rf"does not fit the model; {missing}; 1 unknown to the model: fc\.wieght")
    net = bare()
    loaded = load_checkpoint(path, net, strict=False)
    assert set(loaded) == {"fc.bias", "bn.num_batches_tracked"}
    assert torch.equal(net.fc.bias, state["fc.bias"])


def test_nothing_in_common_is_refused_also_when_not_strict(tmp_path):
    refused(save({"other": torch.ones(2)}, tmp_path / "m.pth"), "does not fit the model", strict=False)


@pytest.mark.parametrize("strict", [True, False])
def test_wrong_shapes(tmp_path, strict):
    path = save({"state_dict": small_state()}, tmp_path / "m.pth")
    refused(path, r"fc\.weight is \[3, 4\] in the file and \[5, 4\] in the model", Net(5), strict=strict)


def test_wrong_kinds_of_numbers(tmp_path):
    state = small_state()
    state["fc.weight"] = torch.ones(3, 4, dtype=torch.int8)
    refused(save(state, tmp_path / "m.pth"), r"fc\.weight is int8 in the file and float32 in the model")


def test_names_in_the_file_do_nothing_to_the_terminal(tmp_path):
    state = {"a\n\x1b[2J\x07b": torch.tensor([float("nan")])}
    refused(save(state, tmp_path / "m.pth"), r"a\?\?\[2J\?b holds NaN")
    refused(save({"x" * 10**4: torch.tensor([float("nan")])}, tmp_path / "m.pth"), r"xxx\.\.\.$")
    refused(save({"x" * 10**5: torch.tensor([1.0])}, tmp_path / "m.pth"), "name is not text, or is far too long")


def test_entries_that_are_no_tensors(tmp_path):
    refused(save({"net": {**small_state(), "lr": 0.1}}, tmp_path / "m.pth"), "entry lr among its weights .*float")
    refused(save({**small_state(), "epoch": 3}, tmp_path / "m.pth"), "entry epoch among its weights .*int")
    refused(save({"net": {**small_state(), 3: torch.ones(1)}}, tmp_path / "m.pth"), "not text")


def test_several_state_dicts_without_a_usual_name(tmp_path):
    path = save({"a": small_state(), "b": {"w": torch.ones(2)}, "epoch": 1}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="several state dicts, a, b: choose one of them with key="):
        load_checkpoint(path)
    assert load_checkpoint(path, bare()).nesting == ("a",)
    assert list(load_checkpoint(path, key="b")) == ["w"]
    refused(path, "no entry 'c', only a, b, epoch", key="c")
    refused(path, "'epoch' that is not a state dict", key="epoch")


def test_tied_weights_that_differ(tmp_path):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    state = {k: v.clone() for k, v in net.state_dict().items()}
    state["1.weight"] += 1
    refused(save(state, tmp_path / "m.pth"), "different values for 0.weight and 1.weight.*model", net)


def test_a_model_whose_own_hook_fails_half_way_is_put_back(tmp_path):
    net = bare()

    class Picky(nn.Module):
        def _load_from_state_dict(self, *args):
            raise RuntimeError("no, thanks")

    net.last = Picky()
    refused(save(small_state(), tmp_path / "m.pth"), "could not be loaded into the model: .*no, thanks", net)


def test_models_that_cannot_take_weights(tmp_path):
    path = save(small_state(), tmp_path / "m.pth")
    for model, match in (("net", "nn.Module"), (nn.LazyLinear(3), "lazy"), (Net().to("meta"), "meta device")):
        with pytest.raises(ModelError, match=match):
            load_checkpoint(path, model)
