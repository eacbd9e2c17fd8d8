"""Backdoor attacks for benchmarks, tests and examples. One file each; a file that is here is found."""

from __future__ import annotations

from fastfip.attacks.base import Attack, attack_labels, get, names, register

__all__ = ["Attack", "attack_labels", "get", "names", "register"]
