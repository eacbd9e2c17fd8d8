"""Several processes in a process group of gloo, forked: what each returns or raises comes back to the test."""

import gc
import multiprocessing
import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist

__all__ = ["environment", "in_processes"]


def in_processes(world, folder, work, group=True):
    """Run `work(rank)` in forked processes; return for each what it returned, or the exception's type and text.

    A process that ends without an answer has None.
    """
    folder = Path(folder)
    port = _free_port()
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=_one, args=(rank, world, port, folder, work, group)) for rank in range(world)]
    for process in started:
        process.start()
    for process in started:
        process.join(300)  # on a machine that is busy with other work
        if process.is_alive():
            process.kill()
    answers = [folder / f"answer.{rank}" for rank in range(world)]
    return [torch.load(path, weights_only=False) if path.exists() else None for path in answers]


def environment(rank, world, port):
    """Return what torchrun tells a process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _one(rank, world, port, folder, work, group):
    torch.set_num_threads(1)
    gc.freeze()  # what the parent has made is not looked through again by each collection here
    os.environ.update(environment(rank, world, port))
    answer = folder / f"answer.{rank}"
    answer.unlink(missing_ok=True)
    try:
        if group:
            dist.init_process_group("gloo", rank=rank, world_size=world)
        found = work(rank)
    except BaseException as error:
        found = (type(error).__name__, str(error))
    torch.save(found, f"{answer}.part")
    os.replace(f"{answer}.part", answer)
    os._exit(0)


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
