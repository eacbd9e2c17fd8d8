"""The range that each channel of clean inputs has, and the size of a typical input, whatever the user normalises by.

An affine map of each channel takes the model's inputs to pixels in [0, 1]: p = (x - low) / (high - low). Published
perturbation bounds and step sizes are in pixels; perturbing and clipping there is the same as on the raw image if
`low` and `high` are where black and white went, which clean images show by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfip.data.batch import Batch
from fastfip.data.task import Task
from fastfip.errors import ConfigError, DataError

__all__ = ["Bound", "PixelRange", "perturbable", "typical_norm"]

#: A bound as a user gives it: one number, or one for each channel; None: inferred from the clean inputs.
Bound = float | tuple[float, ...] | None


def perturbable(task: Task, batch: Batch) -> bool:
    """Return whether the inputs of a batch are real numbers of one shape for each sample, so that they can be moved."""
    try:
        x = task.inputs(batch)
    except DataError:
        return False
    return x.is_floating_point() and x.dim() >= 2


def typical_norm(x: Tensor) -> float:
    """Return the L2 norm of a typical input about the mean: sqrt(d) times the standard deviation of inputs [N, ...]."""
    return float(x.std(unbiased=False)) * math.sqrt(x[0].numel()) or 1.0


@dataclass(frozen=True)
class PixelRange:
    """Range of each channel, [1, ch, 1, ...] (0-dimensional where channels differ from batch to batch)."""

    low: Tensor
    high: Tensor

    @classmethod
    def of_inputs(cls, x: Tensor) -> PixelRange:
        """Return the range of inputs [N, ch, ...]."""
        axes = [0, *range(2, x.dim())]
        return cls(x.amin(axes, keepdim=True), x.amax(axes, keepdim=True))

    @classmethod
    def of_batches(
        cls, batches: Iterable[Batch], task: Task, low: Bound = None, high: Bound = None
    ) -> PixelRange | None:
        """Read the range off clean batches (one pass over the images, not through the model).

        Returns:
            None where inputs are no real numbers of the form [N, ch, ...] (tokens), which cannot be perturbed.

        Raises:
            ConfigError: a given bound has another number of channels, or leaves no room above it.
        """
        ranges: list[PixelRange] = []
        for batch in batches:
            if not perturbable(task, batch):
                return None
            ranges.append(cls.of_inputs(task.inputs(batch).detach()))
        smallest, largest = [r.low for r in ranges], [r.high for r in ranges]
        if len({t.shape[1] for t in smallest}) > 1:
            smallest, largest = [t.amin() for t in smallest], [t.amax() for t in largest]
        bottom, top = torch.stack(smallest).amin(0), torch.stack(largest).amax(0)
        bottom, top = _given("low", low, bottom), _given("high", high, top)
        if low is None and high is None:  # a channel without contrast: perturbed in the units of the others
            span = float((top - bottom).max()) or 1.0
            top = torch.where(top > bottom, top, bottom + span)
        if not bool((top > bottom).all()):
            raise ConfigError(f"low={low} and high={high}: high must be above low, in the units of the model's inputs")
        return cls(bottom, top)

    @property
    def span(self) -> Tensor:
        """Return high - low: a pixel's [0, 1] in the model's units."""
        return self.high - self.low

    def clamp(self, x: Tensor) -> Tensor:
        """Return inputs [N, ch, ...] brought into the range, channel by channel."""
        return torch.minimum(torch.maximum(x, self.low.to(x.dtype)), self.high.to(x.dtype))

    def moved(self, task: Task, batch: Batch, delta: Tensor) -> Batch:
        """Return a batch with its inputs [N, ch, ...] moved by delta [1 or N, ch, ...] in pixels and clipped."""
        x = task.inputs(batch)
        return task.replace_inputs(batch, self.clamp(x + (delta * self.span).to(x.dtype)))


def _given(name: str, bound: Bound, like: Tensor) -> Tensor:
    if bound is None:
        return like
    try:
        values = torch.as_tensor(bound, dtype=like.dtype, device=like.device).flatten()
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"{name}={bound!r}: give a number, or one for each channel") from None
    if values.numel() == 1:
        return values.expand(like.numel()).reshape(like.shape)
    if values.numel() != like.numel():
        raise ConfigError(f"{name} has {values.numel()} numbers for inputs of {like.numel()} channels")
    return values.reshape(like.shape)
