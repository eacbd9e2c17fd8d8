"""How much of a batch goes through the model together, and how that is chosen for a budget of memory.

The memory of a purification, in bytes above what the process has when the model was received:

    copies + factors + optimiser + data + max(decomposition, step, scratch + constant + m * per_sample)

with m = micro_batch, or 2.2 where that is less, the Fisher diagonal is measured and nothing is checkpointed.

The first four, the decomposition and the step are arithmetic; `constant` and `per_sample` are measured, by passes of
one sample and of two. docs/scale.md has the terms for large models, and what they are worth against measurement.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fastfip.data.batch import take
from fastfip.errors import ConfigError, ModelError
from fastfip.methods import Method
from fastfip.methods._screen import CANDIDATES
from fastfip.methods._search import SEARCH_BATCH
from fastfip.methods.run import Run
from fastfip.nets.blocks import checkpointed
from fastfip.nets.counting import tensor_peak
from fastfip.nets.process import resident_memory
from fastfip.nets.state import LOW_PRECISION, still_received
from fastfip.purification.again import blocks_of, first_samples, small_gradients
from fastfip.spectral.places import places_of

__all__ = [
    "MemoryModel",
    "check_micro_batch",
    "choose",
    "fixed_memory",
    "note_statistics",
    "parse_memory",
    "takes_parts",
]

#: Buffers of the size of what is tuned, beside the weights themselves: the gradient, the momentum, and the last good
#: state of the loop; where the best one is chosen by its score, that one as well.
BUFFERS = 3
#: Buffers that are there while no pass runs: the state that takes the last one's place; in `fisher_steps` the step, and
#: the weights from before the measurement of its length.
STEP_BUFFERS = {"fisher_steps": 2}
#: Methods that keep the weights that tuning may begin anew with.
BEGIN_ANEW = ("fine_mixing",)
#: Methods that keep the received values, and share them with the given model where their layout has stayed.
KEEP_RECEIVED = ("fisher_steps", "wfip")
#: Memory of the Fisher diagonal of one sample, in passes of one sample: what each layer's gradient is made of is kept.
#: It was 2.1 on two vision transformers; parts are made by the larger `FISHER_SHARE` of `methods/_space.py`.
FISHER_SAMPLE = 2.2
#: Copies of the largest matrix in float64 that its decomposition takes.
WIDE = 4
#: glibc's number of the size from which blocks are the system's own; set, it does not grow by itself.
_M_MMAP_THRESHOLD = -3
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def takes_parts(recipe: type[Method]) -> bool:
    """Return whether a method can take a step's batch in parts: with the base's `backward`, or one that says so."""
    return recipe.takes_parts or recipe.backward is Method.backward


def check_micro_batch(micro_batch: int | None, memory: int | str | None, recipe: type[Method]) -> None:
    """Refuse a micro_batch or a budget that is none, or that the method has no use for.

    Raises:
        ConfigError: with the remedy.
    """
    if micro_batch is None and memory is None:
        return
    if micro_batch is not None and memory is not None:
        raise ConfigError(f"micro_batch={micro_batch} and memory={memory!r}: the second chooses the first, give one")
    whole = isinstance(micro_batch, int) and not isinstance(micro_batch, bool)
    if micro_batch is not None and (not whole or micro_batch < 1):
        raise ConfigError(f"micro_batch={micro_batch!r}: give a number of samples, 1 or more, or None")
    given = f"memory={memory!r}" if micro_batch is None else f"micro_batch={micro_batch}"
    if memory is not None:
        parse_memory(memory)
    if not takes_parts(recipe):
        raise ConfigError(
            f"{given}: a step of {recipe.name} is no sum over samples that could go through the model "
            "in parts: leave it out and take a smaller batch_size, or take fisher_steps, fast_wfip or fine_tune"
        )


def note_statistics(run: Run) -> None:
    """Say where parts are not the same as the whole batch."""
    if run.micro_batch is not None and run.config.bn_mode == "train" and run.batchnorms:
        run.note(
            f"micro_batch={run.micro_batch}: BatchNorm is in train mode and takes its statistics from each part of a "
            "batch, so steps are not those of whole batches (bn_mode='eval' makes them so)"
        )


def parse_memory(memory: int | str) -> int:
    """Return bytes: of a whole number, or of text such as "12GB" (10^9) or "12GiB" (2^30).

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return memory
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", memory.lower()) if isinstance(memory, str) else None
    size = 0 if found is None else int(float(found[1]) * _UNITS[found[2] or ""])
    if size <= 0:
        raise ConfigError(f"memory={memory!r}: give a number of bytes, or a text such as '12GB' or '500MiB'")
    return size


