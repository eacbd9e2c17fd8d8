"""Channel Lipschitzness based Pruning (CLP, Zheng et al., ECCV 2022, arXiv 2208.03111)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fastfip.data.batch import Batch
from fastfip.errors import ModelError
from fastfip.methods._classifier import Classifier
from fastfip.methods._masks import weights_of
from fastfip.methods.base import Groups, Method, MethodConfig, Run, register, setting

__all__ = ["CLP", "CLPConfig", "channel_lipschitz"]


@dataclass(frozen=True)
class CLPConfig(MethodConfig):
    """Settings of CLP. The paper and its code take 3 for CIFAR-10; smaller prunes more."""

    epochs: int | None = setting(None, "none: channels are pruned at once", low=1)
    steps: int | None = setting(1, "one: channels are pruned at once", low=1)
    bn_mode: Literal["train", "eval", "freeze"] = setting("eval", "BatchNorm's running statistics are kept")
    select: Literal["best", "last"] = setting("last", "nothing is chosen by a score")
    holdout: float = setting(0.0, "share of the clean set that is not used; 0: none", low=0, high=0.5)
    u: float = setting(3.0, "standard deviations above a layer's mean from which a channel is pruned", above=0)


@torch.no_grad()
def channel_lipschitz(weight: Tensor, norm: _BatchNorm | None = None) -> Tensor:
    """Return the upper bounds [out] of the Lipschitz constants of a layer's channels, BatchNorm included.

    sigma_k = |gamma_k| / sqrt(var_k + eps) * ||W_k||_2, W_k the weight of output channel k as a matrix
    [inputs, positions of the kernel] (the paper's equation 8).

    Args:
        weight: [out, in, ...] of a convolution, or [out, in] of a Linear layer, whose rows are their own norms.
        norm: the BatchNorm after it; None: there is none, and its factor is 1.
    """
    rows = weight.detach().flatten(2).double() if weight.dim() > 2 else weight.detach().double()[:, None]
    size = torch.linalg.matrix_norm(rows, 2)
    if norm is None:
        return size
    assert norm.running_var is not None
    return size * norm.weight.detach().double().abs() / (norm.running_var.double() + norm.eps).sqrt()


class _Layer(NamedTuple):
    """Channels that can be pruned: their bounds [out], and the tensors [out, ...] that become zero for a pruned one."""

    bounds: Tensor
    owned: list[nn.Parameter]


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
            if last is not None and plain and width == module.num_features:
                yield last, module
            last = None


def _layers(run: Run) -> list[_Layer]:
    out: list[_Layer] = []
    for layer, norm in _pairs(run.model):
        owned = list(norm.parameters(recurse=False))
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if not any(id(p) in run.frozen for p in owned):
            out.append(_Layer(channel_lipschitz(weight, norm), owned))
    if out or run.batchnorms:
        return out
    places = Classifier.of(run).spared(weights_of(run.model, frozen=run.frozen))
    for _, module, name in places:
        row, bias = (module._parameters.get(key) for key in (name, "bias"))
        if row is not None and not isinstance(module, _ConvTransposeNd):
            mine = [p for p in (row, bias) if p is not None and id(p) not in run.frozen]
            out.append(_Layer(channel_lipschitz(row), mine))
    if out:
        run.note("no BatchNorm after a layer: its channels were compared by their weights alone")
    return out


@register
class CLP(Method):
    """Prune the channels that can change most: those with an unusually large Lipschitz bound. No image is used.

    In each layer with a BatchNorm after it, a channel k with sigma_k > mean + u * std (over the layer's channels) is
    pruned: the weight and bias of its BatchNorm become zero. In a network without BatchNorm, the rows of the weights
    are compared and pruned, except those of the classifier.
    """

    name = "clp"
    summary = "Channel Lipschitzness based Pruning: outlying channels are pruned, by the weights alone"
    Config = CLPConfig

    def setup(self, run: Run) -> None:
        """Find the layers and the bounds of their channels."""
        self.layers = _layers(run)
        if not self.layers:
            raise ModelError(
                "clp finds no channels to prune: no layer before the classifier, or each BatchNorm is frozen, or "
                "has no weights or statistics"
            )
        if not all(bool(torch.isfinite(layer.bounds).all()) for layer in self.layers):
            raise ModelError("clp needs finite weights and variances: there are others in this model")

    def parameter_groups(self, run: Run) -> Groups:
        """What is pruned; the optimiser does not move it."""
        return [{"params": [p for layer in self.layers for p in layer.owned]}]

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
        gone = 0
        for bounds, owned in self.layers:
            if len(bounds) < 2:
                continue
            outlying = bounds > bounds.mean() + config.u * bounds.std()
            gone += int(outlying.sum())
            for p in owned:
                p[outlying] = 0
        run.note(f"{gone} of {sum(len(layer.bounds) for layer in self.layers)} channels pruned")
