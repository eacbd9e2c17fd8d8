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
        if torch.compiler.is_compiling():  # versions are not for its eyes
            return _scaled(x, *torch.ops.fastfip.norm_constants(*_parts(norm), norm.eps, x.dtype == torch.float64))
        state = (x.dtype, *((id(p), None if p is None else p._version) for p in _parts(norm)))
        if state not in cached:
            cached.clear()
            cached[state] = _constants(*_parts(norm), norm.eps, x.dtype == torch.float64)
        return _scaled(x, *cached[state])

    return forward


def _scaled(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    scale, offset = (c.view(-1, *[1] * (x.dim() - 2)) for c in (scale, offset))
    return torch.addcmul(offset, x, scale)


Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def _parts(norm: _BatchNorm) -> Parts:
    assert norm.running_mean is not None and norm.running_var is not None
    return norm.running_mean, norm.running_var, norm.weight, norm.bias


@torch.no_grad()
def _constants(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, double: bool
) -> tuple[Tensor, Tensor]:
    scale = (var.double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    offset = -mean.double() * scale
    if bias is not None:
        offset = offset + bias
    dtype = torch.float64 if double else torch.float32
    return scale.to(dtype), offset.to(dtype)


def _fake(mean: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if rest[-1] else torch.float32
    return torch.empty_like(mean, dtype=dtype), torch.empty_like(mean, dtype=dtype)


# An operator, because a compiler would fuse it into the loop over the map and take every root once for each position.
LIBRARY = torch.library.Library("fastfip", "FRAGMENT")
LIBRARY.define(
    "norm_constants(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, bool double) -> (Tensor, Tensor)"
)
LIBRARY.impl("norm_constants", _constants, "CompositeExplicitAutograd")
torch.library.register_fake("fastfip::norm_constants", _fake, lib=LIBRARY)
