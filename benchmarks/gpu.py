"""Everything that needs a GPU, in pieces: `make gpu` (ARGS="--piece ops --quick --no-peers" leaves parts out).

    tests    the GPU tests of the Triton and the CUDA kernels, the latter's under compute-sanitizer as well, where that
             is installed
    ops      what the device does at best, then every op by backend: `sum_grad_squared` against torch's weight
             gradient, the others against their reference
    models   whole passes over ViT-B/16, ResNet-50 and PreActResNet-18 against a plain forward and backward pass and
             the peers that are installed
    purify   steps of Fast FIP against plain ones, and a run of the default method

A piece begins nothing new after LIMIT seconds and says what it left out, so that each fits a machine that is lent for
minutes; every row is written to benchmarks/results/gpu.csv as soon as it is there. EXPECTED has the seconds that each
should take, by arithmetic: no GPU was at hand. Exit codes: 0 all well, 1 a test or a kernel failed, 3 no GPU.

--rehearse runs the same program on the CPU with tiny sizes, so that it is known to work before a GPU is at hand; its
numbers mean nothing and are not kept.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import torch

from benchmarks import gpu_measure as measure
from benchmarks import gpu_ops, harness
from benchmarks.harness import Row
from benchmarks.ops.problems import conv, dense
from fastfip.ops.backends import cuda, triton

COLUMNS = "part workload size dtype way ms rate unit of_ceiling ratio error"
RESULTS = harness.Results(
    "gpu", f"{COLUMNS} device torch commit cuda triton cpu", run="part workload size dtype way device"
)
NO_GPU = 3
#: Piece -> seconds that it should take on an H100, by arithmetic: rows times the length of a series, and compilation.
EXPECTED = {"tests": 200, "ops": 200, "models": 120, "purify": 60}
LIMIT = 240
CUDA_TESTS = [f"tests/ops/test_cuda_{name}kernels.py" for name in ("", "spectral_", "norm_", "gram_apply_")]
TRITON_TESTS = [f"tests/support/triton_{name}.py" for name in ("kernels", "norms", "spectral", "apply")]


def why_not() -> str:
    """Why nothing can be measured here."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA (set TORCH to a CUDA build)"
    return "" if torch.cuda.is_available() else "torch finds no CUDA device or driver"


