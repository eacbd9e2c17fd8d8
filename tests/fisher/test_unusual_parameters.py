"""Sparse gradients, complex and lazy parameters, gradients that are no derivatives, checkpoints: right, or one line."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastfip
from fastfip.errors import ModelError
from fastfip.fisher import backward_with_fisher, fisher_diagonal, fisher_trace, per_sample_gradients
from fastfip.fisher.sharpness import sharpness
from fastfip.nets.state import fresh_caches
from fastfip.testing.definitions import loop_diagonal, worst_error
from tests.support.fisher_problems import Lambda
from tests.support.small_nets import BiasedAttention

N = 6


def words(**options):
    torch.manual_seed(0)
    model = Lambda(
        lambda m, x: m.head(torch.tanh(m.table(x)).mean(1)), table=nn.Embedding(7, 4, **options), head=nn.Linear(4, 3)
    )
    return model.double(), torch.randint(0, 7, (N, 5)), torch.randint(0, 3, (N,))


def losses_of(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def test_sparse_gradients_of_an_embedding():
    model, x, y = words(sparse=True)
    want = loop_diagonal(words()[0], (x, y), N)
    assert worst_error(fisher_diagonal(model, (x, y)), want) < 1e-12
    total = sum(v.sum() for v in want.values())
    torch.testing.assert_close(fisher_trace(model, x, y).detach(), total)
    for way in ("exact", "perturb"):
        torch.testing.assert_close(fastfip.FisherPenalty(model, way)(x, y).detach(), total)
    fastfip.FisherPenalty(model, "signs")(x, y).backward()
    model.zero_grad()
    for _ in range(2):  # the second adds to a sparse one
        assert worst_error(backward_with_fisher(losses_of(model, x, y), model), want) < 1e-12
    reference = copy.deepcopy(model)
    reference.zero_grad()
    (2 * losses_of(reference, x, y).mean()).backward()
    assert model.table.weight.grad.is_sparse and reference.table.weight.grad.is_sparse
    torch.testing.assert_close(model.table.weight.grad.to_dense(), reference.table.weight.grad.to_dense())
    torch.optim.SparseAdam([model.table.weight]).step()


def test_sparse_gradients_of_a_bag_and_of_coupled_samples():
    torch.manual_seed(0)
    y, x = torch.randint(0, 3, (N,)), torch.randint(0, 7, (N, 5))

    def made(sparse, forward):
        torch.manual_seed(1)
        parts = {"bag": nn.EmbeddingBag(7, 4, mode="sum", sparse=sparse), "head": nn.Linear(4, 3)}
        return Lambda(forward, **parts).double()

    def alone(m, x):
        return m.head(torch.tanh(m.bag(x)))

    def coupled(m, x):
        h = m.bag(x)
        return m.head(torch.tanh(h - h.mean(0)))

    for forward in (alone, coupled):
        a, b = (fisher_diagonal(made(sparse, forward), (x, y)) for sparse in (True, False))
        assert worst_error(a, b) < 1e-12
    with pytest.raises(ModelError, match="set sparse=False"):
        fisher_trace(made(True, alone), x, y)
    torch.testing.assert_close(
        fisher_trace(made(False, alone), x, y).detach(), fisher_diagonal(made(True, alone), (x, y)).trace()
    )


class Spectral(nn.Module):
    """A layer in the frequencies, as neural operators have it: a complex weight, and a real one made complex."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 5, dtype=torch.complex128))
        self.r = nn.Parameter(torch.randn(5, 2, dtype=torch.float64))
        self.head = nn.Linear(8, 3).double()

    def forward(self, x):
        z = torch.fft.rfft(x) * torch.view_as_complex(self.r) @ self.w
        return self.head(torch.tanh(torch.fft.irfft(z, n=8)))


