"""`fastfip evaluate IN` and `fastfip sharpness IN`."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from fastfip.cli import options as o
from fastfip.cli.errors import fail
from fastfip.cli.opening import attack_in

NOTHING = "there is nothing to measure: give --test-data, or --asr-data, or --test-data with --attack and --target"


def evaluate(
    source: o.In,
    net: o.ScoredNet,
    scores: o.Scores,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Measure ACC on clean test images, and ASR and RA on triggered ones.

    Images whose true label is the target class do not count for ASR and RA.
    """
    scores.check()
    if scores.test_data is None and scores.asr_data is None and attack_in(source) is None:
        raise fail(NOTHING)

    from fastfip.metrics.evaluation import evaluate as measure
    from fastfip.reporting.table import evaluation_sheet, show, to_json

    opened = net.opened(source)
    model, where = opened.model, opened.where
    sets = scores.load(opened.how, opened.model, attack=opened.attack)
    if sets == (None, None):
        raise fail("; ".join((NOTHING, *scores.unmeasured(opened.attack))))
    shown = next(images for images in sets if images is not None)
    loaders = [net.batches(images) for images in sets]
    forward, notes = o.as_logits(model, loaders[0] or loaders[1])
    loaders = [o.counted(one, quiet, "batch of images") for one in loaders]
    measured = measure(model, *loaders, forward=forward, device=where)
    notes += scores.unmeasured(opened.attack)
    measured = replace(measured, notes=(*notes, *measured.notes, *shown.words()))
    if as_json:
        print(to_json({"checkpoint": str(source), **measured.to_dict(), "images": shown.to_dict()}))
    else:
        show(evaluation_sheet(measured, str(source)))


def sharpness(
    source: o.In,
    net: o.Net,
    data: o.Data,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="use N images, drawn at random with --seed")
    ] = 1000,
    seed: o.Seed = 0,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Measure how sharp the loss of IN is on clean images.

    Printed are lambda_max, the largest eigenvalue of the Hessian, Tr(H), its trace, and Tr(F), the trace of the Fisher
    information.
    """
    from fastfip.fisher.sharpness import sharpness as measure
    from fastfip.reporting.table import mapping_sheet, show, to_json

    opened = net.opened(source)
    model, where = opened.model, opened.where
    images = opened.how.load(data, "clean").sample(limit, None, seed)
    batches = net.batches(images)
    forward, notes = o.as_logits(model, batches)
    notes += images.words()
    counted = o.counted(batches, quiet, "one pass over the images, batch")
    values = measure(model.to(where), counted, forward=forward, seed=seed).to_dict()
    if as_json:
        print(to_json({"checkpoint": str(source), **values, "notes": notes, "images": images.to_dict()}))
    else:
        show(mapping_sheet(values, f"{source} on {len(images)} images", [f"note: {note}" for note in notes]))
