"""Where the weights are in what a file holds, and what of them does not fit a model."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from fastfip.checkpoint.prefixes import align
from fastfip.errors import CheckpointError, printable

__all__ = ["NESTINGS", "find_state", "fits_or_raise", "is_extra", "is_state"]

#: Entries that usually hold the weights, in the order in which they are looked for.
NESTINGS = ("state_dict", "net", "netC", "model", "model_state_dict", "state_dict_ema")

#: How much of a name is compared with others: the time for it grows with the square.
_COMPARED = 200


def is_state(value: Any) -> bool:
    """Return whether a value is a state dict: names to tensors (and what modules save beside them)."""
    return (
        isinstance(value, Mapping)
        and any(isinstance(v, Tensor) for v in value.values())
        and all(isinstance(k, str) and (isinstance(v, Tensor) or is_extra(k)) for k, v in value.items())
    )


def is_extra(name: str) -> bool:
    """Return whether an entry is what `Module.get_extra_state` gave, which is no tensor."""
    return name.rpartition(".")[2] == "_extra_state"


def find_state(root: Mapping[Any, Any], key: str | None, expected: Iterable[str] | None) -> tuple[str, ...]:
    """Return the keys that lead to the state dict in what a file holds; () if it is one itself.

    Args:
        root: what the file holds.
        key: the entry that the user named (dots lead further in); None: look for it.
        expected: the names that the model needs; of several candidates the one that has them is taken.

    Raises:
        CheckpointError: there is none, or there are several and nothing tells which.
    """
    if key is not None:
        path = (key,) if key in root else tuple(key.split("."))
        value: Any = root
        for part in path:
            if not isinstance(value, Mapping) or part not in value:
                raise CheckpointError(f"has no entry {key!r}, only {_names(root)}")
            value = value[part]
        if not is_state(value) and not _mostly_state(value):
            raise CheckpointError(f"has an entry {key!r} that is not a state dict")
        return path
    if is_state(root):
        return ()
    named = [(name, *rest) for name in NESTINGS if name in root for rest in _inside(root[name])]
    paths = named or [(name,) for name, value in root.items() if isinstance(name, str) and is_state(value)]
    if expected is not None and len(paths) > 1:
        wanted = set(expected)
        paths = [path for path in paths if set(align(_texts(_at(root, path)), wanted)) >= wanted] or paths
    if len(paths) == 1 or (paths and named):
        return paths[0]
    if paths:
        raise CheckpointError(f"has several state dicts, {_names(p[0] for p in paths)}: choose one of them with key=")
    if _mostly_state(root):
        return ()
    raise CheckpointError(f"holds no state dict; its entries are {_names(root) or 'none: it is empty'}")


def _inside(value: Any) -> list[tuple[str, ...]]:
    if is_state(value):
        return [()]
    if isinstance(value, Mapping):
        deeper: list[tuple[str, ...]] = [(name,) for name in NESTINGS if name in value and is_state(value[name])]
        if deeper:
            return deeper
        if _mostly_state(value):
            return [()]
    return []


def _mostly_state(value: Any) -> bool:
    """Return whether a dict has tensors among its values: a state dict with something odd in it, to be named later."""
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())


def _texts(names: Iterable[Any]) -> list[str]:
    return [name for name in names if isinstance(name, str)]


def _at(root: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        root = root[part]
    return root


def fits_or_raise(
    state: Mapping[str, Any], expected: Mapping[str, Any], forgiven: Iterable[str] = (), strict: bool = True
) -> None:
    """Compare a state dict with that of a model: names, shapes, kinds of numbers.

    Args:
        state: what will be loaded.
        expected: the model's own state dict.
        forgiven: names of the model that may be missing.
        strict: names on one side only are refused.

    Raises:
        CheckpointError: they differ; names both sides.
    """
    missing = [name for name in expected if name not in state and name not in set(forgiven)]
    unexpected = [name for name in state if name not in expected]
    if not set(state) & set(expected) or (strict and (missing or unexpected)):
        sides = []
        if missing:
            sides.append(f"{len(missing)} missing in the file: {_with_nearest(missing, unexpected)}")
        if unexpected:
            sides.append(f"{len(unexpected)} unknown to the model: {_with_nearest(unexpected, [])}")
        raise CheckpointError(f"does not fit the model; {'; '.join(sides)}")
    wrong = []
    for name in expected:
        theirs, ours = state.get(name), expected[name]
        if not isinstance(theirs, Tensor) or not isinstance(ours, Tensor):
            continue
        if theirs.shape != ours.shape:
            wrong.append(f"{name} is {list(theirs.shape)} in the file and {list(ours.shape)} in the model")
        elif _number_kind(theirs) != _number_kind(ours):
            wrong.append(f"{name} is {_dtype(theirs)} in the file and {_dtype(ours)} in the model")
    if wrong:
        raise CheckpointError(f"does not fit the model: {_names(wrong, quote=False, most=3)}")


def _number_kind(tensor: Tensor) -> str:
    return "float" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "integer"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _names(names: Iterable[Any], quote: bool = True, most: int = 6) -> str:
    names = [printable(name, 120) for name in names]
    more = f" (and {len(names) - most} more)" if len(names) > most else ""
    return ("; " if not quote else ", ").join(names[:most]) + more


def _with_nearest(names: list[str], others: list[str]) -> str:
    shown = []
    known = {other[:_COMPARED]: other for other in others[:2000]}
    for name in names[:4]:
        near = difflib.get_close_matches(name[:_COMPARED], known, 1, 0.6)
        shown.append(f"{name[:300]} (there: {known[near[0]][:300]})" if near else name[:300])
    return ", ".join(shown) + (", ..." if len(names) > 4 else "")
