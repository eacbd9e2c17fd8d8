"""`load_checkpoint`: read, verify everything, and only then load."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastfip.checkpoint.align import find_state, fits_or_raise, is_extra, is_state
from fastfip.checkpoint.calls import PLAIN, shown
from fastfip.checkpoint.claims import Opaque
from fastfip.checkpoint.prefixes import align, common_prefixes, strip
from fastfip.checkpoint.read import read
from fastfip.errors import CheckpointError, ModelError, printable, reason
from fastfip.nets.state import is_part

__all__ = ["Checkpoint", "check_tensor", "load_checkpoint", "tied_names"]


#: Plain data beside the weights that is nested deeper is left out: what writes it again would run out of stack.
_DEEPEST = 64
#: How many values are looked at in one go.
_CHUNK = 2**20


class Checkpoint(dict[str, Tensor]):
    """The weights of a checkpoint, name -> tensor on the CPU; a plain state dict wherever one is expected.

    Attributes:
        path: the file.
        format: "zip", "legacy" (torch.save before 1.6) or "safetensors".
        nesting: the keys that led to the weights, e.g. ("net",); () for a bare state dict.
        names: for each name here the name in the file, which may carry a prefix such as `module.`.
        extras: the plain data beside the weights ({"epoch": 46, "acc": 84.8}), nested as in the file.
        left_out: entries beside the weights that are not plain data (optimiser state, other weights, settings), and
            names without the prefix of the weights; `save_checkpoint` does not carry them over, as they belong to the
            weights that were replaced. Safe to print.
        metadata: the metadata of a safetensors file.
    """

    path: Path
    format: str
    nesting: tuple[str, ...]
    names: dict[str, str]
    extras: dict[str, Any]
    left_out: list[str]
    metadata: dict[str, str]
    _metadata: Any = None  # what nn.Module.state_dict notes about versions; load_state_dict looks for it

    @property
    def prefix(self) -> str:
        """What was taken off (or is to be put before) every name, e.g. "module."; "" if nothing."""
        for name, theirs in self.names.items():
            return theirs.removesuffix(name) if theirs.endswith(name) else ""
        return ""


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    key: str | None = None,
    prefix: str | None = None,
    strict: bool = True,
) -> Checkpoint:
    """Read the weights of a checkpoint, without running anything that the file holds, and check them.

    Reads safetensors, both formats of torch.save and folders of shards, always to the CPU. Weights under `state_dict`,
    `net`, `netC`, `model`, `model_state_dict` or `state_dict_ema` are found. Without a model a prefix `module.`,
    `_orig_mod.` or `model.` is taken off if every name carries it. With a model whatever prefix makes the names meet is
    taken off or put on, and what torch.compile and its kind put into names is passed over; names without that prefix
    are other things and are left out.

    Args:
        path: the file, its format is told by its content; or a folder or index of shards, as Hugging Face writes them.
        model: loaded into if, and only if, everything is found to be in order; its device and dtypes stay.
        key: the entry that holds the weights (`"net"`, `"a.b"`), where it has another name or there are several.
        prefix: what the names of the weights begin with, e.g. "student", where there are several; it is taken off.
        strict: False: names on one side only are no error (shapes are).

    Returns:
        the weights, under the names of the model if one is given.

    Raises:
        CheckpointError: the file is refused, or does not fit the model. One line; nothing has been loaded.
        ModelError: `model` is no nn.Module, has lazy layers, or is on the meta device.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise ModelError(f"model must be an nn.Module, not {type(model).__name__}")
    try:
        return _load(path, model, key, prefix, strict)
    except CheckpointError as error:
        raise CheckpointError(f"{os.fspath(path)}: {printable(str(error))}") from None
    except MemoryError:
        raise CheckpointError(f"{os.fspath(path)}: needs more memory than there is") from None


