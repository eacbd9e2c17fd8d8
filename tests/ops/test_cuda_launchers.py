"""The launchers of the CUDA kernels, from the op's operands to its result; the emulation takes the module's place."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from fastfip.ops import OPS
from fastfip.ops.backends import native
from fastfip.ops.convolution import ConvShape
from fastfip.ops.memory import Scratch
from tests.ops.test_cuda_norms_on_cpu import parts_of
from tests.ops.test_spectral_grad import KNOWN, problem
from tests.support.cuda_emulation import COMPILER, compile_for_cpu, run_on_cpu

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
SHAPE = ConvShape((3, 3), (2, 1), (1, 0), (1, 1), 2)


@pytest.fixture(scope="module")
def libraries():
    names = ("cuda_on_cpu", "cuda_paired_on_cpu", "cuda_gram_apply_on_cpu")
    return [compile_for_cpu(name) for name in names]


@pytest.fixture(autouse=True)
def module(libraries, monkeypatch):
    """The native module's functions with a device of two multiprocessors, which is this CPU."""
    tiles, paired, gram = libraries

    def count(function, *numbers):
        function.restype = ctypes.c_int64
        return function(*(ctypes.c_int64(n) for n in numbers))

    def size(axis):
        return axis[0] * axis[1] * axis[2]

    def norm_plan(sizes, axes, type_number, by_gram, processors):
        positions = size(axes[0])
        return (1, positions) if by_gram else (sizes[0], parts_of(tiles, sizes, axes, type_number))

    def norms(g, x, sizes, axes, type_number, exact, by_gram, parts, shares, *place):
        function = paired.gram_norms_on_cpu if by_gram else tiles.grad_norm_squared_on_cpu
        run_on_cpu(function, [g, x, sizes, axes, type_number, exact, parts, shares], 0)

    fake = SimpleNamespace(
        cuda_sum_grad_squared_shares=lambda *_: 2,
        cuda_sum_grad_squared=lambda *a: run_on_cpu(tiles.cuda_on_cpu, a[:-2], 0),
        cuda_grad_norm_squared_plan=norm_plan,
        cuda_grad_norm_squared=norms,
        cuda_spectral_grad_shares=lambda sizes, axes, directions, *kind: count(
            paired.paired_shares_on_cpu, kind[0], sizes[0], size(axes[0]), directions, sizes[4], kind[1]
        ),
        cuda_spectral_grad=lambda *a: run_on_cpu(paired.spectral_grad_on_cpu, a[:-2], 0),
        cuda_gram_apply=lambda *a: run_on_cpu(gram.gram_apply_on_cpu, a[:-2], 0),
    )
    monkeypatch.setattr(native, "module", lambda: fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=2))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))


def both(name, *operands):
    """What the op's backend returns, and its reference in float64."""
    wide = [x.double() if isinstance(x, torch.Tensor) else x for x in operands]
    return OPS[name]["cuda"].run(*operands), OPS[name]["reference"].run(*wide)


def close(pair, dtype=torch.float32, tolerance=1e-5):
    got, want = pair
    assert got.dtype == dtype and got.shape == want.shape
    assert (got.double() - want).norm() <= tolerance * want.norm()


def maps(batch, dtype=torch.float32):
    return torch.randn(batch, 4, 4, 5).to(dtype), torch.randn(batch, 6, 7, 7).to(dtype)


@pytest.mark.parametrize("known", KNOWN)
def test_spectral_grad(known):
    close(both("spectral_grad", *problem((2, 140, 9, 12, 5), known, torch.float32), None))
    g, x = maps(2)
    u, v = torch.randn(2, 2, 3), torch.randn(2, 27, 3)
    if not known:
        close(both("spectral_grad", g, x, u, v, SHAPE))
        close(both("spectral_grad", g.bfloat16(), x.bfloat16(), u, v, SHAPE))


@pytest.mark.parametrize("size", [(2, 20, 6, 4), (3, 3, 24, 20), (2, 1, 5, 6), (0, 3, 4, 5), (2, 0, 4, 5)])
def test_grad_norm_squared(size):
    n, t, o, i = size
    close(both("grad_norm_squared", torch.randn(n, t, o), torch.randn(n, t, i)))


def test_one_sample_may_have_any_stride_between_samples():
    g = torch.randn(200).as_strided((1, 3, 8), (59, 8, 1))
    a = torch.randn(1, 3, 8)
    close(both("grad_norm_squared", g, a))


@pytest.mark.parametrize("frames", [1, 2])
def test_grad_norm_squared_of_a_convolution(frames):
    g, x = maps(2 * frames)
    close(both("grad_norm_squared_conv", g.requires_grad_(), x, SHAPE, 2))


@pytest.mark.parametrize("size", [(2, 3, 4, 9, 8), (2, 9, 8, 2, 3), (0, 3, 4, 9, 8), (2, 3, 0, 9, 8)])
def test_gram_apply(size):
    n, t, u, d, e = size
    operands = [torch.randn(n, *s).bfloat16() for s in ((t, d), (u, d), (u, e))]
    close(both("gram_apply", *operands), torch.bfloat16, 2e-2)


def test_sum_grad_squared_adds_to_results_of_any_strides():
    g, a, scratch = torch.randn(3, 5, 6), torch.randn(3, 5, 8), Scratch()
    found = [torch.ones(8, 6).mT, torch.ones(6, 8)]
    want = [torch.ones(6, 8, dtype=torch.float64) for _ in found]
    OPS["sum_grad_squared"]["cuda"].run(g, a, *found, scratch)
    OPS["sum_grad_squared"]["reference"].run(g.double(), a.double(), *want, scratch)
    for pair in zip(found, want):
        close(pair)
