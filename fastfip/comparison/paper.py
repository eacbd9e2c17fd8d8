"""A comparison for a paper: data frame, Markdown, LaTeX, and paired tests over the seeds."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from fastfip.errors import ConfigError, DataError

if TYPE_CHECKING:
    from fastfip.comparison.result import Comparison, Row, Summary

__all__ = ["COLUMNS", "PairedTest", "as_frame", "as_latex", "as_markdown", "paired_tests"]

#: Figure -> the head of its column, what it is multiplied by, digits after the point.
COLUMNS: dict[str, tuple[str, float, int]] = {
    "test_acc": ("ACC (%)", 100, 1),
    "test_asr": ("ASR (%)", 100, 1),
    "test_ra": ("RA (%)", 100, 1),
    "der": ("DER (%)", 100, 1),
    "rir": ("RIR (%)", 100, 1),
    "seconds": ("seconds", 1, 1),
    "peak_memory": ("memory (MiB)", 2**-20, 0),
}
#: Up to so many pairs every choice of signs is tried; of more so many are drawn.
EXACT, DRAWN = 16, 50_000


@dataclass(frozen=True)
class PairedTest:
    """Two methods on the same models, clean sets and seeds.

    Attributes:
        figure: what is compared, e.g. "test_asr". method, other: labels of the rows.
        pairs: n, runs that both have. difference: mean of method - other, in the figure's own unit (a share, seconds).
        spread: standard deviation of the differences; None: one pair.
        p: two-sided p value of the sign-flip permutation test: how often signs drawn at random make a mean at least as
            large. It assumes nothing but that both methods could be exchanged, and cannot fall below 2 / 2^n.
    """

    figure: str
    method: str
    other: str
    pairs: int
    difference: float
    spread: float | None
    p: float

    def __str__(self) -> str:
        head, factor, digits = COLUMNS[self.figure]
        spread = "" if self.spread is None else f" ± {factor * self.spread:.{digits}f}"
        least = 2 / 2**self.pairs
        floor = f" (no smaller one is possible with {self.pairs})" if self.p <= least * 1.0001 and least > 0.01 else ""
        return (
            f"{head}: {self.method} - {self.other} = {factor * self.difference:+.{digits}f}{spread}, "
            f"{self.pairs} pairs, p = {self.p:.2g}{floor}"
        )


def paired_tests(comparison: Comparison, method: str, figure: str, others: Iterable[str] | None) -> list[PairedTest]:
    """Compare a method with others, run by run; `Comparison.paired` has arguments and errors."""
    if figure not in COLUMNS:
        raise ConfigError(f"figure={figure!r}: must be one of {', '.join(COLUMNS)}")
    runs: dict[str, dict[tuple[Any, ...], float]] = {}
    for row in comparison.rows:
        value = getattr(row, figure)
        if value is not None and not row.error:
            runs.setdefault(row.label, {})[_place(row)] = float(value)
    chosen = [label for label in runs if label != method] if others is None else list(others)
    for label in (method, *chosen):
        if label not in runs:
            raise DataError(f"no run of {label!r} has {figure}: there are {', '.join(runs) or 'none'}")
    out = []
    for label in chosen:
        both = [place for place in runs[method] if place in runs[label]]
        if not both:
            continue  # the row of the model as received has one seed only
        gaps = [runs[method][place] - runs[label][place] for place in both]
        spread = stdev(gaps) if len(gaps) > 1 else None
        out.append(PairedTest(figure, method, label, len(gaps), mean(gaps), spread, _sign_flips(gaps)))
    return out


def as_frame(comparison: Comparison) -> Any:
    """Return the runs as a data frame of pandas."""
    try:
        import pandas
    except ImportError:
        raise ModuleNotFoundError("a data frame needs pandas: pip install pandas") from None
    return pandas.DataFrame([asdict(row) for row in comparison.rows])


def as_markdown(comparison: Comparison, figures: Sequence[str] | None) -> str:
    """Return the means as a Markdown table; `Comparison.to_markdown` has arguments and errors."""
    heads, rows = _cells(comparison, figures)
    lines = [["method", *heads], ["---", *["---:"] * len(heads)], *rows]
    return "".join("| " + " | ".join(_escaped(cell, {"|": r"\|"}) for cell in line) + " |\n" for line in lines)


def as_latex(comparison: Comparison, figures: Sequence[str] | None) -> str:
    """Return the means as a LaTeX tabular."""
    heads, rows = _cells(comparison, figures)
    body = [[cell.replace("±", r"$\pm$") for cell in map(_latex, row)] for row in rows]
    lines = [
        rf"\begin{{tabular}}{{l{'r' * len(heads)}}}",
        r"\toprule",
        " & ".join(map(_latex, ["method", *heads])) + r" \\",
        r"\midrule",
        *(" & ".join(row) + r" \\" for row in body),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _place(row: Row) -> tuple[Any, ...]:
    """Return what two runs must have in common to be compared."""
    return row.model, row.clean_set, row.test_set, row.asr_set, row.seed


def _sign_flips(gaps: list[float]) -> float:
    """Return the share of signs at which the mean of the differences is at least as far from zero as it is."""
    bound = abs(sum(gaps)) * (1 - 1e-12)
    if len(gaps) <= EXACT:
        signs = list(itertools.product((1, -1), repeat=len(gaps)))
        return sum(abs(sum(s * g for s, g in zip(sign, gaps))) >= bound for sign in signs) / len(signs)
    drawn = random.Random(0)
    far = sum(abs(sum(g if drawn.random() < 0.5 else -g for g in gaps)) >= bound for _ in range(DRAWN))
    return (far + 1) / (DRAWN + 1)


def _cells(comparison: Comparison, figures: Sequence[str] | None) -> tuple[list[str], list[list[str]]]:
    """Return the heads of the columns, and for each method its label and cells."""
    summaries = comparison.summary()
    if figures is None:
        figures = [name for name in COLUMNS if any(name in s.mean for s in summaries)]
    odd = [name for name in figures if name not in COLUMNS]
    if odd:
        raise ConfigError(f"figures={list(figures)!r}: must be some of {', '.join(COLUMNS)}")
    return [COLUMNS[name][0] for name in figures], [[s.label, *(_cell(s, name) for name in figures)] for s in summaries]


def _cell(summary: Summary, name: str) -> str:
    if name not in summary.mean:
        return "failed" if summary.error else "-"
    if summary.label == "none" and name in ("seconds", "peak_memory"):
        return "-"
    _, factor, digits = COLUMNS[name]
    text = f"{factor * summary.mean[name]:.{digits}f}"
    return text + (f" ± {factor * summary.spread[name]:.{digits}f}" if name in summary.spread else "")


def _escaped(text: str, table: dict[str, str]) -> str:
    return "".join(table.get(letter, letter) for letter in " ".join(text.split()))


def _latex(text: str) -> str:
    table = {letter: "\\" + letter for letter in "&%$#_{}"}
    words = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return _escaped(text, {**table, **words})
