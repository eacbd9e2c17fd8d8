"""BatchNorm's running statistics: kept through passes that must not count, taken anew for weights that changed, and
carried over from images that stand in for others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fastfip.data.batch import Batch
from fastfip.methods.run import Run
from fastfip.nets.state import training_flags

__all__ = ["carry", "distances", "kept_statistics", "statistics_of", "taken_anew"]

#: Standard deviations that a running mean is moved by at most, and times that a variance is made larger or smaller: in
#: channels that the images hardly reach both have no meaning.
FARTHEST, WIDEST = 2.0, 5.0


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


@torch.no_grad()
def distances(run: Run, batches: Iterable[Batch]) -> list[tuple[Tensor, Tensor]]:
    """Return how the running statistics differ from those of these batches: for each layer two tensors [channels].

    The first is how far the mean is away, in the deviations of the batches; the second the ratio of the variances. The
    model and its statistics are left as they are; layers that `taken_anew` leaves as they are do not differ.
    """
    norms = _with_statistics(run)
    received = [(norm.running_mean.clone(), _variance(norm)) for norm in norms]
    out: list[tuple[Tensor, Tensor]] = []
    with kept_statistics(run), training_flags(run.model.modules()):
        taken_anew(run, batches)
        for norm, (mean, variance) in zip(norms, received):
            own = _variance(norm)
            away = (mean - norm.running_mean) / own.sqrt()
            out.append((away.clamp(-FARTHEST, FARTHEST), (variance / own).clamp(1 / WIDEST, WIDEST)))
    return out


@torch.no_grad()
def carry(run: Run, away: list[tuple[Tensor, Tensor]], share: float) -> None:
    """Move the running statistics by a share of what `distances` returned, in their own deviations."""
    for norm, (shift, ratio) in zip(_with_statistics(run), away):
        variance = _variance(norm)
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.add_(share * shift * variance.sqrt())
        norm.running_var.copy_((variance * ratio**share - norm.eps).clamp_min(0))


def _with_statistics(run: Run) -> list[_BatchNorm]:
    norms = [norm for norm in run.batchnorms if isinstance(norm, _BatchNorm)]
    return [norm for norm in norms if norm.running_mean is not None and norm.running_var is not None]


def _variance(norm: _BatchNorm) -> Tensor:
    """Return what a layer divides the square by; the summand keeps channels that are dead from mattering."""
    assert norm.running_var is not None
    return norm.running_var + norm.eps
