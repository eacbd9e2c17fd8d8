"""What wrappers put before names, or into them: found by which names of a file meet those of a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from fastfip.errors import CheckpointError

__all__ = ["align", "common_prefixes", "strip"]

#: What DataParallel, torch.compile and the usual wrappers put before every name.
PREFIXES = ("module.", "_orig_mod.", "model.")
#: What torch.compile, activation checkpointing and FSDP put into names, wherever a module was wrapped.
_INSIDE = frozenset(("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"))
#: The two Linear layers of torchvision's vision transformers, by their names in 0.12 and by those since then.
_MLP = re.compile(r"(^|\.)mlp\.linear_([12])(?=\.)")
_NUMBERS = {"1": "0", "2": "3"}
#: Averages of weights: where the weights themselves are there too, those are meant.
_AVERAGES = re.compile(r"(^|[._])(ema|swa|averaged?|shadow|momentum)([._]|$)")
_PROBES = 12
_CANDIDATES = 24
#: No module lies deeper.
_LEVELS = 64


def common_prefixes(names: Iterable[str]) -> list[str]:
    """Return "" and the longer and longer prefixes of wrappers that all the names carry."""
    names = list(names)
    out = [""]
    while names:
        more = next((p for p in PREFIXES if all(name.startswith(out[-1] + p) for name in names)), None)
        if more is None:
            break
        out.append(out[-1] + more)
    return out


def strip(names: Iterable[str], prefix: str) -> dict[str, str]:
    """Return {name without the prefix: name} for the names that carry it; its last dot may be missing.

    Raises:
        CheckpointError: none does; says what the names begin with.
    """
    names = list(names)
    prefix = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
    out = {name[len(prefix) :]: name for name in names if name.startswith(prefix) and name != prefix}
    if not out:
        first = Counter(f"{name.split('.')[0]}." for name in names if "." in name)
        raise CheckpointError(f"has no names with the prefix {prefix!r}; they begin with {', '.join(list(first)[:6])}")
    return out


def align(names: Iterable[str], expected: Iterable[str]) -> dict[str, str]:
    """Return {expected name: name} for the prefix to take off and that to put on under which most names meet.

    Names that do not carry what is taken off belong to something else and are left out. Names that carry it and are not
    expected are kept under the name that they would have. At a tie the shortest prefixes win; no average is taken for
    the weights that are averaged.

    Raises:
        CheckpointError: all expected names are there more than once, under different prefixes.
    """
    theirs, ours = _bare(names), _bare(expected)
    counted = [name for name in ours if not name.endswith("num_batches_tracked")]
    best, score, others = dict.fromkeys(theirs, ""), (-1, True, 0), [""]
    best = {name: name for name in theirs}
    for off, on in _candidates(list(theirs), list(ours)):
        mapped = {on + name[len(off) :]: name for name in theirs if name.startswith(off)}
        met = sum(name in mapped for name in ours)
        mark = (met, not _AVERAGES.search(off), -len(off) - len(on))
        if mark[:2] == score[:2] and all(name in mapped and mapped[name] != best.get(name) for name in counted):
            others.append(off)
        if mark > score:
            others = [off] if mark[:2] != score[:2] else others
            best, score = mapped, mark
    if counted and len(set(others)) > 1 and all(name in best for name in counted):
        which = " and ".join(repr(off) for off in sorted(set(others))[:3])
        raise CheckpointError(f"has the names of the model under {which}: choose one of them with prefix=")
    return {ours.get(name, name): theirs[own] for name, own in best.items()}


def _bare(names: Iterable[str]) -> Mapping[str, str]:
    """Return {name without what wrappers put into it: name}, or the names as they are where two would become one.

    A layer with two names in the releases of a library has the later one.
    """
    names = list(names)
    out = {".".join(part for part in _renamed(name).split(".") if part not in _INSIDE): name for name in names}
    return out if len(out) == len(names) else {name: name for name in names}


def _renamed(name: str) -> str:
    return _MLP.sub(lambda found: f"{found[1]}mlp.{_NUMBERS[found[2]]}", name) if "mlp." in name else name


def _candidates(theirs: list[str], ours: list[str]) -> Iterator[tuple[str, str]]:
    """Return pairs of prefixes, to take off and to put on, the usual ones first."""
    seen = set()
    for off in common_prefixes(theirs):
        for on in common_prefixes(ours):
            seen.add((off, on))
            yield off, on
    ends: dict[str, list[str]] = {}
    for name in theirs:
        ends.setdefault(name.rpartition(".")[2], []).append(name)
    votes: Counter[tuple[str, str]] = Counter()
    for probe in ours[:: max(1, len(ours) // _PROBES)]:
        wanted = probe.rsplit(".", _LEVELS)
        for name in ends.get(wanted[-1], ()):
            parts = name.rsplit(".", _LEVELS)
            same = 1
            while same < min(len(parts), len(wanted)) and parts[-same - 1] == wanted[-same - 1]:
                same += 1
            off, on = (".".join(p[: len(p) - same]) for p in (parts, wanted))
            votes[f"{off}." if off else "", f"{on}." if on else ""] += 1
    for pair, _ in votes.most_common(_CANDIDATES):
        if pair not in seen:
            yield pair
