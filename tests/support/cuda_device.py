"""Why tests that need a CUDA device and the CUDA kernels cannot run here; "" where they can."""

import torch

from fastfip.ops.backends import cuda

HERE = "no CUDA device" if not torch.cuda.is_available() else cuda.refuses(torch.zeros(1, device="cuda"))
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def close(got, want, tolerance=2e-6):
    assert torch.isfinite(got).all() and got.shape == want.shape
    assert (got.double() - want).norm() <= (1e-13 if got.dtype == torch.float64 else tolerance) * want.norm()
