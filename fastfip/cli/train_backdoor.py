"""`fastfip train-backdoor OUT`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastfip.cli import options as o
from fastfip.cli.errors import fail
from fastfip.cli.opening import as_made_for, build
from fastfip.cli.outputs import check_distinct, check_file, check_outputs, check_state, inputs_of, kept
from fastfip.cli.triggers import make_attack, number_of_classes

if TYPE_CHECKING:
    from torch import Tensor

    from fastfip.attacks import Backdoored, Injection
    from fastfip.data.images import ImageSet


def train_backdoor(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="file to write, .safetensors or .pth")],
    net: o.Net,
    clean: o.Clean,
    attack: Annotated[
        list[str],
        typer.Option(
            "--attack",
            metavar="NAME[:KEY=VALUE,...]",
            help="attack to plant; may be given several times, then no image has two triggers",
        ),
    ],
    target: Annotated[
        list[str],
        typer.Option(
            "--target", metavar="CLASS|next", help="class that each attack wants; next: the true label plus one"
        ),
    ],
    rate: Annotated[
        list[float] | None,
        typer.Option(
            "--rate",
            metavar="R",
            help="share of the images that each attack changes",
            show_default="the usual rate of the attack",
        ),
    ] = None,
    sources: Annotated[
        str | None,
        typer.Option(
            "--sources", metavar="C,C", help="put the trigger only on images of these classes", show_default="all"
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="IN", help="clean checkpoint to start from", show_default="new random weights"),
    ] = None,
    test_data: o.TestData = None,
    asr_out: Annotated[
        Path | None,
        typer.Option("--asr-out", metavar="NPZ", help="write the triggered test images to a file for --asr-data"),
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", metavar="N", help="passes over the images")] = 10,
    lr: Annotated[float, typer.Option("--lr", metavar="LR", help="learning rate of SGD at the start")] = 0.05,
    weight_decay: Annotated[float, typer.Option("--weight-decay", metavar="W", help="weight decay of SGD")] = 5e-4,
    augment: Annotated[
        str,
        typer.Option(
            "--augment",
            metavar="none|crop|crop_flip",
            help="random changes of the images in training: none, crops, or crops and mirroring",
        ),
    ] = "crop_flip",
    keep: Annotated[
        Path | None,
        typer.Option(
            "--keep",
            metavar="FILE",
            help="save the state here after each epoch, and continue from it if the file exists",
        ),
    ] = None,
    seed: o.Seed = 0,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="write the measured numbers as JSON")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace OUT and other outputs if they exist")] = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Train a model that has one or more backdoors, to test defences on it."""
    check_outputs(source or Path("-"), out, report, force, inputs_of(clean.data, test_data, keep))
    check_state("--keep", keep, inputs_of(clean.data, test_data, source))
    places = [] if asr_out is None else _places(asr_out, len(attack))
    if places and test_data is None:
        raise fail("--asr-out writes test images with the trigger: give --test-data")
    for path in places:
        check_file("--asr-out", path, (".npz",), force, inputs=inputs_of(clean.data, test_data, source, keep))
    check_distinct(("OUT", out), ("--report", report), ("--keep", keep), *(("--asr-out", path) for path in places))
    injections = _injections(attack, target, rate or [], sources)
    if augment not in ("none", "crop", "crop_flip"):
        raise fail(f"--augment={augment}: must be none, crop or crop_flip")

    from fastfip.attacks import poison_and_train
    from fastfip.checkpoint import save_checkpoint
    from fastfip.reporting.table import show

    where, how = net.where_and_how()
    if source is not None:
        model, checkpoint = net.restore(source)
    elif net.arch is None:
        raise fail("there is no model to train: give --arch, or --from with a checkpoint of a known architecture")
    else:
        from fastfip.nets.process import seeded

        with seeded(seed, _cpu()):
            model, checkpoint = build(net.arch, net.arch_args), None
    how = as_made_for(net, how, net.arch, model, net.arch_args)
    plain = dataclasses.replace(how, pixels=dataclasses.replace(how.pixels, mean=(), std=(), scale=None))
    images = clean.load(plain, seed)
    test = None if test_data is None else plain.load(test_data, "test")
    tests = None if test is None else _arrays(test)
    classes = number_of_classes(images, model.eval())
    for injection in injections if places and test is not None else ():
        planted, _ = injection.ready()
        if not bool(planted.attacked(test.labels, injection.target, classes, injection.sources).any()):  # type: ignore[union-attr]
            raise fail(f"--asr-out: {planted.name} puts its trigger on none of the test images")
    made = poison_and_train(
        model, _arrays(images), injections, classes=classes,
        pixels=how.pixels, epochs=epochs, lr=lr, batch_size=net.batch_size, weight_decay=weight_decay,
        crop=augment != "none", flip=augment == "crop_flip", test=tests, seed=seed, device=where, keep=keep,
        tick=_teller(quiet),
    )  # fmt: skip
    lost = [kept(out, lambda path: save_checkpoint(made.model.cpu(), path, like=checkpoint))]
    if tests is not None:
        for place, path in enumerate(places):
            lost.append(kept(path, lambda path, place=place: _write_triggered(path, made, place, tests)))  # type: ignore[misc]
    if report is not None:
        from fastfip.reporting.table import write_text

        lost.append(kept(report, lambda path: write_text(path, made.to_json() + "\n")))
    if as_json:
        print(made.to_json())
    else:
        show(made)
    if any(lost):
        from fastfip.errors import CheckpointError

        raise CheckpointError("; ".join(text for text in lost if text))


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


