"""What the CUDA kernel of gram_apply must do on a GPU (`make gpu`)."""

import pytest
import torch

from fastfip.ops import gram_apply
from fastfip.ops.gram_apply.op import prefers_gram
from tests.ops.test_gram_apply import definition
from tests.support.cuda_device import DTYPES, HERE, close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(HERE), reason=HERE)]
SIZES = [  # N, T, U, D, E
    (3, 2, 3, 9, 8),
    (7, 197, 197, 384, 512),
    (2, 33, 130, 200, 300),
    (5, 64, 64, 128, 256),
    (3, 9, 8, 2, 3),
    (0, 2, 3, 4, 5),
    (2, 3, 0, 4, 5),
]


def operands(size, dtype):
    n, t, u, d, e = size
    return [torch.randn(n, *s, device="cuda").to(dtype) for s in ((t, d), (u, d), (u, e))]


def test_both_ways_are_among_the_sizes():
    assert {prefers_gram(*size[1:]) for size in SIZES} == {False, True}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_definition(size, dtype, nan_empty):
    q, k, v = operands(size, dtype)
    got = gram_apply(q, k, v, backend="cuda")
    assert got.dtype == dtype
    want = definition(q.double(), k.double(), v.double())
    close(got, want, max(1e-5, 4 * torch.finfo(dtype).eps))
    assert torch.equal(got, gram_apply(q, k, v, backend="cuda"))  # no atomics


def test_strides_and_mixed_dtypes():
    q = torch.randn(6, 9, 40, device="cuda")[:, ::2].transpose(0, 1)[:, 1:]  # [5, 5, 40]
    k = torch.randn(5, 40, 7, device="cuda").transpose(1, 2).bfloat16()
    v = torch.randn(5, 7, 60, device="cuda")[..., ::3]
    close(gram_apply(q, k, v, backend="cuda"), definition(q.double(), k.double(), v.double()), 1e-5)


@pytest.mark.parametrize("size", [SIZES[0], SIZES[4]])
def test_derivatives(size):
    inputs = [x.requires_grad_() for x in operands(size, torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: gram_apply(*x, backend="cuda"), inputs)
    assert torch.autograd.gradgradcheck(lambda *x: gram_apply(*x, backend="cuda"), inputs, fast_mode=True)
