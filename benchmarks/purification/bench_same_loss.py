"""How long each way takes until the same clean loss: steps that are cheaper may be more.

    python -m benchmarks.purification.bench_same_loss [--nets preact_resnet18 vit_small]
        [--ways ...] [--rates ...] [--table]

The net: trained from scratch on 128 CIFAR-10 images of which 40 % carry a wrong label, until it fits those labels. The
task: the same images with their right labels, batches of 32, BatchNorm in eval mode, until the mean loss of a pass over
the images is at most TARGET, by Adam. `fine-tuning` and `fip` move every weight; the others move singular values and
the affine part, which with `affine apart` has a step size of its own, 0.003. `released layers` rebuild each weight in
the forward pass and let autograd go through it. `with trace`: the exact Fisher trace is added in every fifth step. Of
several step sizes a way is shown with its best.
`vit_small` has the width of ViT-S, a quarter of its depth, and 65 tokens in place of 197.

CPU time of one thread, the singular value decomposition counted. Rows go to benchmarks/results/same_loss.csv; the
images are those of `benchmarks.purification.real_data`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.purification import real_data, steps
from benchmarks.purification.steps import Step
from fastfip.spectral import SpectralShifts
from fastfip.testing import nets

RESULTS = harness.Results(
    "same_loss",
    "net way rate steps seconds loss before reached commit torch cpu native",
    run="net way rate",
    order=lambda r: (list(MAKE).index(r["net"]), list(WAYS).index(r["way"]), float(r["rate"])),
)
TARGET = 1.0
IMAGES, BATCH, WRONG, MOST = 128, 32, 0.4, 10

MAKE: dict[str, Callable[[], nn.Module]] = {
    "preact_resnet18": nets.preact_resnet18,
    "vit_small": lambda: nets.ViT(10, size=32, patch=4, dim=384, depth=3, heads=6),
}


def images() -> tuple[Tensor, Tensor, Tensor]:
    """The images, their right labels, and those of which some are wrong."""
    data = real_data.cifar10()
    mean, std = torch.tensor((0.49, 0.48, 0.45)), torch.tensor((0.25, 0.24, 0.26))
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(data["train_y"]), generator=generator)[:IMAGES].numpy()
    x = ((torch.from_numpy(data["train_x"][chosen]).float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    y = torch.from_numpy(data["train_y"][chosen]).long()
    wrong = torch.rand(IMAGES, generator=generator) < WRONG
    other = (y + torch.randint(1, 10, (IMAGES,), generator=generator)) % 10
    return x, y, torch.where(wrong, other, y)


def passes(x: Tensor, y: Tensor, count: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield [(x[i], y[i]) for i in torch.randperm(len(x), generator=generator).split(BATCH)]


def start(name: str) -> nn.Module:
    """The net that has learned the wrong labels; trained once, then read."""
    torch.manual_seed(0)
    model = MAKE[name]()
    path = harness.cache_dir() / f"same_loss_{name}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    x, _, y = images()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    for number, batches in enumerate(passes(x, y, 40)):
        total = 0.0
        for a, b in batches:
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(a), b)
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) / len(batches)
        print(f"{name}: pass {number}, loss on the labels given {total:.3f}", flush=True)
        if total < 0.2:
            break
    with torch.no_grad():  # the running statistics as they are after the last step
        for batches in passes(x, y, 3):
            for a, _ in batches:
                model(a)
    torch.save(model.state_dict(), path)
    return model.eval()


def adam(tensors: list[Tensor], rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(tensors, lr=rate, betas=(0.9, 0.99))


def apart(tensors: list[Tensor], rate: float) -> torch.optim.Optimizer:
    """The step size is that of singular values; the affine part has one of its own."""
    groups = ([t for t in tensors if (t.dim() <= 1) == affine] for affine in (False, True))
    each = [{"params": group, "lr": lr} for group, lr in zip(groups, (rate, AFFINE))]
    return torch.optim.Adam(each, betas=(0.9, 0.99))


WEIGHTS, SPECTRAL, LONG, AFFINE = (1e-4, 3e-4), (0.01, 0.03), (0.03, 0.1), 3e-3
spectral = partial(steps.singular_values, affine=True)
#: Way -> how its steps are made, step sizes, whether every fifth step has the trace.
WAYS: dict[str, tuple[Callable[..., Step], tuple[float, ...], bool]] = {
    "fine-tuning": (steps.weights, WEIGHTS, False),
    "fip, with trace": (steps.weights, WEIGHTS, True),
    "fast_fip full rank": (spectral, SPECTRAL, False),
    "fast_fip K=64": (partial(spectral, rank=64), SPECTRAL, False),
    "fast_fip K=64, affine apart": (partial(spectral, rank=64), LONG, False),
    "fast_fip K=64, with trace": (partial(spectral, rank=64), SPECTRAL, True),
    "released layers": (partial(spectral, rebuilt=SpectralShifts.differentiable), SPECTRAL, False),
}
#: The optimisers of ways that have another one than `adam`.
OPTIMIZERS = {"fast_fip K=64, affine apart": apart}


def measure(name: str, way: str, rate: float) -> Row:
    model = start(name)
    x, y, _ = images()
    with torch.no_grad():
        before = float(F.cross_entropy(model(x), y))
    make, _, trace = WAYS[way]
    begin = time.process_time()
    step, count, mean, used = (
        make(model, partial(OPTIMIZERS.get(way, adam), rate=rate)),
        0,
        float("inf"),
        0.0,
    )
    for batches in passes(x, y, MOST):
        mean = 0.0
        for a, b in batches:
            mean += float(step(a, b, trace and count % 5 == 4)) / len(batches)
            count += 1
        used = time.process_time() - begin
        print(f"{name} {way} {rate}: {count} steps, {used:.1f} s, loss {mean:.3f}", flush=True)
        if mean <= TARGET or not mean < 20:
            break
    return {
        "net": name, "way": way, "rate": rate, "steps": count, "seconds": round(used, 1), "loss": round(mean, 3),
        "before": round(before, 3), "reached": mean <= TARGET,
    }  # fmt: skip


def score(row: dict[str, str]) -> tuple[bool, float]:
    """Sorts runs: those that got there by their time, then the others by their loss."""
    reached = row["reached"] == "True"
    return not reached, float(row["seconds" if reached else "loss"])


def table() -> str:
    """Return a table in Markdown: the better step size of each way on each net."""
    best: dict[tuple[str, str], dict[str, str]] = {}
    for row in sorted(RESULTS.read(), key=score):
        best.setdefault((row["net"], row["way"]), row)
    names = [name for name in MAKE if any(key[0] == name for key in best)]

    def cell(name: str, way: str) -> str:
        found, plain = best.get((name, way)), best.get((name, "fine-tuning"))
        if found is None or plain is None:
            return "-"
        if found["reached"] != "True":
            return f"not in {found['steps']} steps: {float(found['loss']):.2f}"
        share = float(found["seconds"]) / float(plain["seconds"])
        return f"{share:.2f} ({float(found['seconds']):.0f} s, {found['steps']} steps)"

    return harness.table(["", *names], [[way, *(cell(name, way) for name in names)] for way in WAYS])


def main() -> None:
    parser = harness.Parser(__doc__)
    parser.add_argument("--nets", nargs="*", default=list(MAKE), choices=list(MAKE))
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--rates", nargs="*", type=float, help="step sizes; default: two for each way")
    parser.add_argument("--start", action="store_true", help="only make the net that the runs start from")
    parser.add_argument("--table", action="store_true", help="write the rows into docs/performance.md")
    options = parser.parse()
    torch.set_num_threads(1)
    if options.table:
        harness.splice(harness.DOCS / "performance.md", "same_loss", table())
        return
    for name in options.nets:
        start(name)
        for way in [] if options.start else options.ways:
            for rate in options.rates or WAYS[way][1]:
                RESULTS.add([measure(name, way, rate)])


if __name__ == "__main__":
    main()
