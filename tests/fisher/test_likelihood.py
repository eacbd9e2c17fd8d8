"""Likelihoods: labels drawn from what the outputs stand for, `exact` in closed form, and what is refused.

The oracles are loops over single samples written by hand, in float64, with the score function of each distribution.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastfip.errors import ConfigError, DataError
from fastfip.fisher import Bernoulli, Categorical, Gaussian, fisher_diagonal
from fastfip.testing.definitions import worst_error

N = 6


def of_scores(model, scores):
    """sum of weight * score^2 over (weight, scalar log-likelihood), divided by N: the expectation, term by term."""
    out = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for weight, log_p in scores:
        gradients = torch.autograd.grad(log_p, list(model.parameters()), retain_graph=True)
        for value, g in zip(out.values(), gradients):
            value += weight * g.square() / N
    return out


def segmenter():
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.Tanh(), nn.Conv2d(3, 4, 1)).double()  # C = W = 4


class Words(nn.Module):
    """A language model: a prediction at each token, [N, T, V]."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 5), nn.Linear(5, 7)

    def forward(self, ids):
        return self.head(torch.tanh(self.table(ids)))


def words():
    """Sequences of 2 to 7 tokens, padded with -100 in the labels."""
    model, ids = Words().double(), torch.randint(0, 7, (N, 7))
    y = torch.randint(0, 7, (N, 7))
    for n in range(N):
        y[n, 2 + n :] = -100
    return model, ids, y


def test_logistic_regression_is_p_one_minus_p_x_squared():
    model, x = nn.Linear(3, 1).double(), torch.randn(N, 3, dtype=torch.float64)
    y = torch.randint(0, 2, (N,)).double()
    p = model(x).detach().sigmoid()[:, 0]
    want = {"weight": torch.zeros(1, 3).double(), "bias": torch.zeros(1).double()}
    for n in range(N):
        want["weight"] += p[n] * (1 - p[n]) * x[n].square() / N
        want["bias"] += p[n] * (1 - p[n]) / N
    got = fisher_diagonal(model, (x, y), kind="exact", likelihood="bernoulli")
    assert worst_error(got, want) < 1e-12 and got.n == N

    def loss(z, batch):
        return F.binary_cross_entropy_with_logits(z[:, 0], batch[1], reduction="none")

    many = (x.repeat(4000, 1), y.repeat(4000))
    drawn = fisher_diagonal(model, many, kind="mc", likelihood="bernoulli", loss=loss)
    assert worst_error(drawn, want) < 0.03  # its expectation; the seed decides
    again = fisher_diagonal(model, (x, y), kind="mc", likelihood="bernoulli", seed=1)
    other = fisher_diagonal(model, (x, y), kind="mc", likelihood="bernoulli", seed=2)
    assert not torch.equal(again["weight"], other["weight"])


def test_several_labels_at_once():
    model, x = nn.Linear(3, 4).double(), torch.randn(N, 3, dtype=torch.float64)
    y = torch.randint(0, 2, (N, 4))
    y[2, 1] = -100
    z = model(x)
    scores = [
        (p, F.logsigmoid(sign * z[n, k]))
        for n in range(N)
        for k in range(4)
        if y[n, k] != -100
        for sign, p in ((1, z[n, k].sigmoid().detach()), (-1, (-z[n, k]).sigmoid().detach()))
    ]
    assert (
        worst_error(fisher_diagonal(model, (x, y), kind="exact", likelihood="bernoulli"), of_scores(model, scores))
        < 1e-12
    )
    drawn = Bernoulli().draw(z, y, torch.Generator().manual_seed(0))
    assert drawn[2, 1] == -100 and set(drawn[y != -100].tolist()) == {0, 1} and drawn.dtype == y.dtype


