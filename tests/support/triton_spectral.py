"""What the Triton kernel of spectral_grad must do: see triton_kernels.py, which is run likewise."""

import pytest
import torch

from fastfip.ops import spectral_grad, spectral_sum_grad_squared
from fastfip.ops.backends.triton import interpreted
from tests.ops.test_spectral_grad import CONVS, KNOWN, conv_problem, definition, problem

assert interpreted() or torch.cuda.is_available(), "run with TRITON_INTERPRET=1 or on a machine with a GPU"
DEVICE = "cpu" if interpreted() else "cuda"
SIZES = [
    (1, 1, 1, 1, 1),
    (3, 2, 5, 7, 2),
    (2, 140, 33, 40, 65),
    (1, 300, 17, 5, 33),
    (5, 17, 70, 1, 9),
    (0, 3, 4, 5, 2),
    (3, 0, 4, 5, 2),
]


def close(got, want):
    assert torch.isfinite(got).all() and got.shape == want.shape and got.dtype == torch.float32
    assert (got.double() - want).norm() <= 4e-6 * want.norm()


def moved(operands):
    return [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in operands]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize("size", SIZES)
def test_definition(size, known, dtype, nan_empty):
    operands = moved(problem(size, known, dtype))
    each = definition(*operands)
    close(spectral_grad(*operands, per_sample=True, backend="triton"), each)
    close(spectral_grad(*operands, backend="triton"), each.sum(0))
    close(spectral_sum_grad_squared(*operands, backend="triton"), each.square().sum(0))


def test_strides_and_mixed_dtypes():
    g = torch.randn(9, 30, 50, device=DEVICE).permute(1, 2, 0)[::3, ::2, 1:]  # [10, 25, 8]
    x = torch.randn(25, 10, 40, device=DEVICE).transpose(0, 1)[..., ::2].bfloat16()
    u, v = torch.randn(1, 6, 8, device=DEVICE).mT, torch.randn(1, 20, 12, device=DEVICE)[..., ::2]
    close(spectral_grad(g, x, u, v, per_sample=True, backend="triton"), definition(g, x, u, v))


@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize("case", CONVS)
def test_convolutions(case, known, nan_empty):
    (*tensors, shape), _ = conv_problem(case, 3, known, torch.float32)
    tensors = moved(tensors)
    found = spectral_grad(*tensors, shape, per_sample=True, backend="triton")
    wide = [None if t is None else t.double() for t in tensors]
    close(found, spectral_grad(*wide, shape, per_sample=True, backend="reference"))


def test_derivatives():
    operands = [t.requires_grad_() for t in moved(problem((3, 4, 5, 2, 3), "", torch.float32))]
    for t, y in zip(
        torch.autograd.grad(spectral_sum_grad_squared(*operands, backend="triton").sum(), operands),
        torch.autograd.grad(spectral_sum_grad_squared(*operands, backend="reference").sum(), operands),
    ):
        close(t, y.double())
