"""Backdoor attacks for benchmarks, tests and examples. One file each; a file that is here is found."""

from __future__ import annotations

from fastfip.attacks.base import Attack, Ground, attack_labels, get, names, register
from fastfip.attacks.train import Backdoored, Injection, poison_and_train

__all__ = [
    "Attack", "Backdoored", "Ground", "Injection", "attack_labels", "get", "names", "poison_and_train", "register",
]  # fmt: skip
