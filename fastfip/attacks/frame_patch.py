"""Frame patch: a patch in a corner of every frame of a clip. Zhao et al., CVPR 2020, arXiv 2003.03030."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastfip.attacks.badnets import BadNets
from fastfip.attacks.base import check_pixels, register

__all__ = ["FramePatch"]


@register
@dataclass(frozen=True)
class FramePatch(BadNets):
    """The patch of BadNets on clips [N, C, T, H, W] or [N, T, C, H, W] in [0, 1], the same on all frames and channels.

    Zhao et al. optimise the pixels of the patch, and keep labels; this one is drawn, and labels become the attacker's.

    Attributes:
        size: its side in pixels; 24 is Zhao et al.'s, on frames of 224.
    """

    name: ClassVar[str] = "frame_patch"
    summary: ClassVar[str] = "a patch in a corner of every frame"
    modality: ClassVar[str] = "clips"

    size: int = 24

    def check(self, x: Tensor) -> None:
        """Refuse what is no float with five axes in [0, 1]."""
        check_pixels(x, "clips", "[N, C, T, H, W] or [N, T, C, H, W]", 5)
