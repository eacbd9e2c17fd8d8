"""BatchNorm that is frozen altogether, as what it then is: a scale and an offset for each channel.

In eval mode and without a gradient of its affine part it is `x * scale + offset`. torch's own operation keeps x for the
backward pass and sums over it for gradients that nobody asked for; this one keeps nothing of the size of x.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["FrozenNorms"]


class FrozenNorms:
    """The BatchNorm layers of a model; while `put`, those that are frozen at a call compute as scale and offset."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        own = {nn.BatchNorm1d.forward, nn.BatchNorm2d.forward, nn.BatchNorm3d.forward}  # all one function
        self.norms = [m for m in modules if isinstance(m, _BatchNorm) and type(m).forward in own]
        self.inside: list[_BatchNorm] = []

    def put(self) -> None:
        """Replace the layers' forward; scale and offset are taken anew whenever the statistics have moved."""
        self.remove()
        for norm in self.norms:
            if "forward" in norm.__dict__ or norm.running_mean is None or norm.running_var is None:
                continue
            norm.__dict__["forward"] = _forward(norm)
            self.inside.append(norm)

    def remove(self) -> None:
        """Give the layers their own forward back."""
        for norm in self.inside:
            norm.__dict__.pop("forward", None)
        self.inside.clear()


def _forward(norm: _BatchNorm):  # type: ignore[no-untyped-def]
    cached: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def forward(x: Tensor) -> Tensor:
        tuned = any(p is not None and p.requires_grad for p in (norm.weight, norm.bias))
        # Numbers of low precision are normalised in float32 inside torch's operation, which this one could not do.
        if norm.training or tuned or x.dtype not in (torch.float32, torch.float64) or x.dim() < 3:
            return type(norm).forward(norm, x)
        assert norm.running_mean is not None and norm.running_var is not None
        if torch.compiler.is_compiling():  # versions are not for its eyes
            return _scaled(x, *_constants(norm, x.dtype))
        parts = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        state = (x.dtype, *((id(p), None if p is None else p._version) for p in parts))
        if state not in cached:
            cached.clear()
            cached[state] = _constants(norm, x.dtype)
        return _scaled(x, *cached[state])

    return forward


def _scaled(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    scale, offset = (c.view(-1, *[1] * (x.dim() - 2)) for c in (scale, offset))
    return torch.addcmul(offset, x, scale)


@torch.no_grad()
def _constants(norm: _BatchNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    offset = -norm.running_mean.double() * scale
    if norm.bias is not None:
        offset = offset + norm.bias
    return scale.to(dtype), offset.to(dtype)
