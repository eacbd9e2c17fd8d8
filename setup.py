"""Builds the optional native module. Everything else about the package is in pyproject.toml.

FASTFIP_NATIVE=auto (default)  build it; where no compiler works, install without it and say so
FASTFIP_NATIVE=1               build it or fail
FASTFIP_NATIVE=0               do not build it: a pure Python wheel

FASTFIP_CUDA=auto (default)    with CUDA kernels where the torch that is installed is a CUDA build and nvcc is found and
                               works; without them, saying why, where not
FASTFIP_CUDA=1                 with them or fail
FASTFIP_CUDA=0                 without them
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

ROOT = Path(__file__).resolve().parent
MODE = os.environ.get("FASTFIP_NATIVE", "auto")
CUDA = os.environ.get("FASTFIP_CUDA", "auto")
for name, value in (("FASTFIP_NATIVE", MODE), ("FASTFIP_CUDA", CUDA)):
    if value not in ("auto", "1", "0"):
        raise OptionError(f"{name}={value!r}: use auto, 1 or 0")
NO_COMPILER = "no working C++ compiler (install one, or name it in CXX)"


def run(step: str, command: list[str]) -> None:
    """Run one build step; what it printed is shown only when it fails."""
    try:
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        raise CompileError(f"{command[0]} cannot run: {error.strerror}") from None
    if done.returncode == 0:
        return
    print(done.stdout, file=sys.stderr)
    if "CMAKE_CXX_COMPILER" in done.stdout:
        raise CompileError(NO_COMPILER)
    wrong = [line.strip() for line in done.stdout.splitlines() if "error:" in line or "nvcc fatal" in line]
    raise CompileError(f"{step} failed: {wrong[0] if wrong else 'pip install -v shows how'}")


def no_cuda_torch(folders: Iterable[str] | None = None) -> str:
    """Why torch has no use for CUDA kernels here; empty where it has.

    An isolated build cannot import torch, and need not: the file `torch/version.py` says which CUDA it was built for.
    It is looked for on `sys.path` and where the interpreter installs packages, which an isolated build leaves out.
    """
    if folders is None:
        folders = [*sys.path, *(sysconfig.get_path(name) for name in ("platlib", "purelib"))]
    for folder in folders:
        file = Path(folder or ".") / "torch" / "version.py"
        if file.is_file():
            found = re.search(r"^cuda\b.*= *'([0-9.]+)'", file.read_text(encoding="utf-8"), re.MULTILINE)
            return "" if found else "the torch beside it was no CUDA build (FASTFIP_CUDA=1 compiles them all the same)"
    return "there was no torch beside it (FASTFIP_CUDA=1 compiles them all the same)"


class CMakeBuild(build_ext):
    """Configure, build and place the one extension with CMake and ninja."""

    def build_extension(self, ext: Extension) -> None:
        """Build; in mode auto a failing compiler leaves a note where the module would be, which `fastfip env` shows."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # one that an earlier build left must not be packaged when this one fails
        note = target.parent / "_native_missing.txt"
        note.unlink(missing_ok=True)
        try:
            self.compile_with_cuda(target)
        except CompileError as error:
            if MODE == "1":
                raise
            print(f"fastfip: installing without native kernels: {error}", file=sys.stderr)
            note.write_text(f"not built when fastfip was installed: {error}\n")
            if self.editable_mode:
                shutil.copy(note, ROOT / "fastfip")
        else:
            if self.editable_mode:
                (ROOT / "fastfip" / note.name).unlink(missing_ok=True)

    def compile_with_cuda(self, target: Path) -> None:
        """Build with the CUDA kernels that FASTFIP_CUDA asks for; an nvcc that fails must not cost the CPU kernels."""
        why = no_cuda_torch() if CUDA == "auto" else ""
        if why:
            self.compile_with_cmake(target, "0", f"when fastfip was built, {why}")
            return
        try:
            self.compile_with_cmake(target, CUDA)
        except CompileError as error:
            if CUDA != "auto" or str(error).startswith(NO_COMPILER):
                raise
            why = "".join(c if c.isalnum() or c in " .,:-+_/()" else " " for c in str(error))
            self.compile_with_cmake(target, "0", f"when fastfip was built, {why}")
            print(f"fastfip: installing without CUDA kernels: {error}", file=sys.stderr)

    def compile_with_cmake(self, target: Path, cuda: str, missing: str = "") -> None:
        """Raises setuptools.errors.CompileError with one line that names the step and its first error."""
        import pybind11

        build = Path(self.build_temp).resolve() / "native"
        shutil.rmtree(build, ignore_errors=True)  # a cache of another compiler or Python must not survive
        cmake = shutil.which("cmake") or "cmake"
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        run(
            "cmake",
            [cmake, "-S", str(ROOT), "-B", str(build), *generator]
            + ["-DCMAKE_BUILD_TYPE=Release"]
            + [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
            + [f"-DFASTFIP_OUTPUT_DIR={target.parent}", f"-DFASTFIP_OUTPUT_NAME={target.name}"]
            + [f"-DFASTFIP_CUDA={cuda}", f"-DFASTFIP_CUDA_MISSING={missing}"],
        )
        run(
            "the C++ build",
            [cmake, "--build", str(build), "--config", "Release", "--parallel", str(os.cpu_count() or 1)],
        )
        if not target.exists():
            raise CompileError(f"the build left no {target.name}")


# optional: an editable install must not insist on copying a file that mode auto did not build
native = [] if MODE == "0" else [Extension("fastfip._native", sources=[], optional=MODE == "auto")]
setup(ext_modules=native, cmdclass={"build_ext": CMakeBuild})
