"""The spectral shift: what W(delta) is, its gradient, per-sample gradients, and that folding leaves plain weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastfip.errors import ConfigError, ModelError
from fastfip.ops.backends import native
from fastfip.ops.spectral import grad, op
from fastfip.ops.spectral.linear_map import SpectralMap
from fastfip.spectral import Rank, SpectralShifts, fisher, layers, weight
from fastfip.spectral.decompose import decompose
from fastfip.spectral.fisher import delta_gradients, recording

LAYERS = {
    "linear": (lambda: nn.Linear(5, 7), (3, 5)),
    "linear over positions": (lambda: nn.Linear(5, 3), (3, 4, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (3, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 5, 3, padding=1), (3, 3, 6, 7)),
    "conv2d same dilated": (lambda: nn.Conv2d(2, 3, (3, 2), padding="same", dilation=2), (2, 2, 7, 6)),
    "conv2d circular": (lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular", stride=2), (3, 2, 7, 5)),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (3, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding="valid"), (3, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1), (2, 2, 3, 4, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1), (2, 4, 4, 5)),
    "transposed groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 4, 4)),
}


RANKS = [None, 1, 2, 0.7]


@pytest.fixture(params=["as it pays", "always the op", "always the kernel"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Layers as small as a test's are torch's own with W(delta) as a leaf; large ones go through op and kernel."""
    if request.param == "always the kernel":
        if not native.available():
            pytest.skip(native.reason())
        for module in (op, fisher):
            monkeypatch.setattr(module, "prefers_kernel", lambda *operands: True)
        monkeypatch.setattr(grad, "kernel_is_faster", lambda *operands: True)
    if request.param != "as it pays":
        monkeypatch.setattr(layers, "prefers_dense", lambda *args: False)
        monkeypatch.setattr(weight, "SMALL", 0)
        monkeypatch.setattr(weight, "EXPENSIVE", 1.0)
    return request.param


def per_sample(layer: nn.Module, shifts: SpectralShifts, x: Tensor) -> list[Tensor]:
    """The definition: one backward pass for each sample through W(delta) as a function of delta."""
    out = []
    for n in range(len(x)):
        with shifts.differentiable():
            loss = layer(x[n : n + 1]).pow(3).sum()
            out.append(torch.autograd.grad(loss, shifts.deltas)[0])
    return out


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", LAYERS)
def test_per_sample_gradients_are_those_of_a_loop(name: str, rank: Rank, path: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    shifts = SpectralShifts.of(layer, rank)
    with torch.no_grad():
        shifts.deltas[0].uniform_(-0.2, 0.2)
        shifts.deltas[0][0, 0] = -2 * shifts.shifts[0].sigma[0, 0]  # a direction that is gone
    expected = per_sample(layer, shifts, x)
    shifts.refresh()
    with recording(shifts) as record:
        losses = layer(x).pow(3).flatten(1).sum(1)
        (found,) = delta_gradients(shifts, record, losses)
    assert found.shape == (len(x), *shifts.deltas[0].shape)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-10)
    assert found[:, 0, 0].abs().max() == 0


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", LAYERS)
def test_collected_gradient_is_the_one_of_autograd(name: str, rank: Rank, path: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(1)
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    shifts = SpectralShifts.of(layer, rank)
    with torch.no_grad():
        shifts.deltas[0].uniform_(-0.2, 0.2)
    expected = torch.stack(per_sample(layer, shifts, x)).sum(0)
    shifts.refresh()
    layer(x[:1]).pow(3).sum().backward()
    layer(x[1:]).pow(3).sum().backward()  # two passes between refresh and collect
    shifts.collect()
    shifts.remove()
    assert shifts.deltas[0].grad is not None
    torch.testing.assert_close(shifts.deltas[0].grad, expected, rtol=1e-9, atol=1e-10)


def test_trace_is_differentiable_once_more(path: str) -> None:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)).double()
    x, y = torch.randn(3, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 3, 1])
    shifts = SpectralShifts.of(net)

    def trace(*deltas: Tensor) -> Tensor:
        for shift, delta in zip(shifts.shifts, deltas):
            shift.delta = delta
        shifts.refresh()
        with recording(shifts) as record:
            losses = nn.functional.cross_entropy(net(x), y, reduction="none")
            each = delta_gradients(shifts, record, losses, create_graph=True)
            return torch.stack([g.pow(2).sum() for g in each]).sum()

    start = [(0.1 * torch.rand_like(d)).requires_grad_(True) for d in shifts.deltas]
    assert torch.autograd.gradcheck(trace, start)


def test_zero_shift_changes_no_bit_and_fold_is_exact() -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 5))
    before = copy.deepcopy(net.state_dict())
    shifts = SpectralShifts.of(net)
    shifts.refresh()
    x = torch.randn(2, 3, 6, 6)
    during = net(x)
    shifts.fold()
    assert list(net.state_dict()) == list(before)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    torch.testing.assert_close(during, net(x))


