"""What a Fast FIP step costs, as a multiple of one plain fine-tuning step, in time and in memory.

    python -m benchmarks.purification.bench_fast_fip [--nets vit_s16 preact_resnet18] [--threads 1]
        [--repeat 5] [--memory]

A step is everything between two batches: W(delta) put in place, forward, loss, backward, the optimiser. The plain step
is SGD with momentum and weight decay on every parameter (the settings of `fine_tune`), BatchNorm in eval mode in all
ways. `released layers` rebuilds each weight U diag(relu(sigma + delta)) V^T in the forward pass and lets autograd go
through it, at full rank, as the code that was released with the paper does. `trace every fifth`: the mean of four
steps without and one with the exact Fisher trace of the shifts in the same pass. `fip, trace every fifth`: the same for
FIP on all weights. `compiled`: the model by torch.compile (inductor), its ratio over the plain step of such a model.

Times: CPU time with one thread, the clock with more; the ways take turns in one process, each gets its least time.
Memory: the peak of a fresh process during the third step, less what it had before the model was made (libraries already
in use); large tensors in mappings of their own, so that gaps between them do not count.
Rows go to benchmarks/results/fast_fip.csv.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.purification import steps
from benchmarks.purification.steps import Step
from fastfip.spectral import SpectralShifts
from fastfip.testing import nets

RESULTS = harness.Results(
    "fast_fip",
    "net way threads ratio ms memory memory_mb error commit torch cpu native",
    run="net way threads",
    kept="memory memory_mb",
    order=lambda r: (r["net"], str(r["threads"])),
)

MAKE: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "vit_s16": lambda: (nets.vit_s16(10), torch.randn(8, 3, 224, 224)),
    "preact_resnet18": lambda: (nets.randomize_norms(nets.preact_resnet18()), torch.randn(32, 3, 32, 32)),
}


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model, x = MAKE[name]()
    return model.eval(), x, torch.randint(0, 8, (len(x),))


def sgd(tensors: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(tensors, lr=1e-6, momentum=0.9, weight_decay=5e-4)


@contextmanager
def released(shifts: SpectralShifts) -> Iterator[None]:
    """Every weight rebuilt whole from its factors, autograd through the product."""
    for shift in shifts.shifts:
        whole = (shift.u * torch.relu(shift.sigma + shift.delta).unsqueeze(1)) @ shift.v.mT
        for site in shift.sites:
            site.put(whole.reshape(shift.weight.shape))
    shifts.installed = True
    try:
        yield
    finally:
        shifts.remove()


plain = partial(steps.weights, make=sgd)
fast = partial(steps.singular_values, make=sgd)
WAYS: dict[str, tuple[Callable[[nn.Module], Step], bool]] = {  # the bool: with the trace
    "plain": (plain, False),
    "fast_fip K=64": (partial(fast, rank=64), False),
    "fast_fip K=64, affine": (partial(fast, rank=64, affine=True), False),
    "fast_fip full rank": (fast, False),
    "fast_fip K=64, with trace": (partial(fast, rank=64), True),
    "released layers": (partial(fast, rebuilt=released), False),
    "fip, with trace": (plain, True),
    "plain, compiled": (partial(plain, compiled=True), False),
    "fast_fip K=64, compiled": (partial(fast, rank=64, compiled=True), False),
}
#: The way that a row's ratio is to be read against, where it is not the plain step.
COMPARED = {"fast_fip K=64, compiled": "plain, compiled"}
#: Means of steps without and with the trace.
EVERY_FIFTH = {
    "fast_fip K=64, trace every fifth": ("fast_fip K=64", "fast_fip K=64, with trace"),
    "fip, trace every fifth": ("plain", "fip, with trace"),
}


def gradients_agree(name: str) -> float:
    """Largest error of delta's gradient at K = 64 against autograd through the recomposed weight, relative."""
    model, x, y = problem(name)
    shifts = SpectralShifts.of(model.requires_grad_(False), 64)
    shifts.refresh()
    F.cross_entropy(model(x[:2]), y[:2]).backward()
    shifts.collect()
    found = [delta.grad for delta in shifts.deltas]
    with shifts.differentiable():
        right = torch.autograd.grad(F.cross_entropy(model(x[:2]), y[:2]), shifts.deltas)
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, right) if a is not None)


