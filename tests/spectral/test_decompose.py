"""The largest singular triplets by iteration, and what is left to the exact way, against torch in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastfip.spectral import SpectralShifts, decompose, leading
from fastfip.spectral.decompose import Factored


def with_values(values: Tensor, rows: int, columns: int) -> Tensor:
    u, v = (torch.linalg.qr(torch.randn(size, len(values)).double()).Q for size in (rows, columns))
    return ((u * values.double()) @ v.mT).float()


N = 264
SPECTRA: dict[str, Callable[[], Tensor]] = {  # by iteration
    "square, flat": lambda: torch.randn(N, N),
    "wide, flat": lambda: torch.randn(N, 601),
    "tall, flat": lambda: torch.randn(517, N),
    "decaying": lambda: with_values(torch.logspace(0, -2, N), N, 300),
    "steep": lambda: with_values(torch.logspace(0, -30, N), 300, N),
    "in fours": lambda: with_values(torch.linspace(1, 0.1, 66).repeat_interleave(4), N, 270),
    "tiny": lambda: 1e-8 * torch.randn(N, N),
}
EXACT: dict[str, Callable[[], Tensor]] = {
    "zero": lambda: torch.zeros(N, 300),
    "of rank ten": lambda: torch.randn(N, 10) @ torch.randn(10, 300),
    "orthogonal": lambda: torch.linalg.qr(torch.randn(N, N)).Q,
    "one is a thousand times as large": lambda: with_values(torch.tensor([1e3, *[1.0] * 40, *[0.5] * 223]), N, N),
    "infinite in float32 when squared": lambda: 1e25 * torch.randn(N, N),
    "zero in float32 when squared": lambda: 1e-25 * torch.randn(N, N),
    "falls by ten thousands": lambda: with_values(torch.logspace(0, -60, N), N, N),
}
RANK = 20


def check(m: Tensor, factors: Factored, keep: int, tolerance: float) -> None:
    """Assert that they are the `keep` largest triplets of [G, O, I]; a triplet's error counts over its own value."""
    u, s, v = (t.double() for t in factors)
    groups, rows, columns = m.shape
    assert (u.shape, s.shape, v.shape) == ((groups, rows, keep), (groups, keep), (groups, columns, keep))
    m, right = m.double(), torch.linalg.svdvals(m.double())[:, :keep]
    tiny = 1e-7 * right[:, :1]  # of rank-deficient ones float64 itself leaves this much of float32's input
    torch.testing.assert_close(s, right, rtol=tolerance, atol=float(tiny.max()) * 1e-3)
    assert bool((s.diff() <= 0).all())
    eye = torch.eye(keep, dtype=torch.float64).expand(groups, keep, keep)
    for side in (u, v):
        torch.testing.assert_close(side.mT @ side, eye, atol=1e-6, rtol=0)
    for left in (m @ v - u * s.unsqueeze(1), m.mT @ u - v * s.unsqueeze(1)):
        assert bool((left.norm(dim=1) <= tolerance * s + tiny).all()), float((left.norm(dim=1) / s).max())


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each iteration found what it was asked for."""
    out: list[bool] = []

    def spied(m: Tensor, k: int) -> Factored | None:
        got = leading.largest(m, k)
        out.append(got is not None)
        return got

    monkeypatch.setattr(decompose, "largest", spied)
    return out


@pytest.mark.parametrize("name", SPECTRA)
def test_the_largest_by_iteration(name: str, found: list[bool]) -> None:
    torch.manual_seed(0)
    m = SPECTRA[name]()[None]
    ((u, s, v),) = decompose.decompose([m], RANK)
    assert found == [True] and u.dtype == s.dtype == v.dtype == torch.float32
    assert u.is_contiguous() and s.is_contiguous() and v.is_contiguous()
    check(m, (u, s, v), RANK, 1.5 * leading.TOLERANCE)


@pytest.mark.parametrize("name", EXACT)
def test_what_cannot_be_iterated_is_decomposed_exactly(name: str, found: list[bool]) -> None:
    torch.manual_seed(1)
    m = EXACT[name]()[None]
    (factors,) = decompose.decompose([m], RANK)
    assert found == [False]
    check(m, factors, RANK, 1e-6)


def test_more_equal_values_than_the_block_has_vectors() -> None:
    """Nothing tells them apart: whether the iteration ends is rounding's matter, not whether it is right."""
    torch.manual_seed(2)
    m = with_values(torch.tensor([1.0] * 132 + [0.5] * 132), N, N)[None]
    (factors,) = decompose.decompose([m], RANK)
    check(m, factors, RANK, 1.5 * leading.TOLERANCE)


@pytest.mark.parametrize("rank, size", [(40, 264), (8, 200), (0.5, 264), (None, 264)])
def test_where_iteration_does_not_pay_it_is_not_tried(rank: float | None, size: int, found: list[bool]) -> None:
    torch.manual_seed(2)
    m = torch.randn(1, size, size)
    ((u, s, v),) = decompose.decompose([m], rank)
    assert not found
    check(m, (u, s, v), s.shape[1], 1e-6)


