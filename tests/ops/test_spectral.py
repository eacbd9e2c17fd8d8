"""spectral_linear and spectral_conv against autograd through the recomposed weight, in float64, twice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastfip.ops.backends import native
from fastfip.ops.convolution import ConvShape
from fastfip.ops.memory import Scratch
from fastfip.ops.spectral import grad, op
from fastfip.ops.spectral.linear_map import TINY, SpectralMap
from fastfip.ops.spectral.op import SpectralFactors, spectral_conv, spectral_linear

FORMS = ["held", "recomposed", "factored"]
SIZES = [(7, 5, 3), (5, 9, 4), (6, 6, 6), (3, 8, 1), (1, 4, 1)]  # O, I, K


class Weight:
    """A weight [G, O, I] with its K largest directions, and W(delta) as a function of delta."""

    def __init__(self, shape: tuple[int, ...], groups: int, k: int, dtype: torch.dtype = torch.float64) -> None:
        self.w = torch.randn(shape, dtype=dtype)
        matrix = self.w.reshape(groups, shape[0] // groups, -1)
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        self.u, self.sigma, self.v = u[..., :k].contiguous(), s[:, :k], vh.mT[..., :k].contiguous()
        self.delta = ((torch.rand(self.sigma.shape, dtype=dtype) - 0.5) * 0.2).requires_grad_(True)

    def of(self, delta: Tensor) -> Tensor:
        shift = torch.relu(self.sigma + delta) - self.sigma
        return self.w + ((self.u * shift.unsqueeze(1)) @ self.v.mT).reshape(self.w.shape)

    def now(self, delta: Tensor) -> tuple[Tensor, SpectralFactors]:
        with torch.no_grad():
            return self.of(delta), SpectralFactors.of(self.u, self.v, self.sigma, delta)

    def given(self, form: str) -> tuple[tuple[Tensor, SpectralFactors], Scratch | None]:
        """The op's weight, directions and scratch memory, which holds NaN."""
        value, factors = self.now(self.delta)
        if form == "held":
            return (value, factors), None
        scratch = Scratch()
        for slot in (0, 1):
            scratch.take(tuple(self.w.shape), self.w, slot=slot).fill_(torch.nan)
        return (self.w, factors), scratch


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The three forms of a product, one after the other, whatever is the cheapest."""
    possible = request.param == "factored"
    monkeypatch.setattr(SpectralMap, "_factored", lambda self, *args, **kwargs: possible and self.f.even)
    return request.param


def both_orders(make, inputs):
    """First derivatives, and the gradient of a function of them, of make(*inputs) -> y."""
    y = make(*inputs)
    first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.pow(3).sum() for g in first), inputs)
    return [y, *first, *second]


def agree(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("special", ["", "gone", "weak", "no input gradient"])
@pytest.mark.parametrize("o,i,k", SIZES)
def test_linear(o: int, i: int, k: int, special: str, form: str) -> None:
    torch.manual_seed(0)
    weight = Weight((o, i), 1, k)
    if special:
        with torch.no_grad():
            weight.delta[0, -1] = {"gone": -100.0}.get(special, 0.0)
            if special == "weak":  # so small a value that dividing by it would amplify rounding errors
                weight.delta[0, -1] = 1e-9 - weight.sigma[0, -1]
    x = torch.randn(4, 3, i, dtype=torch.float64, requires_grad=special != "no input gradient")
    bias = torch.randn(o, dtype=torch.float64, requires_grad=True)
    inputs = [t for t in (x, weight.delta, bias) if t.requires_grad]

    def by_op(*args: Tensor) -> Tensor:
        (value, factors), scratch = weight.given(form)
        assert (factors.weak is not None) == (special == "weak") and factors.even
        return spectral_linear(x, value, factors, weight.delta, bias, scratch=scratch)[0]

    agree(both_orders(by_op, inputs), both_orders(lambda *args: F.linear(x, weight.of(weight.delta), bias), inputs))
    given, scratch = weight.given(form)
    y, p = spectral_linear(x, *given, weight.delta, bias, scratch=scratch)
    torch.testing.assert_close(p[..., : k - 1], (x @ weight.v[0])[..., : k - 1], rtol=1e-9, atol=1e-9)


CONVS = {
    "1d": ((4, 3, 3), ConvShape((3,), (2,), (1,), (1,)), (3, 9)),
    "2d": ((5, 3, 3, 3), ConvShape((3, 3), (1, 1), (1, 1), (1, 1)), (3, 5, 6)),
    "strided dilated": ((4, 2, 3, 2), ConvShape((3, 2), (2, 1), (1, 0), (1, 2)), (2, 7, 6)),
    "groups": ((6, 2, 3, 3), ConvShape((3, 3), (1, 1), (0, 0), (1, 1), 3), (6, 5, 5)),
    "depthwise": ((4, 1, 3, 3), ConvShape((3, 3), (1, 1), (1, 1), (1, 1), 4), (4, 5, 5)),
    "pointwise": ((5, 3, 1, 1), ConvShape((1, 1), (1, 1), (0, 0), (1, 1)), (3, 4, 4)),
    "3d": ((3, 2, 2, 2, 2), ConvShape((2, 2, 2), (1, 1, 1), (1, 0, 1), (1, 1, 1)), (2, 3, 4, 3)),
}


@pytest.mark.parametrize("k", [1, 2, 99])
@pytest.mark.parametrize("name", CONVS)
def test_convolution(name: str, k: int, form: str) -> None:
    torch.manual_seed(1)
    size, shape, space = CONVS[name]
    weight = Weight(size, shape.groups, k)
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(shape.kernel)]
    x = torch.randn(3, *space, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(size[0], dtype=torch.float64, requires_grad=True)
    inputs = [x, weight.delta, bias]

    def by_op(*args: Tensor) -> Tensor:
        given, scratch = weight.given(form)
        return spectral_conv(x, *given, weight.delta, shape, bias, scratch=scratch)[0]

    def plain(*args: Tensor) -> Tensor:
        return conv(x, weight.of(weight.delta), bias, shape.stride, shape.padding, shape.dilation, shape.groups)

    agree(both_orders(by_op, inputs), both_orders(plain, inputs))


@pytest.mark.parametrize("k", [1, 2, 99])
def test_transposed_convolution(k: int, form: str) -> None:
    torch.manual_seed(2)
    weight = Weight((4, 3, 3, 3), 2, k)
    shape = ConvShape((3, 3), (2, 2), (1, 1), (1, 1), 2)
    x = torch.randn(2, 4, 4, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    inputs = [x, weight.delta, bias]

    def plain(*args: Tensor) -> Tensor:
        return F.conv_transpose2d(x, weight.of(weight.delta), bias, 2, 1, 1, 2)

    size = tuple(plain().shape)

    def by_op(*args: Tensor) -> Tensor:
        given, scratch = weight.given(form)
        return spectral_conv(x, *given, weight.delta, shape, bias, transposed_to=size, scratch=scratch)[0]

    agree(both_orders(by_op, inputs), both_orders(plain, inputs))


@pytest.fixture(params=[False, True], ids=["q", "fused"])
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether first derivatives go without q, as they do where the kernel is the faster one; a list of the calls."""
    if request.param and not native.available():
        pytest.skip(native.reason())
    calls: list[bool] = []
    monkeypatch.setattr(op, "prefers_kernel", lambda *operands: calls.append(request.param) or request.param)
    monkeypatch.setattr(grad, "kernel_is_faster", lambda *operands: True)
    return calls


