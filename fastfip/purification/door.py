"""What is found out before anything is tuned: the method and its settings, labels that were not given, the faster
memory layout, and whether model and data fit each other.

A model that its data do not fit (images scaled in another way, classes in another order, a checkpoint before training)
is ruined by every method without a sign of it, so that is asked first, of the model as it was received.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfip.data.batch import Batch, float32_batch, move_to, take, to_tensors
from fastfip.data.cleanset import CleanSet
from fastfip.data.stores import DEFAULT_BATCH, Live, count_of, first_of, live_loader, spread
from fastfip.data.task import LABEL_KEYS, Task, check_inputs, read_batches
from fastfip.errors import ConfigError, DataError
from fastfip.methods import Method, MethodConfig, get
from fastfip.metrics.evaluation import binomial_tail, wilson
from fastfip.nets.process import seeded
from fastfip.nets.state import (
    LOW_PRECISION,
    as_written,
    copied,
    eval_mode,
    is_compiled,
    is_sharded,
    requires_grad,
    unwrapped,
)
from fastfip.purification.workcopy import WorkCopy
from fastfip.worst_case.points import points_axis, shaped_as_clouds

__all__ = [
    "BY_PRETRAINED",
    "FEW_SAMPLES",
    "MANY",
    "by_data",
    "by_settings",
    "check_fit",
    "choose_layout",
    "chosen_of",
    "config_of",
    "with_answers",
]

#: What `method="auto"` takes: the second where there are fewer clean samples than the third, which are no point clouds,
#: and no `loss=`.
MANY, FEW, ENOUGH = "fisher_steps", "fast_wfip", 200
#: And where the weights before fine-tuning are known.
BY_PRETRAINED = "fine_mixing"
#: What the result says of few samples.
FEW_SAMPLES = f"{FEW} was taken for fewer than {ENOUGH} clean samples; {MANY} is the default for more"
#: Samples that are asked whether they are point clouds.
CLOUD_SAMPLES = 8
#: Samples with which the layouts are compared.
LAYOUT_SAMPLES = 8
#: Clean samples that are asked whether the model fits them, at most.
FIT_SAMPLES = 1024
#: Fewer losses than that have no spread to speak of.
FEWEST = 10
#: Standard errors of a one-sided confidence of 99.9 %.
SURE = 3.09
#: Share of guessing models that pass for one that knows something.
BY_CHANCE = 0.01
#: How far the model's own mean confidence may lie above its accuracy without a word.
OVERCONFIDENT = 0.15

_REMEDY = (
    "check how images are scaled (0..1, -1..1, mean and std), the order of channels and of classes, and that the model "
    "is the trained one"
)


def by_data(model: nn.Module, data: Any, task: Task, seed: int) -> str:
    """Return the name of the method that `method="auto"` stands for with these clean samples.

    Where a loss of the user's own says what outputs are (boxes, pixels, tokens), and where inputs are point clouds, the
    first method leaves less of a backdoor at any number of samples: docs/tasks.md.

    Args:
        model: left as it is. Of one whose parts are on several processes the number of samples alone decides.
        data: what a user passes as clean data.
        task: how the model takes a batch.
        seed: of what the data set draws for the samples that are looked at where there are few.
    """
    count = None if task.loss_hook is not None else count_of(data)
    return FEW if count is not None and count < ENOUGH and not _are_clouds(model, data, task, seed) else MANY


def _are_clouds(model: nn.Module, data: Any, task: Task, seed: int) -> bool:
    """Return whether inputs are [N, P, 3] or [N, 3, P] and a copy of the model does not ask for the points' order."""
    if not isinstance(model, nn.Module) or is_sharded(model):
        return False
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with torch.inference_mode(False), torch.no_grad(), seeded(seed, device), as_written(model):
            batch = to_tensors(first_of(data, CLOUD_SAMPLES))
            batch = (batch,) if isinstance(batch, Tensor) else batch
            n = task.size(batch)
            batch = take(batch, torch.tensor(spread(n, CLOUD_SAMPLES), device="cpu"), n)
            if not shaped_as_clouds(task.inputs(batch)):
                return False
            twin = copied(unwrapped(model), "").eval()
            if any(p.dtype in LOW_PRECISION for p in twin.parameters()):  # as the run takes such a model
                twin = twin.float()
            generator = torch.Generator(device="cpu").manual_seed(seed)
            return points_axis(twin, task, move_to(float32_batch(batch), device), generator) is not None
    except Exception:  # of a user's data or forward; the run meets it again, and says it better
        return False


def by_settings(config: Any) -> str:
    """Return the name of the method that `method="auto"` stands for with settings: the one that a config is of."""
    return FEW if isinstance(config, get(FEW).Config) and not isinstance(config, get(MANY).Config) else MANY


