"""The compiled module `fastfip._native`: loaded on first use, or a reason why it is not there.

FASTFIP_NATIVE=0 switches it off; FASTFIP_ISA=portable, avx2 or avx512 has it use a lesser instruction set than this
CPU's best one, so that what another machine computes can be looked at here.
"""

from __future__ import annotations

import functools
import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

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
        loaded = importlib.import_module("fastfip._native")
        _chosen(loaded)
        return loaded, ""
    except ImportError as error:
        if not (isinstance(error, ModuleNotFoundError) and error.name == "fastfip._native"):
            return None, f"does not load: {error}"
    note = Path(__file__).parents[2] / "_native_missing.txt"
    if note.exists():
        return None, note.read_text().strip()
    return None, "not built (pip install with a C++ compiler; FASTFIP_NATIVE=1 shows what fails)"


def _chosen(loaded: ModuleType) -> Any:
    """The best instruction set of this CPU, or the lesser one that FASTFIP_ISA names."""
    best, name = loaded.best_isa(), os.environ.get("FASTFIP_ISA", "")
    if not name:
        return best
    wanted = loaded.Isa.__members__.get(name)
    if wanted is None:
        raise BackendError(f"FASTFIP_ISA={name}: must be one of {', '.join(loaded.Isa.__members__)}")
    if int(wanted) > int(best):
        raise BackendError(f"FASTFIP_ISA={name}: this CPU lacks it, its best is {best.name}")
    return wanted


def available() -> bool:
    """Whether the compiled module can be used; BackendError where FASTFIP_ISA names what this CPU lacks."""
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
    """Instruction set that the native kernels use here: portable, avx2, avx512 or avx512_bf16."""
    return str(_chosen(module()).name)


@constant
def has_bf16() -> bool:
    """Whether the instruction set in use (and the compiler of the module) can multiply bfloat16 numbers."""
    return bool(module().has_bf16) and isa() == "avx512_bf16"


def refuses(*tensors: Tensor, bf16: bool = False) -> str:
    """Why these tensors cannot be given to the kernels, or ""."""
    if bf16:
        if any(x.dtype == torch.float64 for x in tensors):
            return "bfloat16 products are not for float64"
        if available() and not has_bf16():
            return f"bfloat16 products need AVX512_BF16, the kernels use {isa()} here"
    for x in tensors:
        if x.device.type != "cpu":
            return f"it runs on the CPU, not on {x.device.type}"
        if x.dtype not in TYPES:
            return f"it has no {x.dtype}"
    return reason()