def test_complex_parameters_have_the_squared_absolute_value():
    model, x, y = Spectral(), torch.randn(N, 8, dtype=torch.float64), torch.randint(0, 3, (N,))
    want = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    for loss in losses_of(model, x, y):
        got = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        for value, g in zip(want.values(), got):
            value += g.abs().square() / N
    diagonal = fisher_diagonal(model, (x, y))
    assert worst_error(diagonal, want) < 1e-12 and diagonal["w"].dtype == torch.float64
    assert diagonal.coverage["head.weight"] == "linear"
    torch.testing.assert_close(fisher_trace(model, x, y).detach(), diagonal.trace())
    fisher_trace(model, x, y).backward()
    exact = model.w.grad.clone()
    model.zero_grad()
    reference = copy.deepcopy(model)
    losses_of(reference, x, y).mean().backward()
    assert worst_error(backward_with_fisher(losses_of(model, x, y), model), want) < 1e-12
    torch.testing.assert_close(model.w.grad, reference.w.grad)
    each = [g["w"] for g in per_sample_gradients(losses_of(model, x, y), dict(model.named_parameters()))]
    torch.testing.assert_close(sum(g.abs().square() for g in each) / N, want["w"])
    signs = fastfip.FisherPenalty(model, "signs", difference="central")
    drawn = []
    for _ in range(300):
        model.zero_grad()
        signs(x, y).backward()
        drawn.append(model.w.grad.clone())
    assert (torch.stack(drawn).mean(0) - exact).norm() < 0.2 * exact.norm()
    ewc = diagonal.penalty(model)
    with torch.no_grad():
        model.w.add_(1j)
    torch.testing.assert_close(ewc().detach(), want["w"].sum() / 2)
    with pytest.raises(ModelError, match="complex"):
        sharpness(model, (x, y))


def test_frequencies_do_not_scale_the_derivative():
    """The Fisher is of derivatives; `.grad` is what torch makes of them."""
    model, x, y = words(scale_grad_by_freq=True)
    plain = words()[0]
    want = loop_diagonal(plain, (x, y), N)
    parts = [(x[:1], y[:1]), (x[1:], y[1:])]
    for data in ((x, y), parts):
        got = fisher_diagonal(model, data)
        assert worst_error(got, want) < 1e-12 and got.coverage["table.weight"] == "embedding"
    torch.testing.assert_close(fisher_trace(model, x, y), fisher_trace(plain, x, y))
    fastfip.FisherPenalty(model)(x, y)
    with pytest.raises(ModelError, match="way='exact'"):
        fastfip.FisherPenalty(model, "signs")(x, y)
    assert worst_error(backward_with_fisher(losses_of(model, x, y), model), want) < 1e-12
    reference = words(scale_grad_by_freq=True)[0]
    losses_of(reference, x, y).mean().backward()
    torch.testing.assert_close(model.table.weight.grad, reference.table.weight.grad)


def test_frequencies_where_samples_are_coupled_are_one_line():
    model, x, y = words(scale_grad_by_freq=True)
    coupled = Lambda(lambda m, x: m.net(x) - m.net(x).mean(0), net=model)
    with pytest.raises(ModelError, match="scale_grad_by_freq"):
        fisher_diagonal(coupled, (x, y))
    bag = Lambda(lambda m, x: m.b(x), b=nn.EmbeddingBag(7, 3, mode="sum", scale_grad_by_freq=True))
    with pytest.raises(ModelError, match="scale_grad_by_freq"):
        fisher_diagonal(bag, (x, y))


@pytest.mark.parametrize("inside", [True, False])
def test_a_reentrant_checkpoint_is_one_line(inside):
    """Where its input needs a gradient torch raises at length; where only x does, parameters would be left out."""
    net = Lambda(
        lambda m, x: m.c(checkpoint(m.b, m.a(x) if inside else x, use_reentrant=True)),
        a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 3),
    )  # fmt: skip
    x, y = torch.randn(N, 4, requires_grad=not inside), torch.randint(0, 3, (N,))
    calls = [
        lambda: fisher_trace(net, x, y),
        lambda: backward_with_fisher(losses_of(net, x, y), net),
        lambda: fastfip.FisherPenalty(net, "signs")(x, y),
    ]
    if inside:  # data that is walked is cut from a graph of the user's, so that x needs no gradient there
        calls.append(lambda: fisher_diagonal(net, (x, y)))
    for call in calls:
        with pytest.raises(ModelError, match="use_reentrant=False") as error:
            call()
        assert "\n" not in str(error.value)


def test_lazy_layers_are_one_line():
    model, batch = nn.Sequential(nn.LazyLinear(3)), (torch.randn(N, 4), torch.randint(0, 3, (N,)))
    for call in (fisher_diagonal, fisher_trace, sharpness):
        with pytest.raises(ModelError, match="run one batch through it first"):
            call(model, batch)
    model(batch[0])
    fisher_diagonal(model, batch)


