"""Make a backdoored network of handwritten digits and a few clean images: what the README's examples purify.

python examples/backdoored_digits.py

writes `backdoored.safetensors` and `digits.npz` into the working folder. The 1,797 images of 8x8 pixels are those of
scikit-learn, enlarged to 16x16; a tenth of the training images carries a white square of 2x2 pixels and the label 0.
"""

from __future__ import annotations

import numpy as np
import torch

import fastfip
from fastfip.attacks.badnets import BadNets
from fastfip.cli.demonstration import CLEAN, digit_net, digits, train_backdoored

__all__ = ["digit_net"]


def main(seed: int = 0) -> None:
    """Train the network on images with the trigger; keep 70 clean images, and 397 to test with."""
    x, y, test_x, test_y = digits(seed)
    model = train_backdoored(x, y, BadNets(size=2), seed)
    fastfip.save_checkpoint(model, "backdoored.safetensors")
    kept = {"clean_x": x[:CLEAN], "clean_y": y[:CLEAN], "test_x": test_x, "test_y": test_y}
    pixels = {name: (255 * t).round().to(torch.uint8) if name.endswith("x") else t for name, t in kept.items()}
    np.savez("digits.npz", **{name: t.numpy() for name, t in pixels.items()})


if __name__ == "__main__":
    main()