def _injections(attacks: list[str], targets: list[str], rates: list[float], sources: str | None) -> list[Injection]:
    """Return what is planted; each option is given once for all attacks, or once for each."""
    from fastfip.attacks import Injection

    for name, given in (("--target", targets), ("--rate", rates)):
        if len(given) not in ((1, len(attacks)) if name == "--target" else (0, 1, len(attacks))):
            raise fail(
                f"{name}: {len(given)} values for {len(attacks)} attacks: give one value, or one for each attack"
            )
    for target in targets:
        if target != "next" and not (target.isascii() and target.isdigit()):
            raise fail(f"--target={target}: give a class number, or next")
    if sources is not None and not all(part.strip().isdigit() for part in sources.split(",")):
        raise fail(f"--sources={sources}: give class numbers, e.g. 1,7")
    classes = None if sources is None else tuple(int(part) for part in sources.split(","))
    out = []
    for place, spec in enumerate(attacks):
        target = targets[place % len(targets)]
        rate = rates[place % len(rates)] if rates else None
        out.append(Injection(make_attack(spec), "next" if target == "next" else int(target), rate, classes))
    return out


def _arrays(images: ImageSet) -> tuple[Tensor, Tensor]:
    """Return all images as bytes, which take a quarter of the memory, and labels."""
    import torch

    parts = []
    for start in range(0, len(images), 512):
        x = images.batch(range(start, min(start + 512, len(images))))[0]
        if float(x.min()) < 0 or float(x.max()) > 1:
            raise fail(
                f"images run from {float(x.min()):.3g} to {float(x.max()):.3g}: give images that are not normalised"
            )
        parts.append((255 * x).round().to(torch.uint8))
    return torch.cat(parts), images.labels


def _places(path: Path, count: int) -> list[Path]:
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{place + 1}") for place in range(count)]


def _write_triggered(path: Path, made: Backdoored, place: int, test: tuple[Tensor, Tensor]) -> None:
    import numpy as np
    import torch

    injection = made.injections[place]
    attack, _ = injection.ready()
    x, y = test
    images = np.empty(tuple(x.shape), np.float32)  # in its whole size at once, filled in parts
    labels, count = [], 0
    for a, b in zip(x.split(500), y.split(500)):
        part, *both = attack.asr_set(a.float() / 255, b, injection.target, made.classes, injection.sources)
        images[count : count + len(part)] = part.numpy()
        labels.append(both)
        count += len(part)
    wanted, true = (torch.cat(one).numpy() for one in zip(*labels))
    with path.open("wb") as file:
        np.savez(file, asr_x=images[:count], asr_y=true, attack_y=wanted)


def _teller(quiet: bool) -> Any:
    """Return what prints how far the training is, in lines on stderr."""
    from fastfip.cli.errors import say
    from fastfip.reporting.progress import Beat

    beats: dict[str, Beat] = {}

    def tick(what: str, done: int, total: int) -> None:
        if what not in beats:
            beats[what] = Beat(say, what, total)
        beats[what].at(done)

    return None if quiet else tick
