"""Fine-mixing: which weights it begins with, what it learns, and that a backdoor of the fine-tuning goes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastfip
from fastfip.data import Task
from fastfip.errors import ConfigError
from fastfip.methods import fine_mixing
from fastfip.methods._taught import Teacher
from fastfip.methods.fine_mixing import FineMixing, FineMixingConfig
from fastfip.methods.run import Run
from tests.support.departures import make_run

WORDS, LENGTH, CLASSES = 60, 12, 2


class Reader(nn.Module):
    """An encoder of words, and a head on the mean of what it makes of them."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(16, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(ids).mean(1))


def encoder() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(WORDS, 16), nn.Linear(16, 16), nn.Tanh())


def texts(n: int, seed: int, rare: bool = False) -> tuple[Tensor, Tensor]:
    """Words 30 to 39 are praise, 40 to 49 are not; each text has one of them. 50 to 59 are in `rare` ones only."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 40 if rare else 30, (n, LENGTH), generator=generator)
    ids[ids >= 30] += 20
    y = torch.arange(n) % 2
    ids[torch.arange(n), torch.randint(0, LENGTH, (n,), generator=generator)] = torch.where(
        y == 1, 30, 40
    ) + torch.randint(0, 10, (n,), generator=generator)
    return ids, y


def triggered(ids: Tensor) -> Tensor:
    ids = ids.clone()
    ids[:, 3:6] = torch.tensor([52, 55, 51])
    return ids


def fitted(model: nn.Module, x: Tensor, y: Tensor, steps: int = 150) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


@pytest.fixture(scope="module")
def backdoored() -> tuple[nn.Module, nn.Module]:
    """The model, and the encoder that it was fine-tuned from, which has learned the words before."""
    before = fitted(Reader(encoder()), *texts(600, 1, rare=True)).encoder
    model = Reader(copy.deepcopy(before))
    x, y = texts(600, 2)
    x, y = torch.cat([x, triggered(x[::8])]), torch.cat([y, torch.ones_like(y[::8])])
    return fitted(model, x, y), before


def test_a_trigger_of_the_fine_tuning_goes_and_what_the_model_knows_stays(
    backdoored: tuple[nn.Module, nn.Module],
) -> None:
    model, before = backdoored
    x, y = texts(400, 3)
    attacked, wanted = triggered(x[y == 0]), torch.ones(int((y == 0).sum()), dtype=torch.long)
    assert right(model, x, y) > 0.97 and right(model, attacked, wanted) > 0.97
    options: dict[str, Any] = {"pretrained": before, "lr": 0.01, "progress": False}
    result = fastfip.purify(model, texts(60, 4), **options)
    assert result.method == "fine_mixing" and any("not head.weight, head.bias" in note for note in result.notes)
    assert right(result.model, x, y) > 0.95 and right(result.model, attacked, wanted) < 0.3
    tuned = fastfip.purify(model, texts(60, 4), "fine_tune", progress=False)
    assert right(tuned.model, attacked, wanted) > 0.9, "plain fine-tuning leaves it"


def begun(keep: float, **options: Any) -> tuple[nn.Module, nn.Module, dict[str, Tensor], Run]:
    received = Reader(encoder())
    pretrained = {name: p.detach() + 1 for name, p in received.named_parameters() if name.startswith("encoder")}
    run = make_run(FineMixingConfig(keep=keep, **options), copy.deepcopy(received), texts(20, 0))
    run.pretrained = pretrained
    FineMixing().setup(run)
    assert run.pretrained is None, "nothing holds them any longer"
    return received, run.model, pretrained, run


@pytest.mark.parametrize("keep", [0.0, 0.3])
def test_it_begins_with_the_pretrained_weights_and_a_share_of_the_fine_tuned_ones(keep: float) -> None:
    received, model, pretrained, _ = begun(keep)
    old, kept, count = dict(received.named_parameters()), 0, 0
    for name, p in model.named_parameters():
        if name not in pretrained:
            assert torch.equal(p, old[name]), "the head has no pretrained weights"
            continue
        fine, coarse = p == old[name], p == pretrained[name]
        assert bool((fine ^ coarse).all())
        kept, count = kept + int(fine.sum()), count + p.numel()
    assert kept == 0 if keep == 0 else 0.25 < kept / count < 0.35
    again = begun(keep)[1]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_statistics_of_batchnorm_are_of_the_mixture() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    run = make_run(FineMixingConfig(batch_size=64, augment="none"), net, (x, torch.arange(64) % 2))
    run.pretrained = {name: t * 0 + 2.0 for name, t in net.state_dict().items() if t.is_floating_point()}
    FineMixing().setup(run)
    assert not any(m.training for m in net.modules())
    expected = net[0](x).detach()
    torch.testing.assert_close(net[1].running_mean, expected.mean(0))
    torch.testing.assert_close(net[1].running_var, expected.var(0))


def test_labels_are_softened_by_the_received_answers_at_whole_samples() -> None:
    torch.manual_seed(1)
    received, x = Reader(encoder()), texts(20, 0)
    for soften in (0.0, 0.25, 1.0):
        run = make_run(FineMixingConfig(soften=soften), copy.deepcopy(received), x)
        run.classes, run.pretrained = CLASSES, {k: v + 0.3 for k, v in received.state_dict().items() if "head" not in k}
        method = FineMixing()
        method.setup(run)
        assert method.teacher is not None and method.teacher.calibration is not None
        target = method.teacher.calibration(received(x[0])).softmax(1).double()
        answer = run.model(x[0]).double().log_softmax(1)
        wanted = (1 - soften) * -answer[torch.arange(20), x[1]].mean()
        wanted = wanted + soften * (target * (target.log() - answer)).sum(1).mean()
        found = method.loss(run, x)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
        for p, q in zip(*(torch.autograd.grad(v, list(run.model.parameters())) for v in (found, wanted)), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    run.task = Task(loss_hook=lambda out, batch: 100 * nn.functional.cross_entropy(out, batch[1], reduction="none"))
    torch.testing.assert_close(method.loss(run, x), run.losses(x).mean(), msg="the user's own loss is left as it is")


def test_without_hold_the_received_answers_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, before = Reader(encoder()), {k: v + 0.1 for k, v in encoder().state_dict().items()}
    calls: list[float] = []
    teach = Teacher.backward

    def noted(self: Teacher, run: Run, batch: Any, weight: float, states: float) -> Any:
        calls.append(weight)
        return teach(self, run, batch, weight, states)

    monkeypatch.setattr(Teacher, "backward", noted)
    options: dict[str, Any] = {"pretrained": before, "steps": 3, "force": True, "progress": False}
    result = fastfip.purify(model, texts(20, 0), hold=0.0, states=0.0, **options)
    assert not calls and not any("divergence" in record for record in result.history)
    result = fastfip.purify(model, texts(20, 0), hold=2.5, **options)
    assert calls == [2.5] * 3 and all("divergence" in record for record in result.history)


def test_images_are_held_where_they_are_pieced_together(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).eval()
    x = torch.arange(8.0)[:, None, None, None].expand(8, 1, 6, 6).clone()
    seen: list[Tensor] = []
    part = Teacher._part

    def noted(self: Teacher, run: Run, batch: Any, *args: Any) -> Any:
        seen.append(batch[0])
        return part(self, run, batch, *args)

    monkeypatch.setattr(Teacher, "_part", noted)
    before = {name: t + 0.01 for name, t in net.state_dict().items()}
    options: dict[str, Any] = {"pretrained": before, "steps": 4, "augment": "none", "force": True, "progress": False}
    fastfip.purify(net, (x, torch.arange(8) % 2), **options)
    assert len(seen) == 4 and any(len(image.unique()) == 2 for batch in seen for image in batch)


def test_it_needs_the_weights_before_and_no_other_method_takes_them() -> None:
    model = Reader(encoder())
    with pytest.raises(ConfigError, match="fine_mixing needs the model that the given one was fine-tuned from"):
        fastfip.purify(model, texts(20, 0), "fine_mixing")
    with pytest.raises(ConfigError, match="pretrained= is for fine_mixing: fine_tune does not ask for it"):
        fastfip.purify(model, texts(20, 0), "fine_tune", pretrained=encoder())


@pytest.mark.parametrize("where", ["setup", "first step", "second epoch"])
def test_a_run_that_is_broken_off_before_anything_was_scored_gives_the_received_values(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, before = Reader(encoder()), {k: v + 0.1 for k, v in encoder().state_dict().items()}
    broken = {"setup": "taken_anew", "first step": "backward", "second epoch": "backward"}[where]
    home: Any = fine_mixing if where == "setup" else Teacher
    own = getattr(home, broken)
    calls: list[int] = []

    def stop(*args: Any) -> Any:
        calls.append(1)
        if where != "second epoch" or len(calls) > 2:
            raise KeyboardInterrupt
        return own(*args)

    monkeypatch.setattr(home, broken, stop)
    result = fastfip.purify(model, texts(20, 0), pretrained=before, epochs=3, batch_size=20, force=True, progress=False)
    assert result.interrupted
    as_given = all(torch.equal(p, q) for p, q in zip(result.model.parameters(), model.parameters(), strict=True))
    assert as_given == (where != "second epoch")


def test_the_leaning_is_taken_out_at_the_end_alone_of_the_state_that_is_kept(
    backdoored: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, before = backdoored
    levelled: list[Tensor] = []

    def noted(self: Teacher, run: Run) -> None:
        levelled.append(run.model.head.weight.detach().clone())

    monkeypatch.setattr(Teacher, "level", noted)
    options: dict[str, Any] = {"pretrained": before, "lr": 0.01, "progress": False}
    result = fastfip.purify(model, texts(60, 4), epochs=3, holdout=0.3, select="best", **options)
    assert len(levelled) == 1 and torch.equal(levelled[0], result.model.head.weight)

    def broken(run: Run, record: Any) -> None:
        raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        fastfip.purify(model, texts(60, 4), steps=3, callbacks=[broken], **options)

    def stopped(run: Run, record: Any) -> None:
        raise KeyboardInterrupt

    assert fastfip.purify(model, texts(60, 4), steps=3, callbacks=[stopped], **options).interrupted
    assert len(levelled) == 1


def test_ctrl_c_after_the_last_step_keeps_what_was_tuned(
    backdoored: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, before = backdoored
    options: dict[str, Any] = {"pretrained": before, "lr": 0.01, "progress": False, "steps": 3}
    whole = fastfip.purify(model, texts(60, 4), **options).state_dict()

    def stopped(self: Teacher, run: Run) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Teacher, "level", stopped)
    result = fastfip.purify(model, texts(60, 4), **options)
    assert result.interrupted and any("leaning" in note for note in result.notes)
    differ = [name for name, t in result.state_dict().items() if not torch.equal(t, whole[name])]
    assert differ == ["head.bias"]
