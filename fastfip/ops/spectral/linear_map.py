"""The linear map of a layer whose weight moves along singular directions: products, and projections of both sides.

    W(delta) = W + U diag(s - sigma) V^T,    s = relu(sigma + delta)

Four forms of the products with W(delta), by cost; all but the first need no second weight in memory:

    held        W(delta) is there.
    recomposed  W(delta) is put together in scratch memory for the length of a product: K O I products.
    factored    the product with W is corrected: y = (1 + U diag((s - sigma) / sigma) U^T) (W x), or the same with V on
                the side of the input, K products a position and number of the narrower side.
    added       y = W x + U diag(s - sigma) (V^T x), where singular values are too small to divide by.

Along singular directions a product knows the projections already, x V = (W x) U / sigma = (W(delta) x) U / s and
g U = (W^T g) V / sigma = (W(delta)^T g) V / s, so p = x V and q = g U are taken on the narrower side of the weight (a
3 x 3 convolution's output has a ninth of the numbers of its unfolded input).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfip.ops.convolution import ConvShape
from fastfip.ops.memory import Scratch

__all__ = ["SpectralFactors", "SpectralMap", "WantedGradients", "is_even", "like_input", "prefers_dense", "recompose"]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

#: Directions below this share of the largest singular value are projected directly: the division by s multiplies a
#: product's rounding error by at most 1 / TINY.
TINY = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}

#: A number read or written costs as much as so many products: narrow layers are bound by memory. Measured on a CPU with
#: 3 x 3 convolutions of 16 to 512 channels and Linear layers of 384 to 1536; GPUs are balanced alike.
MOVED = 64


@dataclass
class WantedGradients:
    """Which gradients backward passes are for; autograd tells its own operations, but not a Python function.

    Attributes:
        deltas: whether those of delta and bias are wanted; False leaves them out of the passes under way.
    """

    deltas: bool = True


@dataclass(frozen=True)
class SpectralFactors:
    """The moving directions of a weight.

    Attributes:
        u: [G, O/G, K]. v: [G, I, K].
        sigma: [G, K], the singular values of W. s: [G, K], the present ones, relu(sigma + delta).
        weak: which of the K columns cannot be divided by their s, in any group; None: none of them.
        even: whether all columns can be divided by their sigma.
    """

    u: Tensor
    v: Tensor
    sigma: Tensor
    s: Tensor
    weak: Tensor | None = None
    even: bool = False

    @classmethod
    def of(
        cls,
        u: Tensor,
        v: Tensor,
        sigma: Tensor,
        delta: Tensor,
        dtype: torch.dtype | None = None,
        even: bool | None = None,
    ) -> SpectralFactors:
        """Return the directions at delta; `dtype` is that of the layer's products (None: that of u)."""
        s = torch.relu(sigma + delta)
        tiny = TINY[u.dtype if dtype is None else dtype]
        # W(delta) carries the rounding of W, so the largest of the weight's own singular values counts as well. A
        # direction at zero has no gradient whatever its projections are.
        largest = torch.maximum(s, sigma).amax(1, keepdim=True)
        small = ((s < tiny * largest) & (s > 0)).any(0)
        weak = small.nonzero()[:, 0] if bool(small.any()) else None
        return cls(u, v, sigma, s, weak, is_even(sigma, dtype) if even is None else even)


