"""What a call takes, measured in a child of this process: the peak of its memory, and what it raised."""

from __future__ import annotations

import gc
import os
import pickle
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LINUX = sys.platform == "linux"


def in_child(call: Callable[[], Any], most: int = 2**31) -> tuple[Any, int]:
    """Return what a call returns, or the exception that it raises, and its peak of bytes above the start.

    Args:
        call: run in a fork, so that nothing that it imports or breaks stays here.
        most: bytes of address space that it may take; beyond, allocations fail.
    """
    if not LINUX:
        pytest.skip("peaks of memory are read from /proc")
    gc.collect()
    out, into = os.pipe()
    child = os.fork()
    if not child:
        os.close(out)
        said: Any = None
        try:
            here = status("VmSize")
            resource.setrlimit(resource.RLIMIT_AS, (here + most, here + most))
            Path("/proc/self/clear_refs").write_text("5")
            before = status("VmRSS")
            try:
                said = call()
            except BaseException as error:
                said = error
            said = (said, status("VmHWM") - before)
        finally:
            os.write(into, pickle.dumps(said))
            os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    return pickle.loads(data)


def status(name: str) -> int:
    """Return bytes that /proc/self/status has under a name, e.g. VmRSS."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1])
