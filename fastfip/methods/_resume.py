"""What a method keeps between steps, as plain values and tensors that a file can hold, and back."""

from __future__ import annotations

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
from fastfip.worst_case.pixels import PixelRange
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
        setattr(method, name, _made(value, _Place(method, run, whole)))


class _Place:
    """Where values belong."""

    def __init__(self, method: Method, run: Run, whole: CleanSet) -> None:
        self.method, self.run, self.whole = method, run, whole

    @property
    def tensors(self) -> list[Tensor]:
        space: Any = self.method.space  # type: ignore[attr-defined]  # who bounds steps has one
        return list(space.tensors)


def _plain(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return {_IS: "received"}
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


def _made(value: Any, place: _Place) -> Any:
    if isinstance(value, Tensor):
        return value.to(place.run.device)
    if isinstance(value, list):
        return [_made(v, place) for v in value]
    if not isinstance(value, dict):
        return value
    kind = value[_IS]
    if kind == "received":
        return frozen_copy(place.run.model)
    if kind == "weights":
        return {n: p.detach().clone() for n, p in place.run.model.named_parameters() if p.is_floating_point()}
    if kind == "samples":
        return place.whole.chosen(value["index"].cpu())
    make = next(make for known, (_, make) in _KINDS.items() if known.__name__ == kind)
    return make(place, **{name: _made(v, place) for name, v in value.items() if name != _IS})


def _sieve(place: _Place, whole: CleanSet | None, gone: Tensor) -> Sieve:
    sieve = Sieve(place.run)
    sieve.whole, sieve.gone = whole, gone.cpu()
    return sieve


def _mean(place: _Place, share: float, mean: list[Tensor], count: int) -> StateMean:
    made = StateMean(place.tensors, share)
    made.mean, made.count = mean, count
    return made


def _terms(place: _Place, turns: bool, received: nn.Module | None, mixable: bool, latest: Tensor | None) -> CleanTerms:
    made = CleanTerms(place.run, turns, received, mixable)
    made.latest = latest
    return made


def _perturbations(place: _Place, history: list[Any], **fields: Any) -> Perturbations:
    run = place.run
    known = [(radius, success) for radius, success in history]
    return Perturbations(**fields, history=known, generator=run.generator, ranks=run.ranks)


#: Class -> the attributes that make it, and how it is made of them.
_KINDS: dict[type, tuple[tuple[str, ...], Callable[..., Any]]] = {
    Perturbations: (("store", "range", "unit", "radius", "success", "outside", "history"), _perturbations),
    DeltaStore: (("values", "scale"), lambda place, **fields: DeltaStore(**fields)),
    PixelRange: (("low", "high"), lambda place, **fields: PixelRange(**fields)),
    Endless: (("clean", "rest"), lambda place, clean, rest: Endless(place.run, clean, rest)),
    Sieve: (("whole", "gone"), _sieve),
    StepBound: (("diagonal", "trust"), lambda place, **fields: StepBound(place.tensors, **fields)),
    StateMean: (("share", "mean", "count"), _mean),
    CleanTerms: (("turns", "received", "mixable", "latest"), _terms),
}
