"""What a Fisher diagonal costs, as a multiple of one plain forward and backward pass.

    python -m benchmarks.bench_fisher_diagonal [--workloads abcde] [--threads 1] [--repeat 5] [--memory] [--no-peers]

The workloads are those of docs/kernels.md: (a) an MLP, (b) PreActResNet-18 in eval mode, (c) ViT-S/16, (d) one Linear
at 197 tokens, (e) one 3x3 convolution. Ways: ours by backend, ours together with the gradient, one backward for each
sample, vmap(grad), and BackPACK, Opacus and nngeometry where they are installed (extra [bench]).

Times are CPU times, so other programs disturb them little; all ways take turns in one process, the order reversed every
second time, and each gets its least time. A way is timed only after its result agrees with float64 to 1e-3; one that
does not is listed with its error. Memory: the peak of a fresh process, less that of the plain pass, over the size of
the parameters.
Rows go to benchmarks/results/fisher_diagonal.csv.
"""

from __future__ import annotations

import argparse
import copy
import csv
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import nets
from fastfip import env
from fastfip.errors import BackendError
from fastfip.fisher import backward_with_fisher, fisher_diagonal
from fastfip.ops import OPS
from fastfip.testing import loop_diagonal, worst_error

RESULTS = Path(__file__).parent / "results" / "fisher_diagonal.csv"
Diagonal = dict[str, Tensor]


@dataclass
class Workload:
    model: nn.Module
    x: Tensor
    y: Tensor

    def losses(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y, reduction="none")


class Dense(nn.Module):
    """A layer whose every output takes part in the class scores."""

    def __init__(self, layer: nn.Module, size: int) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("sign", torch.where(torch.rand(size) < 0.5, -1.0, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x).flatten(1)
        return (z * self.sign).view(z.shape[0], 8, -1).sum(2) / z.shape[1] ** 0.5


MAKE: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "a": lambda: (nets.MLP(784, 1024, 1024, 10), torch.randn(256, 784)),
    "b": lambda: (nets.randomize_norms(nets.preact_resnet18()), torch.randn(32, 3, 32, 32)),
    "c": lambda: (nets.vit_s16(10), torch.randn(8, 3, 224, 224)),
    "d": lambda: (Dense(nn.Linear(768, 3072), 197 * 3072), torch.randn(32, 197, 768)),
    "e": lambda: (Dense(nn.Conv2d(256, 256, 3, padding=1), 256 * 64), torch.randn(128, 256, 8, 8)),
}


def workload(key: str) -> Workload:
    torch.manual_seed(0)
    model, x = MAKE[key]()
    return Workload(model.eval(), x, torch.randint(0, 8, (len(x),)))


# ----------------------------------------------------------------------------------------------------------- the ways


def ours(backend: str) -> Callable[[Workload], Diagonal]:
    def run(w: Workload) -> Diagonal:
        return fisher_diagonal(w.model, (w.x, w.y), backend=backend)

    return run


def together(w: Workload) -> Diagonal:
    w.model.zero_grad()
    return backward_with_fisher(w.losses(), w.model)


def one_by_one(w: Workload) -> Diagonal:
    params = dict(w.model.named_parameters())
    out = {k: torch.zeros_like(p) for k, p in params.items()}
    for x, y in zip(w.x.split(1), w.y.split(1)):
        for value, g in zip(out.values(), torch.autograd.grad(F.cross_entropy(w.model(x), y), list(params.values()))):
            value.addcmul_(g, g)
    return {k: v / len(w.x) for k, v in out.items()}


def vmap_grad(w: Workload) -> Diagonal:
    params = {k: p.detach() for k, p in w.model.named_parameters()}
    buffers = dict(w.model.named_buffers())

    def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        z = torch.func.functional_call(w.model, (p, buffers), (x[None],))
        return F.cross_entropy(z, y[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, w.x, w.y)
    return {k: g.square().mean(0) for k, g in each.items()}


def backpack(w: Workload) -> Diagonal:
    from backpack import backpack as context
    from backpack import extend, extensions

    if not hasattr(w, "extended"):
        w.extended = extend(copy.deepcopy(w.model), use_converter=True)  # type: ignore[attr-defined]
        w.criterion = extend(nn.CrossEntropyLoss(reduction="sum"))  # type: ignore[attr-defined]
    w.extended.zero_grad()  # type: ignore[attr-defined]
    with context(extensions.SumGradSquared()):
        w.criterion(w.extended(w.x), w.y).backward()  # type: ignore[attr-defined]
    own = dict(w.model.named_parameters())
    found = [p.sum_grad_squared / len(w.x) for p in w.extended.parameters()]  # type: ignore[attr-defined]
    return dict(zip(own, found))


def opacus(w: Workload) -> Diagonal:
    from opacus.grad_sample import GradSampleModule

    if not hasattr(w, "sampled"):
        w.sampled = GradSampleModule(copy.deepcopy(w.model), loss_reduction="sum", strict=False)  # type: ignore[attr-defined]
    w.sampled.zero_grad()  # type: ignore[attr-defined]
    F.cross_entropy(w.sampled(w.x), w.y, reduction="sum").backward()  # type: ignore[attr-defined]
    return {
        k.removeprefix("_module."): p.grad_sample.square().mean(0)
        for k, p in w.sampled.named_parameters()  # type: ignore[attr-defined]
    }


def nngeometry(w: Workload) -> Diagonal:
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatDiag

    # Its own per-sample function is the empirical Fisher of the labels given.
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(w.x, w.y), batch_size=len(w.x))
    fim = FIM(
        model=w.model,
        loader=loader,
        representation=PMatDiag,
        variant="classif_logits",
        device="cpu",
        function=lambda x, y: F.cross_entropy(w.model(x), y, reduction="none")[:, None],
    )
    flat, out, at = fim.get_diag(), {}, 0
    for k, p in w.model.named_parameters():
        out[k] = flat[at : at + p.numel()].view_as(p)
        at += p.numel()
    return out


