"""Channel Lipschitzness based Pruning (CLP, Zheng et al., ECCV 2022, arXiv 2208.03111)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fastfip.data.batch import Batch
from fastfip.errors import ModelError
from fastfip.methods.base import Groups, Method, MethodConfig, Run, register, setting

__all__ = ["CLP", "CLPConfig", "channel_lipschitz"]


@dataclass(frozen=True)
class CLPConfig(MethodConfig):
    """Settings of CLP. The paper and its code take 3 for CIFAR-10; smaller prunes more."""

    epochs: int | None = setting(None, "none: channels are pruned at once", low=1)
    steps: int | None = setting(1, "one: channels are pruned at once", low=1)
    bn_mode: Literal["eval"] = setting("eval", "BatchNorm's running statistics are kept: no image is used")
    select: Literal["last"] = setting("last", "nothing is chosen by a score")
    holdout: float = setting(0.0, "none: no image is used", low=0, high=0)
    u: float = setting(3.0, "standard deviations above a layer's mean from which a channel is pruned", above=0)


@torch.no_grad()
def channel_lipschitz(weight: Tensor, norm: _BatchNorm) -> Tensor:
    """Return the upper bounds [out] of the Lipschitz constants of a layer's channels, BatchNorm included.

    sigma_k = |gamma_k| / sqrt(var_k + eps) * ||W_k||_2, W_k the weight of output channel k as a matrix
    [inputs, positions of the kernel] (the paper's equation 8).

    Args:
        weight: [out, in, ...] of a convolution, or [out, in] of a Linear layer, whose rows are their own norms.
        norm: the BatchNorm after it.
    """
    rows = weight.detach().flatten(2).double() if weight.dim() > 2 else weight.detach().double()[:, None]
    size = torch.linalg.matrix_norm(rows, 2)
    assert norm.running_var is not None
    return size * norm.weight.detach().double().abs() / (norm.running_var.double() + norm.eps).sqrt()


def _pairs(model: nn.Module) -> Iterator[tuple[nn.Module, _BatchNorm]]:
    """Pair each BatchNorm with weights and running statistics with the layer before it, in the order of the modules.

    The paper's code pairs them so. Layers whose channels are not those of the BatchNorm (one that comes first in its
    block, as in a DenseNet) are no pair.
    """
    last: nn.Module | None = None
    for module in model.modules():
        if isinstance(module, (_ConvNd, nn.Linear)):
            last = module
        elif isinstance(module, _BatchNorm):
            width = getattr(last, "out_channels", None) or getattr(last, "out_features", None)
            plain = module.running_var is not None and module.affine and not isinstance(last, _ConvTransposeNd)
            if last is not None and plain and width == module.num_features > 1:
                yield last, module
            last = None


@register
class CLP(Method):
    """Prune the channels that can change most: those with an outlying Lipschitz bound. No image is looked at.

    In each layer with a BatchNorm after it, a channel k with sigma_k > mean + u * std (over the layer's channels) is
    pruned: its BatchNorm's weight and bias become zero.
    """

    name = "clp"
    summary = "Channel Lipschitzness based Pruning: outlying channels are pruned, by the weights alone"
    Config = CLPConfig

    def setup(self, run: Run) -> None:
        """Find the layers with a BatchNorm after them."""
        self.pairs = [
            (layer, norm)
            for layer, norm in _pairs(run.model)
            if not {id(p) for p in norm.parameters(recurse=False)} & run.frozen
        ]
        if not self.pairs:
            raise ModelError(
                "clp compares channels through the BatchNorm after them, and this model has no BatchNorm with running "
                "statistics after a convolution or Linear layer: take another method"
            )

    def parameter_groups(self, run: Run) -> Groups:
        """The BatchNorm layers' weights and biases, which the optimiser does not move."""
        return [{"params": [p for _, norm in self.pairs for p in norm.parameters(recurse=False)]}]

    @torch.no_grad()
    def backward(self, run: Run, batch: Batch) -> dict[str, float | Tensor]:
        """Only tell the loss: there is no gradient."""
        with run.autocast():
            return {"loss": self.loss(run, batch)}

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Prune, in the first step."""
        if run.step:
            return
        config = run.config
        assert isinstance(config, CLPConfig)
        gone = total = 0
        for layer, norm in self.pairs:
            weight = layer.weight
            assert isinstance(weight, Tensor)
            bound = channel_lipschitz(weight, norm)
            if not bool(torch.isfinite(bound).all()):
                raise ModelError("clp needs finite weights and variances")
            outlying = bound > bound.mean() + config.u * bound.std()
            gone, total = gone + int(outlying.sum()), total + len(bound)
            for p in norm.parameters(recurse=False):
                p[outlying] = 0
        run.note(f"{gone} of {total} channels pruned")
