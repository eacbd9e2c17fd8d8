"""Inputs in pixels: the range that each channel of the clean inputs has, whatever the user normalises by.

An affine map of each channel takes the model's inputs to pixels in [0, 1]: p = (x - low) / (high - low). Published
perturbation bounds and step sizes are in pixels; perturbing and clipping there is the same as on the raw image if
`low` and `high` are where black and white went, which clean images show by themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastfip.data.batch import Batch
from fastfip.errors import ConfigError
from fastfip.methods.base import MethodConfig, Run, setting
from fastfip.worst_case.universal import perturbable

__all__ = ["PixelConfig", "PixelRange"]

#: A bound as a user gives it: one number, or one for each channel; None: inferred from the clean inputs.
Bound = float | tuple[float, ...] | None


@dataclass(frozen=True)
class PixelConfig(MethodConfig):
    """Settings of a method that perturbs images."""

    low: float | tuple[float, ...] | None = setting(
        None, "black in the inputs' units, or one for each channel; None: from the clean images"
    )
    high: float | tuple[float, ...] | None = setting(
        None, "white in the inputs' units, or one for each channel; None: from the clean images"
    )


@dataclass(frozen=True)
class PixelRange:
    """Range of each channel, [1, ch, 1, ...] (0-dimensional where channels differ from batch to batch)."""

    low: Tensor
    high: Tensor

    @classmethod
    def of_run(cls, run: Run, without: str) -> PixelRange | None:
        """Return the range of a run whose config is a `PixelConfig`; None and a note, what is done `without` it."""
        assert isinstance(run.config, PixelConfig)
        found = cls.of(run, run.config.low, run.config.high)
        if found is None:
            run.note(f"inputs that are no real numbers cannot be perturbed: {without}")
        return found

    @classmethod
    def of(cls, run: Run, low: Bound = None, high: Bound = None) -> PixelRange | None:
        """Read the range off the clean set (one pass over the images, not through the net).

        Returns:
            None where inputs are no real numbers of the form [N, ch, ...] (tokens), which cannot be perturbed.

        Raises:
            ConfigError: a given bound has another number of channels, or leaves no room above it.
        """
        smallest: list[Tensor] = []
        largest: list[Tensor] = []
        for batch in run.clean.batches(device=run.device):
            if not perturbable(run.task, batch):
                return None
            x = run.task.inputs(batch).detach()
            axes = [0, *range(2, x.dim())]
            smallest.append(x.amin(axes))
            largest.append(x.amax(axes))
            shape = (1, -1, *[1] * (x.dim() - 2))
        if len({len(t) for t in smallest}) > 1:
            smallest, largest = [t.amin() for t in smallest], [t.amax() for t in largest]
            shape = ()
        bottom, top = torch.stack(smallest).amin(0).reshape(shape), torch.stack(largest).amax(0).reshape(shape)
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

    def moved(self, run: Run, batch: Batch, delta: Tensor) -> Batch:
        """Return a batch with its inputs [N, ch, ...] moved by delta [1 or N, ch, ...] in pixels and clipped."""
        x = run.task.inputs(batch)
        moved = x + (delta * self.span).to(x.dtype)
        clipped = torch.minimum(torch.maximum(moved, self.low.to(x.dtype)), self.high.to(x.dtype))
        return run.task.replace_inputs(batch, clipped)


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
