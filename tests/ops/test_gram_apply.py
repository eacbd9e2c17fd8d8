"""gram_apply against its definition, in either order of the products, and as torch sees it."""

import sys
import warnings

import pytest
import torch
import torch._dynamo.testing
from torch.autograd import gradcheck, gradgradcheck

from fastfip.ops import OPS
from fastfip.ops.grad_norm_squared.op import grad_norm_squared
from fastfip.ops.gram_apply.op import gram_apply, prefers_gram
from tests.support.opchecks import registered

X3 = torch.zeros(1, 1, 1)
BACKENDS = [b.name for b in OPS["gram_apply"].backends if b.automatic and not b.refuses(X3, X3, X3)]
GRAM, OTHER = (3, 2, 3, 9, 8), (3, 9, 8, 2, 3)
SIZES = [
    GRAM,
    OTHER,
    (1, 1, 1, 1, 1),
    (2, 1, 5, 3, 7),
    (2, 5, 1, 7, 3),
    (3, 17, 13, 11, 19),
    (0, 2, 3, 4, 5),
    (2, 3, 0, 4, 5),
]


def operands(n, t, u, d, e, dtype=torch.float64, grad=True):
    return [torch.randn(n, *s, dtype=dtype).requires_grad_(grad) for s in ((t, d), (u, d), (u, e))]


def definition(q, k, v):
    return torch.einsum("ntd,nud,nue->nte", q, k, v)


@pytest.fixture(params=[1, 1 << 20], ids="chunk{}".format)
def chunk(request, monkeypatch):
    monkeypatch.setattr(sys.modules["fastfip.ops.gram_apply.op"], "CHUNK", request.param)


def test_both_orders_are_among_the_sizes():
    assert prefers_gram(*GRAM[1:]) and not prefers_gram(*OTHER[1:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
def test_definition_and_gradient(backend, size, chunk, nan_empty):
    inputs = operands(*size)
    got, want = gram_apply(*inputs, backend=backend), definition(*inputs)
    torch.testing.assert_close(got, want)
    w = torch.randn_like(want)
    torch.testing.assert_close(torch.autograd.grad(got, inputs, w), torch.autograd.grad(want, inputs, w))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [GRAM, OTHER])
def test_derivatives_of_every_order(backend, size):
    inputs = operands(2, *size[1:])
    assert gradcheck(lambda *x: gram_apply(*x, backend=backend), inputs)
    assert gradgradcheck(lambda *x: gram_apply(*x, backend=backend), inputs, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    q = torch.randn(6, 9, 4, dtype=torch.float64)[:, ::2].transpose(0, 1)[:, 1:]  # [5, 5, 4]
    k = torch.randn(5, 4, 7, dtype=torch.float64).transpose(1, 2)
    v = torch.randn(5, 7, 6, dtype=torch.float64)[..., ::3]
    torch.testing.assert_close(gram_apply(q, k, v, backend=backend), definition(q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_summed_in_float32(backend, dtype):
    inputs = operands(2, 6, 5, 4, 3, dtype)
    out = gram_apply(*inputs, backend=backend)
    want = definition(*(x.detach().double() for x in inputs))
    assert out.dtype == dtype
    assert (out.double() - want).norm() <= 4 * torch.finfo(dtype).eps * want.norm()
    assert all(g.dtype == dtype for g in torch.autograd.grad(out.sum(), inputs))


def test_it_is_the_gradient_of_grad_norm_squared():
    g, a, _ = operands(3, 4, 4, 5, 5)
    a = a[..., :3]
    dg, da = torch.autograd.grad(grad_norm_squared(g, a).sum(), (g, a))
    torch.testing.assert_close(dg, 2 * gram_apply(a, a, g))
    torch.testing.assert_close(da, 2 * gram_apply(g, g, a))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
def test_opcheck(backend, size):
    operated = *operands(*size, grad=False), backend
    registered(torch.ops.fastfip.gram_apply.default, operated, traced=backend == BACKENDS[0])


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_compiles_to_one_graph_for_all_batch_sizes(backend):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(*x):
        return gram_apply(*x, backend=backend).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for n in (6, 7, 9):
        inputs = operands(n, 4, 5, 3, 2)
        got, want = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, loss))
        torch.testing.assert_close(got, want)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms(backend):
    inputs = operands(3, 4, 5, 3, 2, grad=False)

    def loss(*x):
        return gram_apply(*x, backend=backend).square().sum()

    own = [x.clone().requires_grad_() for x in inputs]
    want = torch.autograd.grad(loss(*own), own)
    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1, 2))(*inputs), want)
    qs = torch.randn(6, *inputs[0].shape, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = torch.vmap(loss, in_dims=(0, None, None))(qs, *inputs[1:])
        torch.testing.assert_close(got, torch.stack([loss(x, *inputs[1:]) for x in qs]))
        got = torch.vmap(torch.func.grad(loss), in_dims=(0, None, None))(qs, *inputs[1:])
        torch.testing.assert_close(got, torch.stack([torch.func.grad(loss)(x, *inputs[1:]) for x in qs]))
        got = torch.vmap(lambda k: gram_apply(inputs[0], k, inputs[2], backend=backend), in_dims=1)(
            torch.stack([inputs[1]] * 2, 1)
        )
        torch.testing.assert_close(got, torch.stack([gram_apply(*inputs)] * 2))


@pytest.mark.parametrize("change", [(0, (2, 4, 4)), (1, (2, 5, 4)), (2, (2, 6, 2)), (2, (2, 6))])
def test_shapes_that_do_not_fit(change):
    inputs = operands(2, 4, 5, 3, 2)
    inputs[change[0]] = torch.randn(change[1])
    with pytest.raises(ValueError, match="gram_apply needs"):
        gram_apply(*inputs)
