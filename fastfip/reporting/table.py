"""What commands print: a table for a terminal, the same as plain text where there is none, or JSON."""

from __future__ import annotations

import json
import math
import sys
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from fastfip.errors import printable
from fastfip.reporting.files import replacing

_LONGEST_LINE = 10_000
#: Columns of a terminal that nobody has widened.
COLUMNS = 80

__all__ = [
    "Report",
    "Sheet",
    "evaluation_sheet",
    "mapping_sheet",
    "methods_sheet",
    "plain",
    "settings_sheet",
    "show",
    "to_json",
    "write_text",
]


@dataclass(frozen=True)
class Sheet:
    """A table with a title above it and lines below. Columns whose name ends in ">" are aligned to the right.

    `width`: as plain text the table is at most so wide, if its last column, of words, can be broken; None: as it comes.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    lines: Sequence[str] = field(default=())
    width: int | None = None

    def __str__(self) -> str:
        names = [name.rstrip(">") for name in self.columns]
        shown = [names, *self.rows] if any(names) else list(self.rows)
        widths = [max([len(row[i]) for row in shown], default=0) for i in range(len(names))]
        out = [self.title] if self.title else []
        for line in (line for row in shown for line in self._broken(row, widths)):
            cells = [
                cell.rjust(width) if name.endswith(">") else cell.ljust(width)
                for cell, width, name in zip(line, widths, self.columns)
            ]
            out.append("  ".join(cells).rstrip())
        return "\n".join([*map(_safe, out), *map(_safe, self.lines)])

    def _broken(self, row: Sequence[str], widths: Sequence[int]) -> list[Sequence[str]]:
        """Return a row as the lines that its last cell takes."""
        room = 0 if self.width is None else self.width - sum(widths[:-1]) - 2 * (len(widths) - 1)
        parts = textwrap.wrap(row[-1], room, break_on_hyphens=False) if room > 0 else []
        return [row] if len(parts) < 2 else [[*row[:-1], parts[0]], *([*[""] * (len(row) - 1), p] for p in parts[1:])]

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(show_header=any(name.rstrip(">") for name in self.columns))
        for name in self.columns:
            table.add_column(Text(_safe(name.rstrip(">"))), justify="right" if name.endswith(">") else "left")
        for row in self.rows:
            table.add_row(*(Text(_safe(cell)) for cell in row))
        title = [Text(_safe(self.title), style="bold")] if self.title else []
        return Group(*title, table, *(Text(_safe(line)) for line in self.lines))


class Report(ABC):
    """A result that prints as a table, in a terminal and as plain text, and goes to JSON."""

    @abstractmethod
    def table(self) -> Sheet:
        """Return what is printed."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return everything but models and pictures as plain values."""

    def to_json(self, path: str | Path | None = None, indent: int | None = 2) -> str:
        """Return `to_dict()` as JSON text, and write it if `path` is given; numbers that are not finite become null."""
        text = to_json(self.to_dict(), indent)
        if path is not None:
            write_text(path, text + "\n")
        return text

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> Any:
        return self.table()


def _safe(text: str) -> str:
    """Return a text, line by line, without what would do something to a terminal: it may hold names from files."""
    return "\n".join(printable(line, _LONGEST_LINE) for line in text.split("\n"))


def evaluation_sheet(evaluation: Any, title: str) -> Sheet:
    """Return the table of a `metrics.Evaluation`."""
    rows = []
    for name, word in (("acc", "ACC"), ("asr", "ASR"), ("ra", "RA")):
        value = getattr(evaluation, name)
        if value is not None:
            count = evaluation.n if name == "acc" else evaluation.n_triggered
            rows.append((word, evaluation.shown(name), f"{count}"))
    if evaluation.loss is not None:
        rows.append(("loss", f"{evaluation.loss:.4g}", f"{evaluation.n}"))
    return Sheet(title, ("", "value>", "images>"), rows, [f"note: {note}" for note in evaluation.notes])


def mapping_sheet(values: Mapping[str, Any], title: str = "", lines: Sequence[str] = ()) -> Sheet:
    """Return a table of names and values."""
    rows = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, float):
            value = f"{value:.6g}"
        rows.append((str(name), "-" if value is None else str(value)))
    return Sheet(title, ("", ""), rows, lines)


def methods_sheet(methods: Sequence[Any], kind: str = "method") -> Sheet:
    """Return the table of methods, or of another kind that has names and summaries, given their classes."""
    rows = [(method.name, method.summary) for method in methods]
    return Sheet("", (kind, "what it does"), rows, [f"fastfip {kind}s NAME shows the settings of one"], COLUMNS)


def settings_sheet(method: Any) -> Sheet:
    """Return the table of a method's settings: name, default, meaning with type and range; 80 columns wide."""
    import dataclasses

    rows = []
    values = method.Config()  # a setting whose default depends on another has it here, not in its field
    for item in dataclasses.fields(method.Config):
        default = getattr(values, item.name)
        default = "none" if default is None else str(default)
        rule = item.metadata
        bounds = [f"{sign}{rule[name]:g}" for name, sign in _BOUNDS if rule.get(name) is not None]
        kind = str(item.type).replace("Literal[", "").replace("]", "").replace(" | None", "")
        rows.append((item.name, default, f"{rule.get('help', '')} ({', '.join([kind, *bounds])})"))
    return Sheet(f"{method.name}: {method.summary}", ("setting", "default", "meaning (values)"), rows, width=COLUMNS)


_BOUNDS = (("low", ">="), ("above", ">"), ("high", "<="), ("below", "<"))


def show(what: Any, stream: TextIO | None = None) -> None:
    """Print a sheet or a result: with lines and colour on a terminal, as plain text elsewhere."""
    stream = sys.stdout if stream is None else stream
    if stream.isatty():
        from rich.console import Console

        Console(file=stream).print(what)
    else:
        print(what, file=stream)


def to_json(values: Any, indent: int | None = 2) -> str:
    """Return JSON text; numbers that are not finite become null, what JSON does not know becomes text."""
    return json.dumps(plain(values), indent=indent, allow_nan=False)


def write_text(path: str | Path, text: str) -> None:
    """Write to a file beside it and rename: a run that is stopped leaves no half of a file."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def plain(value: Any) -> Any:
    """Return a value as what JSON knows: numbers that are not finite are None, what it does not know is text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
