"""What a Fast FIP step costs, as a multiple of one plain fine-tuning step, in time and in memory.

    python -m benchmarks.purification.bench_fast_fip [--nets vit_s16 preact_resnet18] [--threads 1]
        [--repeat 5] [--memory]

A step is everything between two batches: W(delta) put in place, forward, loss, backward, the optimiser. The plain step
is SGD with momentum and weight decay on every parameter (the settings of `fine_tune`), BatchNorm in eval mode in all
ways. `released layers` rebuilds each weight U diag(relu(sigma + delta)) V^T in the forward pass and lets autograd go
through it, at full rank, as the code that was released with the paper does. `trace every fifth`: the mean of four
steps without and one with the exact Fisher trace of the shifts in the same pass. `fip, trace every fifth`: the same for
FIP on all weights.

Times: CPU time with one thread, the clock with more; the ways take turns in one process, each gets its least time.
Memory: the peak of a fresh process during the third step, less what it had before the model was made (libraries already
in use); large tensors in mappings of their own, so that gaps between them do not count.
Rows go to benchmarks/results/fast_fip.csv.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfip import env
from fastfip.data import Task
from fastfip.fisher import trace_and_logits
from fastfip.fisher.modes import readable
from fastfip.spectral import SpectralShifts
from fastfip.spectral.fisher import delta_gradients, recording
from fastfip.testing import nets

RESULTS = Path(__file__).parents[1] / "results" / "fast_fip.csv"
ETA = 1e-3
Step = Callable[[], None]

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


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    optimizer = sgd(list(model.parameters()))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def fip_trace(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    optimizer = sgd(list(model.parameters()))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        found = trace_and_logits(model, (x, y), Task())
        (found.losses.mean() + ETA * found.trace).backward()
        optimizer.step()

    return step


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def fast(rank: int | None, affine: bool = False) -> Callable[[nn.Module, Tensor, Tensor], Step]:
    def make(model: nn.Module, x: Tensor, y: Tensor) -> Step:
        shifts = SpectralShifts.of(frozen(model), rank)
        small = [p.requires_grad_(True) for p in model.parameters() if affine and p.dim() <= 1]
        optimizer = sgd([*shifts.deltas, *small])

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            shifts.refresh()
            F.cross_entropy(model(x), y).backward()
            shifts.collect()
            shifts.remove()
            optimizer.step()

        return step

    return make


def fast_trace(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    shifts = SpectralShifts.of(frozen(model), 64)
    optimizer = sgd(shifts.deltas)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        shifts.refresh()
        with recording(shifts) as record:
            with readable(model, second_order=True):
                losses = F.cross_entropy(model(x), y, reduction="none")
            each = delta_gradients(shifts, record, losses, create_graph=True)
            trace = torch.stack([d.square().sum() for d in each]).sum() / len(x)
        (losses.mean() + ETA * trace).backward()
        shifts.collect()
        shifts.remove()
        optimizer.step()

    return step


def released(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Every weight rebuilt whole from its factors, autograd through the product."""
    shifts = SpectralShifts.of(frozen(model))
    optimizer = sgd(shifts.deltas)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for shift in shifts.shifts:
            whole = (shift.u * torch.relu(shift.sigma + shift.delta).unsqueeze(1)) @ shift.v.mT
            for site in shift.sites:
                site.put(whole.reshape(shift.weight.shape))
        shifts.installed = True
        F.cross_entropy(model(x), y).backward()
        shifts.remove()
        optimizer.step()

    return step


WAYS: dict[str, Callable[[nn.Module, Tensor, Tensor], Step]] = {
    "plain": plain,
    "fast_fip K=64": fast(64),
    "fast_fip K=64, affine": fast(64, affine=True),
    "fast_fip full rank": fast(None),
    "fast_fip K=64, with trace": fast_trace,
    "released layers": released,
    "fip, with trace": fip_trace,
}
#: Means of steps without and with the trace.
EVERY_FIFTH = {
    "fast_fip K=64, trace every fifth": ("fast_fip K=64", "fast_fip K=64, with trace"),
    "fip, trace every fifth": ("plain", "fip, with trace"),
}


def gradients_agree(name: str) -> float:
    """Largest error of delta's gradient at K = 64 against autograd through the recomposed weight, relative."""
    model, x, y = problem(name)
    shifts = SpectralShifts.of(frozen(model), 64)
    shifts.refresh()
    F.cross_entropy(model(x[:2]), y[:2]).backward()
    shifts.collect()
    found = [delta.grad for delta in shifts.deltas]
    with shifts.differentiable():
        right = torch.autograd.grad(F.cross_entropy(model(x[:2]), y[:2]), shifts.deltas)
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, right) if a is not None)


