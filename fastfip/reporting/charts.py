"""Charts for a page: SVG text that takes its colours from the page, so that it serves light and dark ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from fastfip.errors import printable

__all__ = ["course", "shares"]

#: A chart is drawn for the width of a phone and grows with the page.
_WIDTH = 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 10, 34

Point = tuple[float, float]


def course(
    series: Sequence[tuple[str, Sequence[Point]]], across: str, up: str, mark: tuple[float, str] | None = None
) -> Markup:
    """Return lines with markers.

    Args:
        series: (name, points) of each line; points that are not finite are left out.
        across: label of the horizontal axis.
        up: label of the vertical one, which begins at 0 or below.
        mark: where a vertical line stands, and what it means.

    Returns:
        the chart with its legend; empty where there is no point.
    """
    series = [(name, [p for p in points if all(map(math.isfinite, p))]) for name, points in series]
    series = [(name, points) for name, points in series if points]
    if not series:
        return Markup("")
    height = 200
    xs, ys = zip(*(p for _, points in series for p in points))
    left, right = min(xs), max(xs)
    bottom, top = min(0.0, *ys), max(ys)
    span = right - left or 1.0
    top = top if top > bottom else bottom + 1.0

    def at(x: float, y: float) -> Point:
        return (
            _LEFT + (_WIDTH - _LEFT - _RIGHT) * (x - left) / span if right > left else (_LEFT + _WIDTH - _RIGHT) / 2,
            _TOP + (height - _TOP - _BOTTOM) * (top - y) / (top - bottom),
        )

    parts = _frame(height)
    for y in _ticks(bottom, top):
        _, v = at(left, y)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{v:.1f}" y2="{v:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{v + 3:.1f}" text-anchor="end">{y:g}</text>')
    for x in _whole(left, right):
        h, _ = at(x, bottom)
        parts.append(f'<text x="{h:.1f}" y="{height - _BOTTOM + 14}" text-anchor="middle">{x:g}</text>')
    if mark is not None and left <= mark[0] <= right:
        h, _ = at(mark[0], bottom)
        parts.append(f'<line class="mark" x1="{h:.1f}" x2="{h:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>')
    for place, (_, points) in enumerate(series):
        path = " ".join(f"{h:.1f},{v:.1f}" for h, v in (at(*p) for p in points))
        parts.append(f'<polyline class="line c{place}" points="{path}"/>')
        parts += [_marker(place, *at(*p)) for p in points] if len(points) <= 60 else []
    parts.append(_axis_name(across, (_LEFT + _WIDTH - _RIGHT) / 2, height - 4))
    parts.append(_upright(up, 10, (_TOP + height - _BOTTOM) / 2))
    names = [name for name, _ in series]
    said = f"{up} by {across}: " + "; ".join(
        f"{name} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for name, points in series
    )
    return _legend(names, None if mark is None else mark[1]) + _svg(parts, height, said)


def shares(rows: Sequence[tuple[str, Sequence[tuple[str, float, tuple[float, float] | None]]]], said: str) -> Markup:
    """Return shares from 0 to 100 % as points with their intervals, one row a name and one point a series in it.

    Args:
        rows: (name of the row, [(series, share in [0, 1], its interval or None), ...]).
        said: what the chart shows, for who cannot see it.
    """
    rows = [(name, points) for name, points in rows if points]
    if not rows:
        return Markup("")
    names = list(dict.fromkeys(series for _, points in rows for series, _, _ in points))
    step = 12 * len(names) + 22
    height = _TOP + step * len(rows) + 32

    def across(share: float) -> float:
        return 12 + (_WIDTH - 36) * share

    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        h = across(tick)
        parts.append(f'<line class="grid" x1="{h:.1f}" x2="{h:.1f}" y1="{_TOP}" y2="{height - 30}"/>')
        parts.append(f'<text x="{h:.1f}" y="{height - 18}" text-anchor="middle">{100 * tick:g}</text>')
    for place, (name, points) in enumerate(rows):
        y = _TOP + step * place + 12
        parts.append(f'<text class="row" x="{across(0):.1f}" y="{y}">{_text(name)}</text>')
        for series, share, around in points:
            number = names.index(series)
            v = y + 11 + 12 * number
            if around is not None:
                parts.append(
                    f'<line class="line c{number}" x1="{across(around[0]):.1f}" x2="{across(around[1]):.1f}" '
                    f'y1="{v}" y2="{v}"/>'
                )
            parts.append(_marker(number, across(share), v))
    parts.append(_axis_name("%", _WIDTH / 2, height - 4))
    return _legend(names, None) + _svg(parts, height, said)


def _text(text: str) -> str:
    """Return a text that may come from a file as it may stand in the page."""
    return str(escape(printable(text)))


def _svg(parts: list[str], height: float, said: str) -> Markup:
    return Markup(f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{_text(said)}">{"".join(parts)}</svg>')


def _frame(height: float) -> list[str]:
    base = height - _BOTTOM
    return [f'<polyline class="axis" points="{_LEFT},{_TOP} {_LEFT},{base} {_WIDTH - _RIGHT},{base}"/>']


def _marker(place: int, h: float, v: float) -> str:
    """A form of its own for each series: colour is not all that tells them apart."""
    if place % 3 == 0:
        return f'<circle class="dot c{place}" cx="{h:.1f}" cy="{v:.1f}" r="3"/>'
    if place % 3 == 1:
        return f'<rect class="dot c{place}" x="{h - 3:.1f}" y="{v - 3:.1f}" width="6" height="6"/>'
    return (
        f'<polygon class="dot c{place}" points="{h:.1f},{v - 4:.1f} {h + 4:.1f},{v + 3:.1f} {h - 4:.1f},{v + 3:.1f}"/>'
    )


def _legend(names: Sequence[str], mark: str | None) -> Markup:
    items = [_key(_marker(place, 6, 6), name) for place, name in enumerate(names)]
    if mark is not None:
        items.append(_key('<line class="mark" x1="6" x2="6" y1="0" y2="12"/>', mark))
    return Markup(f'<div class="legend">{"".join(items)}</div>')


def _key(shape: str, text: str) -> str:
    return f'<span class="key"><svg viewBox="0 0 12 12" aria-hidden="true">{shape}</svg>{_text(text)}</span>'


def _axis_name(text: str, h: float, v: float) -> str:
    return f'<text class="name" x="{h:.1f}" y="{v:.1f}" text-anchor="middle">{_text(text)}</text>'


def _upright(text: str, h: float, v: float) -> str:
    turn = f'transform="rotate(-90 {h:.1f} {v:.1f})"'
    return f'<text class="name" x="{h:.1f}" y="{v:.1f}" text-anchor="middle" {turn}>{_text(text)}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """Return about four round numbers from `low` to `high`."""
    size = 10 ** math.floor(math.log10((high - low) / 3))
    step = next(m * size for m in (1, 2, 5, 10) if (high - low) / (m * size) <= 5)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _whole(low: float, high: float) -> list[float]:
    """Return about six whole numbers from `low` to `high`, both ends among them."""
    step = max(1, math.ceil((high - low) / 5))
    inner = [x for x in range(math.ceil(low), math.floor(high) + 1, step) if high - x >= step / 2 or x == high]
    return list(dict.fromkeys([*map(float, inner), float(high)]))
