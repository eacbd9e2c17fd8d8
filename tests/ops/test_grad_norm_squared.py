"""grad_norm_squared against its definition and its derivatives, dense and convolution, direct and Gram."""

import sys
import warnings

import pytest
import torch
import torch._dynamo.testing

from fastfip.ops import ConvShape, grad_norm_squared, grad_norm_squared_conv
from fastfip.ops.grad_norm_squared.gram import Lattice, prefers_gram
from fastfip.ops.grad_norm_squared.op import keeps
from fastfip.ops.registry import OPS
from tests.ops.test_sum_grad_squared import CONVS, SIZES, close, conv_problem
from tests.support.opchecks import registered

conv = sys.modules["fastfip.ops.grad_norm_squared.convolution"]
X3 = torch.zeros(1, 1, 1)
BACKENDS = [b.name for b in OPS["grad_norm_squared"].backends if b.automatic and not b.refuses(X3, X3)]
CONV1 = ConvShape((1,), (1,), (0,), (1,))
BACKENDS_CONV = [b.name for b in OPS["grad_norm_squared_conv"].backends if not b.refuses(X3, X3, CONV1, 1)]
GRAM, DIRECT = (3, 2, 9, 8), (3, 9, 2, 3)


@pytest.fixture(params=[1, 64, 1 << 20], ids="chunk{}".format)
def chunk(request, monkeypatch):
    for name in ("op", "convolution"):
        monkeypatch.setattr(sys.modules[f"fastfip.ops.grad_norm_squared.{name}"], "CHUNK", request.param)


def definition(g, a):
    return torch.stack([(x.t() @ y).square().sum() for x, y in zip(g, a)]) if len(g) else g.new_zeros(0)


