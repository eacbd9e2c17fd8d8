"""`audit`: a planted backdoor is ranked first and flagged from clean samples alone, its clean twin is not."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

import fastfip
from fastfip.auditing.anomaly import anomaly
from fastfip.auditing.result import Audit, NetAudit, Retuning
from fastfip.data import Task
from fastfip.errors import BackendError, ConfigError, DataError, ModelError
from fastfip.worst_case.inversion import FORMS, invert
from tests.support.small_nets import CLASSES, conv_net, data, loader, same, values

TARGET = 0


class NoAttack:
    def poison(self, x, y, rate, target, generator=None):
        return x, y, None


@pytest.fixture(scope="module")
def digits():
    """Digits, the attack, a backdoored net and a clean one trained in the same way."""
    pytest.importorskip("sklearn")
    from fastfip.cli import demonstration as demo

    x, y, test_x, test_y = demo.digits(0)
    attack = demo.BadNets(size=2)
    nets = [demo.train_backdoored(x, y, a, 0, epochs=6) for a in (attack, NoAttack())]
    return (x[:300], y[:300]), attack.asr_set(test_x, test_y, TARGET), nets


@pytest.fixture(scope="module")
def audited(digits):
    clean, triggered, (bad, good) = digits
    pick = torch.arange(12)
    poisoned = [(triggered[0][pick], triggered[1][pick])]
    return fastfip.audit(bad, clean, purified=good, poisoned=poisoned, asr_loader=[triggered], steps=80)


@pytest.fixture(scope="module")
def others(audited):
    """What is found on two more backdoored nets and a clean one, of other triggers and other images, by name."""
    from fastfip.cli import demonstration as demo

    found = {"white, 0": audited.received, "clean, 0": audited.purified}
    for name, seed, attack in (
        ("checker, 0", 0, demo.BadNets(size=3, pattern="checker")),
        ("away from the border, 1", 1, demo.BadNets(size=2, margin=2)),
        ("clean, 1", 1, NoAttack()),
    ):
        x, y, _, _ = demo.digits(seed)
        net = demo.train_backdoored(x, y, attack, seed, epochs=6)
        found[name] = fastfip.audit(net, [(x[:300], y[:300])], steps=80, sharpness=False).received
    return found


def test_the_planted_class_is_first_and_flagged_and_the_clean_twin_is_not(audited, others):
    """The margins are wide: nets differ by the instruction set they were trained with, as by another seed."""
    for name, net in others.items():
        for form, ranks in net.anomaly.items():
            size = net.inverted[form].size
            if name.startswith("clean"):
                assert ranks.ratio > 0.5, (name, form, ranks)
            else:
                assert ranks.classes[0] == TARGET, (name, form, size)
                # Measured over three seeds and three instruction sets: at most 0.67, additive, and 0.19, patch.
                assert float(size[TARGET]) < {"additive": 0.8, "patch": 0.5}[form] * float(size[1:].min()), (name, size)
        assert net.flagged == ([] if name.startswith("clean") else [TARGET]), (name, str(net.words()))
    bad = audited.received
    assert bad.verdict == "flagged" and audited.purified.verdict != "flagged"
    one = bad.inverted["patch"]
    assert bool(one.reached[TARGET]) and float(one.success[TARGET]) >= 0.9
    assert "class 0 flagged" in str(audited) and "not a certificate" in str(audited)


def test_what_was_found_is_what_it_says(digits, audited):
    """The change of the target class, put on fresh images, sends them there; the size is that of the change."""
    (x, y), triggered, (bad, good) = digits
    for form, one in audited.received.inverted.items():
        others = x[y != TARGET][150:]
        moved = one.apply(others, TARGET)
        with torch.no_grad():
            assert float((bad(moved).argmax(1) == TARGET).float().mean()) > 0.75
            assert float((bad(others).argmax(1) == TARGET).float().mean()) < 0.1
        assert float(moved.min()) >= float(x.min()) and float(moved.max()) <= float(x.max())
        if form == "patch":
            assert float(one.size[TARGET]) == pytest.approx(float(one.mask[TARGET].sum()), rel=1e-4)
            assert float(one.size[TARGET]) < 0.5 * float(one.size.median())
        # On the clean twin the same change does less: that is what `transfer` reports.
        with torch.no_grad():
            index = torch.nonzero(y != TARGET).flatten()[:300]
        assert audited.purified.transfer[form][TARGET] < 0.5 < float(one.success[TARGET]), index.shape


def test_retuning_sees_the_backdoor_come(audited):
    course = dict(audited.retuning.course)
    assert audited.retuning.poisoned == 12 and course[0] < 0.2 < course[20]
    assert "re-tuned with 12 poisoned samples" in str(audited)


def test_figures_and_picture(audited, tmp_path):
    values = json.loads(audited.to_json())
    assert values["received"]["flagged"] == [TARGET] and values["purified"]["verdict"] != "flagged"
    assert values["received"]["sharpness"]["lambda_max"] > 0
    assert len(values["received"]["forms"]["patch"]["size"]) == 10
    pytest.importorskip("matplotlib")
    figure = audited.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    pictures = [axes for axes in figure.axes if axes.get_title()]
    assert len(pictures) == 16 and pictures[0].get_title().startswith("class 0: ")
    assert pictures[0].get_title().endswith(" pixels") and pictures[0].get_xlabel().startswith("sends 9")
    (drawn,) = pictures[0].images
    shown, bound = drawn.get_array(), drawn.norm.vmax
    assert shown.shape == (16, 16) and float(abs(shown).max()) == pytest.approx(bound) == -drawn.norm.vmin
    assert float(shown[14:, 14:].mean()) > 0.2 * bound > float(shown[:8, :8].mean())  # the trigger
    assert len(figure.axes) == 32  # a key beside each of them
    assert "in the units of the inputs" in figure.get_supxlabel()


def test_the_report_has_the_changes_as_pictures(audited, tmp_path):
    audited.report(tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert text.count("<img ") == 20 and "Smallest patch change towards class 0 on the received model" in text
    assert "class 0 flagged" in text and "Re-tuning test" in text and "pixels covered" in text
    found = audited.document()["received"]["pictures"][0]
    assert found["label"] == TARGET and found["size"] == float(audited.received.inverted[found["form"]].size[TARGET])


def test_nothing_is_changed_and_a_seed_is_a_result():
    model = conv_net().train()
    model[0].weight.requires_grad_(False)
    before, state = values(model), torch.get_rng_state()
    runs = []
    for _ in range(2):
        torch.rand(1)
        found = fastfip.audit(model, loader(), steps=3, sharpness=False)
        runs.append({form: one.size for form, one in found.received.inverted.items()})
    assert all(torch.equal(runs[0][form], runs[1][form]) for form in FORMS)
    assert same(before, values(model)) and model.training and not model[0].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    torch.set_rng_state(state)
    torch.rand(1), torch.rand(1)
    assert found.received.verdict == "cannot tell"  # three classes
    assert "3 classes are too few" in str(found)


def test_sizes_are_measured_where_just_enough_samples_move():
    """One logit rises with one pixel: the smallest additive change is known."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]))
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(200, 1, 2, 2, generator=generator) * 2 - 1
    x[:, 0, 0, 0] = -torch.rand(200, generator=generator)  # class 0; to class 1 by more than -x
    x[0, 0, 0, 0] = 1.0  # so that the range allows it
    y = (x[:, 0, 0, 0] > 0).long()
    found = invert(net, Task(), (x, y), [1], "additive", reach=0.9, steps=150, check=190)
    unit = float(x.std(unbiased=False)) * 2
    assert found.classes.tolist() == [1] and bool(found.reached[0])
    assert float(found.size[0]) * unit == pytest.approx(0.9, abs=0.12)
    assert 0.85 <= float(found.success[0]) <= 0.97


