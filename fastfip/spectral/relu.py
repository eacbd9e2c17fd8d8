"""What a ReLU keeps for its backward pass: where it let numbers through, in a byte each, in place of its output.

torch keeps the output, which is the next layer's input and costs nothing where that layer keeps it too. A spectral
layer does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["keep_signs"]

_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def keep_signs(x: Tensor) -> None:
    """Let the ReLU that x comes from, if it does, keep where x is positive instead of x."""
    node = x.grad_fn
    if node is None or node.name() != "ReluBackward0" or x.element_size() not in _BITS:
        return
    saved = getattr(node, "_raw_saved_result", None)
    if saved is not None:
        try:
            saved.register_hooks(_pack, _unpack)
        except RuntimeError:  # a second use of x, or somebody else's hooks (checkpointing)
            return


@torch.no_grad()
def _pack(y: Tensor) -> tuple[Tensor, torch.dtype]:
    # No number is below zero, so a positive one's bits are at least 1 as an integer: twice as fast as comparing.
    return y.view(_BITS[y.element_size()]).clamp(max=1).to(torch.uint8), y.dtype


@torch.no_grad()
def _unpack(kept: tuple[Tensor, torch.dtype]) -> Tensor:
    return kept[0].to(kept[1])
