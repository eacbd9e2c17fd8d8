"""What the first calls on a vision transformer cost, in which the graph is verified, and the later ones.

    python -m benchmarks.fisher.bench_first_calls [--tokens 65 197] [--samples 4 8 16 32] [--threads 1] [--no-file]

ViT-S/16 (384 features, 12 blocks, 6 heads) has 65 and 197 tokens at 128 and at 224 pixels, and both are 1 modulo 4: the
rows of the class tokens alone do not tell in which order the samples follow each other. Ways: `backward_with_fisher`
(gradient and diagonal), and `fisher_trace` with its gradient. Times are multiples of a plain forward and backward pass
in the same process, CPU times with one thread. Every row has a model of its own; a tiny one is worked on first, so that
no module is loaded within what is measured.

Rows go to benchmarks/results/first_calls.csv.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.harness import Row
from fastfip.fisher import backward_with_fisher, fisher_trace
from fastfip.testing import nets

RESULTS = harness.Results(
    "first_calls",
    "way tokens samples threads plain_ms first second later clock commit torch cpu native",
    run="way tokens samples threads",
    order=lambda r: (r["way"], int(r["tokens"]), int(r["samples"])),
)
CALLS = 5


def vit(tokens: int, tiny: bool = False) -> nn.Module:
    """ViT-S/16 with so many tokens."""
    size = 16 * round((tokens - 1) ** 0.5)
    dim, depth, heads = (12, 1, 1) if tiny else (384, 12, 6)
    return nets.ViT(10, size, 16, dim, depth, heads).eval()


def plain(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()


def gradient_and_diagonal(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    backward_with_fisher(F.cross_entropy(model(x), y, reduction="none"), model)


def trace_and_gradient(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    fisher_trace(model, x, y).backward()


WAYS: dict[str, Callable[[nn.Module, Tensor, Tensor], None]] = {
    "gradient and diagonal": gradient_and_diagonal,
    "trace and its gradient": trace_and_gradient,
}


def measure(way: str, tokens: int, samples: int, threads: int, tiny: bool = False) -> Row:
    """Time the calls one after the other on a new model."""
    torch.manual_seed(0)
    model = vit(tokens, tiny)
    size = 16 * round((tokens - 1) ** 0.5)
    x, y = torch.randn(samples, 3, size, size), torch.randint(0, 10, (samples,))
    kind = harness.clock(threads)
    now = time.process_time if kind == "cpu" else time.perf_counter

    def seconds(call: Callable[[nn.Module, Tensor, Tensor], None]) -> float:
        start = now()
        call(model, x, y)
        return now() - start

    plain(model, x, y)
    base = min(seconds(plain) for _ in range(2))
    times = [seconds(WAYS[way]) / base for _ in range(CALLS)]
    entry: Row = {
        "way": way,
        "tokens": tokens,
        "samples": samples,
        "threads": threads,
        "plain_ms": round(base * 1e3, 1),
    }
    later = {"first": times[0], "second": times[1], "later": min(times[2:])}
    return {**entry, **{name: round(value, 3) for name, value in later.items()}, "clock": kind}


def main() -> None:
    parser = harness.Parser(__doc__, "threads")
    parser.add_argument("--tokens", type=int, nargs="*", default=[65, 197])
    parser.add_argument("--samples", type=int, nargs="*", default=[4, 8, 16, 32])
    parser.add_argument("--no-file", action="store_true", help="print, but do not write the rows")
    options = parser.parse()
    for way in WAYS:
        measure(way, 5, 3, options.threads, tiny=True)
    cases = [("gradient and diagonal", t, n) for t in options.tokens for n in options.samples]
    cases += [("trace and its gradient", t, 4) for t in options.tokens]
    for case in cases:
        found = measure(*case, options.threads)
        harness.show(
            {k: found[k] for k in ("way", "tokens", "samples", "plain_ms", "first", "second", "later")}, way=-24
        )
        if not options.no_file:
            RESULTS.add([found])


if __name__ == "__main__":
    main()