@pytest.mark.parametrize("used_before", [False, True])
def test_what_a_module_keeps_between_passes_is_computed_anew(used_before):
    torch.manual_seed(0)
    model = BiasedAttention().double().eval()
    plain = BiasedAttention(keeps=False).double().eval()
    plain.load_state_dict(model.state_dict())
    x, y = torch.randn(N, 5, 4, dtype=torch.float64), torch.arange(N) % 3
    if used_before:
        with torch.no_grad():
            model(x)
    before = dict(model.attention_bias_cache)
    want = loop_diagonal(plain, (x, y), N)
    for _ in range(2):
        assert worst_error(fisher_diagonal(model, [(x, y)]), want) < 1e-12
        trace, right = fisher_trace(model, x, y), fisher_trace(plain, x, y)
        got, slope = (torch.autograd.grad(t, list(m.parameters())) for t, m in ((trace, model), (right, plain)))
        torch.testing.assert_close(got, slope)
    assert sharpness(model, [(x, y)], iterations=2, probes=0) == sharpness(plain, [(x, y)], iterations=2, probes=0)
    after = model.attention_bias_cache
    assert list(after) == list(before) and all(after[key] is before[key] for key in before)


class Scaled(nn.Module):
    """A BatchNorm that stays in eval mode, and a dict of tensors that is part of the model."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.scales = {"a": torch.linspace(1, 6, 6, dtype=torch.float64)}

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x):
        h = self.norm(self.a(x))
        return self.head(torch.tanh(h * self.scales["a"] if "a" in self.scales else h))


def test_a_dict_of_tensors_that_train_does_not_touch_is_part_of_the_model():
    torch.manual_seed(0)
    model, kept = Scaled().double().eval(), []
    x, y = torch.randn(N, 4, dtype=torch.float64), torch.arange(N) % 3
    model.register_forward_hook(lambda module, *_: kept.append(list(module.scales)))
    want = loop_diagonal(model, (x, y), N)
    assert worst_error(fisher_diagonal(model, [(x, y)]), want) < 1e-12
    assert float(fisher_trace(model, x, y).detach()) == pytest.approx(sum(float(v.sum()) for v in want.values()))
    fastfip.purify(model, (x, y), "fip", steps=2, progress=False, force=True)
    assert len(kept) > 10 and all(names == ["a"] for names in kept)


def test_a_wrapped_train_method_is_looked_through_and_one_without_code_empties_nothing():
    class Wrapped(BiasedAttention):
        @functools.wraps(BiasedAttention.train)
        def train(self, mode=True):
            return BiasedAttention.train(self, mode)

    class Partial(Scaled):
        train = functools.partialmethod(nn.Module.train)

    kept, scaled = Wrapped().eval(), Partial().eval()
    kept(torch.randn(N, 5, 4))
    with fresh_caches([kept, scaled]):
        assert not kept.attention_bias_cache and list(scaled.scales) == ["a"]
    assert kept.attention_bias_cache


class Stem(nn.Module):
    """XCiT's and LeViT's stem: a convolution and BatchNorm, whose map becomes tokens."""

    def __init__(self, looped=False):
        super().__init__()
        self.conv, self.norm, self.looped = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), looped
        self.mix, self.head = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 3)

    def body(self, x):
        tokens = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
        return (
            torch.tanh(F.layer_norm(tokens, (4,)) @ self.mix)
            * torch.arange(1.0, 1.0 + tokens.shape[1]).to(tokens)[:, None]
        )

    def forward(self, x):
        tokens = checkpoint(self.body, x, use_reentrant=False) if self.looped else self.body(x)
        return self.head(tokens.square().mean(1))


@pytest.mark.parametrize("looped", [False, True])
def test_a_batch_of_one_behind_batchnorm(looped):
    """torch's own gradient is wrong there: of the sample and itself again it is right."""
    torch.manual_seed(0)
    model = Stem(looped).double().eval()
    x, y = torch.randn(N, 2, 6, 6, dtype=torch.float64), torch.arange(N) % 3
    want = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(N):
        loss = losses_of(model, x[[n, n]], y[[n, n]])[0]
        for value, g in zip(want.values(), torch.autograd.grad(loss, list(model.parameters()))):
            value += g.square() / N
    singles = [(x[n : n + 1], y[n : n + 1]) for n in range(N)]
    for data in (singles, [(x, y)], [(x[:5], y[:5]), (x[5:], y[5:])]):
        assert worst_error(fisher_diagonal(model, data), want) < 1e-10
    total = sum(float(v.sum()) for v in want.values())
    traces = [fisher_trace(model, *one).detach() for one in singles]
    assert float(sum(traces)) / N == pytest.approx(total)
    with torch.no_grad():
        assert float(sum(fisher_trace(model, *one) for one in singles)) / N == pytest.approx(total)