def test_anomaly_index_and_chance():
    sizes = torch.tensor([8.0, 100, 110, 90, 95, 105, 120, 85, 99, 101])
    found = anomaly(range(10), sizes, torch.ones(10, dtype=torch.bool))
    log = sizes.double().log()
    spread = 1.4826 * (log - log.quantile(0.5)).abs().quantile(0.5)
    assert found.classes[0] == 0 and found.index[0] == pytest.approx(float((log.quantile(0.5) - log[0]) / spread))
    assert found.p < 0.001 and found.ratio == pytest.approx(8 / 99.5, rel=0.01)
    # What is called chance is chance: of samples of one normal, five in a hundred are below 0.05.
    generator = torch.Generator().manual_seed(1)
    draws = torch.randn(400, 10, generator=generator).exp()
    share = sum(anomaly(range(10), d, torch.ones(10, dtype=torch.bool)).p < 0.05 for d in draws) / 400
    assert 0.02 < share < 0.09
    # The labels are those that were given, and a larger size never comes first.
    named = anomaly([7, 3, 9, 4, 5], torch.tensor([5.0, 1, 6, 7, 8]), torch.ones(5, dtype=torch.bool))
    assert named.classes == (3, 7, 9, 4, 5) and list(named.index) == sorted(named.index, reverse=True)


