"""The last states of a model that keep places apart: hidden states of tokens, the last feature maps of images.

They say far more of a sample than its answer does, which for two classes is one number.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastfip.methods.run import Run
from fastfip.worst_case.layers_of_ids import ids_of_call
from fastfip.worst_case.places import TokenPlace

__all__ = ["LastStates", "Seen"]

#: Clean samples by which the layer is found.
FEW = 8


@dataclass
class Seen:
    """What a pass left: the states [N, ...], and which tokens are no padding, bool [N, T] (None: nobody knows)."""

    states: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class LastStates:
    """Where the states are.

    Attributes:
        name: of the layer in `model.named_modules()` whose output they are.
        square: mean square of a state of the received model, by which departures are measured.
        place: where the model looks up token ids, which tell the padding; None: it looks up none.
    """

    name: str
    square: float
    place: TokenPlace | None

    @classmethod
    def of(cls, run: Run, place: TokenPlace | None) -> LastStates | None:
        """Find the last layer that returns real numbers [N, T, d] or [N, channels, ...] of more places than one.

        It is not the lookup of words, and has not as many numbers at a place as the model's outputs.

        Returns:
            None where there is no such layer: vectors alone, or compiled code.
        """
        batch = next(iter(run.clean.batches(min(FEW, run.clean.n), device=run.device)))
        whole = replace(run.alone, most=None)  # the layer is found by the rows of a batch, which has to go as one
        n, found = whole.size(batch), list[tuple[str, torch.Size, float]]()

        def keep(name: str) -> Any:
            def hook(module: nn.Module, args: Any, out: Any) -> None:
                x = _first(out)
                if x is not None and x.dim() >= 3 and len(x) == n and x[0, 0].numel() > 1:
                    found.append((name, x.shape, float(x.float().square().mean())))

            return hook

        handles = [m.register_forward_hook(keep(name)) for name, m in run.model.named_modules()]
        try:
            with run.eval_mode(), torch.no_grad():
                answer = whole.forward(run.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        looked_up = None if place is None else place.name
        for name, shape, square in reversed(found):
            if name and name != looked_up and not _speaks_of_outputs(shape, answer.shape) and 0 < square < math.inf:
                return cls(name, square, place)
        return None

    @contextlib.contextmanager
    def watched(self, model: nn.Module) -> Iterator[Seen]:
        """Give what the passes in a block leave; of several passes the last one's."""
        seen = Seen()

        def states(module: nn.Module, args: Any, out: Any) -> None:
            x = _first(out)
            if x is not None:
                seen.states = [x]

        def tokens(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            ids = ids_of_call(args, kwargs)
            if ids is not None and self.place is not None and self.place.padding is not None and not seen.tokens:
                seen.tokens = [ids != self.place.padding]

        handles = [model.get_submodule(self.name).register_forward_hook(states)]
        if self.place is not None:
            layer = model.get_submodule(self.place.name)
            handles.append(layer.register_forward_hook(tokens, with_kwargs=True))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def departure(self, run: Run, n: int, received: Seen, tuned: Seen, taken: Tensor) -> Tensor | None:
        """Return the mean over n samples of the mean squared difference of their states, over `square`.

        Args:
            run: whose ranks share the samples.
            n: samples of the part, of all ranks.
            received: what a pass of the received model left, without gradients.
            tuned: the same of the tuned one.
            taken: [n], one for each sample that counts and zero for the others.

        Returns:
            None where the layer was not met.
        """
        if not received.states or not tuned.states or received.states[0].shape != tuned.states[0].shape:
            return None
        old, new = received.states[0].float(), tuned.states[0].float()
        squares = (new - old).square()
        shown = tuned.tokens[0] if tuned.tokens else None
        if shown is not None and shown.shape == squares.shape[:2]:
            kept = shown.to(squares.dtype)
            each = (squares.flatten(2).mean(2) * kept).sum(1) / kept.sum(1).clamp_min(1)
        else:
            each = squares.flatten(1).mean(1)
        total = each @ taken[run.task.rows(n)] / (n * self.square)
        if run.ranks is None:
            return total
        return run.once(total) if run.ranks.rows(n) is None else run.total(total)


def _first(out: Any) -> Tensor | None:
    """Return a tensor of real numbers, or the first one of a tuple: recurrent layers return more beside it."""
    out = out[0] if isinstance(out, (tuple, list)) and out else out
    return out if isinstance(out, Tensor) and out.is_floating_point() else None


def _speaks_of_outputs(shape: torch.Size, answer: torch.Size) -> bool:
    """Return whether a tensor has as many numbers at each place as the model's outputs: logits before they are cut."""
    if len(answer) < 2:
        return False
    classes = answer[-1] if len(shape) == 3 and len(answer) != 4 else answer[1]
    return classes == (shape[-1] if len(shape) == 3 else shape[1])