def _load(
    path: str | os.PathLike[str], model: nn.Module | None, key: str | None, prefix: str | None, strict: bool
) -> Checkpoint:
    form, root, metadata = read(path)
    own = None if model is None else _own_state(model)
    nesting = find_state(root, key, own)
    state, outer = root, root
    for part in nesting:
        state = state[part]
    entries = {}
    for name, value in state.items():
        if not isinstance(name, str):
            raise CheckpointError(f"has a weight whose name is not text, or is far too long ({type(name).__name__})")
        if is_extra(name) and not isinstance(value, Tensor):
            entries[name] = _extra(name, value)
        else:
            entries[name] = check_tensor(name, value)
    names = _names_of(entries, own, prefix)
    out = Checkpoint((name, entries[theirs]) for name, theirs in names.items())
    out.path, out.format, out.nesting, out.names, out.metadata = Path(path), form, nesting, names, metadata
    out.extras, out.left_out = _beside(outer, nesting)
    taken = set(names.values())
    out.left_out += [printable(".".join((*nesting, name))) for name in entries if name not in taken]
    out._metadata = _renamed_versions(state, out.prefix)
    if model is not None and own is not None:
        _fit(out, model, own, strict)
    return out


def _names_of(entries: Mapping[str, Any], own: Mapping[str, Any] | None, prefix: str | None) -> dict[str, str]:
    """Return {name in the model: name in the file}."""
    if own is None:
        return strip(entries, common_prefixes(entries)[-1] if prefix is None else prefix) if entries else {}
    if prefix is None:
        return align(entries, own)
    bare = strip(entries, prefix)
    return {name: bare[theirs] for name, theirs in align(bare, own).items()}


def _own_state(model: nn.Module) -> dict[str, Any]:
    own = model.state_dict()
    for name, value in own.items():
        if nn.parameter.is_lazy(value):
            raise ModelError(f"the model has a lazy layer ({name}): run one batch through it first")
        if isinstance(value, Tensor) and value.device.type == "meta":
            raise ModelError(f"{name} of the model is on the meta device: model.to_empty(device='cpu') first")
    return own


def check_tensor(name: str, value: Any) -> Tensor:
    """Return the tensor without its history, if it is a dense tensor of finite numbers that it really stores.

    Raises:
        CheckpointError: it is not; named.
    """
    if not isinstance(value, Tensor):
        raise CheckpointError(f"has an entry {name} among its weights that is not a tensor but {type(value).__name__}")
    if value.is_quantized:
        raise CheckpointError(f"{name} is quantised: save a plain dense tensor instead")
    if value.layout is not torch.strided or value.is_nested:
        raise CheckpointError(f"{name} is sparse ({value.layout}): save a plain dense tensor instead")
    if value.device.type == "meta":
        raise CheckpointError(f"{name} is a meta tensor, which has no values")
    if is_part(value):
        raise CheckpointError(
            f"{name} is a DTensor, of which each process has a part: collect whole weights on every rank with "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True)), and save these on one"
        )
    if type(value) not in (Tensor, nn.Parameter):
        raise CheckpointError(f"{name} is a tensor of the subclass {type(value).__name__}: save a plain tensor instead")
    value = value.detach()
    room = value.untyped_storage().nbytes() // value.element_size() - value.storage_offset()
    if value.numel() > max(room, 0):
        raise CheckpointError(f"{name} claims {value.numel()} values {list(value.shape)} and stores {max(room, 0)}")
    if value.is_floating_point() or value.is_complex():
        bad, nan = 0, False
        for part in _pieces(value):
            part = part if part.element_size() > 1 else part.float()
            wrong = part.numel() - int(torch.isfinite(part).sum())
            bad, nan = bad + wrong, nan or (wrong > 0 and bool(torch.isnan(part).any()))
        if bad:
            what = "NaN" if nan else "Inf"
            raise CheckpointError(f"{name} holds {what} ({bad} of {value.numel()} values are not finite)")
    return value


