"""What Triton kernels must do: interpreted (by test_triton.py, in a process of its own, since the interpreter is chosen
at import), or on a GPU (`make gpu`).
"""

import pytest
import torch

from fastfip.ops import sum_grad_squared, sum_grad_squared_conv
from fastfip.ops.backends.triton import interpreted
from fastfip.ops.sum_grad_squared.op import sum_grad_squared_and_grad
from tests.ops.test_sum_grad_squared import CONVS, conv_problem, definition

assert interpreted() or torch.cuda.is_available(), "run with TRITON_INTERPRET=1 or on a machine with a GPU"
DEVICE = "cpu" if interpreted() else "cuda"
SIZES = [(1, 1, 1, 1), (3, 2, 5, 7), (2, 40, 33, 65), (5, 17, 70, 130), (9, 3, 1, 40), (0, 3, 4, 5), (3, 0, 4, 5)]


def close(got, want):
    assert torch.isfinite(got).all()
    assert (got.double() - want).norm() <= 2e-6 * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_definition(size, dtype, nan_empty):
    n, t, o, i = size
    g, a = (torch.randn(n, t, size, device=DEVICE).to(dtype) for size in (o, i))
    out, grad = sum_grad_squared_and_grad(g, a, backend="triton")
    squares, total = definition(g, a)
    close(out, squares)
    close(grad, total)
    close(sum_grad_squared(g, a, out=torch.ones(o, i, device=DEVICE), backend="triton"), squares + 1)


def test_strides_and_mixed_dtypes():
    g = torch.randn(9, 30, 50, device=DEVICE).permute(1, 2, 0)[::3, ::2, 1:]
    a = torch.randn(25, 10, 40, device=DEVICE).transpose(0, 1)[..., ::2].bfloat16()
    close(sum_grad_squared(g, a, backend="triton"), definition(g, a)[0])


@pytest.mark.parametrize("case", CONVS)
def test_convolutions(case, nan_empty):
    x, shape, weight, forward = conv_problem(case, 3, torch.float32)
    g, x = torch.randn_like(forward(x)).detach().to(DEVICE), x.to(DEVICE)
    grad = torch.zeros_like(weight).detach().to(DEVICE)
    out = sum_grad_squared_conv(g, x, shape, grad=grad, backend="triton")
    wide = torch.zeros_like(grad).double()
    close(out, sum_grad_squared_conv(g.double(), x.double(), shape, grad=wide, backend="reference"))
    close(grad, wide)


def test_derivatives():
    g, a = (torch.randn(3, 4, size, device=DEVICE, requires_grad=True) for size in (5, 2))
    for x, y in zip(
        torch.autograd.grad(sum_grad_squared(g, a, backend="triton").sum(), (g, a)),
        torch.autograd.grad(sum_grad_squared(g, a, backend="reference").sum(), (g, a)),
    ):
        close(x, y.double())