def test_an_iteration_that_runs_out_is_followed_by_the_exact_way(
    found: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    monkeypatch.setattr(leading, "MOST_PRODUCTS", 5)
    m = torch.randn(1, N, N)
    (factors,) = decompose.decompose([m], RANK)
    assert found == [False]
    check(m, factors, RANK, 1e-6)


def test_what_float32_rounds_off_is_taken_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    m = SPECTRA["steep"]()
    assert leading.largest(m.mT, RANK) is not None
    monkeypatch.setattr(leading, "MOST_ROUNDS", 1)
    assert leading.largest(m.mT, RANK) is None


def test_groups_are_matrices_of_their_own(found: list[bool]) -> None:
    torch.manual_seed(5)
    m = torch.stack([torch.randn(300, N), SPECTRA["decaying"]().mT, 3 * torch.randn(300, N)])
    (factors,) = decompose.decompose([m], RANK)
    assert found == [True] * 3
    check(m, factors, RANK, 1.5 * leading.TOLERANCE)
    (alone,) = decompose.decompose([m[1:2]], RANK)
    assert all(torch.equal(one[1:2], other) for one, other in zip(factors, alone))


def test_one_group_that_cannot_be_iterated(found: list[bool]) -> None:
    torch.manual_seed(6)
    m = torch.stack([torch.randn(N, N), torch.zeros(N, N)])
    (factors,) = decompose.decompose([m], RANK)
    assert found == [True, False]
    check(m, factors, RANK, 1e-6)


@pytest.mark.parametrize("view", ["transposed", "strided", "expanded"])
def test_memory_that_is_not_contiguous(view: str, found: list[bool]) -> None:
    torch.manual_seed(7)
    whole = torch.randn(1, 2 * N, N)
    m = {"transposed": whole.mT, "strided": whole[:, ::2], "expanded": whole[:, :1].expand(1, N, N)}[view]
    (factors,) = decompose.decompose([m], RANK)
    (same,) = decompose.decompose([m.contiguous()], RANK)
    assert found == [view != "expanded"] * 2  # that one has rank 1
    check(m, factors, RANK, 1.5 * leading.TOLERANCE)
    check(m, same, RANK, 1.5 * leading.TOLERANCE)


def test_float64_stays_accurate(found: list[bool]) -> None:
    torch.manual_seed(8)
    m = torch.randn(1, N, 300).double()
    (factors,) = decompose.decompose([m], RANK)
    assert not found and all(t.dtype == torch.float64 for t in factors)
    check(m, factors, RANK, 1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [30, N])
def test_low_precision_is_decomposed_as_float32(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(9)
    m = torch.randn(1, size, size).to(dtype)
    for one, other in zip(decompose.decompose([m], 8), decompose.decompose([m.float()], 8)):
        assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(one, other))


def test_projections_read_from_the_output_are_those_of_a_product() -> None:
    """What a layer does with the factors: x V from y = W x, as U^T y / s."""
    torch.manual_seed(10)
    m = SPECTRA["wide, flat"]()
    ((u, s, v),) = decompose.decompose([m[None]], RANK)
    x = torch.randn(200, m.shape[1])
    right = x.double() @ v[0].double()
    direct = (x @ v[0] - right).norm() / right.norm()
    read = ((x @ m.mT) @ u[0] / s - right).norm() / right.norm()
    assert float(direct) > 1e-9 and float(read) < 8 * float(direct)


def test_the_same_weights_have_the_same_factors_and_nobody_s_seed_is_used() -> None:
    torch.manual_seed(11)
    m = torch.randn(1, N, N)
    state = torch.get_rng_state()
    (first,) = decompose.decompose([m], RANK)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    (second,) = decompose.decompose([m], RANK)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_matrices_keep_their_order_and_only_few_are_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(13)
    sizes: list[int] = []
    batched = decompose._batched

    def spied(stack: Tensor, rank: decompose.Rank) -> object:
        sizes.append(stack.numel())
        return batched(stack, rank)

    monkeypatch.setattr(decompose, "_batched", spied)
    monkeypatch.setattr(decompose, "TOGETHER", 100)
    shapes = [(1, 5, 7), (1, 20, 20), (1, 5, 7), (1, 5, 7), (2, 5, 7), (1, 20, 20), (1, 5, 7), (1, 3, 3)]
    matrices = [torch.randn(shape) for shape in shapes]
    factored = decompose.decompose(iter(matrices), 3)
    assert sorted(sizes) == [9, 35, 70, 105, 400, 400]
    for m, factors in zip(matrices, factored, strict=True):
        check(m, factors, 3, 1e-6)


def test_a_model_whose_weights_are_iterated_is_folded_back_exactly(found: list[bool]) -> None:
    torch.manual_seed(14)
    net = nn.Sequential(nn.Linear(300, N), nn.Tanh(), nn.Linear(N, 300))
    before = [p.detach().clone() for p in net.parameters()]
    shifts = SpectralShifts.of(net, RANK)
    assert found == [True, True]
    shifts.refresh()
    net(torch.randn(3, 300)).pow(2).sum().backward()
    shifts.collect()
    gradients = [delta.grad for delta in shifts.deltas]
    assert all(g is not None and bool(g.any()) for g in gradients)
    shifts.fold()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_of_torch_does_not_matter(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    m = torch.randn(1, N, 300)
    want = decompose.decompose([m], RANK)[0]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = decompose.decompose([m], RANK)[0]
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(found, want):
        assert a.dtype == b.dtype and torch.equal(a, b)
