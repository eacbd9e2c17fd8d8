"""Jobs in processes of their own, a fresh one for each attempt: whatever ends a process costs one attempt of one job.

for outcome in outcomes(function, jobs, Processes(threads=1), workers=2, retries=1, timeout=600):
print(outcome.job, outcome.error or outcome.value)
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, Protocol

import fastfip
from fastfip.errors import ConfigError, reason

__all__ = ["Executor", "Outcome", "Processes", "Said", "called", "outcomes"]

#: What libraries ask how many threads they may start.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
#: Seconds after which processes are looked at again, although none has said anything.
_GLANCE = 0.5
#: Bytes of a log that are looked through for the last line.
_LOG_END = 4096


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        job: as it was given.
        value: what the function returned, None after an error.
        error: why there is no value, in one line; empty where there is one.
        attempts: processes that it took, 1 or more.
        seconds: of the last attempt, with the start of its process.
    """

    job: Any
    value: Any
    error: str
    attempts: int
    seconds: float


@dataclass(frozen=True)
class Said:
    """What one attempt ended with: a value, or an error in one line."""

    value: Any = None
    error: str = ""


class Executor(Protocol):
    """Where attempts run. A handle is whatever `start` returns."""

    def start(self, function: Callable[[Any], Any], job: Any) -> Any:
        """Begin `function(job)` in a fresh process."""

    def wait(self, handles: list[Any], seconds: float) -> list[tuple[Any, Said]]:
        """Return those that have ended, after at most so many seconds."""

    def stop(self, handle: Any) -> None:
        """End an attempt at once."""


def outcomes(
    function: Callable[[Any], Any],
    jobs: Iterable[Any],
    place: Executor,
    *,
    workers: int = 1,
    retries: int = 0,
    timeout: float | None = None,
) -> Generator[Outcome, None, None]:
    """Run `function(job)` for each job, several at a time, and yield how each ended, in the order in which they end.

    A job whose process died, or whose function raised, is begun again after the others; one that was over its time is
    not, since it would be again. Closing the generator ends what runs.

    Args:
        function: of a module that workers can import.
        jobs: what it is called with, one after the other when a worker is free.
        place: where the processes are.
        workers: jobs at a time.
        retries: further attempts of a job.
        timeout: seconds that one attempt may take; None: any time.

    Raises:
        ConfigError: a number of workers, retries or seconds that cannot be.
    """
    if workers < 1 or retries < 0 or (timeout is not None and not timeout > 0):
        raise ConfigError(
            f"workers={workers}, retries={retries}, timeout={timeout}: workers must be at least 1, "
            "retries at least 0, and timeout more than 0"
        )
    first, again = iter(jobs), deque[tuple[Any, int]]()
    busy: dict[Any, tuple[Any, int, float]] = {}
    try:
        while True:
            while len(busy) < workers and (item := _next(first, again)) is not None:
                busy[place.start(function, item[0])] = (*item, time.monotonic())
            if not busy:
                return
            for handle, said in place.wait(list(busy), _patience(busy, timeout)):
                job, attempt, began = busy.pop(handle)
                if said.error and attempt <= retries:
                    again.append((job, attempt + 1))
                else:
                    yield Outcome(job, said.value, said.error, attempt, time.monotonic() - began)
            for handle, (job, attempt, began) in list(busy.items()):
                if timeout is not None and time.monotonic() - began > timeout:
                    place.stop(handle)
                    del busy[handle]
                    late = f"over the time limit of {timeout:g} s"
                    yield Outcome(job, None, late, attempt, time.monotonic() - began)
    finally:
        for handle in busy:
            place.stop(handle)


def _next(first: Iterator[Any], again: deque[tuple[Any, int]]) -> tuple[Any, int] | None:
    for job in first:
        return job, 1
    return again.popleft() if again else None


def _patience(busy: dict[Any, tuple[Any, int, float]], timeout: float | None) -> float:
    if timeout is None:
        return _GLANCE
    return max(0.0, min(_GLANCE, min(began for *_, began in busy.values()) + timeout - time.monotonic()))


def called(function: Callable[[Any], Any], job: Any) -> Said:
    """Return what a function makes of a job, or what it raised, whose traceback goes to stderr."""
    try:
        return Said(value=function(job))
    except BaseException as error:  # SystemExit too: a worker has nobody else to tell
        traceback.print_exc()
        return Said(error=f"{type(error).__name__}: {reason(error)}")