def plain(w: Workload) -> Diagonal:
    w.model.zero_grad()
    w.losses().mean().backward()
    return {}


def ways(peers: bool) -> dict[str, Callable[[Workload], Diagonal]]:
    found: dict[str, Callable[[Workload], Diagonal]] = {"plain": plain}
    for backend in OPS["sum_grad_squared"].backends:
        found[f"fastfip {backend.name}"] = ours(backend.name)
    found["fastfip with gradient"] = together
    found |= {"one backward each": one_by_one, "vmap(grad)": vmap_grad}
    return {**found, "backpack": backpack, "opacus": opacus, "nngeometry": nngeometry} if peers else found


# ---------------------------------------------------------------------------------------------------------- measuring


def checked(w: Workload, call: Callable[[Workload], Diagonal]) -> str:
    """Error of a way on a few samples against the definition in float64, or why it cannot run."""
    few = Workload(w.model, w.x[:3], w.y[:3])
    wide = copy.deepcopy(w.model).double()
    want = loop_diagonal(wide, (few.x.double(), few.y), len(few.x))
    try:
        got = call(few)
    except (ImportError, BackendError) as error:
        return f"not here: {error}"
    except Exception as error:  # a peer that cannot do this net says so in many ways
        return f"fails: {type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
    if set(got) != set(want):
        return f"leaves out {len(set(want) - set(got))} parameters"
    return f"{worst_error(got, want, 1e-6):.1e}"


def measure(key: str, repeat: int, peers: bool, only: str | None = None) -> list[dict[str, object]]:
    w, rows = workload(key), list[dict[str, object]]()
    calls: dict[str, tuple[Callable[[Workload], Diagonal], str]] = {}
    for name, call in ways(peers).items():
        if only and only not in name and name != "plain":
            continue
        error = "" if name == "plain" else checked(w, call)
        wrong = name != "plain" and not (error[0].isdigit() and float(error) < 1e-3)
        if wrong and "bf16" not in name:
            rows.append({"workload": key, "way": name, "ratio": "", "ms": "", "error": error})
            continue
        calls[name] = (call, error)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call, _ in calls.values():
        call(w)  # warm, and verified
    for round_ in range(repeat):
        for name in list(calls) if round_ % 2 else reversed(list(calls)):
            start = time.process_time()
            calls[name][0](w)
            times[name].append(time.process_time() - start)
    base = min(times["plain"])
    for name, (_, error) in calls.items():
        best = min(times[name])
        rows.append(
            {"workload": key, "way": name, "ratio": round(best / base, 3), "ms": round(best * 1e3, 1), "error": error}
        )
    return rows


def high_water() -> int:
    """Peak memory of this process in kB (getrusage would count the process that started it)."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def peak(key: str, way: str, threads: int) -> int:
    """Peak memory in bytes of a fresh process that does nothing else."""
    command = [sys.executable, "-m", "benchmarks.bench_fisher_diagonal", "--peak", way, "--workloads", key]
    done = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="abcde")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", help="only ways with this in their name")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--memory", action="store_true", help="measure the peak memory of each way as well")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        w = workload(options.workloads)
        for _ in range(2):
            ways(True)[options.peak](w)
        print(high_water())
        return
    rows = []
    for key in options.workloads:
        found = measure(key, options.repeat, not options.no_peers, options.only)
        size = 4 * nets.parameter_count(workload(key).model)
        base = peak(key, "plain", options.threads) if options.memory else 0
        for entry in found:
            entry["memory"] = ""
            if options.memory and entry["ratio"] != "":
                entry["memory"] = round((peak(key, str(entry["way"]), options.threads) - base) / size, 2)
            print("  ".join(f"{v!s:<24}" if k == "way" else f"{v!s:>9}" for k, v in entry.items()), flush=True)
        rows += found
    save(rows, options.threads)


def save(rows: list[dict[str, object]], threads: int) -> None:
    """Replace the rows of the same workloads, ways and threads; keep the others."""
    here = env.collect()
    stamp = {"threads": threads, **{key: here[key] for key in ("commit", "torch", "cpu", "native")}}
    new = [{**row, **stamp} for row in rows]
    mine = {(str(r["workload"]), str(r["way"]), str(threads)) for r in new}
    old = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
    kept = [r for r in old if (r["workload"], r["way"], r["threads"]) not in mine]
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["workload", "way", "ratio", "ms", "error", "memory", *stamp])
        writer.writeheader()
        writer.writerows(sorted([*kept, *new], key=lambda r: (str(r["threads"]), str(r["workload"]))))


if __name__ == "__main__":
    main()
