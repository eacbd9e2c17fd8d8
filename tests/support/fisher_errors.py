"""Largest relative errors of the Fisher diagonal of whole nets against the per-sample loop, as a table in markdown.

    python -m tests.support.fisher_errors

float64: over all parameters. float32: against float64, and what the loop itself makes of it in float32.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from fastfip.data import Task
from fastfip.fisher import fisher_diagonal
from fastfip.testing.definitions import loop_diagonal, worst_error
from tests.fisher.test_whole_nets import NETS, B, problem


def cast(batch: Any, dtype: torch.dtype) -> Any:
    if isinstance(batch, dict):
        return {k: cast(v, dtype) for k, v in batch.items()}
    if isinstance(batch, tuple):
        return tuple(cast(v, dtype) for v in batch)
    return batch.to(dtype) if batch.is_floating_point() else batch


def row(name: str, model: torch.nn.Module, batch: Any, task: Task, samples: int) -> str:
    model, batch = copy.deepcopy(model).double().eval(), cast(batch, torch.float64)
    hooks = {"loss": task.loss_hook, "forward": task.forward_hook}
    want = loop_diagonal(model, batch, samples, task)
    double, coverage = worst_error(got := fisher_diagonal(model, batch, **hooks), want, 1e-10), got.coverage
    model, batch = model.float(), cast(batch, torch.float32)
    theirs = worst_error(loop_diagonal(model, batch, samples, task), want, 1e-6)
    single = worst_error(fisher_diagonal(model, batch, **hooks), want, 1e-6)
    slow = sum("loop" in how or "one sample" in how for how in coverage.values())
    return f"| {name} | {len(coverage)} | {slow} | {double:.0e} | {single:.0e} | {theirs:.0e} |"


def main() -> None:
    print("| net | parameters | of them by a slower path | float64 | float32 | torch's own loop in float32 |")
    print("|---" * 6 + "|")
    for name in NETS:
        print(row(name, *problem(name), Task(), B), flush=True)
    try:
        from tests.fisher.test_hf import MODELS
        from tests.fisher.test_hf import B as samples
    except BaseException as error:  # pytest's Skipped: no transformers
        print(f"no Hugging Face models: {error}")
        return
    for make in MODELS:
        torch.manual_seed(0)
        model, batch, task, _ = make()
        for p in model.parameters():
            p.data.add_(torch.randn_like(p), alpha=0.1)
        print(row(make.__name__.replace("_", "-"), model, batch, task, samples), flush=True)


if __name__ == "__main__":
    main()
