"""`purify` without data: images that stand in for clean samples, and settings that suit them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastfip.data.stand_ins import input_shape_of, norms_of, stand_in_images
from fastfip.data.task import Forward
from fastfip.errors import DataError
from fastfip.nets.checks import check_net
from fastfip.nets.state import as_written

__all__ = ["DRAWN", "NO_DATA", "without_data"]

#: What `method="auto"` takes: as good as `fisher_steps` on drawn images, at hardly any accuracy (docs/purification.md).
NO_DATA = "clp"
#: Images that are drawn for it, which only tell that the model runs.
ENOUGH_TO_RUN = 64

#: Settings of `fisher_steps` on drawn images. Two thirds of the steps: on such images each costs accuracy. And the
#: weights do not go back: the backdoor returned with them (docs/purification.md).
DRAWN: dict[str, Any] = {"steps": 100, "back": 0.0}

#: What the result says before all else.
SAID = (
    "WITHOUT DATA, {n} drawn images {shape} stand for clean samples, the received model's answers for labels: the "
    "backdoor may be left, and the accuracy on these images says nothing (measure it with test_loader=)"
)


def without_data(
    model: nn.Module, input_shape: tuple[int, int, int] | None, forward: Forward | None, seed: int, method: object
) -> tuple[tuple[Tensor, Tensor], tuple[str, ...]]:
    """Return drawn images x [N, channels, height, width] with answers y [N], and what the result should say of them.

    Args:
        model: the received one; left as it is.
        input_shape: (channels, height, width); None: it is found out.
        forward: the user's hook.
        seed: of the images.
        method: that gets them: a few are enough for the one that looks at weights alone.

    Raises:
        DataError: the model has no BatchNorm, so that clean samples are needed.
        ModelError: no labels can be read off what it returns.
        ConfigError: the shape of its inputs is not known, or wrong.
    """
    check_net(model)
    if not norms_of(model):
        raise DataError(
            "there is no BatchNorm to tell what this model's inputs are like, so purify needs clean samples: give "
            "clean_loader=, a DataLoader, a Dataset, tensors (x, y), or images alone, without labels; a few for each "
            "class are enough"
        )
    with torch.inference_mode(False), as_written(model):
        shape = input_shape_of(model) if input_shape is None else input_shape
        samples = {"samples": ENOUGH_TO_RUN} if method == NO_DATA else {}
        x, y = stand_in_images(model, shape, seed=seed, forward=forward, **samples)
    return (x, y), (SAID.format(n=len(y), shape="x".join(str(v) for v in x.shape[1:])),)
