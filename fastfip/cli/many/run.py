"""`purify_many`: the rows of a manifest, several at a time, into one folder."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastfip.cli.many.job import Job, run_row
from fastfip.cli.many.keys import Digests
from fastfip.cli.many.ledger import Ledger
from fastfip.cli.many.on_ray import RayTasks
from fastfip.cli.many.pool import Executor, Outcome, Processes, outcomes
from fastfip.cli.many.report import write_report
from fastfip.cli.many.rows import ManyRow, as_rows
from fastfip.errors import ConfigError, FastFIPError, printable

__all__ = ["ManyResult", "purify_many"]

#: What a checkpoint that says nothing of its own form is written as.
_SUFFIX = ".safetensors"
#: Files that are called alike in every folder: the folder's name says more.
_ALIKE = ("attack_result", "model", "pytorch_model")


@dataclass(frozen=True)
class ManyResult:
    """What came of the rows of a manifest.

    Attributes:
        path: the folder with `results.csv`, `report.md`, `report.json` and the purified files.
        rows: their lines of `results.csv`, in the order of the manifest; those that were not reached are missing.
        asked: how many rows the manifest has.
        skipped: how many were done already.
    """

    path: Path
    rows: list[dict[str, str]]
    asked: int
    skipped: int

    @property
    def failed(self) -> list[dict[str, str]]:
        """Return the lines of rows that failed."""
        return [row for row in self.rows if row["status"] == "failed"]

    @property
    def done(self) -> list[dict[str, str]]:
        """Return the lines of rows that are done."""
        return [row for row in self.rows if row["status"] == "done"]

    def __str__(self) -> str:
        parts = [f"{len(self.done)} of {self.asked} rows done"]
        parts += [f"{self.skipped} of them before"] if self.skipped else []
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        return ", ".join(parts)


def purify_many(
    rows: str | os.PathLike[str] | Iterable[ManyRow | Mapping[str, Any]],
    out: str | os.PathLike[str],
    *,
    workers: int | None = None,
    retries: int = 1,
    timeout: float | None = None,
    threads: int = 1,
    retry_failed: bool = False,
    ray: bool = False,
    ray_address: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> ManyResult:
    """Purify many checkpoints, each in a process of its own, into one folder, which goes on where it was left.

    Rows are known by what they say and what their files hold. Those that `out/results.csv` has are passed over, so the
    same call after a crash does what is missing, and no row twice. Purified files are never written over others.
    A script that calls this needs `if __name__ == "__main__":`, because workers import it.

    Args:
        rows: a manifest (a CSV file with the names of `ManyRow` as columns), or rows.
        out: folder for the results; made if it is not there.
        workers: rows at a time; None: the processors of this machine (or the cluster) by `threads`.
        retries: further attempts of a row whose process died or broke. A row that is wrong is not tried again.
        timeout: seconds for one attempt; None: any time.
        threads: of each worker.
        retry_failed: try rows again that failed in an earlier run.
        ray: tasks of Ray instead of processes; needs the extra `ray`.
        ray_address: of a cluster, e.g. "auto", whose machines see the same files; None: one inside this process.
        progress: gets a line for each row.

    Returns:
        the lines of the rows.

    Raises:
        ConfigError: a wrong row (its line is named), two rows that are the same or write the same file, a folder that
            another run works in. Nothing was done then.
        BackendError: Ray is not installed, or the cluster cannot be reached.
    """
    if threads < 1:
        raise ConfigError(f"threads={threads}: must be at least 1")
    listed, base = as_rows(rows)
    keyed = _keyed(listed, base)
    with Ledger(out) as ledger:
        failed = {key for key in keyed if ledger.rows.get(key, {}).get("status") == "failed"}
        if retry_failed and failed:
            ledger.forget(failed)
        names = _names(keyed, ledger)
        todo = [
            Job(row, key, str(base), str(ledger.work), names[key])
            for key, row in keyed.items()
            if key not in ledger.rows
        ]
        skipped = sum(ledger.rows.get(key, {}).get("status") == "done" for key in keyed)
        try:
            with _place(ray, ray_address, workers, threads, ledger) as (place, most):
                ended = outcomes(run_row, todo, place, workers=most, retries=retries, timeout=timeout)
                with contextlib.closing(ended):
                    for number, outcome in enumerate(ended, 1):
                        _take(ledger, outcome)
                        if progress is not None:
                            progress(f"{number} of {len(todo)}: {_line(ledger.rows[outcome.job.key])}")
        finally:
            result = ManyResult(
                ledger.path, [ledger.rows[key] for key in keyed if key in ledger.rows], len(keyed), skipped
            )
            write_report(result.path, str(result), result.rows)
    return result


def _keyed(rows: list[ManyRow], base: Path) -> dict[str, ManyRow]:
    """Return rows by their keys, each looked at as far as that goes without running it."""
    from fastfip.cli.purify import settings_of

    digests, found, checked = Digests(base), dict[str, ManyRow](), set[Any]()
    places: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        try:
            if row.epochs is not None and row.steps is not None:
                raise ConfigError("epochs and steps: give only one of them")
            how = (row.method, row.config, row.settings, row.pretrained is None)
            if how not in checked and ":" not in row.method:  # a class of the user's is for the workers to import
                config = None if row.config is None else base / row.config
                settings_of(row.method, config, list(row.settings), row.pretrained is not None)
                checked.add(how)
            key = digests.key(row)
        except FastFIPError as error:
            raise ConfigError(f"row {number} ({printable(row.checkpoint, 60)}): {error}") from None
        if key in found:
            raise ConfigError(f"rows {places[key]} and {number} are the same: leave one out, or give another seed")
        found[key], places[key] = row, number
    return found


def _names(keyed: Mapping[str, ManyRow], ledger: Ledger) -> dict[str, str]:
    """Return the name of the file that each row writes: its own, or its checkpoint's, with the key where that is taken.

    Raises:
        ConfigError: two rows want the same name, or a file of another row or of nobody's has it.
    """
    names = {key: row["out"] for key, row in ledger.rows.items()}
    taken = {row["out"] for row in ledger.rows.values() if row["status"] == "done"}
    new = {key: row for key, row in keyed.items() if key not in names}
    wanted = Counter(_default(row) for row in keyed.values() if row.out is None)
    for key, row in sorted(new.items(), key=lambda item: item[1].out is None):  # those that say it first
        name = row.out or _default(row)
        if row.out is None and (wanted[name] > 1 or name in taken or (ledger.path / name).exists()):
            name = f"{Path(name).stem}-{key[:8]}{Path(name).suffix}"
        if name in taken or (ledger.path / name).exists():
            who = "another row writes it" if name in taken else "it exists already"
            raise ConfigError(f"{printable(row.checkpoint, 60)}: out {printable(name, 100)}: {who}: give another name")
        names[key] = name
        taken.add(name)
    return names


def _default(row: ManyRow) -> str:
    path = Path(row.checkpoint)
    stem = path.parent.name if path.stem in _ALIKE and path.parent.name else path.stem
    return stem.lstrip(".") + (path.suffix if path.suffix in (".safetensors", ".pth", ".pt") else _SUFFIX)


@contextlib.contextmanager
def _place(
    ray: bool, address: str | None, workers: int | None, threads: int, ledger: Ledger
) -> Iterator[tuple[Executor, int]]:
    if ray or address is not None:
        with RayTasks(address, workers, threads) as tasks:
            yield tasks, workers or tasks.room
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = max(1, cores // threads) if workers is None else workers
    yield Processes(threads, log=lambda job: ledger.logs / f"{job.key}.txt"), most


def _take(ledger: Ledger, outcome: Outcome) -> None:
    job: Job = outcome.job
    if outcome.error:
        row = dataclasses.asdict(job.row)
        ledger.give_up(row, job.key, job.out, outcome.error, outcome.attempts, outcome.seconds)
    else:
        ledger.commit(outcome.value, outcome.attempts)


def _line(row: Mapping[str, str]) -> str:
    """Return what is said of a row when it has ended."""
    if row["status"] == "failed":
        return f"{row['checkpoint']} failed: {row['error']}"
    changes = [
        f"{word} {100 * float(row[f'{name}_before']):.1f} -> {100 * float(row[name]):.1f} %"
        for name, word in (("acc", "ACC"), ("asr", "ASR"))
        if row[name] and row[f"{name}_before"]
    ]
    return ", ".join([f"{row['checkpoint']} to {row['out']}", *changes, f"{float(row['seconds']):.0f} s"])
