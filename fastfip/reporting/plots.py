"""Pictures of results in one style: matplotlib is asked for in one place, and imported only to draw something."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["COLOURS", "MARKERS", "diverging", "labelled", "legend_above", "new_figure", "saved", "styled"]

#: Okabe and Ito's colours, told apart by eyes of every kind; yellow, too pale on white, is left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
#: Colour is not all that tells series apart.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_TEXT, _GRID = "#1b1f24", "#d0d7de"


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure of a size in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plot() needs matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def styled(axes: Any, across: str, up: str, grid: str = "y") -> Any:
    """Give axes the style of all pictures and names with units; return them.

    Args:
        axes: of matplotlib.
        across: name of the horizontal axis, with its unit.
        up: name of the vertical one.
        grid: along which axis lines are drawn: "x", "y" or "both".
    """
    axes.set_xlabel(across, fontsize=9, color=_TEXT)
    axes.set_ylabel(up, fontsize=9, color=_TEXT)
    axes.tick_params(labelsize=8, colors=_TEXT)
    axes.grid(axis=grid, color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return axes


def legend_above(axes: Any) -> None:
    """Put a legend above the axes, where nothing is drawn; none where nothing has a name."""
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(handles), frameon=False, borderaxespad=0.2,
            columnspacing=1.2, handletextpad=0.5,
        )  # fmt: skip


def labelled(axes: Any, points: Sequence[tuple[float, float]], texts: Sequence[str], clear: float = 8) -> None:
    """Write a text beside each point so that none leaves the axes and none covers another one, if there is room.

    The four corners around a point are tried in turn, then places further away, joined by a line.

    Args:
        axes: with its limits as they are to be; the figure is laid out by this.
        points: in the units of the axes.
        texts: one for each point.
        clear: distance of a text from its point, in points of type.
    """
    from matplotlib.text import Text

    figure = axes.figure
    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    dots = [axes.transData.transform(point) for point in points]
    taken: list[Any] = []
    for place in sorted(range(len(points)), key=lambda i: -dots[i][1]):
        best, fewest = None, None
        for far in (clear, 2 * clear, 3 * clear, 4 * clear, 6 * clear):
            for h, v in ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1)):
                note = axes.annotate(
                    texts[place], points[place], xytext=(far * h, far * v), textcoords="offset points", fontsize=8,
                    color=_TEXT, ha=("right", "center", "left")[h + 1], va="bottom" if v > 0 else "top",
                    arrowprops=None if far == clear else _joined(h, v),
                )  # fmt: skip
                note.get_window_extent()  # puts it in its place
                box = Text.get_window_extent(note)  # without its line
                outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
                wrong = 100 * outside + sum(box.overlaps(other) for other in taken)
                wrong += sum(box.contains(*dot) for dot in dots)
                if fewest is None or wrong < fewest:
                    if best is not None:
                        best.remove()
                    best, fewest = note, wrong
                else:
                    note.remove()
            if not fewest:
                break
        if best is not None:
            taken.append(Text.get_window_extent(best))


def _joined(h: int, v: int) -> dict[str, Any]:
    """Return how a text is joined to its point: from the corner that is nearest to it."""
    return {"arrowstyle": "-", "color": _GRID, "shrinkA": 0, "shrinkB": 2, "relpos": (0.5 - h / 2, 0.5 - v / 2)}


def diverging() -> Any:
    """Return the colours of changes: blue is lowered, white unchanged, orange raised."""
    from matplotlib.colors import LinearSegmentedColormap

    from fastfip.reporting.pictures import SHADES

    return LinearSegmentedColormap.from_list("fastfip-change", list(SHADES))


def saved(figure: Any, path: str | Path | None) -> Any:
    """Return the figure, after writing it to a file if `path` is given."""
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure
