"""Gram matrices of rows and of the windows of a convolution."""

import pytest
import torch

from fastfip.ops.convolution import ConvShape, columns, columns_transpose
from fastfip.ops.grad_norm_squared.gram import Lattice, gram


@pytest.mark.parametrize("size", [(2, 5, 3), (2, 200, 7), (3, 193, 1), (0, 200, 4), (2, 1, 4)])
@pytest.mark.parametrize("turned", [False, True])
def test_gram(size, turned, nan_empty):
    b, t, d = size
    x = torch.randn(b, d, t, dtype=torch.float64).mT if turned else torch.randn(b, t, d, dtype=torch.float64)
    torch.testing.assert_close(gram(x), x @ x.mT)
    room = torch.empty(b, 2, t, t, dtype=torch.float64)
    gram(x, room[:, 1])
    torch.testing.assert_close(room[:, 1], x @ x.mT)


SHAPES = [
    # kernel, padding, dilation, groups, size
    ((3, 3), (1, 1), (1, 1), 1, (4, 5)),
    ((3, 2), (2, 0), (1, 2), 2, (5, 6)),
    ((5,), (3,), (2,), 1, (11,)),
    ((2, 3, 2), (1, 2, 0), (1, 1, 2), 1, (3, 4, 4)),
    ((1, 1), (0, 0), (1, 1), 2, (3, 2)),
    ((4, 4), (0, 0), (1, 1), 1, (4, 4)),
]


@pytest.mark.parametrize("case", SHAPES)
def test_lattice(case, nan_empty):
    """Both sums of moved copies against the windows themselves, for samples that lie next to each other."""
    kernel, padding, dilation, groups, size = case
    shape = ConvShape(kernel, (1,) * len(size), padding, dilation, groups)
    out_size = tuple(n + 2 * p - d * (k - 1) for n, p, d, k in zip(size, padding, dilation, kernel))
    x = torch.randn(3, 4, *size, dtype=torch.float64)
    cols = columns(x, shape, out_size).flatten(0, 1)  # [B*groups, I, T]
    assert Lattice.serves(shape)
    lattice = Lattice(shape, size, out_size)

    found = lattice.windows(gram(lattice.of_input(x, groups).mT))
    t = cols.shape[2]
    places = torch.arange(lattice.places, dtype=torch.float64).view(1, 1, -1)
    at = lattice.output(places, 1).flatten().long()
    torch.testing.assert_close(found[:, at][:, :, at], cols.mT @ cols)

    weights = torch.randn(len(cols), t, t, dtype=torch.float64)  # M of any matrix over the positions
    spread = torch.zeros_like(found)
    spread[:, at[:, None], at] = weights
    got = lattice.input(lattice.of_input(x, groups) @ lattice.windows_transpose(spread), 3)
    want = columns_transpose((cols @ weights).view(3, groups, -1, t), shape, size, out_size)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("stride, padding", [(2, 1), (1, 3)])
def test_what_has_no_lattice(stride, padding):
    assert not Lattice.serves(ConvShape((3, 3), (1, stride), (1, padding), (1, 1)))
