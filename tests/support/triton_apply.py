"""What the Triton kernel of spectral_apply and its adjoint must do: see triton_kernels.py, which is run likewise."""

import pytest
import torch

from fastfip.errors import BackendError
from fastfip.ops import ConvShape, spectral_adjoint, spectral_apply
from fastfip.ops.backends.triton import interpreted
from fastfip.ops.registry import OPS
from fastfip.ops.spectral.linear_map import like_input
from tests.ops.test_spectral_apply import Layer

assert interpreted() or torch.cuda.is_available(), "run with TRITON_INTERPRET=1 or on a machine with a GPU"
DEVICE = "cpu" if interpreted() else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LINEAR = [  # sizes of the batch, O, I, K
    ((), 1, 1, 1),
    ((5,), 7, 5, 3),
    ((2, 3), 20, 33, 17),
    ((70,), 130, 40, 33),
    ((1, 65), 40, 270, 16),
    ((3,), 129, 131, 128),
    ((0, 3), 4, 5, 2),
]
CONVS = [  # N, in, C, O, K, groups
    (2, (7,), 3, 4, 2, 1),
    (3, (6, 11), 6, 10, 3, 2),
    (1, (2, 3, 2), 70, 150, 17, 1),
    (2, (0, 2), 3, 4, 2, 1),
]


class Problem:
    """Operands of the op in one dtype, and what it returns by definition, of those very operands, in float64."""

    def __init__(self, layer, dtype):
        self.shape = layer.shape
        self.u, self.v, self.sigma = (t.float().to(DEVICE) for t in (layer.u, layer.v, layer.sigma))
        # Far from where they were, and one in three gone: the correction is as large as the product.
        self.delta = self.sigma * (torch.rand_like(self.sigma) * 2 - 1)
        self.delta[:, ::3] = -2 * self.sigma[:, ::3]
        self.bias = layer.bias.detach().to(DEVICE, dtype)
        self.weight = layer.weight.to(DEVICE, dtype)
        self.there = self.moved_weight(self.weight.double())

    def moved_weight(self, weight):
        u, v, sigma, delta = (t.double() for t in (self.u, self.v, self.sigma, self.delta))
        change = torch.relu(sigma + delta) - sigma
        return weight + ((u * change.unsqueeze(1)) @ v.mT).reshape(weight.shape)

    def operands(self, moved):
        weight = self.there.to(self.weight.dtype) if moved else self.weight
        return weight, self.u, self.v, self.sigma, self.delta

    def check(self, x, g, moved, bias):
        weight, *rest = self.operands(moved)
        options = {"moved": moved, "backend": "triton"}
        y, p = spectral_apply(x, weight, *rest, self.bias if bias else None, self.shape, **options)
        back, q = spectral_adjoint(g, weight, *rest, x.shape, self.shape, **options)
        # What is in W and taken away again leaves its error.
        parts = [(weight if moved else self.there).double(), self.weight.double()]
        more = self.bias.reshape(-1, *[1] * (0 if self.shape is None else len(self.shape.kernel))) if bias else 0
        right, left = (f.double().mT.flatten(0, 1) for f in (self.v, self.u))
        close(y, *(self.times(x, w.flatten(1)) + more for w in parts), x)
        close(p, self.times(x, right), 0, x)
        groups, i, _ = self.v.shape
        close(back, *(self.times(g, w.reshape(groups, -1, i).mT.flatten(0, 1)) for w in parts), g)
        close(q, self.times(g, left), 0, g)

    def times(self, x, matrix):
        """x times a matrix [G * rows, columns], group by group, in float64."""
        if self.shape is None:
            return x.double() @ matrix.mT
        matrix = matrix.reshape(self.shape.groups, -1, matrix.shape[1])
        x = x.double().unflatten(1, (self.shape.groups, -1))
        return torch.einsum("gab,ngb...->nga...", matrix, x).flatten(1, 2)


def close(got, want, before, x):
    """The interpreter cuts bfloat16 off where a device rounds."""
    assert got.shape == want.shape and got.dtype == x.dtype and torch.isfinite(got).all()
    assert got.stride() == like_input(got, x).stride()
    error = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}[x.dtype]
    size = max(want.norm(), torch.as_tensor(before, dtype=torch.float64).norm())
    assert (got.double() - want).norm() <= error * size


def linear(case, dtype=torch.float32):
    batch, o, i, k = case
    problem = Problem(Layer(o, i, k), dtype)
    return problem, *(torch.randn(*batch, size, device=DEVICE).to(dtype) for size in (i, o))


def conv(case, dtype=torch.float32):
    n, size, c, o, k, groups = case
    ones = (1,) * len(size)
    problem = Problem(Layer(o, c, k, (ones, ones, (0,) * len(size), ones, groups)), dtype)
    return problem, *(torch.randn(n, channels, *size, device=DEVICE).to(dtype) for channels in (c, o))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LINEAR)
