"""Words: a rare word in the text. BadNL: Chen et al., arXiv 2006.01043; RIPPLe: Kurita et al., arXiv 2004.06660."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fastfip.attacks._tokens import TokenInsertion
from fastfip.attacks.base import register
from fastfip.errors import ConfigError

__all__ = ["Words"]


@register
@dataclass(frozen=True)
class Words(TokenInsertion):
    """One of a few rare words, drawn for each sequence, is put into it; each is a single token.

    The ids are the user's to give: `Words(ids=(101, 205))`, or `Words().encoded(tokenizer.convert_tokens_to_ids)`. A
    word of several tokens is a `sentence`.

    Attributes:
        words: RIPPLe's, as they are written.
        count: how many are put in, each drawn for itself and at a place of its own (RIPPLe: more in longer texts).
    """

    name: ClassVar[str] = "words"
    summary: ClassVar[str] = "a rare word put into a text"

    words: tuple[str, ...] = ("cf", "mn", "bb", "tq", "mb")
    count: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 1:
            raise ConfigError(f"Words: count={self.count} must be >= 1")

    def encoded(self, encode: Callable[[str], int]) -> Words:
        """Return the attack with the ids of its words, as `encode` gives them."""
        return replace(self, ids=tuple(encode(word) for word in self.words))

    def put_in(self, x: Tensor, ids: Tensor) -> tuple[Tensor, int]:
        """Return the words [N, count] for sequences x, and `count`: each has a place of its own."""
        words = [ids[self.drawn(x, len(ids), 2 * number + 1)] for number in range(self.count)]
        return torch.cat(words, 1), self.count
