import math

import pytest
import torch
from torch import nn

import fastfip
from fastfip.data import Task
from fastfip.data.cleanset import CleanSet
from fastfip.errors import ConfigError, ModelError
from fastfip.methods import Method
from fastfip.methods.config import MethodConfig, learning_rate
from fastfip.methods.run import Run, autocast_dtype
from fastfip.purification.callbacks import Callback
from fastfip.purification.loop import Tuned, fit
from tests.support.small_nets import CLASSES, TiedNet, conv_net, data, plain_net, same, values


class Plain(Method):
    """Tunes everything; a test changes what it needs."""

    name = "plain"
    summary = "for tests"

    def parameter_groups(self, run):
        return [{"params": list(run.model.parameters())}]


def make_run(model=None, n=24, heldout=True, task=None, amp=None, **settings):
    torch.manual_seed(0)
    settings = {"epochs": 3, "batch_size": 8, "lr": 0.05, **settings}
    if settings.get("steps"):
        settings["epochs"] = None
    return Run(
        model=conv_net() if model is None else model,
        task=Task() if task is None else task,
        clean=CleanSet.of(data(n)),
        heldout=CleanSet.of(data(9, seed=1)) if heldout else None,
        config=MethodConfig(**settings),
        device=torch.device("cpu"),
        generator=torch.Generator().manual_seed(0),
        classes=CLASSES,
        amp=amp,
    )


def test_the_course_of_the_step_size():
    assert [learning_rate(s, 8, "constant", 0.5) for s in range(8)] == [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1]
    cosine = [learning_rate(s, 4, "cosine", 0.0) for s in range(4)]
    assert cosine == pytest.approx([1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])
    seen = []

    class Watch(Callback):
        def on_step(self, run, step_values):
            seen.append([group["lr"] for group in optimizers[0].param_groups])

    optimizers = []

    class Two(Plain):
        def parameter_groups(self, run):
            a, *b = run.model.parameters()
            return [{"params": [a], "lr": 1.0}, {"params": b}]

        def make_optimizer(self, run, groups):
            optimizers.append(super().make_optimizer(run, groups))
            return optimizers[0]

    fit(make_run(steps=4), Two(), False, [Watch()])
    assert [lr for lr, _ in seen] == pytest.approx(cosine)
    assert [lr for _, lr in seen] == pytest.approx([0.05 * c for c in cosine])


def test_it_learns_and_writes_history():
    run = make_run(epochs=12, lr=0.2)
    history = fit(run, Plain())
    assert [record["epoch"] for record in history] == list(range(1, 13))
    assert history[-1]["step"] == run.step == run.total_steps == 36 and run.progress == 1.0
    assert history[-1]["score"] < history[0]["score"] and history[-1]["heldout_acc"] == 1.0
    assert run.seconds["train"] > 0 and run.seconds["score"] > 0
    logits = run.model.eval()(data(9, seed=1)[0])
    loss = nn.functional.cross_entropy(logits, data(9, seed=1)[1]).detach()
    assert float(loss) == pytest.approx(min(record["score"] for record in history))


def test_steps_end_within_an_epoch_and_batches_cover_the_set():
    seen = []

    class Watch(Plain):
        def loss(self, run, batch):
            seen.append(batch[0].sum((1, 2, 3)).tolist())
            return super().loss(run, batch)

    run = make_run(steps=4, batch_size=10)
    fit(run, Watch())
    assert run.step == 4 and run.epochs == 2 and [len(rows) for rows in seen] == [10, 10, 4, 10]
    assert sorted(v for rows in seen[:3] for v in rows) == sorted(data(24)[0].sum((1, 2, 3)).tolist())


def test_a_method_may_leave_samples_out_and_a_new_pass_begins():
    seen = []

    class Fewer(Plain):
        def backward(self, run, batch):
            if run.step == 1:
                run.clean = run.clean.subset(torch.arange(3, 16))
            seen.append(batch[0].sum((1, 2, 3)).tolist())
            return super().backward(run, batch)

    run = make_run(steps=9)
    history = fit(run, Fewer())
    assert [len(rows) for rows in seen] == [8, 8, 8, 5, 8, 5, 8, 5, 8]
    kept = sorted(data(24)[0].sum((1, 2, 3))[3:16].tolist())
    for k in (2, 4, 6):
        assert sorted(seen[k] + seen[k + 1]) == kept
    assert run.step == 9 and run.epochs == run.epoch == len(history) == 5


