"""The native kernels of grad_norm_squared by themselves: the tiles are those of sum_grad_squared, their use is not."""

import itertools

import pytest
import torch

from fastfip.ops.backends import native
from fastfip.ops.grad_norm_squared.native import grad_norm_squared, grad_norm_squared_conv
from tests.ops.test_native_sum_grad_squared import CONVS, ISAS, MODES, SIZES, conv_exact, conv_problem

pytestmark = pytest.mark.skipif(not native.available(), reason=f"native kernels: {native.reason()}")
TOLERANCES = {torch.float32: {"rtol": 2e-5, "atol": 2e-5}, torch.float64: {"rtol": 1e-12, "atol": 1e-12}}


def check(norms, product, each, dtype):
    assert norms.dtype == dtype
    torch.testing.assert_close(norms.double(), each.flatten(1).square().sum(1), **TOLERANCES[dtype])
    error = (product.double() - each).norm()
    assert error <= 32 * torch.finfo(dtype).eps * each.norm() and torch.isfinite(product).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [*SIZES, (700, 3, 40, 70)])
def test_every_instruction_set(isa, dtype, size, nan_empty):
    n, t, o, i = size
    g, a = torch.randn(n, t, o, dtype=dtype), torch.randn(n, t, i, dtype=dtype)
    product = torch.empty(n, o, i, dtype=dtype) if t else torch.zeros(n, o, i, dtype=dtype)
    norms = grad_norm_squared(g, a, product, isa=isa)
    check(norms, product, torch.einsum("nto,nti->noi", g.double(), a.double()), dtype)
    assert torch.equal(grad_norm_squared(g, a, isa=isa), norms)
    again = torch.full_like(product, float("nan")) if t else torch.zeros_like(product)
    torch.testing.assert_close(grad_norm_squared(g, a, again, isa=isa, threads=3), norms)
    assert torch.equal(again, product)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CONVS)
def test_convolutions(isa, case, nan_empty):
    c, o, kernel, stride, padding, dilation, groups, _ = case
    for mode, dtype, frames in itertools.product(MODES, (torch.float32, torch.float64), (1, 2)):
        if frames == 2 and len(kernel) == 3:
            continue
        g, x = conv_problem(case, 2 * frames, dtype)
        options = kernel, stride, padding, dilation, groups, mode
        each = torch.stack(
            [conv_exact(gn, xn, *options, frames)[1] for gn, xn in zip(g.split(frames), x.split(frames))]
        )
        product = torch.empty(2, o, c // groups, *kernel, dtype=dtype)
        norms = grad_norm_squared_conv(g, x, product, *options, frames=frames, isa=isa)
        check(norms, product, each, dtype)
        alone = grad_norm_squared_conv(g, x, None, *options, frames=frames, isa=isa, threads=3)
        torch.testing.assert_close(alone, norms)


@pytest.mark.parametrize("isa", ISAS)
def test_strides_and_half_precision(isa):
    g = torch.randn(9, 30, 50).permute(1, 2, 0)[::3, ::2, 1:].bfloat16()  # [10, 25, 8]
    a = torch.randn(25, 10, 40).transpose(0, 1)[..., ::2].half()  # [10, 25, 20]
    product = torch.empty(10, 8, 20)
    norms = grad_norm_squared(g, a, product, isa=isa)
    check(norms, product, torch.einsum("nto,nti->noi", g.double(), a.double()), torch.float32)


def test_numbers_do_not_depend_on_the_run():
    g, a = torch.randn(6, 40, 130), torch.randn(6, 40, 170)
    for threads in (1, 2, 5):
        one, two = (grad_norm_squared(g, a, threads=threads) for _ in range(2))
        assert torch.equal(one, two)
