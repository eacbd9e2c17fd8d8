"""What one purification does: measure, tune, measure again; and what it was asked for."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastfip.data.batch import Batch, move_to, pick
from fastfip.data.cleanset import CleanSet, class_indices
from fastfip.data.outputs import binary_task, first_outputs, is_one_logit, logits_task
from fastfip.data.stores import kept
from fastfip.data.task import Task, iter_batches
from fastfip.errors import ConfigError, DataError, FastFIPError, reason
from fastfip.methods import Method, MethodConfig
from fastfip.methods.run import Run, autocast_dtype
from fastfip.metrics.evaluation import Evaluation, evaluate
from fastfip.nets.blocks import checkpointed
from fastfip.nets.checks import check_amp, check_gradient_checkpointing
from fastfip.nets.process import seeded
from fastfip.nets.state import is_part, requires_grad
from fastfip.purification.callbacks import Callback
from fastfip.purification.door import check_fit, choose_layout, with_answers
from fastfip.purification.loop import fit
from fastfip.purification.result import Coverage
from fastfip.purification.workcopy import WorkCopy, in_full_precision

if TYPE_CHECKING:
    from fastfip.nets.shards import Shards
    from fastfip.purification.resume import Resume

__all__ = ["MEASURES", "PurifyOptions", "coverage_of", "tune"]


#: What `measure=` may name.
MEASURES = ("acc", "asr", "fisher_trace")
#: Clean samples on which the Fisher trace before and after is taken, at most.
TRACE_SAMPLES = 256
#: Samples that go through the model together before it is known how many `memory=` has room for.
FEW_TOGETHER = 2
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
    group: Any = None
    resume: Resume | None = None
    notes: tuple[str, ...] = ()
    alerts: tuple[str, ...] = ()
    micro_batch: int | None = None
    memory: int | str | None = None
    gradient_checkpointing: bool | str = "auto"
    shards: Shards | None = None
    whole: str | None = None
    chosen: frozenset[str] = frozenset()
    pretrained: Any = None

    @property
    def in_parts(self) -> bool:
        """Return whether batches go through the model in parts."""
        return self.micro_batch is not None or self.memory is not None

    def __post_init__(self) -> None:
        check_amp(self.amp)
        if self.frozen not in ("keep", "tune"):
            raise ConfigError(f"frozen={self.frozen!r}: must be 'keep' or 'tune'")
        check_gradient_checkpointing(self.gradient_checkpointing)
        odd = [name for name in self.measure if name not in MEASURES]
        if self.in_parts:
            from fastfip.purification.memory import check_micro_batch

            check_micro_batch(self.micro_batch, self.memory, self.recipe)
        if odd:
            raise ConfigError(f"measure={self.measure!r}: must be some of {', '.join(MEASURES)}")


def _within_memory(run: Run, options: PurifyOptions) -> tuple[nn.Module, ...]:
    """Let batches go through the model in parts, as small as was given, or as the memory has room for.

    Returns:
        The modules of the model to checkpoint.
    """
    from fastfip.purification.again import blocks_of, has_checkpoints
    from fastfip.purification.memory import choose, note_statistics, parse_memory

    alone = run.ranks is None  # of several processes each would look at, and find, its own
    with seeded(options.seed, run.device):
        blocks = blocks_of(run) if options.gradient_checkpointing is True else ()
        run.checkpointed = bool(blocks) or (alone and options.in_parts and has_checkpoints(run))
        if options.memory is not None:
            free = options.gradient_checkpointing == "auto" and alone
            budget = parse_memory(options.memory)
            run.micro_batch, blocks = choose(run, options.recipe, budget, None if free else blocks)
            run.task = replace(run.task, most=run.micro_batch)
            run.checkpointed |= bool(blocks)
    note_statistics(run)
    return blocks


def tune(
    work: WorkCopy, device: torch.device, options: PurifyOptions, ends: ExitStack
) -> tuple[Run, list[dict[str, Any]], Evaluation, Evaluation]:
    """Measure, tune and measure again; return the run, its history and both evaluations."""
    notes, known = list(options.notes), None
    if options.pretrained is not None:
        from fastfip.purification.pretrained import pretrained_values

        known, said = pretrained_values(options.pretrained, work.model, work.frozen(options.frozen == "keep"))
        notes.append(said)
    few = FEW_TOGETHER if options.micro_batch is None and options.memory is not None else options.micro_batch
    options = replace(options, task=replace(options.task, most=few))
    seed, config = options.seed, options.config
    work.to(device)
    model = work.model.eval()
    ranks = None
    if options.group is not None:
        from fastfip.purification.ranked import begin, clean_of_all, over_ranks

        given = {"methods": options.recipe.name, "settings": str(config.to_dict()), "seeds": seed, "amp=": options.amp,
                 "micro_batch=": options.micro_batch, "memory=": options.memory is not None}  # fmt: skip
        sharded = options.shards is not None
        ranks = ends.enter_context(begin(options.recipe, options.group, work.given, given, device, sharded))
    walk = None
    if work.shards is not None and ranks is not None:
        from fastfip.purification.sharded import own_passes, walked_by_all

        ends.enter_context(own_passes(work.shards, ranks))
        walk = functools.partial(walked_by_all, ranks=ranks)
    with seeded(seed, device):
        data, answered = with_answers(model, options.clean_loader, options.task, device, walk)
        if answered:
            notes.append(
                "no labels were given: the received model's own answers were taken for them, so that its accuracy on "
                "these samples says nothing, nor whether they are scaled as it expects"
            )
        clean = CleanSet.of(data, options.task) if ranks is None else clean_of_all(data, options.task, ranks, notes)
        ends.callback(clean.close)
        inputs: dict[str, Any] = {}
        if work.shards is not None:
            notes.append(f"each of {work.shards.world} processes worked on its parts of the weights")
        elif options.shards is not None:
            few = next(iter(clean.batches(min(FEW_TOGETHER, clean.n), device=device)))
            options.shards.compare(options.task.forward, few)
            world, why = options.shards.world, options.whole
            notes.append(f"each of {world} processes gathered all weights, and took its parts back: {why}")
        clean, task, classes = _probe(model, clean, options.task, device, notes, inputs)
        clean.check(classes)
        tuned, heldout = clean.split(config.holdout, seed)
        heldout = None if heldout is None else heldout.in_memory()
    notes += clean.notes
    with seeded(seed, device):
        if work.shards is None:
            frugal = options.memory is not None or options.gradient_checkpointing is True
            choose_layout(work, clean, task, device, 1 if frugal else task.most)
        notes += check_fit(model, clean, task, classes, device, options.force)
    run = Run(
        model=model,
        task=task if ranks is None else over_ranks(task, ranks),
        clean=tuned,
        heldout=heldout,
        config=config,
        device=device,
        generator=torch.Generator(device="cpu").manual_seed(seed),
        given=clean.n,
        chosen=options.chosen,
        classes=classes,
        amp=autocast_dtype(options.amp, device),
        seed=seed,
        notes=notes,
        alerts=list(options.alerts),
        ranks=ranks,
        shards=work.shards,
        frozen=work.frozen(options.frozen == "keep"),
        received=work.received,
        pretrained=known,
        micro_batch=options.micro_batch,
        seconds=dict.fromkeys(("fisher", "svd", "train", "score", "evaluation"), 0.0),
        inputs=inputs,
    )
    del known
    if tuned.n < 2 and config.bn_mode == "train" and run.batchnorms:
        run.config = config.replace(bn_mode="eval")
        run.note("one clean sample has no batch statistics: BatchNorm is kept in eval mode")
    if options.in_parts or options.gradient_checkpointing is True:
        run.blocks = _within_memory(run, options)
        ends.enter_context(checkpointed(run.blocks))
        task = run.task
    with run.timed("evaluation"):
        scorer = Scorer(run, task, work, options.test_loader, options.asr_loader, options.measure)
    with seeded(seed, device):
        before = scorer.measure()
    progress = options.progress if ranks is None or ranks.first else False
    # Seeded anew, so that the weights do not depend on whether anything was measured.
    with seeded(seed, device), torch.autocast(device.type, enabled=False), _recurrent(model):
        if work.is_low_precision:
            in_full_precision(work, run)
        history = fit(run, options.recipe(), progress, options.callbacks, options.resume)
        work.to_own_dtype()
        if ranks is not None:
            ranks.settle([t for t in (*work.model.parameters(), *work.model.buffers()) if not is_part(t)])
        run.task = task
    try:
        with seeded(seed, device):
            after = scorer.measure()
    except KeyboardInterrupt:  # what was tuned must not be lost with the figures
        if ranks is not None:
            raise
        run.interrupted = True
        after = Evaluation(on=scorer.on, notes=("interrupted while measuring the purified model",))
    except (DataError, OSError) as error:  # nor with a stream that gives its samples once, or a file that is gone
        run.alert(f"THE PURIFIED MODEL WAS NOT MEASURED: {reason(error)}")
        after = Evaluation(on=scorer.on)
    run.notes += [note for note in after.notes if note not in run.notes]
    _say_loss(run, before, after)
    return run, history, before, after


def coverage_of(work: WorkCopy, run: Run, method: str, moved: set[str]) -> Coverage:
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
    model: nn.Module, clean: CleanSet, task: Task, device: torch.device, notes: list[str], inputs: dict[str, Any]
) -> tuple[CleanSet, Task, int | None]:
    """Run the net once; return the clean set, the task (of logits) and C, None where `loss=` takes other outputs.

    `inputs` gets the shape and the range of the first batch, for the report.
    """
    batch = next(iter(clean.batches(min(clean.batch_size, clean.n), device=device)))
    inputs.update(_facts(task, batch))
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


def _facts(task: Task, batch: Batch) -> dict[str, Any]:
    """Say what inputs are like; nothing where it is not known which part of a batch they are."""
    try:
        x = task.inputs(batch)
    except FastFIPError:
        return {}
    facts: dict[str, Any] = {"shape": list(x.shape[1:]), "dtype": str(x.dtype).removeprefix("torch."), "of": len(x)}
    if x.is_floating_point() and x.numel():
        facts.update(low=float(x.min()), high=float(x.max()), mean=float(x.mean()), std=float(x.std(unbiased=False)))
    return facts


class Scorer:
    """Measures before and after on the same data."""

    def __init__(
        self,
        run: Run,
        task: Task,
        work: WorkCopy,
        test_loader: Iterable[Batch] | None,
        asr_loader: Iterable[Batch] | None,
        measure: tuple[str, ...],
    ) -> None:
        self.run, self.work, self.task, self.measured = run, work, task, measure
        self.test, self.asr = _walked_again(test_loader), _walked_again(asr_loader)
        if run.shards is not None and run.ranks is not None:
            from fastfip.purification.sharded import FromFirst

            self.test, self.asr = (FromFirst.of(data, run.ranks, task) for data in (self.test, self.asr))
        if run.clean.binary and self.test is not None:
            self.test = [class_indices(batch) for batch in iter_batches(self.test, Task(loss_hook=run.task.loss))]
        self.on = "test_loader"
        if self.test is None and "acc" in measure:
            own = run.clean if run.heldout is None else run.heldout
            what = "clean samples tuned on" if run.heldout is None else "held-out clean samples"
            self.clean = own.in_memory()
            self.on = f"{self.clean.n} {what}"
            run.note(f"no test_loader: ACC and loss are of the {self.on}")
        given = [name for name, data in (("test_loader", test_loader), ("asr_loader", asr_loader)) if data is not None]
        if given:
            run.note(
                f"{' and '.join(given)} only scored: nothing was selected by {'it' if len(given) == 1 else 'them'}"
            )
        self.sample: list[Batch] = []
        if "fisher_trace" in measure:
            order = itertools.islice(run.clean.batches(TRACE_SAMPLES // 4, device=run.device), 4)
            parts = [part for batch in order for part, _ in run.parts(batch)]
            if run.checkpointed:  # a graph of several samples would be computed again for each of them
                parts = [pick(part, n, task.size(part)) for part in parts for n in range(task.size(part))]
            self.sample = parts  # kept, so that augmentation does not change it between before and after

    def measure(self) -> Evaluation:
        """Return the figures of the model as it is now; its time counts as evaluation."""
        run = self.run
        with run.timed("evaluation"):
            measured = evaluate(
                run.model,
                None if "acc" not in self.measured else self.clean.batches() if self.test is None else self.test,
                self.asr if "asr" in self.measured else None,
                forward=self.task.forward,
                loss=self.task.loss_hook,
            )
            measured = replace(measured, on=self.on, fisher_trace=self.trace() if self.sample else None)
        return measured if run.ranks is None else run.ranks.from_first(measured)

    def trace(self) -> float | None:
        """Tr(F) of the empirical Fisher of all parameters, in eval mode; None and a note where it cannot be taken."""
        from fastfip.fisher import trace_and_logits

        task = self.task
        if self.work.is_low_precision:  # squares of small gradients would underflow
            self.work.to_float32()
            task = task.in_float32()
        try:
            with self.run.eval_mode(), requires_grad(self.run.model.parameters(), True):
                parts = [
                    (float(trace_and_logits(self.run.model, batch, task, create_graph=False).trace), task.size(batch))
                    for batch in self.sample
                ]
            return sum(trace * n for trace, n in parts) / sum(n for _, n in parts)
        except (FastFIPError, RuntimeError, NotImplementedError) as error:
            self.run.note(f"Fisher trace not measured: {reason(error)}")
            return None
        finally:
            if self.work.is_low_precision:
                self.work.to_own_dtype()


def _walked_again(data: Any) -> Any:
    """A generator is kept, so that it can be walked before and after."""
    return kept(data) if isinstance(data, Iterator) else data
