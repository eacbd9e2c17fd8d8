"""`fastfip evaluate IN` and `fastfip sharpness IN`."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from . import options as o
from .errors import fail


def evaluate(
    source: o.In,
    arch: o.Arch,
    test_data: o.TestData = None,
    asr_data: o.AsrData = None,
    attack: o.AttackSpec = None,
    target: o.Target = None,
    arch_args: o.ArchArgs = None,
    key: o.Key = None,
    mean: o.Mean = None,
    std: o.Std = None,
    size: o.Size = None,
    channels: o.Channels = None,
    batch_size: o.BatchSize = 256,
    device: o.Device = "cpu",
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Measure ACC on clean test images, and ASR and RA on triggered ones (never over images of the target class)."""
    if test_data is None and asr_data is None:
        raise fail("nothing to measure: give --test-data, --asr-data, or --test-data with --attack and --target")

    from ..datasets import load, loader
    from ..metrics import evaluate as measure
    from ..report import evaluation_sheet, show, to_json

    where, how = o.device(device), o.pixels(mean, std, size, channels)
    model, _ = o.restore(source, arch, arch_args, key)
    test = load(test_data, "test", how) if test_data is not None else None
    asr = o.triggered(asr_data, attack, target, test, how)
    loaders = [None if images is None else loader(images, batch_size) for images in (test, asr)]
    forward, notes = o.as_logits(model, loaders[0] or loaders[1])
    found = measure(model, *loaders, forward=forward, device=where)
    found = replace(found, notes=(*notes, *found.notes))
    if as_json:
        print(to_json({"checkpoint": str(source), **found.to_dict()}))
    else:
        show(evaluation_sheet(found, str(source)))


def sharpness(
    source: o.In,
    arch: o.Arch,
    data: o.Data,
    arch_args: o.ArchArgs = None,
    key: o.Key = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", help="use N images, picked at random")] = 1000,
    mean: o.Mean = None,
    std: o.Std = None,
    size: o.Size = None,
    channels: o.Channels = None,
    batch_size: o.BatchSize = 128,
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Measure how sharp the loss is at IN on clean images: largest Hessian eigenvalue, Tr(H), Tr(F)."""
    from ..curvature import sharpness as measure
    from ..datasets import load, loader
    from ..report import mapping_sheet, show, to_json

    where, how = o.device(device), o.pixels(mean, std, size, channels)
    model, _ = o.restore(source, arch, arch_args, key)
    images = load(data, "clean", how).sample(limit, None, seed)
    batches = loader(images, batch_size)
    forward, notes = o.as_logits(model, batches)
    values = measure(model.to(where), batches, forward=forward, seed=seed).to_dict()
    if as_json:
        print(to_json({"checkpoint": str(source), **values, "notes": notes}))
    else:
        show(mapping_sheet(values, f"{source} on {len(images)} images", [f"note: {note}" for note in notes]))
