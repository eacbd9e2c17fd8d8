"""The trace's gradient by per-sample shifts and by signs, against `exact`; every layer, every use, every refusal."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tests.support.fisher_problems as problems
import tests.support.fisher_uses as uses
from fastfip.data import Task
from fastfip.fisher import fisher_trace
from fastfip.fisher.differences.perturb import Uncovered, perturbed
from fastfip.fisher.differences.signs import signed
from fastfip.fisher.graph.plan import selected
from fastfip.testing import nets
from fastfip.testing.definitions import loop_gradients, loop_trace, relative_error, worst_error

N, C = 6, 4


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, C)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        y = self.norm(x)
        return self.head((x + self.attention(y, y, y, need_weights=False)[0]).mean(1))


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, C))


def conv_net():
    """Maps large and small: gradients kept whole, and by their factors."""
    first = [nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), nn.LayerNorm((8, 8)), nn.Conv2d(4, 16, 3, stride=2), nn.GELU()]
    return nn.Sequential(*first, nn.Conv2d(16, 24, 3, padding=1, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(96, C))


SMOOTH = {
    "mlp": (mlp, (5,)),
    "conv": (conv_net, (3, 8, 8)),
    "vit": (lambda: nets.ViT(C, size=8, dim=8, depth=2, heads=2), (3, 8, 8)),
    "mha": (Attention, (5, 8)),
}


def problem(name, dtype=torch.float64):
    torch.manual_seed(0)
    make, shape = SMOOTH[name]
    model = nets.randomize_norms(make()).to(dtype).eval()
    return model, torch.randn(N, *shape, dtype=dtype), torch.randint(0, C, (N,))


def gradient(value, params):
    found = torch.autograd.grad(value, list(params.values()), allow_unused=True)
    return {k: torch.zeros_like(p) if g is None else g for (k, p), g in zip(params.items(), found)}


def filled(gradients, params):
    return {k: gradients.get(k, torch.zeros_like(p)) for k, p in params.items()}


def flat(gradients):
    return torch.cat([g.detach().double().flatten() for g in gradients.values()])


@pytest.mark.parametrize("name", SMOOTH)
def test_three_ways_of_one_gradient(name):
    """`exact` is the per-sample loop's, central `perturb` is `exact`, to 1e-6 and better."""
    model, x, y = problem(name)
    params = selected(model, None)
    exact = fisher_trace(model, x, y)
    want = gradient(exact, params)
    assert worst_error(want, gradient(loop_trace(model, (x, y), N), params), 1e-9) < 1e-8
    found = perturbed(model, (x, y), Task(), params, difference="central")
    torch.testing.assert_close(found.trace, exact.detach(), rtol=1e-10, atol=0)
    assert worst_error(filled(found.gradient, params), want, 1e-3) < 1e-6
    forward = perturbed(model, (x, y), Task(), params)
    assert worst_error(filled(forward.gradient, params), want, 1e-3) < 1e-4
    mean = gradient(F.cross_entropy(model(x), y), params)
    assert worst_error(filled(forward.mean_gradient, params), mean, 1e-9) < 1e-9


@pytest.mark.parametrize("name", SMOOTH)
def test_the_error_falls_with_the_step(name):
    """O(h) and O(h^2): the difference quotient of the right thing, not something near it."""
    model, x, y = problem(name)
    params = selected(model, None)
    want = flat(gradient(fisher_trace(model, x, y), params))
    for difference, ratio in (("forward", 10), ("central", 100)):
        coarse, fine = (
            relative_error(flat(perturbed(model, (x, y), Task(), params, difference=difference, step=h).gradient), want)
            for h in (1e-4, 1e-5)
        )
        assert 0.5 * ratio < coarse / fine < 2 * ratio


@pytest.mark.parametrize("name", SMOOTH)
def test_default_step_in_float32(name):
    model, x, y = problem(name)
    want = flat(gradient(fisher_trace(model, x, y), selected(model, None)))
    model = model.float()
    for difference, tolerance in (("forward", 3e-2), ("central", 3e-3)):
        found = perturbed(model, (x.float(), y), Task(), selected(model, None), difference=difference)
        assert relative_error(flat(found.gradient), want) < tolerance


@pytest.mark.parametrize("name", SMOOTH)
def test_under_autocast(name):
    model, x, y = problem(name)
    want = flat(gradient(fisher_trace(model, x, y), selected(model, None)))
    model, x = model.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = perturbed(model, (x, y), Task(), selected(model, None), difference="central")
    assert found.logits.dtype == torch.bfloat16
    assert relative_error(flat(found.gradient), want) < 0.4


#: Uses that have per-sample gradients of a kind that cannot be shifted, or none: they must be refused by name.
REFUSED = {
    "bilinear", "prelu", "prelu-one", "weight-norm", "spectral-norm", "orthogonal", "mha-bias-kv", "lstm",
    "lstm-bidirectional-time-first", "lstm-projected", "gru", "rnn", "gru-cell", "lstm-cell", "linear-and-transposed",
    "conv-twice", "tied-language-model", "scalars", "matrix-on-the-left", "einsum", "einsum-heads", "scaled-weight",
    "masked-weight", "low-rank-weight", "overlapping-slices", "bert-positions", "t5-bias", "index-select",
    "swin-windows", "checkpoint", "unknown-operation", "unknown-operation-first", "unfold-and-product",
    "broadcast-by-an-unknown-operation", "response-norm",
}  # fmt: skip
ALL = {**problems.LAYERS, **uses.USES}


