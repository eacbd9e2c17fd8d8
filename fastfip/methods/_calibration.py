"""What is fitted to logits: a temperature and shifts by which they fit labels, and shifts by which they fit others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Calibration", "levelling"]

#: Steps of the solver at most, and the weight of the squares of what it finds: without it a class that is never wrong
#: would be shifted without an end.
MOST, RIDGE = 200, 1e-3
#: The inverse of the temperature is kept in this range.
SHARPEST, FLATTEST = 1.0, 0.05


@dataclass(frozen=True)
class Calibration:
    """Answers `scale * logits + shift`, by which the received model fits the clean labels best.

    One temperature and a shift for each class (Platt, 1999; Guo et al., arXiv 1706.04599), by the cross-entropy. What a
    fine-tuned model says too loudly is said less so, and never more.
    """

    scale: float
    shift: Tensor

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Calibration:
        """Fit both to logits [n, C] and labels [n] by L-BFGS, in float64."""
        z, y = logits.detach().double().cpu(), labels.detach().cpu().long()
        scale = torch.ones((), dtype=torch.float64, device="cpu", requires_grad=True)
        shift = torch.zeros(z.shape[1], dtype=torch.float64, device="cpu", requires_grad=True)
        _solved(
            [scale, shift],
            lambda: F.cross_entropy(scale * z + shift, y) + RIDGE / 2 * ((scale - 1).square() + shift.square().sum()),
        )
        found = shift.detach() - shift.detach().mean()
        return cls(min(SHARPEST, max(FLATTEST, float(scale.detach()))), found.float())

    def __call__(self, logits: Tensor) -> Tensor:
        """Return calibrated logits [N, C], in float32."""
        return self.scale * logits.float() + self.shift.to(logits.device)


def levelling(answers: Tensor, targets: Tensor) -> Tensor:
    """Return the shift of each class, float32 [C] of mean 0, by which answers fit targets best.

    It is the least of the mean of KL(softmax(targets) || softmax(answers + shift)), found by L-BFGS in float64, with a
    small weight on its squares. At it each class is as likely, on average over the samples, as in the targets.

    Args:
        answers: logits [n, C].
        targets: logits [n, C].
    """
    z, p = answers.detach().double().cpu(), targets.detach().double().cpu().softmax(1)
    shift = torch.zeros(z.shape[1], dtype=torch.float64, device="cpu", requires_grad=True)
    _solved([shift], lambda: F.cross_entropy(z + shift, p) + RIDGE / 2 * shift.square().sum())
    found = shift.detach() - shift.detach().mean()
    return found.float()


def _solved(unknown: list[Tensor], value: Callable[[], Tensor]) -> None:
    """Set tensors so that a smooth, convex value of theirs is least."""
    solver = torch.optim.LBFGS(unknown, max_iter=MOST, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        now = value()
        now.backward()
        return now

    with torch.enable_grad():
        solver.step(loss)