def measure(name: str, threads: int, repeat: int) -> list[dict[str, object]]:
    clock = time.process_time if threads == 1 else time.perf_counter
    error = gradients_agree(name)
    if error > 1e-3:
        sys.exit(f"{name}: delta's gradient is off by {error:.1e}; not timed")
    steps: dict[str, Step] = {}
    for way, make in WAYS.items():  # each has a model of its own: what is frozen differs
        steps[way] = make(*problem(name))
        steps[way]()
    times = {way: float("inf") for way in WAYS}
    for turn in range(repeat):
        for way in list(WAYS) if turn % 2 else reversed(list(WAYS)):
            start = clock()
            steps[way]()
            times[way] = min(times[way], clock() - start)
    for way, (without, with_trace) in EVERY_FIFTH.items():
        times[way] = 0.8 * times[without] + 0.2 * times[with_trace]
    base = times["plain"]
    return [
        {"net": name, "way": way, "threads": threads, "ratio": round(t / base, 3), "ms": round(t * 1e3, 1),
         "error": f"{error:.1e}" if way.startswith("fast_fip K=64") else ""}
        for way, t in times.items()
    ]  # fmt: skip


def high_water(field: str = "VmHWM") -> int:
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def peak_here(name: str, way: str) -> int:
    # What the libraries take when they are first used is nobody's.
    small = nn.Linear(64, 64)
    SpectralShifts.of(small, 8)
    small(torch.ones(64, 64)).sum().backward()
    sgd(list(small.parameters())).step()
    before = high_water("VmRSS")
    step = WAYS[way](*problem(name))
    step()
    step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is in use now
    step()
    return high_water() - before


def add_memory(name: str, threads: int) -> None:
    rows = load()
    found: dict[str, int] = {}
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.purification.bench_fast_fip", "--peak", way, "--nets", name]
        done = subprocess.run(
            [*command, "--threads", str(threads)], capture_output=True, text=True, check=True,
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        )  # fmt: skip
        found[way] = int(done.stdout.split()[-1])
        print(name, way, found[way] // 1024, "MB", flush=True)
    for way, parts in EVERY_FIFTH.items():
        found[way] = max(found[part] for part in parts)
    for row in rows:
        if (row["net"], row["threads"]) == (name, str(threads)):
            row["memory"] = str(round(found[row["way"]] / found["plain"], 3))
            row["memory_mb"] = str(found[row["way"]] // 1024)
    write(rows)


def load() -> list[dict[str, str]]:
    return list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []


def write(rows: list[dict[str, str]]) -> None:
    fields = "net way threads ratio ms memory memory_mb error commit torch cpu native".split()
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, restval="")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda r: (r["net"], r["threads"])))


def write_table() -> None:
    """Put the rows between the marks in docs/performance.md."""
    rows = {(r["net"], r["threads"], r["way"]): r for r in load()}
    columns = sorted({(net, threads) for net, threads, _ in rows}, key=lambda c: (list(MAKE).index(c[0]), c[1]))
    heads = [f"{net}, {threads} thread{'s' * (threads != '1')}" for net, threads in columns]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for way in [*WAYS, *EVERY_FIFTH]:
        cells = []
        for net, threads in columns:
            row = rows.get((net, threads, way), {})
            memory = f" ({float(row['memory']):.2f})" if row.get("memory") else ""
            cells.append(f"{float(row['ratio']):.2f}{memory}" if row.get("ratio") else "-")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    path = Path(__file__).parents[2] / "docs" / "performance.md"
    begin, end = "<!-- fast_fip:begin -->", "<!-- fast_fip:end -->"
    text = path.read_text()
    path.write_text(
        f"{text.split(begin)[0]}{begin}\n"
        "Time of a step over the plain one's, in brackets the same of its peak memory:\n\n"
        + "\n".join(lines)
        + f"\n{end}{text.split(end)[1]}"
    )


def _text(row: dict[str, object]) -> dict[str, str]:
    return {key: str(value) for key, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="*", default=list(MAKE), choices=list(MAKE))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="measure the peak memory for the rows that are there")
    parser.add_argument("--table", action="store_true", help="write the rows into docs/performance.md")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak_here(options.nets[0], options.peak))
        return
    if options.table:
        write_table()
        return
    for name in options.nets:
        if options.memory:
            add_memory(name, options.threads)
            continue
        here = env.collect()
        stamp = {key: str(here[key]) for key in ("commit", "torch", "cpu", "native")}
        found = measure(name, options.threads, options.repeat)
        same = {r["way"]: r for r in load() if (r["net"], r["threads"]) == (name, str(options.threads))}
        old = [r for r in load() if r not in same.values()]
        memory = {way: {k: r[k] for k in ("memory", "memory_mb")} for way, r in same.items()}
        write([*old, *({**memory.get(str(row["way"]), {}), **_text(row), **stamp} for row in found)])
        for row in found:
            print(row["net"], f"{row['way']:<34}", row["ratio"], row["ms"], "ms", row["error"], flush=True)


if __name__ == "__main__":
    main()
