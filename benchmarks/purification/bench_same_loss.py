"""How long each way takes until the same clean loss: steps that are cheaper may be more.

    python -m benchmarks.purification.bench_same_loss [--nets preact_resnet18 vit_small]
        [--ways ...] [--rates ...] [--table]

The net: trained from scratch on 128 CIFAR-10 images of which 40 % carry a wrong label, until it fits those labels. The
task: the same images with their right labels, batches of 32, BatchNorm in eval mode, until the mean loss of a pass over
the images is at most TARGET, by Adam. `fine-tuning` and `fip` move every weight; the others move singular values and
the affine part; `released layers` rebuild each weight in the forward pass and let autograd go through it. `with trace`:
the exact Fisher trace is added in every fifth step. Of several step sizes a way is shown with its best.
`vit_small` has the width of ViT-S, a quarter of its depth, and 65 tokens in place of 197.

CPU time of one thread, the singular value decomposition counted. Rows go to benchmarks/results/same_loss.csv; the
images are those of `benchmarks.purification.real_data`.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.purification import real_data
from fastfip import env
from fastfip.data import Task
from fastfip.fisher import trace_and_logits
from fastfip.fisher.modes import readable
from fastfip.spectral import SpectralShifts
from fastfip.spectral.fisher import delta_gradients, recording
from fastfip.testing import nets

RESULTS = Path(__file__).parents[1] / "results" / "same_loss.csv"
TARGET = 1.0
IMAGES, BATCH, WRONG, MOST = 128, 32, 0.4, 10
ETA = 1e-3
Step = Callable[[Tensor, Tensor, bool], float]

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
    path = real_data.cache_dir() / f"same_loss_{name}.pt"
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


def every_weight(model: nn.Module, rate: float, trace: bool) -> Step:
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.99))

    def step(x: Tensor, y: Tensor, fifth: bool) -> float:
        optimizer.zero_grad(set_to_none=True)
        if trace and fifth:
            found = trace_and_logits(model, (x, y), Task())
            loss = found.losses.mean()
            (loss + ETA * found.trace).backward()
        else:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def spectral(model: nn.Module, rate: float, rank: int | None, trace: bool = False, rebuilt: bool = False) -> Step:
    model.requires_grad_(False)
    shifts = SpectralShifts.of(model, rank)
    small = [p.requires_grad_(True) for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.Adam([*shifts.deltas, *small], lr=rate, betas=(0.9, 0.99))

    def step(x: Tensor, y: Tensor, fifth: bool) -> float:
        optimizer.zero_grad(set_to_none=True)
        if rebuilt:
            with shifts.differentiable():
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            return float(loss.detach())
        shifts.refresh()
        if trace and fifth:
            with recording(shifts) as record:
                with readable(model, second_order=True):
                    losses = F.cross_entropy(model(x), y, reduction="none")
                each = delta_gradients(shifts, record, losses, create_graph=True)
            loss = losses.mean()
            (loss + ETA * torch.stack([d.square().sum() for d in each]).sum() / len(x)).backward()
        else:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
        shifts.collect()
        shifts.remove()
        optimizer.step()
        return float(loss.detach())

    return step


WAYS: dict[str, tuple[Callable[[nn.Module, float], Step], tuple[float, ...]]] = {
    "fine-tuning": (lambda m, rate: every_weight(m, rate, False), (1e-4, 3e-4)),
    "fip, with trace": (lambda m, rate: every_weight(m, rate, True), (1e-4, 3e-4)),
    "fast_fip full rank": (lambda m, rate: spectral(m, rate, None), (0.01, 0.03)),
    "fast_fip K=64": (lambda m, rate: spectral(m, rate, 64), (0.01, 0.03)),
    "fast_fip K=64, with trace": (lambda m, rate: spectral(m, rate, 64, trace=True), (0.01, 0.03)),
    "released layers": (lambda m, rate: spectral(m, rate, None, rebuilt=True), (0.01, 0.03)),
}


def measure(name: str, way: str, rate: float) -> dict[str, object]:
    model = start(name)
    x, y, _ = images()
    with torch.no_grad():
        before = float(F.cross_entropy(model(x), y))
    begin = time.process_time()
    step, steps, mean, used = WAYS[way][0](model, rate), 0, float("inf"), 0.0
    for batches in passes(x, y, MOST):
        mean = 0.0
        for a, b in batches:
            mean += step(a, b, steps % 5 == 4) / len(batches)
            steps += 1
        used = time.process_time() - begin
        print(f"{name} {way} {rate}: {steps} steps, {used:.1f} s, loss {mean:.3f}", flush=True)
        if mean <= TARGET or not mean < 20:
            break
    return {
        "net": name, "way": way, "rate": rate, "steps": steps, "seconds": round(used, 1), "loss": round(mean, 3),
        "before": round(before, 3), "reached": mean <= TARGET,
    }  # fmt: skip


def load() -> list[dict[str, str]]:
    return list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []


def add(row: dict[str, object]) -> None:
    here = env.collect()
    new = {k: str(v) for k, v in {**row, **{key: here[key] for key in ("commit", "torch", "cpu", "native")}}.items()}
    same = ("net", "way", "rate")
    rows = [*(r for r in load() if [r[k] for k in same] != [new[k] for k in same]), new]
    order = {way: k for k, way in enumerate(WAYS)}
    rows.sort(key=lambda r: (list(MAKE).index(r["net"]), order[r["way"]], float(r["rate"])))
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(new))
        writer.writeheader()
        writer.writerows(rows)


def score(row: dict[str, str]) -> tuple[bool, float]:
    """Sorts runs: those that got there by their time, then the others by their loss."""
    reached = row["reached"] == "True"
    return not reached, float(row["seconds" if reached else "loss"])


def write_table() -> None:
    """Put the better step size of each way between the marks in docs/performance.md."""
    best: dict[tuple[str, str], dict[str, str]] = {}
    for row in load():
        key, old = (row["net"], row["way"]), best.get((row["net"], row["way"]))
        rank = score(row)
        if old is None or rank < score(old):
            best[key] = row
    names = [name for name in MAKE if any(key[0] == name for key in best)]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for way in WAYS:
        cells = []
        for name in names:
            found, plain = best.get((name, way)), best.get((name, "fine-tuning"))
            if found is None or plain is None:
                cells.append("-")
            elif found["reached"] != "True":
                cells.append(f"not in {found['steps']} steps: {float(found['loss']):.2f}")
            else:
                share = float(found["seconds"]) / float(plain["seconds"])
                cells.append(f"{share:.2f} ({float(found['seconds']):.0f} s, {found['steps']} steps)")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    path = Path(__file__).parents[2] / "docs" / "performance.md"
    begin, end = "<!-- same_loss:begin -->", "<!-- same_loss:end -->"
    text = path.read_text()
    path.write_text(f"{text.split(begin)[0]}{begin}\n" + "\n".join(lines) + f"\n{end}{text.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="*", default=list(MAKE), choices=list(MAKE))
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--rates", nargs="*", type=float, help="step sizes; default: two for each way")
    parser.add_argument("--start", action="store_true", help="only make the net that the runs start from")
    parser.add_argument("--table", action="store_true", help="write the rows into docs/performance.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.table:
        write_table()
        return
    for name in options.nets:
        start(name)
        for way in [] if options.start else options.ways:
            for rate in options.rates or WAYS[way][1]:
                add(measure(name, way, rate))


if __name__ == "__main__":
    main()
