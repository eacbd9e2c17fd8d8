"""Defaults of `fisher_steps` for models that cannot learn again what its usual steps destroy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastfip.methods.run import Run

__all__ = ["FOUND_RADIUS", "SPARSE", "for_clouds", "for_found", "for_sparse", "for_texts"]

#: With fewer clean samples a class nothing is destroyed, as it cannot be learned again: so long and so many are steps.
SPARSE, SPARSE_LENGTH, SPARSE_STEPS = 3, 0.1, 75
#: Where one of very many classes is reached within this radius, it is unlearned with this weight by steps of this
#: length, and images are seen as they are: those changed at random answer the target, and their part in the Fisher
#: would shorten the very steps that unlearn it. The last number is how far back: classes without a sample lose most.
FOUND_RADIUS, FOUND_WEIGHT, FOUND_LENGTH, FOUND_BACK = 0.2, 2.0, 0.15, 0.3
#: Where inputs are point clouds: how far the weights go back, and the weight of the divergence from the received
#: answers at moved clouds. More of either saves accuracy, and brings some backdoors back.
CLOUD_BACK, CLOUD_HOLD = 0.3, 1.0
#: Points of the clouds that go through the model together on a CPU, and the fewest clouds: the activations of a batch
#: of clouds are so much larger than the clouds that memory is taken from the system, and given back, in every pass.
CLOUD_POINTS, FEWEST_CLOUDS = 2048, 4
#: Where words are unlearned: steps, samples a step, and how far back, which returns accuracy long before the backdoor.
TEXT_STEPS, TEXT_BATCH, TEXT_BACK = 75, 32, 0.5
#: Where the received answers are held as well, phrases are unlearned and words are exchanged at random almost to the
#: end, and nothing goes back: that is where a sentence returns.
HELD_UNTIL, HELD_BACK = 0.95, 0.0


def for_sparse(run: Run) -> None:
    """Take the settings for fewer than `SPARSE` clean samples a class."""
    _take(run, length=SPARSE_LENGTH, steps=SPARSE_STEPS, bn_mode="eval")


def for_found(run: Run, usual_length: bool) -> None:
    """Take the settings for so few, where one of very many classes is reached all the same.

    Args:
        run: after `for_sparse`.
        usual_length: the length was the default before that.
    """
    _take(run, weight=FOUND_WEIGHT, back=FOUND_BACK)
    if usual_length and "length" not in run.chosen:
        run.config = run.config.replace(length=FOUND_LENGTH)


def for_clouds(run: Run, points: int) -> None:
    """Take the settings for point clouds of so many points; on a CPU they go through the model in parts."""
    _take(run, bn_mode="eval", back=CLOUD_BACK, hold=CLOUD_HOLD)
    if run.micro_batch is None and run.ranks is None and run.device.type == "cpu" and run.config.bn_mode != "train":
        run.micro_batch = max(FEWEST_CLOUDS, CLOUD_POINTS // points)
        run.task = replace(run.task, most=run.micro_batch)


def for_texts(run: Run, held: bool) -> None:
    """Take the settings for token ids whose words are unlearned, with the received answers held or not."""
    _take(run, steps=TEXT_STEPS, batch_size=TEXT_BATCH, back=HELD_BACK if held else TEXT_BACK)
    if held:
        _take(run, unlearn=HELD_UNTIL, changes=HELD_UNTIL)


def _take(run: Run, **less: Any) -> None:
    """Change the settings that the user has not given, and that are the defaults."""
    usual = type(run.config)()
    free = (name for name in less if name not in run.chosen and getattr(run.config, name) == getattr(usual, name))
    run.config = run.config.replace(**{name: less[name] for name in free})
