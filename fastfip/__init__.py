"""Clean backdoored networks with a few clean samples, guided by the Fisher information.

Importing this package loads nothing but this file: every public name is resolved when it is first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # what type checkers read instead of __getattr__; tests/test_typing.py holds it to the tables below
    from fastfip import (
        attacks as attacks,
        auditing as auditing,
        backdoorbench as backdoorbench,
        checkpoint as checkpoint,
        comparison as comparison,
        data as data,
        errors as errors,
        fisher as fisher,
        methods as methods,
        metrics as metrics,
        nets as nets,
        ops as ops,
        purification as purification,
        reporting as reporting,
        spectral as spectral,
        worst_case as worst_case,
    )
    from fastfip.auditing.audit import audit as audit
    from fastfip.auditing.margins import margins as margins
    from fastfip.cli.many.rows import ManyRow as ManyRow
    from fastfip.cli.many.run import ManyResult as ManyResult, purify_many as purify_many
    from fastfip.checkpoint import load_checkpoint as load_checkpoint, save_checkpoint as save_checkpoint
    from fastfip.comparison.compare import compare as compare
    from fastfip.data.stand_ins import stand_in_images as stand_in_images
    from fastfip.fisher import (
        FisherPenalty as FisherPenalty,
        backward_with_fisher as backward_with_fisher,
        fisher_diagonal as fisher_diagonal,
        fisher_trace as fisher_trace,
    )
    from fastfip.fisher.sharpness import sharpness as sharpness
    from fastfip.integrations import accelerate as accelerate, hf as hf, lightning as lightning
    from fastfip.metrics import evaluate as evaluate
    from fastfip.purification.callbacks import Callback as Callback
    from fastfip.purification.purify import purify as purify, purify_ as purify_
    from fastfip.purification.result import PurifyResult as PurifyResult

# public name -> module that holds it. No module may have the name of a function listed here: importing a submodule
# sets it as an attribute of the package, and would hide the function.
_WHERE = {
    "purify": "fastfip.purification.purify",
    "purify_": "fastfip.purification.purify",
    "PurifyResult": "fastfip.purification.result",
    "Callback": "fastfip.purification.callbacks",
    "backward_with_fisher": "fastfip.fisher",
    "FisherPenalty": "fastfip.fisher",
    "fisher_diagonal": "fastfip.fisher",
    "fisher_trace": "fastfip.fisher",
    "sharpness": "fastfip.fisher.sharpness",
    "stand_in_images": "fastfip.data.stand_ins",
    "audit": "fastfip.auditing.audit",
    "margins": "fastfip.auditing.margins",
    "evaluate": "fastfip.metrics",
    "compare": "fastfip.comparison.compare",
    "purify_many": "fastfip.cli.many.run",
    "ManyRow": "fastfip.cli.many.rows",
    "ManyResult": "fastfip.cli.many.run",
    "load_checkpoint": "fastfip.checkpoint",
    "save_checkpoint": "fastfip.checkpoint",
}
#: The same for what needs a package that is an extra: `from fastfip import *` must not ask for it.
_EXTRAS = dict.fromkeys(("accelerate", "hf", "lightning"), "fastfip.integrations")
_MODULES = (
    "attacks",
    "auditing",
    "backdoorbench",
    "checkpoint",
    "comparison",
    "data",
    "errors",
    "fisher",
    "methods",
    "metrics",
    "nets",
    "ops",
    "purification",
    "reporting",
    "spectral",
    "worst_case",
)

__all__ = ["__version__", *_MODULES, *_WHERE]


if not TYPE_CHECKING:  # else every name that is not there would be one of type Any

    def __getattr__(name: str) -> Any:
        if name in _WHERE or name in _EXTRAS:
            value = getattr(importlib.import_module({**_WHERE, **_EXTRAS}[name]), name)
        elif name in _MODULES:
            value = importlib.import_module(f"fastfip.{name}")
        else:
            raise AttributeError(f"module 'fastfip' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_EXTRAS})
