"""Weights that move along their singular directions only.

    W(delta) = U diag(relu(sigma + delta)) V^T,    delta [R], zero at the start      (FIP, arXiv 2409.00863, Fast FIP)

It is computed as W + U diag(relu(sigma + delta) - sigma) V^T, which is the same matrix with the rounding of the SVD
left out: delta = 0 gives back W bit by bit, and a weight of low precision is added to, not rebuilt. relu has no
gradient at and below zero, so a direction whose sigma + delta has reached zero stays gone, and one with sigma = 0
never moves.

A Linear weight is its matrix [O, I]. A convolution's is [O, I * kernel], one matrix for each group [G, O/G, I/G *
kernel]; a transposed convolution's is [I, O * kernel] likewise. Tied weights (one tensor in several places) share one
delta.

Index letters: `o` output, `i` input (unfolded), `r` singular direction, R = min(O, I) of each group.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..errors import ModelError

__all__ = ["Shift", "SpectralShifts"]


@dataclass
class Shift:
    """One weight, its singular value decomposition, and delta.

    Attributes:
        names: the weight's names in the model (several if it is tied).
        places: the modules that hold it as `weight`.
        weight: the parameter itself; it is not changed before `fold`.
        u: [G, O, R]. sigma: [G, R]. v: [G, I, R], in float32, or float64 for a float64 weight.
        delta: [G, R], a leaf that asks for a gradient.
    """

    names: list[str]
    places: list[nn.Module]
    weight: nn.Parameter
    u: Tensor
    sigma: Tensor
    v: Tensor
    delta: Tensor

    def matrix(self, weight: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as [G, O, I]."""
        groups = self.u.shape[0]
        return weight.reshape(groups, weight.shape[0] // groups, -1)

    def shift(self) -> Tensor:
        """Return relu(sigma + delta) - sigma, [G, R]."""
        return torch.relu(self.sigma + self.delta) - self.sigma

    def recompose(self) -> Tensor:
        """Return W(delta) in the weight's shape and dtype, differentiable with respect to delta."""
        change = (self.u * self.shift().unsqueeze(-2)) @ self.v.mT
        return self.weight.detach() + change.reshape(self.weight.shape).to(self.weight.dtype)

    def pull(self, gradient: Tensor) -> Tensor:
        """Return the gradient with respect to delta that belongs to a gradient with respect to W(delta).

        d l / d delta_r = 1[sigma_r + delta_r > 0] * u_r^T G v_r
        """
        full = self.matrix(gradient).to(self.u.dtype)
        inner = ((full @ self.v) * self.u).sum(-2)
        return inner * (self.sigma + self.delta.detach() > 0)


class SpectralShifts:
    """The spectral shifts of a model's Linear and convolution weights.

    While `installed`, the model computes with W(delta): `refresh` puts fresh tensors in the weights' places before a
    step, `collect` turns the gradients that arrived there into gradients of the deltas. Several forward and backward
    passes may lie between the two. `fold` writes W(delta) into the weights, `remove` only takes the tensors out
    again.
    """

    def __init__(self, shifts: list[Shift]) -> None:
        self.shifts = shifts
        self._leaves: list[Tensor] = []
        self.installed = False

    @classmethod
    def of(cls, model: nn.Module) -> SpectralShifts:
        """Decompose every Linear and convolution weight, in float32 at least; equal shapes in one batched SVD.

        Raises:
            ModelError: the model has no such weight, or one is not finite.
        """
        found: dict[int, tuple[nn.Parameter, list[str], list[nn.Module]]] = {}
        for name, module in model.named_modules():
            if not isinstance(module, (nn.Linear, _ConvNd)):
                continue
            weight = module._parameters.get("weight")  # None where the user's own parametrisation computes it
            if weight is None or not weight.is_floating_point() or weight.numel() == 0:
                continue
            entry = found.setdefault(id(weight), (weight, [], []))
            entry[1].append(f"{name}.weight" if name else "weight")
            entry[2].append(module)
        if not found:
            raise ModelError("the model has no Linear or convolution weight of its own: there is nothing to shift")
        return cls(list(_decompose(list(found.values()))))

    def __len__(self) -> int:
        """Return how many weights are shifted."""
        return len(self.shifts)

    @property
    def deltas(self) -> list[Tensor]:
        """The tensors that are tuned, one [G, R] for each weight."""
        return [shift.delta for shift in self.shifts]

    @property
    def weights(self) -> list[nn.Parameter]:
        """The weights themselves; they stay as they are until `fold`."""
        return [shift.weight for shift in self.shifts]

    @torch.no_grad()
    def refresh(self) -> None:
        """Put W(delta) of the present deltas in the weights' places, as leaves that collect gradients."""
        self._leaves = []
        for shift in self.shifts:
            leaf = shift.recompose().requires_grad_(True)
            self._leaves.append(leaf)
            self._put(shift, leaf)
        self.installed = True

    def collect(self) -> None:
        """Add the gradients that arrived at W(delta) since `refresh` to those of the deltas."""
        for shift, leaf in zip(self.shifts, self._leaves):
            if leaf.grad is None:
                continue
            gradient = shift.pull(leaf.grad)
            leaf.grad = None
            shift.delta.grad = gradient if shift.delta.grad is None else shift.delta.grad + gradient

    @contextlib.contextmanager
    def differentiable(self) -> Iterator[None]:
        """Put W(delta) in place as a function of delta for a block, so that autograd itself goes through it."""
        self.remove()
        try:
            for shift in self.shifts:
                self._put(shift, shift.recompose())
            self.installed = True
            yield
        finally:
            self.remove()

    def remove(self) -> None:
        """Take W(delta) out again: the model computes with its own weights."""
        if not self.installed:
            return
        for shift in self.shifts:
            for place in shift.places:
                place.__dict__.pop("weight", None)
                # Put first again, as Linear and convolution layers have it: the state dict keeps its order.
                rest = dict(place._parameters)
                place._parameters.clear()
                place._parameters.update({"weight": shift.weight, **rest})
        self._leaves = []
        self.installed = False

    @torch.no_grad()
    def fold(self) -> None:
        """Write W(delta) into the weights (same tensors, shapes, dtypes) and set the deltas to zero effect."""
        self.remove()
        for shift in self.shifts:
            shift.weight.copy_(shift.recompose())

    @staticmethod
    def _put(shift: Shift, value: Tensor) -> None:
        # A parameter cannot be a computed tensor, so its place in the module is taken by a plain attribute meanwhile.
        for place in shift.places:
            place._parameters.pop("weight", None)
            place.__dict__["weight"] = value


def _decompose(found: list[tuple[nn.Parameter, list[str], list[nn.Module]]]) -> Iterator[Shift]:
    """SVD of every weight; weights of one matrix shape together, which is faster for the many equal layers of a net."""
    matrices: list[Tensor] = []
    for weight, names, places in found:
        if not bool(torch.isfinite(weight).all()):
            raise ModelError(f"{names[0]} holds NaN or Inf: it has no singular values")
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        groups = getattr(places[0], "groups", 1)
        matrices.append(weight.detach().reshape(groups, weight.shape[0] // groups, -1).to(dtype))
    parts: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    by_shape: dict[tuple[object, ...], list[int]] = {}
    for k, matrix in enumerate(matrices):
        by_shape.setdefault((tuple(matrix.shape), matrix.dtype, matrix.device), []).append(k)
    for members in by_shape.values():
        # float64 inside: the factors are then exact to the last bit that they are kept in.
        u, sigma, vh = torch.linalg.svd(torch.stack([matrices[k] for k in members]).double(), full_matrices=False)
        for row, k in enumerate(members):
            parts[k] = (u[row], sigma[row], vh[row].mT)
    for k, (weight, names, places) in enumerate(found):
        dtype = matrices[k].dtype
        u, sigma, v = (t.to(dtype).contiguous() for t in parts[k])
        yield Shift(names, places, weight, u, sigma, v, torch.zeros_like(sigma).requires_grad_(True))


def is_transposed(module: nn.Module) -> bool:
    """Return whether a module's weight is stored input first."""
    return isinstance(module, _ConvTransposeNd)
