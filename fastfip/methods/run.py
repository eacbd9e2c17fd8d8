"""What a method sees while it works: the model, the data, the settings, where the loop is, and what it may use.

`fastfip.purification.loop.fit` makes the loop of it; `fastfip.methods.base.Method` is the other side.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fastfip.data.batch import Batch, take
from fastfip.data.cleanset import CleanSet
from fastfip.data.task import Task
from fastfip.errors import ConfigError
from fastfip.methods.config import MethodConfig
from fastfip.nets.checks import check_amp
from fastfip.nets.parts import clip_parts, norms_of_parts
from fastfip.nets.state import eval_mode, training_flags

if TYPE_CHECKING:
    from fastfip.nets.ranks import Ranks
    from fastfip.nets.shards import Shards

__all__ = ["Endless", "Run", "autocast_dtype", "norms_of"]


@dataclass
class Run:
    """One purification under way.

    Attributes:
        model: the working copy, in eval mode but for what `train_mode` switches. A method may change it; `Method.fold`
            undoes that.
        task: how a batch and the model meet: `task.forward(model, batch)`, `task.labels(batch)`, ...
        clean: the clean samples that are tuned on; a method may leave some out (`run.clean = run.clean.subset(...)`).
        heldout: those that only select (None: nothing could be held out).
        config: the method's own config class.
        generator: seeded, on the CPU; a method draws from nothing else.
        given: how many clean samples there were at first, held-out ones too.
        left_out: how many of them a method took out of `clean`.
        chosen: names of the settings that the user gave a value, the default one or another.
        classes: C, where the outputs are logits [N, C].
        epoch, epochs, step, total_steps: where the loop is; `epoch` counts from 1, `step` the steps done.
        frozen: ids of the parameters that the user froze and that stay as they are, to the bit.
        left: name of a parameter -> why the method leaves it alone, where the method knows.
        received: name -> value of the received model's parameters and buffers; nobody writes to them.
        pretrained: the same of the model that it was fine-tuned from, where somebody gave it, as far as they have names
            and shapes in common.
        micro_batch: samples that go through the model together where a graph is kept (see `parts`), of several
            processes in each; None: all.
        blocks: modules that are checkpointed for the run. checkpointed: the memory is that of a model whose parts are
            computed again in the backward pass, so that gradients of each sample are taken one sample at a time.
        diverged: whether the loss ran away. alerts: what the result should say before all else.
        ranks: the processes that share each batch, None for one alone: `task.forward` then runs this rank's rows and
            returns the outputs of all, and gradients have to be summed (`share`).
        shards: the parts of the parameters that the ranks have, where these are tuned as they are; None: each process
            has all of `model`.
        notes: what it should say as well. seconds: time by purpose, see `timed`.
        inputs: shape and range of a first batch. found: small pictures of what the method found, for a report.
    """

    model: nn.Module
    task: Task
    clean: CleanSet
    config: MethodConfig
    device: torch.device
    generator: torch.Generator
    heldout: CleanSet | None = None
    given: int = 0
    left_out: int = 0
    chosen: frozenset[str] = frozenset()
    classes: int | None = None
    amp: torch.dtype | None = None
    seed: int = 0
    epoch: int = 0
    epochs: int = 0
    step: int = 0
    total_steps: int = 0
    best_epoch: int | None = None
    interrupted: bool = False
    frozen: frozenset[int] = frozenset()
    left: dict[str, str] = field(default_factory=dict)
    received: dict[str, Tensor] = field(default_factory=dict, repr=False)
    pretrained: Mapping[str, Tensor] | None = field(default=None, repr=False)
    micro_batch: int | None = None
    blocks: tuple[nn.Module, ...] = ()
    checkpointed: bool = False
    diverged: bool = False
    alerts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    scaler: torch.amp.GradScaler | None = None
    ranks: Ranks | None = None
    shards: Shards | None = None
    _logged: dict[str, list[float | Tensor]] = field(default_factory=dict, repr=False)
    _inner: list[float] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if self.config.label_smoothing and self.task.loss_hook is not None:
            raise ConfigError(
                "label_smoothing belongs to the cross-entropy: leave it at 0 with loss=, or smooth in loss="
            )
        if self.amp == torch.float16 and self.device.type == "cuda":
            self.scaler = torch.amp.GradScaler("cuda")

    # -------------------- the loop

    @property
    def progress(self) -> float:
        """Return the share of the steps that is done, 0 to 1."""
        return self.step / self.total_steps if self.total_steps else 0.0

    def log(self, **values: float | Tensor) -> None:
        """Add numbers of this step to the history, which holds their mean over the epoch."""
        for name, value in values.items():
            self._logged.setdefault(name, []).append(value.detach() if isinstance(value, Tensor) else value)

    def take_log(self) -> dict[str, float]:
        """Return the means of what was logged since the last call."""
        out = {name: float(sum(float(v) for v in values)) / len(values) for name, values in self._logged.items()}
        self._logged.clear()
        return out

    def note(self, text: str) -> None:
        """Say something in the result, once."""
        if text not in self.notes:
            self.notes.append(text)

    def alert(self, text: str) -> None:
        """Say something in the first line of the result, once: who reads no further must know it."""
        if text not in self.alerts:
            self.alerts.append(text)

    @contextlib.contextmanager
    def timed(self, purpose: str) -> Iterator[None]:
        """Add the time of a block to `seconds[purpose]` ("fisher", "svd", ...), less that of timed blocks in it."""
        self._synchronize()
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            self._synchronize()
            spent = time.perf_counter() - start
            self.seconds[purpose] = self.seconds.get(purpose, 0.0) + spent - self._inner.pop()
            if self._inner:
                self._inner[-1] += spent

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # -------------------- forward, loss, backward

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Return the autocast context that `amp=` asked for (none: does nothing). Fisher terms stay outside of it."""
        if self.amp is None:
            return contextlib.nullcontext()
        # No cache: it is emptied at the end of the outermost block only, so that inside another one (`purify` shuts out
        # the caller's) the casts of tuned biases would go stale after the first step.
        return torch.autocast(self.device.type, dtype=self.amp, cache_enabled=False)

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits of a batch, with BatchNorm and dropout as the model is set now."""
        return self.task.forward(self.model, batch)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the loss of each sample [N], with the config's label smoothing."""
        if not self.config.label_smoothing:
            losses = self.task.loss(logits, batch)
            if self.task.loss_hook is not None:
                self.task.check_count(losses, batch)
            return losses
        return F.cross_entropy(
            logits, self.task.labels(batch), reduction="none", label_smoothing=self.config.label_smoothing
        )

    def parts(self, batch: Batch) -> Iterator[tuple[Batch, float]]:
        """Yield a batch in parts of at most `together` samples, each with its share of the samples.

        The mean loss of a batch, and its gradient, is the sum of its parts' mean losses times their shares. Where
        BatchNorm takes its statistics from the part, none is of one sample alone.
        """
        places = None if self.micro_batch is None else self.places(self.task.size(batch))
        if places is None or len(places) == 1:
            yield batch, 1.0
            return
        n = self.task.size(batch)
        for place in places:
            yield take(batch, place, n), len(place) / n

    @property
    def together(self) -> int | None:
        """Return how many samples of a batch go through the model together in all processes; None: the whole batch."""
        return None if self.micro_batch is None else self.micro_batch * self.world

    @property
    def world(self) -> int:
        """Return how many processes share each batch."""
        return 1 if self.ranks is None else self.ranks.world

    def places(self, n: int) -> tuple[Tensor, ...]:
        """Return which of n samples go through the model together, int64 on the CPU, as evenly as can be."""
        count = 1 if self.together is None else -(-n // self.together)
        if any(norm.training for norm in self.batchnorms):
            count = min(count, max(1, n // 2))
        return torch.arange(n, device="cpu").tensor_split(count)

    def losses(self, batch: Batch) -> Tensor:
        """Return the loss of each sample [N] as the model is set now, with the config's label smoothing."""
        if self.ranks is None:
            return self.loss(self.forward(batch), batch)
        return self.task.losses(self.model, batch, self.loss)  # type: ignore[attr-defined]

    @property
    def alone(self) -> Task:
        """Return the task of this process alone, also where several share each batch."""
        return self.task if self.ranks is None else self.task.alone  # type: ignore[attr-defined]

    def backward(self, loss: Tensor) -> None:
        """Back-propagate a scalar, scaled where float16 autocast needs that."""
        # What a checkpoint computes anew in the backward pass needs BatchNorm as it was.
        with contextlib.nullcontext() if self.ranks is None else self.ranks.norms():
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def share(self, tensors: list[Tensor]) -> None:
        """Sum the gradients of tensors over the ranks, in one piece; one process alone has nothing to share."""
        if self.ranks is None:
            return
        gradients = [t.grad for t in tensors if t.grad is not None]
        if self.shards is not None:
            gradients = self.shards.summed_by_fsdp(gradients)
        self.ranks.sum_(gradients, "gradients")

    def clip(self, tensors: list[Tensor], most: float) -> Tensor:
        """Shorten the gradients of tensors so that their norm is at most `most`; return what it was."""
        if self.shards is None or self.ranks is None:
            return nn.utils.clip_grad_norm_(tensors, most)
        return clip_parts(tensors, most, self.ranks)

    def norms(self, tensors: Sequence[Tensor]) -> list[float]:
        """Return the L2 norm of each tensor, of the whole where this process has a part of it."""
        if self.shards is None or self.ranks is None:
            return norms_of(tensors)
        return norms_of_parts(tensors, self.ranks)

    def all(self, holds: bool) -> bool:
        """Return whether what each rank finds of its parts holds on all of them."""
        return holds if self.shards is None or self.ranks is None else not self.ranks.any(not holds)

    def mine(self, batch: Batch) -> Batch:
        """Return this rank's rows of a batch: all of them in a process alone, and where there are fewer than ranks."""
        return batch if self.ranks is None else self.task.mine(batch)  # type: ignore[attr-defined]

    def own_generator(self) -> torch.Generator:
        """Return a generator for what each rank draws for its own rows; a process alone has one for everything."""
        if self.ranks is None:
            return self.generator
        seed = int(torch.randint(0, 2**62, (), generator=self.generator, device="cpu"))
        return torch.Generator(device="cpu").manual_seed(seed + self.ranks.rank)

    def total(self, part: Tensor) -> Tensor:
        """Return the sum over the ranks of a scalar made of each one's own rows, differentiable in these."""
        return part if self.ranks is None else self.ranks.total(part)

    def sum_over_ranks(self, sums: list[Tensor], count: int) -> int:
        """Sum what each rank has added up of its own samples, in place; return how many samples there were in all."""
        if self.ranks is None:
            return count
        self.ranks.sum_(sums, "fisher")
        return round(self.ranks.number(count))

    def once(self, term: Tensor) -> Tensor:
        """Return a term of the loss that needs no sample, so that `share` counts its gradient once."""
        return term if self.ranks is None else self.ranks.once(term)

    def endless(self) -> Endless:
        """Walk the clean samples again and again, shuffled, in batches of the config's size."""
        return Endless(self)

    # -------------------- train and eval

    @property
    def batchnorms(self) -> list[nn.Module]:
        """Return the BatchNorm layers; InstanceNorm is none (its train mode is another function of x)."""
        return [module for module in self.model.modules() if isinstance(module, _BatchNorm)]

    def is_frozen(self, module: nn.Module) -> bool:
        """Return whether a layer has parameters of its own and the user froze them all: its statistics stay as well."""
        own = list(module.parameters(recurse=False))
        return bool(own) and all(id(p) in self.frozen for p in own)

    def train_mode(self) -> None:
        """Set the model as the config tunes it: eval mode but for BatchNorm (`bn_mode`) and dropout."""
        self.model.eval()
        for module in self.model.modules():
            if isinstance(module, _BatchNorm):
                module.training = self.config.bn_mode == "train" and not self.is_frozen(module)
            elif isinstance(module, _DropoutNd):
                module.training = self.config.dropout

    @contextlib.contextmanager
    def bn(self, mode: str) -> Iterator[None]:
        """Set BatchNorm to "train" or "eval" for a block; running statistics are updated in "train"."""
        if mode not in ("train", "eval"):
            raise ValueError(f"bn({mode!r}): train or eval")
        layers = self.batchnorms
        with training_flags(layers):
            for layer in layers:
                layer.training = mode == "train" and not self.is_frozen(layer)
            yield

    def eval_mode(self) -> contextlib.AbstractContextManager[nn.Module]:
        """Set the whole model to eval mode for a block."""
        return eval_mode(self.model)


class Endless:
    """A walk over the clean samples without an end.

    Attributes:
        clean: the set of the present pass. rest: its batches that are still to come, as `CleanSet.order` names them.
    """

    def __init__(self, run: Run, clean: CleanSet | None = None, rest: list[list[int]] | None = None) -> None:
        self.run, self.clean, self.rest = run, run.clean if clean is None else clean, rest or []
        self._batches = self.clean.walk(self.rest, run.device) if self.rest else iter(())

    def __iter__(self) -> Endless:
        return self

    def __next__(self) -> Batch:
        if not self.rest:
            run = self.run
            self.clean = run.clean
            self.rest = self.clean.order(run.config.batch_size, shuffle=True, generator=run.generator)
            self._batches = self.clean.walk(self.rest, run.device)
        batch = next(self._batches)
        self.rest = self.rest[1:]
        return batch


def norms_of(tensors: Sequence[Tensor]) -> list[float]:
    """Return the L2 norm of each tensor."""
    return [float(t.norm()) for t in tensors]


def autocast_dtype(amp: bool | str, device: torch.device) -> torch.dtype | None:
    """Return the dtype that `amp=` means on a device; True: bfloat16 where it is supported, else float16.

    Raises:
        ConfigError: anything but False, True, "bf16", "fp16".
    """
    check_amp(amp)
    if amp is False:
        return None
    if amp is True:
        if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.float16
        return torch.bfloat16
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[str(amp)]
