"""Universal perturbations of the input: for every class the small change that sends most clean samples there.

A backdoor is a shortcut: one small change of the input that moves every sample to one class. Without the trigger it can
still be looked for, on clean data alone, as the smallest universal perturbation for each class (Neural Cleanse, Wang et
al., S&P 2019; universal adversarial perturbations, Moosavi-Dezfooli et al., CVPR 2017). Purification uses what is found
as the inputs at which the Fisher information of the net is largest; an audit reports it.

Index letters: `n` sample, `c` class. A perturbation has the shape of one input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastfip.data.batch import Batch, take
from fastfip.data.task import Task
from fastfip.nets.state import requires_grad
from fastfip.worst_case.pixels import PixelRange, typical_norm
from fastfip.worst_case.store import DeltaStore, row_norms

if TYPE_CHECKING:
    from fastfip.nets.ranks import Ranks

__all__ = ["Perturbations"]

#: Inputs of one pass of `improve`: a larger batch goes through the model in parts, for the memory of its activations.
PASS_BYTES = 5 << 20


@dataclass
class Perturbations:
    """One universal perturbation for each class, of bounded L2 norm, improved by normalised gradient steps.

    Attributes:
        store: the perturbations, on the device of the inputs.
        range: of each channel of the clean inputs: perturbed inputs stay in it, so nothing needs to be known of how the
            user scales images.
        unit: the norm of typical inputs, sqrt(d) times their standard deviation. The radius is a multiple of it.
        radius: L2 bound of each perturbation, in the inputs' own units.
        success: [C] running share of samples (not of the class) that the perturbation of c sends to c.
        outside: [K] classes whose perturbation rounding left a little longer than the bound: the next step shortens
            them as well, whatever classes it is for.
        ranks: the processes that share each batch, if there are several: each has gradients for its own samples.
    """

    store: DeltaStore
    range: PixelRange
    unit: float
    radius: float
    generator: torch.Generator
    success: Tensor
    outside: Tensor
    history: list[tuple[float, list[float]]] = field(default_factory=list)
    ranks: Ranks | None = None

    @classmethod
    def of(
        cls, x: Tensor, classes: int, generator: torch.Generator, radius: float = 0.02, ranks: Ranks | None = None
    ) -> Perturbations:
        """Start from tiny noise.

        Args:
            x: clean inputs [N, ch, ...] as the model takes them.
            classes: C.
            generator: CPU generator; nothing else is drawn from.
            radius: of the first bound, in units of `unit`.
            ranks: the processes that share each batch.
        """
        x = x.detach().float()
        unit = typical_norm(x)
        return cls(
            DeltaStore.noise(x, classes, generator, 1e-3 * radius * unit, unit / math.sqrt(x[0].numel())),
            PixelRange.of_inputs(x),
            unit,
            radius * unit,
            generator,
            torch.zeros(classes, device=x.device, dtype=torch.float32),
            torch.zeros(0, dtype=torch.int64, device=x.device),
            ranks=ranks,
        )

    @property
    def relative_radius(self) -> float:
        """Return the bound in units of the norm of a typical input."""
        return self.radius / self.unit

    def apply(self, x: Tensor, c: Tensor) -> Tensor:
        """Return inputs [N, ...] moved by the perturbation of their class `c` [N], within the clean inputs' range."""
        return self.range.clamp(x + self.store.rows(c).to(x.dtype))

    def draw(self, y: Tensor, sharpness: float) -> Tensor:
        """Return for each sample a class other than its own, the likelier the better its perturbation works.

        Args:
            y: [N] int64, true classes.
            sharpness: probabilities are proportional to `success ** sharpness`; 0: uniform.
        """
        weight = self.success.clamp_min(0.01).cpu()
        weight = (weight / weight.max()).pow(sharpness).clamp_min(1e-12)
        table = weight.expand(len(y), -1).clone()
        table[torch.arange(len(y), device="cpu"), y.cpu()] = 0
        return torch.multinomial(table, 1, generator=self.generator)[:, 0].to(y.device)

    def improve(self, model: nn.Module, task: Task, batch: Batch, c: Tensor, step: float = 0.3) -> Tensor:
        """Take one step of the perturbations of the classes `c` [N] towards sending the batch there.

        The model's parameters get no gradient. Each class moves by `step` radii along its own normalised gradient of
        the cross-entropy towards c, then back into the ball.

        Returns:
            the share of samples that went to their c, as a scalar.
        """
        n = task.size(batch)
        most = max(1, PASS_BYTES * n // max(1, task.inputs(batch).nbytes))
        with requires_grad(model.parameters(), False):
            if most >= n:
                used, moved = self.moved(task, batch, c)
                return self.step(task.forward(model, moved), used, c, step)
            logits, gradients = [], []
            for part in torch.arange(n, device="cpu").tensor_split(math.ceil(n / most)):
                mine = c[part.to(c.device)]
                used, moved = self.moved(task, take(batch, part, n), mine)
                logits.append(task.forward(model, moved).float())
                gradients.append(self._gradient(logits[-1], used, mine))
                logits[-1] = logits[-1].detach()
                del used, moved  # with the graph, before the next part
        self._move(c, torch.cat(gradients), step)
        return self.count(torch.cat(logits), c)

    def moved(self, task: Task, batch: Batch, c: Tensor) -> tuple[Tensor, Batch]:
        """Return the perturbations of the classes `c` [N] as a leaf [N, ...], and the batch moved by them."""
        x = task.inputs(batch)
        used = self.store.rows(c).to(x.dtype).requires_grad_(True)
        return used, task.replace_inputs(batch, self.range.clamp(x + used))

    def step(self, logits: Tensor, used: Tensor, c: Tensor, step: float = 0.3, retain_graph: bool = False) -> Tensor:
        """Take the step of `improve` from the logits of a pass that was there anyway (see `moved`)."""
        logits = logits.float()
        self._move(c, self._gradient(logits, used, c, retain_graph), step)
        return self.count(logits, c)

    @staticmethod
    def _gradient(logits: Tensor, used: Tensor, c: Tensor, retain_graph: bool = False) -> Tensor:
        """Return the gradient in what was used, [N, ...], of the summed cross-entropy towards c [N]."""
        loss = nn.functional.cross_entropy(logits, c, reduction="sum")
        return torch.autograd.grad(loss, used, retain_graph=retain_graph)[0]

    @torch.no_grad()
    def _move(self, c: Tensor, gradient: Tensor, step: float) -> None:
        """Move the perturbations of the classes `c` [N] and bring them back into the ball; no others are touched."""
        touched, place = torch.unique(torch.cat([c, self.outside]), return_inverse=True)
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = gradient.new_zeros(len(touched), *gradient.shape[1:], dtype=wide)
        total.index_add_(0, place[: len(c)], gradient.to(wide).nan_to_num(0.0, 0.0, 0.0))
        if self.ranks is not None:
            self.ranks.sum_([total], "perturbations")
        total = total.float()
        size = row_norms(total)
        rows = self.store.rows(touched)
        rows -= total.mul_(step * self.radius).div_(size.clamp_min(1e-20))
        rows *= self._shortening(rows)
        if self.store.exact:
            self.outside = touched[(self._shortening(rows) < 1).flatten()]
        self.store.put(touched, rows)

    def _shortening(self, rows: Tensor) -> Tensor:
        """Return the factor, at most 1, that brings each row into the ball, [K, 1, ...]."""
        return (self.radius / row_norms(rows).clamp_min(1e-20)).clamp(max=1)

    @torch.no_grad()
    def count(self, logits: Tensor, c: Tensor) -> Tensor:
        """Take note of who of logits [N, C] went to c [N]; return the share of them, as a scalar.

        `success` is a running mean: a sample counts a tenth, so about ten samples are remembered.
        """
        hit = (logits.argmax(1) == c).float()
        seen = torch.zeros_like(self.success).index_add_(0, c, torch.ones_like(hit))
        hits = torch.zeros_like(self.success).index_add_(0, c, hit)
        keep = 0.9**seen
        self.success = keep * self.success + (1 - keep) * hits / seen.clamp_min(1)
        return hit.mean()

    def grow(self, factor: float) -> None:
        """Widen the bound; the perturbations themselves stay where they are."""
        self.history.append((self.relative_radius, self.success.tolist()))
        self.radius *= factor
