"""What ReLU keeps in front of a spectral layer: a byte a number, and the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastfip.spectral import SpectralShifts, layers
from fastfip.spectral.relu import _pack, keep_signs


@pytest.fixture(autouse=True)
def always_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "prefers_dense", lambda *args: False)


class Net(nn.Module):
    """ReLUs in every form, one with two readers."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace
        self.a, self.b = nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(5, 5, 3, padding=1)
        self.short, self.relu, self.out = nn.Conv2d(5, 5, 1), nn.ReLU(inplace), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.a(x), inplace=self.inplace)
        x = self.relu(self.b(x)) + self.short(x)
        return self.out(torch.relu(x.mean((2, 3)))).relu()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients(dtype: torch.dtype, inplace: bool, last: bool) -> None:
    torch.manual_seed(0)
    net = Net(inplace).to(dtype)
    x = torch.randn(3, 2, 6, 5, dtype=dtype, requires_grad=True)
    x = x.to(memory_format=torch.channels_last) if last else x
    shifts = SpectralShifts.of(net, 4)
    with shifts.differentiable():
        y = net(x)
        right = torch.autograd.grad(y.pow(2).sum(), [x, *shifts.deltas])
    shifts.refresh()
    found = net(x)
    found.pow(2).sum().backward(inputs=[x, *shifts.deltas], retain_graph=True)
    for delta in shifts.deltas:
        delta.grad = None
    x.grad = None
    found.pow(2).sum().backward(inputs=[x, *shifts.deltas])  # what was kept can be read again
    close = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    for a, b in zip([x.grad, *(delta.grad for delta in shifts.deltas)], right):
        assert (a - b).norm() <= close * b.norm()


def test_a_byte_a_number_is_kept() -> None:
    z = torch.tensor([-1.0, -0.0, 0.0, 1e-45, 2.0, torch.inf, torch.nan], requires_grad=True)
    y = torch.relu(z * 1)
    keep_signs(y)
    keep_signs(y)
    kept, dtype = _pack(y)
    assert kept.dtype == torch.uint8 and dtype == torch.float32
    (found,) = torch.autograd.grad(y.sum(), z)
    (right,) = torch.autograd.grad(torch.relu(z * 1).sum(), z)
    assert torch.equal(found, right)


def test_the_output_itself_is_let_go() -> None:
    torch.manual_seed(2)
    layer = nn.Linear(6, 6)
    shifts = SpectralShifts.of(layer, 2)
    shifts.refresh()
    y = torch.relu(torch.randn(4, 6, requires_grad=True) * 1)
    node: Any = y.grad_fn
    assert node._saved_result.data_ptr() == y.data_ptr()
    layer(y)
    assert node._saved_result.data_ptr() != y.data_ptr()


def test_checkpointing_goes_on_working() -> None:
    torch.manual_seed(3)
    net = Net(False).double()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    shifts = SpectralShifts.of(net)
    with shifts.differentiable():
        right = torch.autograd.grad(net(x).pow(2).sum(), [x, *shifts.deltas])
    for reentrant in (False, True):
        shifts.refresh()
        checkpoint(net, x, use_reentrant=reentrant).pow(2).sum().backward()
        shifts.collect()
        for leaf, expected in zip([x, *shifts.deltas], right):
            torch.testing.assert_close(leaf.grad, expected)
            leaf.grad = None
        shifts.remove()
