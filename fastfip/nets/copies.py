"""Copies of a model, and the model inside a wrapper."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fastfip.errors import ModelError, reason

__all__ = ["copied", "frozen_copy", "is_compiled", "unwrapped"]


def copied(model: nn.Module, remedy: str) -> nn.Module:
    """Return a deep copy of a model.

    Args:
        model: it is left as it is.
        remedy: what the error advises where the model cannot be copied.

    Raises:
        ModelError: copying it fails, with the reason.
    """
    try:
        with torch.no_grad():
            return copy.deepcopy(model)
    except Exception as error:  # what a user's module raises when it is copied can be anything
        raise ModelError(f"the model cannot be copied ({type(error).__name__}: {reason(error)}): {remedy}") from error


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode that requires no gradient: the model as it was received.

    Raises:
        ModelError: the model cannot be copied.
    """
    twin = copied(model, "this method needs the received model beside the one that it tunes")
    for p in twin.parameters():
        p.requires_grad_(False)
    return twin.eval()


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel or DataParallel."""
    while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module
    return model


def is_compiled(model: nn.Module) -> bool:
    """Return whether torch.compile was used on the model or a part of it."""
    return any(
        type(m).__name__ == "OptimizedModule" or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )
