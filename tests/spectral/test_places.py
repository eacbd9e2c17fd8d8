"""Weights that are no plain Linear or convolution weight are shifted as well: found, with the right gradient."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfip
from fastfip.spectral import SpectralShifts
from fastfip.spectral.places import may_be_map, seen_as_maps

N, T, D = 5, 4, 6


class Conv1D(nn.Module):
    """The Linear of GPT-2, its weight stored input first."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(nx, nf) / 3)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        size = x.size()[:-1] + (self.weight.size(1),)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class Experts(nn.Module):
    """A stack of experts, one matrix [out, in] for each."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, D, D) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + sum(F.linear(x, self.stack[e]).relu() for e in range(3))


class Batched(Experts):
    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(1, -1, D).expand(3, -1, -1)
        return x + torch.bmm(rows, self.stack).sum(0).view_as(x)


class Summed(Experts):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.einsum("nti,eio->nto", x, self.stack)


class Bare(nn.Module):
    """Parameters of its own, used as maps; and a position embedding, a scale and a table, which are none."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(D, D) / 3)
        self.v = nn.Parameter(torch.randn(D, D) / 3)
        self.kernel = nn.Parameter(torch.randn(D, D, 3) / 3)
        self.position = nn.Parameter(torch.randn(1, T, D) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x + self.position, self.w) @ self.v.t()
        return x + F.conv1d(x.transpose(1, 2), self.kernel, padding=1).transpose(1, 2)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], **options: int) -> None:
        super().__init__()
        self.rnn = kind(D, D, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Stepwise(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cell = kind(D, D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x[:, 0])
        h = h if isinstance(h, tuple) else (h,)
        again = self.cell(x[:, 1], h if len(h) > 1 else h[0])
        return (again[0] if isinstance(again, tuple) else again)[:, None]


def old(norm: str) -> nn.Module:
    layer = nn.Linear(D, D)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(nn.utils, norm)(layer)


def new(norm: str) -> nn.Module:
    return getattr(nn.utils.parametrizations, norm)(nn.Linear(D, D))


KINDS = {
    "gpt2": (lambda: Conv1D(D, D), {"weight": (1, D)}),
    "experts": (Experts, {"stack": (3, D)}),
    "bmm": (Batched, {"stack": (3, D)}),
    "einsum": (Summed, {"stack": (3, D)}),
    "bare": (Bare, {"w": (1, D), "v": (1, D), "kernel": (1, D)}),
    "lstm": (lambda: Recurrent(nn.LSTM), {"rnn.weight_ih_l0": (4, D), "rnn.weight_hh_l0": (4, D)}),
    "lstm_proj": (
        lambda: Recurrent(nn.LSTM, proj_size=3),
        {"rnn.weight_ih_l0": (4, D), "rnn.weight_hh_l0": (4, 3), "rnn.weight_hr_l0": (1, 3)},
    ),
    "gru": (lambda: Recurrent(nn.GRU), {"rnn.weight_ih_l0": (3, D), "rnn.weight_hh_l0": (3, D)}),
    "rnn": (lambda: Recurrent(nn.RNN), {"rnn.weight_ih_l0": (1, D), "rnn.weight_hh_l0": (1, D)}),
    "lstm_cell": (lambda: Stepwise(nn.LSTMCell), {"cell.weight_ih": (4, D), "cell.weight_hh": (4, D)}),
    "gru_cell": (lambda: Stepwise(nn.GRUCell), {"cell.weight_ih": (3, D), "cell.weight_hh": (3, D)}),
    "old_weight_norm": (lambda: old("weight_norm"), {"weight_v": (1, D)}),
    "old_spectral_norm": (lambda: old("spectral_norm"), {"weight_orig": (1, D)}),
    "weight_norm": (lambda: new("weight_norm"), {"parametrizations.weight.original1": (1, D)}),
    "spectral_norm": (lambda: new("spectral_norm"), {"parametrizations.weight.original": (1, D)}),
}


def found(net: nn.Module, x: Tensor) -> SpectralShifts:
    with torch.no_grad(), seen_as_maps(may_be_map(net)) as seen:
        net(x)
    return SpectralShifts.of(net, seen=seen)


@pytest.mark.parametrize("kind", KINDS)
def test_its_matrices_are_found_and_have_the_right_gradient(kind: str) -> None:
    torch.manual_seed(3)
    make, forms = KINDS[kind]
    net, x = make().double().eval(), torch.randn(N, T, D, dtype=torch.float64)
    own = copy.deepcopy(net.state_dict())
    shifts = found(net, x)
    assert {s.names[0]: tuple(s.delta.shape) for s in shifts.shifts} == forms
    with torch.no_grad():
        received = net(x)
        for delta in shifts.deltas:
            delta.add_(0.05 * torch.randn_like(delta))
    with shifts.differentiable():
        right = net(x)
        expected = torch.autograd.grad(right.pow(2).sum(), shifts.deltas)
    shifts.refresh()
    shifted = net(x)
    shifted.pow(2).sum().backward()
    shifts.collect()
    torch.testing.assert_close(shifted, right)
    torch.testing.assert_close([d.grad for d in shifts.deltas], list(expected))
    assert all(float(g.norm()) > 0 for g in expected)
    shifts.remove()
    with torch.no_grad():
        torch.testing.assert_close(net(x), received)
        shifts.fold()
        torch.testing.assert_close(net(x), right)
    assert list(net.state_dict()) == list(own)


def test_what_is_no_map_is_left_alone_with_a_reason() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bare, self.head = Bare(), nn.Linear(D, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.bare(x).mean(1))

    torch.manual_seed(0)
    clean = torch.randn(24, T, D), torch.arange(24) % 3
    coverage = fastfip.purify(Net(), clean, "fast_wfip", steps=3, progress=False).coverage
    assert set(coverage.left) == {"bare.position"} and "no linear map" in coverage.left["bare.position"]
    coverage = fastfip.purify(Net(), clean, "fast_fip", steps=3, progress=False).coverage
    assert coverage.left["head.bias"] == "biases and the affine of norm layers only with affine=True"
    assert {"bare.w", "bare.v", "bare.kernel", "head.weight"} == set(coverage.tuned)


@pytest.mark.parametrize("method", ["fast_wfip", "fast_fip"])
@pytest.mark.parametrize("kind", ["gpt2", "experts", "lstm", "gru", "old_weight_norm", "weight_norm", "spectral_norm"])
def test_a_purification_moves_it_and_takes_everything_back(kind: str, method: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = KINDS[kind][0](), nn.Linear(D, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(x)).mean(1))

    torch.manual_seed(0)
    net = Net()
    result = fastfip.purify(net, (torch.randn(24, T, D), torch.arange(24) % 3), method, steps=3, progress=False)
    assert {f"body.{name}" for name in KINDS[kind][1]} <= set(result.coverage.tuned)
    assert list(result.state_dict()) == list(net.state_dict())
    x = torch.randn(2, T, D)
    twin = Net()
    twin.load_state_dict(result.state_dict())
    torch.testing.assert_close(twin.eval()(x), result.model.eval()(x))


def test_a_weight_that_is_zero_is_said_to_have_no_directions() -> None:
    net = nn.Sequential(nn.Linear(D, D), nn.Linear(D, 3))
    nn.init.zeros_(net[1].weight)
    clean = torch.randn(24, D), torch.arange(24) % 3
    coverage = fastfip.purify(net, clean, "fast_wfip", steps=3, progress=False).coverage
    assert "so are its singular values" in coverage.left["1.weight"]
