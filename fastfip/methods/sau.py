"""Shared Adversarial Unlearning (SAU, Wei et al., NeurIPS 2023, arXiv 2307.10562)."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastfip.data.batch import Batch
from fastfip.methods._pixels import PixelConfig, range_of
from fastfip.methods.base import Groups, Method, Run, register, setting
from fastfip.nets.state import frozen_copy, requires_grad

__all__ = ["SAU", "SAUConfig", "unshared"]

#: A shared class less likely than this is unlearned: its term has no gradient any more (released code).
UNLEARNED = 1e-3


def jensen_shannon(a: Tensor, b: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of softmax(a) and softmax(b), both [N, C], as [N]."""
    log_p, log_q = a.log_softmax(1), b.log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).clamp_min(1e-30).log()
    return ((p * (log_p - log_m)).sum(1) + (q * (log_q - log_m)).sum(1)) / 2


def unshared(logits: Tensor, shared: Tensor) -> Tensor:
    """Return -log(1 - p) of the classes `shared` [N] under logits [N, C], as [N]; zero gradient where p < 1e-3."""
    others = logits.scatter(1, shared[:, None], -torch.inf)
    loss = logits.logsumexp(1) - others.logsumexp(1)
    p = -torch.expm1(-loss.detach())
    return torch.where(p > UNLEARNED, loss, loss.detach())


@dataclass(frozen=True)
class SAUConfig(PixelConfig):
    """Settings of SAU: those of the released code."""

    epochs: int | None = setting(100, "passes over the clean set", low=1)
    batch_size: int | None = setting(256, "samples in a step; None: the batch size of the loader", low=1)
    lr: float = setting(1e-4, "step size", above=0)
    optimizer: Literal["sgd", "adam"] = setting("adam", "optimiser")
    schedule: Literal["constant", "cosine"] = setting("constant", "course of the step size after the warm-up")
    bn_mode: Literal["train", "eval", "freeze"] = setting("eval", "BatchNorm; eval keeps the running statistics")
    select: Literal["best", "last"] = setting("last", "which epoch is kept: the last, or the best by clean score")
    radius: float = setting(0.2, "largest change of a pixel (L-infinity), in pixels of [0, 1]", above=0)
    inner: int = setting(5, "steps of the perturbation", low=1)
    inner_step: float = setting(0.2, "step size of the perturbation, in pixels", above=0)
    start: Literal["max", "min", "zero", "random"] = setting("max", "where the perturbation starts in its box")
    beta_adversarial: float = setting(0.01, "weight of the adversarial loss in the search", low=0)
    beta_shared: float = setting(1.0, "weight of the divergence of the two models in the search", low=0)
    clean_weight: float = setting(1.0, "weight of the clean loss", low=0)
    adversarial_weight: float = setting(0.0, "weight of the loss at perturbed inputs", low=0)
    shared_weight: float = setting(1.0, "weight of unlearning the class that the received model is led to", low=0)


