"""What outputs say of labels: the likelihood of those given, labels drawn from it, and its Fisher in closed form.

A likelihood factorises over the positions of a sample (tokens, pixels, outputs of a regression), given the outputs z:

    log p(y|z) = sum_t log p(y_t|z_t),      Fisher of z = E[d log p / dz (d log p / dz)^T] = sum_k v_k v_k^T

so the Fisher of the weights is sum_k (J^T v_k)^2 on its diagonal: a backward pass for each `slopes` vector v_k.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfip.data.outputs import looks_like_probabilities
from fastfip.errors import ConfigError, DataError, choices

__all__ = ["Bernoulli", "Categorical", "Gaussian", "Likelihood", "as_logits", "draw_labels", "likelihood_of"]


@dataclass(frozen=True)
class Likelihood(ABC):
    """The distribution of labels y that outputs z stand for; one sample for each row of z.

    Attributes:
        reduction: of a sample's positions, "sum" or "mean"; the mean is over those that are not ignored. It is what a
            sample's loss is, and so scales its gradients.
    """

    reduction: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        if self.reduction not in ("sum", "mean"):
            raise ConfigError(f"reduction must be 'sum' or 'mean' (over a sample's positions), not {self.reduction!r}")

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return -log p(y|z) of each sample up to a constant, [N], in the form that `reduction` says.

        Raises:
            DataError: labels that do not fit the outputs.
        """
        each, kept = self._each(outputs, y)
        each = (each * kept).reshape(each.shape[0], -1).sum(1)
        return each * self._share(kept).to(each.dtype)

    @abstractmethod
    def draw(self, outputs: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return labels drawn from p(.|z), in the shape of `y`; ignored ones stay. On the CPU: seeds carry over."""

    @abstractmethod
    def slopes(self, outputs: Tensor, y: Tensor, top_k: int | None = None) -> Iterator[Tensor]:
        """Yield v_k in the shape of the outputs, with sum_k v_k v_k^T the Fisher of the outputs, sample by sample."""

    @abstractmethod
    def _each(self, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return -log p of every position, and which positions count; both of one shape [N, ...]."""

    def _share(self, kept: Tensor) -> Tensor:
        """Return what a sample's sum over positions is multiplied by, [N]."""
        count = kept.reshape(kept.shape[0], -1).sum(1).double()
        return count.clamp(min=1).reciprocal() if self.reduction == "mean" else torch.ones_like(count)


@dataclass(frozen=True)
class Categorical(Likelihood):
    """One of C classes at each position: softmax over the class axis, as in cross-entropy.

    Attributes:
        axis: of the outputs that the classes lie in; None: found from the labels' shape.
        ignore_index: positions with this label do not count; they keep it where labels are drawn.
    """

    axis: int | None = None
    ignore_index: int = -100

    def draw(self, outputs: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw a class for each position."""
        z, y = self._rows(outputs, y)
        drawn = draw_labels(as_logits(z), generator).to(y.dtype)
        return torch.where(y == self.ignore_index, y, drawn)

    def slopes(self, outputs: Tensor, y: Tensor, top_k: int | None = None) -> Iterator[Tensor]:
        """Yield sqrt(p_c) (onehot(c) - p) for each position and class (of each position's `top_k` likeliest)."""
        axis = self._axis(outputs, y)
        z, y = self._rows(outputs, y)
        p = as_logits(z.detach()).softmax(-1)
        kept = (y != self.ignore_index).reshape(len(y), -1)
        share = self._share(kept).to(p)[:, None]
        flat = p.reshape(len(p), -1, p.shape[-1])  # [N, positions, C]
        order = flat.topk(min(top_k, flat.shape[2]), 2).indices if top_k else torch.arange(p.shape[-1], device=p.device)
        for t in range(flat.shape[1]):
            if not bool(kept[:, t].any()):
                continue
            for k in range(order.shape[-1]):
                chosen = order[:, t, k] if top_k else order[k].expand(len(p))
                each = F.one_hot(chosen, flat.shape[2]).to(p) - flat[:, t]
                root = flat[:, t].gather(1, chosen[:, None]).sqrt()
                v = torch.zeros_like(flat)
                v[:, t] = each * root * share * kept[:, t, None]
                yield v.reshape(p.shape).movedim(-1, axis)

    def _each(self, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z, y = self._rows(outputs, y)
        if z.dim() > 2 and looks_like_probabilities(z.reshape(-1, z.shape[-1])):
            raise DataError(
                "the outputs are probabilities (a softmax inside the model), and logits are needed:"
                " pass forward= that returns their logarithm"
            )
        kept = y != self.ignore_index
        some = y[kept]
        if some.numel() and (int(some.min()) < 0 or int(some.max()) >= z.shape[-1]):
            raise DataError(
                f"labels run from {int(some.min())} to {int(some.max())}, outside 0..{z.shape[-1] - 1}: number the"
                f" classes from 0; positions that do not count are labelled {self.ignore_index} (ignore_index=)"
            )
        each = F.cross_entropy(z.movedim(-1, 1), y.long(), ignore_index=self.ignore_index, reduction="none")
        return each, kept

    def _rows(self, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs with their classes in the last axis, and the labels, which have the shape of the rest."""
        return outputs.movedim(self._axis(outputs, y), -1), y

    def _axis(self, outputs: Tensor, y: Tensor) -> int:
        dims = outputs.dim()
        asked = range(1, dims) if self.axis is None else [self.axis % dims] if -dims <= self.axis < dims else []
        if self.axis is None and dims > 2:
            asked = [1, dims - 1]
        fits = [d for d in asked if d > 0 and torch.Size((*outputs.shape[:d], *outputs.shape[d + 1 :])) == y.shape]
        if len(fits) == 1 and not y.is_floating_point():
            return fits[0]
        if len(fits) > 1:
            raise DataError(
                f"labels {list(y.shape)} fit outputs {list(outputs.shape)} with the classes in axis 1 and in the last:"
                " say which, likelihood=fastfip.fisher.Categorical(axis=1) or (axis=-1)"
            )
        raise DataError(
            f"likelihood='categorical' needs integer labels in the outputs' shape without the class axis; labels are"
            f" {_kind(y)}, outputs {list(outputs.shape)}{'' if self.axis is None else f' with axis={self.axis}'}"
        )


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Yes or no for each output: sigmoid, as in binary cross-entropy with logits; labels in [0, 1].

    Attributes:
        ignore_index: outputs with this label do not count; they keep it where labels are drawn.
    """

    ignore_index: int = -100

    def draw(self, outputs: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw 0 or 1 for each output."""
        z, labels = _paired(outputs, y, "bernoulli")
        p = z.detach().double().cpu().sigmoid()
        drawn = torch.bernoulli(p, generator=generator).to(y)
        return torch.where(labels == self.ignore_index, labels, drawn).reshape(y.shape)

    def slopes(self, outputs: Tensor, y: Tensor, top_k: int | None = None) -> Iterator[Tensor]:
        """Yield sqrt(p (1 - p)) at one output after the other."""
        z, labels = _paired(outputs.detach(), y, "bernoulli")
        kept = labels != self.ignore_index
        root = (z.sigmoid() * (-z).sigmoid()).sqrt() * kept
        yield from _one_by_one(root, self._share(kept))

    def _each(self, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z, labels = _paired(outputs, y, "bernoulli")
        kept = labels != self.ignore_index
        some = labels[kept]
        if some.numel() and (float(some.min()) < 0 or float(some.max()) > 1):
            raise DataError(f"labels run from {float(some.min()):g} to {float(some.max()):g}: bernoulli takes 0 and 1")
        target = torch.where(kept, labels, torch.zeros_like(labels)).to(z.dtype)
        return F.binary_cross_entropy_with_logits(z, target, reduction="none"), kept


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """A number for each output, with a fixed variance: squared error, (z - y)^2 / (2 variance).

    Attributes:
        variance: of the labels around the outputs.
    """

    variance: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.variance < math.inf:
            raise ConfigError(f"variance must be positive, not {self.variance!r}")

    def draw(self, outputs: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw a number around each output; in the labels' dtype if that is a floating one."""
        z, _ = _paired(outputs, y, "gaussian")
        noise = torch.randn(z.shape, generator=generator, dtype=torch.float64) * self.variance**0.5
        drawn = z.detach().double() + noise.to(z.device)
        return drawn.to(y.dtype if y.is_floating_point() else z.dtype).reshape(y.shape)

    def slopes(self, outputs: Tensor, y: Tensor, top_k: int | None = None) -> Iterator[Tensor]:
        """Yield 1 / deviation at one output after the other."""
        z, _ = _paired(outputs.detach(), y, "gaussian")
        kept = torch.ones_like(z, dtype=torch.bool)
        yield from _one_by_one(torch.full_like(z, self.variance**-0.5), self._share(kept))

    def _each(self, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z, labels = _paired(outputs, y, "gaussian")
        each = (z - labels.to(z.dtype)).square() / (2 * self.variance)
        return each, torch.ones_like(each, dtype=torch.bool)


LIKELIHOODS: dict[str, type[Likelihood]] = {"categorical": Categorical, "bernoulli": Bernoulli, "gaussian": Gaussian}


def likelihood_of(asked: str | Likelihood) -> Likelihood:
    """Return a likelihood asked for by name, or as it is.

    Raises:
        ConfigError: no such likelihood.
    """
    if isinstance(asked, Likelihood):
        return asked
    if asked not in LIKELIHOODS:
        raise ConfigError(f"likelihood={asked!r}{choices(asked, list(LIKELIHOODS))}")
    return LIKELIHOODS[asked]()


def draw_labels(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return labels drawn from softmax(logits) over the last dimension, [...]; on the CPU, so that seeds carry over."""
    p = logits.detach().double().cpu().softmax(-1)
    drawn = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator)
    return drawn.reshape(p.shape[:-1]).to(logits.device)


def as_logits(z: Tensor) -> Tensor:
    """Return logits with the same softmax: of probabilities (a user's loss takes their logarithm itself) the logarithm.

    Classes are in the last axis.
    """
    if not looks_like_probabilities(z.reshape(-1, z.shape[-1])):
        return z
    return z.clamp_min(torch.finfo(z.dtype).tiny).log()


def _paired(outputs: Tensor, y: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return outputs and labels in one shape [N, ...]: [N, 1] and [N] are the same."""
    if y.shape == outputs.shape:
        return outputs, y
    if y.shape[:1] == outputs.shape[:1] and y.numel() == outputs.numel():
        return outputs, y.reshape(outputs.shape)
    raise DataError(
        f"likelihood={name!r} needs a label for each output; labels are {_kind(y)}, outputs {list(outputs.shape)}"
    )


def _one_by_one(root: Tensor, share: Tensor) -> Iterator[Tensor]:
    """Yield `root` [N, ...] with all positions but one at zero, times each sample's share."""
    flat = root.reshape(len(root), -1)
    for t in range(flat.shape[1]):
        if not bool(flat[:, t].any()):
            continue
        v = torch.zeros_like(flat)
        v[:, t] = flat[:, t] * share.to(flat)
        yield v.reshape(root.shape)


def _kind(y: Tensor) -> str:
    return f"{str(y.dtype).removeprefix('torch.')} {list(y.shape)}"
