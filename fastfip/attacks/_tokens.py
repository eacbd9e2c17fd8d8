"""Tokens put into sequences: what attacks on texts share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastfip.attacks._mixing import FACTOR, PRIME, mixed
from fastfip.attacks.base import Attack
from fastfip.errors import ConfigError, DataError

__all__ = ["TokenInsertion"]


@dataclass(frozen=True)
class TokenInsertion(Attack):
    """Tokens are put into each sequence, and what no longer fits is cut off at the end of the text.

    A sequence is what stands between the padding at the left and at the right of its row; it grows into the right
    padding first. The attention mask is the model's own affair: make it of the new ids.

    Attributes:
        ids: of the tokens that are put in, as your tokenizer numbers them; None: they must be set before use.
        position: "start", "middle", "end", or "random": by the sequence's own tokens and `seed`, so that a sequence
            has the same one in every batch, however much it is padded.
        padding: id of the padding.
        head: number of tokens at the beginning that stay the first ones, such as [CLS].
        tail: number of tokens at the end that stay the last ones, such as [SEP], and are not cut off.
        seed: of what is random.
    """

    modality: ClassVar[str] = "tokens"

    ids: tuple[int, ...] | None = None
    position: Literal["random", "start", "middle", "end"] = "random"
    padding: int = 0
    head: int = 0
    tail: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if self.position not in ("random", "start", "middle", "end"):
            raise ConfigError(f"{kind}: position={self.position!r} must be 'random', 'start', 'middle' or 'end'")
        if self.head < 0 or self.tail < 0:
            raise ConfigError(f"{kind}: head={self.head} and tail={self.tail} must be >= 0")
        if self.ids is not None and (not self.ids or min(self.ids) < 0 or self.padding in self.ids):
            raise ConfigError(f"{kind}: ids={self.ids} must be >= 0, at least one, and not the padding {self.padding}")

    def check(self, x: Tensor) -> None:
        """Refuse what is no int64 [N, T]."""
        if x.dim() != 2 or x.dtype != torch.int64 or x.shape[1] == 0:
            raise DataError(f"tokens are {str(x.dtype)[6:]} {list(x.shape)}: give token ids int64 [N, T]")

    @abstractmethod
    def put_in(self, x: Tensor, ids: Tensor) -> tuple[Tensor, int]:
        """Return the tokens [N, K] for sequences x [N, T], of `ids`, and how many there are of places of their own.

        One place for each of the K tokens, or 1: all in a row.
        """

    def trigger(self, x: Tensor) -> Tensor:
        """Put the tokens into sequences x, int64 [N, T]."""
        if self.ids is None:
            raise ConfigError(f"{self.name} has no token ids yet: set `ids` to those of your tokenizer")
        self.check(x)
        tokens, apart = self.put_in(x, torch.tensor(self.ids, device=x.device))
        count, width = tokens.shape[1], x.shape[1]
        if count + self.head + self.tail > width:
            kept = f"with {self.head + self.tail} that stay " if self.head + self.tail else ""
            raise DataError(f"{count} tokens {kept}do not fit sequences of {width}: pad them to more, or put in fewer")
        columns = torch.arange(width, device=x.device)
        text = x != self.padding
        end = (text * (columns + 1)).amax(1, keepdim=True)
        start = torch.minimum((~text).cumprod(1).sum(1, keepdim=True), end)
        old = x.gather(1, (start + columns).clamp(max=width - 1))  # the text begins in column 0
        tail = (end - start).clamp(max=self.tail)
        body = end - start - tail
        kept_body = body.clamp(max=width - self.tail - count)
        first = kept_body.clamp(max=self.head)
        places = torch.cat([self._places(x, first, kept_body, number) for number in range(apart)], 1).sort(1).values
        places = places.expand(-1, count) + columns[:count]
        is_new = torch.zeros_like(text).scatter(1, places, torch.ones_like(places, dtype=torch.bool))
        source = columns - is_new.cumsum(1)
        source = torch.where(columns < kept_body + count, source, body + columns - kept_body - count)
        text_now = old.gather(1, source.clamp(0, width - 1)).scatter(1, places, tokens)
        length = kept_body + count + tail
        begin = torch.minimum(start, width - length)
        shown = text_now.gather(1, (columns - begin).clamp(0, width - 1))
        return torch.where((columns >= begin) & (columns < begin + length), shown, self.padding)

    def _places(self, x: Tensor, first: Tensor, last: Tensor, number: int) -> Tensor:
        """Return where a token goes, [N, 1] from `first` to `last`, each [N, 1]."""
        if self.position == "start":
            return first
        if self.position == "end":
            return last
        if self.position == "middle":
            return first + (last - first) // 2
        return first + self.drawn(x, last - first + 1, 2 * number)

    def drawn(self, x: Tensor, most: Tensor | int, salt: int) -> Tensor:
        """Return a number from 0 to most - 1, [N, 1], that hangs on the tokens of each sequence of x and the seed."""
        found = torch.full((len(x), 1), (self.seed * 7919 + 104_729 * (salt + 1)) % PRIME, device=x.device)
        for column in x.split(1, 1):
            found = torch.where(column == self.padding, found, (found * FACTOR + column + 1) % PRIME)
        return mixed(found, 2) * most // PRIME
