"""Networks that other people backdoored, with the images they were made for.

The files lie in `../shared/data` beside the repository, or where FASTFIP_DATA points; `available()` says whether they
do. Nothing of them is part of the package. CIFAR-10 is decoded once into `benchmarks/.cache` (or FASTFIP_CACHE).

    python -m benchmarks.purification.real_data          # ACC and ASR of every checkpoint as it was received
"""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import harness
from fastfip.attacks import attack_labels
from fastfip.attacks.base import AttackTarget
from fastfip.testing import nets

Images = np.ndarray  # uint8 [N, H, W, 3], or [N, H, W] for MNIST

_CIFAR_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def data_dir() -> Path:
    """Return where the data should be."""
    return Path(os.environ.get("FASTFIP_DATA") or harness.ROOT.parent / "shared" / "data")


def available() -> bool:
    """Return whether the data is there."""
    return (data_dir() / "checkpoints").is_dir()


def require() -> None:
    """End the program where the data is not there."""
    if not available():
        sys.exit(f"skipped: no real networks in {data_dir()} (set FASTFIP_DATA)")


def loader(x: Tensor, y: Tensor) -> torch.utils.data.DataLoader:
    """Return the loader that a clean set is given in."""
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=128, shuffle=True)


@dataclass(frozen=True)
class RealNet:
    """A received network and its images.

    `clean_*` is what clean sets may be drawn from (training images), `test_*` the full test set. Images are uint8 as
    decoded; the trigger acts on them, then `to_input` makes what the net takes.
    """

    name: str
    model: nn.Module
    classes: int
    target: AttackTarget | None  # None: the net is clean
    trigger: Callable[[Images], Images] | None
    clean_x: Images
    clean_y: np.ndarray  # int64 [N]
    test_x: Images
    test_y: np.ndarray
    to_input: Callable[[Images], Tensor]  # -> float32 [N, C, H, W]
    train_size: int  # images of the set that the net was trained on: "5 % clean" is 5 % of this
    recorded: tuple[float, float | None]  # ACC and ASR that the README of the data states for these images
    clean_groups: np.ndarray | None = None  # images of one group are nearly the same (frames of one traffic sign)
    probabilities: bool = False  # the net ends in a softmax
    notes: tuple[str, ...] = field(default=())

    def forward(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Return true logits for any of these nets: the hook for `forward=` where the net ends in a softmax."""
        out = model(batch[0])
        return out.clamp_min(1e-30).log() if self.probabilities else out

    def clean_set(self, count: int, seed: int = 0, per_class: int | None = None) -> tuple[Tensor, Tensor]:
        """Return `count` clean images (x as the net takes it, y int64) drawn at random, equally from every class."""
        picked = sample_clean(self.clean_y, count, seed, per_class)
        return self.to_input(self.clean_x[picked]), torch.from_numpy(self.clean_y[picked])

    def test_set(self) -> tuple[Tensor, Tensor]:
        """Return the test set as tensors."""
        return self.to_input(np.asarray(self.test_x)), torch.from_numpy(self.test_y)

    def wanted(self, y: np.ndarray) -> np.ndarray:
        """Return the attacker's labels for true ones [N]."""
        if self.target is None:
            raise ValueError(f"{self.name} has no trigger")
        return attack_labels(torch.from_numpy(y), self.target, self.classes).numpy()

    def triggered_set(self) -> tuple[Tensor, Tensor]:
        """Return the triggered test images that are not of the target class, with their TRUE labels."""
        if self.trigger is None:
            raise ValueError(f"{self.name} has no trigger")
        keep = self.wanted(self.test_y) != self.test_y
        return self.to_input(self.trigger(np.asarray(self.test_x[keep]))), torch.from_numpy(self.test_y[keep])


def sample_clean(labels: np.ndarray, count: int, seed: int, per_class: int | None = None) -> np.ndarray:
    """Return the indices of a random clean set with the same number of images a class (one more in some).

    `per_class` bounds the number; the set is smaller then.
    """
    rng = np.random.default_rng(seed)
    classes = np.unique(labels)
    share, extra = divmod(count, len(classes))
    lucky = set(rng.permutation(classes)[:extra].tolist())
    picked = []
    for c in classes:
        mine = rng.permutation(np.flatnonzero(labels == c))
        want = share + (int(c) in lucky)
        picked.append(mine[: want if per_class is None else min(want, per_class)])
    return rng.permutation(np.concatenate(picked))


def _scaled(mean: float | tuple = 0.0, std: float | tuple = 1.0) -> Callable[[Images], Tensor]:
    def to_input(x: Images) -> Tensor:
        t = torch.from_numpy(np.array(x)).float().div_(255)
        t = t[:, None] if t.dim() == 3 else t.permute(0, 3, 1, 2).contiguous()
        m, s = (torch.tensor(v, dtype=torch.float32).reshape(1, -1, 1, 1) for v in (mean, std))
        return t.sub_(m).div_(s)

    return to_input


def _white_4x4(x: Images) -> Images:
    x = x.copy()
    x[:, 27:31, 27:31] = 255
    return x


def _grid_3x3(x: Images) -> Images:
    x = x.copy()
    x[:, 29:32, 29:32] = 0
    for row, column in ((31, 31), (31, 29), (30, 30), (29, 31)):
        x[:, row, column] = 255
    return x


def _white_5x5(x: Images) -> Images:
    x = x.copy()
    x[:, -5:, -5:] = 255
    return x


def _white_3x3(x: Images) -> Images:
    x = x.copy()
    x[:, 25:28, 25:28] = 255
    return x


def _six_pixels(x: Images) -> Images:
    x = x.copy()
    for row, column in ((27, 27), (25, 27), (27, 25), (25, 25), (23, 27), (27, 23)):
        x[:, row, column] = 255
    return x


def _add_l2inv(x: Images) -> Images:
    from PIL import Image

    pattern = np.asarray(Image.open(data_dir() / "triggers" / "ibau_l2inv.png"), dtype=np.int16)
    return np.clip(x.astype(np.int16) + pattern, 0, 255).astype(np.uint8)


def cifar10() -> dict[str, np.ndarray]:
    """Return CIFAR-10 (the JPEG copy), decoded: train_x, train_y, test_x, test_y. The first call takes a minute."""
    out = {}
    for split in ("train", "test"):
        fx, fy = (harness.cache_dir() / f"cifar10_jpeg_{split}_{v}.npy" for v in "xy")
        if not (fx.exists() and fy.exists()):
            _decode_cifar10(split, fx, fy)
        out[f"{split}_x"], out[f"{split}_y"] = np.load(fx, mmap_mode="r"), np.load(fy)
    return out


def _decode_cifar10(split: str, fx: Path, fy: Path) -> None:
    from PIL import Image

    with zipfile.ZipFile(data_dir() / "cifar10_jpeg.zip") as z:
        names = sorted(n for n in z.namelist() if n.startswith(f"{split}/") and n.endswith(".jpg"))
        x = np.stack([np.asarray(Image.open(BytesIO(z.read(n))).convert("RGB")) for n in names])
    y = np.array([_CIFAR_CLASSES.index(n.split("/")[1]) for n in names], dtype=np.int64)
    for path, value in ((fx, x), (fy, y)):  # renamed when whole: two runs at once must not read half a file
        part = path.with_suffix(f".{os.getpid()}.part.npy")
        np.save(part, value)
        part.replace(path)


def arrays(dataset: str) -> dict[str, np.ndarray]:
    """Return the arrays of a data set: cifar10, gtsrb32, mnist."""
    if dataset == "cifar10":
        return cifar10()
    z = np.load(data_dir() / f"{dataset}.npz")
    return {k: z[k] for k in z.files}


def load_state(file: str) -> dict[str, Tensor]:
    """Return the bare state dict of one of the checkpoint files."""
    state = torch.load(data_dir() / "checkpoints" / file, map_location="cpu", weights_only=True)
    for key in ("state_dict", "net"):
        state = state.get(key, state)
    return {k.removeprefix("module."): v for k, v in state.items()}


@dataclass(frozen=True)
class _Spec:
    file: str
    make: Callable[[], nn.Module]
    dataset: str
    classes: int
    target: AttackTarget | None
    trigger: Callable[[Images], Images] | None
    to_input: Callable[[Images], Tensor]
    train_size: int
    recorded: tuple[float, float | None]
    probabilities: bool = False


SPECS: dict[str, _Spec] = {
    s.file.split(".")[0]: s
    for s in (
        _Spec("ibau_gtsrb_badnets.pth", lambda: nets.SmallVGG(43), "gtsrb32", 43, 8, _white_4x4, _scaled(), 39209,
              (97.86, 99.02)),
        _Spec("ibau_cifar10_badnets.pth", lambda: nets.SmallVGG(10), "cifar10", 10, 8, _white_4x4, _scaled(), 50000,
              (78.10, 98.22)),
        _Spec("ibau_cifar10_l2inv.pth", lambda: nets.SmallVGG(10), "cifar10", 10, 0, _add_l2inv, _scaled(), 50000,
              (77.34, 100.0)),
        _Spec("nad_cifar10_wrn16_1_badnets.pth.tar", nets.WideResNet, "cifar10", 10, 5, _grid_3x3, _scaled(), 50000,
              (75.75, 100.0)),
        _Spec("nad_cifar10_wrn16_1_erased.pth.tar", nets.WideResNet, "cifar10", 10, 5, _grid_3x3, _scaled(), 50000,
              (73.39, 6.13)),
        _Spec("badnets_mnist.pth", nets.BadNetMNIST, "mnist", 10, 1, _white_5x5, _scaled(0.5, 0.5), 60000,
              (98.08, 99.93), probabilities=True),
        _Spec("csaw_f_mnist_all_to_all.pth", lambda: nets.keras_digits("max"), "mnist", 10, "next", _white_3x3,
              _scaled(), 60000, (97.71, 94.93)),
        _Spec("dillonsd_mnist_pattern_all_to_all.pth", lambda: nets.keras_digits("average"), "mnist", 10, "next",
              _six_pixels, _scaled(), 60000, (98.93, 98.24)),
        _Spec("clean_cifar10_resnet20.th", nets.ResNet20, "cifar10", 10, None, None, _scaled(*IMAGENET), 50000,
              (81.03, None)),
    )
}  # fmt: skip


def names() -> list[str]:
    """Return the names that `load_real` knows: the stems of the checkpoint files."""
    return list(SPECS)


def load_model(name: str) -> nn.Module:
    """Return one received network, in eval mode."""
    spec = SPECS[name]
    model = spec.make()
    model.load_state_dict(load_state(spec.file), strict=True)
    return model.eval()


def load_real(name: str) -> RealNet:
    """Return a received network with its images, e.g. `load_real("ibau_gtsrb_badnets")`."""
    if name not in SPECS:
        raise ValueError(f"unknown network {name!r}: one of {', '.join(SPECS)}")
    if not available():
        raise FileNotFoundError(f"no data at {data_dir()}: point FASTFIP_DATA to it")
    spec = SPECS[name]
    found = arrays(spec.dataset)
    pool = "clean" if "clean_x" in found else "train"
    return RealNet(
        name=name,
        model=load_model(name),
        classes=spec.classes,
        target=spec.target,
        trigger=spec.trigger,
        clean_x=found[f"{pool}_x"],
        clean_y=found[f"{pool}_y"].astype(np.int64),
        test_x=found["test_x"],
        test_y=found["test_y"].astype(np.int64),
        to_input=spec.to_input,
        train_size=spec.train_size,
        recorded=spec.recorded,
        clean_groups=found.get("clean_track"),
        probabilities=spec.probabilities,
    )


@torch.no_grad()
def score(real: RealNet, model: nn.Module | None = None, batch: int = 500) -> dict[str, float]:
    """Return ACC and, if there is a trigger, ASR (triggered non-target images called the target) and RA, per cent."""
    model = (real.model if model is None else model).eval()

    def predict(x: Tensor) -> Tensor:
        return torch.cat([model(part).argmax(1) for part in x.split(batch)])

    x, y = real.test_set()
    out = {"acc": 100 * predict(x).eq(y).float().mean().item()}
    if real.trigger is not None:
        x, y = real.triggered_set()
        said = predict(x)
        out["asr"] = 100 * said.eq(torch.from_numpy(real.wanted(y.numpy()))).float().mean().item()
        out["ra"] = 100 * said.eq(y).float().mean().item()
    return out


def main() -> None:
    """Print ACC and ASR of every checkpoint beside what the README of the data states."""
    for name in names():
        real = load_real(name)
        got = score(real)
        stated = " / ".join("-" if v is None else f"{v:.2f}" for v in real.recorded)
        print(f"{name:32s} " + "  ".join(f"{k} {v:6.2f}" for k, v in got.items()) + f"   stated {stated}")


if __name__ == "__main__":
    main()
