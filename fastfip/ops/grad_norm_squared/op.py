"""Op `grad_norm_squared`: the squared norm of each per-sample weight gradient (the Fisher trace, sample by sample).

    s[n] = || G_n ||_F^2,     G_n[o, i] = sum_t g[n, t, o] a[n, t, i]

g [N, T, O] is the gradient of each sample's own loss at the output of a linear map, a [N, T, I] its input. Of two ways
the cheaper is taken: G_n itself (2 T O I operations), or the two Gram matrices over t (2 T^2 (O + I)). G_n is not kept,
the backward forms it again, a few samples at a time; Gram matrices are kept where they are no larger than g and a:

    ds[n]/dg[n] = 2 a_n G_n^T = 2 (a_n a_n^T) g_n          ds[n]/da[n] = 2 g_n G_n = 2 (g_n g_n^T) a_n

The result is float64 for float64 and float32 otherwise. Differentiable any number of times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastfip.ops.backends import cuda, native, triton
from fastfip.ops.grad_norm_squared import native as kernel
from fastfip.ops.grad_norm_squared.autograd import define, differentiable
from fastfip.ops.grad_norm_squared.gram import gram, prefers_gram
from fastfip.ops.memory import CHUNK, accumulation_dtype
from fastfip.ops.registry import Backend, Op


def reference(g: Tensor, a: Tensor) -> Tensor:
    """Define the op, in differentiable torch operations."""
    acc = accumulation_dtype(g.dtype)
    g, a = g.to(acc), a.to(acc)
    if g.shape[1] == 1:
        return g.square().sum((1, 2)) * a.square().sum((1, 2))
    if prefers_gram(g.shape[1], g.shape[2], a.shape[2]):
        return ((g @ g.transpose(1, 2)) * (a @ a.transpose(1, 2))).sum((1, 2))
    return (g.transpose(1, 2) @ a).square().sum((1, 2))


def _grams(g: Tensor, a: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """G g^T and a a^T for each of B, in out [B, 2, T, T] if there is one."""
    return gram(g, None if out is None else out[:, 0]), gram(a, None if out is None else out[:, 1])


def keeps(g: Tensor, a: Tensor) -> bool:
    """Whether the Gram matrices are formed, and kept for the backward: where they are no larger than g and a.

    The backward then has two products with them to make; of G_n it would have three.
    """
    t, o, i = g.shape[1], g.shape[2], a.shape[2]
    return t > 1 and 2 * t <= o + i and t * (o + i) < 2 * o * i


def _step(samples: int, each: int) -> int:
    return max(1, min(samples, CHUNK // max(1, each)))


def _squared(x: Tensor) -> Tensor:
    """Squared norm of each row, without their squares in memory."""
    return torch.linalg.vecdot(x, x)


def _dense(g: Tensor, a: Tensor, kept: Tensor | None = None) -> Tensor:
    """S [N]; the Gram matrices go to `kept` [N, 2, T, T] if there is one."""
    n, t, o = g.shape
    acc = accumulation_dtype(g.dtype)
    if t == 1:
        return _squared(g[:, 0].to(acc)) * _squared(a[:, 0].to(acc))
    i = a.shape[2]
    by_gram = kept is not None or prefers_gram(t, o, i)
    step, out = _step(n, 2 * t * t if by_gram else o * i), g.new_empty(n, dtype=acc)
    for k in range(0, n, step):
        part = slice(k, k + step)
        gn, an = g[part].to(acc), a[part].to(acc)
        if by_gram:
            one, two = _grams(gn, an, None if kept is None else kept[part])
            out[part] = torch.linalg.vecdot(one.flatten(1), two.flatten(1))
        else:
            out[part] = (gn.mT @ an).flatten(1).square().sum(1)
    return out


def _dense_gradients(g: Tensor, a: Tensor, v: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gradients of sum_n v[n] s[n]."""
    n, t, o = g.shape
    i, acc = a.shape[2], v.dtype
    if t == 1:
        g1, a1, twice = g.to(acc), a.to(acc), 2 * v
        dg = g1 * (twice * _squared(a1[:, 0]))[:, None, None]
        da = a1 * (twice * _squared(g1[:, 0]))[:, None, None]
        return dg.to(g.dtype).contiguous(), da.to(a.dtype).contiguous()
    dg, da = (torch.empty_like(x, dtype=acc, memory_format=torch.contiguous_format) for x in (g, a))
    kept = kept if kept is not None and kept.numel() else None
    by_gram = kept is not None or prefers_gram(t, o, i)
    step = _step(n, 2 * t * t if by_gram else o * i)
    for k in range(0, n, step):
        part = slice(k, k + step)
        gn, an, twice = g[part].to(acc), a[part].to(acc), 2 * v[part, None, None]
        if by_gram:
            one, two = _grams(gn, an) if kept is None else kept[part].unbind(1)
            torch.bmm(two * twice, gn, out=dg[part])
            torch.bmm(one * twice, an, out=da[part])
            continue
        product = (gn.mT @ an).mul_(twice)
        torch.bmm(an, product.mT, out=dg[part])
        torch.bmm(gn, product, out=da[part])
    return dg.to(g.dtype), da.to(a.dtype)


