"""The CUDA kernel of spectral_grad itself, compiled for the CPU and run thread by thread, against float64.

See test_cuda_on_cpu.py for what that shows and what it does not.
"""

import ctypes

import pytest
import torch

from fastfip.ops.spectral import grad_cuda as launcher
from tests.ops.test_spectral_grad import CONVS, KNOWN, conv_problem, definition, problem
from tests.support.cuda_emulation import COMPILER, ROUNDING, close, compile_for_cpu, inside_nan, run_on_cpu

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def library():
    return compile_for_cpu("cuda_paired_on_cpu")


def shares_of(library, *numbers):
    function = library.paired_shares_on_cpu
    function.restype = ctypes.c_int64
    return function(*(ctypes.c_int64(n) for n in numbers))


def run(library, operands, processors=1, order=0):
    """Return each [N, G, K] and the loader that ran; parts begin as NaN."""
    found = launcher.operands(*operands)
    call = launcher.describe(found)
    positions = call.axes[0][0] * call.axes[0][1] * call.axes[0][2]
    samples, groups = call.sizes[0], found.groups
    shares = shares_of(library, call.type, samples, positions, call.directions, groups, processors)
    acc = torch.float64 if found.g.dtype == torch.float64 else torch.float32
    parts = torch.full((samples, shares, groups, found.directions), float("nan"), dtype=acc)
    loader = run_on_cpu(library.spectral_grad_on_cpu, [*call, parts.data_ptr(), shares], order)
    return parts.sum(1), loader


SIZES = [  # N, T, O, I, K
    (1, 1, 1, 1, 1),
    (3, 1, 5, 7, 2),
    (2, 130, 33, 70, 9),
    (1, 200, 9, 40, 66),
    (3, 65, 64, 32, 64),
]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("loader", ["rows", "windows"])
def test_matrices(library, size, known, dtype, loader):
    g, x, u, v = problem(size, known, dtype)
    g, x = (inside_nan(t, dtype, 16 if loader == "rows" else 17) for t in (g, x))
    u, v = (None if d is None else inside_nan(d, dtype) for d in (u, v))
    for order, processors in [(0, 1), (1, 4), (2, 1)] if size[1] < 40 else [(3, 4)]:
        each, ran = run(library, (g, x, u, v, None), processors, order)
        assert ran == loader
        close(each, definition(g, x, u, v), dtype)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_strides(library, dtype):
    g = torch.randn(9, 30, 50).to(dtype).permute(1, 2, 0)[::3, ::2, 1:]  # [10, 25, 8]
    x = torch.randn(25, 10, 12).to(dtype).transpose(0, 1)[..., ::2]
    u = torch.randn(1, 6, 8).to(dtype).mT[..., ::2]  # [1, 8, 3]
    v = torch.randn(1, 3, 6).to(dtype).mT
    each, loader = run(library, (g, x, u, v, None))
    assert loader == "windows"
    close(each, definition(g, x, u, v), dtype)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize("case", CONVS)
def test_convolutions(library, case, known, dtype):
    (g, x, u, v, shape), each = conv_problem(case, 2, known, dtype)
    if known:  # what is known was rounded after each was computed
        each = conv_definition(g, x, u, v, shape)
    got, _ = run(library, (g, x, u, v, shape), 8, 3)
    close(got, each, dtype)


def conv_definition(g, x, u, v, shape):
    """The reference in float64, which test_spectral_grad.py compares with the weight's own gradient."""
    from fastfip.ops.spectral.grad import reference

    return reference(*(None if t is None else t.double() for t in (g, x, u, v)), shape)


@pytest.mark.parametrize("known", ["", "p"])
def test_channels_last_maps_of_1x1_kernels_are_read_as_rows(library, known):
    (g, x, u, v, shape), each = conv_problem(
        (8, 16, 3, (1, 1), (1, 1), (0, 0), (1, 1), 1, (4, 5)), 2, known, torch.float32
    )
    last = torch.channels_last
    operands = g.contiguous(memory_format=last), x.contiguous(memory_format=last), u, v, shape
    got, loader = run(library, operands)
    assert loader == "rows"
    close(got, conv_definition(g, x, u, v, shape), torch.float32)
    assert run(library, (g, x, u, v, shape))[1] == "windows"


def test_mixed_dtypes_become_the_wider_float(library):
    g, x, u, v = problem((2, 20, 8, 12, 3), "", torch.bfloat16, torch.float32)
    each, _ = run(library, (g, x, u, v, None))
    assert each.dtype == torch.float32
    close(each, definition(g, x, u, v), torch.float32)


def test_one_tf32_product_only_where_it_is_asked_for(library):
    operands = problem((2, 30, 40, 24, 5), "", torch.float32)
    want, errors, before = definition(*operands), {}, torch.get_float32_matmul_precision()
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        try:
            got, _ = run(library, (*operands, None))
        finally:
            torch.set_float32_matmul_precision(before)
        errors[precision] = float((got.double() - want).norm() / want.norm())
    assert errors["highest"] < 1e-6 and 1e-5 < errors["high"] < 2e-3


@pytest.mark.parametrize("type_number, rows, columns", [(0, 64, 64), (1, 64, 32), (2, 128, 64), (3, 128, 64)])
@pytest.mark.parametrize(
    "samples, positions, directions, groups", [(1, 50432, 64, 1), (256, 1, 64, 1), (4, 3136, 20, 3)]
)
def test_shares_fill_the_device_and_none_is_empty(
    library, type_number, rows, columns, samples, positions, directions, groups
):
    shares = shares_of(library, type_number, samples, positions, directions, groups, 132)
    tiles = -(-positions // rows)
    assert 1 <= shares <= tiles and (shares - 1) * -(-tiles // shares) < tiles
    assert shares * -(-directions // columns) * samples * groups >= min(132, tiles * samples)
