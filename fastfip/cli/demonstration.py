"""`fastfip demo`: real handwritten digits, a backdoor, and its removal, within a minute on two cores.

The digits are the 1,797 of 8x8 pixels that scikit-learn carries, so nothing is downloaded; they are enlarged to 16x16,
so that a trigger of 2x2 pixels is as small a part of the image as triggers are elsewhere.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfip.attacks.badnets import BadNets
from fastfip.cli.reports import typed
from fastfip.nets.process import seeded
from fastfip.purification.door import FEW
from fastfip.purification.purify import purify
from fastfip.purification.result import PurifyResult
from fastfip.reporting.plots import COLOURS, new_figure
from fastfip.reporting.table import Report, Sheet

__all__ = ["Demo", "digit_net", "run_demo", "train_backdoored"]

TARGET = 0
SIZE = 16
TRAIN = 1_400
CLEAN = 70  # 5 % of the training set
EPOCHS = 15
BATCH = 64
#: A net this small wants smaller steps of `fast_wfip` than its default: at lr 0.1 accuracy falls by 1.0 to 4.3 points
#: over six seeds, at 0.05 by 0.5 to 3.0; ASR is below 2 % in all of them.
OPTIONS: dict[str, dict[str, Any]] = {"fast_wfip": {"lr": 0.05}}


@dataclass
class Demo(Report):
    """What the demo found: the purification, lambda_max before and after, and the files it wrote."""

    result: PurifyResult
    lambda_max: tuple[float | None, float | None]
    files: list[Path]

    def table(self) -> Sheet:
        """Return what is printed: the result's table with lambda_max, and the files."""
        shown = ["-" if value is None else f"{value:.4g}" for value in self.lambda_max]
        title = f"Handwritten digits with a BadNets trigger, purified by {self.result.title}"
        rows = [*self.result.rows(), ("lambda_max", shown[0], shown[1])]
        lines = [*self.result.footer(), *(f"wrote {path}" for path in self.files)]
        return Sheet(title, ("", "before>", "after>"), rows, lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the result's figures and lambda_max before and after."""
        return {**self.result.to_dict(), "lambda_max": list(self.lambda_max)}


def digit_net(classes: int = 10) -> nn.Sequential:
    """Return a small convolutional net with BatchNorm for images [N, 1, 16, 16]."""

    def block(before: int, now: int) -> list[nn.Module]:
        return [nn.Conv2d(before, now, 3, padding=1, bias=False), nn.BatchNorm2d(now), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*block(1, 16), *block(16, 32), *block(32, 64), nn.Flatten(), nn.Linear(256, classes))


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return train and test images [N, 1, 16, 16] in [0, 1] and labels [N], split by the seed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ModuleNotFoundError("the demo needs scikit-learn: pip install scikit-learn matplotlib") from None
    bunch = load_digits()
    x = F.interpolate(torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16, size=SIZE, mode="bilinear")
    y = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    return x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:]