def test_when_it_cannot_tell():
    every = torch.ones(6, dtype=torch.bool)
    few = anomaly(range(4), torch.tensor([1.0, 9, 9, 8]), every[:4])
    assert few.p is None and "4 classes" in few.why_not and few.classes[0] == 0
    unreached = anomaly(range(6), torch.tensor([1.0, 9, 9, 9, 9, 9]), torch.tensor([True] * 3 + [False] * 3))
    assert unreached.p is None and "3 of 6 classes" in unreached.why_not
    flat = anomaly(range(6), torch.full((6,), 2.0), every)
    assert flat.p is None and "nearly equal" in flat.why_not and math.isfinite(flat.index[0])
    wide = anomaly(
        range(6), torch.tensor([1.0, 3, 9, 27, 81, 243]), every
    )  # a class is much smaller, but so are others
    net = NetAudit("received", {}, {"patch": wide}, None)
    assert net.flagged == [] and net.verdict == "cannot tell"
    near = anomaly(range(6), torch.tensor([60.0, 99, 100, 101, 100.5, 99.5]), every)  # far out, and yet hardly smaller
    net = NetAudit("received", {}, {"patch": near}, None)
    assert near.index[0] > 20 and net.flagged == [] and net.verdict == "nothing stands out"


def test_inputs_that_cannot_be_changed_leave_the_sharpness():
    net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3))
    tokens, labels = torch.randint(9, (20, 3)), torch.arange(20) % 3
    found = fastfip.audit(net, [(tokens, labels)])
    assert found.received.inverted == {} and found.received.sharpness["n"] == 20
    assert "no changes were looked for" in str(found) and found.received.verdict == "cannot tell"


def test_probabilities_are_taken_for_what_they_are():
    found = fastfip.audit(nn.Sequential(conv_net(), nn.Softmax(1)), loader(), steps=2, sharpness=False, classes=[2, 0])
    assert any("probabilities" in note for note in found.notes)
    assert found.received.inverted["patch"].classes.tolist() == [2, 0]


