"""The Fisher trace as a term of anybody's loss, its gradient by one of three ways."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastfip.data.batch import Batch, pick
from fastfip.data.task import Task
from fastfip.errors import ConfigError, ModelError
from fastfip.fisher.differences.perturb import TraceWithGradient, Uncovered, perturbed, working_dtype
from fastfip.fisher.differences.signs import signed
from fastfip.fisher.graph.plan import selected
from fastfip.fisher.graph.reading import topological
from fastfip.fisher.graph.recipe import refuse_node
from fastfip.fisher.graph.verify import cache_of
from fastfip.fisher.modes import check_modes, fit_for_fisher, naming_precision, readable
from fastfip.fisher.trace import trace_and_logits, without_second_derivative
from fastfip.nets.state import eval_mode, is_compiled, unwrapped

Way = Literal["auto", "exact", "perturb", "signs"]

#: Operations whose first derivative jumps: a difference quotient of gradients across the jump has no limit.
KINKED = (
    "Relu", "LeakyRelu", "Rrelu", "Prelu", "Threshold", "Hardtanh", "Hardshrink", "Softshrink", "Hardsigmoid", "Clamp",
    "MaxPool", "AdaptiveMaxPool", "FractionalMaxPool", "MaxBackward", "MinBackward", "Amax", "Amin", "Maximum",
    "Minimum", "AbsBackward", "Median", "Topk", "Kthvalue", "Sort", "MkldnnMaxPool", "Hardswish",
)  # fmt: skip
_FUSED = ("ScaledDotProductFlash", "ScaledDotProductEfficient", "ScaledDotProductCudnn", "ScaledDotProductFused")


def choose_way(model: nn.Module, batch: Batch, task: Task) -> tuple[str, str]:
    """Return the way that suits a model, and why: read from the graph of one sample.

    Finite differences of gradients are no derivatives where a model has kinks, so a piecewise-linear one gets `exact`;
    so does a smooth one, unless `exact` would have to give up fused attention or compiled code.
    """
    with torch.enable_grad(), readable(model):
        root = task.forward(model, pick(batch, 0, task.size(batch))).grad_fn
    if root is None:
        raise ModelError("the model's output has no graph: no parameter of it requires a gradient")
    nodes = topological(root)
    for node in nodes:
        refuse_node(node)
    names = {node.name() for node in nodes}
    if any(getattr(node, "_saved_scale_grad_by_freq", False) for node in nodes):
        return "exact", "an Embedding has scale_grad_by_freq=True, and differences take gradients for derivatives"
    kinks = sorted(name for name in names if name.startswith(KINKED))
    if kinks:
        return (
            "exact",
            f"the model has kinks ({_operation(kinks[0])}), where differences are not derivatives",
        )
    if any(name.startswith(_FUSED) for name in names):
        return "perturb", "the model is smooth and has fused attention, which has no second derivative"
    operation = without_second_derivative(nodes)
    if operation is not None:
        return "perturb", f"the model is smooth, and torch has no second derivative of {operation}"
    if is_compiled(model):
        return "perturb", "the model is smooth and compiled; compiled code has no second derivative"
    return "exact", "the model is smooth, and nothing in it lacks a second derivative"


def _operation(node: str) -> str:
    return node.removesuffix("0").removesuffix("Backward")


class FisherPenalty:
    """The Fisher trace of a batch, mean_n ||grad log p(y_n|x_n)||^2, as a term of a loss.

        penalty = fastfip.FisherPenalty(model)
        loss = F.cross_entropy(model(x), y) + eta * penalty(x, y)
        loss.backward()

    The three ways give the same gradient (docs/trace.md has errors and costs):

    - `exact`: a double backward pass. Right for every net; fused attention is replaced by its mathematical form and
      compiled code by what it was compiled from, while the term is computed.
    - `perturb`: two (`difference="central"`: three) ordinary passes in which every sample has its own shifted weights.
      First-order autograd only: fused attention, autocast and DistributedDataParallel stay as they are. For smooth
      nets.
    - `signs`: the same with one shift for all, random and unbiased. No work for single samples; compiled code is used.
      For smooth nets.

    `perturb` and `signs` do all their work when called; `backward` multiplies what they have found.

    The model is taken in eval mode for the length of a call, and put back: in train mode BatchNorm couples the samples
    of a batch, which then have no gradients of their own, and dropout makes another net.

    Attributes:
        way: the way that is used; "auto" before the first call if it was left open.
        reason: why.
    """

    way: str
    reason: str

    def __init__(
        self,
        model: nn.Module,
        way: Way = "auto",
        params: Iterable[str] | Mapping[str, Tensor] | None = None,
        *,
        loss: Callable[[Tensor, Batch], Tensor] | None = None,
        forward: Callable[[nn.Module, Batch], Tensor] | None = None,
        difference: Literal["forward", "central"] = "forward",
        step: float | None = None,
        seed: int = 0,
    ) -> None:
        """Describe the term.

        Args:
            model: any module that classifies; wrapped in DistributedDataParallel or compiled, if it is.
            way: how the gradient is found; "auto": by what the first batch shows of the model.
            params: names of parameters (or name -> leaf tensor); None: all that require a gradient, at every call.
            loss: `loss(logits, batch) -> [N]`; None: cross-entropy.
            forward: `forward(model, batch) -> logits`, with batch = (x, y).
            difference: of gradients, for `perturb` and `signs`: "forward", or "central", which costs half as much again
                and is finer.
            step: the largest shift of the parameters, relative to their size; None: by dtype.
            seed: of the signs.

        Raises:
            ConfigError: an unknown way or difference, or a step that is not positive.
        """
        if way not in get_args(Way):
            raise ConfigError(f"way={way!r}: must be one of {', '.join(get_args(Way))}")
        if difference not in ("forward", "central"):
            raise ConfigError(f"difference={difference!r}: must be 'forward' or 'central'")
        if step is not None and not step > 0:
            raise ConfigError(f"step={step}: must be positive")
        self.way, self.reason = way, "asked for" if way != "auto" else "not yet chosen: the first batch decides"
        self._model, self._inner = unwrapped(model, compiled=False), _uncompiled(unwrapped(model, compiled=False))
        self._params = params if params is None or isinstance(params, Mapping) else tuple(params)
        self._task = Task.of(forward, loss)
        self._difference, self._step = difference, step
        self._generator = torch.Generator().manual_seed(seed)
        self._scale = 256.0  # of the losses in float16, where gradients of single samples underflow
        self._open, self._looked = way == "auto", False

    def __repr__(self) -> str:
        """Name the way and the reason."""
        return f"FisherPenalty(way={self.way!r}: {self.reason})"

    def __call__(self, x: Batch, y: Tensor | None = None) -> Tensor:
        """Return the trace of a batch: a scalar whose backward pass adds its gradient to the parameters'.

        Args:
            x: the inputs; with `y=None` a whole batch (a tuple or dict).
            y: labels [N].

        Raises:
            ModelError: `perturb` was asked for and cannot shift a parameter (which, the error says); nothing to
                differentiate; a BatchNorm without running statistics.
            DataError: the batch cannot be used.
        """
        return self._terms(x if y is None else (x, y))[1]

    def with_loss(self, x: Batch, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the mean loss of the batch, in eval mode, and the trace; both differentiable, for the price of one.

        `perturb` with forward differences has the gradient of the mean loss in its hands, and `exact` its graph, so a
        step with the trace costs two plain forward and backward passes (or the double backward) and nothing more.
        """
        return self._terms(x if y is None else (x, y), with_loss=True)

    def _terms(self, batch: Batch, with_loss: bool = False) -> tuple[Tensor, Tensor]:
        params = selected(self._inner, self._params)
        with eval_mode(self._inner):
            check_modes(self._inner)
            with naming_precision(params.values(), batch):
                self._task = fit_for_fisher(self._inner, self._task, batch, self._task.loss_hook is None)
            if not torch.is_grad_enabled():
                output = trace_and_logits(self._inner, batch, self._task, params=params, create_graph=False)
                return output.losses.detach().mean(), output.trace.detach()
            self._look(batch)
            if self.way != "exact":
                try:
                    return self._by_differences(batch, params, with_loss)
                except Uncovered as error:
                    if not self._open:
                        raise
                    self.way, self.reason = "exact", f"{error.args[0].split(':')[0]}"
            first = next(iter(params.values()))
            with torch.autocast(first.device.type, enabled=False):
                out = trace_and_logits(self._inner, batch, self._task, params=params)
            return out.losses.mean(), out.trace

    def _look(self, batch: Batch) -> None:
        """Look once at what kind of net it is."""
        if self._looked or (self.way == "exact" and not self._open):
            return
        way, reason = choose_way(self._model, batch, self._task)
        if self._open:
            self.way, self.reason = way, reason
        elif "scale_grad_by_freq" in reason:
            raise ModelError(f"way={self.way!r}, but {reason}: take way='exact'")
        elif "kinks" in reason:
            self.reason = f"asked for, although {reason}"
            warnings.warn(f"way={self.way!r}, but {reason}: take way='exact'", stacklevel=4)
        self._looked = True

    def _by_differences(self, batch: Batch, params: dict[str, Tensor], with_loss: bool) -> tuple[Tensor, Tensor]:
        common: dict[str, Any] = {"difference": self._difference, "step": self._step}
        half = working_dtype(params) == torch.float16
        while True:
            common["loss_scale"] = self._scale if half else 1.0
            if self.way == "perturb":
                estimate = perturbed(self._inner, batch, self._task, params, cache=cache_of(self._inner), **common)
            else:
                estimate = signed(self._model, batch, self._task, params, generator=self._generator, **common)
            if not half or self._scale == 1 or torch.isfinite(estimate.trace):
                break
            self._scale /= 16
        trace = attach(estimate.trace, estimate.gradient, params)
        if not with_loss:
            return estimate.losses.mean(), trace
        return self._mean_loss(batch, estimate, params), trace

    def _mean_loss(self, batch: Batch, estimate: TraceWithGradient, params: dict[str, Tensor]) -> Tensor:
        if estimate.mean_gradient is not None:
            return attach(estimate.losses.mean(), estimate.mean_gradient, params)
        return self._task.loss(self._task.forward(self._model, batch), batch).mean()


def _uncompiled(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)


class _Attached(torch.autograd.Function):
    """A number whose gradient is known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *params: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if g is None else (g * v.to(g.dtype)) for g in ctx.gradients)


def attach(value: Tensor, gradients: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> Tensor:
    """Return `value` as a function of `params` that has the given gradients."""
    named = {name: p for name, p in params.items() if name in gradients}
    grads = [gradients[name].detach().to(p.dtype) for name, p in named.items()]
    out: Tensor = _Attached.apply(value.detach(), grads, *named.values())
    return out
