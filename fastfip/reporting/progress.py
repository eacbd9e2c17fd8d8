"""How far a long piece of work is, in lines: for logs, where a bar would be unreadable."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

__all__ = ["Beat", "Counted", "length"]

#: Seconds between lines: at most, and at least (so that what is quick says nothing).
LONGEST, SHORTEST = 30.0, 5.0

T = TypeVar("T")


class Beat:
    """Says how far the work is at every tenth of it, at least every 30 seconds, and never twice within 5 seconds."""

    def __init__(
        self, say: Callable[[str], None], title: str, total: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.say, self.title, self.total, self.clock = say, title, total, clock
        self.start = self.last = clock()
        self.tenth = 0

    def at(self, done: int, figures: str = "") -> None:
        """Be told that so many parts are done."""
        now = self.clock()
        tenth = 10 * done // self.total if self.total else 0
        wait = now - self.last
        if wait < SHORTEST or (wait < LONGEST and tenth <= self.tenth):
            return
        self.last, self.tenth = now, tenth
        far = f"{done} of {self.total} ({100 * done // self.total} %)" if self.total else f"{done}"
        self.say(f"{self.title} {far} after {now - self.start:.0f} s{f', {figures}' if figures else ''}")


def length(data: Any) -> int | None:
    """Return how many batches there are, where data know that; a pair or a dict is one batch itself."""
    return len(data) if hasattr(data, "__len__") and not isinstance(data, (tuple, dict)) else None


class Counted(Iterable[T]):
    """Batches that are counted while they are walked; each walk counts anew. `sized`: what has their number."""

    def __init__(self, data: Iterable[T], say: Callable[[str], None], title: str, sized: Any = None) -> None:
        self.data, self.say, self.title, self.total = data, say, title, length(data if sized is None else sized)

    def __iter__(self) -> Iterator[T]:
        beat = Beat(self.say, self.title, self.total)
        for done, batch in enumerate(self.data):
            beat.at(done)
            yield batch
