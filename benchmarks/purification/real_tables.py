"""The tables that are made of the rows of `real_models.py`: each row, each method, each method on each net.

A cell is one net at one share of clean images in one setting; its figures are means over the seeds. Methods are
compared on the cells that both have, never on means over different cells.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import mean, median, stdev

from benchmarks import harness
from benchmarks.harness import Row

__all__ = ["BADNETS", "best_first", "by_method", "by_net", "full"]

Cell = tuple[str, float, str]  # net, fraction, setting
REFERENCE = "fast_wfip"
BASELINE = "fine_tune"
#: Means that differ by less than this many points of DER are called equal.
EQUAL = 0.1
#: The three nets that were backdoored by BadNets, and the ASR in percent below which a backdoor counts as removed.
BADNETS = ("nad_cifar10_wrn16_1_badnets", "ibau_gtsrb_badnets", "badnets_mnist")
REMOVED = 10.0


def good(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that hold figures: those of runs that broke hold an error instead."""
    return [row for row in rows if not row.get("error")]


def _cells(rows: Sequence[Row]) -> dict[str, dict[Cell, list[Row]]]:
    """Rows by method, then by cell."""
    out: dict[str, dict[Cell, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in good(rows):
        out[row["method"]][row["net"], float(row["fraction"]), row["setting"]].append(row)
    return out


def _values(rows: Sequence[Row], key: str) -> list[float]:
    return [float(row[key]) for row in rows if row[key] not in ("", None)]


def _means(cells: dict[Cell, list[Row]], key: str) -> dict[Cell, float]:
    """Mean over the seeds of each cell that has the figure."""
    return {cell: mean(values) for cell, found in cells.items() if (values := _values(found, key))}


def _gaps(mine: dict[Cell, float], theirs: dict[Cell, float]) -> list[float]:
    return [value - theirs[cell] for cell, value in mine.items() if cell in theirs]


def _spread(values: Sequence[float], digits: int = 2) -> str:
    if not values:
        return "-"
    tail = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{tail}"


def full(rows: Sequence[Row]) -> str:
    """Return every cell of every method: means over the seeds, +- is their standard deviation."""
    groups: dict[tuple[str, str, float, str], list[Row]] = defaultdict(list)
    for row in good(rows):
        groups[row["setting"], row["net"], float(row["fraction"]), row["method"]].append(row)
    lines = []
    for (setting, net, fraction, method), found in groups.items():
        show = lambda key, found=found: _spread(_values(found, key))  # noqa: E731
        plain = lambda key, digits, found=found: f"{mean(_values(found, key) or [0]):.{digits}f}"  # noqa: E731
        known = bool(found[0]["asr_before"])
        lines.append(
            [net, setting, f"{found[0]['clean_images']} ({fraction:.0%})", method, plain("acc_before", 2), show("acc"),
             plain("asr_before", 2) if known else "-", show("asr"), show("ra"), show("der"), plain("seconds", 0),
             plain("peak_memory_mb", 0)]
        )  # fmt: skip
    head = "net,setting,clean images,method,ACC before,ACC,ASR before,ASR,RA,DER,seconds,peak MB".split(",")
    broken = [row for row in rows if row.get("error")]
    tail = [
        f"\nno result: {row['net']}, {row['method']}, {float(row['fraction']):.0%}, {row['setting']}, "
        f"seed {row['seed']}: {row['error']}"
        for row in broken
    ]
    return harness.table(head, lines) + "\n".join(["", *tail] if tail else [])


def best_first(rows: Sequence[Row], reference: str = REFERENCE) -> list[str]:
    """Return the methods by their mean difference of DER to the reference, best first; those without one last."""
    ders = {method: _means(cells, "der") for method, cells in _cells(rows).items()}
    theirs = ders.get(reference) or next(iter(ders.values()), {})

    def place(method: str) -> float:
        gaps = _gaps(ders[method], theirs)
        return -mean(gaps) if gaps else float("inf")

    return sorted(ders, key=lambda method: (place(method), method))


def by_method(rows: Sequence[Row], reference: str = REFERENCE) -> str:
    """Return one line for each method.

    DER: mean over the cells of nets with a backdoor, +- the standard deviation from cell to cell; `worst`: the lowest
    cell. Then mean differences of DER to the baseline and to the reference, each on the cells that both have, and the
    cells in which the method is better / equal / worse than the reference. Seconds are the processor's, over the cells
    that have them (their number, if it is not all); how many times the reference's: the median of the cells that both
    have, the lowest and the highest. `clean net`: change of ACC there, in points. `BadNets removed`: on how many of the
    nets backdoored by BadNets that were measured at 5 %, plain, the mean ASR is below 10 %.
    """
    cells = _cells(rows)
    if reference not in cells:
        reference = next(iter(cells), "")
    lines = []
    for method in best_first(rows, reference):
        mine = cells[method]
        ders = _means(mine, "der")
        spreads = [stdev(v) for found in mine.values() if len(v := _values(found, "der")) > 1]
        gaps, baseline = (_gaps(ders, _means(cells.get(other, {}), "der")) for other in (reference, BASELINE))
        seconds, theirs = _means(mine, "cpu_seconds"), _means(cells[reference], "cpu_seconds")
        times = [seconds[cell] / max(theirs[cell], 1e-9) for cell in seconds if cell in theirs]
        better = sum(gap > EQUAL for gap in gaps)
        worse = sum(gap < -EQUAL for gap in gaps)
        loss = [float(r["acc"]) - float(r["acc_before"]) for found in mine.values() for r in found if r["der"] == ""]
        itself = method == reference
        some = f" ({len(seconds)} of {len(mine)} cells)" if 0 < len(seconds) < len(mine) else ""
        lines.append(
            [f"`{method}`", f"{len(ders)}", _spread(list(ders.values())),
             f"{min(ders.values()):.2f}" if ders else "-", f"{mean(spreads):.2f}" if spreads else "-",
             "-" if method == BASELINE or not baseline else f"{mean(baseline):+.2f}",
             "-" if itself or not gaps else f"{mean(gaps):+.2f}",
             "-" if itself or not gaps else f"{better} / {len(gaps) - better - worse} / {worse}",
             _spread(list(seconds.values()), 0) + some,
             "-" if itself or not times else f"{median(times):.1f}x ({min(times):.1f} to {max(times):.1f})",
             f"{mean(loss):+.2f}" if loss else "-", _removed(mine)]
        )  # fmt: skip
    head = ["method", "cells", "DER", "worst", "sd over seeds", f"DER - {BASELINE}", f"DER - {reference}",
            "better / equal / worse", "CPU seconds", f"/ {reference}", "clean net", "BadNets removed"]  # fmt: skip
    return harness.table(head, lines)


def _removed(cells: dict[Cell, list[Row]]) -> str:
    asked = [(net, 0.05, "plain") for net in BADNETS]
    asr = _means({cell: cells[cell] for cell in asked if cell in cells}, "asr")
    return f"{sum(value < REMOVED for value in asr.values())} of {len(asr)}" if asr else "-"


def by_net(rows: Sequence[Row], fraction: float, setting: str = "plain") -> str:
    """Return methods by nets: ACC / ASR, means over the seeds; "-" where nothing was measured."""
    chosen = [r for r in good(rows) if float(r["fraction"]) == fraction and r["setting"] == setting]
    nets = list(dict.fromkeys(r["net"] for r in chosen))
    cell: Callable[[str, str], list[Row]] = lambda m, n: [r for r in chosen if (r["method"], r["net"]) == (m, n)]  # noqa: E731

    def figures(found: list[Row], suffix: str = "") -> str:
        acc, asr = _values(found, f"acc{suffix}"), _values(found, f"asr{suffix}")
        if not acc:
            return "-"
        return f"{mean(acc):.1f} / {mean(asr):.1f}" if asr else f"{mean(acc):.1f}"

    lines = [["as received", *(figures([r for r in chosen if r["net"] == n][:1], "_before") for n in nets)]]
    lines += [[f"`{method}`", *(figures(cell(method, n)) for n in nets)] for method in best_first(chosen)]
    return harness.table(["ACC / ASR", *nets], lines)