def test_shift_is_the_formula_of_the_paper() -> None:
    torch.manual_seed(4)
    layer = nn.Linear(6, 4, bias=False).double()
    u, sigma, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    delta = torch.tensor([0.5, -0.1, -10.0, 0.2], dtype=torch.float64)
    shifts = SpectralShifts.of(layer)
    with torch.no_grad():
        shifts.deltas[0].copy_(delta)
    shifts.fold()
    torch.testing.assert_close(layer.weight.detach(), u @ torch.diag(torch.relu(sigma + delta)) @ vh)


def test_tied_weights_share_one_shift_and_stay_tied() -> None:
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    own = net[0].weight
    shifts = SpectralShifts.of(net)
    assert len(shifts) == 1 and shifts.shifts[0].names == ["0.weight", "2.weight"]
    x = torch.randn(3, 4)
    shifts.refresh()
    net(x).pow(2).sum().backward()
    shifts.collect()
    expected = None
    with shifts.differentiable():
        (expected,) = torch.autograd.grad(net(x).pow(2).sum(), shifts.deltas)
    torch.testing.assert_close(shifts.deltas[0].grad, expected)
    with torch.no_grad():
        shifts.deltas[0].add_(0.1)
    shifts.fold()
    assert net[0].weight is own and net[2].weight is own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_keep_their_dtype(dtype: torch.dtype) -> None:
    layer = nn.Linear(6, 4).to(dtype)
    before = layer.weight.detach().clone()
    shifts = SpectralShifts.of(layer)
    assert shifts.shifts[0].sigma.dtype == torch.float32
    shifts.fold()
    assert layer.weight.dtype == dtype and torch.equal(layer.weight, before)
    assert layer.weight.requires_grad and isinstance(layer.weight, nn.Parameter)


def test_refusals() -> None:
    with pytest.raises(ModelError, match="no Linear or convolution"):
        SpectralShifts.of(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)))
    bad = nn.Linear(2, 2)
    with torch.no_grad():
        bad.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="NaN or Inf"):
        SpectralShifts.of(bad)


