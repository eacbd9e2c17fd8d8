"""Singular value decompositions of weights: all directions, or the largest.

Matrices of one shape are decomposed together. In float64 inside, so that the factors are exact to the last bit of the
precision they are kept in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastfip.errors import ConfigError

__all__ = ["Factored", "Rank", "decompose"]

#: None: all directions; an int: at most so many of the largest of each group; a float: the fewest whose squares sum to
#: this share of all of them.
Rank = int | float | None

Factored = tuple[Tensor, Tensor, Tensor]

#: The eigenvectors of M M^T give singular values of relative error eps (sigma_1 / sigma)^2: below this share of
#: sigma_1 they are no longer right to float32, and the decomposition of M itself is taken, at ten times the cost.
SMALLEST_BY_GRAM = 1e-4


def decompose(matrices: Sequence[Tensor], rank: Rank = None) -> list[Factored]:
    """Return u [G, O, K], sigma [G, K] (falling) and v [G, I, K] of each matrix [G, O, I], in its dtype.

    Raises:
        ConfigError: the rank is no positive int and no float between 0 and 1.
    """
    check_rank(rank)
    factored: dict[int, Factored] = {}
    by_shape: dict[tuple[object, ...], list[int]] = {}
    for k, matrix in enumerate(matrices):
        by_shape.setdefault((tuple(matrix.shape), matrix.dtype, matrix.device), []).append(k)
    for members in by_shape.values():
        stack = torch.stack([matrices[k] for k in members])
        for k, factors in zip(members, _batched(stack, rank)):
            u, sigma, v = _largest(*factors, rank)
            factored[k] = tuple(t.to(stack.dtype).contiguous() for t in (u, sigma, v))  # type: ignore[assignment]
    return [factored[k] for k in range(len(matrices))]


def check_rank(rank: Rank) -> None:
    """Refuse what is no rank."""
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    share = isinstance(rank, float) and 0 < rank <= 1
    if rank is not None and not whole and not share:
        raise ConfigError(
            f"rank={rank!r}: give a number of directions (1 or more), a share of the energy (0 to 1), or None"
        )


def _batched(stack: Tensor, rank: Rank) -> Iterator[Factored]:
    """Decompose [B, G, O, I]: by the smaller Gram matrix where that is exact enough."""
    if stack.dtype == torch.float64:
        yield from zip(*_svd(stack))
        return
    wide = stack.double()
    turned = wide.shape[-2] > wide.shape[-1]
    m = wide.mT if turned else wide
    values, vectors = torch.linalg.eigh(m @ m.mT)
    keep = min(rank, m.shape[-2]) if isinstance(rank, int) else m.shape[-2]
    left = vectors.flip(-1)[..., :keep]
    sigma = values.flip(-1)[..., :keep].clamp_min(0).sqrt()
    exact = (sigma[..., -1] >= SMALLEST_BY_GRAM * sigma[..., 0]).all(-1)
    right = (m.mT @ left) / sigma.clamp_min(torch.finfo(sigma.dtype).tiny).unsqueeze(-2)
    for row in range(len(stack)):
        if bool(exact[row]):
            u, v = (right, left) if turned else (left, right)
            yield u[row], sigma[row], v[row]
        else:
            yield _svd(wide[row])


def _svd(m: Tensor) -> Factored:
    u, sigma, vh = torch.linalg.svd(m, full_matrices=False)
    return u, sigma, vh.mT


def _largest(u: Tensor, sigma: Tensor, v: Tensor, rank: Rank) -> Factored:
    if isinstance(rank, float):
        energy = sigma.square().cumsum(-1)
        enough = energy >= rank * energy[..., -1:] * (1 - 1e-12)
        keep = int(enough.to(torch.int8).argmax(-1).max()) + 1  # the groups of a convolution keep equally many
    else:
        keep = sigma.shape[-1] if rank is None else min(rank, sigma.shape[-1])
    return u[..., :keep], sigma[..., :keep], v[..., :keep]
