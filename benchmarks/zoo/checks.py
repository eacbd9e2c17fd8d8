"""What each public function must do with a model: what is right is computed by hand, in a loop over samples.

Afterwards the model that was given has the values, flags and gradients that it had.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import fastfip
from benchmarks.zoo.nets import Given, labels, outputs
from fastfip.data.batch import map_tensors
from fastfip.errors import FastFIPError
from fastfip.fisher.graph.reading import topological
from fastfip.testing.definitions import relative_error, worst_error

#: Entries of squares whose norm is a smaller share of the whole are zero but for rounding; of gradients its root.
FLOOR = 1e-9
FISHER_SAMPLES = 6

Check = Callable[[nn.Module, Given], "str"]


class Wrong(Exception):
    """A result is not what it must be."""


@dataclass(frozen=True)
class Verdict:
    """What came of one function and one model.

    Attributes:
        verdict: "right"; "refused": a FastFIPError of one line; "wrong": anything else. detail: figures, or the line.
    """

    verdict: str
    detail: str


def judged(check: Check, model: nn.Module, batch: Given) -> Verdict:
    """Run one check on a model; whatever it raises is a verdict."""
    before = _state(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = Verdict("right", check(model, batch))
    except FastFIPError as error:
        text = str(error)
        one_line = "\n" not in text and ":" in text and len(text) < 700
        found = Verdict("refused" if one_line else "wrong", " ".join(text.split()))
    except Exception as error:  # what a model's own code raises can be anything, and none of it should come through
        found = Verdict("wrong", " ".join(f"{type(error).__name__}: {error}".split())[:300])
    if not _same_state(_state(model), before):
        return Verdict("wrong", f"the model that was given has changed; {found.detail}")
    return found


def _state(model: nn.Module) -> dict[str, Any]:
    values: dict[str, Any] = {name: value.clone() for name, value in model.state_dict().items()}
    values |= {f"{name} (flag)": (p.requires_grad, p.dtype) for name, p in model.named_parameters()}
    values |= {f"{name} (gradient)": None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return values | {f"{name} (mode)": module.training for name, module in model.named_modules()}


def _same_state(now: dict[str, Any], before: dict[str, Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b) and a == b

    return list(now) == list(before) and all(same(now[name], before[name]) for name in now)


def _must(holds: object, what: str) -> None:
    if not holds:
        raise Wrong(what)


def _given(batch: Given) -> Any:
    """The way that a model of its kind is given data: `(x, y)`, or batches that are dicts."""
    return [batch]


# ------------------------------------------------------------------------------------------------------- measurements


def evaluate(model: nn.Module, batch: Given) -> str:
    """ACC and loss are those by hand."""
    found = fastfip.evaluate(model, _given(batch))
    with torch.no_grad():
        out = outputs(model, batch)
    acc = float((out.argmax(1) == labels(batch)).float().mean())
    loss = float(F.cross_entropy(out, labels(batch)))
    _must(found.acc is not None and found.loss is not None and found.n == len(out), "no ACC, no loss, or another n")
    assert found.acc is not None and found.loss is not None
    _must(abs(found.acc - acc) < 1e-6 and abs(found.loss - loss) < 1e-4 * (1 + loss), f"ACC {found.acc} for {acc}")
    return f"ACC {100 * acc:.0f} %"


def audit(model: nn.Module, batch: Given) -> str:
    """There are rows for every class, or the word that nothing can be looked for."""
    found = fastfip.audit(model, _given(batch), steps=2, samples=8)
    text = str(found)
    rows = found.table().rows
    none = "no changes were looked for" in text
    _must(rows or none, "neither rows nor a word why there are none")
    sharpness = found.received.sharpness
    _must(sharpness is not None and all(map(math.isfinite, sharpness.values())), f"sharpness {sharpness}")
    return "no inputs to change: sharpness alone" if none else f"{len(rows)} rows"


# ------------------------------------------------------------------------------------------------------------- Fisher


@dataclass(frozen=True)
class _Bounds:
    """Relative errors that are rounding: of values, of the gradient of a trace, and of one by differences."""

    value: float
    gradient: float
    differences: float
    said: str = ""


#: Some times what is reached (benchmarks/results/zoo.csv); docs/trace.md has those of differences.
_DOUBLE = _Bounds(1e-11, 1e-9, 2e-4)
_SINGLE = _Bounds(1e-5, 1e-5, 2e-2, " (float32)")


def _in_double(model: nn.Module, batch: Given) -> tuple[nn.Module, Given, _Bounds]:
    """A copy of the model and samples of it in float64; in float32 where parts of it compute in that anyhow."""
    few = part(batch, slice(FISHER_SAMPLES))
    twin = copy.deepcopy(model).double()
    double: Given = map_tensors(lambda t: t.double() if t.is_floating_point() else t, few)
    try:
        root = outputs(twin, double).grad_fn
        used = {meta.dtype for node in topological(root) for meta in getattr(node, "_input_metadata", ())}
    except RuntimeError:  # experts' products are there for float32 alone
        used = {torch.float32}
    if torch.float32 in used:
        return copy.deepcopy(model), few, _SINGLE
    return twin, double, _DOUBLE


class _Composite(TorchFunctionMode):
    """A hard sigmoid as its definition, which torch can differentiate twice.

    (Its own first derivative has a sixth in float32 in it, also in float64.)
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.hardsigmoid:
            return F.relu6(args[0] + 3) / 6
        return func(*args, **(kwargs or {}))


