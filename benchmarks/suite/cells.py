"""One cell: a network of the suite, a method, a clean set; what is left of accuracy and of each backdoor."""

from __future__ import annotations

import dataclasses
import functools
import time
import zipfile
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastfip
from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.purification import real_data
from benchmarks.suite.networks import NETWORKS, Base, Network, Prepared, prepare, score
from fastfip.cli.many.pool import Processes, outcomes
from fastfip.methods import MethodConfig
from fastfip.metrics import Evaluation, der

__all__ = ["FLOOR", "SETTINGS", "Cell", "kept", "measured", "results", "rows_of", "run", "run_apart", "said"]

#: Doing nothing is the third of the floor: its DER is 50.
FLOOR = ("fine_tune", "large_step")
#: Fine-tuning as in "super-fine-tuning" (Sha et al., arXiv 2212.09067): large noisy steps leave sharp minima.
LARGE_STEP: dict[str, Any] = {"lr": 0.1, "steps": 150, "batch_size": 64, "bn_mode": "train"}
#: What is done to the clean set (hidden: 0.5 % of it, at least one image, are triggered images with the label that the
#: training set gave them; missing: one class has no image; domain: ImageNet's samples at the network's size with the
#: network's own answers for labels; unlabelled: images alone; nodata: none), to the method, or afterwards (retune:
#: tuned with five poisoned images).
SETTINGS = (
    "plain",
    "hidden",
    "missing",
    "domain",
    "unlabelled",
    "lr_half",
    "lr_double",
    "steps_half",
    "steps_double",
    "retune",
    "nodata",
)
HIDDEN = 0.005
COLUMNS = (
    "network made base attack target rate method fraction setting seed clean_images acc_twin asr_twin acc_before "
    "asr_before ra_before acc asr ra der seconds cpu_seconds peak_memory_mb steps machine threads "
    "torch fastfip commit note error native"
)


def kept() -> harness.Results:
    """Return the rows of the trained networks themselves: benchmarks/results/suite_networks.csv."""
    names = list(NETWORKS)
    return harness.Results(
        "suite_networks",
        "network set base attack target rate acc acc_twin asr asr_twin ra cpu_seconds machine torch fastfip commit",
        run="network", order=lambda r: (names.index(r["network"]) if r["network"] in names else len(names)),
    )  # fmt: skip


def rows_of(name: str) -> list[Row]:
    """Return a row for each backdoor of a network before any purification; it is trained if it is not there."""
    network = NETWORKS[name]
    prepared, twin = prepare(network), _twin(network)
    common: Row = {
        "network": name, "set": network.set if network.backdoors else "both", "base": network.base,
        "acc": _percent(prepared.clean.acc), "acc_twin": _percent(twin.clean.acc),
        "cpu_seconds": round(prepared.seconds),
    }  # fmt: skip
    rows = [
        {**common, "attack": b.label, "target": b.target, "rate": b.rate, "asr": _percent(found.asr),
         "asr_twin": _percent(asr), "ra": _percent(found.ra)}
        for b, found, asr in zip(network.backdoors, prepared.attacked, twin_asr(name))
    ]  # fmt: skip
    return rows or [common]


def said(name: str) -> None:
    """Train a network, or take it as it is, and print how accurate it is and how well its backdoors work.

    Not in `__main__`: workers do not import that of a package.
    """
    prepared = prepare(NETWORKS[name])
    parts = [
        f"{backdoor.label} -> {backdoor.target}: ASR {found.shown('asr')}"
        for backdoor, found in zip(prepared.network.backdoors, prepared.attacked)
    ]
    print(f"{name}: ACC {prepared.clean.shown('acc')} {'; '.join(parts)} ({prepared.seconds:.0f} CPU s)", flush=True)


