"""What it costs to decompose the weights before Fast FIP's first step: ViT-B/16, the 64 largest directions of each.

    python -m benchmarks.purification.bench_spectral_setup [--spectra random decaying] [--threads 1] [--repeat 2]
        [--memory] [--table]

    full SVD     torch.linalg.svd(full_matrices=False) of every weight in float32
    Gram eigh    all eigenvectors of the smaller Gram matrix in float64, matrices of a shape together: the way before
    iteration    `fastfip.spectral.decompose`
    cache        the same read from its file, the hash of the weights included

`random` are the weights as they are initialised. `decaying` stands for trained ones: singular vectors at random, values
that fall from 1 to 1/100 on a logarithmic scale. Real trained weights are not measured.

Times: CPU time with one thread, the clock with more; the ways take turns in one process, each gets its least time.
Memory: the peak of a fresh process during the call, less what it had before, the factors included; `memory` is its
share of the weights' memory. Residual: the largest |W v - s u| / s and |W^T u - s v| / s of all directions, in float64,
of the factors as they are kept in float32. Rows go to benchmarks/results/spectral_setup.csv.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Row
from fastfip.spectral import decompose, leading
from fastfip.spectral.cache import decompose_once
from fastfip.spectral.decompose import Factored
from fastfip.spectral.places import places_of
from fastfip.testing import nets

RESULTS = harness.Results(
    "spectral_setup",
    "net spectrum way rank threads seconds ratio memory memory_mb residual commit torch machine native",
    run="net spectrum way rank threads",
    kept="memory memory_mb",
    order=lambda r: (r["net"], r["spectrum"], str(r["threads"]), ORDER.index(r["way"])),
)
ORDER = ("full SVD", "Gram eigh", "iteration", "cache")
NET, RANK = "vit_b16", 64
SPECTRA = ("random", "decaying")


def problem(spectrum: str, make: Callable[[], torch.nn.Module] = nets.vit_b16) -> list[Tensor]:
    """Return the model's weights as matrices [G, O, I]."""
    torch.manual_seed(0)
    places = places_of(make(), (), {})
    weights = [(getattr(p.module, p.attribute).detach(), p) for p in places]
    matrices = [weight.reshape(p.groups, p.rows, -1) for weight, p in weights]
    if spectrum == "decaying":
        for m in matrices:
            least = min(m.shape[1:])
            u, v = (torch.linalg.qr(torch.randn(size, least)).Q for size in m.shape[1:])
            m.copy_((u * torch.logspace(0, -2, least)) @ v.mT)
    return matrices


def full_svd(matrices: list[Tensor]) -> list[Factored]:
    out = []
    for m in matrices:
        u, s, vh = torch.linalg.svd(m, full_matrices=False)
        out.append((u[..., :RANK].clone(), s[..., :RANK].clone(), vh.mT[..., :RANK].clone()))
    return out


def gram_eigh(matrices: list[Tensor]) -> list[Factored]:
    """Decompose as before: no iteration, all matrices of a shape at once."""
    with mock.patch.object(leading, "LEAST_SIZE", 1 << 62), mock.patch.object(decompose, "TOGETHER", 1 << 62):
        return decompose.decompose(matrices, RANK)


def iteration(matrices: list[Tensor]) -> list[Factored]:
    return decompose.decompose(matrices, RANK)


def cached(matrices: list[Tensor], path: Path) -> list[Factored]:
    def anew() -> Iterator[Tensor]:
        return iter(matrices)

    return decompose_once(anew, RANK, path)


def ways(folder: str) -> dict[str, Callable[[list[Tensor]], list[Factored]]]:
    path = Path(folder) / "weights.factors"
    return {"full SVD": full_svd, "Gram eigh": gram_eigh, "iteration": iteration, "cache": partial(cached, path=path)}


def worst_residual(matrices: list[Tensor], factored: list[Factored]) -> float:
    worst = 0.0
    for matrix, factors in zip(matrices, factored):
        m, (u, s, v) = matrix.double(), (t.double() for t in factors)
        for left in (m @ v - u * s.unsqueeze(1), m.mT @ u - v * s.unsqueeze(1)):
            worst = max(worst, float((left.norm(dim=1) / s).max()))
    return worst


def measure(spectrum: str, threads: int, repeat: int) -> list[Row]:
    matrices, residuals = problem(spectrum), dict[str, float]()

    def look(way: str, found: Any) -> None:
        if way not in residuals:
            residuals[way] = worst_residual(matrices, found)

    with tempfile.TemporaryDirectory() as folder:
        calls = {way: partial(call, matrices) for way, call in ways(folder).items()}
        found = harness.take_turns(calls, repeat, threads=threads, after=look)
    times = {way: getattr(seconds, harness.clock(threads)) for way, seconds in found.items()}
    return [
        {"net": NET, "spectrum": spectrum, "way": way, "rank": RANK, "threads": threads, "seconds": round(t, 2),
         "ratio": round(t / times["full SVD"], 3), "residual": f"{residuals[way]:.1e}"}
        for way, t in times.items()
    ]  # fmt: skip


def peak_here(spectrum: str, way: str) -> int:
    matrices = problem(spectrum)
    with tempfile.TemporaryDirectory() as folder:
        call = ways(folder)[way]
        if way == "cache":
            call(matrices)
        for warm in ways(f"{folder}/none").values():  # what the libraries take when they are first used is nobody's
            if not isinstance(warm, partial):
                warm([torch.randn(1, 512, 512)])
        harness.release()
        before = harness.resident()
        kept: list[Any] = []
        return harness.peak(lambda: kept.append(call(matrices))) - before


def add_memory(spectrum: str, threads: int) -> None:
    weights = sum(m.numel() * m.element_size() for m in problem(spectrum))
    rows = {r["way"]: r for r in RESULTS.read() if (r["spectrum"], r["threads"]) == (spectrum, str(threads))}
    for way, row in rows.items():
        options = ("--peak", way, "--spectra", spectrum, "--threads", threads)
        (found,) = harness.fresh(
            "benchmarks.purification.bench_spectral_setup", *options, MALLOC_MMAP_THRESHOLD_="65536"
        )
        print(spectrum, way, found // 2**20, "MB", flush=True)
        RESULTS.add([{**row, "memory": round(found / weights, 3), "memory_mb": found // 2**20}])


def table() -> str:
    """Return the rows as a table in Markdown."""
    head = ["weights", "way", "threads", "seconds", "of the full SVD", "extra memory, of the weights'", "residual"]
    names = ("spectrum", "way", "threads", "seconds", "ratio", "memory", "residual")
    return harness.table(head, [[row[name] for name in names] for row in RESULTS.read()])


def main() -> None:
    parser = harness.Parser(__doc__, "threads", "repeat", "peak")
    parser.add_argument("--spectra", nargs="*", default=list(SPECTRA), choices=SPECTRA)
    parser.add_argument("--memory", action="store_true", help="measure the peak memory for the rows that are there")
    parser.add_argument("--table", action="store_true", help="write the rows into docs/performance.md")
    options = parser.parse()
    if options.peak:
        print(peak_here(options.spectra[0], options.peak))
        return
    if options.table:
        harness.splice(harness.DOCS / "performance.md", "spectral_setup", table())
        return
    for spectrum in options.spectra:
        if options.memory:
            add_memory(spectrum, options.threads)
            continue
        found = measure(spectrum, options.threads, options.repeat)
        RESULTS.add(found)
        for row in found:
            harness.show(row, way=-10)


if __name__ == "__main__":
    main()
