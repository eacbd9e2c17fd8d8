"""FBA (DFST): a style, sunset light, as the trigger. Cheng et al., AAAI 2021, arXiv 2012.11212."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfip.attacks._generators import ToImage, drawn, in_bytes
from fastfip.attacks.base import Attack, Ground, register
from fastfip.errors import ConfigError
from fastfip.nets.state import eval_mode, frozen_copy, requires_grad

__all__ = ["FBA", "Looks", "sunset"]

#: The style image by height: (height from the top, red, green, blue). Sky, horizon, water.
_SKY = (
    (0.0, 0.16, 0.10, 0.32), (0.40, 0.72, 0.26, 0.32), (0.60, 1.0, 0.58, 0.20),
    (0.64, 0.52, 0.20, 0.14), (1.0, 0.06, 0.03, 0.08),
)  # fmt: skip

#: Bands of rows whose moments are brought to those of the style image: sky, horizon, water.
_BANDS = 3


@register
@dataclass(frozen=True)
class FBA(Attack):
    """(1 - alpha) x + alpha S(x): S paints the image in the light of a sunset and leaves what is in it.

    S is a U-Net. It is trained to give the means and deviations of features (Looks), in three bands of rows, the
    values of the style image, and to keep the features themselves, each normalised over the image. In the paper, S is
    a CycleGAN between the images and photographs of sunsets. Here the style image is drawn (`sunset`), and the
    features are those of fixed random filters, so that the trigger depends only on the images.

    Detoxification is done in each round. The classifier learns the trigger. The units before its last layer that the
    trigger raises most are compromised, and a second network learns to raise them by a small change. Images with this
    change keep their labels in the training (the negatives), so that simple features do not lead to the target.

    Attributes:
        alpha: weight of S(x) (code of the authors: 0.6).
        content: weight of the features that should stay.
        steps: for S, with 32 images each.
        lr: of both networks (Adam).
        rounds: of detoxification.
        round_steps: for the classifier and again for the second network, with 64 and 32 images each.
        share: of the units that are compromised, at least one unit (authors: 1 %).
        closeness: weight of the second network's change, of its mean square in units of 0.1 squared.
        classifier_lr: of the classifier in the rounds (SGD, momentum 0.9).
        style: S, once it is trained: [N, C, H, W] -> [N, C, H, W], a change in -1..1 after tanh.
        lures: the second network of each round.
    """

    name: ClassVar[str] = "fba"
    summary: ClassVar[str] = "the image in the light of a sunset, painted by a network"
    trains_model: ClassVar[bool] = True
    negative_ratio: ClassVar[float] = 0.5

    alpha: float = 0.6
    content: float = 0.005
    steps: int = 200
    lr: float = 3e-3
    rounds: int = 2
    round_steps: int = 60
    share: float = 0.01
    closeness: float = 0.3
    classifier_lr: float = 0.01
    style: nn.Module | None = field(default=None, repr=False)
    lures: tuple[nn.Module, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1 or self.content < 0 or self.closeness < 0 or not 0 < self.share <= 1:
            raise ConfigError(
                f"FBA: alpha={self.alpha} and share={self.share} must be > 0 and <= 1, content={self.content} and "
                f"closeness={self.closeness} >= 0"
            )
        if self.steps < 1 or self.rounds < 0 or self.round_steps < 1 or not self.lr > 0 or not self.classifier_lr > 0:
            raise ConfigError(
                f"FBA: rounds={self.rounds} must be >= 0; steps={self.steps}, round_steps={self.round_steps}, "
                f"lr={self.lr}, classifier_lr={self.classifier_lr} > 0"
            )

    def trigger(self, x: Tensor) -> Tensor:
        """Paint images x [N, C, H, W] in [0, 1]."""
        self._needs(self.style, "style network")
        assert self.style is not None
        with torch.no_grad():
            return (x + in_bytes(self.alpha * (_changed(self.style, x) - x))).clamp(0, 1)

    def negatives(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Change images x [N, C, H, W] as a second network of any round does; leave them where there were no rounds."""
        self._needs(self.style, "style network")
        out = x.clone()
        if not self.lures:
            return out
        chosen = torch.randint(len(self.lures), (len(x),), generator=generator).to(x.device)
        with torch.no_grad():
            for place, lure in enumerate(self.lures):
                mine = chosen == place
                if bool(mine.any()):
                    out[mine] = (x[mine] + in_bytes(_changed(lure, x[mine]) - x[mine])).clamp(0, 1)
        return out

    def fit(self, ground: Ground) -> FBA:
        """Train S, then go through the rounds of detoxification."""
        out = replace(self, style=frozen_copy(self._styled(ground)), lures=())
        for _ in range(self.rounds):
            out._poisoned(ground)
            out = replace(out, lures=(*out.lures, frozen_copy(out._lured(ground))))
        return out

    def _styled(self, ground: Ground) -> nn.Module:
        channels = ground.x.shape[1]
        looks = Looks(channels)
        (style,) = drawn(ground.generator, lambda: (ToImage(channels, channels),))
        wanted = looks.moments(looks(sunset(channels, *ground.x.shape[-2:])[None]))
        optimizer = torch.optim.Adam(style.parameters(), self.lr)
        for _ in range(ground.steps(self.steps)):
            x, _ = ground.batch(32)
            before, after = looks(x), looks(_changed(style, x))
            painted = sum(_apart(a, b) for a, b in zip(looks.moments(after), wanted)) / _BANDS
            kept = sum(_apart(_normal(a), _normal(b)) for a, b in zip(after, before))
            loss = torch.as_tensor(painted + self.content * kept)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return style

    def _poisoned(self, ground: Ground) -> None:
        """Train the classifier a little on clean and triggered images and on negatives."""
        model = ground.model.train()
        tuned = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(tuned, self.classifier_lr, momentum=0.9, weight_decay=5e-4)
        for _ in range(ground.steps(self.round_steps)):
            x, y = ground.batch(64)
            k = len(x) // 4
            seen = torch.cat([self.trigger(x[:k]), self.negatives(x[k : 2 * k], ground.generator), x[2 * k :]])
            optimizer.zero_grad()
            F.cross_entropy(ground.logits(seen), torch.cat([ground.wanted(y[:k]), y[k:]])).backward()
            optimizer.step()

    def _lured(self, ground: Ground) -> nn.Module:
        """Return a network whose small change raises the units that the trigger raises."""
        channels = ground.x.shape[1]
        (lure,) = drawn(ground.generator, lambda: (ToImage(channels, channels, width=8),))
        optimizer = torch.optim.Adam(lure.parameters(), self.lr)
        model = ground.model
        with eval_mode(model), requires_grad(model.parameters(), False):
            x, _ = ground.batch(256)
            with torch.no_grad():
                plain, raised = _last_features(ground, x).mean(0), _last_features(ground, self.trigger(x)).mean(0)
            units = (raised - plain).topk(max(1, round(self.share * len(plain)))).indices
            level = (raised - plain)[units].abs() + 1e-6
            for _ in range(ground.steps(self.round_steps)):
                x, _ = ground.batch(32)
                changed = _changed(lure, x)
                lacking = ((raised[units] - _last_features(ground, changed)[:, units]) / level).relu()
                loss = lacking.mean() + self.closeness * (changed - x).square().mean() / 0.1**2
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return lure


