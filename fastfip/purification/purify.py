"""`purify`: a backdoored net and a few clean samples in, a clean net out."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import fastfip
from fastfip.data.batch import Batch, move_to
from fastfip.data.cleanset import CleanSet
from fastfip.data.outputs import binary_task, first_outputs, is_one_logit, logits_task
from fastfip.data.task import Forward, Loss, Task
from fastfip.errors import ConfigError, ModelError
from fastfip.methods import Method, MethodConfig, get
from fastfip.methods.run import Run, autocast_dtype
from fastfip.metrics.evaluation import Evaluation
from fastfip.nets.checks import check_amp, check_seed, of_checkpointing, usable_device
from fastfip.nets.process import PeakMemory, seeded
from fastfip.nets.state import as_written, without_caches
from fastfip.purification.callbacks import Callback
from fastfip.purification.door import (
    FEW_SAMPLES,
    MANY,
    by_count,
    by_settings,
    check_fit,
    choose_layout,
    config_of,
    with_answers,
)
from fastfip.purification.loop import fit
from fastfip.purification.no_data import DRAWN, NO_DATA, without_data
from fastfip.purification.result import Coverage, PurifyResult
from fastfip.purification.scorer import MEASURES, Scorer
from fastfip.purification.workcopy import WorkCopy, in_full_precision

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastfip.methods.overrides import Overrides

__all__ = ["purify", "purify_"]

#: A loss of clean accuracy that the result warns of.
WORRYING_LOSS = 0.05
#: One that its first line is about.
RUINED = 0.2


@dataclass(frozen=True)
class PurifyOptions:
    """What `purify` was asked for, checked: its arguments, and the method's class, settings and task made of them."""

    clean_loader: Iterable[Batch]
    recipe: type[Method]
    config: MethodConfig
    task: Task
    seed: int
    device: torch.device | None
    amp: bool | str
    progress: bool | Callable[[str], None] | None
    callbacks: Iterable[Callback | Callable[[Run, dict[str, Any]], bool | None]] | None
    test_loader: Iterable[Batch] | None
    asr_loader: Iterable[Batch] | None
    measure: tuple[str, ...]
    force: bool
    frozen: str
    notes: tuple[str, ...] = ()
    alerts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_amp(self.amp)
        if self.frozen not in ("keep", "tune"):
            raise ConfigError(f"frozen={self.frozen!r}: must be 'keep' or 'tune'")
        odd = [name for name in self.measure if name not in MEASURES]
        if odd:
            raise ConfigError(f"measure={self.measure!r}: must be some of {', '.join(MEASURES)}")


