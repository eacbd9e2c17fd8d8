"""The gradient of the Fisher trace by random signs: unbiased, noisy, and no work for single samples at all.

L_e = sum_n e_n l_n / sqrt(N),  e_n = +1 or -1 with equal chances:       E || grad L_e ||^2 = Tr F

d || grad L_e ||^2 / dW = 2 H_e grad L_e,  by a difference quotient of grad L_e along itself
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastfip.data.batch import Batch
from fastfip.data.task import Task
from fastfip.fisher.differences.perturb import TraceWithGradient, default_step, swapped, working_dtype
from fastfip.fisher.graph.norm_rules import mend_transposed
from fastfip.fisher.graph.reading import as_real, topological


def signed(
    model: nn.Module,
    batch: Batch,
    task: Task,
    params: Mapping[str, Tensor],
    *,
    difference: str = "forward",
    step: float | None = None,
    generator: torch.Generator | None = None,
    loss_scale: float = 1.0,
) -> TraceWithGradient:
    """Return one draw of the trace and of its gradient; arguments as for `perturbed`.

    The model runs as it is, compiled or not; its parameters are given other memory for the shifted passes.
    """
    step = default_step(working_dtype(params), difference) if step is None else step

    def gradient(e: Tensor | None) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            logits = task.forward(model, batch)
            losses = task.loss(logits, batch)
            if e is None:
                e = torch.randint(0, 2, losses.shape, generator=generator, device="cpu").to(losses) * 2 - 1
            if losses.grad_fn is not None:
                mend_transposed(topological(losses.grad_fn))
            total = (e * losses).sum() * (loss_scale / losses.shape[0] ** 0.5)
            gradients = torch.autograd.grad(total, list(params.values()), allow_unused=True)
        dense = {name: g.to_dense() if g.is_sparse else g for name, g in zip(params, gradients) if g is not None}
        named = {name: g / loss_scale for name, g in dense.items()}
        return named, e, losses.detach(), logits.detach()

    here, e, losses, logits = gradient(None)
    acc = torch.promote_types(losses.dtype, torch.float32)
    sizes = [torch.linalg.vector_norm(as_real(t.detach()), dtype=acc) for t in params.values()]
    norm = torch.stack(
        [torch.linalg.vector_norm(as_real(g), dtype=acc) for g in here.values()] or [losses.new_zeros(())]
    ).norm()
    if not float(norm) > 0:
        return TraceWithGradient(
            norm.square(), {name: torch.zeros_like(g) for name, g in here.items()}, losses, logits, None
        )
    h = step * float(torch.stack(sizes).norm()) / float(norm)

    def at(h: float) -> dict[str, Tensor]:
        with swapped(params, {name: params[name].detach() + h * g for name, g in here.items()}):
            return gradient(e)[0]

    high, low, width = at(h), here, h
    if difference == "central":
        low, width = at(-h), 2 * h
    out = {name: (g - low[name]) * (2 / width) for name, g in high.items()}
    return TraceWithGradient(norm.square(), out, losses, logits, None)
