"""What fastfip runs on here: versions, CPU, backends and, for each backend that is missing, the reason."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from fastfip.errors import reason


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the checkout that this package is imported from; None for an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        done = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    if done.returncode != 0:
        return None
    return done.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def _torch() -> tuple[Any, str]:
    """Return torch with its version; None and the reason where it does not load, which a bug report may be about."""
    try:
        import torch
    except ModuleNotFoundError as error:
        missing = "not installed: pip install torch" if error.name == "torch" else f"does not load: {reason(error)}"
        return None, missing
    except Exception as error:  # a broken installation raises OSError, RuntimeError and others
        return None, f"does not load: {type(error).__name__}: {reason(error)}"
    return torch, torch.__version__


def _native() -> str:
    from fastfip.ops.backends import native

    if not native.available():
        return f"no: {native.reason()}"
    best = native.module().best_isa().name
    return f"yes ({native.isa()})" if native.isa() == best else f"yes ({native.isa()}, by FASTFIP_ISA; best is {best})"


def _backend() -> str:
    """Which implementation of the ops runs by itself, and why it is not the fastest one."""
    from fastfip.ops.backends import native

    if native.available():
        return "native on the CPU, reference elsewhere"
    return f"reference; native kernels are {native.reason()}"


def _cuda() -> str:
    """Asks NVML, not the CUDA runtime: a CUDA context would make a later fork of this process fail."""
    import torch

    if torch.version.cuda is None:
        return "no: this torch is built without CUDA"
    asked = os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    try:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    finally:
        if asked is None:
            del os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"]
        else:
            os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = asked
    if count == 0:
        return "no: no device or driver"
    return f"yes ({count} device{'s' * (count != 1)}, CUDA {torch.version.cuda})"


def _cuda_kernels() -> str:
    """Asks neither driver nor runtime (see _cuda), only what was compiled and what NVML says."""
    from fastfip.ops.backends import cuda

    why = cuda.reason() or (_cuda() if _cuda().startswith("no") else "")
    if why:
        return f"no: {why.removeprefix('no: ')}" + (f" (compiled: {cuda.compiled()})" if cuda.compiled() else "")
    return f"yes ({cuda.compiled()}); never run on a GPU yet, so only when asked for"


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "no: not installed (pip install triton)"
    return f"yes ({_version('triton') or 'unknown version'})"


def collect() -> dict[str, Any]:
    """Everything a bug report or a benchmark row needs, as plain values; initialises neither CUDA nor Triton.

    Where torch is missing or broken, what depends on it is None.
    """
    import fastfip

    torch, torch_version = _torch()

    names = ("numpy", "safetensors", "rich", "typer", "scikit-learn", "matplotlib", "transformers")
    return {
        "fastfip": fastfip.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch_version,
        "packages": {name: version for name in names if (version := _version(name))},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_capability": None if torch is None else torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": None if torch is None else torch.get_num_threads(),
        "backend": None if torch is None else _backend(),
        "native": None if torch is None else _native(),
        "triton": _triton(),
        "cuda": None if torch is None else _cuda(),
        "cuda_kernels": None if torch is None else _cuda_kernels(),
    }


def text(values: dict[str, Any] | None = None) -> str:
    """The values of `collect()` as lines "name  value"."""
    values = collect() if values is None else values
    rows = []
    for name, value in values.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        rows.append(f"{name:<15} {'-' if value is None else value}")
    return "\n".join(rows)