class NormByHand(nn.BatchNorm2d):
    """BatchNorm in eval mode, of any number of sides, written out."""

    def forward(self, x):
        mean, var, weight, bias = (
            t.view(-1, *(1,) * (x.dim() - 2)) for t in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        return (x - mean) / (var + self.eps).sqrt() * weight + bias


class Narrow(nn.Module):
    """A convolution and BatchNorm over maps with a side of one, whose positions become tokens."""

    def __init__(self, sides, by_hand, looped=False):
        super().__init__()
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if len(sides) == 2 else (nn.Conv3d, nn.BatchNorm3d)
        self.conv, self.norm, self.looped = conv(2, 4, 1), (NormByHand if by_hand else norm)(4), looped
        self.mix, self.head = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 3)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)

    def body(self, x):
        maps = self.norm(self.conv(x))
        maps = maps.movedim(max(range(2, x.dim()), key=lambda i: x.shape[i]), 2)
        while maps.dim() > 3:
            maps = maps.squeeze(-1)
        tokens = maps.transpose(1, 2)
        mixed = torch.tanh(tokens @ self.mix)
        return mixed * torch.arange(1.0, 1.0 + tokens.shape[1]).to(tokens)[:, None]

    def forward(self, x):
        tokens = checkpoint(self.body, x, use_reentrant=False) if self.looped else self.body(x)
        return self.head(tokens.square().mean(1))


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize("sides", [(5, 1), (1, 5), (1, 1, 3)], ids=str)
def test_batchnorm_of_maps_with_a_side_of_one(sides, looped):
    """torch's own gradient is wrong there, for batches of any size."""
    torch.manual_seed(0)
    model = Narrow(sides, False, looped).double().eval()
    plain = Narrow(sides, True).double().eval()
    plain.load_state_dict(model.state_dict())
    x, y = torch.randn(N, 2, *sides, dtype=torch.float64), torch.arange(N) % 3
    want = loop_diagonal(plain, (x, y), N)
    for size in (2, 3, N):
        data = [(x[i : i + size], y[i : i + size]) for i in range(0, N, size)]
        assert worst_error(fisher_diagonal(model, data), want) < 1e-10
    trace, right = fisher_trace(model, x, y), fisher_trace(plain, x, y)
    total = sum(float(v.sum()) for v in want.values())
    with torch.no_grad():
        assert [trace.item(), right.item(), fisher_trace(model, x, y).item()] == pytest.approx([total] * 3)
    slopes = [torch.autograd.grad(t, list(m.parameters())) for t, m in ((trace, model), (right, plain))]
    torch.testing.assert_close(*slopes)
    assert worst_error(backward_with_fisher(losses_of(model, x, y), model), want) < 1e-10
    losses_of(plain, x, y).mean().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


@pytest.mark.parametrize("way", ["perturb", "signs"])
def test_differences_too_are_right_behind_batchnorm_of_maps_with_a_side_of_one(way):
    torch.manual_seed(0)
    model, plain = Narrow((5, 1), False).double().eval(), Narrow((5, 1), True).double().eval()
    plain.load_state_dict(model.state_dict())
    x, y = torch.randn(N, 2, 5, 1, dtype=torch.float64), torch.arange(N) % 3
    values, slopes = [], []
    for net in (model, plain):
        torch.manual_seed(1)
        trace = fastfip.FisherPenalty(net, way=way, difference="central")(x, y)
        values.append(trace.item())
        slopes.append(dict(zip(dict(net.named_parameters()), torch.autograd.grad(trace, list(net.parameters())))))
    assert values[0] == pytest.approx(values[1])
    assert worst_error(*slopes, 1e-6) < 1e-5
