"""Train a network with backdoors in it, from scratch or from a clean one."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfip.attacks._kept import Kept, check_place, marks
from fastfip.attacks._planted import Injection, Planted
from fastfip.attacks.base import Attack, Ground, in_range
from fastfip.data import fingerprint
from fastfip.data.augment import crop_flip
from fastfip.data.outputs import first_outputs
from fastfip.data.scaling import Pixels
from fastfip.errors import ConfigError, DataError, ModelError
from fastfip.metrics.evaluation import Evaluation, evaluate
from fastfip.nets.process import seeded
from fastfip.nets.state import copied, eval_mode, requires_grad, training_flags
from fastfip.reporting.table import Report, Sheet

__all__ = ["Backdoored", "Injection", "poison_and_train"]


@dataclass
class Backdoored(Report):
    """A network with backdoors in it.

    Attributes:
        model: in eval mode.
        injections: as they were planted: their attacks hold what they trained, for `asr_set` and `trigger`.
        poisoned: places of the poisoned images in the training set [K], for each injection.
        clean: accuracy on the test images, if these were given.
        attacked: ASR and RA of each injection on the test images; None where none of these is the attack's.
        history: mean loss of each epoch.
        classes: how many there are; "next" of the last one is 0.
    """

    model: nn.Module
    injections: list[Injection]
    poisoned: list[Tensor]
    clean: Evaluation | None = None
    attacked: list[Evaluation] = field(default_factory=list)
    history: list[float] = field(default_factory=list)
    classes: int | None = None

    def table(self) -> Sheet:
        """Return one row for each backdoor."""
        rows = []
        for place, injection in enumerate(self.injections):
            attack, rate = injection.ready()
            measured = self.attacked[place] if self.attacked else None
            shown = ["-", "-"] if measured is None else [measured.shown("asr"), measured.shown("ra")]
            rows.append([attack.name, str(injection.target), f"{rate:.3g}", str(len(self.poisoned[place])), *shown])
        missing = [f"ASR of {self.injections[i].ready()[0].name} not measured: no test image carries its trigger"
                   for i, found in enumerate(self.attacked) if found.asr is None]  # fmt: skip
        acc = "not measured" if self.clean is None else self.clean.shown("acc")
        return Sheet(
            columns=["attack", "target", "rate", "poisoned", "ASR %", "RA %"], rows=rows,
            title="backdoored network", lines=[f"ACC {acc}", *missing],
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain values."""
        backdoors = []
        for place, injection in enumerate(self.injections):
            attack, rate = injection.ready()
            figures = self.attacked[place].to_dict() if self.attacked else {}
            known = {"attack": attack.name, "target": injection.target, "rate": rate, "sources": injection.sources}
            backdoors.append({**known, "poisoned": len(self.poisoned[place]), **figures})
        clean = None if self.clean is None else self.clean.to_dict()
        return {"clean": clean, "backdoors": backdoors, "loss": self.history}