@pytest.mark.parametrize("special", ["", "gone", "weak", "no input gradient"])
@pytest.mark.parametrize("o,i,k", SIZES)
def test_first_derivatives_of_linear(o: int, i: int, k: int, special: str, form: str, fused: list[bool]) -> None:
    torch.manual_seed(0)
    weight = Weight((o, i), 1, k)
    if special in ("gone", "weak"):
        with torch.no_grad():
            weight.delta[0, -1] = -100.0 if special == "gone" else 1e-9 - weight.sigma[0, -1]
    x = torch.randn(4, 3, i, dtype=torch.float64, requires_grad=special != "no input gradient")
    bias = torch.randn(o, dtype=torch.float64, requires_grad=True)
    inputs = [t for t in (x, weight.delta, bias) if t.requires_grad]
    given, scratch = weight.given(form)
    y = spectral_linear(x, *given, weight.delta, bias, scratch=scratch)[0]
    want = torch.autograd.grad(F.linear(x, weight.of(weight.delta), bias).sin().sum(), inputs)
    agree(torch.autograd.grad(y.sin().sum(), inputs), want)
    assert fused or form == "factored"


@pytest.mark.parametrize("k", [1, 2, 99])
@pytest.mark.parametrize("name", CONVS)
def test_first_derivatives_of_convolutions(name: str, k: int, form: str, fused: list[bool]) -> None:
    torch.manual_seed(1)
    size, shape, space = CONVS[name]
    weight = Weight(size, shape.groups, k)
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(shape.kernel)]
    x = torch.randn(3, *space, dtype=torch.float64, requires_grad=True)
    given, scratch = weight.given(form)
    y = spectral_conv(x, *given, weight.delta, shape, scratch=scratch)[0]
    options = shape.stride, shape.padding, shape.dilation, shape.groups
    plain = conv(x, weight.of(weight.delta), None, *options)
    inputs = [x, weight.delta]
    agree(torch.autograd.grad(y.sin().sum(), inputs), torch.autograd.grad(plain.sin().sum(), inputs))
    assert fused or form == "factored"


