"""The clean terms: the loss, and the KL to the received model on clean inputs and mixtures of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfip.data.batch import Batch
from fastfip.methods.base import Run

__all__ = ["CleanTerms", "divergence"]

Received = Callable[[], AbstractContextManager[nn.Module]]


def divergence(target: Tensor, answer: Tensor) -> Tensor:
    """Return the mean KL(softmax(target) || softmax(answer)) of logits [N, C], in float32; masked ones may be -inf."""
    p, q = (x.float().log_softmax(-1).clamp_min(-100) for x in (target, answer))
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()


class CleanTerms:
    """(1 - kl) times the loss plus kl times KL(p_received || p), back-propagated together or in turns.

    To second order the KL is the quadratic form of the full Fisher at the received weights, of which the published
    retainer keeps the diagonal.

    Attributes:
        received: gives the received model for a block (`Space.received`); None: the loss alone.
        mixable: whether inputs can be mixed.
    """

    def __init__(self, run: Run, turns: bool, received: Received | None, mixable: bool) -> None:
        self.run, self.turns, self.received, self.mixable = run, turns, received, mixable
        self.latest: Tensor | None = None  # the clean loss of the last step that took it

    def backward(self, batch: Batch) -> dict[str, float | Tensor]:
        """Back-propagate the clean terms of this step; return what the history shows."""
        run, mixed = self.run, batch
        if self.weights()[1]:
            mixed = self.mix(batch, run.task.size(batch))
        sums: dict[str, float | Tensor] = {}
        for (part, share), (other, _) in zip(run.parts(batch), run.parts(mixed)):
            for name, value in self._part(part, other, share).items():
                sums[name] = value if share == 1 else sums.get(name, 0.0) + share * value
        if "loss" in sums:
            self.latest = torch.as_tensor(sums["loss"])
        if self.latest is not None:
            sums["loss"] = self.latest
        return sums

    def _part(self, batch: Batch, mixed: Batch, share: float) -> dict[str, Tensor]:
        """Back-propagate the terms of a part of the batch, times its share; return their values."""
        run, target = self.run, None
        values: dict[str, Tensor] = {}
        if self.weights()[1]:
            with torch.no_grad(), run.autocast(), self.received() as received:  # type: ignore[misc]
                target = run.task.forward(received, mixed)
            if target.dim() != 2 or target.shape[1] < 2:
                run.note(
                    "the outputs are not logits [N, C]: no KL divergence keeps them near those of the received model"
                )
                self.received = target = None
        of_loss, of_kl = self.weights()
        total: Tensor | float = 0.0
        if of_loss:
            with run.autocast():
                loss = run.losses(batch).mean()
            total = of_loss * loss
            values["loss"] = loss.detach()
        if target is not None:
            if run.micro_batch is not None and of_loss:  # one graph at a time
                run.backward(share * total)  # type: ignore[arg-type]
                total = 0.0
            with run.autocast():
                answer = run.forward(mixed)
            kl = divergence(target, answer)
            total = total + of_kl * kl
            values["kl"] = kl.detach()
        run.backward(total if share == 1 else share * total)  # type: ignore[arg-type]
        return values

    def weights(self) -> tuple[float, float]:
        """Return the weights of the loss and of the KL in this step; in turns each is that of two steps, or zero.

        While the model unlearns both are taken in every step: the KL says how much room there is.
        """
        config: Any = self.run.config
        kl = config.kl if self.received is not None else 0.0
        if not self.turns or self.run.progress < config.unlearn or kl in (0.0, 1.0):
            return 1 - kl, kl
        return (0.0, 2 * kl) if self.run.step % 2 else (2 * (1 - kl), 0.0)

    def mix(self, batch: Batch, n: int) -> Batch:
        """Mix the batch's inputs, each at least half of its own: more points to hold the model to its answers."""
        if not self.mixable or n < 2:
            return batch
        x = self.run.task.inputs(batch)
        share = 0.5 + 0.5 * float(torch.rand((), generator=self.run.generator, device="cpu", dtype=torch.float32))
        other = torch.randperm(n, generator=self.run.generator, device="cpu").to(x.device)
        return self.run.task.replace_inputs(batch, share * x + (1 - share) * x[other])
