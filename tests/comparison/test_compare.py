"""`compare`: the same start, data and seeds for every method; rows that survive errors, files and broken runs."""

from __future__ import annotations

import json

import pytest
import torch

import fastfip
from fastfip.comparison.result import Comparison, Row
from fastfip.data import fingerprint
from fastfip.errors import BackendError, ConfigError, DataError
from fastfip.methods.fine_tune import FineTune
from fastfip.metrics import evaluate
from tests.support.small_nets import CLASSES, conv_net, data, loader, same, values


class Broken(FineTune):
    name = "broken"
    summary = "fails"

    def loss(self, run, batch):
        raise MemoryError("no room\nat all")


class Spy(FineTune):
    """Records what each run starts with."""

    name = "spy"
    summary = "looks"
    seen: list = []

    def setup(self, run):
        labels = run.clean.labels.tolist()
        Spy.seen.append((fingerprint.of_model(run.model), run.seed, labels, torch.rand(2).tolist()))
        with torch.no_grad():
            next(run.model.parameters()).zero_()  # what it does to its copy must not reach the next one


TEST = [data(30, seed=1)]
ONE = ("fine_tune", {"steps": 1})


def test_rows_hold_what_purify_and_evaluate_say():
    model = conv_net()
    before = values(model)
    asr = [(data(9, seed=2)[0], torch.zeros(9, dtype=torch.long), torch.arange(9) % CLASSES)]
    found = fastfip.compare(
        model, loader(), [("fine_tune", {"epochs": 3, "lr": 0.1})], test_loader=TEST, asr_loader=asr, seeds=[0, 5]
    )
    assert same(before, values(model))
    assert [(row.label, row.seed) for row in found.rows] == [
        ("none", 0), ("fine_tune (epochs=3, lr=0.1)", 0), ("fine_tune (epochs=3, lr=0.1)", 5),
    ]  # fmt: skip
    for row in found.rows[1:]:
        single = fastfip.purify(
            model, loader(), "fine_tune", epochs=3, lr=0.1, seed=row.seed, test_loader=TEST, asr_loader=asr
        )
        assert (row.test_acc, row.test_asr, row.test_ra) == (single.after.acc, single.after.asr, single.after.ra)
        assert (row.der, row.rir) == (single.der, single.rir) and row.steps == single.settings["steps"]
        assert row.seconds > 0 and row.peak_memory >= 0 and "resident memory" in row.memory_of
    first = evaluate(model, TEST, asr)
    assert (found.rows[0].test_acc, found.rows[0].test_asr, found.rows[0].der) == (first.acc, first.asr, 0.5)


def test_every_run_starts_from_the_same():
    Spy.seen.clear()
    model = conv_net()
    shuffled = loader(shuffle=True)
    config = {"steps": 1}
    fastfip.compare(model, shuffled, [(Spy, config), (Spy, {"steps": 2})], seeds=[0, 1], baseline=False)
    a, b, c, d = Spy.seen
    assert a == b and c == d and a[0] == c[0] == fingerprint.of_model(model)
    assert (a[1], c[1]) == (0, 1) and a[3] != c[3]


def test_an_error_is_a_row_and_the_others_go_on():
    found = fastfip.compare(conv_net(), loader(), [Broken, ONE], test_loader=TEST, seeds=[0, 1])
    errors = [row.error for row in found.rows]
    assert errors == ["", "MemoryError: no room at all", "", "MemoryError: no room at all", ""]
    broken = found.summary()[1]
    assert (broken.runs, broken.failed, broken.mean) == (0, 2, {})
    assert "broken: MemoryError: no room at all" in str(found) and "0 (2 failed)" in str(found)


def test_mean_and_spread():
    rows = [Row("m", "m", seed, test_acc=acc, test_asr=0.5, seconds=s) for seed, acc, s in ((0, 0.5, 1), (1, 0.7, 3))]
    rows.append(Row("m", "m", 2, error="no"))
    rows.append(Row("one", "one", 0, test_acc=0.25))
    found = Comparison(rows).summary()
    assert found[0].mean["test_acc"] == pytest.approx(0.6) and found[0].spread["test_acc"] == pytest.approx(0.02**0.5)
    assert found[0].mean["seconds"] == 2 and found[0].failed == 1
    assert found[1].spread == {} and "test_asr" not in found[1].mean
    assert "60.00 ± 14.14" in str(Comparison(rows))


