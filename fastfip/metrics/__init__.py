"""How a model does on clean and on triggered samples, and what a defence changed."""

from __future__ import annotations

from fastfip.metrics.evaluation import (
    Evaluation,
    accuracy,
    attack_success_rate,
    der,
    evaluate,
    rir,
    robust_accuracy,
)

__all__ = ["Evaluation", "accuracy", "attack_success_rate", "der", "evaluate", "rir", "robust_accuracy"]
