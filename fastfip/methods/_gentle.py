"""Defaults of `fisher_steps` for models that cannot learn again what its usual steps destroy."""

from __future__ import annotations

from typing import Any, TypeVar

from fastfip.methods.config import MethodConfig

__all__ = ["FOUND_RADIUS", "SPARSE", "for_clouds", "for_found", "for_sparse", "for_texts"]

C = TypeVar("C", bound=MethodConfig)

#: With fewer clean samples a class nothing is destroyed, as it cannot be learned again: so long and so many are steps.
SPARSE, SPARSE_LENGTH, SPARSE_STEPS = 3, 0.1, 75
#: Where one of very many classes is reached within this radius, it is unlearned with this weight by steps of this
#: length, and images are seen as they are: those changed at random answer the target, and their part in the Fisher
#: would shorten the very steps that unlearn it.
FOUND_RADIUS, FOUND_WEIGHT, FOUND_LENGTH = 0.2, 2.0, 0.15
#: How far the weights go back where inputs are point clouds: on a PointNet accuracy returned, and no backdoor did.
CLOUD_BACK = 0.5
#: Where words are unlearned: steps, samples a step, and how far back, which returns accuracy long before the backdoor.
TEXT_STEPS, TEXT_BATCH, TEXT_BACK = 75, 32, 0.5


def for_sparse(config: C) -> C:
    """Return the settings for fewer than `SPARSE` clean samples a class."""
    return _in_place_of_defaults(config, length=SPARSE_LENGTH, steps=SPARSE_STEPS, bn_mode="eval")


def for_found(config: C, usual_length: bool) -> C:
    """Return the settings for so few, where one of very many classes is reached all the same.

    Args:
        config: after `for_sparse`.
        usual_length: the length was the default before that.
    """
    config = _in_place_of_defaults(config, weight=FOUND_WEIGHT)
    return config.replace(length=FOUND_LENGTH) if usual_length else config


def for_clouds(config: C) -> C:
    """Return the settings for point clouds."""
    return _in_place_of_defaults(config, bn_mode="eval", back=CLOUD_BACK)


def for_texts(config: C) -> C:
    """Return the settings for token ids whose words are unlearned."""
    return _in_place_of_defaults(config, steps=TEXT_STEPS, batch_size=TEXT_BATCH, back=TEXT_BACK)


def _in_place_of_defaults(config: C, **less: Any) -> C:
    usual = type(config)()
    return config.replace(**{k: v for k, v in less.items() if getattr(config, k) == getattr(usual, k)})
