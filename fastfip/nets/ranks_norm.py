"""BatchNorm in train mode over the rows of all ranks: the statistics of the whole batch, on any device.

`torch.nn.SyncBatchNorm` runs on CUDA only, and would have to take the places of the model's own layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from fastfip.nets.ranks import Ranks

__all__ = ["SharedNorms"]


class SharedNorms(TorchFunctionMode):
    """Stands in for `torch.nn.functional.batch_norm` in train mode; whatever module calls it stays as it is."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take the statistics over all ranks where the call asks for those of the batch."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.batch_norm:
            values = dict(zip(_NAMES, args), **kwargs)
            if values.get("training"):
                return _over_ranks(self.ranks, **values)
        return func(*args, **kwargs)


_NAMES = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


def _over_ranks(
    ranks: Ranks,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise [N, C, ...] by mean and variance over everything but C, of the rows of all ranks."""
    y, mean, var, count = _Normalised.apply(input, weight, bias, eps, ranks)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            unbiased = var * (count / (count - 1).clamp_min(1))
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    result: Tensor = y
    return result


class _Normalised(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, and the gradient through mean and var of all ranks' rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, ranks: Ranks
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        axes = [0, *range(2, x.dim())]
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide, axes, correction=0)
        mine = torch.stack([mean.double(), var.double(), torch.full_like(mean, x.numel() / x.shape[1]).double()])
        means, variances, counts = torch.cat(ranks.parts(mine[None], [1] * ranks.world, "batchnorm")).unbind(1)
        count = counts.sum(0)
        mean = (means * counts).sum(0) / count
        var = ((variances + (means - mean).square()) * counts).sum(0) / count  # parts and what lies between them
        mean, var = mean.to(wide.dtype), var.to(wide.dtype)
        y = torch.nn.functional.batch_norm(wide, mean, var, weight, bias, False, 0.0, eps).to(x.dtype)
        ctx.ranks, ctx.axes, ctx.eps = ranks, axes, eps
        ctx.save_for_backward(x, weight, bias, mean, var, count)
        ctx.save_for_forward(x, weight, bias, mean, var, count)
        samples = count.to(wide.dtype)
        ctx.mark_non_differentiable(mean, var, samples)
        return y, mean, var, samples

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, d_weight: Tensor | None, d_bias: Tensor | None, *_: None) -> Any:
        x, weight, _bias, mean, var, count = ctx.saved_tensors
        shape = [1, -1, *([1] * (x.dim() - 2))]
        scale = (var + ctx.eps).rsqrt().view(shape)
        unit = (x.to(mean.dtype) - mean.view(shape)) * scale
        dy = torch.zeros_like(unit)
        if dx is not None:
            dx = dx.to(mean.dtype)
            sums = torch.stack([dx.sum(ctx.axes), (dx * unit).sum(ctx.axes)]).to(torch.float64, copy=True)
            ctx.ranks.sum_([sums], "batchnorm")
            of_mean, of_unit = (sums / count).to(mean.dtype)
            dy = (dx - of_mean.view(shape) - unit * of_unit.view(shape)) * scale
            dy = dy if weight is None else dy * weight.to(dy.dtype).view(shape)
        if d_weight is not None:
            dy = dy + unit * d_weight.to(dy.dtype).view(shape)
        if d_bias is not None:
            dy = dy + d_bias.to(dy.dtype).view(shape)
        return dy.to(x.dtype), None, None, None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> Any:
        x, weight, bias, mean, var, count = ctx.saved_tensors
        shape = [1, -1, *([1] * (x.dim() - 2))]
        scale = (var + ctx.eps).rsqrt()
        dy = dy.to(mean.dtype)
        unit = (x.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
        sums = torch.stack([dy.sum(ctx.axes), (dy * unit).sum(ctx.axes)])
        d_bias = sums[0].to(bias.dtype) if bias is not None and ctx.needs_input_grad[2] else None
        d_weight = sums[1].to(weight.dtype) if weight is not None and ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, d_weight, d_bias, None, None
        total = sums.to(torch.float64, copy=True)
        ctx.ranks.sum_([total], "batchnorm")
        of_mean, of_unit = (total / count).to(mean.dtype)
        dx = dy - of_mean.view(shape) - unit * of_unit.view(shape)
        scale = scale if weight is None else scale * weight.to(scale.dtype)
        return (dx * scale.view(shape)).to(x.dtype), d_weight, d_bias, None, None
