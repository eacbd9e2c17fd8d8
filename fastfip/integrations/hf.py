"""For transformers' Trainer (extra `hf`): a callback that purifies, and a Trainer with the Fisher penalty.

trainer = fastfip.hf.FIPTrainer(model, args, train_dataset=clean, eta_f=1e-3, eta_r=5.0)
fastfip.hf.PurifyCallback().attach(trainer)
trainer.train()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfip.data.batch import Batch
from fastfip.errors import ConfigError, DataError
from fastfip.fisher import FisherDiagonal, FisherPenalty, QuadraticPenalty, eval_mode, fisher_diagonal
from fastfip.integrations.holding import figures, plain_forward, purify_held
from fastfip.methods import Method
from fastfip.purification.result import PurifyResult

try:
    from transformers import Trainer as _Trainer
    from transformers import TrainerCallback as _TrainerCallback
except ImportError as missing:
    raise ImportError(f"fastfip.hf needs transformers: pip install fastfip[hf] ({missing})") from missing

__all__ = ["FIPTrainer", "PurifyCallback", "next_token_loss"]


class PurifyCallback(_TrainerCallback):
    """Purify the model of a Trainer when training ends.

        trainer = transformers.Trainer(model, args, train_dataset=suspect, eval_dataset=clean)
        fastfip.hf.PurifyCallback().attach(trainer)
        trainer.train()                                 # ends with a purified model
        trainer.save_model("purified")

    It runs where the Trainer has put the model, in its precision, and on all its processes, which end with the same
    weights. Training flags, `requires_grad` and gradients are as before. Checkpoints that the Trainer wrote during the
    training hold the model as it was before.

    Attributes:
        result: the last purification, None before the first.
    """

    def __init__(
        self,
        clean: Any = None,
        method: str | type[Method] = "auto",
        *,
        at_end: bool = True,
        prefix: str = "purify",
        **options: Any,
    ) -> None:
        """Say what is purified with what.

        Args:
            clean: clean samples, see `fastfip.purify`; with `attach` also a data set of Hugging Face's `datasets`,
                which goes through the Trainer's collator. None: the Trainer's evaluation set.
            method: its name, or a class.
            at_end: purify at the end of `train`; False: only when `run` is called.
            prefix: of the names of logged figures: `PREFIX/acc_before`, `PREFIX/acc_after`, `PREFIX/loss_after` ...
            **options: of `fastfip.purify`: `steps`, `seed`, `test_loader`, `asr_loader`, `lr` and so on. `amp` is that
                of the Trainer unless it is given.

        Raises:
            ConfigError: `inplace` is given: the Trainer's model is always purified itself.
        """
        if "inplace" in options:
            raise ConfigError("inplace: leave it out, the callback purifies the model that the Trainer holds")
        self.clean, self.method, self.at_end, self.prefix, self.options = clean, method, at_end, prefix, options
        self.trainer: Any = None
        self.result: PurifyResult | None = None

    def attach(self, trainer: Any) -> PurifyCallback:
        """Add the callback to a Trainer, whose collator, evaluation set and log it then uses."""
        self.trainer = trainer
        trainer.add_callback(self)
        return self

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Purify, if that is wanted now."""
        if self.at_end:
            self.run(args, state, kwargs["model"], kwargs.get("eval_dataloader"))

    def run(self, args: Any, state: Any, model: nn.Module, eval_dataloader: Any = None) -> PurifyResult:
        """Purify now, and log before and after.

        Args:
            args: the Trainer's arguments, which have its precision.
            state: the Trainer's state, in whose history the figures go if no Trainer is attached.
            model: the model, without the Trainer's wrappers.
            eval_dataloader: clean samples, where none were given and no Trainer is attached.

        Returns:
            the result; its model is `model` itself.

        Raises:
            ConfigError: `group` is given for a model that is sharded.
            DataError: there are no clean samples.
        """
        options = {"amp": "bf16" if args.bf16 else "fp16" if args.fp16 else False, **self.options}
        copy = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.result = purify_held(model, self._clean(eval_dataloader), self.method, options, copy)
        said = figures(self.result, self.prefix)
        if self.trainer is not None:
            self.trainer.log(said)
        else:
            state.log_history.append({**said, "step": state.global_step})
        return self.result

    def _clean(self, eval_dataloader: Any) -> Any:
        trainer, clean = self.trainer, self.clean
        if trainer is not None and (clean is None or _is_dataset(clean)):
            if clean is None and not _is_dataset(trainer.eval_dataset):
                raise DataError("the Trainer has not one evaluation set to purify with: pass clean=")
            return _in_order(trainer, trainer.eval_dataset if clean is None else clean)
        if clean is None and eval_dataloader is None:
            raise DataError("there are no clean samples: pass clean=, or attach the callback to a Trainer")
        return eval_dataloader if clean is None else clean


def _is_dataset(data: Any) -> bool:
    """Whether it has samples by number, as torch's and Hugging Face's data sets have, and is no loader or batch."""
    sized = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return sized and not isinstance(data, (Mapping, list, tuple, str, Tensor))


def _in_order(trainer: Any, dataset: Any) -> torch.utils.data.DataLoader[Any]:
    """Return a plain loader of all of a data set, with the Trainer's collator and without columns it does not want.

    Every process reads all of it: nothing is split.
    """
    made = trainer.get_test_dataloader(dataset)
    return torch.utils.data.DataLoader(made.dataset, trainer.args.eval_batch_size, collate_fn=made.collate_fn)


