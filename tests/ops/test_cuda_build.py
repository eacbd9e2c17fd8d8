"""The CUDA kernels without a GPU: what nvcc makes of them, and what the module says when asked to run one."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from fastfip import env
from fastfip.errors import BackendError
from fastfip.ops import (
    OPS,
    ConvShape,
    grad_norm_squared,
    grad_norm_squared_conv,
    gram_apply,
    spectral_grad,
    sum_grad_squared,
    sum_grad_squared_conv,
)
from fastfip.ops.backends import cuda, native
from tests.support.built import ROOT, built

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
not_compiled = f"native module: {native.reason()}" if native.reason() else cuda.missing()
needs_kernels = pytest.mark.skipif(bool(not_compiled), reason=f"CUDA kernels: {not_compiled}")

#: What each kind of operand must be multiplied with.
PRODUCTS = {
    "4HalfILb1E": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "4HalfILb0E": "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    "6Single": "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
    "6Double": "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64",
}
#: How many kernels of each kind csrc/cuda/<name>.cu has: loaders, with and without a gradient, with one product or two.
KERNELS = {"sum_grad_squared": 4, "spectral_grad": 4, "grad_norm_squared": 3, "gram_apply": 1}
#: Loaders that read element by element: 16-bit numbers through registers, too small for an asynchronous copy.
BY_ELEMENT = ("11LoadWindows", "13LoadPositions")


def compile_for(name, architecture):
    """(ptxas' report, PTX) of csrc/cuda/<name>.cu."""
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}"]
    flags = ["-std=c++17", "-O3", *include, f"-arch={architecture}", "-Xptxas", "-v", "-cubin", "--keep"]
    command = [NVCC, *flags, str(ROOT / "csrc" / "cuda" / f"{name}.cu")]

    def make(folder):
        into = [f"--keep-dir={folder}", "-o", str(folder / "a.cubin")]
        done = subprocess.run([*command, *into], cwd=folder, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / "report").write_text(done.stdout + done.stderr)
        for path in folder.iterdir():
            if path.name != "report" and path.suffix != ".ptx":
                path.unlink()

    folder = built(f"{name}-{architecture}", command, make)
    (ptx,) = folder.glob("*.ptx")
    return (folder / "report").read_text(), ptx.read_text()


@pytest.fixture(scope="module", params=KERNELS)
def compiled(request):
    """Name, report and PTX for sm_90, once."""
    return request.param, *compile_for(request.param, "sm_90")


def report(text):
    """For each kernel of ptxas' report: stack, bytes spilled, registers."""
    pattern = r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers"
    return {name: tuple(map(int, numbers)) for name, *numbers in re.findall(pattern, text, re.DOTALL)}


def assert_no_kernel_spills(name, text, spilled_at_most=0):
    kernels = report(text)
    second_pass = 2 if name == "sum_grad_squared" else 0
    assert len(kernels) == 4 * KERNELS[name] + second_pass
    for kernel, (stack, spilled, registers) in kernels.items():
        assert stack <= spilled_at_most and spilled <= spilled_at_most, kernel
        half = "4Half" in kernel
        alone = "ELb1EEE" in kernel if name == "sum_grad_squared" else "13LoadPositions" in kernel
        # 1, 2 and 3 blocks in 65536 registers
        limit = 255 if (half and alone) or name == "gram_apply" else 128 if half else 168
        assert registers <= limit, (kernel, registers)


@needs_nvcc
def test_no_kernel_spills_and_blocks_fit_side_by_side(compiled):
    assert_no_kernel_spills(*compiled[:2])


@needs_nvcc
@pytest.mark.nvcc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_100"])
@pytest.mark.parametrize("name", KERNELS)
def test_no_kernel_spills_on_other_devices(name, architecture):
    listed = subprocess.run([NVCC, "--list-gpu-code"], text=True, capture_output=True).stdout
    if architecture not in listed.split():
        pytest.skip(f"this nvcc does not know {architecture}")
    # sm_100 is served from PTX; two words of a thread find no register there in kernels of 16-bit numbers.
    little = 8 if architecture == "sm_100" and name in ("sum_grad_squared", "grad_norm_squared") else 0
    assert_no_kernel_spills(name, compile_for(name, architecture)[0], little)


