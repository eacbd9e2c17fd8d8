"""The page of a report, made of nothing but its document: one file without network and without scripts."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastfip.errors import printable
from fastfip.reporting import charts

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

__all__ = ["page"]

#: First line of the page of each kind of document.
HEADINGS = {"purify": "Purification report", "audit": "Audit report", "compare": "Comparison report"}
#: Classes that a table shows, those first that fell the most.
MOST_CLASSES = 40
#: Longest text that is shown; what is longer is cut, and is whole in the JSON.
_LONGEST = 4000
_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}")


def page(document: Mapping[str, Any]) -> str:
    """Return the page of a document, see `fastfip.reporting.document`.

    Every text in it may come from a file: it is escaped, and what would turn or hide writing becomes a question mark.

    Raises:
        KeyError: there is no page for this kind of document.
    """
    heading = HEADINGS[document["kind"]]
    template = _environment().get_template(f"{document['kind']}.html")
    return template.render(**document, heading=heading, history_of=functools.partial(_history, document.get("history")))


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Environment(
        loader=PackageLoader("fastfip.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(
        percent=_percent, points=_points, figure=_figure, amount=_amount, around=_around, png=_png, size=_size
    )
    found.globals.update(course=charts.course, shares=charts.shares, bars=_bars, phases=_phases)
    found.globals.update(
        means=_means, percents=_percents, columns_of=_columns, shown_classes=_shown_classes, class_name=_class_name
    )
    return found


def _shown(value: Any) -> Any:
    """Return what is put on the page: texts without marks that turn writing, line breaks kept."""
    if hasattr(value, "__html__"):
        return value
    if value is None:
        return "-"
    return "\n".join(printable(line, _LONGEST) for line in value.split("\n")) if isinstance(value, str) else value


def _percent(share: float | None, digits: int = 2) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def _points(change: float | None) -> str:
    """A difference of two shares, with its sign, in percentage points."""
    if change is None:
        return "-"
    text = f"{100 * change:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def _around(interval: Any) -> str:
    return "" if not interval else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def _figure(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _amount(number: float | None) -> str:
    """Bytes, in the largest unit that leaves a number above 1."""
    if number is None:
        return "-"
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"


def _size(shape: Any) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _png(text: str) -> Markup:
    """Return a picture's address; only what can be base64 is one."""
    from markupsafe import Markup

    if not _BASE64.fullmatch(text):
        raise ValueError("a picture of the report is no base64 text")
    return Markup(f"data:image/png;base64,{text}")


def _history(records: Any, name: str) -> list[tuple[float, float]]:
    """Return (epoch, value) of a figure where it is known."""
    return [(r["epoch"], r[name]) for r in records or () if isinstance(r.get(name), (int, float))]


def _columns(records: Any) -> list[str]:
    """Return the figures of a history, the epoch first."""
    names = list(dict.fromkeys(name for record in records for name in record))
    return sorted(names, key=lambda name: name != "epoch")


def _bars(before: Any, after: Any) -> list[Any]:
    """Return the rows of the chart of shares."""
    rows = []
    for name in ("acc", "asr", "ra"):
        points = [
            (word, side[name], side["intervals"].get(name))
            for word, side in (("before", before), ("after", after))
            if side[name] is not None
        ]
        rows.append((name.upper(), points))
    return rows


def _means(summary: Any) -> list[Any]:
    """Return the rows of the chart of methods: means with one standard deviation to either side."""
    rows = []
    for one in summary:
        points = []
        for name, word in (("test_acc", "ACC"), ("test_asr", "ASR")):
            if name in one["mean"]:
                mean, spread = one["mean"][name], one["spread"].get(name)
                around = None if spread is None else (max(0.0, mean - spread), min(1.0, mean + spread))
                points.append((word, mean, around))
        rows.append(("as received" if one["label"] == "none" else one["label"], points))
    return rows


def _percents(course: Any) -> list[tuple[float, float]]:
    """Return (step, percent) of (step, share), where it is known."""
    return [(step, 100 * share) for step, share in course if share is not None]


def _phases(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    """Return the phases with time in them, the longest first, and what no phase has."""
    known = [(name, spent) for name, spent in seconds.items() if name != "total" and spent >= 0.005]
    rest = seconds.get("total", 0.0) - sum(spent for _, spent in known)
    return sorted([*known, *([("other", rest)] if rest >= 0.005 else [])], key=lambda item: -item[1])


def _shown_classes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows that the table has: all of a few classes, else those that fell the most."""
    if len(rows) <= MOST_CLASSES:
        return rows
    return sorted(rows, key=lambda row: row["after"] - row["before"])[:MOST_CLASSES]


def _class_name(label: int, rows: list[dict[str, Any]]) -> str:
    """Return the name of a class, in brackets, where it has one that is not its number."""
    name = next((row["name"] for row in rows if row["label"] == label), None)
    return "" if name is None or name == str(label) else f" ({name})"
