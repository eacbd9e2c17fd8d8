"""How fast `spectral_grad` runs, by backend, against two products of torch and their sum.

    python -m benchmarks.ops.bench_spectral_grad [--threads 1] [--repeat 40]

Layers of a PreActResNet-18 (32 images of 32 x 32) and of a ViT-S/16 (8 images, 197 tokens), K = 64 directions. Forms:
`p known`, q alone is multiplied out and p is read (what a backward pass of Fast FIP needs), and `both`. `torch` forms q
(and p) whole, multiplies and sums; `kernel` is the native kernel by itself, also where the op prefers the reference;
`native` and `reference` are the op. Float32; bfloat16 with `p known` against products in float32.

Times are CPU times with one thread, the least of many turns that the ways take in one process. A row is timed only
after its result agrees with the definition in float64. "sgemm" is the share of the rate of torch.mm on 1024 x 1024
matrices. Rows go to benchmarks/results/spectral_grad.csv.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.ops import problems
from fastfip.ops import ConvShape, spectral_grad
from fastfip.ops.backends import native
from fastfip.ops.spectral import grad_native
from fastfip.ops.spectral.grad_autograd import project
from fastfip.testing.definitions import relative_error

RESULTS = harness.Results(
    "spectral_grad",
    "workload size form dtype way ms gflops sgemm torch_over_it error threads commit torch cpu native",
    run="workload form dtype threads",
)
K = 64

LINEAR = {  # N, T, O, I
    "ViT qkv": (8, 197, 1152, 384),
    "ViT projection": (8, 197, 384, 384),
    "ViT first of the MLP": (8, 197, 1536, 384),
    "ViT second of the MLP": (8, 197, 384, 1536),
    "T=1": (256, 1, 1024, 1024),
}
CONV = {  # N, C, O, size, kernel, stride
    "3x3 32x32 64": (32, 64, 64, 32, 3, 1),
    "3x3 16x16 128": (32, 128, 128, 16, 3, 1),
    "3x3 8x8 256": (32, 256, 256, 8, 3, 1),
    "3x3 4x4 512": (32, 512, 512, 4, 3, 1),
    "3x3 stride 2": (32, 64, 128, 32, 3, 2),
    "1x1 stride 2": (32, 64, 128, 32, 1, 2),
}


@dataclass
class Case:
    size: str
    g: Tensor
    x: Tensor
    u: Tensor
    v: Tensor
    shape: ConvShape | None

    def of(self, form: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None, ConvShape | None]:
        """Return the operands; where p is known it takes the place of x."""
        if form == "both":
            return self.g, self.x, self.u, self.v, self.shape
        p = project(self.x.float(), self.v, self.shape, right=True).to(self.g.dtype)
        return self.g, p, self.u, None, self.shape


def linear(n: int, t: int, o: int, i: int, dtype: torch.dtype) -> Case:
    g, x = (torch.randn(n, t, features).to(dtype) for features in (o, i))
    return Case(f"{n}x{t}x{o}x{i}", g, x, torch.randn(1, o, K), torch.randn(1, i, K), None)


def conv(n: int, c: int, o: int, size: int, k: int, s: int, dtype: torch.dtype) -> Case:
    shape = ConvShape((k, k), (s, s), (k // 2, k // 2), (1, 1))
    wide = (size + 2 * (k // 2) - k) // s + 1
    g, x = torch.randn(n, o, wide, wide).to(dtype), torch.randn(n, c, size, size).to(dtype)
    return Case(f"{n}x{c}x{o}x{size} k{k} s{s}", g, x, torch.randn(1, o, K), torch.randn(1, c * k * k, K), shape)


def by_torch(g: Tensor, x: Tensor, u: Tensor, v: Tensor | None, shape: ConvShape | None) -> Tensor:
    """The products whole, multiplied and summed."""
    q, p = project(g.float(), u, shape, right=False), project(x.float(), v, shape, right=True)
    if shape is None:
        return (p * q).reshape(-1, K).sum(0)
    return torch.linalg.vecdot(p.flatten(2), q.flatten(2)).sum(0)


def measure(workload: str, case: Case, form: str, rate: float, threads: int, repeat: int) -> Iterator[Row]:
    operands = case.of(form)
    ways: dict[str, Callable[[], Tensor]] = {
        "torch": lambda: by_torch(*operands),
        "kernel": lambda: grad_native.spectral_grad(*operands).sum(0),
        "native": lambda: spectral_grad(*operands, backend="native"),
        "reference": lambda: spectral_grad(*operands, backend="reference"),
    }
    if not native.available():
        del ways["kernel"], ways["native"]
    wide = [t.double() if isinstance(t, Tensor) else t for t in operands]
    exact = spectral_grad(*wide, backend="reference").flatten()
    errors = {way: relative_error(call().flatten(), exact) for way, call in ways.items()}
    assert max(errors.values()) < 1e-4, (workload, form, errors)
    found = harness.take_turns(ways, repeat, threads=threads)
    seconds = {way: getattr(times, harness.clock(threads)) for way, times in found.items()}
    positions = operands[0].numel() // case.u.shape[1]
    work = 2 * positions * K * (case.u.shape[1] + (case.v.shape[1] if form == "both" else 0))
    for way, taken in seconds.items():
        row = {
            "workload": workload,
            "size": case.size,
            "form": form,
            "dtype": problems.name_of(case.g.dtype),
            "way": way,
        }
        row |= problems.rates(taken, work, rate, errors[way])
        row["torch_over_it"] = round(seconds["torch"] / taken, 2)
        harness.show(row, 9, workload=-22, size=-20)
        yield {**row, "threads": threads}


def main() -> None:
    options = harness.Parser(__doc__, "threads", "repeat").parse()
    torch.manual_seed(0)
    rate = problems.gemm_rate(torch.float32, options.repeat)
    rows: list[Row] = []
    for make, cases in ((linear, LINEAR), (conv, CONV)):
        for workload, sizes in cases.items():
            for dtype, form in ((torch.float32, "p known"), (torch.float32, "both"), (torch.bfloat16, "p known")):
                rows += measure(workload, make(*sizes, dtype), form, rate, options.threads, options.repeat)  # type: ignore[operator]
    RESULTS.add(rows)


if __name__ == "__main__":
    main()
