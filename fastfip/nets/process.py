"""What a run shares with the process around it: the global random state and memory."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

__all__ = ["PeakMemory", "resident_memory", "seeded"]

#: The global generators are the whole process's: one thread at a time has them. Blocks of one thread may be nested.
_GENERATORS = threading.RLock()


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed Python, NumPy and torch for a block, and give every generator its old state back.

    Blocks of several threads take turns: what one had seeded would be kept by another as the state to give back, and
    neither would draw what its seed says.
    """
    with _GENERATORS:
        yield from _seeded(seed, device)


def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    import numpy

    python, old = random.getstate(), numpy.random.get_state()
    cuda = device.type == "cuda"
    index = (torch.cuda.current_device() if device.index is None else device.index) if cuda else 0
    with torch.random.fork_rng(devices=[index] if cuda else []):
        try:
            random.seed(seed)
            numpy.random.seed(seed % 2**32)
            # Not torch.manual_seed: it would seed devices that this run has nothing to do with.
            torch.default_generator.manual_seed(seed)
            if cuda:
                torch.cuda.default_generators[index].manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(old)


class PeakMemory:
    """The peak of memory during a block."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.what = "tensors on the device" if self.cuda else "resident memory of the process"
        self.peak = 0

    def __enter__(self) -> PeakMemory:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            # Linux: 5 sets the peak that it keeps for the process back to the present value.
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:
                self.what += ", since it began"
        return self

    def __exit__(self, *error: object) -> None:
        self.peak = torch.cuda.max_memory_allocated(self.device) if self.cuda else _resident_peak()


def resident_memory(field: str = "VmRSS") -> int | None:
    """Return the resident memory of this process in bytes, "VmHWM": its peak; None where the system cannot say it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return None


def _resident_peak() -> int:
    peak = resident_memory("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
