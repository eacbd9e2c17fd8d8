"""ANP: masks and perturbations in their ranges, the gradient of the objective, pruning by clean accuracy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastfip
from fastfip.data.cleanset import CleanSet
from fastfip.errors import ModelError
from fastfip.methods import anp
from fastfip.methods.anp import ANP, ANPConfig
from tests.support.departures import make_run, planted, rows, vit


def neurons(model: nn.Module, norm: bool) -> list[tuple[str, str]]:
    """Names of the masked weights and their biases: BatchNorm, or every layer but the classifier."""
    return [("1.weight", "1.bias")] if norm else [("0.weight", "0.bias"), ("4.weight", "4.bias")]


def column(m: Tensor, like: Tensor) -> Tensor:
    return m.reshape(-1, *[1] * (like.dim() - 1))


@pytest.mark.parametrize("norm", [False, True])
def test_the_gradient_is_that_of_the_objective(norm: bool) -> None:
    """At masks below one and the adversary's own perturbation, against plain autograd over masks in float64."""
    model, (x, y) = planted(norm)
    model, batch = model.double(), (x.double(), y)
    received = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = make_run(ANPConfig(alpha=0.3, radius=0.25, bn_mode="eval", steps=5), model, batch)
    method = ANP()
    method.setup(run)
    assert [m.name for m in method.masks.masks] == [weight for weight, _ in neurons(model, norm)]
    with torch.no_grad():
        for m in method.masks.values:
            m.copy_(0.5 + 0.5 * torch.rand(m.shape, generator=torch.Generator().manual_seed(1)))
    masks = [m.detach().clone() for m in method.masks.values]
    method.backward(run, batch)
    found = [m.grad.clone() for m in method.masks.values]
    assert all(torch.equal(m.detach(), before) for m, before in zip(method.masks.values, masks))
    for m in method.masks.values:
        m.grad = None
    run.generator.manual_seed(0)
    delta, xi = method.adversary(run, batch)

    leaves = [m.clone().requires_grad_(True) for m in masks]

    def loss(change: float) -> Tensor:
        weights = dict(received)
        for (w, b), m, d, s in zip(neurons(model, norm), leaves, delta, xi):
            weights[w] = received[w] * column(m.flatten() + change * d.flatten(), received[w])
            weights[b] = received[b] * (1 + change * s)
        return F.cross_entropy(functional_call(model, weights, batch[0]), y)

    expected = torch.autograd.grad(0.3 * loss(0.0) + 0.7 * loss(1.0), leaves)
    for a, b in zip(found, expected):
        assert torch.allclose(a.flatten(), b.flatten(), rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        assert loss(1.0) > loss(0.0)
    for name, p in model.named_parameters():  # masks stay in the weights, biases are as received
        if name not in [weight for weight, _ in neurons(model, norm)]:
            assert torch.equal(p.detach(), received[name])


@pytest.mark.parametrize("inner", [1, 3])
def test_the_adversary_stays_within_the_radius_and_takes_sign_steps(inner: int) -> None:
    model, batch = planted(True)
    run = make_run(ANPConfig(radius=0.4, inner=inner), model, batch)
    run.train_mode()
    method = ANP()
    method.setup(run)
    delta, xi = method.adversary(run, batch)
    assert all(float(t.abs().max()) <= 0.4 + 1e-7 for t in [*delta, *xi])
    assert any(bool((t.abs() > 0.3).any()) for t in delta)


def test_running_statistics_see_the_clean_pass_only() -> None:
    model, batch = planted(True)
    twin, _ = planted(True)
    run = make_run(ANPConfig(), model, batch)
    method = ANP()
    method.setup(run)
    run.train_mode()
    twin[1].train()
    method.backward(run, batch)
    twin(batch[0])
    assert torch.allclose(model[1].running_mean, twin[1].running_mean)
    assert torch.allclose(model[1].running_var, twin[1].running_var)
    assert int(model[1].num_batches_tracked) == int(twin[1].num_batches_tracked)


@pytest.mark.parametrize("norm", [False, True])
def test_pruned_neurons_lose_their_weight_and_all_else_is_as_received(norm: bool) -> None:
    model, batch = planted(norm)
    seen = []

    class Watched(ANP):
        def after_step(self, run):
            super().after_step(run)
            values = torch.cat([m.detach().flatten() for m in self.masks.values])
            seen.append((float(values.min()), float(values.max())))

    result = fastfip.purify(model, batch, Watched, steps=40, progress=False)
    assert min(low for low, _ in seen) < 0.95 and all(low >= 0 and high <= 1 for low, high in seen)
    before, after = model.state_dict(), result.state_dict()
    assert list(before) == list(after) and all(before[k].dtype == after[k].dtype for k in before)
    masked = [weight for weight, _ in neurons(model, norm)]
    pruned = 0
    for name in before:
        if name not in masked:
            assert torch.equal(before[name], after[name])
            continue
        gone = (after[name] == 0).flatten(1 if after[name].dim() > 1 else 0)
        gone = gone.all(1) if after[name].dim() > 1 else gone
        pruned += int(gone.sum())
        assert torch.equal(after[name][~gone], before[name][~gone])
    assert pruned >= 1 and any(f"{pruned} of {36 - 24 * norm} neurons pruned" in note for note in result.notes)
    again = fastfip.purify(model, batch, ANP, steps=40, progress=False)
    assert all(torch.equal(after[k], again.state_dict()[k]) for k in after)


def chosen(tolerance: float = 0.05, threshold: float | None = None):
    model, batch = planted(False)
    run = make_run(ANPConfig(tolerance=tolerance, threshold=threshold), model, batch, heldout=True)
    method = ANP()
    method.setup(run)
    run.step = 1
    total = sum(m.numel() for m in method.masks.values)

    def accuracy(gone: torch.Tensor) -> float:
        method._prune(gone)
        assert sum(int((m == 0).sum()) for m in method.masks.values) == len(gone)
        with torch.no_grad():
            return float((model(batch[0]).argmax(1) == batch[1]).float().mean())

    return run, method, total, accuracy


def test_neurons_go_as_far_as_clean_accuracy_allows() -> None:
    run, method, total, accuracy = chosen()
    generator = torch.Generator().manual_seed(3)
    masks, order = torch.rand(total, generator=generator).sort()
    gone = method.choose(run, masks, order)
    assert 0 < len(gone) < int((masks <= 0.9).sum()) and len(gone) == len(gone.unique())
    assert set(gone.tolist()) <= set(order[masks <= 0.9].tolist())
    assert accuracy(gone) >= accuracy(order[:0]) - 0.05
    # One neuron between any two thresholds: those that can go on top of the ones before them do.
    masks = torch.cat([torch.arange(1, 19) / 20 - 0.01, torch.ones(total - 18)])
    spared = 0
    for _ in range(5):
        order, expected = torch.randperm(total, generator=generator), []
        for neuron in order[:18].tolist():
            if accuracy(torch.tensor([*expected, neuron])) >= accuracy(order[:0]) - 0.05:
                expected.append(neuron)
        assert method.choose(run, masks, order).tolist() == expected
        spared += 18 - len(expected)
    assert spared > 0


def test_a_neuron_that_clean_images_need_does_not_end_the_pruning() -> None:
    """Masks at zero are in no order: whichever neuron comes first, the others that can go do."""
    run, method, total, accuracy = chosen(tolerance=0.02)
    nothing = torch.arange(0)
    cost = torch.tensor([accuracy(nothing) - accuracy(torch.tensor([k])) for k in range(total)])
    assert cost.max() > 0.02
    order = cost.argsort(descending=True)
    gone = method.choose(run, torch.zeros(total), order)
    assert order[0] not in gone and len(gone) >= 5 and accuracy(gone) >= accuracy(nothing) - 0.02


def test_the_choice_takes_few_scores(monkeypatch) -> None:
    run, method, total, _ = chosen()
    calls = []
    score = method.score
    monkeypatch.setattr(method, "score", lambda run: calls.append(1) or score(run))
    monkeypatch.setattr(anp, "MOST_SCORES", 7)
    masks = torch.linspace(0, 0.85, total)
    assert len(method.choose(run, masks, torch.arange(total))) >= 1 and 2 <= len(calls) <= 7 + 1 + 3  # 2 ** 3 > 7


def test_the_samples_tuned_on_have_the_last_word() -> None:
    """Few held-out samples let neurons go that the others need: the last ones are given back."""
    run, method, total, accuracy = chosen(tolerance=0.03)
    x, y = planted(False)[1]
    few = torch.cat([torch.nonzero(y == c).flatten()[:1] for c in range(2)])
    run.heldout = CleanSet.of((x[few], y[few]))
    method.before = method.score(run)
    nothing = torch.arange(0)
    fits = [k for k in range(total) if accuracy(torch.tensor([k])) >= accuracy(nothing) - 0.03]
    order = torch.tensor(fits + [k for k in range(total) if k not in fits])
    masks = torch.linspace(0.0, 0.89, total)
    gone = method.choose(run, masks, order)
    assert run.heldout is not None and run.heldout.n == 2
    ends = method.ends
    assert accuracy(order[:0]) - accuracy(gone) <= 0.03 < accuracy(order[:0]) - accuracy(method.joined)
    assert len(gone) in ends and torch.equal(gone, method.joined[: len(gone)])


def test_ctrl_c_while_neurons_are_chosen_prunes_none(monkeypatch) -> None:
    model, batch = planted(False)

    def interrupted(*_: object) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(ANP, "choose", interrupted)
    result = fastfip.purify(model, batch, "anp", steps=20, progress=False)
    assert result.interrupted and any("none was pruned" in note for note in result.notes)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), result.state_dict().values()))


