"""The way of a call through the package: which modules it enters, and which functions are handed the model.

    python -m tests.support.trips fine_tune|audit

runs the call in this process and prints what was seen as JSON. It runs twice, and the second call is the one that is
watched: the first imports what is imported late.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fastfip"


class Trip(NamedTuple):
    """What one call did, in the order in which it was first done."""

    modules: list[str]  # files of the package in which a Python function was entered, relative to it
    hand_overs: int  # calls from a function of one of them to a function of another
    stations: list[str]  # functions of the package that got the model, or a copy of it, as an argument


def watch(call: Callable[[], Any], package: Path, model_type: type | None = None) -> Trip:
    """Run `call` and note what it does in the package; the model and its copies are what is of `model_type`.

    An argument counts if it is the model, or a tuple, list or dict that holds it. Bodies of modules and comprehensions
    are no functions.
    """
    prefix = f"{package}/"
    modules: dict[str, None] = {}
    stations: dict[str, None] = {}
    stack: list[str] = []
    hand_overs = 0

    def see(frame: FrameType, event: str, _: Any) -> None:
        nonlocal hand_overs
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(prefix) or code.co_name == "<module>":
            return
        if event == "return":
            if stack:
                stack.pop()
            return
        module = code.co_filename.removeprefix(prefix)
        modules[module] = None
        hand_overs += bool(stack) and stack[-1] != module
        stack.append(module)
        if model_type is not None and any(_holds(value, model_type) for value in _arguments(frame)):
            stations[f"{module}:{code.co_firstlineno} {_name(code)}"] = None

    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return Trip(list(modules), hand_overs, list(stations))


def _name(code: CodeType) -> str:
    return getattr(code, "co_qualname", code.co_name)  # Python 3.11


def _arguments(frame: FrameType) -> Iterable[Any]:
    code = frame.f_code
    many = sum(bool(code.co_flags & flag) for flag in (4, 8))  # *args and **kwargs
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + many]
    # `.0` is the iterator of a comprehension.
    return [frame.f_locals[name] for name in names if name in frame.f_locals and not name.startswith(".")]


def _holds(value: Any, kind: type) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, kind) or (type(value) in (list, tuple) and any(isinstance(one, kind) for one in value))


def _scene(name: str) -> tuple[Callable[[], Any], type]:
    """Return the call that is watched, and the type of its model: one that no other object is of."""
    import torch
    from torch import nn

    import fastfip
    from tests.support.small_nets import conv_net, data

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = conv_net()

        def forward(self, x: Any) -> Any:
            return self.net(x)

    torch.manual_seed(0)
    model, clean = Given(), data()
    if name == "fine_tune":
        return lambda: fastfip.purify(model, clean, "fine_tune", steps=2, progress=False), Given
    return lambda: fastfip.audit(model, clean, steps=2), Given


if __name__ == "__main__":
    scene, given = _scene(sys.argv[1])
    scene()
    print(json.dumps(watch(scene, PACKAGE, given)._asdict()))
