"""The stand-ins with a cheap double backward: values and derivatives of every order are those of torch's own layers."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from fastfip.fisher.second_order import CheapSecondOrder
from fastfip.fisher.trace import trace_and_logits
from fastfip.testing.definitions import loop_trace

CASES = {
    "padded": (F.conv2d, (2, 3, 5, 4), (4, 3, 3, 3), {"padding": 1}),
    "stride": (F.conv2d, (2, 3, 6, 5), (4, 3, 3, 2), {"stride": (2, 1), "padding": (0, 1)}),
    "groups": (F.conv2d, (2, 4, 5, 5), (6, 2, 3, 3), {"groups": 2, "dilation": 2, "padding": 2}),
    "line": (F.conv1d, (2, 2, 7), (3, 2, 3), {"stride": 2}),
    "solid": (F.conv3d, (1, 2, 3, 3, 3), (2, 2, 2, 2, 2), {}),
}


def wide(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_convolutions(case, bias):
    function, x, w, options = CASES[case]
    inputs = [wide(*x), wide(*w), *([wide(w[0])] if bias else [])]

    def stand_in(*inputs):
        with CheapSecondOrder():
            z = function(*inputs, **options)
        assert z.grad_fn.name() == "_SecondOrderConvolutionBackward"
        return z

    torch.testing.assert_close(stand_in(*inputs), function(*inputs, **options))
    assert gradcheck(stand_in, inputs)
    assert gradgradcheck(stand_in, inputs)


@pytest.mark.parametrize("affine", ["both", "weight", "none"])
@pytest.mark.parametrize("shape", [(3, 2, 4, 3), (5, 2), (2, 2, 3)])
def test_batch_norm(shape, affine):
    mean, var = torch.randn(2, dtype=torch.float64), torch.rand(2, dtype=torch.float64) + 0.5
    inputs = [wide(*shape), *[wide(2) for _ in range({"both": 2, "weight": 1, "none": 0}[affine])]]

    def stand_in(x, *rest):
        with CheapSecondOrder():
            z = F.batch_norm(x, mean, var, *rest)
        assert z.grad_fn.name() == "_SecondOrderNormBackward"
        return z

    torch.testing.assert_close(stand_in(*inputs), F.batch_norm(inputs[0], mean, var, *inputs[1:]))
    assert gradcheck(stand_in, inputs)
    assert gradgradcheck(stand_in, inputs)


@pytest.mark.parametrize("chunk", [5, 1 << 14])
def test_gelu(chunk, monkeypatch, nan_empty):
    monkeypatch.setattr("fastfip.fisher.second_order._CHUNK", chunk)
    x = (3 * torch.randn(3, 2, 4, dtype=torch.float64)).transpose(0, 2).requires_grad_()

    def stand_in(x):
        with CheapSecondOrder():
            z = F.gelu(x)
        assert z.grad_fn.name() == "_SecondOrderGeluBackward"
        return z

    torch.testing.assert_close(stand_in(x), F.gelu(x))
    assert gradcheck(stand_in, x)
    assert gradgradcheck(stand_in, x)
    thirds = []
    for function in (stand_in, F.gelu):
        value = function(x).square().sum()
        for _ in range(3):
            value = torch.autograd.grad(value, x, create_graph=True)[0].square().sum()
        thirds.append(value.detach())
    torch.testing.assert_close(*thirds)


def test_what_does_not_apply_is_left_to_torch():
    x, w = wide(2, 3, 5, 4), wide(4, 3, 3, 3)
    with CheapSecondOrder():
        assert "_SecondOrder" not in F.gelu(x, approximate="tanh").grad_fn.name()
        assert "_SecondOrder" not in F.conv2d(x, w, padding="same").grad_fn.name()
        assert (
            "_SecondOrder"
            not in F.batch_norm(x, torch.zeros(3).double(), torch.ones(3).double(), training=True).grad_fn.name()
        )
        with torch.no_grad():
            assert F.conv2d(x, w).grad_fn is None


def test_weight_gradients_that_nobody_wants_are_not_computed(monkeypatch):
    asked = []
    backward = torch.ops.aten.convolution_backward
    monkeypatch.setattr(torch.ops.aten, "convolution_backward", lambda *a: asked.append(a[-1]) or backward(*a))
    x, w = wide(2, 3, 5, 4), wide(4, 3, 3, 3)
    with CheapSecondOrder():
        z = F.conv2d(x * 1, w)
    torch.autograd.grad(z.sum(), x, create_graph=True)
    assert asked == [[True, False, False]]
    z.sum().backward()
    assert asked[1:] == [[True, True, False]] and w.grad is not None


def test_a_net_whose_loss_and_trace_are_differentiated_together():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3, padding=1), torch.nn.BatchNorm2d(3), torch.nn.GELU(),
        torch.nn.Conv2d(3, 4, 3, stride=2), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(16, 3),
    ).double().eval()  # fmt: skip
    x, y = torch.randn(3, 2, 5, 5, dtype=torch.float64), torch.tensor([0, 1, 2])
    found = trace_and_logits(model, (x, y))
    (found.losses.mean() + found.trace).backward()
    got = [p.grad for p in model.parameters()]
    own = F.cross_entropy(model(x), y) + loop_trace(model, (x, y), 3)
    for one, want in zip(got, torch.autograd.grad(own, list(model.parameters()))):
        torch.testing.assert_close(one, want)
