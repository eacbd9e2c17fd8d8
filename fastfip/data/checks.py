"""What is found out before the work: whether the device, the net and a batch of it can be used at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastfip.errors import BackendError, ConfigError, FastFIPError, ModelError

__all__ = ["check_net", "first_outputs", "home_of", "reading", "usable_device"]


def usable_device(name: torch.device | str) -> torch.device:
    """Return a device that was asked for by name.

    Raises:
        ConfigError: no such kind of device, or "meta".
        BackendError: it is not here.
    """
    try:
        where = torch.device(name)
    except (RuntimeError, TypeError, ValueError):
        raise ConfigError(f"device={name!r}: give cpu, cuda, cuda:1, mps ...") from None
    if where.type == "meta":
        raise ConfigError("device='meta' has no numbers to compute with")
    try:
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:160]
        raise BackendError(f"device={str(where)!r} cannot be used here: {reason}") from None
    return where


def home_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter (buffer, if there are none); the CPU for a net without either."""
    tensor = next(iter([*model.parameters(), *model.buffers()]), None)
    return torch.device("cpu") if tensor is None else tensor.device


def check_net(model: nn.Module) -> None:
    """Refuse what is no net with weights.

    Raises:
        ModelError: no module, lazy layers, weights on the meta device, NaN or Inf in a parameter.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    parameters = list(model.named_parameters())
    if any(isinstance(p, nn.parameter.UninitializedParameter) for _, p in parameters):
        raise ModelError("the model has lazy layers without weights: run one batch through it first")
    if any(t.device.type == "meta" for _, t in [*parameters, *model.named_buffers()]):
        raise ModelError("the model is on the meta device, without weights: load them first")
    for name, p in parameters:
        if p.is_floating_point() and not bool(torch.isfinite(p.detach()).all()):
            raise ModelError(f"the weight {name} holds NaN or Inf: the checkpoint is broken")


@contextlib.contextmanager
def reading(data: str) -> Iterator[None]:
    """Turn what a net raises on data that it does not fit into one error that names the data.

    Raises:
        ModelError: the block raised an error that is none of fastfip's.
    """
    try:
        yield
    except FastFIPError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"the model fails on a batch of {data} ({type(error).__name__}: {reason})") from error


def first_outputs(
    model: nn.Module, forward: Callable[[nn.Module, Any], Tensor], batch: Any, data: str = "the clean data"
) -> Tensor:
    """Run the net once, without gradients; return its outputs, which are finite.

    Args:
        model: in eval mode.
        forward: `forward(model, batch) -> outputs`, e.g. `Task.forward`.
        batch: on the net's device.
        data: what errors call the data.

    Raises:
        ModelError: it fails on the batch, or gives NaN or Inf.
    """
    with reading(data), torch.no_grad():
        out = forward(model, batch)
    if not bool(torch.isfinite(out).all()):
        raise ModelError(f"the model's outputs on {data} are NaN or Inf: check its weights and how images are scaled")
    return out
