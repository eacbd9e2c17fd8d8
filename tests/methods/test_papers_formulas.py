"""FT-SAM, I-BAU and ANP against second implementations, written here from the papers' formulas alone, in float64.

Nothing of `fastfip.methods` is used for the expected weights, and no autograd where a derivative is short: the toy nets
are ones whose derivatives can be written down. What the released codes do otherwise stands in the methods' docstrings.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev

import fastfip
from fastfip.data.cleanset import CleanSet
from fastfip.methods.anp import ANP, ANPConfig
from tests.support.departures import make_run

CLOSE = 1e-6
N, INPUTS, HIDDEN, CLASSES = 12, 5, 4, 3


def toy(seed: int = 0) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A net of one hidden layer with tanh, and images [N, 1, 1, 5] from 0.2 to 0.8 with labels."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)).double()
    x = 0.2 + 0.6 * torch.rand(N, 1, 1, INPUTS, dtype=torch.float64)
    return net.eval(), x, torch.arange(N) % CLASSES


def weights_of(net: nn.Module) -> list[np.ndarray]:
    return [p.detach().numpy().copy() for p in net.parameters()]


def differ(net: nn.Module, expected: list[np.ndarray]) -> float:
    """The largest difference, relative to the largest weight of its tensor."""
    pairs = zip(weights_of(net), expected, strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def slopes(w: list[np.ndarray], x: np.ndarray, wanted: np.ndarray) -> list[np.ndarray]:
    """The gradient of the mean cross-entropy of the toy net in its weights; rows of `wanted` [N, C] sum to 1."""
    w1, b1, w2, b2 = w
    hidden = np.tanh(x @ w1.T + b1)
    out = (softmax(hidden @ w2.T + b2) - wanted) / len(x)
    back = (out @ w2) * (1 - hidden**2)
    return [back.T @ x, back.sum(0), out.T @ hidden, out.sum(0)]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("rho", "smoothing"), [(2.0, 0.1), (0.5, 0.0)])
def test_ft_sam(rho: float, smoothing: float, steps: int) -> None:
    """arXiv 2304.11823: eps = rho w^2 g / ||w g||_2 over all weights, then SGD at w by the gradient at w + eps."""
    net, x, y = toy()
    lr, momentum, decay = 0.1, 0.9, 5e-4
    w = weights_of(net)
    wanted = (1 - smoothing) * np.eye(CLASSES)[y.numpy()] + smoothing / CLASSES
    pixels = x.flatten(1).numpy()
    velocity = [np.zeros_like(v) for v in w]
    for _ in range(steps):
        g = slopes(w, pixels, wanted)
        length = math.sqrt(sum(float(((v * d) ** 2).sum()) for v, d in zip(w, g)))
        there = slopes([v + rho * v**2 * d / length for v, d in zip(w, g)], pixels, wanted)
        velocity = [momentum * m + d + decay * v for m, d, v in zip(velocity, there, w)]
        w = [v - lr * m for v, m in zip(w, velocity)]
    result = fastfip.purify(
        net, (x, y), "ft_sam", steps=steps, batch_size=N, lr=lr, momentum=momentum, weight_decay=decay, rho=rho,
        label_smoothing=smoothing, schedule="constant", grad_clip=None, augment="none", holdout=0.0, warmup=0.0,
        progress=False, force=True,
    )  # fmt: skip
    assert differ(result.model, w) < CLOSE
    assert differ(net, w) > 1e-3  # the weights have moved


def ibau_step(
    net: nn.Module, x: Tensor, y: Tensor, radius: float, climb: float, ridge: float, terms: int, step: float
) -> tuple[dict[str, Tensor], Tensor]:
    """The hypergradient of I-BAU with dense second derivatives, and the perturbation that it is taken at.

    delta is climbed once from 0 and projected into the ball. The map of the inner problem, Phi(d) = d - step * grad of
    inner, gives v by `terms` rounds of v <- (dPhi/dd)^T v + d outer / dd, and the gradient d outer / d theta +
    (dPhi / d theta)^T v.
    """
    params = {name: p.detach().clone() for name, p in net.named_parameters()}

    def outer(theta: dict[str, Tensor], d: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, theta, x + d), y)

    def inner(theta: dict[str, Tensor], d: Tensor) -> Tensor:
        return ridge * d.square().sum() - outer(theta, d)

    zero = torch.zeros_like(x[:1])
    delta = zero - climb * grad(inner, 1)(params, zero)
    delta = delta * min(1.0, radius / float(delta.norm()))
    size = delta.numel()
    bend = hessian(inner, 1)(params, delta).reshape(size, size)
    v = torch.zeros(size, dtype=torch.float64)
    pull = grad(outer, 1)(params, delta).flatten()
    for _ in range(terms):
        v = v - step * bend @ v + pull
    mixed = jacrev(grad(inner, 1), 0)(params, delta)  # d2 inner / (dd dtheta): [size of delta, of the weight]
    direct = grad(outer, 0)(params, delta)
    out = {k: direct[k] - step * (v @ mixed[k].reshape(size, -1)).reshape(direct[k].shape) for k in params}
    assert max(float(mixed[k].abs().max()) for k in params) > 1e-3
    return out, delta


def ibau_run(net: nn.Module, x: Tensor, y: Tensor, **settings: float) -> nn.Module:
    """One round of one step: with all images, and with a perturbation of all of them as in the paper."""
    return fastfip.purify(
        net, (x, y), "i_bau", steps=1, batch_size=N, share=1.0, low=0.0, high=1.0, holdout=0.0, grad_clip=None,
        warmup=0.0, weight_decay=0.0, progress=False, force=True, **settings,
    ).model  # fmt: skip


@pytest.mark.parametrize("terms", [1, 5, 20])
@pytest.mark.parametrize("radius", [0.05, 10.0])
def test_i_bau(radius: float, terms: int) -> None:
    """arXiv 2110.03735, section 3, by its fixed-point iteration, where that contracts: a ridge above the curvature."""
    net, x, y = toy(1)
    climb, ridge, step, lr = 30.0, 1.0, 0.1, 1e-3
    gradient, delta = ibau_step(net, x, y, radius, climb, ridge, terms, step)
    assert float((x + delta).min()) > 0 and float((x + delta).max()) < 1  # nothing is clipped
    assert float(delta.norm()) == pytest.approx(0.05) if radius < 1 else 0.1 < float(delta.norm()) < radius
    # The first step of Adam: both moments are those of one gradient, the bias correction takes their factors off.
    expected = [p.detach() - lr * g / (g.abs() + 1e-8) for p, g in zip(net.parameters(), gradient.values())]
    settings = {"lr": lr, "radius": radius, "delta_lr": climb, "ridge": ridge, "terms": terms, "inner_step": step}
    found = ibau_run(net, x, y, **settings)
    assert differ(found, [e.numpy() for e in expected]) < CLOSE
    # Adam all but hides a gradient's size: once more by plain steps.
    found = ibau_run(net, x, y, **settings, optimizer="sgd", momentum=0.0)
    for p, q, g in zip(net.parameters(), found.parameters(), gradient.values(), strict=True):
        assert float(((p - q).detach() / lr - g).abs().max()) < CLOSE * float(g.abs().max())
    theta = {name: p.detach() for name, p in net.named_parameters()}
    plain = grad(lambda theta: F.cross_entropy(functional_call(net, theta, x), y))(theta)
    assert max(float((plain[k] - gradient[k]).abs().max()) for k in plain) > 1e-3


def test_i_bau_ends_the_iteration_where_it_diverges() -> None:
    """At the paper's ridge of 1e-3 the toy's map grows: ours stops before the first longer term, the paper's goes on.

    So what is taken is the paper's step with fewer terms, here one. Both are far from the implicit gradient then, which
    asks for a minimum.
    """
    net, x, y = toy(1)
    settings = {"lr": 1e-3, "radius": 10.0, "delta_lr": 30.0, "ridge": 1e-3, "inner_step": 0.1}
    found = ibau_run(net, x, y, **settings, terms=5, optimizer="sgd", momentum=0.0)
    for terms, agrees in ((1, True), (5, False)):
        gradient, _ = ibau_step(net, x, y, 10.0, 30.0, 1e-3, terms, 0.1)
        moved = [(p - q).detach() / 1e-3 for p, q in zip(net.parameters(), found.parameters())]
        worst = max(float((m - g).abs().max() / g.abs().max()) for m, g in zip(moved, gradient.values()))
        assert (worst < CLOSE) == agrees and worst < 0.05


class Neurons(nn.Module):
    """A hidden layer with BatchNorm: its scale and shift are the neurons' weight and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn, self.fc2 = nn.Linear(INPUTS, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.bn(self.fc1(x.flatten(1)))))


