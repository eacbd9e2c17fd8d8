"""Build the tensors of a pickle that has been followed and checked: bytes of the file, as what they claim to be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, BinaryIO

import torch

from fastfip.checkpoint.claims import Claim, Storage
from fastfip.checkpoint.opcodes import Encoded
from fastfip.checkpoint.scan import Scan
from fastfip.errors import CheckpointError, reason

__all__ = ["build"]

#: Tuples within tuples that are gone through; what lies deeper is no plain data for anybody.
_DEEPEST = 64
#: What a value that is looked into may be; in a tuple of so many values it is asked for each time, not remembered.
_PARTS = (Claim, Encoded, dict, list, tuple)
_FEW = 8


def build(file: BinaryIO, scanned: Scan, starts: Mapping[str, int], big: bool) -> Any:
    """Return what a pickle holds, with tensors on the CPU in place of claims. No unpickler runs.

    Tensors of one block share its memory.

    Args:
        file: the file.
        scanned: its pickle; every claim has been compared with what is stored.
        starts: where the bytes of each storage begin.
        big: the most significant byte comes first.

    Raises:
        CheckpointError: there is not enough memory, the file is shorter than it was, or it takes more than it may.
    """
    blocks: dict[str, torch.UntypedStorage] = {}
    made: dict[int, torch.Tensor] = {}
    for claim in scanned.tensors:
        if isinstance(claim, Claim):
            storage = claim.storage
            if storage.key not in blocks:
                blocks[storage.key] = _block(file, scanned.storages[storage.key], starts.get(storage.key, 0), big)
            if big and claim.width > storage.width:
                raise CheckpointError(
                    "stores its bytes in the other byte order and does not say how many bytes make a value"
                )
            empty = torch.empty(0, dtype=getattr(torch, claim.dtype))
            try:
                made[id(claim)] = empty.set_(
                    blocks[storage.key], claim.offset + storage.start, claim.size, claim.stride
                )
            except (RuntimeError, ValueError, TypeError, OverflowError) as error:
                raise CheckpointError(
                    f"is damaged: a tensor cannot be made from its description ({reason(error)})"
                ) from None
    todo: list[Any] = [scanned.root]
    seen = set()
    tuples: dict[int, tuple[Any, Any]] = {}
    encoded: dict[int, tuple[Encoded, bytes]] = {}

    def built(item: Any, depth: int = 0) -> Any:
        if isinstance(item, Claim):
            return made[id(item)]
        if isinstance(item, Encoded):
            if id(item) not in encoded:  # with the old one, so that its id is nobody else's
                scanned.budget.spend(300 + len(item))  # beside its text
                encoded[id(item)] = item, bytes(item)
            return encoded[id(item)][1]
        if isinstance(item, (dict, list)) and item:
            todo.append(item)
        if not isinstance(item, tuple) or depth > _DEEPEST:
            return item
        if len(item) <= _FEW and not any(isinstance(part, _PARTS) for part in item):
            return item
        if id(item) not in tuples:  # with the old one, so that its id is nobody else's
            scanned.budget.spend(300 + 8 * len(item))
            tuples[id(item)] = item, tuple([built(part, depth + 1) for part in item])
        return tuples[id(item)][1]

    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        scanned.budget.spend(60)
        seen.add(id(value))
        for key, item in list(value.items()) if isinstance(value, dict) else enumerate(value):
            if isinstance(item, _PARTS):
                value[key] = built(item)
    return scanned.root


def _block(file: BinaryIO, storage: Storage, start: int, big: bool) -> torch.UntypedStorage:
    size = storage.numel * storage.width
    try:
        block = torch.empty(size, dtype=torch.uint8)
    except RuntimeError:
        raise CheckpointError(f"needs more memory than there is: {size} bytes for one tensor") from None
    raw: Any = block.numpy()
    file.seek(start)
    if size and file.readinto(memoryview(raw)) != size:  # type: ignore[attr-defined]
        raise CheckpointError("is truncated: it became shorter while it was read")
    width = storage.width // 2 if storage.kind.startswith("Complex") else storage.width
    if big and width > 1:
        raw.view(f"u{width}").byteswap(inplace=True)
    if storage.kind == "Bool":
        block.ne_(0)  # anything but 0 and 1 is undefined for what computes with it
    return block.untyped_storage()
