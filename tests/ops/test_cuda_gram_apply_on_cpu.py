"""The CUDA kernel of gram_apply itself, compiled for the CPU and run thread by thread, against float64.

See test_cuda_on_cpu.py for what that shows and what it does not.
"""

import pytest
import torch

from fastfip.ops.gram_apply import cuda as launcher
from tests.ops.test_gram_apply import definition
from tests.support.cuda_emulation import COMPILER, ROUNDING, close, compile_for_cpu, inside_nan, run_on_cpu

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def library():
    return compile_for_cpu("cuda_gram_apply_on_cpu")


def run(library, q, k, v, order=0):
    """Return the result in the type of its sums; it begins as NaN."""
    q, k, v = launcher.operands(q, k, v)
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.full((q.shape[0], q.shape[1], v.shape[2]), float("nan"), dtype=acc)
    run_on_cpu(library.gram_apply_on_cpu, [*launcher.describe(q, k, v), out.data_ptr()], order)
    return out


def want(q, k, v):
    return definition(q.double(), k.double(), v.double())


SIZES = [  # N, T, U, D, E
    (1, 1, 1, 1, 1),
    (3, 5, 9, 7, 3),
    (2, 33, 65, 40, 70),
    (1, 130, 17, 33, 8),
    (2, 20, 100, 24, 33),
]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("size", SIZES)
def test_definition(library, size, dtype):
    n, t, u, d, e = size
    q, k, v = (inside_nan(torch.randn(n, *s), dtype) for s in ((t, d), (u, d), (u, e)))
    for order in range(4) if n * t < 40 else [3]:
        close(run(library, q, k, v, order), want(q, k, v), dtype)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_strides(library, dtype):
    q = torch.randn(6, 9, 4).to(dtype)[:, ::2].transpose(0, 1)[:, 1:]  # [5, 5, 4]
    k = torch.randn(5, 4, 7).to(dtype).transpose(1, 2)
    v = torch.randn(1, 7, 6).to(dtype)[..., ::3].expand(5, 7, 2)
    close(run(library, q, k, v), want(q, k, v), dtype)


def test_mixed_dtypes_become_the_wider_float(library):
    q, k, v = torch.randn(2, 5, 4), torch.randn(2, 6, 4).bfloat16(), torch.randn(2, 6, 9).half()
    close(run(library, q, k, v), want(q, k, v), torch.float32)


def test_one_tf32_product_only_where_it_is_asked_for(library):
    operands = [torch.randn(2, 30, 12) for _ in range(3)]
    errors, before = {}, torch.get_float32_matmul_precision()
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        try:
            got = run(library, *operands)
        finally:
            torch.set_float32_matmul_precision(before)
        errors[precision] = float((got.double() - want(*operands)).norm() / want(*operands).norm())
    assert errors["highest"] < 1e-6 and 1e-5 < errors["high"] < 2e-3


def test_rows_that_are_not_aligned_are_refused(library):
    q = torch.randn(1, 3, 6)[..., :5]
    with pytest.raises(AssertionError, match="rows are not aligned"):
        run_on_cpu(library.gram_apply_on_cpu, [*launcher.describe(q, q, q), torch.zeros(15).data_ptr()], 0)
