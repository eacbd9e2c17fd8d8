"""`compare`: every method on the user's own model, each on a copy, with the same clean set and the same seeds."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastfip
from fastfip.comparison.result import BASELINE, Comparison, Row
from fastfip.data import fingerprint
from fastfip.data.batch import Batch
from fastfip.data.cleanset import CleanSet
from fastfip.data.task import Forward, Loss, Task, batches_of
from fastfip.errors import ConfigError, reason
from fastfip.methods import Method, MethodConfig, get, names
from fastfip.metrics.evaluation import Evaluation, der, evaluate, rir
from fastfip.nets.checks import device_of, usable_device
from fastfip.nets.process import resident_memory, seeded
from fastfip.purification.purify import purify
from fastfip.reporting.progress import Beat

__all__ = ["Choice", "all_methods", "compare"]

#: A method by its name or class, or with settings of its own.
Choice = str | type[Method] | tuple[str | type[Method], Mapping[str, Any]]


def compare(
    model: nn.Module,
    clean_loader: Iterable[Batch],
    methods: Iterable[Choice] | None = None,
    *,
    test_loader: Iterable[Batch] | None = None,
    asr_loader: Iterable[Batch] | None = None,
    seeds: Iterable[int] = (0,),
    baseline: bool = True,
    out: str | Path | None = None,
    resume: bool = False,
    device: torch.device | str | None = None,
    amp: bool | str = False,
    progress: bool | Callable[[str], None] | None = None,
    on_row: Callable[[Row], None] | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    force: bool = False,
    pretrained: Any = None,
) -> Comparison:
    """Run methods on one model and put them side by side.

    Each run starts from the model as it was given, which is left alone, with the same clean samples and the same
    seeds. Nothing is selected by the test sets; they do not reach the methods. A method that ends in an error, out of
    memory included, gives a row with the error, and the others go on. Ctrl-C ends it with the rows that are complete
    (before the model as received is measured there are none, and it goes to the caller).

    Args:
        model: any net that `fastfip.purify` takes.
        clean_loader: as for `fastfip.purify`; a generator is read once.
        methods: names, classes, or pairs (name, settings); None: all that are registered, with their defaults (those
            that need `pretrained` only with it).
        test_loader: clean test samples. Without them ACC is of the held-out clean samples, which `acc_on` says.
        asr_loader: triggered samples, see `fastfip.evaluate`. Without them there is no ASR, RA, DER.
        seeds: each method runs once for each.
        baseline: whether the model as received has a row of its own, "none".
        out: a .csv or .json file that is written after every row.
        resume: take from `out` the rows of the same model, method, settings, seed, clean set, test sets, device, `amp`
            and version of fastfip; rows with an error are run again.
        device: as for `fastfip.purify`.
        amp: as for `fastfip.purify`.
        progress: whether a table that grows is shown on stderr; a function gets lines instead, as of `purify`; None: a
            table where stderr is a terminal.
        on_row: called with each new row.
        forward: as for `fastfip.purify`.
        loss: as for `fastfip.purify`.
        force: as for `fastfip.purify`.
        pretrained: as for `fastfip.purify`; methods that do not ask for it do not get it.

    Returns:
        the rows, with `.table()`, `.to_csv()`, `.to_json()`, `.plot()`.

    Raises:
        ConfigError: no methods, no seeds, an unknown method, setting or device, `resume` without `out`.
        DataError: data that cannot be used, or an `out` that holds something else.
        BackendError: a device that is not here.
    """
    plan = [_choice(choice) for choice in (all_methods(pretrained is not None) if methods is None else methods)]
    drawn = list(dict.fromkeys(seeds))
    _check(plan, drawn, out, resume)
    run_device = device_of(model) if device is None else usable_device(device)
    old = Comparison.read(out) if resume and out is not None and Path(out).exists() else Comparison([])
    task = Task.of(forward, loss)
    with seeded(0, torch.device("cpu")):
        clean = CleanSet.of(clean_loader, task)
        clean_name = fingerprint.of_batches(clean.batches())
    test, asr = (None if d is None else fingerprint.Watched(_again(d)) for d in (test_loader, asr_loader))
    measured = evaluate(model, test, asr, forward=forward, loss=loss, device=device)
    common: dict[str, Any] = {
        "model": fingerprint.of_model(model),
        "clean_set": clean_name,
        "test_set": "" if test is None else test.digest,
        "asr_set": "" if asr is None else asr.digest,
        "clean_samples": clean.n,
        "device": str(run_device),
        "amp": str(amp),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fastfip": fastfip.__version__,
    }
    done = Comparison([])
    if baseline:
        done.rows.append(_received(measured, common))
    known = {row.key: row for row in old.rows if not row.error}
    lines = progress if callable(progress) else False
    options = {"device": device, "amp": amp, "forward": forward, "loss": loss, "force": force, "progress": lines}
    state = None if pretrained is None else _state_of(pretrained)
    state_name = "" if state is None else fingerprint.of_values(x for item in state.items() for x in item)[:16]
    with _shown(done, progress) as show:
        try:
            for seed, (method, config, label) in itertools.product(drawn, plan):
                mine: dict[str, Any] = dict(options)
                settings = config.to_dict()
                if state is not None and method.needs_pretrained:
                    mine["pretrained"] = state
                    settings["pretrained"] = state_name
                row = Row(method=method.name, label=label, config=settings, seed=seed, **common)
                if row.key in known:
                    # The same settings may have been written in another way, and rows are grouped by their label.
                    done.rows.append(dataclasses.replace(known[row.key], label=label))
                    continue
                show(label, seed)
                _run(row, model, clean, method, config, measured, test, asr, mine)
                if row.interrupted:
                    done.interrupted = True
                    break
                done.rows.append(row)
                _save(done, old, out)
                if on_row is not None:
                    on_row(row)
                show("", seed)
        except KeyboardInterrupt:  # not in the loop of a purification, which ends by itself: while scoring, say
            done.interrupted = True
    _save(done, old, out)
    return done


def _check(plan: Sequence[Any], seeds: Sequence[int], out: str | Path | None, resume: bool) -> None:
    if not plan:
        raise ConfigError(f"no methods to compare: there are {', '.join(names())}")
    labels = [label for _, _, label in plan]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(f"{', '.join(twice)}: named twice with the same settings")
    if not seeds or any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in seeds):
        raise ConfigError(f"seeds={seeds}: give whole numbers >= 0")
    if resume and out is None:
        raise ConfigError("resume=True needs out=, the file of the broken run")
    if out is not None and Path(out).suffix not in (".csv", ".json"):
        raise ConfigError(f"out={str(out)!r}: must end in .csv or .json")


def _state_of(pretrained: Any) -> dict[str, Tensor]:
    from fastfip.purification.pretrained import state_of

    return state_of(pretrained)


def all_methods(pretrained: bool) -> list[str]:
    """Return the names of the methods that can run, with or without the weights before fine-tuning."""
    return [name for name in names() if pretrained or not get(name).needs_pretrained]


def _choice(choice: Choice) -> tuple[type[Method], MethodConfig, str]:
    """Return the class, the settings and a label that names what is no default."""
    named, changes = choice if isinstance(choice, tuple) else (choice, {})
    method = get(named) if isinstance(named, str) else named
    config = method.Config.from_dict(changes)
    words = ", ".join(f"{name}={value}" for name, value in changes.items())
    return method, config, f"{method.name} ({words})" if words else method.name


def _received(measured: Evaluation, common: Mapping[str, Any]) -> Row:
    row = Row(method=BASELINE, label=BASELINE, config={}, seed=0, **common)
    row.take(measured, measured)
    row.seconds, row.peak_memory = 0.0, 0
    return row


def _run(
    row: Row,
    model: nn.Module,
    clean: CleanSet,
    method: type[Method],
    config: MethodConfig,
    before: Evaluation,
    test: Any,
    asr: Any,
    options: Mapping[str, Any],
) -> None:
    """Run one method and fill its row."""
    # A new set each time, because a run adds its remarks to the set.
    mine: Any = clean.subset(torch.arange(clean.n, device="cpu"))
    try:
        held = _held(row.device)
        result = purify(model, mine, method, config=config, seed=row.seed, group=None, **options)
        row.interrupted = result.interrupted
        row.seconds = result.seconds["total"] - result.seconds["evaluation"]
        row.peak_memory = max(0, result.peak_memory - held)
        row.memory_of = f"{result.settings['peak_memory_of']}, less what was in use before"
        row.steps = result.settings["steps"]
        if row.interrupted:
            return
        hooks = {name: options[name] for name in ("forward", "loss", "device")}
        after = evaluate(result.model, test, asr, **hooks)
        if test is None:  # what the purification itself could measure
            kept = {"acc": result.after.acc, "loss": result.after.loss, "on": result.after.on}
            after = Evaluation(**{**after.__dict__, **kept})
            before = Evaluation(**{**before.__dict__, "acc": result.before.acc})
        row.take(before, after)
        if before.asr is not None and before.acc is not None:
            row.der = der(before, after)
        if before.ra is not None and before.acc is not None:
            row.rir = rir(before, after)
    except (Exception, MemoryError) as error:
        row.error = f"{type(error).__name__}: {reason(error)}"
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _held(device: str) -> int:
    """Return the bytes in use before a run: tensors on a CUDA device, or the process's resident memory.

    What earlier runs freed is given back to the system first: the allocator would serve a later run from it, and that
    run would seem to take no memory.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc's
    return resident_memory() or 0


