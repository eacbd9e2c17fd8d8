"""What a Fisher diagonal costs, as a multiple of one plain forward and backward pass.

    python -m benchmarks.fisher.bench_fisher_diagonal [--workloads abcde] [--threads 1] [--repeat 5]
        [--only WAY] [--no-peers]
    python -m benchmarks.fisher.bench_fisher_diagonal --memory [--workloads abcde]
    python -m benchmarks.fisher.bench_fisher_diagonal --plot

The workloads are those of docs/kernels.md: (a) an MLP, (b) PreActResNet-18 in eval mode, (c) ViT-S/16, (d) one Linear
at 197 tokens, (e) one 3x3 convolution. Ways: ours by backend, ours together with the gradient, one backward for each
sample, vmap(grad), and BackPACK, Opacus and nngeometry where they are installed (extra [bench]).

All ways take turns in one process, the order reversed every second time, and each gets its least time; a way that
needs more than three times a plain pass takes two turns only. With one thread times are CPU times, which other programs
disturb little; with more they are wall-clock times (column `clock`), so let nothing else run. A way is timed only after
what it gives agrees with float64 to 1e-3; one that does not, or fails, is listed with its error and no time.
`left_out` counts the parameters that a way says nothing about.

--memory: the peak of a fresh process, less that of the plain pass (which holds the gradients), over the size of the
parameters; it goes into the rows that are there. `memory_first` is that of the first call, which verifies the graph,
loads modules and makes scratch buffers; `memory` that of a later one.

Rows go to benchmarks/results/fisher_diagonal.csv: a run replaces those of its own workloads, ways and threads. --plot
draws them, and writes the table of docs/fisher.md.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

from torch import Tensor

from benchmarks import harness
from benchmarks.fisher.fisher_ways import TITLES, Way, Workload, ways, workload
from benchmarks.harness import Row
from fastfip.errors import BackendError
from fastfip.testing import nets
from fastfip.testing.definitions import loop_diagonal, worst_error

RESULTS = harness.Results(
    "fisher_diagonal",
    "workload way threads ratio ms plain_ms clock memory memory_first error left_out commit torch cpu native",
    run="workload way threads",
    kept="memory memory_first",
    order=lambda r: (str(r["threads"]), r["workload"], list(ways()).index(r["way"])),
)
DOCUMENT = harness.DOCS / "fisher.md"
SHOWN = {  # way -> what it is called in the table and in the plot, colour
    "fastfip native": ("fastfip", "#1b6ca8"),
    "fastfip with gradient": ("fastfip, gradient and diagonal", "#7fb3d5"),
    "fastfip native_bf16": ("fastfip, bf16 products", "#c6dbef"),
    "nngeometry": ("nngeometry", "#e08214"),
    "backpack": ("BackPACK", "#b35806"),
    "opacus": ("Opacus", "#8073ac"),
    "one backward each": ("one backward a sample", "#969696"),
    "vmap(grad)": ("vmap(grad)", "#525252"),
}


def checked(w: Workload, way: Way) -> tuple[str, int]:
    """Error of a way on a few samples against the definition in float64, or why it cannot run; parameters left out."""
    few = w.few(3)
    want = loop_diagonal(copy.deepcopy(w.model).double(), (few.x.double(), few.y), len(few.x))
    try:
        got = way(few)
    except (ImportError, BackendError) as error:
        return f"not here: {error}", 0
    except Exception as error:  # a peer that cannot do this net says so in many ways
        return f"fails: {harness.failure(error)}", 0
    if not got:
        return "finds nothing", len(want)
    error = worst_error(got, {name: want[name] for name in got}, 1e-6)
    return f"{error:.1e}" if error < 1e-2 else f"wrong: relative error {error:.1e}", len(want) - len(got)


def is_good(name: str, error: str) -> bool:
    """Whether a way may be timed; bf16 products are as far off as they are meant to be."""
    return error[0].isdigit() and (float(error) < 1e-3 or "bf16" in name)


def measure(key: str, threads: int, repeat: int, peers: bool, only: str | None = None) -> list[Row]:
    w, rows, calls = workload(key), list[Row](), dict[str, Way]()
    for name, way in ways(peers).items():
        if only and only not in name and name != "plain":
            continue
        entry: Row = {"workload": key, "way": name, "threads": threads, "error": "", "left_out": 0}
        if name != "plain":
            entry["error"], entry["left_out"] = checked(w, way)
        if name == "plain" or is_good(name, entry["error"]):
            calls[name] = way
        rows.append(entry)
    names: dict[str, set[str]] = {}

    def after(name: str, got: dict[str, Tensor]) -> None:
        assert set(got) == names.setdefault(name, set(got)), f"{name} does not give every time what it gave first"

    works = {name: partial(way, w) for name, way in calls.items()}
    times = harness.take_turns(works, repeat, threads=threads, patience=3, after=after)
    kind = harness.clock(threads)
    base = getattr(times["plain"], kind)  # of the same process: rows are added workload by workload
    for entry in rows:
        if entry["way"] in times:
            best = getattr(times[entry["way"]], kind)
            entry |= {"ratio": round(best / base, 3), "ms": round(best * 1e3, 1), "clock": kind}
            entry["plain_ms"] = round(base * 1e3, 1)
    return rows


def peaks_here(key: str, way: str) -> tuple[int, int]:
    """Peak memory of this process during the first call, and during the third one."""
    call, made = ways()[way], dict[str, Workload]()
    first = harness.peak(lambda: call(made.setdefault(key, workload(key))))
    call(made[key])
    harness.release()
    return first, harness.peak(lambda: call(made[key]))


def peaks(key: str, way: str, threads: int) -> list[int]:
    """Peak memory in bytes of a fresh process that does nothing else: first call, later call."""
    options = ("--peak", way, "--workloads", key, "--threads", threads)
    return harness.fresh("benchmarks.fisher.bench_fisher_diagonal", *options)


def add_memory(key: str, threads: int, only: str | None) -> None:
    """Measure the peak memory of the ways that have a time, and write it into their rows."""
    size, base = 4 * nets.parameter_count(workload(key).model), peaks(key, "plain", threads)
    for r in RESULTS.read():
        timed = (r["workload"], r["threads"]) == (key, str(threads)) and r["ratio"] != "" and r["way"] != "plain"
        if timed and (not only or only in r["way"]):
            first, later = (round((x - y) / size, 2) for x, y in zip(peaks(key, r["way"], threads), base))
            RESULTS.add([{**r, "memory_first": first, "memory": later}])
            print(key, r["way"], later, "first", first, flush=True)


def plot(path: Path) -> None:
    """Draw the ratio of every way, workload by workload, with one thread."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = {(r["workload"], r["way"]): r for r in RESULTS.read() if r["threads"] == "1"}
    keys = sorted({key for key, _ in rows})
    figure, axes = plt.subplots(1, len(keys), figsize=(3.1 * len(keys), 3.4), sharey=True, squeeze=False)
    for axis, key in zip(axes[0], keys):
        for at, (way, (_, colour)) in enumerate(reversed(SHOWN.items())):
            r = rows.get((key, way))
            if r is None or not r["ratio"]:
                axis.text(1.03, at, "cannot" if r is not None else "", va="center", fontsize=8, color="#777777")
                continue
            ratio = float(r["ratio"])
            axis.barh(at, ratio - 1, left=1, color=colour, height=0.75)
            star = "*" if r["left_out"] not in ("", "0") else ""
            axis.text(max(ratio, 1) * 1.05, at, f"{ratio:.3g}{star}", va="center", fontsize=8)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xlim(0.75, 600)
        axis.set_xticks([1, 10, 100], ["1", "10", "100"])
        axis.set_title(f"({key}) {TITLES[key]}", fontsize=8)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.tick_params(left=False, labelsize=8)
    axes[0][0].set_yticks(range(len(SHOWN)), [label for label, _ in reversed(SHOWN.values())], fontsize=8)
    figure.supxlabel(
        "time of the Fisher diagonal / time of a plain forward and backward pass; one thread; * leaves out parameters",
        fontsize=8,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def table(threads: str = "1") -> str:
    """Return the ratios as a table in markdown, with the extra memory in brackets where it was measured."""
    rows = {(r["workload"], r["way"]): r for r in RESULTS.read() if r["threads"] == threads}

    def cell(key: str, way: str) -> str:
        r = rows.get((key, way))
        if r is None or not r["ratio"]:
            return "-" if r is None else "fails"
        ratio = float(r["ratio"])
        text = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
        text += f" ({float(r['memory']):.1f})" if r["memory"] else ""
        return text + (f", {r['left_out']} parameters left out" if r["left_out"] not in ("", "0") else "")

    lines = [[label, *(cell(key, way) for key in TITLES)] for way, (label, _) in SHOWN.items()]
    return harness.table(["", *(f"({key}) {title}" for key, title in TITLES.items())], lines)


def main() -> None:
    parser = harness.Parser(__doc__, "threads", "repeat", "peak")
    parser.add_argument("--workloads", default="abcde")
    parser.add_argument("--only", help="only ways with this in their name")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--no-file", action="store_true", help="print, but do not write the rows")
    parser.add_argument("--memory", action="store_true", help="measure the peak memory of the ways that have a time")
    parser.add_argument("--plot", action="store_true", help="draw the rows that are there, write the table")
    options = parser.parse()
    if options.peak:
        print(*peaks_here(options.workloads, options.peak))
        return
    if options.plot:
        plot(harness.DOCS / "pictures" / "fisher_diagonal.png")
        harness.splice(DOCUMENT, "fisher", table())
        return
    for key in options.workloads:
        if options.memory:
            add_memory(key, options.threads, options.only)
            continue
        found = measure(key, options.threads, options.repeat, not options.no_peers, options.only)
        for entry in found:
            shown = {name: entry.get(name, "") for name in ("workload", "way", "ratio", "ms", "error")}
            harness.show(
                {**shown, "left_out": f"{entry['left_out']} left out" if entry["left_out"] else ""}, 8, way=-22
            )
        if not options.no_file:  # the plain pass of a full run stays
            RESULTS.add([r for r in found if not options.only or r["way"] != "plain"])


if __name__ == "__main__":
    main()
