"""The images that commands are given: clean ones, and triggered ones of `--asr-data` or `--attack`."""

from __future__ import annotations

import contextlib
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from fastfip.cli.errors import fail

if TYPE_CHECKING:
    from torch import nn

    from fastfip.backdoorbench import AttackResult
    from fastfip.data.images import ImageSet
    from fastfip.data.scaling import Pixels


@dataclass(frozen=True)
class ImageReader:
    """How images become inputs, and class folders labels."""

    pixels: Pixels
    order: str | None
    skip_broken: bool = False

    def load(self, spec: str, role: str) -> ImageSet:
        """Return the images of an option, see `fastfip.data.images.load`."""
        from fastfip.data.images import load

        images = load(spec, role, self.pixels, self.order)
        return images.without_broken() if self.skip_broken else images


def check(asr_data: str | None, attack: str | None, target: str | None, test_data: str | None) -> None:
    """Find out whether triggered images can be made of these options, before any image is read."""
    if asr_data is not None and attack is not None:
        raise fail("--asr-data and --attack: give only one of them")
    if target is not None and target != "next" and not (target.isascii() and target.isdigit()):
        raise fail(f"--target={target}: give a class number, or next")
    if asr_data is None and attack is None and target is not None:
        raise fail("--target needs --asr-data or --attack")
    if attack is None:
        return
    if test_data is None:
        raise fail("--attack puts a trigger on test images: give --test-data")
    if target is None:
        raise fail("--attack needs --target: the class that the attacker wants")
    make_attack(attack)


def triggered(
    asr_data: str | None,
    attack: str | None,
    target: str | None,
    test: ImageSet | None,
    how: ImageReader,
    model: nn.Module | None = None,
) -> ImageSet | None:
    """Return the triggered images of `--asr-data`, or of `--attack` on the test images; None if neither is given.

    The model says how many classes there are, where folders do not.
    """
    check(asr_data, attack, target, None if test is None else "given")
    if asr_data is not None:
        return _from_data(asr_data, target, how, model)
    if attack is None or test is None or target is None:
        return None
    return test.triggered(make_attack(attack).trigger, _attack_labels(test, target, model))


def poisoned(attack: AttackResult, how: ImageReader) -> ImageSet | None:
    """Return the poisoned test pictures of a result of BackdoorBench; None where it has none, or they are not there."""
    found = attack.poisoned() if attack.img_size is not None else None
    return found.images(how.pixels) if found is not None and found.is_there else None


def unmeasured(attack: AttackResult | None) -> list[str]:
    """Return why there are no triggered images where a result of BackdoorBench says that there are some."""
    found = None if attack is None or attack.img_size is None else attack.poisoned()
    if found is None or found.is_there:
        return []
    return [f"ASR not measured: the folder {found.folder}, which has the triggered images, is not beside the file"]


def _from_data(spec: str, target: str | None, how: ImageReader, model: nn.Module | None) -> ImageSet:
    from fastfip.errors import DataError

    images = how.load(spec, "triggered")
    if images.attack is not None:
        if target is not None:
            raise fail("--target: leave it out, because the .npz of --asr-data has attack_y")
        return images
    if target is not None:
        return images.with_attack(_attack_labels(images, target, model))
    if len(images.labels.unique()) > 1:
        raise DataError(
            f"{spec}: the labels are of several classes: if they are the true labels, give --target, or "
            "attack_y in the .npz"
        )
    return images


def _attack_labels(images: ImageSet, target: str, model: nn.Module | None) -> Any:
    from fastfip import attacks

    if target != "next":
        return attacks.attack_labels(images.labels, int(target))
    return attacks.attack_labels(images.labels, "next", number_of_classes(images, model))


def number_of_classes(images: ImageSet, model: nn.Module | None) -> int:
    """Return how many classes there are: class folders, else outputs of the model; else the largest label and one."""
    from fastfip.data.outputs import first_outputs
    from fastfip.data.task import Task
    from fastfip.errors import ModelError

    least = int(images.labels.max()) + 1
    if images.classes is not None:
        return max(least, len(images.classes))
    if model is None:
        return least
    try:
        outputs = first_outputs(model, Task().forward, images.batch([0]))
    except ModelError:  # what runs the model on all images says more
        return least
    return max(least, outputs.shape[-1]) if outputs.dim() == 2 else least


def make_attack(spec: str) -> Any:
    """Return the attack of `NAME[:KEY=VALUE,...]` or `MODULE:CLASS[:...]`; a picture is given by its file."""
    import dataclasses

    from fastfip import attacks
    from fastfip.attacks.base import for_images
    from fastfip.data.pictures import read_image
    from fastfip.errors import ConfigError

    name, _, rest = spec.partition(":")
    place, colon, options_after = rest.partition(":")
    if rest and "=" not in place and "," not in place:  # MODULE:CLASS[:KEY=VALUE,...]
        name, rest = f"{name}:{place}", options_after if colon else ""
    kind: Any = attacks.get(name)
    for_images(kind)
    fields = [item.name for item in dataclasses.fields(kind) if item.repr] if dataclasses.is_dataclass(kind) else []
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key not in fields:
            raise ConfigError(
                f"attack {name}: {part!r} is not KEY=VALUE with a setting of the attack "
                f"({', '.join(fields) or 'it has none'})"
            )
        options[key] = read_image(value) if key == "picture" else _value(f"attack {name}: {key}", value, kind, key)
    try:
        return kind(**options)
    except TypeError as error:
        raise ConfigError(f"attack {spec!r}: {error}") from None


def _value(what: str, text: str, cls: type, key: str) -> Any:
    """Return a value of the type that a field of a dataclass has; what has no type is a number if it looks like one."""
    from torch import Tensor

    from fastfip.errors import ConfigError

    try:
        hint: Any = get_type_hints(cls).get(key, Any)
    except Exception:  # names that a class of the user's only has for type checkers
        hint = Any
    kinds = [kind for kind in get_args(hint) if kind is not type(None)] if _is_union(hint) else [hint]
    if type(None) in get_args(hint) and text.lower() == "none":
        return None
    if Tensor in kinds or any(get_origin(kind) in (tuple, list, dict) for kind in kinds):
        raise ConfigError(f"{what} cannot be given on the command line: set it in Python")
    if bool in kinds:
        if text.lower() not in _YES | _NO:
            raise ConfigError(f"{what}={text} must be true or false")
        return text.lower() in _YES
    if Any not in kinds and not any(kind in (int, float) for kind in kinds):
        return text
    for number in (int, float):
        if number is int or kinds != [int]:
            with contextlib.suppress(ValueError):
                return number(text)
    if Any in kinds or str in kinds:
        return text
    raise ConfigError(f"{what}={text} must be a {'whole number' if kinds == [int] else 'number'}")


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


_YES, _NO = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}
