"""Native kernels on operands that end where memory ends: a read beyond one kills this process (a test starts it)."""

import ctypes
import itertools
import mmap

import torch

from fastfip.ops.grad_norm_squared.native import grad_norm_squared, grad_norm_squared_conv
from fastfip.ops.spectral.grad_native import spectral_grad
from fastfip.ops.sum_grad_squared.native import sum_grad_squared, sum_grad_squared_conv
from tests.ops.test_native_spectral_grad import MORE
from tests.ops.test_native_spectral_grad import SIZES as SPECTRAL_SIZES
from tests.ops.test_native_sum_grad_squared import CONVS, ISAS, SIZES, conv_problem
from tests.ops.test_spectral_grad import CONVS as SPECTRAL_CONVS
from tests.ops.test_spectral_grad import KNOWN, problem
from tests.ops.test_spectral_grad import conv_problem as spectral_conv

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(x: torch.Tensor, at_end: bool) -> torch.Tensor:
    """Copy of x, contiguous, whose last byte (or first one) lies beside a page that cannot be touched."""
    size = x.numel() * x.element_size()
    pages = -(-max(size, 1) // mmap.PAGESIZE)
    length = (pages + 2) * mmap.PAGESIZE
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    base = libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, private, -1, 0)
    for page in (0, pages + 1):
        assert libc.mprotect(base + page * mmap.PAGESIZE, mmap.PAGESIZE, 0) == 0
    start = base + mmap.PAGESIZE + (pages * mmap.PAGESIZE - size if at_end else 0)
    memory = (ctypes.c_char * max(size, 1)).from_address(start)
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel()) if size else x.flatten()
    return copy.view(x.shape).copy_(x)


for isa, dtype, end in itertools.product(ISAS, (torch.float32, torch.float64, torch.bfloat16), (True, False)):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    for bf16 in (False, True) if isa == "avx512_bf16" and acc == torch.float32 else (False,):
        for n, t, o, i in SIZES:
            g, a = (guarded(torch.randn(n, t, size).to(dtype), end) for size in (o, i))
            out, grad = (guarded(torch.zeros(o, i, dtype=acc), end) for _ in range(2))
            sum_grad_squared(g, a, out, grad, isa=isa, bf16=bf16)
            grad_norm_squared(g, a, guarded(torch.zeros(n, o, i, dtype=acc), end), isa=isa)
            g, a = (guarded(torch.randn(n, size, t).to(dtype), end).transpose(1, 2) for size in (o, i))
            sum_grad_squared(g, a, out, grad, isa=isa, bf16=bf16, threads=2)
        for case in CONVS:
            c, o, kernel, stride, padding, dilation, groups, _ = case
            g, x = (guarded(y, end) for y in conv_problem(case, 3, dtype))
            out, grad = (guarded(torch.zeros(o, c // groups, *kernel, dtype=acc), end) for _ in range(2))
            sum_grad_squared_conv(g, x, out, grad, stride, padding, dilation, groups, isa=isa, bf16=bf16)
            each = guarded(torch.zeros(3, *out.shape, dtype=acc), end)
            grad_norm_squared_conv(g, x, each, kernel, stride, padding, dilation, groups, isa=isa)
    for known in KNOWN:
        for size in SPECTRAL_SIZES:
            operands = [t if t is None else guarded(t, end) for t in problem(size, known, dtype)]
            spectral_grad(*operands, None, isa=isa)
            g, x = (guarded(t.mT, end).mT for t in operands[:2])
            spectral_grad(g, x, *operands[2:], None, isa=isa, threads=2)
        for case in [*SPECTRAL_CONVS, *MORE]:
            (*tensors, shape), _ = spectral_conv(case, 3, known, dtype)
            spectral_grad(*(t if t is None else guarded(t, end) for t in tensors), shape, isa=isa)
print("no access beyond an operand")