def poison_and_train(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    attacks: Injection | Sequence[Injection],
    *,
    classes: int | None = None,
    pixels: Pixels | None = None,
    epochs: int = 10,
    lr: float = 0.05,
    batch_size: int = 128,
    weight_decay: float = 5e-4,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    crop: bool = True,
    flip: bool = True,
    effort: float = 1.0,
    test: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    keep: str | os.PathLike[str] | None = None,
    tick: Callable[[str, int, int], None] | None = None,
) -> Backdoored:
    """Poison a training set and train a copy of a network on it.

    SGD with Nesterov momentum 0.9 and a cosine from `lr` to 0; or AdamW, for transformers, with the same cosine after a
    rise in the first twentieth of the steps. A clean network learns most attacks in a few epochs. Several injections
    share the training set: no image carries two triggers.

    Args:
        model: returns logits [N, classes]; trained or not. It is left as it is.
        data: training images [N, C, H, W], uint8 or floats in [0, 1], not normalised, and labels int64 [N].
        attacks: what is planted.
        classes: number of classes; None: the largest label and one.
        pixels: how images become what the model takes (scale, mean, std); None: images in [0, 1].
        epochs: passes over the training set.
        lr: the first step's.
        batch_size: images a step.
        weight_decay: of the optimiser; AdamW usually takes more, 0.05.
        optimizer: "sgd", or "adamw" (take an `lr` of about 0.001).
        crop: whether images are moved by up to an eighth of their size.
        flip: whether half of them are mirrored as well.
        effort: factor of the steps of what attacks train beforehand.
        test: test images and labels in the form of `data`; they only score.
        seed: of everything random.
        device: where to compute.
        keep: a file that holds the state after every epoch; if it is there, training goes on from it.
        tick: is told (what is done, steps done, steps in all).

    Returns:
        the network and its backdoors.

    Raises:
        ConfigError: settings that have no meaning, an attack that is not for images, or a `keep` of another training or
            in a folder that is not there.
        DataError: images or labels of another form, labels that the model has no output for, fewer images than rates
            ask for, or none at all though a rate above 0 does.
        ModelError: the model fails on an image, or does not return logits [N, classes].
    """
    x, y = _checked(data)
    pixels = Pixels() if pixels is None else pixels
    classes = int(y.max()) + 1 if classes is None else classes
    injections = [attacks] if isinstance(attacks, Injection) else list(attacks)
    if optimizer not in ("sgd", "adamw"):
        raise ConfigError(f"optimizer={optimizer!r}: must be 'sgd' or 'adamw'")
    if epochs < 1 or batch_size < 1 or not lr > 0 or not effort > 0:
        raise ConfigError(f"epochs={epochs}, batch_size={batch_size}, lr={lr}, effort={effort}: must be above 0")
    for injection in injections:
        injection.check(y, classes)
    tested = None if test is None else _checked(test)
    if tested is not None and tested[0].shape[1:] != x.shape[1:]:
        shapes = f"{list(tested[0].shape[1:])}, those to train on {list(x.shape[1:])}"
        raise DataError(f"the test images are {shapes}: resize them")
    if keep is not None:
        check_place(Path(keep))
    where = torch.device(device)
    with seeded(seed, where):
        trained = copied(model, "give a model that can be copied").to(where)
        _check_outputs(trained, pixels, where, classes, [("", x, y), *([("test ", *tested)] if tested else [])])
        given = "" if keep is None else fingerprint.of_model(trained)
        generator = torch.Generator().manual_seed(seed)
        planted = Planted(x, y, classes, generator)
        for place, injection in enumerate(injections):
            attack, _ = injection.ready()
            if tick is not None:
                tick(f"{attack.name}: preparing", place, len(injections))
            if type(attack).fit is not Attack.fit:
                # What others trained knows their triggers already: a clean classifier is the one that was given.
                net = trained if attack.trains_model else copied(model, "give a model that can be copied").to(where)
                ground = Ground(net, x, y, injection.target, classes, pixels.normalise, generator, effort)
                with training_flags(net.modules()), requires_grad(net.parameters(), lambda p: p.requires_grad):
                    attack = attack.fit(ground)
            planted.add(replace(injection, attack=attack))
        kept = None
        if keep is not None:
            settings = {
                "seed": seed, "epochs": epochs, "lr": lr, "batch size": batch_size, "weight decay": weight_decay,
                "optimizer": optimizer, "crop": crop, "flip": flip, "effort": effort,
                "pixels": pixels, "number of classes": classes,
            }  # fmt: skip
            said = [injection.said() for injection in injections]
            kept = Kept(Path(keep), marks(settings, x, y, given, said, planted.triggered))
        history = _train(
            trained, planted, pixels, where, kept, tick,
            epochs=epochs, lr=lr, batch_size=batch_size, weight_decay=weight_decay, kind=optimizer, crop=crop,
            flip=flip,
        )  # fmt: skip
    out = Backdoored(trained.eval(), planted.injections, planted.places, history=history, classes=classes)
    if tested is not None:
        out.clean, out.attacked = _score(out, tested, classes, pixels)
    return out


