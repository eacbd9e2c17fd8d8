"""How a shifted weight lies in the model: where it is found, when it is made, and what a model cannot do meanwhile."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastfip.errors import ModelError
from fastfip.spectral import SpectralShifts, layers


def test_an_interruption_in_the_middle_of_refresh_leaves_the_net_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(14)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    before = copy.deepcopy(net.state_dict())
    shifts = SpectralShifts.of(net)
    own = type(shifts.shifts[0]).refresh

    def interrupted(self: object) -> Tensor:
        if self is shifts.shifts[1]:
            raise KeyboardInterrupt
        return own(self)  # type: ignore[arg-type]

    monkeypatch.setattr(type(shifts.shifts[0]), "refresh", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shifts.refresh()
    shifts.remove()
    assert list(net.state_dict()) == list(before) and "forward" not in net[0].__dict__
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_single_vector_goes_through() -> None:
    torch.manual_seed(15)
    layer = nn.Linear(4, 5).double()
    x = torch.randn(4, dtype=torch.float64)
    shifts = SpectralShifts.of(layer)
    shifts.refresh()
    layer(x).pow(2).sum().backward()
    shifts.collect()
    with shifts.differentiable():
        right = torch.autograd.grad(layer(x).pow(2).sum(), [*shifts.deltas, layer.bias])
    torch.testing.assert_close([shifts.deltas[0].grad, layer.bias.grad], list(right))


def test_a_weight_is_there_once() -> None:
    """Neither refresh nor a step leaves a second weight behind; who reads the attribute finds W(delta) all the same."""
    torch.manual_seed(16)
    net = nn.Sequential(nn.Linear(300, 320), nn.Linear(320, 300)).requires_grad_(False)
    kinds = [type(m) for m in net]
    shifts = SpectralShifts.of(net, 4)
    with torch.no_grad():
        shifts.deltas[0].fill_(0.5)
    shifts.refresh()
    net(torch.randn(600, 300)).pow(2).sum().backward()
    shifts.collect()
    assert all(shift.value is None and not shift.held for shift in shifts.shifts)
    assert all(delta.grad is not None for delta in shifts.deltas)
    torch.testing.assert_close(net[0].weight, shifts.shifts[0].recompose().detach())
    assert net[0].weight.requires_grad and isinstance(net[0], nn.Linear) and "weight" not in net[0]._parameters
    net[0].weight.sum().backward()  # a use of the weight itself
    before = shifts.deltas[0].grad.clone()
    shifts.collect()
    pulled = shifts.shifts[0].pull(torch.ones(320, 300))
    torch.testing.assert_close(shifts.deltas[0].grad, before + pulled)
    shifts.remove()
    assert (
        [type(m) for m in net] == kinds
        and net[0].weight is shifts.weights[0]
        and not shifts.deltas[0].grad.isnan().any()
    )


def test_what_is_dear_to_make_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "prefers_dense", lambda *args: False)
    layer = nn.Linear(300, 320).requires_grad_(False)
    for rank, positions, kept in ((16, 2, False), (300, 600, True), (300, 2400, False)):
        shifts = SpectralShifts.of(layer, rank)
        shifts.refresh()
        layer(torch.randn(positions, 300)).sum().backward()
        shifts.remove()
        assert bool(shifts.shifts[0].held) == kept and shifts.shifts[0].value is None


@pytest.mark.parametrize("positions", [3, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_layers_of_any_precision(dtype: torch.dtype, positions: int) -> None:
    """Few positions and many, the two forms that need no second weight; bfloat16 weights, and autocast."""
    torch.manual_seed(17)
    width, stride = (300, 1) if positions == 3 else (30, 14)  # 21 positions of the convolution either way
    net = nn.Sequential(nn.Linear(300, 320), nn.Conv1d(positions, 230, width, stride, bias=False)).to(dtype)
    x = torch.randn(2, positions, 300, dtype=dtype)
    shifts = SpectralShifts.of(net, 8)
    with torch.no_grad():
        for delta in shifts.deltas:
            delta.uniform_(-0.2, 0.2)
    with shifts.differentiable():
        y = net(x)
        right = torch.autograd.grad(y.float().pow(2).sum(), shifts.deltas)
    for cast in (False, True) if dtype == torch.float32 else (False,):
        shifts.refresh()
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            found = net(x)
        found.float().pow(2).sum().backward()
        shifts.collect()
        close = 1e-4 if dtype == torch.float32 and not cast else 0.05
        assert (found - y).norm() < close * y.norm()
        for delta, expected in zip(shifts.deltas, right):
            assert (delta.grad - expected).norm() < close * expected.norm()
            delta.grad = None


def test_no_copy_while_shifted() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 2))
    shifts = SpectralShifts.of(model)
    shifts.refresh()
    with pytest.raises(ModelError, match="while its weights are shifted"):
        copy.deepcopy(model)
    shifts.remove()
    copy.deepcopy(model)


@pytest.mark.parametrize(
    "module",
    [
        nn.ConvTranspose2d(3, 4, 3, stride=1, dilation=2, output_padding=1),
        nn.ConvTranspose1d(3, 4, 3, stride=2, dilation=3, output_padding=2),
    ],
)
def test_more_output_padding_than_stride(module: nn.Module) -> None:
    module = module.double()
    x = torch.randn(2, *[3, 6, 6][: module.weight.dim() - 1], dtype=torch.float64)
    shifts = SpectralShifts.of(module)
    (delta,) = shifts.deltas
    with torch.no_grad():
        delta.normal_()
    shifts.refresh()
    y = module(x)
    upstream = torch.randn_like(y)
    (y * upstream).sum().backward()
    shifts.collect()
    with shifts.differentiable():
        (wanted,) = torch.autograd.grad((module(x) * upstream).sum(), delta)
    torch.testing.assert_close(delta.grad, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("groups", [1, 2])
def test_an_empty_batch(groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3, groups=groups), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Linear(16, 4))
    shifts = SpectralShifts.of(model)
    shifts.refresh()
    y = model(torch.randn(0, 16, 20, 20))
    assert y.shape == (0, 32, 16, 4)
    y.sum().backward()
    shifts.collect()
    assert all(d.grad is None or not d.grad.any() for d in shifts.deltas)
