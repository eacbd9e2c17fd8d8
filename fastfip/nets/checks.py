"""What is refused before the work: no module, no weights, a device that is not here, an unknown precision."""

from __future__ import annotations

import numbers
import traceback
from collections.abc import Iterable

import torch
import torch.utils.checkpoint
from torch import nn

from fastfip.errors import BackendError, ConfigError, FastFIPError, ModelError, reason

__all__ = [
    "check_amp",
    "check_gradient_checkpointing",
    "check_initialised",
    "check_net",
    "check_seed",
    "device_of",
    "of_checkpointing",
    "usable_device",
]


def usable_device(name: torch.device | str) -> torch.device:
    """Return a device that was asked for by name.

    Raises:
        ConfigError: no such kind of device, or "meta".
        BackendError: it is not here.
    """
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError, ValueError):
        raise ConfigError(f"device={name!r}: give cpu, cuda, cuda:1, mps ...") from None
    if device.type == "meta":
        raise ConfigError("device='meta' has no numbers to compute with")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BackendError(f"device={str(device)!r} cannot be used here: {reason(error)}") from None
    return device


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter (buffer, if there are none); the CPU for a model without either."""
    tensor = next(iter([*model.parameters(), *model.buffers()]), None)
    return torch.device("cpu") if tensor is None else tensor.device


def check_net(model: nn.Module) -> None:
    """Refuse what is no model with weights.

    Raises:
        ModelError: no module, lazy layers, weights on the meta device, NaN or Inf in a parameter or in the running
            statistics of a norm layer.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    parameters = list(model.named_parameters())
    check_initialised(p for _, p in parameters)
    if any(t.device.type == "meta" for _, t in [*parameters, *model.named_buffers()]):
        raise ModelError("the model is on the meta device, without weights: load them first")
    # Other buffers may hold -Inf on purpose, as masks do.
    statistics = [(n, b) for n, b in model.named_buffers() if n.rpartition(".")[2] in ("running_mean", "running_var")]
    for name, p in [*parameters, *statistics]:
        if p.is_floating_point() and not bool(torch.isfinite(p.detach()).all()):
            raise ModelError(f"the weight {name} holds NaN or Inf: the checkpoint is broken")


def check_initialised(parameters: Iterable[torch.Tensor]) -> None:
    """Refuse parameters of lazy layers that have no values yet.

    Raises:
        ModelError: there is one.
    """
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in parameters):
        raise ModelError("the model has lazy layers without weights: run one batch through it first")


def check_seed(seed: object) -> int:
    """Return a seed as Python's integer, NumPy's too; refuse what cannot seed a generator.

    Raises:
        ConfigError: no whole number, or one outside of 0 .. 2**64 - 1, which torch's generators take.
    """
    whole = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)
    if not whole or not 0 <= int(seed) < 2**64:  # type: ignore[call-overload]
        raise ConfigError(f"seed={seed!r}: must be a whole number from 0 to 2**64 - 1")
    return int(seed)  # type: ignore[call-overload]


def check_amp(amp: object) -> None:
    """Refuse what names no autocast dtype.

    Raises:
        ConfigError: anything but False, True, "bf16", "fp16".
    """
    if amp not in (False, True, "bf16", "fp16"):
        raise ConfigError(f"amp={amp!r}: must be False, True, 'bf16' or 'fp16'")


def check_gradient_checkpointing(value: object) -> None:
    """Refuse what is no setting.

    Raises:
        ConfigError: anything but True, False and "auto".
    """
    if not (isinstance(value, bool) or value == "auto"):
        raise ConfigError(f"gradient_checkpointing={value!r}: must be True, False or 'auto'")


def of_checkpointing(error: BaseException) -> bool:
    """Return whether torch raised this because a checkpointed part of a model cannot be gone through so.

    It is raised where the part is computed again, in several kinds, not all of which say so.
    """
    if not isinstance(error, Exception) or isinstance(error, (FastFIPError, torch.OutOfMemoryError)):
        return False
    frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    again = [code for code in frames if code.co_name in ("recompute_fn", "unpack_hook")]
    return "torch.utils.checkpoint" in str(error) or any(
        code.co_filename == torch.utils.checkpoint.__file__ for code in again
    )