def test_files_keep_everything(tmp_path):
    found = fastfip.compare(conv_net(), loader(), [Broken, ONE], test_loader=TEST)
    for name in ("a.csv", "a.json"):
        (found.to_csv if name.endswith("csv") else found.to_json)(tmp_path / name)
        assert Comparison.read(tmp_path / name) == found
    assert json.loads(found.to_json())["rows"][2]["config"]["steps"] == 1
    head = found.to_csv().splitlines()[0].split(",")
    assert {"test_acc", "test_asr", "test_ra", "der", "seconds", "peak_memory", "error"} <= set(head)
    (tmp_path / "b.csv").write_text("a,b\n1,2\n")
    for bad in ("b.csv", "none.json"):
        with pytest.raises(DataError, match=bad):
            Comparison.read(tmp_path / bad)


def test_a_broken_run_goes_on(tmp_path):
    out, model, calls = tmp_path / "c.csv", conv_net(), []

    def stop(row):
        calls.append(row.label)
        if len(calls) == 2:
            raise RuntimeError("the power is gone")

    plan = {"methods": [ONE, Broken, ("fine_tune", {"steps": 2})], "test_loader": TEST, "out": out}
    with pytest.raises(RuntimeError):
        fastfip.compare(model, loader(), **plan, on_row=stop)
    kept = Comparison.read(out).rows
    assert [row.label for row in kept] == ["none", "fine_tune (steps=1)", "broken"]
    again = fastfip.compare(model, loader(), **plan, resume=True, on_row=lambda row: calls.append(row.label))
    # What failed runs again, what is there does not: its seconds are those of the first time.
    assert calls[2:] == ["broken", "fine_tune (steps=2)"] and again.rows[1] == kept[1]
    assert Comparison.read(out).rows == again.rows
    for change in ("model", "clean", "seed", "config", "test"):
        calls.clear()
        other = conv_net() if change == "model" else model
        clean = loader(21) if change == "clean" else loader()
        more = {**plan, "methods": [("fine_tune", {"steps": 1 if change != "config" else 3})]}
        more["test_loader"] = [data(12, seed=3)] if change == "test" else TEST
        fastfip.compare(
            other, clean, **more, seeds=[7 if change == "seed" else 0], resume=True,
            on_row=lambda row: calls.append(row.label),
        )  # fmt: skip
        assert len(calls) == 1, change
    labels = [row.label for row in Comparison.read(out).rows]
    assert labels.count("fine_tune (steps=2)") == 1 and labels.count("fine_tune (steps=1)") == 5  # no row is lost


class StopsIn:
    """Test batches; Ctrl-C comes while they are walked the k-th time."""

    def __init__(self, k):
        self.left = k

    def __iter__(self):
        self.left -= 1
        yield TEST[0]
        if self.left == 0:
            raise KeyboardInterrupt


def test_ctrl_c_while_a_purified_net_is_scored_keeps_the_rows(tmp_path):
    out, model, plan = tmp_path / "c.json", conv_net(), [ONE, ("fine_tune", {"steps": 2})]
    found = fastfip.compare(model, loader(), plan, test_loader=StopsIn(3), out=out)
    assert found.interrupted and [row.label for row in found.rows] == ["none", "fine_tune (steps=1)"]
    kept = Comparison.read(out)
    assert kept.rows == found.rows and kept.interrupted and "interrupted" in str(found)
    again = fastfip.compare(model, loader(), plan, test_loader=TEST, out=out, resume=True)
    assert len(again.rows) == 3 and again.rows[1] == found.rows[1] and not again.interrupted
    # From the caller's own function as well; the row that it was shown is complete.
    shown = fastfip.compare(model, loader(), plan, on_row=lambda row: (_ for _ in ()).throw(KeyboardInterrupt))
    assert shown.interrupted and len(shown.rows) == 2


def test_ctrl_c_in_the_first_run_leaves_the_model_as_received(tmp_path):
    out = tmp_path / "c.csv"
    found = fastfip.compare(conv_net(), loader(), [ONE], test_loader=StopsIn(2), out=out)
    assert found.interrupted and [row.method for row in found.rows] == ["none"]
    assert Comparison.read(out).rows == found.rows


