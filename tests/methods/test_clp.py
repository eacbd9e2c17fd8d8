"""`clp`: the bound of each channel is its definition, and what is pruned follows from it alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastfip
from fastfip.errors import ModelError
from fastfip.methods.clp import channel_lipschitz


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 24)
        self.norm2 = nn.BatchNorm1d(24)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(torch.relu(self.norm2(self.fc(h))))


def _net() -> _Net:
    torch.manual_seed(0)
    net = _Net()
    with torch.no_grad():
        for norm in (net.norm, net.norm2):
            norm.running_var.uniform_(0.5, 2)
            norm.running_mean.normal_()
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_()
    return net.eval()


def test_the_bound_is_the_norm_of_the_folded_weight_of_each_channel() -> None:
    net = _net()
    for layer, norm in ((net.conv, net.norm), (net.fc, net.norm2)):
        found = channel_lipschitz(layer.weight, norm)
        for k in range(len(found)):
            folded = layer.weight[k].double() * norm.weight[k].abs() / (norm.running_var[k] + norm.eps).sqrt()
            expected = torch.linalg.svdvals(folded.reshape(folded.shape[0], -1))[0]
            assert torch.allclose(found[k], expected)


def test_the_outlying_channels_become_zero_and_nothing_else_moves() -> None:
    net = _net()
    with torch.no_grad():
        net.norm.weight[5] *= -30
        net.fc.weight[7] *= 40
    data = (torch.rand(8, 3, 8, 8), torch.arange(8) % 4)
    result = fastfip.purify(net, data, "clp", force=True, progress=False)
    expected = {name: value.clone() for name, value in net.state_dict().items()}
    for name, k in (("norm", 5), ("norm2", 7)):
        expected[f"{name}.weight"][k] = expected[f"{name}.bias"][k] = 0
    found = result.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any("2 of 40 channels pruned" in note for note in result.notes)
    assert not result.unchanged


def test_the_images_do_not_matter_and_a_smaller_u_prunes_more() -> None:
    net = _net()
    ends = [
        fastfip.purify(net, (torch.rand(8, 3, 8, 8), torch.arange(8) % 4), "clp", u=u, seed=seed, force=True)
        for seed, u in ((0, 1.0), (1, 1.0), (0, 0.5))
    ]
    gone = [int(sum((norm.weight == 0).sum() for norm in (end.model.norm, end.model.norm2))) for end in ends]
    assert gone[0] == gone[1] and 0 < gone[0] < gone[2]
    assert all(torch.equal(a, b) for a, b in zip(ends[0].model.parameters(), ends[1].model.parameters()))


def test_without_batchnorm_the_rows_themselves_are_compared_and_the_classifier_is_spared() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 4))
    with torch.no_grad():
        net[0].weight[3] *= 50
        net[2].weight[1] *= 50
    result = fastfip.purify(net, (torch.rand(8, 6), torch.arange(8) % 4), "clp", u=1.5, force=True)
    expected = {name: value.clone() for name, value in net.state_dict().items()}
    expected["0.weight"][3] = expected["0.bias"][3] = 0
    assert all(torch.equal(result.model.state_dict()[name], value) for name, value in expected.items())
    assert any("by their weights alone" in note for note in result.notes)


def test_a_model_of_one_layer_is_refused_and_a_frozen_layer_is_left() -> None:
    with pytest.raises(ModelError, match="no layer before the classifier"):
        fastfip.purify(nn.Linear(5, 3), (torch.randn(6, 5), torch.arange(6) % 3), "clp", force=True)
    net = _net()
    for norm in (net.norm, net.norm2):
        norm.requires_grad_(False)
    with pytest.raises(ModelError, match="each BatchNorm is frozen"):
        fastfip.purify(net, (torch.rand(8, 3, 8, 8), torch.arange(8) % 4), "clp", force=True)
    net = _net()
    with torch.no_grad():
        net.norm.weight[5] *= 30
        net.norm2.weight[7] *= 30
    net.norm.requires_grad_(False)
    result = fastfip.purify(net, (torch.rand(8, 3, 8, 8), torch.arange(8) % 4), "clp", force=True)
    assert result.model.norm.weight[5].item() != 0 and result.model.norm2.weight[7].item() == 0
