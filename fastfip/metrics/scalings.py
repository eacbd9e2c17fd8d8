"""How accurate a model is on images under the usual scalings and numberings of the classes: which of them it wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfip.data.images import ImageSet
from fastfip.data.outputs import first_outputs, logits_task
from fastfip.data.pictures import ORDERS, class_order
from fastfip.data.scaling import STATISTICS, Pixels
from fastfip.data.task import Task
from fastfip.errors import DataError, ModelError
from fastfip.nets.state import eval_mode
from fastfip.reporting.progress import Beat
from fastfip.reporting.table import Report, Sheet

__all__ = ["Scalings", "Trial", "try_scalings"]

#: Accuracies that differ by less are not told apart.
CLOSE = 0.01
#: By so much must a one-to-one matching of labels and answers beat the accuracy, to speak of another numbering.
RENUMBERED = 0.2
#: A class needs so many images, before the answer that most of them get says anything.
FEWEST = 4


@dataclass(frozen=True)
class Trial:
    """Accuracy and mean loss under one scaling and one numbering of the classes.

    Attributes:
        pixels: the scaling. order: "as given" or the order of the class folders ("number", "text").
        acc: share of images with their label. loss: mean cross-entropy in nats.
        answers: for each label (of 4 images or more) the answer that is its own, if labels and answers are matched
            one to one, most images first.
        agree: share of the images of these labels that get that answer, whatever its number.
    """

    pixels: Pixels
    order: str
    acc: float
    loss: float
    answers: tuple[tuple[int, int], ...]
    agree: float


@dataclass
class Scalings(Report):
    """All trials, the best first.

    Attributes:
        trials: see `Trial`. given: as the user asked for it. n: images. classes: outputs of the model.
        notes: what else was seen.
    """

    trials: list[Trial]
    given: Trial
    n: int
    classes: int
    notes: list[str]

    @property
    def best(self) -> Trial:
        """Return the trial with the highest accuracy; the one that was given, if it is as good.

        Where another numbering of the classes explains far more images, it is the one in which they agree most.
        """
        first, clearest = self.trials[0], max(self.trials, key=lambda t: t.agree)
        if clearest.agree - first.acc > RENUMBERED:
            return self.given if clearest.agree - self.given.agree < CLOSE else clearest
        return self.given if first.acc - self.given.acc < CLOSE else first

    def words(self) -> list[str]:
        """Return in sentences what the trials say."""
        best, given, chance = self.best, self.given, 1 / self.classes
        out = []
        if best.agree - best.acc > RENUMBERED:
            moved = [f"{label} -> {answer}" for label, answer in best.answers if label != answer]
            out.append(
                f"does not fit ({_named(best)}: ACC {100 * best.acc:.2f} %): the classes are numbered differently, "
                f"{100 * best.agree:.0f} % of the images agree on {', '.join(moved[:8])}{', ...' * (len(moved) > 8)} "
                "(label -> answer)"
            )
        elif best.acc < max(2 * chance, chance + 0.05):
            out.append(
                f"does not fit: ACC {100 * best.acc:.2f} % at best, chance is {100 * chance:.2f} %: these are not "
                "the images or the labels that the model was made for, or they were prepared in another way"
            )
        elif best is given:
            out.append(f"fits: {_named(given)} as given: ACC {100 * given.acc:.2f} % on {self.n} images")
        else:
            out.append(
                f"does not fit as given ({_named(given)}: ACC {100 * given.acc:.2f} %); "
                f"{_named(best)} gives ACC {100 * best.acc:.2f} % on {self.n} images"
            )
        close = [t for t in self.trials if t is not best and t.order == best.order and best.acc - t.acc < CLOSE]
        if close and best.acc > 0.5:
            out.append(f"these images do not tell it apart from {', '.join(str(t.pixels) for t in close)}")
        return [*out, *self.notes]

    def table(self) -> Sheet:
        """Return accuracy and loss of every trial."""
        rows = [
            (str(t.pixels), t.order, f"{100 * t.acc:.2f} %", f"{t.loss:.4g}", "as given" if t == self.given else "")
            for t in self.trials
        ]
        title = f"Accuracy on {self.n} images"
        return Sheet(title, ("scaling", "class order", "ACC>", "loss>", ""), rows, self.words())

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return {
            "images": self.n,
            "classes": self.classes,
            "trials": [_plain(t) for t in self.trials],
            "given": _plain(self.given),
            "best": _plain(self.best),
            "words": self.words(),
        }


def _plain(t: Trial) -> dict[str, Any]:
    return {"scaling": str(t.pixels), **t.pixels.to_dict(), "class_order": t.order, "acc": t.acc, "loss": t.loss}


def _named(t: Trial) -> str:
    return f"{t.pixels}" + ("" if t.order == "as given" else f", classes by {t.order}")


def try_scalings(
    model: nn.Module,
    images: ImageSet,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 128,
    progress: Callable[[str], None] | None = None,
) -> Scalings:
    """Measure a model on images under the usual scalings, and its class folders under both orders.

    Args:
        model: gives logits [N, C] (or probabilities) for images [N, C, H, W]; it is left as it was.
        images: with the scaling that the user has in mind; the others keep its size and channels.
        device: where to compute; the model has to be there.
        batch_size: images a batch.
        progress: gets a line now and then, where it takes long.

    Raises:
        ModelError: the model fails on the images. DataError: labels beyond the model's classes in every order.
    """
    given = images.pixels
    orders = _orders(images)
    raw, labels = _raw(images, batch_size), images.labels
    notes: list[str] = []
    trials: list[Trial] = []
    first: list[Trial] = []
    with eval_mode(model), torch.no_grad():
        candidates = _candidates(given, raw, notes)
        beat = Beat(progress or (lambda text: None), "scaling", len(candidates))
        for done, pixels in enumerate(candidates):
            beat.at(done)
            try:
                logits = _logits(model, raw, pixels, labels, device, batch_size, notes if pixels == given else [])
            except ModelError:
                if pixels == given:
                    raise
                notes.append(f"note: under {pixels} the model gives no finite outputs")
                continue
            for order, mapping in orders.items():
                y = mapping[labels]
                if int(y.max()) >= logits.shape[1]:
                    continue
                trial = _trial(logits, y, pixels, order)
                trials.append(trial)
                first += [trial] if pixels == given and order == next(iter(orders)) else []
        classes = logits.shape[1]
    if not first:
        raise DataError(f"labels run to {int(labels.max())}, and the model has {classes} classes")
    trials.sort(key=lambda t: (-t.acc, t.loss))
    return Scalings(trials, first[0], len(labels), classes, notes)


def _trial(logits: Tensor, y: Tensor, pixels: Pixels, order: str) -> Trial:
    got, classes = logits.argmax(1), logits.shape[1]
    acc, loss = float((got == y).float().mean()), float(F.cross_entropy(logits.double(), y))
    votes = torch.bincount(y * classes + got, minlength=classes * classes).view(classes, classes)
    votes[votes.sum(1) < FEWEST] = 0
    counted, matched, answers = int(votes.sum()), 0, []
    while int(votes.max()) > 0:
        label, answer = divmod(int(votes.argmax()), classes)
        answers.append((label, answer))
        matched += int(votes[label, answer])
        votes[label], votes[:, answer] = 0, 0
    return Trial(pixels, order, acc, loss, tuple(sorted(answers)), matched / counted if counted else acc)


def _orders(images: ImageSet) -> dict[str, Tensor]:
    """Return for each order of the class folders what number a class of the set gets; the set's own order first."""
    if images.classes is None or images.order is None:
        return {"as given": torch.arange(int(images.labels.max()) + 1)}
    out: dict[str, Tensor] = {}
    for order in sorted(ORDERS, key=lambda name: name != images.order):
        names, _ = class_order(images.classes, order)
        mapping = torch.tensor([names.index(name) for name in images.classes])
        if not any(torch.equal(mapping, other) for other in out.values()):
            out[order] = mapping
    return out