def config_of(
    recipe: type[Method],
    config: MethodConfig | Mapping[str, Any] | None,
    steps: int | None,
    epochs: int | None,
    overrides: Mapping[str, Any],
) -> MethodConfig:
    """Return a method's settings: a config (None: its own) with what was given by name instead.

    Raises:
        ConfigError: a config of another method, steps and epochs at once, an unknown setting or a value out of range.
    """
    if steps is not None and epochs is not None:
        raise ConfigError(f"steps={steps} and epochs={epochs}: give one of them")
    if config is None:
        config = recipe.Config()
    elif isinstance(config, Mapping):
        config = recipe.Config.from_dict(config)
    elif not isinstance(config, recipe.Config):
        raise ConfigError(
            f"config is a {type(config).__name__}, {recipe.name} takes a {recipe.Config.__name__} or a mapping"
        )
    changes = dict(overrides)
    changes.update({name: value for name, value in (("steps", steps), ("epochs", epochs)) if value is not None})
    return config.replace(**changes) if changes else config


def chosen_of(config: Any, steps: int | None, epochs: int | None, overrides: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the settings that were given a value; of a config object nobody knows which these are."""
    named = {name for name, value in (("steps", steps), ("epochs", epochs)) if value is not None}
    return frozenset([*overrides, *named, *(config if isinstance(config, Mapping) else ())])


def with_answers(
    model: nn.Module,
    data: Any,
    task: Task,
    device: torch.device,
    walk: Callable[[Iterable[Batch]], Iterable[tuple[Batch, bool]]] | None = None,
) -> tuple[Any, bool]:
    """Return the data with the model's answers as labels, if it has none, and whether it had none.

    Args:
        model: answers in eval mode.
        data: what a user passes as clean data; without labels it may be a tensor of inputs [N, ...] as well, or batches
            that are such a tensor, a tuple of one, or a dict without a field of labels. It is read into memory then.
        task: how the model takes a batch; with `loss=` nothing is done, because labels may be of any form.
        device: where the model is.
        walk: gives the batches, and whether they count, where a pass takes all ranks; None: they all do.

    Raises:
        DataError: inputs that cannot be used, or outputs that no class can be read off.
    """
    if task.loss_hook is not None or data is None:
        return data, False
    batches, known = _batches(data)
    if known or batches is None:
        return data if batches is None else batches, False
    counted = ((batch, True) for batch in batches) if walk is None else walk(batches)
    return list(_answered(model, counted, task, device)), True


def _batches(data: Any) -> tuple[Iterable[Batch] | None, bool]:
    """Return the batches of the data (None: as it was given) and whether they have labels."""
    if not isinstance(data, (Tensor, Mapping, tuple, list)) and hasattr(data, "__array__"):
        data = torch.as_tensor(data)
    if isinstance(data, Tensor):
        return (data.split(DEFAULT_BATCH) if data.dim() > 1 else None), data.dim() <= 1
    if isinstance(data, Mapping):
        return [data], not _lacks_labels(data)
    if isinstance(data, (tuple, list)):
        if not data:
            return None, True
        if isinstance(data, list) and _are_inputs(data):
            return data, False
        if hasattr(data[0], "__array__"):  # one batch
            return [data], not _lacks_labels(data)
        return data, not _lacks_labels(data[0])
    live = live_loader(data)
    if live is not None:
        loader, index, size = live
        store = Live(loader)
        if len(index) == 0 or not _lacks_labels(store.get(index[:1].tolist())):
            return None, True
        return store.loader(chunk.tolist() for chunk in index.split(size)), False
    if not isinstance(data, Iterable):
        return None, True
    walk = read_batches(data)  # which may give its batches only once: it goes on from the first one
    first = list(itertools.islice(walk, 1))
    return _resumed(first, walk), not (first and _lacks_labels(first[0]))


def _resumed(first: list[Batch], walk: Iterator[Batch]) -> Iterator[Batch]:
    """Yield what was taken and then the rest, without asking for an iterator again: some begin anew when asked."""
    yield from first
    with contextlib.suppress(StopIteration):
        while True:
            yield next(walk)


def _are_inputs(data: list[Any]) -> bool:
    """Return whether a list holds batches of inputs of one form, not (x, y)."""
    return all(
        isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1 and x.shape[1:] == data[0].shape[1:]
        for x in data
    )


def _lacks_labels(batch: Batch) -> bool:
    batch = to_tensors(batch)
    if isinstance(batch, Mapping):
        numbers = any(isinstance(v, Tensor) and v.dim() == 1 and not v.is_floating_point() for v in batch.values())
        return not numbers and not any(key in batch for key in LABEL_KEYS)  # numbers: labels by a name of their own
    if isinstance(batch, tuple):
        return len(batch) == 1 and isinstance(batch[0], Tensor) and batch[0].dim() > 1
    return isinstance(batch, Tensor) and batch.dim() > 1


@torch.no_grad()
def _answered(
    model: nn.Module, batches: Iterable[tuple[Batch, bool]], task: Task, device: torch.device
) -> Iterator[Batch]:
    with eval_mode(model):
        for raw, counts in batches:
            batch = to_tensors(raw)
            batch = (batch,) if isinstance(batch, Tensor) else batch
            check_inputs(batch, task)
            out = task.forward(model, move_to(batch, device))
            if not counts:
                continue
            if out.dim() == 2 and out.shape[1] > 1:
                y = out.argmax(1)
            elif out.dim() == 1 or (out.dim() == 2 and out.shape[1] == 1):
                if bool(((out >= 0) & (out <= 1)).all()):
                    raise DataError(
                        "the clean data has no labels, and one output between 0 and 1 may be a logit or a probability: "
                        "pass (x, y)"
                    )
                y = (out.reshape(-1) > 0).long()
            else:
                raise DataError(
                    f"the clean data has no labels, and none can be read off outputs of shape {list(out.shape)}: pass "
                    "(x, y)"
                )
            y = y.cpu()
            yield {**batch, LABEL_KEYS[0]: y} if isinstance(batch, Mapping) else (*batch, y)


def choose_layout(work: WorkCopy, clean: CleanSet, task: Task, device: torch.device, most: int | None = None) -> None:
    """Put a convolutional model on a CPU in channels_last, where it then gives the same and has a backward pass.

    That is tried on `most` samples; nothing is checkpointed then.
    """
    model = work.model
    if device.type != "cpu" or not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return
    if is_compiled(model):  # its code is for the layout that it met first
        return
    batch = next(iter(clean.batches(min(most or LAYOUT_SAMPLES, LAYOUT_SAMPLES, clean.n), device=device)))

    def outputs() -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return task.forward(model, batch)

    def works() -> bool:
        try:
            with requires_grad(model.parameters(), True):
                there = outputs()
                weights = [p for p in model.parameters() if p.requires_grad]
                if there.requires_grad:
                    torch.autograd.grad(there.sum(), weights, allow_unused=True)
        except Exception:  # what a user's forward raises in a layout that it was not written for can be anything
            return False
        return there.shape == here.shape and bool((there.detach() - here).abs().max() <= tolerance * here.abs().max())

    with torch.no_grad():
        here = outputs()
    tolerance = 32 * math.sqrt(torch.finfo(here.dtype).eps) if here.is_floating_point() else 0.0
    work.channels_last(works)


def check_fit(
    model: nn.Module, clean: CleanSet, task: Task, classes: int | None, device: torch.device, force: bool
) -> list[str]:
    """Refuse a model and clean data that do not fit each other; see `force=` of `purify` for when that is.

    Args:
        model: the received one, in eval mode.
        clean: all clean samples, of which at most 1,024 are asked.
        task: how it meets a batch.
        classes: C of its logits [N, C]; None: nothing is known about them, and nothing is checked.
        device: where it is.
        force: a note instead of an error.

    Returns:
        what the result should say: that the model is suspiciously bad on the clean samples, or nothing.

    Raises:
        DataError: they do not fit.
    """
    if classes is None or clean.labels is None:
        return []
    right, sure, losses = _answers(model, clean, task, device)
    n = len(right)
    accuracy, guessing, nothing = float(right.mean()), 1 / classes, math.log(classes)
    error = float(losses.std()) / math.sqrt(n) if n >= FEWEST else math.inf
    mean = float(losses.mean())
    # An infinite loss is one that is above every bound.
    high = mean - SURE * error > nothing if math.isfinite(mean) else n >= FEWEST
    low = wilson(accuracy, n, SURE)[1] < (1 + guessing) / 2
    guesses = binomial_tail(int(right.sum()), n, guessing) > BY_CHANCE
    said = f"the received model is right on {100 * accuracy:.1f} % of {n} clean samples, with a mean loss of {mean:.3g}"
    if low and (guesses or high):
        text = f"{said} (guessing: {100 * guessing:.1f} %, {nothing:.3g}): they do not fit each other, {_REMEDY}"
        if not force and task.loss_hook is None:
            raise DataError(f"{text}; force=True goes on")
        return [text]
    likely = wilson(accuracy, n)[1]  # a remark needs less certainty than a refusal
    if high or likely < (1 + guessing) / 2:
        return [f"{said}, which is suspiciously bad: {_REMEDY}"]
    confidence = float(sure.mean())
    if likely < confidence - OVERCONFIDENT:
        return [f"{said}, and {100 * confidence:.1f} % sure of itself, which is suspicious: {_REMEDY}"]
    return []


@torch.no_grad()
def _answers(model: nn.Module, clean: CleanSet, task: Task, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return of each of the samples whether the answer is right, its probability, and its cross-entropy, all [n]."""
    right, sure, losses = [], [], []
    if clean.n > FIT_SAMPLES:  # spread evenly: the samples may be sorted by class
        clean = clean.subset(torch.linspace(0, clean.n - 1, FIT_SAMPLES, dtype=torch.float64, device="cpu").long())
    for batch in clean.batches(device=device):
        logits = task.forward(model, batch).float()
        y = task.labels(batch).to(logits.device)
        losses.append(F.cross_entropy(logits, y, reduction="none").double().cpu())
        top = logits.softmax(1).max(1)
        right.append((top.indices == y).double().cpu())
        sure.append(top.values.double().cpu())
    return torch.cat(right), torch.cat(sure), torch.cat(losses)
