"""Autograd and tracing of `grad_norm_squared`: the op as torch sees it.

With v the gradient at s, and A(q, k, v) the op gram_apply:

    first:   dg = 2 v A(a, a, g)                             da = 2 v A(g, g, a)
    second:  with x, y the gradients at dg, da
             dg = 2 v (A(a, a, x) + A(y, a, g) + A(a, y, g)) da = 2 v (A(g, g, y) + A(x, g, a) + A(g, x, a))
             dv = 2 (<x, A(a, a, g)> + <y, A(g, g, a)>)       for each sample

The first is an op by itself, since both results come from one product per sample. All others are gram_apply, which is
its own derivative, so every order exists and none stores a product for every sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastfip.ops.gram_apply.op import gram_apply
from fastfip.ops.memory import accumulation_dtype

LIBRARY = torch.library.Library("fastfip", "FRAGMENT")
# With `keep` the second result is what the backward can use again [N, 2, T, T], else it is empty [N, 0, T, T].
LIBRARY.define("grad_norm_squared(Tensor g, Tensor a, str backend, bool keep=False) -> (Tensor, Tensor)")
LIBRARY.define("grad_norm_squared_backward(Tensor g, Tensor a, Tensor v, Tensor? kept=None) -> (Tensor, Tensor)")


def define(
    forward: Callable[[Tensor, Tensor, str, bool], tuple[Tensor, Tensor]],
    backward: Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]],
) -> None:
    """Give the ops their implementations."""

    def with_default(g: Tensor, a: Tensor, backend: str, keep: bool = False) -> tuple[Tensor, Tensor]:
        return forward(g, a, backend, keep)

    def without_kept(g: Tensor, a: Tensor, v: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return backward(g, a, v, kept)

    LIBRARY.impl("grad_norm_squared", with_default, "CompositeExplicitAutograd")
    LIBRARY.impl("grad_norm_squared_backward", without_kept, "CompositeExplicitAutograd")


@torch.library.register_fake("fastfip::grad_norm_squared", lib=LIBRARY)
def _fake(g: Tensor, a: Tensor, backend: str, keep: bool = False) -> tuple[Tensor, Tensor]:
    (n, t), acc = g.shape[:2], accumulation_dtype(g.dtype)
    return g.new_empty(n, dtype=acc), g.new_empty(n, 2 if keep else 0, t, t, dtype=acc)


@torch.library.register_fake("fastfip::grad_norm_squared_backward", lib=LIBRARY)
def _fake_backward(g: Tensor, a: Tensor, v: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    dg, da = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (g, a))
    return dg, da


def _more_samples(info: Any, in_dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """One more batch axis is more samples."""
    size = info.batch_size
    moved = (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, in_dims))
    return [x.flatten(0, 1) for x in moved]


def _parted(info: Any, *results: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    size = info.batch_size
    return tuple(x.reshape(size, x.shape[0] // size, *x.shape[1:]) for x in results), (0,) * len(results)


def _under_vmap(
    info: Any, in_dims: tuple[int | None, ...], g: Tensor, a: Tensor, backend: str, keep: bool = False
) -> Any:
    return _parted(info, *torch.ops.fastfip.grad_norm_squared(*_more_samples(info, in_dims, (g, a)), backend, keep))


def _backward_under_vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> Any:
    return _parted(info, *torch.ops.fastfip.grad_norm_squared_backward(*_more_samples(info, in_dims, inputs)))


torch.library.register_vmap("fastfip::grad_norm_squared", _under_vmap, lib=LIBRARY)
torch.library.register_vmap("fastfip::grad_norm_squared_backward", _backward_under_vmap, lib=LIBRARY)


class _GradNormSquaredBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, a: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.fastfip.grad_norm_squared_backward(g, a, v, kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor | None, ...]:
        saved_g, saved_a, v = ctx.saved_tensors
        g, a, x, y = (tensor.to(v.dtype) for tensor in (saved_g, saved_a, x, y))
        twice = 2 * v[:, None, None]
        dg = twice * (gram_apply(a, a, x) + gram_apply(y, a, g) + gram_apply(a, y, g))
        da = twice * (gram_apply(g, g, y) + gram_apply(x, g, a) + gram_apply(g, x, a))
        dv = None
        if ctx.needs_input_grad[2]:
            dv = 2 * ((x * gram_apply(a, a, g)).sum((1, 2)) + (y * gram_apply(g, g, a)).sum((1, 2)))
        return dg.to(saved_g.dtype), da.to(saved_a.dtype), dv, None


class _GradNormSquared(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, a: Tensor, backend: str, keep: bool) -> tuple[Tensor, Tensor]:
        return torch.ops.fastfip.grad_norm_squared(g, a, backend, keep)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:2], output[1])

    @staticmethod
    def backward(ctx: Any, v: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        g, a, kept = ctx.saved_tensors
        dg, da = _GradNormSquaredBackward.apply(g, a, v, kept)
        return dg, da, None, None


def differentiable(g: Tensor, a: Tensor, backend: str, keep: bool = False) -> Tensor:
    """Return s [N] of g [N, T, O] and a [N, T, I], by that backend; `keep`: see the op."""
    return _GradNormSquared.apply(g, a, backend, keep)[0]
