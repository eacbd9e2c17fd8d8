"""The report of many purifications, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fastfip.reporting.files import replacing
from fastfip.reporting.table import to_json

__all__ = ["write_report"]

_HEAD = ("checkpoint", "file", "method", "ACC before", "ACC", "ASR before", "ASR", "seconds", "")


def write_report(folder: Path, summary: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Write `report.md` and `report.json` into a folder.

    Args:
        folder: of the results.
        summary: how many rows are done.
        rows: lines of `results.csv`.
    """
    with replacing(folder / "report.json") as temporary:
        temporary.write_text(to_json({"summary": summary, "rows": list(rows)}) + "\n", encoding="utf-8")
    with replacing(folder / "report.md") as temporary:
        temporary.write_text(markdown(summary, rows), encoding="utf-8")


def markdown(summary: str, rows: Sequence[Mapping[str, str]]) -> str:
    """Return the report as Markdown: the summary, what failed and why, and a table of all rows."""
    failed = [row for row in rows if row["status"] == "failed"]
    parts = ["# Many purifications", f"{summary}. Figures are in percent; `results.csv` has all of them."]
    if failed:
        lines = (f"- {_cell(r['checkpoint'])} (key {r['key']}): {_cell(r['error'])}" for r in failed)
        parts += ["## Failed", "\n".join(lines)]
    warned = [row for row in rows if row["alerts"] and row["status"] == "done"]
    if warned:
        parts += [
            "## Done, but to be looked at",
            "\n".join(f"- {_cell(r['out'])}: {_cell(r['alerts'])}" for r in warned),
        ]
    table = [_HEAD, ("---",) * len(_HEAD), *map(_cells, rows)]
    parts += ["## All rows", "\n".join(f"| {' | '.join(line)} |" for line in table)]
    return "\n\n".join(parts) + "\n"


def _cells(row: Mapping[str, str]) -> tuple[str, ...]:
    percents = [_percent(row[name]) for name in ("acc_before", "acc", "asr_before", "asr")]
    plain = [_cell(row[name]) for name in ("checkpoint", "out", "method")]
    return (*plain, *percents, row["seconds"], row["status"])


def _percent(value: str) -> str:
    return f"{100 * float(value):.1f}" if value else "-"


def _cell(text: str) -> str:
    """Return text that may come from a file as part of a table: nothing in it is markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("`", "'")
