"""Natural gradient fine-tuning (NGF, Karim et al., arXiv 2306.17441): the classifier alone, on cached features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastfip.data.batch import Batch
from fastfip.data.task import Task
from fastfip.methods._classifier import LastLayer, refuse_frozen
from fastfip.methods._features import FeatureSet
from fastfip.methods._natural import Exact, Kronecker, Solver
from fastfip.methods.base import Groups, Method, MethodConfig, Run, register, setting

__all__ = ["NGF", "NGFConfig", "stable_damping"]

#: The released code's.
DAMPING = 1e-3


@dataclass(frozen=True)
class NGFConfig(MethodConfig):
    """Settings of NGF: those of the paper and, where it states none, of the released code."""

    epochs: int | None = setting(100, "passes over the clean set", low=1)
    batch_size: int | None = setting(128, "samples in a step; None: the batch size of the loader", low=1)
    schedule: Literal["constant", "cosine"] = setting("constant", "course of the step size, beside its drops")
    drop: float = setting(0.1, "factor of the step size at each drop", above=0, high=1)
    drop_every: float = setting(0.4, "share of the steps between two drops", above=0)
    bn_mode: Literal["train", "eval", "freeze"] = setting("eval", "without effect: features are taken in eval mode")
    select: Literal["best", "last"] = setting(
        "last", "which epoch is kept: the best by held-out clean score, or the last"
    )
    layer: str | None = setting(None, "name of the classifier; None: the last layer, whose outputs are the logits")
    solver: Literal["exact", "kronecker"] = setting(
        "exact", "the Fisher itself, or its Kronecker-factored form (EKFAC)"
    )
    damping: float | None = setting(
        None, "added to the Fisher; None: 1e-3, or as much as keeps a plain gradient step stable", above=0
    )
    every: int = setting(10, "the Fisher is taken anew every so many steps", low=1)
    samples: int = setting(512, "clean samples that the Fisher is taken over, at most", low=1)
    kl_clip: float | None = setting(1e-2, "largest lr^2 <V, g> of a step; None: not bounded", above=0)
    eta: float = setting(5.0, "weight of the retainer", low=0)
    views: int = setting(10, "augmented views of each sample that are cached, where the clean loader augments", low=1)


@register
class NGF(Method):
    """Tune the last layer along the natural gradient of the clean loss, with a penalty for leaving its old weights.

        min_theta  L(theta) + (eta / 2) sum_i F_ii (theta_i - theta_i^0)^2,    theta <- theta - lr (F + d I)^-1 grad

    theta = [W, b] of the classifier. The rest of the model is frozen and in eval mode, so that its features are
    computed once, and a step does not run the model. F is the empirical Fisher of the classifier over the clean
    samples.

    Differences from the released code: there, every weight is tuned by plain SGD and only the classifier's gradient is
    preconditioned, the retainer is missing, the step size drops before the first pass, and EKFAC's scale is computed in
    another basis than it is used in. None of this is done here. Of its settings, the bound `kl_clip`, the momentum and
    the period of the Fisher are kept. Its eta is unknown; the default is that of FIP's retainer. Its damping of 1e-3 is
    a lower bound here. The empirical Fisher of a model that fits its data is nearly zero, so that only the damping
    bounds the steps; if features are large, 1e-3 lets them destroy the classifier (see `stable_damping`).
    """

    name = "ngf"
    summary = "NGF: natural gradient steps of the classifier on cached features"
    Config = NGFConfig

    def setup(self, run: Run) -> None:
        """Find the classifier, cache the features, take the retainer's Fisher diagonal."""
        config = run.config
        assert isinstance(config, NGFConfig)
        self.config = config
        classifier = LastLayer.of(run, config.layer)
        refuse_frozen(run, classifier.layer)
        if config.dropout:
            run.note("ngf takes its features in eval mode: dropout has no effect")
        self.theta = classifier.theta().requires_grad_(True)
        self.anchor = self.theta.detach().clone()
        task = self._task(run, classifier)
        views = min(config.views, config.epochs or config.views) if run.clean.live else 1
        with run.timed("features"):
            clean = FeatureSet.cached(run, run.clean, classifier, task, views)
            heldout = None if run.heldout is None else FeatureSet.cached(run, run.heldout, classifier, task)
        # From here on the loop walks features: what it is given back in `fold` is the samples.
        self.given = run.clean, run.heldout, run.task, run.scaler
        self.classifier = classifier
        run.clean, run.heldout, run.task, run.scaler = clean, heldout, task, None
        with run.timed("fisher"):
            self._fisher(run)

    def _task(self, run: Run, classifier: LastLayer) -> Task:
        own, shape = run.task, classifier.shape
        loss = None if own.loss_hook is None else lambda logits, batch: own.loss(logits, batch[2])
        return Task.of(lambda model, batch: (batch[0] @ self.theta.T).reshape(len(batch[0]), *shape), loss)

    def _fisher(self, run: Run) -> None:
        pool = next(iter(run.clean.batches(self.config.samples, shuffle=True, generator=run.generator)))
        self.pool: Batch = tuple(part.to(run.device) if isinstance(part, Tensor) else part for part in pool)
        damping = stable_damping(self.pool[0], self.config.lr) if self.config.damping is None else self.config.damping
        kind = Exact if self.config.solver == "exact" else Kronecker
        self.solver: Solver = kind(self.pool[0], damping)
        total, n = torch.zeros_like(self.anchor), 0
        for batch in run.clean.batches(device=run.device):
            e, _ = self.errors(run, batch)
            total += e.square().T @ batch[0].square()
            n += len(e)
        self.diagonal = total / n

    def parameter_groups(self, run: Run) -> Groups:
        """The classifier's [W, b]."""
        return [{"params": [self.theta]}]

    def make_optimizer(self, run: Run, groups: Groups) -> torch.optim.Optimizer:
        """Return the config's optimiser."""
        self.optimizer = super().make_optimizer(run, groups)
        return self.optimizer

    def errors(self, run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the gradients of the samples' own losses with respect to the logits [N, C], and the losses [N]."""
        with torch.enable_grad():
            logits = (batch[0] @ self.theta.detach().T).requires_grad_(True)
            losses = run.loss(logits.reshape(len(logits), *self.shape), batch)
            (e,) = torch.autograd.grad(losses.sum(), logits)
        return e, losses.detach()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the net's output for one sample."""
        return self.classifier.shape

    @torch.no_grad()
    def backward(self, run: Run, batch: Batch) -> dict[str, float | Tensor]:
        """Set the gradient of theta to the natural one of a batch of features."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] *= config.drop ** int(run.progress / config.drop_every)
        if run.step % config.every == 0:
            self.solver.refresh(self.errors(run, self.pool)[0])
        e, losses = self.errors(run, batch)
        gradient = e.T @ batch[0] / len(e)
        loss = losses.mean()
        if config.eta > 0:
            gradient += config.eta * self.diagonal * (self.theta - self.anchor)
        natural = self.solver.solve(gradient)
        inner = float((natural * gradient).sum())
        if config.kl_clip is not None and inner > 0:
            lr = self.optimizer.param_groups[0]["lr"]
            natural = natural * min(1.0, math.sqrt(config.kl_clip / (lr**2 * inner)))
        self.theta.grad = natural
        return {"loss": loss, "moved": (self.theta - self.anchor).norm()}

    def after_step(self, run: Run) -> None:
        """Keep the model's own layer up to date."""
        self.classifier.write(self.theta.detach())

    def fold(self, run: Run) -> None:
        """Write theta into the layer; give the run its samples back."""
        if hasattr(self, "classifier"):
            run.clean, run.heldout, run.task, run.scaler = self.given
            self.classifier.write(self.theta.detach())


def stable_damping(h: Tensor, lr: float) -> float:
    """Return max(1e-3, lr * L), L = lambda_max(mean h h^T) / 2: no step overshoots, however small the Fisher is.

    L bounds the curvature of the cross-entropy of softmax regression on the features h [n, m]; a gradient step of
    lr / damping <= 1 / L is stable, and the Fisher only shortens it. Nothing but clean features decides.
    """
    gram = h @ h.T if len(h) < h.shape[1] else h.T @ h
    return max(DAMPING, lr * float(torch.linalg.eigvalsh(gram.double())[-1]) / len(h) / 2)
