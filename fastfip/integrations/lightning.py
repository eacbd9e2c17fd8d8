"""A callback for Lightning that purifies the trained model: `fastfip.lightning.Purify` (extra `lightning`)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fastfip.data.batch import Batch
from fastfip.errors import ConfigError, DataError, ModelError
from fastfip.integrations.holding import figures, purify_held
from fastfip.methods import Method
from fastfip.purification.result import PurifyResult

try:
    from lightning.pytorch.callbacks import Callback as _LightningCallback
except ImportError as missing:
    try:  # the same package under its older name
        from pytorch_lightning.callbacks import Callback as _LightningCallback
    except ImportError:
        raise ImportError("fastfip.lightning needs Lightning: pip install fastfip[lightning]") from missing

__all__ = ["Purify"]

#: Strategies of which each process has a part of the weights.
_SHARDED = ("FSDP", "DeepSpeed", "ModelParallel")
_AMP = {"16-mixed": "fp16", "bf16-mixed": "bf16"}
_TRANSFERS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class Purify(_LightningCallback):
    """Purify a LightningModule, or a module in it, when training ends.

        trainer = lightning.Trainer(callbacks=[fastfip.lightning.Purify()])
        trainer.fit(module, datamodule=data)            # ends with a purified module

    The purification runs where the trainer has put the model, in its precision, and on all its processes, which end
    with the same weights. Training flags, `requires_grad` and gradients are as before. Before and after go to the
    trainer's loggers. Checkpoints that were written during the training hold the model as it was before: `save_to`
    writes one with the purified weights, and so does `trainer.save_checkpoint`.

    Attributes:
        result: the last purification, None before the first.
    """

    def __init__(
        self,
        clean: Iterable[Batch] | str | Callable[[], Any] | None = None,
        method: str | type[Method] = "auto",
        *,
        submodule: str | None = None,
        at_end: bool = True,
        save_to: str | os.PathLike[str] | None = None,
        prefix: str = "purify",
        **options: Any,
    ) -> None:
        """Say what is purified with what.

        Args:
            clean: clean samples, see `fastfip.purify`; or a function that returns them; or the name of a method of the
                data module (or the module) that does, e.g. "clean_dataloader". None: the validation data of the
                trainer, else of its data module.
            method: its name, or a class.
            submodule: name of the module that is purified, e.g. "net" for `module.net`; None: the LightningModule
                itself, whose `forward` has to return the logits.
            at_end: purify at the end of `fit`; False: only when `run` is called.
            save_to: path of a Lightning checkpoint that is written after the purification.
            prefix: of the names of logged figures: `PREFIX/acc_before`, `PREFIX/acc_after`, `PREFIX/loss_after` ...
            **options: of `fastfip.purify`: `steps`, `seed`, `test_loader`, `asr_loader`, `lr` and so on. `amp` is that
                of the trainer unless it is given.

        Raises:
            ConfigError: `inplace` is given: the trainer's module is always purified itself.
        """
        super().__init__()
        if "inplace" in options:
            raise ConfigError("inplace: leave it out, the callback purifies the module that the trainer holds")
        self.clean, self.method, self.submodule = clean, method, submodule
        self.at_end, self.save_to, self.prefix, self.options = at_end, save_to, prefix, options
        self.result: PurifyResult | None = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Purify: the model is still on its device, and the loggers are still open."""
        if self.at_end:
            self.run(trainer, pl_module)

    def run(self, trainer: Any, pl_module: Any) -> PurifyResult:
        """Purify now, log before and after, and write the checkpoint if one is wanted.

        Args:
            trainer: the trainer that has trained the module.
            pl_module: the module.

        Returns:
            the result; its model is the module (or the submodule) itself.

        Raises:
            ModelError: there is no such submodule, or the strategy spreads the weights over processes.
            ConfigError: `group` is given for a model that is sharded.
            DataError: there are no clean samples.
        """
        strategy = type(trainer.strategy).__name__
        if strategy.startswith(_SHARDED):
            raise ModelError(
                f"{strategy} gives each process a part of the weights: save one whole checkpoint and purify that"
            )
        model = self._target(pl_module)
        options = {"amp": _AMP.get(str(trainer.precision), False), **self.options}
        copy = isinstance(trainer.model, nn.parallel.DistributedDataParallel)
        with _validating(trainer):
            clean = self._clean(trainer, pl_module)
            self.result = purify_held(model, clean, self.method, options, copy)
        for logger in trainer.loggers:
            logger.log_metrics(figures(self.result, self.prefix), step=trainer.global_step)
        if self.save_to is not None:
            trainer.save_checkpoint(self.save_to)
        return self.result

    def _target(self, pl_module: Any) -> nn.Module:
        if self.submodule is None:
            return pl_module
        try:
            return pl_module.get_submodule(self.submodule)
        except AttributeError:
            names = [name for name, _ in pl_module.named_children()]
            raise ModelError(f"submodule={self.submodule!r}: the module has {', '.join(names) or 'none'}") from None

    def _clean(self, trainer: Any, pl_module: Any) -> Any:
        datamodule = getattr(trainer, "datamodule", None)
        clean = self.clean
        if isinstance(clean, str):
            owner = next((one for one in (datamodule, pl_module) if callable(getattr(one, clean, None))), None)
            if owner is None:
                raise DataError(f"clean={clean!r}: neither the data module nor the module has such a method")
            clean = getattr(owner, clean)
        if callable(clean) and not isinstance(clean, Iterable):
            clean = clean()
        if clean is None:
            clean = _validation(trainer, datamodule)
        if clean is None:
            raise DataError("there are no validation data to purify with: pass clean=, e.g. a loader of clean samples")
        if isinstance(clean, (list, tuple)) and clean and all(_is_loader(one) for one in clean):
            if len(clean) > 1:
                raise DataError(f"there are {len(clean)} validation loaders: pass the clean one as clean=")
            clean = clean[0]
        elif isinstance(clean, Mapping) and clean and all(_is_loader(one) for one in clean.values()):
            raise DataError(f"there are validation loaders {', '.join(map(str, clean))}: pass the clean one as clean=")
        return _transferred(clean, trainer, datamodule, pl_module) if _is_loader(clean) else clean


def _is_loader(data: Any) -> bool:
    return isinstance(data, torch.utils.data.DataLoader)


def _validation(trainer: Any, datamodule: Any) -> Any:
    """Return the validation data of the trainer, else of its data module; None: there are none."""
    loaders = trainer.val_dataloaders
    if loaders is None and datamodule is not None and "val_dataloader" in vars(type(datamodule)):
        loaders = datamodule.val_dataloader()
    return loaders


def _transferred(loader: Any, trainer: Any, datamodule: Any, pl_module: Any) -> Any:
    """Return a loader as it is, or its batches, where hooks of the user's change them on their way to the model."""
    own = any(
        name in vars(kind)
        for one in (datamodule, pl_module)
        for kind in type(one).__mro__
        if not kind.__module__.partition(".")[0].endswith("lightning")
        for name in _TRANSFERS
    )
    return [trainer.strategy.batch_to_device(batch) for batch in loader] if own else loader


@contextlib.contextmanager
def _validating(trainer: Any) -> Iterator[None]:
    """Let the hooks of the user's see a trainer that validates, as augmentation is for training alone."""
    training = trainer.training
    if training:
        trainer.validating = True
    try:
        yield
    finally:
        if training:
            trainer.training = True
