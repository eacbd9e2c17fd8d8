"""A mark for torch.compile that does not import the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def constant(function: F) -> F:
    """Say that the result never changes, as `torch.compiler.assume_constant_result` does: that imports torch._dynamo.

    The import takes 1.5 s, which every first call of a process would pay. tests/ops compile with `fullgraph=True`, so a
    torch that knows the mark under another name is noticed.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
