"""The options that commands share, and what is made of them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from fastfip.cli.errors import fail

if TYPE_CHECKING:
    from torch import nn

    from fastfip.checkpoint import Checkpoint
    from fastfip.data.images import ImageSet, Pixels

In = Annotated[Path, typer.Argument(metavar="IN", help="checkpoint to read: safetensors or a file of torch.save")]
Arch = Annotated[
    str,
    typer.Option(
        "--arch", metavar="MODULE:FACTORY", help="what builds the model, e.g. nets:resnet18 for resnet18 in ./nets.py"
    ),
]
ArchArgs = Annotated[
    str | None, typer.Option("--arch-args", metavar="JSON", help="""its arguments, e.g. '{"num_classes": 43}'""")
]
Key = Annotated[
    str | None,
    typer.Option("--key", metavar="NAME", help="entry of IN with the weights, if not a usual one"),
]
Data = Annotated[
    str,
    typer.Option(
        "--data", metavar="DIR|NPZ", help="clean images: a folder of class folders, or FILE.npz[:images,labels]"
    ),
]
TestData = Annotated[
    str | None, typer.Option("--test-data", metavar="DIR|NPZ", help="clean test images; they only score")
]
AsrData = Annotated[
    str | None,
    typer.Option(
        "--asr-data",
        metavar="DIR|NPZ",
        help="triggered images, with their true labels (and --target, or attack_y in the .npz) or the attack's",
    ),
]
AttackSpec = Annotated[
    str | None,
    typer.Option(
        "--attack",
        metavar="NAME[:KEY=VALUE,...]",
        help="put this trigger on the test images, e.g. badnets:size=4,margin=1 (with --target)",
    ),
]
Target = Annotated[
    str | None,
    typer.Option("--target", metavar="CLASS|next", help="class that the attacker wants; next: the label plus one"),
]
Mean = Annotated[str | None, typer.Option("--mean", metavar="M[,M,M]", help="subtracted from pixels in [0, 1]")]
Std = Annotated[str | None, typer.Option("--std", metavar="S[,S,S]", help="what they are then divided by")]
Size = Annotated[str | None, typer.Option("--size", metavar="H[,W]", help="resize images")]
Channels = Annotated[int | None, typer.Option("--channels", metavar="1|3", help="read image files as grey or colour")]
BatchSize = Annotated[int, typer.Option("--batch-size", metavar="N", help="images a batch")]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", help="use N clean images, picked by --seed")]
PerClass = Annotated[int | None, typer.Option("--per-class", metavar="N", help="use at most N clean images a class")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="of everything random")]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="where to compute, e.g. cuda")]
Amp = Annotated[str, typer.Option("--amp", metavar="off|bf16|fp16", help="mixed precision")]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
IgnoreFit = Annotated[
    bool, typer.Option("--ignore-fit", help="go on where IN is no better on the clean images than a guess")
]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


class Group:
    """Options that several commands have: a dataclass of them, which a command takes as one parameter."""


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command as typer wants it, with the fields of its groups as parameters of its own."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for given in inspect.signature(command).parameters.values():
        kind = hints[given.name]
        if not (isinstance(kind, type) and issubclass(kind, Group)):
            parameters.append(given.replace(annotation=kind, kind=given.KEYWORD_ONLY))
            continue
        groups[given.name] = kind
        own = get_type_hints(kind, include_extras=True)
        for item in dataclasses.fields(kind):  # type: ignore[arg-type]
            default = given.empty if item.default is dataclasses.MISSING else item.default
            parameters.append(
                inspect.Parameter(item.name, given.KEYWORD_ONLY, default=default, annotation=own[item.name])
            )

    @functools.wraps(command)
    def call(**options: Any) -> None:
        made = {
            name: kind(**{item.name: options.pop(item.name) for item in dataclasses.fields(kind)})
            for name, kind in groups.items()
        }
        command(**made, **options)

    del call.__wrapped__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {item.name: item.annotation for item in parameters}
    return call


@dataclass
class Net(Group):
    """The network, how images become its inputs, and where it runs."""

    arch: Arch
    arch_args: ArchArgs = None
    key: Key = None
    mean: Mean = None
    std: Std = None
    size: Size = None
    channels: Channels = None
    batch_size: BatchSize = 128
    device: Device = "cpu"

    def where_and_how(self) -> tuple[str, Pixels]:
        """Return the device, checked, and how images become inputs."""
        return device(self.device), pixels(self.mean, self.std, self.size, self.channels)

    def restore(self, path: Path) -> tuple[nn.Module, Checkpoint]:
        """Return the model with the weights of a checkpoint, in eval mode, and the checkpoint."""
        return restore(path, self.arch, self.arch_args, self.key)

    def batches(self, images: ImageSet | None) -> Any:
        """Return a loader of images, None for none."""
        from fastfip.data.images import loader

        return None if images is None else loader(images, self.batch_size)


@dataclass
class ScoredNet(Net):
    """The same for a net that is only run forward."""

    batch_size: BatchSize = 256


@dataclass
class Clean(Group):
    """Clean images, and how many of them."""

    data: Data
    limit: Limit = None
    per_class: PerClass = None

    def load(self, how: Pixels, seed: int) -> ImageSet:
        """Return the images that are used."""
        from fastfip.data.images import load

        return load(self.data, "clean", how).sample(self.limit, self.per_class, seed)


@dataclass
class Scores(Group):
    """Test images and triggered ones, which only score."""

    test_data: TestData = None
    asr_data: AsrData = None
    attack: AttackSpec = None
    target: Target = None

    def load(self, how: Pixels, clean: ImageSet | None = None) -> tuple[ImageSet | None, ImageSet | None]:
        """Return both, None where not given; `clean` has to have the same classes."""
        from fastfip.data.images import load, same_classes

        test = load(self.test_data, "test", how) if self.test_data is not None else None
        if test is not None and clean is not None:
            same_classes(clean, test)
        return test, triggered(self.asr_data, self.attack, self.target, test, how)


def precision(amp: str) -> bool | str:
    """Return what `amp=` is for `--amp`."""
    if amp not in ("off", "bf16", "fp16"):
        raise fail(f"--amp={amp}: must be off, bf16 or fp16")
    return False if amp == "off" else amp


def check_drawing(name: str, path: Path | None, force: bool) -> None:
    """Find out before the work whether a drawing could be written after it."""
    if path is None:
        return
    check_file(name, path, (".png", ".svg", ".pdf"), force)
    try:
        import matplotlib  # noqa: F401 (better now than after the work)
    except ImportError:
        from fastfip.errors import BackendError

        raise BackendError(f"{name} needs matplotlib: pip install 'fastfip[plot]'") from None


def check_file(name: str, path: Path, suffixes: tuple[str, ...], force: bool, also: str = "") -> None:
    """Find out before the work whether a file could be written after it."""
    if path.suffix not in suffixes:
        raise fail(f"{name} {path}: must end in {', '.join(suffixes)}")
    if path.is_dir():
        raise fail(f"{name} {path} is a folder")
    if path.exists() and not force:
        raise fail(f"{name} {path} exists: --force replaces it{also}")
    if not path.resolve().parent.is_dir():
        raise fail(f"{name} {path}: the folder {path.resolve().parent} does not exist")


def build(arch: str, arch_args: str | None) -> nn.Module:
    """Return the model of `--arch` and `--arch-args`."""
    from fastfip.checkpoint import load_arch

    arguments: Any = {}
    if arch_args is not None:
        try:
            arguments = json.loads(arch_args)
        except json.JSONDecodeError as error:
            raise fail(f"--arch-args is no JSON: {error}") from None
        if not isinstance(arguments, dict):
            raise fail("--arch-args must be a JSON object, e.g. '{\"num_classes\": 43}'")
    return load_arch(arch, arguments)


def restore(path: Path, arch: str, arch_args: str | None, key: str | None) -> tuple[nn.Module, Checkpoint]:
    """Return the model with the weights of a checkpoint, in eval mode, and the checkpoint."""
    from fastfip.checkpoint import load_checkpoint

    model = build(arch, arch_args)
    return model.eval(), load_checkpoint(path, model, key=key)


def pixels(mean: str | None, std: str | None, size: str | None, channels: int | None) -> Pixels:
    """Return how images become inputs."""
    from fastfip.data.images import Pixels

    sides = tuple(int(v) for v in _numbers("--size", size))
    if len(sides) > 2 or sides != _numbers("--size", size):
        raise fail("--size is H or H,W")
    both = None if not sides else (sides[0], sides[-1])
    return Pixels(_numbers("--mean", mean), _numbers("--std", std), both, channels)


def _numbers(name: str, text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise fail(f"{name}={text}: give numbers with commas between them") from None


def as_logits(model: nn.Module, batches: Any) -> tuple[Any, list[str]]:
    """Return a `forward=` for a model with a softmax inside it (None for others), and what to say about it."""
    import torch

    from fastfip.data.outputs import logits_task
    from fastfip.data.task import Task

    batch = next(iter(batches))
    with torch.no_grad():
        task, said = logits_task(model, Task(), batch, Task().forward(model, batch))
    return task.forward_hook, [] if said is None else [said]


def device(name: str) -> str:
    """Check that a device is there.

    Raises:
        ConfigError: no such kind of device.
        BackendError: it is not here.
    """
    from fastfip.nets.checks import usable_device

    usable_device(name)
    return name


def triggered(
    asr_data: str | None, attack: str | None, target: str | None, test: ImageSet | None, how: Pixels
) -> ImageSet | None:
    """Return the triggered images of `--asr-data`, or of `--attack` on the test images; None if neither is given."""
    if asr_data is not None and attack is not None:
        raise fail("--asr-data and --attack: give one of them")
    if asr_data is None and attack is None:
        if target is not None:
            raise fail("--target needs --asr-data or --attack")
        return None
    if asr_data is not None:
        return _from_data(asr_data, target, how)
    if test is None:
        raise fail("--attack puts a trigger on test images: give --test-data")
    if target is None:
        raise fail("--attack needs --target: the class that the attacker wants")
    return test.triggered(make_attack(str(attack)).trigger, _attack_labels(test, target))


def _from_data(spec: str, target: str | None, how: Pixels) -> ImageSet:
    from fastfip.data.images import load
    from fastfip.errors import DataError

    images = load(spec, "triggered", how)
    if images.attack is not None:
        if target is not None:
            raise fail("--target: the .npz of --asr-data has attack_y already")
        return images
    if target is not None:
        return images.with_attack(_attack_labels(images, target))
    if len(images.labels.unique()) > 1:
        raise DataError(
            f"{spec}: labels of several classes: give --target if they are the true ones, or attack_y in the .npz"
        )
    return images


def _attack_labels(images: ImageSet, target: str) -> Any:
    from fastfip import attacks

    if target != "next" and not target.isdigit():
        raise fail(f"--target={target}: give a class number, or next")
    return attacks.attack_labels(images.labels, "next" if target == "next" else int(target))


def make_attack(spec: str) -> Any:
    """Return the attack of `NAME[:KEY=VALUE,...]`; a picture is given by its file."""
    import dataclasses

    from fastfip import attacks
    from fastfip.data.images import read_image
    from fastfip.errors import ConfigError

    name, _, rest = spec.partition(":")
    kind: Any = attacks.get(name)
    fields = [item.name for item in dataclasses.fields(kind)]
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key not in fields:
            raise ConfigError(f"attack {name}: {part!r} is no KEY=VALUE of {', '.join(fields)}")
        options[key] = read_image(value) if key == "picture" else _value(value)
    try:
        return kind(**options)
    except TypeError as error:
        raise ConfigError(f"attack {spec!r}: {error}") from None


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
