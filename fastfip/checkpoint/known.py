"""Architectures that are known by the names that benchmarks give them, or by the names and shapes of their weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastfip.checkpoint.align import fits_or_raise
from fastfip.checkpoint.arch import load_arch
from fastfip.checkpoint.prefixes import align
from fastfip.errors import CheckpointError, ConfigError, ModelError, printable

__all__ = ["KNOWN", "OTHERS", "Architecture", "known_arch"]

_NETS = "fastfip.testing.nets"
#: No data set that networks are trained on has more classes.
_MOST_CLASSES = 10**6


@dataclass(frozen=True)
class Architecture:
    """What builds an architecture: a `spec` of `load_arch` with its arguments, `classes` being the name of one more."""

    spec: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    classes: str = "classes"

    def of(self, classes: int) -> tuple[str, dict[str, Any]]:
        """Return spec and arguments for a number of classes."""
        return self.spec, {**self.arguments, self.classes: classes}


#: By the names of BackdoorBench's `generate_cls_model`, those that are built here; plain torch, no weights.
KNOWN = {
    "preactresnet18": Architecture(f"{_NETS}:preact_resnet18"),
    "resnet20": Architecture(f"{_NETS}:ResNet20"),
    "resnet50": Architecture(f"{_NETS}:resnet50"),
    "vgg11": Architecture(f"{_NETS}:vgg", {"layers": 11, "norm": False}),
    "vgg16": Architecture(f"{_NETS}:vgg", {"layers": 16, "norm": False}),
    "vgg19": Architecture(f"{_NETS}:vgg", {"layers": 19, "norm": False}),
    "vgg19_bn": Architecture(f"{_NETS}:vgg", {"layers": 19}),
    "vit_b_16": Architecture(f"{_NETS}:resized_vit"),
    "vit_b_32": Architecture(f"{_NETS}:resized_vit", {"patch": 32}),
    "vit_l_16": Architecture(f"{_NETS}:resized_vit", {"dim": 1024, "depth": 24, "heads": 16}),
    "vit_l_32": Architecture(f"{_NETS}:resized_vit", {"patch": 32, "dim": 1024, "depth": 24, "heads": 16}),
    "convnext_tiny": Architecture(f"{_NETS}:convnext_tiny"),
}
#: Those that torchvision has to be installed for.
OTHERS = (
    "alexnet", "densenet121", "densenet161", "efficientnet_b0", "efficientnet_b3", "googlenet", "inception_v3",
    "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_large", "resnet18", "resnet34", "resnext50_32x4d",
    "shufflenet_v2_x1_0", "squeezenet1_0", "wide_resnet50_2",
)  # fmt: skip


def known_arch(
    weights: Mapping[str, tuple[int, ...]], name: str | None = None, classes: int | None = None
) -> tuple[str, dict[str, Any]]:
    """Return what `load_arch` builds the architecture from that some weights belong to. Nothing is allocated for it.

    Args:
        weights: the shape of each by its name; a prefix may stand before all of them.
        name: of the architecture, in BackdoorBench's words; None: whichever of the known ones has these weights.
        classes: how many; None: the rows of the last matrix.

    Raises:
        CheckpointError: the weights are not those of the architecture, or of none that is known.
        ModelError: torchvision, which has the architecture, is not installed.
    """
    if classes is None:
        classes = next((shape[0] for shape in reversed(list(weights.values())) if len(shape) == 2), 0)
    if not 1 <= classes <= _MOST_CLASSES:
        raise CheckpointError(f"cannot be told what it is of: {classes} classes")
    if name in OTHERS:
        if importlib.util.find_spec("torchvision") is None:  # and none of the working folder is taken for it
            raise ModelError(
                f"is a {name}: pip install torchvision, or name the code that builds it with arch (--arch)"
            )
        spec = f"torchvision:{name}", {"num_classes": classes}
        fault = _fault(weights, *spec)
    elif name in KNOWN:
        spec = KNOWN[name].of(classes)
        fault = _fault(weights, *spec)
    else:
        found = next((one.of(classes) for one in KNOWN.values() if not _fault(weights, *one.of(classes))), None)
        if found is not None:
            return found
        what = "is of no architecture that is known by its names" if name is None else f"is of {printable(name, 60)!r}"
        raise CheckpointError(
            f"{what}: name the code that builds it with arch (--arch); known are {', '.join((*KNOWN, *OTHERS))}"
        )
    if fault:
        raise CheckpointError(f"says that it is a {name} of {classes} classes, but it {fault}")
    return spec


def _fault(weights: Mapping[str, tuple[int, ...]], spec: str, arguments: Mapping[str, Any]) -> str | None:
    """Return why weights are not those of an architecture, which is built without memory for them; None: they are."""
    try:
        with torch.device("meta"):
            own = load_arch(spec, arguments).state_dict()
    except (ModelError, ConfigError):
        return None  # it cannot be built so: that it fits is found out when it is loaded
    try:
        theirs: dict[str, Tensor] = {}
        for ours, name in align(weights, own).items():
            like = own.get(ours)
            kind = torch.float32 if like is None else like.dtype
            theirs[ours] = torch.empty(weights[name], dtype=kind, device="meta")
        fits_or_raise(theirs, own, [name for name in own if name.endswith("num_batches_tracked")])
    except CheckpointError as error:
        return str(error)
    return None