def results(of: str) -> harness.Results:
    """Return the rows of a set: benchmarks/results/suite_development.csv or suite_validation.csv."""
    names = list(NETWORKS)
    return harness.Results(
        f"suite_{of}", COLUMNS, run="network method fraction seed setting",
        order=lambda r: (
            SETTINGS.index(r["setting"]), names.index(r["network"]) if r["network"] in names else len(names),
            r["attack"], float(r["fraction"]), r["method"], int(r["seed"]),
        ),
    )  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """What is run: one method on one network with one clean set."""

    network: str
    method: str
    fraction: float
    seed: int
    setting: str = "plain"

    @classmethod
    def of(cls, words: list[str]) -> Cell:
        """Return the cell of these words."""
        return cls(words[0], words[1], float(words[2]), int(words[3]), words[4])


def clean_set(prepared: Prepared, fraction: float, seed: int, setting: str) -> tuple[Tensor, Tensor]:
    """Return the clean set as the model takes it, and labels."""
    base = prepared.base
    pool_x, pool_y = prepared.pool
    count = min(round(fraction * base.size), len(pool_y))
    if setting == "domain":
        x = _samples(count, seed, prepared)
        with torch.no_grad():
            return x, torch.cat([prepared.model(part).argmax(1) for part in x.split(500)])
    picked = real_data.sample_clean(pool_y, count, seed)
    rng = np.random.default_rng([seed, 1])
    if setting == "missing":
        picked = picked[pool_y[picked] != rng.choice(np.unique(pool_y))]
    x, y = prepared.inputs(pool_x[picked]), torch.from_numpy(pool_y[picked])
    if setting == "hidden" and prepared.leaked:
        places = torch.from_numpy(rng.permutation(len(y))[: max(len(prepared.leaked), round(HIDDEN * len(y)))].copy())
        for turn, part in enumerate(torch.tensor_split(places, len(prepared.leaked))):
            shown, labels = prepared.leaked[turn]
            x[part], y[part] = base.pixels.normalise(shown[: len(part)]), labels[: len(part)]
    return x, y


def _samples(count: int, seed: int, prepared: Prepared) -> Tensor:
    from PIL import Image

    height, width = prepared.test[0].shape[-2:]
    with zipfile.ZipFile(real_data.data_dir() / "imagenet_samples_256.zip") as z:
        names = sorted(n for n in z.namelist() if n.lower().endswith((".jpg", ".jpeg")))
        chosen = np.random.default_rng(seed).permutation(len(names))[:count]
        mode = "RGB" if prepared.test[0].shape[1] == 3 else "L"
        images = [Image.open(BytesIO(z.read(names[i]))).convert(mode).resize((width, height)) for i in chosen]
    return prepared.inputs(np.stack([np.asarray(image) for image in images]))


def settings_of(method: str, setting: str, base: Base) -> tuple[str, MethodConfig]:
    """Return the name of the method and its settings in a cell."""
    crop = "crop_flip" if base.flip else "crop"  # digits are moved too: a step of that size needs it
    name = "fine_tune" if method == "large_step" else method
    config = fastfip.methods.get(name).Config()
    if method == "large_step":
        config = config.replace(augment=crop, **LARGE_STEP)
    kind, _, way = setting.partition("_")
    factor = {"half": 0.5, "double": 2.0}.get(way)
    if factor is None:
        return name, config
    if kind == "lr":
        return name, config.replace(lr=config.lr * factor)
    if config.steps is not None:
        return name, config.replace(steps=max(1, round(config.steps * factor)))
    return name, config.replace(epochs=max(1, round((config.epochs or 1) * factor)))


def _retuned(prepared: Prepared, model: torch.nn.Module, x: Tensor, y: Tensor, seed: int) -> torch.nn.Module:
    """Return the model tuned for a hundred steps with five poisoned images among the clean ones."""
    shown, labels = prepared.leaked[0]
    few = prepared.base.pixels.normalise(shown[:5])
    result = fastfip.purify(
        model, real_data.loader(torch.cat([x, few]), torch.cat([y, labels[:5]])), "fine_tune", steps=100, seed=seed,
        holdout=0.0, select="last", progress=False, force=True,
    )  # fmt: skip
    return result.model


