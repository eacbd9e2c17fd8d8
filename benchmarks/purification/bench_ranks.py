"""What several processes send for one purification, against DistributedDataParallel, and how far they end apart.

    python -m benchmarks.purification.bench_ranks [--nets resnet20 vit preact_resnet18] [--worlds 2 4] [--table]

Bytes are what one process hands to collectives in a step of the tuning (32 samples), counted by `fastfip.nets.ranks`;
those of DistributedDataParallel are the buckets of gradients that its communication hook sees in a step of the same
model, without the buffers that it broadcasts. `gradients` are sums of what is tuned; `perturbations` are sums for the
worst case, in the steps that unlearn; `others` are outputs, BatchNorm's statistics and the Fisher trace. `weights` and
`answers` say how far the weights, and the outputs for all samples, are from those of one process: the norm of the
difference over the norm, in float32, after STEPS steps of a fresh model. Inputs are noise: bytes do not depend on what
they show. The search before the first step is cut to two steps.
Rows go to benchmarks/results/ranks.csv, the table to docs/distributed.md.
"""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import fastfip
from benchmarks import harness
from fastfip.methods import _reach, _search
from fastfip.methods.wfip import search as searching
from fastfip.testing import nets

RESULTS = harness.Results(
    "ranks",
    "net parameters method world gradients perturbations others ddp ratio weights answers commit torch cpu",
    run="net method world",
)
NETS: dict[str, Any] = {
    "resnet20": nets.ResNet20,
    "vit": nets.ViT,
    "preact_resnet18": nets.preact_resnet18,
}
METHODS = ("fine_tune", "fisher_steps", "wfip", "fast_wfip", "fast_fip")
STEPS, BATCH, CLASSES = 4, 32, 10


def made(net: str) -> nn.Module:
    """A fresh model in eval mode, the same in every process."""
    torch.manual_seed(0)
    return nets.randomize_norms(NETS[net](CLASSES)).eval()


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(BATCH, 3, 32, 32, generator=generator), torch.arange(BATCH) % CLASSES


def purified(net: str, method: str, group: Any) -> fastfip.PurifyResult:
    searching.ROUNDS, _search.STEPS, _reach.LAST, _search.REACH = 1, 2, 1, 0.0
    return fastfip.purify(
        made(net), samples(), method, steps=STEPS, batch_size=BATCH, progress=False, group=group, force=True, measure=()
    )


def bytes_of_ddp(net: str) -> int:
    """Bytes of gradients that DistributedDataParallel hands to its communication hook in a step."""
    sent = 0

    def count(state: None, bucket: Any) -> Any:
        nonlocal sent
        sent += bucket.buffer().nbytes
        done: Any = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    # The text of an annotation, as this file has them, is refused.
    count.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}
    model = nn.parallel.DistributedDataParallel(made(net))
    model.register_comm_hook(None, count)
    x, y = samples()
    F.cross_entropy(model(x[:2]), y[:2]).backward()
    return sent


def one(rank: int, world: int, port: int, wanted: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    found: dict[Any, Any] = {}
    for net in wanted:
        found[net] = bytes_of_ddp(net)
        for method in METHODS:
            result = purified(net, method, "auto")
            found[net, method] = result.settings["ranks"]["bytes"], ends(result)
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.destroy_process_group()


def rows(wanted: list[str], worlds: list[int]) -> list[dict[str, object]]:
    torch.set_num_threads(1)
    alone = {(net, method): ends(purified(net, method, None)) for net in wanted for method in METHODS}
    out = []
    for world in worlds:
        with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            free.close()
            mp.spawn(one, (world, port, wanted, folder), world)
            found = torch.load(Path(folder) / "found.pt", weights_only=True)
        for net in wanted:
            for method in METHODS:
                sent, state = found[net, method]
                out.append(
                    row(net, method, world, sent, found[net], [apart(a, b) for a, b in zip(alone[net, method], state)])
                )
                harness.show(out[-1], net=-16, method=-13)
    return out


def row(net: str, method: str, world: int, sent: dict[str, int], ddp: int, far: list[float]) -> dict[str, object]:
    config = fastfip.methods.get(method).Config()
    # Two of the search's steps, or what its first radius takes, are in the sum of the perturbations.
    unlearning = max(1, round(STEPS * getattr(config, "unlearn", 0.0) + 0.49))
    gradients = sent["gradients"] / STEPS
    return {
        "net": net, "parameters": nets.parameter_count(made(net)), "method": method, "world": world,
        "gradients": round(gradients), "perturbations": round(sent.get("perturbations", 0) / (unlearning + 2)),
        "others": round(sum(sent.get(what, 0) for what in ("outputs", "batchnorm", "values")) / STEPS),
        "ddp": ddp, "ratio": f"{ddp / gradients:.3g}",
        "weights": f"{far[0]:.1e}", "answers": f"{far[1]:.1e}",
    }  # fmt: skip


@torch.no_grad()
def ends(result: fastfip.PurifyResult) -> tuple[Tensor, Tensor]:
    """All weights of the purified model in a row, and its outputs."""
    return torch.cat([p.flatten() for p in result.model.parameters()]), result.model(samples()[0])


def apart(mine: Tensor, other: Tensor) -> float:
    return float((mine.double() - other.double()).norm() / mine.double().norm())


def show() -> str:
    head = ["model", "parameters", "method", "processes", "gradients", "worst case", "others", "DDP's gradients",
            "DDP's over ours", "weights apart", "answers apart"]  # fmt: skip
    return harness.table(
        head,
        [
            [r["net"], f"{int(r['parameters']):,}", f"`{r['method']}`", r["world"],
             *(f"{int(r[name]) / 1000:,.1f} kB" for name in ("gradients", "perturbations", "others", "ddp")),
             r["ratio"], r["weights"], r["answers"]]
            for r in RESULTS.read()
        ],
    )  # fmt: skip


def main() -> None:
    parser = harness.Parser(__doc__)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--worlds", nargs="+", type=int, default=[2])
    parser.add_argument("--table", action="store_true", help="only write the table to docs/distributed.md anew")
    options = parser.parse()
    if not options.table:
        RESULTS.add(rows(options.nets, options.worlds))
    harness.splice(harness.DOCS / "distributed.md", "ranks", show())


if __name__ == "__main__":
    main()
