"""The native kernels by themselves: instruction sets, threads, tails of the tiles, strides, convolution options."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastfip.errors import BackendError
from fastfip.ops.backends import native
from fastfip.ops.backends.native_arguments import sources
from fastfip.ops.sum_grad_squared.native import sum_grad_squared, sum_grad_squared_conv

pytestmark = pytest.mark.skipif(not native.available(), reason=f"native kernels: {native.reason()}")

ISAS = [name for name, isa in native.module().Isa.__members__.items() if int(isa) <= int(native.module().best_isa())] \
    if native.available() else []  # fmt: skip

SIZES = [
    # N, T, O, I: below, at and above the tiles' sizes (6 and 7 rows; 1, 2 and 4 vectors of 2 to 16 lanes)
    (1, 1, 1, 1),
    (3, 2, 1, 65),
    (3, 5, 70, 1),
    (2, 3, 7, 64),
    (5, 4, 13, 100),
    (2, 17, 8, 32),
    (4, 6, 48, 48),
    (9, 300, 15, 17),  # several chunks of samples
    (2, 1100, 5, 33),  # several blocks of positions
    (0, 3, 4, 5),
    (3, 0, 4, 5),
]


def exact(g, a):
    each = torch.einsum("nto,nti->noi", g.double(), a.double())
    return each.square().sum(0), each.sum(0)


def results(*size, dtype=torch.float32):
    """Two results that are not zero at the start: kernels add."""
    return torch.ones(*size, dtype=dtype), torch.full(size, 2.0, dtype=dtype)


def check(out, grad, squares, total, g, a):
    """Within twice the error that torch makes in this dtype, and no less than a few roundings."""
    eps = torch.finfo(out.dtype).eps
    if out.dtype == torch.float32 and g is not None:
        each = torch.einsum("nto,nti->noi", g.float(), a.float())
        theirs = (each.square().sum(0).double() - squares).norm(), (each.sum(0).double() - total).norm()
    else:
        theirs = (torch.zeros(()), torch.zeros(()))
    for ours, want, other, start in ((out, squares, theirs[0], 1), (grad, total, theirs[1], 2)):
        error = (ours.double() - start - want).norm()
        assert torch.isfinite(ours).all()
        assert error <= 2 * other + 32 * eps * (want.norm() + start * want.numel() ** 0.5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_every_instruction_set(isa, dtype, size, nan_empty):
    n, t, o, i = size
    g, a = torch.randn(n, t, o, dtype=dtype), torch.randn(n, t, i, dtype=dtype)
    out, grad = results(o, i, dtype=dtype)
    sum_grad_squared(g, a, out, grad, isa=isa)
    check(out, grad, *exact(g, a), g, a)
    alone = torch.ones(o, i, dtype=dtype)
    sum_grad_squared(g, a, alone, isa=isa)
    assert torch.equal(alone, out)


@pytest.mark.parametrize("isa", ISAS)
def test_many_samples_pass_through_several_chunks(isa):
    g, a = torch.randn(700, 3, 40), torch.randn(700, 3, 70)
    out, grad = results(40, 70)
    sum_grad_squared(g, a, out, grad, isa=isa)
    check(out, grad, *exact(g, a), g, a)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_read_exactly(isa, dtype):
    g, a = torch.randn(4, 9, 30).to(dtype), (torch.randn(4, 9, 40) * 1e-3).to(dtype)
    a[0, 0, :6] = torch.tensor(
        [6e-8, -6e-8, 1e-5, 0.0, -0.0, torch.finfo(dtype).max], dtype=dtype
    )  # subnormals of float16
    out, grad = results(30, 40)
    sum_grad_squared(g, a, out, grad, isa=isa)
    wide, total = results(30, 40)
    sum_grad_squared(g.float(), a.float(), wide, total, isa=isa)
    assert torch.equal(out, wide) and torch.equal(grad, total)
    a[1, 1, 1] = float("nan")
    sum_grad_squared(g, a, out, isa=isa)
    assert torch.isnan(out[:, 1]).all() and torch.isfinite(out[:, 2:5]).all()


@pytest.mark.parametrize("isa", ISAS)
def test_strides_and_mixed_dtypes(isa):
    base = torch.randn(9, 30, 50)
    g = base.permute(1, 2, 0)[::3, ::2, 1:]  # [10, 25, 8]: samples in the middle, features outermost
    a = torch.randn(25, 10, 40).transpose(0, 1)[..., ::2].double()  # [10, 25, 20]
    out, grad = (y.t() for y in results(20, 8))  # not contiguous
    sum_grad_squared(g, a, out, grad, isa=isa)
    check(out, grad, *exact(g, a), g, a)
    few = torch.randn(10, 25, 3)  # so few rows that the other operand is read where it lies
    out, grad = results(3, 20)
    sum_grad_squared(few, a.float()[..., :20], out, grad, isa=isa)
    check(out, grad, *exact(few, a.float()), few, a)


@pytest.mark.parametrize("size", [(6, 40, 130, 70), (50, 64, 20, 300), (5, 400, 1, 200), (40, 300, 9, 3)])
def test_threads_do_not_change_the_numbers(size):
    n, t, o, i = size
    g, a = torch.randn(n, t, o), torch.randn(n, t, i)
    want, want_grad = results(o, i)
    sum_grad_squared(g, a, want, want_grad, threads=1)
    for threads in (2, 3, 8):
        out, grad = results(o, i)
        sum_grad_squared(g, a, out, grad, threads=threads)
        check(out, grad, *exact(g, a), g, a)
        again, grad_again = results(o, i)
        sum_grad_squared(g, a, again, grad_again, threads=threads)
        assert torch.equal(out, again) and torch.equal(grad, grad_again)


MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}
CONVS = [
    # C, O, kernel, stride, padding, dilation, groups, sizes
    (3, 4, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1, (6, 5)),
    (4, 70, (3, 2), (2, 1), ((0, 0), (2, 2)), (1, 2), 2, (7, 6)),
    (20, 20, (3, 3), (1, 1), ((2, 2), (2, 2)), (2, 2), 20, (6, 6)),  # depthwise
    (
        20,
        60,
        (4, 4),
        (2, 2),
        ((1, 2), (2, 1)),
        (1, 1),
        20,
        (8, 7),
    ),  # depthwise, three outputs each, 'same'-like padding
    (24, 24, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 12, (5, 5)),  # few channels in many groups
    (5, 3, (1, 1), (2, 2), ((0, 0), (0, 0)), (1, 1), 1, (5, 3)),
    (2, 8, (4,), (3,), ((1, 1),), (1,), 2, (11,)),
    (2, 3, (2, 3, 2), (1, 2, 1), ((1, 1), (0, 0), (1, 1)), (1, 1, 2), 1, (3, 5, 4)),
    (3, 33, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1, (24, 24)),  # more positions than a block
]


def conv_exact(g, x, kernel, stride, padding, dilation, groups, mode, frames=1):
    """Per-sample weight gradients by autograd of torch's own convolution, in float64."""
    flat = [p for pair in reversed(padding) for p in pair]
    x = x.double()
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
    weight = torch.zeros(g.shape[1], x.shape[1] // groups, *kernel, dtype=torch.float64, requires_grad=True)
    each = []
    for xn, gn in zip(x.split(frames), g.double().split(frames)):
        z = conv(F.pad(xn, flat, mode=MODES[mode]) if any(flat) else xn, weight, None, stride, 0, dilation, groups)
        each.append(torch.autograd.grad(z, weight, gn)[0])
    each = torch.stack(each)
    return each.square().sum(0), each.sum(0)


def conv_problem(case, batch, dtype=torch.float32):
    c, o, kernel, stride, padding, dilation, groups, sizes = case
    x = torch.randn(batch, c, *sizes, dtype=dtype)
    out = [(n + sum(p) - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in zip(sizes, padding, dilation, kernel, stride)]
    return torch.randn(batch, o, *out, dtype=dtype), x


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CONVS)
def test_convolutions(isa, case, nan_empty):
    c, o, kernel, stride, padding, dilation, groups, _ = case
    for mode, dtype in itertools.product(MODES, (torch.float32, torch.float64)):
        g, x = conv_problem(case, 3, dtype)
        out, grad = results(o, c // groups, *kernel, dtype=dtype)
        sum_grad_squared_conv(g, x, out, grad, stride, padding, dilation, groups, mode, isa=isa)
        check(out, grad, *conv_exact(g, x, kernel, stride, padding, dilation, groups, mode), None, None)
        alone = torch.ones_like(out)
        sum_grad_squared_conv(g, x, alone, None, stride, padding, dilation, groups, mode, isa=isa, threads=3)
        assert torch.allclose(alone, out, rtol=1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("case", [case for case in CONVS if len(case[2]) < 3])
def test_frames_of_one_sample_are_summed_before_squaring(case):
    c, o, kernel, stride, padding, dilation, groups, _ = case
    g, x = conv_problem(case, 6)
    out, grad = results(o, c // groups, *kernel)
    sum_grad_squared_conv(g, x, out, grad, stride, padding, dilation, groups, frames=3)
    check(out, grad, *conv_exact(g, x, kernel, stride, padding, dilation, groups, "zeros", 3), None, None)


@pytest.mark.parametrize("case", [CONVS[0], CONVS[2]])
def test_maps_of_any_strides_and_half_precision(case):
    c, o, kernel, stride, padding, dilation, groups, _ = case
    g, x = conv_problem(case, 4)
    want = results(o, c // groups, *kernel)
    sum_grad_squared_conv(g, x, *want, stride, padding, dilation, groups)
    last = torch.channels_last
    for gv, xv in (
        (g.contiguous(memory_format=last), x.contiguous(memory_format=last)),
        (
            g.transpose(2, 3).contiguous().transpose(2, 3),
            x.flip(0).flip(0).transpose(0, 1).contiguous().transpose(0, 1),
        ),
        (g.repeat_interleave(2, 3)[..., ::2], x.repeat_interleave(2, 3)[..., ::2]),
    ):
        got = results(o, c // groups, *kernel)
        sum_grad_squared_conv(gv, xv, *got, stride, padding, dilation, groups)
        assert torch.allclose(got[0], want[0], rtol=1e-5) and torch.allclose(got[1], want[1], rtol=1e-5, atol=1e-5)
    half = results(o, c // groups, *kernel)
    sum_grad_squared_conv(g.bfloat16(), x.bfloat16(), *half, stride, padding, dilation, groups)
    check(
        *half, *conv_exact(g.bfloat16(), x.bfloat16(), kernel, stride, padding, dilation, groups, "zeros"), None, None
    )


def test_padded_indices_are_those_of_torch():
    x = torch.arange(7.0)
    for (before, after), (mode, name) in itertools.product([(0, 0), (2, 3), (6, 1)], MODES.items()):
        want = F.pad(x[None, None], (before, after), mode=name, value=-1.0 if mode == "zeros" else None)
        assert sources(7, before, after, mode) == want[0, 0].long().tolist()


def test_refusals_have_reasons():
    x = torch.zeros(1, 1, 1)
    assert native.refuses(x) == ""
    assert "not on meta" in native.refuses(x.to("meta"))
    assert "no torch.int32" in native.refuses(x, x.int())
    with pytest.raises(BackendError, match="no instruction set 'sse9'"):
        sum_grad_squared(x, x, x[0].clone(), isa="sse9")
    with pytest.raises(ValueError, match="beyond the padded map"):  # sizes that do not fit must not be read
        sum_grad_squared_conv(
            torch.zeros(1, 1, 9), torch.zeros(1, 1, 9), torch.zeros(1, 1, 3), None, [1], [(0, 0)], [1]
        )


@pytest.mark.skipif(sys.platform != "linux", reason="guard pages are made as on Linux")
def test_nothing_beyond_an_operand_is_touched():
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    done = subprocess.run(
        [sys.executable, "tests/support/guarded_memory.py"], cwd=root, env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stderr[-2000:]}"
    assert "no access beyond" in done.stdout


def test_samples_more_than_two_to_the_31_elements_apart():
    try:
        memory = torch.empty(2**31 + 4096, dtype=torch.bfloat16)  # only the pages that are touched take memory
    except RuntimeError:
        pytest.skip("no 4 GiB of address space")
    g = memory.as_strided((2, 3, 5), (2**31, 5, 1)).copy_(torch.randn(2, 3, 5))
    x = memory.as_strided((2, 2, 6), (2**31 + 64, 6, 1), 1024).copy_(torch.randn(2, 2, 6))
    out, grad = results(5, 5)
    sum_grad_squared(g, g, out, grad)
    check(out, grad, *exact(g, g), g, g)
    gc = torch.randn(2, 3, 4)
    out, grad = results(3, 2, 3)
    sum_grad_squared_conv(gc, x, out, grad, [1], [(0, 0)], [1])
    check(out, grad, *conv_exact(gc, x, (3,), (1,), ((0, 0),), (1,), 1, "zeros"), None, None)
