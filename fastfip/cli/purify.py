"""`fastfip purify IN OUT`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastfip.cli import options as o
from fastfip.cli.errors import Interrupted, NotPurified, fail

if TYPE_CHECKING:
    from fastfip.methods import MethodConfig


def purify(
    source: o.In,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="file to write, .safetensors or .pth")],
    net: o.Net,
    clean: o.Clean,
    scores: o.Scores,
    method: Annotated[str, typer.Option("--method", metavar="NAME", help="see fastfip methods")] = "fast_wfip",
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="settings of the method, .json or .yaml")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="one setting of the method; may be given several times"),
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", metavar="N", help="passes over the clean images")] = None,
    steps: Annotated[int | None, typer.Option("--steps", metavar="N", help="steps, instead of epochs")] = None,
    seed: o.Seed = 0,
    amp: o.Amp = "off",
    fisher_trace: Annotated[
        bool, typer.Option("--fisher-trace", help="measure the trace of the Fisher information before and after too")
    ] = False,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="write figures, history and settings as JSON")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace OUT (and the report) if they exist")] = False,
    ignore_fit: o.IgnoreFit = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bar, also on a terminal")] = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Clean the backdoored network IN with a few clean images and write it to OUT, in the form of IN."""
    check_outputs(source, out, report, force)
    mixed = o.precision(amp)
    scores.check()
    if epochs is not None and steps is not None:
        raise fail("--epochs and --steps: give one of them")

    from fastfip.checkpoint import save_checkpoint
    from fastfip.purification.purify import purify as clean_up
    from fastfip.reporting.table import show

    chosen = _config(method, config, settings or [])
    where, how = net.where_and_how()
    model, checkpoint = net.restore(source)
    images = clean.load(how, seed)
    test, asr = scores.load(how, images)
    result = clean_up(
        model,
        net.batches(images),
        method,
        config=chosen,
        epochs=epochs,
        steps=steps,
        seed=seed,
        device=where,
        amp=mixed,
        progress=False if quiet else None,
        test_loader=net.batches(test),
        asr_loader=net.batches(asr),
        measure=("acc", "asr", "fisher_trace") if fisher_trace else ("acc", "asr"),
        inplace=True,
        force=ignore_fit,
    )
    result.notes += images.words()
    result.settings["images"] = images.to_dict()
    if result.interrupted and not result.history:
        raise Interrupted("interrupted before the first epoch was complete: nothing written")
    if not result.unchanged:
        save_checkpoint(result.model, out, like=checkpoint)
    if checkpoint.left_out:
        result.notes.append(
            f"not carried over to {out.name}, as they belong to the old weights: {', '.join(checkpoint.left_out[:10])}"
        )
    if report is not None:
        _write_report(report, result)
    if as_json:
        print(result.to_json())
    else:
        show(result)
    if result.interrupted:
        raise Interrupted(f"interrupted: {out} holds the last good state")
    if result.unchanged or result.diverged:
        written = "nothing written" if result.unchanged else f"{out} holds the last good state"
        raise NotPurified(f"{'; '.join(result.alerts)} ({written})")


def check_outputs(source: Path, out: Path, report: Path | None, force: bool) -> None:
    """Find out before the work what could not be written after it."""
    from fastfip.checkpoint import check_suffix

    check_suffix(out)
    for name, path in (("OUT", out), ("--report", report)):
        if path is None:
            continue
        if _same(path, source):
            raise fail(f"{name} {path} is IN: IN is never changed, give another file")
        if path.is_dir():
            raise fail(f"{name} {path} is a folder")
        if path.exists() and not force:
            raise fail(f"{name} {path} exists: --force replaces it")
        folder = path.resolve().parent
        if not folder.is_dir():
            raise fail(f"{name} {path}: the folder {folder} does not exist")
        if not os.access(folder, os.W_OK):
            raise fail(f"{name} {path}: the folder {folder} cannot be written")
    if report is not None and _same(report, out):
        raise fail(f"OUT and --report are both {out}")


def _same(a: Path, b: Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:
        return os.path.realpath(a) == os.path.realpath(b)


def _config(method: str, path: Path | None, settings: list[str]) -> MethodConfig:
    from fastfip.methods import get

    kind: Any = get(method).Config
    chosen: MethodConfig = kind() if path is None else kind.load(path)
    if not settings:
        return chosen
    changes: dict[str, str] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals:
            raise fail(f"--set {text}: give KEY=VALUE, e.g. --set lr=0.01")
        changes[name.strip()] = value.strip()
    return chosen.read(changes)


def _write_report(path: Path, result: Any) -> None:
    from fastfip.checkpoint import replacing

    try:
        with replacing(path) as temporary:
            temporary.write_text(result.to_json() + "\n", encoding="utf-8")
    except OSError as error:
        print(f"fastfip: the report {path} cannot be written: {error.strerror}", file=sys.stderr)