def purify(
    model: nn.Module,
    clean_loader: Iterable[Batch] | None = None,
    method: str | type[Method] = "auto",
    *,
    config: MethodConfig | Mapping[str, Any] | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    amp: bool | str = False,
    progress: bool | Callable[[str], None] | None = None,
    callbacks: Iterable[Callback | Callable[[Run, dict[str, Any]], bool | None]] | None = (),
    test_loader: Iterable[Batch] | None = None,
    asr_loader: Iterable[Batch] | None = None,
    measure: Iterable[str] = ("acc", "asr"),
    forward: Forward | None = None,
    loss: Loss | None = None,
    inplace: bool = False,
    force: bool = False,
    frozen: str = "keep",
    input_shape: tuple[int, int, int] | None = None,
    **overrides: Unpack[Overrides],
) -> PurifyResult:
    """Remove a backdoor from a classifier with a few clean samples, or, less well, with none.

    The given model is left alone (unless `inplace`), the global random state too; the same seed gives the same weights.
    Python's, NumPy's and torch's global generators are seeded meanwhile: purifications in several threads take turns.
    In the result training flags, requires_grad, gradients, device, dtype, tied weights, hooks and the form of the state
    dict are those of the given model. A model whose parameters are all frozen is purified like any other.

    Args:
        model: any net that classifies: logits [N, C], or probabilities (what their softmax is taken of is used).
        clean_loader: clean samples `(x, y, ...)` or dicts: a DataLoader (its dataset, transforms and collate function
            are used, with an order of our own), a Dataset, one batch, or any iterable (read once into memory). One
            sample a class is enough for it to run. Without labels (a tensor of images, batches `x` or `(x,)`, dicts
            without a label) the received model's own answers are taken for them, and everything is read into memory.
            None, for networks with BatchNorm: `clp` prunes channels by their weights alone, or, with another method,
            drawn images stand in for the samples (`fastfip.stand_in_images`).
        method: its name (`fastfip.methods.names()`), or a class. "auto": `fisher_steps`, or `fast_wfip` where there are
            fewer than 200 clean samples and no settings are given; `clp` without data and without settings.
        config: the method's settings, as its config class or a mapping.
        steps: optimiser steps, instead of what the config says.
        epochs: passes over the clean set, instead of what the config says.
        seed: of everything random.
        device: where to compute; None: where the model is. The result goes back to where the model was.
        amp: False, True, "bf16" or "fp16": autocast of the clean loss; Fisher terms stay in full precision.
        progress: whether a bar is shown; a function gets a line every tenth of the steps or 30 seconds instead (none
            within 5 seconds); None: a bar where stderr is a terminal.
        callbacks: functions `f(run, record)` called after each epoch (True stops), or `callbacks.Callback` objects.
        test_loader: clean test samples; they only score, nothing is selected by them.
        asr_loader: triggered samples, see `fastfip.evaluate`; they only score, nothing is selected by them.
        measure: what is measured before and after: "acc" (with the clean loss), "asr" (with RA), and "fisher_trace",
            which is off by default, since it can take a sixth of a short run.
        forward: `forward(model, batch) -> logits`, for nets or batches of another form.
        loss: `loss(logits, batch) -> Tensor [N]`, one loss for each sample.
        inplace: work on the model itself; after an error it is as it was.
        force: go on where model and data do not seem to fit each other. Without it a model is refused, before anything
            is tuned, that is clearly right on less than half of what guessing leaves (its accuracy on the clean set is,
            with a confidence of 99.9 %, below (1 + 1/C) / 2), and that either cannot be told from guessing (a binomial
            test against 1/C, at 1 %) or has a mean loss clearly above ln C, that of a model that knows nothing. Few
            samples decide less: ten right ones of 24 in three classes are not refused. With `loss=` it is only a note.
        frozen: "keep": parameters with `requires_grad=False` stay as they are, to the bit, where others have it True (a
            frozen backbone, the base of a LoRA model); "tune": they are tuned as well. Where all are frozen, as in a
            model for inference, that says nothing about purification, and all are tuned.
        input_shape: without data, (channels, height, width) of the model's inputs; None: found out where it can be.
        **overrides: settings of the method by name, e.g. `lr=0.02`.

    Returns:
        the purified model, what was measured before and after, and how it went.

    Raises:
        DataError: clean data that cannot be used: empty, uint8 images, labels out of range or no class indices. Or no
            data and no BatchNorm.
        ModelError: a model that cannot be used, or a loss that is never finite.
        ConfigError: an unknown method or setting (the nearest is named), or a value out of its range.
        BackendError: a device that is not here.
    """
    start = time.perf_counter()
    few, seed = False, check_seed(seed)
    said: tuple[str, ...] = ()
    if clean_loader is None:
        method = NO_DATA if method == "auto" and not (config or overrides or steps or epochs) else method
        clean_loader, said = without_data(model, input_shape, forward, seed, method)
        config = DRAWN if config is None and method in ("auto", MANY) else config
    elif input_shape is not None:
        raise ConfigError(f"input_shape={input_shape!r} is for purify without data: leave it out, the samples tell it")
    if method == "auto":
        method = by_settings(config) if config or overrides else by_count(clean_loader)
        few = method != MANY and not config
    recipe = get(method) if isinstance(method, str) else method
    if not (isinstance(recipe, type) and issubclass(recipe, Method)):
        raise ConfigError(
            f"method={method!r}: give the name of a method, such as 'fisher_steps', 'auto', or a class of one"
        )
    if not isinstance(inplace, bool):
        raise ConfigError(f"inplace={inplace!r}: must be True or False")
    options = PurifyOptions(
        clean_loader=clean_loader,
        recipe=recipe,
        config=config_of(recipe, config, steps, epochs, overrides),
        task=Task.of(forward, loss),
        seed=seed,
        device=None if device is None else usable_device(device),
        amp=amp,
        progress=progress,
        callbacks=callbacks,
        test_loader=test_loader,
        asr_loader=asr_loader,
        measure=(measure,) if isinstance(measure, str) else tuple(measure),
        force=force,
        frozen=frozen,
        notes=(FEW_SAMPLES,) if few else (),
        alerts=said,
    )
    # Somebody else's no_grad or inference_mode around the call would leave nothing to tune with.
    with torch.inference_mode(False), torch.enable_grad(), as_written(model):
        work = WorkCopy(model, inplace)
        work_device = work.device if options.device is None else options.device
        try:
            with PeakMemory(work_device) as memory, seeded(options.seed, work_device), ExitStack() as ends:
                ends.enter_context(without_caches(work.model))
                run, history, before, after = _purify(work, work_device, options, ends)
            result = work.finish(recipe.name)
            moved = work.moved()
            coverage = _coverage(work, run, recipe.name, moved)
        except BaseException as error:
            work.undo()
            if of_checkpointing(error):
                raise ModelError(
                    f"{recipe.name} goes through the model in ways that gradient checkpointing cannot follow: turn it "
                    "off, e.g. model.gradient_checkpointing_disable(), or take fine_tune"
                ) from error
            raise
    run.seconds["total"] = time.perf_counter() - start
    return PurifyResult(
        model=result,
        method=recipe.name,
        before=before,
        after=after,
        history=history,
        seconds=run.seconds,
        peak_memory=memory.peak,
        settings={
            "config": options.config.to_dict(),
            "seed": seed,
            "device": str(work_device),
            "amp": amp,
            "clean_samples": run.given,
            "left_out_samples": run.left_out,
            "heldout_samples": 0 if run.heldout is None else run.heldout.n,
            "steps": run.step,
            "best_epoch": run.best_epoch,
            "peak_memory_of": memory.what,
        },
        versions={
            "fastfip": fastfip.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        notes=run.notes,
        interrupted=run.interrupted,
        alerts=run.alerts,
        diverged=run.diverged,
        unchanged=not moved,
        coverage=coverage,
    )


if TYPE_CHECKING:
    purify_ = purify  # a wrong keyword is an error here as well
else:

    def purify_(
        model: nn.Module,
        clean_loader: Iterable[Batch] | None = None,
        method: str | type[Method] = "auto",
        **options: Any,
    ) -> PurifyResult:
        """Purify a model in place: :func:`purify` with `inplace=True`."""
        return purify(model, clean_loader, method, **{**options, "inplace": True})


def _purify(
    work: WorkCopy, device: torch.device, options: PurifyOptions, ends: ExitStack
) -> tuple[Run, list[dict[str, Any]], Evaluation, Evaluation]:
    """Measure, tune and measure again; return the run, its history and both evaluations."""
    notes = list(options.notes)
    seed, config = options.seed, options.config
    work.to(device)
    model = work.model.eval()
    with seeded(seed, device):
        data, answered = with_answers(model, options.clean_loader, options.task, device)
        if answered:
            notes.append(
                "no labels were given: the received model's own answers were taken for them, so that its accuracy on "
                "these samples says nothing, nor whether they are scaled as it expects"
            )
        clean = CleanSet.of(data, options.task)
        ends.callback(clean.close)
        clean, task, classes = _probe(model, clean, options.task, device, notes)
        clean.check(classes)
        tuned, heldout = clean.split(config.holdout, seed)
        heldout = None if heldout is None else heldout.in_memory()
    notes += clean.notes
    with seeded(seed, device):
        choose_layout(work, clean, task, device)
        notes += check_fit(model, clean, task, classes, device, options.force)
    run = Run(
        model=model,
        task=task,
        clean=tuned,
        heldout=heldout,
        config=config,
        device=device,
        generator=torch.Generator(device="cpu").manual_seed(seed),
        given=clean.n,
        classes=classes,
        amp=autocast_dtype(options.amp, device),
        seed=seed,
        notes=notes,
        alerts=list(options.alerts),
        frozen=work.frozen(options.frozen == "keep"),
        seconds=dict.fromkeys(("fisher", "svd", "train", "score", "evaluation"), 0.0),
    )
    if tuned.n < 2 and config.bn_mode == "train" and run.batchnorms:
        run.config = config.replace(bn_mode="eval")
        run.note("one clean sample has no batch statistics: BatchNorm is kept in eval mode")
    with run.timed("evaluation"):
        scorer = Scorer(run, work, options.test_loader, options.asr_loader, options.measure)
    with seeded(seed, device):
        before = scorer.measure()
    # Seeded anew, so that the weights do not depend on whether anything was measured.
    with seeded(seed, device), torch.autocast(device.type, enabled=False), _recurrent(model):
        if work.is_low_precision:
            in_full_precision(work, run)
        history = fit(run, options.recipe(), options.progress, options.callbacks)
        work.to_own_dtype()
        run.task = task
    try:
        with seeded(seed, device):
            after = scorer.measure()
    except KeyboardInterrupt:  # what was tuned must not be lost with the figures
        run.interrupted = True
        after = Evaluation(on=scorer.on, notes=("interrupted while measuring the purified model",))
    run.notes += [note for note in after.notes if note not in run.notes]
    _say_loss(run, before, after)
    return run, history, before, after


def _coverage(work: WorkCopy, run: Run, method: str, moved: set[str]) -> Coverage:
    """Say what was tuned, and of the rest why not; a model that is as it was received must not pass for a clean one."""
    tuned, left = [], {}
    for name, p in work.model.named_parameters():
        if name in moved:
            tuned.append(name)
        elif id(work.parameters[name]) in run.frozen:
            left[name] = "frozen, and frozen='keep'"
        elif not p.is_floating_point():
            left[name] = "no real numbers"
        else:
            left[name] = run.left.get(name, f"nothing that {method} tunes, or no gradient moved it")
    if not moved:
        ended = "interrupted" if run.interrupted else "try a larger lr or more steps"
        run.alert(f"THE MODEL IS AS IT WAS GIVEN: {method} moved nothing ({ended})")
    sizes = {name: p.numel() for name, p in work.model.named_parameters()}
    return Coverage(tuple(tuned), left, sum(sizes[name] for name in tuned), sum(sizes.values()))


def _recurrent(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    # cuDNN's recurrent layers have no backward pass in eval mode, in which all but BatchNorm and dropout is tuned.
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        return torch.backends.cudnn.flags(enabled=False)
    return contextlib.nullcontext()


def _say_loss(run: Run, before: Evaluation, after: Evaluation) -> None:
    """A net that was ruined must not pass for a clean one: ASR is low there as well."""
    if before.acc is not None and after.acc is not None and before.acc - after.acc > WORRYING_LOSS:
        run.note(
            f"clean accuracy fell by {100 * (before.acc - after.acc):.1f} points: the net was moved too far, "
            f"try a smaller lr (now {run.config.lr:g}) or more clean samples"
        )
        if before.acc - after.acc > RUINED:
            run.alert(f"RUINED, clean accuracy fell from {100 * before.acc:.1f} to {100 * after.acc:.1f} %")


def _probe(
    model: nn.Module, clean: CleanSet, task: Task, device: torch.device, notes: list[str]
) -> tuple[CleanSet, Task, int | None]:
    """Run the net once; return the clean set, the task (of logits) and C, None where `loss=` takes other outputs."""
    batch = next(iter(clean.batches(min(clean.batch_size, clean.n), device=device)))
    logits = first_outputs(model, task.forward, batch)
    for number, odd in clean.forms:
        first_outputs(model, task.forward, move_to(odd, device), f"the clean data (batch {number})")
    two = binary_task(task, logits, batch) if is_one_logit(logits, task.size(batch)) else None
    if two is not None:
        notes.append("one logit, and labels 0 and 1: tuned and measured as two classes")
        return clean.of_two_classes(), two, 2
    if task.loss_hook is not None:
        plain = logits.dim() == 2 and logits.shape[1] > 1 and clean.labels is not None
        plain = plain and int(clean.labels.max()) < logits.shape[1]  # type: ignore[union-attr]  # else they mean something else to it
        return clean, task, logits.shape[1] if plain else None
    task, said = logits_task(model, task, batch, logits)
    if said is not None:
        notes.append(said)
    task.loss(logits.detach(), batch)  # says what is wrong where logits and labels do not fit
    return clean, task, logits.shape[1]