def test_regression_by_its_own_noise():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(N, 3, dtype=torch.float64), torch.randn(N, 2, dtype=torch.float64)
    z = model(x)
    want = of_scores(model, [(1.0, z[n, k]) for n in range(N) for k in range(2)])
    assert worst_error(fisher_diagonal(model, (x, y), kind="exact", likelihood="gaussian"), want) < 1e-12
    wide = fisher_diagonal(model, (x, y), kind="exact", likelihood=Gaussian(variance=4.0))
    assert worst_error(wide, {k: v / 4 for k, v in want.items()}) < 1e-12

    def loss(z, batch):
        return 0.5 * (z - batch[1]).square().sum(1)

    many = (x.repeat(3000, 1), y.repeat(3000, 1))
    drawn = fisher_diagonal(model, many, kind="mc", likelihood="gaussian", loss=loss)
    assert worst_error(drawn, want) < 0.05
    data = fisher_diagonal(model, (x, y), likelihood="gaussian")
    assert worst_error(data, fisher_diagonal(model, (x, y), loss=loss)) < 1e-12


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_tokens_that_do_not_count_stay_out(reduction):
    model, ids, y = words()
    log_p = model(ids).log_softmax(-1)
    count = (y != -100).sum(1) if reduction == "mean" else torch.ones(N)
    scores = [
        (log_p[n, t, c].exp().detach() / count[n] ** 2, log_p[n, t, c])
        for n in range(N)
        for t in range(7)
        if y[n, t] != -100
        for c in range(7)
    ]
    likelihood = Categorical(reduction=reduction, axis=-1)
    got = fisher_diagonal(model, (ids, y), kind="exact", likelihood=likelihood)
    assert worst_error(got, of_scores(model, scores)) < 1e-12

    def loss(z, batch):
        each = F.cross_entropy(z.transpose(1, 2), batch[1], reduction="none")
        return each.sum(1) / (count if reduction == "mean" else 1)

    drawn = likelihood.draw(model(ids), y, torch.Generator().manual_seed(3))
    assert ((drawn == -100) == (y == -100)).all()
    mc = fisher_diagonal(model, (ids, y), kind="mc", likelihood=likelihood, loss=loss, seed=3)
    assert worst_error(mc, fisher_diagonal(model, (ids, drawn), loss=loss)) < 1e-12
    assert worst_error(mc, fisher_diagonal(model, (ids, y), kind="mc", likelihood=likelihood, seed=3)) < 1e-12


def test_segmentation_has_its_classes_in_axis_one_also_where_c_is_w():
    model, x = segmenter(), torch.randn(N, 2, 4, 4, dtype=torch.float64)
    y = torch.randint(0, 4, (N, 4, 4))
    with pytest.raises(DataError, match=r"axis=1.*axis=-1"):
        fisher_diagonal(model, (x, y), kind="exact", likelihood="categorical")
    log_p = model(x).log_softmax(1)
    scores = [
        (log_p[n, c, i, j].exp().detach(), log_p[n, c, i, j])
        for n in range(N)
        for c in range(4)
        for i in range(4)
        for j in range(4)
    ]
    want = of_scores(model, scores)
    got = fisher_diagonal(model, (x, y), kind="exact", likelihood=Categorical(axis=1))
    assert worst_error(got, want) < 1e-12
    many = (x.repeat(300, 1, 1, 1), y.repeat(300, 1, 1))
    drawn = fisher_diagonal(model, many, kind="mc", likelihood=Categorical(axis=1))
    assert worst_error(drawn, want) < 0.1
    wrong = fisher_diagonal(model, (x, y), kind="exact", likelihood=Categorical(axis=3))
    assert worst_error(wrong, want) > 0.1


def test_a_softmax_over_the_pixels_classes_is_one_line():
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Softmax(1))
    with pytest.raises(DataError, match="softmax inside the model"):
        fisher_diagonal(net, (torch.randn(N, 2, 4, 5), torch.randint(0, 3, (N, 4, 5))), likelihood="categorical")


def test_the_class_axis_is_found_where_the_labels_tell_it():
    z, y = torch.randn(2, 3, 5), torch.randint(0, 3, (2, 5))
    torch.testing.assert_close(Categorical().losses(z, y), F.cross_entropy(z, y, reduction="none").sum(1))
    torch.testing.assert_close(Categorical().losses(z.transpose(1, 2), y), Categorical().losses(z, y))


def test_likeliest_classes_of_each_position():
    model, ids, y = words()
    every = fisher_diagonal(model, (ids, y), kind="exact", likelihood=Categorical(axis=-1))
    assert (
        worst_error(fisher_diagonal(model, (ids, y), kind="exact", likelihood=Categorical(axis=-1), top_k=7), every)
        < 1e-12
    )
    log_p = model(ids).log_softmax(-1)
    scores = [
        (log_p[n, t, c].exp().detach(), log_p[n, t, c])
        for n in range(N)
        for t in range(7)
        if y[n, t] != -100
        for c in log_p[n, t].topk(2).indices
    ]
    two = fisher_diagonal(model, (ids, y), kind="exact", likelihood=Categorical(axis=-1), top_k=2)
    assert worst_error(two, of_scores(model, scores)) < 1e-12


class Probabilities(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).softmax(1)


