"""How a command ends: exit codes, one line on stderr, and a traceback only where it is asked for."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import typer

__all__ = ["CODES", "Interrupted", "NotPurified", "fail", "guarded", "run", "say", "undisturbed", "usage"]

#: Exit code -> what it means. docs/cli.md shows them.
CODES = {
    0: "done",
    1: "unexpected error, a defect of fastfip; --debug shows where it happened",
    2: "wrong usage, such as an unknown option, a missing argument, or an output file that already exists",
    3: "data that cannot be used",
    4: "a checkpoint that is refused or does not fit the model, or a result file that cannot be written",
    5: "a model, method or setting that cannot be used",
    6: "a device or backend that cannot run here",
    7: "not purified: the run diverged (the last good state was written), or no weight changed (nothing was written)",
    8: "some rows of a manifest failed; all others were done",
    130: "interrupted; the last good state was written if an epoch was complete and a weight had moved",
}

# typer carries its own click or uses the installed one, by its version; both have these classes as ancestors.
#: What was typed, for reports.
TYPED: ContextVar[list[str]] = ContextVar("TYPED")
_USAGE: Any = typer.BadParameter.__mro__[1]


#: What errors of the library propose, and what the command line has instead.
_OPTIONS = {"force=True goes on": "--ignore-fit goes on, fastfip inspect tries the usual scalings and class orders"}


class Interrupted(Exception):
    """Ctrl-C; the text says what was written."""


class NotPurified(Exception):
    """The work came to an end, but its result is not what was asked for; the text says what was written."""


def _code(error: BaseException) -> int:
    from fastfip.errors import BackendError, CheckpointError, ConfigError, DataError, ModelError

    for kind, code in ((DataError, 3), (CheckpointError, 4), ((ModelError, ConfigError), 5), (BackendError, 6)):
        if isinstance(error, kind):
            return code
    return 1


def fail(text: str) -> Any:
    """Return the exception for wrong usage."""
    return typer.BadParameter(text)


def usage(error: BaseException) -> str | None:
    """Return what an error says of wrong usage, in one line; None: it is another one."""
    if not isinstance(error, _USAGE):
        return None
    return " ".join(error.format_message().split()).removeprefix("Invalid value: ").removesuffix(".")


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with what typer would handle in its own way, differently in each version, handled here."""

    @functools.wraps(command)
    def call(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except KeyboardInterrupt:
            raise Interrupted("interrupted") from None
        except BrokenPipeError:
            _nobody_reads()

    return call


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Take SIGTERM (systemd, Slurm, timeout) for Ctrl-C, so that what is good is saved."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def undisturbed() -> Iterator[list[int]]:
    """Let a first Ctrl-C or SIGTERM wait for the end of the block, whose list then has it; a second one does not wait.

    For the writing of what took long to compute.
    """
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt
        say("the result is being written first; interrupt once more to stop without it")

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():  # None: it was not Python's
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _nobody_reads() -> None:
    """`fastfip methods | head`: whoever reads has had enough, which is no error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(command: Any, arguments: list[str] | None) -> int:
    """Run the command line; return its exit code. Every error is one line on stderr."""
    typed = (list(sys.argv[1:]) if arguments is None else list(arguments)) or ["--help"]
    token = TYPED.set(typed)
    try:
        with _terminable():
            return _run(command, typed)
    finally:
        TYPED.reset(token)


def _run(command: Any, arguments: list[str]) -> int:
    debug = bool(os.environ.get("FASTFIP_DEBUG")) or "--debug" in arguments
    try:
        result = command.main(args=arguments, prog_name="fastfip", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except typer.Exit as error:
        return int(error.exit_code)
    except Interrupted as error:
        say(str(error))
        return 130
    except NotPurified as error:
        say(str(error))
        return 7
    except (KeyboardInterrupt, typer.Abort):
        say("interrupted")
        return 130
    except BrokenPipeError:
        _nobody_reads()
        return 0
    except _USAGE as error:
        path = getattr(getattr(error, "ctx", None), "command_path", "fastfip")
        say(f"{usage(error)} (see {path} --help)")
        return 2
    except Exception as error:
        if debug:
            traceback.print_exc()
        code = _code(error)
        text = " ".join(str(error).split())
        for words, option in _OPTIONS.items():
            text = text.replace(words, option)
        if code == 1:
            text = f"unexpected {type(error).__name__}: {text}" + ("" if debug else " (--debug shows where)")
        say(text)
        return code


def say(text: str) -> None:
    """Print a line on stderr, where it does nothing to a terminal."""
    from fastfip.errors import printable

    print(f"fastfip: {printable(text, 2000)}", file=sys.stderr)
