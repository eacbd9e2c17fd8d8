"""How fast `sum_grad_squared` runs, by backend, against this machine's own matrix product.

    python -m benchmarks.ops.bench_sum_grad_squared [--threads 1] [--gradient] [--quick]

Times are CPU times (the least of some repetitions), so other programs on the machine disturb them little. A row is
timed only after its result agrees with the definition in float64. "sgemm" is the share of the rate of torch.mm on
1024 x 1024 matrices of the same type; for convolutions "weight_gradient" is the time of torch's own weight gradient
over ours (above 1: we are faster).
Rows go to benchmarks/results/sum_grad_squared.csv.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.ops import problems
from benchmarks.ops.problems import Problem

RESULTS = harness.Results(
    "sum_grad_squared",
    "workload size dtype backend ms gflops sgemm weight_gradient error gradient threads commit torch cpu native",
    run="gradient threads",
)

# N, T, O, I; the named ones are workloads (a) and (d) of docs/kernels.md
DENSE = {
    "T=1 (a)": (256, 1, 1024, 1024),
    "T=4": (256, 4, 512, 512),
    "T=16": (64, 16, 512, 512),
    "T=64": (32, 64, 512, 512),
    "T=197 (d)": (32, 197, 3072, 768),
    "T=197": (32, 197, 768, 768),
    "T=1024": (16, 1024, 256, 256),
    "ten outputs": (64, 64, 10, 512),
}
# N, C, O, size, kernel, stride, groups; (e) and the layers of (b), a PreActResNet-18
CONV = {
    "3x3 8x8 256 (e)": (128, 256, 256, 8, 3, 1, 1),
    "3x3 32x32 64 (b)": (32, 64, 64, 32, 3, 1, 1),
    "3x3 16x16 128 (b)": (32, 128, 128, 16, 3, 1, 1),
    "3x3 4x4 512 (b)": (32, 512, 512, 4, 3, 1, 1),
    "first layer (b)": (32, 3, 64, 32, 3, 1, 1),
    "3x3 stride 2 (b)": (32, 64, 128, 32, 3, 2, 1),
    "1x1 stride 2 (b)": (32, 64, 128, 32, 1, 2, 1),
    "depthwise 7x7": (8, 96, 96, 56, 7, 1, 96),
    "32 groups of 4": (32, 128, 128, 16, 3, 1, 32),
}


def measure(workload: str, problem: Problem, rate: float, gradient: bool, repeat: int) -> Iterator[Row]:
    """Time every backend, after a look at its error."""
    g, a, exact, dtype = problem.g, problem.a, problem.exact(), problem.g.dtype
    out, grad = problem.results(), problem.results() if gradient else None
    plain = harness.least(partial(problem.weight_gradient, g, a), repeat) if problem.shape else None
    for backend, why in problem.backends(out, grad):
        if why:
            print(f"{workload}: {backend.name} cannot run: {why}")
            continue
        error = problem.error(backend.name, exact)
        assert error < (1e3 * torch.finfo(dtype).eps if backend.automatic else 1e-2), (workload, backend.name, error)
        seconds = harness.least(partial(problem.ours, g, a, out=out, grad=grad, backend=backend.name), repeat)
        row = {"workload": workload, "size": problem.size, "dtype": problems.name_of(dtype), "backend": backend.name}
        row |= problems.rates(seconds, problem.work, rate, error)
        harness.show(row, 10, workload=-18)
        yield {**row, "gradient": gradient, "weight_gradient": round(plain / seconds, 2) if plain else ""}


def main() -> None:
    parser = harness.Parser(__doc__, "threads")
    parser.add_argument("--gradient", action="store_true", help="also return the gradient from the same pass")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, no file")
    options = parser.parse()
    torch.manual_seed(0)
    repeat, rows = 2 if options.quick else 7, list[Row]()
    for dtype in (torch.float32, torch.float64):
        rate = problems.gemm_rate(dtype, repeat)
        for workload, sizes in DENSE.items():
            rows += measure(workload, problems.dense(*sizes, dtype), rate, options.gradient, repeat)
    rate = problems.gemm_rate(torch.float32, repeat)
    for workload, layer in CONV.items():
        rows += measure(workload, problems.conv(*layer, torch.float32), rate, options.gradient, repeat)
    if not options.quick:
        RESULTS.add(rows)


if __name__ == "__main__":
    main()
