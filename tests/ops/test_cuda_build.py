"""The CUDA kernels without a GPU: what nvcc makes of them, and what the module says when asked to run one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastfip import env
from fastfip.errors import BackendError
from fastfip.ops import OPS, ConvShape, sum_grad_squared, sum_grad_squared_conv
from fastfip.ops.backends import cuda, native

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
not_compiled = f"native module: {native.reason()}" if native.reason() else cuda.missing()
needs_kernels = pytest.mark.skipif(bool(not_compiled), reason=f"CUDA kernels: {not_compiled}")

#: What each kind of operand must be multiplied with, and how many kernels it has: two loaders, with and without grad.
PRODUCTS = {
    "4HalfILb1E": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "4HalfILb0E": "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    "6Single": "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
    "6Double": "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64",
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(ptxas' report, PTX) of the kernels for sm_90: one architecture, once."""
    folder = tmp_path_factory.mktemp("nvcc")
    flags = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}", "-arch=sm_90", "-Xptxas", "-v"]
    source = ROOT / "csrc" / "cuda" / "sum_grad_squared.cu"
    command = [NVCC, *flags, "-cubin", "--keep", f"--keep-dir={folder}", str(source), "-o", str(folder / "a.cubin")]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (ptx,) = folder.glob("*.ptx")
    return done.stdout + done.stderr, ptx.read_text()


def report(text):
    """For each kernel of ptxas' report: stack, bytes spilled, registers."""
    pattern = r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers"
    return {name: tuple(map(int, numbers)) for name, *numbers in re.findall(pattern, text, re.DOTALL)}


@needs_nvcc
def test_no_kernel_spills_and_blocks_fit_side_by_side(compiled):
    kernels = report(compiled[0])
    assert len(kernels) == 4 * 4 + 2  # types, loaders with and without the gradient; the second pass in two types
    for name, (stack, spilled, registers) in kernels.items():
        assert (stack, spilled) == (0, 0), name
        half = "4Half" in name
        limit = 255 if half and "ELb1EEE" in name else 128 if half else 168  # 1, 2 and 3 blocks in 65536 registers
        assert registers <= limit, (name, registers)


@needs_nvcc
def test_products_run_on_tensor_cores_and_loads_are_asynchronous(compiled):
    entries = re.split(r"\.entry\s+", compiled[1])[1:]
    seen = dict.fromkeys(PRODUCTS, 0)
    for entry in entries:
        name = entry.split("(", 1)[0]
        if "add_shares" in name:
            continue
        (kind,) = (kind for kind in PRODUCTS if f"kernelINS0_{kind}" in name)
        seen[kind] += 1
        assert entry.count(PRODUCTS[kind]) >= 8, name
        assert not [other for other in PRODUCTS.values() if other != PRODUCTS[kind] and other in entry], name
        windows_of_halves = "Half" in kind and "11LoadWindows" in name
        assert bool(re.search(r"cp\.async\.c[ag]\.", entry)) != windows_of_halves, (
            name
        )  # 2 bytes are too few for an asynchronous copy
        assert ("ldmatrix" in entry) == ("Half" in kind), name
        assert "fma.rn.f64" not in entry or kind == "6Double", name
    assert seen == dict.fromkeys(PRODUCTS, 4)


def test_it_is_asked_for_by_name_only():
    for op in ("sum_grad_squared", "sum_grad_squared_conv"):
        assert not OPS[op]["cuda"].automatic


@pytest.mark.parametrize("conv", [False, True])
def test_a_tensor_on_the_cpu_is_refused_with_the_reason(conv):
    x = torch.zeros(1, 2, 1)
    with pytest.raises(BackendError, match="backend cuda cannot run: it runs on CUDA devices, not on cpu"):
        if conv:
            sum_grad_squared_conv(x, x, ConvShape((1,), (1,), (0,), (1,)), backend="cuda")
        else:
            sum_grad_squared(x, x, backend="cuda")


def test_the_environment_report_says_whether_they_can_run():
    line = env.collect()["cuda_kernels"]
    assert line.startswith("yes (CUDA ") if torch.cuda.is_available() and not cuda.reason() else line.startswith("no: ")
    if native.available() and torch.version.cuda is None:
        assert "torch is built without CUDA" in line or not_compiled in line


@needs_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_module_loads_without_a_driver_and_says_what_is_missing():
    """In a process of its own: asking starts CUDA, and the kernels' own error is CUDA's."""
    code = """
from fastfip.ops.backends import cuda, native
module = native.module()
print(cuda.compiled())
print(module.cuda_driver_reason())
ones, sizes = [1, 1, 1], [1, 1, 1, 1, 1]
axes = [ones, ones, ones, ones, [0, 0, 0], ones]
print(module.cuda_sum_grad_squared_shares([64, 1, 64, 64, 1], axes, 0, 132))
matrix = (0, [0, 0, 1, 0, 0, 1])
try:
    module.cuda_sum_grad_squared(matrix, matrix, sizes, axes, 0, True, 0, 0, 0, 1, 0, 0)
except RuntimeError as error:
    print(error)
try:
    module.cuda_sum_grad_squared(matrix, matrix, [1, 1, 3, 1, 2], axes, 0, True, 0, 0, 0, 1, 0, 0)
except ValueError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    compiled, driver, shares, error, groups = done.stdout.splitlines()
    assert compiled.startswith("CUDA ") and "sm_80 sm_90" in compiled
    assert driver and int(shares) == 64
    assert "CUDA says: " in error
    assert groups == "groups must divide outputs and channels"
