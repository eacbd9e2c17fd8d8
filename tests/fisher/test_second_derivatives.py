"""The gradient of the trace where torch alone has none: right, or one line that names the operation and the remedy."""

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import fastfip
from fastfip.errors import ModelError
from fastfip.fisher.second_order import CheapSecondOrder
from fastfip.nets.process import keeping_activations
from fastfip.testing.definitions import loop_trace, relative_error, worst_error
from tests.support.fisher_problems import Lambda
from tests.support.small_nets import values

N = 5


class Blocks(nn.Module):
    """A block of convolution, BatchNorm and GELU and one of fused attention, checkpointed or not."""

    def __init__(self, kept):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.GELU())
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)
        self.kept = kept

    def attend(self, t):
        q, k, v = self.qkv(t).unflatten(2, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def run(self, part, x):
        return part(x) if self.kept else checkpoint(part, x, use_reentrant=False)

    def forward(self, x):
        tokens = self.run(self.block, self.stem(x)).flatten(2).transpose(1, 2)
        return self.head(self.run(self.attend, tokens).mean(1))


class Gated(nn.Module):
    """Squeeze and excitation as in MobileNetV3: a hard sigmoid, in place or not."""

    def __init__(self, gate):
        super().__init__()
        self.conv, self.squeeze, self.head = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)
        self.gate = gate

    def forward(self, x):
        x = F.hardswish(self.conv(x))
        x = x * self.gate(self.squeeze(x.mean((2, 3), keepdim=True) * 4))
        return self.head(x.mean((2, 3)))


class Distances(nn.Module):
    """Classes by the distance to their prototypes."""

    def __init__(self, distance=torch.cdist, fixed=False):
        super().__init__()
        self.fc, self.distance = nn.Linear(4, 4), distance
        prototypes = torch.randn(3, 4)
        if fixed:
            self.register_buffer("prototypes", prototypes)
        else:
            self.prototypes = nn.Parameter(prototypes)

    def forward(self, x):
        return -self.distance(torch.tanh(self.fc(x)), self.prototypes)


def distances(a, b):
    return (a[:, None] - b).square().sum(-1).sqrt()


def made(make, *shape):
    torch.manual_seed(0)
    model = make().double().eval()
    return model, torch.randn(N, *shape, dtype=torch.float64), torch.arange(N) % 3


def slopes(value, model):
    model.zero_grad()
    value.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_checkpointed_blocks_have_the_trace_and_gradient_of_the_blocks():
    plain, x, y = made(lambda: Blocks(kept=True), 2, 8, 8)
    model, _, _ = made(lambda: Blocks(kept=False), 2, 8, 8)
    want = loop_trace(plain, (x, y), N)
    gradient = slopes(want, plain)
    for term in (fastfip.fisher_trace(model, x, y), fastfip.FisherPenalty(model, way="exact")(x, y)):
        assert relative_error(term, want) < 1e-10
        assert worst_error(slopes(term, model), gradient, 1e-10) < 1e-8
    for _ in range(2):  # what is known of one graph is not taken for the other, whose checkpoints can be read once
        with torch.no_grad():
            assert relative_error(fastfip.fisher_trace(model, x, y), want) < 1e-10
        diagonal, right = (fastfip.fisher_diagonal(one, [(x, y)]) for one in (model, plain))
        assert worst_error(diagonal, right, 1e-10) < 1e-10
        assert worst_error(slopes(fastfip.fisher_trace(model, x, y), model), gradient, 1e-10) < 1e-8
    mean, term = fastfip.FisherPenalty(model, way="exact").with_loss(x, y)
    torch.testing.assert_close(mean, F.cross_entropy(plain(x), y))
    (mean + term).backward()
    options = {"iterations": 3, "probes": 2}
    found, right = (fastfip.sharpness(one, [(x, y)], **options).to_dict() for one in (model, plain))
    assert found == pytest.approx(right, rel=1e-9)


def test_torch_checkpoints_again_afterwards_and_after_an_error():
    model, x, y = made(lambda: Blocks(kept=False), 2, 8, 8)
    generator = torch.utils.checkpoint._checkpoint_without_reentrant_generator
    fastfip.fisher_trace(model, x, y)
    with pytest.raises(KeyError), keeping_activations(), keeping_activations():
        raise KeyError
    assert torch.utils.checkpoint._checkpoint_without_reentrant_generator is generator
    calls = []
    model.block.register_forward_hook(lambda *_: calls.append(1))
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        model(x).sum().backward()
    assert len(calls) == 2


