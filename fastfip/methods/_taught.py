"""What the received model knows, taught to weights that never had its backdoor.

Its answers, and its last states, are learned at clean samples that are pieced together of two. What a backdoor left in
it beside the trigger itself, a leaning towards the target, is kept out twice: the answers are calibrated by the labels
of the clean samples, and a piece of which the received model then thinks otherwise than its label says is passed over.

A model of a few clean texts is misled by any words that are added to one, a trigger before all. So words that turn
texts in the received model alone are put into some of them, and the answers without these are taught.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfip.data.augment import pieced
from fastfip.data.batch import Batch, take
from fastfip.data.lengths import token_ids
from fastfip.errors import ModelError
from fastfip.methods._calibration import Calibration, levelling
from fastfip.methods._classifier import LastLayer
from fastfip.methods._received import giving, kept_received
from fastfip.methods._search import group_by_length, token_place
from fastfip.methods._states import LastStates, Seen
from fastfip.methods._suspects import Wordings, insertion_of, places
from fastfip.methods.run import Run
from fastfip.worst_case.places import Rewording, TokenPlace

__all__ = ["Teacher", "divergence"]

#: Share of the texts that get a piece of another one between their words, where there is a way to put it there.
BETWEEN = 0.5
#: Pieced samples at which the classes are levelled, about. With a quarter as many shifts differed by 0.2 between draws.
LEVELLED = 2048
#: Share of the pieced samples that is learned from; with less, the result says so.
FEW = 0.3
#: Share of the steps after which words are looked for, as the tuned model has to know the task by then, and after
#: which again; those of a scout do not count.
LOOKED_FOR, AGAIN = 1 / 3, 1 / 5


class Teacher:
    """The received model, from what it was to the end of the run.

    Attributes:
        received: what `giving` needs.
        place: where words are exchanged; None: the model takes no token ids.
        states: its last states; None: only answers are taught.
        calibration: of its answers; None where these are not taught.
        wordings: the words that only the received model minds; None: none are looked for.
    """

    def __init__(self, run: Run, answers: bool, states: bool) -> None:
        """Ask the model as it is for all that is known of it later; nothing is tuned yet.

        Args:
            run: with the received values.
            answers: whether its answers are taught, which takes outputs that are logits of classes.
            states: whether its last states are.
        """
        found = token_place(run)
        self.place: TokenPlace | None = None if found is None else found[0]
        if self.place is not None:
            group_by_length(run, self.place)
        self.insertion = None if self.place is None else insertion_of(run, self.place)
        self.received: nn.Module = kept_received(run)
        self.states = LastStates.of(run, self.place) if states else None
        self.calibration: Calibration | None = None
        self.answers, self.share = answers and run.classes is not None, list[Tensor]()
        self.last: Tensor | None = None
        self.wordings: Wordings | None = None
        self.worded, self.searches = 0.0, 0
        if answers and not self.answers:
            run.note("the outputs are not logits of classes: the received model's answers were not taught")
        if states and self.states is None:
            run.note("no layer of the model keeps places apart: the received model's states were not taught")
        if run.classes is not None:
            logits, labels = [], []
            with run.eval_mode(), torch.no_grad():
                for batch in run.clean.batches(device=run.device):
                    logits.append(run.forward(batch).float())
                    labels.append(run.task.labels(batch))
            self.calibration = Calibration.of(torch.cat(logits), torch.cat(labels))

    def suspect_words(self, run: Run, share: float) -> None:
        """Have words looked for later on that only the received model minds, to be put into a share of the texts.

        Args:
            run: its model has the pretrained weights; nothing is tuned yet.
            share: 0: none are looked for.
        """
        if share == 0 or self.place is None or self.calibration is None or not self.answers:
            return
        found: Wordings | str = "words cannot be put into these batches"
        if self.insertion is not None:
            found = Wordings.of(run, self.received, self.insertion)
        if isinstance(found, str):
            run.note(f"no words were looked for that only the received model minds: {found}")
        else:
            self.wordings, self.worded = found, share

    def backward(self, run: Run, batch: Batch, weight: float, states: float) -> dict[str, float | Tensor]:
        """Add the gradient of the departure from the received answers and states at the batch, pieced together.

        Args:
            run: its model has BatchNorm in eval mode meanwhile.
            batch: clean samples; they go through the model in the run's parts.
            weight: of the divergence of the answers, in nats.
            states: weight of the departure of the states.

        Returns:
            both, means over the samples, and the share of the samples that was learned from. Texts with suspected words
            have no departure.
        """
        n = run.task.size(batch)
        plain, worded, rest = self._worded(run, batch)
        between, rest = self._between(run, rest)
        generator = run.own_generator() if self.place is not None else None
        sums: dict[str, float | Tensor] = {}

        def add(share: float, values: dict[str, Tensor]) -> None:
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + share * value

        with run.bn("eval"):
            if plain is not None:
                m = run.task.size(plain)
                for place in run.places(m):
                    few, share = take(plain, place, m), len(place) / n
                    add(share, self._without_words(run, few, take(worded, place, m), share, weight))
            for group, over in ((between, False), (rest, True)):
                if group is not None:
                    portion = run.task.size(group) / n
                    for part, share in run.parts(group):
                        new = self._pieces(run, generator) if over else None
                        add(portion * share, self._part(run, part, portion * share, new, weight, states))
        return sums

    def target(self, run: Run, batch: Batch) -> Tensor:
        """Return the calibrated received answers at a batch as it is, logits [N, C]."""
        assert self.calibration is not None
        with torch.no_grad(), giving(run, self.received) as given:
            return self.calibration(run.task.forward(given, batch))

    def search_after(self, run: Run, share: float) -> None:
        """Look for words if it is time to, after a share of the steps."""
        if share >= LOOKED_FOR + self.searches * AGAIN:
            self.searches += 1
            self.search(run)

    def search(self, run: Run) -> None:
        """Look for words that turn texts in the received model and not in the tuned one."""
        if self.wordings is None:
            return
        assert self.calibration is not None
        with run.timed("search"), giving(run, self.received) as given:
            self.wordings.compare(run, given, self.calibration)

    def _worded(self, run: Run, batch: Batch) -> tuple[Batch | None, Batch | None, Batch | None]:
        """Divide a batch: texts, the same ones with phrases in between, and the others; None where there are none."""
        if self.wordings is None or not self.wordings.suspects.scores:
            return None, None, batch
        n, task = run.task.size(batch), run.task
        phrases = self.wordings.suspects.draw(task.labels(batch), self.worded, run.generator)
        where = places(n, run.generator)
        new, done = self.wordings.insertion.put(task, batch, phrases, where)
        worded, rest = _divided(batch, new, done, n)
        return None if worded is None else take(batch, torch.nonzero(done).flatten(), n), worded, rest

    def _between(self, run: Run, batch: Batch | None) -> tuple[Batch | None, Batch | None]:
        """Return half of the texts, with a piece of another one between the words of each, and the other half.

        The other half gets pieces in the place of words when the model looks these up. Images get theirs here. None
        stands for no samples.
        """
        if batch is None or self.insertion is None:
            return None, batch if batch is None else pieced(run.task, batch, run.generator)
        ids, n = token_ids(run.task, batch), run.task.size(batch)
        assert ids is not None
        drawn = torch.rand(2, n, generator=run.generator, device="cpu", dtype=torch.float32)
        pieces = self.insertion.pieces(ids, run.generator).masked_fill((drawn[0] >= BETWEEN)[:, None], -1)
        return _divided(batch, *self.insertion.put(run.task, batch, pieces, drawn[1]), n)

    def _without_words(self, run: Run, plain: Batch, worded: Batch, share: float, weight: float) -> dict[str, Tensor]:
        """Add the gradient of the departure, at texts with a phrase in them, from the received answers without it."""
        assert self.calibration is not None
        with torch.no_grad(), giving(run, self.received) as given, run.autocast():
            target = self.calibration(run.task.forward(given, plain))
        taken = (target.argmax(1) == run.task.labels(plain).to(target.device)).float()
        with run.autocast():
            answer = run.forward(worded)
        kl = divergence(target, answer, taken)
        run.backward(share * weight * kl)
        self.share.append(taken.mean())
        return {"divergence": kl.detach(), "learned_from": taken.mean()}

    def _part(
        self,
        run: Run,
        part: Batch,
        share: float,
        new: Rewording | None,
        weight: float,
        states: float,
    ) -> dict[str, Tensor]:
        with torch.no_grad(), giving(run, self.received) as given, self._reworded(given, new), run.autocast():
            with self._watched(given) as old:
                target = run.task.forward(given, part)
        n = run.task.size(part)
        taken = torch.ones(n, dtype=torch.float32, device=target.device)
        if self.calibration is not None:
            target = self.calibration(target)
            taken = (target.argmax(1) == run.task.labels(part).to(target.device)).float()
        self.share.append(taken.mean())
        values = {"learned_from": taken.mean()}
        with self._reworded(run.model, new), self._watched(run.model) as mine:
            with run.autocast():
                answer = run.forward(part)
            total: Tensor | float = 0.0
            if self.answers:
                kl = divergence(target, answer, taken)
                total, values["divergence"] = weight * kl, kl.detach()
            departed = None if self.states is None else self.states.departure(run, n, old, mine, taken)
            if departed is not None:
                total, values["departure"] = total + states * departed, departed.detach()
            if isinstance(total, Tensor):
                run.backward(share * total)
        return values

    @torch.no_grad()
    def level(self, run: Run) -> None:
        """Shift the logits of the tuned model so that it leans to no class more than the calibrated received answers.

        What learns from a few samples leans to one class or another where it knows little, which changes its answers at
        samples near the boundary, and so does a trigger's success. Pieced samples are met by neither model as they are,
        so the leaning shows in them. The shift goes into the bias of the layer that makes the logits. Where there is no
        such bias (or one logit for two classes, a weight that is used elsewhere too, a bias that is computed), or the
        user froze it, or each process has a part of it, the model stays as it is.
        """
        if self.calibration is None or not self.answers or run.shards is not None:
            return
        try:
            last = LastLayer.of(replace(run, task=replace(run.alone, most=None), ranks=None))
        except ModelError:
            return
        bias = last.layer._parameters.get("bias")
        if not isinstance(bias, Tensor) or id(bias) in run.frozen:
            return
        generator = run.own_generator() if self.place is not None else None
        targets, answers = list[Tensor](), list[Tensor]()
        size = run.config.batch_size or run.clean.batch_size
        every = run.clean.subset(torch.arange(run.clean.n, device="cpu"))
        every.lengths = None  # texts of any lengths together: those of like lengths were tuned on
        with run.eval_mode():
            passes = (
                every.batches(size, shuffle=True, generator=run.generator, device=run.device)
                for _ in range(-(-LEVELLED // every.n))
            )
            for batch in itertools.islice(itertools.chain.from_iterable(passes), -(-LEVELLED // min(size, every.n))):
                for part, _ in run.parts(pieced(run.task, batch, run.generator)):
                    new = self._pieces(run, generator)
                    with giving(run, self.received) as given, self._reworded(given, new), run.autocast():
                        targets.append(self.calibration(run.task.forward(given, part)))
                    with self._reworded(run.model, new), run.autocast():
                        answers.append(run.forward(part).float())
        bias.add_(levelling(torch.cat(answers), torch.cat(targets)).to(bias))

    def _pieces(self, run: Run, generator: torch.Generator | None) -> Rewording | None:
        """Return what pieces texts together, alike in both models; None: the model takes no token ids."""
        return None if self.place is None else _once(self._neighbour(self.place.pieced(run.model, generator)))

    def _neighbour(self, pieces: Rewording) -> Rewording:
        """Return what puts the last text of the part before in front: a part of one text has no other of its own."""

        def new(ids: Tensor) -> tuple[Tensor, Tensor]:
            last, self.last = self.last, ids[-1:]
            if last is None or len(ids) > 1:
                return pieces(ids)
            assert self.place is not None
            missing = ids.shape[1] - last.shape[1]
            if missing > 0 and self.place.padding is None:
                return pieces(ids)
            last = F.pad(last, (0, max(0, missing)), value=self.place.padding or 0)[:, : ids.shape[1]]
            found, inside = pieces(torch.cat([last.to(ids.device), ids]))
            return found[1:], inside[1:]

        return new

    def say(self, run: Run) -> None:
        """Say in the result if hardly anything was taught."""
        if self.share and float(torch.stack(self.share).mean()) < FEW:
            run.note(
                "the received model's answers contradict the labels of most samples that were pieced together: hardly "
                "anything but the labels was learned"
            )

    def _watched(self, model: nn.Module) -> contextlib.AbstractContextManager[Seen]:
        return contextlib.nullcontext(Seen()) if self.states is None else self.states.watched(model)

    def _reworded(self, model: nn.Module, new: Rewording | None) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.place is None or new is None else self.place.reworded(model, new)


def divergence(target: Tensor, answer: Tensor, taken: Tensor | None = None) -> Tensor:
    """Return KL(target || answer) of logits [N, C]: the sum over the samples that are `taken`, [N] or all, over N."""
    taken = torch.ones(len(target), dtype=torch.float32, device=target.device) if taken is None else taken
    p, q = (x.float().log_softmax(1).clamp_min(-100) for x in (target, answer))
    return F.kl_div(q, p, reduction="none", log_target=True).sum(1) @ taken / len(taken)


def _divided(batch: Batch, new: Batch, which: Tensor, n: int) -> tuple[Batch | None, Batch | None]:
    """Return those of n samples of `new` that `which` [n] names, and the others of `batch`; None: there are none."""
    some, others = torch.nonzero(which).flatten(), torch.nonzero(~which).flatten()
    return take(new, some, n) if len(some) else None, take(batch, others, n) if len(others) else None


def _once(new: Rewording) -> Rewording:
    """Return what exchanges the same words whenever it is called: of two models that read the same texts."""
    drawn: list[tuple[Tensor, Tensor]] = []

    def same(ids: Tensor) -> tuple[Tensor, Tensor]:
        if not drawn:
            drawn.append(new(ids))
        return drawn[0]

    return same