# ------------------------------------------------------------------------------------------------- on this machine


@dataclass(eq=False)
class _Attempt:
    process: Any
    pipe: connection.Connection
    log: Path | None


class Processes:
    """Processes of this machine, started anew and not forked. They end when the one that started them does.

    Args:
        threads: that libraries may start in each.
        log: gives the file for what the process of a job prints; None: it prints where this one does.
    """

    def __init__(self, threads: int = 1, log: Callable[[Any], Path] | None = None) -> None:
        self.threads, self.log = threads, log
        self.context = multiprocessing.get_context("spawn")

    def start(self, function: Callable[[Any], Any], job: Any) -> _Attempt:
        """Begin `function(job)` in a fresh process."""
        log = None if self.log is None else self.log(job)
        pipe, theirs = self.context.Pipe(duplex=False)
        with _environment(dict.fromkeys(_THREADS, str(self.threads))), _importable():
            process = self.context.Process(target=_work, args=(theirs, function, job, log))
            process.start()
        theirs.close()
        return _Attempt(process, pipe, log)

    def wait(self, handles: list[_Attempt], seconds: float) -> list[tuple[_Attempt, Said]]:
        """Return those that have ended, after at most so many seconds."""
        ready = connection.wait([attempt.pipe for attempt in handles], seconds)
        # A process that a worker forked may hold the pipe open after the worker was killed.
        ended = [a for a in handles if a.pipe in ready or a.process.exitcode is not None]
        return [(attempt, self._said(attempt)) for attempt in ended]

    def _said(self, attempt: _Attempt) -> Said:
        said = None
        with contextlib.suppress(EOFError, OSError):
            if attempt.pipe.poll():
                said = attempt.pipe.recv()
        if said is None:
            attempt.process.join(10)
        error = Said(error=_death(attempt))
        self.stop(attempt)
        return error if said is None else said

    def stop(self, handle: _Attempt) -> None:
        """End a process and those that it started."""
        process = handle.process
        with contextlib.suppress(ProcessLookupError, PermissionError, AttributeError):
            os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own
        process.kill()
        process.join()
        handle.pipe.close()


def _death(attempt: _Attempt) -> str:
    code = attempt.process.exitcode
    if code is None:
        return "the worker stopped answering"
    if code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            memory = ", as a machine out of memory does" if name == "SIGKILL" else ""
            return f"the worker was stopped by {name}{memory}"
    last = _last_line(attempt.log)
    hint = "" if last else ": a script that starts workers needs `if __name__ == '__main__':`"
    return f"the worker ended with exit code {code}{hint}" + (f": {last}" if last else "")


def _last_line(log: Path | None) -> str:
    if log is None:
        return ""
    try:
        end = log.read_bytes()[-_LOG_END:].decode(errors="replace").split("\n")
    except OSError:
        return ""
    lines = [line.strip() for line in end if line.strip()]
    return reason(ValueError(lines[-1])) if lines else ""


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables that a process has from its start: libraries read them while they are loaded."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    """Let workers find the very package that runs here: `python -m fastfip` takes its folder off the path."""
    root = str(Path(fastfip.__file__).resolve().parents[1])
    there = root in sys.path
    if not there:
        sys.path.insert(0, root)
    try:
        yield
    finally:
        if not there:
            sys.path.remove(root)


def _work(pipe: connection.Connection, function: Callable[[Any], Any], job: Any, log: Path | None) -> None:
    """What a worker does: one job."""
    group = hasattr(os, "setsid")
    if group:
        os.setsid()  # Ctrl-C is for the one that started it, which ends it
    threading.Thread(target=_end_with_parent, args=(group,), daemon=True).start()
    if log is not None:
        _print_to(log)
    said = called(function, job)
    try:
        pipe.send(said)
    except Exception as error:  # a value that cannot be sent
        pipe.send(Said(error=f"{type(error).__name__}: {reason(error)}"))
    sys.stdout.flush()


def _end_with_parent(group: bool) -> None:
    """Wait for the end of the process that started this one, and end with it and with what this one started."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        if group:
            os.killpg(0, signal.SIGKILL)
        os._exit(1)


def _print_to(log: Path) -> None:
    sys.stdout.flush()
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
