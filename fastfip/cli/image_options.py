"""The options that say how images become inputs, read and checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastfip.cli.errors import fail

if TYPE_CHECKING:
    from fastfip.data.scaling import Pixels

__all__ = ["class_order", "pixels"]


def pixels(
    mean: str | None, std: str | None, size: str | None, channels: int | None, scale: str | None = None
) -> Pixels:
    """Return how images become inputs. A name for mean or std stands for both, unless the other one is given."""
    from fastfip.data.scaling import SCALES, STATISTICS, Pixels

    if scale is not None and scale not in SCALES:
        raise fail(f"--scale={scale}: must be {', '.join(SCALES)}")
    sides = _numbers("--size", size)
    if len(sides) > 2 or any(side != int(side) for side in sides):
        raise fail("--size must be one number (H) or two (H,W)")
    both = None if not sides else (int(sides[0]), int(sides[-1]))
    numbers = []
    for name, given, other, which in (("--mean", mean, std, 0), ("--std", std, mean, 1)):
        stem = next((text for text in (given, other) if text is not None), None)
        known = None if stem is None else _statistics(stem)
        numbers.append(
            _numbers(name, given, f", or a name: {', '.join(STATISTICS)}") if known is None else known[which]
        )
        if known is not None and scale not in (None, "01"):
            raise fail(f"{name}={stem} is for pixels from 0 to 1: leave out --scale {scale}")
    return Pixels(numbers[0], numbers[1], both, channels, scale)


def _statistics(text: str) -> Any:
    """Return mean and std of a name; None for numbers."""
    from fastfip.data.scaling import statistics
    from fastfip.errors import ConfigError

    try:
        return statistics(text)
    except ConfigError:
        return None


def class_order(order: str | None) -> str | None:
    """Check `--class-order`."""
    if order not in (None, "number", "text"):
        raise fail(f"--class-order={order}: must be number or text")
    return order


def _numbers(name: str, text: str | None, also: str = "") -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise fail(f"{name}={text}: give numbers with commas between them{also}") from None
