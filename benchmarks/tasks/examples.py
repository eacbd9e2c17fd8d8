"""Run examples from start to end, as their author's defaults are, on two threads: time, and what they print.

    python -m benchmarks.tasks.examples point_clouds video detection
    python -m benchmarks.tasks.examples text_classifier -- --weights FOLDER --data FOLDER
    python -m benchmarks.tasks.examples table

What follows `--` is given to the example. Rows go to `benchmarks/results/examples.csv`, their table to docs/tasks.md.
CPU minutes are those of the process and its threads: on two cores that nobody shares, an example takes at least half
of them, and at most all.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time

from benchmarks import harness

FOLDER = harness.ROOT / "examples"
RESULTS = harness.Results(
    "examples", "example arguments wall_minutes cpu_minutes before after threads machine torch commit", "example"
)
THREADS = 2


def run(name: str, words: list[str], python: str = sys.executable) -> harness.Row:
    """Run an example; return its row.

    Raises:
        SystemExit: it fails.
    """
    count = str(THREADS)
    threads = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
    start, before = time.perf_counter(), _spent()
    done = subprocess.run(
        [python, str(FOLDER / f"{name}.py"), *words], env={**os.environ, **threads}, text=True, capture_output=True
    )
    wall, cpu = time.perf_counter() - start, _spent() - before
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stdout}\n{done.stderr}")
    said = figures(done.stdout)
    return {
        "example": name, "arguments": " ".join(w for w in words if not os.path.exists(w)), "threads": THREADS,
        "wall_minutes": f"{wall / 60:.2f}", "cpu_minutes": f"{cpu / 60:.2f}", "before": said[0], "after": said[1],
    }  # fmt: skip


def _spent() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def figures(printed: str) -> tuple[str, str]:
    """Return what an example prints of its model before and after; empty where it has no lines that begin so."""
    lines = [line.partition(":") for line in printed.splitlines()]
    found = {head.strip(): " ".join(rest.split()) for head, _, rest in lines}
    return found.get("as received", found.get("backdoored", "")), found.get("purified", "")


def table() -> str:
    """Return the rows as a table."""
    columns = ("cpu_minutes", "wall_minutes", "before", "after")
    rows = [[f"`{row['example']}`", *(row[name] or "-" for name in columns)] for row in RESULTS.read()]
    return harness.table(["example", "CPU minutes", "wall-clock minutes", "as received", "purified"], rows)


def main(words: list[str]) -> None:
    """Run what is asked for."""
    place = words.index("--") if "--" in words else len(words)
    names, rest = words[:place], words[place + 1 :]
    if names == ["table"]:
        harness.splice(harness.DOCS / "tasks.md", "examples", table())
        return
    for name in names:
        row = run(name, rest)
        RESULTS.add([row])
        print(" | ".join(str(value) for value in row.values()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
