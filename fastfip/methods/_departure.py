"""Methods that drive the classifier off the weight it was received with (FST, D3)."""

from __future__ import annotations

import math
from abc import abstractmethod

from torch import Tensor

from fastfip.data.batch import Batch
from fastfip.methods._classifier import Classifier, refuse_frozen
from fastfip.methods.base import Groups, Method, Run

__all__ = ["Departure"]


class Departure(Method):
    """Fine-tune everything while the classifier, drawn anew, keeps off its received weight at the received norm."""

    classifier: Classifier
    #: Spread of the new weight before it is scaled; None: 1 / sqrt(inputs).
    spread: float | None = None
    new_bias = True

    def setup(self, run: Run) -> None:
        """Find the classifier."""
        self.classifier = Classifier.of(run)
        refuse_frozen(run, self.classifier.module)
        self.drawn = False

    def parameter_groups(self, run: Run) -> Groups:
        """All parameters."""
        return [{"params": list(run.model.parameters())}]

    def backward(self, run: Run, batch: Batch) -> dict[str, float | Tensor]:
        """Draw the classifier before the first step (an interruption before it leaves the net as given); then step."""
        if not self.drawn:
            inputs = self.classifier.received[0].numel()
            spread = 1 / math.sqrt(inputs) if self.spread is None else self.spread
            self.classifier.draw(run.generator, spread, self.new_bias)
            self.drawn = True
        with run.autocast():
            clean = run.loss(run.forward(batch), batch).mean()
        loss = self.objective(run, clean)
        run.backward(loss)
        return {"loss": loss.detach(), "clean": clean.detach()}

    @abstractmethod
    def objective(self, run: Run, clean: Tensor) -> Tensor:
        """Return what is minimised, given the mean clean loss."""

    def after_step(self, run: Run) -> None:
        """Keep the norm."""
        self.classifier.project()
