"""A command in several processes, as torchrun starts them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from fastfip.cli.errors import Interrupted
from fastfip.cli.options import Net

__all__ = ["together"]


@contextlib.contextmanager
def together(net: Net) -> Iterator[bool]:
    """Let the processes that torchrun started be one process group for a block; yield whether this one speaks.

    Nothing is done where WORLD_SIZE says that there is one process. On CUDA each process has a device of its own.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) < 2:
        yield True
        return
    import torch
    import torch.distributed as dist

    cuda = torch.device(net.device).type == "cuda"
    if net.device == "cuda":
        net.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if cuda:
        torch.cuda.set_device(net.device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield dist.get_rank() == 0
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted, or ended by torchrun because another process failed: nothing written (with --resume FILE the "
            "same command goes on)"
        ) from None
    finally:
        dist.destroy_process_group()
