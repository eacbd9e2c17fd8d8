"""Run a slice of the suite; see the docstring of the package.

Rows that are there are kept, so a slice that was cut off goes on. `--minutes` ends it after the cells that run then.
Networks are trained first, each once; those of the cache are taken as they are. `networks` trains those that are named,
or takes those that are there, and writes how accurate they are and how well their backdoors work.
"""

from __future__ import annotations

import csv
import datetime
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks import harness
from benchmarks.purification import real_data
from benchmarks.suite import tables
from benchmarks.suite.cells import SETTINGS, Cell, kept, results, rows_of, run, run_apart
from benchmarks.suite.networks import NETWORKS, folder, prepare
from benchmarks.suite.slices import SLICES, cells

LOOKS = harness.ROOT / "benchmarks" / "results" / "looks.csv"


def _train(name: str, threads: int, end: float) -> str:
    """Train a network in a process of its own unless it is there; return what went wrong."""
    if (folder() / f"{NETWORKS[name].key()}.pth").exists():
        return ""
    if time.monotonic() > end:
        return "not trained: the time is over"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.suite", "--train", name], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    print(done.stdout.strip(), flush=True)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


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
    broken: set[str] = set()
    with ThreadPoolExecutor(args.jobs) as pool:
        first, rest = [n for n in order if n.endswith("-clean")], [n for n in order if not n.endswith("-clean")]
        for group in (first, rest):  # the clean network of a base is what the others are made of
            for name, error in zip(group, pool.map(lambda name: _train(name, threads, end), group)):
                if error:
                    broken.add(name)
                    print(f"{name}: {error}", flush=True)

    def one(cell: Cell) -> None:
        if time.monotonic() > end or {cell.network, f"{NETWORKS[cell.network].base}-clean"} & broken:
            return
        found, error = run_apart(cell, threads, args.time_limit)
        if error:
            network = NETWORKS[cell.network]
            found = [{
                "network": cell.network, "made": network.key(), "base": network.base,
                "method": cell.method, "fraction": cell.fraction,
                "setting": cell.setting, "seed": cell.seed, "attack": "", "target": "", "error": error,
            }]  # fmt: skip
        rows.add([{**row, "threads": threads} for row in found])
        for row in found:
            shown = ("network", "attack", "method", "fraction", "setting", "seed", "acc", "asr", "der", "cpu_seconds")
            print({k: row[k] for k in (*shown, "error") if row.get(k) not in (None, "")}, flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, todo))
    left = [cell for cell in asked if cell not in {_of(row) for row in rows.read() if _current(row)}]
    print(f"{len(asked) - len(left)} of {len(asked)} cells are there")


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
    parser.add_argument("--cell", nargs=5, metavar=("NETWORK", "METHOD", "FRACTION", "SEED", "SETTING"))
    args = parser.parse()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if args.slice == "table":
        tables.write()
        return
    real_data.require()
    if args.cell:
        of = "validation" if NETWORKS[args.cell[0]].set == "validation" else "development"
        for row in run(Cell.of(args.cell)):
            print("ROW", *(f"{k}={v}" for k, v in results(of).stamped(row).items()), sep="\t")
    elif args.train:
        _said(args.train)
    elif args.slice == "networks":
        for name in args.networks or [n for n in NETWORKS if (folder() / f"{NETWORKS[n].key()}.pth").exists()]:
            _said(name)
            kept().add(rows_of(name))
        tables.write()
    else:
        _run_all(args)
        tables.write()


def _said(name: str) -> None:
    prepared = prepare(NETWORKS[name])
    parts = [
        f"{backdoor.label} -> {backdoor.target}: ASR {found.shown('asr')}"
        for backdoor, found in zip(prepared.network.backdoors, prepared.attacked)
    ]
    print(f"{name}: ACC {prepared.clean.shown('acc')} {'; '.join(parts)} ({prepared.seconds:.0f} CPU s)", flush=True)


if __name__ == "__main__":
    main()
