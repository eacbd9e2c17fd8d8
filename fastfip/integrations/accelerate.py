"""For training loops with Hugging Face's Accelerate (extra `accelerate`): `fastfip.accelerate.purify`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils.data import BatchSampler, IterableDataset, RandomSampler, SequentialSampler, Subset
from torch.utils.data.distributed import DistributedSampler

from fastfip.data.batch import Batch
from fastfip.data.rank_task import loader_like
from fastfip.errors import ConfigError, ModelError
from fastfip.integrations.holding import figures, purify_held
from fastfip.methods import Method, get
from fastfip.nets.state import is_sharded
from fastfip.purification.result import PurifyResult

try:
    import accelerate as _package
    from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
    from accelerate.utils import broadcast_object_list
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
            are the accelerator's unless they are given. `group=None` has each process do all of the work and take the
            weights of the first one, with any method, unless the model is sharded.

    Returns:
        the same result on every process; its model is the one inside the wrappers.

    Raises:
        ConfigError: `inplace`, or another `group` than None, is given: both are the accelerator's matter; or the model
            is sharded and the method works in one process only.
        ModelError: weights in parts of another form than FSDP2's (FSDP1, DeepSpeed, Megatron-LM, XLA); or the
            purification failed on another process.
    """
    if "inplace" in options:
        raise ConfigError("inplace: leave it out, the prepared model is purified itself, by all of its processes")
    if options.get("group") is not None:
        raise ConfigError("group: leave it out for all of the accelerator's processes, or give None for each by itself")
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    first = any("FullyShardedDataParallel" in c.__name__ for m in model.modules() for c in type(m).__mro__)
    if kind in _REFUSED or first:
        raise ModelError(
            f"{'FSDP1' if first else kind} gives each process a part of the weights: take FSDP2 (fsdp_version=2), or "
            "save the whole state dict (accelerator.get_state_dict) and purify that"
        )
    n = accelerator.num_processes
    given = {
        "amp": _AMP.get(str(accelerator.mixed_precision), False),
        "device": accelerator.device,
        "progress": None if accelerator.is_main_process else False,
        **{name: _whole(value, n) if name.endswith("_loader") else value for name, value in options.items()},
    }
    wrapped = any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules())
    inner = accelerator.unwrap_model(model, keep_torch_compile=False)
    if not is_sharded(inner):
        given = {"group": "auto" if _shared(method, clean) else None, **given}
    result = purify_held(inner, _whole(clean, n), method, given, copy=wrapped)
    if accelerator.trackers:
        accelerator.log(figures(result, prefix))
    return result


def _shared(method: str | type[Method], clean: Any) -> bool:
    """Whether processes can share the work of a method; without data `auto` is one that they cannot share."""
    if method == "auto":
        return clean is not None
    recipe = get(method) if isinstance(method, str) else method
    return bool(getattr(recipe, "over_ranks", False))


def _whole(data: Any, processes: int) -> Any:
    """Return a plain loader of all samples in place of one that `prepare` has made for this process's part.

    Every process has to call it: which samples they are is what the sampler of the first one says, because samplers
    may draw, and processes may be seeded differently.
    """
    dataset: Any = getattr(data, "dataset", None)
    prepared = type(data).__module__.startswith("accelerate.") and hasattr(data, "collate_fn")
    if not prepared or isinstance(dataset, IterableDataset):
        return data
    batches: Any = data.sampler if data.batch_sampler is None else data.batch_sampler
    split = getattr(data, "split_batches", False)  # each process takes its part of a batch of the user's
    while isinstance(batches, (BatchSamplerShard, SkipBatchSampler)):  # inside: that of all processes
        split = split or getattr(batches, "split_batches", False)
        batches = batches.batch_sampler
    places: list[Any] | None = None
    if type(batches) is not BatchSampler or data.batch_sampler is None:
        places = [list(batch) for batch in batches]
    elif not isinstance(batches.sampler, (RandomSampler, SequentialSampler, DistributedSampler)):
        places = [[place] for place in batches.sampler]  # also those of a last batch that `drop_last` leaves out
    (places,) = broadcast_object_list([places])
    if data.batch_sampler is None:  # the data set itself makes batches
        return loader_like(data, dataset, batch_size=None, sampler=places)
    size = getattr(batches, "batch_size", None) or max(map(len, places or [[0]]))
    if places is not None:
        dataset = Subset(dataset, sorted({int(place) for batch in places for place in batch}))
    return loader_like(data, dataset, batch_size=size if split else size * processes)
