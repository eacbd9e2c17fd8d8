"""Flags of a model that are set for a block and brought back afterwards: train or eval mode, requires_grad."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn

__all__ = ["eval_mode", "requires_grad", "training_flags"]


@contextlib.contextmanager
def training_flags(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Bring `training` of these modules back after a block that sets it."""
    before = [(module, module.training) for module in modules]
    try:
        yield
    finally:
        for module, flag in before:
            module.training = flag


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Put the model in eval mode for a block; every module's own flag is as before afterwards."""
    with training_flags(model.modules()):
        yield model.eval()


@contextlib.contextmanager
def requires_grad(tensors: Iterable[Tensor], wanted: bool | Callable[[Tensor], bool]) -> Iterator[None]:
    """Set `requires_grad` of tensors for a block; each has its own flag again afterwards.

    Args:
        tensors: e.g. `model.parameters()`. What is no floating-point (or complex) tensor cannot require a gradient.
        wanted: one flag for all of them, or a function that tells it for each.
    """
    before = [(t, t.requires_grad) for t in tensors]
    try:
        for t, _ in before:
            asked = wanted(t) if callable(wanted) else wanted
            t.requires_grad_(asked and (t.is_floating_point() or t.is_complex()))
        yield
    finally:
        for t, flag in before:
            t.requires_grad_(flag)