def _native(g: Tensor, a: Tensor) -> Tensor:
    """G_n by the native kernel; where that is not the cheaper way, the reference."""
    direct = g.shape[1] > 1 and not prefers_gram(g.shape[1], g.shape[2], a.shape[2])
    return kernel.grad_norm_squared(g, a) if direct else _dense(g, a)


def _triton(g: Tensor, a: Tensor) -> Tensor:
    from fastfip.ops.grad_norm_squared.triton import grad_norm_squared as run  # imports triton

    return reference(g, a) if g.shape[1] == 1 else run(g, a, prefers_gram(g.shape[1], g.shape[2], a.shape[2]))


def _cuda(g: Tensor, a: Tensor) -> Tensor:
    from fastfip.ops.grad_norm_squared.cuda import grad_norm_squared as run

    return reference(g, a) if g.shape[1] == 1 else run(g, a, prefers_gram(g.shape[1], g.shape[2], a.shape[2]))


# triton, cuda: not chosen by themselves before their tests have passed on a GPU.
GRAD_NORM_SQUARED = Op(
    "grad_norm_squared",
    (
        Backend("native", _native, native.refuses),
        Backend("triton", _triton, triton.refuses, automatic=False),
        Backend("cuda", _cuda, cuda.refuses, automatic=False),
        Backend("reference", _dense),
    ),
)


def _run(g: Tensor, a: Tensor, backend: str, keep: bool) -> tuple[Tensor, Tensor]:
    t = g.shape[1]
    kept = g.new_empty(g.shape[0], 2 if keep else 0, t, t, dtype=accumulation_dtype(g.dtype))
    if keep:
        return _dense(g, a, kept), kept
    return GRAD_NORM_SQUARED[backend].run(g, a), kept


define(_run, _dense_gradients)


def grad_norm_squared(
    g: Tensor,  # [N, T, O]
    a: Tensor,  # [N, T, I]
    *,
    backend: str = "auto",
) -> Tensor:  # [N]
    """Return s[n] = || sum_t g[n, t, :] a[n, t, :]^T ||_F^2, float64 for float64 and float32 otherwise.

    Raises:
        ValueError: the shapes do not fit each other.
        BackendError: the backend asked for cannot run here.

    Source: the "ghost norm" of Goodfellow 2015 (arXiv 1510.01799) and Li et al. 2022 (arXiv 2110.05679).
    """
    if g.dim() != 3 or a.dim() != 3 or g.shape[:2] != a.shape[:2]:
        raise ValueError(
            f"grad_norm_squared needs g [N, T, O] and a [N, T, I], not {list(g.shape)} and {list(a.shape)}"
        )
    chosen = GRAD_NORM_SQUARED.choose(backend, g, a).name
    once_more = torch.is_grad_enabled() and (g.requires_grad or a.requires_grad)
    return differentiable(g, a, chosen, once_more and chosen not in ("triton", "cuda") and keeps(g, a))