def _pieces(value: Tensor) -> Iterator[Tensor]:
    """Return views that make up a tensor, small ones: what is computed of a large one takes as much memory again."""
    if value.numel() <= _CHUNK:
        yield value
        return
    side = max(range(value.dim()), key=lambda i: value.shape[i])
    for part in value.split(max(1, value.shape[side] * _CHUNK // value.numel()), side):
        yield from _pieces(part)


def _fit(out: Checkpoint, model: nn.Module, own: dict[str, Any], strict: bool) -> None:
    tied = tied_names(own)
    for name in own:  # safetensors keeps one name of tied weights
        twin = next((other for other in tied.get(name, ()) if other in out), None)
        if name not in out and twin is not None:
            out[name] = out[twin]
    # Files of torch < 0.4.1 have no such counters; load_state_dict knows.
    counters = [name for name in own if name.rpartition(".")[2] == "num_batches_tracked"]
    fits_or_raise(out, own, counters, strict)
    for name, others in tied.items():
        for other in others:
            if name in out and other in out and not torch.equal(out[name], out[other]):
                raise CheckpointError(f"has different values for {name} and {other}, which are one tensor in the model")
    before = copy.deepcopy(own)
    try:
        model.load_state_dict(out, strict=False)
    except Exception as error:
        _restore(own, before)
        raise CheckpointError(f"could not be loaded into the model: {reason(error)}") from None
    except BaseException:
        _restore(own, before)
        raise
    for name in set(out) - set(own):
        del out[name]


def _restore(own: dict[str, Any], before: dict[str, Any]) -> None:
    with torch.no_grad():
        for name, value in own.items():
            if isinstance(value, Tensor):
                value.copy_(before[name])


def tied_names(state: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return for each name of a state dict the other names of the same tensor, where there are any."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, value in state.items():
        if (
            isinstance(value, Tensor)
            and value.layout is torch.strided
            and value.numel()
            and value.device.type != "meta"
        ):
            memory = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
            groups.setdefault(memory, []).append(name)
    return {name: [n for n in group if n != name] for group in groups.values() if len(group) > 1 for name in group}


def _renamed_versions(state: Any, prefix: str) -> Any:
    versions = getattr(state, "_metadata", None)
    if not isinstance(versions, Mapping):
        return None
    versions = {k: v for k, v in versions.items() if isinstance(k, str) and isinstance(v, dict) and _is_flat(v)}
    if not prefix:
        return versions
    stem = prefix.removesuffix(".")
    kept = {k: v for k, v in versions.items() if k == stem or k.startswith(prefix)}
    return {k[len(prefix) :]: v for k, v in kept.items()}


def _is_flat(values: Mapping[Any, Any]) -> bool:
    return all(isinstance(item, PLAIN) for pair in values.items() for item in pair)


def _extra(name: str, value: Any) -> Any:
    """Return what `Module.get_extra_state` gave, in Python's own containers; tensors are kept.

    Raises:
        CheckpointError: there is something else in it.
    """
    try:
        return _plain(value, {}, tensors=True)
    except TypeError as error:
        raise CheckpointError(f"has an entry {name} that is not plain data ({error})") from None


def _beside(root: Any, nesting: tuple[str, ...]) -> tuple[dict[str, Any], list[str]]:
    """Return the plain data beside the weights, and the names of the rest."""
    kept: dict[str, Any] = {}
    left: list[str] = []
    level, into = root, kept
    for depth, part in enumerate(nesting):
        for name, value in level.items():
            if name == part:
                into[name] = {} if depth < len(nesting) - 1 else None
                continue
            try:
                into[name] = _plain(value, {})
            except TypeError:
                left.append(printable(".".join((*nesting[:depth], shown(name)))))
        level, into = level[part], into[part]
    return kept, left


def _plain(value: Any, known: dict[int, Any], depth: int = 0, tensors: bool = False) -> Any:
    """Return numbers, text and containers of them, single-valued or all `tensors` too; TypeError for anything else.

    `known` has what was seen before by its id, so that what occurs often is copied once; None while it is open.
    """
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor) and (tensors or value.numel() == 1):
        return value.detach()
    if not isinstance(value, (dict, list, tuple)) or (is_state(value) and not tensors) or depth > _DEEPEST:
        raise TypeError(f"{type(value).__name__} is not plain data")
    if id(value) not in known:
        known[id(value)] = None
        if isinstance(value, dict):
            if any(isinstance(key, Opaque) for key in value):
                raise TypeError("a key that is not plain data")
            known[id(value)] = {k: _plain(v, known, depth + 1, tensors) for k, v in value.items()}
        else:
            items = [_plain(v, known, depth + 1, tensors) for v in value]
            known[id(value)] = items if isinstance(value, list) else tuple(items)
    if known[id(value)] is None:
        raise TypeError("a container that holds itself")
    return known[id(value)]
