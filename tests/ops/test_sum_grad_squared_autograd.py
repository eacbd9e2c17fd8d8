"""sum_grad_squared as torch sees it: derivatives, tracing, transforms, for every backend."""

import sys
import warnings

import pytest
import torch
import torch._dynamo.testing
from torch.autograd import gradcheck, gradgradcheck

from fastfip.ops import sum_grad_squared, sum_grad_squared_conv
from fastfip.ops.sum_grad_squared.op import sum_grad_squared_and_grad
from tests.ops.test_sum_grad_squared import BACKENDS, CONVS, close, conv_problem, definition
from tests.support.opchecks import registered

OP = torch.ops.fastfip.sum_grad_squared.default
BACKWARD = torch.ops.fastfip.sum_grad_squared_backward.default
SIZES = [(3, 4, 5, 2), (4, 1, 3, 2), (1, 3, 1, 1), (2, 0, 3, 2), (0, 3, 2, 2)]


def operands(n, t, o, i, dtype=torch.float64, grad=True):
    g, a = torch.randn(n, t, o, dtype=dtype), torch.randn(n, t, i, dtype=dtype)
    return g.requires_grad_(grad), a.requires_grad_(grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES[:3])
def test_first_and_second_derivatives(backend, size, monkeypatch):
    monkeypatch.setattr(sys.modules["fastfip.ops.sum_grad_squared.autograd"], "CHUNK", 1)  # samples one at a time
    inputs = operands(*size)
    for function in (sum_grad_squared, sum_grad_squared_and_grad):
        assert gradcheck(lambda g, a, f=function: f(g, a, backend=backend), inputs)
        assert gradgradcheck(lambda g, a, f=function: f(g, a, backend=backend), inputs, fast_mode=True)


@pytest.mark.parametrize("size", SIZES)
def test_backward_agrees_with_autograd_through_the_definition(size, nan_empty):
    g, a = operands(*size)
    for chosen in ((1.0, 0.0), (0.0, 1.0), (0.7, -2.0)):
        ours = [y.square().sum() * w for y, w in zip(sum_grad_squared_and_grad(g, a), chosen)]
        each = torch.einsum("nto,nti->noi", g, a)
        plain = [y.square().sum() * w for y, w in zip((each.square().sum(0), each.sum(0)), chosen)]
        for x, want in zip(torch.autograd.grad(sum(ours), (g, a)), torch.autograd.grad(sum(plain), (g, a))):
            close(x, want, torch.float64)


def test_third_derivative():
    g, a = operands(2, 3, 2, 2)

    def through_the_definition(g, a):
        return torch.einsum("nto,nti->noi", g, a).square().sum(0)

    thirds = []
    for function in (sum_grad_squared, through_the_definition):
        value = function(g, a).pow(2).sum()
        for _ in range(3):
            value = sum(x.pow(2).sum() for x in torch.autograd.grad(value, (g, a), create_graph=True))
        thirds.append(value.detach())
    close(thirds[0], thirds[1], torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("t", [1, 4])
def test_gradients_have_the_dtype_of_the_operands(dtype, t):
    g, a = operands(3, t, 4, 2, dtype)
    sum_grad_squared(g, a).sum().backward()
    wide = [x.detach().double().requires_grad_() for x in (g, a)]
    torch.einsum("nto,nti->noi", *wide).square().sum().backward()
    for x, y in zip((g, a), wide):
        assert x.grad.dtype == dtype
        assert (x.grad.double() - y.grad).norm() <= 4 * torch.finfo(dtype).eps * y.grad.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("gradient", [True, False])
def test_opcheck(backend, size, gradient):
    g, a = operands(*size, grad=False)
    first = backend == BACKENDS[0]
    registered(OP, (g, a, gradient, backend), traced=first)
    registered(OP, (g.float(), a.float().bfloat16(), gradient, backend), traced=first and size == SIZES[0])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("gradient", [True, False])
def test_opcheck_of_the_backward(size, gradient):
    g, a = operands(*size, grad=False)
    at_out = torch.randn(size[2], size[3], dtype=torch.float64)
    registered(BACKWARD, (g, a, at_out, at_out if gradient else None))


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_compiles_to_one_graph_for_all_batch_sizes(backend):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(g, a):
        out, grad = sum_grad_squared_and_grad(g, a, backend=backend)
        return out.sum() + grad.square().sum() + sum_grad_squared(2 * g, a, backend=backend).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for n in (6, 7, 9):
        g, a = operands(n, 4, 5, 3)
        want = torch.autograd.grad(loss(g, a), (g, a))
        for x, y in zip(torch.autograd.grad(compiled(g, a), (g, a)), want):
            close(x, y, torch.float64)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms(backend):
    g, a = operands(3, 4, 5, 2, grad=False)

    def loss(g, a):
        return sum_grad_squared(g, a, backend=backend).square().sum()

    ga = [x.clone().requires_grad_() for x in (g, a)]
    want = torch.autograd.grad(loss(*ga), ga)
    for x, y in zip(torch.func.grad(loss, argnums=(0, 1))(g, a), want):
        close(x, y, torch.float64)
    gs = torch.randn(6, 3, 4, 5, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = torch.vmap(loss, in_dims=(0, None))(gs, a)
        close(got, torch.stack([loss(x, a) for x in gs]), torch.float64)
        got = torch.vmap(torch.func.grad(loss), in_dims=(0, None))(gs, a)
        close(got, torch.stack([torch.func.grad(loss)(x, a) for x in gs]), torch.float64)
        got = torch.vmap(lambda x: sum_grad_squared(x, a, backend=backend), in_dims=1)(gs.transpose(0, 1))
        close(got, torch.stack([sum_grad_squared(x, a) for x in gs]), torch.float64)


def test_forward_mode_is_refused_and_not_zero():
    g, a = operands(2, 3, 2, 2, grad=False)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(sum_grad_squared, (g, a), (g, a))


@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize("frames", [1, 2])
def test_convolutions_are_differentiable(case, frames):
    x, shape, _, forward = conv_problem(case, 2 * frames)
    g = torch.randn_like(forward(x)).requires_grad_()
    x.requires_grad_()

    def value(g, x):
        return sum_grad_squared_conv(g, x, shape, samples=2)

    close(value(g, x).detach(), value(g.detach(), x.detach()), torch.float64)
    assert gradcheck(value, (g, x), fast_mode=True)
    assert gradgradcheck(value, (g, x), fast_mode=True)


def test_what_is_added_to_a_result_leaves_no_graph():
    g, a = operands(2, 3, 2, 2)
    out = sum_grad_squared(g, a, out=torch.zeros(2, 2, dtype=torch.float64))
    assert not out.requires_grad
    close(out, definition(g.detach(), a.detach())[0], torch.float64)