def test_gradgradcheck() -> None:
    torch.manual_seed(3)
    weight = Weight((3, 5), 1, 2)
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)

    def by_op(x: Tensor, delta: Tensor) -> Tensor:
        return spectral_linear(x, *weight.now(delta), delta)[0]

    assert torch.autograd.gradcheck(by_op, (x, weight.delta))
    assert torch.autograd.gradgradcheck(by_op, (x, weight.delta))


def test_no_gradient_of_a_whole_weight_is_formed() -> None:
    """The saving that the op is for: neither the forward nor the backward pass makes a second O x I tensor."""
    from torch.utils._python_dispatch import TorchDispatchMode

    torch.manual_seed(4)
    weight = Weight((480, 400), 1, 4, torch.float32)
    x = torch.randn(640, 400, requires_grad=True)
    value, factors = weight.now(weight.delta)
    made: list[torch.Size] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend([out.shape] if isinstance(out, Tensor) and out.data_ptr() != value.data_ptr() else [])
            return out

    with Watch():
        spectral_linear(x, value, factors, weight.delta)[0].pow(2).sum().backward()
    assert made and all(sorted(shape) != [400, 480] for shape in made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_division_by_s_keeps_the_precision(dtype: torch.dtype) -> None:
    """p by the narrow side is as good as x V itself up to 1 / TINY times the precision of the products."""
    torch.manual_seed(5)
    weight = Weight((8, 64), 1, 8, torch.float32)
    with torch.no_grad():
        weight.delta.copy_(-weight.sigma + weight.sigma[0, 0] * torch.logspace(0, -5, 8))
    value, factors = weight.now(weight.delta)
    factors = SpectralFactors.of(factors.u, factors.v, weight.sigma, weight.delta.detach(), dtype)
    assert factors.weak is not None and 0 < len(factors.weak) < 8
    x = torch.randn(256, 64)
    p = spectral_linear(x.to(dtype), value.to(dtype), factors, weight.delta)[1]
    error = (p.detach().double() - x.to(dtype).double() @ weight.v[0].double()).abs().max() / x.abs().max()
    assert error < 8 * torch.finfo(dtype).eps / TINY[dtype]


def test_refusals() -> None:
    weight = Weight((3, 5), 1, 2)
    value, factors = weight.now(weight.delta)
    with pytest.raises(ValueError, match="do not fit"):
        spectral_linear(torch.randn(2, 5, dtype=torch.float64), value, factors, weight.delta[:, :1])
    with pytest.raises(ValueError, match="numbers of its factors"):
        spectral_linear(torch.randn(2, 5, dtype=torch.float64), value[:2], factors, weight.delta)
    with pytest.raises(ValueError, match="cast one of them"):
        spectral_linear(torch.randn(2, 5), value, factors, weight.delta)