def test_a_given_threshold_is_taken() -> None:
    run, method, total, _ = chosen(threshold=0.2)
    masks, order = torch.rand(total, generator=torch.Generator().manual_seed(3)).sort()
    assert torch.equal(method.choose(run, masks, order), order[: int((masks <= 0.2).sum())])
    assert torch.equal(method.choose(run, torch.ones(total), order), order[:1])


def test_pruning_weakens_a_planted_backdoor() -> None:
    """It does not remove it: with twelve neurons the trigger's are needed by clean images as well."""
    model, batch = planted(True)
    result = fastfip.purify(model, batch, "anp", steps=150, lr=0.05, progress=False)
    acc, asr = rows(result.model)
    assert rows(model)[1] > 0.95 and asr < rows(model)[1] - 0.1 and acc > 0.9


def test_it_runs_on_attention() -> None:
    model, batch = vit()
    result = fastfip.purify(model, batch, "anp", epochs=3, progress=False)
    assert torch.equal(result.model.head.weight, model.head.weight)
    assert any("neurons pruned" in note for note in result.notes)


def test_a_net_that_is_one_layer_has_nothing_to_prune() -> None:
    _, batch = planted()
    with pytest.raises(ModelError, match="anp finds nothing to tune"):
        fastfip.purify(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), batch, "anp", steps=1, progress=False)
