"""fisher_diagonal: kinds of labels, data, options, refusals, and that the model is left alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastfip.data import Task
from fastfip.errors import ConfigError, DataError, ModelError
from fastfip.fisher import FisherDiagonal, draw_labels, eval_mode, fisher_diagonal
from fastfip.fisher.graph import verify as verify_module
from fastfip.testing import nets
from fastfip.testing.definitions import loop_diagonal, worst_error

N, C = 7, 4


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nets.randomize_norms(
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ELU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(27, C))
    )
    return model.double().eval(), torch.randn(N, 2, 5, 5, dtype=torch.float64), torch.randint(0, C, (N,))


def test_batches_do_not_matter(problem):
    model, x, y = problem
    want = loop_diagonal(model, (x, y), N)
    for data in (
        (x, y),
        [(x[:4], y[:4]), (x[4:], y[4:])],
        DataLoader(TensorDataset(x, y), batch_size=2),
        TensorDataset(x, y),
    ):
        got = fisher_diagonal(model, data)
        assert isinstance(got, FisherDiagonal) and got.n == N and got.kind == "empirical"
        assert worst_error(got, want) < 1e-10


def test_one_sample_at_a_time(problem):
    model, x, y = problem
    want = loop_diagonal(model, (x, y), N)
    assert worst_error(fisher_diagonal(model, [(x[n : n + 1], y[n : n + 1]) for n in range(N)]), want) < 1e-10


def test_exact_is_the_expectation_over_the_models_own_labels(problem):
    model, x, y = problem
    p = model(x).softmax(1).detach()
    want = {k: torch.zeros_like(v) for k, v in model.named_parameters()}
    for n in range(N):
        for c in range(C):
            one = loop_diagonal(model, (x[n : n + 1], torch.tensor([c])), 1)
            for k in want:
                want[k] += p[n, c] * one[k] / N
    got = fisher_diagonal(model, (x, y), kind="exact")
    assert worst_error(got, want) < 1e-10 and got.kind == "exact"
    assert worst_error(fisher_diagonal(model, (x, y), kind="exact", top_k=C), want) < 1e-10
    assert worst_error(fisher_diagonal(model, (x, y), kind="exact", top_k=100), want) < 1e-10


def test_top_k_takes_each_samples_likeliest_classes(problem):
    model, x, y = problem
    p, order = model(x).softmax(1).detach().sort(1, descending=True)
    want = {k: torch.zeros_like(v) for k, v in model.named_parameters()}
    for n in range(N):
        for rank in range(2):
            one = loop_diagonal(model, (x[n : n + 1], order[n, rank : rank + 1]), 1)
            for k in want:
                want[k] += p[n, rank] * one[k] / N
    assert worst_error(fisher_diagonal(model, (x, y), kind="exact", top_k=2), want) < 1e-10


def test_mc_draws_labels_from_the_model_with_a_seed(problem):
    model, x, y = problem
    drawn = draw_labels(model(x), torch.Generator().manual_seed(3))
    got = fisher_diagonal(model, (x, y), kind="mc", seed=3)
    assert worst_error(got, loop_diagonal(model, (x, drawn), N)) < 1e-10
    again, other = fisher_diagonal(model, (x, y), kind="mc", seed=3), fisher_diagonal(model, (x, y), kind="mc", seed=4)
    assert all(torch.equal(got[k], again[k]) for k in got)
    assert any(not torch.equal(got[k], other[k]) for k in got)


def test_drawn_labels_follow_the_distribution():
    z = torch.tensor([[0.0, 1.0, 2.0]]).repeat(20000, 1)
    share = torch.bincount(draw_labels(z, torch.Generator().manual_seed(0)), minlength=3) / 20000
    torch.testing.assert_close(share, z[0].softmax(0), atol=0.015, rtol=0)


def test_temperature_and_label_smoothing(problem):
    model, x, y = problem
    cold = Task.of(loss=lambda z, b: F.cross_entropy(z / 2.5, b[1], reduction="none"))
    assert worst_error(fisher_diagonal(model, (x, y), temperature=2.5), loop_diagonal(model, (x, y), N, cold)) < 1e-10
    soft = Task.of(loss=lambda z, b: F.cross_entropy(z, b[1], reduction="none", label_smoothing=0.1))
    assert (
        worst_error(fisher_diagonal(model, (x, y), label_smoothing=0.1), loop_diagonal(model, (x, y), N, soft)) < 1e-10
    )


def test_hooks(problem):
    model, x, y = problem
    data = [{"picture": x, "name": ["a"] * N, "y": y}]
    got = fisher_diagonal(model, data, forward=lambda m, b: m(b["picture"]))
    assert worst_error(got, loop_diagonal(model, (x, y), N)) < 1e-10


def test_selected_parameters(problem):
    model, x, y = problem
    want = loop_diagonal(model, (x, y), N)
    got = fisher_diagonal(model, (x, y), params=["5.weight", "0.bias"])
    assert list(got) == ["5.weight", "0.bias"] and worst_error(got, {k: want[k] for k in got}) < 1e-10
    model[0].requires_grad_(False)
    got = fisher_diagonal(model, (x, y))
    assert "0.weight" not in got and worst_error(got, {k: want[k] for k in got}) < 1e-10


def test_tied_weights_are_listed_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    batch = (torch.randn(N, 4, dtype=torch.float64), torch.randint(0, 4, (N,)))
    got = fisher_diagonal(model, batch)
    assert list(got) == ["0.weight", "0.bias", "2.bias"] and "2 uses" in got.coverage["0.weight"]
    assert worst_error(got, loop_diagonal(model, batch, N)) < 1e-10


def state(model):
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [m.training for m in model.modules()],
        [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        [len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        {k: type(v) for m in model.modules() for k, v in m.__dict__.items()},
    )


def same(a, b):
    assert a[0].keys() == b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0])
    assert a[1] == b[1] and a[3] == b[3] and a[4] == b[4]
    for (r1, g1), (r2, g2) in zip(a[2], b[2]):
        assert r1 == r2 and (g1 is None) == (g2 is None) and (g1 is None or torch.equal(g1, g2))


def test_the_model_is_left_alone_also_after_an_error(problem):
    model, x, y = problem
    model[0].bias.requires_grad_(False)
    model[3].train()  # a flag that differs from its neighbours'
    model[0].weight.grad = torch.randn_like(model[0].weight)
    before = state(model)
    for kind in ("empirical", "mc", "exact"):
        fisher_diagonal(model, (x, y), kind=kind)
        same(state(model), before)
    calls = []

    def fails(z, batch):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("in the middle")
        return F.cross_entropy(z, batch[1], reduction="none")

    with pytest.raises(RuntimeError, match="in the middle"):
        fisher_diagonal(model, [(x, y), (x, y)], loss=fails)
    same(state(model), before)


def test_works_under_no_grad_and_keeps_the_callers_mode(problem):
    model, x, y = problem
    want = loop_diagonal(model, (x, y), N)
    with torch.no_grad():
        assert worst_error(fisher_diagonal(model, (x, y)), want) < 1e-10
        assert not torch.is_grad_enabled()


def test_batch_norm_in_train_mode_is_refused_with_the_remedy(problem):
    model, x, y = problem
    with pytest.raises(ModelError, match=r"'1' is in train mode.*model.eval\(\)"):
        fisher_diagonal(model.train(), (x, y))
    with eval_mode(model):
        fisher_diagonal(model, (x, y))
    assert all(m.training for m in model.modules())


def test_batch_norm_by_function_is_refused(problem):
    _, x, y = problem
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, C)).double()

    def forward(m, batch):
        return m[2](m[1](F.batch_norm(m[0](batch[0]), None, None, training=True)))

    with pytest.raises(ModelError, match="statistics of the batch"):
        fisher_diagonal(model, (x, y), forward=forward)


def test_batch_norm_without_running_statistics_is_refused(problem):
    _, x, y = problem
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(27, C)
    )
    with pytest.raises(ModelError, match="running statistics"):
        fisher_diagonal(model.double().eval(), (x, y))


def test_active_dropout_is_refused(problem):
    model, x, y = problem
    model[4].train()
    with pytest.raises(ModelError, match=r"dropout '4'.*model.eval\(\)"):
        fisher_diagonal(model, (x, y))


class Coupled(nn.Module):
    """Samples see each other without any BatchNorm: nothing can be separated, and a loop over the losses is exact."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, C)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.b(h - h.mean(0))


