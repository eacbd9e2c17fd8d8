"""Compile every Triton kernel and configuration for sm_80 and sm_90, spectral_apply for sm_100 as well, without a GPU.
Prints one line each:
kernel, type, architecture, configuration, registers, bytes of stack (spills), tensor core instructions.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastfip.ops.grad_norm_squared import triton as norms
from fastfip.ops.gram_apply import triton as applied
from fastfip.ops.spectral import apply_triton as layer
from fastfip.ops.spectral import grad_triton as spectral
from fastfip.ops.sum_grad_squared import triton as kernels

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
OPERANDS = ("g_ptr", "a_ptr", "x_ptr", "q_ptr", "k_ptr", "v_ptr", "u_ptr", "w_ptr", "bias_ptr", "y_ptr", "p_ptr")


def compile_one(kernel, constants, dtype, architecture, tiles):
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = f"*{dtype}" if name in OPERANDS else "*fp32" if name.endswith("_ptr") else "i32"
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in signature if name.endswith("_ptr")
    }
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    done = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    tensor_core = len(re.findall(r"wgmma\.mma|mma\.sync|tcgen05\.mma", done.asm["ptx"]))
    print(kernel.fn.__name__, dtype, f"sm_{architecture}", *tiles, registers, stack, tensor_core, flush=True)


for (_, half), tiles in kernels.TILES.items():
    constants = {
        "GRADIENT": True,
        "INTERPRET": False,
        "PRECISION": "tf32x3",
        "BLOCK_O": tiles.block_o,
        "BLOCK_I": tiles.block_i,
        "BLOCK_T": tiles.block_t,
    }
    window = {f"{name}_{axis}": 1 for name in ("STEP", "PAD", "DILATION") for axis in "ZYX"}
    window.update(KERNEL_Z=1, KERNEL_Y=3, KERNEL_X=3, DIMS=2)
    for architecture in (80, 90):
        for dtype in ("bf16",) if half else ("fp32",):
            compile_one(kernels.dense_kernel, constants, dtype, architecture, tiles)
            compile_one(kernels.conv_kernel, constants | window, dtype, architecture, tiles)

for module, kernel in ((norms, norms.norm_kernel), (applied, applied.gram_apply_kernel)):
    for half, tiles in module.TILES.items():
        blocks = {name.upper(): size for name, size in tiles._asdict().items() if name.startswith("block")}
        constants = {"INTERPRET": False, "PRECISION": "tf32x3", **blocks}
        for architecture in (80, 90):
            for gram in (True, False) if module is norms else (None,):
                chosen = constants if gram is None else constants | {"GRAM": gram}
                compile_one(kernel, chosen, "bf16" if half else "fp32", architecture, tiles)

for half, tiles in spectral.TILES.items():
    blocks = {name.upper(): size for name, size in tiles._asdict().items() if name.startswith("block")}
    window = {f"{name}_{axis}": 1 for name in ("STEP", "PAD", "DILATION") for axis in "ZYX"}
    window.update(KERNEL_Z=1, KERNEL_Y=3, KERNEL_X=3)
    for architecture in (80, 90):
        for left, right in ((True, 0), (True, 1), (True, 2), (False, 1), (False, 2)):
            constants = {"INTERPRET": False, "PRECISION": "tf32x3", "LEFT": left, "RIGHT": right, **blocks, **window}
            compile_one(spectral.spectral_grad_kernel, constants, "bf16" if half else "fp32", architecture, tiles)

for half, tiles in layer.TILES.items():
    blocks = {name.upper(): size for name, size in tiles._asdict().items() if name.startswith("block")}
    for architecture in (80, 90, 100):
        for correct, directions in ((True, 16), (True, 64), (True, 128), (False, 128)):
            constants = {"INTERPRET": False, "PRECISION": "tf32x3", "CORRECT": correct, "BIAS": True, **blocks}
            constants["BLOCK_K"] = directions
            compile_one(layer.spectral_apply_kernel, constants, "bf16" if half else "fp32", architecture, tiles)
