"""What purification takes in memory above the given model, against the memory model, and whether budgets are held.

    python -m benchmarks.purification.bench_memory [--cases vit_b16:fast_wfip:2 ...] [--budgets vit_b16:1700 ...]
    python -m benchmarks.purification.bench_memory --table

A case is NET:METHOD:MICRO_BATCH, or NET:METHOD:MICRO_BATCH:again with gradient checkpointing; `adam` for a method is
one plain step of Adam on every parameter, on a batch of so many. Each runs in a fresh process: what the libraries take
when they are first used is there before the model is made, then the resident memory with the model is read, then
`purify` runs, and its own peak (the system's count, set back at its beginning) is taken less that. `predicted` is the
memory model of `fastfip.purification.memory` for the same run. Large tensors lie in mappings of their own
(MALLOC_MMAP_THRESHOLD_), so that gaps between them do not count.

Three steps on as many clean images a step as go together (on two in a budget); the search is one step of it, and
batches at the worst case have eight images instead of 64: that is 56 images less, and no activation, since they go
through the model in parts of MICRO_BATCH.

A budget is NET:METHOD:MEGABYTES: the same with `memory=`, whole, in memory as glibc has it by default; the peak of the
process over the budget is the figure. Rows go to benchmarks/results/memory.csv.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfip
from benchmarks import harness
from benchmarks.harness import Row
from fastfip.data import Task
from fastfip.data.cleanset import CleanSet
from fastfip.methods import _reach, _search, get
from fastfip.methods.run import Run
from fastfip.methods.wfip import search
from fastfip.purification import memory
from fastfip.purification.again import blocks_of
from fastfip.testing import nets

RESULTS = harness.Results(
    "memory",
    "net method micro_batch checkpointing budget_mb chosen parameters_mb peak_mb ratio predicted_mb error commit torch "
    "cpu",
    run="net method micro_batch checkpointing budget_mb",
    order=lambda r: (r["net"], r["method"], str(r["budget_mb"]), str(r["micro_batch"]), r["checkpointing"]),
)

MAKE: dict[str, tuple[Callable[[], nn.Module], int]] = {  # the second: pixels
    "vit_b16": (lambda: nets.vit_b16(10), 224),
    "vit_s16": (lambda: nets.vit_s16(10), 224),
    "long_vit": (lambda: nets.ViT(10, size=224, patch=8, dim=64, depth=24, heads=2), 224),  # narrow: 785 tokens of 64
    "resnet50": (lambda: nets.randomize_norms(nets.resnet50(10)), 96),
    "preact_resnet18": (lambda: nets.randomize_norms(nets.preact_resnet18()), 32),
    "wide_mlp": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2048), nn.GELU(), nn.Linear(2048, 2048),
                                       nn.GELU(), nn.Linear(2048, 10)), 32),
}  # fmt: skip
CASES = [
    "vit_b16:fast_wfip:2", "vit_b16:adam:2", "vit_s16:fast_wfip:2", "vit_s16:fisher_steps:2", "resnet50:fast_wfip:2",
    "resnet50:fisher_steps:2", "long_vit:fast_wfip:8", "long_vit:fast_wfip:8:again", "long_vit:fisher_steps:8",
    "long_vit:fisher_steps:8:again", "preact_resnet18:fast_wfip:2",
    "preact_resnet18:fine_tune:2", "wide_mlp:fast_wfip:2",
]  # fmt: skip
BUDGETS = ["vit_b16:fast_wfip:1900", "preact_resnet18:fisher_steps:900", "vit_s16:fast_wfip:650"]
SHORT: dict[str, Any] = {
    "steps": 3,
    "batch_size": 2,
    "holdout": 0,
    "force": True,
    "progress": False,
    "measure": ("acc",),
}
WORST = 8


@contextlib.contextmanager
def short_search() -> Iterator[None]:
    """Cut the search to one step, and its batches and those of the unlearning to `WORST` images."""
    short = [(search, "ROUNDS", 1), (_search, "STEPS", 1), (_search, "REACH", 0.0), (_reach, "LAST", 1)]
    few = [(module, "SEARCH_BATCH", WORST) for module in (_search, _reach, memory)]
    with contextlib.ExitStack() as ends:
        for module, name, value in [*short, *few]:
            ends.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield


def problem(net: str, images: int = 2) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a model in eval mode and images with labels."""
    torch.manual_seed(0)
    make, pixels = MAKE[net]
    return make().eval(), torch.randn(images, 3, pixels, pixels), torch.arange(images) % 10


def warm_up(method: str) -> None:
    """Use what a run uses: what libraries take then is nobody's."""
    x, y = torch.randn(12, 3, 8, 8), torch.arange(12) % 3
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 16), nn.GELU(), nn.Linear(16, 3))
    if method == "adam":
        adam(small, x, y)
    else:
        fastfip.purify(small, (x, y), method, steps=2, force=True, progress=False, micro_batch=2)


