"""Build the architecture that a state dict belongs to, from `module:factory` or from a library of models."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastfip.errors import ConfigError, ModelError, choices, reason
from fastfip.registry import working_folder_importable

__all__ = ["load_arch"]

#: Packages of models that are often named and not installed, by the name of their module.
_PACKAGES = {
    "torchvision": "torchvision",
    "timm": "timm",
    "transformers": "transformers",
    "torchaudio": "torchaudio",
    "open_clip": "open_clip_torch",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
    "efficientnet_pytorch": "efficientnet-pytorch",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "pytorchcv": "pytorchcv",
    "robustbench": "robustbench",
    "peft": "peft",
}


def load_arch(spec: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """Import a module and call a factory in it: this runs the code of that module, which is the user's own.

    Args:
        spec: `module:factory` (dots in it lead into classes), e.g. `nets:resnet18`, `torchvision.models:vgg11`; the
            working folder is searched as well. Or a model of a library, without weights: `timm:NAME`,
            `torchvision:NAME`, `hf:DIR`, where DIR is a folder with the config.json of a model of transformers
            (code that such a folder holds is not run).
        arguments: keyword arguments of the factory; of `hf:` entries of the config, e.g. `{"num_labels": 43}`.

    Returns:
        the model.

    Raises:
        ConfigError: `spec` is not of that form, or the factory does not take the arguments.
        ModelError: the module cannot be imported, has no such factory, or the factory fails or returns no nn.Module.
    """
    module_name, colon, path = spec.partition(":")
    if module_name in _LIBRARIES and path:
        model = _LIBRARIES[module_name](spec, path, arguments or {})
    else:
        model = _from_module(spec, module_name, colon, path, arguments or {})
    if not isinstance(model, nn.Module):
        raise ModelError(f"arch {spec!r} returned a {type(model).__name__}, not an nn.Module")
    return model


def _from_module(spec: str, module_name: str, colon: str, path: str, arguments: Mapping[str, Any]) -> Any:
    if not (module_name and colon and path) or not all(part.isidentifier() for part in path.split(".")):
        raise ConfigError(f"arch {spec!r} must be module:factory, e.g. mynets:resnet18 for resnet18 in mynets.py")
    if module_name.endswith(".py") or "/" in module_name or "\\" in module_name:
        name = module_name.removesuffix(".py").replace("\\", "/").strip("./").replace("/", ".")
        raise ConfigError(f"arch {spec!r} must name a module, not a file: {name}:{path}")
    with working_folder_importable():
        factory = _imported(spec, module_name)
        for part in path.split("."):
            if not hasattr(factory, part):
                raise ModelError(f"arch {spec!r}: {module_name} has no {path}")
            factory = getattr(factory, part)
        if isinstance(factory, nn.Module) and not arguments:
            return factory
        if not callable(factory):
            raise ModelError(f"arch {spec!r} is a {type(factory).__name__}, not a function or class")
        return _called(spec, factory, arguments)


def _imported(spec: str, module_name: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        top = error.name.split(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else ""
        why = f"{type(error).__name__}: {reason(error)}"
        if top == module_name.split(".")[0] and top not in _PACKAGES:
            why = f"there is none here ({Path.cwd()}) or installed"
        elif top in _PACKAGES and importlib.util.find_spec(top) is None:
            why = f"{top} is not installed: pip install {_PACKAGES[top]}"
        raise ModelError(f"arch {spec!r}: module {module_name} cannot be imported: {why}") from error


def _called(spec: str, factory: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    try:
        return factory(**arguments)
    except TypeError as error:
        raise ConfigError(f"arch {spec!r} does not take {dict(arguments)}: {reason(error)}") from error
    except Exception as error:
        raise ModelError(f"arch {spec!r} failed: {type(error).__name__}: {reason(error)}") from error


def _timm(spec: str, name: str, arguments: Mapping[str, Any]) -> Any:
    timm = _imported(spec, "timm")
    if timm.is_model(name):
        return _called(spec, timm.create_model, {"model_name": name, **arguments})
    return _own_or_unknown(spec, timm, name, timm.list_models(), arguments)


def _torchvision(spec: str, name: str, arguments: Mapping[str, Any]) -> Any:
    models = _imported(spec, "torchvision.models")
    known = models.list_models()
    if name in known:
        return _called(spec, models.get_model, {"name": name, **arguments})
    return _own_or_unknown(spec, _imported(spec, "torchvision"), name, known, arguments)


def _own_or_unknown(spec: str, module: Any, path: str, known: list[str], arguments: Mapping[str, Any]) -> Any:
    """Take `timm:create_model` for module:factory; what is neither that nor a model is named with what is nearest."""
    if hasattr(module, path.split(".")[0]):
        return _from_module(spec, module.__name__, ":", path, arguments)
    nearest = choices(path, known).partition(" There are ")[0]
    raise ModelError(f"arch {spec!r}: {module.__name__} has no model {path!r}{nearest}")


def _transformers(spec: str, folder: str, arguments: Mapping[str, Any]) -> Any:
    where = Path(folder)
    if not (where / "config.json").is_file():
        raise ModelError(f"arch {spec!r}: give a folder with a config.json, as save_pretrained writes it")
    transformers = _imported(spec, "transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config.update(dict(arguments))
    except Exception as error:  # whatever a folder from elsewhere makes of transformers
        raise ModelError(f"arch {spec!r}: its config.json cannot be used: {reason(error)}") from error
    name = next(iter(config.architectures or ()), None)
    kind = getattr(transformers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ModelError(f"arch {spec!r}: transformers has no class {name!r}, which its config.json names")
    return _called(spec, lambda: kind(config), {})


_LIBRARIES = {"timm": _timm, "torchvision": _torchvision, "hf": _transformers}
