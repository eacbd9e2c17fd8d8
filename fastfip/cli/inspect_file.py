"""`fastfip inspect FILE`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastfip.cli import options as o
from fastfip.cli.errors import fail, say
from fastfip.cli.opening import as_made_for, attack_in, build
from fastfip.cli.triggers import ImageReader

if TYPE_CHECKING:
    from torch import nn

    from fastfip.checkpoint.inspection import FileContents
    from fastfip.data.scaling import Pixels
    from fastfip.metrics.scalings import Scalings

#: Sizes that are tried where a model fails on the images as they are.
SIZES = (32, 28, 224, 64, 96, 128, 299)
#: Images for which these sizes are compared.
FEW = 64


def inspect(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="checkpoint to look at; no code in it is run")],
    arch: Annotated[
        str | None,
        typer.Option(
            "--arch", metavar=o.ARCH_FORMS, help="find out whether FILE fits this model; the code of the model is run"
        ),
    ] = None,
    arch_args: o.ArchArgs = None,
    key: o.Key = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="DIR|NPZ",
            help="images to measure the accuracy on, under the usual scalings; needs --arch",
        ),
    ] = None,
    inputs: o.Inputs = o.Inputs(),  # noqa: B008 (options.grouped makes a new one for each call)
    limit: Annotated[int, typer.Option("--limit", metavar="N", help="use N images, drawn at random with --seed")] = 500,
    seed: o.Seed = 0,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Print what FILE holds, whether it fits a model, which scaling of images the model needs, and the next command.

    It also describes files that every other command refuses. The only code that it runs is that of --arch.
    """
    if data is not None and arch is None:
        raise fail("--data needs --arch: the model whose accuracy is measured")

    from fastfip.checkpoint.inspection import fitting, inspect_file
    from fastfip.errors import CheckpointError
    from fastfip.reporting.table import show, to_json

    where, how = inputs.where_and_how()
    contents = inspect_file(source, key)
    fits: bool | None = None
    why, tried, used = "", None, how
    if arch is not None:
        model = build(arch, arch_args).eval()
        how = used = as_made_for(inputs, how, arch, model, arch_args)
        try:
            found = fitting(source, model, contents, key)
            key, fits = (found if found != contents.key or key is not None else None), True
        except CheckpointError as error:
            fits, why = False, str(error).removeprefix(f"{source}: ")
        if fits and data is not None:
            tried, used = _tried(model.to(where), data, how, inputs, limit, seed, contents, None if quiet else say)
    lines = _commands(source, arch, arch_args, key, data, fits, tried, used, contents)
    if as_json:
        figures = {**contents.to_dict(), "arch": arch, "fits": fits, "misfit": why or None}
        print(to_json({**figures, "accuracy": None if tried is None else tried.to_dict(), "next": lines}))
        return
    show(contents)
    if fits is not None:
        print(f"\nfits {arch}: " + (f"yes{f', under {key!r}' if key else ''}" if fits else f"no: it {why}"))
    if tried is not None:
        print()
        show(tried)
    print("\nnext:\n" + "\n".join(f"  {line}" for line in lines))


def _tried(
    model: nn.Module,
    data: str,
    how: ImageReader,
    inputs: o.Inputs,
    limit: int,
    seed: int,
    contents: FileContents,
    tell: Callable[[str], None] | None,
) -> tuple[Scalings, ImageReader]:
    """Return the trials, in the size and channels of the images or, where the model fails on these, in others."""
    from fastfip.errors import DataError, ModelError
    from fastfip.metrics.scalings import try_scalings

    def run(way: ImageReader, count: int) -> Scalings:
        images = way.load(data, "clean").sample(count, None, seed)
        return try_scalings(model, images, device=inputs.device, batch_size=inputs.batch_size, progress=tell)

    try:
        return run(how, limit), how
    except (DataError, ModelError) as error:
        first = error
    found: list[tuple[float, ImageReader]] = []
    for way in _other_ways(how, contents.guesses.get("channels")):
        try:
            found.append((run(way, FEW).best.acc, way))
        except (DataError, ModelError):
            continue
        if found[-1][0] > 0.9:
            break
    if not found:
        raise first
    best = max(found, key=lambda pair: pair[0])[1]
    tried = run(best, limit)
    tried.notes.append(
        f"note: the images were resized or recoloured, because the model failed on them as they are: {first}"
    )
    return tried, best


