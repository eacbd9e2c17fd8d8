"""How sharp a minimum is: the largest eigenvalue and the trace of the loss's Hessian, and the trace of the Fisher."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfip.data.batch import Batch
from fastfip.data.task import Task, iter_batches
from fastfip.errors import ConfigError, ModelError
from fastfip.fisher.graph.plan import selected
from fastfip.fisher.graph.reading import topological
from fastfip.fisher.graph.verify import Cache, cache_of
from fastfip.fisher.modes import fit_for_fisher, naming_precision, readable
from fastfip.fisher.trace import Params, squared_norms, without_second_derivative, written_for_one_derivative
from fastfip.nets.state import eval_mode


@dataclasses.dataclass(frozen=True)
class Sharpness:
    """Curvature of the mean loss over `n` samples, in eval mode, with respect to the selected parameters.

    Attributes:
        lambda_max: largest eigenvalue of the Hessian H (algebraically, so not that of a negative one).
        residual: an eigenvalue of H lies within this distance of `lambda_max`.
        trace_hessian: Tr(H), estimated by Hutchinson's method.
        trace_hessian_error: its standard error.
        trace_fisher: Tr(F) of the empirical Fisher, exact.
        n: number of samples.
        parameters: number of parameters.
        iterations: products with H that the eigenvalue took.
    """

    lambda_max: float
    residual: float
    trace_hessian: float
    trace_hessian_error: float
    trace_fisher: float
    n: int
    parameters: int
    iterations: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain numbers."""
        return dataclasses.asdict(self)


