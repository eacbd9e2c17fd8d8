"""The CUDA kernels themselves, compiled for the CPU and run thread by thread (cuda_on_cpu.h), against float64.

It checks what addresses, masks, layouts and the order of copies and barriers compute; not what a GPU's speed or memory
model does to it.
"""

import ctypes
import itertools

import pytest
import torch

from fastfip.ops.backends.cuda_operands import convolution, dense
from tests.ops.test_sum_grad_squared import CONVS, conv_problem, definition
from tests.support.cuda_emulation import COMPILER, ROUNDING, close, compile_for_cpu, inside_nan, run_on_cpu

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def library():
    library = compile_for_cpu("cuda_on_cpu")
    library.cuda_shares.restype = ctypes.c_int64
    return library


def run(library, call, out, grad=None, shares=1, order=0):
    """Run the kernel; the workspace begins as NaN. Returns the loader that ran."""
    room = torch.full((2 * shares * out.numel(),), float("nan"), dtype=out.dtype)
    results = [out.data_ptr(), 0 if grad is None else grad.data_ptr(), room.data_ptr(), shares]
    return run_on_cpu(library.cuda_on_cpu, [*call, *results], order)


def results(size, dtype):
    """Two results that are not zero at the start: kernels add."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.ones(size, dtype=acc), torch.full(size, 2.0, dtype=acc)


SIZES = [(1, 1, 1, 1), (3, 2, 5, 7), (2, 40, 33, 70), (4, 33, 130, 68), (5, 17, 8, 24), (2, 65, 64, 32)]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("loader", ["rows", "windows"])
def test_matrices(library, size, dtype, loader):
    n, t, o, i = size
    g, a = (inside_nan(torch.randn(n, t, f), dtype, 16 if loader == "rows" else 17) for f in (o, i))
    squares, total = definition(g, a)
    for order, shares in itertools.product(range(3), {1, n}) if n * t < 40 else [(0, 1), (3, 2)]:
        out, grad = results((o, i), dtype)
        assert run(library, dense(g, a), out, grad, shares, order) == loader
        close(out - 1, squares, dtype)
        close(grad - 2, total, dtype)
    out, _ = results((o, i), dtype)
    run(library, dense(g, a), out, None, min(n, 3))
    close(out - 1, squares, dtype)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_strides(library, dtype):
    g = torch.randn(9, 30, 50).to(dtype).permute(1, 2, 0)[::3, ::2, 1:]  # [10, 25, 8]
    a = torch.randn(25, 10, 12).to(dtype).transpose(0, 1)[..., ::2]
    out, grad = results((8, 6), dtype)
    assert run(library, dense(g, a), out, grad) == "windows"
    squares, total = definition(g, a)
    close(out - 1, squares, dtype)
    close(grad - 2, total, dtype)


WIDE = (70, 72, (3, 3), (2, 1), (1, 1), (1, 1), 1, (5, 9))  # several tiles of inputs


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("case", [*CONVS, WIDE])
@pytest.mark.parametrize("frames", [1, 2])
def test_convolutions(library, case, dtype, frames):
    x, shape, weight, forward = conv_problem(case, 3 * frames)
    g = torch.randn_like(forward(x)).detach().to(dtype)
    x = x.to(dtype)
    wide_g, wide_x = g.double(), x.double()
    each = torch.stack(
        [torch.autograd.grad(forward(xn), weight, gn)[0] for xn, gn in zip(wide_x.split(frames), wide_g.split(frames))]
    )
    options = shape.stride, shape.padding, shape.dilation, shape.groups, frames
    for order, shares in ((0, 1), (3, 3)):
        out, grad = results(weight.shape, dtype)
        run(library, convolution(g, x, shape.kernel, *options), out, grad, shares, order)
        close(out - 1, each.square().sum(0), dtype)
        close(grad - 2, each.sum(0), dtype)


def test_one_tf32_product_only_where_it_is_asked_for(library):
    g, a = torch.randn(2, 9, 8), torch.randn(2, 9, 12)
    squares = definition(g, a)[0]
    errors = {}
    for precision in ("highest", "high"):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            call = dense(g, a)
        finally:
            torch.set_float32_matmul_precision(before)
        out = torch.zeros(8, 12)
        run(library, call, out)
        errors[precision] = float((out.double() - squares).norm() / squares.norm())
    assert errors["highest"] < 3e-7 and 1e-5 < errors["high"] < 2e-3


def test_rows_that_are_not_aligned_are_read_one_by_one(library):
    """The fast loader on them would be an error on a device; the emulation refuses it too."""
    memory = torch.randn(2 * 3 * 8 + 1)
    for start, loader in ((0, "rows"), (1, "windows")):
        g = memory[start : start + 48].view(2, 3, 8)
        out, _ = results((8, 8), torch.float32)
        assert run(library, dense(g, g), out) == loader
        close(out - 1, definition(g, g)[0], torch.float32)


@pytest.mark.parametrize("type_number, tile", list(enumerate([(64, 64), (64, 32), (128, 64), (128, 64)])))
@pytest.mark.parametrize(
    "samples, outputs, inputs, groups",
    [(64, 768, 768, 1), (64, 3072, 768, 1), (1, 64, 64, 1), (256, 64, 27, 1), (8, 1, 49, 96)],
)
def test_shares_fill_the_device_and_bound_the_workspace(library, type_number, tile, samples, outputs, inputs, groups):
    numbers = (ctypes.c_int64(n) for n in (samples, outputs, inputs, groups))
    shares = library.cuda_shares(type_number, *numbers, 132)
    tiles = -(-outputs // tile[0]) * -(-inputs // tile[1]) * groups
    assert 1 <= shares <= samples
    assert shares == 1 or shares * outputs * inputs * groups <= 1 << 24
    assert shares * tiles >= min(96, samples * tiles)
