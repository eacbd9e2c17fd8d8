"""Fine-mixing (Zhang et al., arXiv 2210.09545): back to the weights before fine-tuning, and on to what was learned.

A backdoor that came in while a pretrained model was fine-tuned is not in the pretrained weights, which are public for
most models of texts. The paper takes a share of the fine-tuned weights, drawn one by one, puts the pretrained ones in
the place of the others, and fine-tunes the mixture on clean samples: `hold=0, states=0`, and a `keep` that is chosen by
clean accuracy, 0.3 say. Its second part, which looks for odd vectors among those of words (E-PUR), is not here.

The default keeps none of them. A few labels alone would teach less than the received model knows, so its answers and
its last states are learned as well (`fastfip.methods._taught`), at samples pieced together of two clean ones. A trigger
is in none of these; what it does is not taught. Of texts, words that only the received model minds are looked for, and
the new weights are told to ignore them. docs/tasks.md has what was measured, on texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastfip.data.augment import augmented, movable
from fastfip.data.batch import Batch
from fastfip.methods._batchnorm import taken_anew
from fastfip.methods._scout import Scout
from fastfip.methods._taught import Teacher, divergence
from fastfip.methods.base import Groups, Method, MethodConfig, Run, register, setting

__all__ = ["FineMixing", "FineMixingConfig"]


@dataclass(frozen=True)
class FineMixingConfig(MethodConfig):
    """Settings of fine-mixing; the published form has `hold=0`, `states=0` and a `keep` chosen by clean accuracy."""

    STEPS: ClassVar[int | None] = 200

    epochs: int | None = setting(None, "passes over the clean set", low=1)
    steps: int | None = setting(None, "optimiser steps, instead of epochs; 200 if neither is given", low=1)
    batch_size: int | None = setting(32, "samples in a step; None: the batch size of the loader", low=1)
    lr: float = setting(1e-4, "step size", above=0)
    optimizer: Literal["sgd", "adam"] = setting("adam", "optimiser")
    warmup: float = setting(0.1, "share of the steps in which the step size rises linearly", low=0, below=1)
    grad_clip: float | None = setting(1.0, "largest norm of the gradient; None: not clipped", above=0)
    augment: Literal["none", "crop", "crop_flip"] = setting(
        "crop",
        "what is done to each clean image tuned on: moved by up to an eighth (crop), mirrored as well (crop_flip)",
    )
    select: Literal["best", "last"] = setting(
        "last", "which epoch is kept: the last, or the best by held-out clean score"
    )
    holdout: float = setting(0.0, "share of the clean set that only selects; 0: none", low=0, high=0.5)
    dropout: bool = setting(True, "whether dropout is active while tuning")
    keep: float = setting(
        0.0, "share of the fine-tuned weights that are kept, drawn at random; the others are the pretrained ones",
        low=0, below=1,
    )  # fmt: skip
    hold: float = setting(
        1.0, "weight of the divergence from the received answers, at samples pieced together of the clean ones", low=0
    )
    states: float = setting(
        2.0, "weight of the departure from the received model's last states there, hidden states or feature maps", low=0
    )
    suspects: float = setting(
        0.5, "share of the texts there with words put in that only the received model minds; 0: none are looked for",
        low=0, high=1,
    )  # fmt: skip
    scout: float = setting(
        0.25, "share of the steps after which such words are looked for and tuning begins anew; 0: it begins once",
        low=0, below=1,
    )  # fmt: skip
    soften: float = setting(
        0.5, "share of the received answers in what whole clean samples teach, labels have the rest; with hold > 0",
        low=0, high=1,
    )  # fmt: skip


@register
class FineMixing(Method):
    """Mix the weights with the pretrained ones, and learn the labels, and what the received model made of the samples.

    w <- w_pre + m (w_received - w_pre), each entry of m 1 with the probability `keep`, else 0 (Zhang et al.). What the
    pretrained model has not, such as a new head, stays as it was received, and so do frozen parameters. Then Adam
    minimises L(w) + hold KL(p || p_w) + states |h - h_w|^2 / |h|^2: the loss L at clean samples, the others where a
    text has a piece of another one in the place of one of its own or between its words, and an image a rectangle of
    another (CutMix); other inputs are taken as they are. p are the received answers, with one temperature and a shift
    for each class by which they fit the clean labels best; h are the received model's last hidden states, or feature
    maps. A pieced sample of which p says another class than its label is passed over in both. At the end the bias of
    the logits is shifted so that p_w has each class as often as p at pieced samples. With p, L has the labels with the
    weight 1 - `soften` and KL(p || p_w) with the rest: a few labels alone are learned by heart.

    Of texts, after a share of the steps (`scout`) and four times from a third of the others on, each of the hundred
    words that fine-tuning moved most is put into clean ones. It is suspected of a class if p has the class more often
    then, by 0.03 more than three times what p_w does. The share `suspects` of the texts gets up to four words that are
    suspected of a class that is not its own, and p_w learns p without them. After the first time tuning begins anew:
    what was learned before the suspects were known is given up. This, and pieces between words, needs batches in which
    a mask tells the padding, or none. Texts of like lengths are put into a batch.
    """

    name = "fine_mixing"
    summary = "back to the weights before fine-tuning (pretrained=), and on to what the received model knows"
    Config = FineMixingConfig
    takes_parts = over_ranks = needs_pretrained = True

    teacher: Teacher | None = None
    scout: Scout | None = None
    latest: float | Tensor = 0.0  # loss
    scored = False  # an epoch was
    tuned = False  # since tuning began, for the last time

    @torch.no_grad()
    def setup(self, run: Run) -> None:
        """Ask the received model what it knows, and mix the weights."""
        config = self.config(run)
        assert run.pretrained is not None
        if config.hold > 0 or config.states > 0:
            self.teacher = Teacher(run, config.hold > 0, config.states > 0)
            self.more = run.endless()
        frozen = {id(b) for m in run.model.modules() if run.is_frozen(m) for b in m.buffers(recurse=False)} | run.frozen
        named = (*run.model.named_parameters(remove_duplicate=False), *run.model.named_buffers(remove_duplicate=False))
        done = set(frozen)
        for name, t in named:  # a file may have tied weights under either name
            old = run.pretrained.get(name)
            if old is None or id(t) in done or not t.is_floating_point():
                continue
            done.add(id(t))
            old = old.to(t.device, t.dtype)
            if config.keep > 0:
                kept = torch.rand(t.shape, generator=run.generator, device="cpu", dtype=torch.float32) < config.keep
                old = torch.where(kept.to(t.device), t, old)
            t.copy_(old)
        if self.teacher is not None:
            self.teacher.suspect_words(run, config.suspects)
        taken_anew(run, run.clean.batches(run.config.batch_size, device=run.device, smallest=2))
        run.model.eval()
        if self.teacher is not None and self.teacher.wordings is not None and config.scout > 0:
            self.scout = Scout(run, config.scout)
        run.pretrained = None  # nobody needs them any more

    @torch.no_grad()
    def fold(self, run: Run) -> None:
        """Give the received values back where a run was broken off before any epoch was scored."""
        if run.interrupted and not self.scored:
            for name, t in (*run.model.named_parameters(), *run.model.named_buffers()):
                if name in run.received:
                    t.copy_(run.received[name])
        elif self.teacher is not None:
            self.teacher.say(run)

    def finish(self, run: Run) -> None:
        """Take a leaning to a class out of the bias of the logits."""
        if self.teacher is None:
            return
        if not self.tuned:
            run.note("the run ended before tuning began anew: what it has learned may have a part of a backdoor")
        try:
            self.teacher.level(run)
        except KeyboardInterrupt:
            if run.ranks is not None:
                raise
            run.interrupted = True
            run.note("interrupted after the last step: a leaning to a class was not taken out")

    @staticmethod
    def config(run: Run) -> FineMixingConfig:
        """Return the settings of a run."""
        assert isinstance(run.config, FineMixingConfig)
        return run.config

    def parameter_groups(self, run: Run) -> Groups:
        """All parameters."""
        return [{"params": list(run.model.parameters())}]

    def make_optimizer(self, run: Run, groups: Groups) -> torch.optim.Optimizer:
        """Return the config's optimiser; where there is a scout it needs to know it."""
        self.optimizer = super().make_optimizer(run, groups)
        return self.optimizer

    def after_step(self, run: Run) -> None:
        """Remember that the weights are no longer those that tuning began with."""
        self.tuned = self.scout is None or self.scout.over

    def is_candidate(self, run: Run) -> bool:
        """Return whether the weights were tuned, after the scout if there is one."""
        return self.tuned

    def backward(self, run: Run, batch: Batch) -> dict[str, float | Tensor]:
        """Back-propagate the clean loss, and the divergence from the received answers at other samples."""
        config = self.config(run)
        self._look(run)
        values = super().backward(run, batch)
        self.latest = values["loss"]
        if self.teacher is not None:
            values.update(self.teacher.backward(run, self._moved(run, next(self.more)), config.hold, config.states))
        return values

    def loss(self, run: Run, batch: Batch) -> Tensor:
        """Return the mean loss of the labels, in a part of it the divergence from the received answers.

        What the user's own `loss=` is worth beside a divergence is not known, so it is left as it is.
        """
        share = self.config(run).soften
        if self.teacher is None or not self.teacher.answers or share == 0 or run.task.loss_hook is not None:
            return super().loss(run, batch)
        target = self.teacher.target(run, batch)
        answer = run.forward(batch)
        return (1 - share) * run.loss(answer, batch).mean() + share * divergence(target, answer)

    def score(self, run: Run) -> dict[str, float]:
        """Return the loss of the latest step where nothing is chosen by a score: no pass is spent on one."""
        self.scored = True
        if run.heldout is None and run.config.select == "last":
            return {"score": float(self.latest)}
        return super().score(run)

    def _look(self, run: Run) -> None:
        """Begin anew if it is time to, and look for words that only the received model minds."""
        if self.teacher is None:
            return
        at, count = run.step, run.total_steps
        if self.scout is not None:
            at, count = self.scout.place(run)
            if not self.scout.over and self.scout.first(run) <= run.step:
                if self.scout.first(run) > 0:
                    self.teacher.search(run)
                    self.scout.begin_anew(run, self.optimizer)
                self.scout.end()
            self.scout.set_size(run, self.optimizer)
            if not self.scout.over:
                return
        self.teacher.search_after(run, at / count)

    @staticmethod
    def _moved(run: Run, batch: Batch) -> Batch:
        how = run.config.augment if movable(run.task, batch, run.classes) else "none"
        return batch if how == "none" else augmented(run.task, batch, how == "crop_flip", run.generator) or batch