@needs_nvcc
def test_products_run_on_tensor_cores_and_loads_are_asynchronous(compiled):
    source, _, ptx = compiled
    seen = dict.fromkeys(PRODUCTS, 0)
    for entry in re.split(r"\.entry\s+", ptx)[1:]:
        name = entry.split("(", 1)[0]
        if "add_shares" in name:
            continue
        (kind,) = (kind for kind in PRODUCTS if f"kernelINS0_{kind}" in name)
        seen[kind] += 1
        assert entry.count(PRODUCTS[kind]) >= 8, name
        others = {other for other in PRODUCTS.values() if other != PRODUCTS[kind] and other in entry}
        again = {PRODUCTS["6Single"]} if source == "gram_apply" and "Half" in kind else set()  # its sums are float32
        assert others == again, name
        through_registers = "Half" in kind and any(loader in name for loader in BY_ELEMENT)
        both = "11LoadWindows" in name  # beside LoadPositions the right operand comes asynchronously all the same
        assert bool(re.search(r"cp\.async\.c[ag]\.", entry)) != (through_registers and both), name
        assert ("ldmatrix" in entry) == ("Half" in kind), name
        assert "fma.rn.f64" not in entry or kind == "6Double", name
    assert seen == dict.fromkeys(PRODUCTS, KERNELS[source])


def test_it_is_asked_for_by_name_only():
    kernels = [b for op in OPS.values() for b in op.backends if b.name in ("cuda", "triton")]
    assert len(kernels) >= 13 and not any(b.automatic for b in kernels)


@pytest.mark.parametrize("conv", [False, True])
def test_a_tensor_on_the_cpu_is_refused_with_the_reason(conv):
    x = torch.zeros(1, 2, 1)
    with pytest.raises(BackendError, match="backend cuda cannot run: it runs on CUDA devices, not on cpu"):
        if conv:
            sum_grad_squared_conv(x, x, ConvShape((1,), (1,), (0,), (1,)), backend="cuda")
        else:
            sum_grad_squared(x, x, backend="cuda")


def test_the_norms_and_gram_apply_refuse_it_too():
    x = torch.zeros(1, 2, 1)
    with pytest.raises(BackendError, match="backend cuda cannot run: it runs on CUDA devices, not on cpu"):
        gram_apply(x, x, x, backend="cuda")
    with pytest.raises(BackendError, match="backend cuda cannot run: it runs on CUDA devices, not on cpu"):
        grad_norm_squared(x, x, backend="cuda")
    with pytest.raises(BackendError, match="backend cuda cannot run: it runs on CUDA devices, not on cpu"):
        grad_norm_squared_conv(x, x, ConvShape((1,), (1,), (0,), (1,)), backend="cuda")


def test_spectral_grad_refuses_it_too_and_says_when_nothing_is_to_be_projected():
    g, u = torch.zeros(1, 2, 3), torch.zeros(1, 3, 1)
    with pytest.raises(BackendError, match="backend cuda cannot run: it runs on CUDA devices, not on cpu"):
        spectral_grad(g, g, u, u, backend="cuda")
    with pytest.raises(BackendError, match="backend cuda cannot run: there is nothing to be projected"):
        spectral_grad(g, g, backend="cuda")


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
row = [[1, 1, 512], *axes[1:5], [1, 1, 512]]
print(module.cuda_spectral_grad_shares([1, 1, 64, 64, 1], row, 64, 0, 132))
odd, none = (4, [0, 0, 0]), (0, [0, 0, 0])
print(module.cuda_grad_norm_squared_plan([4, 1, 65, 65, 1], row, 0, False, 1))
print(module.cuda_grad_norm_squared_plan([4, 1, 64, 64, 1], row, 0, True, 132))
try:
    module.cuda_grad_norm_squared(matrix, matrix, sizes, axes, 0, True, True, 0, 1, 0, 0)
except ValueError as error:
    print(error)
try:
    module.cuda_gram_apply(odd, odd, odd, [1, 1, 1, 1, 1], 0, True, 0, 0, 0)
except ValueError as error:
    print(error)
try:
    module.cuda_spectral_grad(matrix, odd, matrix, none, sizes, axes, 1, 0, True, 0, 1, 0, 0)
except ValueError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    compiled, driver, shares, error, groups, *others = done.stdout.splitlines()
    more_shares, plan, gram_plan, rows, more_rows, lines = others
    assert compiled.startswith("CUDA ") and "sm_80 sm_90" in compiled
    assert driver and int(shares) == 64
    assert "CUDA says: " in error
    assert groups == "groups must divide outputs and channels"
    assert int(more_shares) == 8  # tiles of 64 positions
    assert plan == "(4, 16)"  # every sample by itself; 2 x 2 tiles of four warps
    assert gram_plan == "(8, 4096)"  # tiles of 64 positions, a number for each of 512
    assert rows == more_rows == "CUDA kernels: rows are not aligned to 16 bytes"
    assert lines == "CUDA kernels: directions are not aligned to 16 bytes"
