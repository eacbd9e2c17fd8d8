"""The one loop that every method runs in.

It owns what no method decides for itself: order of batches, schedule of the step size, clipping, mixed precision, which
epoch is kept, stopping early, Ctrl-C and losses that are not finite.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fastfip.data.augment import augmented, movable
from fastfip.errors import ModelError
from fastfip.methods.base import Groups, Method
from fastfip.methods.config import learning_rate
from fastfip.methods.run import Run
from fastfip.nets.state import by_mesh, own_part, requires_grad
from fastfip.purification.callbacks import Callback, Record, as_callbacks

if TYPE_CHECKING:
    from fastfip.purification.resume import Resume

__all__ = ["Run", "Tuned", "fit"]

#: So many steps in a row without a finite loss end the loop.
PATIENCE_NONFINITE = 10
#: A loss above so many times the first one (or so many nats, if that is more) has run away: it does not come back.
RUNAWAY = 1e6
#: A run of very many short epochs is scored at most about so often.
MOST_SCORES = 100


def fit(
    run: Run,
    method: Method,
    progress: bool | Callable[[str], None] | None = None,
    callbacks: Iterable[Callback | Callable[[Run, Record], bool | None]] | None = (),
    resume: Resume | None = None,
) -> list[Record]:
    """Tune `run.model` by a method; afterwards it holds the state that was kept, folded back to plain weights.

    Kept is the candidate epoch with the lowest held-out clean score (`config.select="best"`), or the last candidate.
    The state before the first step is never a candidate: the backdoored net may well fit clean data best.

    Ctrl-C: the best candidate so far is kept, or the end of the last scored epoch; `run.interrupted` is set.

    A loss or gradient that is not finite: the step is left out and, if numbers in the model are not finite either, the
    model goes back to the end of the last scored epoch. Ten such steps in a row end the loop: with the best candidate
    so far and a note or, if there is none, with an error.

    Args:
        run: made by `fastfip.purify`; its model is changed in place.
        method: an instance made for this run.
        progress: whether a bar is shown, or a function that gets lines; None: a bar where stderr is a terminal.
        callbacks: `Callback` objects or functions `f(run, record)` called after each epoch.
        resume: where the state is kept now and then, and taken from at the start if it is there.

    Returns:
        The history: one dict for each epoch (epoch, step, lr, seconds, the means of what the method logged, the score).

    Raises:
        ModelError: the loss is never finite, or the method tunes nothing.
    """
    watchers = as_callbacks(callbacks, progress, method.name)
    history: list[Record] = []
    run.model.eval()
    try:
        try:
            broken = None if resume is None else resume.begin(run, method)
            if broken is None:
                method.setup(run)
        except KeyboardInterrupt:
            if run.ranks is not None:  # the others know nothing of it: what they would keep is not this
                raise
            run.interrupted = True
            run.note("interrupted before the first step: the model is as it was given")
            return history
        with Tuned(run, method) as tuned:
            loop = _Loop(run, method, tuned, watchers, history, resume)
            if resume is not None and broken is not None:
                resume.restore(loop, broken)
            loop.go()
            if not run.interrupted:
                method.finish(run)
    finally:
        method.fold(run)
    return history


class Tuned:
    """The tensors that are tuned; the rest of the model is frozen while this is entered."""

    def __init__(self, run: Run, method: Method) -> None:
        self.run, self.model = run, run.model
        self.groups = _groups(run, method)
        self.tensors: list[Tensor] = [p for group in self.groups for p in group["params"]]
        self.seconds = 0.0

    def __enter__(self) -> Tuned:
        mine = {id(p) for p in self.tensors}
        self.everything = list({id(p): p for p in [*self.model.parameters(), *self.tensors]}.values())
        self.flags = requires_grad(self.everything, lambda p: id(p) in mine)
        self.flags.__enter__()
        self.without_gradients()
        return self

    def __exit__(self, *error: object) -> None:
        self.flags.__exit__(None, None, None)
        self.without_gradients()

    def without_gradients(self) -> None:
        """Leave no gradient behind, neither the user's nor ours."""
        for p in self.everything:
            p.grad = None

    def state(self) -> list[Tensor]:
        """Every tensor that the loop may change: what is tuned, and the buffers (running statistics)."""
        return [*self.tensors, *(b for b in self.model.buffers() if b is not None)]

    @torch.no_grad()
    def save(self, into: list[Tensor] | None = None) -> list[Tensor]:
        """Return copies of the state, in the memory of copies that nobody needs any more."""
        pairs = zip(self.state(), itertools.chain(into or (), itertools.repeat(None)))
        return [t.clone() if old is None or old.shape != t.shape else old.copy_(t) for t, old in pairs]

    @torch.no_grad()
    def restore(self, saved: list[Tensor]) -> None:
        """Put a saved state back."""
        for t, value in zip(self.state(), saved):
            t.copy_(value)

    def finite(self) -> bool:
        """Return whether every number of the state is."""
        mine = (own_part(t) for t in self.state() if t.is_floating_point())
        return self.run.all(all(bool(torch.isfinite(t).all()) for t in mine))


