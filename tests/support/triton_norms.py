"""What the Triton kernels of grad_norm_squared and gram_apply must do: see triton_kernels.py, which is run likewise."""

import pytest
import torch

from fastfip.ops import grad_norm_squared, gram_apply
from fastfip.ops.backends.triton import interpreted
from fastfip.ops.grad_norm_squared.op import prefers_gram

assert interpreted() or torch.cuda.is_available(), "run with TRITON_INTERPRET=1 or on a machine with a GPU"
DEVICE = "cpu" if interpreted() else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 1, 1, 1), (3, 2, 5, 7), (2, 40, 33, 65), (2, 35, 90, 130), (2, 3, 1, 40), (0, 3, 4, 5), (3, 0, 4, 5)]


def close(got, want, eps=5e-7):
    assert torch.isfinite(got).all()
    assert (got.double() - want).norm() <= 4 * eps * want.norm()


def norms(g, a):
    return torch.einsum("nto,nti->noi", g.double(), a.double()).square().sum((1, 2))


def applied(q, k, v):
    return torch.einsum("ntd,nud,nue->nte", q.double(), k.double(), v.double())


def test_both_forms_are_among_the_sizes():
    assert {prefers_gram(*size[1:]) for size in SIZES if size[1] > 1} == {True, False}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_norms(size, dtype, nan_empty):
    n, t, o, i = size
    g, a = (torch.randn(n, t, size, device=DEVICE).to(dtype) for size in (o, i))
    close(grad_norm_squared(g, a, backend="triton"), norms(g, a))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size", [(1, 1, 1, 1, 1), (2, 3, 5, 7, 2), (2, 40, 33, 65, 70), (0, 2, 3, 4, 5), (2, 3, 0, 4, 5)]
)
def test_applied(size, dtype, nan_empty):
    n, t, u, d, e = size
    q, k, v = (torch.randn(n, *s, device=DEVICE).to(dtype) for s in ((t, d), (u, d), (u, e)))
    close(
        gram_apply(q, k, v, backend="triton"), applied(q, k, v), torch.finfo(dtype).eps if dtype.itemsize == 2 else 5e-7
    )


def test_strides_and_mixed_dtypes():
    g = torch.randn(9, 30, 50, device=DEVICE).permute(1, 2, 0)[::3, ::2, 1:]
    a = torch.randn(25, 10, 40, device=DEVICE).transpose(0, 1)[..., ::2].bfloat16()
    close(grad_norm_squared(g, a, backend="triton"), norms(g, a))
    close(gram_apply(g, g, a, backend="triton"), applied(g, g, a))


def test_derivatives():
    g, a = (torch.randn(3, 4, size, device=DEVICE, requires_grad=True) for size in (5, 2))
    for call in (grad_norm_squared, lambda g, a, backend: gram_apply(g, g, a, backend=backend)):
        for x, y in zip(
            torch.autograd.grad(call(g, a, backend="triton").sum(), (g, a)),
            torch.autograd.grad(call(g, a, backend="reference").sum(), (g, a)),
        ):
            close(x, y.double())
