"""What may watch the loop: callbacks, and the progress bar, which is one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from fastfip.methods.run import Run
from fastfip.reporting.progress import Beat

__all__ = ["Callback", "Lines", "Progress", "as_callbacks"]

Record = dict[str, Any]


class Callback:
    """Watches a run. Return True from `on_step` or `on_epoch` to stop early; an exception ends the purification.

    A plain function `f(run, record)` serves as `on_epoch`.
    """

    def on_start(self, run: Run) -> None:
        """Be told that the loop begins."""

    def on_step(self, run: Run, values: Record) -> bool | None:
        """See what the method returned for a step (losses, as numbers or tensors)."""
        return None

    def on_epoch(self, run: Run, record: Record) -> bool | None:
        """See the entry of the history that this epoch made."""
        return None

    def on_end(self, run: Run) -> None:
        """Be told that the loop is over, also after an error."""


class _Function(Callback):
    def __init__(self, function: Callable[[Run, Record], bool | None]) -> None:
        self.function = function

    def on_epoch(self, run: Run, record: Record) -> bool | None:
        return self.function(run, record)


class Progress(Callback):
    """A bar on stderr: steps, loss, held-out score. rich is imported when it starts."""

    def __init__(self, title: str = "") -> None:
        self.title = title
        self._bar: Any = None
        self._task: Any = None

    def on_start(self, run: Run) -> None:
        """Show the bar."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            transient=console.is_terminal,
        )
        self._bar.start()
        self._task = self._bar.add_task(self.title, total=run.total_steps, figures="")

    def on_step(self, run: Run, values: Record) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=run.step)

    def on_epoch(self, run: Run, record: Record) -> None:
        """Show the figures of the epoch."""
        self._bar.update(self._task, figures=_figures(record))

    def on_end(self, run: Run) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


class Lines(Callback):
    """The same in lines, given to a function: at every tenth of the steps, see `fastfip.reporting.progress.Beat`."""

    def __init__(self, title: str, say: Callable[[str], None]) -> None:
        self.title, self.say = title, say
        self._beat: Beat | None = None
        self._figures = ""

    def on_start(self, run: Run) -> None:
        """Begin to count."""
        self._beat = Beat(self.say, f"{self.title}, step", run.total_steps)

    def on_step(self, run: Run, values: Record) -> None:
        """Say how far it is, if it is time to."""
        if self._beat is not None:
            self._beat.at(run.step, self._figures)

    def on_epoch(self, run: Run, record: Record) -> None:
        """Keep the figures of the epoch for the next line."""
        self._figures = _figures(record)


def _figures(record: Record) -> str:
    shown = [("loss", "loss", "{:.3f}"), ("score", "held-out", "{:.3f}"), ("heldout_acc", "acc", "{:.1%}")]
    return "  ".join(f"{word} {form.format(record[key])}" for key, word, form in shown if key in record)


def as_callbacks(
    callbacks: Iterable[Callback | Callable[[Run, Record], bool | None]] | None,
    progress: bool | Callable[[str], None] | None,
    title: str,
) -> list[Callback]:
    """Return callbacks as objects, with the bar (None: where stderr is a terminal) or lines, if they are wanted."""
    if callbacks is None:
        callbacks = ()
    if callable(callbacks) or isinstance(callbacks, Callback):
        callbacks = [callbacks]
    out = [item if isinstance(item, Callback) else _Function(item) for item in callbacks]
    if callable(progress):
        out.append(Lines(title, progress))
    elif progress or (progress is None and sys.stderr is not None and sys.stderr.isatty()):
        out.append(Progress(title))
    return out