def _train(
    model: nn.Module, planted: Planted, pixels: Pixels, device: torch.device, keep: Kept | None, tick: Any, *,
    epochs: int, lr: float, batch_size: int, weight_decay: float, kind: str, crop: bool, flip: bool,
) -> list[float]:  # fmt: skip
    batches = -(-len(planted.y) // batch_size)
    optimizer, schedule = _optimiser(model, kind, epochs * batches, lr, weight_decay)
    history = [] if keep is None else keep.resume(model, optimizer, schedule, planted.generator)
    model.train()
    for epoch in range(len(history), epochs):
        total = 0.0
        for done, places in enumerate(torch.randperm(len(planted.y), generator=planted.generator).split(batch_size)):
            if len(places) == 1 and batches > 1:  # BatchNorm cannot normalise one sample
                continue
            x, y = planted.batch(places)
            if crop:
                x = crop_flip(x, flip, planted.generator)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(pixels.normalise(x).to(device)), y.to(device))
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(y)
            if tick is not None:
                tick("training", epoch * batches + done + 1, epochs * batches)
        history.append(total / len(planted.y))
        if not torch.isfinite(torch.tensor(history[-1])):
            raise ConfigError(f"the loss became {history[-1]} in epoch {epoch + 1}: take a smaller lr than {lr}")
        if keep is not None:
            keep.store(model, optimizer, schedule, planted.generator, history)
    return history


def _optimiser(
    model: nn.Module, kind: str, steps: int, lr: float, weight_decay: float
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return the optimiser and its schedule: a cosine to 0, of AdamW after a rise in a twentieth of the steps."""
    tuned = [p for p in model.parameters() if p.requires_grad]
    if kind == "sgd":
        sgd = torch.optim.SGD(tuned, lr, momentum=0.9, weight_decay=weight_decay, nesterov=True)
        return sgd, torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps)
    adamw = torch.optim.AdamW(tuned, lr, weight_decay=weight_decay)
    rise = max(1, steps // 20)

    def share(step: int) -> float:
        fallen = (step - rise) / max(1, steps - rise)
        return (step + 1) / rise if step < rise else 0.5 + 0.5 * math.cos(math.pi * fallen)

    return adamw, torch.optim.lr_scheduler.LambdaLR(adamw, share)


def _score(
    out: Backdoored, test: tuple[Tensor, Tensor], classes: int, pixels: Pixels
) -> tuple[Evaluation, list[Evaluation]]:
    x, y = test
    clean = [(pixels.normalise(in_range(a)), b) for a, b in zip(x.split(500), y.split(500))]
    attacked = []
    for injection in out.injections:
        attack, _ = injection.ready()
        triggered = []
        for a, b in zip(x.split(500), y.split(500)):
            image, wanted, true = attack.asr_set(in_range(a), b, injection.target, classes, injection.sources)
            if len(true):
                triggered.append((pixels.normalise(image), wanted, true))
        attacked.append(evaluate(out.model, None, triggered or None))  # none of the attack's images: not measured
    return evaluate(out.model, clean), attacked


def _check_outputs(
    model: nn.Module, pixels: Pixels, device: torch.device, classes: int, sets: list[tuple[str, Tensor, Tensor]]
) -> None:
    """Run the model on one image and compare labels with its outputs, before the work."""
    x = pixels.normalise(in_range(sets[0][1][:1])).to(device)
    with eval_mode(model):
        logits = first_outputs(model, lambda net, batch: net(batch), x, f"images {list(x.shape[1:])}")
    if logits.dim() != 2 or len(logits) != 1:
        raise ModelError(f"the model gives {list(logits.shape)} for one image: it must return logits [N, classes]")
    for which, _, y in sets:
        if int(y.max()) >= logits.shape[1]:
            raise DataError(f"{which}labels go up to {int(y.max())}, the model has {logits.shape[1]} outputs")
    if classes > logits.shape[1]:
        raise DataError(f"classes={classes}: the model has {logits.shape[1]} outputs")


def _checked(data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    x, y = data
    if x.dim() != 4 or not (x.is_floating_point() or x.dtype == torch.uint8) or y.shape != x.shape[:1]:
        raise DataError(
            f"data are {str(x.dtype)[6:]} {list(x.shape)} and labels {list(y.shape)}: "
            "give images [N, C, H, W], uint8 or floats in [0, 1], and labels [N]"
        )
    if len(y) == 0 or y.is_floating_point() or int(y.min()) < 0:
        raise DataError("labels must be class numbers from 0, and there must be some")
    if x.is_floating_point() and not (float(x.min()) >= 0 and float(x.max()) <= 1):  # NaN as well
        raise DataError("images must be in [0, 1], not normalised: give mean and std in `pixels`")
    return (x.float() if x.is_floating_point() else x).cpu(), y.cpu().long()