class Scripted(Plain):
    """Scores what the test says."""

    def __init__(self, scores, candidates=None):
        self.scores, self.candidates = scores, candidates
        self.states = []

    def score(self, run):
        self.states.append(values(run.model))
        return {"score": self.scores[run.epoch - 1]}

    def is_candidate(self, run):
        return self.candidates is None or self.candidates[run.epoch - 1]


def test_the_best_candidate_is_kept_running_statistics_too():
    run = make_run()
    method = Scripted([0.3, 0.2, 0.4])
    history = fit(run, method)
    assert run.best_epoch == 2 and same(values(run.model), method.states[1])
    assert [record["candidate"] for record in history] == [True] * 3
    run = make_run()
    method = Scripted([0.3, 0.1, 0.2], [True, False, True])
    fit(run, method)
    assert run.best_epoch == 3 and same(values(run.model), method.states[2])
    run = make_run()
    method = Scripted([0.1, math.nan, 0.3])
    fit(run, method)
    assert run.best_epoch == 1


def test_the_last_epoch_is_kept_on_request_or_if_there_is_no_candidate():
    for select, candidates in (("last", None), ("best", [False] * 3)):
        run = make_run(select=select)
        method = Scripted([0.1, 0.2, 0.3], candidates)
        fit(run, method)
        assert same(values(run.model), method.states[2])


def test_patience():
    run = make_run(epochs=9, patience=2)
    history = fit(run, Scripted([0.5, 0.4, 0.6, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1]))
    assert len(history) == 4 and run.best_epoch == 2
    assert "no better held-out score in 2" in run.notes[0]


def test_very_many_epochs_are_scored_now_and_then():
    run = make_run(epochs=300, batch_size=24)
    history = fit(run, Plain())
    scored = [record["epoch"] for record in history if "score" in record]
    assert scored == list(range(3, 301, 3))


def test_what_is_not_tuned_is_frozen_and_flags_come_back():
    class Head(Plain):
        def parameter_groups(self, run):
            return [{"params": list(run.model[6].parameters())}]

        def backward(self, run, batch):
            out = super().backward(run, batch)
            flags.append([p.requires_grad for p in run.model.parameters()])
            return out

    flags = []
    run = make_run()
    run.model[0].weight.requires_grad_(False)
    run.model[6].bias.requires_grad_(False)
    before = values(run.model)
    fit(run, Head())
    assert flags[0] == [False, False, False, True, True]
    assert [p.requires_grad for p in run.model.parameters()] == [False, True, True, True, False]
    assert all(p.grad is None for p in run.model.parameters())
    after = values(run.model)
    assert torch.equal(before["0.weight"], after["0.weight"]) and not torch.equal(before["6.bias"], after["6.bias"])


def test_a_tied_weight_is_updated_once():
    run = make_run(TiedNet(), steps=1, momentum=0.0, lr=0.1, schedule="constant", batch_size=24)
    start = values(run.model)

    class Twice(Plain):
        def parameter_groups(self, run):
            return [{"params": [run.model.first.weight, run.model.second.weight]}, {"params": run.model.first.weight}]

        def after_step(self, run):
            grads.append(run.model.first.weight.grad.clone())

    grads = []
    fit(run, Twice())
    assert torch.allclose(run.model.first.weight, start["first.weight"] - 0.1 * grads[0])
    assert run.model.first.weight is run.model.second.weight


@pytest.mark.parametrize("mode", ["train", "eval", "freeze"])
def test_batchnorm_modes(mode):
    run = make_run(bn_mode=mode)
    modes = []

    class Watch(Plain):
        def loss(self, run, batch):
            modes.append((run.model[1].training, run.model[3].training, run.model.training))
            with run.bn("train"):
                assert run.model[1].training
            with run.bn("eval"):
                assert not run.model[1].training
            assert run.model[1].training == (mode == "train")
            return super().loss(run, batch)

    before = values(run.model)
    fit(run, Watch())
    after = values(run.model)
    assert set(modes) == {(mode == "train", False, False)}
    assert torch.equal(before["1.running_mean"], after["1.running_mean"]) == (mode != "train")
    assert torch.equal(before["1.weight"], after["1.weight"]) == (mode == "freeze")
    assert not torch.equal(before["0.weight"], after["0.weight"])


