"""How long each method takes, and what it leaves, beside the package's own: one network, one clean set, one run.

    python -m benchmarks.purification.bench_methods [--networks digits-badnets-all ...] [--fractions 0.05 0.01]
        [--methods awm anp ...] [--again] [--table]

The networks are those of `benchmarks.suite`; each is trained where it is not there. Every method runs at its own
default settings in a process of its own, one after the other, on one thread; the ratio is that of the CPU time of
`purify`, with everything it does, to that of `fisher_steps` on the same network in the same run. Development networks
are enough: times do not depend on what was looked at. Rows go to benchmarks/results/method_times.csv, the table to
docs/suite.md.
"""

from __future__ import annotations

import time

from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.suite.cells import Cell, run_apart
from benchmarks.suite.networks import NETWORKS, prepare

OURS = "fisher_steps"
METHODS = (OURS, "large_step", "fast_wfip", "wfip", "i_bau", "ft_sam", "anp", "awm")
RESULTS = harness.Results(
    "method_times",
    "network fraction method began cpu_seconds ratio acc_before asr_before acc asr der steps machine threads torch "
    "fastfip commit native",
    run="network fraction method",
    order=lambda r: (list(NETWORKS).index(r["network"]), -float(r["fraction"]), _place(r["method"])),
)


def _place(method: str) -> int:
    return METHODS.index(method) if method in METHODS else len(METHODS)


def measure(network: str, fraction: float, methods: list[str]) -> list[Row]:
    """Run the methods one after the other, the package's own first; return a row for each."""
    prepare(NETWORKS[network])
    began = time.strftime("%Y-%m-%d %H:%M")  # rows of one run have it alike
    rows: list[Row] = []
    for method in [OURS, *(m for m in methods if m != OURS)]:
        found, error = run_apart(Cell(network, method, fraction, 0), 1, None)
        if not found:
            print(f"{network}, {method}: {error}", flush=True)
            continue
        mean = {key: sum(float(r[key]) for r in found) / len(found) for key in ("asr_before", "asr", "der")}
        seconds = float(found[0]["cpu_seconds"])
        rows.append({
            "network": network, "fraction": fraction, "method": method, "began": began, "cpu_seconds": seconds,
            "ratio": f"{seconds / float(rows[0]['cpu_seconds']):.2f}" if rows else "1.00", "threads": 1,
            **{key: found[0][key] for key in ("acc_before", "acc", "steps")},
            **{key: f"{value:.2f}" for key, value in mean.items()},
        })  # fmt: skip
        harness.show(
            {key: rows[-1][key] for key in ("network", "fraction", "method", "cpu_seconds", "ratio", "der")}, 14
        )
    return rows if rows and rows[0]["method"] == OURS else []


def show() -> str:
    """Return the table of the rows."""
    rows = [
        [r["network"], f"{float(r['fraction']):.0%}", f"`{r['method']}`", f"{float(r['cpu_seconds']):.0f}", r["ratio"],
         f"{float(r['acc']):.1f} / {float(r['asr']):.1f}", f"{float(r['der']):.1f}"]
        for r in RESULTS.read()
    ]  # fmt: skip
    head = ["network", "clean images", "method", "CPU seconds", f"over `{OURS}`'s", "ACC / ASR", "DER"]
    return harness.table(head, rows)


def main() -> None:
    parser = harness.Parser(__doc__, "again")
    parser.add_argument("--networks", nargs="+", default=["digits-badnets-all"], choices=list(NETWORKS))
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.05, 0.01], help="shares of clean images")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--table", action="store_true", help="only write the table to docs/suite.md anew")
    options = parser.parse()
    if not options.table:
        have = {RESULTS.key(row) for row in RESULTS.read()}
        for network in options.networks:
            for fraction in options.fractions:
                wanted = [m for m in options.methods if options.again or (network, str(fraction), m) not in have]
                if wanted:
                    RESULTS.add(measure(network, fraction, wanted))
    harness.splice(harness.DOCS / "suite.md", "method-times", show())


if __name__ == "__main__":
    main()
