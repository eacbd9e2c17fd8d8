"""Results of BackdoorBench: `attack_result.pt` read without running it, `defense_result.pt` read and written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastfip.backdoorbench.pictures import PoisonedSet
from fastfip.backdoorbench.settings import image_size, pixels_of
from fastfip.checkpoint.arch import load_arch
from fastfip.checkpoint.claims import Claim
from fastfip.checkpoint.known import known_arch
from fastfip.checkpoint.load import Checkpoint, load_checkpoint
from fastfip.checkpoint.read import follow
from fastfip.checkpoint.save import save_checkpoint
from fastfip.checkpoint.shards import index_of
from fastfip.data.images import ImageSet, loader
from fastfip.data.scaling import Pixels
from fastfip.errors import CheckpointError, ConfigError, DataError, ModelError, printable

__all__ = ["AttackResult", "find", "read", "write_defense_result"]

_KEYS = ("model_name", "num_classes", "model")


@dataclass(eq=False)
class AttackResult:
    """What a run of BackdoorBench left: a network, the data set it was trained on, and poisoned pictures.

    Attributes:
        path: the file.
        model_name: BackdoorBench's name of the architecture, e.g. "preactresnet18".
        num_classes: how many classes it tells apart.
        clean_data: name of the data set, e.g. "cifar10"; None: the file does not say, as a defense_result.pt.
        data_path: where that lay.
        img_size: height, width and channels of the inputs; None as above.
        shapes: shape of each weight, by its name in the file.
    """

    path: Path
    model_name: str
    num_classes: int
    clean_data: str | None = None
    data_path: str | None = None
    img_size: tuple[int, int, int] | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    _sets: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def pixels(self) -> Pixels:
        """How images become inputs: size, channels and normalisation of the data set.

        Raises:
            ConfigError: the file does not name the data set, or it is none of BackdoorBench's.
        """
        if self.clean_data is None or self.img_size is None:
            raise ConfigError(f"{self.path} does not say of which data set it is: give mean and std (--mean, --std)")
        return pixels_of(self.clean_data, self.img_size)

    @property
    def arch(self) -> tuple[str, dict[str, Any]]:
        """What `load_arch` builds the network from: spec and arguments.

        Raises:
            CheckpointError: the weights are not those of the architecture that the file names, or that is not known.
            ModelError: it is in a library that is not installed.
        """
        try:
            return known_arch(self.shapes, self.model_name, self.num_classes)
        except (CheckpointError, ModelError) as error:
            raise type(error)(f"{self.path}: {printable(str(error))}") from None

    def build(self) -> nn.Module:
        """Return the network with its weights, in eval mode, on the CPU.

        Raises:
            CheckpointError, ModelError: as for `arch`; or the weights cannot be used, see `load_checkpoint`.
        """
        model = load_arch(*self.arch).eval()
        load_checkpoint(self.path, model, key="model")
        return model

    def poisoned(self, name: str = "bd_test") -> PoisonedSet | None:
        """Return a set of poisoned pictures, "bd_test" or "bd_train"; None: the file has none.

        Raises:
            CheckpointError: it cannot be used; one line says why.
        """
        state = self._sets.get(name)
        if state is None or isinstance(state, PoisonedSet):
            return state
        try:
            self._sets[name] = PoisonedSet.of(state, self.path, self.num_classes)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {name} {printable(str(error))}") from None
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from None
        return self.poisoned(name)

    def triggered(self, pixels: Pixels | None = None) -> ImageSet:
        """Return the pictures of `bd_test` as images (x, attack label, true label).

        Raises:
            DataError: the file has none, or the folder that they lie in is not beside it.
            CheckpointError: they cannot be used.
        """
        found = self.poisoned()
        if found is None:
            raise DataError(f"{self.path}: has no poisoned test set (bd_test)")
        if not found.is_there:
            raise DataError(f"{self.path}: its pictures are missing: copy the folder {found.folder} beside it")
        return found.images(self.pixels if pixels is None else pixels)

    def asr_loader(self, batch_size: int = 128, pixels: Pixels | None = None) -> DataLoader[tuple[Tensor, ...]]:
        """Return batches of `triggered`, for `asr_loader=` of `purify`, `evaluate` and `compare`."""
        return loader(self.triggered(pixels), batch_size)


def find(path: str | os.PathLike[str]) -> AttackResult | None:
    """Return the result of BackdoorBench that a file holds; None: it holds something else, or cannot be told.

    A `defense_result.pt` is one too, without a data set and pictures.

    Raises:
        CheckpointError: the file is refused (see docs/checkpoints.md), or what it says of itself is.
    """
    where = index_of(path)
    try:
        root = follow(where)
        if not isinstance(root, Mapping) or not all(key in root for key in _KEYS):
            return None
        return _result(where, root)
    except CheckpointError as error:
        raise CheckpointError(f"{os.fspath(path)}: {printable(str(error))}") from None


def read(path: str | os.PathLike[str]) -> AttackResult:
    """Read an `attack_result.pt` or `defense_result.pt` of BackdoorBench; nothing in it is run, see `find`.

    Args:
        path: the file, or a folder with an `attack_result.pt`.

    Raises:
        CheckpointError: it is refused, or is no result of BackdoorBench.
    """
    found = find(path)
    if found is None:
        raise CheckpointError(f"{os.fspath(path)}: is no result of BackdoorBench, which has {', '.join(_KEYS)}")
    return found


def _result(path: Path, root: Mapping[Any, Any]) -> AttackResult:
    name, classes, model = (root[key] for key in _KEYS)
    if not isinstance(name, str) or type(classes) is not int or not isinstance(model, Mapping):
        raise CheckpointError("has a model_name, num_classes or model of another kind than BackdoorBench writes")
    shapes = {key: value.size for key, value in model.items() if isinstance(key, str) and isinstance(value, Claim)}
    size = root.get("img_size")
    texts = {key: root.get(key) for key in ("clean_data", "data_path")}
    if not all(value is None or isinstance(value, str) for value in texts.values()):
        raise CheckpointError("names its data set by something that is no text")
    sets = {key: root.get(key) for key in ("bd_train", "bd_test")}
    size = None if size is None else image_size(size)
    return AttackResult(path, name, classes, texts["clean_data"], texts["data_path"], size, shapes, sets)


def write_defense_result(
    weights: nn.Module | Mapping[str, Any], path: str | os.PathLike[str], like: AttackResult | Checkpoint
) -> Path:
    """Write `defense_result.pt` as BackdoorBench does: a dict of model_name, num_classes and model, and nothing else.

    Names, order and dtypes of the weights are those of the file that they came from. `torch.load(weights_only=True)`
    reads it.

    Args:
        weights: the purified network, or its state dict.
        path: the file, or a folder for `defense_result.pt`.
        like: the result that they came from, or its weights as `load_checkpoint` returned them.

    Returns:
        the path of the file.

    Raises:
        CheckpointError: the weights do not fit `like`, are not finite, or the file cannot be written.
    """
    where = Path(path)
    where = where / "defense_result.pt" if where.is_dir() else where
    source = load_checkpoint(like.path, key="model") if isinstance(like, AttackResult) else like
    if source.nesting != ("model",) or not {"model_name", "num_classes"} <= set(source.extras):
        raise CheckpointError(f"{source.path}: is no result of BackdoorBench, which has {', '.join(_KEYS)}")
    form = Checkpoint(source)
    vars(form).update(vars(source))
    form.extras = {key: source.extras[key] for key in _KEYS}
    return save_checkpoint(weights, where, like=form)