def test_dropout_is_off_unless_asked_for():
    active = []

    class Watch(Plain):
        def loss(self, run, batch):
            active.append(run.model[3].training)
            return super().loss(run, batch)

    fit(make_run(steps=1), Watch())
    fit(make_run(steps=1, dropout=True), Watch())
    assert active == [False, True]


def test_gradients_are_clipped():
    run = make_run(plain_net(), steps=1, grad_clip=1e-3, momentum=0.0, lr=1.0)
    before = values(run.model)
    fit(run, Plain())
    moved = sum((a - b).square().sum() for a, b in zip(values(run.model).values(), before.values())).sqrt()
    assert float(moved) == pytest.approx(1e-3, rel=1e-3)


def test_label_smoothing_and_weight_decay_do_what_they_say():
    run = make_run(label_smoothing=0.2)
    x, y = data(6)
    logits = run.forward((x, y))
    expected = nn.functional.cross_entropy(logits, y, label_smoothing=0.2, reduction="none")
    assert torch.allclose(run.loss(logits, (x, y)), expected)
    with pytest.raises(ConfigError, match="label_smoothing"):
        make_run(label_smoothing=0.2, task=Task.of(None, lambda logits, batch: logits[:, 0]))

    class Nothing(Plain):
        def loss(self, run, batch):
            return 0.0 * sum(p.sum() for p in run.model.parameters())

    for optimizer in ("sgd", "adam"):
        run = make_run(plain_net(), steps=1, weight_decay=0.1, lr=0.5, optimizer=optimizer)
        before = values(run.model)["0.weight"]
        fit(run, Nothing())
        moved = run.model[0].weight.detach() - before
        expected = -0.5 * 0.1 * before if optimizer == "sgd" else -0.5 * before.sign()
        assert torch.allclose(moved, expected, atol=1e-3)


class Poisoned(Plain):
    """The loss is NaN in some steps."""

    def __init__(self, bad, through_model=False):
        self.bad, self.through_model = bad, through_model

    def loss(self, run, batch):
        if run.step in self.bad:
            if self.through_model:
                batch = (batch[0] * math.nan, batch[1])
            else:
                return super().loss(run, batch) * math.nan
        return super().loss(run, batch)


def test_a_step_without_a_finite_loss_is_left_out():
    run, clean = make_run(), make_run()
    fit(run, Poisoned({1}))
    fit(clean, Plain())
    assert all(bool(torch.isfinite(v).all()) for v in values(run.model).values())
    assert any("not finite" in note for note in run.notes)
    assert not same(values(run.model), values(clean.model))


def test_a_step_without_a_finite_loss_is_left_out_where_losses_are_scaled():
    run = make_run()
    run.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    fit(run, Poisoned({0, 1}))
    assert all(bool(torch.isfinite(v).all()) for v in values(run.model).values())
    assert any("not finite" in note for note in run.notes)


def test_running_statistics_that_are_no_longer_finite_are_taken_back():
    run = make_run(epochs=2)
    history = fit(run, Poisoned({4}, through_model=True))
    assert all(bool(torch.isfinite(v).all()) for v in values(run.model).values())
    assert all(math.isfinite(record["score"]) for record in history)


def test_an_infinite_gradient_is_left_out():
    class Steep(Plain):
        def loss(self, run, batch):
            loss = super().loss(run, batch)
            return loss + 0 * (run.model[6].bias.double() * 1e-200).abs().sqrt().sum() if run.step == 1 else loss

    run = make_run(grad_clip=1.0)
    with torch.no_grad():
        run.model[6].bias.zero_()
    fit(run, Steep())
    assert all(bool(torch.isfinite(v).all()) for v in values(run.model).values())


def test_ten_in_a_row_end_it():
    run = make_run(epochs=9)
    with pytest.raises(ModelError, match="not finite in 10 steps in a row, in epoch 4 of 9: lower lr"):
        fit(run, Poisoned(range(100)))
    run = make_run(epochs=9)
    history = fit(run, Poisoned(range(4, 100)))
    assert run.best_epoch is not None and len(history) < 9 and "10 steps in a row" in run.alerts[0]
    assert run.diverged and "lower lr" in run.alerts[0]