def to_double(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: to_double(v) for k, v in value.items()}
    return tuple(to_double(v) for v in value) if isinstance(value, (tuple, list)) else value


@pytest.mark.parametrize("name", [name for name in ALL if name != "embedding-bag"])
def test_every_layer_and_use(name):
    """Either right, or refused by name: a part that silently stays where it is would be a wrong gradient."""
    torch.manual_seed(0)
    made = ALL[name]()
    model, batch = made.model.double(), to_double(made.batch)
    params = selected(model, None)
    try:
        found = perturbed(model, batch, made.task, params, difference="central")
    except Uncovered as error:
        assert name in REFUSED, f"{error} (name {name!r} in REFUSED if that is right)"
        assert any(repr(k) in str(error) for k in params) and "way='exact'" in str(error)
        return
    assert name not in REFUSED, f"{name} is shifted now: take it from REFUSED"
    want = gradient(loop_trace(model, batch, made.task.size(batch), made.task), params)
    assert worst_error(filled(found.gradient, params), want, 1e-3) < 1e-5


def test_some_parameters_only():
    model, x, y = problem("vit")
    names = ["cls_token", "blocks.0.norm1.bias", "blocks.1.qkv.weight", "head.bias"]
    names = [name for name in names if name in dict(model.named_parameters())]
    assert len(names) >= 2
    want = gradient(fisher_trace(model, x, y, params=names), selected(model, None))
    found = perturbed(model, (x, y), Task(), selected(model, names), difference="central")
    # The trace is over the chosen parameters; its gradient is given for those.
    assert worst_error(found.gradient, {k: want[k] for k in names}, 1e-3) < 1e-6


def test_whole_and_factors_are_both_met(monkeypatch):
    """The same gradient whether per-sample gradients are kept as they are or by their factors."""
    from fastfip.fisher.differences import shifts

    for name in ("conv", "vit"):
        model, x, y = problem(name)
        params = selected(model, None)
        found = []
        for room in (0.0, 1e9):
            monkeypatch.setattr(shifts, "ROOM", room)
            found.append(perturbed(model, (x, y), Task(), params, difference="central"))
        assert worst_error(filled(found[0].gradient, params), filled(found[1].gradient, params), 1e-3) < 1e-6


def test_the_model_is_as_before():
    model, x, y = problem("vit")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    addresses = [p.data_ptr() for p in model.parameters()]
    versions = [p._version for p in model.parameters()]
    perturbed(model, (x, y), Task(), selected(model, None))
    signed(model, (x, y), Task(), selected(model, None))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.data_ptr() for p in model.parameters()] == addresses and all(p.grad is None for p in model.parameters())
    assert [p._version for p in model.parameters()] == versions


def test_signs_are_unbiased():
    """The mean of 1,000 draws is the gradient of the trace, within three standard errors of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3)).double()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(0, 3, (4,))
    params = selected(model, None)
    exact = fisher_trace(model, x, y)
    want = flat(gradient(exact, params))
    generator = torch.Generator().manual_seed(1)
    draws = [signed(model, (x, y), Task(), params, difference="central", generator=generator) for _ in range(1000)]
    for values, target in (
        (torch.stack([d.trace for d in draws])[:, None], exact.detach()[None]),
        (torch.stack([flat(d.gradient) for d in draws]), want),
    ):
        spread = values.std(0) / len(draws) ** 0.5
        assert ((values.mean(0) - target).norm() <= 3 * spread.norm()) and spread.norm() > 0
    assert (torch.stack([flat(d.gradient) for d in draws]).mean(0) - want).norm() < 0.2 * want.norm()


def test_one_draw_of_signs_is_exact_for_its_signs():
    model, x, y = problem("mlp")
    params = selected(model, None)
    found = signed(model, (x, y), Task(), params, difference="central", generator=torch.Generator().manual_seed(3))
    e = torch.randint(0, 2, (N,), generator=torch.Generator().manual_seed(3)).double() * 2 - 1
    total = (e * F.cross_entropy(model(x), y, reduction="none")).sum() / N**0.5
    g = torch.autograd.grad(total, list(params.values()), create_graph=True)
    norm = sum(v.square().sum() for v in g)
    torch.testing.assert_close(found.trace, norm.detach())
    assert worst_error(found.gradient, gradient(norm, params), 1e-3) < 1e-6


def test_kinks_break_differences_and_not_exact():
    """Why piecewise-linear nets get `exact`: a smaller step makes it worse, in any precision."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 5)).double()
    x, y = torch.randn(64, 50, dtype=torch.float64), torch.randint(0, 5, (64,))
    params = selected(model, None)
    want = flat(gradient(fisher_trace(model, x, y), params))
    assert relative_error(want, flat(gradient(loop_trace(model, (x, y), 64), params))) < 1e-9
    sizes = [
        flat(perturbed(model, (x, y), Task(), params, step=step).gradient).norm() / want.norm()
        for step in (1e-3, 1e-4, 1e-5)
    ]
    assert 1.1 < sizes[0] < sizes[1] < sizes[2] and sizes[2] > 3


def test_norms_are_those_of_single_samples():
    model, x, y = problem("conv")
    each = loop_gradients(model, (x, y), N)
    want = torch.stack([sum(v.square().sum() for v in g.values()) for g in each]).mean()
    torch.testing.assert_close(perturbed(model, (x, y), Task(), selected(model, None)).trace, want)
