"""What a method keeps between steps, as plain values and tensors that a file can hold, and back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastfip.data.cleanset import CleanSet
from fastfip.errors import ConfigError
from fastfip.methods.base import REGISTRY, Method, Run
from fastfip.methods.run import Endless
from fastfip.methods.wfip.clean import CleanTerms
from fastfip.methods.wfip.sieve import Sieve
from fastfip.methods.wfip.steps import StateMean, StepBound
from fastfip.nets.state import frozen_copy
from fastfip.worst_case.added_points import AddedPoints, PointPlace
from fastfip.worst_case.goals import AwayFromTarget, TowardsClass
from fastfip.worst_case.phrases import Phrases
from fastfip.worst_case.pixels import PixelRange
from fastfip.worst_case.places import InputPlace, TokenPlace
from fastfip.worst_case.store import DeltaStore
from fastfip.worst_case.universal import Perturbations

__all__ = ["check_resumable", "method_from", "state_of_method"]

_IS = "is a"


def check_resumable(recipe: type[Method]) -> None:
    """Refuse a method that cannot say what it keeps.

    Raises:
        ConfigError: it cannot.
    """
    if recipe.keeps is None:
        able = [name for name in REGISTRY.names() if REGISTRY.get(name).keeps is not None]
        raise ConfigError(f"a broken run of {recipe.name} cannot go on: resume= is for {', '.join(able)}")


def state_of_method(method: Method) -> dict[str, Any]:
    """Return what `keeps` names."""
    return {name: _plain(getattr(method, name, None)) for name in method.keeps or ()}


def method_from(method: Method, run: Run, whole: CleanSet, state: dict[str, Any]) -> None:
    """Set what `keeps` names as it was.

    Args:
        method: `reenter` has been called.
        run: its model is the received one.
        whole: the clean samples before any were left out.
        state: what `state_of_method` returned.
    """
    method.reenter(run)
    for name, value in state.items():
        setattr(method, name, _made(value, _Home(method, run, whole)))


class _Home:
    """Where values belong."""

    def __init__(self, method: Method, run: Run, whole: CleanSet) -> None:
        self.method, self.run, self.whole = method, run, whole

    @property
    def space(self) -> Any:
        return self.method.space  # type: ignore[attr-defined]  # who bounds steps has one

    @property
    def tensors(self) -> list[Tensor]:
        return list(self.space.tensors)


def _plain(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return {_IS: "received"}
    if isinstance(value, functools.partial):
        return {_IS: "received by the space"}
    if isinstance(value, dict) and value and all(isinstance(v, Tensor) for v in value.values()):
        return {_IS: "weights"}
    for kind, (fields, _) in _KINDS.items():
        if isinstance(value, kind):
            return {_IS: kind.__name__, **{name: _plain(getattr(value, name)) for name in fields}}
    if isinstance(value, CleanSet):
        return {_IS: "samples", "index": value.index}
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    assert value is None or isinstance(value, (bool, int, float, str)), type(value)
    return value


def _made(value: Any, home: _Home) -> Any:
    if isinstance(value, Tensor):
        return value.to(home.run.device)
    if isinstance(value, list):
        return [_made(v, home) for v in value]
    if not isinstance(value, dict):
        return value
    kind = value[_IS]
    if kind == "received":
        return frozen_copy(home.run.model, home.run.received)
    if kind == "received by the space":
        home.space.keep_received(home.run)
        return functools.partial(home.space.received, home.run)
    if kind == "weights":
        return {n: p.detach().clone() for n, p in home.run.model.named_parameters() if p.is_floating_point()}
    if kind == "samples":
        return home.whole.chosen(value["index"].cpu())
    make = next(make for known, (_, make) in _KINDS.items() if known.__name__ == kind)
    return make(home, **{name: _made(v, home) for name, v in value.items() if name != _IS})


def _sieve(home: _Home, whole: CleanSet | None, gone: Tensor) -> Sieve:
    sieve = Sieve(home.run)
    sieve.whole, sieve.gone = whole, gone.cpu()
    return sieve


def _mean(home: _Home, share: float, mean: list[Tensor], count: int) -> StateMean:
    made = StateMean(home.tensors, share)
    made.mean, made.count = mean, count
    return made


def _terms(home: _Home, turns: bool, received: Any, mixable: bool, latest: Tensor | None) -> CleanTerms:
    made = CleanTerms(home.run, turns, received, mixable)
    made.latest = latest
    return made


def _perturbations(
    home: _Home, history: list[Any], kind: type[Perturbations] = Perturbations, **fields: Any
) -> Perturbations:
    run = home.run
    known = [(radius, success) for radius, success in history]
    return kind(**fields, history=known, generator=run.generator, ranks=run.ranks)


def _phrases(home: _Home, **fields: Any) -> Phrases:
    on_cpu: dict[str, Any] = {
        name: value.cpu() if isinstance(value, Tensor) else value for name, value in fields.items()
    }
    return Phrases(**on_cpu)


_PERTURBED = ("store", "place", "goal", "unit", "radius", "success", "outside", "history", "together")
#: Class -> the attributes that make it, and how it is made of them; a class before the one that it is a case of.
_KINDS: dict[type, tuple[tuple[str, ...], Callable[..., Any]]] = {
    AddedPoints: (_PERTURBED, functools.partial(_perturbations, kind=AddedPoints)),
    Perturbations: (_PERTURBED, _perturbations),
    PointPlace: (
        ("axis", "low", "high"),
        lambda home, **fields: PointPlace(**fields, generator=home.run.generator),
    ),
    InputPlace: (("range",), lambda home, **fields: InputPlace(**fields)),
    TokenPlace: (
        ("name", "center", "width", "padding", "head"),
        lambda home, **fields: TokenPlace(**fields, generator=home.run.generator),
    ),
    Phrases: (
        ("place", "goal", "ids", "success", "together", "order", "kept", "next", "found", "remembers"),
        _phrases,
    ),
    TowardsClass: (("rows", "classes"), lambda home, **fields: TowardsClass(**fields)),
    AwayFromTarget: (("threshold", "rows"), lambda home, **fields: AwayFromTarget(**fields)),
    DeltaStore: (("values", "scale"), lambda home, **fields: DeltaStore(**fields)),
    PixelRange: (("low", "high"), lambda home, **fields: PixelRange(**fields)),
    Endless: (("clean", "rest"), lambda home, clean, rest: Endless(home.run, clean, rest)),
    Sieve: (("whole", "gone"), _sieve),
    StepBound: (("diagonal", "trust"), lambda home, **fields: StepBound(home.tensors, **fields)),
    StateMean: (("share", "mean", "count"), _mean),
    CleanTerms: (("turns", "received", "mixable", "latest"), _terms),
}