def _raw(images: ImageSet, batch_size: int) -> Tensor:
    """Return the images before their scaling, [N, C, H, W]."""
    places: Sequence[int] = range(len(images))
    parts = [images.source.batch(images.index[list(places[i : i + batch_size])].tolist()) for i in places[::batch_size]]
    return torch.cat(parts)


def _candidates(given: Pixels, raw: Tensor, notes: list[str]) -> list[Pixels]:
    """Return the scalings to try, the given one first."""
    if raw.dim() != 4 or float(raw.min()) < 0 or float(raw.max()) > 1:
        notes.append("note: the inputs are no images in [0, 1]: no other scaling was tried")
        return [given]
    bare = replace(given, mean=(), std=(), scale=None)
    out = [given, bare, replace(bare, scale="-11"), replace(bare, scale="255")]
    for mean, std in STATISTICS.values():
        if len(mean) in (1, raw.shape[1]):
            out.append(replace(bare, mean=mean, std=std))
    different: dict[Any, Pixels] = {}
    for pixels in out:
        different.setdefault((pixels.scale or "01", pixels.mean, pixels.std), pixels)  # None and "01" say the same
    return list(different.values())


def _logits(
    model: nn.Module,
    raw: Tensor,
    pixels: Pixels,
    labels: Tensor,
    device: torch.device | str,
    batch_size: int,
    notes: list[str],
) -> Tensor:
    task = Task()
    parts: list[Tensor] = []
    for i in range(0, len(raw), batch_size):
        batch = (pixels.normalise(raw[i : i + batch_size]).to(device), labels[i : i + batch_size].to(device))
        if not parts:
            shape = "x".join(map(str, raw.shape[1:]))
            out = first_outputs(model, task.forward, batch, f"images {shape} under {pixels}")
            task, said = logits_task(model, task, batch, out)
            notes += [] if said is None else [f"note: {said}"]
        parts.append(task.forward(model, batch).float().cpu())
    logits = torch.cat(parts)
    if logits.dim() != 2 or len(logits) != len(raw):
        raise DataError(f"the model gives {list(logits.shape)} for {len(raw)} images, no logits [N, C]")
    return logits
