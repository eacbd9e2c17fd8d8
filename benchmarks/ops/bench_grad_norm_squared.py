"""How fast `grad_norm_squared` and `gram_apply` run, by backend, against plain torch and a loop over samples.

    python -m benchmarks.ops.bench_grad_norm_squared [--threads 1] [--quick]

The shapes are those of the layers of the workloads of bench_fisher_diagonal.py (c: four samples). "forward" is the
norms alone, "both" with the gradients of their sum. Rivals: "torch formula" is the ghost norm as a few lines of torch
write it (the map unfolded, direct or Gram by cost of the forward, autograd's own backward), "loop" forms G_n of one
sample after the other.

Times are CPU times, the least of some repetitions. "gflops" counts the operations of the direct form (2 T O I a sample
forward, 6 with the gradients; gram_apply: of the cheaper order), whatever a way does: one that needs fewer may exceed
the rate of the matrix product, "sgemm" is the quotient. A row is timed only after it agrees with the definition in
float64.
Rows go to benchmarks/results/grad_norm_squared.csv.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.ops import problems
from fastfip.ops import OPS, ConvShape, grad_norm_squared, grad_norm_squared_conv, gram_apply
from fastfip.testing.definitions import relative_error

RESULTS = harness.Results(
    "grad_norm_squared",
    "op workload size way what ms gflops sgemm error threads commit torch cpu native",
    run="threads",
)
Call = Callable[..., Tensor]

# N, T, O, I
DENSE = {
    "hidden layer (a)": (256, 1, 1024, 1024),
    "qkv (c)": (4, 197, 1152, 384),
    "projection (c)": (4, 197, 384, 384),
    "mlp (c)": (4, 197, 1536, 384),
    "T=64": (32, 64, 512, 512),
    "T=1024": (16, 1024, 256, 256),
}
# N, C, O, size, kernel, stride
CONV = {
    "first layer (b)": (32, 3, 64, 32, 3, 1),
    "3x3 32x32 64 (b)": (32, 64, 64, 32, 3, 1),
    "3x3 stride 2 (b)": (32, 64, 128, 32, 3, 2),
    "3x3 16x16 128 (b)": (32, 128, 128, 16, 3, 1),
    "3x3 8x8 256 (b)": (32, 256, 256, 8, 3, 1),
    "3x3 4x4 512 (b)": (32, 512, 512, 4, 3, 1),
    "3x3 8x8 256 (e)": (128, 256, 256, 8, 3, 1),
}
# N, T, U, D, E
APPLY = {
    "hidden layer (a)": (256, 1, 1, 1024, 1024),
    "qkv (c)": (4, 197, 197, 384, 1152),
    "mlp (c)": (4, 197, 197, 384, 1536),
    "T=1024": (16, 1024, 1024, 256, 256),
}


@dataclass
class Problem:
    op: str
    workload: str
    size: str
    operands: tuple[Tensor, ...]
    ways: dict[str, Call]  # "loop" is the definition
    work: dict[str, int]  # what is measured -> its operations


def loop(g: Tensor, a: Tensor) -> Tensor:
    return torch.stack([(y.t() @ x).square().sum() for y, x in zip(g, a)])


def unfolded(norms: Call, k: int, s: int) -> Call:
    def call(g: Tensor, x: Tensor) -> Tensor:
        return norms(g.flatten(2).mT, F.unfold(x, k, padding=k // 2, stride=s).mT)

    return call


def ours(op: str, call: Call, *arguments: object) -> dict[str, Call]:
    """Return the backends that an op may choose by itself."""
    able = (b.name for b in OPS[op].backends if b.automatic and not b.refuses(*arguments))
    return {name: partial(call, backend=name) for name in able}


def make() -> Iterator[Problem]:
    for name, (n, t, o, i) in DENSE.items():
        g, a = torch.randn(n, t, o), torch.randn(n, t, i)
        ways = ours("grad_norm_squared", grad_norm_squared, g, a)
        ways |= {"torch formula": problems.ghost_norm, "loop": loop}
        text, work = f"{n}x{t}x{o}x{i}", n * t * o * i
        yield Problem("grad_norm_squared", name, text, (g, a), ways, {"forward": 2 * work, "both": 6 * work})
    for name, (n, c, o, size, k, s) in CONV.items():
        shape = ConvShape((k, k), (s, s), (k // 2, k // 2), (1, 1))
        g, a = torch.randn(n, o, size // s, size // s), torch.randn(n, c, size, size)
        ways = ours("grad_norm_squared_conv", partial(grad_norm_squared_conv, shape=shape), g, a, shape, n)
        ways |= {"torch formula": unfolded(problems.ghost_norm, k, s), "loop": unfolded(loop, k, s)}
        text, work = f"{n}x{c}x{o}x{size} k{k} s{s}", g.numel() * c * k * k
        yield Problem("grad_norm_squared_conv", name, text, (g, a), ways, {"forward": 2 * work, "both": 6 * work})
    for name, (n, t, u, d, e) in APPLY.items():
        operands = torch.randn(n, t, d), torch.randn(n, u, d), torch.randn(n, u, e)
        ways = ours("gram_apply", gram_apply, *operands)
        ways["torch formula"] = lambda q, k, v: (q @ k.mT) @ v
        ways["loop"] = lambda q, k, v: torch.stack([(x @ y.t()) @ z for x, y, z in zip(q, k, v)])
        work = 2 * n * min(t * u * (d + e), (t + u) * d * e)
        yield Problem("gram_apply", name, f"{n}x{t}x{u}x{d}x{e}", operands, ways, {"forward": work})


def results(call: Call, operands: Sequence[Tensor], both: bool) -> tuple[Tensor, ...]:
    """Return what a way gives, and the gradients of its sum if they are asked for."""
    found = call(*operands)
    return (found, *torch.autograd.grad(found.sum(), operands)) if both else (found,)


def checked(problem: Problem, way: str) -> float:
    """Error of a way, and of its gradients where they are measured, on two samples."""
    both = "both" in problem.work
    few = [x[:2].detach().requires_grad_(both) for x in problem.operands]
    wide = [x.detach().double().requires_grad_(both) for x in few]
    got, want = results(problem.ways[way], few, both), results(problem.ways["loop"], wide, both)
    error = max(relative_error(x, y) for x, y in zip(got, want))
    assert error < 1e-4, (problem.workload, way, error)
    return error


def measure(problem: Problem, rate: float, repeat: int) -> Iterator[Row]:
    for way, call in problem.ways.items():
        error = checked(problem, way)
        for what, work in problem.work.items():
            both = what == "both"
            operands = [x.detach().requires_grad_(both) for x in problem.operands]
            seconds = harness.least(partial(results, call, operands, both), repeat)
            row = {"op": problem.op, "workload": problem.workload, "size": problem.size, "way": way, "what": what}
            row |= problems.rates(seconds, work, rate, error)
            harness.show(row, -8, op=-23, workload=-18, size=-20, way=-14)
            yield row


def main() -> None:
    parser = harness.Parser(__doc__, "threads")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, no file")
    options = parser.parse()
    torch.manual_seed(0)
    repeat, rows = 1 if options.quick else 5, list[Row]()
    rate = problems.gemm_rate(torch.float32, repeat)
    for problem in make():
        rows += measure(problem, rate, repeat)
    if not options.quick:
        RESULTS.add(rows)


if __name__ == "__main__":
    main()