def train_backdoored(
    x: Tensor, y: Tensor, attack: BadNets, seed: int, progress: bool = False, epochs: int = EPOCHS
) -> nn.Sequential:
    """Train `digit_net` on digits of which a tenth carries the trigger and the attack's label."""
    generator = torch.Generator().manual_seed(seed)
    x, y, _ = attack.poison(x, y, 0.1, TARGET, generator=generator)
    with seeded(seed, torch.device("cpu")):
        model = digit_net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        steps = epochs * -(-len(x) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        for _ in _track(range(epochs), "training the backdoored model", progress):
            for index in torch.randperm(len(x), generator=generator).split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(x[index]), y[index]).backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def run_demo(
    out_dir: str | Path = "fastfip-demo",
    seed: int = 0,
    progress: bool | None = None,
    method: str = "auto",
    **options: Any,
) -> Demo:
    """Train a backdoored net, purify it with 5 % clean data, and show what that did.

    Args:
        out_dir: gets `demo.png` (triggered digits with the answers before and after; the history), `demo.json` and
            `report.html`, the report of the purification.
        seed: of everything random.
        progress: whether bars are shown; None: where stderr is a terminal.
        method: what purifies.
        **options: for `fastfip.purify`, over those of `OPTIONS`.

    Returns:
        the result; printed by rich, it is the table.

    Raises:
        ModuleNotFoundError: scikit-learn or matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401 (better now than after the work)
    except ImportError:
        raise ModuleNotFoundError("the demo needs matplotlib: pip install scikit-learn matplotlib") from None
    if progress is None:
        progress = sys.stderr is not None and sys.stderr.isatty()
    threads = torch.get_num_threads()
    # The net is so small that a second thread costs more than it gives, much more on a busy machine.
    torch.set_num_threads(1)
    try:
        return _run(Path(out_dir), seed, progress, method, options)
    finally:
        torch.set_num_threads(threads)


def _run(out: Path, seed: int, progress: bool, method: str, options: dict[str, Any]) -> Demo:
    x, y, test_x, test_y = digits(seed)
    attack = BadNets(size=2)
    model = train_backdoored(x, y, attack, seed, progress)
    clean = torch.utils.data.TensorDataset(x[:CLEAN], y[:CLEAN])
    triggered = attack.asr_set(test_x, test_y, TARGET)
    taken = FEW if method == "auto" else method  # 70 samples are few
    result = purify(
        model,
        torch.utils.data.DataLoader(clean, batch_size=BATCH),
        taken,
        seed=seed,
        progress=progress,
        test_loader=[(test_x, test_y)],
        asr_loader=[triggered],
        measure=("acc", "asr", "fisher_trace"),
        **{**OPTIONS.get(taken, {}), **options},
    )
    sample = (x[:CLEAN], y[:CLEAN])
    lambda_max = (_lambda_max(model, sample), _lambda_max(result.model, sample))
    out.mkdir(parents=True, exist_ok=True)
    files = [out / "demo.png", out / "demo.json", out / "report.html"]
    with torch.no_grad():
        answers = [net.eval()(triggered[0]).argmax(1) for net in (model, result.model)]
    _picture(files[0], result, triggered[0], triggered[2], answers[0], answers[1])
    shown = Demo(result, lambda_max, files)
    shown.to_json(files[1])
    result.origin.command = typed() or "fastfip demo"
    result.report(files[2])
    return shown


def _lambda_max(model: nn.Module, sample: tuple[Tensor, Tensor]) -> float | None:
    from fastfip.fisher.sharpness import sharpness

    return float(sharpness(model, [sample]).lambda_max)


def _track(steps: range, title: str, progress: bool) -> Any:
    if not progress:
        return steps
    from rich.console import Console
    from rich.progress import track

    return track(steps, title, console=Console(stderr=True), transient=True)


def _picture(path: Path, result: PurifyResult, x: Tensor, true: Tensor, before: Tensor, after: Tensor) -> None:
    """Draw one triggered image of each class with both answers, and the course of the purification."""
    figure = new_figure(10, 5.4)
    parts: Any = figure.subfigures(2, 1, height_ratios=(2, 3))
    top, bottom = parts
    shown = [int(torch.nonzero(true == c)[0]) for c in true.unique().tolist()]
    for axes, i in zip(top.subplots(1, len(shown)), shown):
        axes.imshow(x[i, 0].numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set_xticks([])
        axes.set_yticks([])
        for put, word, answer in ((axes.set_title, "before", before), (axes.set_xlabel, "after", after)):
            wrong = answer[i] != true[i]  # the mark says it as well: colour alone would not do
            mark = "\N{BALLOT X}" if wrong else "\N{CHECK MARK}"
            put(f"{word}: {int(answer[i])} {mark}", fontsize=9, color=COLOURS[1 if wrong else 0])
    top.suptitle("Digits with the trigger (bottom right): what the model says before and after", fontsize=10)
    course, bars = bottom.subplots(1, 2, width_ratios=(3, 2))
    result.draw_history(course)
    result.draw_bars(bars)
    figure.savefig(path, dpi=120)