def test_linear(case, dtype, moved, bias, nan_empty):
    problem, x, g = linear(case, dtype)
    problem.check(x, g, moved, bias)


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CONVS)
def test_pointwise_convolutions(case, dtype, moved, nan_empty):
    problem, x, g = conv(case, dtype)
    problem.check(x, g, moved, True)
    if len(problem.shape.kernel) == 2:
        x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
        problem.check(x, g, moved, True)


@pytest.mark.parametrize("moved", [False, True])
def test_strides(moved):
    problem, *_ = linear(((1,), 8, 20, 5))
    x = torch.randn(41, 30, 50, device=DEVICE).permute(1, 2, 0)[::3, ::2, 1::2]  # [10, 25, 20]
    g = torch.randn(25, 10, 16, device=DEVICE).transpose(0, 1)[..., ::2]
    problem.u, problem.v = problem.u.mT.contiguous().mT, problem.v.repeat(1, 1, 2)[..., :5]
    problem.bias = torch.stack([problem.bias, problem.bias], 1)[:, 0]
    for form in (lambda w: w.mT.contiguous().mT, lambda w: w.repeat_interleave(2, 1)[:, ::2]):
        problem.weight, problem.there = form(problem.weight), form(problem.there)
        problem.check(x, g, moved, True)
    problem, x, g = conv(CONVS[1])
    problem.check(x.mT.contiguous().mT[:2], g.repeat(1, 2, 1, 1)[:2, ::2], moved, True)


def test_far_apart():
    """A tile of rows begins beyond 2^31 numbers; the memory between them is never touched."""
    problem, *_ = linear(((1,), 4, 5, 2), torch.float16)
    x = torch.empty(130 << 24, dtype=torch.float16, device=DEVICE).as_strided((130, 5), (1 << 24, 1))
    x.copy_(torch.randn(130, 5))
    y, p = spectral_apply(x, *problem.operands(False), backend="triton")
    again = spectral_apply(x.contiguous(), *problem.operands(False), backend="triton")
    assert torch.equal(y, again[0]) and torch.equal(p, again[1])


@pytest.mark.parametrize("make, case", [(linear, LINEAR[2]), (conv, CONVS[1])])
def test_derivatives(make, case):
    """First ones through the gradients of the reference, those of a graph through the kernel of the adjoint."""
    problem, x, g = make(case)
    inputs = [t.requires_grad_() for t in (x, problem.delta, problem.bias)]
    w = torch.randn_like(x)
    found = []
    for backend in ("triton", "reference"):
        y, p = spectral_apply(x, *problem.operands(False), problem.bias, problem.shape, backend=backend)
        first = torch.autograd.grad((y * g).sum(), inputs, retain_graph=True)
        with_p = torch.autograd.grad(y.square().sum() + p.pow(3).sum(), inputs, create_graph=True)
        second = torch.autograd.grad((with_p[0] * w).sum() + with_p[1].square().sum(), inputs)
        back, q = spectral_adjoint(g, *problem.operands(False), x.shape, problem.shape, backend=backend)
        adjoint = torch.autograd.grad((back * w).sum() + q.square().sum(), [problem.delta])
        found.append([*first, *with_p, *second, *adjoint])
    for got, want in zip(*found):
        assert torch.isfinite(got).all() and got.shape == want.shape
        assert (got - want).norm() <= 2e-5 * want.norm()


def test_it_waits_for_no_number(monkeypatch):
    """A look at a number would wait for the device, and cannot be captured in a graph of CUDA's."""
    problem, x, g = linear(LINEAR[1])

    def look(*_):
        raise AssertionError("a number was looked at")

    for name in ("__bool__", "item", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, look)
    spectral_apply(x, *problem.operands(False), problem.bias, backend="triton")
    spectral_adjoint(g, *problem.operands(False), x.shape, backend="triton")


def test_refusals_have_reasons():
    problem, x, _ = linear(LINEAR[1])
    window = ConvShape((1, 1), (2, 1), (0, 0), (1, 1))
    wide = [t.double() for t in (x, *problem.operands(False))]
    many = Problem(Layer(130, 130, 129), torch.float32)
    with pytest.raises(BackendError, match=r"has no torch\.float64"):
        spectral_apply(*wide, backend="triton")
    with pytest.raises(BackendError, match="at most 128 directions, not 129"):
        spectral_apply(torch.randn(2, 130, device=DEVICE), *many.operands(False), backend="triton")
    problem, x, g = conv(CONVS[1])
    with pytest.raises(BackendError, match="one tap, stride 1 and no padding"):
        spectral_apply(x, *problem.operands(False), shape=window, backend="triton")
    with pytest.raises(BackendError, match="one tap, stride 1 and no padding"):
        size = (*x.shape[:2], 2 * g.shape[2] - 1, g.shape[3])
        spectral_adjoint(g, *problem.operands(False), size, window, backend="triton")
    far = torch.zeros(1, device=DEVICE).expand(3, 2**24 + 1)
    for op in ("spectral_apply", "spectral_adjoint"):
        refuses = OPS[op]["triton"].refuses
        assert "at most 16777216 features" in refuses(x, far, problem.u, problem.v, None)