def composite(x):
    return F.relu6(x + 3) / 6


@pytest.mark.parametrize("gate", [nn.Hardsigmoid(), nn.Hardsigmoid(inplace=True), F.hardsigmoid])
def test_a_hard_sigmoid_has_a_second_derivative(gate):
    model, x, y = made(lambda: Gated(gate), 2, 6, 6)
    twin, _, _ = made(lambda: Gated(composite), 2, 6, 6)
    want = loop_trace(twin, (x, y), N)
    got = fastfip.fisher_trace(model, x, y)
    assert relative_error(got, want) < 1e-10
    assert worst_error(slopes(got, model), slopes(want, twin), 1e-10) < 1e-8
    assert fastfip.sharpness(model, [(x, y)], iterations=2, probes=2).trace_hessian != 0


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_hard_sigmoid_of_any_precision_is_torchs_own(dtype, inplace):
    x = torch.linspace(-4, 4, 4001, dtype=torch.float64).to(dtype).requires_grad_()
    want = F.hardsigmoid(x)
    with CheapSecondOrder():
        got = F.hardsigmoid(x * 1, inplace)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps / 8)
    slope, right = (torch.autograd.grad(out.sum(), x)[0] for out in (got, want))
    torch.testing.assert_close(slope, right, rtol=1e-6, atol=0)


def test_what_torch_cannot_differentiate_twice_has_a_value_and_a_line_that_says_so():
    model, x, y = made(Distances, 4)
    before = values(model)
    trace = fastfip.fisher_trace(model, x, y)
    with torch.no_grad():
        torch.testing.assert_close(trace.detach(), fastfip.fisher_trace(model, x, y))
    with pytest.raises(ModelError, match=r"no gradient here: the model uses Cdist, .*way='perturb'") as found:
        trace.backward()
    assert "\n" not in str(found.value)
    with pytest.raises(ModelError, match=r"none of Cdist, .*fastfip\.fisher_trace"):
        fastfip.sharpness(model, [(x, y)])
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())


class Cubed(torch.autograd.Function):
    """x^3, whose author wrote one derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.pow(3)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0].square() * g


class Twice(Cubed):
    """The same; its backward can be differentiated."""

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0].square() * g


def cubes(function):
    return lambda: Lambda(lambda m, x: m.b(function.apply(m.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 3))


def test_a_function_of_the_users_with_one_derivative_is_named():
    (model, x, y), (twin, _, _) = made(cubes(Cubed), 4), made(cubes(Twice), 4)
    trace, want = fastfip.fisher_trace(model, x, y), loop_trace(twin, (x, y), N)
    torch.testing.assert_close(trace.detach(), want.detach())
    with pytest.raises(ModelError, match=r"no gradient here: the model uses Cubed, .*way='perturb'"):
        trace.backward()
    with pytest.raises(ModelError, match=r"none of Cubed, .*fastfip\.fisher_trace"):
        fastfip.sharpness(model, [(x, y)])
    by_differences = fastfip.FisherPenalty(model, way="perturb", difference="central")(x, y)
    assert worst_error(slopes(by_differences, model), slopes(want, twin), 1e-10) < 1e-5
    assert worst_error(slopes(fastfip.fisher_trace(twin, x, y), twin), slopes(loop_trace(twin, (x, y), N), twin)) < 1e-8


def test_the_loss_counts_too():
    model, x, y = made(lambda: nn.Linear(4, 3), 4)
    trace = fastfip.fisher_trace(model, x, y, loss=lambda z, b: F.multi_margin_loss(z, b[1], reduction="none"))
    with pytest.raises(ModelError, match="uses MultiMarginLoss"):
        trace.backward()


def test_a_smooth_model_without_second_derivatives_goes_by_differences():
    model, x, y = made(lambda: Distances(torch.cdist, fixed=True), 4)
    twin, _, _ = made(lambda: Distances(distances, fixed=True), 4)
    penalty = fastfip.FisherPenalty(model, difference="central")
    got, want = penalty(x, y), loop_trace(twin, (x, y), N)
    assert penalty.way == "perturb" and "no second derivative of Cdist" in penalty.reason
    assert relative_error(got, want) < 1e-10
    assert worst_error(slopes(got, model), slopes(want, twin), 1e-10) < 1e-5