def test_both_forms_are_among_the_sizes():
    assert prefers_gram(*GRAM[1:]) and not prefers_gram(*DIRECT[1:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [*SIZES, GRAM, DIRECT])
def test_definition_and_gradient(backend, size, chunk, nan_empty):
    n, t, o, i = size
    g = torch.randn(n, t, o, dtype=torch.float64, requires_grad=True)
    a = torch.randn(n, t, i, dtype=torch.float64, requires_grad=True)
    v = torch.randn(n, dtype=torch.float64)
    got, want = grad_norm_squared(g, a, backend=backend), definition(g, a)
    close(got, want.detach(), torch.float64)
    if n:
        for x, y in zip(torch.autograd.grad(got @ v, (g, a)), torch.autograd.grad(want @ v, (g, a))):
            close(x, y, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [GRAM, DIRECT, (3, 1, 2, 4)])
def test_derivatives_of_every_order(backend, size):
    n, t, o, i = size
    g, a = torch.randn(n, t, o, dtype=torch.float64), torch.randn(n, t, i, dtype=torch.float64)
    inputs = (g.requires_grad_(), a.requires_grad_())

    def op(g, a):
        return grad_norm_squared(g, a, backend=backend)

    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradgradcheck(op, inputs, fast_mode=True)


WAYS = ["direct", "places", "windows"]


@pytest.mark.parametrize("backend", BACKENDS_CONV)
@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_convolution_and_gradient(backend, case, frames, way, chunk, nan_empty, monkeypatch):
    x, shape, weight, forward = conv_problem(case, 3 * frames)
    if way == "places" and (frames > 1 or not Lattice.serves(shape)):
        return
    monkeypatch.setattr(conv, "_way", lambda *arguments: way)
    x.requires_grad_()
    g = torch.randn_like(forward(x)).requires_grad_()
    if OPS["grad_norm_squared_conv"][backend].refuses(g, x, shape, 3):
        assert len(shape.kernel) == 3 and frames > 1
        backend = "auto"
    v = torch.randn(3, dtype=torch.float64)
    each = [
        torch.autograd.grad(forward(xn), weight, gn, create_graph=True)[0].square().sum()
        for xn, gn in zip(x.split(frames), g.split(frames))
    ]
    want, got = torch.stack(each), grad_norm_squared_conv(g, x, shape, samples=3, backend=backend)
    close(got, want.detach(), torch.float64)
    for p, q in zip(torch.autograd.grad(got @ v, (g, x)), torch.autograd.grad(want @ v, (g, x))):
        close(p, q, torch.float64)


def test_ways_by_cost():
    def way(c, o, size, kernel, stride=1, padding=1, frames=1):
        shape = ConvShape((kernel,) * 2, (stride,) * 2, (padding,) * 2, (1, 1))
        out = (size + 2 * padding - kernel) // stride + 1
        return conv._way(torch.empty(2 * frames, o, out, out), torch.empty(2 * frames, c, size, size), shape, 2)

    assert way(64, 64, 32, 3) == "direct"  # the layers of a ResNet, from the first to the last
    assert way(128, 128, 16, 3) == way(256, 256, 8, 3) == way(512, 512, 4, 3) == "places"
    assert way(128, 256, 16, 3, stride=2) == way(256, 256, 8, 3, frames=2) == "windows"
    assert way(4, 4, 4, 1, padding=2) != "places"  # positions of which no lattice has room


@pytest.mark.parametrize("backend", BACKENDS_CONV)
@pytest.mark.parametrize("frames", [1, 2])
def test_convolution_derivatives_of_every_order(backend, frames):
    x, shape, _, forward = conv_problem((2, 4, (2, 2), (2, 1), (1, 0), (1, 1), 2, (3, 3)), 2 * frames)
    g = torch.randn_like(forward(x)).detach()
    inputs = (g.requires_grad_(), x.requires_grad_())

    def op(g, x):
        return grad_norm_squared_conv(g, x, shape, samples=2, backend=backend)

    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradgradcheck(op, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(backend, dtype):
    g, a = (torch.randn(4, 5, 3) * 1e-3).to(dtype), torch.randn(4, 5, 6).to(dtype)
    out = grad_norm_squared(g.requires_grad_(), a.requires_grad_(), backend=backend)
    assert out.dtype == torch.float32
    close(out.detach(), definition(g.double(), a.double()).detach(), dtype)
    assert torch.autograd.grad(out.sum(), g)[0].dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS_CONV)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_convolution_dtypes_and_strides(backend, way, dtype, monkeypatch):
    monkeypatch.setattr(conv, "_way", lambda *arguments: way)
    x, shape, weight, forward = conv_problem(CONVS[0], 3)
    x, g = x.to(dtype), torch.randn_like(forward(x)).detach().to(dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    g = g.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    each = [
        torch.autograd.grad(forward(xn.double()), weight, gn.double(), create_graph=True)[0].square().sum()
        for xn, gn in zip(x.split(1), g.split(1))
    ]
    out = grad_norm_squared_conv(g, x, shape, backend=backend)
    assert out.dtype == torch.float32
    close(out.detach(), torch.stack(each).detach(), dtype)
    want = torch.autograd.grad(sum(each), (g, x))
    for p, q in zip(torch.autograd.grad(out.sum(), (g, x)), want):
        assert p.dtype == dtype
        close(p, q.double(), dtype)


def test_no_samples():
    shape = ConvShape((3, 3), (1, 1), (1, 1), (1, 1))
    g, x = torch.zeros(0, 4, 5, 5, requires_grad=True), torch.zeros(0, 2, 5, 5, requires_grad=True)
    for backend in BACKENDS_CONV:
        out = grad_norm_squared_conv(g, x, shape, backend=backend)
        assert out.shape == (0,)
        assert [y.shape for y in torch.autograd.grad(out.sum(), (g, x))] == [g.shape, x.shape]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(3, 5, 40, 30), (2, 199, 210, 220), (2, 5, 6, 6)])
