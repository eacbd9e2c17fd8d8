"""The workloads of bench_fisher_diagonal, and the ways to get a Fisher diagonal that it compares.

Every way takes a workload and returns {parameter name: diagonal}, the mean over samples. The peers' own set-up (what
wraps or extends a model) is done once and kept on the workload, so that only the pass itself is timed.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfip.fisher import backward_with_fisher, fisher_diagonal
from fastfip.ops import OPS
from fastfip.testing import nets

Diagonal = dict[str, Tensor]


@dataclass
class Workload:
    model: nn.Module
    x: Tensor
    y: Tensor
    kept: dict[str, Any] = field(default_factory=dict)  # what each peer sets up once

    def losses(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y, reduction="none")

    def few(self, samples: int) -> Workload:
        return Workload(self.model, self.x[:samples], self.y[:samples])


Way = Callable[[Workload], Diagonal]


class Dense(nn.Module):
    """A layer whose every output takes part in the class scores."""

    def __init__(self, layer: nn.Module, size: int) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("sign", torch.where(torch.rand(size) < 0.5, -1.0, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x).flatten(1)
        return (z * self.sign).view(z.shape[0], 8, -1).sum(2) / z.shape[1] ** 0.5


MAKE: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "a": lambda: (nets.MLP(784, 1024, 1024, 10), torch.randn(256, 784)),
    "b": lambda: (nets.randomize_norms(nets.preact_resnet18()), torch.randn(32, 3, 32, 32)),
    "c": lambda: (nets.vit_s16(10), torch.randn(8, 3, 224, 224)),
    "d": lambda: (Dense(nn.Linear(768, 3072), 197 * 3072), torch.randn(32, 197, 768)),
    "e": lambda: (Dense(nn.Conv2d(256, 256, 3, padding=1), 256 * 64), torch.randn(128, 256, 8, 8)),
}
TITLES = {
    "a": "MLP 784-1024-1024-10, N=256",
    "b": "PreActResNet-18, 32x32, N=32",
    "c": "ViT-S/16, 224, N=8",
    "d": "Linear 768-3072, 197 tokens, N=32",
    "e": "Conv 256-256 3x3 on 8x8, N=128",
}


def workload(key: str) -> Workload:
    torch.manual_seed(0)
    model, x = MAKE[key]()
    return Workload(model.eval(), x, torch.randint(0, 8, (len(x),)))


# ---------------------------------------------------------------------------------------------------- ours and torch's


def plain(w: Workload) -> Diagonal:
    """One forward and backward pass: what everything is compared with."""
    w.model.zero_grad()
    w.losses().mean().backward()
    return {}


def ours(w: Workload, backend: str = "auto") -> Diagonal:
    return fisher_diagonal(w.model, (w.x, w.y), backend=backend)


def together(w: Workload, backend: str = "auto") -> Diagonal:
    w.model.zero_grad()
    return backward_with_fisher(w.losses(), w.model, backend=backend)


def one_by_one(w: Workload) -> Diagonal:
    params = dict(w.model.named_parameters())
    out = {k: torch.zeros_like(p) for k, p in params.items()}
    for x, y in zip(w.x.split(1), w.y.split(1)):
        for value, g in zip(out.values(), torch.autograd.grad(F.cross_entropy(w.model(x), y), list(params.values()))):
            value.addcmul_(g, g)
    return {k: v / len(w.x) for k, v in out.items()}


def vmap_gradients(w: Workload, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each sample's own gradient by torch.func, where the parameters have these values."""
    buffers = dict(w.model.named_buffers())

    def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        z = torch.func.functional_call(w.model, (p, buffers), (x[None],))
        return F.cross_entropy(z, y[None])

    return torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, w.x, w.y)


def vmap_grad(w: Workload) -> Diagonal:
    each = vmap_gradients(w, {k: p.detach() for k, p in w.model.named_parameters()})
    return {k: g.square().mean(0) for k, g in each.items()}


# ------------------------------------------------------------------------------------------------------------- peers


def backpack(w: Workload) -> Diagonal:
    """BackPACK: SumGradSquared. Modules that it does not know (LayerNorm, bare parameters) it leaves out."""
    from backpack import backpack as context
    from backpack import extend, extensions

    if "backpack" not in w.kept:
        model = copy.deepcopy(w.model)
        for m in model.modules():  # its hooks refuse operations in place
            if hasattr(m, "inplace"):
                m.inplace = False
        w.kept["backpack"] = extend(model), extend(nn.CrossEntropyLoss(reduction="sum"))
    model, loss = w.kept["backpack"]
    model.zero_grad()
    with warnings.catch_warnings(), context(extensions.SumGradSquared()):
        warnings.simplefilter("ignore")
        loss(model(w.x), w.y).backward()
    found = {}
    for k, p in model.named_parameters():
        if hasattr(p, "sum_grad_squared"):
            found[k] = p.sum_grad_squared / len(w.x)
            del p.sum_grad_squared
    return found


def opacus(w: Workload) -> Diagonal:
    """Opacus: per-sample gradients, then their squares. It wants train mode, and has no rule for BatchNorm."""
    from opacus.grad_sample import GradSampleModule

    if "opacus" not in w.kept:
        model = copy.deepcopy(w.model)
        if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
            model.train()  # it records nothing in eval mode; the nets without BatchNorm have no dropout either
        w.kept["opacus"] = GradSampleModule(model, loss_reduction="sum", strict=False)
    model = w.kept["opacus"]
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a full backward hook fires although the inputs need no gradient
        F.cross_entropy(model(w.x), w.y, reduction="sum").backward()
    return {
        k.removeprefix("_module."): p.grad_sample.square().mean(0)
        for k, p in model.named_parameters()
        if getattr(p, "grad_sample", None) is not None
    }


def nngeometry(w: Workload) -> Diagonal:
    """Return the diagonal by nngeometry: PMatDiag of the per-sample losses. Bare parameters it leaves out."""
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import PMatDiag

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(w.x, w.y), batch_size=len(w.x))
    if "nngeometry" not in w.kept:  # a copy: where it fails its hooks stay
        w.kept["nngeometry"] = copy.deepcopy(w.model)
    model = w.kept["nngeometry"]
    layers = LayerCollection.from_model(model, ignore_unsupported_layers=True)
    generator = TorchHooksJacobianBackend(
        layer_collection=layers,
        model=model,
        function=lambda x, y: F.cross_entropy(model(x), y, reduction="none")[:, None],
    )
    flat, out, known = PMatDiag(generator=generator, examples=loader).get_diag(), {}, dict(model.named_modules())
    for path in layers.layers:
        at, prefix = layers.p_pos[path], f"{path}." if path else ""
        for k in ("weight", "bias"):
            p = getattr(known[path], k, None)
            if p is not None:
                out[prefix + k] = flat[at : at + p.numel()].view_as(p)
                at += p.numel()
    return out


PEERS: dict[str, Way] = {"backpack": backpack, "opacus": opacus, "nngeometry": nngeometry}


def ways(peers: bool = True) -> dict[str, Way]:
    found: dict[str, Way] = {"plain": plain}
    for backend in OPS["sum_grad_squared"].backends:
        found[f"fastfip {backend.name}"] = functools.partial(ours, backend=backend.name)
    found["fastfip with gradient"] = together
    found |= {"one backward each": one_by_one, "vmap(grad)": vmap_grad}
    return {**found, **PEERS} if peers else found
