"""The native kernels of spectral_grad by themselves: instruction sets, threads, tails of blocks, strides, windows."""

import pytest
import torch

from fastfip.ops.backends import native
from fastfip.ops.convolution import ConvShape
from fastfip.ops.spectral.grad import FEW, kernel_is_faster
from fastfip.ops.spectral.grad_native import spectral_grad
from tests.ops.test_native_sum_grad_squared import ISAS
from tests.ops.test_spectral_grad import CONVS, KNOWN, conv_problem, definition, problem

pytestmark = pytest.mark.skipif(not native.available(), reason=f"native kernels: {native.reason()}")

SIZES = [
    # N, T, O, I, K: below, at and above the tiles (6 and 7 rows, up to 4 vectors), the blocks (32 to 128 positions),
    # the 128 features that are summed in registers, the chunks of a long sample
    (1, 1, 1, 1, 1),
    (3, 2, 1, 65, 1),
    (5, 4, 13, 100, 17),
    (2, 17, 8, 32, 64),
    (4, 6, 48, 48, 16),
    (70, 1, 30, 20, 33),
    (9, 129, 15, 130, 7),
    (3, 64, 257, 5, 65),
    (2, 3400, 5, 3, 9),
    (0, 3, 4, 5, 2),
    (3, 0, 4, 5, 2),
]
MORE = [
    # in, out, K, kernel, stride, padding, dilation, groups, size
    (3, 33, 9, (3, 3), (1, 1), (1, 1), (1, 1), 1, (24, 23)),  # many blocks, lines that they cut
    (8, 12, 5, (3, 3), (2, 2), (1, 1), (1, 1), 4, (17, 9)),
    (40, 9, 16, (1, 1), (1, 1), (0, 0), (1, 1), 1, (4, 4)),  # several samples in a block
    (30, 9, 3, (3, 3), (1, 1), (1, 1), (1, 1), 1, (4, 4)),  # more than 128 features
]


def check(found, operands, each):
    """Within twice the error that torch makes in this dtype, and no less than a few roundings."""
    assert torch.isfinite(found).all() and found.shape == each.shape
    eps, dtype = torch.finfo(found.dtype).eps, found.dtype
    size = each.norm() + definition_of_sizes(operands)
    assert (found.double() - each).norm() <= 32 * eps * size, (dtype, (found.double() - each).norm() / size)


def definition_of_sizes(operands):
    """What the terms of the sums come to: signs may cancel, roundings do not."""
    *tensors, shape = operands
    if shape is not None:
        return 0
    return definition(*(None if t is None else t.abs() for t in tensors)).norm() / max(1, tensors[0].shape[1]) ** 0.5


def laid_out(operands, positions_last):
    """The same numbers with positions, not features, next to each other."""
    if not positions_last:
        return operands
    g, x, *rest = operands
    return [*(t.mT.contiguous().mT for t in (g, x)), *rest]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize("positions_last", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_every_instruction_set(isa, dtype, known, positions_last, size, nan_empty):
    operands = [*laid_out(problem(size, known, dtype), positions_last), None]
    found = spectral_grad(*operands, isa=isa)
    assert found.dtype == dtype
    check(found, operands, definition(*operands[:4]))
    for threads in (2, 5):
        assert torch.equal(spectral_grad(*operands, isa=isa, threads=threads), found)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize("case", [*CONVS, *MORE])
def test_convolutions(isa, dtype, known, case, nan_empty):
    operands, each = conv_problem(case, 5, known, dtype)
    if dtype == torch.float32 and known:  # the operand that is known was rounded
        each = conv_again(operands)
    found = spectral_grad(*operands, isa=isa)
    assert (found.double() - each).norm() <= 64 * torch.finfo(dtype).eps * each.norm()
    for threads in (2, 5):
        assert torch.equal(spectral_grad(*operands, isa=isa, threads=threads), found)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(operands[0].dim())
    if last is not None:
        g, x, *rest = operands
        found = spectral_grad(g.contiguous(memory_format=last), x.contiguous(memory_format=last), *rest, isa=isa)
        assert (found.double() - each).norm() <= 64 * torch.finfo(dtype).eps * each.norm()


def conv_again(operands):
    *tensors, shape = operands
    g, x, u, v = (None if t is None else t.double() for t in tensors)
    from fastfip.ops.spectral.grad import reference

    return reference(g, x, u, v, shape)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_exactly(isa, known, dtype):
    for size in ((4, 9, 30, 40, 16), (3, 70, 17, 5, 7)):
        operands = problem(size, known, dtype)
        wide = [None if t is None else t.float() for t in operands]
        found = spectral_grad(*operands, None, isa=isa)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, spectral_grad(*wide, None, isa=isa), rtol=1e-6, atol=1e-5)
        wider = [*operands[:2], *wide[2:]]
        assert torch.equal(found, spectral_grad(*wider, None, isa=isa))


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_a_number_stays_with_its_sample(isa):
    for positions_last in (False, True):
        g, x, u, v = laid_out(problem((5, 6, 20, 30, 8), "", torch.float32), positions_last)
        want = spectral_grad(g, x, u, v, None, isa=isa)
        g[2, 3, 4] = float("nan")
        found = spectral_grad(g, x, u, v, None, isa=isa)
        assert torch.isnan(found[2]).all()
        others = [0, 1, 3, 4]
        torch.testing.assert_close(found[others], want[others])


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_the_kernel_runs_where_it_was_measured_to_be_faster(isa, monkeypatch):
    monkeypatch.setattr(native, "isa", lambda: isa)
    g, p, u = torch.randn(2, FEW // 2, 5), torch.randn(2, FEW // 2, 3), torch.randn(1, 5, 3)
    few, one = (g[:, 1:], p[:, 1:], u, None, None), (g, p[..., :1], u[..., :1], None, None)
    assert kernel_is_faster(g, p, u, None, None) == (isa == "avx2")
    assert not kernel_is_faster(g.half(), p, u, None, None)
    assert not kernel_is_faster(*few) and not kernel_is_faster(*one)
    shape = ConvShape((3,), (1,), (1,), (1,))
    maps = torch.randn(2, 5, FEW), torch.randn(2, 4, FEW)
    assert not kernel_is_faster(*maps, u, torch.randn(1, 12, 3), shape)


def test_windows_beyond_the_map_are_refused():
    shape = ConvShape((3,), (1,), (0,), (1,))
    with pytest.raises(ValueError, match="beyond the padded map"):
        spectral_grad(torch.zeros(1, 2, 9), torch.zeros(1, 2, 9), torch.zeros(1, 2, 1), torch.zeros(1, 6, 1), shape)


def test_samples_more_than_two_to_the_31_elements_apart():
    try:
        memory = torch.empty(2**31 + 4096, dtype=torch.bfloat16)  # only the pages that are touched take memory
    except RuntimeError:
        pytest.skip("no 4 GiB of address space")
    g = memory.as_strided((2, 3, 5), (2**31, 5, 1)).copy_(torch.randn(2, 3, 5))
    u = torch.randn(1, 5, 4)
    torch.testing.assert_close(spectral_grad(g, g, u, u, None).double(), definition(g, g, u, u), rtol=1e-4, atol=1e-4)