def sharpness(
    model: nn.Module,
    data: Iterable[Batch],
    *,
    loss: Callable[[Tensor, Batch], Tensor] | None = None,
    forward: Callable[[nn.Module, Batch], Tensor] | None = None,
    params: Params = None,
    iterations: int = 50,
    tolerance: float = 1e-3,
    probes: int = 20,
    max_batches: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Sharpness:
    """Measure lambda_max(H), Tr(H) and Tr(F) of the mean loss over `data`; the model is left as it is.

    The model is put in eval mode for the measurement. The data is walked once and kept: everything is taken on the same
    samples. lambda_max comes from Lanczos iterations, each one product with H (twice the price of a training step).

    Args:
        model: any module that classifies.
        data: as for `fisher_diagonal`.
        loss: `loss(logits, batch) -> [N]`; None: cross-entropy.
        forward: `forward(model, batch) -> logits`.
        params: names of parameters; None: all that require a gradient.
        iterations: at most so many products for lambda_max.
        tolerance: stop when the residual is below this share of lambda_max.
        probes: random sign vectors for Tr(H); the error falls with the square root of their number. 0: nan.
        max_batches: only so many batches of the data.
        seed: of the starting vector and the probes.
        device: where the batches go; None: where the model is.

    Raises:
        ModelError: a frozen model, one whose samples are coupled in eval mode too, or one with an operation that torch
            cannot differentiate twice.
        DataError: data that cannot be used.
        ConfigError: iterations below 1, a negative number of probes.

    Source: Lanczos 1950; Hutchinson 1989; as measures of a backdoored minimum: FIP (arXiv 2409.00863).
    """
    if iterations < 1 or probes < 0:
        raise ConfigError("iterations must be at least 1 and probes at least 0")
    task, chosen = Task.of(forward, loss), selected(model, params)
    for name, p in chosen.items():
        if p.is_complex():
            raise ModelError(f"sharpness is of real parameters, and {name!r} is complex: leave it out with params=")
    device = next(iter(chosen.values())).device if device is None else device
    batches = list(itertools.islice(iter_batches(data, task, device), max_batches))
    with eval_mode(model):
        with naming_precision(chosen.values(), batches[0]):
            task = fit_for_fisher(model, task, batches[0], loss is None)

        def logits(batch: Batch, second_order: bool) -> Tensor:
            with readable(model, second_order=second_order):
                return task.forward(model, batch)

        problem = _Problem(logits, task, chosen, batches, cache_of(model))
        fisher, n = problem.fisher()
        top, residual, used = lanczos(problem.hessian_times, problem.random(seed), iterations, tolerance)
        estimates = problem.quadratic_forms(probes, seed) / n
    mean = float(estimates.mean()) if probes else math.nan
    error = float(estimates.std() / probes**0.5) if probes > 1 else math.nan
    size = sum(p.numel() for p in chosen.values())
    return Sharpness(top / n, residual / n, mean, error, fisher, n, size, used)


def lanczos(
    times: Callable[[Sequence[Tensor]], list[Tensor]], start: Sequence[Tensor], iterations: int, tolerance: float
) -> tuple[float, float, int]:
    """Return the largest eigenvalue of a symmetric operator, its residual, and the number of products taken.

    No basis is kept (three vectors in memory): without reorthogonalisation eigenvalues may appear twice in the small
    matrix, but the largest one is right.
    """
    v, before = _scaled(start, 1 / _norm(start)), [torch.zeros_like(s) for s in start]
    alphas: list[float] = []
    betas: list[float] = []
    value, residual = 0.0, math.inf
    for _ in range(iterations):
        w = times(v)
        alphas.append(_dot(v, w))
        for wi, vi, bi in zip(w, v, before):
            wi.sub_(vi, alpha=alphas[-1]).sub_(bi, alpha=betas[-1] if betas else 0.0)
        beta = _norm(w)
        small = torch.diag(torch.tensor(alphas, dtype=torch.float64))
        if betas:
            off = torch.diag(torch.tensor(betas, dtype=torch.float64), 1)
            small = small + off + off.T
        values, vectors = torch.linalg.eigh(small)
        value, residual = float(values[-1]), beta * abs(float(vectors[-1, -1]))
        if residual <= tolerance * abs(value) or beta == 0 or not math.isfinite(beta):
            break
        betas.append(beta)
        before, v = v, _scaled(w, 1 / beta)
    return value, residual, len(alphas)


class _Problem:
    """Products with the Hessian of the summed loss over the batches."""

    def __init__(
        self,
        logits: Callable[[Batch, bool], Tensor],
        task: Task,
        params: dict[str, Tensor],
        batches: list[Batch],
        cache: Cache,
    ) -> None:
        self.logits, self.task, self.batches, self.cache = logits, task, batches, cache
        self.names, self.params = params, list(params.values())

    def losses(self, second_order: bool) -> Iterator[Tensor]:
        for batch in self.batches:
            with torch.enable_grad():
                yield self.task.loss(self.logits(batch, second_order), batch)

    def slopes(self) -> Iterator[list[Tensor]]:
        """The gradient of each batch's summed loss, with its graph."""
        for losses in self.losses(second_order=True):
            nodes = [] if losses.grad_fn is None else topological(losses.grad_fn)
            operation = without_second_derivative(nodes) or written_for_one_derivative(nodes)
            if operation is not None:
                raise ModelError(
                    f"sharpness needs second derivatives, and torch has none of {operation}, which the model uses: "
                    "measure Tr(F) alone, by fastfip.fisher_trace"
                )
            with torch.enable_grad():
                got = torch.autograd.grad(losses.sum(), self.params, create_graph=True, allow_unused=True)
                yield [torch.zeros_like(p) if g is None else g for g, p in zip(got, self.params)]

    def random(self, seed: int, signs: bool = False) -> list[Tensor]:
        """A random vector; drawn on the CPU, so that a seed means the same everywhere."""
        rng = torch.Generator().manual_seed(seed)
        out = []
        for p in self.params:
            drawn = torch.randint(2, p.shape, generator=rng) * 2 - 1 if signs else torch.randn(p.shape, generator=rng)
            out.append(drawn.to(p))
        return out

    def hessian_times(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """H v of the summed loss."""
        total = [torch.zeros_like(p) for p in self.params]
        for slope in self.slopes():
            for t, g in zip(total, self._product(slope, vector, retain=False)):
                t.add_(g)
        return total

    def quadratic_forms(self, probes: int, seed: int) -> Tensor:
        """v^T H v for random sign vectors, [probes]: one first-order graph of each batch serves all of them."""
        out = torch.zeros(probes, dtype=torch.float64)
        for slope in self.slopes() if probes else ():
            for k in range(probes):
                v = self.random(seed * 100003 + k + 1, signs=True)
                out[k] += _dot(v, self._product(slope, v, retain=k < probes - 1))
        return out

    def _product(self, slope: list[Tensor], vector: Sequence[Tensor], retain: bool) -> list[Tensor]:
        live = [(g, v) for g, v in zip(slope, vector) if g.requires_grad]
        if not live:
            return [torch.zeros_like(p) for p in self.params]
        got = torch.autograd.grad(
            [g for g, _ in live], self.params, [v for _, v in live], retain_graph=retain, allow_unused=True
        )
        return [torch.zeros_like(p) if g is None else g for g, p in zip(got, self.params)]

    def fisher(self) -> tuple[float, int]:
        """Tr(F) and the number of samples."""
        total, n = 0.0, 0
        for losses in self.losses(second_order=False):
            norms = squared_norms(losses, self.names, cache=self.cache, create_graph=False)
            total, n = total + float(norms.double().sum()), n + losses.shape[0]
        return total / n, n


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return float(torch.stack([torch.dot(x.flatten(), y.flatten()).double().cpu() for x, y in zip(a, b)]).sum())


def _norm(a: Sequence[Tensor]) -> float:
    return _dot(a, a) ** 0.5


def _scaled(a: Sequence[Tensor], by: float) -> list[Tensor]:
    return [x * by for x in a]
