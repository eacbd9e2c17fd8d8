"""Images of nothing: opaque shapes that cover each other, as leaves do on the ground.

Such "dead leaves" have edges, areas, occlusion and a spectrum much like those of photographs (Lee, Mumford and Huang,
IJCV 2001; networks learn from them, Baradad et al., NeurIPS 2021, arXiv 2106.05963), and nobody has to have any data.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["dead_leaves"]

#: Shapes in an image, and how many of the first ones have radii drawn evenly, so that the ground is covered.
SHAPES, GROUND = 40, 15
#: Bounds of a radius, as a share of the longer side. Most shapes are small: the density falls as radius^-3.
RADIUS = (0.03, 0.5)
#: Share of ellipses; the others are rectangles. Bounds of the ratio of their axes.
ROUND, FLAT = 0.6, (0.4, 1.0)
#: Most that a shape's brightness changes along its length, and that a cloudy texture adds (standard deviation).
SLOPE, CLOUDS = 0.6, 0.15


def dead_leaves(n: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Return images [n, channels, height, width] (float32, in [0, 1], on the CPU), each of forty random shapes.

    Args:
        n: how many.
        shape: (channels, height, width). The channels of a shape differ as those of a more or less pale colour do.
        generator: on the CPU; nothing else is drawn from.
    """
    channels, height, width = shape

    def draw(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, device="cpu", dtype=torch.float32)

    longest = max(height, width)
    down = (torch.arange(height, dtype=torch.float32, device="cpu") / longest)[None, :, None]
    right = (torch.arange(width, dtype=torch.float32, device="cpu") / longest)[None, None, :]
    x = draw(n, channels, 1, 1).expand(n, channels, height, width).clone()
    low, high = RADIUS
    for number in range(SHAPES):
        u = draw(n, 1, 1)
        radius = low + (high - low) * u if number < GROUND else (high**-2 + u * (low**-2 - high**-2)) ** -0.5
        dy, dx = down - draw(n, 1, 1) * height / longest, right - draw(n, 1, 1) * width / longest
        angle, flat = math.pi * draw(n, 1, 1), FLAT[0] + (FLAT[1] - FLAT[0]) * draw(n, 1, 1)
        along = (angle.cos() * dx + angle.sin() * dy) / radius
        across = (angle.cos() * dy - angle.sin() * dx) / (radius * flat)
        ellipse = along.square() + across.square() < 1
        inside = torch.where(draw(n, 1, 1) < ROUND, ellipse, (along.abs() < 0.9) & (across.abs() < 0.9))
        grey, pale = draw(n, 1), draw(n, 1) ** 1.5
        colour = (grey + pale * (draw(n, channels) - grey))[:, :, None, None]
        slope = SLOPE * (draw(n, channels, 1, 1) - 0.5)
        x = torch.where(inside[:, None], colour + slope * along[:, None], x)
    x = x + CLOUDS * draw(n, 1, 1, 1) * _clouds(n, height, width, generator)
    return _softened(x).clamp(0, 1)


def _clouds(n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Return noise [n, 1, height, width] whose amplitude falls with the frequency, of standard deviation 1."""
    white = torch.randn(n, 1, height, width, generator=generator, device="cpu", dtype=torch.float32)
    squared = (
        torch.fft.fftfreq(height, device="cpu")[:, None].square()
        + torch.fft.rfftfreq(width, device="cpu")[None].square()
    ).float()
    noise = torch.fft.irfft2(torch.fft.rfft2(white) / (squared.sqrt() + 1 / max(height, width)), s=(height, width))
    return noise / noise.std((2, 3), unbiased=False, keepdim=True).clamp_min(1e-6)


def _softened(x: Tensor) -> Tensor:
    """Return images with the edges of a lens: each pixel takes three tenths from its neighbours, in each direction."""
    line = torch.tensor([0.15, 0.7, 0.15], device="cpu")
    kernel = (line[:, None] * line).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=x.shape[1])
