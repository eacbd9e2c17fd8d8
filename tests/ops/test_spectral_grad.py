"""spectral_grad against its definition in float64, for every backend: sizes, strides, dtypes, convolutions."""

import sys

import pytest
import torch
import torch.nn.functional as F

from fastfip.errors import BackendError
from fastfip.ops import spectral_grad, spectral_sum_grad_squared
from fastfip.ops.convolution import ConvShape
from fastfip.ops.registry import OPS

X = torch.zeros(1, 1, 1)
BACKENDS = [b.name for b in OPS["spectral_grad"].backends if b.automatic and not b.refuses(X, X, X, X, None)]
SIZES = [  # N, T, O, I, K
    (1, 1, 1, 1, 1),
    (3, 1, 5, 7, 2),
    (2, 4, 1, 3, 9),
    (5, 3, 4, 1, 1),
    (7, 17, 13, 11, 6),
    (3, 50, 65, 70, 33),
    (1, 200, 9, 150, 64),
    (0, 3, 4, 5, 2),
    (3, 0, 4, 5, 2),
]
KNOWN = ["", "p", "q"]  # "both" leaves nothing to a kernel: test_both_are_known


def definition(g, x, u, v):
    """The formula for each sample, in float64."""
    q = g.double() if u is None else torch.einsum("nto,ok->ntk", g.double(), u[0].double())
    p = x.double() if v is None else torch.einsum("nti,ik->ntk", x.double(), v[0].double())
    return torch.einsum("ntk,ntk->nk", q, p).unsqueeze(1)


def problem(size, known="", dtype=torch.float64, factors=None):
    n, t, o, i, k = size
    factors = factors or dtype
    g, u = torch.randn(n, t, o).to(dtype), torch.randn(1, o, k).to(factors)
    x, v = torch.randn(n, t, i).to(dtype), torch.randn(1, i, k).to(factors)
    if known in ("q", "both"):
        g, u = torch.randn(n, t, k).to(dtype), None
    if known in ("p", "both"):
        x, v = torch.randn(n, t, k).to(dtype), None
    return g, x, u, v


@pytest.fixture(params=[1, 64, 1 << 20], ids="chunk{}".format)
def chunk(request, monkeypatch):
    """Chunks from a single position to everything at once."""
    monkeypatch.setattr(sys.modules["fastfip.ops.spectral.grad"], "CHUNK", request.param)
    return request.param


