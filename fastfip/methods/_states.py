"""The last states of a model that keep places apart: hidden states of tokens, the last feature maps of images.

They say far more of a sample than its answer does, which for two classes is one number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastfip.methods.run import Run
from fastfip.worst_case.layers_of_ids import ids_of_call
from fastfip.worst_case.places import TokenPlace

__all__ = ["LastStates", "Seen"]


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
        """Find the last layer that returns a tensor of real numbers [N, ..., ...] and is not the model's own output.

        Returns:
            None where there is no such layer (vectors alone, compiled code), or its states are all zero.
        """
        batch = next(iter(run.clean.batches(device=run.device)))
        whole = replace(run.alone, most=None)  # the layer is found by the rows of a batch, which has to go as one
        n, found = whole.size(batch), list[tuple[str, Tensor]]()

        def keep(name: str) -> Any:
            def hook(module: nn.Module, args: Any, out: Any) -> None:
                if isinstance(out, Tensor) and out.is_floating_point() and out.dim() >= 3 and len(out) == n:
                    found.append((name, out))

            return hook

        handles = [m.register_forward_hook(keep(name)) for name, m in run.model.named_modules()]
        try:
            with run.eval_mode(), torch.no_grad():
                answer = whole.forward(run.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        found = [(name, out) for name, out in found if name and out.shape != answer.shape]
        if not found:
            return None
        square = float(found[-1][1].float().square().mean())
        return cls(found[-1][0], square, place) if 0 < square < float("inf") else None

    @contextlib.contextmanager
    def watched(self, model: nn.Module) -> Iterator[Seen]:
        """Give what the passes in a block leave; of several passes the last one's."""
        seen = Seen()

        def states(module: nn.Module, args: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                seen.states = [out]

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
