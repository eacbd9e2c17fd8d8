"""The Fisher diagonal as an object, and what is done with it: arithmetic, files, EWC's penalty, merging models."""

from __future__ import annotations

import copy
import json
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastfip.checkpoint import load_checkpoint, replacing
from fastfip.errors import CheckpointError, ConfigError, ModelError
from fastfip.nets.state import copied, is_part

__all__ = ["FisherDiagonal", "QuadraticPenalty", "merge"]


class FisherDiagonal(dict[str, Tensor]):
    """Parameter name -> diagonal of its block of the Fisher, in the parameter's shape.

    float64 for float64 parameters and float32 otherwise, on the parameter's device. `a + b` and `2 * a` are of the
    numbers; the diagonal of two data sets together is `(a * a.n + b * b.n) * (1 / (a.n + b.n))`. Of a model that is
    sharded over processes the values are DTensors: `trace`, `to_vector`, `save` and penalties are called on every rank.

    Pickled (`torch.save`) it is an OrderedDict with the same attributes, which `torch.load(weights_only=True)` reads
    anywhere; `save` and `load` keep it what it is.

    Attributes:
        coverage: for every name, how it was found: the operations whose rules applied, or the slower exact path.
        n: number of samples.
        kind: where the labels came from; "empirical, mc" for a sum of both.
    """

    coverage: dict[str, str]
    n: int
    kind: str

    def __init__(self, values: Mapping[str, Tensor], coverage: Mapping[str, str], n: int, kind: str) -> None:
        super().__init__(values)
        self.coverage, self.n, self.kind = dict(coverage), n, kind

    def trace(self) -> Tensor:
        """Return the trace of the Fisher: the sum over all parameters, float64."""
        return torch.stack([_whole(v.double().sum()).cpu() for v in self.values()]).sum()

    def to_vector(self) -> Tensor:
        """Return all entries as one vector, in the order of the names."""
        return torch.cat([_whole(value).reshape(-1) for value in self.values()])

    def __add__(self, other: object) -> FisherDiagonal:
        """Return the sum; `n` is the number of samples of both.

        Raises:
            ConfigError: they are of different parameters.
        """
        if other == 0:  # sum() begins with it
            return copy.copy(self)
        if not isinstance(other, FisherDiagonal):
            return NotImplemented
        _same_parameters(self, other)
        kinds = dict.fromkeys([*self.kind.split(", "), *other.kind.split(", ")])
        values = {name: value + other[name] for name, value in self.items()}
        return FisherDiagonal(values, self.coverage, self.n + other.n, ", ".join(kinds))

    __radd__ = __add__

    def __mul__(self, factor: object) -> FisherDiagonal:
        """Return the multiple; `n` stays."""
        if not isinstance(factor, (int, float)) and not (isinstance(factor, Tensor) and factor.dim() == 0):
            return NotImplemented
        return FisherDiagonal({name: v * factor for name, v in self.items()}, self.coverage, self.n, self.kind)

    __rmul__ = __mul__

    def __copy__(self) -> FisherDiagonal:
        return FisherDiagonal(self, self.coverage, self.n, self.kind)

    def __deepcopy__(self, memo: dict[int, Any]) -> FisherDiagonal:
        return FisherDiagonal(copy.deepcopy(dict(self), memo), self.coverage, self.n, self.kind)

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), vars(self), None, iter(self.items())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it to a `.safetensors` file: the tensors under the parameters' names, the rest as metadata.

        Raises:
            CheckpointError: another suffix, or the disk refuses.
        """
        from safetensors.torch import save_file

        where = Path(path)
        if where.suffix.lower() != ".safetensors":
            raise CheckpointError(f"{where}: a Fisher diagonal is saved as .safetensors")
        tensors = {
            name: _whole(v.detach()).cpu().clone(memory_format=torch.contiguous_format) for name, v in self.items()
        }
        about = {"n": str(self.n), "kind": self.kind, "coverage": json.dumps(self.coverage)}
        try:
            with replacing(where) as temporary:
                save_file(tensors, temporary, metadata={"format": "pt", "fastfip": "fisher diagonal", **about})
        except OSError as error:
            raise CheckpointError(f"{where}: cannot be written: {error.strerror or error}") from None
        return where

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str | None = None) -> FisherDiagonal:
        """Read what `save` wrote; nothing in the file is run.

        Raises:
            CheckpointError: the file is refused, or is no Fisher diagonal.
        """
        found = load_checkpoint(path)
        values = {found.names[name]: value.to(device) for name, value in found.items()}
        try:
            about = found.metadata
            if about.get("fastfip") != "fisher diagonal":
                raise ValueError
            coverage = {str(name): str(how) for name, how in json.loads(about["coverage"]).items()}
            return cls(values, coverage, int(about["n"]), about["kind"])
        except (KeyError, ValueError, AttributeError, RecursionError):
            raise CheckpointError(f"{os.fspath(path)}: is no Fisher diagonal that save() wrote") from None

    def penalty(self, model: nn.Module) -> QuadraticPenalty:
        """Return elastic weight consolidation's penalty around the model's weights as they are now.

        Raises:
            ModelError: the model has not all of the parameters.
        """
        return QuadraticPenalty(self, model)


class QuadraticPenalty:
    """sum_i F_i (w_i - w*_i)^2 / 2: what moving away from the weights w* costs, to second order, in mean log p.

        ewc = fisher.penalty(model)                     # the weights as they are now
        loss = F.cross_entropy(model(x), y) + 500 * ewc()

    Source: Kirkpatrick et al. 2017 (arXiv 1612.00796).
    """

    def __init__(self, fisher: FisherDiagonal, model: nn.Module) -> None:
        """Remember the model's weights; they are copied."""
        self.fisher, self.model = fisher, model
        self.anchor = {name: p.detach().clone() for name, p in _parameters(model, fisher).items()}

    def __call__(self, model: nn.Module | None = None) -> Tensor:
        """Return the penalty of the model's weights (None: of the model it was made of): a differentiable scalar."""
        params = _parameters(self.model if model is None else model, self.fisher)
        terms = [
            (self.fisher[name].to(p.device) * _squared(p - self.anchor[name].to(p.device))).sum()
            for name, p in params.items()
        ]
        terms = [_whole(term) for term in terms]
        return torch.stack([term.to(terms[0]) for term in terms]).sum() / 2


