"""Spectral layers in 16 bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastfip.spectral import SpectralShifts, layers


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("module", [nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(48, 32, 1), nn.Linear(96, 32)])
def test_a_large_bias_does_not_round_the_gradient_away(
    module: nn.Module, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "prefers_dense", lambda *_: False)
    torch.manual_seed(0)
    shape = (8, 96) if isinstance(module, nn.Linear) else (8, module.in_channels, 8, 8)
    x = torch.randn(shape).bfloat16()

    def gradient(bias: float, dtype: torch.dtype) -> torch.Tensor:
        with torch.no_grad():
            module.bias.fill_(bias)
        module.to(dtype)
        shifts = SpectralShifts.of(module, rank)
        shifts.refresh()
        y = module(x.to(dtype))
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        y.backward(upstream)
        shifts.collect()
        shifts.remove()
        return shifts.deltas[0].grad.double()

    with torch.no_grad():
        module.weight.copy_(module.weight.bfloat16())
    wanted = gradient(30.0, torch.float64)
    for bias in (0.0, 30.0):
        got = gradient(bias, torch.bfloat16)
        assert (got.abs() - wanted.abs()).norm() < 0.03 * wanted.norm(), bias  # singular vectors have no sign
