"""The diagonal of the Fisher information: the mean over samples of squared per-sample gradients of log p(y|x)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastfip.data.batch import Batch
from fastfip.data.task import Task, iter_batches
from fastfip.errors import ConfigError
from fastfip.fisher.batch_measure import BatchMeasure
from fastfip.fisher.graph.plan import selected
from fastfip.fisher.labels import Kind, Labels, Sample
from fastfip.fisher.likelihood import Categorical, Likelihood
from fastfip.fisher.modes import check_modes, fit_for_fisher, naming_precision
from fastfip.fisher.result import FisherDiagonal
from fastfip.fisher.squared_sum import SquaredSum
from fastfip.nets.shards import Shards
from fastfip.reporting.progress import Counted, length


def fisher_diagonal(
    model: nn.Module,
    data: Iterable[Batch],
    kind: Kind = "empirical",
    *,
    likelihood: str | Likelihood | None = None,
    sample: Sample | None = None,
    loss: Callable[[Tensor, Batch], Tensor] | None = None,
    forward: Callable[[nn.Module, Batch], Tensor] | None = None,
    params: Iterable[str] | Mapping[str, Tensor] | None = None,
    top_k: int | None = None,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool | Callable[[str], None] = False,
    backend: str = "auto",
    group: Any = None,
) -> FisherDiagonal:
    """Return the diagonal of the Fisher information, exact for every parameter: mean_n (d log p(y_n|x_n) / d theta)^2.

    One forward and one backward pass over the data; no weight gradient is computed besides, and no per-sample gradient
    stored. A parameter that no rule covers gets its exact value by a slower path, which `coverage` names. The model is
    not changed in any way: no hook, no flag, no gradient. Samples that see each other are noticed and go a slower path;
    in arithmetic of 16 bits a few such pairs are not (docs/fisher.md).

    Args:
        model: any module, in eval mode. Where it ends in a softmax, what goes into that is taken for the logits
            (without `forward=` and `loss=`).
        data: batches `(x, y)`, a dataset, one such pair, or anything with `forward=` and `loss=`.
        kind: where the labels come from: "empirical" from the data; "mc" drawn from the model, one for each sample;
            "exact" the expectation over all classes of the model's own distribution (a backward pass for each class).
        likelihood: of labels given the outputs: "categorical" (softmax), "bernoulli" (sigmoid), "gaussian" (squared
            error), or one of `fastfip.fisher.Categorical`, `Bernoulli`, `Gaussian` with its class axis, ignored label
            and so on. It gives the loss where there is no `loss=`, and the labels of "mc" and "exact"; None: one class
            in C for each row of logits [N, C]. Positions (tokens, pixels) each have a label, those with the ignored one
            keep it, and a sample's log-likelihood is their sum. "exact" then needs a backward pass for each
            position and class.
        sample: for kind="mc", `sample(outputs, batch, generator) -> labels` in place of a likelihood: for losses that
            shift or mask.
        loss: `loss(logits, batch) -> [N]`, the negative log-likelihood of each sample; None: the likelihood's, or
            cross-entropy. With "mc" and "exact" it needs `likelihood=` (or `sample=`), and with "exact" one class in C.
        forward: `forward(model, batch) -> logits`.
        params: names of parameters (or name -> leaf tensor); None: all that require a gradient.
        top_k: with kind="exact", only each sample's k likeliest classes (the sum is cut off, not rescaled).
        temperature: logits are divided by it, in the loss and where labels are drawn.
        label_smoothing: of the cross-entropy; for kind="empirical" without `loss=`.
        seed: of the labels drawn.
        device: where the batches go; None: where the model is.
        progress: show a bar on stderr; a function gets lines instead (every tenth, or 30 seconds).
        backend: of the products (`fastfip.ops`): "auto", or the name of one.
        group: processes that each give a part of the data, such as a DistributedSampler's: a torch.distributed group,
            or "auto" for the default one. Every process gets the mean over the samples of all of them, whatever the
            lengths of the parts. With kind="mc" each draws labels of its own. None: this process alone. A model that is
            sharded over processes (`fully_shard`, DTensors) needs it: the values are then DTensors in the layout of the
            parameters (docs/distributed.md has what that costs).

    Raises:
        ModelError: BatchNorm in train mode (samples have no gradients of their own there), random outputs (dropout), a
            buffer that a forward pass changes, a frozen model, a checkpoint that hides its parameters.
        DataError: data that cannot be used, labels that do not fit the outputs.
        ConfigError: an unknown kind or likelihood, or options that exclude each other; a sharded model without its
            group, or with tensors as `params`.
        BackendError: the backend asked for cannot run here; a process of the group failed.

    Source: the retainer of FIP (arXiv 2409.00863) and NGF (arXiv 2306.17441); the Fisher by labels drawn from the
    model: Kunstner et al. 2019 (arXiv 1905.12558).
    """
    if temperature <= 0 or not 0 <= label_smoothing < 1:
        raise ConfigError("temperature must be positive, and label_smoothing at least 0 and below 1")
    if label_smoothing and (loss is not None or kind != "empirical" or likelihood is not None):
        raise ConfigError("label_smoothing belongs to the cross-entropy with labels from the data (kind='empirical')")
    task = smoothed(Task.of(forward, loss), label_smoothing)
    labels, task = Labels.of(kind, task, likelihood, sample, top_k, temperature)
    takes_logits = loss is None and (labels.likelihood is None or isinstance(labels.likelihood, Categorical))
    shards = Shards.of(model, group, params)
    if shards is not None and shards.world > 1 and kind != "exact" and not shards.rewritten:
        from fastfip.fisher.sharded import in_units

        check_modes(model)
        device = next(iter(shards.parts.values())).device if device is None else device
        bar = _bar(iter_batches(data, task, device), data, progress)
        found, data = in_units(
            shards, bar, task, labels, takes_logits=takes_logits, temperature=temperature, params=params,
            backend=backend, group=group, seed=seed,
        )  # fmt: skip
        if found is not None:
            return found
        progress = False
    model = model if shards is None else shards.twin
    check_modes(model)
    chosen = selected(model, params)
    total, count, first = SquaredSum(chosen, backend=backend), 0, True
    device = next(iter(chosen.values())).device if device is None else device
    generator = torch.Generator().manual_seed(seed)
    measure = BatchMeasure(model, temperature, chosen, total)
    with _together(group, chosen) as ranks:
        if ranks is not None and ranks.rank:
            generator.manual_seed(seed + ranks.rank * 1_000_003)
        for batch in _bar(iter_batches(data, task, device), data, progress):
            with naming_precision(chosen.values(), batch):
                if first:
                    if shards is not None and ranks is not None:
                        from fastfip.fisher.sharded import compare_on_all

                        compare_on_all(shards, ranks, task, batch)
                    task, first = fit_for_fisher(model, task, batch, takes_logits), False
                logits = measure.forward(task, batch)
            samples = logits.shape[0]
            for one in labels.passes(task, batch, logits, generator):
                samples = measure.add(logits, one)
            count += samples
            del logits, one  # with the graph, before the next batch
        if ranks is not None and shards is None:
            count = ranks.mean_(list(total.out.values()), count, "fisher")
            return FisherDiagonal(total.out, total.coverage, count, kind)
        if ranks is not None:
            count = round(ranks.number(count))
        for name in list(total.out) if shards is not None else ():  # one at a time: of its sum each rank keeps its part
            if ranks is not None:
                ranks.sum_([total.out[name]], "fisher")
            total.out[name] = shards.part(name, total.out[name])  # type: ignore[union-attr]
    for value in total.out.values():
        value.div_(count)
    return FisherDiagonal(total.out, total.coverage, count, kind)


def _together(group: Any, params: Mapping[str, Tensor]) -> contextlib.AbstractContextManager[Any]:
    if group is None:
        return contextlib.nullcontext()
    from fastfip.nets.ranks import Ranks

    return Ranks.of(group, params.values(), "fisher_diagonal")


def smoothed(task: Task, label_smoothing: float) -> Task:
    """Return the task with a cross-entropy of smoothed labels."""
    if not label_smoothing:
        return task

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(
            logits, task.labels(batch), reduction="none", label_smoothing=label_smoothing
        )

    return Task.of(task.forward_hook, loss)


def _bar(batches: Iterable[Batch], data: Any, show: bool | Callable[[str], None]) -> Iterable[Batch]:
    if not show:
        return batches
    if callable(show):
        return Counted(batches, show, "Fisher diagonal, batch", data)
    from rich.console import Console
    from rich.progress import track

    total = length(data)
    bar = Console(stderr=True)  # what is printed stays clean
    return track(batches, description="Fisher diagonal", total=total, transient=True, console=bar)