def _each_gradient(twin: nn.Module, few: Given, create_graph: bool) -> list[list[Tensor]]:
    """Each sample's gradients, from a batch of the sample and itself again.

    Not of the sample alone: of BatchNorm in eval mode torch's gradient of a batch of one is wrong where the gradient
    that it gets is transposed (XCiT, torch 2.13).
    """
    params = [p for p in twin.parameters() if p.requires_grad]
    each = []
    for n in range(FISHER_SAMPLES):
        pair: Given = map_tensors(lambda t: t[[n, n]], few)  # noqa: B023
        with sdpa_kernel(SDPBackend.MATH), _Composite() if create_graph else contextlib.nullcontext():
            loss = F.cross_entropy(outputs(twin, pair), labels(pair), reduction="none")[0]
            got = torch.autograd.grad(loss, params, create_graph=create_graph, allow_unused=True)
        each.append([torch.zeros_like(p) if g is None else g for p, g in zip(params, got)])
    return each


def _diagonal_by_loop(twin: nn.Module, few: Given) -> dict[str, Tensor]:
    names = [name for name, p in twin.named_parameters() if p.requires_grad]
    squares = [[g.square() for g in mine] for mine in _each_gradient(twin, few, False)]
    return {name: torch.stack(mine).mean(0) for name, mine in zip(names, zip(*squares))}


def part(batch: Given, which: slice) -> Given:
    """Return some samples of a batch."""
    few: Given = map_tensors(lambda t: t[which], batch)
    return few


def fisher_diagonal(model: nn.Module, batch: Given) -> str:
    """Equal to the loop over samples, in the first call and in one that knows the graph."""
    twin, few, bounds = _in_double(model, batch)
    want = _diagonal_by_loop(twin, few)
    before, cut = _state(twin), FISHER_SAMPLES // 2 + 1
    errors = []
    for data in ([few], [part(few, slice(cut)), part(few, slice(cut, None))], [few]):
        found = fastfip.fisher_diagonal(twin, data)
        _must(found.n == FISHER_SAMPLES and set(found.coverage) == set(want), "n or coverage is not complete")
        errors.append(worst_error(found, want, FLOOR))
    _must(_same_state(_state(twin), before), "the model has changed")
    _must(max(errors) < bounds.value, f"error {max(errors):.1e}")
    numbers = sum(v.numel() for v in want.values())
    slow = [name for name, way in found.coverage.items() if "sample" in way]
    share = sum(want[name].numel() for name in slow) / numbers
    how = f"sample by sample: {len(slow)} of {len(want)} parameters, {100 * share:.0f} %"
    return f"error {max(errors):.0e}{bounds.said}; {how}"


def backward_with_fisher(model: nn.Module, batch: Given) -> str:
    """Gradients are those of torch, the diagonal is that of the loop."""
    twin, few, bounds = _in_double(model, batch)
    diagonal = _diagonal_by_loop(twin, few)
    F.cross_entropy(outputs(twin, few), labels(few)).backward()
    gradient = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    twin.zero_grad()
    worst = 0.0
    for _ in range(2):
        twin.zero_grad()
        losses = F.cross_entropy(outputs(twin, few), labels(few), reduction="none")
        found = fastfip.backward_with_fisher(losses, twin)
        got = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
        worst = max(worst, worst_error(found, diagonal, FLOOR), worst_error(got, gradient, math.sqrt(FLOOR)))
    _must(worst < bounds.value, f"error {worst:.1e}")
    return f"error {worst:.0e}{bounds.said}"


def _trace_by_loop(twin: nn.Module, few: Given) -> tuple[Tensor, dict[str, Tensor]]:
    each = [torch.stack([g.square().sum() for g in mine]).sum() for mine in _each_gradient(twin, few, True)]
    want = torch.stack(each).mean()
    want.backward()
    gradient = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    twin.zero_grad()
    return want.detach(), gradient


