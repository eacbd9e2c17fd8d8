"""The layer of a net that makes the logits: found, read and written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from fastfip.errors import ModelError
from fastfip.methods.base import Run

__all__ = ["Classifier", "LastLayer", "put", "recorded", "refuse_frozen"]


def refuse_frozen(run: Run, layer: nn.Module) -> None:
    """Refuse a classifier that the user froze, for methods whose work is at the classifier.

    Raises:
        ModelError: it is frozen.
    """
    if any(id(p) in run.frozen for p in layer.parameters()):
        raise ModelError("the classifier is frozen, and this method tunes it: take another method, or frozen='tune'")


class Classifier:
    """The layer that makes the logits: the last Linear that a forward pass calls, else the last convolution.

    Attributes:
        module: the layer.
        received: its weight as it was given, detached, at least float32.
        norm: the Frobenius norm of that.

    Raises:
        ModelError: the model has neither.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.received = self.weight.detach().clone()
        self.norm = torch.linalg.vector_norm(self.received)

    @classmethod
    def of(cls, run: Run) -> Classifier:
        """Find it by one forward pass of two samples."""
        layers: dict[str, nn.Module] = {
            name: m for name, m in run.model.named_modules() if isinstance(m, (nn.Linear, _ConvNd))
        }
        with run.eval_mode(), torch.no_grad(), recorded(layers) as called:
            run.forward(next(iter(run.clean.batches(2, device=run.device))))
        for kind in (nn.Linear, _ConvNd):
            # A layer whose weight is used without calling it is found by its place.
            for names in (called, layers):
                candidates = [layers[name] for name in names if isinstance(layers[name], kind)]
                if candidates:
                    return cls(candidates[-1])
        raise ModelError("the model has no Linear or convolution layer to take for its classifier: try another method")

    def spared(self, places: list[tuple[str, nn.Module, str]]) -> list[tuple[str, nn.Module, str]]:
        """Return places (name, module, attribute) of weights without those of the classifier: logits are no neurons."""
        own = self.module._parameters.get("weight")
        return [(n, m, a) for n, m, a in places if m is not self.module and m._parameters[a] is not own]

    @property
    def weight(self) -> Tensor:
        """Return the present weight (of a parametrised layer what comes out), at least float32, differentiable."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.to(torch.promote_types(weight.dtype, torch.float32))

    @torch.no_grad()
    def draw(self, generator: torch.Generator, spread: float, bias: bool) -> None:
        """Draw the weight (and bias) anew, uniform in +-spread, the weight scaled to the received norm."""

        def uniform(like: Tensor) -> Tensor:
            values = torch.rand(like.shape, generator=generator, device="cpu", dtype=torch.float32) * 2 - 1
            return (spread * values).to(like.device)

        put(self.module, uniform(self.received))
        own = self.module.bias
        if bias and isinstance(own, Tensor):
            own.copy_(uniform(own))
        self.project()

    @torch.no_grad()
    def project(self) -> None:
        """Scale the weight to the received norm."""
        weight = self.weight
        put(self.module, weight * (self.norm / torch.linalg.vector_norm(weight).clamp_min(1e-20)))


@dataclass
class LastLayer:
    """A Linear or 1x1 convolution with logits = features @ theta^T, theta = [W, b].

    Several positions (a 1x1 convolution before a global mean) have the mean of their inputs as features.
    """

    name: str
    layer: nn.Module
    shape: tuple[int, ...]  # of what the net gives for one sample

    @classmethod
    def of(cls, run: Run, name: str | None = None) -> LastLayer:
        """Find the layer that was run last and gives the logits (up to a constant for each sample, as a softmax in the
        net leaves it), checked on a batch of clean samples.

        Args:
            run: its model and clean set.
            name: of the layer, as `named_modules` has it; None: found.

        Raises:
            ModelError: no such layer, no layer gives the logits, or its weight is used elsewhere as well.
        """
        known = {key: module for key, module in run.model.named_modules() if _is_linear(module)}
        if name is not None and name not in known:
            some = ", ".join(list(known)[-3:]) or "none"
            raise ModelError(f"layer={name!r} is no Linear or 1x1 convolution of the model: the last ones are {some}")
        batch = next(iter(run.clean.batches(min(64, run.clean.batch_size), device=run.device)))
        with run.eval_mode(), torch.no_grad(), recorded(known) as seen:
            out = run.forward(batch)
        for key in reversed(list(seen)):
            if name is not None and key != name:
                continue
            candidate = cls(key, known[key], tuple(out.shape[1:]))
            inputs = seen[key]
            if len(inputs) != 1 or not candidate.gives(inputs[0], out, run.task.loss_hook is not None):
                continue
            candidate.check(run.model)
            return candidate
        which = f"the layer {name!r} does not give" if name is not None else "no Linear or 1x1 convolution gives"
        raise ModelError(f"{which} the logits directly: name the classifier with layer=, or take another method")

    def check(self, model: nn.Module) -> None:
        """Raise ModelError if the weight cannot be set, or is also used where the features come from."""
        weight = self.layer._parameters.get("weight")
        if weight is None:
            steps = getattr(getattr(self.layer, "parametrizations", {}), "weight", None)
            if steps is None or not all(hasattr(step, "right_inverse") for step in steps):
                raise ModelError(f"the weight of {self.name} is computed and cannot be set: take another method")
            return
        others = [
            m for m in model.modules() if m is not self.layer and any(p is weight for p in m._parameters.values())
        ]
        if others:
            raise ModelError(f"the weight of {self.name} is used in other layers too: take another method")

    @torch.no_grad()
    def theta(self) -> Tensor:
        """Return a copy of [W, b] ([W] without a bias), [C, m + 1], in float32 at least."""
        weight = self.layer.weight.detach().flatten(1)  # type: ignore[operator]
        bias = self.layer.bias
        dtype = torch.promote_types(weight.dtype, torch.float32)
        parts = [weight] if bias is None else [weight, bias.detach()[:, None]]  # type: ignore[operator]
        return torch.cat([part.to(dtype) for part in parts], 1)

    @torch.no_grad()
    def write(self, theta: Tensor) -> None:
        """Write [W, b] into the layer."""
        bias = self.layer.bias
        weight = theta if bias is None else theta[:, :-1]
        put(self.layer, weight)
        if isinstance(bias, Tensor):
            bias.copy_(theta[:, -1])

    def features(self, h: Tensor) -> Tensor:
        """Return what theta multiplies, [N, m + 1] ([N, m] without a bias), of the layer's input."""
        if isinstance(self.layer, _ConvNd):
            h = h.flatten(2).mean(2)
        elif h.dim() > 2:
            h = h.flatten(1, -2).mean(1)
        h = h.detach().to(torch.promote_types(h.dtype, torch.float32))
        return h if self.layer.bias is None else torch.cat([h, torch.ones_like(h[:, :1])], 1)

    def gives(self, h: Tensor, out: Tensor, exactly: bool) -> bool:
        """Return whether the net's outputs are this layer's, up to rounding; not `exactly`: as a softmax sees them."""
        z = self.features(h) @ self.theta().T
        if z.numel() != out.numel() or len(z) != len(out):
            return False
        eps = torch.finfo(out.dtype).eps
        z, out = z.double(), out.double().reshape(z.shape)
        if not exactly:
            z, out = (t.log_softmax(1).clamp_min(-30) for t in (z, out))
        room = (100 if eps < 1e-4 else 8) * eps * (1 + float(out.abs().max()))
        return bool((z - out).abs().max() <= room)


@torch.no_grad()
def put(layer: nn.Module, value: Tensor) -> None:
    """Write a layer's weight, in its shape and dtype; of a parametrised one through the `right_inverse`.

    Raises:
        ModelError: the parametrisation has none.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if not parametrize.is_parametrized(layer, "weight"):
        weight.copy_(value.reshape(weight.shape))
        return
    try:
        layer.weight = value.reshape(weight.shape).to(weight.dtype)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise ModelError("the classifier's parametrisation cannot be assigned to: fold it in first") from error


@contextlib.contextmanager
def recorded(layers: dict[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Keep the inputs of layers for a block: each call's, in the order in which layers were last run."""
    seen: dict[str, list[Tensor]] = {}

    def keeper(key: str):  # type: ignore[no-untyped-def]
        def keep(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            seen[key] = [*seen.pop(key, []), (args[0] if args else named["input"]).detach()]

        return keep

    handles = [module.register_forward_pre_hook(keeper(key), with_kwargs=True) for key, module in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, _ConvNd):
        return module.groups == 1 and not module.transposed and all(k == 1 for k in module.kernel_size)
    return isinstance(module, nn.Linear)