def test_coupled_samples_are_noticed():
    torch.manual_seed(0)
    model = Coupled().double()
    x, y = torch.randn(N, 4, dtype=torch.float64), torch.randint(0, C, (N,))
    got = fisher_diagonal(model, (x, y))
    losses = F.cross_entropy(model(x), y, reduction="none")
    want = {k: torch.zeros_like(p) for k, p in model.named_parameters()}
    for loss in losses:
        for (k, _), g in zip(
            model.named_parameters(), torch.autograd.grad(loss, model.parameters(), retain_graph=True)
        ):
            want[k] += g.square() / N
    assert worst_error(got, want) < 1e-10
    assert got.coverage["a.weight"] == got.coverage["a.bias"] == "per-sample loop"
    assert got.coverage["b.weight"] == "linear"


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "true"}, {"temperature": 0.0}, {"label_smoothing": 1.0}, {"top_k": 3}, {"kind": "exact", "top_k": 0},
        {"kind": "mc", "label_smoothing": 0.1},
    ],
)  # fmt: skip
def test_options_that_make_no_sense(problem, options):
    model, x, y = problem
    with pytest.raises(ConfigError):
        fisher_diagonal(model, (x, y), **options)


def test_what_cannot_be_used(problem):
    model, x, y = problem
    with pytest.raises(DataError, match="no samples"):
        fisher_diagonal(model, [])
    with pytest.raises(DataError, match="outside"):
        fisher_diagonal(model, (x, y + C))
    with pytest.raises(ModelError, match="no parameter 'weight'"):
        fisher_diagonal(model, (x, y), params=["weight"])
    frozen = copy.deepcopy(model).requires_grad_(False)
    with pytest.raises(ModelError, match="requires_grad_"):
        fisher_diagonal(frozen, (x, y))
    with pytest.raises(ModelError, match="frozen"):
        fisher_diagonal(frozen, (x, y), params=["5.weight"])
    with pytest.raises(ModelError, match="no graph"):
        fisher_diagonal(model, (x, y), forward=lambda m, b: m(b[0]).detach())