def ready(name: str, way: str) -> Callable[[], Tensor]:
    """Return a step on a model of its own: what is frozen differs."""
    model, x, y = problem(name)
    make, trace = WAYS[way]
    return partial(make(model), x, y, trace)


def measure(name: str, threads: int, repeat: int) -> list[Row]:
    error = gradients_agree(name)
    if error > 1e-3:
        sys.exit(f"{name}: delta's gradient is off by {error:.1e}; not timed")
    found = harness.take_turns({way: ready(name, way) for way in WAYS}, repeat, threads=threads)
    times = {way: getattr(seconds, harness.clock(threads)) for way, seconds in found.items()}
    for way, (without, with_trace) in EVERY_FIFTH.items():
        times[way] = 0.8 * times[without] + 0.2 * times[with_trace]
    ratio = {way: t / times[COMPARED.get(way, "plain")] for way, t in times.items()}
    return [
        {"net": name, "way": way, "threads": threads, "ratio": round(ratio[way], 3), "ms": round(t * 1e3, 1),
         "error": f"{error:.1e}" if way.startswith("fast_fip K=64") else ""}
        for way, t in times.items()
    ]  # fmt: skip


def peak_here(name: str, way: str) -> int:
    # What the libraries take when they are first used is nobody's.
    small = nn.Linear(64, 64)
    SpectralShifts.of(small, 8)
    small(torch.ones(64, 64)).sum().backward()
    sgd(list(small.parameters())).step()
    before = harness.resident()
    step = ready(name, way)
    step()
    step()
    harness.release()
    return harness.peak(step) - before


def add_memory(name: str, threads: int) -> None:
    found: dict[str, int] = {}
    for way in WAYS:
        options = ("--peak", way, "--nets", name, "--threads", threads)
        (found[way],) = harness.fresh(
            "benchmarks.purification.bench_fast_fip", *options, MALLOC_MMAP_THRESHOLD_="65536"
        )
        print(name, way, found[way] // 2**20, "MB", flush=True)
    for way, parts in EVERY_FIFTH.items():
        found[way] = max(found[part] for part in parts)
    ratio = {way: peak / found[COMPARED.get(way, "plain")] for way, peak in found.items()}
    RESULTS.add([
        {**row, "memory": round(ratio[row["way"]], 3), "memory_mb": found[row["way"]] // 2**20}
        for row in RESULTS.read() if (row["net"], row["threads"]) == (name, str(threads)) and row["way"] in found
    ])  # fmt: skip


def table() -> str:
    """Return the rows as a table in Markdown, a column for each net and number of threads."""
    rows = {(r["net"], r["threads"], r["way"]): r for r in RESULTS.read()}
    columns = sorted({(net, threads) for net, threads, _ in rows}, key=lambda c: (list(MAKE).index(c[0]), c[1]))

    def cell(net: str, threads: str, way: str) -> str:
        row = rows.get((net, threads, way), {})
        memory = f" ({float(row['memory']):.2f})" if row.get("memory") else ""
        return f"{float(row['ratio']):.2f}{memory}" if row.get("ratio") else "-"

    heads = [f"{net}, {threads} thread{'s' * (threads != '1')}" for net, threads in columns]
    lines = [[way, *(cell(*column, way) for column in columns)] for way in [*WAYS, *EVERY_FIFTH]]
    return harness.table(["", *heads], lines)


def main() -> None:
    parser = harness.Parser(__doc__, "threads", "repeat", "peak")
    parser.add_argument("--nets", nargs="*", default=list(MAKE), choices=list(MAKE))
    parser.add_argument("--memory", action="store_true", help="measure the peak memory for the rows that are there")
    parser.add_argument("--table", action="store_true", help="write the rows into docs/performance.md")
    options = parser.parse()
    if options.peak:
        print(peak_here(options.nets[0], options.peak))
        return
    if options.table:
        head = "Time of a step over the plain one's, in brackets the same of its peak memory:"
        harness.splice(harness.DOCS / "performance.md", "fast_fip", f"{head}\n\n{table()}")
        return
    for name in options.nets:
        if options.memory:
            add_memory(name, options.threads)
            continue
        found = measure(name, options.threads, options.repeat)
        RESULTS.add(found)
        for row in found:
            print(row["net"], f"{row['way']:<34}", row["ratio"], row["ms"], "ms", row["error"], flush=True)


if __name__ == "__main__":
    main()
