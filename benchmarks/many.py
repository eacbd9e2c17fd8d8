"""Many purifications that are killed half-way and resumed: is each row there, and none twice?

    python -m benchmarks.many [--models 20] [--workers 2] [--folder DIR]      # processes of this machine
    python -m benchmarks.many --ray                                            # tasks of a cluster inside the process
    python -m benchmarks.many --table                                          # only write the table of docs/many.md

Small digits networks with a backdoor are trained, each from a seed of its own (the demo's, 8 epochs); networks that are
in the folder are taken as they are. `fastfip purify-many` fine-tunes each on 70 images. When half of the rows have
their line it is killed by SIGKILL, and then the same command runs to its end. The row says what `results.csv` held at
both moments; with a missing or doubled row, or a file that is not the one of its line, the exit code is 1. Rows go to
benchmarks/results/many.csv.
"""

from __future__ import annotations

import csv
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from benchmarks import harness
from benchmarks.harness import Row
from fastfip.attacks.badnets import BadNets
from fastfip.cli.demonstration import CLEAN, TARGET, digits, train_backdoored

EPOCHS = 8
RESULTS = harness.Results(
    "many",
    "way models workers done_when_killed lines_when_resumed done failed twice missing wrong_files acc_before acc "
    "asr_before asr seconds_before seconds_after machine torch fastfip commit",
    run="way models workers",
)


def make(folder: Path, models: int) -> Path:
    """Write the networks, images and the manifest; return the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    attack = BadNets(size=2)
    for seed in range(models):
        path = folder / f"digits-{seed:03}.pth"
        if path.exists():
            continue
        x, y, test_x, test_y = digits(seed)
        model = train_backdoored(x, y, attack, seed, epochs=EPOCHS)
        triggered, wanted, true = attack.asr_set(test_x, test_y, TARGET)
        np.savez(
            folder / f"digits-{seed:03}.npz", clean_x=x[:CLEAN], clean_y=y[:CLEAN], test_x=test_x, test_y=test_y,
            asr_x=triggered, asr_y=true, attack_y=wanted,
        )  # fmt: skip
        torch.save(model.state_dict(), path)
    manifest = folder / "manifest.csv"
    with manifest.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow("checkpoint arch data test_data asr_data method settings".split())
        for seed in range(models):
            data = f"digits-{seed:03}.npz"
            arch = "fastfip.cli.demonstration:digit_net"
            writer.writerow([f"digits-{seed:03}.pth", arch, data, data, data, "fine_tune", "lr=0.1 steps=150"])
    return manifest


def lines(out: Path) -> list[Row]:
    """Return the whole lines of the results."""
    path = out / "results.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["python"]]


def run(command: list[str], out: Path, stop: int) -> float:
    """Run a command, killed when there are so many lines; return its seconds."""
    began = time.monotonic()
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(harness.ROOT)}) as process:
        while process.poll() is None:
            if stop and len(lines(out)) >= stop:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.1)
    return time.monotonic() - began


def measure(folder: Path, models: int, workers: int, way: str) -> Row:
    """Purify, kill, resume; return what was there."""
    manifest, out = make(folder, models), folder / f"out-{way}-{os.getpid()}"
    command = [
        sys.executable, "-m", "fastfip", "purify-many", str(manifest), "--out", str(out), "--workers", str(workers),
        *(["--ray"] if way == "ray" else []),
    ]  # fmt: skip
    before = run(command, out, models // 2)
    killed = lines(out)
    after = run(command, out, 0)
    rows = lines(out)
    keys = Counter(row["key"] for row in rows)
    done = [row for row in rows if row["status"] == "done"]
    names = {row["checkpoint"] for row in rows}
    figures = {
        name: round(100 * mean(float(row[name]) for row in done), 2)
        for name in ("acc_before", "acc", "asr_before", "asr")
        if done
    }
    return {
        "way": way, "models": models, "workers": workers, "done_when_killed": len(killed),
        "lines_when_resumed": len(rows), "done": len(done), "failed": len(rows) - len(done),
        "twice": sum(count > 1 for count in keys.values()),
        "missing": sum(f"digits-{seed:03}.pth" not in names for seed in range(models)),
        "wrong_files": sum(digest(out / row["out"]) != row["sha256"] for row in done),
        **figures, "seconds_before": round(before), "seconds_after": round(after),
    }  # fmt: skip


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def show() -> str:
    """Return the table of the rows."""
    head = "where|models|workers|lines when killed|lines at the end|done|failed|twice|missing|wrong files".split("|")
    names = "way models workers done_when_killed lines_when_resumed done failed twice missing wrong_files".split()
    return harness.table(head, [[row[name] for name in names] for row in RESULTS.read()])


def main() -> None:
    parser = harness.Parser(__doc__, "threads")
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--ray", action="store_true", help="as tasks of Ray")
    parser.add_argument("--folder", type=Path, default=None, help="where the networks and results are")
    parser.add_argument("--table", action="store_true", help="only write the table of docs/many.md")
    options = parser.parse()
    row: Row = {}
    if not options.table:
        folder = options.folder or harness.cache_dir() / "many"
        row = measure(folder, options.models, options.workers, "ray" if options.ray else "processes")
        RESULTS.add([row])
        harness.show(row, 10)
    harness.splice(harness.DOCS / "many.md", "many", show())
    if any(row.get(name) for name in ("failed", "twice", "missing", "wrong_files")):
        sys.exit(1)


if __name__ == "__main__":
    main()