@pytest.mark.parametrize("kind", ["empirical", "mc", "exact"])
def test_a_net_that_returns_probabilities(kind):
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x, y = torch.randn(N, 3, dtype=torch.float64), torch.randint(0, 4, (N,))
    want = {f"net.{k}": v for k, v in fisher_diagonal(net, (x, y), kind=kind).items()}
    got = fisher_diagonal(Probabilities(net), (x, y), kind=kind)
    assert worst_error(got, want) < 1e-12
    named = fisher_diagonal(Probabilities(net), (x, y), kind=kind, likelihood="categorical")
    assert worst_error(named, want) < 1e-12

    def loss(p, batch):  # a user who knows about it
        return F.nll_loss(p.log(), batch[1], reduction="none")

    own = fisher_diagonal(Probabilities(net), (x, y), kind=kind, likelihood="categorical", loss=loss)
    assert worst_error(own, want) < 1e-12


def test_exact_with_a_loss_of_the_users_walks_through_the_classes():
    net, x = nn.Linear(3, 4).double(), torch.randn(N, 3, dtype=torch.float64)
    y = torch.randint(0, 4, (N,))

    def loss(z, batch):
        return F.cross_entropy(z, batch[1], reduction="none")

    got = fisher_diagonal(net, (x, y), kind="exact", likelihood="categorical", loss=loss)
    assert worst_error(got, fisher_diagonal(net, (x, y), kind="exact")) < 1e-12


def test_labels_by_the_users_own_hand():
    """Next tokens: the loss shifts, so only its author knows which outputs a label belongs to."""
    model, ids, _ = words()

    def loss(z, batch):
        return F.cross_entropy(z[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none").sum(1)

    def sample(z, batch, generator):
        p = z[:, :-1].softmax(-1).reshape(-1, 7)
        return torch.cat([batch["labels"][:, :1], torch.multinomial(p, 1, generator=generator).reshape(N, 6)], 1)

    batch = {"ids": ids, "labels": ids}
    options = {"forward": lambda m, b: m(b["ids"]), "loss": loss}
    got = fisher_diagonal(model, [batch], kind="mc", sample=sample, seed=5, **options)
    drawn = sample(model(ids), batch, torch.Generator().manual_seed(5))
    want = fisher_diagonal(model, [{"ids": ids, "labels": drawn}], **options)
    assert worst_error(got, want) < 1e-12


def squared(z, batch):
    return (z - batch[1]).square().sum(1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "mc", "loss": squared}, "likelihood='categorical', 'bernoulli' or 'gaussian', or sample="),
        ({"kind": "exact", "loss": squared}, "likelihood='categorical', 'bernoulli' or 'gaussian'"),
        ({"kind": "exact", "loss": squared, "likelihood": "gaussian"}, "leave out loss="),
        ({"kind": "exact", "loss": squared, "likelihood": "bernoulli"}, "leave out loss="),
        ({"kind": "exact", "sample": lambda *a: a}, "kind='mc'"),
        ({"kind": "mc", "sample": lambda *a: a, "likelihood": "gaussian"}, "leave out likelihood="),
        ({"kind": "mc", "sample": 3}, "must be a function"),
        ({"kind": "exact", "likelihood": "gaussian", "top_k": 2}, "categorical likelihood"),
        ({"likelihood": "gaussian", "temperature": 2.0}, "variance"),
        ({"likelihood": "categoric"}, "did you mean 'categorical'"),
        ({"likelihood": "gaussian", "label_smoothing": 0.1}, "label_smoothing"),
    ],
)
def test_combinations_without_a_meaning_are_one_line(options, says):
    model, x = nn.Linear(3, 2), torch.randn(N, 3)
    with pytest.raises(ConfigError) as error:
        fisher_diagonal(model, (x, torch.randn(N, 2)), **options)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("likelihood", "y", "says"),
    [
        ("categorical", torch.zeros(N, 2), "integer labels"),
        (Categorical(axis=5), torch.zeros(N).long(), "axis=5"),
        ("categorical", torch.full((N,), 7), "outside 0..1"),
        ("bernoulli", torch.zeros(N, 3), "a label for each output"),
        ("bernoulli", torch.full((N, 2), 3.0), "0 and 1"),
        ("gaussian", torch.zeros(N, 3), "a label for each output"),
    ],
)
def test_labels_that_do_not_fit_are_one_line(likelihood, y, says):
    with pytest.raises(DataError) as error:
        fisher_diagonal(nn.Linear(3, 2), (torch.randn(N, 3), y), likelihood=likelihood)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_settings_out_of_range():
    with pytest.raises(ConfigError, match="reduction"):
        Categorical(reduction="max")
    with pytest.raises(ConfigError, match="variance"):
        Gaussian(variance=0.0)
