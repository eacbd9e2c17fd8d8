"""The state in which Fisher terms are taken: what is refused, and what is switched for the length of a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from fastfip.errors import ModelError
from fastfip.nets.state import is_compiled


def check_modes(model: nn.Module) -> None:
    """Refuse a model that has no per-sample gradients as it stands.

    Raises:
        ModelError: a BatchNorm that uses the statistics of the batch, or active dropout; with the remedy.
    """
    for name, m in model.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and not _is_instance_norm(m):
            if m.training:
                raise ModelError(
                    f"BatchNorm {name!r} is in train mode: it couples the samples of a batch, there are no per-sample"
                    " gradients; call model.eval() (Fisher terms use the running statistics)"
                )
            if m.running_mean is None:
                raise ModelError(
                    f"BatchNorm {name!r} keeps no running statistics and so couples the samples of a batch in eval mode"
                    " too: there are no per-sample gradients; give it track_running_stats=True"
                )
        elif isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0:
            raise ModelError(
                f"dropout {name!r} is active: the Fisher of a random subnet is not the model's; call model.eval()"
            )


def _is_instance_norm(m: nn.Module) -> bool:
    return isinstance(m, nn.modules.instancenorm._InstanceNorm)


@contextlib.contextmanager
def readable(model: nn.Module, second_order: bool = False) -> Iterator[None]:
    """Make a forward pass leave a graph that rules can read, and with `second_order` one that has second derivatives.

    Recurrent layers are computed step by step rather than by one opaque call, compiled models run eagerly, and fused
    attention, which has no second derivative, gives way to the mathematical form; layers whose second derivative is
    expensive in torch are computed by second_order.py.
    """
    with contextlib.ExitStack() as stack:
        if any(isinstance(m, nn.RNNBase) for m in model.modules()):
            stack.enter_context(_without_mkldnn())
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if is_compiled(model):
            stack.enter_context(_eager())
        if second_order:
            from torch.nn.attention import SDPBackend, sdpa_kernel

            from fastfip.fisher.second_order import CheapSecondOrder

            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(CheapSecondOrder())
        yield


@contextlib.contextmanager
def _without_mkldnn() -> Iterator[None]:
    before = torch._C._get_mkldnn_enabled()  # its flags() warns about devices that are not there
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def _eager() -> contextlib.AbstractContextManager[None]:
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