def pytest(until: float, *arguments: str, before: tuple[str, ...] = ()) -> str:
    """Run tests in a process of their own, until that time at most; how they ended, in pytest's words."""
    command = [*before, sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if before else dict(os.environ)
    seconds = until - time.monotonic()
    if seconds < 1:
        return "left out: the time of the piece was over"
    # A session of its own, so that what the tests have started ends with them: it would keep the GPU busy.
    running = subprocess.Popen(
        command, cwd=harness.ROOT, text=True, env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        said = running.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        running.communicate()
        return f"left out: not done after {seconds:.0f} s"
    last = (said.strip().splitlines() or ["printed nothing"])[-1].strip("= ")
    if running.returncode not in (0, 5):
        print(said[-8000:])
        return f"FAILED (exit {running.returncode}): {last}"
    return last


def tests() -> Iterator[Row]:
    """Run every GPU test there is: a row for each group."""
    missing, until = triton.reason(), time.monotonic() + LIMIT
    yield {
        "part": "tests", "workload": "Triton kernels",
        "error": missing or pytest(until, *TRITON_TESTS),
    }  # fmt: skip
    yield {"part": "tests", "workload": "CUDA kernels and everything marked gpu", "error": pytest(until, "-m", "gpu")}
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        said = "compute-sanitizer is not installed"
        if sanitizer and not cuda.reason():
            command = (sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all")
            said = pytest(until, *CUDA_TESTS, "-k", "test_definition or test_convolutions and not last", before=command)
        yield {"part": "tests", "workload": f"CUDA kernels under {tool}", "error": said}


def ops(options: argparse.Namespace, clock: harness.Clock) -> Iterator[Row]:
    if options.rehearse:
        dtypes = [torch.float32, torch.bfloat16]
        yield from measure.ceilings(clock, 64, dtypes)
        yield from measure.kernels(clock, "dense", dense, {"tiny": (2, 3, 8, 8)}, dtypes)
        yield from measure.kernels(clock, "conv", conv, {"tiny": (2, 4, 4, 6, 3, 1, 1)}, [torch.float32])
        yield from gpu_ops.ops(clock, gpu_ops.SMALL_LAYERS, dtypes)
        return
    halves = [torch.bfloat16] if options.quick else [torch.bfloat16, torch.float16]
    yield from measure.ceilings(clock, 8192, [*halves, torch.float32])
    yield from gpu_ops.ops(clock, gpu_ops.LAYERS, [*halves[:1], torch.float32])
    yield from measure.kernels(clock, "dense", dense, measure.DENSE, [*halves[:1], torch.float32])
    yield from measure.kernels(clock, "conv", conv, measure.CONV, [*halves[:1], torch.float32])


def models(options: argparse.Namespace, clock: harness.Clock) -> Iterator[Row]:
    workloads = measure.SMALL_NETS if options.rehearse else measure.NETS
    yield from measure.passes(clock, workloads, not options.no_peers and not options.rehearse)


def purify(options: argparse.Namespace, clock: harness.Clock) -> Iterator[Row]:
    yield from gpu_ops.purification(
        clock, gpu_ops.SMALL_NETS if options.rehearse else gpu_ops.NETS, 2 if options.rehearse else 150
    )


def clock_of(options: argparse.Namespace) -> harness.Clock:
    if options.rehearse:
        return harness.Clock("cpu", 1, 0.01)
    return harness.Clock("cuda", 3 if options.quick else 5, 20 if options.quick else 60)


def rows(options: argparse.Namespace, piece: str) -> Iterator[Row]:
    """The rows of a piece, until its time is over."""
    if piece == "tests":
        yield from () if options.rehearse else tests()
        return
    start = time.monotonic()
    yield from _within(start, PIECES[piece](options, clock_of(options)), piece)


def _within(start: float, found: Iterator[Row], piece: str) -> Iterator[Row]:
    for r in found:
        yield r
        if time.monotonic() - start > LIMIT:
            yield {"part": piece, "workload": "left out", "error": f"the rest, after {LIMIT} s"}
            return


PIECES = {"ops": ops, "models": models, "purify": purify}


def with_ceiling(r: Row, best: dict[str, float]) -> Row:
    """Return a row with the share of the device's own matrix product of the same type; `best` remembers these."""
    if r["part"] == "ceiling":
        if "dtype" in r:
            best[str(r["dtype"])] = float(str(r["rate"]))
    elif "rate" in r and r.get("dtype") in best:
        return {**r, "of_ceiling": float(str(r["rate"])) / best[str(r["dtype"])]}
    return r


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


def save(r: Row) -> None:
    device = torch.cuda.get_device_name()
    named = dict.fromkeys(("part", "workload", "size", "dtype", "way"), "")
    RESULTS.add([{**named, **{k: shown(v) for k, v in r.items()}, "device": device}])


def main() -> int:
    parser = harness.Parser(__doc__)
    parser.add_argument("--piece", nargs="*", choices=list(EXPECTED), default=list(EXPECTED), help="default: all four")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny sizes, no tests, nothing kept")
    options = parser.parse()
    why = why_not()
    if why and not options.rehearse:
        print(f"no GPU to measure: {why}")
        return NO_GPU
    found, best = list[Row](), dict[str, float]()
    for piece in options.piece:
        begin = time.monotonic()
        for r in rows(options, piece):
            found.append(with_ceiling(r, best))
            print("  ".join(f"{k}={shown(v)}" for k, v in found[-1].items() if v != ""), file=sys.stderr, flush=True)
            if not options.rehearse:
                save(found[-1])
        spent = time.monotonic() - begin
        print(f"{piece}: {spent:.0f} s (expected on a GPU: {EXPECTED[piece]} s)", file=sys.stderr, flush=True)
    table(found, "rehearsal on the CPU" if options.rehearse else torch.cuda.get_device_name())
    return int(any(str(r.get("error", "")).startswith("FAILED") for r in found))


if __name__ == "__main__":
    sys.exit(main())
