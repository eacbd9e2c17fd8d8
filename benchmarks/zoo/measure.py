"""Give every model of the large zoo to every public function; what came of it becomes docs/zoo.md.

    python -m benchmarks.zoo.measure [--nets NAME ...] [--functions NAME ...] [--no-file]
    python -m benchmarks.zoo.measure --table                            # the document from the rows that are there

`make zoo` installs what it needs and runs it. Exit code 1: something is wrong, neither right nor refused in one line,
or it is refused and EXPECTED_REFUSALS does not have it. Rows go to benchmarks/results/zoo.csv.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Sequence
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.zoo.checks import CHECKS, judged
from benchmarks.zoo.library import version
from benchmarks.zoo.nets import NETS, Net, trained

RESULTS = harness.Results(
    "zoo",
    "net library what function verdict detail seconds parameters numbers versions machine torch commit",
    run="net library function",
    order=lambda row: (_PLACE.get((row["net"], row["library"]), len(NETS)), list(CHECKS).index(row["function"])),
)
DOCUMENT = harness.DOCS / "zoo.md"
#: Net, library and function of cells that one line may refuse; any other refusal is a fault.
EXPECTED_REFUSALS: frozenset[tuple[str, str, str]] = frozenset()
#: How the alerts of a result begin.
_ALERTS = ("DIVERGED", "RUINED", "ONLY FINE-TUNED", "THE MODEL IS AS IT WAS GIVEN")
_PLACE = {(net.name, net.library): place for place, net in enumerate(NETS)}
_LIBRARIES = {"timm": ("timm",), "transformers": ("transformers",), "peft": ("peft", "transformers")}


def measure(net: Net, functions: Collection[str] = tuple(CHECKS)) -> list[Row]:
    """Return a row for each of these public functions."""
    model, batch = trained(net), net.data()
    parameters = list(model.parameters())
    common = {
        "net": net.name,
        "library": net.library,
        "what": net.what,
        "parameters": len(parameters),
        "numbers": sum(p.numel() for p in parameters),
        "versions": ", ".join(version(name) for name in _LIBRARIES[net.library]),
    }
    rows = []
    for function, check in ((name, CHECKS[name]) for name in CHECKS if name in functions):
        start = time.perf_counter()
        found = judged(check, model, batch)
        seconds = round(time.perf_counter() - start, 1)
        rows.append(
            {**common, "function": function, "verdict": found.verdict, "detail": found.detail, "seconds": seconds}
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table: models by functions, and a line for each that is not right."""
    nets: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        nets.setdefault((row["net"], row["library"]), {})[row["function"]] = row
    notes: list[str] = []
    lines = []
    for (name, library), found in nets.items():
        cells = []
        for function in CHECKS:
            row = found.get(function)
            cells.append("-" if row is None else _cell(row, notes))
        first = next(iter(found.values()))
        numbers = f"{int(first['numbers']) / 1e6:.2g}"
        lines.append([f"`{name}`", library, first["what"], numbers, *cells])
    head = ["model", "of", "what is in it", "million numbers", *(f"`{function}`" for function in CHECKS)]
    text = [harness.table(head, lines)]
    text += [f"{place}. {note}" for place, note in enumerate(notes, 1)]
    versions = sorted({part for row in rows for part in row["versions"].split(", ")})
    wrong = sum(row["verdict"] == "wrong" for row in rows)
    refused = sum(row["verdict"] == "refused" for row in rows)
    counts = (
        f"{len(nets)} models, {len(rows)} cells: {len(rows) - wrong - refused} right, {refused} refused, {wrong} wrong"
    )
    return "\n".join(
        [
            f"{counts}. {', '.join(versions)}, torch {'; '.join(sorted({r['torch'] for r in rows}))}.",
            "",
            text[0],
            "",
            *text[1:],
        ]
    ).rstrip()


def _cell(row: dict[str, Any], notes: list[str]) -> str:
    """What stands in the table: a word, and the number of a note where there is more to say."""
    detail = row["detail"]
    alerts = [part for part in detail.split("; ") if part.startswith(_ALERTS)]
    if row["verdict"] != "right":
        note = f"{row['verdict']}: {detail}"
    elif alerts:
        note = f"right: {'; '.join(alerts)}"
    elif row["function"] == "audit" and "sharpness alone" in detail:
        note = f"right: {detail}"
    elif row["function"] == "FisherPenalty":
        return f"right, {detail.partition(':')[0]}"
    else:
        return "right"
    note = note.replace("|", "\\|").replace("<", "&lt;")
    if note not in notes:
        notes.append(note)
    return f"{row['verdict']} ({notes.index(note) + 1})"


def is_fault(row: dict[str, Any]) -> bool:
    """Whether a cell is wrong, or refused where that is not expected."""
    refused = row["verdict"] == "refused" and (row["net"], row["library"], row["function"]) not in EXPECTED_REFUSALS
    return refused or row["verdict"] == "wrong"


def write_document() -> None:
    """Put the table into docs/zoo.md."""
    harness.splice(DOCUMENT, "zoo", table(RESULTS.read()))


def main() -> None:
    """Measure, write the rows and the document."""
    parser = harness.Parser(__doc__, "threads")
    parser.add_argument("--nets", nargs="*", help="names of models, or of libraries; all if left out")
    parser.add_argument("--functions", nargs="*", choices=list(CHECKS), help="public functions; all if left out")
    parser.add_argument("--no-file", action="store_true", help="print, but do not write the rows")
    parser.add_argument("--table", action="store_true", help="write the document from the rows that are there")
    options = parser.parse()
    faults = 0
    for net in NETS if not options.table else ():
        if options.nets and net.name not in options.nets and net.library not in options.nets:
            continue
        torch.manual_seed(0)
        rows = measure(net, options.functions or tuple(CHECKS))
        faults += sum(map(is_fault, rows))
        for row in rows:
            harness.show(
                {k: row[k] for k in ("net", "function", "verdict", "seconds", "detail")},
                net=-32,
                function=-20,
                verdict=-8,
                detail=-1,
            )
        if not options.no_file:
            RESULTS.add(rows)
    if not options.no_file:
        write_document()
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