class FIPTrainer(_Trainer):
    """transformers' Trainer with the terms of FIP (arXiv 2409.00863, CCS 2024) in its loss.

        L(theta) + eta_f * Tr F(theta) + (eta_r / 2) * sum_i F_ii (theta_i - theta_i^0)^2

    L is the Trainer's own loss, Tr F the trace of the empirical Fisher information of the batch (FisherPenalty), and
    F_ii a Fisher diagonal at the weights theta^0. On clean samples the trace leads a backdoored model to a smoother
    minimum and the last term keeps what it has learned; with `eta_f=0` and the diagonal of an earlier task it is
    elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796).

    Both terms are mean values of the batch, also where gradients are accumulated or averaged over processes. They are
    added in training alone: the evaluation loss stays the model's. They are logged beside it, as `fisher_trace` and
    `retainer` (without their weights).

    Attributes:
        fisher: the term of the trace, a `FisherPenalty`. anchor: the other one, a `QuadraticPenalty`; None before the
            first step where it is not given.
    """

    def __init__(
        self,
        *args: Any,
        eta_f: float = 1e-3,
        eta_r: float = 0.0,
        anchor: FisherDiagonal | QuadraticPenalty | None = None,
        trace_every: int = 1,
        trace_way: Literal["auto", "exact", "perturb", "signs"] = "auto",
        per_sample_loss: Callable[[Tensor, Batch], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Make the Trainer.

        Args:
            *args: of transformers.Trainer.
            eta_f: weight of the Fisher trace (the paper's eta_F); 0: without.
            eta_r: weight of the retainer (the paper's eta_r), the anchor on the diagonal; 0: without.
            anchor: the diagonal F_ii, whose theta^0 are then the weights at the first step, or
                `diagonal.penalty(model)` of an earlier moment. None: the diagonal of the training set at the first
                step.
            trace_every: the trace is added every so many batches.
            trace_way: how its gradient is found, see `fastfip.FisherPenalty`.
            per_sample_loss: `loss(logits, batch) -> [N]`, the -log p of each sample in the Fisher; None: cross-entropy
                of class labels [N]. `next_token_loss` is that of a causal language model.
            **kwargs: of transformers.Trainer.

        Raises:
            ConfigError: a weight below 0, or `trace_every` below 1.
        """
        for name, value in (("eta_f", eta_f), ("eta_r", eta_r)):
            if not value >= 0:
                raise ConfigError(f"{name}={value}: must be at least 0")
        if trace_every < 1:
            raise ConfigError(f"trace_every={trace_every}: must be at least 1")
        super().__init__(*args, **kwargs)
        self.eta_f, self.eta_r, self.trace_every, self.per_sample_loss = eta_f, eta_r, trace_every, per_sample_loss
        self.fisher = FisherPenalty(self.model, trace_way, loss=per_sample_loss)
        self.anchor = anchor if isinstance(anchor, QuadraticPenalty) else None
        self._diagonal = anchor if isinstance(anchor, FisherDiagonal) else None
        self._batches = 0
        self._terms: dict[str, list[Tensor]] = {}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the Trainer's loss with the terms; in evaluation without them."""
        batch = dict(inputs)
        given = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            return given
        loss = given[0] if return_outputs else given
        loss = loss + self._weighted_terms(batch) / self._accumulated(num_items_in_batch)
        return (loss, given[1]) if return_outputs else loss

    def fisher_diagonal(self, dataset: Any = None) -> FisherDiagonal:
        """Return the Fisher diagonal of the present weights on a data set (None: the training set), in eval mode."""
        dataset = self.train_dataset if dataset is None else dataset
        if not _is_dataset(dataset):
            raise DataError("the Fisher diagonal needs a data set with samples by number: pass one, or anchor=")
        model = self._inner()
        with plain_forward(model), eval_mode(model):
            return fisher_diagonal(model, _in_order(self, dataset), loss=self.per_sample_loss)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the means of the terms since the last time beside the training loss."""
        if "loss" in logs:
            for name, values in self._terms.items():
                logs[name] = float(torch.stack(values).mean())
            self._terms = {}
        super().log(logs, *args, **kwargs)

    def _inner(self) -> nn.Module:
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    def _weighted_terms(self, batch: Batch) -> Tensor:
        total = torch.zeros((), device=self.args.device)
        self._batches += 1
        if self.eta_f and (self._batches - 1) % self.trace_every == 0:
            with plain_forward(self._inner()):
                trace = self.fisher(batch)
            total = total + self.eta_f * self._noted("fisher_trace", trace)
        if self.eta_r:
            total = total + self.eta_r * self._noted("retainer", self._retainer()())
        return total

    def _retainer(self) -> QuadraticPenalty:
        if self.anchor is None:
            diagonal = self.fisher_diagonal() if self._diagonal is None else self._diagonal
            self.anchor = diagonal.penalty(self._inner())
        return self.anchor

    def _noted(self, name: str, value: Tensor) -> Tensor:
        self._terms.setdefault(name, []).append(value.detach().float().cpu())
        return value

    def _accumulated(self, items: Any) -> int:
        """Return what a mean of the batch is divided by here, where the Trainer will not divide the loss itself."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = (self.model_accepts_loss_kwargs and items is not None) or self.compute_loss_func is not None
        return int(self.current_gradient_accumulation_steps) if scaled else 1


def next_token_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Return the mean loss of each sequence's next tokens, [N]: the `per_sample_loss` of a causal language model.

    Args:
        logits: [N, T, V].
        batch: a dict whose "labels" are [N, T] int64, as transformers wants them: the tokens themselves, -100 where
            none is asked for.
    """
    labels = batch["labels"][:, 1:].to(logits.device)
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return losses.sum(1) / (labels != -100).sum(1).clamp_min(1)
