"""The largest singular triplets of a matrix: a Chebyshev-filtered subspace iteration, checked by its residuals.

A block of random vectors is multiplied by a polynomial of the Gram matrix that is small on all eigenvalues below those
of the block and grows above them; the eigenvectors within the block (Rayleigh-Ritz) give the next interval, and how
much is left to do (Zhou and Saad, "A Chebyshev-Davidson algorithm for large symmetric eigenproblems", SIAM J. Matrix
Anal. Appl. 29, 2007). These products are in float32. The last step is exact in float64:

    u = X R, v = M^T X R / s,    with R and s^2 the eigenvectors and eigenvalues of (M^T X)^T (M^T X)

so that M^T u = s v and orthonormal columns are true of it whatever X is. What X lacks shows in |M v - s u| alone, which
is measured; where it is too much, power iterations in float64 take what float32 has rounded off.

Spectra without gaps, those of random initialisations, are no obstacle: which of nearly equal directions the block ends
with does not matter to whoever moves along them, as long as each is a singular vector by its residual. Exactly equal
ones, more than the block has room for, leave nothing for the filter to tell apart, and it gives up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["SMALLEST", "TOLERANCE", "largest", "pays"]

#: |M v - s u| / s that is left at most. A float32 decomposition by LAPACK leaves four times as much.
TOLERANCE = 4 * torch.finfo(torch.float32).eps

#: A singular value from Gram matrices in float64 has the relative error eps (s_1 / s)^2: below this share of s_1 it is
#: no longer right to float32.
SMALLEST = 1e-4

#: The iteration pays for matrices with so many rows and columns, and so many times as many as are asked for.
LEAST_SIZE, LEAST_SHARE = 256, 7

#: Products in float32 and rounds in float64 after which the iteration gives up.
MOST_PRODUCTS, MOST_ROUNDS = 80, 5

#: Largest degree of the first filter, whose interval is a guess, and of the others.
FIRST, LATER = 4, 12

#: How far the largest eigenvalue may outgrow the smallest wanted one in a filter, as a natural logarithm: what float32
#: rounds off must stay smaller than the columns.
MOST_GROWTH = 16.0


def pays(rows: int, columns: int, k: int) -> bool:
    """Return whether k triplets of such a matrix are found faster by iteration than all of them at once."""
    least = min(rows, columns)
    return least >= LEAST_SIZE and least >= LEAST_SHARE * k


def largest(m: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return u [n, k], s [k] (falling) and v [N, k], in float64, of m [n, N], n <= N, in float32.

    The start is drawn with a seed of its own.

    Returns:
        None where the residuals do not fall below `TOLERANCE`, where s_k is below `SMALLEST` of s_1, and where squares
        would leave the range of float32.
    """
    if not 1e-12 < float(torch.linalg.vector_norm(m)) < 1e12:
        return None
    x = _iterated(_gram(m), k)
    if x is None:
        return None
    wide = m.double()
    (u, s, v), residual = _triplets(wide, x[:, :k], k)
    for _ in range(MOST_ROUNDS):
        if residual <= TOLERANCE:
            return (u, s, v) if float(s[-1]) >= SMALLEST * float(s[0]) else None
        x = torch.linalg.qr(((x.mT @ wide) @ wide.mT).mT).Q
        (u, s, v), residual = _triplets(wide, x, k)
    return None


def _gram(m: Tensor) -> Tensor:
    """Return m m^T, a quarter of it by symmetry."""
    n = m.shape[0]
    half = n // 2
    out = m.new_empty(n, n)
    torch.mm(m[half:], m.mT, out=out[half:])
    torch.mm(m[:half], m[:half].mT, out=out[:half, :half])
    out[:half, half:] = out[half:, :half].mT
    return out


def _iterated(g: Tensor, k: int) -> Tensor | None:
    """Return a block [n, b] of float64 that begins with the k largest eigenvectors of g, right to its rounding."""
    n = g.shape[0]
    x = _drawn(n, min(n, k + max(16, k // 2)), g)
    before, spent, cap, last = math.inf, 0, FIRST, False
    while spent < MOST_PRODUCTS:
        # The rounding of this step is what the residual would end at: in float64 once it may be the last one.
        x, y, values = _rotated(g, torch.linalg.qr(x.double() if last else x).Q)
        top, least, cut = float(values[0]), float(values[k - 1]), float(values[-1])
        worst = float(((y - x * values)[:, :k].norm(dim=0) / values[:k]).max())
        if worst <= TOLERANCE or worst > before / 2 or cut <= 1e-6 * top:
            return x.double()
        if least <= cut:
            return None
        rate = math.acosh(2 * least / cut - 1)
        growth = math.acosh(2 * top / cut - 1) - rate
        needed = math.ceil(math.log(4 * worst / TOLERANCE) / rate)
        degree = max(2, min(needed, cap, int(MOST_GROWTH / (growth + 1e-9))))
        x = _filtered(g, x.to(g.dtype), y.to(g.dtype), degree, cut, top)
        before, spent, cap, last = worst, spent + degree, LATER, degree >= needed
    return None


def _drawn(rows: int, columns: int, like: Tensor) -> Tensor:
    """The start: the same for every call, whatever torch's default dtype and device are."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(rows, columns, generator=generator, dtype=like.dtype, device="cpu").to(like.device)


def _rotated(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the eigenvectors of g within an orthonormal block, g times them, and the eigenvalues, falling."""
    y = (g @ x.to(g.dtype)).to(x.dtype)
    inner = x.mT @ y
    values, vectors = torch.linalg.eigh((inner + inner.mT) / 2)
    vectors = vectors.flip(-1)
    return x @ vectors, y @ vectors, values.flip(-1)


def _filtered(g: Tensor, x: Tensor, y: Tensor, degree: int, cut: float, top: float) -> Tensor:
    """Return T(g) x in columns of length 1, T the Chebyshev polynomial that is at most 1 on [0, cut]; y = g x.

    On the way the polynomials are scaled to be 1 at `top`, so that nothing overflows.
    """
    half = cut / 2
    first = scale = half / (top - half)
    old, new = x, (y - half * x) * (scale / half)
    for _ in range(degree - 1):
        following = 1 / (2 / first - scale)
        product = torch.addmm(new, g, new, beta=-2 * following, alpha=2 * following / half)
        old, new, scale = new, product.sub_(old, alpha=scale * following), following
    return new / new.norm(dim=0)


def _triplets(m: Tensor, x: Tensor, k: int) -> tuple[tuple[Tensor, Tensor, Tensor], float]:
    """Return the k largest u, s and v within orthonormal left vectors [n, b], and their largest residual over s."""
    # Rows for vectors: on a CPU such products take half the time of m^T x, whichever way m lies in memory.
    y = x.mT @ m
    values, vectors = torch.linalg.eigh(y @ y.mT)
    s = values.flip(-1)[:k].clamp_min(torch.finfo(m.dtype).tiny).sqrt()
    vectors = vectors.flip(-1)[:, :k]
    u, v = vectors.mT @ x.mT, (vectors.mT @ y) / s.unsqueeze(1)
    residual = float(((v @ m.mT - u * s.unsqueeze(1)).norm(dim=1) / s).max())
    return (u.mT, s, v.mT), residual