def test_a_divergence_is_never_kept():
    run = make_run(plain_net(), lr=1e38, epochs=4)
    with pytest.raises(ModelError, match="lower lr"):  # for which reason is a matter of rounding
        fit(run, Plain())
    assert all(bool(torch.isfinite(v).all()) for v in values(run.model).values())


class Climbing(Plain):
    """A loss that is finite for a while, whatever it is worth."""

    def __init__(self, losses):
        self.losses = losses

    def backward(self, run, batch):
        values = super().backward(run, batch)
        return {**values, "loss": self.losses[min(run.step, len(self.losses) - 1)]}


def test_a_loss_that_runs_away_ends_the_run_at_once():
    run = make_run(epochs=9)
    history = fit(run, Climbing([1.0] * 7 + [2e6]))
    assert run.step == 7 and len(history) == 2 and run.best_epoch is not None
    assert "stopped in epoch 3 of 9, the loss went from 1 to 2e+06: lower lr" in run.alerts[0] and run.diverged
    with pytest.raises(ModelError, match=r"the loss went from 1 to 1e\+30, in epoch 1 of 9: lower lr"):
        fit(make_run(epochs=9), Climbing([1.0, 1e30]))


def test_a_loss_that_only_rises_goes_on():
    run = make_run(epochs=3)
    assert len(fit(run, Climbing([1e-3] * 4 + [9e5]))) == 3 and not run.diverged and not run.alerts


def test_a_run_that_diverges_again_and_again_from_its_last_good_state_ends():
    run = make_run(epochs=40)
    bad = [step for step in range(120) if step >= 6 and step % 4]
    fit(run, Poisoned(bad))
    assert run.diverged and run.step < 40 and "steps: lower lr" in run.alerts[0]


def test_an_epoch_without_a_finite_score_is_never_kept():
    with pytest.raises(ModelError, match="no epoch ends with a finite held-out loss: lower lr"):
        fit(make_run(epochs=2), Scripted([math.inf, math.inf]))


def interrupt_after(epoch):
    def callback(run, record):
        if run.epoch == epoch:
            raise KeyboardInterrupt

    return callback


def test_ctrl_c_keeps_the_best_state():
    run = make_run(epochs=5)
    method = Scripted([0.3, 0.1, 0.2, 0.0, 0.0])
    history = fit(run, method, False, interrupt_after(3))
    assert run.interrupted and len(history) == 3 and same(values(run.model), method.states[1])
    assert "interrupted in epoch 3 of 5: the state of epoch 2 is kept" in run.notes


def test_a_state_that_is_not_the_best_is_written_over_and_ctrl_c_loses_none(monkeypatch):
    saved, save = [], Tuned.save

    def watched(self, into=None):
        saved.append(into is not None)
        if into is not None and len(saved) == 5:
            into[0].fill_(math.nan)  # half-way
            raise KeyboardInterrupt
        return save(self, into)

    monkeypatch.setattr(Tuned, "save", watched)
    run = make_run(epochs=6)
    method = Scripted([0.1, 0.2, 0.3, 0.4, 0.0, 0.0])
    fit(run, method, False)
    assert saved == [False, False, False, True, True]
    assert run.interrupted and same(values(run.model), method.states[0])


def test_ctrl_c_within_a_step_never_leaves_half_a_step():
    class Interrupted(Plain):
        def backward(self, run, batch):
            with torch.no_grad():
                run.model[0].weight.add_(1.0)  # as adversarial perturbations do
            if run.step == 1:
                raise KeyboardInterrupt
            out = super().backward(run, batch)
            with torch.no_grad():
                run.model[0].weight.sub_(1.0)
            return out

    run = make_run()
    before = values(run.model)
    assert fit(run, Interrupted()) == [] and run.interrupted
    assert same(values(run.model), before)
    assert "as it was given" in run.notes[0]


def test_ctrl_c_during_the_set_up():
    class Slow(Plain):
        def setup(self, run):
            raise KeyboardInterrupt

    run = make_run()
    before = values(run.model)
    assert fit(run, Slow()) == [] and run.interrupted and same(values(run.model), before)
    assert run.notes == ["interrupted before the first step: the model is as it was given"]


