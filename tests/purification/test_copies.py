"""Models that torch itself refuses to copy: their weight is computed by a hook and kept with its graph."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fastfip
from tests.support.small_nets import CLASSES, data, same, values

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")

KINDS = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
}


def net(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES))
    for layer in (model[0], model[3]):
        KINDS[kind](layer)
    model(data(4)[0])
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    return model


@pytest.mark.parametrize("method", ["fine_tune", "fast_wfip", "wfip", "fst"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_copied_purified_and_saved(kind, method):
    model, x = net(kind), data(5)[0]
    with torch.no_grad():
        before, answer = values(model), model.eval()(x)
    result = fastfip.purify(model, data(24), method, steps=3, progress=False)
    assert same(values(model), before) and torch.equal(model(x), answer)
    assert list(result.state_dict()) == list(before) and not torch.equal(result.model(x), answer)
    twin = net(kind)
    twin.load_state_dict(result.state_dict())
    torch.testing.assert_close(twin.eval()(x), result.model.eval()(x))
    if kind == "prune":
        assert torch.equal(result.state_dict()["3.weight_mask"], before["3.weight_mask"])
    assert "weight" in "".join(result.coverage.tuned)


@pytest.mark.parametrize("kind", KINDS)
def test_in_place_it_comes_to_the_same(kind):
    mine, other = net(kind), net(kind)
    result = fastfip.purify_(mine, data(24), "fine_tune", steps=3, progress=False)
    assert result.model is mine
    assert same(values(mine), fastfip.purify(other, data(24), "fine_tune", steps=3, progress=False).state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_audited(kind):
    model = net(kind)
    before = values(model)
    assert len(fastfip.audit(model, data(24), steps=2).table().rows) > 0 and same(values(model), before)


def test_strides_of_sides_of_length_one_are_kept():
    """They are contiguous in both layouts, and yet tell a convolution which of them its output has."""
    convolutions = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)]
    model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    strides = [p.stride() for p in model.parameters()]
    data = torch.rand(12, 3, 12, 12), torch.arange(12) % 3
    for inplace in (False, True):
        result = fastfip.purify(model, data, "fine_tune", steps=1, progress=False, inplace=inplace)
        assert [p.stride() for p in result.model.parameters()] == strides
