"""Triton kernels. Nothing here is imported before a kernel runs; importing this package does not import triton."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from fastfip.ops.backends.constant import constant


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (on the CPU, slowly), as TRITON_INTERPRET=1 asks for."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@constant
def reason() -> str:
    """Why Triton kernels cannot run here; empty when they can."""
    return "" if _installed() else "triton is not installed (pip install triton)"


def refuses(*tensors: torch.Tensor) -> str:
    """Why these tensors cannot be given to the kernels, or ""."""
    for x in tensors:
        if x.device.type != "cuda" and not (interpreted() and x.device.type == "cpu"):
            return f"it runs on CUDA devices, not on {x.device.type}"
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it has no {x.dtype}"
    return reason()
