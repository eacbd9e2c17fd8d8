"""What the CUDA kernels of grad_norm_squared must do on a GPU (`make gpu`)."""

import pytest
import torch

from fastfip.ops import grad_norm_squared, grad_norm_squared_conv
from fastfip.ops.grad_norm_squared.gram import prefers_gram
from tests.ops.test_cuda_norms_on_cpu import definition
from tests.ops.test_sum_grad_squared import CONVS, conv_problem
from tests.support.cuda_device import DTYPES, HERE, close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(HERE), reason=HERE)]
SIZES = [
    (3, 2, 5, 7),
    (7, 197, 64, 40),
    (5, 31, 128, 64),
    (4, 150, 768, 512),
    (300, 3, 200, 72),
    (3, 1, 8, 9),
    (0, 3, 4, 5),
    (3, 0, 4, 5),
]


def test_both_ways_are_among_the_sizes():
    assert {prefers_gram(*size[1:]) for size in SIZES} == {False, True}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_definition(size, dtype, nan_empty):
    n, t, o, i = size
    g, a = (torch.randn(n, t, features, device="cuda").to(dtype) for features in (o, i))
    got = grad_norm_squared(g, a, backend="cuda")
    close(got, definition(g, a), 1e-5)
    assert torch.equal(got, grad_norm_squared(g, a, backend="cuda"))  # no atomics


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CONVS, (8, 16, (3, 3), (1, 1), (1, 1), (1, 1), 1, (14, 14))])
@pytest.mark.parametrize("frames", [1, 2])
def test_convolutions(case, frames, dtype, nan_empty):
    x, shape, _, forward = conv_problem(case, 3 * frames)
    g, x = torch.randn_like(forward(x)).detach().cuda().to(dtype), x.cuda().to(dtype)
    want = grad_norm_squared_conv(g.double(), x.double(), shape, samples=3, backend="reference")
    close(grad_norm_squared_conv(g, x, shape, samples=3, backend="cuda"), want, 1e-5)


@pytest.mark.parametrize("size", [(2, 3, 4, 5), (2, 3, 9, 8)])
def test_derivatives(size):
    n, t, o, i = size
    g, a = (torch.randn(n, t, f, device="cuda", dtype=torch.float64, requires_grad=True) for f in (o, i))
    assert torch.autograd.gradcheck(lambda *x: grad_norm_squared(*x, backend="cuda"), (g, a))
    assert torch.autograd.gradgradcheck(lambda *x: grad_norm_squared(*x, backend="cuda"), (g, a))


def test_derivatives_of_a_convolution():
    x, shape, _, forward = conv_problem(CONVS[0], 2)
    g = torch.randn_like(forward(x)).detach().cuda().requires_grad_()
    x = x.detach().cuda().requires_grad_()
    assert torch.autograd.gradcheck(lambda *y: grad_norm_squared_conv(*y, shape, backend="cuda"), (g, x))
