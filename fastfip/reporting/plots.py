"""Pictures of results: matplotlib is asked for in one place, and imported only when something is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["new_figure", "saved"]


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure of a size in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plot() needs matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained")


def saved(figure: Any, path: str | Path | None) -> Any:
    """Return the figure, after writing it to a file if `path` is given."""
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure
