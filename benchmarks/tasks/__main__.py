"""Measure tasks; see the docstring of the package."""

from __future__ import annotations

import argparse
import re
import time
from typing import Any

import torch

import fastfip
from benchmarks import harness
from benchmarks.tasks import TASKS, Case, attacks, make

#: Nothing, fine-tuning, fine-tuning by a large step, our two methods, whichever of these the default takes; and where
#: there are weights from before fine-tuning, the method that takes these, and its published form.
METHODS = ("nothing", "fine_tune", "large_step", "fast_wfip", "fisher_steps", "auto", "fine_mixing", "published_mixing")
#: Steps and their size of `large_step`, where a task has none of its own.
LARGE_STEP = {"steps": 150, "lr": 0.1}
#: Three tenths of the fine-tuned weights, and the clean loss alone, in as many steps as its rows had from the first on.
PUBLISHED = {"keep": 0.3, "hold": 0.0, "states": 0.0, "steps": 90}
RESULTS = harness.Results(
    "tasks",
    "task attack method seed score_name score_before asr_before score asr seconds settings alerts data details "
    "threads machine torch commit",
    run="task attack method seed data",
    order=lambda row: (
        [*TASKS, row["task"]].index(row["task"]), row["attack"], clean_of(row), int(row["seed"]),
        METHODS.index(row["method"]),
    ),
)  # fmt: skip


def clean_of(row: harness.Row) -> int:
    """Return how many clean samples a row says that there were."""
    found = re.search(r"(\d+) (others )?clean", str(row["data"]))
    return int(found[1]) if found else 0


def row(task: str, attack: str, method: str, seed: int, case: Case, before: tuple[float, float]) -> harness.Row:
    """Purify the model of a case by a method and measure it."""
    settings: dict[str, Any]
    name, settings = {
        "large_step": ("fine_tune", dict(LARGE_STEP)),
        "published_mixing": ("fine_mixing", dict(PUBLISHED)),
    }.get(method, (method, {}))
    settings.update(case.own.get(name if method == "published_mixing" else method, {}))
    start, used, after, alerts, model = time.perf_counter(), time.process_time(), before, "", case.model
    if method != "nothing":
        result = fastfip.purify(case.model, case.clean, name, seed=seed, progress=False, **case.options, **settings)
        spent, used = time.perf_counter() - start, time.process_time() - used
        after, alerts, model = case.measure(result.model), "; ".join(result.alerts), result.model
        if method == "auto":
            settings["method"] = result.method
    else:
        spent = 0.0
    details = "" if case.details is None else case.details(model)
    if method != "nothing":  # on a shared machine seconds say little
        details = "; ".join([f"{used:.0f} CPU seconds", *([details] if details else [])])
    return {
        "task": task, "attack": attack, "method": method, "seed": seed, "score_name": case.score,
        "score_before": f"{before[0]:.2f}", "asr_before": f"{before[1]:.2f}", "score": f"{after[0]:.2f}",
        "asr": f"{after[1]:.2f}", "seconds": f"{spent:.0f}", "alerts": alerts, "data": case.data,
        "details": details,
        "settings": " ".join(f"{k}={'as released' if k == 'pretrained' else v}" for k, v in settings.items()),
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def table() -> str:
    """Return the rows as a table: each task, attack and number of clean samples, each method, means over seeds."""
    groups: dict[tuple[str, str, int, str], list[dict[str, str]]] = {}
    for found in RESULTS.read():
        groups.setdefault((found["task"], found["attack"], clean_of(found), found["method"]), []).append(found)
    lines = []
    for (task, attack, clean, method), rows in groups.items():
        mean = {k: sum(float(r[k]) for r in rows) / len(rows) for k in ("score", "asr", "seconds")}
        lines.append(
            [task, attack, clean, f"`{method}`" if method != "nothing" else "nothing", len(rows), rows[0]["score_name"],
             f"{mean['score']:.1f}", f"{mean['asr']:.1f}", f"{mean['seconds']:.0f}" if method != "nothing" else "-"]
        )  # fmt: skip
    head = ["task", "attack", "clean", "method", "seeds", "measure", "measure, %", "attack success, %", "seconds"]
    return harness.table(head, lines)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="+", choices=[*TASKS, "table"])
    parser.add_argument("--attacks", nargs="*")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--clean", type=int, help="clean samples; texts, points, video and detection only")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for task in args.tasks:
        if task == "table":
            harness.splice(harness.DOCS / "tasks.md", "tasks", table())
            continue
        for attack in args.attacks or attacks(task):
            for seed in args.seeds:
                case = make(task, attack, seed, args.clean)
                before = case.measure(case.model)
                mixing = "fine_mixing" in case.own
                for method in (m for m in args.methods if mixing or "mixing" not in m):
                    found = row(task, attack, method, seed, case, before)
                    RESULTS.add([found])
                    shown = "task attack method seed score_before asr_before score asr seconds alerts".split()
                    print(" ".join(str(found[k]) for k in shown), flush=True)


if __name__ == "__main__":
    main()
