"""Which clean samples have no part in the recovery: those that the unlearning hurt most."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from fastfip.data.cleanset import CleanSet
from fastfip.methods._found import Thumbnails
from fastfip.methods.base import Run

__all__ = ["Sieve"]


class Sieve:
    """The samples of `run.clean` that are left out of the recovery, and which of them come back.

    A triggered sample with the attacker's label pulls the backdoor back, through the loss and through a KL to the
    received net, which answers it as it is labelled; the unlearned net does not. Among clean samples few are like that,
    and these the net learns again from the others: what it then answers as labelled comes back.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.whole: CleanSet | None = None
        self.gone = torch.zeros(0, dtype=torch.int64, device="cpu")

    @torch.no_grad()
    def leave_out(self, received: Callable[[], AbstractContextManager[nn.Module]], share: float) -> None:
        """Leave a share of the samples out: those whose loss rose most over the received net's.

        The last sample of a class stays. Of a large set only as many samples are ranked, and kept, as the steps that
        are left can draw: the cost stays below that of these steps.

        Args:
            received: gives the net as it was received, in eval mode, for a block; `run.model` is the unlearned one.
            share: in [0, 1), of the samples; rounded down.
        """
        run, clean = self.run, self.run.clean
        batch_size = clean.batch_size if run.config.batch_size is None else run.config.batch_size
        drawn = (run.total_steps - run.step - 1) * batch_size
        if drawn <= 0 or int(share * clean.n) == 0:
            return
        if drawn < clean.n:
            clean = clean.subset(torch.randperm(clean.n, generator=run.generator, device="cpu")[:drawn].sort().values)
        rise = []
        with run.eval_mode(), run.autocast():
            for batch in clean.batches(device=run.device):
                with received() as net:
                    before = run.task.loss(run.task.forward(net, batch), batch)
                rise.append(run.task.loss(run.forward(batch), batch) - before)
        worst = torch.cat(rise).float().nan_to_num(nan=torch.inf).argsort(descending=True, stable=True).cpu()
        self.whole = clean
        self._set(_but_the_last_of_a_class(clean.places()[worst], clean.labels, int(share * clean.n)))

    @torch.no_grad()
    def take_back(self) -> None:
        """Let those come back that the net, tuned without them, answers as they are labelled (where it has classes)."""
        run, clean = self.run, self.whole
        if clean is None or run.classes is None or not len(self.gone):
            return
        out = clean.subset(self.gone)
        right = []
        pictures = Thumbnails(run)
        with run.eval_mode(), run.autocast():
            for batch in out.batches(device=run.device):
                right.append((run.forward(batch).argmax(1) == run.task.labels(batch)).cpu())
                pictures.add(batch, ~right[-1])
        pictures.keep()
        self._set(self.gone[out.places()[~torch.cat(right)]])

    def say(self) -> None:
        """Note what was left out to the end."""
        if len(self.gone) and self.whole is not None:
            self.run.note(
                f"{len(self.gone)} of {self.whole.n} clean samples were left out of the recovery: the unlearning "
                "raised their loss most, and the model did not return to their labels by itself"
            )

    def _set(self, gone: Tensor) -> None:
        """Leave out these places of the whole set, and no others."""
        assert self.whole is not None
        if len(gone) == len(self.gone) and self.run.clean.n + len(gone) == self.whole.n:
            return
        keep = torch.ones(self.whole.n, dtype=torch.bool, device="cpu")
        keep[gone] = False
        self.gone, self.run.left_out = gone, len(gone)
        self.run.clean = self.whole.subset(torch.nonzero(keep).flatten())


def _but_the_last_of_a_class(places: Tensor, labels: Tensor | None, most: int) -> Tensor:
    """Return up to `most` of the places, in their order, that leave each class of `labels` [n] a sample."""
    if labels is None:
        return places[:most]
    left = torch.bincount(labels).tolist()
    out: list[int] = []
    for place in places.tolist():
        if len(out) == most:
            break
        label = int(labels[place])
        if left[label] > 1:
            left[label] -= 1
            out.append(place)
    return torch.tensor(out, dtype=torch.int64, device="cpu")
