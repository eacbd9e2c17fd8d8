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

import argparse
import csv
import functools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.bench_sum_grad_squared import cpu_time, gemm_rate, relative_error
from fastfip import env
from fastfip.ops import OPS, ConvShape, grad_norm_squared, grad_norm_squared_conv, gram_apply

RESULTS = Path(__file__).parents[1] / "results" / "grad_norm_squared.csv"
Norms = Callable[[Tensor, Tensor], Tensor]

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


def formula(g: Tensor, a: Tensor) -> Tensor:
    if a.shape[1] * (a.shape[2] + g.shape[2]) < a.shape[2] * g.shape[2]:
        return ((a @ a.mT) * (g @ g.mT)).sum((1, 2))
    return (g.mT @ a).square().sum((1, 2))


def loop(g: Tensor, a: Tensor) -> Tensor:
    return torch.stack([(y.t() @ x).square().sum() for y, x in zip(g, a)])


def unfolded(norms: Norms, k: int, s: int) -> Norms:
    def call(g: Tensor, x: Tensor) -> Tensor:
        return norms(g.flatten(2).mT, F.unfold(x, k, padding=k // 2, stride=s).mT)

    return call


def measured(call: Norms, g: Tensor, a: Tensor, repeat: int, both: bool) -> float:
    g, a = g.requires_grad_(both), a.requires_grad_(both)

    def run() -> None:
        norms = call(g, a)
        if both:
            torch.autograd.grad(norms.sum(), (g, a))

    return cpu_time(run, repeat)


def checked(call: Norms, g: Tensor, a: Tensor, exact: Norms, name: str) -> float:
    """Error of the norms and of both gradients on two samples."""
    few = [x[:2].detach().requires_grad_() for x in (g, a)]
    wide = [x.detach().double().requires_grad_() for x in few]
    got, want = call(*few), exact(*wide)
    pairs = [(got.detach(), want.detach())]
    pairs += zip(torch.autograd.grad(got.sum(), few), torch.autograd.grad(want.sum(), wide))
    error = max(relative_error(x, y) for x, y in pairs)
    assert error < 1e-4, (name, error)
    return error


def norm_rows(repeat: int, rate: float) -> list[dict[str, object]]:
    problems: list[tuple[str, str, str, Tensor, Tensor, dict[str, Norms], Norms, int]] = []
    for name, (n, t, o, i) in DENSE.items():
        g, a = torch.randn(n, t, o), torch.randn(n, t, i)
        ways: dict[str, Norms] = {
            b.name: functools.partial(grad_norm_squared, backend=b.name)
            for b in OPS["grad_norm_squared"].backends
            if b.automatic and not b.refuses(g, a)
        }
        ways |= {"torch formula": formula, "loop": loop}
        problems.append(("grad_norm_squared", name, f"{n}x{t}x{o}x{i}", g, a, ways, loop, n * t * o * i))
    for name, (n, c, o, size, k, s) in CONV.items():
        shape = ConvShape((k, k), (s, s), (k // 2, k // 2), (1, 1))
        g, x = torch.randn(n, o, size // s, size // s), torch.randn(n, c, size, size)
        ways = {
            b.name: functools.partial(grad_norm_squared_conv, shape=shape, backend=b.name)
            for b in OPS["grad_norm_squared_conv"].backends
            if b.automatic and not b.refuses(g, x, shape, n)
        }
        ways |= {"torch formula": unfolded(formula, k, s), "loop": unfolded(loop, k, s)}
        text, work = f"{n}x{c}x{o}x{size} k{k} s{s}", g.numel() * c * k * k
        problems.append(("grad_norm_squared_conv", name, text, g, x, ways, unfolded(loop, k, s), work))
    rows = []
    for op, name, text, g, a, calls, exact, work in problems:
        for way, call in calls.items():
            error = checked(call, g, a, exact, f"{name}: {way}")
            for both in (False, True):
                seconds = measured(call, g.detach(), a.detach(), repeat, both)
                what = "both" if both else "forward"
                rows.append(row(op, name, text, way, what, seconds, (6 if both else 2) * work, rate, error))
    return rows


def apply_rows(repeat: int, rate: float) -> list[dict[str, object]]:
    rows = []
    for name, (n, t, u, d, e) in APPLY.items():
        q, k, v = torch.randn(n, t, d), torch.randn(n, u, d), torch.randn(n, u, e)
        exact = torch.einsum("ntd,nud,nue->nte", *(x[:2].double() for x in (q, k, v)))
        calls: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
            b.name: functools.partial(gram_apply, backend=b.name)
            for b in OPS["gram_apply"].backends
            if b.automatic and not b.refuses(q, k, v)
        }
        calls["torch formula"] = lambda q, k, v: (q @ k.mT) @ v
        calls["loop"] = lambda q, k, v: torch.stack([(x @ y.t()) @ z for x, y, z in zip(q, k, v)])
        work = 2 * n * min(t * u * (d + e), (t + u) * d * e)
        for way, call in calls.items():
            error = relative_error(call(q[:2], k[:2], v[:2]), exact)
            assert error < 1e-4, (name, way, error)
            seconds = cpu_time(functools.partial(call, q, k, v), repeat)
            rows.append(row("gram_apply", name, f"{n}x{t}x{u}x{d}x{e}", way, "forward", seconds, work, rate, error))
    return rows


def row(
    op: str, name: str, size: str, way: str, what: str, seconds: float, work: int, rate: float, error: float
) -> dict[str, object]:
    entry: dict[str, object] = {"op": op, "workload": name, "size": size, "way": way, "what": what}
    entry |= {"ms": round(seconds * 1e3, 3), "gflops": round(work / seconds / 1e9, 1)}
    entry |= {"sgemm": round(work / seconds / rate, 2), "error": f"{error:.1e}"}
    widths = {"op": 23, "workload": 18, "size": 20, "way": 14}
    print("  ".join(f"{value!s:<{widths.get(key, 8)}}" for key, value in entry.items()), flush=True)
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, no file")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    repeat = 1 if options.quick else 5
    rate = gemm_rate(torch.float32, repeat)
    rows = norm_rows(repeat, rate) + apply_rows(repeat, rate)
    if options.quick:
        return
    here = env.collect()
    stamp = {"threads": options.threads, **{key: here[key] for key in ("commit", "torch", "cpu", "native")}}
    old = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
    kept = [r for r in old if r["threads"] != str(options.threads)]
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *stamp])
        writer.writeheader()
        writer.writerows([*kept, *({**r, **stamp} for r in rows)])


if __name__ == "__main__":
    main()
