"""`fastfip compare IN`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastfip.cli import options as o
from fastfip.cli.errors import Interrupted, fail
from fastfip.cli.outputs import check_distinct, check_drawing, check_file, check_report, inputs_of, kept
from fastfip.cli.reports import data_of, origin_of


def compare(
    source: o.In,
    net: o.Net,
    clean: o.Clean,
    scores: o.Scores,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods", metavar="A,B,...", help="methods to run (fastfip methods lists them)", show_default="all"
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METHOD.KEY=VALUE", help="one setting of a method; may be given several times"),
    ] = None,
    seeds: Annotated[
        str, typer.Option("--seeds", metavar="N,N,...", help="run each method once with each of these seeds")
    ] = "0",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="write the rows to a .csv or .json file after every run"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="keep the rows that --out already holds, and run only what is missing")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="draw ACC against ASR into a .png, .svg or .pdf file")
    ] = None,
    report: o.ReportFile = None,
    pretrained: o.Pretrained = None,
    amp: o.Amp = "off",
    force: Annotated[bool, typer.Option("--force", help="replace --out, --plot and --report if they exist")] = False,
    ignore_fit: o.IgnoreFit = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Run several methods on the model in IN, each on its own copy, and print accuracy, attack success and time.

    With --limit or --per-class the clean images are drawn once, with seed 0, so that all runs use the same ones.
    """
    drawn = _seeds(seeds)
    mixed = o.precision(amp)
    scores.check()
    inputs = inputs_of(source, clean.data, scores.test_data, scores.asr_data, pretrained)
    _check_outputs(out, plot, resume, force, inputs)
    check_report(report, force, inputs)
    check_distinct(("--out", out), ("--plot", plot), ("--report", report))

    from fastfip.comparison.compare import compare as side_by_side
    from fastfip.errors import CheckpointError
    from fastfip.reporting.table import show, to_json

    chosen = _choices(methods, settings or [], pretrained is not None)
    opened = net.opened(source)
    images = clean.load(opened.how, 0)
    test, asr = scores.load(opened.how, opened.model, images, opened.attack)
    comparison = side_by_side(
        opened.model,
        net.batches(images),
        chosen,
        test_loader=net.batches(test),
        asr_loader=net.batches(asr),
        seeds=drawn,
        out=out,
        resume=resume,
        device=opened.where,
        amp=mixed,
        progress=o.progress(quiet),
        force=ignore_fit,
        pretrained=pretrained,
    )
    comparison.notes += [*scores.unmeasured(opened.attack), *images.words()]
    comparison.images = images.to_dict()
    comparison.origin = origin_of(source, opened, net.arch, report, **data_of(clean.data, scores))
    if as_json:
        print(to_json({**comparison.to_dict(), "images": comparison.images}))
    else:
        show(comparison)
    written = ((plot, comparison.plot), (report, comparison.report))
    lost = [comparison.unsaved, *(kept(path, write) for path, write in written if path is not None)]
    if any(lost):
        raise CheckpointError("; ".join(text for text in lost if text))
    if comparison.interrupted:
        hint = "with --out FILE the complete rows are kept, and --resume continues from them"
        if out is not None:
            hint = f"{out} holds the complete rows, and --resume continues from them"
        raise Interrupted(f"interrupted: {hint}")
    runs = [row for row in comparison.rows if row.label != "none"]
    if all(row.error for row in runs):
        from fastfip.errors import ModelError

        raise ModelError(f"every method failed; the first error: {runs[0].error}")


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise fail(f"--seeds={text}: give whole numbers with commas between them")
    return [int(part) for part in parts]


def _check_outputs(out: Path | None, plot: Path | None, resume: bool, force: bool, inputs: list[Path]) -> None:
    """Find out before the work what could not be written after it."""
    if resume and out is None:
        raise fail("--resume needs --out, the file of the run to continue")
    if out is not None:
        check_file("--out", out, (".csv", ".json"), force or resume, ", --resume continues from it", inputs)
    check_drawing("--plot", plot, force, inputs)


def _choices(methods: str | None, settings: list[str], pretrained: bool) -> list[tuple[str, dict[str, str]]]:
    """Return the methods with their settings, which are read as the types that they have."""
    from fastfip.comparison.compare import all_methods

    chosen = (
        all_methods(pretrained) if methods is None else [name.strip() for name in methods.split(",") if name.strip()]
    )
    changes: dict[str, dict[str, str]] = {name: {} for name in chosen}
    for text in settings:
        left, equals, value = text.partition("=")
        method, dot, name = left.strip().partition(".")
        if not equals or not dot:
            raise fail(f"--set {text}: give METHOD.KEY=VALUE, e.g. --set fip.lr=0.01")
        if method not in changes:
            raise fail(f"--set {text}: {method} is not one of the methods to run ({', '.join(chosen)})")
        changes[method][name.strip()] = value.strip()
    return list(changes.items())
