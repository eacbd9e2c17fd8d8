"""What every launcher of a Triton kernel does to its operands, and how products are made. Needs no triton."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfip.ops.backends import triton

#: Whether kernels run in Triton's interpreter. They have to know: it multiplies the bit patterns of bfloat16.
INTERPRETED = triton.interpreted()


def precision() -> str:
    """How float32 products are made: as torch.matmul does; for "highest" by three TF32 products (as exact)."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def operands(*tensors: Tensor) -> list[Tensor]:
    """Return them as kernels read them: tl.dot multiplies equal types, and offsets in a sample are 32 bits wide."""
    if len({x.dtype for x in tensors}) > 1:
        tensors = tuple(x.float() for x in tensors)
    return [x if _fits(x) else x.contiguous() for x in tensors]


def _fits(x: Tensor) -> bool:
    return sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:])) < 2**31 - 2**20
