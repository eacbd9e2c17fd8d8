"""Which parts of the working copy are checkpointed in a run, after a look at whether that gives the same gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastfip.data.batch import Batch, take
from fastfip.errors import ModelError, reason
from fastfip.methods.run import Run
from fastfip.nets.blocks import best_blocks, checkpointed
from fastfip.nets.process import checkpoints_met, computed_again_alike
from fastfip.nets.state import eval_mode, requires_grad

__all__ = ["blocks_of", "first_samples", "has_checkpoints", "small_gradients"]

#: Largest difference of gradients over their size with which they are the same: a device may add up in another order.
SAME = 1e-3


def blocks_of(run: Run) -> tuple[nn.Module, ...]:
    """Return the modules of the model to checkpoint, those with which least is kept; none where little would be saved.

    Raises:
        ModelError: their gradients are others when they are computed again.
    """
    batch = first_samples(run)
    with eval_mode(run.model), torch.enable_grad(), requires_grad(run.model.parameters(), True):
        saving = best_blocks(run.model, lambda: run.task.loss(run.task.forward(run.model, batch), batch))
    if not saving.blocks:
        run.note(
            "no gradient checkpointing: no parts were found that would keep much less than the "
            f"{saving.plain / 1e6:.1f} MB that the model keeps of the first samples"
        )
        return ()
    n = run.task.size(batch)
    batch = take(batch, torch.arange(1, device="cpu"), n)
    try:
        plain = _drawn_alike(run, batch)
        with computed_again_alike(run.model), checkpointed(saving.blocks):
            again = _drawn_alike(run, batch)
        same = all(_close(a, b) for a, b in zip(plain, again))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a class that does not take another one in its place, a part that counts its calls, ...
        raise ModelError(f"gradient_checkpointing=True: parts of the model cannot be computed again ({reason(error)}): "
                         "leave it out") from error  # fmt: skip
    if not same:
        raise ModelError(
            "gradient_checkpointing=True: parts of the model have other gradients when they are computed again, as "
            "they change what they were given, keep something between passes, or are treated by their class: leave it "
            "out"
        )
    return saving.blocks


def first_samples(run: Run) -> Batch:
    """Return a batch of two clean samples, of one where there are no more."""
    return next(iter(run.clean.batches(min(2, run.clean.n), device=run.device)))


def has_checkpoints(run: Run) -> bool:
    """Return whether the model checkpoints parts of itself as it is used in a run: in eval mode, with a graph."""
    met, model = checkpoints_met(), run.model
    with computed_again_alike(model), eval_mode(model), torch.enable_grad(), requires_grad(model.parameters(), True):
        run.task.forward(model, first_samples(run))
    return checkpoints_met() > met


def small_gradients(run: Run, batch: Batch) -> tuple[Tensor | None, ...]:
    """Return the gradients of biases and norm layers (of the first parameter where there are none) in eval mode."""
    model = run.model
    small: list[nn.Parameter] = [p for p in model.parameters() if p.dim() <= 1 and p.is_floating_point()]
    small = small or list(model.parameters())[:1]
    with eval_mode(model), torch.enable_grad(), requires_grad(model.parameters(), True):
        losses = run.alone.loss(run.alone.forward(model, batch), batch)
        return torch.autograd.grad(losses.sum(), small, allow_unused=True)


def _drawn_alike(run: Run, batch: Batch) -> tuple[Tensor | None, ...]:
    """Return the gradients of a pass whose random numbers are those of the next call."""
    with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
        return small_gradients(run, batch)


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return bool(torch.linalg.vector_norm(a - b) <= SAME * torch.linalg.vector_norm(a))
