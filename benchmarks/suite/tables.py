"""The tables and the plot that are made of the rows of the suite.

A cell is one backdoor of one network at one share of clean images; figures are means over the seeds. The floor of a
cell is the best DER of doing nothing (50), plain fine-tuning and fine-tuning with a large step: a method is worth its
while where it lies above. Methods are compared with the floor on the cells that both have.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from benchmarks import harness
from benchmarks.suite.cells import FLOOR, SETTINGS, kept, results
from benchmarks.suite.networks import NETWORKS
from benchmarks.suite.slices import measurable_methods

__all__ = ["by_attack", "by_method", "missing", "write"]

Row = dict[str, str]
Cell = tuple[str, str, str, str]  # network, attack, fraction, setting
#: ASR in percent above which a backdoor counts as kept.
KEPT = 10.0
NOTHING = 50.0
#: Methods that the README compares with the plainest rival, network by network.
OURS = ("fisher_steps",)


def _cells(rows: list[Row], key: str) -> dict[str, dict[Cell, float]]:
    """Means over the seeds, by method."""
    found: dict[str, dict[Cell, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row[key] != "" and not row["error"]:
            cell = (row["network"], row["attack"], row["fraction"], row["setting"])
            found[row["method"]][cell].append(float(row[key]))
    return {method: {cell: mean(values) for cell, values in cells.items()} for method, cells in found.items()}


def floor(rows: list[Row]) -> dict[Cell, float]:
    """Return the best DER of the simplest rivals on each cell that all of them have."""
    ders = _cells(rows, "der")
    simple = [ders.get(method, {}) for method in FLOOR]
    shared = set.intersection(*(set(cells) for cells in simple)) if all(simple) else set()
    return {cell: max(NOTHING, *(cells[cell] for cells in simple)) for cell in shared}


def by_method(rows: list[Row], fraction: float = 0.05, setting: str = "plain") -> str:
    """Return one line for each method: DER, against the floor, backdoors kept, change of clean networks, seconds.

    Of the backdoors that are kept, those are named whose trigger misleads the clean twin as well: what was optimised on
    a clean network is an adversarial perturbation, which purification is not about.
    """
    rows = [row for row in rows if row["setting"] == setting and float(row["fraction"]) == fraction]
    keys = ("der", "asr", "acc", "acc_before", "cpu_seconds", "asr_twin")
    ders, asrs, accs, before, seconds, twins = (_cells(rows, key) for key in keys)
    least = floor(rows)
    lines = []
    # Means over different cells do not compare: methods that have fewer stand below those that have more.
    for method in sorted(accs, key=lambda m: (-len(ders.get(m, ())), -mean(ders.get(m, {None: 0.0}).values()))):
        mine = ders.get(method, {})
        gaps = [value - least[cell] for cell, value in mine.items() if cell in least]
        lost = [accs[method][cell] - before[method][cell] for cell in accs[method] if not cell[1]]
        kept = [cell for cell, value in asrs.get(method, {}).items() if value > KEPT]
        alike = sum(twins.get(method, {}).get(cell, 0.0) > KEPT for cell in kept)
        worst = min(mine, key=lambda cell: mine[cell]) if mine else None
        lines.append([
            f"`{method}`", len(mine), f"{mean(mine.values()):.1f}" if mine else "-",
            f"{mine[worst]:.1f} ({worst[0]})" if worst else "-",
            f"{mean(gaps):+.1f} ({sum(g > 0.1 for g in gaps)} of {len(gaps)} above)" if gaps else "-",
            f"{len(kept)} of {len(mine)}" + (f" ({alike} mislead the twin too)" if alike else "") if mine else "-",
            f"{mean(lost):+.1f}" if lost else "-", f"{mean(seconds[method].values()):.0f}",
        ])  # fmt: skip
    head = ["method", "cells", "DER", "worst", "DER - floor", "ASR > 10", "clean networks", "CPU seconds"]
    return harness.table(head, lines)


def by_attack(rows: list[Row], fraction: float, setting: str = "plain") -> str:
    """Return ACC / ASR of each method on each backdoor; ASR above 10 % is bold."""
    rows = [row for row in rows if row["setting"] == setting and float(row["fraction"]) == fraction]
    accs, asrs = _cells(rows, "acc"), _cells(rows, "asr")
    first = {(r["network"], r["attack"], r["fraction"], r["setting"]): r for r in rows if not r["error"]}
    lines = []
    for cell, row in first.items():
        shown = [_pair(accs.get(m, {}).get(cell), asrs.get(m, {}).get(cell)) for m in sorted(accs)]
        old = f"{float(row['acc_before']):.1f}" + (f" / {float(row['asr_before']):.1f}" if row["asr_before"] else "")
        twin = " / ".join(f"{float(row[key]):.1f}" for key in ("acc_twin", "asr_twin") if row[key]) or "-"
        lines.append([cell[0], cell[1] or "none", twin, old, *shown])
    return harness.table(["network", "attack", "twin", "before", *(f"`{m}`" for m in sorted(accs))], lines)


def _pair(acc: float | None, asr: float | None) -> str:
    if acc is None:
        return "-"
    if asr is None:
        return f"{acc:.1f}"
    return f"{acc:.1f} / **{asr:.1f}**" if asr > KEPT else f"{acc:.1f} / {asr:.1f}"


def missing(rows: list[Row], of: str) -> str:
    """Return what of the set was not measured, in plain words: three seeds of every method on every network, plain."""
    have: dict[tuple[str, float], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in {(r["network"], r["method"], r["fraction"], r["seed"]) for r in rows if not r["error"] and _plain(r)}:
        have[row[1], float(row[2])][row[0]] += 1
    wanted = [n.name for n in NETWORKS.values() if n.backdoors and n.set == of]
    lacking = []
    for fraction in (0.05, 0.01):
        none = [f"`{m}`" for m in [*FLOOR[1:], *measurable_methods()] if not have[m, fraction]]
        if none:
            lacking.append(f"- at {fraction:.0%}, on every network: {', '.join(none)}")
        for method in (m for m in [*FLOOR[1:], *measurable_methods()] if have[m, fraction]):
            absent = [name for name in wanted if name not in have[method, fraction]]
            seeds = min(have[method, fraction].values())
            if absent:
                lacking.append(f"- `{method}` at {fraction:.0%}: {', '.join(absent)}")
            if seeds < 3:
                lacking.append(f"- `{method}` at {fraction:.0%}: {3 - seeds} of 3 seeds")
    broken = [
        f"- {r['network']}, `{r['method']}`, {float(r['fraction']):.0%}: {r['error']}" for r in rows if r["error"]
    ]
    return "\n".join(lacking + broken) or "- nothing"


def _plain(row: Row) -> bool:
    return row["setting"] == "plain"


def networks_table() -> str:
    """Return what the trained networks are before any purification."""
    lines = []
    for row in kept().read():
        shown = [f"{float(row[key]):.1f}" if row[key] else "-" for key in ("acc", "acc_twin", "asr", "asr_twin")]
        rate = f"{float(row['rate']):.0%}" if row["rate"] else "-"
        known = [row["network"], row["attack"] or "none", row["target"] or "-", rate, row["set"]]
        lines.append([*known, *shown, row["cpu_seconds"]])
    head = ["network", "attack", "target", "rate", "set", "ACC", "ACC, twin", "ASR", "ASR, twin", "CPU seconds"]
    return harness.table(head, lines)


def validation() -> list[Row]:
    """Return the rows of the validation set."""
    return results("validation").read()


def readme(rows: list[Row], methods: Sequence[str] = ()) -> str:
    """Return what the README shows: the cells at 5 % clean images, plain; of methods without them, a sentence says so.

    Means over different cells do not compare: methods that have fewer cells than others are not in it.
    """
    rows = [row for row in rows if row["setting"] == "plain" and float(row["fraction"]) == 0.05]
    ders, asrs, accs, before, seconds = (
        _cells(rows, key) for key in ("der", "asr", "acc", "acc_before", "cpu_seconds")
    )
    most = max((len(cells) for cells in ders.values()), default=0)
    shown = [method for method in ders if len(ders[method]) == most]
    shared = sorted(set.intersection(*(set(ders[method]) for method in shown))) if shown else []
    lines = []
    for method in sorted(shown, key=lambda m: -mean(ders[m][cell] for cell in shared)):
        change = mean(accs[method][cell] - before[method][cell] for cell in shared)
        left = [asrs[method][cell] for cell in shared]
        lines.append([
            f"`{method}`", f"{mean(ders[method][cell] for cell in shared):.1f}", f"{change:+.1f}", f"{mean(left):.1f}",
            f"{max(left):.1f}", f"{sum(value > KEPT for value in left)} of {len(left)}",
            f"{mean(seconds[method][cell] for cell in shared):.0f}",
        ])  # fmt: skip
    head = ["method", "DER", "ACC change, points", "ASR left, %", "worst", "ASR above 10 %", "CPU seconds"]
    absent = sorted({f"`{name}`" for name in methods} - {f"`{method}`" for method in shown})
    tail = f"\n\nNot measured on all of them, and so not in the table: {', '.join(absent)}." if absent else ""
    if not shared:
        return "Nothing was measured yet." + tail
    first = [row for row in rows if (row["network"], row["attack"], row["fraction"], row["setting"]) in shared]
    old = [float(row["asr_before"]) for row in first]
    said = f"{len(shared)} backdoors; before, ASR was {min(old):.0f} to {max(old):.0f} %."
    return f"{said}\n\n{harness.table(head, lines)}{''.join(_by_base(first, method) for method in OURS)}{tail}"


def _by_base(rows: list[Row], ours: str, theirs: str = "large_step") -> str:
    """Return how a method and the plainest rival did on the networks of each base; nothing where one has no rows."""
    parts = []
    for base in dict.fromkeys(row["base"] for row in rows):
        mine, rival = ([r for r in rows if r["base"] == base and r["method"] == method] for method in (ours, theirs))
        if mine and rival:
            ders, changes = (
                " and ".join(
                    f"{mean(float(r[a]) - (float(r[b]) if b else 0.0) for r in some):{form}}" for some in (mine, rival)
                )
                for a, b, form in (("der", "", ".1f"), ("acc", "acc_before", "+.1f"))
            )
            parts.append(f"{base} ({len(mine)}): DER {ders}, ACC {changes} points")
    return f"\n\n`{ours}` and `{theirs}` by network: {'; '.join(parts)}." if parts else ""


def text(of: str) -> str:
    """Return what the documents show of a set."""
    rows = results(of).read()
    if not rows:
        return "Nothing was measured yet."
    commits = sorted({row["commit"] for row in rows})
    parts = [f"Commits of the rows: {', '.join(commits)}. 5 % clean images:", by_method(rows)]
    for setting in SETTINGS:
        for fraction in (0.05, 0.01):
            some = [r for r in rows if r["setting"] == setting and float(r["fraction"]) == fraction]
            if some:
                name = "" if setting == "plain" else f", {setting}"
                parts += [
                    f"{fraction:.0%} clean images{name}, ACC / ASR in percent:",
                    by_attack(rows, fraction, setting),
                ]
    return "\n\n".join([*parts, "Not measured:", missing(rows, of)])


def transformers(rows: list[Row]) -> str:
    """Return one line for each method: ACC / ASR and DER of the vision transformers at 5 % clean images."""
    rows = [r for r in rows if r["base"] == "vit" and r["setting"] == "plain" and float(r["fraction"]) == 0.05]
    accs, asrs, ders, seconds = (_cells(rows, key) for key in ("acc", "asr", "der", "cpu_seconds"))
    cells = {cell: r for r in rows if not r["error"] for cell in [(r["network"], r["attack"], r["fraction"], "plain")]}
    before = [f"{float(r['acc_before']):.1f}" + (f" / {float(r['asr_before']):.1f}" if r["asr_before"] else "")
              for r in cells.values()]  # fmt: skip
    lines = [["as received", *before, "-"]]
    for method in sorted(accs, key=lambda m: -mean(ders.get(m, {None: 0.0}).values())):
        pairs = [_pair(accs[method].get(cell), asrs.get(method, {}).get(cell)) for cell in cells]
        reached = [ders.get(method, {}).get(cell) for cell in cells]
        shown = [pair + (f", DER {value:.1f}" if value is not None else "") for pair, value in zip(pairs, reached)]
        lines.append([f"`{method}`", *shown, f"{mean(seconds[method].values()):.0f}"])
    return harness.table(["ACC / ASR", *(cell[0] for cell in cells), "CPU seconds"], lines)


def plot(rows: list[Row], path: Path) -> None:
    """Draw the DER of each cell by method, best method above, at 5 % and plain; the floor is a method as well."""
    from fastfip.reporting.plots import new_figure, saved

    rows = [row for row in rows if row["setting"] == "plain" and float(row["fraction"]) == 0.05]
    ders = {**_cells(rows, "der"), "floor": floor(rows)}
    ders = {method: cells for method, cells in ders.items() if cells}
    order = sorted(ders, key=lambda method: mean(ders[method].values()))
    figure = new_figure(7.5, 0.9 + 0.28 * len(order))
    axes = figure.subplots()
    for place, method in enumerate(order):
        values = list(ders[method].values())
        axes.plot(values, [place] * len(values), "o", color="C7" if method == "floor" else "C0", alpha=0.5, ms=5)
        axes.plot([mean(values)], [place], "|", color="C3", ms=14, mew=2)
    axes.axvline(NOTHING, color="0.7", lw=1)
    axes.set_yticks(range(len(order)), [f"{method} ({len(ders[method])})" for method in order])
    axes.set_xlabel("DER of each backdoor (their number in brackets); red: mean; 50: nothing gained")
    saved(figure, path)


def write() -> None:
    """Put the tables into docs/suite.md, draw the validation set, and print the lines of the methods."""
    if any(row["der"] for row in validation()):
        plot(validation(), harness.DOCS / "pictures" / "suite.png")
    harness.splice(harness.DOCS / "suite.md", "suite-networks", networks_table())
    harness.splice(harness.DOCS / "results.md", "vit", transformers(results("development").read()))
    for of in ("development", "validation"):
        harness.splice(harness.DOCS / "suite.md", f"suite-{of}", text(of))
        rows = results(of).read()
        if rows:
            print(of, by_method(rows), sep="\n")
    harness.splice(harness.README, "suite", readme(validation(), measurable_methods()))
