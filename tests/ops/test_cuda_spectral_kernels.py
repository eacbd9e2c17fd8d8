"""What the CUDA kernel of spectral_grad must do on a GPU (`make gpu`)."""

import pytest
import torch

from fastfip.ops import spectral_grad, spectral_sum_grad_squared
from tests.ops.test_spectral_grad import CONVS, KNOWN, conv_problem, definition, problem
from tests.support.cuda_device import DTYPES, HERE, close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(HERE), reason=HERE)]
SIZES = [
    (1, 1, 1, 1, 1),
    (3, 2, 5, 7, 3),
    (7, 197, 384, 256, 64),
    (300, 3, 200, 72, 66),
    (1, 5000, 128, 64, 64),  # many shares
    (0, 3, 4, 5, 2),
    (3, 0, 4, 5, 2),
]


def on_device(operands):
    return [x.cuda() if isinstance(x, torch.Tensor) else x for x in operands]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize("size", SIZES)
def test_definition(size, known, dtype, nan_empty):
    operands = on_device(problem(size, known, dtype))
    each = definition(*operands)
    got = spectral_grad(*operands, per_sample=True, backend="cuda")
    close(got, each, 1e-5)
    assert torch.equal(got, spectral_grad(*operands, per_sample=True, backend="cuda"))  # no atomics
    close(spectral_grad(*operands, backend="cuda"), each.sum(0), 1e-5)
    close(spectral_sum_grad_squared(*operands, backend="cuda"), each.square().sum(0), 1e-5)


def test_strides_and_mixed_dtypes():
    g = torch.randn(9, 30, 50, device="cuda").permute(1, 2, 0)[::3, ::2, 1:]
    x = torch.randn(25, 10, 40, device="cuda").transpose(0, 1)[..., ::2].bfloat16()
    u, v = torch.randn(1, 6, 8, device="cuda").mT, torch.randn(1, 6, 20, device="cuda").mT
    close(spectral_grad(g, x, u, v, per_sample=True, backend="cuda"), definition(g, x, u, v), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, "last"])
def test_convolutions(case, known, dtype, layout, nan_empty):
    g, x, u, v, shape = on_device(conv_problem(case, 3, known, dtype)[0])
    if layout == "last" and x.dim() == 4:
        g, x = (y.contiguous(memory_format=torch.channels_last) for y in (g, x))
    wide = [y.double() if isinstance(y, torch.Tensor) else y for y in (g, x, u, v)]
    want = spectral_grad(*wide, shape, per_sample=True, backend="reference")
    close(spectral_grad(g, x, u, v, shape, per_sample=True, backend="cuda"), want, 1e-5)


def test_derivatives():
    operands = [x.cuda().requires_grad_() for x in problem((2, 3, 4, 5, 2))]
    assert torch.autograd.gradcheck(lambda *x: spectral_sum_grad_squared(*x, backend="cuda"), operands)


def test_it_can_be_captured_in_a_graph():
    operands = on_device(problem((2, 70, 64, 32, 16), "", torch.float32))
    spectral_grad(*operands, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = spectral_grad(*operands, backend="cuda")
    operands[0].normal_()
    graph.replay()
    close(out, definition(*operands).sum(0), 1e-5)
