"""BatchNorm's running statistics: kept through passes that must not count, and taken anew for weights that changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fastfip.data.batch import Batch
from fastfip.methods.run import Run

__all__ = ["kept_statistics", "statistics_of", "taken_anew"]


def statistics_of(run: Run) -> list[Tensor]:
    """Return the buffers of all BatchNorm layers."""
    return [b for module in run.batchnorms for b in module.buffers(recurse=False)]


@contextlib.contextmanager
def kept_statistics(run: Run) -> Iterator[None]:
    """Take back what passes in a block do to the running statistics."""
    buffers = statistics_of(run)
    saved = [b.clone() for b in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for b, value in zip(buffers, saved):
                b.copy_(value)


@torch.no_grad()
def taken_anew(run: Run, batches: Iterable[Batch]) -> None:
    """Set the running statistics to the mean of those of the batches, for the weights as they are.

    Layers that the config or the user keeps in eval mode stay as they are; where there is no other, no batch is read.
    """
    run.train_mode()
    norms = [norm for norm in run.batchnorms if norm.training and isinstance(norm.running_mean, Tensor)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()  # type: ignore[operator]
            norm.momentum = None  # type: ignore[assignment]  # a plain mean
        for batch in batches:
            run.forward(batch)
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
