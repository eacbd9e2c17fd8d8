"""Numbers that hang on a sample alone: what looks drawn, and is the same in every batch and on every device."""

from __future__ import annotations

from torch import Tensor

__all__ = ["FACTOR", "PRIME", "mixed"]

#: A prime below 2^31, and a factor: products of what is below the prime and the factor stay in 64 bits.
PRIME, FACTOR = 2**31 - 1, 48_271


def mixed(numbers: Tensor, rounds: int) -> Tensor:
    """Return int64 numbers below PRIME such that close ones are no longer close."""
    for _ in range(rounds):
        numbers = (numbers ^ (numbers >> 13)) * FACTOR % PRIME
    return numbers
