"""The semantics of the code released with FIP, kept for comparison; its trace term is no trace.

What it does (facts read from the released regulariser, restated in the project's notes on methods):

- `output[:, target]` on log-probabilities [N, C] with labels [N] gives an N x N matrix, not N numbers; its mean is the
  mean over images of sum_c (n_c / N) log p(c | x): the cross-entropy towards the batch's label histogram.
- its gradient g (with graph) is multiplied with Gaussian vectors v; the running sum over the tensors is collected after
  every tensor, so tensor l of P counts P - l times; the sum is divided by the number of probes.
- added to the cross-entropy with weight eta_f every fifth step, BatchNorm in train mode, no retainer.

So the term has mean zero over the probes: it is noise shaped by the curvature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastfip.data.batch import Batch
from fastfip.errors import ConfigError
from fastfip.methods._objective import Objective

__all__ = ["Released", "surrogate"]


def surrogate(log_p: Tensor, y: Tensor, tensors: list[Tensor], probes: list[list[Tensor]]) -> Tensor:
    """Return the released "trace": differentiable once more with respect to `tensors`.

    Args:
        log_p: log-probabilities [N, C].
        y: labels [N].
        tensors: the P tensors that are tuned.
        probes: for each probe one Gaussian tensor for each of `tensors`.
    """
    gathered = log_p[:, y]  # [N, N], as released
    gradients = torch.autograd.grad(gathered.mean(), tensors, create_graph=True, allow_unused=True)
    total = log_p.new_zeros(())
    count = len(tensors)
    for probe in probes:
        for place, (g, v) in enumerate(zip(gradients, probe)):
            if g is not None:
                total = total + (count - place) * (g * v).sum()
    return total / len(probes)


class Released(Objective):
    """Fine-tuning with the released surrogate every `trace_every` steps."""

    def setup(self) -> None:
        """Refuse what the released code has no meaning for."""
        super().setup()
        if self.run.task.loss_hook is not None:
            raise ConfigError("variant='released' is defined for class labels only: leave loss= out")

    def backward(self, batch: Batch) -> dict[str, float | Tensor]:
        """Add the gradients of the cross-entropy and of the surrogate, from one forward pass."""
        run, config = self.run, self.config
        with self.space.as_function():
            with run.autocast():
                logits = run.forward(batch)
                loss = run.loss(logits, batch).mean()
            values: dict[str, float | Tensor] = {"loss": loss.detach()}
            if run.step % config.trace_every == 0 and config.eta_f > 0:
                tensors = [t for t in self.space.tensors if t.requires_grad]
                probes = [
                    [torch.randn(t.shape, generator=run.generator).to(t) for t in tensors] for _ in range(config.probes)
                ]
                term = surrogate(logits.float().log_softmax(1), run.task.labels(batch), tensors, probes)
                values["surrogate"] = term.detach()
                loss = loss + config.eta_f * term
            run.backward(loss)
        return values
