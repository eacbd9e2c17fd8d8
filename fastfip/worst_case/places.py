"""Where a universal perturbation is added: the model's input, or what its first layer makes of token ids.

Inputs of real numbers are moved as they are. Token ids cannot be moved by a little; the vectors that the model looks up
for them can. The layer that does so is found by running the model once, not by its name or class. A word or a sentence
that an attacker puts in a text is a few vectors at some place of it, so the perturbation is a few free vectors that are
written over those at a place drawn anew for each sample ("soft trigger").
"""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastfip.data.batch import Batch
from fastfip.data.task import Task
from fastfip.nets.state import eval_mode
from fastfip.worst_case.layers_of_ids import calls_of_lookups, chosen_lookup, ids_of_call, padding_of
from fastfip.worst_case.lookups import Written, vectors_of_words
from fastfip.worst_case.pixels import PixelRange

__all__ = ["InputPlace", "OfInputs", "Place", "TokenPlace"]

#: Vectors of a soft trigger. Several in a row turn over any short text, backdoor or not: docs/notes/trials.md.
WIDTH = 1
#: Share of the texts that are reworded, and words of the table that are written into one at most.
SHARE, WORDS = 0.75, 3
#: Share of those texts that get a piece of another text instead, and its words at most.
SPLICED, PIECE = 0.5, 8
#: Share of the words of a text that are exchanged at most by `scrambled`.
EXCHANGED = 0.8

#: Ids -> those that are looked up in their place, and where they are others.
Rewording = Callable[[Tensor], tuple[Tensor, Tensor]]


class Place(ABC):
    """Where perturbations are."""

    @abstractmethod
    def nbytes(self, task: Task, batch: Batch) -> int:
        """Return the bytes of what is moved of a batch: large ones go through the model in parts."""

    @abstractmethod
    def dtype(self, task: Task, batch: Batch) -> torch.dtype:
        """Return the dtype in which perturbations are added."""

    @abstractmethod
    def moved(
        self, model: nn.Module, task: Task, batch: Batch, used: Tensor
    ) -> contextlib.AbstractContextManager[Batch]:
        """Return a context that gives the batch to run the model on, which meets the perturbations `used` [N, ...].

        The passes, forward and backward, belong inside the context.
        """


class OfInputs(Place):
    """A place in the model's input of real numbers."""

    def nbytes(self, task: Task, batch: Batch) -> int:
        """Return the bytes of the inputs."""
        return task.inputs(batch).nbytes

    def dtype(self, task: Task, batch: Batch) -> torch.dtype:
        """Return that of the inputs."""
        return task.inputs(batch).dtype


@dataclass(frozen=True)
class InputPlace(OfInputs):
    """The model's input; moved inputs stay in the range of the clean ones."""

    range: PixelRange

    @contextlib.contextmanager
    def moved(self, model: nn.Module, task: Task, batch: Batch, used: Tensor) -> Iterator[Batch]:
        """Give the batch with its inputs moved."""
        x = task.inputs(batch)
        yield task.replace_inputs(batch, self.range.clamp(x + used))


