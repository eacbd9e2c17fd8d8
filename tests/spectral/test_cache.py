"""Decompositions that are kept in a file: read where they are of these weights and whole, made anew everywhere else."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn

from fastfip.checkpoint import save_checkpoint
from fastfip.errors import CheckpointError, ConfigError
from fastfip.spectral import Rank, SpectralShifts, cache, decompose


def make(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(24, 5), nn.Linear(5, 5))
    return net.to(dtype)


def factors(shifts: SpectralShifts) -> list[Tensor]:
    return [t for shift in shifts.shifts for t in (shift.u, shift.sigma, shift.v)]


def same(one: SpectralShifts, other: SpectralShifts) -> bool:
    pairs = list(zip(factors(one), factors(other), strict=True))
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Rank]:
    """The ranks of all decompositions that were made, not read."""
    ranks: list[Rank] = []

    def spied(matrices: object, rank: Rank = None) -> object:
        ranks.append(rank)
        return decompose.decompose(matrices, rank)  # type: ignore[arg-type]

    monkeypatch.setattr(cache, "decompose", spied)
    return ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rank", [None, 2, 0.8])
def test_the_second_time_they_are_read(dtype: torch.dtype, rank: Rank, tmp_path: Path, made: list[Rank]) -> None:
    path = tmp_path / "net.factors"
    plain = SpectralShifts.of(make(dtype), rank)
    first = SpectralShifts.of(make(dtype), rank, cache=path)
    second = SpectralShifts.of(make(dtype), rank, cache=str(path))
    assert made == [rank, rank]  # not a third time
    assert same(plain, first) and same(first, second)
    assert [p.name for p in tmp_path.iterdir()] == ["net.factors"]


def test_of_another_weight_rank_or_model_they_are_made_anew(tmp_path: Path, made: list[Rank]) -> None:
    path = tmp_path / "net.factors"
    SpectralShifts.of(make(), 2, cache=path)
    net = make()
    with torch.no_grad():
        net[2].weight[3, 4] += 1e-6
    changes: list[tuple[nn.Module, Rank]] = [(net, 2), (make(), 2), (make(), 3), (make(torch.bfloat16), 3)]
    changes += [(make()[2:], 3), (make()[:1], 3)]
    for k, (changed, rank) in enumerate(changes):
        found = SpectralShifts.of(changed, rank, cache=path)
        assert len(made) == k + 2
        assert same(found, SpectralShifts.of(changed, rank))
        made.pop()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def without_one(path: Path) -> None:
    tensors = load(path.read_bytes())
    tensors.pop("1.u")
    resave(path, tensors)


def exchanged(path: Path) -> None:
    tensors = load(path.read_bytes())
    tensors["2.u"], tensors["2.v"] = tensors["2.v"], tensors["2.u"]
    resave(path, tensors)


def resave(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        said = file.metadata()
    save_file(tensors, path, said)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit": flip,
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "empty": lambda path: path.write_bytes(b""),
    "no safetensors": lambda path: path.write_bytes(b"\x80\x02cos\nsystem\n(S'false'\ntR."),
    "a tensor less": without_one,
    "two exchanged": exchanged,
    "another format": lambda path: torch.save(load(path.read_bytes()), path),
    "without a key": lambda path: save_file(load(path.read_bytes()), path),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_replaced(name: str, tmp_path: Path, made: list[Rank]) -> None:
    path = tmp_path / "net.factors"
    right = SpectralShifts.of(make(), 3, cache=path)
    whole = path.read_bytes()
    DAMAGE[name](path)
    assert path.read_bytes() != whole
    assert same(SpectralShifts.of(make(), 3, cache=path), right) and len(made) == 2
    assert same(SpectralShifts.of(make(), 3, cache=path), right) and len(made) == 2


def test_factors_that_were_read_are_no_memory_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "net.factors"
    right = SpectralShifts.of(make(), 3, cache=path)
    found = SpectralShifts.of(make(), 3, cache=path)
    with path.open("r+b") as file:  # in place, as a copy over it would be
        file.write(bytes(path.stat().st_size))
    assert same(found, right)


def test_another_format_number_is_another_file(
    tmp_path: Path, made: list[Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.factors"
    SpectralShifts.of(make(), 3, cache=path)
    monkeypatch.setattr(cache, "FORMAT", "another")
    SpectralShifts.of(make(), 3, cache=path)
    assert len(made) == 2


def test_a_checkpoint_is_never_overwritten(tmp_path: Path, made: list[Rank]) -> None:
    path = save_checkpoint(make(), tmp_path / "net.safetensors")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"name the file of the decomposition \*\.factors"):
        SpectralShifts.of(make(), 3, cache=path)
    assert path.read_bytes() == before and not made


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be kept: .*does not exist"):
        SpectralShifts.of(make(), 3, cache=tmp_path / "nowhere" / "net.factors")
