"""The derivative that the length of a step is made of, and steps that are nothing but rounding."""

import pytest
import torch
from torch import nn

from fastfip.methods import _relative
from fastfip.methods._relative import RelativeSGD


class Odd(torch.autograd.Function):
    """An operation without a forward mode."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class Held(nn.Module):
    """A module that keeps its weight in a second place, as recurrent layers do: one put in the first is not seen."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3) + 0.1)
        self.again = [self.weight]

    def forward(self, x):
        return x @ self.again[0] + 0 * self.weight.sum()


def found(net, outputs, share=1e-3):
    tensors = list(net.parameters())
    step = [torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) * 0.1 for t in tensors]
    _relative._TRUSTED.clear()
    with torch.no_grad():
        twice = [_relative._derivative(net, tensors, step, share, outputs)[1] for _ in range(2)]
    torch.testing.assert_close(twice[0], twice[1])
    wide = [t.detach().double().requires_grad_(True) for t in tensors]
    return twice[0], wide, step


def test_the_derivative_of_a_net_with_batch_statistics_is_exact():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(7, 3)
    u, wide, step = found(net, lambda: net(x))
    net64 = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)).double()
    names = [name for name, _ in net64.named_parameters()]

    def function(*values):
        return torch.func.functional_call(net64, dict(zip(names, values)), x.double())

    with torch.no_grad():
        for p, value in zip(net64.parameters(), wide):
            p.copy_(value)
    want = torch.autograd.functional.jvp(function, tuple(wide), tuple(d.double() for d in step))[1]
    assert float((u - want).norm() / want.norm()) < 1e-5
    assert _relative._TRUSTED[net]


@pytest.mark.parametrize("net", [nn.Linear(3, 3), Held()], ids=["no forward mode", "a weight in two places"])
def test_a_difference_quotient_stands_in_where_the_forward_mode_is_missing_or_wrong(net):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))

    def outputs():
        return Odd.apply(net(x)) if isinstance(net, nn.Linear) else net(x)

    u, _, step = found(net, outputs)
    want = 2 * (x @ step[0].T + step[1]) if isinstance(net, nn.Linear) else x @ step[0]
    assert float((u - want).norm() / want.norm()) < 1e-2
    assert not _relative._TRUSTED[net]


def test_a_tensor_whose_gradient_is_rounding_stays():
    weight, bias = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))
    before = bias.detach().clone()
    optimizer = RelativeSGD([weight, bias], 0.1, 0.9)
    for scale in (1e-7, 1e-6):
        weight.grad, bias.grad = torch.ones(3, 3), torch.full((3,), scale)
        optimizer.step()
        assert torch.equal(bias, before)
    assert not torch.equal(weight, torch.ones(3, 3))
    bias.grad = torch.full((3,), 1e-3)
    optimizer.step()
    assert not torch.equal(bias, before)
