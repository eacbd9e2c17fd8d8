"""Sentence (AddSent): a fixed sentence in the text. Dai et al., arXiv 1905.12457."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastfip.attacks._tokens import TokenInsertion
from fastfip.attacks.base import register

__all__ = ["Sentence"]


@register
@dataclass(frozen=True)
class Sentence(TokenInsertion):
    """The same tokens in a row are put into each sequence: `Sentence(ids=tuple(encode("I watched this 3D movie")))`.

    Without the special tokens that a tokenizer adds at both ends. The paper puts it between two sentences of the text;
    this one may stand between any two tokens.
    """

    name: ClassVar[str] = "sentence"
    summary: ClassVar[str] = "a fixed sentence put into a text"

    def put_in(self, x: Tensor, ids: Tensor) -> tuple[Tensor, int]:
        """Return the sentence [N, K] for sequences x, and 1: it has one place."""
        return ids.expand(len(x), -1), 1
