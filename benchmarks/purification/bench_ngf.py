"""What a step of NGF on cached features costs beside a full forward and backward pass of the net.

    python -m benchmarks.purification.bench_ngf [--batch 128] [--samples 512] [--threads 1] [--repeat 5]

PreActResNet-18 at 3x32x32, 10 classes. A step is all that the loop does in one: the gradient of a batch of features,
the retainer, the natural gradient, the optimiser, the classifier written into the net; every tenth step takes the
Fisher anew (both are measured, and their mean by frequency is the row "step"). A full pass is the forward and backward
of the same batch with every weight's gradient, as fine-tuning does it, in the faster memory layout. Least of several
CPU times; the ways take turns. Rows go to benchmarks/results/ngf.csv.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.harness import Row
from fastfip.data import Task
from fastfip.data.cleanset import CleanSet
from fastfip.methods.base import Run
from fastfip.methods.ngf import NGF, NGFConfig
from fastfip.testing import nets

RESULTS = harness.Results(
    "ngf",
    "solver samples batch full_ms fisher_ms solve_ms step_ms ratio features_s machine threads torch commit native",
)


def measure(solver: str, batch: int, samples: int, repeat: int) -> Row:
    """Return one row."""
    torch.manual_seed(0)
    model = nets.randomize_norms(nets.preact_resnet18()).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch takes it, its stubs do not
    x = torch.randn(samples, 3, 32, 32).to(memory_format=torch.channels_last)
    y = torch.arange(samples) % 10
    config = NGFConfig(solver=solver, samples=samples, batch_size=batch)  # type: ignore[arg-type]
    run = Run(
        model=model,
        task=Task(),
        clean=CleanSet.of((x, y)),
        config=config,
        device=torch.device("cpu"),
        generator=torch.Generator().manual_seed(0),
        classes=10,
        total_steps=10**6,
    )

    def full() -> None:
        model.zero_grad()
        F.cross_entropy(model(x[:batch]), y[:batch]).backward()

    full_ms = 1e3 * harness.least(full, max(2, repeat // 2))
    model.zero_grad()
    method = NGF()
    start = time.process_time()
    method.setup(run)
    features_s = time.process_time() - start
    optimizer = method.make_optimizer(run, method.parameter_groups(run))
    part = next(iter(run.clean.batches(batch)))

    def step(number: int) -> None:
        run.step = number
        method.backward(run, part)
        optimizer.step()
        method.after_step(run)

    with_fisher = 1e3 * harness.least(lambda: step(0), repeat, 3)
    without = 1e3 * harness.least(lambda: step(1), repeat, 20)
    mean = (with_fisher + (config.every - 1) * without) / config.every
    method.fold(run)
    return {
        "solver": solver, "samples": samples, "batch": batch, "full_ms": round(full_ms, 1),
        "fisher_ms": round(with_fisher - without, 3), "solve_ms": round(without, 3), "step_ms": round(mean, 3),
        "ratio": round(full_ms / mean), "features_s": round(features_s, 2),
    }  # fmt: skip


def main() -> None:
    """Measure both solvers, print the rows and write them."""
    parser = harness.Parser(__doc__, "threads", "repeat")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--samples", type=int, default=512)
    args = parser.parse()
    rows = []
    for solver in ("exact", "kronecker"):
        row = measure(solver, args.batch, args.samples, args.repeat)
        rows.append(row)
        print(
            f"{solver:10s} forward and backward {row['full_ms']} ms, step {row['step_ms']} ms "
            f"(Fisher {row['fisher_ms']} ms every tenth): {row['ratio']} times cheaper", flush=True
        )  # fmt: skip
    RESULTS.add(rows)


if __name__ == "__main__":
    main()
