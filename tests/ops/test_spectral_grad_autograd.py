"""spectral_grad as torch sees it: derivatives, tracing, transforms, for every backend."""

import warnings

import pytest
import torch
import torch._dynamo.testing
from torch.autograd import gradcheck, gradgradcheck

from fastfip.ops import spectral_grad, spectral_sum_grad_squared
from tests.ops.test_spectral_grad import BACKENDS, CONVS, KNOWN, close, conv_problem, definition, problem
from tests.support.opchecks import registered

OP = torch.ops.fastfip.spectral_grad.default
SIZES = [(3, 4, 5, 2, 3), (4, 1, 3, 2, 2), (1, 3, 1, 1, 1)]


def tracked(operands):
    return [t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in operands]


def among(operands, call):
    """`call` as a function of the operands that are tensors."""
    where = [k for k, t in enumerate(operands) if isinstance(t, torch.Tensor)]

    def function(*tensors):
        given = list(operands)
        for k, t in zip(where, tensors):
            given[k] = t
        return call(*given)

    return function, [operands[k] for k in where]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize("size", SIZES)
def test_first_and_second_derivatives(backend, known, size):
    operands = tracked(problem(size, known))
    for call in (
        lambda *t: spectral_grad(*t, per_sample=True, backend=backend),
        lambda *t: spectral_grad(*t, backend=backend),
        lambda *t: spectral_sum_grad_squared(*t, backend=backend),
    ):
        function, tensors = among(operands, call)
        assert gradcheck(function, tensors)
        assert gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize("case", CONVS[:7])
def test_derivatives_of_convolutions(known, case):
    operands = tracked(conv_problem(case, 2, known)[0])
    function, tensors = among(operands, lambda *t: spectral_grad(*t, per_sample=True))
    assert gradcheck(function, tensors, fast_mode=True)
    assert gradgradcheck(function, tensors, fast_mode=True)


def test_third_derivative():
    g, x, u, v = tracked(problem((2, 3, 2, 2, 2)))
    thirds = []
    for function in (spectral_sum_grad_squared, lambda *t: definition(*t).square().sum(0)):
        value = function(g, x, u, v).pow(2).sum()
        for _ in range(3):
            value = sum(t.pow(2).sum() for t in torch.autograd.grad(value, (g, x, u, v), create_graph=True))
        thirds.append(value.detach())
    close(thirds[0], thirds[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_have_the_dtype_of_the_operands(dtype):
    operands = tracked(problem((3, 4, 5, 2, 3), "", dtype))
    spectral_grad(*operands).sum().backward()
    wide = [t.detach().double().requires_grad_() for t in operands]
    definition(*wide).sum().backward()
    for t, y in zip(operands, wide):
        assert t.grad.dtype == dtype
        assert (t.grad.double() - y.grad).norm() <= 4 * torch.finfo(dtype).eps * y.grad.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("known", KNOWN)
def test_opcheck(backend, known):
    none, first = ([], [], [], [], 1), backend == BACKENDS[0]
    for size in [*SIZES, (2, 0, 3, 2, 2), (0, 3, 2, 2, 2)]:
        operands = problem(size, known)
        registered(OP, (*operands, *none, backend), traced=first)
        mixed = operands[0].float(), operands[1].bfloat16(), *operands[2:], *none, backend
        registered(OP, mixed, traced=first and size == SIZES[0])
    for case in CONVS[:3]:
        (*operands, shape), _ = conv_problem(case, 2, known)
        options = shape.kernel, shape.stride, shape.padding, shape.dilation
        registered(OP, (*operands, *map(list, options), shape.groups, backend), traced=first)


def graphs(loss, make, sizes):
    """How many graphs torch makes of a loss whose gradients agree with its own for every batch size."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for n in sizes:
        operands = make(n)
        want = torch.autograd.grad(loss(*operands), operands)
        for t, y in zip(torch.autograd.grad(compiled(*operands), operands), want):
            close(t, y)
    return counter.frame_count


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_compiles_to_one_graph_for_all_batch_sizes(backend):
    def loss(g, x, u, v):
        each = spectral_grad(g, x, u, v, per_sample=True, backend=backend)
        return each.square().sum() + spectral_grad(2 * g, x @ v[0], u, backend=backend).sum()

    assert graphs(loss, lambda n: tracked(problem((n, 4, 5, 3, 2))), (6, 7, 9)) == 1


def test_convolutions_compile_to_one_graph_for_all_batch_sizes():
    """With one backend: the graph has its name, and the test above has compiled each of them."""
    shape = conv_problem(CONVS[1], 1)[0][-1]

    def loss(g, x, u, v):
        return spectral_sum_grad_squared(g, x, u, v, shape).sum()

    assert graphs(loss, lambda n: tracked(conv_problem(CONVS[1], n)[0][:4]), (11, 13, 17)) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms(backend):
    g, x, u, v = operands = problem((3, 4, 5, 2, 3))

    def loss(g, x, u, v):
        return spectral_sum_grad_squared(g, x, u, v, backend=backend).square().sum()

    tensors = [t.clone().requires_grad_() for t in operands]
    want = torch.autograd.grad(loss(*tensors), tensors)
    for t, y in zip(torch.func.grad(loss, argnums=(0, 1, 2, 3))(*operands), want):
        close(t, y)
    gs, us = torch.randn(6, 3, 4, 5, dtype=torch.float64), torch.randn(6, 1, 5, 3, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for function in (loss, torch.func.grad(loss)):
            got = torch.vmap(function, in_dims=(0, None, None, None))(gs, x, u, v)
            close(got, torch.stack([function(y, x, u, v) for y in gs]))
            got = torch.vmap(function, in_dims=(None, None, 0, None))(g, x, us, v)
            close(got, torch.stack([function(g, x, y, v) for y in us]))
        got = torch.vmap(lambda y: spectral_grad(y, x, u, v, per_sample=True, backend=backend), in_dims=1)(
            gs.transpose(0, 1)
        )
        close(got, torch.stack([definition(y, x, u, v) for y in gs]))


def test_forward_mode_is_refused_and_not_zero():
    operands = tuple(problem((2, 3, 2, 2, 2)))
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(spectral_grad, operands, operands)
