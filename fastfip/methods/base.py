"""What a method is, and how it is found.

A method says what is tuned, the loss and, where it needs to, the step; the loop around it is
`fastfip.purification.loop.fit`. The order of calls: `setup`, `parameter_groups`, `make_optimizer`; each step `backward`
(which calls `loss`), the optimiser's step, `after_step`; each epoch `is_candidate`, `score`; at the end, whatever
happened, `fold`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastfip.data.batch import Batch
from fastfip.methods.config import MethodConfig, setting
from fastfip.methods.run import Run
from fastfip.registry import Registry

__all__ = ["Method", "MethodConfig", "Run", "get", "names", "register", "setting"]

Groups = list[dict[str, Any]]


class Method(ABC):
    """One way to purify. Subclass it in a file of its own, with a config, under `@register`.

    An instance lives for one run and may keep state (anchors, Fisher diagonals) on itself.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    Config: ClassVar[type[MethodConfig]] = MethodConfig
    #: Whether weight matrices stay as they are until `fold`, which gives those that move new memory: then they need not
    #: be copied before.
    lends_weights: ClassVar[bool] = False
    #: Whether `backward`, where it is the method's own, takes its batch in parts (`Run.parts`).
    takes_parts: ClassVar[bool] = False
    #: Whether several processes may share each batch: what it draws comes from `run.generator`, its passes go through
    #: `run.task` and `run.backward`, and what else it makes of samples is summed over `run.ranks`.
    over_ranks: ClassVar[bool] = False
    #: Whether it also tunes parameters of which each process has a part (FSDP2's DTensors), as they are. What it
    #: computes of a tensor is then elementwise, or goes through `run.norms`, and the received model comes from
    #: `methods/_received.py`.
    over_shards: ClassVar[bool] = False
    #: Whether it asks for the weights that the model was fine-tuned from (`Run.pretrained`, `pretrained=` of `purify`).
    needs_pretrained: ClassVar[bool] = False
    #: Names of the attributes that a broken run needs to go on, beside what the loop keeps and what `reenter` makes
    #: anew; None: such a run cannot go on.
    keeps: ClassVar[tuple[str, ...] | None] = None

    def setup(self, run: Run) -> None:  # noqa: B027 (most methods need none)
        """Prepare: the Fisher diagonal, the SVD. The model is in eval mode; `requires_grad` is as the user left it."""

    def reenter(self, run: Run) -> None:  # noqa: B027
        """Do the part of `setup` that follows from the received model alone, where a broken run goes on.

        The attributes in `keeps` are set afterwards.
        """

    @abstractmethod
    def parameter_groups(self, run: Run) -> Groups:
        """Return what is tuned, as an optimiser takes it: `[{"params": [...], "lr": ...}, ...]`; `lr` may be left out.

        Everything else in the model is frozen while the loop runs, so no gradient is computed for it. The loop passes
        over what is no floating-point tensor or was named before (tied weights), and BatchNorm's affine parameters if
        `bn_mode="freeze"`.
        """

    def make_optimizer(self, run: Run, groups: Groups) -> torch.optim.Optimizer:
        """Return the optimiser: the config's. Its groups' `lr` is what the schedule multiplies."""
        config = run.config
        if config.optimizer == "adam":
            return torch.optim.Adam(groups, lr=config.lr, weight_decay=config.weight_decay)
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)

    def backward(self, run: Run, batch: Batch) -> dict[str, float | Tensor]:
        """Do the forward and backward passes of one step, gradients added to `.grad`; return what the history shows.

        The entry "loss" must be there: a loss that is not finite makes the loop skip the step.
        """
        total: Tensor | float = 0.0
        for part, share in run.parts(batch):
            with run.autocast():
                loss = self.loss(run, part)
            loss = loss if share == 1 else share * loss
            run.backward(loss)
            total = total + loss.detach()
        return {"loss": total}

    def loss(self, run: Run, batch: Batch) -> Tensor:
        """Return the scalar that is minimised: by default the mean clean loss."""
        return run.losses(batch).mean()

    def after_step(self, run: Run) -> None:  # noqa: B027
        """Do what follows the optimiser's step: clipping, projections, a schedule of its own."""

    def is_candidate(self, run: Run) -> bool:
        """Return whether the state at the end of this epoch may be the one that is kept."""
        return True

    @torch.no_grad()
    def score(self, run: Run) -> dict[str, float]:
        """Return figures of the present state on held-out clean data, in eval mode; the lowest "score" is kept.

        By default the score is the mean clean loss; "heldout_acc" is there as well where outputs are logits.
        """
        clean = run.clean if run.heldout is None else run.heldout
        total, right, count = 0.0, 0.0, 0
        with run.eval_mode():
            for batch in clean.batches(device=run.device):
                count += run.task.size(batch)
                logits = run.forward(batch)  # without gradients: in parts where the run has them
                total += float(run.task.loss(logits, batch).sum())
                if run.classes is not None:
                    right += float((logits.argmax(1) == run.task.labels(batch)).sum())
        out = {"score": total / count}
        if run.classes is not None:
            out["heldout_acc"] = right / count
        return out

    def finish(self, run: Run) -> None:  # noqa: B027
        """Do what comes after the last step, with the state that is kept; not after Ctrl-C or an error."""

    def fold(self, run: Run) -> None:  # noqa: B027
        """Take back what `setup` did to the model (parametrisations, hooks, buffers), exactly: plain weights remain.

        Called once on every way out, also after an error inside `setup`.
        """


REGISTRY: Registry[type[Method]] = Registry("method", "fastfip.methods", Method)
register, names, get = REGISTRY.register, REGISTRY.names, REGISTRY.get
