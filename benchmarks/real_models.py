"""Purify networks that other people backdoored: every method, net, share of clean images and seed; a table and a CSV.

    python -m benchmarks.real_models                       # everything; rows that are in the CSV already are kept
    python -m benchmarks.real_models --methods fast_fip --fractions 0.05 --seeds 0 --nets badnets_mnist
    python -m benchmarks.real_models --table               # only print what the CSV holds

Every setting is the method's default; the triggered images only score. `seconds` is the purification alone (set-up,
search, training, held-out scoring), without the test set. ACC, ASR and RA are in percent, over the full test set, ASR
over the images that are not of the target class.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

import fastfip
from benchmarks import real_data
from fastfip.metrics import Evaluation, der

CSV = Path(__file__).resolve().parent / "results" / "real_models.csv"
FIELDS = (
    "net method fraction seed clean_images acc_before asr_before ra_before acc asr ra der seconds seconds_train "
    "peak_memory_mb steps amp machine threads torch fastfip commit"
).split()
#: bfloat16 autocast of the clean and worst-case losses; the weights stay float32.
AMP = "bf16"
METHODS = ("fine_tune", "fip", "fast_fip")
PER_CLASS = {"ibau_gtsrb_badnets": 100}


def commit() -> str:
    """Return the commit of the checkout, with a plus if the code differs from it."""
    try:
        root = Path(__file__).resolve().parent
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "../fastfip"], cwd=root, capture_output=True, text=True
        )
        return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
    except OSError:
        return ""


def machine() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown"


def run(name: str, method: str, fraction: float, seed: int, first: dict[str, str] | None = None) -> dict[str, Any]:
    """Purify one net once and score it."""
    real = real_data.load_real(name)
    real.model.to(memory_format=torch.channels_last)
    x, y = real.clean_set(round(fraction * real.train_size), seed, PER_CLASS.get(name))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=128, shuffle=True)
    old = {k: float(first[f"{k}_before"]) for k in ("acc", "asr", "ra") if first[f"{k}_before"]} if first else None
    old = real_data.score(real) if old is None else old
    result = fastfip.purify(real.model, loader, method, seed=seed, amp=AMP, progress=False)
    new = real_data.score(real, result.model.to(memory_format=torch.channels_last))
    row: dict[str, Any] = {
        "net": name,
        "method": method,
        "fraction": fraction,
        "seed": seed,
        "clean_images": len(y),
        "seconds": round(result.seconds["total"] - result.seconds["evaluation"], 1),
        "seconds_train": round(result.seconds["train"], 1),
        "peak_memory_mb": round((result.peak_memory or 0) / 2**20),
        "steps": result.settings["steps"],
        "amp": AMP,
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fastfip": fastfip.__version__,
        "commit": commit(),
    }
    for key in ("acc", "asr", "ra"):
        row[key] = "" if key not in new else round(new[key], 2)
        row[f"{key}_before"] = "" if key not in old else round(old[key], 2)
    row["der"] = ""
    if "asr" in new:
        row["der"] = round(100 * der(*(Evaluation(acc=s["acc"] / 100, asr=s["asr"] / 100) for s in (old, new))), 2)
    return row


def read() -> list[dict[str, str]]:
    """Return the rows of the CSV."""
    if not CSV.exists():
        return []
    with CSV.open(newline="") as file:
        return list(csv.DictReader(file))


def write(rows: list[dict[str, Any]]) -> None:
    """Write the rows, sorted, in one go."""
    CSV.parent.mkdir(parents=True, exist_ok=True)
    order = {name: k for k, name in enumerate(real_data.names())}
    rows = sorted(
        rows, key=lambda r: (order[r["net"]], float(r["fraction"]), METHODS.index(r["method"]), int(r["seed"]))
    )
    part = CSV.with_suffix(".part")
    with part.open("w", newline="") as file:
        out = csv.DictWriter(file, FIELDS)
        out.writeheader()
        out.writerows(rows)
    os.replace(part, CSV)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the means over the seeds as a Markdown table; +- is the standard deviation."""
    groups: dict[tuple[str, float, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["net"], float(row["fraction"]), row["method"]].append(row)
    lines = [
        "| net | clean images | method | ACC before | ACC | ASR before | ASR | RA | DER | seconds | peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (net, fraction, method), found in groups.items():

        def show(key: str, found: list[dict[str, Any]] = found, digits: int = 2) -> str:
            values = [float(r[key]) for r in found if r[key] != ""]
            if not values:
                return "-"
            spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 and key in ("acc", "asr", "ra", "der") else ""
            return f"{mean(values):.{digits}f}{spread}"

        lines.append(
            f"| {net} | {found[0]['clean_images']} ({float(fraction):.0%}) | {method} | {show('acc_before')} "
            f"| {show('acc')} "
            f"| {show('asr_before')} | {show('asr')} | {show('ra')} | {show('der')} | {show('seconds', digits=0)} "
            f"| {show('peak_memory_mb', digits=0)} |"
        )
    return "\n".join(lines)


def to_readme(text: str) -> None:
    """Put the table between its markers in the README."""
    path = Path(__file__).resolve().parent.parent / "README.md"
    head, rest = path.read_text(encoding="utf-8").split("<!-- real:begin -->")
    _, tail = rest.split("<!-- real:end -->")
    path.write_text(f"{head}<!-- real:begin -->\n{text}\n<!-- real:end -->{tail}", encoding="utf-8")


def main() -> None:
    """Run what is missing, write the CSV after every row, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="*", default=None)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--fractions", nargs="*", type=float, default=[0.05, 0.01])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="purifications at a time, one thread each")
    parser.add_argument("--again", action="store_true", help="replace rows that are there")
    parser.add_argument("--table", action="store_true", help="only print what the CSV holds")
    parser.add_argument("--readme", action="store_true", help="put what the CSV holds into the README")
    parser.add_argument("--one", nargs=4, metavar=("NET", "METHOD", "FRACTION", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.table or args.readme:
        print(table(read()))
        if args.readme:
            to_readme(table(read()))
        return
    if not real_data.available():
        sys.exit(f"skipped: no real networks in {real_data.data_dir()} (set FASTFIP_DATA)")
    if args.one:
        name, method, fraction, seed = args.one
        first = next((r for r in read() if r["net"] == name), None)
        print("ROW", *(f"{k}={v}" for k, v in run(name, method, float(fraction), int(seed), first).items()), sep="\t")
        return
    rows: list[dict[str, Any]] = list(read())
    key = lambda r: (r["net"], r["method"], float(r["fraction"]), int(r["seed"]))  # noqa: E731
    todo = [
        (net, method, fraction, seed)
        for seed in args.seeds
        for fraction in args.fractions
        for net in args.nets or real_data.names()
        for method in args.methods
    ]
    there = set() if args.again else {key(r) for r in rows}
    todo = [t for t in todo if t not in there]
    real_data.cifar10()  # decoded once, before the processes start

    def work(item: tuple[str, str, float, int]) -> None:
        # A process for each purification: its peak memory is its own.
        threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.real_models", "--one", *map(str, item)],
            capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": threads},
        )  # fmt: skip
        line = next((line for line in done.stdout.splitlines() if line.startswith("ROW\t")), None)
        if line is None:
            print("failed:", item, done.stderr.strip().splitlines()[-1:], file=sys.stderr, flush=True)
            return
        row = dict(part.split("=", 1) for part in line.split("\t")[1:])
        rows[:] = [r for r in rows if key(r) != key(row)] + [row]
        write(rows)
        print({k: row[k] for k in ("net", "method", "fraction", "seed", "acc", "asr", "der", "seconds")}, flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, todo))
    print(table(read()))


if __name__ == "__main__":
    main()
