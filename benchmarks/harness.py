"""What every benchmark needs beside what it measures: rows in a CSV, tables in documents, clocks, memory, options.

    RESULTS = Results("ngf", "solver samples full_ms step_ms ratio machine threads torch commit", run="solver")
    times = take_turns({"plain": plain, "ours": ours}, repeat=5)
    RESULTS.add([{"solver": "exact", ..., "ratio": times["ours"].cpu / times["plain"].cpu}])
    splice(DOCS / "methods.md", "ngf", table(["solver", "ratio"], ...))

Everything that is compared takes turns in one process: ratios are of one run, never of two.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import gc
import itertools
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfip import env
from fastfip.nets.process import PeakMemory

ROOT = Path(__file__).resolve().parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
Row = dict[str, Any]


def cache_dir() -> Path:
    """Where what takes long to make is kept: `benchmarks/.cache`, or where FASTFIP_CACHE points."""
    path = Path(os.environ.get("FASTFIP_CACHE") or ROOT / "benchmarks" / ".cache")
    path.mkdir(parents=True, exist_ok=True)
    return path


# --------------------------------------------------------------------------------------------------------------- rows


def code_changed(root: Path = ROOT) -> bool:
    """Whether code that takes part in a measurement differs from the commit; rows and documents change with each."""
    git = ["git", "-C", str(root), "status", "--porcelain", "--", "fastfip", "csrc", "benchmarks/*.py"]
    return bool(subprocess.run(git, capture_output=True, text=True).stdout.strip())


def here() -> Row:
    """What a row says of where it was made: `env.collect()`, the commit with "+changes" where the code differs."""
    found = env.collect()
    commit = str(found["commit"] or "").partition("+")[0]
    return {**found, "commit": commit + "+changes" * bool(commit and code_changed()), "machine": found["cpu"]}


class Results:
    """The rows of `benchmarks/results/NAME.csv`, read as text.

    `run` are the columns that name a run: its rows are replaced when it is measured again. `kept` are columns that
    another pass of the same benchmark fills in. `order` sorts the file. Columns of `here()` that a row has no value
    for (commit, torch, cpu, ...) are filled in. Columns of the file that this benchmark no longer has stay; `absent` is
    what it means that a row is older than a column.
    """

    def __init__(
        self,
        name: str,
        columns: str,
        run: str = "",
        *,
        kept: str = "",
        order: Callable[[Row], Any] = lambda row: 0,
        absent: Mapping[str, str] | None = None,
    ) -> None:
        self.path = ROOT / "benchmarks" / "results" / f"{name}.csv"
        self.columns, self.run, self.kept, self.order = columns.split(), run.split(), kept.split(), order
        self.absent = {**dict.fromkeys(self.columns, ""), **(absent or {})}

    def key(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """What names the run of a row."""
        return tuple(str(row[name]) for name in self.run)

    def read(self) -> list[dict[str, str]]:
        """Return all rows, with an empty text for what a row does not have."""
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return [{**self.absent, **row} for row in csv.DictReader(file)]

    def stamped(self, row: Row) -> Row:
        """Return a row with what the machine, the versions, the backend and the commit are."""
        stamp = here()
        return {**{name: stamp[name] for name in self.columns if name in stamp}, **row}

    def add(self, rows: Sequence[Row]) -> None:
        """Put rows of one or more runs into the file, in the place of those of the same runs."""
        new = [self.stamped(row) for row in rows]
        with self._locked():
            old = self.read()
            before = {self.key(row): row for row in old}
            for row in new:
                for name in self.kept:
                    row.setdefault(name, before.get(self.key(row), {}).get(name, ""))
            again = {self.key(row) for row in new}
            left: list[Row] = [*(row for row in old if self.key(row) not in again), *new]
            left.sort(key=self.order)
            columns = dict.fromkeys([*self.columns, *(old[0] if old else ())])
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(f".{os.getpid()}.part")  # renamed when whole
            with part.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(columns), restval="")
                writer.writeheader()
                writer.writerows(left)
            part.replace(self.path)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other runs from the file: what they added since it was read must not be lost."""
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        with (cache_dir() / f"{self.path.stem}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def show(row: Mapping[str, object], width: int = 9, **widths: int) -> None:
    """Print a row; negative widths stand left."""
    wide = {name: widths.get(name, width) for name in row}
    print("  ".join(f"{value!s:{'<' if wide[k] < 0 else '>'}{abs(wide[k])}}" for k, value in row.items()), flush=True)


# ---------------------------------------------------------------------------------------------------------- documents


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def spliced(text: str, mark: str, new: str) -> str:
    """Return a text with what stands between `<!-- mark:begin -->` and `<!-- mark:end -->` replaced."""
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    if not (text.count(begin) == text.count(end) == 1 and text.index(begin) < text.index(end)):
        raise ValueError(f"it must hold {begin} once and, after it, {end} once")
    return f"{text.split(begin)[0]}{begin}\n{new}\n{end}{text.split(end)[1]}"


def splice(path: Path, mark: str, new: str) -> None:
    """Replace what stands between two marks in a document."""
    try:
        text = spliced(path.read_text(encoding="utf-8"), mark, new)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    path.write_text(text, encoding="utf-8")


def markdown(text: str) -> list[str]:
    """Return the paragraphs of a docstring, indented ones as code."""
    out = []
    for paragraph in re.split(r"\n\s*\n", text):
        if paragraph.startswith("    "):
            out.append(f"```\n{textwrap.dedent(paragraph)}\n```")
        else:
            out.append("\n".join(inline(line) for line in paragraph.splitlines()))
    return out


def inline(text: str) -> str:
    """Escape what Markdown would take for markup, outside of `code`."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([|*])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


# ------------------------------------------------------------------------------------------------------------- clocks


class Seconds(NamedTuple):
    cpu: float
    wall: float


def clock(threads: int) -> str:
    """Which of the `Seconds` counts: "cpu", which other programs disturb little; with more threads "wall".

    Threads that wait for each other would count as work.
    """
    return "cpu" if threads == 1 else "wall"


def least(call: Callable[[], object], repeat: int, inner: int = 1) -> float:
    """Least CPU time of one call, in seconds, of `repeat` series of `inner` calls; one call before is not counted."""
    call()
    best = float("inf")
    for _ in range(repeat):
        start = time.process_time()
        for _ in range(inner):
            call()
        best = min(best, (time.process_time() - start) / inner)
    return best


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    repeat: int,
    *,
    threads: int = 1,
    patience: float = float("inf"),
    before: Callable[[], object] | None = None,
    after: Callable[[str, Any], object] | None = None,
) -> dict[str, Seconds]:
    """Least times of several ways that take turns, the order reversed every second time; a first turn is not counted.

    A way that needs more than `patience` times as long as the first one takes two turns only. `before` runs ahead of
    every call and `after` gets its name and what it returned; neither is timed.
    """
    times: dict[str, list[Seconds]] = {name: [] for name in calls}
    names, kind = list(calls), clock(threads)

    def best(name: str) -> float:
        return min(getattr(found, kind) for found in times[name])

    for turn in range(-1, repeat):
        for name in names if turn % 2 else reversed(names):
            if turn >= 2 and best(name) > patience * best(names[0]):
                continue
            if before is not None:
                before()
            cpu, wall = time.process_time(), time.perf_counter()
            got = calls[name]()
            spent = Seconds(time.process_time() - cpu, time.perf_counter() - wall)
            if after is not None:
                after(name, got)
            del got  # it must not be there while the next way runs
            if turn >= 0:
                times[name].append(spent)
    return {name: Seconds(*map(min, zip(*found))) for name, found in times.items()}


class Clock:
    """Times series of calls on a device, by its events; on the CPU (for a rehearsal), by seconds."""

    def __init__(self, device: str, repeat: int, least_ms: float) -> None:
        self.device, self.repeat, self.least_ms = device, repeat, least_ms
        cuda = device == "cuda"
        self.cache = torch.cuda.get_device_properties(0).L2_cache_size if cuda else 1 << 12

    def copies(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """Return copies of the operands that fill the cache more than twice."""
        size = sum(x.numel() * x.element_size() for x in tensors)
        many = min(64, 1 + 2 * self.cache // max(1, size))
        return [tensors, *(tuple(x.clone() for x in tensors) for _ in range(many))]

    def run(self, calls: Iterator[Callable[[], object]], many: int) -> float:
        """Milliseconds of one of `many` calls in a row."""
        if self.device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            for call in itertools.islice(calls, many):
                call()
            end.record()
            torch.cuda.synchronize()
            return begin.elapsed_time(end) / many
        start = time.perf_counter()
        for call in itertools.islice(calls, many):
            call()
        return (time.perf_counter() - start) * 1e3 / many

    def ms(self, calls: Sequence[Callable[[], object]]) -> float:
        """Return the median of several series, each as long as `least_ms`, over the calls in turn."""
        turn = itertools.cycle(calls)
        self.run(turn, len(calls))  # compiles, and fills what is kept
        many = max(1, int(self.least_ms / max(self.run(turn, 1), 1e-4)))
        return median(self.run(turn, many) for _ in range(self.repeat))


# ------------------------------------------------------------------------------------------------------------- memory


def peak(call: Callable[[], object]) -> int:
    """Peak of the resident memory of this process during a call, in bytes."""
    with PeakMemory(torch.device("cpu")) as memory:
        call()
    if "began" in memory.what:
        sys.exit("this system does not set back the peak of a process: no memory of a single call can be measured")
    return memory.peak


def resident() -> int:
    """Resident memory of this process now, in bytes."""
    return peak(lambda: None)


def release() -> None:
    """Give back to the system what is free: memory that earlier calls left would count as that of later ones."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def fresh(module: str, *arguments: object, **environment: str) -> list[int]:
    """Whole numbers that `python -m MODULE ARGUMENTS` prints last: a process that does nothing else."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    return [int(word) for word in done.stdout.splitlines()[-1].split()]


# ------------------------------------------------------------------------------------------------------------ options

#: Options that several benchmarks have.
OPTIONS: dict[str, dict[str, Any]] = {
    "threads": {"type": int, "default": 1},
    "repeat": {"type": int, "default": 5, "help": "how often each way is timed; the least time counts"},
    "again": {"action": "store_true", "help": "replace rows that are there"},
    "peak": {"help": argparse.SUPPRESS},  # what a fresh process is asked for
}


class Parser(argparse.ArgumentParser):
    """The options of a benchmark: its docstring is the help, `names` are taken from OPTIONS."""

    def __init__(self, doc: str | None, *names: str) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        for name in names:
            self.add_argument(f"--{name}", **OPTIONS[name])

    def parse(self) -> argparse.Namespace:
        """Read the command line, and let torch have the threads that it names."""
        options = self.parse_args()
        if "threads" in options:
            torch.set_num_threads(options.threads)
        return options


def failure(error: Exception, most: int = 80) -> str:
    """What an exception says, in one line: the rivals refuse a net in many ways."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:most]}"