def test_rows_that_are_taken_over_have_the_label_of_this_run(tmp_path):
    """`"1"` and `1` are the same setting, and so is a default that is written down."""
    plan = {"test_loader": TEST, "out": tmp_path / "c.csv"}
    model, lr = conv_net(), FineTune.Config().lr
    first = fastfip.compare(model, loader(), [("fine_tune", {"epochs": "1"})], **plan)
    both = fastfip.compare(model, loader(), [("fine_tune", {"epochs": 1, "lr": lr})], **plan, seeds=[0, 1], resume=True)
    assert both.rows[1].seconds == first.rows[1].seconds
    assert [(s.label, s.runs) for s in both.summary()] == [("none", 1), (f"fine_tune (epochs=1, lr={lr})", 2)]
    assert Comparison.read(plan["out"]).rows == both.rows


def test_rows_of_another_version_are_run_again(tmp_path, monkeypatch):
    plan = {"methods": [ONE], "test_loader": TEST, "out": tmp_path / "c.csv"}
    model, calls = conv_net(), []
    fastfip.compare(model, loader(), **plan)
    with monkeypatch.context() as patch:
        patch.setattr(fastfip, "__version__", "9.9")
        found = fastfip.compare(model, loader(), **plan, resume=True, on_row=lambda row: calls.append(row.fastfip))
    assert calls == ["9.9"] and [row.fastfip for row in found.rows] == ["9.9", "9.9"]
    kept = [(row.method, row.fastfip) for row in Comparison.read(plan["out"]).rows]
    assert sorted(kept) == sorted((m, v) for m in ("none", "fine_tune") for v in (fastfip.__version__, "9.9"))


def test_devices_that_cannot_be_used():
    with pytest.raises(ConfigError, match="device='foo': give cpu"):
        fastfip.compare(conv_net(), loader(), [ONE], device="foo")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="'cuda' cannot be used here"):
            fastfip.compare(conv_net(), loader(), [ONE], device="cuda")


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [Row("none", "none", 0, test_acc=0.9, test_asr=1.0, seconds=0.0)]
    rows += [Row("m", "m", s, test_acc=0.8, test_asr=0.1 * s, seconds=2.0) for s in (0, 1)]
    rows += [Row("x", "x", 0, error="no")]
    figure = Comparison(rows).plot(tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5000
    axes = figure.axes[0]
    assert axes.get_xlabel() == "ASR (%)" and len(axes.collections) >= 1
    assert sorted(text.get_text() for text in axes.texts) == ["as received", "m, 2.0 s"]
    plain = Comparison([Row("m", "m", 0, test_acc=0.8, seconds=2.0)]).plot()
    assert plain.axes[0].get_xlabel() == "seconds"


def test_without_test_sets_what_was_measured_is_said():
    found = fastfip.compare(conv_net(), loader(), [ONE])
    assert found.rows[1].test_acc is not None and "held-out clean samples" in found.rows[1].acc_on
    assert found.rows[1].der is None and "ASR, RA and DER are not known" in str(found)


def test_all_methods_are_the_default_and_bad_usage_comes_first(monkeypatch):
    plan = []
    monkeypatch.setattr("fastfip.comparison.compare._run", lambda row, *args: plan.append(row.method))
    fastfip.compare(conv_net(), loader())
    assert plan == [name for name in fastfip.methods.names() if not fastfip.methods.get(name).needs_pretrained]
    plan.clear()
    model = conv_net()
    fastfip.compare(model, loader(), pretrained=conv_net())
    assert plan == fastfip.methods.names()
    with pytest.raises(ConfigError, match="did you mean"):
        fastfip.compare(conv_net(), loader(), ["fine_tuna"])
    with pytest.raises(ConfigError, match="unknown setting"):
        fastfip.compare(conv_net(), loader(), [("fine_tune", {"lrr": 1})])
    with pytest.raises(ConfigError, match="named twice"):
        fastfip.compare(conv_net(), loader(), [ONE, ONE])
    for options in ({"methods": []}, {"seeds": []}, {"seeds": [-1]}, {"resume": True}, {"out": "a.txt"}):
        with pytest.raises(ConfigError):
            fastfip.compare(conv_net(), loader(), **options)


def test_fingerprints_see_every_value():
    model = conv_net()
    first = fingerprint.of_model(model)
    with torch.no_grad():
        model[1].running_mean[3] += 1e-6
    assert fingerprint.of_model(model) != first
    x, y = data(6)
    whole = fingerprint.of_batches([(x, y)])
    assert fingerprint.of_batches([(x[:2], y[:2]), (x[2:], y[2:])]) == whole
    assert fingerprint.of_batches([(x, (y + 1) % CLASSES)]) != whole
    assert fingerprint.of_batches([(x.flip(0), y)]) != whole
