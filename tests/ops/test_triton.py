"""Triton kernels on a machine without a GPU: interpreted, and compiled ahead of time. Each in a process of its own."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastfip.errors import BackendError
from fastfip.ops import sum_grad_squared
from fastfip.ops.backends import triton

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.triton
needs_triton = pytest.mark.skipif(bool(triton.reason()), reason=triton.reason())


def run(*command: str, **variables: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **variables}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def old_interpreter() -> bool:
    """Triton before 3.7 turns arrays of one element into integers, which NumPy 2.4 refuses."""
    versions = [tuple(map(int, importlib.metadata.version(name).split(".")[:2])) for name in ("triton", "numpy")]
    return versions[0] < (3, 7) and versions[1] >= (2, 4)


@needs_triton
@pytest.mark.skipif(not triton.reason() and old_interpreter(), reason="this Triton cannot interpret with this NumPy")
def test_in_the_interpreter():
    printed = run(
        "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "tests/support/triton_kernels.py",
        "tests/support/triton_norms.py", "tests/support/triton_spectral.py", "tests/support/triton_apply.py",
        TRITON_INTERPRET="1",
    )  # fmt: skip
    assert " passed" in printed and "skipped" not in printed


@pytest.mark.slow
@needs_triton
def test_every_configuration_compiles_without_spills_and_uses_tensor_cores(tmp_path):
    lines = run("tests/support/triton_ahead_of_time.py", TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    # kernels (norms: two forms; spectral: five; its layer: four), architectures, configurations
    assert len(lines) == 2 * 2 * 4 + (2 + 1 + 5) * 2 * 2 + 4 * 3 * 2
    for line in lines:
        *_, stack, tensor_core = line.split()
        assert stack == "0", f"spills: {line}"
        assert int(tensor_core) > 0, f"no tensor core instruction: {line}"


def test_refusals_have_reasons():
    x = torch.zeros(1, 2, 1)
    with pytest.raises(BackendError, match="triton cannot run: it runs on CUDA devices, not on cpu"):
        sum_grad_squared(x, x, backend="triton")
    assert triton.refuses(x.double().to("meta")).startswith("it runs on CUDA devices")