def _other_ways(how: ImageReader, channels: int | None) -> Iterator[ImageReader]:
    for wanted in dict.fromkeys((how.pixels.channels, channels)):
        for size in dict.fromkeys((how.pixels.size, None, *((side, side) for side in SIZES))):
            resize = how.pixels.resize if size == how.pixels.size else None
            yield replace(how, pixels=replace(how.pixels, channels=wanted, size=size, resize=resize))


def _commands(
    source: Path,
    arch: str | None,
    arch_args: str | None,
    key: str | None,
    data: str | None,
    fits: bool | None,
    tried: Scalings | None,
    how: ImageReader,
    contents: FileContents,
) -> list[str]:
    """Return what to type next."""
    words: list[Any] = ["--arch", arch or "MODULE:FACTORY"]
    words += ["--arch-args", arch_args] if arch_args is not None else []
    words += ["--key", key] if key else []
    if contents.refused is not None and not fits:
        return [f"the file {contents.refused}"]
    if fits is False:
        like = " and ".join(f"{count} {name}" for name, count in contents.guesses.items())
        return ["another --arch or other --arch-args" + (f": the file looks like {like}" if like else "")]
    if arch is None and _is_known(source):  # BackdoorBench says what it is, and how its images are scaled
        return [_line(command, source, "--data", data or "DIR") for command in ("purify", "audit")]
    if arch is None:
        return [_line("inspect", source, *words, "--data", data or "DIR")]
    words += ["--data", data or "DIR"]
    if tried is None:
        return [_line("inspect", source, *words)]
    best = tried.best
    words += _as_options(best.pixels, how.pixels)
    if best.order not in ("as given", how.order or tried.given.order):
        words = [*words, "--class-order", best.order]
    elif how.order is not None:
        words += ["--class-order", how.order]
    return [_line("purify", source, _purified(source), *words), _line("audit", source, *words)]


def _is_known(source: Path) -> bool:
    """Return whether a file is a result of BackdoorBench that needs no further options."""
    from fastfip.errors import CheckpointError, ConfigError, ModelError

    try:
        attack = attack_in(source)
        return attack is not None and bool(attack.arch and attack.pixels)
    except (CheckpointError, ConfigError, ModelError):
        return False


def _purified(source: Path) -> Path:
    """Return a name for what `purify` writes."""
    from fastfip.checkpoint import check_suffix
    from fastfip.errors import CheckpointError

    ending = ".pth.tar" if source.name.endswith(".pth.tar") else source.suffix
    try:
        check_suffix(source)
    except CheckpointError:
        return source.with_name(f"{source.name}-purified.pth")
    return source.with_name(f"{source.name.removesuffix(ending)}-purified{ending}")


def _as_options(best: Pixels, given: Pixels) -> list[str]:
    """Return the options for this scaling and the given size and channels, without what a library says by itself."""
    same = (best.mean, best.std, best.scale) == (given.mean, given.std, given.scale)
    out = [] if given.of is not None and same else _scaling_options(best, given.of is not None)
    if given.size is not None and (given.of is None or given.resize is None):
        out += ["--size", ",".join(map(str, given.size))]
    return out + (["--channels", str(given.channels)] if given.channels is not None and given.of is None else [])


def _scaling_options(pixels: Pixels, plain: bool) -> list[str]:
    """Return scale, mean and std; for pixels that are only scaled to [0, 1] nothing, or if `plain` that in words."""
    from fastfip.data.scaling import STATISTICS

    if pixels.scale is None and not pixels.mean and not pixels.std:
        return ["--scale", "01"] if plain else []
    out = [] if pixels.scale is None else ["--scale", pixels.scale]
    name = next((name for name, both in STATISTICS.items() if both == (pixels.mean, pixels.std)), None)
    if name is not None:
        return [*out, "--mean", name]
    out += ["--mean", ",".join(f"{v:g}" for v in pixels.mean)] if pixels.mean else []
    return out + (["--std", ",".join(f"{v:g}" for v in pixels.std)] if pixels.std else [])


def _line(command: str, *words: Any) -> str:
    return shlex.join(["fastfip", command, *map(str, words)])
