"""The compiled module `fastfip._native`: loaded on first use, or a reason why it is not there."""

from __future__ import annotations

import functools
import importlib
import os
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from fastfip.errors import BackendError
from fastfip.ops.backends.constant import constant

#: enum Type of csrc/fastfip.h, which CUDA kernels use as well.
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get("FASTFIP_NATIVE") == "0":
        return None, "switched off by FASTFIP_NATIVE=0"
    try:
        return importlib.import_module("fastfip._native"), ""
    except ImportError as error:
        if not (isinstance(error, ModuleNotFoundError) and error.name == "fastfip._native"):
            return None, f"does not load: {error}"
    note = Path(__file__).parents[2] / "_native_missing.txt"
    if note.exists():
        return None, note.read_text().strip()
    return None, "not built (pip install with a C++ compiler; FASTFIP_NATIVE=1 shows what fails)"


def available() -> bool:
    """Whether the compiled module can be used."""
    return _load()[0] is not None


@constant
def reason() -> str:
    """Why it cannot be used; empty when it can."""
    return _load()[1]


def module() -> ModuleType:
    """The compiled module; BackendError with the reason when there is none."""
    loaded, why = _load()
    if loaded is None:
        raise BackendError(f"native kernels: {why}")
    return loaded


def isa() -> str:
    """Instruction set that the native kernels use on this CPU: portable, avx2, avx512 or avx512_bf16."""
    return str(module().best_isa().name)


@constant
def has_bf16() -> bool:
    """Whether this CPU (and the compiler of the module) can multiply bfloat16 numbers."""
    return bool(module().has_bf16)


def refuses(*tensors: Tensor, bf16: bool = False) -> str:
    """Why these tensors cannot be given to the kernels, or ""."""
    if bf16:
        if any(x.dtype == torch.float64 for x in tensors):
            return "bfloat16 products are not for float64"
        if available() and not has_bf16():
            return f"bfloat16 products need AVX512_BF16, this CPU has {isa()}"
    for x in tensors:
        if x.device.type != "cpu":
            return f"it runs on the CPU, not on {x.device.type}"
        if x.dtype not in TYPES:
            return f"it has no {x.dtype}"
    return reason()
