"""`purify` and the Fisher penalty inside the trainers of other libraries; each library is imported when it is used."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["accelerate", "hf", "lightning"]  # resolved when they are first used: each needs a package of its own


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
