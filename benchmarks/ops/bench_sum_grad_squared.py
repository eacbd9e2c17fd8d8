"""How fast `sum_grad_squared` runs, by backend, against this machine's own matrix product.

    python -m benchmarks.ops.bench_sum_grad_squared [--threads 1] [--gradient] [--quick]

Times are CPU times (the least of some repetitions), so other programs on the machine disturb them little. A row is
timed only after its result agrees with the definition in float64. "sgemm" is the share of the rate of torch.mm on
1024 x 1024 matrices of the same type; for convolutions "weight_gradient" is the time of torch's own weight gradient
over ours (above 1: we are faster).
Rows go to benchmarks/results/sum_grad_squared.csv.
"""

from __future__ import annotations

import argparse
import csv
import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastfip import env
from fastfip.ops import OPS, ConvShape, sum_grad_squared, sum_grad_squared_conv

RESULTS = Path(__file__).parents[1] / "results" / "sum_grad_squared.csv"

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


def cpu_time(call: Callable[[], object], repeat: int) -> float:
    """Least CPU time of one call, in seconds."""
    call()
    best = float("inf")
    for _ in range(repeat):
        start = time.process_time()
        call()
        best = min(best, time.process_time() - start)
    return best


def gemm_rate(dtype: torch.dtype, repeat: int) -> float:
    """Operations a second of CPU time that torch.mm does."""
    x, y = torch.randn(2, 1024, 1024, dtype=dtype)
    out = torch.empty_like(x)
    return 2 * 1024**3 / cpu_time(lambda: torch.mm(x, y, out=out), repeat)


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def dense_rows(gradient: bool, repeat: int) -> list[dict[str, object]]:
    rows = []
    for dtype in (torch.float32, torch.float64):
        rate = gemm_rate(dtype, repeat)
        for name, (n, t, o, i) in DENSE.items():
            g, a = torch.randn(n, t, o, dtype=dtype), torch.randn(n, t, i, dtype=dtype)
            part = slice(0, 4)  # enough for the check
            exact = torch.einsum("nto,nti->noi", g[part].double(), a[part].double()).square().sum(0)
            out, grad = torch.zeros(o, i, dtype=dtype), torch.zeros(o, i, dtype=dtype) if gradient else None
            for backend in OPS["sum_grad_squared"].backends:
                why = backend.refuses(g, a, out, grad)
                if why:
                    print(f"{name}: {backend.name} cannot run: {why}")
                    continue
                error = relative_error(sum_grad_squared(g[part], a[part], backend=backend.name), exact)
                assert error < (1e3 * torch.finfo(dtype).eps if backend.automatic else 1e-2), (
                    name,
                    backend.name,
                    error,
                )
                call = functools.partial(sum_grad_squared, g, a, out=out, grad=grad, backend=backend.name)
                seconds = cpu_time(call, repeat)
                rows.append(row(name, f"{n}x{t}x{o}x{i}", dtype, backend.name, seconds, 2 * n * t * o * i, rate, error))
    return rows


def conv_rows(gradient: bool, repeat: int) -> list[dict[str, object]]:
    rows = []
    dtype = torch.float32
    rate = gemm_rate(dtype, repeat)
    for name, (n, c, o, size, k, s, groups) in CONV.items():
        shape = ConvShape((k, k), (s, s), (k // 2, k // 2), (1, 1), groups)
        x, weight = torch.randn(n, c, size, size), torch.randn(o, c // groups, k, k)
        g = torch.randn_like(torch.nn.functional.conv2d(x, weight, None, s, k // 2, 1, groups))

        def weight_gradient(g: Tensor, x: Tensor, w: Tensor, shape: ConvShape = shape) -> Tensor:
            return torch.ops.aten.convolution_backward(
                g,
                x,
                w,
                None,
                shape.stride,
                shape.padding,
                shape.dilation,
                False,
                [0, 0],
                shape.groups,
                [False, True, False],
            )[1]

        part = slice(0, 2)
        wide = weight.double()
        exact = sum(
            weight_gradient(y[None].double(), z[None].double(), wide).square() for y, z in zip(g[part], x[part])
        )
        plain = cpu_time(functools.partial(weight_gradient, g, x, weight), repeat)
        out, grad = torch.zeros_like(weight), torch.zeros_like(weight) if gradient else None
        for backend in OPS["sum_grad_squared_conv"].backends:
            why = backend.refuses(g, x, shape, n, out, grad)
            if why:
                print(f"{name}: {backend.name} cannot run: {why}")
                continue
            error = relative_error(sum_grad_squared_conv(g[part], x[part], shape, backend=backend.name), exact)
            assert error < (1e3 * torch.finfo(dtype).eps if backend.automatic else 1e-2), (name, backend.name, error)
            call = functools.partial(sum_grad_squared_conv, g, x, shape, out=out, grad=grad, backend=backend.name)
            seconds = cpu_time(call, repeat)
            work = 2 * g.numel() * (c // groups) * k * k
            entry = row(
                name, f"{n}x{c}x{o}x{size} k{k} s{s} g{groups}", dtype, backend.name, seconds, work, rate, error
            )
            rows.append({**entry, "weight_gradient": round(plain / seconds, 2)})
    return rows


def row(
    name: str, size: str, dtype: torch.dtype, backend: str, seconds: float, work: int, rate: float, error: float
) -> dict[str, object]:
    entry = {
        "workload": name,
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        "backend": backend,
        "ms": round(seconds * 1e3, 3),
        "gflops": round(work / seconds / 1e9, 1),
        "sgemm": round(work / seconds / rate, 2),
        "error": f"{error:.1e}",
    }
    print("  ".join(f"{value!s:<18}" if key == "workload" else f"{value!s:>10}" for key, value in entry.items()))
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gradient", action="store_true", help="also return the gradient from the same pass")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, no file")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    repeat = 2 if options.quick else 7
    rows = dense_rows(options.gradient, repeat) + conv_rows(options.gradient, repeat)
    if options.quick:
        return
    here = env.collect()
    stamp = {key: here[key] for key in ("commit", "torch", "cpu", "native")}
    stamp = {"gradient": options.gradient, "threads": options.threads, **stamp}
    old = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
    same = (str(options.gradient), str(options.threads))
    kept = [r for r in old if (r["gradient"], r["threads"]) != same]
    new = [{"weight_gradient": "", **r, **stamp} for r in rows]
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        columns = ["workload", "size", "dtype", "backend", "ms", "gflops", "sgemm", "weight_gradient", "error", *stamp]
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows([*kept, *new])


if __name__ == "__main__":
    main()
