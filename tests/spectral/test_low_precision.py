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
    shape = (8, 96) if isinstance(module, nn.Linear) else (8, module.in_channels, 8, 8)

    def gradient(x: torch.Tensor, bias: float, dtype: torch.dtype) -> torch.Tensor:
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

    # Four sums of one draw can all be near zero by chance, where rounding is all that is left: six are judged together.
    wrong, size = dict.fromkeys((0.0, 30.0), 0.0), 0.0
    for seed in range(6):
        torch.manual_seed(seed)
        x = torch.randn(shape).bfloat16()
        module.float().reset_parameters()
        with torch.no_grad():
            module.weight.copy_(module.weight.bfloat16())
        wanted = gradient(x, 30.0, torch.float64)
        size += wanted.square().sum().item()
        for bias in wrong:
            got = gradient(x, bias, torch.bfloat16)
            wrong[bias] += (got.abs() - wanted.abs()).square().sum().item()  # singular vectors have no sign
    assert max(wrong.values()) < 0.03**2 * size, wrong
