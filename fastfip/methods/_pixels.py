"""Settings of methods that perturb images, and the range of pixels of a run."""

from __future__ import annotations

from dataclasses import dataclass

from fastfip.methods.base import MethodConfig, Run, setting
from fastfip.worst_case.pixels import PixelRange

__all__ = ["PixelConfig", "range_of"]


@dataclass(frozen=True)
class PixelConfig(MethodConfig):
    """Settings of a method that perturbs images."""

    low: float | tuple[float, ...] | None = setting(
        None, "black in the inputs' units, or one for each channel; None: from the clean images"
    )
    high: float | tuple[float, ...] | None = setting(
        None, "white in the inputs' units, or one for each channel; None: from the clean images"
    )


def range_of(run: Run, without: str) -> PixelRange | None:
    """Return the range of a run whose config is a `PixelConfig`; None and a note, what is done `without` it."""
    config = run.config
    assert isinstance(config, PixelConfig)
    known = PixelRange.of_batches(run.clean.batches(device=run.device), run.task, config.low, config.high)
    if known is None:
        run.note(f"inputs that are no real numbers cannot be perturbed: {without}")
    return known
