"""A graph is verified on its first batches, and then no more: also where a batch size leaves two layouts alike."""

import torch
import torch.nn.functional as F
from torch import nn

from fastfip.fisher import fisher_diagonal
from fastfip.fisher.graph import verify
from fastfip.fisher.trace import fisher_trace
from fastfip.testing.definitions import loop_trace


class Token(nn.Module):
    """Only token 0 of T = 5 reaches the classes, and 5 = 1 modulo 4: rows 0, 5, 10, 15 fit both orders of 20."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(F.relu(self.layer(x))[:, 0])


def test_an_ambiguous_batch_size_is_not_verified_for_ever(monkeypatch):
    calls = []
    verified = verify._verified
    monkeypatch.setattr(verify, "_verified", lambda *a, **k: calls.append(1) or verified(*a, **k))
    model, x, y = Token().double().eval(), torch.randn(4, 5, 3, dtype=torch.float64), torch.randint(0, 4, (4,))
    for _ in range(8):
        got = fisher_trace(model, x, y)
    assert len(calls) == verify._TRIES
    torch.testing.assert_close(got, loop_trace(model, (x, y), 4))


def test_a_batch_of_another_size_settles_it(monkeypatch):
    calls = []
    verified = verify._verified
    monkeypatch.setattr(verify, "_verified", lambda *a, **k: calls.append(1) or verified(*a, **k))
    model = Token().double().eval()
    for n in (4, 3, 4, 4, 3, 4):
        fisher_trace(model, torch.randn(n, 5, 3, dtype=torch.float64), torch.randint(0, 4, (n,)))
    assert len(calls) == 2


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
