"""The gradient of one sample after the other, from one backward pass: for what needs them one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fastfip.fisher.graph.forms import GradientForm
from fastfip.fisher.graph.reading import Chain, own_gradients
from fastfip.fisher.graph.verify import Cache, plan_for

__all__ = ["per_sample_gradients"]


def per_sample_gradients(
    losses: Tensor, params: Mapping[str, Tensor], *, cache: Cache | None = None, create_graph: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Yield d losses[n] / d params for n = 0 .. N-1, by name; a parameter without a gradient is left out.

    One backward pass in all where rules apply, and no more than one sample's gradients at a time. The graph of `losses`
    [N] is kept. With `create_graph` the gradients are differentiable.
    """
    with torch.enable_grad():
        plan = plan_for(losses, params, cache)
        gradients = plan.gradients()
        forms: dict[tuple[int, int], GradientForm] = {}
        for uses in [*(g.uses for groups in plan.groups.values() for g in groups), *plan.pulled.values()]:
            for use in uses:
                g = gradients[use.site]
                if g is not None:
                    forms[use.site, use.slot] = plan.form(use.site, use.slot, g if create_graph else g.detach())
    looped = {name: plan.params[name] for name in plan.params if name in plan.loop}
    for n in range(plan.samples):
        with torch.set_grad_enabled(create_graph):
            mine: dict[str, Tensor] = {}
            for name, groups in plan.groups.items():
                for group in groups:
                    parts = [forms[use.site, use.slot] for use in group.uses if (use.site, use.slot) in forms]
                    if parts:
                        value = _whole(group.chain, GradientForm.join(parts).one(n), plan.params[name])
                        mine[name] = mine[name] + value if name in mine else value
            mine.update(plan.pull(n, forms, create_graph=create_graph))
        if looped:
            with torch.enable_grad():
                loss = losses[n]
            mine.update(own_gradients(loss, looped, retain_graph=True, create_graph=create_graph))
        yield mine


def _whole(chain: Chain, value: Tensor, param: Tensor) -> Tensor:
    """A use's gradient in its place of the whole parameter."""
    if not chain.steps:
        return value.reshape(param.shape)
    out = value.new_zeros(param.shape)
    view = chain.view(out)
    view.copy_(value.reshape(view.shape))
    return out