@pytest.mark.parametrize("inner", [1, 2])
@pytest.mark.parametrize("alpha", [0.2, 0.7])
def test_anp(alpha: float, inner: int) -> None:
    """arXiv 2110.14430: a random start, sign steps of the adversary within eps, then a step of the masks in [0, 1].

    min_m alpha L(m w, b) + (1 - alpha) max_{|delta|, |xi| <= eps} L((m + delta) w, (1 + xi) b)
    """
    torch.manual_seed(2)
    net = Neurons().double()
    with torch.no_grad():
        net.bn.weight.copy_(torch.rand(HIDDEN) + 0.5)
        net.bn.bias.copy_(torch.randn(HIDDEN))
    _, x, y = toy(2)
    eps, lr = 0.4, 0.2
    w, b = net.bn.weight.detach().clone(), net.bn.bias.detach().clone()

    def loss(m: Tensor, delta: Tensor, xi: Tensor) -> Tensor:
        """The net, written out, by the statistics of the batch."""
        h = x.flatten(1) @ net.fc1.weight.detach().T + net.fc1.bias.detach()
        h = (h - h.mean(0)) / (h.var(0, unbiased=False) + net.bn.eps).sqrt()
        h = torch.tanh(h * (m + delta) * w + (1 + xi) * b)
        z = h @ net.fc2.weight.detach().T + net.fc2.bias.detach()
        return (z.logsumexp(1) - z[torch.arange(N), y]).mean()

    config = ANPConfig(radius=eps, alpha=alpha, inner=inner, lr=lr, steps=5, momentum=0.9)
    run = make_run(config, net, (x, y))
    method = ANP()
    method.setup(run)
    optimizer = method.make_optimizer(run, method.parameter_groups(run))
    run.train_mode()
    m = torch.tensor([0.9, 0.3, 0.7, 0.05], dtype=torch.float64)
    with torch.no_grad():
        method.masks.values[0].copy_(m)
    draws = torch.Generator().manual_seed(0)  # as the run has it, and in this order
    start = [torch.rand(HIDDEN, generator=draws).double() * 2 * eps - eps for _ in range(2)]
    delta, xi = start
    for _ in range(inner):
        up, aside = grad(loss, (1, 2))(m, delta, xi)
        delta = (delta + eps / inner * up.sign()).clamp(-eps, eps)
        xi = (xi + eps / inner * aside.sign()).clamp(-eps, eps)
    slope = alpha * grad(loss)(m, torch.zeros(HIDDEN), torch.zeros(HIDDEN)) + (1 - alpha) * grad(loss)(m, delta, xi)
    expected = (m - lr * slope).clamp(0, 1)

    run.generator.manual_seed(0)
    method.backward(run, (x, y))
    optimizer.step()
    method.after_step(run)
    assert float((method.masks.values[0].detach() - expected).abs().max()) < CLOSE
    assert float((expected - m).abs().max()) > 1e-3
    assert loss(m, delta, xi) > loss(m, torch.zeros(HIDDEN), torch.zeros(HIDDEN))


def test_anp_prunes_masks_up_to_the_papers_threshold() -> None:
    """Neurons of masks up to 0.2 lose their weight and keep their bias, the others get theirs back whole."""
    torch.manual_seed(2)
    net = Neurons().double()
    _, x, y = toy(2)
    run = make_run(ANPConfig(threshold=0.2), net, (x, y))
    run.clean = CleanSet.of((x, y))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    method = ANP()
    method.setup(run)
    run.step = 1
    with torch.no_grad():
        method.masks.values[0].copy_(torch.tensor([0.9, 0.19, 0.7, 0.05]))
    method.fold(run)
    after = net.state_dict()
    assert after["bn.weight"].tolist() == (before["bn.weight"] * torch.tensor([1, 0, 1, 0])).tolist()
    assert all(torch.equal(after[k], before[k]) for k in before if k != "bn.weight")