def test_progress_bar(problem, capsys):
    model, x, y = problem
    fisher_diagonal(model, [(x, y)], progress=True)


def test_verification_is_done_once_for_a_graph(problem, monkeypatch):
    model, x, y = problem
    calls = []
    real = verify_module._verified
    monkeypatch.setattr(verify_module, "_verified", lambda *a, **k: calls.append(1) or real(*a, **k))
    fisher_diagonal(model, [(x, y), (x[:5], y[:5]), (x, y)])
    fisher_diagonal(model, [(x, y)])
    assert len(calls) == 1
    fisher_diagonal(model, (x, y), params=["5.weight"])
    assert len(calls) == 2


def test_no_weight_gradient_is_computed(problem, monkeypatch):
    """The price is that of a backward pass: what torch would compute for the weights is not computed as well."""
    model, x, y = problem
    fisher_diagonal(model, (x, y))  # verified
    seen = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        fisher_diagonal(model, (x, y))
    for event in profile.events():
        if event.name == "aten::convolution_backward":
            seen.append(event)
    assert not seen  # the only convolution is the first layer: nothing is asked of it
    assert not [p for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision_models_are_summed_in_float32(dtype):
    torch.manual_seed(0)
    model, x = nets.MLP(6, 8, C).to(dtype), torch.randn(N, 6, dtype=dtype)
    y = torch.randint(0, C, (N,))
    got = fisher_diagonal(model, (x, y))
    want = loop_diagonal(copy.deepcopy(model).double(), (x.double(), y), N)
    assert all(v.dtype == torch.float32 for v in got.values())
    assert worst_error(got, want) < 0.05


def test_autocast():
    torch.manual_seed(0)
    model, x, y = nets.MLP(6, 8, 8, C), torch.randn(N, 6), torch.randint(0, C, (N,))
    want = loop_diagonal(model, (x, y), N)
    with torch.autocast("cpu", torch.bfloat16):
        got = fisher_diagonal(model, (x, y))
    assert worst_error(got, want) < 0.05
    assert set(got.coverage.values()) == {"linear"}


def test_norm_layers_alone_keep_their_rules() -> None:
    """The weights around them, not selected, count as data once an input without a gradient has gone through them."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.ReLU(), torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten()
    ).eval()
    data = [(torch.randn(5, 2, 6, 6), torch.randint(0, 4, (5,)))]
    found = fisher_diagonal(net, data, params=["1.weight", "1.bias"])
    assert set(found.coverage.values()) == {"norm"}
    whole = fisher_diagonal(net, data)
    for name, value in found.items():
        torch.testing.assert_close(value, whole[name])
