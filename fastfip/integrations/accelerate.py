"""For training loops with Hugging Face's Accelerate (extra `accelerate`): `fastfip.accelerate.purify`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastfip.data.batch import Batch
from fastfip.errors import ConfigError, ModelError
from fastfip.integrations.holding import figures, purify_held
from fastfip.methods import Method, get
from fastfip.purification.result import PurifyResult

try:
    import accelerate as _package
except ImportError as missing:
    raise ImportError(f"fastfip.accelerate needs Accelerate: pip install fastfip[accelerate] ({missing})") from missing

__all__ = ["purify"]

_AMP = {"bf16": "bf16", "fp16": "fp16"}
#: Kinds of training of which each process has a part of the weights in a form of its own.
_REFUSED = ("DEEPSPEED", "MEGATRON_LM", "XLA")


def purify(
    accelerator: _package.Accelerator,
    model: nn.Module,
    clean: Iterable[Batch] | None = None,
    method: str | type[Method] = "auto",
    *,
    prefix: str = "purify",
    **options: Any,
) -> PurifyResult:
    """Purify a model that an `Accelerator` has prepared, on all of its processes: every one has to make this call.

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        ...
        result = fastfip.accelerate.purify(accelerator, model, clean_loader, steps=20)
        accelerator.print(result)

    The prepared model itself has the new weights afterwards: its parameters stay the same objects, so that the prepared
    optimizer goes on with them. It runs on the accelerator's device and in its mixed precision. The processes share
    the work where the method can do that, else each does all of it; all end with the same weights. A bar is shown by
    the main process only. Where the accelerator has trackers, the figures before and after are logged to them.

    Args:
        accelerator: the `accelerate.Accelerator`.
        model: what `accelerator.prepare` returned, also under DistributedDataParallel, torch.compile or FSDP2
            (docs/distributed.md has what a sharded model costs).
        clean: clean samples, see `fastfip.purify`. Of a prepared loader over a data set all samples are used, each
            once: what `prepare` repeats or leaves out to make parts of one length is not. A prepared stream gives each
            process its part.
        method: its name, or a class.
        prefix: of the names of logged figures: `PREFIX/acc_before`, `PREFIX/acc_after`, `PREFIX/loss_after` ...
        **options: of `fastfip.purify`: `steps`, `seed`, `test_loader`, `asr_loader`, `lr` and so on. `amp` and `device`
            are the accelerator's unless they are given.

    Returns:
        the same result on every process; its model is the one inside the wrappers.

    Raises:
        ConfigError: `inplace` or `group` is given: both are the accelerator's matter.
        ModelError: weights in parts of another form than FSDP2's (FSDP1, DeepSpeed, Megatron-LM, XLA); or the
            purification failed on another process.
    """
    for name in ("inplace", "group"):
        if name in options:
            raise ConfigError(f"{name}: leave it out, the prepared model is purified itself, by all of its processes")
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    first = any("FullyShardedDataParallel" in c.__name__ for m in model.modules() for c in type(m).__mro__)
    if kind in _REFUSED or first:
        raise ModelError(
            f"{'FSDP1' if first else kind} gives each process a part of the weights: take FSDP2 (fsdp_version=2), or "
            "save the whole state dict (accelerator.get_state_dict) and purify that"
        )
    given = {
        "amp": _AMP.get(str(accelerator.mixed_precision), False),
        "device": accelerator.device,
        "progress": None if accelerator.is_main_process else False,
        "group": "auto" if _shared(method, clean) else None,
        **{name: _whole(value) if name.endswith("_loader") else value for name, value in options.items()},
    }
    wrapped = any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules())
    inner = accelerator.unwrap_model(model, keep_torch_compile=False)
    result = purify_held(inner, _whole(clean), method, given, copy=wrapped)
    if accelerator.trackers:
        accelerator.log(figures(result, prefix))
    return result


def _shared(method: str | type[Method], clean: Any) -> bool:
    """Whether processes can share the work of a method; without data `auto` is one that they cannot share."""
    if method == "auto":
        return clean is not None
    recipe = get(method) if isinstance(method, str) else method
    return bool(getattr(recipe, "over_ranks", False))


def _whole(data: Any) -> Any:
    """Return a plain loader of all samples in place of one that `prepare` has made for this process's part."""
    dataset: Any = getattr(data, "dataset", None)
    prepared = type(data).__module__.startswith("accelerate.") and hasattr(data, "collate_fn")
    if not prepared or isinstance(dataset, torch.utils.data.IterableDataset):
        return data
    batches = getattr(data.batch_sampler, "batch_sampler", data.batch_sampler)  # inside: that of all processes
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=int(getattr(data, "total_batch_size", None) or 1),
        sampler=getattr(batches, "sampler", None),
        collate_fn=data.collate_fn,
        num_workers=data.num_workers,
        pin_memory=data.pin_memory,
    )
