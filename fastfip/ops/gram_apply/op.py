"""Op `gram_apply`: attention without the softmax.

    out[n, t] = sum_u (q[n, t] . k[n, u]) v[n, u]          q [N, T, D], k [N, U, D], v [N, U, E] -> [N, T, E]

Two ways give it, and the cheaper is taken: (q k^T) v, with T U (D + E) products, or q (k^T v), with (T + U) D E. What
lies between the two products is held for a few samples at a time. It is the derivative of every ghost norm,

    d s[n] / d g[n] = 2 gram_apply(a, a, g)[n]          d s[n] / d a[n] = 2 gram_apply(g, g, a)[n]

and its own: with w the gradient at out,

    dq = gram_apply(w, v, k)          dk = gram_apply(v, w, q)          dv = gram_apply(k, q, w)

so it has derivatives of every order. The result has the dtype of q; sums are float64 for float64, float32 otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastfip.ops.backends import cuda, triton
from fastfip.ops.memory import CHUNK, accumulation_dtype
from fastfip.ops.registry import Backend, Op

LIBRARY = torch.library.Library("fastfip", "FRAGMENT")
LIBRARY.define("gram_apply(Tensor q, Tensor k, Tensor v, str backend) -> Tensor")


def prefers_gram(t: int, u: int, d: int, e: int) -> bool:
    """Whether (q k^T) v needs fewer products than q (k^T v)."""
    return t * u * (d + e) < (t + u) * d * e


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Define the op, a few samples at a time."""
    n, t, d = q.shape
    u, e = v.shape[1:]
    out = q.new_empty(n, t, e)
    acc = accumulation_dtype(q.dtype)
    gram = prefers_gram(t, u, d, e)
    step = max(1, min(n, CHUNK // max(1, t * u if gram else d * e)))
    for low in range(0, n, step):
        part = slice(low, low + step)
        qn, kn, vn = (x[part].to(acc) for x in (q, k, v))
        product = (qn @ kn.mT) @ vn if gram else qn @ (kn.mT @ vn)
        out[part] = product
    return out


def _triton(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from fastfip.ops.gram_apply.triton import gram_apply as run  # imports triton

    return run(q, k, v)


def _cuda(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from fastfip.ops.gram_apply.cuda import gram_apply as run

    gram = prefers_gram(q.shape[1], k.shape[1], k.shape[2], v.shape[2])
    return run(q, k, v) if gram else reference(q, k, v)


# triton: always (q k^T) v, with tiles of the Gram matrix in registers; cuda: the same where that is the cheaper way.
# Neither is chosen by itself before its tests have passed on a GPU.
GRAM_APPLY = Op(
    "gram_apply",
    (
        Backend("triton", _triton, lambda q, k, v: triton.refuses(q, k, v), automatic=False),
        Backend("cuda", _cuda, cuda.refuses, automatic=False),
        Backend("reference", reference),
    ),
)


def _run(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    return GRAM_APPLY[backend].run(q, k, v)


LIBRARY.impl("gram_apply", _run, "CompositeExplicitAutograd")


@torch.library.register_fake("fastfip::gram_apply", lib=LIBRARY)
def _fake(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


def _under_vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
    """One more batch axis is more samples."""
    size, backend = info.batch_size, inputs[3]
    moved = [
        x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in zip(inputs[:3], in_dims[:3])
    ]  # fmt: skip
    out = torch.ops.fastfip.gram_apply(*(x.flatten(0, 1) for x in moved), backend)
    return out.unflatten(0, (size, inputs[0].shape[0] if in_dims[0] is None else moved[0].shape[1])), 0


torch.library.register_vmap("fastfip::gram_apply", _under_vmap, lib=LIBRARY)


class _GramApply(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        return torch.ops.fastfip.gram_apply(q, k, v, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.backend = inputs[3]

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        need, again = ctx.needs_input_grad, ctx.backend
        dq = _GramApply.apply(w, v, k, again).to(q.dtype) if need[0] else None
        dk = _GramApply.apply(v, w, q, again).to(k.dtype) if need[1] else None
        dv = _GramApply.apply(k, q, w, again).to(v.dtype) if need[2] else None
        return dq, dk, dv, None


def gram_apply(
    q: Tensor,  # [N, T, D]
    k: Tensor,  # [N, U, D]
    v: Tensor,  # [N, U, E]
    *,
    backend: str = "auto",
) -> Tensor:  # [N, T, E]
    """Return sum_u (q[n, t] . k[n, u]) v[n, u] for every n and t, in the dtype of q; it has derivatives of every order.

    Any strides and any of float32, float64, bfloat16 and float16.

    Raises:
        ValueError: the shapes do not fit each other.
        BackendError: the backend asked for cannot run here.

    Source: linear attention (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 5).
    """
    fits = q.dim() == k.dim() == v.dim() == 3 and q.shape[0] == k.shape[0] == v.shape[0]
    if not fits or q.shape[2] != k.shape[2] or k.shape[1] != v.shape[1]:
        raise ValueError(
            f"gram_apply needs q [N, T, D], k [N, U, D] and v [N, U, E], not {list(q.shape)}, {list(k.shape)} and"
            f" {list(v.shape)}"
        )
    return _GramApply.apply(q, k, v, GRAM_APPLY.choose(backend, q, k, v).name)