def adam(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Two plain steps of Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def predicted(model: nn.Module, x: Tensor, y: Tensor, method: str, micro_batch: int, again: bool = False) -> int:
    """Return the memory model's peak above the given model, in bytes."""
    recipe: Any = get(method)
    config = recipe.Config().replace(**{k: v for k, v in SHORT.items() if k in ("steps", "batch_size", "holdout")})
    run = Run(model, Task(), CleanSet.of((x, y)), config, torch.device("cpu"), torch.Generator(), classes=10)
    run.received = {name: p.detach() for name, p in model.named_parameters() if p.dim() != 4}
    terms = memory.measured(run, recipe, blocks_of(run) if again else ())
    # On a CPU convolutions get another layout, and with it memory of their own.
    copy = sum(p.nbytes for p in model.parameters() if p.dim() == 4 or not recipe.lends_weights)
    return terms.peak(micro_batch) - terms.now + copy


def measure_here(net: str, method: str, micro_batch: int, again: bool = False) -> tuple[int, int, int]:
    """Return the bytes of the parameters, those of the peak above the model, and those predicted."""
    with short_search():
        warm_up(method)
        model, x, y = problem(net, max(2, micro_batch))
        size = sum(p.nbytes for p in model.parameters())
        if method == "adam":
            harness.release()
            before = harness.resident()
            return size, harness.peak(lambda: adam(model, x[:micro_batch], y[:micro_batch])) - before, 0
        expected = predicted(model, x, y, method, micro_batch, again)
        harness.release()
        before = harness.resident()
        options = {**SHORT, "batch_size": len(x), "micro_batch": micro_batch, "gradient_checkpointing": again}
        result = fastfip.purify(model, (x, y), method, **options)
        return size, result.peak_memory - before, expected


def budget_here(net: str, method: str, megabytes: int) -> tuple[int, int, int, int]:
    """Return the bytes of the parameters, the process's peak under a budget, the micro_batch chosen, and whether
    anything was checkpointed.
    """
    with short_search():
        model, x, y = problem(net)
        harness.release()
        result = fastfip.purify(model, (x, y), method, memory=f"{megabytes}MB", **SHORT)
        size = sum(p.nbytes for p in model.parameters())
        settings = result.settings
        return size, result.peak_memory, settings["micro_batch"], int(settings["gradient_checkpointing"])


def case(text: str, threads: int) -> Row:
    """Measure a case in a fresh process."""
    net, method, micro, *again = text.split(":")
    arguments = ("--peak", text, "--threads", threads)
    size, peak, expected = harness.fresh(
        "benchmarks.purification.bench_memory", *arguments, MALLOC_MMAP_THRESHOLD_="65536"
    )
    error = round(expected / peak - 1, 3) if expected else ""
    return {"net": net, "method": method, "micro_batch": micro, "checkpointing": "on" if again else "",
            "budget_mb": "", "chosen": "",
            "parameters_mb": round(size / 1e6, 1),
            "peak_mb": round(peak / 1e6, 1), "ratio": round(peak / size, 3),
            "predicted_mb": round(expected / 1e6, 1) if expected else "", "error": error}  # fmt: skip


def budget(text: str, threads: int) -> Row:
    """Measure a budget in a fresh process."""
    net, method, megabytes = text.split(":")
    arguments = ("--peak", f"{text}:budget", "--threads", threads)
    size, peak, micro, again = harness.fresh("benchmarks.purification.bench_memory", *arguments)
    return {"net": net, "method": method, "micro_batch": "", "checkpointing": "on" if again else "",
            "budget_mb": megabytes, "chosen": micro,
            "parameters_mb": round(size / 1e6, 1), "peak_mb": round(peak / 1e6, 1),
            "ratio": round(peak / 1e6 / float(megabytes), 3)}  # fmt: skip


def tables() -> tuple[str, str]:
    """Return the tables of cases and of budgets, in Markdown."""
    rows = RESULTS.read()
    head = ["network", "method", "`micro_batch`", "checkpointing", "parameters, MB", "peak above the model, MB",
            "of the parameters",
            "the model says", "error"]  # fmt: skip
    cases = [
        [r["net"], f"`{r['method']}`" if r["method"] != "adam" else "a step of Adam", r["micro_batch"],
         r["checkpointing"] or "-", r["parameters_mb"], r["peak_mb"],
         f"{float(r['ratio']):.2f}", r["predicted_mb"] or "-",
         f"{100 * float(r['error']):+.0f} %" if r["error"] else "-"]
        for r in rows if not r["budget_mb"]
    ]  # fmt: skip
    held = [
        [r["net"], f"`{r['method']}`", r["budget_mb"], r["chosen"], r["checkpointing"] or "-",
         r["peak_mb"], f"{float(r['ratio']):.2f}"]
        for r in rows if r["budget_mb"]
    ]  # fmt: skip
    budgets = [
        "network",
        "method",
        "`memory=`, MB",
        "chosen `micro_batch`",
        "checkpointing",
        "peak of the process, MB",
        "of the budget",
    ]
    return harness.table(head, cases), harness.table(budgets, held)


def main() -> None:
    parser = harness.Parser(__doc__, "threads", "peak")
    parser.add_argument("--cases", nargs="*", default=CASES)
    parser.add_argument("--budgets", nargs="*", default=BUDGETS)
    parser.add_argument("--table", action="store_true", help="write the rows into docs/scale.md")
    options = parser.parse()
    if options.peak:
        net, method, number, *kind = options.peak.split(":")
        budgeted = kind == ["budget"]
        print(
            *(budget_here(net, method, int(number)) if budgeted else measure_here(net, method, int(number), bool(kind)))
        )
        return
    if not options.table:
        for measure, names in ((case, options.cases), (budget, options.budgets)):
            for name in names:
                RESULTS.add([row := measure(name, options.threads)])
                harness.show(row)
                sys.stdout.flush()
    cases, budgets = tables()
    harness.splice(harness.DOCS / "scale.md", "memory", cases)
    harness.splice(harness.DOCS / "scale.md", "budgets", budgets)


if __name__ == "__main__":
    main()