def _groups(run: Run, method: Method) -> Groups:
    frozen = set(run.frozen)
    if run.config.bn_mode == "freeze":
        frozen |= {id(p) for m in run.model.modules() if isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)}
    seen: set[int] = set()
    groups: Groups = []
    for group in method.parameter_groups(run):
        params = group["params"]
        kept = []
        for p in [params] if isinstance(params, Tensor) else params:
            # A tied weight comes up once for each of its places; it is one tensor and gets one update.
            if id(p) not in frozen and id(p) not in seen and p.is_floating_point():
                seen.add(id(p))
                kept.append(p)
        groups += [{**group, "params": members} for members in by_mesh(kept)]
    if not groups:
        others = "another method, or frozen='tune'" if run.frozen else "another method, or another bn_mode"
        raise ModelError(f"{method.name} finds nothing to tune in this model: try {others}")
    return groups


class _Stop(Exception):
    """Ends the loop early; what it says becomes a note, if it says anything."""


class _Diverged(_Stop):
    """Ends the loop early, and the result must say so first."""


class _Loop:
    def __init__(self, run: Run, method: Method, tuned: Tuned, watchers: list[Callback], history: list[Record],
                 resume: Resume | None) -> None:  # fmt: skip
        self.run, self.method, self.tuned, self.watchers, self.history = run, method, tuned, watchers, history
        self.resume = resume
        self.rest: list[list[int]] | None = None  # batches of this pass that are still to come
        self.optimizer = method.make_optimizer(run, tuned.groups)
        self.base = [group["lr"] for group in self.optimizer.param_groups]
        self.best: list[Tensor] | None = None
        self.best_score = math.inf
        self.since_best = 0
        self.bad_in_a_row = self.bad_steps = 0
        self.first_loss: float | None = None
        self.moved = False
        config = run.config
        self.smallest = 2 if config.bn_mode == "train" and run.batchnorms else 1
        per_epoch = self.steps_of_a_pass()
        run.total_steps = config.steps if config.steps is not None else (config.epochs or 1) * per_epoch
        run.epochs = math.ceil(run.total_steps / per_epoch)
        self.score_every = max(1, run.epochs // MOST_SCORES)
        self.good, self.good_epoch = tuned.save(), 0

    def steps_of_a_pass(self) -> int:
        return len(self.run.clean.order(self.run.config.batch_size, smallest=self.smallest))

    def go(self) -> None:
        run = self.run
        try:
            try:
                for watcher in self.watchers:
                    watcher.on_start(run)
                while run.step < run.total_steps or self.rest is not None:
                    self.epoch()
            except KeyboardInterrupt:
                if run.ranks is not None:
                    raise
                run.interrupted = True
                run.note(f"interrupted in epoch {run.epoch} of {run.epochs}: {self.kept()}")
                self.tuned.restore(self.good)
            except _Stop as stop:
                if isinstance(stop, _Diverged):
                    run.diverged = True
                    run.alert(f"DIVERGED, {stop}: {self.remedy()}")
                elif str(stop):
                    run.note(str(stop))
                self.tuned.restore(self.good)
        finally:
            with contextlib.ExitStack() as ends:  # every one of them, whatever another raises: the bar has a thread
                for watcher in self.watchers:
                    ends.callback(watcher.on_end, run)
        if self.best is not None:
            self.tuned.restore(self.best)
        elif self.history and not math.isfinite(self.history[-1].get("score", 0.0)):
            raise ModelError(f"no epoch ends with a finite held-out loss: {self.remedy()}")

    def spare(self) -> list[Tensor] | None:
        """Return the last good state where another one is the best, which stands for it until the next is saved."""
        if self.best is None or self.good is self.best:
            return None
        spare, self.good, self.good_epoch = self.good, self.best, self.run.best_epoch or 0
        return spare

    def kept(self) -> str:
        epoch = self.run.best_epoch or self.good_epoch
        return f"the state of epoch {epoch} is kept" if epoch else "no epoch was scored, the model is as it was given"

    def epoch(self) -> None:
        run, config, start = self.run, self.run.config, time.perf_counter()
        run.train_mode()
        with run.timed("train"):
            stop = self.walk()
        self.rest = None
        record: Record = {
            **run.take_log(),
            "epoch": run.epoch,
            "step": run.step,
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        last = stop or run.step >= run.total_steps
        if run.epoch % self.score_every == 0 or last:
            with run.timed("score"):
                better = self.score(record)
            if self.tuned.finite():
                self.good, self.good_epoch = self.tuned.save(self.spare()), run.epoch
                if better:
                    self.best, run.best_epoch = self.good, run.epoch
        record["seconds"] = time.perf_counter() - start
        self.history.append(record)
        for watcher in self.watchers:
            stop = bool(watcher.on_epoch(run, record)) or stop
        if self.agreed(stop):
            raise _Stop(f"stopped by a callback after epoch {run.epoch}")
        if config.patience is not None and self.since_best >= config.patience:
            raise _Stop(f"stopped after epoch {run.epoch}: no better held-out score in {self.since_best} scored epochs")

    def walk(self) -> bool:
        """Go through the samples once, or through the rest of a broken pass; whether a callback wants to stop."""
        run, stop = self.run, False
        if self.rest is None:
            run.epoch += 1
            self.rest = run.clean.order(
                run.config.batch_size, shuffle=True, generator=run.generator, smallest=self.smallest
            )
        clean, batches = run.clean, run.clean.walk(self.rest, run.device)
        if self.resume is not None:
            self.resume.settle()
        with contextlib.closing(batches):  # type: ignore[type-var]
            for batch in batches:
                stop = self.step(self.augmented(batch)) or stop
                self.rest = self.rest[1:]
                if run.clean is not clean:  # the method left samples out: a pass over the others begins at once
                    run.epochs = run.epoch + math.ceil((run.total_steps - run.step) / self.steps_of_a_pass())
                    self.rest = []
                if stop or run.step >= run.total_steps:
                    break
                if self.resume is not None:
                    self.resume.step(self)
                if not self.rest:
                    break
        return stop

    def augmented(self, batch: Any) -> Any:
        run, how = self.run, self.run.config.augment
        if how == "none":
            return batch
        if not movable(run.task, batch, run.classes):
            run.note("loss= takes labels that may speak of places: images were not moved, move them with their labels")
            return batch
        changed = augmented(run.task, batch, how == "crop_flip", run.generator)
        if changed is None:
            run.note("the inputs are no images [N, channels, height, width]: they were not augmented")
        return batch if changed is None else changed

    def step(self, batch: Any) -> bool:
        """One step; whether a callback wants to stop."""
        run, optimizer, config = self.run, self.optimizer, self.run.config
        factor = learning_rate(run.step, run.total_steps, config.schedule, config.warmup)
        for group, base in zip(optimizer.param_groups, self.base):
            group["lr"] = base * factor
        optimizer.zero_grad(set_to_none=True)
        values = self.method.backward(run, batch)
        run.share(self.dense())
        self.watch(values)
        if self.usable(values):
            if run.scaler is None:
                optimizer.step()
            else:
                run.scaler.step(optimizer)
                run.scaler.update()
            self.method.after_step(run)
            run.log(**values)
            self.bad_in_a_row, self.moved = 0, True
        else:
            self.bad()
        run.step += 1
        wishes = [bool(watcher.on_step(run, values)) for watcher in self.watchers]  # every one of them sees the step
        return self.agreed(any(wishes))

    def usable(self, values: dict[str, float | Tensor]) -> bool:
        run, config = self.run, self.run.config
        if not all(math.isfinite(float(value)) for value in values.values()):
            return False
        if config.grad_clip is None:
            return True
        if run.scaler is not None:
            run.scaler.unscale_(self.optimizer)
        norm = run.clip(self.dense(), config.grad_clip)
        # With a scaler an overflow is ordinary: it skips the step and lowers its scale.
        return run.scaler is not None or bool(torch.isfinite(norm))

    def dense(self) -> list[Tensor]:
        """Return what is tuned, its gradients no longer sparse: torch has no norm and no sum over ranks of such."""
        if self.run.config.grad_clip is not None or self.run.ranks is not None:
            for p in self.tuned.tensors:
                if p.grad is not None and p.grad.is_sparse:
                    p.grad = p.grad.to_dense()
        return self.tuned.tensors

    def agreed(self, stop: bool) -> bool:
        """Return whether a callback wants to stop, on any rank."""
        return stop if self.run.ranks is None else self.run.ranks.any(stop)

    def watch(self, values: dict[str, float | Tensor]) -> None:
        """End a run whose loss, finite yet, is beyond return."""
        loss = float(values.get("loss", math.nan))
        if not math.isfinite(loss):
            return
        self.first_loss = loss if self.first_loss is None else self.first_loss
        if loss > RUNAWAY * max(1.0, abs(self.first_loss)):
            self.diverged(f"the loss went from {self.first_loss:.3g} to {loss:.3g}")

    def diverged(self, what: str) -> None:
        if self.best is None:
            raise ModelError(f"{what}, in epoch {self.run.epoch} of {self.run.epochs}: {self.remedy()}")
        raise _Diverged(f"stopped in epoch {self.run.epoch} of {self.run.epochs}, {what}")

    def bad(self) -> None:
        run = self.run
        self.bad_in_a_row += 1
        self.bad_steps += 1
        run.note("steps with a loss or gradient that is not finite were left out")
        if not self.tuned.finite():
            self.tuned.restore(self.good)
        if self.bad_in_a_row >= PATIENCE_NONFINITE:
            self.diverged(f"the loss is not finite in {self.bad_in_a_row} steps in a row")
        # From the last good state it comes to the same end again and again.
        if self.bad_steps >= PATIENCE_NONFINITE and 2 * self.bad_steps > run.step + 1:
            self.diverged(f"the loss is not finite in {self.bad_steps} of {run.step + 1} steps")

    def remedy(self) -> str:
        lr = self.run.config.lr
        return f"lower lr (now {lr:g}), set grad_clip, or check that the clean images are scaled as the model expects"

    def score(self, record: Record) -> bool:
        """Score the present state; whether it is the one to keep so far."""
        run = self.run
        figures = self.method.score(run)
        record.update(figures)
        candidate = self.moved and bool(self.method.is_candidate(run)) and math.isfinite(figures["score"])
        record["candidate"] = candidate
        if not candidate:
            return False
        better = figures["score"] < self.best_score
        self.since_best = 0 if better else self.since_best + 1
        self.best_score = min(self.best_score, figures["score"])
        return better or run.config.select == "last"