@dataclass(frozen=True)
class MemoryModel:
    """The terms, in bytes; see the module.

    Attributes:
        now: what is there before a run, the given model and its copy included.
        factors: U and V of the weights. optimiser: gradients, momentum and states of what is tuned.
        copies: weights in another dtype. data: perturbations and batches.
        decomposition: what the largest one takes for its time. step: what is there between passes only.
        scratch: memory that spectral layers share. constant, per_sample: what a pass forward and backward takes.
        least: a single sample takes as much as so many, where the Fisher diagonal is measured.
    """

    now: int = 0
    copies: int = 0
    factors: int = 0
    optimiser: int = 0
    data: int = 0
    decomposition: int = 0
    step: int = 0
    scratch: int = 0
    constant: int = 0
    per_sample: int = 0
    least: float = 1

    @property
    def fixed(self) -> int:
        """Return what does not depend on how many samples go through the model together."""
        return self.now + self.copies + self.factors + self.optimiser + self.data

    def peak(self, micro_batch: int) -> int:
        """Return the peak with so many samples in a pass."""
        samples = max(micro_batch, self.least)
        passes = self.scratch + self.constant + int(samples * self.per_sample)
        return self.fixed + max(self.decomposition, self.step, passes)

    def samples(self, budget: int) -> int:
        """Return how many samples a pass may have within a budget; 0: not even one."""
        if self.peak(1) > budget:
            return 0
        left = budget - self.fixed - self.scratch - self.constant
        return max(1, left // max(1, self.per_sample))


def fixed_memory(
    model: nn.Module,
    recipe: type[Method],
    *,
    optimizer: str = "sgd",
    rank: int | float | None = None,
    best: bool = False,
    frozen: frozenset[int] = frozenset(),
    classes: int = 0,
    input_bytes: int = 0,
    clean_bytes: int = 0,
) -> MemoryModel:
    """Return the terms that are arithmetic, for a run in parts (`micro_batch`).

    Args:
        model: the working copy; its numbers are not read, so it may be on the meta device.
        recipe: the method.
        optimizer: "sgd" or "adam".
        rank: directions of each weight that a spectral method moves.
        best: the best epoch is kept, beside the last.
        frozen: ids of parameters that stay.
        classes: C, of the worst-case perturbations; 0: none are looked for.
        input_bytes: of one input.
        clean_bytes: of all clean inputs that the search looks at together, twice.
    """
    tuned = [p for p in model.parameters() if p.is_floating_point() and id(p) not in frozen]
    wide = sum(p.numel() * max(4, p.element_size()) for p in tuned)
    copies = wide - sum(p.nbytes for p in tuned)
    rows = classes * input_bytes
    step = min(classes, SEARCH_BATCH) * input_bytes  # of a step: sums, rows and their like
    data = (rows // 2 if rows > 256 << 20 else rows) + 3 * step + 2 * clean_bytes + SEARCH_BATCH * input_bytes
    if not recipe.lends_weights:
        buffers = BUFFERS + (optimizer == "adam") + best + (recipe.name in BEGIN_ANEW)
        step = STEP_BUFFERS.get(recipe.name, 0 if best else 1) * wide
        return MemoryModel(copies=copies, optimiser=buffers * wide, step=step, data=data if classes else 0)
    factors, largest, seen, deltas = 0, 0, set(), 0
    for place in places_of(model, frozen, {}):
        weight: Any = place.module._parameters[place.attribute]
        if id(weight) in seen:
            continue
        seen.add(id(weight))
        columns = weight.numel() // (place.groups * place.rows)
        k = min(place.rows, columns, rank if isinstance(rank, int) else columns)
        factors += 4 * place.groups * k * (place.rows + columns)
        deltas += 4 * place.groups * k
        largest = max(largest, weight.numel())
    few = deltas + sum(p.numel() * 4 for p in tuned if p.dim() <= 1)
    return MemoryModel(
        copies=copies,
        factors=factors,
        optimiser=8 * few,  # gradient, two moments, mean of states, Fisher, states of the loop
        data=data if classes else 0,
        decomposition=8 * WIDE * largest,
        scratch=8 * largest,
        least=FISHER_SAMPLE,
    )


def choose(
    run: Run, recipe: type[Method], budget: int, blocks: tuple[nn.Module, ...] | None
) -> tuple[int, tuple[nn.Module, ...]]:
    """Return how many samples may go through the model together within a budget, and note it.

    Args:
        run: before its method is set up.
        recipe: the method.
        budget: bytes: of the process's resident memory on a CPU, of tensors on a CUDA device.
        blocks: modules that are checkpointed; None: such as are found, if it does not go without.

    Returns:
        The number of samples, and the modules to checkpoint.

    Raises:
        ConfigError: not even one sample fits (two, where BatchNorm takes statistics from the part).
    """
    least = 2 if run.config.bn_mode == "train" and run.batchnorms else 1
    model = measured(run, recipe, blocks or ())
    fits = model.samples(budget)
    if fits < least and blocks is None and replace(model, constant=0, per_sample=0).peak(least) <= budget:
        blocks = _found(run)
        model = measured(run, recipe, blocks) if blocks else model
        fits = model.samples(budget)
        if blocks and fits >= least:
            run.note(
                f"gradient checkpointing is on, in {len(blocks)} modules: without it {_size(budget)} have no room for "
                f"{least} sample{'s' * (least > 1)} in a pass; steps are the same and take longer"
            )
    if fits < least:
        raise ConfigError(
            f"memory: {_size(budget)} are not enough for {recipe.name} on this model, which needs about "
            f"{_size(model.peak(least))} with {least} sample{'s' * (least > 1)} in a pass ({_size(model.now)} are "
            "in use already, the model and its copy included): give more, or take a smaller rank or another method"
        )
    if blocks and run.device.type == "cpu":
        give_back_at_once()
    batch = run.config.batch_size or run.clean.batch_size
    world = 1 if run.ranks is None else run.ranks.world
    most = min(fits, -(-max(batch, SEARCH_BATCH) // world))
    if run.ranks is not None:  # all take the same parts: those of the rank that has the least room
        most = min(run.ranks.objects(most))
    run.note(
        f"memory of {_size(budget)}{' in each process' * (world > 1)}: micro_batch={most}, since a sample in a pass "
        f"takes {_size(model.per_sample)} (measured by passes of one and of two) and all else "
        f"{_size(model.fixed + model.scratch + model.constant)}"
    )
    return most, blocks or ()


def give_back_at_once() -> None:
    """Let large blocks go back to the system when they are freed, for the rest of the process, where glibc can.

    Of memory that is computed again and again the C library otherwise keeps gaps, more of them with every pass.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 18)
    trim()


def _found(run: Run) -> tuple[nn.Module, ...]:
    try:
        return blocks_of(run)
    except ModelError:
        run.note("no gradient checkpointing: parts of the model cannot be computed again, or have other gradients then")
        return ()


def measured(run: Run, recipe: type[Method], blocks: tuple[nn.Module, ...] = ()) -> MemoryModel:
    """Return the terms for a run, those of a pass measured by one of one sample and one of two.

    Args:
        run: before its method is set up.
        recipe: the method.
        blocks: modules that are checkpointed.
    """
    config: Any = run.config
    batch = first_samples(run)
    n = run.task.size(batch)
    with checkpointed(blocks):
        one, two = (_pass_peak(run, take(batch, torch.arange(m, device="cpu") % n, n)) for m in (1, 2))
    per_sample, low = max(1, two - one), any(p.dtype in LOW_PRECISION for p in run.model.parameters())
    try:
        inputs = run.task.inputs(batch)
        input_bytes = inputs.nbytes // n if run.classes is not None and inputs.is_floating_point() else 0
    except Exception:  # batches of a form of the user's own: nothing is looked for in them
        input_bytes = 0
    terms = fixed_memory(
        run.model,
        recipe,
        optimizer=config.optimizer,
        rank=getattr(config, "rank", None),
        best=config.select == "best",
        frozen=run.frozen,
        classes=searched(recipe, run.classes or 0) if hasattr(config, "unlearn") and input_bytes else 0,
        input_bytes=input_bytes,
        clean_bytes=min(128 << 20, run.clean.n * input_bytes),
    )
    kept = 0
    if recipe.name in KEEP_RECEIVED:  # in float32, of which the given model's 16 bits are no copy
        named = run.model.named_parameters()
        kept = sum(p.numel() * max(4, p.element_size()) for name, p in named
                   if low or not still_received(p.detach(), run.received.get(name)))  # fmt: skip
    shared = 0 if run.ranks is None else terms.optimiser // BUFFERS  # gradients of all tensors in one, to be summed
    return replace(
        terms,
        step=max(terms.step, shared),
        now=in_use(run.device),
        copies=terms.copies + kept,
        constant=max(0, one - per_sample) * (1 + low),
        per_sample=per_sample * (1 + low),  # 16 bits are tuned in 32
        least=1 if blocks or run.checkpointed else terms.least,
    )


def searched(recipe: type[Method], classes: int) -> int:
    """Return how many classes the worst case of images is looked for at: `fisher_steps` chooses among very many."""
    return CANDIDATES if recipe.name == "fisher_steps" and classes > SEARCH_BATCH else classes


def in_use(device: torch.device) -> int:
    """Return the bytes in use: tensors on a CUDA device, or the process's resident memory without what is free."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    trim()
    return resident_memory() or 0


def trim() -> None:
    """Give memory that is free back to the system, where the C library can (glibc)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


def _pass_peak(run: Run, batch: Any) -> int:
    """Return the bytes that a pass forward and backward takes above what is there, no weight's gradient counted."""
    return tensor_peak(lambda: small_gradients(run, batch), run.device)


def _size(count: int) -> str:
    if count < 10**6:
        return f"{count / 1e3:.0f} kB"
    digits = 0 if count >= 10 ** (math.floor(math.log10(count) / 3) * 3 + 2) else 1
    return f"{count / 1e9:.2f} GB" if count >= 10**9 else f"{count / 1e6:.{digits}f} MB"