def merge(
    models: Sequence[nn.Module],
    fishers: Sequence[FisherDiagonal],
    *,
    weights: Sequence[float] | None = None,
    floor: float = 1e-8,
) -> nn.Module:
    """Return a copy of the first model with every parameter averaged, the diagonals as its weights.

    Buffers (running statistics) and parameters that no diagonal has are the first model's.

    Args:
        models: of one architecture, fine-tuned from one start.
        fishers: one for each model.
        weights: of the models, beside the diagonals; None: all alike.
        floor: added to the diagonals: where all are zero, parameters are averaged plainly.

    Raises:
        ConfigError: not one diagonal (and weight) for each model, or diagonals of different parameters.
        ModelError: the models differ in their parameters, or cannot be copied.

    Source: Matena & Raffel 2022 (arXiv 2111.09832).
    """
    weights = [1.0] * len(models) if weights is None else list(weights)
    if not models or len(models) != len(fishers) or len(models) != len(weights):
        raise ConfigError(f"{len(models)} models, {len(fishers)} diagonals, {len(weights)} weights: one for each model")
    if floor <= 0 or min(weights) < 0 or sum(weights) <= 0:
        raise ConfigError("floor must be positive, and weights at least 0 and not all 0")
    for fisher in fishers[1:]:
        _same_parameters(fishers[0], fisher)
    theirs = [_parameters(model, fisher) for model, fisher in zip(models, fishers)]
    merged = copied(models[0], "merge writes into a copy of the first model")
    with torch.no_grad():
        for name, p in _parameters(merged, fishers[0]).items():
            shares = [w * (fisher[name].to(p.device) + floor) for w, fisher in zip(weights, fishers)]
            total = torch.stack([s * other[name].to(s) for s, other in zip(shares, theirs)]).sum(0)
            p.copy_(total / torch.stack(shares).sum(0))
    return merged


def _whole(t: Tensor) -> Tensor:
    """Return the values of all ranks of what each has a part of: every rank has to call it."""
    return t.full_tensor() if is_part(t) else t  # type: ignore[attr-defined]


def _squared(t: Tensor) -> Tensor:
    return t.abs().square() if t.is_complex() else t.square()


def _parameters(model: nn.Module, fisher: FisherDiagonal) -> dict[str, Tensor]:
    """The parameters that a diagonal is of.

    Raises:
        ModelError: the model lacks one, or it has another shape.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, value in fisher.items():
        if name not in own or own[name].shape != value.shape:
            shape = f"of the shape {list(value.shape)}"
            raise ModelError(f"the diagonal is not this model's: it has {name!r} {shape}, the model has not")
    return {name: own[name] for name in fisher}


def _same_parameters(a: FisherDiagonal, b: FisherDiagonal) -> None:
    """Refuse diagonals of different parameters.

    Raises:
        ConfigError: one name or shape differs; named.
    """
    for name in [*a, *b]:
        if name not in a or name not in b or a[name].shape != b[name].shape:
            raise ConfigError(f"the diagonals are of different parameters: {name!r} is not the same in both")