@register
class SAU(Method):
    """Unlearn the adversarial examples that the tuned model shares with the received one.

    Search, sample by sample, |delta|_inf <= radius, by sign steps:

        min_delta  -beta_adversarial (CE(f(x + delta), y) + CE(f0(x + delta), y)) / 2 + beta_shared JS(f, f0; x + delta)

    A term leaves a sample out when its goal is reached (the model is fooled; both are fooled into one class).
    Unlearning:

        min_theta  clean_weight CE(f(x), y) + adversarial_weight CE(f(x + delta), y)
                   - shared_weight log(1 - p(y' | x + delta)),  y' what f0 says there, where f0 is fooled

    f0 is the received model. Perturbation and clipping are in pixels of [0, 1]; the released code does not clip.
    """

    name = "sau"
    summary = "SAU: unlearning of the adversarial examples shared with the received model"
    Config = SAUConfig

    def setup(self, run: Run) -> None:
        """Copy the received net; read the range of the inputs."""
        config = run.config
        assert isinstance(config, SAUConfig)
        self.config = config
        self.received = frozen_copy(run.model)
        self.range = range_of(run, "the model was only fine-tuned")
        self.classified = run.classes is not None and run.task.loss_hook is None
        if self.range is not None and not self.classified:
            run.note("loss= has no classes to share: perturbed inputs are unlearned towards their own labels")

    def parameter_groups(self, run: Run) -> Groups:
        """All parameters."""
        return [{"params": list(run.model.parameters())}]

    def backward(self, run: Run, batch: Batch) -> dict[str, float | Tensor]:
        """Search; then the gradients of clean and perturbed inputs."""
        if self.range is None:
            return super().backward(run, batch)
        config = self.config
        moved = self.range.moved(run.task, batch, self.search(run, batch))
        with run.autocast():
            clean = run.loss(run.forward(batch), batch).mean()
        run.backward(config.clean_weight * clean)
        values: dict[str, float | Tensor] = {"loss": clean.detach()}
        with run.bn("eval"), run.autocast():
            logits = run.forward(moved)
            own = run.loss(logits, batch).mean()
        weight = config.adversarial_weight
        if self.classified:
            shared = self.shared_loss(run, batch, moved, logits.float() if logits.dtype != torch.float64 else logits)
            values["shared_loss"] = shared.detach()
            total = weight * own + config.shared_weight * shared
        else:
            total = (weight or config.shared_weight) * own
        run.backward(total)
        return values

    def shared_loss(self, run: Run, batch: Batch, moved: Batch, logits: Tensor) -> Tensor:
        """Return the mean of -log(1 - p(y')) over the batch, zero for samples at which the received net holds."""
        with torch.no_grad():
            said, before = self._answers(run, moved), self._answers(run, batch)
            fooled = (said != run.task.labels(batch)) & (said != before)
        return (unshared(logits, said) * fooled).mean()

    def _answers(self, run: Run, batch: Batch) -> Tensor:
        with run.autocast():
            return run.task.forward(self.received, batch).argmax(1)

    def search(self, run: Run, batch: Batch) -> Tensor:
        """Return perturbations [N, ch, ...] in pixels that lead both nets astray, to the same class."""
        config, x = self.config, run.task.inputs(batch)
        delta = self._start(run, x)
        # In float16 the gradient of an input underflows without the scaler.
        cast = contextlib.nullcontext() if run.amp == torch.float16 else run.autocast()
        with requires_grad(run.model.parameters(), False), run.eval_mode(), cast:
            for _ in range(config.inner):
                delta.requires_grad_(True)
                loss, open_ = self._search_loss(run, batch, delta)
                if not open_:
                    break
                (gradient,) = torch.autograd.grad(loss, delta, allow_unused=True)
                if gradient is None:
                    break
                delta = delta.detach() - config.inner_step * gradient.sign().nan_to_num_()
                delta.clamp_(-config.radius, config.radius)
        return delta.detach()

    def _start(self, run: Run, x: Tensor) -> Tensor:
        radius, kind = self.config.radius, self.config.start
        if kind == "random":
            draws = torch.rand(x.shape, generator=run.generator, device="cpu", dtype=torch.float32)
            return (radius * (2 * draws - 1)).to(x.device, x.dtype)
        return torch.full_like(x, {"max": radius, "min": -radius, "zero": 0.0}[kind])

    def _search_loss(self, run: Run, batch: Batch, delta: Tensor) -> tuple[Tensor, bool]:
        """What the perturbation minimises, and whether a sample is still open."""
        assert self.range is not None
        moved = self.range.moved(run.task, batch, delta)
        outputs = [run.task.forward(net, moved) for net in (run.model, self.received)]
        losses = [run.task.loss(out, batch) for out in outputs]
        if not self.classified:
            return -(losses[0] + losses[1]).mean() / 2, True
        y = run.task.labels(batch)
        mine, theirs = (out.argmax(1) for out in outputs)
        fooled = (mine != y, theirs != y)
        adversarial = sum((loss * ~done).mean() for loss, done in zip(losses, fooled)) / 2
        shared = fooled[0] & fooled[1] & (mine == theirs)
        a, b = (out.to(torch.promote_types(out.dtype, torch.float32)) for out in outputs)
        apart = (jensen_shannon(a, b) * ~shared).mean()
        config = self.config
        return config.beta_shared * apart - config.beta_adversarial * adversarial, not bool(shared.all())
