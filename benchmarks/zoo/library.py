"""timm, Hugging Face's transformers and peft: whether they are here, and how they are imported."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from typing import Any

import torch

#: What torchvision's Python files ask of its C library when they are imported. That library is linked to CUDA in the
#: wheels of PyPI, and torch for a CPU cannot load it; no classifier calls these.
_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_DECLARED: list[torch.library.Library] = []  # what is declared stays so as long as this lives


def load(name: str) -> Any:
    """Import a library, offline.

    Raises:
        ImportError: it is not installed: `make zoo` installs it.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if name == "timm" and not _DECLARED:
        declared = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, op):
                declared.define(f"{op}{_NMS}")
        _DECLARED.append(declared)
    return importlib.import_module(name)


def version(name: str) -> str:
    """Return the name of a library with its version."""
    return f"{name} {importlib.metadata.version(name)}"
