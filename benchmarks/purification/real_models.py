"""Purify networks that other people backdoored: every method, net, share of clean images and seed; a table and a CSV.

    python -m benchmarks.purification.real_models          # everything; rows that are in the CSV already are kept
    python -m benchmarks.purification.real_models --methods fast_wfip --fractions 5 --seeds 0 --nets badnets_mnist
        --settings plain
    python -m benchmarks.purification.real_models --table  # only write the tables of what the CSV holds

The tables stand in docs/results.md; a run that added rows writes them too.

Every setting is the method's default; the triggered images only score. `seconds` is the purification alone (set-up,
search, training, held-out scoring), without the test set; `cpu_seconds` the same in time of the processor, which other
programs disturb less (empty in rows from before it was taken). ACC, ASR and RA are in percent, over the full test set,
ASR over the images that are not of the target class. Settings: `plain`; `hidden`, 0.5 % of the clean set (at least one
image) carry the trigger and the attacker's label; `missing`, one class, drawn by the seed, has no clean image.
Several of these may run at a time: each row is added to what the CSV then holds.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import fastfip
from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.purification import real_data, real_tables
from benchmarks.suite.slices import measurable_methods
from fastfip.cli.many.pool import Outcome, Processes, outcomes
from fastfip.metrics import Evaluation, der

#: Net, method, share of clean images, seed and setting of a run.
Item = tuple[str, str, float, int, str]
#: bfloat16 autocast of the clean and worst-case losses; the weights stay float32.
AMP = "bf16"
SETTINGS = ("plain", "hidden", "missing")
HIDDEN = 0.005
PER_CLASS = {"ibau_gtsrb_badnets": 100}
FIRST = ("fine_tune", "wfip", "fast_wfip", "fip", "fast_fip")  # of the methods, in the file
RESULTS = harness.Results(
    "real_models",
    "net method fraction setting seed clean_images acc_before asr_before ra_before acc asr ra der seconds "
    "seconds_train cpu_seconds peak_memory_mb steps amp machine threads torch fastfip commit error native",
    run="net method fraction seed setting",
    order=lambda r: (
        SETTINGS.index(r["setting"]), real_data.names().index(r["net"]), float(r["fraction"]),
        FIRST.index(r["method"]) if r["method"] in FIRST else len(FIRST), r["method"], int(r["seed"]),
    ),
    absent={"setting": "plain"},
)  # fmt: skip


def clean_set(real: real_data.RealNet, fraction: float, seed: int, setting: str) -> tuple[Tensor, Tensor]:
    """Return the clean set of a run; `hidden` and `missing` are what is said at the top of this file."""
    count = round(fraction * real.train_size)
    picked = real_data.sample_clean(real.clean_y, count, seed, PER_CLASS.get(real.name))
    x, y = real.clean_x[np.sort(picked)], real.clean_y[np.sort(picked)]
    order = np.argsort(np.argsort(picked))  # the pixels are read in the file's order, the set keeps its own
    x, y = np.asarray(x)[order], y[order]
    rng = np.random.default_rng([seed, 1])
    if setting == "missing":
        keep = y != rng.choice(np.unique(y))
        x, y = x[keep], y[keep]
    elif setting == "hidden":
        if real.trigger is None or real.target is None:
            raise ValueError(f"{real.name} has no trigger to hide")
        wanted = real.wanted(y)
        chosen = rng.permutation(np.flatnonzero(y != wanted))[: max(1, round(HIDDEN * len(y)))]
        x, y = x.copy(), y.copy()
        x[chosen], y[chosen] = real.trigger(x[chosen]), wanted[chosen]
    elif setting != "plain":
        raise ValueError(f"setting {setting!r}: must be one of {', '.join(SETTINGS)}")
    return real.to_input(x), torch.from_numpy(y)


def run(
    name: str, method: str, fraction: float, seed: int, setting: str = "plain", first: dict[str, str] | None = None
) -> Row:
    """Purify one net once and score it."""
    real = real_data.load_real(name)
    x, y = clean_set(real, fraction, seed, setting)
    old = {k: float(first[f"{k}_before"]) for k in ("acc", "asr", "ra") if first[f"{k}_before"]} if first else None
    old = real_data.score(real) if old is None else old
    start = time.process_time()
    result = fastfip.purify(real.model, real_data.loader(x, y), method, seed=seed, amp=AMP, progress=False)
    spent = time.process_time() - start
    new = real_data.score(real, result.model)
    row: Row = {
        "net": name,
        "method": method,
        "fraction": fraction,
        "setting": setting,
        "seed": seed,
        "clean_images": len(y),
        "seconds": round(result.seconds["total"] - result.seconds["evaluation"], 1),
        "seconds_train": round(result.seconds["train"], 1),
        "cpu_seconds": round(spent * (1 - result.seconds["evaluation"] / result.seconds["total"]), 1),
        "peak_memory_mb": round((result.peak_memory or 0) / 2**20),
        "steps": result.settings["steps"],
        "amp": AMP,
    }
    for key in ("acc", "asr", "ra"):
        row[key] = "" if key not in new else round(new[key], 2)
        row[f"{key}_before"] = "" if key not in old else round(old[key], 2)
    row["der"] = ""
    if "asr" in new:
        row["der"] = round(100 * der(*(Evaluation(acc=s["acc"] / 100, asr=s["asr"] / 100) for s in (old, new))), 2)
    return RESULTS.stamped(row)


def measured(item: Item) -> Row:
    """Return the row of one purification; a worker does this, so that its peak memory is its own."""
    first = next((r for r in RESULTS.read() if r["net"] == item[0] and not r["error"]), None)
    return run(*item, first)


def keep(outcome: Outcome, threads: int) -> None:
    """Add the row of a purification that has ended, or one that says why there is none."""
    named: Row = dict(zip(("net", "method", "fraction", "seed", "setting"), outcome.job))
    row: Row = {**(outcome.value or {**named, "error": outcome.error}), "threads": threads}
    RESULTS.add([row])
    print({k: row[k] for k in ("net", "method", "fraction", "setting", "seed", "acc", "asr", "der", "seconds", "error")
           if row.get(k) not in (None, "")}, flush=True)  # fmt: skip


def results_text(rows: list[dict[str, str]]) -> str:
    """Return the tables of docs/results.md: a line for each method, then ACC / ASR on each net."""
    parts = [real_tables.by_method(rows)]
    present = sorted({(r["setting"], -float(r["fraction"])) for r in rows}, key=lambda p: (SETTINGS.index(p[0]), p[1]))
    words = {
        "plain": "",
        "hidden": ", 0.5 % of them triggered images with the attacker's label",
        "missing": ", one class missing",
    }
    for setting, fraction in present:
        parts.append(f"{-fraction:.0%} clean images{words[setting]}:")
        parts.append(real_tables.by_net(rows, -fraction, setting))
    return "\n\n".join(parts)


def documents(rows: list[dict[str, str]]) -> list[tuple[Path, str]]:
    """Return the documents that hold tables of the rows, between marks called real, with these tables."""
    return [(harness.DOCS / "results.md", results_text(rows))]


def write_documents() -> None:
    """Put what the CSV holds into the documents."""
    for path, text in documents(RESULTS.read()):
        harness.splice(path, "real", text)


def main() -> None:
    """Run what is missing, add its row to the CSV after every run, write and print the tables."""
    parser = harness.Parser(__doc__, "again")
    parser.add_argument("--nets", nargs="*", default=None)
    parser.add_argument("--methods", nargs="*", default=None, help="default: all that are registered")
    parser.add_argument("--fractions", nargs="*", type=float, default=[5, 1], help="in percent, or below 1 as shares")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="purifications at a time; they share the cores")
    parser.add_argument("--time-limit", type=float, default=None, metavar="S", help="seconds for one run, scoring too")
    parser.add_argument("--retry", action="store_true", help="run again what ended in an error")
    parser.add_argument("--table", action="store_true", help="only write and print the tables of what the CSV holds")
    args = parser.parse()
    if args.table:
        rows = RESULTS.read()
        print(real_tables.full(rows), real_tables.by_method(rows), sep="\n\n")
        write_documents()
        return
    real_data.require()
    todo = [
        (net, method, fraction / 100 if fraction >= 1 else fraction, seed, setting)
        for setting in args.settings
        for seed in args.seeds
        for fraction in args.fractions
        for net in args.nets or real_data.names()
        for method in args.methods or measurable_methods()
        if setting != "hidden" or real_data.SPECS[net].trigger is not None
    ]
    there = set() if args.again else {RESULTS.key(r) for r in RESULTS.read() if not (args.retry and r["error"])}
    todo = [item for item in todo if tuple(map(str, item)) not in there]
    real_data.cifar10()  # decoded once, before the processes start
    # Two threads that are held to one core wait for each other: a run took ten times as long.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // args.jobs)
    for outcome in outcomes(measured, todo, Processes(threads), workers=args.jobs, timeout=args.time_limit):
        keep(outcome, threads)
    print(real_tables.by_method(RESULTS.read()))
    write_documents()


if __name__ == "__main__":
    main()