def _again(data: Any) -> Any:
    """A generator is kept, so that it can be walked for each method."""
    return list(data) if isinstance(data, Iterator) else batches_of(data)


def _save(done: Comparison, old: Comparison, out: str | Path | None) -> None:
    """Write the rows, and those of the old file that are of other models, settings or data.

    Where that fails, `done.unsaved` says so, and the next row tries again: the rows must not be lost with the file.
    """
    if out is None:
        return
    mine = {row.key for row in done.rows}
    every = Comparison([*(row for row in old.rows if row.key not in mine), *done.rows], done.interrupted)
    path = Path(out)
    try:
        (every.to_csv if path.suffix == ".csv" else every.to_json)(path)
        done.unsaved = ""
    except OSError as error:
        done.unsaved = f"{path}: cannot be written: {error.strerror or error}"


@contextlib.contextmanager
def _shown(done: Comparison, progress: bool | Callable[[str], None] | None) -> Iterator[Callable[[str, int], None]]:
    """Show the table while it grows, on stderr; or say by lines how many runs are complete."""
    if callable(progress):
        beat = Beat(progress, "runs complete", None)
        yield lambda label, seed: beat.at(len(done.rows), f"{label or 'next'}, seed {seed}")
        return
    if progress is None:
        progress = sys.stderr is not None and sys.stderr.isatty()
    if not progress:
        yield lambda label, seed: None
        return
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(stderr=True), transient=True, auto_refresh=False) as live:

        def show(label: str, seed: int) -> None:
            lines = [Text(f"running {label}, seed {seed} ...")] if label else []
            live.update(Group(done.table(), *lines), refresh=True)

        yield show
