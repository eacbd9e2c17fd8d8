"""The table of docs/scale.md: time, memory and traffic of purifying large models, from the cost model.

    python -m benchmarks.scale_doc

Nothing here was run on a GPU. Memory is that of `fastfip.purification.memory`, on models of these shapes without
numbers (torch's meta device). Time is a count of operations over a rate: on the CPU the rate that a plain step of
ViT-S/16 was measured at (benchmarks/results/fast_fip.csv), on GPUs the peak that the maker publishes times a share that
is assumed. What stands in a column "arithmetic" is just that.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks import harness
from fastfip.methods import get
from fastfip.purification.memory import KEEP_RECEIVED, MemoryModel, fixed_memory
from fastfip.testing import nets

FILE = harness.DOCS / "scale.md"

#: Samples of a step, of a batch at the worst case, and those that the Fisher diagonal is taken over.
BATCH, WORST, FISHER = 64, 64, 512
#: Steps of the search: `fisher_steps` needs five radii to its least one and ten steps more, `fast_wfip` up to sixteen.
SEARCH = {"fisher_steps": 5 * 10 + 10, "fast_wfip": 16 * 10}
#: Numbers of the width that a block keeps for each token: its inputs and outputs, attention, and what the MLP is wide.
KEPT = {"vit": 17, "llama": 20}
#: Peak rates of dense products in operations a second, memory in bytes, and bytes a second between GPUs each way, as
#: NVIDIA's data sheets for the H100 SXM and the H200 have them; Ethernet is 25 Gb/s.
BF16, TF32, H100, H200, NVLINK, ETHERNET = 989e12, 494e12, 80e9, 141e9, 450e9, 25e9 / 8
#: The share of the peak that training of large transformers reaches: 38 to 43 % (Llama 3, arXiv 2407.21783, table 4).
SHARE = 0.4
GPUS = 8


@dataclass(frozen=True)
class Large:
    """A large model: what makes it on the meta device, its kind, tokens a sample, bytes of a number as it is given."""

    name: str
    make: Callable[[], nn.Module]
    kind: str
    tokens: int
    width: int
    layers: int
    given: int
    input_bytes: int


def llama(layers: int, width: int, inner: int, keys: int, vocabulary: int = 32_000) -> nn.Module:
    """Return the weights of a decoder with gated MLPs, keys and values of a width of their own (Llama 2's shapes)."""

    def block() -> nn.ModuleDict:
        shapes = {"q": (width, width), "k": (width, keys), "v": (width, keys), "o": (width, width),
                  "gate": (width, inner), "up": (width, inner), "down": (inner, width)}  # fmt: skip
        parts = {name: nn.Linear(i, o, bias=False) for name, (i, o) in shapes.items()}
        return nn.ModuleDict({**parts, "norm1": nn.RMSNorm(width), "norm2": nn.RMSNorm(width)})

    outer = {"embed": nn.Embedding(vocabulary, width), "head": nn.Linear(width, vocabulary, bias=False)}
    return nn.ModuleDict({**outer, "blocks": nn.ModuleList(block() for _ in range(layers)), "norm": nn.RMSNorm(width)})


MODELS = [
    Large("ViT-H/14", lambda: nets.ViT(1000, 224, 14, 1280, 32, 16), "vit", 257, 1280, 32, 4, 3 * 224 * 224 * 4),
    Large("7B (Llama 2's shapes)", lambda: llama(32, 4096, 11_008, 4096), "llama", 128, 4096, 32, 2, 128 * 4096 * 4),
    Large("70B (Llama 2's shapes)", lambda: llama(80, 8192, 28_672, 1024), "llama", 128, 8192, 80, 2, 128 * 8192 * 4),
]
#: What is purified with: the method, and the rank of its directions.
WAYS: list[tuple[str, int | None]] = [("fisher_steps", None), ("fast_wfip", None), ("fast_wfip", 64)]


def passes(method: str, rank: int | None) -> float:
    """Return the forward passes of a sample that a whole purification is worth; a backward pass counts as two.

    A step of `fisher_steps` is a pass forward and back; while it unlearns another one at the worst case, with the
    gradient of its inputs besides; every fourth one measures its length, two forward passes of 32 samples. `fast_wfip`
    has the loss and the divergence in each step that unlearns (the received model answers as well), one of them in
    each of the others, and the gradient of the inputs in every second step; its layers make six products where torch's
    make three at full rank, and 0.86 of torch's step at rank 64 (measured on ViT-S/16).
    """
    config: Any = get(method).Config()
    steps = config.STEPS
    away = round(config.unlearn * steps)
    if method == "fisher_steps":
        return BATCH * 3 * steps + WORST * 4 * away + 2 * 32 * steps / 4 + WORST * 2 * SEARCH[method]
    layer = 2.0 if rank is None else 0.86
    clean = BATCH * ((3 + 3) * layer + 1) * away + BATCH * (3 * layer + 0.5) * (steps - away)
    return clean + WORST * 3.5 * layer * away + WORST * 2 * layer * SEARCH[method] + FISHER * 4 * layer


def memory(large: Large, method: str, rank: int | None, model: nn.Module) -> tuple[MemoryModel, int]:
    """Return the memory of a run of float32 weights with one sample in a pass, and that with four, without the rest."""
    recipe = get(method)
    numbers = sum(p.numel() for p in model.parameters())
    terms = fixed_memory(model, recipe, rank=rank, classes=0)
    copy = 4 * numbers if large.given != 4 or not recipe.lends_weights else 0
    if large.given != 4 and recipe.name in KEEP_RECEIVED:
        copy += 4 * numbers  # the received values in float32
    sample = KEPT[large.kind] * large.tokens * large.width * large.layers * 4
    whole = MemoryModel(
        now=large.given * numbers, copies=copy, factors=terms.factors, optimiser=terms.optimiser,
        data=(WORST + 3) * large.input_bytes, decomposition=terms.decomposition, step=terms.step, scratch=terms.scratch,
        per_sample=sample, least=terms.least,
    )  # fmt: skip
    return whole, numbers


def traffic(method: str, model: nn.Module, rank: int | None) -> int:
    """Return the numbers of a step's gradient: what processes with a part of the batch each have to sum."""
    if method != "fast_wfip":
        return sum(p.numel() for p in model.parameters())
    few = sum(p.numel() for p in model.parameters() if p.dim() <= 1)
    matrices = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return few + sum(min(rank or w.numel(), len(w), w.numel() // len(w)) for w in matrices)


def decomposition(model: nn.Module, rank: int | None) -> float:
    """Return the operations of the decompositions, about: Gram matrices, eigenvectors, the other side's vectors."""
    total = 0.0
    for weight in (m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))):
        n, numbers = min(len(weight), weight.numel() // len(weight)), weight.numel()
        if rank is None:
            total += 4.0 * numbers * n + 9.0 * n**3
        else:  # a block of half as many vectors again, through polynomials of a degree of about 60 altogether
            total += 1.5 * numbers * n + 2 * 60 * 1.5 * rank * float(n) ** 2 + 6 * 1.5 * rank * numbers
    return total


def decomposition_time(model: nn.Module, rank: int | None) -> float:
    """Return the seconds that they take on one core, at the rate measured on ViT-B/16 (spectral_setup.csv)."""
    with (harness.ROOT / "benchmarks" / "results" / "spectral_setup.csv").open(encoding="utf-8") as file:
        way = "Gram eigh" if rank is None else "iteration"
        (found,) = [r for r in csv.DictReader(file) if (r["spectrum"], r["way"]) == ("decaying", way)]
    with torch.device("meta"):
        small = nets.vit_b16(10)
    return float(found["seconds"]) * decomposition(model, rank) / decomposition(small, rank)


def cpu_rate() -> float:
    """Return the operations a second of a plain step of ViT-S/16 on two threads, of the committed measurement."""
    with (harness.ROOT / "benchmarks" / "results" / "fast_fip.csv").open(encoding="utf-8") as file:
        (row,) = [r for r in csv.DictReader(file) if (r["net"], r["way"], r["threads"]) == ("vit_s16", "plain", "2")]
    with torch.device("meta"):
        numbers = sum(p.numel() for p in nets.vit_s16(10).parameters())
    return 3 * 2 * numbers * 197 * 8 / (float(row["ms"]) / 1e3)


def row(large: Large, method: str, rank: int | None) -> list[str]:
    """Return a row of the table."""
    with torch.device("meta"):
        model = large.make()
    terms, numbers = memory(large, method, rank, model)
    work = passes(method, rank) * 2 * numbers * large.tokens
    peak = terms.peak(4)
    fits = ", ".join(name for name, size in (("H100", H100), ("H200", H200)) if peak <= size) or "neither"
    sent = 4 * traffic(method, model, rank)
    ring = 2 * (GPUS - 1) / GPUS * sent
    way = f"`{method}`" + (f", rank {rank}" if rank else "")
    spectral = terms.factors > 0
    return [
        large.name, way, f"{work / 1e15:,.0f}", _time(work / cpu_rate()),
        _time(decomposition_time(model, rank)) if spectral else "-", _time(work / (SHARE * TF32)),
        _time(work / (SHARE * TF32 * GPUS)), _bytes(terms.now + terms.copies),
        _bytes(terms.factors) if spectral else "-", _bytes(terms.optimiser + terms.step), _bytes(peak), fits,
        _bytes(sent), _time(ring / NVLINK), _time(ring / ETHERNET),
    ]  # fmt: skip


HEAD = [
    "model", "method", "work, 10^15 operations", "2 cores", "U and V, 1 core", "1 GPU", "8 GPUs", "weights", "U and V",
    "optimiser", "peak, 4 samples a pass", "fits on one", "sum of a step", "over NVLink", "over 25 Gb/s",
]  # fmt: skip


def table() -> str:
    """Return the table in Markdown."""
    return harness.table(HEAD, [row(large, *way) for large in MODELS for way in WAYS])


def rates() -> str:
    """Return the sentence about the rates."""
    return (
        f"Rates: two CPU cores {cpu_rate() / 1e9:.0f} billion operations a second (measured: a plain step of ViT-S/16, "
        f"`benchmarks/results/fast_fip.csv`); a GPU {SHARE * TF32 / 1e12:.0f} trillion ({100 * SHARE:.0f} % of the "
        f"{TF32 / 1e12:.0f} that NVIDIA publishes for dense TF32 on an H100 or H200; arithmetic, not measured)."
    )


def _time(seconds: float) -> str:
    for limit, unit, word in ((0.1, 1e-3, "ms"), (100, 1, "s"), (6000, 60, "min"), (72 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {word}"
    return f"{seconds / 86400:,.0f} days"


def _bytes(count: float) -> str:
    for unit, word in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {word}" if count < 1e3 * unit else f"{count / unit:,.0f} {word}"
    return f"{count:.0f} bytes"


def page(text: str) -> str:
    """Return the page with the table and the rates of the present code."""
    return harness.spliced(harness.spliced(text, "scale", table()), "rates", rates())


def main() -> None:
    harness.Parser(__doc__).parse()
    FILE.write_text(page(FILE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
