"""The methods. One file each; a file that is here is found, nothing else needs to know it."""

from __future__ import annotations

from fastfip.methods.base import Method, MethodConfig, Run, get, names, register, setting

__all__ = ["Method", "MethodConfig", "Run", "get", "names", "register", "setting"]
