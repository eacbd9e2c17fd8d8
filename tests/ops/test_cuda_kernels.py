"""What the CUDA kernel of sum_grad_squared must do on a GPU (`make gpu`)."""

import copy

import pytest
import torch

from fastfip.fisher import backward_with_fisher, fisher_diagonal
from fastfip.ops import sum_grad_squared, sum_grad_squared_conv
from fastfip.ops.sum_grad_squared.op import sum_grad_squared_and_grad
from fastfip.testing import nets
from fastfip.testing.definitions import loop_diagonal, worst_error
from tests.ops.test_sum_grad_squared import CONVS, conv_problem, definition
from tests.support.cuda_device import DTYPES, HERE, close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(HERE), reason=HERE)]
SIZES = [
    (3, 2, 5, 7),
    (2, 40, 33, 65),
    (5, 17, 70, 130),
    (64, 31, 128, 64),  # aligned: the loader of rows, several shares
    (7, 197, 384, 256),
    (300, 3, 200, 72),
    (0, 3, 4, 5),
    (3, 0, 4, 5),
]
BIG = (70, 136, (3, 3), (2, 1), (1, 1), (1, 1), 1, (9, 17))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_definition(size, dtype, nan_empty):
    n, t, o, i = size
    g, a = (torch.randn(n, t, features, device="cuda").to(dtype) for features in (o, i))
    squares, total = definition(g, a)
    if n == 0:
        squares, total = squares.cuda(), total.cuda()
    out, grad = sum_grad_squared_and_grad(g, a, backend="cuda")
    close(out, squares)
    close(grad, total)
    again = sum_grad_squared_and_grad(g, a, backend="cuda")
    assert torch.equal(out, again[0]) and torch.equal(grad, again[1])  # no atomics
    ones = torch.ones(i, o, device="cuda", dtype=out.dtype).t()
    close(sum_grad_squared(g, a, out=ones, backend="cuda"), squares + 1)


def test_strides_and_mixed_dtypes():
    g = torch.randn(9, 30, 50, device="cuda").permute(1, 2, 0)[::3, ::2, 1:]
    a = torch.randn(25, 10, 40, device="cuda").transpose(0, 1)[..., ::2].bfloat16()
    close(sum_grad_squared(g, a, backend="cuda"), definition(g, a)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CONVS, BIG])
@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, "last"])
def test_convolutions(case, frames, dtype, layout, nan_empty):
    x, shape, weight, forward = conv_problem(case, 3 * frames)
    g, x = torch.randn_like(forward(x)).detach().cuda().to(dtype), x.cuda().to(dtype)
    if layout == "last" and x.dim() == 4:
        g, x = (y.contiguous(memory_format=torch.channels_last) for y in (g, x))
    grad = torch.zeros(weight.shape, device="cuda", dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    out = sum_grad_squared_conv(g, x, shape, samples=3, grad=grad, backend="cuda")
    wide = torch.zeros_like(grad).double()
    want = sum_grad_squared_conv(g.double(), x.double(), shape, samples=3, grad=wide, backend="reference")
    close(out, want)
    close(grad, wide)


def test_precision_of_float32_follows_torch():
    g, a = torch.randn(4, 50, 64, device="cuda"), torch.randn(4, 50, 64, device="cuda")
    want, error, before = definition(g, a)[0], {}, torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            got = sum_grad_squared(g, a, backend="cuda")
            error[precision] = float((got.double() - want).norm() / want.norm())
    finally:
        torch.set_float32_matmul_precision(before)
    assert error["highest"] < 1e-6 and 1e-5 < error["high"] < 2e-3


def test_derivatives():
    g, a = (torch.randn(3, 4, n, device="cuda", dtype=torch.float64, requires_grad=True) for n in (5, 2))
    assert torch.autograd.gradcheck(lambda *x: sum_grad_squared(*x, backend="cuda"), (g, a))
    assert torch.autograd.gradgradcheck(lambda *x: sum_grad_squared(*x, backend="cuda"), (g, a))


def test_it_runs_on_the_current_stream():
    stream = torch.cuda.Stream()
    g, a = torch.zeros(8, 64, 256, device="cuda"), torch.randn(8, 64, 256, device="cuda")
    slow = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(20):
            slow = slow @ slow / 64
        g.normal_()  # after the products: a launch on another stream would still read zeros
        out = sum_grad_squared(g, a, out=torch.zeros(256, 256, device="cuda"), backend="cuda")
    stream.synchronize()
    close(out, definition(g, a)[0])


def test_it_can_be_captured_in_a_graph():
    g, a = torch.randn(8, 64, 128, device="cuda"), torch.randn(8, 64, 128, device="cuda")
    out = torch.zeros(128, 128, device="cuda")
    sum_grad_squared(g, a, out=out.clone(), backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sum_grad_squared(g, a, out=out, backend="cuda")
    out.zero_()
    g.normal_()
    graph.replay()
    close(out, definition(g, a)[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_tensors_device_is_used_and_the_current_one_kept():
    g, a = torch.randn(3, 40, 33, device="cuda:1"), torch.randn(3, 40, 65, device="cuda:1")
    close(sum_grad_squared(g, a, backend="cuda"), definition(g, a)[0])
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("net", ["vit", "resnet"])
def test_whole_nets(net):
    torch.manual_seed(0)
    model = nets.ViT(10, dim=32, depth=2, heads=2) if net == "vit" else nets.BottleneckResNet(10, (1, 2), width=8)
    model = nets.randomize_norms(model).eval()
    x, y = torch.randn(5, 3, 32, 32), torch.randint(0, 10, (5,))
    want = loop_diagonal(copy.deepcopy(model).double(), (x.double(), y), 5)
    model, x, y = model.cuda(), x.cuda(), y.cuda()
    got = fisher_diagonal(model, (x, y), backend="cuda")
    assert worst_error({k: v.cpu() for k, v in got.items()}, want, 1e-6) < 1e-3
    losses = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
    both = backward_with_fisher(losses, model, backend="cuda")
    assert worst_error({k: v.cpu() for k, v in both.items()}, want, 1e-6) < 1e-3