def _against(twin: nn.Module, trace: Tensor, want: Tensor, gradient: dict[str, Tensor]) -> tuple[float, float]:
    trace.backward()
    got = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None and name in gradient}
    rest = {n: torch.zeros_like(gradient[n]) for n in gradient if n not in got}
    return relative_error(trace, want), worst_error({**got, **rest}, gradient, 1e-6)


def fisher_trace(model: nn.Module, batch: Given) -> str:
    """Value and gradient are those of the loop, which is differentiated twice."""
    twin, few, bounds = _in_double(model, batch)
    want, gradient = _trace_by_loop(twin, few)
    few_y = labels(few)
    for _ in range(2):
        twin.zero_grad()
        trace = fastfip.fisher_trace(twin, few) if isinstance(few, dict) else fastfip.fisher_trace(twin, few[0], few_y)
        value, slope = _against(twin, trace, want, gradient)
        _must(value < bounds.value and slope < bounds.gradient, f"error {value:.1e}, of the gradient {slope:.1e}")
    return f"error {value:.0e}, of the gradient {slope:.0e}{bounds.said}"


def fisher_penalty(model: nn.Module, batch: Given) -> str:
    """As the trace, by the way that the model suggests."""
    twin, few, bounds = _in_double(model, batch)
    want, gradient = _trace_by_loop(twin, few)
    penalty = fastfip.FisherPenalty(twin)
    trace = penalty(few) if isinstance(few, dict) else penalty(*few)
    value, slope = _against(twin, trace, want, gradient)
    most = bounds.gradient if penalty.way == "exact" else bounds.differences
    _must(value < bounds.value and slope < most, f"{penalty.way}: error {value:.1e}, of the gradient {slope:.1e}")
    return f"{penalty.way}: error {value:.0e}, of the gradient {slope:.0e}{bounds.said}"


# ------------------------------------------------------------------------------------------------------- purification


def _purified(model: nn.Module, batch: Given, method: str) -> str:
    before = model.state_dict()
    result = fastfip.purify(
        model, _given(batch), method, steps=3, weight_decay=0.0, progress=False, test_loader=_given(batch), force=True
    )
    after = result.state_dict()
    _must(list(after) == list(before), "other keys")
    _must(all(after[k].dtype == v.dtype and after[k].shape == v.shape for k, v in before.items()), "other dtypes")
    _must(all(bool(torch.isfinite(v).all()) for v in after.values() if v.is_floating_point()), "NaN or Inf")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    _must(all(torch.equal(after[name], before[name]) for name in frozen & {*before}), "a frozen parameter moved")
    coverage = result.coverage
    names = {name for name, _ in model.named_parameters()}
    _must({*coverage.tuned} | {*coverage.left} == names and not {*coverage.tuned} & {*coverage.left}, "coverage")
    _must(all(coverage.left.values()), "a parameter is left without a reason")
    _must(coverage.tuned, "nothing moved")
    with torch.no_grad():
        acc = float((outputs(result.model.eval(), batch).argmax(1) == labels(batch)).float().mean())
    _must(result.after.acc is not None and abs(result.after.acc - acc) < 1e-6, f"ACC {result.after.acc} for {acc}")
    saved = io.BytesIO()
    torch.save(after, saved)
    saved.seek(0)
    fresh = copy.deepcopy(model)
    fresh.load_state_dict(torch.load(saved, weights_only=True))
    with torch.no_grad():
        again, reached = outputs(fresh, batch), outputs(result.model, batch)
    # Not bit by bit: the memory of weights may be laid out in another order, which is that of sums.
    _must(relative_error(again, reached) < 1e-4, "loaded again it is another model")
    tuned = f"tuned {len(coverage.tuned)} of {len(names)} parameters"
    why = {reason for name, reason in coverage.left.items() if name not in frozen}
    tuned += f" ({'; '.join(sorted(why))})" if why else ""
    return "; ".join([tuned, *result.alerts])


def fine_tune(model: nn.Module, batch: Given) -> str:
    """The shortest method."""
    return _purified(model, batch, "fine_tune")


def fisher_steps(model: nn.Module, batch: Given) -> str:
    """The default method."""
    return _purified(model, batch, "fisher_steps")


def fast_wfip(model: nn.Module, batch: Given) -> str:
    """The default method for few samples."""
    return _purified(model, batch, "fast_wfip")


CHECKS: dict[str, Check] = {
    "evaluate": evaluate,
    "fisher_diagonal": fisher_diagonal,
    "backward_with_fisher": backward_with_fisher,
    "fisher_trace": fisher_trace,
    "FisherPenalty": fisher_penalty,
    "fine_tune": fine_tune,
    "fisher_steps": fisher_steps,
    "fast_wfip": fast_wfip,
    "audit": audit,
}
