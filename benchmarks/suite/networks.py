"""The networks of the suite: what is trained on what, with which backdoors, in which set.

Each network is trained once, from a clean one, and kept in the cache with its triggered test images, so that a method
is scored on what was made when the network was. Three sets, never mixed: *development*, which may be looked at while a
method is changed; *validation*, of which every look is logged; *test*, which others keep and this repository does not
have. Attack families are split as well: those of VALIDATION_ONLY are in no development network.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.purification import real_data
from fastfip.attacks import Injection, attack_labels, get, poison_and_train
from fastfip.attacks.base import in_range
from fastfip.data.scaling import Pixels
from fastfip.metrics import Evaluation, evaluate
from fastfip.testing import nets

__all__ = ["NETWORKS", "VALIDATION_ONLY", "Backdoor", "Base", "Network", "Prepared", "prepare", "score"]

Set = Literal["development", "validation"]

#: Attack families that no development network carries.
VALIDATION_ONLY = ("trojannet", "advdoor", "narcissus", "clb", "cba", "dynamic", "lira", "issba", "fba")
#: Triggered test images of a backdoor that are kept, and clean test images that are scored.
TRIGGERED, TESTED = 2000, 5000
#: Triggered images of the training set that are kept, for clean sets with hidden ones and for re-tuning.
LEAKED = 100


@dataclass(frozen=True)
class Base:
    """A clean network and the data it is for.

    Attributes:
        dataset: name in `real_data`. size: of the set that shares of clean images refer to.
        make: the network, untrained. state: its clean weights; None: it is trained from scratch first.
        pixels: how images become inputs. images: of the training set. scratch: epochs from scratch.
        epochs, lr: of the training with backdoors. adamw: whether AdamW trains it (`lr` from scratch too, images in
            batches of 64, weight decay 0.05), not SGD.
        crop: whether images are moved in training. flip: whether they may be mirrored as well.
    """

    name: str
    dataset: str
    size: int
    make: Callable[[], nn.Module]
    pixels: Pixels
    images: int
    epochs: int = 4
    lr: float = 0.05
    crop: bool = True
    flip: bool = True
    state: Callable[[], dict[str, Tensor]] | None = None
    scratch: int = 0
    adamw: bool = False

    def training(self, batch_size: int) -> dict[str, Any]:
        """Return what `poison_and_train` is called with, but for epochs and learning rate; SGD has its own batches."""
        how: dict[str, Any] = {"pixels": self.pixels, "crop": self.crop, "flip": self.flip}
        return {**how, "optimizer": "adamw", "weight_decay": 0.05, "batch_size": batch_size} if self.adamw else how


class DigitNet(nn.Module):
    """Two 5x5 convolutions, two Linear layers, no norm; logits; input [N, 1, 28, 28]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 5), nn.Conv2d(16, 32, 5)
        self.fc1, self.fc2 = nn.Linear(512, 256), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, 10]."""
        x = torch.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = torch.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.fc2(torch.relu(self.fc1(x.view(x.size(0), -1))))


def _resnet20() -> nn.Module:
    return nets.ResNet20().to(memory_format=torch.channels_last)


def _vit() -> nn.Module:
    """Six pre-norm attention blocks over 16 patches of 8x8 and a class token; no BatchNorm, no dropout.

    Patches are embedded by three strided convolutions in the place of one (Xiao et al., arXiv 2106.14881): a few
    thousand images teach a transformer alone too little.
    """
    net = nets.ViT(43, patch=8, dim=128, depth=6, heads=4, ratio=2)
    layers = [nn.Conv2d(a, b, 3, 2, 1) for a, b in ((3, 32), (32, 64), (64, 128))]
    net.patch = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    return net


BASES = {
    base.name: base
    for base in (
        Base("resnet20", "cifar10", 50000, _resnet20, Pixels(*real_data.IMAGENET), 10000,
             state=lambda: real_data.load_state("clean_cifar10_resnet20.th")),
        Base("vgg", "cifar10", 50000, lambda: nets.SmallVGG(10, 16), Pixels(), 10000, scratch=12),
        Base("gtsrb", "gtsrb32", 39209, lambda: nets.SmallVGG(43, 16), Pixels(), 4300, epochs=8, flip=False,
             scratch=30),
        Base("digits", "mnist", 60000, DigitNet, Pixels((0.5,), (0.5,)), 10000, epochs=20, lr=0.05, crop=False,
             scratch=5),
        Base("vit", "gtsrb32", 39209, _vit, Pixels((0.5,) * 3, (0.5,) * 3), 4300, epochs=7, lr=1e-3,
             flip=False, scratch=16, adamw=True),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Backdoor:
    """One backdoor of a network: the attack by name, its settings, target, and share of the training set."""

    attack: str
    target: int | Literal["next"] = 0
    rate: float = 0.1
    settings: tuple[tuple[str, Any], ...] = ()
    sources: tuple[int, ...] | None = None

    def injection(self) -> Injection:
        """Return what `poison_and_train` takes."""
        return Injection(get(self.attack)(**dict(self.settings)), self.target, self.rate, self.sources)

    @property
    def label(self) -> str:
        """What tables call it."""
        kind = "-all" if self.target == "next" else ""
        return self.attack + kind + (f" {self.rate:.0%}" if self.rate < 0.02 else "")


@dataclass(frozen=True)
class Network:
    """A network of the suite: its base, what is planted in it, the set it belongs to.

    `epochs` are those of the base unless a backdoor needs more to be learned.
    """

    name: str
    base: str
    backdoors: tuple[Backdoor, ...]
    set: Set = "development"
    seed: int = 0
    effort: float = 1.0
    epochs: int | None = None

    def key(self) -> str:
        """Return a name that changes with what is written here of the network: base, training, backdoors.

        The code of an attack is not in it: where that changes, the files of its networks have to be removed.
        """
        base = BASES[self.base]
        made = [
            self.base,
            base.images,
            self.epochs or base.epochs,
            base.lr,
            base.crop,
            base.flip,
            base.scratch,
            self.seed,
            self.effort,
            *(["adamw"] if base.adamw else []),
        ]
        said = json.dumps([made, [[b.attack, b.target, b.rate, b.settings, b.sources] for b in self.backdoors]])
        return f"{self.name}-{hashlib.sha256(said.encode()).hexdigest()[:10]}"


@dataclass
class Prepared:
    """A trained network with what it is scored on.

    Attributes:
        model: in eval mode.
        test: test images as the model takes them, and labels.
        triggered: for each backdoor (images as the model takes them, attack labels, true labels).
        leaked: for each backdoor (triggered images as they were trained on, in [0, 1]; the labels they had there).
        pool: images uint8 [N, H, W, C] and labels that clean sets are drawn from.
        seconds: that the training took, of the processor.
        clean: its accuracy. attacked: ASR and RA of each backdoor.
    """

    network: Network
    base: Base
    model: nn.Module
    test: tuple[Tensor, Tensor]
    triggered: list[tuple[Tensor, Tensor, Tensor]]
    leaked: list[tuple[Tensor, Tensor]]
    pool: tuple[np.ndarray, np.ndarray]
    seconds: float
    clean: Evaluation
    attacked: list[Evaluation]

    def inputs(self, x: np.ndarray) -> Tensor:
        """Return images as the model takes them."""
        return self.base.pixels.normalise(in_range(_first(x)))


def _first(x: np.ndarray) -> Tensor:
    """Channels first, uint8."""
    out = torch.from_numpy(np.ascontiguousarray(x))
    return out[:, None] if out.dim() == 3 else out.permute(0, 3, 1, 2).contiguous()


@functools.lru_cache(maxsize=2)
def _data(base: str) -> dict[str, np.ndarray]:
    """Return train_x, train_y (poisoned or clean training), pool_x, pool_y (clean sets), test_x, test_y of a base.

    The pool is disjoint from the training set, but of GTSRB, of which there are only 4,300 training images. (The clean
    ResNet-20 that came from elsewhere has seen the originals of all of CIFAR-10's training images.)
    """
    made = BASES[base]
    arrays = real_data.arrays(made.dataset)
    name = "clean" if "clean_x" in arrays else "train"
    x, y = arrays[f"{name}_x"], arrays[f"{name}_y"].astype(np.int64)
    order = np.random.default_rng(7).permutation(len(y))
    train, rest = np.sort(order[: made.images]), np.sort(order[made.images :])
    rest = train if len(rest) < made.images else rest
    # Files are sorted by class: what is kept of them must not be.
    tested = np.random.default_rng(8).permutation(len(arrays["test_y"]))[:TESTED]
    return {
        "train_x": x[train], "train_y": y[train], "pool_x": x[rest], "pool_y": y[rest],
        "test_x": arrays["test_x"][tested], "test_y": arrays["test_y"][tested].astype(np.int64),
    }  # fmt: skip


def folder() -> Path:
    """Where trained networks are kept."""
    path = harness.cache_dir() / "suite"
    path.mkdir(exist_ok=True)
    return path


def _kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a file holds; if it is not there, make it."""
    if not path.exists():
        made = make()
        part = path.with_suffix(f".{os.getpid()}.part")  # renamed when whole
        torch.save(made, part)
        part.replace(path)
    return torch.load(path, weights_only=True)


def _clean_state(base: Base) -> dict[str, Tensor]:
    if base.state is not None:
        return base.state()

    def make() -> dict[str, Any]:
        data = _data(base.name)
        x, y = _first(data["train_x"]), torch.from_numpy(data["train_y"])
        torch.manual_seed(0)
        lr = base.lr if base.adamw or base.scratch <= 5 else 0.1
        trained = poison_and_train(base.make(), (x, y), [], epochs=base.scratch, lr=lr, **base.training(64))
        return trained.model.state_dict()

    return _kept(folder() / f"base-{base.name}-{base.images}-{base.scratch}.pth", make)


def clean_model(base: str) -> nn.Module:
    """Return the clean network that those with backdoors are made of."""
    model = BASES[base].make()
    model.load_state_dict(_clean_state(BASES[base]))
    return model.eval()


def _make(network: Network) -> dict[str, Any]:
    base, data = BASES[network.base], _data(network.base)
    start = time.process_time()
    x, y = _first(data["train_x"]), torch.from_numpy(data["train_y"])
    classes = int(y.max()) + 1
    out = poison_and_train(
        clean_model(network.base), (x, y), [backdoor.injection() for backdoor in network.backdoors], classes=classes,
        epochs=network.epochs or base.epochs, lr=base.lr, seed=network.seed, effort=network.effort, **base.training(32),
    )  # fmt: skip
    test_x, test_y = _first(data["test_x"]), torch.from_numpy(data["test_y"])
    triggered, leaked = [], []
    for injection, places in zip(out.injections, out.poisoned):
        attack, _ = injection.ready()
        found = attack.asr_set(in_range(test_x), test_y, injection.target, classes, injection.sources)
        triggered.append([found[0][:TRIGGERED].half(), found[1][:TRIGGERED], found[2][:TRIGGERED]])
        some = places[:: max(1, len(places) // LEAKED)][:LEAKED]
        generator = torch.Generator().manual_seed(network.seed)
        shown = attack.training_trigger(in_range(x[some]), generator)
        leaked.append([shown.half(), attack_labels(y[some], injection.target, classes)])
    held: dict[str, Any] = {"model": out.model.state_dict(), "triggered": triggered, "leaked": leaked}
    held["seconds"] = time.process_time() - start
    clean, attacked = score(_prepared(network, held), out.model)
    held["scores"] = [clean.acc, *(value for found in attacked for value in (found.asr, found.ra))]
    return held


def _prepared(network: Network, held: dict[str, Any]) -> Prepared:
    base, data = BASES[network.base], _data(network.base)
    model = base.make()
    model.load_state_dict(held["model"])
    normalise, scores = base.pixels.normalise, held.get("scores", [None])
    return Prepared(
        network, base, model.eval(),
        test=(normalise(in_range(_first(data["test_x"]))), torch.from_numpy(data["test_y"])),
        triggered=[(normalise(x.float()), wanted, true) for x, wanted, true in held["triggered"]],
        leaked=[(x.float(), y) for x, y in held["leaked"]],
        pool=(data["pool_x"], data["pool_y"]),
        seconds=held["seconds"],
        clean=Evaluation(acc=scores[0]),
        attacked=[Evaluation(asr=asr, ra=ra) for asr, ra in zip(scores[1::2], scores[2::2])],
    )  # fmt: skip


def prepare(network: Network) -> Prepared:
    """Return a network, trained if it is not in the cache."""
    return _prepared(network, _kept(folder() / f"{network.key()}.pth", lambda: _make(network)))


def score(prepared: Prepared, model: nn.Module) -> tuple[Evaluation, list[Evaluation]]:
    """Return the accuracy, and ASR and RA of each backdoor, on what was kept of the test set."""
    x, y = prepared.test
    clean = evaluate(model, list(zip(x.split(500), y.split(500))))
    attacked = [evaluate(model, None, list(zip(*(part.split(500) for part in parts)))) for parts in prepared.triggered]
    return clean, attacked


def _each(base: str, backdoors: Sequence[Backdoor], of: Set, epochs: int | None = None) -> list[Network]:
    """One network for each backdoor."""
    names = [f"{base}-{backdoor.label.replace(' ', '').replace('%', '')}" for backdoor in backdoors]
    return [Network(name, base, (backdoor,), of, epochs=epochs) for name, backdoor in zip(names, backdoors)]


NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        *(Network(f"{base}-clean", base, ()) for base in BASES),
        *_each("resnet20", [Backdoor("blend"), Backdoor("sig", rate=0.05), Backdoor("lf")], "development"),
        # Small patches at the border leave the image in many crops, warps and quantisation are faint: more epochs.
        *_each("resnet20", [
            Backdoor("badnets"), Backdoor("badnets", rate=0.01), Backdoor("badnets", "next"), Backdoor("wanet"),
            Backdoor("bppa"),
        ], "development", epochs=16),
        Network("resnet20-four", "resnet20", (
            Backdoor("blend", 1, 0.05), Backdoor("wanet", 2, 0.1), Backdoor("sig", 3, 0.05), Backdoor("bppa", 4, 0.05),
        )),
        *_each("digits", [Backdoor("badnets"), Backdoor("badnets", "next"), Backdoor("wanet"), Backdoor("blend")],
               "development"),
        *_each("gtsrb", [Backdoor("badnets"), Backdoor("blend")], "development"),
        *_each("vgg", [Backdoor("badnets"), Backdoor("blend")], "development"),
        # The patch lies so far from the border that no crop takes it away.
        *_each("vit", [
            Backdoor("badnets", settings=(("size", 4), ("margin", 4), ("pattern", "checker"))), Backdoor("blend"),
        ], "development"),
        # Patterns that are optimised, generators, clean labels, composites: in no development network.
        *_each("resnet20", [
            Backdoor("trojannet", 2), Backdoor("lira", 3), Backdoor("dynamic", 5),
            Backdoor("advdoor", 6), Backdoor("fba", 7), Backdoor("narcissus", 2, 0.01), Backdoor("clb", 1, 0.05),
            Backdoor("trojannet", 2, 0.01),
        ], "validation"),
        *_each("resnet20", [Backdoor("issba", 4), Backdoor("cba", 2)], "validation", epochs=16),
        *_each("digits", [
            Backdoor("trojannet", "next"), Backdoor("lira", 3), Backdoor("advdoor", 6), Backdoor("dynamic", 5),
        ], "validation"),
        *_each("gtsrb", [Backdoor("trojannet", 2), Backdoor("lira", 3)], "validation"),
    )
}  # fmt: skip
