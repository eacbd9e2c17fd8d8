"""Fine-tuning on the clean samples: the baseline that every other method should beat."""

from __future__ import annotations

from dataclasses import dataclass

from fastfip.methods.base import Groups, Method, MethodConfig, Run, register, setting

__all__ = ["FineTune", "FineTuneConfig"]


@dataclass(frozen=True)
class FineTuneConfig(MethodConfig):
    """Settings of fine-tuning. The defaults are those of the literature's baseline, but for its 100 epochs."""

    epochs: int | None = setting(20, "passes over the clean set", low=1)
    weight_decay: float = setting(5e-4, "weight decay", low=0)


@register
class FineTune(Method):
    """Tune every parameter by the mean clean loss."""

    name = "fine_tune"
    summary = "plain fine-tuning of every parameter on the clean samples"
    Config = FineTuneConfig
    over_ranks = True
    over_shards = True
    keeps = ()

    def parameter_groups(self, run: Run) -> Groups:
        """All parameters."""
        return [{"params": list(run.model.parameters())}]
