"""Models of 16 bits that are worked on in float32: their steps and small gradients would round to nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["LOW_PRECISION", "cast", "dtypes_of", "to_float32"]

#: Dtypes whose steps are too coarse to tune in.
LOW_PRECISION = (torch.float16, torch.bfloat16)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by their names, tied ones by each."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def dtypes_of(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtype of each parameter and buffer by its name."""
    return {name: t.dtype for name, t in tensors_of(model).items()}


def cast(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Bring the parameters and buffers that are named to these dtypes, in place."""
    for name, t in tensors_of(model).items():
        if name in dtypes and t.dtype != dtypes[name]:
            t.data = t.data.to(dtypes[name])


def to_float32(model: nn.Module) -> None:
    """Bring float16 and bfloat16 parameters and buffers to float32, in place."""
    cast(model, {name: torch.float32 for name, dtype in dtypes_of(model).items() if dtype in LOW_PRECISION})