def test_what_is_kept_is_what_would_be_formed(backend, size):
    n, t, o, i = size
    g, a = torch.randn(n, t, o, dtype=torch.float64), torch.randn(n, t, i, dtype=torch.float64)
    v = torch.randn(n, dtype=torch.float64)
    assert keeps(g, a)
    (kept, plain), ops = (
        [torch.ops.fastfip.grad_norm_squared(g, a, backend, k) for k in (True, False)],
        torch.ops.fastfip,
    )
    close(kept[0], plain[0], torch.float64)
    assert kept[1].shape == (n, 2, t, t) and plain[1].numel() == 0
    for p, q in zip(ops.grad_norm_squared_backward(g, a, v, kept[1]), ops.grad_norm_squared_backward(g, a, v)):
        close(p, q, torch.float64)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.numel()) or x, lambda x: x):
        grad_norm_squared(g.requires_grad_(), a, backend=backend)
    assert sum(held) == g.numel() + a.numel() + 2 * n * t * t


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [GRAM, DIRECT])
def test_any_strides(backend, size):
    n, t, o, i = size
    g = torch.randn(t, o + 1, 2 * n, dtype=torch.float64).permute(2, 0, 1)[::2, :, 1:].requires_grad_()
    a = torch.randn(n, 2 * i, t, dtype=torch.float64).transpose(1, 2)[..., ::2].requires_grad_()
    got, want = grad_norm_squared(g, a, backend=backend), definition(g, a)
    close(got, want.detach(), torch.float64)
    for x, y in zip(torch.autograd.grad(got.sum(), (g, a)), torch.autograd.grad(want.sum(), (g, a))):
        close(x, y, torch.float64)


def test_third_derivative():
    g, a = (torch.randn(2, 3, size, dtype=torch.float64, requires_grad=True) for size in (2, 4))
    thirds = []
    for function in (grad_norm_squared, definition):
        value = function(g, a).square().sum()
        for _ in range(3):
            value = sum(x.square().sum() for x in torch.autograd.grad(value, (g, a), create_graph=True))
        thirds.append(value.detach())
    close(thirds[0], thirds[1], torch.float64)


TRACED = [GRAM, DIRECT, (2, 1, 3, 4), (0, 2, 3, 4), (2, 0, 3, 4)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", TRACED)
def test_opcheck(backend, size):
    n, t, o, i = size
    g, a = (torch.randn(n, t, k, dtype=torch.float64) for k in (o, i))
    registered(torch.ops.fastfip.grad_norm_squared.default, (g, a, backend), traced=backend == BACKENDS[0])


@pytest.mark.parametrize("size", TRACED)
def test_opcheck_of_the_backward(size):
    n, t, o, i = size
    g, a, v = (torch.randn(*s, dtype=torch.float64) for s in ((n, t, o), (n, t, i), (n,)))
    registered(torch.ops.fastfip.grad_norm_squared_backward.default, (g, a, v))
    registered(torch.ops.fastfip.grad_norm_squared_backward.default, (g.bfloat16(), a.float(), v.float()))


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_compiles_to_one_graph_for_all_batch_sizes(backend):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(g, a):
        return grad_norm_squared(g, a, backend=backend).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for n in (6, 7, 9):
        g, a = (torch.randn(n, 4, size, dtype=torch.float64, requires_grad=True) for size in (5, 3))
        want = torch.autograd.grad(loss(g, a), (g, a))
        for x, y in zip(torch.autograd.grad(compiled(g, a), (g, a)), want):
            close(x, y, torch.float64)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms(backend):
    g, a = (torch.randn(3, 4, size, dtype=torch.float64, requires_grad=True) for size in (5, 2))

    def loss(g, a):
        return grad_norm_squared(g, a, backend=backend).square().sum()

    for x, y in zip(torch.func.grad(loss, argnums=(0, 1))(g, a), torch.autograd.grad(loss(g, a), (g, a))):
        close(x.detach(), y, torch.float64)
    gs, a = torch.randn(6, 3, 4, 5, dtype=torch.float64), a.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = torch.vmap(loss, in_dims=(0, None))(gs, a)
        close(got, torch.stack([loss(x, a) for x in gs]), torch.float64)
        got = torch.vmap(torch.func.grad(loss), in_dims=(0, None))(gs, a)
        close(got, torch.stack([torch.func.grad(loss)(x, a) for x in gs]), torch.float64)
        got = torch.vmap(lambda x: grad_norm_squared(x, a, backend=backend), in_dims=1)(gs.transpose(0, 1))
        close(got, torch.stack([grad_norm_squared(x, a) for x in gs]), torch.float64)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError):
        grad_norm_squared(torch.randn(2, 3, 4), torch.randn(3, 3, 4))
