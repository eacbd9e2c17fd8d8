"""Memory of a rank while the Fisher diagonal is taken of a sharded model, and while such a model is purified.

    python -m benchmarks.fisher.bench_sharded [--blocks 12] [--width 1024] [--world 2] [--table]

The model is a stack of Linear layers of one width, each a unit of FSDP2. `parts` are the bytes of a rank's parts of the
parameters, `peak` the most resident memory of rank 0 above that before the model was made, with the parts; both over
the bytes of all parameters in `peak / parameters`. `whole model` is the same call with group="auto" on a model that
is not sharded. The processes run with MALLOC_MMAP_THRESHOLD_=65536, so that glibc keeps nothing of what is freed.
Inputs are 32 samples of noise.
Rows go to benchmarks/results/sharded_memory.csv, the tables to docs/distributed.md and docs/scale.md (purifications).
"""

from __future__ import annotations

import functools
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import fastfip
from benchmarks import harness
from fastfip.methods import get
from fastfip.nets.process import PeakMemory, resident_memory

RESULTS = harness.Results(
    "sharded_memory", "what blocks width world parameters parts peak multiple commit torch cpu", run="what blocks width"
)
CLASSES, SAMPLES = 4, 32


def made(blocks: int, width: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(blocks) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES)).eval()


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model:  # type: ignore[attr-defined]
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model)


def diagonal(model: nn.Module, data: Any) -> None:
    fastfip.fisher_diagonal(model, [tuple(t.chunk(dist.get_world_size())[dist.get_rank()] for t in data)], group="auto")


def purified(model: nn.Module, data: Any, method: str) -> None:
    fastfip.purify(
        model, data, method, steps=2, batch_size=8, inplace=True, progress=False, force=True, measure=(), group="auto"
    )


#: What is measured: whether the model is sharded, and the call.
WHAT: dict[str, tuple[bool, Any]] = {
    "`fisher_diagonal`, whole model": (False, diagonal),
    "`fisher_diagonal`": (True, diagonal),
    **{
        f"`purify`, `{method}`": (True, functools.partial(purified, method=method))
        for method in ("fine_tune", "wfip", "fisher_steps", "fast_wfip", "fast_fip")
    },
}


def one(rank: int, world: int, port: int, what: str, blocks: int, width: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    parts, call = WHAT[what]
    y = torch.arange(SAMPLES) % CLASSES
    small = made(2, 16)  # what is imported, and what torch sets up, is not the model's
    call(sharded(small) if parts else small, (torch.randn(SAMPLES, 16), y))
    before = resident_memory() or 0
    model = made(blocks, width)
    model = sharded(model) if parts else model
    with PeakMemory(torch.device("cpu")) as used:
        call(model, (torch.randn(SAMPLES, width, generator=torch.Generator().manual_seed(0)), y))
    own = sum(getattr(p, "to_local", lambda p=p: p)().nbytes for p in model.parameters())
    if rank == 0:
        torch.save((own, used.peak - before), Path(folder) / "found.pt")
    dist.destroy_process_group()


def rows(blocks: int, width: int, world: int) -> list[dict[str, object]]:
    # What is freed goes back to the system at once: else the resident memory is that of the allocator's own lists.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    size, out = sum(p.nbytes for p in made(blocks, width).parameters()), []
    for what in WHAT:
        with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            free.close()
            mp.spawn(one, (world, port, what, blocks, width, folder), world)
            parts, peak = torch.load(Path(folder) / "found.pt", weights_only=True)
        out.append(row(what, blocks, width, world, size, parts, peak))
        harness.show(out[-1], what=-32)
    return out


def row(what: str, blocks: int, width: int, world: int, size: int, parts: int, peak: int) -> dict[str, object]:
    return {
        "what": what, "blocks": blocks, "width": width, "world": world, "parameters": size, "parts": parts,
        "peak": peak, "multiple": f"{peak / size:.2f}",
    }  # fmt: skip


def show() -> str:
    head = ["call", "processes", "all parameters", "a rank's parts", "peak of a rank", "peak / all parameters"]
    return harness.table(
        head,
        [
            [r["what"], r["world"], *(f"{int(r[name]) / 1e6:,.1f} MB" for name in ("parameters", "parts", "peak")),
             r["multiple"]]
            for r in RESULTS.read()
        ],
    )  # fmt: skip


def purifications() -> str:
    """Return the table of the methods: whether each works in parts, and the peak of a rank."""
    said = []
    for r in RESULTS.read():
        method = r["what"].removeprefix("`purify`, ").strip("`")
        if r["what"].startswith("`purify`"):
            way = "its parts" if get(method).over_shards else "all weights"
            said.append([f"`{method}`", way, f"{int(r['parts']) / int(r['parameters']):.2f}", r["multiple"]])
    return harness.table(["method", "a rank tunes", "a rank's parts / all parameters", "peak / all parameters"], said)


def main() -> None:
    parser = harness.Parser(__doc__)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="only write the tables of the documents anew")
    options = parser.parse()
    if not options.table:
        RESULTS.add(rows(options.blocks, options.width, options.world))
    harness.splice(harness.DOCS / "distributed.md", "sharded", show())
    harness.splice(harness.DOCS / "scale.md", "parts", purifications())


if __name__ == "__main__":
    main()
