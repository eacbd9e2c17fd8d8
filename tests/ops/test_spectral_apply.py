"""spectral_apply and its adjoint against W(delta) itself in float64: every backend, derivative, graph, transform."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from fastfip.ops import ConvShape, spectral_adjoint, spectral_apply
from fastfip.ops.convolution import arguments_of
from fastfip.ops.registry import OPS
from fastfip.ops.spectral.apply import spectral_layer
from tests.support.opchecks import registered

X = torch.zeros(1, 1)
BACKENDS = [b.name for b in OPS["spectral_apply"].backends if not b.refuses(X, X, X, X, None)]
LINEAR = [  # sizes of the batch, O, I, K
    ((), 3, 4, 2),
    ((1,), 1, 1, 1),
    ((5,), 7, 5, 3),
    ((2, 3), 5, 9, 4),
    ((2, 1, 3), 6, 6, 6),
    ((40,), 9, 70, 8),
    ((40,), 70, 9, 8),
    ((0, 3), 4, 5, 2),
]
CONVS = [  # N, in, C, O, K, kernel, stride, padding, dilation, groups
    (2, (7,), 3, 4, 2, (3,), (1,), (1,), (1,), 1),
    (2, (6, 5), 4, 6, 3, (3, 2), (2, 1), (1, 0), (1, 2), 2),
    (1, (4, 4), 5, 3, 3, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (3, (3, 4, 3), 2, 4, 2, (2, 2, 1), (1, 2, 1), (1, 0, 0), (1, 1, 1), 2),
]
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Layer:
    """A weight, some of its directions, delta and a bias, and what they are by definition."""

    def __init__(self, o: int, i: int, k: int, conv: tuple = (), dtype: torch.dtype = torch.float64) -> None:
        kernel, stride, padding, dilation, groups = conv or ((), (), (), (), 1)
        self.shape = ConvShape(kernel, stride, padding, dilation, groups) if conv else None
        self.weight = torch.randn(o, i // groups, *kernel, dtype=dtype)
        matrix = self.weight.reshape(groups, o // groups, -1)
        u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
        self.u, self.sigma, self.v = u[..., :k].contiguous(), sigma[:, :k].contiguous(), vh.mT[..., :k].contiguous()
        self.delta = ((torch.rand_like(self.sigma) - 0.5) * 0.4).requires_grad_()
        self.bias = torch.randn(o, dtype=dtype, requires_grad=True)

    @property
    def constants(self):
        return self.weight, self.u, self.v, self.sigma

    def of(self, delta):
        shift = torch.relu(self.sigma + delta) - self.sigma
        return self.weight + ((self.u * shift.unsqueeze(1)) @ self.v.mT).reshape(self.weight.shape)

    def product(self, x, weight, bias=None):
        c = self.shape
        if c is None:
            return F.linear(x, weight, bias)
        return _CONV[len(c.kernel)](x, weight, bias, c.stride, c.padding, c.dilation, c.groups)

    def right(self, x):
        if self.shape is None:
            return x @ self.v[0]
        kernel = self.v.mT.reshape(-1, self.v.shape[1] // self.shape.taps, *self.shape.kernel)
        return self.product(x, kernel)

    def left(self, g):
        if self.shape is None:
            return g @ self.u[0]
        groups, a, k = self.u.shape
        q = torch.einsum("gak,ngat->ngkt", self.u, g.reshape(len(g), groups, a, -1))
        return q.reshape(len(g), groups * k, *g.shape[2:])

    def adjoint(self, g, x, weight):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.product(x, weight), x, g, create_graph=True)[0]


def linear(case):
    batch, o, i, k = case
    layer = Layer(o, i, k)
    return layer, torch.randn(*batch, i, dtype=torch.float64)


def conv(case):
    n, size, c, o, k, *options = case
    layer = Layer(o, c, k, tuple(options))
    return layer, torch.randn(n, c, *size, dtype=torch.float64)


PROBLEMS = [(linear, case) for case in LINEAR] + [(conv, case) for case in CONVS]


def close(got, want):
    assert got.shape == want.shape and torch.isfinite(got).all()
    assert (got - want).norm() <= 1e-10 * want.norm() + 1e-300


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("make, case", PROBLEMS)
def test_definition(make, case, moved, backend, nan_empty):
    layer, x = make(case)
    now = layer.of(layer.delta).detach()
    _, *rest = layer.constants
    weight = now if moved else layer.weight
    want = layer.product(x, now, layer.bias)
    residual = torch.randn_like(want)
    options = {"moved": moved, "backend": backend}
    y, p = spectral_apply(x, weight, *rest, layer.delta, layer.bias, layer.shape, residual=residual, **options)
    close(y, want + residual)
    close(p, layer.right(x))
    g = torch.randn_like(want)
    back, q = spectral_adjoint(g, weight, *rest, layer.delta, x.shape, layer.shape, **options)
    close(back, layer.adjoint(g, x, now))
    close(q, layer.left(g))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make, case", [PROBLEMS[k] for k in (0, 2, 3, 8, 9, 11)])
def test_first_and_second_derivatives(make, case, backend):
    layer, x = make(case)
    inputs = x.requires_grad_(), layer.delta, layer.bias
    options = {"backend": backend}

    def forward(x, delta, bias):
        return spectral_apply(x, *layer.constants, delta, bias, layer.shape, **options)

    def adjoint(g, delta):
        return spectral_adjoint(g, *layer.constants, delta, x.shape, layer.shape, **options)

    g = torch.randn_like(layer.product(x, layer.weight)).requires_grad_()
    for function, given in ((forward, inputs), (adjoint, (g, layer.delta))):
        assert gradcheck(function, given, fast_mode=True)
        assert gradgradcheck(function, given, fast_mode=True)


def test_a_direction_that_is_gone_has_no_gradient():
    layer, x = linear(((5,), 7, 5, 3))
    with torch.no_grad():
        layer.delta[0, 1] = -2 * layer.sigma[0, 1]
    y, _ = spectral_apply(x, *layer.constants, layer.delta, layer.bias)
    close(y, layer.product(x, layer.of(layer.delta), layer.bias))
    (found,) = torch.autograd.grad(y.square().sum(), layer.delta)
    (want,) = torch.autograd.grad(layer.product(x, layer.of(layer.delta), layer.bias).square().sum(), layer.delta)
    close(found, want)
    assert found[0, 1] == 0 and (found[0, [0, 2]] != 0).all()


@pytest.mark.parametrize("dtype, error", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_dtypes_and_strides(dtype, error):
    layer = Layer(12, 20, 4)
    x = torch.randn(20, 3, 6, dtype=torch.float64).permute(1, 2, 0)
    want = layer.product(x, layer.of(layer.delta), layer.bias)
    low = x.to(dtype).requires_grad_()
    factors = [t.float() for t in (layer.u, layer.v, layer.sigma)]
    delta = layer.delta.detach().float().requires_grad_()
    y, p = spectral_apply(low, layer.weight.to(dtype), *factors, delta, layer.bias.to(dtype))
    assert y.dtype == p.dtype == dtype
    assert (y.double() - want).norm() <= error * want.norm()
    assert (p.double() - x @ layer.v[0]).norm() <= 3 * error * p.double().norm()
    y.float().square().sum().backward()
    (right,) = torch.autograd.grad(want.square().sum(), layer.delta)
    assert delta.grad.dtype == torch.float32
    assert (delta.grad.double() - right).norm() <= 5 * error * right.norm()


@pytest.mark.parametrize("make, case", [PROBLEMS[k] for k in (0, 3, 7, 8, 9, 11)])
def test_opcheck(make, case):
    layer, x = make(case)
    options = *map(list, arguments_of(layer.shape)[:4]), arguments_of(layer.shape)[4], "reference"
    rest = *layer.constants, layer.delta.detach()
    y, p = spectral_apply(x, *rest, layer.bias.detach(), layer.shape)
    for moved in (False, True):
        traced = not moved  # whether W has moved changes values alone
        registered(torch.ops.fastfip.spectral_apply, (x, layer.bias.detach(), *rest, moved, *options), traced)
        registered(torch.ops.fastfip.spectral_adjoint, (y, list(x.shape), *rest, moved, *options), traced)
        for x_too in (False, True):
            given = y, p, list(x.shape), x_too, *rest, moved, *options
            registered(torch.ops.fastfip.spectral_apply_backward, given, traced)


@pytest.mark.parametrize("make, case", [(linear, LINEAR[3]), (linear, LINEAR[5]), (conv, CONVS[1])])
def test_one_graph_without_the_gradient_of_the_weight(make, case):
    layer, x = make(case)
    seen = []

    def watch(graph, _):
        seen.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        from torch._functorch.aot_autograd import make_boxed_func

        return make_boxed_func(graph.forward)

    def loss(x, delta, bias):
        w = layer.of(delta).detach()
        y = spectral_layer(x, w, layer.u, layer.v, layer.sigma, delta, bias, layer.shape)
        return y.square().sum()

    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=aot_autograd(fw_compiler=watch, bw_compiler=watch))
    inputs = x.requires_grad_(), layer.delta, layer.bias
    y = layer.product(x, layer.of(layer.delta), layer.bias)
    want = torch.autograd.grad(y.square().sum(), inputs)
    for found, right in zip(torch.autograd.grad(compiled(*inputs), inputs), want):
        close(found, right)
    forward, backward = seen
    assert any("spectral_apply" in name for name in forward)
    assert any("spectral_apply_backward" in name for name in backward)
    assert not any("mm" in name or "convolution_backward" in name for name in backward)


@pytest.mark.parametrize("given", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("make, case", [(linear, LINEAR[3]), (conv, CONVS[1])])
def test_each_op_is_one_graph_whichever_input_has_a_gradient(make, case, given):
    layer, x = make(case)
    g = torch.randn_like(layer.product(x, layer.weight))

    def apply(x, delta):
        y, p = spectral_apply(x, *layer.constants, delta, shape=layer.shape)
        return y.square().sum() + p.sum()

    def adjoint(g, delta):
        back, q = spectral_adjoint(g, *layer.constants, delta, x.shape, layer.shape)
        return back.square().sum() + q.sum()

    delta = layer.delta.detach()
    for loss, first in ((apply, x), (adjoint, g)):
        torch._dynamo.reset()
        inputs = [t.clone().requires_grad_(tracked) for t, tracked in zip((first, delta), given)]
        tracked = [t for t in inputs if t.requires_grad]
        want = torch.autograd.grad(loss(*inputs), tracked)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for found, right in zip(torch.autograd.grad(compiled(*inputs), tracked), want):
            close(found, right)


def test_both_results_in_one_graph():
    layer, x = linear(LINEAR[3])

    def loss(x, delta, bias):
        y, p = spectral_apply(x, *layer.constants, delta, bias)
        return y.square().sum() + p.pow(3).sum()

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    inputs = x.requires_grad_(), layer.delta, layer.bias
    want = torch.autograd.grad(loss(*inputs), inputs)
    for found, right in zip(torch.autograd.grad(compiled(*inputs), inputs), want):
        close(found, right)
    assert counter.frame_count == 1


def test_transforms():
    layer, x = linear(((6,), 5, 4, 3))
    maps = torch.randn(3, 6, 4, dtype=torch.float64)
    deltas = torch.randn(3, 1, 3, dtype=torch.float64) * 0.1

    def loss(x, delta):
        y, p = spectral_apply(x, *layer.constants, delta, layer.bias.detach())
        back, q = spectral_adjoint(y, *layer.constants, delta, x.shape)
        return y.square().sum() + p.sum() + back.sum() + q.square().sum()

    def definition(x, delta):
        weight = layer.of(delta)
        y = layer.product(x, weight, layer.bias.detach())
        return y.square().sum() + layer.right(x).sum() + (y @ weight).sum() + layer.left(y).square().sum()

    for make in (lambda f: f, lambda f: torch.func.grad(f, argnums=(0, 1))):
        for dims, given in (((0, None), (maps, deltas[0])), ((None, 0), (x, deltas)), ((0, 0), (maps, deltas))):
            found, want = (torch.func.vmap(make(f), in_dims=dims)(*given) for f in (loss, definition))
            for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (found, want))):
                close(a, b)


def test_transforms_of_convolutions():
    layer, x = conv(CONVS[1])
    maps = torch.randn(3, *x.shape, dtype=torch.float64)
    delta = layer.delta.detach()
    both = torch.func.vmap(lambda x: spectral_apply(x, *layer.constants, delta, shape=layer.shape))(maps)
    g = torch.randn_like(both[0])
    back = torch.func.vmap(lambda g: spectral_adjoint(g, *layer.constants, delta, x.shape, layer.shape))(g)
    for k, one in enumerate(maps):
        for got, want in zip(both, spectral_apply(one, *layer.constants, delta, shape=layer.shape)):
            close(got[k], want)
        for got, want in zip(back, spectral_adjoint(g[k], *layer.constants, delta, x.shape, layer.shape)):
            close(got[k], want)


def test_what_does_not_fit_is_refused():
    layer, x = linear(((5,), 7, 5, 3))
    with pytest.raises(ValueError, match="do not fit"):
        spectral_apply(x, layer.weight, layer.u[..., :2], layer.v, layer.sigma, layer.delta)
    with pytest.raises(ValueError, match="cast one of them"):
        spectral_apply(x.float(), *layer.constants, layer.delta)
    with pytest.raises(ValueError, match=r"\[5, 4\] is not rows of 5 features"):
        spectral_apply(x[:, :4], *layer.constants, layer.delta)
    with pytest.raises(ValueError, match="the bias"):
        spectral_apply(x, *layer.constants, layer.delta, layer.bias[:6])
    g = torch.randn(5, 7, dtype=torch.float64)
    with pytest.raises(ValueError, match="does not have the outputs"):
        spectral_adjoint(g, *layer.constants, layer.delta, (4, 5))
    wide, maps = conv(CONVS[1])
    with pytest.raises(ValueError, match="is not a map of 4 features"):
        spectral_apply(maps[:, :2], *wide.constants, wide.delta, shape=wide.shape)
    out = torch.randn_like(wide.product(maps, wide.weight))
    with pytest.raises(ValueError, match="does not have the outputs"):
        spectral_adjoint(out, *wide.constants, wide.delta, (2, 4, 6, 9), wide.shape)
    with pytest.raises(ValueError, match="does not have the"):
        spectral_adjoint(x, layer.weight[:3], layer.u, layer.v, layer.sigma, layer.delta, x.shape)