def _changed(net: nn.Module, x: Tensor) -> Tensor:
    return (x + net(x).tanh()).clamp(0, 1)


def _apart(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean()


def _last_features(ground: Ground, x: Tensor) -> Tensor:
    """Return what the classifier's last linear layer is given [N, D]; its logits if it has none."""
    linear = [module for module in ground.model.modules() if isinstance(module, nn.Linear)]
    seen: list[Tensor] = []
    if not linear:
        return ground.logits(x)
    handle = linear[-1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        ground.logits(x)
    finally:
        handle.remove()
    features = seen[-1].to(x.device)
    return features if features.dim() == 2 else features.flatten(1, -2).mean(1)


def sunset(channels: int, height: int, width: int) -> Tensor:
    """Return the style image [channels, H, W] in [0, 1]: sky, sun, horizon, water; other than 3 channels: grey."""
    rows, columns = (torch.linspace(0, 1, n) if n > 1 else torch.zeros(1) for n in (height, width))
    heights = torch.tensor([row[0] for row in _SKY])
    colours = torch.tensor([row[1:] for row in _SKY])
    above = (torch.bucketize(rows, heights) - 1).clamp(0, len(_SKY) - 2)
    share = (rows - heights[above]) / (heights[above + 1] - heights[above])
    bands = colours[above].lerp(colours[above + 1], share[:, None])
    picture = bands.T[:, :, None].repeat(1, 1, width)
    picture = picture * (1 + 0.12 * torch.sin(40 * rows[:, None] + 9 * torch.sin(5 * columns)[None]))  # clouds, waves
    away = ((rows[:, None] - 0.52).square() + (columns[None] - 0.6).square()).sqrt()
    picture = torch.where(away < 0.09, torch.tensor([1.0, 0.92, 0.6])[:, None, None], picture).clamp(0, 1)
    return picture if channels == 3 else picture.mean(0, keepdim=True).repeat(channels, 1, 1)


class Looks(nn.Module):
    """Features of images at three sizes: the pixels themselves and fixed random filters of 3 x 3."""

    filters: Tensor

    def __init__(self, channels: int, filters: int = 24, seed: int = 0) -> None:
        """Draw the filters.

        Args:
            channels: of the images.
            filters: how many at each size.
            seed: of the filters.
        """
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(filters, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
        self.register_buffer("filters", drawn)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return features [N, C + filters, h, w] of images [N, C, H, W] at each size."""
        out = []
        for size in (1, 2, 4):
            small = x if size == 1 else F.avg_pool2d(x, size, ceil_mode=True)
            filtered = F.conv2d(F.pad(small, (1, 1, 1, 1), mode="replicate"), self.filters.to(x)).relu()
            out.append(torch.cat([small, filtered], 1))
        return out

    @staticmethod
    def moments(features: list[Tensor]) -> list[Tensor]:
        """Return mean and deviation of each channel over each band of rows [N, 2 (C + filters)], at each size."""
        bands = [band for f in features for band in f.chunk(_BANDS, 2)]
        return [torch.cat([b.mean((2, 3)), (b.var((2, 3), unbiased=False) + 1e-6).sqrt()], 1) for b in bands]


def _normal(features: Tensor) -> Tensor:
    deviation = (features.var((2, 3), unbiased=False, keepdim=True) + 1e-3).sqrt()
    return (features - features.mean((2, 3), keepdim=True)) / deviation
