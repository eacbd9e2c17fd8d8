"""Singular value decompositions of weights: all directions, or the largest.

A few of the largest of a large matrix are found by iteration (`fastfip.spectral.leading`). The others are decomposed
in float64, so that the factors are exact to the last bit of the precision they are kept in: small matrices of one shape
together, larger ones one at a time, since their copies would need more memory than the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fastfip.errors import ConfigError
from fastfip.spectral.leading import SMALLEST, largest, pays

__all__ = ["Factored", "Rank", "check_rank", "decompose"]

#: None: all directions; an int: at most so many of the largest of each group; a float: the fewest whose squares sum to
#: this share of all of them.
Rank = int | float | None

Factored = tuple[Tensor, Tensor, Tensor]

#: Numbers of the matrices that are decomposed together: 8 MB in float64.
TOGETHER = 1 << 20


def decompose(matrices: Iterable[Tensor], rank: Rank = None) -> list[Factored]:
    """Return u [G, O, K], sigma [G, K] (falling) and v [G, I, K] of each matrix [G, O, I], in float32 or its float64.

    Columns are orthonormal. With an int rank much smaller than the matrix, W v = sigma u and W^T u = sigma v hold up to
    `leading.TOLERANCE` sigma, and of directions that are as good as equally large others than the first K may be found;
    in all other cases both hold up to rounding. The same matrices always have the same factors.

    Raises:
        ConfigError: the rank is no positive int and no float between 0 and 1.
    """
    check_rank(rank)
    factored: dict[int, Factored] = {}
    waiting: dict[tuple[object, ...], dict[int, Tensor]] = {}
    for k, matrix in enumerate(matrices):
        found = _iterated(matrix, rank)
        if found is not None:
            factored[k] = found
            continue
        alike = waiting.setdefault((tuple(matrix.shape), matrix.dtype, matrix.device), {})
        alike[k] = matrix
        if len(alike) * matrix.numel() >= TOGETHER:
            factored.update(_together(alike, rank))
            alike.clear()
    for alike in waiting.values():
        factored.update(_together(alike, rank))
    return [factored[k] for k in range(len(factored))]


def check_rank(rank: Rank) -> None:
    """Refuse what is no rank."""
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    share = isinstance(rank, float) and 0 < rank <= 1
    if rank is not None and not whole and not share:
        raise ConfigError(
            f"rank={rank!r}: give a number of directions (1 or more), a share of the energy (0 to 1), or None"
        )


def _iterated(matrix: Tensor, rank: Rank) -> Factored | None:
    """Decompose [G, O, I] by iteration, group by group; None where that does not pay or does not converge."""
    groups, rows, columns = matrix.shape
    if not isinstance(rank, int) or matrix.dtype == torch.float64 or not pays(rows, columns, rank):
        return None
    factors = (
        matrix.new_empty(groups, rows, rank, dtype=torch.float32),
        matrix.new_empty(groups, rank, dtype=torch.float32),
        matrix.new_empty(groups, columns, rank, dtype=torch.float32),
    )
    for group, m in enumerate(matrix):
        turned = rows > columns
        found = largest((m.mT if turned else m).float(), rank)
        if found is None:
            return None
        for kept, new in zip(factors, reversed(found) if turned else found):
            kept[group] = new
    return factors


def _together(alike: dict[int, Tensor], rank: Rank) -> dict[int, Factored]:
    """Decompose matrices [G, O, I] of one shape exactly; None of them: nothing."""
    out: dict[int, Factored] = {}
    if alike:
        stack = torch.stack([m if m.dtype == torch.float64 else m.float() for m in alike.values()])
        for k, factors in zip(alike, _batched(stack, rank)):
            u, sigma, v = (t.to(stack.dtype).contiguous() for t in _largest(*factors, rank))
            out[k] = u, sigma, v
    return out


def _batched(stack: Tensor, rank: Rank) -> Iterator[Factored]:
    """Decompose [B, G, O, I]: by the smaller Gram matrix where that is exact enough, at a tenth of the cost."""
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
    exact = ((sigma[..., -1] >= SMALLEST * sigma[..., 0]) & (sigma[..., -1] > 0)).all(-1)
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
