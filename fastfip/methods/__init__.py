"""The methods. One file each; a file that is here is found, nothing else needs to know it."""

from __future__ import annotations

from fastfip.methods.base import Method, MethodConfig, get, names, register

__all__ = ["Method", "MethodConfig", "get", "names", "register"]
