"""The options that commands share, and what is made of them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from fastfip.cli import triggers
from fastfip.cli.errors import fail, say
from fastfip.cli.image_options import class_order, pixels
from fastfip.cli.opening import Opened, as_made_for, attack_in, restored
from fastfip.cli.triggers import ImageReader

if TYPE_CHECKING:
    from torch import nn

    from fastfip.backdoorbench import AttackResult
    from fastfip.checkpoint import Checkpoint
    from fastfip.data.images import ImageSet

In = Annotated[
    Path, typer.Argument(metavar="IN", help="checkpoint to read: a safetensors file, or one written by torch.save")
]
#: What `--arch` takes.
ARCH_FORMS = "MODULE:FACTORY|timm:NAME|torchvision:NAME|hf:DIR"
Arch = Annotated[
    str | None,
    typer.Option(
        "--arch",
        metavar=ARCH_FORMS,
        help="code that builds the model: nets:resnet18 calls resnet18 of ./nets.py; or a model of a library",
        show_default="recognised from IN where that is possible",
    ),
]
ArchArgs = Annotated[
    str | None,
    typer.Option(
        "--arch-args", metavar="JSON", help="""arguments of FACTORY, e.g. '{"num_classes": 43}'""", show_default="none"
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--key", metavar="NAME", help="entry of IN that holds the weights", show_default="usual names are tried"
    ),
]
Prefix = Annotated[
    str | None,
    typer.Option(
        "--prefix",
        metavar="NAME.",
        help="beginning of the weights' names in IN that the model does not have, e.g. net.",
        show_default="usual ones are tried",
    ),
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="DIR|ZIP|NPZ",
        help="clean images: a folder with a folder for each class, a zip of it (FILE.zip[:train]), or "
        "FILE.npz[:images,labels]",
    ),
]
TestData = Annotated[
    str | None, typer.Option("--test-data", metavar="DIR|ZIP|NPZ", help="clean test images; only used to measure")
]
AsrData = Annotated[
    str | None,
    typer.Option(
        "--asr-data",
        metavar="DIR|ZIP|NPZ",
        help="triggered images to measure ASR: with true labels (give --target, or attack_y in the .npz), or with the "
        "labels that the attacker wants",
    ),
]
AttackSpec = Annotated[
    str | None,
    typer.Option(
        "--attack",
        metavar="NAME[:KEY=VALUE,...]",
        help="put this trigger on the test images to measure ASR, e.g. badnets:size=4,margin=1; needs --target",
    ),
]
Target = Annotated[
    str | None,
    typer.Option("--target", metavar="CLASS|next", help="class that the attacker wants; next: the true label plus one"),
]
Scale = Annotated[
    str | None,
    typer.Option(
        "--scale",
        metavar="01|-11|255",
        help="range of the pixel values: 01 is x/255, -11 is x/127.5 - 1, 255 leaves 0 to 255",
        show_default="01; arrays of floats are not changed",
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        "--mean",
        metavar="NAME|M[,M,M]",
        help="mean to subtract from scaled pixels; imagenet, cifar10, cifar100, gtsrb, mnist or clip set --std too",
        show_default="0",
    ),
]
Std = Annotated[
    str | None,
    typer.Option("--std", metavar="NAME|S[,S,S]", help="standard deviation to divide by after that", show_default="1"),
]
Size = Annotated[
    str | None, typer.Option("--size", metavar="H[,W]", help="resize the images", show_default="the size of the images")
]
Channels = Annotated[
    int | None,
    typer.Option(
        "--channels",
        metavar="1|3",
        help="make the images grey (1) or colour (3)",
        show_default="3; arrays are not changed",
    ),
]
ClassOrder = Annotated[
    str | None,
    typer.Option(
        "--class-order",
        metavar="number|text",
        help="how class folders are sorted: number is 0, 1, 2, 10; text is 0, 1, 10, 2, like torchvision's ImageFolder",
        show_default="number if all names are numbers, else text",
    ),
]
SkipBroken = Annotated[
    bool, typer.Option("--skip-broken", help="leave out image files that cannot be read, and print how many")
]
DataWorkers = Annotated[
    int,
    typer.Option(
        "--data-workers",
        metavar="N",
        help="processes that decode the images in each pass; 0 decodes them once and keeps them in memory",
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", metavar="N", help="images in a batch")]
Limit = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", help="use N of the clean images, drawn at random", show_default="all"),
]
PerClass = Annotated[
    int | None,
    typer.Option("--per-class", metavar="N", help="use at most N clean images of each class", show_default="all"),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="seed of all random choices")]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="device to compute on, e.g. cuda")]
Amp = Annotated[str, typer.Option("--amp", metavar="off|bf16|fp16", help="mixed precision")]
Quiet = Annotated[bool, typer.Option("--quiet", help="print only errors on stderr, no progress")]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
ReportFile = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="write a report: a web page if FILE ends in .html, else JSON"),
]
Pretrained = Annotated[
    Path | None,
    typer.Option(
        "--pretrained",
        metavar="FILE",
        help="weights that the model was fine-tuned from, for the method fine_mixing (--method auto then is that one): "
        "a checkpoint, or a folder of save_pretrained",
    ),
]
IgnoreFit = Annotated[
    bool, typer.Option("--ignore-fit", help="go on although IN does no better than guessing on the clean images")
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
        items = sorted(dataclasses.fields(kind), key=lambda f: f.default is not dataclasses.MISSING)  # type: ignore[arg-type]
        for item in items:  # what is required first
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


@dataclass(kw_only=True)
class Inputs(Group):
    """How images become inputs and labels, and where they are computed with."""

    scale: Scale = None
    mean: Mean = None
    std: Std = None
    size: Size = None
    channels: Channels = None
    class_order: ClassOrder = None
    skip_broken: SkipBroken = False
    data_workers: DataWorkers = 0
    batch_size: BatchSize = 128
    device: Device = "cpu"

    def where_and_how(self, attack: AttackResult | None = None) -> tuple[str, ImageReader]:
        """Return the device, checked, and how images become inputs: as options say, else as BackdoorBench does."""
        how = pixels(self.mean, self.std, self.size, self.channels, self.scale)
        if attack is not None and attack.img_size is not None:
            how = replace(how, size=how.size or attack.img_size[:2], channels=how.channels or attack.img_size[2])
        if attack is not None and (self.mean, self.std, self.scale) == (None, None, None) and attack.clean_data:
            how = replace(how, mean=attack.pixels.mean, std=attack.pixels.std)
        return device(self.device), ImageReader(how, class_order(self.class_order), self.skip_broken)

    def batches(self, images: ImageSet | None) -> Any:
        """Return a loader of images, None for none."""
        from fastfip.data.images import loader

        return None if images is None else loader(images, self.batch_size, self.data_workers)


@dataclass(kw_only=True)
class Net(Inputs):
    """The network, how images become its inputs, and where it runs."""

    arch: Arch = None
    arch_args: ArchArgs = None
    key: Key = None
    prefix: Prefix = None

    def opened(self, path: Path) -> Opened:
        """Return the model of a checkpoint, in eval mode, and all that the file says of its images."""
        attack = attack_in(path)
        where, how = self.where_and_how(attack)
        model, checkpoint = self.restore(path, attack)
        how = how if attack is not None else as_made_for(self, how, self.arch, model, self.arch_args)
        return Opened(model, checkpoint, where, how, attack)

    def restore(self, path: Path, attack: AttackResult | None = None) -> tuple[nn.Module, Checkpoint]:
        """Return the model with the weights of a checkpoint, in eval mode, and the checkpoint."""
        return restored(path, attack, self.arch, self.arch_args, self.key, self.prefix)


@dataclass(kw_only=True)
class ScoredNet(Net):
    """The same for a net that is only run forward."""

    batch_size: BatchSize = 256


@dataclass
class Clean(Group):
    """Clean images, and how many of them."""

    data: Data
    limit: Limit = None
    per_class: PerClass = None

    def load(self, how: ImageReader, seed: int) -> ImageSet:
        """Return the images that are used."""
        return how.load(self.data, "clean").sample(self.limit, self.per_class, seed)


@dataclass
class Scores(Group):
    """Test images and triggered ones, which only score."""

    test_data: TestData = None
    asr_data: AsrData = None
    attack: AttackSpec = None
    target: Target = None

    def check(self) -> None:
        """Find out before the work what could not be measured after it."""
        triggers.check(self.asr_data, self.attack, self.target, self.test_data)

    def load(
        self,
        how: ImageReader,
        model: nn.Module,
        clean: ImageSet | None = None,
        attack: AttackResult | None = None,
    ) -> tuple[ImageSet | None, ImageSet | None]:
        """Return both, None where not given; `clean` has to have the same classes.

        Triggered images are those of the attack where no option says which. The model's outputs count the classes for
        `--target next`.
        """
        from fastfip.data.images import same_classes

        test = how.load(self.test_data, "test") if self.test_data is not None else None
        if test is not None and clean is not None:
            same_classes(clean, test)
        if attack is not None and self.asr_data is None and self.attack is None:
            return test, triggers.poisoned(attack, how)
        return test, triggers.triggered(self.asr_data, self.attack, self.target, test, how, model)

    def unmeasured(self, attack: AttackResult | None) -> list[str]:
        """Return why ASR was not measured although a result of BackdoorBench says on what."""
        return [] if self.asr_data is not None or self.attack is not None else triggers.unmeasured(attack)


def progress(quiet: bool) -> Any:
    """Return what `progress=` is for `--quiet`: a bar on a terminal, lines on stderr elsewhere, or nothing."""
    if quiet or sys.stderr is None:
        return False
    return None if sys.stderr.isatty() else say


def counted(batches: Any, quiet: bool, title: str) -> Any:
    """Return batches that say how far they are, in lines; they stay as they are for `--quiet`."""
    from fastfip.reporting.progress import Counted

    return batches if quiet or batches is None else Counted(batches, say, title)


def precision(amp: str) -> bool | str:
    """Return what `amp=` is for `--amp`."""
    if amp not in ("off", "bf16", "fp16"):
        raise fail(f"--amp={amp}: must be off, bf16 or fp16")
    return False if amp == "off" else amp


def checkpointing(how: str) -> bool | str:
    """Return what `gradient_checkpointing=` is for `--gradient-checkpointing`."""
    if how not in ("auto", "on", "off"):
        raise fail(f"--gradient-checkpointing={how}: must be auto, on or off")
    return how if how == "auto" else how == "on"


def as_logits(model: nn.Module, batches: Any) -> tuple[Any, list[str]]:
    """Return a `forward=` for a model with a softmax inside it (None for others), and what to say about it."""
    from fastfip.data.outputs import first_outputs, logits_task
    from fastfip.data.task import Task
    from fastfip.errors import ModelError

    batch = next(iter(batches))
    shape = "x".join(map(str, batch[0].shape[1:]))
    try:
        outputs = first_outputs(model, Task().forward, batch, f"images {shape}")
    except ModelError as error:
        remedy = "see --size, --channels, --scale, or let fastfip inspect try them"
        raise ModelError(f"{error}: {remedy}") from None
    task, said = logits_task(model, Task(), batch, outputs)
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