def test_bad_usage():
    model = conv_net()
    for options in (
        {"forms": ["stripe"]}, {"reach": 0.0}, {"steps": 0}, {"samples": 1}, {"amp": "fp8"}, {"classes": [3]},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            fastfip.audit(model, loader(), **options)
    x, y = data(9)
    with pytest.raises(DataError, match="one class"):
        fastfip.audit(model, [(x, y * 0)], steps=1, sharpness=False)
    with pytest.raises(DataError, match="at least 2 triggered"):
        fastfip.audit(model, loader(), steps=1, sharpness=False, poisoned=[(x[:1], y[:1])])


@pytest.fixture(scope="module")
def small():
    """A net, and what its audit with all parts finds in float32."""
    torch.manual_seed(0)
    model = conv_net()
    return model, whole_audit(model, torch.float32)


def whole_audit(model, dtype, wrap=lambda net: net):
    x, y = data(24)
    mine = wrap(copy.deepcopy(model).to(dtype))
    given = copy.deepcopy(mine).to(dtype)
    before, kept = values(given), x.to(dtype)
    batch = (kept.clone(), y)
    found = fastfip.audit(given, [batch], purified=mine, steps=5, poisoned=[(x[:6].to(dtype), y[:6] * 0)])
    assert same(before, values(given)) and same(before, values(mine)) and torch.equal(batch[0], kept)
    return found


def near(found, want, rel):
    for one, other in zip(found.nets, want.nets):
        for form in FORMS:
            assert torch.allclose(one.inverted[form].size.double(), other.inverted[form].size.double(), rtol=rel)
            assert one.transfer.get(form) == pytest.approx(other.transfer.get(form), abs=0.1)
        assert one.sharpness["lambda_max"] == pytest.approx(other.sharpness["lambda_max"], rel=rel)
    assert found.retuning == want.retuning


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_nets_of_every_precision(small, dtype):
    model, want = small
    found = whole_audit(model, dtype)
    near(found, want, 0.05 if dtype is torch.bfloat16 else 0.01)
    assert any("copies in float32" in note for note in found.notes) == (dtype is not torch.float64)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert found.received.inverted["patch"].moved.dtype is wide


class Halves(nn.Module):
    """Casts to float16 in the middle, whatever its weights are."""

    def __init__(self, net):
        super().__init__()
        self.first, self.rest = net[0], net[1:]

    def forward(self, x):
        return self.rest(self.first(x).half())


def test_a_net_that_casts_itself_is_searched_in_its_own_dtype(small):
    model, want = small
    found = whole_audit(model, torch.float16, Halves)
    near(found, want, 0.05)
    assert any("in its own dtype" in note for note in found.notes)


class Fixed(nn.Module):
    """No parameters; input [N, 2, 6, 6]."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.register_buffer("w", torch.randn(CLASSES, 72).to(dtype))

    def forward(self, x):
        return x.flatten(1) @ self.w.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_net_without_parameters(dtype):
    x, y = data(24)
    clean, model = [(x.to(dtype), y)], Fixed(dtype)
    found = fastfip.audit(model, clean, steps=2)
    assert set(found.received.inverted) == set(FORMS) and found.received.sharpness is None
    assert any("sharpness not measured" in note for note in found.notes) and model.w.dtype is dtype
    with pytest.raises(ModelError, match="leave out poisoned="):
        fastfip.audit(model, clean, steps=2, poisoned=clean)


class NoGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def forward(self, x):
        with torch.no_grad():
            return self.net(x)


def test_what_cannot_be_audited_is_one_clear_error():
    model, (x, y) = conv_net(), data(24)
    spoiled = x.clone()
    spoiled[20, 0, 0, 0] = math.nan
    broken = conv_net()
    with torch.no_grad():
        broken[6].weight[0, 0] = math.nan
    narrow = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, CLASSES))
    bad = [
        ({"device": "foo"}, ConfigError, "device='foo': give cpu"),
        ({"device": "meta"}, ConfigError, "no numbers"),
        ({"seed": -1}, ConfigError, "seed=-1"),
        ({"clean_loader": [(spoiled, y)]}, DataError, "1 of 24 samples hold NaN"),
        ({"clean_loader": [(x[:, :1], y)]}, ModelError, "the model fails on a batch of the clean data"),
        ({"purified": conv_net(5)}, ModelError, "received model has 3 classes and the purified model has 5"),
        ({"model": conv_net(5), "purified": model}, ModelError, "has 5 classes and the purified model has 3"),
        ({"purified": narrow}, ModelError, "purified=: the model fails on a batch .* give the same model"),
        ({"purified": broken}, ModelError, r"purified=: the weight 6\.weight holds NaN"),
        ({"purified": nn.Sequential(model, nn.Linear(CLASSES, 1))}, ModelError, "purified=: an audit needs logits"),
        ({"model": broken}, ModelError, r"6\.weight holds NaN"),
        ({"model": 3}, ModelError, "must be a torch.nn.Module"),
        ({"model": conv_net().to("meta")}, ModelError, "meta device"),
        ({"model": nn.Sequential(nn.Flatten(), nn.LazyLinear(3))}, ModelError, "lazy layers"),
        ({"model": NoGradient()}, ModelError, "passes none to them"),
        ({"forward": lambda net, batch: net(batch[0])[:5]}, DataError, "24 samples give 5 rows"),
        ({"poisoned": [(spoiled, y)]}, DataError, "1 of 24 samples hold NaN"),
        ({"poisoned": [(x, y + 7)]}, DataError, "outside 0..2"),
        ({"poisoned": [(x.byte(), y)]}, DataError, "uint8"),
        ({"poisoned": [(x, y)], "asr_loader": [(x[:, :1], y)]}, ModelError, "fails on a batch of asr_loader="),
    ]
    if not torch.cuda.is_available():
        bad.append(({"device": "cuda"}, BackendError, "'cuda' cannot be used here"))
    for options, error, words in bad:
        with pytest.raises(error, match=words):
            fastfip.audit(**{"model": model, "clean_loader": [(x, y)], "steps": 1, "sharpness": False, **options})


def test_labels_that_only_the_loss_understands_leave_the_sharpness():
    x, y = data(24)
    soft = nn.functional.one_hot(y, CLASSES).float()
    found = fastfip.audit(conv_net(), [(x, soft)], loss=lambda out, batch: -(out.log_softmax(1) * batch[1]).sum(1))
    assert found.received.inverted == {} and found.received.sharpness["n"] == 24
    assert any("labels are not class indices" in note for note in found.notes)


def test_a_purified_net_without_the_softmax_of_the_received_one():
    """Each net is asked by itself whether it gives probabilities."""
    net = conv_net()
    found = fastfip.audit(nn.Sequential(net, nn.Softmax(1)), loader(), purified=net, steps=3, sharpness=False)
    for form in FORMS:
        assert torch.equal(found.received.inverted[form].size, found.purified.inverted[form].size)


def test_table_without_purified_net():
    found = Audit(NetAudit("received", {}, {}, None), None, Retuning(((0, 0.5),), 3), {"samples": 5}, 1.0, ["a note"])
    text = str(found)
    assert "ASR by steps: 0: 50 %" in text and "note: a note" in text and "received's" not in text
