"""grad_norm_squared against its definition and its derivatives, dense and convolution, direct and Gram."""

import sys

import pytest
import torch

from fastfip.ops.grad_norm_squared import grad_norm_squared, grad_norm_squared_conv, prefers_gram
from fastfip.ops.registry import OPS
from tests.ops.test_sum_grad_squared import CONVS, SIZES, close, conv_problem

BACKENDS = [b.name for b in OPS["grad_norm_squared"].backends]
BACKENDS_CONV = [b.name for b in OPS["grad_norm_squared_conv"].backends]
GRAM, DIRECT = (3, 2, 9, 8), (3, 9, 2, 3)


@pytest.fixture(params=[1, 64, 1 << 20], ids="chunk{}".format)
def chunk(request, monkeypatch):
    monkeypatch.setattr(sys.modules["fastfip.ops.grad_norm_squared"], "CHUNK", request.param)


def definition(g, a):
    return torch.stack([(x.t() @ y).square().sum() for x, y in zip(g, a)]) if len(g) else g.new_zeros(0)


def test_both_forms_are_among_the_sizes():
    assert prefers_gram(*GRAM[1:]) and not prefers_gram(*DIRECT[1:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [*SIZES, GRAM, DIRECT])
def test_definition_and_gradient(backend, size, chunk, nan_empty):
    n, t, o, i = size
    g = torch.randn(n, t, o, dtype=torch.float64, requires_grad=True)
    a = torch.randn(n, t, i, dtype=torch.float64, requires_grad=True)
    v = torch.randn(n, dtype=torch.float64)
    got, want = grad_norm_squared(g, a, backend=backend), definition(g, a)
    close(got, want.detach(), torch.float64)
    if n:
        for x, y in zip(torch.autograd.grad(got @ v, (g, a)), torch.autograd.grad(want @ v, (g, a))):
            close(x, y, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [GRAM, DIRECT, (3, 1, 2, 4)])
def test_derivatives_of_every_order(backend, size):
    n, t, o, i = size
    g, a = torch.randn(n, t, o, dtype=torch.float64), torch.randn(n, t, i, dtype=torch.float64)
    inputs = (g.requires_grad_(), a.requires_grad_())

    def op(g, a):
        return grad_norm_squared(g, a, backend=backend)

    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradgradcheck(op, inputs)


@pytest.mark.parametrize("backend", BACKENDS_CONV)
@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize("frames", [1, 2])
def test_convolution_and_gradient(backend, case, frames, chunk):
    x, shape, weight, forward = conv_problem(case, 3 * frames)
    x.requires_grad_()
    g = torch.randn_like(forward(x)).requires_grad_()
    v = torch.randn(3, dtype=torch.float64)
    each = [
        torch.autograd.grad(forward(xn), weight, gn, create_graph=True)[0].square().sum()
        for xn, gn in zip(x.split(frames), g.split(frames))
    ]
    want, got = torch.stack(each), grad_norm_squared_conv(g, x, shape, samples=3, backend=backend)
    close(got, want.detach(), torch.float64)
    for p, q in zip(torch.autograd.grad(got @ v, (g, x)), torch.autograd.grad(want @ v, (g, x))):
        close(p, q, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS_CONV)
@pytest.mark.parametrize("frames", [1, 2])
def test_convolution_derivatives_of_every_order(backend, frames):
    x, shape, _, forward = conv_problem((2, 4, (2, 2), (2, 1), (1, 0), (1, 1), 2, (3, 3)), 2 * frames)
    g = torch.randn_like(forward(x)).detach()
    inputs = (g.requires_grad_(), x.requires_grad_())

    def op(g, x):
        return grad_norm_squared_conv(g, x, shape, samples=2, backend=backend)

    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradgradcheck(op, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(backend, dtype):
    g, a = (torch.randn(4, 5, 3) * 1e-3).to(dtype), torch.randn(4, 5, 6).to(dtype)
    out = grad_norm_squared(g.requires_grad_(), a.requires_grad_(), backend=backend)
    assert out.dtype == torch.float32
    close(out.detach(), definition(g.double(), a.double()).detach(), dtype)
    assert torch.autograd.grad(out.sum(), g)[0].dtype == dtype


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError):
        grad_norm_squared(torch.randn(2, 3, 4), torch.randn(3, 3, 4))
