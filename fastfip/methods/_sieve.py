"""Which clean samples have no part in the recovery: those that the unlearning hurt most."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Run

__all__ = ["sieve"]


@torch.no_grad()
def sieve(run: Run, received: nn.Module, share: float) -> None:
    """Leave a share of `run.clean` out from now on: the samples whose loss rose most over the received net's.

    A triggered sample with the attacker's label pulls the backdoor back, through the loss and through a KL to the
    received net, which answers it as it is labelled; the unlearned net does not. Among clean samples few are like that.
    The last sample of a class stays.

    Of a large set only as many samples are ranked, and kept, as the steps that are left can draw: the cost stays below
    that of these steps.

    Args:
        run: at the end of its last unlearning step, the unlearned weights in place.
        received: the net as it was received, in eval mode.
        share: in [0, 1), of the samples; rounded down.
    """
    clean = run.clean
    batch_size = clean.batch_size if run.config.batch_size is None else run.config.batch_size
    drawn = (run.total_steps - run.step - 1) * batch_size
    if drawn <= 0 or int(share * clean.n) == 0:
        return
    if drawn < clean.n:
        clean = clean.subset(torch.randperm(clean.n, generator=run.generator, device="cpu")[:drawn].sort().values)
    rise = []
    with run.eval_mode(), run.autocast():
        for batch in clean.batches(device=run.device):
            before = run.task.loss(run.task.forward(received, batch), batch)
            rise.append(run.task.loss(run.forward(batch), batch) - before)
    worst = torch.cat(rise).float().nan_to_num(nan=torch.inf).argsort(descending=True, stable=True).cpu()
    gone = _but_the_last_of_a_class(clean.places()[worst], clean.labels, int(share * clean.n))
    if not gone:
        return
    keep = torch.ones(clean.n, dtype=torch.bool, device="cpu")
    keep[gone] = False
    run.left_out += len(gone)
    run.note(
        f"{len(gone)} of {clean.n} clean samples, those that the unlearning hurt most, had no part in the recovery"
    )
    run.clean = clean.subset(torch.nonzero(keep).flatten())


def _but_the_last_of_a_class(places: Tensor, labels: Tensor | None, most: int) -> list[int]:
    """Return up to `most` of the places, in their order, that leave each class of `labels` [n] a sample."""
    if labels is None:
        return places[:most].tolist()
    left = torch.bincount(labels).tolist()
    out: list[int] = []
    for place in places.tolist():
        if len(out) == most:
            break
        label = int(labels[place])
        if left[label] > 1:
            left[label] -= 1
            out.append(place)
    return out
