"""`fastfip audit IN`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from fastfip.cli import options as o
from fastfip.cli import triggers
from fastfip.cli.errors import Interrupted, fail, say
from fastfip.cli.outputs import check_distinct, check_drawing, check_report, inputs_of, kept
from fastfip.cli.reports import origin_of
from fastfip.reporting.progress import SHORTEST


def audit(
    source: o.In,
    net: o.Net,
    data: o.Data,
    purified: Annotated[
        Path | None, typer.Option("--purified", metavar="FILE", help="checkpoint of the same model after purification")
    ] = None,
    poisoned: Annotated[
        str | None,
        typer.Option(
            "--poisoned",
            metavar="NPZ",
            help="a few triggered images with the label that the attacker wants, for the re-tuning test",
        ),
    ] = None,
    asr_data: o.AsrData = None,
    target: o.Target = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            "--picture", metavar="FILE", help="draw the changes that were found into a .png, .svg or .pdf file"
        ),
    ] = None,
    report: o.ReportFile = None,
    steps: Annotated[int, typer.Option("--steps", metavar="N", help="steps of the search for each class")] = 100,
    reach: Annotated[
        float, typer.Option("--reach", metavar="SHARE", help="share of the images that a change must send to the class")
    ] = 0.9,
    classes: Annotated[
        str | None,
        typer.Option("--classes", metavar="N,N,...", help="search only for these classes", show_default="all"),
    ] = None,
    curvature: Annotated[
        bool,
        typer.Option("--sharpness/--no-sharpness", help="measure how sharp the loss is: lambda_max, Tr(H) and Tr(F)"),
    ] = True,
    limit: Annotated[int, typer.Option("--limit", metavar="N", help="use at most N clean images")] = 1000,
    seed: o.Seed = 0,
    amp: o.Amp = "off",
    force: Annotated[bool, typer.Option("--force", help="replace --picture and --report if they exist")] = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Look for signs of a backdoor in IN with clean images alone. The result is evidence, never a certificate.

    For every class, audit searches for the smallest change of an image that sends most images to that class. It
    flags the classes that need a much smaller change than the others. The exit code is 0 whatever is found.
    """
    mixed = o.precision(amp)
    if (asr_data is not None or target is not None) and poisoned is None:
        raise fail("--asr-data and --target are only used in the re-tuning test: give --poisoned as well")
    inputs = inputs_of(source, purified, data, poisoned, asr_data)
    check_drawing("--picture", picture, force, inputs)
    check_report(report, force, inputs)
    check_distinct(("--picture", picture), ("--report", report))
    searched = _labels(classes)

    from fastfip.auditing.audit import audit as look
    from fastfip.errors import CheckpointError
    from fastfip.reporting.table import show

    opened = net.opened(source)
    model, where, how = opened.model, opened.where, opened.how
    other = None if purified is None else net.restore(purified, opened.attack)[0]
    clean = how.load(data, "clean")
    bad = None if poisoned is None else triggers.triggered(poisoned, None, target, None, how, model)
    asr = None if asr_data is None else triggers.triggered(asr_data, None, target, None, how, model)
    evidence = look(
        model,
        net.batches(clean),
        purified=other,
        poisoned=None if bad is None else [(x, y) for x, y, *_ in net.batches(bad)],
        asr_loader=net.batches(asr),
        classes=searched,
        reach=reach,
        steps=steps,
        samples=limit,
        sharpness=curvature,
        seed=seed,
        device=where,
        amp=mixed,
        progress=_sayer(quiet),
    )
    evidence.notes += clean.words()
    evidence.settings["images"] = clean.to_dict()
    evidence.origin = origin_of(source, opened, net.arch, report, clean=data, poisoned=poisoned, triggered=asr_data)
    if as_json:
        print(evidence.to_json())
    else:
        show(evidence)
    written = ((picture, evidence.plot), (report, evidence.report))
    lost = [kept(path, write) for path, write in written if path is not None]
    if any(lost):
        raise CheckpointError("; ".join(text for text in lost if text))
    if evidence.interrupted:
        raise Interrupted("interrupted: the searches that were complete are shown")


def _sayer(quiet: bool) -> Callable[[str], None] | None:
    """Return what says the parts of an audit: all of them on a terminal, at most one in 5 seconds in a log."""
    if quiet:
        return None
    if sys.stderr.isatty():
        return say
    start = time.monotonic()
    return lambda text: say(text) if time.monotonic() - start >= SHORTEST else None


def _labels(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise fail(f"--classes={text}: give labels with commas between them")
    return [int(part) for part in parts]
