"""`save_checkpoint`: all or nothing on the disk, and in the form of the file that it came from."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastfip.checkpoint.align import is_extra
from fastfip.checkpoint.load import Checkpoint, check_tensor, load_checkpoint
from fastfip.checkpoint.prefixes import align
from fastfip.errors import CheckpointError, printable, reason
from fastfip.reporting.files import replacing

__all__ = ["check_suffix", "save_checkpoint"]

_TORCH_SUFFIXES = (".pt", ".pth", ".th", ".tar", ".bin", ".ckpt", ".pkl")


def save_checkpoint(
    weights: nn.Module | Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    like: Checkpoint | str | os.PathLike[str] | None = None,
) -> Path:
    """Write weights to a file: to a temporary one beside it, flushed to the disk, then renamed.

    Args:
        weights: a module or its state dict, on any device.
        path: `.safetensors`, or for the zip format of torch.save one of `.pt .pth .th .tar .bin .ckpt .pkl`.
        like: the checkpoint that these weights came from. The file then has its names (prefix), its dtypes and its
            nesting with the plain data beside the weights (`{"net": ..., "acc": 84.8}`); what belongs to the old
            weights, such as optimiser state or their average, is not carried over (`Checkpoint.left_out`).
            Safetensors has no nesting.

    Returns:
        the path.

    Raises:
        CheckpointError: unknown suffix, weights that are not finite or not dense, names that do not fit `like`, or the
            disk refuses. A file that was there before is then still there, unchanged.
    """
    where = Path(path)
    from safetensors import SafetensorError

    suffix = check_suffix(where)
    source = weights.state_dict() if isinstance(weights, nn.Module) else weights
    try:
        if like is not None and not isinstance(like, Checkpoint):
            like = load_checkpoint(like)
        state = _like(source, like) if like is not None else dict(source)
        state = {k: v if is_extra(k) and not isinstance(v, Tensor) else check_tensor(k, v) for k, v in state.items()}
        if not state:
            raise CheckpointError("there are no weights to save")
        with replacing(where) as temporary:
            try:
                if suffix == ".safetensors":
                    _write_safetensors(state, temporary, like.metadata if like is not None else {})
                else:
                    _write_torch(state, temporary, like, getattr(source, "_metadata", None))
            except (RuntimeError, SafetensorError) as error:  # what both writers make of a full disk
                raise CheckpointError(f"cannot be written: {reason(error)}") from None
    except CheckpointError as error:
        raise CheckpointError(str(error) if str(error).startswith(str(where)) else f"{where}: {error}") from None
    except OSError as error:
        said = error.strerror or str(error)
        raise CheckpointError(f"{where}: {said if error.errno is None else f'cannot be written: {said}'}") from None
    return where


def check_suffix(path: str | os.PathLike[str]) -> str:
    """Return the suffix of a file to write.

    Raises:
        CheckpointError: it names no known format.
    """
    suffix = Path(path).suffix.lower()
    if suffix != ".safetensors" and suffix not in _TORCH_SUFFIXES:
        known = " ".join((".safetensors", *_TORCH_SUFFIXES))
        raise CheckpointError(f"{os.fspath(path)}: the suffix must say the format: it can be {known}")
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name that no system takes
        raise CheckpointError(f"{printable(os.fspath(path))}: cannot be written: {reason(error)}") from None
    return suffix


def _like(source: Mapping[str, Any], like: Checkpoint) -> dict[str, Any]:
    """Return the weights under the names of the file, in its order and dtypes."""
    theirs = {file_name: like[name] for name, file_name in like.names.items() if name in like}
    ours = align(source, theirs)
    missing = [name for name in theirs if name not in ours]
    if missing:
        raise CheckpointError(
            f"the weights to save lack {missing[0]}{', ...' * (len(missing) > 1)}, which the input has"
        )
    out = {}
    for name, old in theirs.items():
        new = source[ours[name]]
        if isinstance(new, Tensor) and isinstance(old, Tensor):
            if new.shape != old.shape:
                raise CheckpointError(f"{name} is {list(new.shape)}, in the input {list(old.shape)}")
            new = new.detach().to(old.dtype)
        out[name] = new
    return out


def _write_safetensors(state: Mapping[str, Any], path: Path, metadata: Mapping[str, str]) -> None:
    from safetensors.torch import save_file

    extra = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if extra:
        raise CheckpointError(f"safetensors can hold only tensors, and {extra[0]} is none: save as .pt")
    # One copy for each name: safetensors refuses tensors that share memory, and a strict reader wants every name.
    tensors = {name: value.to("cpu").clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    save_file(tensors, path, metadata={"format": "pt", **metadata})


def _write_torch(state: Mapping[str, Any], path: Path, like: Checkpoint | None, versions: Any) -> None:
    compact: dict[tuple[Any, ...], Tensor] = {}
    out: OrderedDict[str, Any] = OrderedDict()
    for name, value in state.items():
        if isinstance(value, Tensor):
            memory = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
            if memory not in compact:  # a view would drag the whole of its storage along; tied weights stay tied
                whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
                compact[memory] = value.to("cpu") if whole else value.to("cpu").clone()
            value = compact[memory]
        out[name] = value
    if isinstance(versions, Mapping) and (like is None or like._metadata is not None):
        prefix = like.prefix if like is not None else ""
        stem = prefix.removesuffix(".")
        out._metadata = OrderedDict(  # type: ignore[attr-defined]
            ((prefix + k if k else stem), v) for k, v in versions.items()
        )
    root: Any = out
    if like is not None and like.nesting:
        root = _put(like.extras, like.nesting, out)
    with open(path, "wb") as file:
        torch.save(root, file)


def _put(extras: Mapping[str, Any], nesting: tuple[str, ...], state: Any) -> dict[str, Any]:
    first, *rest = nesting
    inner = _put(extras[first], tuple(rest), state) if rest else state
    return {name: inner if name == first else value for name, value in extras.items()}