def run(cell: Cell) -> list[Row]:
    """Purify one network once; return a row for each of its backdoors (of a clean one, one row)."""
    network: Network = NETWORKS[cell.network]
    prepared = prepare(network)
    name, config = settings_of(cell.method, cell.setting, prepared.base)
    options: dict[str, Any] = {"config": config}
    if cell.setting == "nodata":
        x, y = (part[:0] for part in prepared.test)
        data, options["input_shape"] = None, tuple(prepared.test[0].shape[1:])
        if name == "fisher_steps":  # `purify` has settings of its own for it without data
            del options["config"]
    else:
        x, y = clean_set(prepared, cell.fraction, cell.seed, cell.setting)
        data = x if cell.setting == "unlabelled" else real_data.loader(x, y)
    start = time.process_time()
    result = fastfip.purify(prepared.model, data, name, **options, seed=cell.seed, progress=False, force=True)
    cpu = time.process_time() - start
    model = result.model
    if cell.setting == "retune":
        model = _retuned(prepared, model, x, y, cell.seed)
    clean, attacked = score(prepared, model)
    own = result.seconds
    common: Row = {
        "network": cell.network, "made": network.key(), "base": network.base,
        "method": cell.method, "fraction": cell.fraction,
        "setting": cell.setting, "seed": cell.seed, "clean_images": len(y), "acc_before": _percent(prepared.clean.acc),
        "acc": _percent(clean.acc), "acc_twin": _percent(_twin(network).clean.acc), "steps": result.settings["steps"],
        "seconds": round(own["total"] - own["evaluation"], 1), "cpu_seconds": round(cpu, 1),
        "peak_memory_mb": round((result.peak_memory or 0) / 2**20), "attack": "", "target": "", "rate": "",
        "asr_twin": "",
        "asr_before": "", "ra_before": "", "asr": "", "ra": "", "der": "",
        "note": "; ".join(result.alerts)[:200], "error": "",
    }  # fmt: skip
    rows: list[Row] = []
    for backdoor, old, new, twin in zip(network.backdoors, prepared.attacked, attacked, twin_asr(cell.network)):
        figures = der(*(Evaluation(acc=c.acc, asr=a.asr) for c, a in ((prepared.clean, old), (clean, new))))
        rows.append({
            **common, "attack": backdoor.label, "target": backdoor.target, "rate": backdoor.rate,
            "asr_twin": _percent(twin), "asr_before": _percent(old.asr), "ra_before": _percent(old.ra),
            "asr": _percent(new.asr),
            "ra": _percent(new.ra), "der": _percent(figures),
        })  # fmt: skip
    if cell.setting == "retune":  # tuned with images of the first one
        rows = rows[:1]
    return rows or [common]


def _percent(share: float | None) -> float | str:
    return "" if share is None else round(100 * share, 2)


def _twin(network: Network) -> Prepared:
    """Return the network that was trained alike without a backdoor."""
    return prepare(NETWORKS[f"{network.base}-clean"])


@functools.lru_cache
def twin_asr(name: str) -> list[float | None]:
    """Return how often each trigger of a network misleads its clean twin: more than that no purification can be asked.

    Triggers that were optimised on the clean network are adversarial perturbations of it.
    """
    prepared, twin = prepare(NETWORKS[name]), _twin(NETWORKS[name])
    return [found.asr for found in score(dataclasses.replace(prepared, test=_few(twin)), twin.model)[1]]


def _few(prepared: Prepared) -> tuple[Tensor, Tensor]:
    x, y = prepared.test
    return x[:10], y[:10]


def measured(cell: Cell) -> list[Row]:
    """Return the rows of a cell, with machine, versions and commit; a worker does this, so that its peak is its own."""
    of = "validation" if NETWORKS[cell.network].set == "validation" else "development"
    return [results(of).stamped(row) for row in run(cell)]


def run_apart(cell: Cell, threads: int, limit: float | None) -> tuple[list[Row], str]:
    """Run one cell in a process of its own; return its rows, or none and an error."""
    (outcome,) = outcomes(measured, [cell], Processes(threads), timeout=limit)
    return outcome.value or [], outcome.error
