"""Fine-tuning with adaptive sharpness-aware minimisation (FT-SAM, Zhu et al., ICCV 2023, arXiv 2304.11823)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastfip.data.batch import Batch
from fastfip.methods.base import Groups, Method, MethodConfig, Run, register, setting

__all__ = ["FTSAM", "FTSAMConfig", "adaptive_perturbation"]

#: Up to so many classes the settings of the paper's CIFAR-10 runs hold, beyond those of GTSRB and Tiny-ImageNet.
FEW_CLASSES = 10


@dataclass(frozen=True)
class FTSAMConfig(MethodConfig):
    """Settings of FT-SAM: those of the paper, whose GTSRB runs had 50 epochs, and a clipped gradient.

    The clipping is ours. In a model without normalisation layers, the loss at radius 2 is so steep that the paper's
    steps lead to chance level on clean data in the first epoch (a single trial on MNIST: held-out accuracy 0.23, and
    0.90 with clipping).
    """

    epochs: int | None = setting(100, "passes over the clean set", low=1)
    batch_size: int | None = setting(256, "samples in a step; None: the batch size of the loader", low=1)
    weight_decay: float = setting(5e-4, "weight decay", low=0)
    grad_clip: float | None = setting(5.0, "largest norm of the gradient; None: not clipped", above=0)
    augment: Literal["none", "crop", "crop_flip"] = setting(
        "crop",
        "random changes of the clean images: moved by up to an eighth (crop), also mirrored (crop_flip)",
    )
    select: Literal["best", "last"] = setting(
        "last", "which epoch is kept: the best by held-out clean score, or the last"
    )
    rho: float | None = setting(
        None, "radius of the perturbation; None: the paper's 2 for up to 10 classes, 8 for more", above=0
    )
    eta: float = setting(0.0, "added to |w| in the perturbation, so that weights of zero move too (ASAM)", low=0)
    label_smoothing: float | None = setting(  # type: ignore[assignment]  # resolved before anything reads it
        None, "label smoothing; None: the paper's 0.1 for up to 10 classes, 0 for more", low=0, below=1
    )


@register
class FTSAM(Method):
    """Tune every parameter by the gradient at the worst near-by weights, near measured relative to each weight.

        min_w max_{||eps / |w||_2 <= rho} L(w + eps),    eps = rho * w^2 g / ||w g||_2,    g = grad L(w)

    The norm is over all parameters. Both passes normalise by the batch's statistics (`bn_mode="train"`); running
    statistics are updated by the first only.

    Differences from the version in BackdoorBench: the cosine runs once over all steps (there it changes with each
    batch, has a period of 200 steps and ends at its largest value). Weights are restored from a copy and not by a
    subtraction, so that nothing is lost in low precision. rho and label smoothing are the paper's for the size of the
    data set (there the defaults of the command line replace them). No part of the gradient is decomposed.

    That code crops its clean images at random, and mirrors those of CIFAR-10. This matters a lot: without it
    (`augment="none"`), the model fits a few thousand images before its weights have moved far, and a Wide ResNet 16-1
    kept its BadNets backdoor (a single trial). Crops are the default. Use `augment="crop_flip"` if a mirrored image
    keeps its class.
    """

    name = "ft_sam"
    summary = "FT-SAM: fine-tuning of every parameter with adaptive sharpness-aware minimisation"
    Config = FTSAMConfig
    over_ranks = True
    keeps = ("rho",)

    rho: float

    def setup(self, run: Run) -> None:
        """Fill in what the paper sets for each data set."""
        config = run.config
        assert isinstance(config, FTSAMConfig)
        few = run.classes is None or run.classes <= FEW_CLASSES
        self.rho = (2.0 if few else 8.0) if config.rho is None else config.rho
        if config.label_smoothing is None:
            smoothing = 0.1 if few and run.classes is not None and run.task.loss_hook is None else 0.0
            run.config = config.replace(label_smoothing=smoothing)

    def parameter_groups(self, run: Run) -> Groups:
        """All parameters."""
        self.tensors = [p for p in run.model.parameters() if p.is_floating_point()]
        return [{"params": self.tensors}]

    def backward(self, run: Run, batch: Batch) -> dict[str, float | Tensor]:
        """Take the gradient at w + eps; the weights themselves are bit by bit as they were afterwards."""
        values = super().backward(run, batch)
        tuned: list[Tensor] = [p for p in self.tensors if p.grad is not None]
        run.share(tuned)
        gradients = [p.grad for p in tuned if p.grad is not None]
        steps = adaptive_perturbation(tuned, gradients, self.rho, run.config.eta)  # type: ignore[attr-defined]
        if steps is None:
            # float16's scaler sees the overflow in these gradients and lowers its scale; else the loop skips the step.
            return values if run.scaler is not None else {**values, "loss": float("nan")}
        kept = [p.detach().clone() for p in tuned]
        try:
            with torch.no_grad():
                torch._foreach_add_(tuned, steps)
                for p in tuned:
                    p.grad = None
            with frozen_statistics(run.model):
                there = super().backward(run, batch)
        finally:
            with torch.no_grad():
                torch._foreach_copy_(tuned, kept)
        return {**values, "sharpness": torch.as_tensor(there["loss"]) - torch.as_tensor(values["loss"])}


@torch.no_grad()
def adaptive_perturbation(
    weights: list[Tensor], gradients: list[Tensor], rho: float, eta: float = 0.0
) -> list[Tensor] | None:
    """Return eps = rho * T^2 g / ||T g||_2, T = |w| + eta (FT-SAM, eq. of the inner maximum; ASAM's eta is 0 there).

    Its length in the weights' own measure is the radius: ||eps / T||_2 = rho, over all tensors together. Any common
    factor of the gradients (a loss scale) drops out.

    Args:
        weights: tensors of any shapes.
        gradients: one of the same shape for each.
        rho: the radius.
        eta: added to |w|.

    Returns:
        one tensor for each weight, of its dtype (zeros where all gradients are); None where the norm is not finite.
    """
    wide = [w.detach().to(torch.promote_types(w.dtype, torch.float32)) for w in weights]
    scale = torch._foreach_abs(wide)
    if eta:
        torch._foreach_add_(scale, eta)
    steps = torch._foreach_mul(scale, gradients)
    norms = torch._foreach_norm(steps)
    norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms]))
    if not bool(torch.isfinite(norm)):
        return None
    torch._foreach_mul_(steps, scale)
    torch._foreach_mul_(steps, float(rho / norm) if norm > 0 else 0.0)
    return [step.to(w.dtype) for step, w in zip(steps, weights)]


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Let BatchNorm in train mode normalise by the batch without touching running statistics or their counter."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
