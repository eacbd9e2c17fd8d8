"""What a layer looks up for words, and what was written over its words in a pass of the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastfip.nets.state import eval_mode

__all__ = ["Written", "vectors_of_words"]

#: Words that a layer is asked for, to see what it returns.
ASKED = 8


def vectors_of_words(layer: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return what makes vectors [..., d] of ids [...] as the layer does, without its hooks.

    It reads the layer's table (`weight` [words, d]) where the layer returns the rows of it as they are, and asks the
    layer itself where it returns something else, such as scaled rows.

    Returns:
        None where the layer has no table, or where the vector of a word depends on the words around it.
    """
    table = getattr(layer, "weight", None)
    if not isinstance(table, Tensor) or table.dim() != 2 or len(table) == 0:
        return None
    ids = torch.linspace(0, len(table) - 1, ASKED, device="cpu").long().to(table.device)[None]
    with torch.no_grad(), eval_mode(layer):
        try:
            out, turned, alone = (layer.forward(some) for some in (ids, ids.flip(1), ids[:, -1:]))
        except Exception:  # it is called in a way of its own: what it returns for a word is not known
            return None
        if not isinstance(out, Tensor) or out.shape != (*ids.shape, table.shape[1]) or not out.is_floating_point():
            return None
        if torch.equal(out.to(table.dtype), table[ids]):
            return lambda ids: layer.weight[ids]  # type: ignore[index]
        same = torch.allclose(turned.flip(1), out) and torch.allclose(alone, out[:, -1:])
    return (lambda ids: layer.forward(ids)) if same else None


class Written:
    """What was drawn for the ids that a layer reads first in each pass of a model.

    Other ids of the same pass get nothing: they are those of a decoder that has the same table. Ids that were met
    before get what was drawn for them then: checkpoints compute a part of the pass once more in the backward pass.

    Attributes:
        make: draws, of ids, those that are looked up and where they are others; it returns the ids themselves where it
            has nothing for them.
    """

    def __init__(self, make: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self.make = make
        self._known: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []
        self._first: bool | None = None  # whether a pass has met no ids; None: passes are not told

    def begin(self, *_: object) -> None:
        """Begin a pass; it is a hook before the model's forward."""
        self._first = True

    def of(self, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return what was or is drawn for some ids; None: they are left alone."""
        drawn = next((drawn for known, drawn in self._known if torch.equal(known, ids)), None)
        if drawn is None:
            if self._first is False:
                return None
            drawn = self.make(ids)
            if drawn[0] is ids:
                return None
            self._known.append((ids.clone(), drawn))
        if self._first:
            self._first = False
        return drawn
