"""`purify`: a backdoored net and a few clean samples in, a clean net out."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import fastfip
from fastfip.data.batch import Batch
from fastfip.data.task import Forward, Loss, Task
from fastfip.errors import ConfigError, ModelError
from fastfip.methods import Method, MethodConfig, get
from fastfip.methods.run import Run
from fastfip.nets.checks import check_seed, of_checkpointing, usable_device
from fastfip.nets.process import PeakMemory, computed_again_alike, seeded
from fastfip.nets.state import as_written, is_sharded, without_caches
from fastfip.purification.callbacks import Callback
from fastfip.purification.door import BY_PRETRAINED, FEW_SAMPLES, MANY, by_data, by_settings, chosen_of, config_of
from fastfip.purification.no_data import DRAWN, NO_DATA, without_data
from fastfip.purification.result import PurifyResult
from fastfip.purification.tuning import PurifyOptions, coverage_of, tune
from fastfip.purification.workcopy import WorkCopy

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastfip.methods.overrides import Overrides
    from fastfip.nets.shards import Shards
    from fastfip.purification.resume import Resume

__all__ = ["purify", "purify_"]


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
    micro_batch: int | None = None,
    memory: int | str | None = None,
    gradient_checkpointing: bool | str = "auto",
    group: Any = "auto",
    resume: str | os.PathLike[str] | Resume | None = None,
    resume_every: float = 60.0,
    pretrained: nn.Module | Mapping[str, Any] | str | os.PathLike[str] | None = None,
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
            fewer than 200 clean samples, no point clouds, no `loss=` and no settings; `fine_mixing` with `pretrained=`;
            `clp` without data and settings.
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
        inplace: work on the model itself; after an error it is as it was. A model that is sharded over processes
            (`fully_shard`, DTensors) is purified so only, see docs/distributed.md.
        force: go on where model and data do not seem to fit each other. Without it a model is refused, before anything
            is tuned, that is clearly right on less than half of what guessing leaves (its accuracy on the clean set is,
            with a confidence of 99.9 %, below (1 + 1/C) / 2), and that either cannot be told from guessing (a binomial
            test against 1/C, at 1 %) or has a mean loss clearly above ln C, that of a model that knows nothing. Few
            samples decide less: ten right ones of 24 in three classes are not refused. With `loss=` it is only a note.
        frozen: "keep": parameters with `requires_grad=False` stay as they are, to the bit, where others have it True (a
            frozen backbone, the base of a LoRA model); "tune": they are tuned as well. Where all are frozen, as in a
            model for inference, that says nothing about purification, and all are tuned.
        micro_batch: samples that go through the model together, at most; None: whole batches (`fisher_steps` on a CPU
            may choose a number for point clouds). A step's gradient is the same: that of the batch's parts, weighted by
            their sizes. Only BatchNorm in train mode takes its statistics from the parts (of two samples at least),
            and a note says so. Spectral methods then keep no second copy of the weights either. For methods whose step
            is a sum over samples. Of several processes, in each of them.
        memory: a budget, e.g. "12GB" or bytes: of the whole process's resident memory on a CPU, of tensors on a CUDA
            device. It chooses `micro_batch` by passes of one sample and of two, and notes what it chose. Where not even
            one sample has room, it turns `gradient_checkpointing` on in a process alone; on a CPU the C library then
            gives freed memory back at once, for the rest of the process.
        gradient_checkpointing: True: parts of the model, those that keep most, keep only their inputs for the backward
            pass and are computed again in it: steps are the same, take less memory and one more forward pass. What the
            gradients of each sample are taken for goes one sample at a time then, which takes longer. "auto": only
            where `memory=` needs it, and in one process. False: never. Checkpoints of the model's own stay as they are,
            see docs/scale.md.
        input_shape: without data, (channels, height, width) of the model's inputs; None: found out where it can be.
        group: the processes that share the work, see docs/distributed.md. "auto": those of the default group of
            torch.distributed, if it is initialised: every one of them has to make the same call, and gets the same
            result. None: this process alone. Or a process group.
        resume: a file, such as "run.resume". What a killed run needs to go on is written there now and then; where the
            file exists, the run goes on from it and ends with the weights that it would have ended with. It belongs to
            this model, clean set, method, settings and seed, and is removed at the end. For the methods
            `fisher_steps`, `fast_wfip`, `wfip`, `fast_fip`, `fip`, `fine_tune` and `ft_sam`.
        resume_every: seconds between two writings of that file, at least.
        pretrained: the model that the given one was fine-tuned from, for `fine_mixing`: a module, its state dict, a
            file, or a folder of `save_pretrained`. It is found by names, whose prefixes may be others, and shapes; what
            it lacks (a new head) stays. It has to come from a source of its own that is trusted.
        **overrides: settings of the method by name, e.g. `lr=0.02`.

    Returns:
        the purified model, what was measured before and after, and how it went.

    Raises:
        DataError: clean data that cannot be used: empty, uint8 images, labels out of range or no class indices. Or no
            data and no BatchNorm.
        ModelError: a model that cannot be used, or a loss that is never finite.
        ConfigError: an unknown method or setting (the nearest is named), or a value out of its range.
        BackendError: a device that is not here; a process of the group that does not come, or that fails (nothing is
            changed then).
    """
    start = time.perf_counter()
    few, seed = False, check_seed(seed)
    said: tuple[str, ...] = ()
    if not isinstance(inplace, bool):
        raise ConfigError(f"inplace={inplace!r}: must be True or False")
    shards, whole, drawn = None, None, clean_loader is None
    if isinstance(model, nn.Module) and is_sharded(model):
        from fastfip.purification.ranked import parts_of

        shards = parts_of(model, group, inplace)
    if clean_loader is None and pretrained is not None:
        raise ConfigError("pretrained= needs clean samples as well: pass them, or leave it out")
    if clean_loader is None:
        model = model if shards is None else shards.twin
        method = NO_DATA if method == "auto" and not (config or overrides or steps or epochs) else method
        clean_loader, said = without_data(model, input_shape, forward, seed, method)
        config = DRAWN if config is None and method in ("auto", MANY) else config
    elif input_shape is not None:
        raise ConfigError(f"input_shape={input_shape!r} is for purify without data: leave it out, the samples tell it")
    if method == "auto" and pretrained is not None:
        method = BY_PRETRAINED
    if method == "auto":
        task = Task.of(forward, loss)
        method = by_settings(config) if config or overrides else by_data(model, clean_loader, task, seed)
        few = method != MANY and not config
    recipe = get(method) if isinstance(method, str) else method
    if not (isinstance(recipe, type) and issubclass(recipe, Method)):
        raise ConfigError(
            f"method={method!r}: give the name of a method, such as 'fisher_steps', 'auto', or a class of one"
        )
    if pretrained is not None and not recipe.needs_pretrained:
        raise ConfigError(f"pretrained= is for {BY_PRETRAINED}: {recipe.name} does not ask for it, leave it out")
    if pretrained is None and recipe.needs_pretrained:
        raise ConfigError(
            f"{recipe.name} needs the model that the given one was fine-tuned from: pretrained=, a module, a state "
            "dict, a file or a folder"
        )
    work_device = None if device is None else usable_device(device)
    measure = (measure,) if isinstance(measure, str) else tuple(measure)
    if gradient_checkpointing is True and _group_of(group) is not None:
        raise ConfigError("gradient_checkpointing=True is for one process: leave it out, and take micro_batch=")
    if shards is not None:
        from fastfip.purification.sharded import why_whole

        whole = why_whole(shards, recipe, work_device, amp, resume is not None, measure, drawn, memory is not None)
        model = model if whole is None else shards.twin
    options = PurifyOptions(
        clean_loader=clean_loader,
        recipe=recipe,
        config=config_of(recipe, config, steps, epochs, overrides),
        task=Task.of(forward, loss),
        seed=seed,
        device=work_device,
        amp=amp,
        progress=progress,
        callbacks=callbacks,
        test_loader=test_loader,
        asr_loader=asr_loader,
        measure=measure,
        force=force,
        frozen=frozen,
        group=_group_of(group),
        resume=None if resume is None else _resume_of(resume, resume_every),
        notes=(FEW_SAMPLES,) if few else (),
        alerts=said,
        micro_batch=micro_batch,
        memory=memory,
        gradient_checkpointing=gradient_checkpointing,
        shards=shards,
        whole=whole,
        chosen=chosen_of(config, steps, epochs, overrides),
        pretrained=pretrained,
    )
    # Somebody else's no_grad or inference_mode around the call would leave nothing to tune with.
    with torch.inference_mode(False), torch.enable_grad(), as_written(model):
        work = _work_on(model, inplace, recipe, shards if whole is None else None)
        work_device = work.device if options.device is None else options.device
        try:
            with PeakMemory(work_device) as used, seeded(options.seed, work_device), ExitStack() as ends:
                ends.enter_context(without_caches(work.model))
                ends.enter_context(computed_again_alike(work.model))
                run, history, before, after = tune(work, work_device, options, ends)
            moved = work.moved()
            result = work.finish(recipe.name)
            coverage = coverage_of(work, run, recipe.name, moved)
            if shards is not None and whole is not None:
                shards.write_back()
                result = shards.model
            if options.resume is not None:
                options.resume.finish(run)
        except BaseException as error:
            work.undo()
            if of_checkpointing(error):
                raise ModelError(
                    f"{recipe.name} goes through the model in ways that gradient checkpointing cannot follow: turn it "
                    "off (model.gradient_checkpointing_disable(), in timm model.set_grad_checkpointing(False)), or "
                    "take fine_tune"
                ) from error
            raise
    # After a resume the parts have the time of the run that was broken off as well.
    run.seconds["total"] = max(time.perf_counter() - start, sum(run.seconds.values()))
    return PurifyResult(
        model=result,
        method=recipe.name,
        before=before,
        after=after,
        history=history,
        seconds=run.seconds,
        peak_memory=used.peak,
        settings={
            "config": run.config.to_dict(),
            "seed": seed,
            "device": str(work_device),
            "amp": amp,
            "clean_samples": run.given,
            "left_out_samples": run.left_out,
            "heldout_samples": 0 if run.heldout is None else run.heldout.n,
            "steps": run.step,
            "best_epoch": run.best_epoch,
            "peak_memory_of": used.what,
            "micro_batch": run.micro_batch,
            "gradient_checkpointing": bool(run.blocks),
            "inputs": run.inputs,
            "classes": run.classes,
            "chosen": sorted(run.chosen),
            "arguments": _arguments(
                forward=forward,
                loss=loss,
                force=force,
                frozen=frozen,
                input_shape=input_shape,
                pretrained=os.fspath(pretrained) if isinstance(pretrained, os.PathLike) else pretrained,
            ),
            **_ranks_of(run),
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
        found=run.found,
    )


def _arguments(**given: Any) -> dict[str, str]:
    """Return those that are not as usual, by name, as they are written in Python; a function by the argument's name."""
    usual = {"force": False, "frozen": "keep"}
    changed = {name: value for name, value in given.items() if value is not None and value != usual.get(name)}
    return {
        name: name if callable(value) or isinstance(value, Mapping) else repr(value) for name, value in changed.items()
    }


def _work_on(model: nn.Module, inplace: bool, recipe: type[Method], shards: Shards | None) -> WorkCopy:
    if shards is None:
        return WorkCopy(model, inplace, recipe.lends_weights)
    from fastfip.purification.sharded import PartsCopy

    return PartsCopy(shards)


def _group_of(group: Any) -> Any:
    alone = group is None or (isinstance(group, str) and group == "auto" and not _in_a_group())
    if alone:
        return None
    from fastfip.nets.ranks import group_of

    return group_of(group)


def _resume_of(resume: Any, every: float) -> Resume:
    from fastfip.purification.resume import Resume

    return resume if isinstance(resume, Resume) else Resume(resume, every)


def _in_a_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _ranks_of(run: Run) -> dict[str, Any]:
    if run.ranks is None:
        return {}
    from fastfip.purification.ranked import traffic

    return {"ranks": traffic(run.ranks, run.step)}


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
