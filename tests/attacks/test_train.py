"""Training with backdoors: what is poisoned, what is left, what is reproduced."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from fastfip.attacks import Attack, Injection, attack_labels, poison_and_train
from fastfip.attacks._planted import Planted
from fastfip.attacks.badnets import BadNets
from fastfip.attacks.cba import CBA
from fastfip.data.scaling import Pixels
from fastfip.errors import ConfigError, DataError, ModelError
from fastfip.testing.nets import ViT
from tests.support.small_nets import same, values


def shapes(n=240, seed=0):
    """Bright quarters of an image: four classes that a small net learns in seconds."""
    generator = torch.Generator().manual_seed(seed)
    x, y = 0.3 * torch.rand(n, 3, 12, 12, generator=generator), torch.arange(n) % 4
    for c, (rows, columns) in enumerate(((0, 0), (0, 6), (6, 0), (4, 4))):
        x[y == c, :, rows : rows + 5, columns : columns + 5] += 0.5
    return x, y


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(432, 4)
    )


PATCH = BadNets(size=2)
TRAINING = {"epochs": 6, "lr": 0.05, "batch_size": 32, "flip": False, "crop": False}


def test_a_backdoor_is_learned_and_the_model_given_is_left():
    model, (x, y) = net(), shapes()
    before, kept = values(model), x.clone()
    pixels = Pixels(mean=(0.5,), std=(0.25,))
    out = poison_and_train(model, (x, y), Injection(PATCH, 1), test=shapes(80, 1), pixels=pixels, **TRAINING)
    assert same(values(model), before) and torch.equal(x, kept)
    assert out.clean.acc > 0.95 and out.attacked[0].asr > 0.9 and not out.model.training
    assert len(out.poisoned[0]) == 24 and not bool((y[out.poisoned[0]] == 1).any())
    assert "badnets" in str(out) and out.to_dict()["backdoors"][0]["poisoned"] == 24
    clean = poison_and_train(model, (x, y), [], test=shapes(80, 1), pixels=pixels, **TRAINING)
    assert clean.clean.acc > 0.95 and not clean.attacked


def test_bytes_and_floats_are_the_same_images_and_a_seed_the_same_network():
    x, y = shapes()
    x = (255 * x).to(torch.uint8)
    settings = {**TRAINING, "epochs": 2, "crop": True, "flip": True}
    injections = [Injection("wanet", 2), Injection(PATCH, "next")]
    one, two = (poison_and_train(net(), (data, y), injections, **settings) for data in (x, x.float() / 255))
    assert same(values(one.model), values(two.model)) and one.history == two.history
    other = poison_and_train(net(), (x, y), injections, seed=1, **settings)
    assert not same(values(one.model), values(other.model))


def test_no_image_carries_two_triggers():
    x, y = shapes()
    injections = [
        Injection(PATCH, 1, rate=0.2, sources=(2,)), Injection("sig", 0, rate=0.2), Injection("bppa", "next", rate=0.2),
    ]  # fmt: skip
    out = poison_and_train(net(), (x, y), injections, **{**TRAINING, "epochs": 1})
    together = torch.cat(out.poisoned)
    assert len(together.unique()) == len(together) == 3 * 48
    assert bool((y[out.poisoned[0]] == 2).all()) and bool((y[out.poisoned[1]] == 0).all())
    with pytest.raises(DataError, match="12 are of the target class and free"):
        poison_and_train(net(), (x, y), [Injection("sig", 0, rate=0.2), Injection("sig", 0, rate=0.1)], **TRAINING)


def test_the_usual_rate_is_all_of_a_small_target_class_and_a_rate_that_is_asked_for_is_not():
    x, y = shapes()
    kept = (y != 3) | (torch.arange(240) < 40)
    few, settings = (x[kept], y[kept]), {**TRAINING, "epochs": 1}
    out = poison_and_train(net(), few, Injection("sig", 3), **settings)
    assert len(out.poisoned[0]) == 10 and out.to_dict()["backdoors"][0]["rate"] == 10 / 190
    with pytest.raises(DataError, match="asks for 19 images, 10 are of the target class"):
        poison_and_train(net(), few, Injection("sig", 3, rate=0.1), **settings)


def test_a_training_that_was_cut_off_ends_as_if_it_had_not_been(tmp_path):
    data, state = shapes(), tmp_path / "state.pth"
    settings = {**TRAINING, "epochs": 3, "crop": True}

    def stop(what, done, total):
        if what == "training" and done > total * 2 // 3:
            raise KeyboardInterrupt

    whole = poison_and_train(net(), data, Injection("wanet", 1), **settings)
    with pytest.raises(KeyboardInterrupt):
        poison_and_train(net(), data, Injection("wanet", 1), keep=state, tick=stop, **settings)
    assert state.exists()
    resumed = poison_and_train(net(), data, Injection("wanet", 1), keep=state, **settings)
    assert same(values(whole.model), values(resumed.model)) and resumed.history == whole.history
    with pytest.raises(ConfigError, match="no state of this training"):
        poison_and_train(net(), data, Injection("wanet", 1), keep=state, **{**settings, "epochs": 4})


def test_adamw_trains_what_sgd_at_its_learning_rate_does_not_and_goes_on_from_a_file(tmp_path):
    data, settings = shapes(), {**TRAINING, "lr": 3e-3, "epochs": 8, "test": shapes(80, 1)}
    torch.manual_seed(0)
    transformer = ViT(4, size=12, patch=4, dim=32, depth=2, heads=2, ratio=2)
    first = poison_and_train(transformer, data, Injection(PATCH, 1), optimizer="adamw", weight_decay=0.05, **settings)
    assert first.clean.acc > 0.9 and first.attacked[0].asr > 0.8
    slow = poison_and_train(transformer, data, Injection(PATCH, 1), **settings)
    assert slow.clean.acc < first.clean.acc - 0.1
    state = tmp_path / "state.pth"

    def stop(what, done, steps):
        if done == 3 * steps // 4:
            raise KeyboardInterrupt

    changed = {**settings, "optimizer": "adamw", "weight_decay": 0.05, "keep": state}
    with pytest.raises(KeyboardInterrupt):
        poison_and_train(transformer, data, Injection(PATCH, 1), tick=stop, **changed)
    resumed = poison_and_train(transformer, data, Injection(PATCH, 1), **changed)
    assert same(values(first.model), values(resumed.model))


def test_the_learning_rate_of_adamw_rises_and_falls_to_nothing(monkeypatch):
    seen, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *given: (seen.append(self.param_groups[0]["lr"]), step(self))[1]
    )
    poison_and_train(net(), shapes(), [], optimizer="adamw", **{**TRAINING, "lr": 1e-3, "epochs": 5})
    assert len(seen) == 40 and seen[:2] == pytest.approx([5e-4, 1e-3]) and max(seen) == pytest.approx(1e-3)
    assert all(a >= b for a, b in zip(seen[2:], seen[3:])) and 0 < seen[-1] < 1e-5


def test_an_optimiser_that_is_not_known_is_refused():
    with pytest.raises(ConfigError, match="'adam': must be 'sgd' or 'adamw'"):
        poison_and_train(net(), shapes(60), [], **{**TRAINING, "optimizer": "adam"})


def test_poisoned_images_lie_where_they_are_looked_for():
    x, y = torch.rand(1400, 1, 4, 4), torch.arange(1400) % 4
    planted = Planted(x, y, 4, torch.Generator().manual_seed(0))
    injections = [Injection(PATCH, 1, 0.4), Injection("bppa", "next", 0.1), Injection(PATCH, 1, 0.0)]
    for injection in injections:
        planted.add(injection)
    assert [len(places) for places in planted.places] == [560, 140, 0] and planted.triggered.shape == (700, 1, 4, 4)
    for injection, places in zip(injections, planted.places):
        shown, labels = planted.batch(places.flip(0))
        assert torch.equal(shown, injection.ready()[0].trigger(x[places.flip(0)]))
        assert torch.equal(labels, attack_labels(y, injection.target, 4)[places.flip(0)])


def test_a_state_of_another_training_is_refused(tmp_path):
    x, y = shapes(60)
    state, settings = tmp_path / "state.pth", {**TRAINING, "epochs": 1}
    mine = Injection(PATCH, 1, sources=(0, 2))
    poison_and_train(net(), (x, y), mine, keep=state, **settings)
    assert len(poison_and_train(net(), (x, y), mine, keep=state, **settings).history) == 1
    moved, other = net(), y.clone()
    with torch.no_grad():
        moved[0].bias[0] += 1e-3
    other[5] = (other[5] + 1) % 4
    wrong = {
        "attacks": [Injection(BadNets(size=3), 1, sources=(0, 2)), Injection(PATCH, 3, sources=(0, 2)),
                    Injection(PATCH, 1, 0.15, (0, 2)), Injection(PATCH, 1), []],
        "seed": {"seed": 1}, "lr": {"lr": 0.04}, "weight decay": {"weight_decay": 0.0}, "crop": {"crop": True},
        "optimizer": {"optimizer": "adamw"},
        "effort": {"effort": 0.5}, "pixels": {"pixels": Pixels((0.5,), (0.5,))},
        "first weights": moved, "images or labels": [(x * 0.99, y), (x, other)],
    }  # fmt: skip
    for said, change in wrong.items():
        for one in change if isinstance(change, list) else [change]:
            given = {"model": net(), "data": (x, y), "attacks": mine, **settings}
            if isinstance(one, dict):
                given |= one
            else:
                place = {"attacks": "attacks", "first weights": "model", "images or labels": "data"}[said]
                given[place] = one
            with pytest.raises(ConfigError, match=f"no state of this training .*{said}.*: remove it"):
                poison_and_train(**given, keep=state)


def test_a_state_whose_attack_was_fitted_in_another_way_is_refused(tmp_path):
    @dataclass(frozen=True)
    class Fitted(Attack):
        name: ClassVar[str] = "fitted"
        summary: ClassVar[str] = "a brightness that is found"
        found: float = field(default=0.0, repr=False)

        def trigger(self, x):
            return x * self.found

        def fit(self, ground):
            return replace(self, found=next(brightness))

    brightness, state = iter((0.5, 0.5, 0.6)), tmp_path / "state.pth"
    for _ in range(2):
        poison_and_train(net(), shapes(60), Injection(Fitted(), 1), keep=state, **{**TRAINING, "epochs": 1})
    with pytest.raises(ConfigError, match="not the same poisoned images"):
        poison_and_train(net(), shapes(60), Injection(Fitted(), 1), keep=state, **{**TRAINING, "epochs": 1})


def counting(calls):
    """A net that says how often it was trained a step."""
    model = net()
    model.register_forward_hook(lambda module, x, out: calls.append(module.training))
    return model


def test_a_network_is_not_lost_where_none_of_the_test_images_carries_a_trigger():
    data, (x, y) = shapes(), shapes(40, 1)
    settings = {**TRAINING, "epochs": 1}
    for attack, test in ((Injection(PATCH, 1, sources=(2,)), y != 2), (Injection(CBA(), 2), y != 0)):
        out = poison_and_train(net(), data, [attack], test=(x[test], y[test]), **settings)
        assert out.clean.acc is not None and out.attacked[0].asr is None and "not measured" in str(out)
        assert out.to_dict()["backdoors"][0]["asr"] is None


def test_what_could_not_be_scored_or_learned_is_said_before_anything_is_trained(tmp_path):
    x, y = shapes(60)
    fits, one = (x, y), Injection(PATCH, 1)
    wrong = {
        r"the test images are \[3, 9, 9\], those to train on \[3, 12, 12\]": (fits, one, {"test": (x[..., 3:, 3:], y)}),
        "test labels go up to 4, the model has 4 outputs": (fits, one, {"test": (x, y + 1)}),
        "^labels go up to 4, the model has 4 outputs": ((x, y + 1), one, {}),
        "classes=5: the model has 4 outputs": (fits, one, {"classes": 5}),
        "target=7: there are 4 classes, 0 to 3": (fits, Injection(PATCH, 7), {}),
        "a rate of 0.001 is none of 60 images": (fits, Injection(PATCH, 1, 0.001), {}),
        "a rate of 0.01 is none of 40 images": ((x[:40], y[:40]), Injection("narcissus", 1), {}),
        r"not of the target class and of the classes \[1\]": (fits, Injection(PATCH, 1, None, (1,)), {}),
        "no images of the target class 3": ((x[y < 3], y[y < 3]), Injection("sig", 3), {"classes": 4}),
        "leave out the sources": (fits, Injection("sig", 1, sources=(1,)), {}),
        "the folder .*nowhere does not exist": (fits, one, {"keep": tmp_path / "nowhere" / "k"}),
        "is a folder": (fits, one, {"keep": tmp_path}),
        "must be in ": ((x / x * x.new_tensor(float("nan")), y), one, {}),
    }  # fmt: skip
    for said, (data, injection, more) in wrong.items():
        calls = []
        with pytest.raises((DataError, ConfigError), match=said) as error:
            poison_and_train(counting(calls), data, injection, **{**TRAINING, **more})
        assert "\n" not in str(error.value) and True not in calls
    with pytest.raises(ModelError, match="logits"):
        poison_and_train(nn.Conv2d(3, 4, 3), fits, one, **TRAINING)


def test_images_of_other_floats_are_trained_on_as_float32():
    x, y = shapes(60)
    x = (x * 255).round() / 255
    one, two = (poison_and_train(net(), (x.to(t), y), Injection(PATCH, 1), **TRAINING) for t in (None, torch.float64))
    assert same(values(one.model), values(two.model))
    half = poison_and_train(net(), (x.half(), y), Injection(PATCH, 1), test=(x.double(), y), **TRAINING)
    assert half.clean.acc > 0.9


def test_an_attack_that_needs_a_clean_classifier_gets_the_one_that_was_given():
    seen, given = [], net()

    class Looks(BadNets):
        def fit(self, ground):
            seen.append(values(ground.model))
            return self

    poison_and_train(
        given, shapes(), [Injection("lira", 1, 0.1), Injection(Looks(), 2, 0.1)],
        **{**TRAINING, "epochs": 1, "effort": 0.02},
    )  # fmt: skip
    assert same(seen[0], values(given))


def test_what_cannot_be_trained_on():
    x, y = shapes(20)
    wrong = {"give images": (x[:, 0], y), "not normalised": (x * 2 - 1, y), "labels": (x, y[:3]), "from 0": (x, y - 1)}
    for said, data in wrong.items():
        with pytest.raises(DataError, match=said):
            poison_and_train(net(), data, Injection(PATCH))
    with pytest.raises(ConfigError, match="epochs=0"):
        poison_and_train(net(), (x, y), Injection(PATCH), epochs=0)
    with pytest.raises(DataError, match="'next' is not possible"):
        poison_and_train(net(), (x, y), Injection("sig", "next"))
