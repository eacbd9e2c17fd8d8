"""sum_grad_squared against its definition, for every backend: shapes, strides, dtypes, convolutions of every option."""

import sys

import pytest
import torch
import torch.nn.functional as F

from fastfip.errors import BackendError
from fastfip.ops import memory as scratch_module
from fastfip.ops.convolution import ConvShape
from fastfip.ops.memory import Scratch
from fastfip.ops.registry import OPS
from fastfip.ops.sum_grad_squared.op import sum_grad_squared, sum_grad_squared_conv

X3, X4 = torch.zeros(1, 1, 1), torch.zeros(1, 1, 1, 1)
BACKENDS = [b.name for b in OPS["sum_grad_squared"].backends if b.automatic and not b.refuses(X3, X3, X3[0], None)]
SHAPE = ConvShape((1, 1), (1, 1), (0, 0), (1, 1))
BACKENDS_CONV = [
    b.name for b in OPS["sum_grad_squared_conv"].backends if b.automatic and not b.refuses(X4, X4, SHAPE, 1, X4, None)
]
SIZES = [
    (1, 1, 1, 1),
    (3, 1, 5, 7),
    (2, 4, 1, 3),
    (5, 3, 4, 1),
    (7, 17, 13, 11),
    (4, 33, 65, 70),
    (0, 3, 4, 5),
    (3, 0, 4, 5),
]


def definition(g, a):
    """Sum and squares of per-sample gradients, written from the formula, in float64."""
    each = (
        torch.stack([x.double().t() @ y.double() for x, y in zip(g, a)])
        if len(g)
        else torch.zeros(1, g.shape[2], a.shape[2])
    )
    return each.square().sum(0), each.sum(0)


@pytest.fixture(params=[1, 64, 1 << 20], ids="chunk{}".format)
def chunk(request, monkeypatch):
    """Chunks from a single sample to everything at once."""
    monkeypatch.setattr(sys.modules["fastfip.ops.sum_grad_squared.op"], "CHUNK", request.param)
    return request.param


def close(got, want, dtype):
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}[dtype]
    assert torch.isfinite(got).all()
    assert (got.double() - want).norm() <= tolerance * want.norm() + 1e-300


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
def test_definition(backend, size, chunk, nan_empty):
    n, t, o, i = size
    g, a = torch.randn(n, t, o, dtype=torch.float64), torch.randn(n, t, i, dtype=torch.float64)
    squares, total = definition(g, a)
    grad = torch.zeros(o, i, dtype=torch.float64)
    close(sum_grad_squared(g, a, grad=grad, backend=backend), squares, torch.float64)
    close(grad, total, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("t", [1, 6])
def test_dtypes_accumulate_in_float32(backend, dtype, t):
    g, a = (torch.randn(9, t, 8) * 1e-3).to(dtype), torch.randn(9, t, 5).to(dtype)
    out = sum_grad_squared(g, a, backend=backend)
    assert out.dtype == torch.float32
    close(out, definition(g, a)[0], dtype)  # squares of 1e-3 would vanish in float16


@pytest.mark.parametrize("backend", BACKENDS)
def test_adds_to_what_is_given_and_reads_any_strides(backend):
    g = torch.randn(6, 9, 4, dtype=torch.float64)[:, ::2].transpose(0, 1)[:, 1:]  # [5, 5, 4]
    a = torch.randn(5, 7, 5, dtype=torch.float64).transpose(1, 2)[..., ::3]  # [5, 5, 3]
    squares, total = definition(g, a)
    out, grad = torch.ones(3, 4, dtype=torch.float64).t(), torch.ones(4, 3, dtype=torch.float64)
    returned = sum_grad_squared(g, a, out=out, grad=grad, backend=backend, scratch=Scratch())
    assert returned is out
    close(out, squares + 1, torch.float64)
    close(grad, total + 1, torch.float64)


CONVS = [
    # in, out, kernel, stride, padding, dilation, groups, size
    (3, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1, (6, 5)),
    (4, 6, (3, 2), (2, 1), (0, 2), (1, 2), 2, (7, 6)),
    (4, 4, (3, 3), (1, 1), (2, 2), (2, 2), 4, (6, 6)),
    (5, 3, (1, 1), (1, 1), (0, 0), (1, 1), 1, (4, 3)),
    (5, 3, (1, 1), (2, 2), (0, 0), (1, 1), 1, (4, 3)),
    (2, 8, (4,), (3,), (1,), (1,), 2, (11,)),
    (2, 3, (2, 3, 2), (1, 2, 1), (1, 0, 1), (1, 1, 2), 1, (3, 5, 4)),
    (1, 1, (1,), (1,), (0,), (1,), 1, (1,)),
]


def conv_problem(case, batch, dtype=torch.float64):
    c, o, kernel, stride, padding, dilation, groups, size = case
    shape = ConvShape(kernel, stride, padding, dilation, groups)
    x = torch.randn(batch, c, *size, dtype=dtype)
    weight = torch.randn(o, c // groups, *kernel, dtype=dtype, requires_grad=True)
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]

    def forward(part):
        return conv(part, weight, None, stride, padding, dilation, groups)

    return x, shape, weight, forward


@pytest.mark.parametrize("backend", BACKENDS_CONV)
@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize("frames", [1, 2])
def test_convolution(backend, case, frames, chunk, nan_empty):
    x, shape, weight, forward = conv_problem(case, 3 * frames)
    z = forward(x)
    if backend == "native" and frames > 1 and len(shape.kernel) == 3:
        with pytest.raises(BackendError, match="no axis left"):
            sum_grad_squared_conv(z.detach(), x, shape, samples=3, backend=backend)
        backend = "auto"
    g = torch.randn_like(z)
    each = torch.stack(
        [torch.autograd.grad(forward(xn), weight, gn)[0] for xn, gn in zip(x.split(frames), g.split(frames))]
    )
    grad = torch.zeros_like(weight).detach()
    out = sum_grad_squared_conv(g, x, shape, samples=3, grad=grad, backend=backend)
    close(out, each.square().sum(0), torch.float64)
    close(grad, each.sum(0), torch.float64)


@pytest.mark.parametrize("backend", BACKENDS_CONV)
def test_convolution_of_channels_last_maps(backend):
    x, shape, _, forward = conv_problem(CONVS[0], 3)
    g = torch.randn_like(forward(x))
    want = sum_grad_squared_conv(g, x, shape, backend=backend)
    last = torch.channels_last
    got = sum_grad_squared_conv(
        g.contiguous(memory_format=last), x.contiguous(memory_format=last), shape, backend=backend
    )
    close(got, want.detach(), torch.float64)


def test_scratch_is_used_again(monkeypatch):
    made = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(a) or empty(*a, **k))
    room = Scratch()
    for _ in range(3):
        sum_grad_squared(torch.randn(5, 3, 4), torch.randn(5, 3, 2), scratch=room, backend="reference")
    assert len(made) == 1


