"""A graph is verified on its first batches, and then no more: also where a batch size leaves two layouts alike."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastfip.fisher import backward_with_fisher, fisher_diagonal
from fastfip.fisher.graph import verify
from fastfip.fisher.trace import fisher_trace
from fastfip.testing import nets
from fastfip.testing.definitions import loop_diagonal, loop_trace, worst_error


class Token(nn.Module):
    """Only token 0 of T = 5 reaches the classes, and 5 = 1 modulo 4: rows 0, 5, 10, 15 fit both orders of 20."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(F.relu(self.layer(x))[:, 0])


@pytest.fixture
def verified(monkeypatch):
    """A list with an entry for each verification."""
    calls, real = [], verify._verified
    monkeypatch.setattr(verify, "_verified", lambda *a, **k: calls.append(1) or real(*a, **k))
    return calls


def test_an_ambiguous_batch_size_is_verified_once(verified):
    model, x, y = Token().double().eval(), torch.randn(4, 5, 3, dtype=torch.float64), torch.randint(0, 4, (4,))
    for _ in range(3):
        got = fisher_trace(model, x, y)
    assert len(verified) == 1
    torch.testing.assert_close(got, loop_trace(model, (x, y), 4))


def test_two_samples_alone_leave_it_open_until_another_size_settles_it(verified):
    model = Token().double().eval()
    for n in (2, 3, 2, 4, 2, 3):
        x, y = torch.randn(n, 5, 3, dtype=torch.float64), torch.randint(0, 4, (n,))
        torch.testing.assert_close(fisher_trace(model, x, y), loop_trace(model, (x, y), n))
    assert len(verified) == 2


class TimeFirst(Token):
    """The same with its samples in the second axis: the middle one of three tokens fits both orders for two samples."""

    def forward(self, x):
        return self.head(F.relu(self.layer(x.transpose(0, 1)))[x.shape[1] // 2])


def test_samples_in_the_second_axis_are_found_after_a_batch_that_fits_both_orders(verified):
    model = TimeFirst().double().eval()
    for n in (2, 3, 4):
        x, y = torch.randn(n, 3, 3, dtype=torch.float64), torch.randint(0, 4, (n,))
        torch.testing.assert_close(fisher_trace(model, x, y), loop_trace(model, (x, y), n))


@pytest.mark.parametrize("samples", [2, 4, 8, 16, 32])
def test_a_class_token_before_64_patches_is_verified_once(verified, samples):
    """65 = 1 modulo each of the sizes: in the last block rows 0, 65, 130 ... alone have a gradient."""
    model = nets.randomize_norms(nets.ViT(4, size=16, patch=2, dim=6, depth=2, heads=1)).double().eval()
    x, y = torch.randn(samples, 3, 16, 16, dtype=torch.float64), torch.randint(0, 4, (samples,))
    for _ in range(2):
        backward_with_fisher(F.cross_entropy(model(x), y, reduction="none"), model)
    assert len(verified) == 1
    few = (x[:3], y[:3]) if samples > 2 else (x.repeat(2, 1, 1, 1)[:3], y.repeat(2)[:3])
    want = loop_diagonal(model, few, len(few[1]))  # what was found holds for other sizes
    assert worst_error(fisher_diagonal(model, few), want, 1e-12) < 1e-10 and len(verified) == 1


def test_a_verification_walks_backward_three_times(monkeypatch):
    """Weighted losses, one sample's loss, and plain losses, on whose way the two others are compared."""
    model = nets.randomize_norms(nets.ViT(4, size=8, patch=4, dim=6, depth=1, heads=1)).eval()
    x, y = torch.randn(4, 3, 8, 8), torch.randint(0, 4, (4,))
    walks, real = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: walks.append(1) or real(*a, **k))
    counts = []
    for _ in range(2):
        walks.clear()
        backward_with_fisher(F.cross_entropy(model(x), y, reduction="none"), model)
        counts.append(len(walks))
    assert counts == [4, 1]


@pytest.mark.parametrize("samples", [5, 40])
def test_arithmetic_in_sixteen_bits_keeps_the_rules(samples):
    """Rounding must not pass for coupling: 40 samples have more weights than there are powers of two."""
    torch.manual_seed(0)
    model = nets.randomize_norms(nets.ViT(4, size=8, patch=4, dim=6, depth=2, heads=1)).eval()
    x, y = torch.randn(samples, 3, 8, 8), torch.randint(0, 4, (samples,))
    want = fisher_diagonal(model, (x, y))
    with torch.autocast("cpu", torch.bfloat16):
        got = fisher_diagonal(model, (x, y))
    assert got.coverage == want.coverage and "loop" not in str(got.coverage)
    half = fisher_diagonal(model.bfloat16(), (x.bfloat16(), y))
    assert "loop" not in str(half.coverage)


class Pair(nn.Module):
    """Sample `into` also sees a little of sample `of`; the others are on their own."""

    def __init__(self, share, of, into):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        self.share, self.of, self.into = share, of, into

    def forward(self, x):
        h = torch.tanh(self.a(x))
        if len(x) > max(self.of, self.into):
            mixed = h[self.into] + self.share * h[self.of]
            h = torch.cat([h[: self.into], mixed[None], h[self.into + 1 :]])
        return self.b(h)


@pytest.mark.parametrize(("share", "of", "into"), [(0.3, 3, 7), (0.02, 150, 20), (-0.1, 199, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_coupled_samples_among_two_hundred_are_noticed(share, of, into, dtype):
    model = Pair(share, of, into).to(dtype)
    x, y = torch.randn(200, 4, dtype=dtype), torch.randint(0, 3, (200,))
    got = fisher_diagonal(model, (x, y))
    want = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for loss in F.cross_entropy(model(x), y, reduction="none"):
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        for value, g in zip(want.values(), gradients):
            value += g.square() / 200
    assert got.coverage["a.weight"] == "per-sample loop" and got.coverage["b.weight"] == "linear"
    assert worst_error(got, want) < (1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 15), (torch.float16, 11)])
def test_most_pairs_are_noticed_in_sixteen_bits_too(dtype, least):
    """Two of 200 samples that see each other have the same weight in one case of 16, and of 4."""
    torch.manual_seed(0)
    noticed = 0
    for _ in range(17):
        of, into = torch.randperm(200)[:2].tolist()
        x, y = torch.randn(200, 4, dtype=dtype), torch.randint(0, 3, (200,))
        noticed += "loop" in fisher_diagonal(Pair(0.3, of, into).to(dtype), (x, y)).coverage["a.weight"]
    assert noticed >= least


def test_another_use_of_the_same_net_is_verified_anew() -> None:
    """The graphs differ in one axis alone; what was found of the first must not be taken for the second."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(3, 4), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor, time: int) -> torch.Tensor:
            return self.out(torch.tanh(self.inner(x))).mean(time)

    net = Net().double()
    x, y = torch.randn(4, 8, 3, dtype=torch.float64), torch.randint(0, 5, (4,))
    first = fisher_diagonal(net, [(x, y)], forward=lambda m, b: m(b[0], 1))
    second = fisher_diagonal(net, [(x, y)], forward=lambda m, b: m(b[0].transpose(0, 1).contiguous(), 0))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value)
