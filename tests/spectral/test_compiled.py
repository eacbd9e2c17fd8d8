"""torch.compile: one graph, the gradients of the eager model, and no second compilation at the next delta."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastfip.spectral import SpectralShifts
from fastfip.testing import nets

NETS = {
    "vit": lambda: nets.ViT(4, size=8, dim=8, depth=2, heads=2),
    "vit, packed attention": lambda: nets.ViT(4, size=8, dim=8, depth=1, heads=2, fused=False),
    "resnet": lambda: nets.randomize_norms(nets.PreActResNet(4, blocks=(1, 1), width=4)),
}


@pytest.mark.parametrize("name", NETS)
def test_one_graph(name: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    net: nn.Module = NETS[name]().double().eval().requires_grad_(False)
    x, y = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 3])
    shifts = SpectralShifts.of(net, 2)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for turn in range(3):
        with torch.no_grad():
            for delta in shifts.deltas:
                delta.uniform_(-0.1, 0.1)
        found = []
        for call in (net, compiled):
            shifts.refresh()
            nn.functional.cross_entropy(call(x), y).backward()
            shifts.collect()
            shifts.remove()
            found.append([delta.grad for delta in shifts.deltas])
            for delta in shifts.deltas:
                delta.grad = None
        for a, b in zip(*found):
            torch.testing.assert_close(a, b)
        assert counter.frame_count == 1, f"compiled again in step {turn}"
