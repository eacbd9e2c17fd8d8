"""One weight that moves along its singular directions: W(delta), and the gradient of delta."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastfip.ops.memory import Scratch
from fastfip.ops.spectral.op import SpectralFactors, WantedGradients, is_even, recompose
from fastfip.spectral.site import WeightSite

__all__ = ["SpectralShift"]

#: Numbers of a weight up to which W(delta) is kept from product to product: below a megabyte it is no matter.
SMALL = 1 << 16

#: The same where making do without it costs more than this share of a product (K over the positions or over the wider
#: side of the weight, by form): two such shares a step are what a second weight in memory saves.
EXPENSIVE = 1 / 8


@dataclass
class SpectralShift:
    """One weight, the singular directions that move, and delta.

    Attributes:
        names: the weight's names in the model (several if it is tied).
        sites: where the model holds it.
        weight: the parameter itself; it is not changed before `fold`.
        u: [G, O, R]. sigma: [G, R]. v: [G, I, R], in float32, or float64 for a float64 weight.
        delta: [G, R], a leaf that requires a gradient.
        scratch: memory in which W(delta) is put together for the length of a product.
        value: W(delta) as a leaf for the gradients of uses that are no layer of their own, made when it is first read.
        factors: the directions at the present delta, for the layers' own op. held: W(delta) for its products, where it
            is kept: small, expensive to make, or in another dtype than the weight's.
        frugal: whether memory matters more than time: of a large weight neither W(delta) nor its gradient is kept.
    """

    names: list[str]
    sites: list[WeightSite]
    weight: nn.Parameter
    u: Tensor
    sigma: Tensor
    v: Tensor
    delta: Tensor
    scratch: Scratch = field(default_factory=Scratch, repr=False)
    value: Tensor | None = field(default=None, repr=False)
    wanted: WantedGradients = field(default_factory=WantedGradients, repr=False)
    frugal: bool = False
    factors: dict[torch.dtype, SpectralFactors] = field(default_factory=dict, repr=False)
    held: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False)
    _even: dict[torch.dtype, bool] = field(default_factory=dict, repr=False)
    _fresh: bool = field(default=False, repr=False)
    _trained: bool = field(default=False, repr=False)

    def matrix(self, weight: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as [G, O, I]."""
        return weight.reshape(*self.u.shape[:2], -1)

    @property
    def saves_memory(self) -> bool:
        """Return whether layers make do without W(delta) and its gradient, whatever that costs."""
        return self.frugal and self.weight.numel() > SMALL

    def shift(self) -> Tensor:
        """Return relu(sigma + delta) - sigma, [G, R]."""
        return torch.relu(self.sigma + self.delta) - self.sigma

    def recompose(self) -> Tensor:
        """Return W(delta) in the weight's shape and dtype, differentiable with respect to delta."""
        change = (self.u * self.shift().unsqueeze(-2)) @ self.v.mT
        return self.weight.detach() + change.reshape(self.weight.shape).to(self.weight.dtype)

    def refresh(self) -> None:
        """Forget what belongs to another delta."""
        if not self._trained:  # only passes without a gradient read it: steps have no need of the memory
            self.value = None
        self._fresh = False
        self.factors.clear()
        self.held.clear()

    def leaf(self) -> Tensor:
        """Return `value` at the present delta; its memory is used again."""
        self._trained |= torch.is_grad_enabled()
        with torch.no_grad():
            if self.value is None:
                self.value = torch.empty_like(self.weight, memory_format=torch.contiguous_format).requires_grad_(True)
            if not self._fresh:
                recompose(self.weight, self.u, self.shift(), self.v, self.scratch, out=self.value.data)
                self._fresh = True
        return self.value

    def read(self) -> Tensor:
        """Return W(delta) for whoever reads the weight: the leaf, or a function of delta to a compiler."""
        return self.recompose() if torch.compiler.is_compiling() else self.leaf()

    @torch.no_grad()
    def directions(self, dtype: torch.dtype, positions: int) -> tuple[Tensor, SpectralFactors, Scratch | None]:
        """Return the op's weight, directions and scratch memory, for products over so many positions.

        `dtype` is that of the products; autocast's may be another than the weight's.
        """
        if dtype not in self.factors:
            if dtype not in self._even:
                self._even[dtype] = is_even(self.sigma, dtype)
            delta = self.delta.detach()
            self.factors[dtype] = SpectralFactors.of(self.u, self.v, self.sigma, delta, dtype, self._even[dtype])
        factors = self.factors[dtype]
        if self._fresh and dtype == self.weight.dtype:
            assert self.value is not None
            return self.value.detach(), factors, None
        cheap = self.saves_memory or self.sigma.shape[1] <= EXPENSIVE * max(positions, self.u.shape[1], self.v.shape[1])
        if dtype == self.weight.dtype and self.weight.numel() > SMALL and cheap:
            return self.weight, factors, self.scratch
        if dtype not in self.held:
            made = recompose(self.weight, self.u, self.shift(), self.v, self.scratch)
            self.held[dtype] = made.to(dtype, copy=True)
        return self.held[dtype], factors, None

    def pull(self, gradient: Tensor) -> Tensor:
        """Return the gradient with respect to delta that belongs to a gradient with respect to W(delta).

        d l / d delta_r = 1[sigma_r + delta_r > 0] * u_r^T G v_r
        """
        full = self.matrix(gradient).to(self.u.dtype)
        inner = ((full @ self.v) * self.u).sum(-2)
        return inner * (self.sigma + self.delta.detach() > 0)

    def forget(self) -> None:
        """Give back all memory but that of the directions."""
        self._trained = False
        self.refresh()
        self.scratch.clear()
