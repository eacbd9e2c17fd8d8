"""Where every sample needs a pass of its own, that is all that is done: counted in passes, not in seconds."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from fastfip.fisher import fisher_diagonal
from fastfip.testing.definitions import loop_diagonal, worst_error
from tests.support.fisher_problems import Lambda

N = 6


@pytest.fixture
def walks(monkeypatch):
    """A list with an entry for each walk backward."""
    calls, real = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or real(*a, **k))
    return calls


class Packed(nn.Module):
    """Sequences of their own lengths, packed: rows of different samples lie between each other."""

    def __init__(self):
        super().__init__()
        self.r, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)
        self.runs = 0

    def forward(self, x, lengths):
        self.runs += 1
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.r(packed)[1][0][-1])


def of_lengths(model, batch):
    return model(batch[0], batch[2])


def sequences(seed=0):
    torch.manual_seed(seed)
    x, lengths = torch.randn(N, 7, 3, dtype=torch.float64), torch.randint(2, 8, (N,))
    return x, torch.randint(0, 3, (N,)), lengths


def definition(model, batch):
    """One forward and one backward pass a sample."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(N):
        one = tuple(t[n : n + 1] for t in batch)
        loss = F.cross_entropy(of_lengths(model, one), one[1])
        for value, g in zip(total.values(), torch.autograd.grad(loss, list(model.parameters()))):
            value += g.square() / N
    return total


def test_a_packed_lstm_costs_the_loop_and_one_forward_pass(walks):
    model, batch = Packed().double(), sequences()
    want = definition(model, batch)
    assert worst_error(fisher_diagonal(model, [batch], forward=of_lengths), want) < 1e-10
    walks.clear()
    model.runs = 0
    got = fisher_diagonal(model, [batch], forward=of_lengths)
    assert worst_error(got, want) < 1e-10 and set(got.coverage.values()) == {"per-sample loop"}
    assert len(walks) == N and model.runs == N + 1


def test_a_batch_whose_samples_see_each_other_is_noticed_after_one_whose_do_not():
    """The model is known as one to be looped over; the second batch has a coupling that its first had not."""
    model = Packed().double()

    def forward(m, batch):
        z = of_lengths(m, batch)
        return z if batch[3].sum() == 0 else z - 0.3 * z.mean(0)

    batch = sequences()
    quiet, loud = (*batch, torch.zeros(N)), (*batch, torch.ones(N))
    for _ in range(2):
        assert worst_error(fisher_diagonal(model, [quiet], forward=forward), definition(model, batch)) < 1e-10
    probabilities = forward(model, loud).softmax(1).detach()
    exact = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for c in range(3):
        for p, loss in zip(
            probabilities[:, c], F.cross_entropy(forward(model, loud), torch.full((N,), c), reduction="none")
        ):
            for value, g in zip(exact.values(), torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)):
                value += p * g.square() / N
    assert worst_error(fisher_diagonal(model, [loud], kind="exact", forward=forward), exact) < 1e-10
    for _ in range(2):
        fisher_diagonal(model, [quiet], forward=forward)
    got = fisher_diagonal(model, [loud], forward=forward)
    want = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for loss in F.cross_entropy(forward(model, loud), loud[1], reduction="none"):
        for value, g in zip(want.values(), torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)):
            value += g.square() / N
    assert worst_error(got, want) < 1e-10


def test_a_loss_with_weights_of_its_own_does_not_pass_for_the_graph():
    model, batch = Packed().double(), sequences()
    model.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def loss(z, one):
        return model.scale * F.cross_entropy(z, one[1], reduction="none")

    first = fisher_diagonal(model, [batch], forward=of_lengths, loss=loss)
    second = fisher_diagonal(model, [batch], forward=of_lengths, loss=loss)
    assert worst_error(second, first) < 1e-10 and all(value.any() for value in second.values())


def test_tokens_as_samples_go_through_one_row_at_a_time(walks):
    runs = []
    model = Lambda(
        lambda m, x: runs.append(len(x)) or m.head(torch.cumsum(torch.tanh(m.table(x)), 1)),
        table=nn.Embedding(7, 4), head=nn.Linear(4, 7),
    ).double()  # fmt: skip
    x, y = torch.randint(0, 7, (N, 5)), torch.randint(0, 7, (N, 5))

    def loss(z, batch):
        return F.cross_entropy(z.flatten(0, 1), batch[1].flatten(), reduction="none")

    want = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for one in loss(model(x), (x, y)):
        for value, g in zip(want.values(), torch.autograd.grad(one, list(model.parameters()), retain_graph=True)):
            value += g.square() / (5 * N)
    for _ in range(2):
        runs.clear()
        got = fisher_diagonal(model, (x, y), loss=loss)
        assert worst_error(got, want) < 1e-10 and got.n == 5 * N
    assert all(rows == 1 for rows in runs[1:]) and len(runs) <= N + 1


def test_weight_standardisation_and_sorted_experts_are_exact():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, w / (w.std((1, 2, 3), keepdim=True) + 1e-5), self.bias, self.stride, self.padding)

    class Experts(nn.Module):
        """Tokens sorted by their expert, as fast mixtures do it."""

        def __init__(self):
            super().__init__()
            self.gate, self.w = nn.Linear(4, 2), nn.Parameter(torch.randn(2, 4, 4))
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            rows = x.reshape(-1, 4)
            weight, expert = self.gate(rows).softmax(-1).max(-1)
            order, first = expert.argsort(), int((expert == 0).sum())
            parts = [rows[order[:first]] @ self.w[0], rows[order[first:]] @ self.w[1]]
            back = torch.empty_like(rows).index_copy(0, order, torch.tanh(torch.cat(parts))) * weight[:, None]
            return self.head((rows + back).view_as(x).mean(1))

    nets = [
        (nn.Sequential(Standardised(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)), (2, 5, 5)),
        (Experts(), (5, 4)),
    ]
    for model, shape in nets:
        model = model.double()
        batch = torch.randn(N, *shape, dtype=torch.float64), torch.randint(0, 3, (N,))
        want = loop_diagonal(model, batch, N)
        for _ in range(2):
            assert worst_error(fisher_diagonal(model, batch), want) < 1e-10


def test_a_function_that_the_user_has_compiled_keeps_the_rules():
    model, x, y = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)),
        torch.randn(N, 3),
        torch.randint(0, 3, (N,)),
    )
    compiled = torch.compile(lambda m, batch: m(batch[0]), backend="aot_eager")
    got = fisher_diagonal(model, (x, y), forward=compiled)
    assert set(got.coverage.values()) == {"linear"}
    assert worst_error(got, loop_diagonal(model, (x, y), N)) < 1e-5
