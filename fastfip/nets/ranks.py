"""The processes of a torch.distributed group that work on one thing: who is who, and what goes from one to the others.

Every process ("rank") walks the same batches and computes its own rows of each. What is made of the outputs is then
computed by all of them on all rows, alike, so that only outputs, gradients and a few sums cross the wire. `Ranks.bytes`
counts what this rank handed to collectives, by purpose.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from fastfip.errors import BackendError, ConfigError, reason

__all__ = ["Ranks", "group_of"]

#: Seconds that a rank waits for the others to begin.
START = 300.0
#: How often this process has begun with others: the ranks count alike.
_begun: Counter[str] = Counter()
#: The groups of our own beside groups of the user's that are not of all processes.
_kept: dict[Any, Any] = {}


def group_of(group: Any) -> Any:
    """Return the process group that `group=` means, None where there is one process only.

    Args:
        group: "auto": the default group, if there is one; None: this process alone; or a process group.

    Raises:
        ConfigError: it is something else, or this process is no member of it.
    """
    if group is None or not dist.is_available():
        return None
    if isinstance(group, str) and group == "auto":
        group = dist.group.WORLD if dist.is_initialized() else None
    elif not isinstance(group, dist.ProcessGroup):
        raise ConfigError(f"group={group!r}: give 'auto', None (this process alone) or a torch.distributed group")
    return None if group is None or dist.get_world_size(group) < 2 else group


class Ranks:
    """One rank among others, with a group of their own that ends with the work.

    Attributes:
        rank: 0 to world - 1. world: how many there are. backend: that of the group.
        bytes: what this rank handed to collectives, by purpose.
    """

    def __init__(self, group: Any, device: torch.device, what: str) -> None:
        """Wait for the other ranks to begin as well.

        Args:
            group: a process group that this process belongs to.
            device: where tensors are that are shared.
            what: is begun, for errors.

        Raises:
            BackendError: the others do not begin within five minutes, or the backend
                cannot send what is on the device.
        """
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.backend, self.device = str(dist.get_backend(group)), device
        if self.backend == "nccl" and device.type != "cuda":
            raise BackendError(f"the process group is of nccl, which sends nothing from {device}: initialise gloo")
        self.bytes: Counter[str] = Counter()
        self.members = dist.get_process_group_ranks(group)
        self.store = c10d._get_default_store()
        self._meet(what)
        # A group of their own: a rank that fails closes it, which wakes the others; the user's group goes on.
        try:
            self._group: Any = self._own_group(group)
        except RuntimeError as error:
            raise self.lost(error) from error

    def _own_group(self, group: Any) -> Any:
        if group is dist.group.WORLD:
            return dist.new_group(self.members, timeout=_timeout(group))
        if group not in _kept:  # torch gives the groups of one part of the ranks the same name: there can be one only
            _kept[group] = dist.new_group(self.members, timeout=_timeout(group), use_local_synchronization=True)
        return _kept[group]

    def _meet(self, what: str) -> None:
        who = hashlib.sha256(repr(self.members).encode()).hexdigest()[:16]
        key = f"fastfip/{what}/{who}"
        _begun[key] += 1
        self._key = f"{key}/{_begun[key]}/failed"
        keys = [f"{key}/{_begun[key]}/{rank}" for rank in range(self.world)]
        try:
            self.store.set(keys[self.rank], "here")
            self.store.wait(keys, timedelta(seconds=START))
        except (RuntimeError, ValueError) as error:
            missing = [rank for rank, one in enumerate(keys) if not self._there(one)]
            _begun[key] -= 1
            with contextlib.suppress(RuntimeError):
                self.store.delete_key(keys[self.rank])
            raise BackendError(
                f"{what} was begun on rank {self.rank}, and rank {', '.join(map(str, missing))} of the process group "
                f"did not come within {START:.0f} s: call it on every rank, or with group=None for this process alone"
            ) from error

    def _there(self, key: str) -> bool:
        with contextlib.suppress(RuntimeError):
            return bool(self.store.check([key]))
        return False

    @classmethod
    def of(cls, group: Any, tensors: Iterable[Tensor], what: str) -> contextlib.AbstractContextManager[Ranks | None]:
        """Return the ranks of a group for a block, None where `group=` means this process alone; see `group_of`."""
        known = group_of(group)
        return contextlib.nullcontext() if known is None else cls(known, next(iter(tensors)).device, what)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is not None and not isinstance(error, LostRank):
            said = f"rank {self.rank} failed ({type(error).__name__}: {reason(error)})".replace(": )", ")")
            with contextlib.suppress(RuntimeError):
                self.store.set(self._key, said)
        self.close(failed=error is not None)

    def close(self, failed: bool = False) -> None:
        """Leave the group; a rank that still waits for this one gets an error."""
        group, self._group = self._group, None
        if group is None or (group in _kept.values() and not failed):
            return
        for own in [own for own, kept in _kept.items() if kept is group]:
            del _kept[own]
        with contextlib.suppress(Exception):
            if self.backend == "nccl":
                group.abort()
            dist.destroy_process_group(group)
        del group
        gc.collect()  # the connections end with the last reference

    # -------------------- who computes what

    def rows(self, n: int) -> slice | None:
        """Return which of n rows are this rank's; None: there are too few, and every rank computes all of them."""
        if n < self.world:
            return None
        return slice(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    @property
    def first(self) -> bool:
        """Return whether this is the rank that speaks and writes."""
        return self.rank == 0

    # -------------------- collectives

    def _do(self, collective: Callable[..., Any], *args: Any) -> None:
        try:
            collective(*args, group=self._group)
        except RuntimeError as error:  # a closed connection, a timeout
            raise self.lost(error) from error

    def lost(self, error: BaseException) -> LostRank:
        """Return the error that says which rank failed, where a collective did."""
        said = ""
        with contextlib.suppress(RuntimeError):
            if self._there(self._key):
                said = self.store.get(self._key).decode()
        if not said and "imed out" in str(error):
            said = "a process of the group did not answer in time"
        said = said or "a process of the group is gone"
        return LostRank(f"{said}: the work of all {self.world} processes has ended, and nothing was changed or written")

    def sum_(self, tensors: Sequence[Tensor], what: str) -> None:
        """Add up tensors over the ranks, in place: those of one dtype together, 16 bits in float32."""
        groups: dict[torch.dtype, list[Tensor]] = {}
        for t in tensors:
            wide = torch.float32 if t.dtype in (torch.float16, torch.bfloat16) else t.dtype
            groups.setdefault(wide, []).append(t)
        for dtype, members in groups.items():
            flat = torch.cat([t.detach().reshape(-1).to(dtype) for t in members])
            self.bytes[what] += flat.nbytes
            self._do(dist.all_reduce, flat)
            with torch.no_grad():
                for t, total in zip(members, flat.split([t.numel() for t in members])):
                    t.copy_(total.view_as(t))

    def number(self, value: float, what: str = "control") -> float:
        """Return the sum of a number over the ranks."""
        total = torch.tensor([value], dtype=torch.float64, device=self.device)
        self.sum_([total], what)
        return float(total)

    def mean_(self, sums: Sequence[Tensor], count: int, what: str) -> int:
        """Make the mean over all ranks' samples of sums over the own ones, in place; return how many samples."""
        self.sum_(sums, what)
        total = round(self.number(count))
        for value in sums:
            value.div_(total)
        return total

    def any(self, wish: bool) -> bool:
        """Return whether some rank wishes it."""
        return self.number(float(wish)) > 0

    def parts(self, mine: Tensor, sizes: Sequence[int], what: str) -> list[Tensor]:
        """Return every rank's tensor [sizes[rank], ...] of one dtype and shape but for the first dimension."""
        most, row = max(sizes), mine.shape[1:]
        padded = mine.new_zeros(most, *row)
        padded[: len(mine)] = mine
        sent = padded.reshape(-1).view(torch.uint8)
        out = [torch.empty_like(sent) for _ in sizes]
        self.bytes[what] += sent.nbytes
        self._do(dist.all_gather, out, sent)
        return [t.view(mine.dtype).reshape(most, *row)[:size] for t, size in zip(out, sizes)]

    def gathered(self, rows: Tensor, n: int, what: str = "outputs") -> Tensor:
        """Return all n rows of what each rank has its own rows of, [n, ...]; gradients reach the own rows."""
        mine = self.rows(n)
        if mine is None:
            return self.once(rows)
        result: Tensor = _Gathered.apply(rows, self, n, what)
        return result

    def total(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks of a scalar that each has its part of; a gradient reaches the own part."""
        result: Tensor = _Total.apply(x, self, 1)
        return result

    def mean_of(self, mean: Tensor, count: int) -> Tensor:
        """Return the mean over all ranks' samples of what is the mean over `count` own ones.

        Its gradient is the own part times the number of ranks: the mean of these over the ranks is that of the whole.
        """
        share = mean * (count / self.number(count))
        result: Tensor = _Total.apply(share, self, self.world)
        return result

    def once(self, x: Tensor) -> Tensor:
        """Return x, which every rank computes as a whole: of its gradient each has a share, so that they add up."""
        result: Tensor = _Once.apply(x, self.world)
        return result

    def objects(self, value: Any) -> list[Any]:
        """Return every rank's object, pickled on the way."""
        out: list[Any] = [None] * self.world
        self._do(dist.all_gather_object, out, value)
        return out

    def from_first(self, value: Any) -> Any:
        """Return the object of rank 0, pickled on the way; the others' is not looked at."""
        return self.objects(value if self.first else None)[0]

    def agree(self, named: dict[str, Any], remedy: str) -> None:
        """Refuse to go on where the ranks were not given the same.

        Raises:
            ConfigError: they were not; every rank gets the same words.
        """
        everyone = self.objects(named)
        odd = [name for name in named if any(other.get(name) != everyone[0].get(name) for other in everyone)]
        if odd:
            raise ConfigError(f"the ranks of the process group were given different {' and '.join(odd)}: {remedy}")

    @torch.no_grad()
    def settle(self, tensors: Sequence[Tensor], tolerance: float = 1e-3) -> None:
        """See to it that the ranks end with the same values: those of rank 0, where rounding made others.

        Raises:
            BackendError: they are further apart than that.
        """
        if not tensors:
            return
        sums = torch.stack([t.detach().double().sum() for t in tensors] + [t.double().norm() for t in tensors])
        everyone = self.parts(sums.nan_to_num(0.0)[None], [1] * self.world, "control")
        if all(torch.equal(other, everyone[0]) for other in everyone):
            return
        apart = 0.0
        for t in tensors:
            mine = t.detach().clone()
            self._do(dist.broadcast, t, self.members[0])
            apart = max(apart, float((mine - t).double().norm() / t.double().norm().clamp_min(1e-12)))
        if self.number(float(apart > tolerance)) > 0:
            raise BackendError(
                f"the ranks ended with different weights (rank {self.rank} is {apart:.1g} of their size from rank 0): "
                "the model or a callback draws or keeps something that differs between processes"
            )

    # -------------------- BatchNorm

    @contextlib.contextmanager
    def norms(self) -> Iterator[None]:
        """Let BatchNorm in train mode take its statistics over the rows of all ranks for a block."""
        from fastfip.nets.ranks_norm import SharedNorms

        with SharedNorms(self):
            yield


class LostRank(BackendError):
    """Another rank is gone; this one has nothing to say of its own."""


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks, n: int, what: str) -> Tensor:
        slices = [slice(n * r // ranks.world, n * (r + 1) // ranks.world) for r in range(ranks.world)]
        ctx.mine, ctx.sizes = slices[ranks.rank], [s.stop - s.start for s in slices]
        ctx.ranks, ctx.what = ranks, what
        return torch.cat(ranks.parts(rows.detach(), ctx.sizes, what))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient[ctx.mine], None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return torch.cat(ctx.ranks.parts(tangent, ctx.sizes, ctx.what))


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, times: int) -> Tensor:
        ctx.times = times
        out = x.detach().clone()
        ranks.sum_([out], "values")
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.times, None, None


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, world: int) -> Tensor:
        ctx.world = world
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient / ctx.world, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return tangent.clone()


def _timeout(group: Any) -> timedelta | None:
    """Return the timeout that the user's group has; None: torch's."""
    with contextlib.suppress(Exception):
        return group._get_backend(torch.device("cpu")).options._timeout
    return None
