"""The windows of a convolution."""

from __future__ import annotations

import torch

from fastfip.ops.convolution import ConvShape, columns


def test_the_gradient_at_an_expanded_leaf_is_that_of_its_copy() -> None:
    shape = ConvShape((2, 2), (1, 1), (0, 0), (1, 1), 1)
    upstream = torch.randn(3, 1, 8, 9, dtype=torch.float64)
    one = torch.randn(1, 2, 1, 4, dtype=torch.float64).expand(3, 2, 4, 4).detach().requires_grad_()
    other = one.detach().clone().requires_grad_()
    for x in (one, other):
        (columns(x, shape, (3, 3)) * upstream).sum().backward()
    torch.testing.assert_close(one.grad, other.grad)