def test_callbacks_see_everything_and_may_stop():
    calls = []

    class Watch(Callback):
        def on_start(self, run):
            calls.append("start")

        def on_step(self, run, step_values):
            calls.append(("step", run.step, float(step_values["loss"]) > 0))
            return run.step == 4

        def on_end(self, run):
            calls.append("end")

    run = make_run()
    history = fit(run, Plain(), False, [Watch(), lambda run, record: calls.append(record["epoch"])])
    assert calls == ["start", *(("step", i, True) for i in (1, 2, 3)), 1, ("step", 4, True), 2, "end"]
    assert len(history) == 2 and "stopped by a callback after epoch 2" in run.notes
    run = make_run()
    assert len(fit(run, Plain(), False, lambda run, record: run.epoch == 1)) == 1


def test_what_a_method_set_up_is_folded_on_every_way_out():
    class Folding(Plain):
        folds = 0

        def __init__(self, fail):
            self.fail = fail

        def setup(self, run):
            assert not run.model.training
            if self.fail == "setup":
                raise RuntimeError("setup")

        def loss(self, run, batch):
            if self.fail == "loss":
                raise RuntimeError("loss")
            return super().loss(run, batch)

        def fold(self, run):
            self.folds += 1

    for fail in ("setup", "loss", "callback", None):
        method = Folding(fail)

        def callback(run, record, fail=fail):
            if fail == "callback":
                raise RuntimeError("callback")

        if fail is None:
            fit(make_run(), method)
        else:
            with pytest.raises(RuntimeError, match=fail):
                fit(make_run(), method, False, callback)
        assert method.folds == 1


def test_a_method_with_nothing_to_tune():
    class Norms(Plain):
        def parameter_groups(self, run):
            return [{"params": [p for m in run.batchnorms for p in m.parameters()]}]

    with pytest.raises(ModelError, match="finds nothing to tune"):
        fit(make_run(bn_mode="freeze"), Norms())
    with pytest.raises(ModelError, match="finds nothing to tune"):
        fit(make_run(plain_net()), Norms())


def test_without_a_held_out_part_the_tuned_samples_score():
    run = make_run(heldout=False)
    history = fit(run, Plain())
    with torch.no_grad():
        loss = nn.functional.cross_entropy(run.model.eval()(data(24)[0]), data(24)[1])
    assert min(record["score"] for record in history) == pytest.approx(float(loss))


def test_autocast():
    dtypes = []

    class Watch(Plain):
        def loss(self, run, batch):
            dtypes.append(run.forward(batch).dtype)
            return super().loss(run, batch)

    fit(make_run(steps=1, amp=autocast_dtype("bf16", torch.device("cpu"))), Watch())
    fit(make_run(steps=1), Watch())
    assert dtypes == [torch.bfloat16, torch.float32]
    assert autocast_dtype(True, torch.device("cpu")) is torch.bfloat16
    assert autocast_dtype(False, torch.device("cpu")) is None
    with pytest.raises(ConfigError, match="amp='half'"):
        autocast_dtype("half", torch.device("cpu"))


def test_logged_numbers_are_averaged_over_the_epoch():
    class Logging(Plain):
        def backward(self, run, batch):
            run.log(step=float(run.step), tensor=torch.tensor(2.0 * run.step))
            return super().backward(run, batch)

    history = fit(make_run(epochs=2), Logging())
    assert [record["step"] for record in history] == [3, 6]  # the loop's own entry stays
    assert [record["tensor"] for record in history] == [2.0, 8.0]


def test_time_is_counted_once(monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 10.0])
    monkeypatch.setattr("fastfip.methods.run.time.perf_counter", lambda: next(clock))
    run = make_run()
    with run.timed("train"):
        with run.timed("fisher"):
            pass
    assert run.seconds == {"fisher": 3.0, "train": 7.0}


def test_the_bar_shows_only_when_asked(capsys):
    fit(make_run(), Plain(), None)
    assert capsys.readouterr().err == ""
    fit(make_run(), Plain(), True)
    assert "plain" in capsys.readouterr().err


def test_autocast_sees_the_weights_of_this_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(64, 6), torch.arange(64) % 3
    result = fastfip.purify(model, (x, y), "fine_tune", amp="bf16", epochs=30, lr=0.3, holdout=0.0, progress=False)
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(result.model(x), y))
    # The last steps are tiny (cosine): what the loop saw and what the result gives are nearly the same.
    assert loss == pytest.approx(result.history[-1]["loss"], rel=0.03)