class Head(nn.Module):
    """Attention with packed projections, a weight that another module reads, and an ordinary layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return nn.functional.linear(self.out(x).tanh(), self.out.weight.t()).mean(1)


def test_uses_that_are_no_layer_of_their_own() -> None:
    torch.manual_seed(6)
    net = Head().double().eval()
    keys = list(net.state_dict())
    x, y = torch.randn(3, 5, 4, dtype=torch.float64), torch.tensor([0, 3, 1])
    shifts = SpectralShifts.of(net, 3)
    names = {name for shift in shifts.shifts for name in shift.names}
    assert names == {"attention.in_proj_weight", "attention.out_proj.weight", "out.weight"}
    with torch.no_grad():
        for delta in shifts.deltas:
            delta.uniform_(-0.1, 0.1)

    def losses() -> Tensor:
        return nn.functional.cross_entropy(net(x), y, reduction="none")

    with shifts.differentiable():
        expected = [torch.autograd.grad(one, shifts.deltas, retain_graph=True) for one in losses()]
    shifts.refresh()
    with recording(shifts) as record:
        found = delta_gradients(shifts, record, losses())
    for k, each in enumerate(found):
        torch.testing.assert_close(each, torch.stack([sample[k] for sample in expected]), rtol=1e-9, atol=1e-11)
    losses().sum().backward()
    shifts.collect()
    for k, delta in enumerate(shifts.deltas):
        torch.testing.assert_close(delta.grad, sum(sample[k] for sample in expected), rtol=1e-9, atol=1e-11)
    shifts.fold()
    assert list(net.state_dict()) == keys
    assert "forward" not in net.out.__dict__ and isinstance(net.attention.in_proj_weight, nn.Parameter)


def test_trace_goes_through_uses_that_are_no_layer_of_their_own() -> None:
    torch.manual_seed(7)
    net = Head().double().eval()
    x, y = torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([0, 3])
    shifts = SpectralShifts.of(net, 2)

    def losses() -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return nn.functional.cross_entropy(net(x), y, reduction="none")

    with shifts.differentiable():
        each = [torch.autograd.grad(one, shifts.deltas, create_graph=True) for one in losses()]
        expected = torch.autograd.grad(sum(g.pow(2).sum() for one in each for g in one), shifts.deltas)
    shifts.refresh()
    with recording(shifts) as record:
        found = delta_gradients(shifts, record, losses(), create_graph=True)
    sum(g.pow(2).sum() for g in found).backward()
    shifts.collect()
    for delta, right in zip(shifts.deltas, expected):
        torch.testing.assert_close(delta.grad, right, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("rank", [0, -1, True, 1.5, 0.0, "all"])
def test_a_rank_that_is_none_is_refused(rank: object) -> None:
    with pytest.raises(ConfigError, match="rank="):
        SpectralShifts.of(nn.Linear(3, 3), rank)  # type: ignore[arg-type]


def test_small_singular_values_are_decomposed_exactly() -> None:
    """The Gram matrix loses singular values below 1e-8 of the largest; the factors must not."""
    torch.manual_seed(8)
    q, r = torch.linalg.qr(torch.randn(2, 12, 12).double())
    m = (q[0] @ torch.diag(torch.logspace(0, -7, 12).double()) @ r[1].sign() @ q[1]).float()[None, :6]
    for rank, keep in ((None, 6), (2, 2), (0.5, 1)):
        ((u, sigma, v),) = decompose([m], rank)
        right = torch.linalg.svdvals(m.double())
        assert sigma.shape == (1, keep)
        torch.testing.assert_close(sigma.double(), right[:, :keep], rtol=1e-5, atol=0)
        eye = torch.eye(keep)[None]
        torch.testing.assert_close(u.mT @ u, eye, atol=1e-5, rtol=0)
        torch.testing.assert_close(v.mT @ v, eye, atol=1e-5, rtol=0)


def test_a_pass_for_inputs_leaves_the_deltas_out(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(9)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    shifts = SpectralShifts.of(net)
    shifts.refresh()
    loss = net(x).pow(2).sum()
    (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
    with monkeypatch.context() as patch, shifts.inputs_only():
        patch.setattr(SpectralMap, "total", None)  # the sum that delta's gradient is
        (found,) = torch.autograd.grad(loss, x, retain_graph=True)
    torch.testing.assert_close(found, plain)
    loss.backward()
    shifts.collect()
    assert all(delta.grad is not None for delta in shifts.deltas) and net[3].bias.grad is not None


def definition(net: nn.Module, shifts: SpectralShifts, losses: object) -> list[Tensor]:
    """One backward pass for each sample through W(delta) as a function of delta."""
    with shifts.differentiable():
        each = [torch.autograd.grad(one, shifts.deltas, retain_graph=True) for one in losses()]  # type: ignore[operator]
    return [torch.stack(rows) for rows in zip(*each)]


@pytest.mark.parametrize("batch_first", [True, False])
def test_samples_are_found_wherever_they_lie(batch_first: bool) -> None:
    torch.manual_seed(11)
    net = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=batch_first).double().eval()
    x, y = torch.randn(3, 5, 4, dtype=torch.float64), torch.tensor([0, 3, 1])

    def losses() -> Tensor:
        out = net(x).mean(1) if batch_first else net(x.transpose(0, 1).contiguous()).mean(0)
        return nn.functional.cross_entropy(out, y, reduction="none")

    shifts = SpectralShifts.of(net, 3)
    expected = definition(net, shifts, losses)
    for _ in range(2):  # the second time from what the first found out
        shifts.refresh()
        with recording(shifts) as record:
            found = delta_gradients(shifts, record, losses())
        shifts.remove()
        for each, right in zip(found, expected):
            torch.testing.assert_close(each, right, rtol=1e-8, atol=1e-10)


def test_a_layer_computed_once_for_all_samples() -> None:
    torch.manual_seed(12)

    class Query(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.turn, self.out = nn.Parameter(torch.randn(2, 4)), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out((x @ self.turn(self.query).T) @ self.query)

    net = Query().double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 2, 1, 0, 1])

    def losses() -> Tensor:
        return nn.functional.cross_entropy(net(x), y, reduction="none")

    shifts = SpectralShifts.of(net)
    expected = definition(net, shifts, losses)
    shifts.refresh()
    with recording(shifts) as record:
        found = delta_gradients(shifts, record, losses())
    for each, right in zip(found, expected):
        torch.testing.assert_close(each, right, rtol=1e-8, atol=1e-10)


def test_a_weight_tied_to_an_embedding_moves_in_both_places() -> None:
    torch.manual_seed(13)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.embed(x).tanh()).mean(1)

    net = Tied().double()
    keys = list(net.state_dict())
    x = torch.randint(0, 6, (3, 5))
    shifts = SpectralShifts.of(net)
    with torch.no_grad():
        shifts.deltas[0].uniform_(-0.3, 0.3)
    expected = definition(net, shifts, lambda: net(x).pow(2).sum(1))
    shifts.refresh()
    during = net(x).detach()
    with recording(shifts) as record:
        found = delta_gradients(shifts, record, net(x).pow(2).sum(1))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-8, atol=1e-10)
    shifts.fold()
    torch.testing.assert_close(net(x), during)
    assert list(net.state_dict()) == keys and net.out.weight is net.embed.weight