def is_even(sigma: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Return whether none of the singular values [G, K] is too small to divide a product of that dtype by."""
    tiny = TINY[sigma.dtype if dtype is None else dtype]
    return bool((sigma > 0).all()) and bool((sigma >= tiny * sigma.amax(1, keepdim=True)).all())


class SpectralMap:
    """A linear map, its adjoint, and the projections of both sides.

    `weight` is W(delta), or with `scratch` (memory to put W(delta) together in) W.
    """

    def __init__(
        self,
        weight: Tensor,
        factors: SpectralFactors,
        conv: ConvShape | None,
        wanted: WantedGradients | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        self.weight, self.f, self.conv, self.scratch = weight, factors, conv, scratch
        self.wanted = WantedGradients() if wanted is None else wanted
        _, self.o, self.k = factors.u.shape
        self.i = factors.v.shape[1]

    # -------------------- the map

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return y = W(delta) x + bias and p = x V."""
        change = self.f.s - self.f.sigma
        if self._added(x, after=True):
            p = self.right(x)
            y = self.product(x, self.weight, bias)
            y += self.left_adjoint(p * self._shaped(change.to(p.dtype)))
            return y, p
        if not self._factored(x, after=True):
            y = self.product(x, self._moved(), bias)
            return y, self._right_from(x, y, bias)
        if self._output_is_narrow:
            early = None if _rounds(bias, x) else bias
            y = self.product(x, self.weight, early)
            p = self._from_output(y, early, 1 / self.f.sigma)
            y += self.left_adjoint(p * self._shaped(change.to(p.dtype)))
            return (y if bias is early else y + self._by_feature(bias.to(y.dtype))), p  # type: ignore[union-attr]
        p = self.right(x)
        scaled = p * (change / self.f.sigma)[0].to(p.dtype)
        return self.product(x + scaled @ self.f.v[0].mT.to(x.dtype), self.weight, bias), p

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return y alone."""
        return self.forward(x, bias)[0] if self._corrected(x, after=True) else self.product(x, self._moved(), bias)

    def backward(self, g: Tensor, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return x = W(delta)^T g, of that size, and q = g U."""
        change = self.f.s - self.f.sigma
        if self._added(g, after=False):
            q = self.left(g)
            x = self._adjoint_times(g, self.weight, size)
            x += self.right_adjoint(q * self._shaped(change.to(q.dtype)), size)
            return x, q
        if not self._factored(g, after=False):
            x = self._adjoint_times(g, self._moved(), size)
            return x, self.left_from(g, x)
        if self._output_is_narrow:
            q = self.left(g)
            moved = g + self.left_adjoint(q * self._shaped((change / self.f.sigma).to(q.dtype)))
            return self._adjoint_times(moved, self.weight, size), q
        x = self._adjoint_times(g, self.weight, size)
        q = x @ (self.f.v[0] / self.f.sigma).to(x.dtype)
        x += (q * change[0].to(q.dtype)) @ self.f.v[0].mT.to(x.dtype)
        return x, q

    def adjoint_alone(self, g: Tensor, size: tuple[int, ...]) -> Tensor | None:
        """Return x of `backward` without q; None where q is on the way to it."""
        return None if self._corrected(g, after=False) else self._adjoint_times(g, self._moved(), size)

    def adjoint(self, g: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return x alone."""
        if self._corrected(g, after=False):
            return self.backward(g, size)[0]
        return self._adjoint_times(g, self._moved(), size)

    @property
    def _output_is_narrow(self) -> bool:
        return self.conv is not None or self.o <= self.i

    def _factored(self, t: Tensor, after: bool) -> bool:
        return self.f.even and self._corrected(t, after)

    def _added(self, t: Tensor, after: bool) -> bool:
        return not self.f.even and self._corrected(t, after)

    def _corrected(self, t: Tensor, after: bool) -> bool:
        """Whether correcting costs less than recomposing; `t` is the map's input or (not `after`) its output."""
        if self.scratch is None:
            return False
        if self.conv is None:
            return t.numel() // max(1, t.shape[-1]) < max(self.o, self.i)
        positions = t.numel() // max(1, t.shape[1])
        if after:
            positions //= math.prod(self.conv.stride)
        return positions < self.i

    def _moved(self) -> Tensor:
        if self.scratch is None:
            return self.weight
        return recompose(self.weight, self.f.u, self.f.s - self.f.sigma, self.f.v, self.scratch)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's own product with a weight."""
        c = self.conv
        if c is None:
            return F.linear(x, weight, bias)
        return _CONV[len(c.kernel)](x, weight, bias, c.stride, c.padding, c.dilation, c.groups)

    def _adjoint_times(self, g: Tensor, weight: Tensor, size: tuple[int, ...]) -> Tensor:
        return g @ weight if self.conv is None else _conv_adjoint(g, weight, self.conv, size)

    # -------------------- projections, on all directions or some (`columns`)

    def right(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        """Return x V: [.., K], for a convolution [N, G*K, *out]."""
        v, c = _pick(self.f.v, columns).to(x.dtype), self.conv
        if c is None:
            return x @ v[0]
        kernel = v.mT.reshape(-1, v.shape[1] // c.taps, *c.kernel)
        return _CONV[len(c.kernel)](x, kernel, None, c.stride, c.padding, c.dilation, c.groups)

    def right_adjoint(self, p: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return p V^T, as the map's input."""
        v, c = self.f.v.to(p.dtype), self.conv
        if c is None:
            return p @ v[0].mT
        return _conv_adjoint(p, v.mT.reshape(-1, v.shape[1] // c.taps, *c.kernel), c, size)

    def left(self, g: Tensor, columns: Tensor | None = None) -> Tensor:
        """Return g U, in the shape of `right`."""
        return self._across(g, _pick(self.f.u, columns))

    def left_adjoint(self, q: Tensor) -> Tensor:
        """Return q U^T, as the map's output."""
        return self._across(q, self.f.u.mT)

    def _across(self, g: Tensor, factor: Tensor) -> Tensor:
        """Return g times [G, A, B], channel group by channel group."""
        factor = factor.to(g.dtype)
        if self.conv is None:
            return g @ factor[0]
        groups, a, b = factor.shape
        # A matrix product: a convolution with 1 x 1 kernels would reorder the map first, at several times the cost.
        if groups == 1 and _channels_last(g):
            return (g.movedim(1, -1) @ factor[0]).movedim(-1, 1)
        product = factor.mT @ g.reshape(g.shape[0], groups, a, math.prod(g.shape[2:]))
        return product.reshape(g.shape[0], groups * b, *g.shape[2:])

    # -------------------- the same from the other side

    def _right_from(self, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        """Return x V, from y = W(delta) x + bias where that is cheaper."""
        if self.o >= self.i or _rounds(bias, y) or _many(self.f.weak, self.k):
            return self.right(x)
        return self._mend(self._from_output(y, bias, self._inverse()), lambda weak: self.right(x, weak))

    def _from_output(self, y: Tensor, bias: Tensor | None, inverse: Tensor) -> Tensor:
        scaled = self.f.u * inverse.unsqueeze(1)
        p = self._across(y, scaled)
        if bias is not None:
            moved = bias.to(self.f.u.dtype).reshape(self.f.u.shape[0], 1, self.o) @ scaled
            p -= self._shaped(moved[:, 0].to(y.dtype))
        return p

    def left_from(self, g: Tensor, x: Tensor | None) -> Tensor:
        """Return g U, from x = W(delta)^T g where there is one and that is cheaper."""
        if x is None or not self._left_from_input():
            return self.left(g)
        q = x @ (self.f.v[0] * self._inverse()).to(x.dtype)
        return self._mend(q, lambda weak: self.left(g, weak))

    def left_operands(self, g: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what `left_from` multiplies: an operand, its directions, and those that are to be had from g."""
        if x is None or not self._left_from_input():
            return g, self.f.u, None
        return x, self.f.v * self._inverse().unsqueeze(1), self.f.weak

    def _left_from_input(self) -> bool:
        return self.conv is None and self.i < self.o and not _many(self.f.weak, self.k)

    def _inverse(self) -> Tensor:
        return torch.where(self.f.s > 0, 1 / self.f.s, 0)

    def _mend(self, p: Tensor, direct: Callable[[Tensor], Tensor]) -> Tensor:
        weak = self.f.weak
        if weak is None:
            return p
        if self.conv is None:
            p[..., weak] = direct(weak)
        else:
            groups = self.f.s.shape[0]
            p.unflatten(1, (groups, -1))[:, :, weak] = direct(weak).unflatten(1, (groups, -1))
        return p

    def _shaped(self, per_direction: Tensor) -> Tensor:
        """[G, K] as it multiplies p."""
        return per_direction[0] if self.conv is None else per_direction.reshape(-1, *[1] * len(self.conv.kernel))

    def _by_feature(self, bias: Tensor) -> Tensor:
        """[O] as it is added to y."""
        return bias if self.conv is None else bias.reshape(-1, *[1] * len(self.conv.kernel))

    # -------------------- sums

    def total(self, p: Tensor, q: Tensor) -> Tensor:
        """sum_{n,t} p q as [G, K] in the precision of s, directions that are gone left out."""
        s = self.f.s
        if self.conv is None:
            product = (p * q).reshape(-1, s.shape[1]).sum(0, dtype=s.dtype)
        elif _channels_last(p):
            p, q = p.movedim(1, -1).flatten(0, -2), q.movedim(1, -1).flatten(0, -2)
            product = (p * q).sum(0, dtype=s.dtype)
        else:
            product = torch.linalg.vecdot(p.flatten(2), q.flatten(2)).sum(0, dtype=s.dtype)
        return product.reshape(s.shape) * (s > 0)

    def of_bias(self, gy: Tensor) -> Tensor:
        """Return the gradient of the bias [O], a sum over positions."""
        return gy.movedim(-1 if self.conv is None else 1, -1).flatten(0, -2).sum(0) if gy.dim() > 1 else gy


def recompose(
    weight: Tensor, u: Tensor, change: Tensor, v: Tensor, scratch: Scratch, out: Tensor | None = None
) -> Tensor:
    """Return weight + U diag(change) V^T, contiguous: in `out`, or in scratch memory that the next call overwrites."""
    out = scratch.take(tuple(weight.shape), weight) if out is None else out
    groups, o, _ = u.shape
    scaled = u * change.unsqueeze(1)
    if weight.dtype == u.dtype:
        out.copy_(weight).view(groups, o, -1).baddbmm_(scaled, v.mT)
        return out
    wide = scratch.take(tuple(weight.shape), u, slot=1)
    torch.bmm(scaled, v.mT, out=wide.view(groups, o, -1))
    return torch.add(weight, wide.to(weight.dtype), out=out)


def prefers_dense(u: Tensor, v: Tensor, taps: int | None, positions: int, weak: Tensor | None = None) -> bool:
    """Return whether the gradient of the whole weight costs less than the two projections, in products a position.

    Args:
        u: as in `SpectralFactors`.
        v: as there.
        weak: as there.
        taps: of a convolution's kernel; None for a Linear.
        positions: N T of the layer's output.
    """
    _, o, k = u.shape
    i = v.shape[1]
    narrow = min(o, i) if taps is None else o
    taps, weakly = taps or 1, 0 if weak is None else len(weak)
    if _many(weak, k):
        products, moved = k * (o + i), o + i // taps + 4 * k
    else:
        products = k * (narrow + min(narrow, o)) + weakly * i
        moved = 2 * narrow + 4 * k + (weakly + i // taps if weakly else 0)
    return o * i * (1 + k / max(1, positions)) < products + MOVED * moved


def _rounds(bias: Tensor | None, y: Tensor) -> bool:
    """Whether p cannot be read from y = W x + bias: in 16 bits a large bias leaves few digits of W x in it."""
    return bias is not None and y.dtype in (torch.bfloat16, torch.float16)


def _pick(factor: Tensor, columns: Tensor | None) -> Tensor:
    return factor if columns is None else factor[:, :, columns]


def _channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def format_of(x: Tensor) -> torch.memory_format:
    """Return the memory format of a map: channels last, or the usual one."""
    if not _channels_last(x):
        return torch.contiguous_format
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)


def _many(weak: Tensor | None, k: int) -> bool:
    """So many weak directions that projecting all of them directly costs no more than both ways together."""
    return weak is not None and 2 * len(weak) > k


def like_input(t: Tensor, x: Tensor) -> Tensor:
    """Return t in the memory format of x: a compiler wants to know it beforehand."""
    return t.contiguous(memory_format=format_of(x))


def _conv_adjoint(g: Tensor, weight: Tensor, c: ConvShape, size: tuple[int, ...]) -> Tensor:
    # The input's numbers are not read; an expanded one would be copied to its full size.
    x = torch.empty(size, dtype=g.dtype, device=g.device, memory_format=format_of(g))
    zeros = [0] * len(c.kernel)
    mask = [True, False, False]
    return torch.ops.aten.convolution_backward(
        g, x, weight, None, c.stride, c.padding, c.dilation, False, zeros, c.groups, mask
    )[0]
