"""CUDA C++ kernels (csrc/cuda, part of `fastfip._native`): whether they were compiled and can run, or why not."""

from __future__ import annotations

import functools

import torch

from fastfip.ops.backends import native
from fastfip.ops.backends.constant import constant


def missing() -> str:
    """Why the kernels are not in the native module; empty when they are."""
    return str(getattr(native.module(), "cuda_missing", "the native module is older than the CUDA kernels"))


@constant
def reason() -> str:
    """Why the kernels cannot run in this process whatever the tensors; empty when nothing is known against it.

    Leaves CUDA alone: the driver is asked when the first tensor on a CUDA device comes.
    """
    if native.reason():
        return f"native module: {native.reason()}"
    if missing():
        return f"not compiled: {missing()}"
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    return ""


@functools.cache
def _driver_reason() -> str:
    return str(native.module().cuda_driver_reason())


@constant
def driver_reason() -> str:
    """Why the driver cannot run them, in CUDA's words ("" if it can). Initialises CUDA: a fork after it has none."""
    return reason() if native.reason() or missing() else _driver_reason()


@constant
def _too_old(device: int | None) -> bool:
    return torch.cuda.get_device_capability(device) < (8, 0)


def compiled() -> str:
    """What was compiled: "CUDA 13.0, sm_80 sm_90"; empty when nothing was."""
    return str(getattr(native.module(), "cuda_compiled", "")) if native.available() else ""


def refuses(*tensors: torch.Tensor) -> str:
    """Why these tensors cannot be given to the kernels, or ""."""
    why = reason()
    for x in tensors:
        if x.device.type != "cuda":
            wrong = f"it runs on CUDA devices, not on {x.device.type}"
            return f"{wrong}; {why}" if why else wrong
        if x.dtype not in native.TYPES:
            return f"it has no {x.dtype}"
    if why:
        return why
    if tensors and _too_old(tensors[0].device.index):
        return "it needs a device of compute capability 8.0 (A100) or later"
    return driver_reason()
