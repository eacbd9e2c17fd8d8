"""What is found out before the work: whether a model can be run on a batch of the data at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastfip.errors import FastFIPError, ModelError, reason

__all__ = ["first_outputs", "reading"]


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
        raise ModelError(f"the model fails on a batch of {data} ({type(error).__name__}: {reason(error)})") from error


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
