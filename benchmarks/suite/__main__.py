"""Run a slice of the suite; see the docstring of the package.

Rows that are there are kept, so a slice that was cut off goes on. `--minutes` ends it after the cells that run then.
Networks are trained first, each once; those of the cache are taken as they are. `networks` trains those that are named,
or takes those that are there, and writes how accurate they are and how well their backdoors work.
"""

from __future__ import annotations

import csv
import datetime
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import harness
from benchmarks.purification import real_data
from benchmarks.suite import tables
from benchmarks.suite.cells import SETTINGS, Cell, kept, measured, results, rows_of, said
from benchmarks.suite.networks import NETWORKS, folder
from benchmarks.suite.slices import SLICES, cells
from fastfip.cli.many.pool import Outcome, Processes, outcomes

LOOKS = harness.ROOT / "benchmarks" / "results" / "looks.csv"


def _train_all(names: list[str], jobs: int, threads: int, end: float) -> dict[str, str]:
    """Train those of the networks that are not there, each in a process of its own; return what went wrong, by name."""
    late = dict[str, str]()

    def missing() -> Iterator[str]:
        for name in names:
            if (folder() / f"{NETWORKS[name].key()}.pth").exists():
                continue
            if time.monotonic() > end:
                late[name] = "not trained: the time is over"
            else:
                yield name

    ended = outcomes(said, missing(), Processes(threads), workers=jobs)
    return {**{outcome.job: outcome.error for outcome in ended if outcome.error}, **late}


def _log_look(todo: list[Cell]) -> None:
    """Write down that the validation set is looked at: once for each version of the methods."""
    new = not LOOKS.exists()
    with LOOKS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["date", "commit", "cells", "methods", "networks"])
        stamp = harness.here()
        writer.writerow([
            datetime.date.today().isoformat(), stamp["commit"], len(todo),
            " ".join(sorted({cell.method for cell in todo})), len({cell.network for cell in todo}),
        ])  # fmt: skip


def _run_all(args: Any) -> None:
    of = SLICES[args.slice]
    rows = results(of)
    asked = cells(
        args.slice, only=args.networks, use=args.methods, fractions=args.fractions, seeds=args.seeds,
        settings=args.settings,
    )  # fmt: skip
    if any(NETWORKS[cell.network].set != of and NETWORKS[cell.network].backdoors for cell in asked):
        sys.exit(f"these networks are not of the {of} set")
    there = {_of(row) for row in rows.read() if _current(row) and not (args.retry and row["error"])}
    todo = asked if args.again else [cell for cell in asked if cell not in there]
    if todo and of == "validation":
        _log_look(todo)
    real_data.cifar10()  # decoded once, before the processes start
    threads = 1  # threads that wait for each other on busy cores took ten times as long
    end = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    wanted = {cell.network for cell in todo}
    order = [*dict.fromkeys(f"{NETWORKS[n].base}-clean" for n in sorted(wanted)), *sorted(wanted)]
    broken: dict[str, str] = {}
    first, rest = [n for n in order if n.endswith("-clean")], [n for n in order if not n.endswith("-clean")]
    for group in (first, rest):  # the clean network of a base is what the others are made of
        found = _train_all(group, args.jobs, threads, end)
        broken |= found
        for name, error in found.items():
            print(f"{name}: {error}", flush=True)

    def possible() -> Iterator[Cell]:
        for cell in todo:
            if time.monotonic() > end:
                return
            if not {cell.network, f"{NETWORKS[cell.network].base}-clean"} & set(broken):
                yield cell

    for outcome in outcomes(measured, possible(), Processes(threads), workers=args.jobs, timeout=args.time_limit):
        _keep(rows, outcome, threads)
    left = [cell for cell in asked if cell not in {_of(row) for row in rows.read() if _current(row)}]
    print(f"{len(asked) - len(left)} of {len(asked)} cells are there")


def _keep(rows: harness.Results, outcome: Outcome, threads: int) -> None:
    """Add the rows of a cell that has ended, or one that says why there are none."""
    cell, network = outcome.job, NETWORKS[outcome.job.network]
    found = outcome.value or [{
        "network": cell.network, "made": network.key(), "base": network.base,
        "method": cell.method, "fraction": cell.fraction,
        "setting": cell.setting, "seed": cell.seed, "attack": "", "target": "", "error": outcome.error,
    }]  # fmt: skip
    rows.add([{**row, "threads": threads} for row in found])
    for row in found:
        shown = ("network", "attack", "method", "fraction", "setting", "seed", "acc", "asr", "der", "cpu_seconds")
        print({k: row[k] for k in (*shown, "error") if row.get(k) not in (None, "")}, flush=True)


def _current(row: dict[str, str]) -> bool:
    """Whether a row is of a network as it is described now."""
    return row["network"] in NETWORKS and row["made"] == NETWORKS[row["network"]].key()


def _of(row: dict[str, str]) -> Cell:
    return Cell.of([row["network"], row["method"], row["fraction"], row["seed"], row["setting"]])


def main() -> None:
    """Run what is asked for, print and write the tables."""
    parser = harness.Parser(__doc__, "again")
    parser.add_argument("slice", nargs="?", choices=[*SLICES, "table", "networks"], default="smoke")
    parser.add_argument("--networks", nargs="*", choices=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--fractions", nargs="*", type=float, help="shares of clean images, e.g. 0.05")
    parser.add_argument("--seeds", nargs="*", type=int)
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=["plain"])
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time; they share the cores")
    parser.add_argument("--minutes", type=float, help="start no training and no cell after so many minutes")
    parser.add_argument("--time-limit", type=float, metavar="S", help="seconds for one cell")
    parser.add_argument("--retry", action="store_true", help="run again what ended in an error")
    parser.add_argument("--train", metavar="NETWORK", help="train one network")
    args = parser.parse()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if args.slice == "table":
        tables.write()
        return
    real_data.require()
    if args.train:
        said(args.train)
    elif args.slice == "networks":
        for name in args.networks or [n for n in NETWORKS if (folder() / f"{NETWORKS[n].key()}.pth").exists()]:
            said(name)
            kept().add(rows_of(name))
        tables.write()
    else:
        _run_all(args)
        tables.write()


if __name__ == "__main__":
    main()
