"""The CUDA kernels compiled for the CPU (cuda_on_cpu.h), and what their tests give to them."""

import ctypes
import shutil
import subprocess

import torch

from tests.support.built import ROOT, built

COMPILER = shutil.which("g++") or shutil.which("c++")
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


def compile_for_cpu(name):
    """The library of tests/support/<name>.cpp; its functions return what is wrong, or nothing."""
    include = [f"-I{ROOT / part}" for part in ("csrc", "csrc/cuda", "tests/support")]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    command = [str(COMPILER), *flags, *include, str(ROOT / "tests" / "support" / f"{name}.cpp")]
    made = built(name, command, lambda folder: subprocess.run([*command, "-o", str(folder / "a.so")], check=True))
    return ctypes.CDLL(str(made / "a.so"))


def flat(values):
    return [y for x in values for y in (flat(x) if isinstance(x, (list, tuple)) else [int(x)])]


def run_on_cpu(function, arguments, order):
    """Run a kernel, its threads taking turns in that order. Returns the loader that ran."""
    numbers = flat(arguments)
    rows = ctypes.c_int(-1)
    function.restype = ctypes.c_char_p
    said = function((ctypes.c_int64 * len(numbers))(*numbers), order, ctypes.byref(rows))
    assert said is None, said.decode()
    return "rows" if rows.value else "windows"


def close(got, want, dtype, times=1):
    assert torch.isfinite(got).all() and got.shape == want.shape
    assert (got.double() - want).norm() <= times * ROUNDING[dtype] * want.norm()


def inside_nan(x, dtype, room=16):
    """x in that dtype with NaN before and after it and between its rows; features and rows aligned to 16 bytes."""
    n, t, f = x.shape
    wide = torch.full((n, t + 1, -(-f // 8) * 8 + room), float("nan"), dtype=dtype)
    start = wide.data_ptr() % 16 // x.element_size()
    assert start == 0
    wide[:, :t, :f] = x.to(dtype)
    return wide[:, :t, :f]