@dataclass
class TokenPlace(Place):
    """The vectors of token ids, as the layer `name` looks them up.

    Where they are [N, T, d] the perturbation is `width` vectors [K, d] about `center`, written over those at a place
    that is drawn for each sample among its tokens; where they are of another form (the mean of a bag of words, [N, d])
    it is added to them.

    Attributes:
        name: of the layer in `model.named_modules()`.
        center: mean vector of clean tokens, [d]; None: the perturbation is added.
        width: K.
        padding: id that fills the rows at their ends; None: there is none.
        head: 1 where every sequence begins with the same id, such as [CLS], which is left alone.
        generator: on the CPU; places are drawn from it.
    """

    name: str
    center: Tensor | None
    width: int
    padding: int | None
    head: int
    generator: torch.Generator

    @classmethod
    def of(
        cls, model: nn.Module, forward: Callable[[Batch], Any], batches: list[Batch], generator: torch.Generator
    ) -> tuple[TokenPlace, Tensor] | None:
        """Find the layer that turns ids into vectors.

        It is the innermost module that is given whole numbers alone and returns real ones, one row a sample: the one
        whose input is a tensor of the batch or a part of its columns, else the one whose input has the most different
        numbers. Positions and types of tokens, the same in every row, are not meant.

        Args:
            model: in eval mode.
            forward: runs it on a batch.
            batches: some clean ones, on the model's device.
            generator: on the CPU.

        Returns:
            the place, and clean examples of what is perturbed: [M, K, d], or the rows [M, ...] that are added to. None
            where no such layer is met.
        """
        name, seen, found = None, [], []
        for batch in batches:
            calls = calls_of_lookups(model, forward, batch)
            if name is None:
                name = chosen_lookup(calls, batch)
            mine = next((call for call in calls if call[0] == name), None)
            if name is None or mine is None:
                return None
            seen.append(mine[1].cpu())
            found.append(mine[2])
        assert name is not None
        if not (seen[0].dim() == 2 and found[0].dim() == 3 and found[0].shape[:2] == seen[0].shape):
            same = len({out.shape[1:] for out in found}) == 1
            return (cls(name, None, 0, None, 0, generator), torch.cat(found)) if same else None
        padding = padding_of(seen)
        first = {int(v) for ids in seen for v in ids[:, 0].tolist()}
        place = cls(name, None, min(WIDTH, min(ids.shape[1] for ids in seen)), padding, int(len(first) == 1), generator)
        tokens = torch.cat([out[(ids != padding).to(out.device)] if padding is not None else out.flatten(0, 1)
                            for ids, out in zip(seen, found)]).float()  # fmt: skip
        place.center = tokens.mean(0)
        usable = len(tokens) // place.width * place.width
        return place, (tokens[:usable] - place.center).reshape(-1, place.width, tokens.shape[1])

    def nbytes(self, task: Task, batch: Batch) -> int:
        """Return 0: a batch of ids goes through the model as a whole, as the user's does."""
        return 0

    def dtype(self, task: Task, batch: Batch) -> torch.dtype:
        """Return float32."""
        return torch.float32

    @contextlib.contextmanager
    def moved(self, model: nn.Module, task: Task, batch: Batch, used: Tensor) -> Iterator[Batch]:
        """Give the batch as it is, with a hook on the layer while the block runs."""
        first: list[Tensor] = []
        drawn: list[Tensor] = []
        rows = task.rows(len(used))
        mine = used[rows]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
            ids = ids_of_call(args, kwargs)
            if ids is None or not isinstance(out, Tensor) or out.shape[0] != mine.shape[0]:
                return out
            if first and not (ids.shape == first[0].shape and bool((ids == first[0]).all())):
                return out  # the same layer met again with other ids: a decoder's
            if not first:
                first.append(ids)
                drawn.append(ids if self.center is None else self._places(ids, self._uniform(len(used))[rows]))
            return self._written(out, mine, drawn[0])

        handle = model.get_submodule(self.name).register_forward_hook(hook, with_kwargs=True)
        try:
            yield batch
        finally:
            handle.remove()

    @contextlib.contextmanager
    def reworded(
        self,
        model: nn.Module,
        new: Rewording | None = None,
        seen: list[tuple[Tensor, Tensor]] | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[None]:
        """Have the layer look up other words in some places of the texts, while the block runs.

        In each pass of the model these are the ids that the layer is given first; the same ids get the same words
        throughout the block. Where the layer has no table (see `table`) nothing is changed.

        Args:
            model: it has the layer.
            new: makes, of the ids [N, T] that the layer is given, those that are looked up, and bool [N, T], where
                they are; None: `mixed`.
            seen: gets that bool and the vectors [N, T, d] as a leaf, for their gradient; with the model's parameters
                frozen.
            generator: on the CPU, for `mixed`; None: the place's own.
        """
        layer = model.get_submodule(self.name)
        look_up = vectors_of_words(layer) if self.center is not None else None
        if look_up is None:
            yield
            return
        passes = Written(self.mixed(model, generator) if new is None else new)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
            ids = ids_of_call(args, kwargs)
            if ids is None or ids.dim() != 2 or not isinstance(out, Tensor) or out.shape[:-1] != ids.shape:
                return out
            drawn = passes.of(ids)
            if drawn is None:
                return out
            found, inside = drawn
            written = torch.where(inside[:, :, None], look_up(found).to(out.dtype), out)
            if seen is not None:
                written = written.detach().requires_grad_(True)
                seen.append((inside, written))
            return written

        begin = model.register_forward_pre_hook(passes.begin)
        handle = layer.register_forward_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            begin.remove()
            handle.remove()

    def mixed(self, model: nn.Module, generator: torch.Generator | None = None) -> Rewording:
        """Return what writes words that say nothing of the label over a part of most texts.

        They are words drawn from the whole table, as no clean text may hold those of a trigger, or a piece of another
        text of the batch, as long as a short sentence; half of a text stays at least. `generator` is on the CPU; None:
        the place's own.
        """
        words = len(model.get_submodule(self.name).weight)  # type: ignore[arg-type]
        generator = self.generator if generator is None else generator
        uniform = functools.partial(self._uniform, generator=generator)

        def new(ids: Tensor) -> tuple[Tensor, Tensor]:
            n, length = ids.shape
            begin, end = self.ends(ids)
            spliced = uniform(n) < SPLICED
            most = torch.where(spliced, PIECE, WORDS)
            most = torch.minimum(most, ((end - begin) // 2).clamp_min(1))
            width = torch.where(uniform(n) < SHARE, 1 + (uniform(n) * most).long(), 0)
            start = begin + (uniform(n) * (end - begin - width + 1).clamp_min(1)).long()
            column = torch.arange(length, device="cpu")
            inside = (column >= start[:, None]) & (column < (start + width)[:, None])
            piece = self._pieces(ids, start, width, uniform)
            drawn = torch.randint(0, words, (n, length), generator=generator, device="cpu")
            chosen = torch.where(spliced[:, None], piece, drawn)
            inside = inside.to(ids.device)
            return torch.where(inside, chosen.to(ids.device), ids), inside

        return new

    def pieced(self, model: nn.Module, generator: torch.Generator | None = None) -> Rewording:
        """Return what writes a piece of the next text over as many words of each: from one word up to all of them.

        Such texts are made of words as they stand together in clean ones. `generator` is on the CPU; None: the place's
        own.
        """
        uniform = functools.partial(self._uniform, generator=self.generator if generator is None else generator)

        def new(ids: Tensor) -> tuple[Tensor, Tensor]:
            n, length = ids.shape
            begin, end = self.ends(ids)
            most = torch.minimum(end - begin, (end - begin).roll(1))
            width = torch.minimum(1 + (uniform(n) * most).long(), most)
            start = begin + (uniform(n) * (end - begin - width + 1)).long()
            column = torch.arange(length, device="cpu")
            inside = ((column >= start[:, None]) & (column < (start + width)[:, None])).to(ids.device)
            return torch.where(inside, self._pieces(ids, start, width, uniform).to(ids.device), ids), inside

        return new

    def _pieces(self, ids: Tensor, start: Tensor, width: Tensor, uniform: Callable[[int], Tensor]) -> Tensor:
        """Return [N, T] on the CPU, with `width` words of the text before each row from its column `start` on.

        They are a piece of that text from a place of its own. What the other columns hold means nothing.
        """
        n, length = ids.shape
        begin, end = self.ends(ids.roll(1, 0))
        first = begin + (uniform(n) * (end - begin - width + 1).clamp_min(1)).long()
        column = torch.arange(length, device="cpu")
        return ids.roll(1, 0).cpu().gather(1, (first[:, None] + column - start[:, None]).clamp(0, length - 1))

    def scrambled(self, model: nn.Module, generator: torch.Generator | None = None) -> Rewording:
        """Return what exchanges many words of each text, each for itself, for words of the whole table.

        In a text any share of the words from none to `EXCHANGED` is equally likely. A trigger of several words stays
        out of such texts, and what the model knows of single words shows in them. Words of other texts are not among
        them on purpose: those are the common ones, of which a trigger of a whole sentence is made as well, and holding
        the answers to each of them may teach the sentence again. `generator` is on the CPU; None: the place's own.
        """
        words = len(model.get_submodule(self.name).weight)  # type: ignore[arg-type]
        generator = self.generator if generator is None else generator

        def new(ids: Tensor) -> tuple[Tensor, Tensor]:
            n, length = ids.shape
            begin, end = self.ends(ids)
            column = torch.arange(length, device="cpu")
            within = (column >= begin[:, None]) & (column < end[:, None])
            share = EXCHANGED * self._uniform(n, generator)
            inside = within & (self._uniform(n * length, generator).view(n, length) < share[:, None])
            drawn = torch.randint(0, words, (n, length), generator=generator, device="cpu")
            inside = inside.to(ids.device)
            return torch.where(inside, drawn.to(ids.device), ids), inside

        return new

    def phrased(self, phrases: Tensor, share: Tensor | None = None, rows: slice = slice(None)) -> Rewording:
        """Return what writes a phrase over words of each text.

        Args:
            phrases: [N, K] ids on the CPU, one for each text; -1 fills the shorter ones.
            share: [N] in [0, 1): where each stands in its text; None: drawn anew.
            rows: of the N texts that this process runs.
        """
        at = (self._uniform(len(phrases)) if share is None else share)[rows]
        phrases = phrases[rows]

        def new(ids: Tensor) -> tuple[Tensor, Tensor]:
            if len(ids) != len(phrases):
                return ids, torch.zeros_like(ids, dtype=torch.bool)
            n, length = ids.shape
            begin, end = self.ends(ids)
            width = torch.minimum((phrases >= 0).sum(1), end - begin)
            start = begin + (at * (end - begin - width + 1)).long()
            offset = torch.arange(length, device="cpu") - start[:, None]
            inside = (offset >= 0) & (offset < width[:, None])
            words = phrases.gather(1, offset.clamp(0, phrases.shape[1] - 1))
            inside = inside.to(ids.device)
            return torch.where(inside, words.to(ids.device), ids), inside

        return new

    def table(self, model: nn.Module) -> Tensor | None:
        """Return the vectors [words, d] that the layer makes of all its words, without gradient.

        None: it has no table, makes of a word what depends on others (see `vectors_of_words`), or reads bags of words.
        """
        layer = model.get_submodule(self.name)
        look_up = vectors_of_words(layer) if self.center is not None else None
        if look_up is None:
            return None
        weight: Tensor = layer.weight  # type: ignore[assignment]
        with torch.no_grad(), eval_mode(layer):
            return look_up(torch.arange(len(weight), device=weight.device)[None])[0]

    def _written(self, out: Tensor, used: Tensor, places: Tensor) -> Tensor:
        if self.center is None:
            return out + used.to(out.dtype)
        width = places.shape[1]
        vectors = (self.center + used[:, :width]).to(out.dtype)
        return out.scatter(1, places[:, :, None].expand(-1, -1, out.shape[2]), vectors)

    def _places(self, ids: Tensor, share: Tensor) -> Tensor:
        """Return the columns [N, K] that are written over, in a row within the tokens of each sequence of ids [N, T].

        `share` [N] in [0, 1) says where.
        """
        n, length = ids.shape
        width = min(self.width, length)
        begin, end = self.ends(ids)
        room = (end - begin - width).clamp_min(0) + 1
        start = begin + (share * room).long()
        start = start.clamp(max=length - width)
        return (start[:, None] + torch.arange(width, device="cpu")).to(ids.device)

    def ends(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first column of each text of ids [N, T] that may be written over and the one after its last."""
        text = torch.ones_like(ids, dtype=torch.bool) if self.padding is None else ids != self.padding
        begin = text.int().argmax(1).cpu() + self.head
        return begin, torch.maximum((ids.shape[1] - text.int().flip(1).argmax(1)).cpu(), begin)

    def _uniform(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        generator = self.generator if generator is None else generator
        return torch.rand(n, generator=generator, device="cpu", dtype=torch.float32)
