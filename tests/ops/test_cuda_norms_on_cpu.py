"""The CUDA kernels of grad_norm_squared themselves, compiled for the CPU and run thread by thread, against float64.

See test_cuda_on_cpu.py for what that shows and what it does not.
"""

import ctypes

import pytest
import torch

from fastfip.ops.backends.cuda_operands import convolution, dense
from fastfip.ops.grad_norm_squared import cuda as launcher
from tests.ops.test_sum_grad_squared import CONVS, conv_problem
from tests.support.cuda_emulation import COMPILER, ROUNDING, close, compile_for_cpu, inside_nan, run_on_cpu

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def library():
    return compile_for_cpu("cuda_on_cpu")


@pytest.fixture(scope="module")
def paired():
    return compile_for_cpu("cuda_paired_on_cpu")


def definition(g, a):
    return torch.einsum("nto,nti->noi", g.double(), a.double()).square().sum((1, 2))


TILES = [(64, 64), (64, 32), (128, 64), (128, 64)]  # by type, as csrc/cuda/problem.h has them


def parts_of(library, sizes, axes, type_number):
    """How many numbers a sample the kernel leaves: one for each tile of G_n and each of its warps."""
    rows, columns = TILES[type_number]
    taps = axes[1][0] * axes[1][1] * axes[1][2]
    tiles = -(-sizes[2] // sizes[4] // rows) * -(-sizes[3] // sizes[4] * taps // columns)
    return tiles * sizes[4] * library.norm_warps(ctypes.c_int(type_number))


def direct(library, call, like, shares=1, order=0):
    """Return the norms by G_n and the loader that ran; parts begin as NaN."""
    samples, many = call.sizes[0], parts_of(library, call.sizes, call.axes, call.type)
    acc = torch.float64 if like.dtype == torch.float64 else torch.float32
    parts = torch.full((samples, many), float("nan"), dtype=acc)
    loader = run_on_cpu(library.grad_norm_squared_on_cpu, [*call, parts.data_ptr(), shares], order)
    return parts.sum(1), loader


SIZES = [(3, 2, 5, 7), (2, 40, 33, 70), (1, 33, 130, 68), (5, 17, 8, 24)]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("loader", ["rows", "windows"])
def test_matrices_by_their_gradients(library, size, dtype, loader):
    n, t, o, i = size
    g, a = (inside_nan(torch.randn(n, t, f), dtype, 16 if loader == "rows" else 17) for f in (o, i))
    for order, shares in [(0, 1), (3, n)]:
        norms, ran = direct(library, dense(*launcher.operands(g, a, False)), g, shares, order)
        assert ran == loader
        close(norms, definition(g, a), dtype)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize("frames", [1, 2])
def test_convolutions(library, case, dtype, frames):
    x, shape, weight, forward = conv_problem(case, 2 * frames)
    g = torch.randn_like(forward(x)).detach().to(dtype)
    x = x.to(dtype)
    pairs = zip(x.double().split(frames), g.double().split(frames))
    each = torch.stack([torch.autograd.grad(forward(xn), weight, gn)[0] for xn, gn in pairs])
    options = shape.kernel, shape.stride, shape.padding, shape.dilation, shape.groups, frames
    norms, _ = direct(library, convolution(g, x, *options), g, 2, 2)
    close(norms, each.flatten(1).square().sum(1), dtype)


def gram_norms(paired, g, a, shares=1, order=0):
    left, right = launcher.operands(g, a, True)
    call = dense(left, right)
    acc = torch.float64 if left.dtype == torch.float64 else torch.float32
    parts = torch.full((g.shape[0], shares * g.shape[1]), float("nan"), dtype=acc)
    run_on_cpu(paired.gram_norms_on_cpu, [*call, parts.data_ptr(), shares], order)
    return parts.sum(1)


GRAM_SIZES = [(1, 2, 1, 1), (3, 5, 7, 9), (2, 33, 70, 40), (1, 150, 24, 33), (2, 65, 8, 16)]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("size", GRAM_SIZES)
def test_matrices_by_their_gram_matrices(paired, size, dtype):
    n, t, o, i = size
    g, a = (inside_nan(torch.randn(n, t, f), dtype) for f in (o, i))
    rows = TILES[{torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}[dtype]][0]
    for order, shares in [(2, 1), (3, -(-t // rows))]:
        close(gram_norms(paired, g, a, shares, order), definition(g, a), dtype, times=2)


@pytest.mark.parametrize("gram", [False, True])
def test_strides_and_mixed_dtypes(library, paired, gram):
    g = torch.randn(9, 30, 50).permute(1, 2, 0)[::3, ::2, 1:]  # [10, 25, 8]
    a = torch.randn(25, 10, 12).transpose(0, 1)[..., ::2].bfloat16()
    if gram:
        norms = gram_norms(paired, g, a)
    else:
        left, right = launcher.operands(g, a, False)  # the call has their addresses only
        norms, loader = direct(library, dense(left, right), g)
        assert loader == "windows"
    close(norms, definition(g, a), torch.float32)


def test_the_gram_kernel_refuses_rows_that_are_not_aligned(paired):
    g = torch.randn(1, 3, 6)[..., :5]
    with pytest.raises(AssertionError, match="rows are not aligned|directions are not aligned"):
        run_on_cpu(paired.gram_norms_on_cpu, [*dense(g, g), torch.zeros(3).data_ptr(), 1], 0)