def close(got, want, dtype=torch.float64):
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
    assert torch.isfinite(got).all() and got.shape == want.shape
    assert (got.double() - want).norm() <= tolerance * want.norm() + 1e-300


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize("size", SIZES)
def test_definition(backend, known, size, chunk, nan_empty):
    operands = problem(size, known)
    each = definition(*operands)
    close(spectral_grad(*operands, per_sample=True, backend=backend), each)
    close(spectral_grad(*operands, backend=backend), each.sum(0))
    close(spectral_sum_grad_squared(*operands, backend=backend), each.square().sum(0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_directions_that_are_gone_have_no_gradient(backend):
    operands = problem((3, 4, 5, 6, 4))
    s = torch.tensor([[1.0, 0.0, -1.0, 0.5]], dtype=torch.float64)
    each = definition(*operands) * torch.tensor([[1.0, 0, 0, 1]])
    close(spectral_grad(*operands, s=s, per_sample=True, backend=backend), each)
    close(spectral_grad(*operands, s=s, backend=backend), each.sum(0))
    close(spectral_sum_grad_squared(*operands, s=s, backend=backend), each.square().sum(0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_summed_in_float32(backend, known, dtype):
    operands = problem((4, 9, 8, 5, 3), known, dtype, torch.float32)
    each = definition(*operands)
    found = spectral_grad(*operands, per_sample=True, backend=backend)
    assert found.dtype == torch.float32
    close(found, each, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend, nan_empty):
    g = torch.randn(6, 9, 4, dtype=torch.float64)[:, ::2].transpose(0, 1)[:, 1:]  # [5, 5, 4]
    x = torch.randn(5, 7, 5, dtype=torch.float64).transpose(1, 2)[..., ::3]  # [5, 5, 3]
    u = torch.randn(1, 8, 4, dtype=torch.float64).mT[:, :, ::2]  # [1, 4, 4]
    v = torch.randn(1, 4, 3, dtype=torch.float64).mT  # [1, 3, 4]
    each = definition(g, x, u, v)
    close(spectral_grad(g, x, u, v, per_sample=True, backend=backend), each)
    close(spectral_grad(g, x, u, v, backend=backend), each.sum(0))
    p = (x @ v).transpose(1, 2).contiguous().transpose(1, 2)
    close(spectral_grad(g, p, u, per_sample=True, backend=backend), each)
    expanded = torch.randn(1, 1, 4, dtype=torch.float64).expand(5, 5, 4)  # the gradient of a sum
    close(spectral_grad(expanded, x, u, v, backend=backend), definition(expanded, x, u, v).sum(0))


CONVS = [
    # in, out, K, kernel, stride, padding, dilation, groups, size
    (3, 4, 3, (3, 3), (1, 1), (1, 1), (1, 1), 1, (6, 5)),
    (4, 6, 2, (3, 2), (2, 1), (0, 2), (1, 2), 2, (7, 6)),
    (4, 4, 1, (3, 3), (1, 1), (2, 2), (2, 2), 4, (6, 6)),
    (5, 3, 3, (1, 1), (1, 1), (0, 0), (1, 1), 1, (4, 3)),
    (5, 3, 2, (1, 1), (2, 2), (0, 0), (1, 1), 1, (4, 3)),
    (2, 8, 4, (4,), (3,), (1,), (1,), 2, (11,)),
    (2, 3, 3, (2, 3, 2), (1, 2, 1), (1, 0, 1), (1, 1, 2), 1, (3, 5, 4)),
    (3, 70, 20, (3, 3), (1, 1), (1, 1), (1, 1), 1, (16, 13)),
    (1, 1, 1, (1,), (1,), (0,), (1,), 1, (1,)),
]


def conv_problem(case, batch, known="", dtype=torch.float64):
    """Operands, and each sample's gradient as U^T G V of its own weight gradient, in float64."""
    c, o, k, kernel, stride, padding, dilation, groups, size = case
    shape = ConvShape(kernel, stride, padding, dilation, groups)
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
    x = torch.randn(batch, c, *size).to(dtype)
    weight = torch.randn(o, c // groups, *kernel, dtype=torch.float64, requires_grad=True)

    def forward(x):
        return conv(x.double(), weight, None, stride, padding, dilation, groups)

    g = torch.randn(forward(x).shape).to(dtype)
    u, v = torch.randn(groups, o // groups, k).to(dtype), torch.randn(groups, weight[0].numel(), k).to(dtype)
    whole = torch.stack([torch.autograd.grad(forward(xn[None]), weight, gn[None].double())[0] for xn, gn in zip(x, g)])
    each = torch.einsum("ngoi,gok,gik->ngk", whole.view(batch, groups, o // groups, -1), u.double(), v.double())
    if known in ("q", "both"):
        g = torch.einsum("ngot,gok->ngkt", g.double().reshape(batch, groups, o // groups, -1), u.double())
        g, u = g.reshape(batch, groups * k, *forward(x).shape[2:]).to(dtype), None
    if known in ("p", "both"):
        x = conv(x.double(), v.double().mT.reshape(-1, c // groups, *kernel), None, stride, padding, dilation, groups)
        x, v = x.to(dtype), None
    return (g, x, u, v, shape), each


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize("case", CONVS)
def test_convolution(backend, known, case, chunk, nan_empty):
    operands, each = conv_problem(case, 3, known)
    close(spectral_grad(*operands, per_sample=True, backend=backend), each)
    close(spectral_grad(*operands, backend=backend), each.sum(0))
    close(spectral_sum_grad_squared(*operands, backend=backend), each.square().sum(0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("known", ["", "p"])
def test_maps_of_other_strides(backend, known):
    (g, x, u, v, shape), each = conv_problem(CONVS[0], 3, known)
    last = torch.channels_last
    found = spectral_grad(g.contiguous(memory_format=last), x.contiguous(memory_format=last), u, v, shape,
                          per_sample=True, backend=backend)  # fmt: skip
    close(found, each)
    wide = (t.repeat_interleave(2, 3)[..., ::2] for t in (g, x))
    close(spectral_grad(*wide, u, v, shape, per_sample=True, backend=backend), each)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("known", ["", "p"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_convolutions_of_other_dtypes(backend, known, dtype):
    (g, x, u, v, shape), each = conv_problem(CONVS[0], 3, "", dtype)
    if known:  # p as the forward pass leaves it, rounded
        p = spectral_grad_p(x, v, shape).to(dtype)
        each = (spectral_grad_q(g, u) * p.double()).flatten(2).sum(2).unsqueeze(1)
        x, v = p, None
    found = spectral_grad(g, x, u, v, shape, per_sample=True, backend=backend)
    assert found.dtype == torch.float32
    close(found, each, torch.float32)


def spectral_grad_p(x, v, shape):
    kernels = v.double().mT.reshape(-1, x.shape[1], *shape.kernel)
    return F.conv2d(x.double(), kernels, None, shape.stride, shape.padding, shape.dilation)


def spectral_grad_q(g, u):
    return torch.einsum("noyx,ok->nkyx", g.double(), u[0].double())


def test_no_gradient_of_a_whole_weight_is_formed():
    """Nor, with p at hand, anything of the size of g: what is made is q at most."""
    from torch.utils._python_dispatch import TorchDispatchMode

    g, x, u, v = problem((4, 300, 480, 400, 3), "", torch.float32)
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.namespace != "fastfip" and isinstance(out, torch.Tensor) and not func.is_view:
                made.append(out.numel())
            return out

    with Watch():
        spectral_grad(g, x, u, v)
        spectral_sum_grad_squared(g, x, u, v)
    assert made and max(made) < 480 * 400


@pytest.mark.parametrize(
    "call",
    [
        lambda: spectral_grad(torch.randn(2, 3, 4), torch.randn(2, 4, 4), torch.randn(1, 4, 2), torch.randn(1, 4, 2)),
        lambda: spectral_grad(torch.randn(2, 3), torch.randn(2, 3)),
        lambda: spectral_grad(torch.randn(2, 3, 4), torch.randn(2, 3, 5)),
        lambda: spectral_grad(torch.randn(2, 3, 4), torch.randn(2, 3, 5), torch.randn(1, 4, 2), torch.randn(1, 4, 2)),
        lambda: spectral_grad(torch.randn(2, 3, 4), torch.randn(2, 3, 5), torch.randn(4, 2), torch.randn(5, 2)),
        lambda: spectral_grad(torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(1, 4, 2)),
        lambda: spectral_grad(torch.randn(2, 3, 4), torch.randn(2, 3, 4), s=torch.ones(4)),
        lambda: spectral_sum_grad_squared(torch.randn(2, 3, 4), torch.randn(3, 3, 4)),
        lambda: spectral_grad(
            torch.randn(2, 3, 4), torch.randn(2, 2, 5), torch.randn(1, 3, 2), torch.randn(1, 2, 2),
            ConvShape((1,), (1,), (0,), (1,)),
        ),
        lambda: spectral_grad(
            torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(2, 1, 2), None, ConvShape((1,), (1,), (0,), (1,), 2)
        ),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit(call):
    with pytest.raises(ValueError):
        call()


@pytest.mark.parametrize("size", SIZES)
def test_both_are_known(size):
    operands = problem(size, "both")
    close(spectral_grad(*operands, per_sample=True), definition(*operands))
    operands, each = conv_problem(CONVS[1], 2, "both")
    close(spectral_grad(*operands, per_sample=True), each)


def test_a_backend_that_does_not_exist():
    with pytest.raises(BackendError, match="no backend 'fast'"):
        spectral_grad(X, X, backend="fast")
