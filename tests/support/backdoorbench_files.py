"""Result folders as BackdoorBench writes them: its container of poisoned pictures, its state, its torch.save."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SIDE, CLASSES, TARGET = 16, 4, 1


class Container:
    """Poisoned pictures by their index: in memory as tuples, or on disk as PNGs with their labels."""

    def __init__(self, folder: str | None = None) -> None:
        self.folder, self.held = folder, {}

    def add(self, index: Any, picture: np.ndarray, attack: int, true: int, really: Path | None) -> None:
        from PIL import Image

        image = Image.fromarray(picture)
        if self.folder is None:
            self.held[index] = (image, attack, true)
            return
        assert really is not None
        (really / str(true)).mkdir(parents=True, exist_ok=True)
        image.save(really / str(true) / f"{index}.png")
        self.held[index] = {"path": f"{self.folder}/{true}/{index}.png", "other_info": [attack, true]}

    def state(self) -> dict[str, Any]:
        return {"save_folder_path": self.folder, "data_dict": self.held, "save_file_format": ".png"}


def poisoned_state(
    pictures: np.ndarray, true: np.ndarray, target: int, folder: str | None = None, really: Path | None = None
) -> dict[str, Any]:
    """What a poisoned test set says of itself: all pictures of other classes than the target, kept by their index."""
    indicator = (true != target).astype(np.float64)
    container = Container(folder)
    for index in np.arange(len(true)):  # NumPy's numbers as keys, as there
        if indicator[index] == 1:
            container.add(index, pictures[index], target, int(true[index]), really)
    return {
        "bd_data_container": container.state(),
        "getitem_all": True,
        "getitem_all_switch": False,
        "original_index_array": np.arange(len(true))[np.where(indicator == 1)[0]],
        "poison_indicator": indicator,
        "save_folder_path": folder,
    }


def some_pictures(count: int = 24, side: int = SIDE, channels: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pictures [N, H, W(, 3)] of uint8 and their true labels."""
    rng = np.random.default_rng(seed)
    shape = (count, side, side, channels) if channels > 1 else (count, side, side)
    return rng.integers(0, 256, shape, dtype=np.uint8), np.arange(count) % CLASSES


def attack_result(
    folder: Path,
    model: dict[str, Tensor],
    disk: bool = False,
    numpy: int = 2,
    model_name: str = "preactresnet18",
    pictures: tuple[np.ndarray, np.ndarray] | None = None,
    dataset: str = "cifar10",
    protocol: int = 2,
    **changes: Any,
) -> Path:
    """Write folder/attack_result.pt (and the pictures beside it) and return its path."""
    x, y = some_pictures() if pictures is None else pictures
    stored = f"./record/{folder.name}"
    folder.mkdir(parents=True, exist_ok=True)
    sets = {}
    for name in ("bd_train", "bd_test"):
        at = (f"{stored}/{name}_dataset", folder / f"{name}_dataset") if disk else (None, None)
        sets[name] = poisoned_state(x[:8] if name == "bd_train" else x, y[:8] if name == "bd_train" else y, TARGET, *at)
    value = {
        "model_name": model_name,
        "num_classes": CLASSES,
        "model": OrderedDict(model),
        "data_path": f"./data/{dataset}",
        "img_size": (x.shape[1], x.shape[2], 3 if x.ndim == 4 else 1),
        "clean_data": dataset,
        **sets,
        **changes,
    }
    path = folder / "attack_result.pt"
    torch.save(value, path, pickle_protocol=protocol)
    if numpy == 1:
        rename_numpy(path)
    return path


def rename_numpy(path: Path) -> None:
    """Give NumPy's functions in a file the names that NumPy 1 has for them."""
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries:
            if name.endswith("data.pkl"):
                assert b"cnumpy._core.multiarray\n" in data
                data = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
            archive.writestr(zipfile.ZipInfo(name), data)
