"""The code that was released with FIP, restated as a method outside the package."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastfip
from benchmarks.purification.released_fip import ReleasedFIP, ReleasedFIPConfig, surrogate
from fastfip.errors import ConfigError
from tests.support.fip_runs import data, make_run, net


def test_released_surrogate_is_its_definition() -> None:
    model, (x, y) = net(), data()
    tensors = list(model.parameters())
    generator = torch.Generator().manual_seed(3)
    probes = [[torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors] for _ in range(3)]
    found = surrogate(model(x).log_softmax(1), y, tensors, probes)

    # In words: the gradient of the mean of the N x N matrix log_p[i, y_j]; after every tensor the running sum of the
    # products with the Gaussians is appended to a list; the list's sum is divided by the number of probes.
    log_p = model(x).log_softmax(1)
    mean = torch.stack([log_p[i, y[j]] for i in range(len(x)) for j in range(len(x))]).mean()
    gradients = torch.autograd.grad(mean, tensors)
    appended = []
    for probe in probes:
        running = 0.0
        for g, v in zip(gradients, probe):
            running += float((g * v).sum())
            appended.append(running)
    assert found.item() == pytest.approx(sum(appended) / len(probes), rel=1e-10)


def test_released_surrogate_sees_the_label_histogram_only() -> None:
    model, (x, y) = net(), data()
    tensors = list(model.parameters())
    probes = [[torch.ones_like(t) for t in tensors]]
    one = surrogate(model(x).log_softmax(1), y, tensors, probes)
    other = surrogate(model(x).log_softmax(1), y.flip(0), tensors, probes)
    assert one.item() == pytest.approx(other.item(), rel=1e-9)


def test_released_step_adds_the_gradient_of_both_terms() -> None:
    model = net()
    config = ReleasedFIPConfig(probes=2)
    assert (config.steps, config.lr, config.momentum, config.eta_f, config.trace_every) == (2000, 0.005, 0.95, 0.5, 5)
    run, method = make_run(config, model), ReleasedFIP()
    x, y = data()
    for step in (0, 1):
        run.step = step
        model.zero_grad()
        run.generator.manual_seed(7)
        method.setup(run)
        run.train_mode()
        method.backward(run, (x, y))
        got = [p.grad.clone() for p in model.parameters()]
        logits = model(x)  # BatchNorm in train mode, as released
        loss = F.cross_entropy(logits, y)
        if step % 5 == 0:
            generator = torch.Generator().manual_seed(7)
            probes = [[torch.randn(p.shape, generator=generator).to(p) for p in model.parameters()] for _ in range(2)]
            loss = loss + 0.5 * surrogate(logits.log_softmax(1), y, list(model.parameters()), probes)
        expected = torch.autograd.grad(loss, list(model.parameters()))
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_it_is_a_method_like_any_other() -> None:
    result = fastfip.purify(
        net(torch.float32), data(24, torch.float32), ReleasedFIP, steps=3, progress=False, force=True
    )
    assert result.method == "released_fip" and "surrogate" in result.history[0]
    with pytest.raises(ConfigError, match="class labels only"):
        fastfip.purify(net(), data(), ReleasedFIP, loss=lambda logits, batch: logits.sum(1), progress=False)
