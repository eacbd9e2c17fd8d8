"""Build the architecture that a state dict belongs to, from `module:factory`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastfip.errors import ConfigError, ModelError
from fastfip.registry import working_folder_importable

__all__ = ["load_arch"]


def load_arch(spec: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """Import a module and call a factory in it: this runs the code of that module, which is the user's own.

    Args:
        spec: `module:factory` (dots in it lead into classes), e.g. `nets:resnet18`, `torchvision.models:vgg11`.
            The working folder is searched as well.
        arguments: keyword arguments of the factory.

    Returns:
        the model.

    Raises:
        ConfigError: `spec` is not of that form, or the factory does not take the arguments.
        ModelError: the module cannot be imported, has no such factory, or the factory fails or returns no nn.Module.
    """
    module_name, colon, path = spec.partition(":")
    if not (module_name and colon and path) or not all(part.isidentifier() for part in path.split(".")):
        raise ConfigError(f"arch {spec!r} must be module:factory, e.g. mynets:resnet18 for resnet18 in mynets.py")
    if module_name.endswith(".py") or "/" in module_name or "\\" in module_name:
        name = module_name.removesuffix(".py").replace("\\", "/").strip("./").replace("/", ".")
        raise ConfigError(f"arch {spec!r} must name a module, not a file: {name}:{path}")
    with working_folder_importable():
        model = _built(spec, module_name, path, arguments or {})
    if not isinstance(model, nn.Module):
        raise ModelError(f"arch {spec!r} returned a {type(model).__name__}, not an nn.Module")
    return model


def _built(spec: str, module_name: str, path: str, arguments: Mapping[str, Any]) -> Any:
    try:
        factory: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        missing = isinstance(error, ModuleNotFoundError) and error.name == module_name.split(".")[0]
        why = f"there is none here ({Path.cwd()}) or installed" if missing else f"{type(error).__name__}: {error}"
        raise ModelError(f"arch {spec!r}: module {module_name} cannot be imported: {why}") from error
    for part in path.split("."):
        if not hasattr(factory, part):
            raise ModelError(f"arch {spec!r}: {module_name} has no {path}")
        factory = getattr(factory, part)
    if isinstance(factory, nn.Module) and not arguments:
        return factory
    if not callable(factory):
        raise ModelError(f"arch {spec!r} is a {type(factory).__name__}, not a function or class")
    try:
        return factory(**arguments)
    except TypeError as error:
        raise ConfigError(f"arch {spec!r} does not take {dict(arguments)}: {error}") from error
    except Exception as error:
        raise ModelError(f"arch {spec!r} failed: {type(error).__name__}: {error}") from error
