"""How a model of a library wants its images: what timm, torchvision and transformers say of it, as `Pixels`."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastfip.data.resize import INTERPOLATIONS
from fastfip.data.scaling import Pixels
from fastfip.errors import ConfigError, FastFIPError, ModelError, printable, reason

__all__ = ["own_pixels"]

#: Where transformers writes it: a file of its own, or a part of a file with more.
_FILES = (("preprocessor_config.json", None), ("processor_config.json", "image_processor"))


def own_pixels(spec: str, model: nn.Module, arguments: Mapping[str, Any] | None = None) -> Pixels | None:
    """Return how a model of a library was meant to be given its images.

    Args:
        spec: as for `load_arch`: `timm:NAME` has it in `pretrained_cfg`, `torchvision:NAME` in the transforms of its
            default weights, `hf:DIR` in the preprocessor_config.json of the folder.
        model: what `load_arch` made of it.
        arguments: those of `load_arch`: an `img_size` or `image_size` among them is the size, with nothing cut off.

    Returns:
        size, resize, interpolation, mean, std and scale; None for other forms of `spec`, and where nothing is said.

    Raises:
        ConfigError: what is said has no counterpart here, e.g. a border around the image.
        ModelError: preprocessor_config.json cannot be read.
    """
    library, _, name = spec.partition(":")
    if library not in _READERS or not name:
        return None
    try:
        found = _READERS[library](name, model)
    except FastFIPError as error:
        raise type(error)(f"arch {printable(spec)!r}: {error}") from None
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise ModelError(f"arch {printable(spec)!r}: its preprocessing cannot be understood: {reason(error)}") from None
    if found is None:
        return None
    side = next((v for k, v in (arguments or {}).items() if k in ("img_size", "image_size")), None)
    changes: dict[str, Any] = {"of": spec}
    if side is not None:
        changes |= {"size": _pair(side), "resize": None}
    return Pixels(**{**found, **changes})


def _pair(side: Any) -> tuple[int, int]:
    pair = side if isinstance(side, (list, tuple)) else (side, side)
    return int(pair[0]), int(pair[-1])


def _timm(name: str, model: nn.Module) -> dict[str, Any] | None:
    said: Any = getattr(model, "pretrained_cfg", None)
    if not isinstance(said, Mapping) or not said.get("input_size"):
        return None
    channels, height, width = map(int, said["input_size"])
    share = float(said.get("crop_pct") or 0.875)
    before = (math.floor(height / share), math.floor(width / share))
    mode = said.get("crop_mode") or "center"
    resize: Any = before
    if mode == "center" and height == width:
        resize = before[0]
    elif mode != "squash":
        raise ConfigError(f"its crop_mode is {mode!r} for {height} x {width}: give --size, --mean and --std")
    return {
        "size": (height, width),
        "resize": None if resize == (height, width) else resize,
        "interpolation": _interpolation(said.get("interpolation", "bilinear")),
        "mean": tuple(map(float, said["mean"])),
        "std": tuple(map(float, said["std"])),
        "channels": channels if channels in (1, 3) else None,
    }


def _torchvision(name: str, model: nn.Module) -> dict[str, Any] | None:
    models = importlib.import_module("torchvision.models")
    if name not in models.list_models():  # `torchvision:models.resnet18` is module:factory
        return None
    weights = models.get_model_weights(name)
    transforms = getattr(weights, "DEFAULT", next(iter(weights), None))
    said: Any = None if transforms is None else transforms.transforms()
    if type(said).__name__ != "ImageClassification":  # detection, segmentation and video have no one size
        return None
    (resize, *_), crop = said.resize_size, said.crop_size
    return {
        "size": _pair(crop),
        "resize": int(resize),
        "interpolation": _interpolation(said.interpolation.value),
        "mean": tuple(map(float, said.mean)),
        "std": tuple(map(float, said.std)),
        "channels": 3,
    }


def _transformers(folder: str, model: nn.Module) -> dict[str, Any] | None:
    said = _written(Path(folder))
    if said is None:
        return None
    out: dict[str, Any] = {"channels": {1: 1, 3: 3}.get(len(said.get("image_mean") or ()))}
    if said.get("do_resize", True) and said.get("size") is not None:
        out |= _sizes(said)
    elif said.get("do_center_crop") and said.get("crop_size") is not None:
        raise ConfigError("it cuts images without a resize: give --size, --mean and --std")
    if said.get("do_normalize", True):
        out |= {"mean": tuple(map(float, said["image_mean"])), "std": tuple(map(float, said["image_std"]))}
    factor = float(said.get("rescale_factor", 1 / 255)) if said.get("do_rescale", True) else 1.0
    if math.isclose(factor, 1.0):
        out["scale"] = "255"
    elif not math.isclose(factor, 1 / 255, rel_tol=1e-3):
        raise ConfigError(f"it multiplies pixels by {factor:g}: give --scale, --mean and --std")
    return out


def _written(folder: Path) -> dict[str, Any] | None:
    """Return what a folder says of images; None where it says nothing (a model of texts)."""
    for name, part in _FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"its {name} cannot be read: {reason(error)}") from None
        said = said.get(part) if part is not None and isinstance(said, dict) else said
        if isinstance(said, dict) and {"size", "image_mean", "do_resize"} & set(said):
            return said
    return None


def _sizes(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return size, resize and interpolation of a preprocessor_config.json."""
    size, crop = said["size"], said.get("crop_size") if said.get("do_center_crop") else None
    size = size if isinstance(size, Mapping) else {"shortest_edge" if crop else "both": size}
    out = {"interpolation": _interpolation(said.get("resample", 2))}
    shortest = size.get("shortest_edge")
    if shortest is None:
        stretched = (int(size["height"]), int(size["width"])) if "height" in size else _pair(size["both"])
        return {**out, "size": _cropped(crop) or stretched, "resize": stretched if crop else None}
    if crop is not None:
        return {**out, "size": _cropped(crop), "resize": int(shortest)}
    share = said.get("crop_pct")
    if share is None:
        raise ConfigError("it keeps the proportions of images, so that they have no one size: give --size")
    side = int(shortest)  # ConvNeXT: small images are cut, large ones stretched
    return {**out, "size": (side, side), "resize": int(side / float(share)) if side < 384 else None}


def _cropped(crop: Any) -> tuple[int, int] | None:
    return (int(crop["height"]), int(crop["width"])) if isinstance(crop, Mapping) else crop and _pair(crop)


def _interpolation(name: Any) -> str:
    return INTERPOLATIONS[name] if isinstance(name, int) and 0 <= name < len(INTERPOLATIONS) else str(name)


_READERS = {"timm": _timm, "torchvision": _torchvision, "hf": _transformers}