def test_a_backend_that_does_not_exist():
    with pytest.raises(BackendError, match="no backend 'fast'"):
        sum_grad_squared(torch.randn(1, 1, 1), torch.randn(1, 1, 1), backend="fast")


@pytest.mark.parametrize(
    "call",
    [
        lambda: sum_grad_squared(torch.randn(2, 3, 4), torch.randn(2, 4, 4)),
        lambda: sum_grad_squared(torch.randn(2, 3), torch.randn(2, 3)),
        lambda: sum_grad_squared(torch.randn(2, 3, 4), torch.randn(2, 3, 4), out=torch.zeros(4, 5)),
        lambda: sum_grad_squared(torch.randn(2, 3, 4), torch.randn(2, 3, 4), out=torch.zeros(4, 4).double()),
        lambda: sum_grad_squared(torch.randn(2, 3, 4), torch.randn(2, 3, 4), grad=torch.zeros(4, 5)),
        lambda: sum_grad_squared_conv(
            torch.randn(3, 2, 4), torch.randn(3, 2, 4), ConvShape((1,), (1,), (0,), (1,)), samples=2
        ),
        lambda: sum_grad_squared_conv(torch.randn(3, 2, 4), torch.randn(3, 3, 4), ConvShape((1,), (1,), (0,), (1,), 2)),
    ],
)
def test_shapes_that_do_not_fit(call):
    with pytest.raises(ValueError):
        call()


def test_chunk_bounds_the_memory():
    assert scratch_module.CHUNK * 8 <= 1 << 24


BF16 = OPS["sum_grad_squared"]["native_bf16"].refuses(X3, X3, X3[0], None)


@pytest.mark.skipif(bool(BF16), reason=BF16)
@pytest.mark.parametrize("size", [(3, 1, 5, 7), (4, 33, 65, 70), (5, 64, 7, 300), (0, 3, 4, 5), (2, 300, 20, 33)])
def test_bf16_products_have_the_error_of_their_operands_and_no_more(size, nan_empty):
    """Against the definition on operands that were rounded before: what is left are float32 sums."""
    n, t, o, i = size
    g, a = torch.randn(n, t, o), torch.randn(n, t, i)
    grad = torch.zeros(o, i)
    out = sum_grad_squared(g, a, grad=grad, backend="native_bf16")
    rounded = (x.bfloat16() for x in (g, a)) if t > 1 else (g, a)  # T = 1 is a product of squares, and stays exact
    squares, total = definition(*rounded)
    close(out, squares, torch.float32)
    close(grad, total, torch.float32)
    if n and t > 1:
        exact = definition(g, a)[0]
        assert 0 < (out.double() - exact).norm() / exact.norm() < 1e-2


@pytest.mark.skipif(bool(BF16), reason=BF16)
@pytest.mark.parametrize("case", CONVS)
def test_bf16_convolutions(case, nan_empty):
    x, shape, weight, forward = conv_problem(case, 3, torch.float32)
    g = torch.randn_like(forward(x)).detach()
    out = sum_grad_squared_conv(g, x, shape, backend="native_bf16")
    if shape.groups < 4:  # where groups are lanes, loads are the limit and nothing is rounded
        g, x = g.bfloat16(), x.bfloat16()
    want = sum_grad_squared_conv(g.double(), x.double(), shape, backend="reference")
    close(out, want, torch.float32)


def test_bf16_is_never_chosen_by_itself_and_refused_for_float64():
    x = X3.double()
    assert OPS["sum_grad_squared"].choose("auto", X3, X3, X3[0], None).name != "native_bf16"
    with pytest.raises(BackendError, match="native_bf16 cannot run"):
        sum_grad_squared(x, x, backend="native_bf16")
