"""What compilers make of the C++ and CUDA sources: kept in build/tests until a source, flag or compiler changes."""

import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["ROOT", "built"]

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build" / "tests"


def built(name, command, make):
    """Return the folder that `make(folder)` has filled by that command; made once for each state of the sources.

    Several test files, both workers and the next run use the same folder. What fails is not kept.
    """
    folder = KEPT / f"{name}-{state(*command)}"
    if not folder.is_dir():
        KEPT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT) as part:
            new = Path(part) / "new"
            new.mkdir()
            make(new)
            try:
                os.rename(new, folder)
            except OSError:  # the other worker was first
                assert folder.is_dir()
        for old in KEPT.glob(f"{name}-*"):
            if old != folder:
                gone = Path(tempfile.mkdtemp(dir=KEPT)) / "old"
                with contextlib.suppress(OSError):  # the other worker was first
                    os.rename(old, gone)  # at once, so that no folder is there in part
                shutil.rmtree(gone.parent, ignore_errors=True)
    return folder


@functools.cache
def state(compiler, *flags):
    """Return a text that is another one for every other compiler, flag, or source of csrc and tests/support."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(repr((compiler, flags)).encode() + version)
    for path in sorted([*(ROOT / "csrc").rglob("*"), *(ROOT / "tests" / "support").iterdir()]):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            digest.update(repr((str(path.relative_to(ROOT)), path.read_bytes())).encode())
    return digest.hexdigest()[:16]
