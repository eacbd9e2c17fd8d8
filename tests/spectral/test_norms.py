"""Frozen BatchNorm as a scale and an offset: the same numbers, nothing kept, everything put back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastfip.spectral import SpectralShifts


def net() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3, affine=False)
    )
    with torch.no_grad():
        for m in (made[1], made[4]):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
        made[1].weight.normal_()
        made[1].bias.normal_()
    return made.double().eval()


@pytest.mark.parametrize("case", ["frozen", "affine tuned", "train"])
def test_same_outputs_and_gradients(case: str) -> None:
    model = net().train(case == "train")
    model.requires_grad_(False)
    model[1].weight.requires_grad_(case == "affine tuned")
    x = torch.randn(3, 2, 7, 6, dtype=torch.float64)
    shifts = SpectralShifts.of(model)
    with shifts.differentiable():
        expected = model(x)
        right = torch.autograd.grad(expected.pow(3).sum(), shifts.deltas)
    means = model[1].running_mean.clone()
    shifts.refresh()
    found = model(x)
    found.pow(3).sum().backward()
    shifts.collect()
    assert torch.equal(means, model[1].running_mean) == (case != "train")
    torch.testing.assert_close(found, expected)
    for delta, g in zip(shifts.deltas, right):
        torch.testing.assert_close(delta.grad, g)
    assert (model[1].weight.grad is not None) == (case == "affine tuned")
    shifts.remove()
    assert not any("forward" in m.__dict__ for m in model)


def test_nothing_of_the_input_is_kept() -> None:
    model = net().requires_grad_(False)
    shifts = SpectralShifts.of(model)
    shifts.refresh()
    x = torch.randn(3, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        y = model[1](x)
    assert kept and all(shape.numel() == 4 for shape in kept)
    y.sum().backward()
    shifts.remove()
    torch.testing.assert_close(y, model[1](x))


def test_statistics_that_moved_since_are_seen() -> None:
    model = net().requires_grad_(False)
    x = torch.randn(3, 2, 7, 6, dtype=torch.float64)
    shifts = SpectralShifts.of(model)
    shifts.refresh()
    model(x)
    model[1].running_mean.add_(1)
    during = model(x)
    shifts.remove()
    torch.testing.assert_close(during, model(x))
