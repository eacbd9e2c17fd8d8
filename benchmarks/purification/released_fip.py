"""The semantics of the code that was released with FIP (arXiv 2409.00863), kept for comparison; its trace is no trace.

    fastfip.purify(model, loader, ReleasedFIP)      # a class, not a name: it is no method of the package

What it does, read from the released regulariser:

- `output[:, target]` on log-probabilities [N, C] with labels [N] gives an N x N matrix, not N numbers; its mean is the
  mean over images of sum_c (n_c / N) log p(c | x): the cross-entropy towards the batch's label histogram.
- its gradient g (with graph) is multiplied with Gaussian vectors v; the running sum over the tensors is collected after
  every tensor, so tensor l of P counts P - l times; the sum is divided by the number of probes.
- added to the cross-entropy with weight eta_f every fifth step, BatchNorm in train mode, no retainer.

So the term has mean zero over the probes: it is noise shaped by the curvature. The released code has no runnable path
for Fast FIP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastfip.data.batch import Batch
from fastfip.errors import ConfigError
from fastfip.methods._space import SpaceMethod
from fastfip.methods.base import MethodConfig, Run, setting

__all__ = ["ReleasedFIP", "ReleasedFIPConfig", "surrogate"]


@dataclass(frozen=True)
class ReleasedFIPConfig(MethodConfig):
    """Settings of the released code."""

    STEPS: ClassVar[int | None] = 2000

    epochs: int | None = setting(None, "passes over the clean set, instead of steps", low=1)
    batch_size: int | None = setting(128, "samples a step", low=1)
    lr: float = setting(0.005, "step size", above=0)
    momentum: float = setting(0.95, "momentum of SGD", low=0, below=1)
    schedule: Literal["constant", "cosine"] = setting("constant", "course of the step size")
    eta_f: float = setting(0.5, "weight of the surrogate", low=0)
    trace_every: int = setting(5, "the surrogate is added every so many steps", low=1)
    probes: int = setting(20, "Gaussian vectors of the surrogate", low=1)


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


class ReleasedFIP(SpaceMethod):
    """Fine-tuning with the released surrogate every `trace_every` steps."""

    name = "released_fip"
    summary = "the code released with FIP: fine-tuning with noise shaped by the curvature"
    Config = ReleasedFIPConfig

    def setup(self, run: Run) -> None:
        """Refuse what the released code has no meaning for."""
        super().setup(run)
        if run.task.loss_hook is not None:
            raise ConfigError("released_fip is defined for class labels only: leave loss= out")

    def backward(self, run: Run, batch: Batch) -> dict[str, float | Tensor]:
        """Add the gradients of the cross-entropy and of the surrogate, from one forward pass."""
        config: Any = run.config
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
