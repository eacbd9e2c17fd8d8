"""Everything that needs a GPU, in one command: `make gpu` (ARGS="--quick --no-tests --no-peers" leaves parts out).

It runs the GPU tests of the Triton and the CUDA kernels (and the latter's under compute-sanitizer where that is
installed), measures what the device does at best, then sum_grad_squared by backend and whole passes over ViT-B/16,
ResNet-50 and PreActResNet-18 against a plain forward and backward pass and the peers that are installed. One table,
and benchmarks/results/gpu.csv. Exit codes: 0 all well, 1 a test failed, 3 no GPU.

--rehearse runs the same program on the CPU with tiny sizes, so that it is known to work before a GPU is at hand; its
numbers mean nothing and are not kept.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import torch

from benchmarks import gpu_measure as measure
from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.ops.problems import conv, dense
from fastfip.ops.backends import cuda, triton

COLUMNS = "part workload size dtype way ms rate unit of_ceiling ratio error"
RESULTS = harness.Results("gpu", f"{COLUMNS} device torch commit cuda triton cpu")  # each run replaces all rows
NO_GPU = 3
CUDA_TESTS = "tests/ops/test_cuda_kernels.py"
TRITON_TESTS = [f"tests/support/triton_{name}.py" for name in ("kernels", "norms", "spectral", "apply")]


def why_not() -> str:
    """Why nothing can be measured here."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA (set TORCH to a CUDA build)"
    return "" if torch.cuda.is_available() else "torch finds no CUDA device or driver"


def pytest(*arguments: str, before: tuple[str, ...] = ()) -> str:
    """Run tests in a process of their own; how they ended, in pytest's words."""
    command = [*before, sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if before else dict(os.environ)
    done = subprocess.run(command, cwd=harness.ROOT, text=True, capture_output=True, env=environment)
    last = (done.stdout.strip().splitlines() or ["printed nothing"])[-1].strip("= ")
    if done.returncode not in (0, 5):
        print(done.stdout[-6000:] + done.stderr[-2000:])
        return f"FAILED (exit {done.returncode}): {last}"
    return last


def tests() -> Iterator[Row]:
    """Run every GPU test there is: a row for each group."""
    missing = triton.reason()
    yield {
        "part": "tests", "workload": "Triton kernels",
        "error": missing or pytest(*TRITON_TESTS),
    }  # fmt: skip
    yield {"part": "tests", "workload": "CUDA kernels and everything marked gpu", "error": pytest("-m", "gpu")}
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        said = "compute-sanitizer is not installed"
        if sanitizer and not cuda.reason():
            command = (sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all")
            said = pytest(CUDA_TESTS, "-k", "test_definition or test_convolutions and not last", before=command)
        yield {"part": "tests", "workload": f"CUDA kernels under {tool}", "error": said}


def rows(options: argparse.Namespace) -> Iterator[Row]:
    if options.rehearse:
        clock = harness.Clock("cpu", 1, 0.01)
        dtypes = [torch.float32, torch.bfloat16]
        yield from measure.ceilings(clock, 64, dtypes)
        yield from measure.kernels(clock, "dense", dense, {"tiny": (2, 3, 8, 8)}, dtypes)
        yield from measure.kernels(clock, "conv", conv, {"tiny": (2, 4, 4, 6, 3, 1, 1)}, [torch.float32])
        yield from measure.passes(clock, measure.SMALL_NETS, False)
        return
    clock = harness.Clock("cuda", 3 if options.quick else 7, 20 if options.quick else 200)
    halves = [torch.bfloat16] if options.quick else [torch.bfloat16, torch.float16]
    yield from measure.ceilings(clock, 8192, [*halves, torch.float32])
    yield from measure.kernels(clock, "dense", dense, measure.DENSE, [*halves[:1], torch.float32])
    yield from measure.kernels(clock, "conv", conv, measure.CONV, [*halves[:1], torch.float32])
    yield from measure.passes(clock, measure.NETS, not options.no_peers)


def with_ceiling(found: list[Row]) -> None:
    """Fill in the share of the device's own matrix product of the same type."""
    best = {r["dtype"]: float(str(r["rate"])) for r in found if r["part"] == "ceiling" and "dtype" in r}
    for r in found:
        if r["part"] in ("dense", "conv") and "rate" in r and r["dtype"] in best:
            r["of_ceiling"] = float(str(r["rate"])) / best[r["dtype"]]


def shown(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def table(found: list[Row], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    view = Table(title=title, title_justify="left")
    for column in COLUMNS.split():
        view.add_column(column, justify="right" if column in ("ms", "rate", "of_ceiling", "ratio") else "left")
    before = None
    for r in found:
        if before not in (None, (r["part"], r["workload"])):
            view.add_section()
        before = (r["part"], r["workload"])
        view.add_row(*(shown(r.get(column, "")) for column in COLUMNS.split()))
    Console(width=None if sys.stdout.isatty() else 200).print(view)


def save(found: list[Row]) -> None:
    device = torch.cuda.get_device_name()
    RESULTS.add([{**{k: shown(v) for k, v in r.items()}, "device": device} for r in found])


def main() -> int:
    parser = harness.Parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny sizes, no tests, nothing kept")
    options = parser.parse()
    why = why_not()
    if why and not options.rehearse:
        print(f"no GPU to measure: {why}")
        return NO_GPU
    found = [] if options.no_tests or options.rehearse else list(tests())
    for r in rows(options):
        found.append(r)
        print("  ".join(f"{k}={shown(v)}" for k, v in r.items() if v != ""), file=sys.stderr, flush=True)
    with_ceiling(found)
    table(found, "rehearsal on the CPU" if options.rehearse else torch.cuda.get_device_name())
    if not options.rehearse:
        save(found)
    return int(any(str(r.get("error", "")).startswith("FAILED") for r in found))


if __name__ == "__main__":
    sys.exit(main())
