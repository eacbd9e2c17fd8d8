"""What the received model teaches: its calibrated answers and last states, where they agree with the labels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfip.data.batch import Batch
from fastfip.data.task import Task
from fastfip.methods import _taught
from fastfip.methods._states import LastStates
from fastfip.methods._taught import Teacher
from fastfip.methods.fine_mixing import FineMixingConfig
from fastfip.methods.run import Run
from fastfip.worst_case.places import TokenPlace
from tests.support.departures import make_run

WORDS, CLASSES = 40, 3


class Encoder(nn.Module):
    """Vectors of words, a layer of hidden states, their mean over what is no padding, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer, self.head = nn.Embedding(WORDS, 6), nn.Linear(6, 5), nn.Linear(5, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids[:, : int((ids != 0).sum(1).max())]
        shown = (ids != 0).to(self.table.weight.dtype)[:, :, None]
        hidden = self.layer(self.table(ids)).tanh()
        return self.head((hidden * shown).sum(1) / shown.sum(1))


def texts(n: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, WORDS, (n, 9), generator=generator)
    ids[:, 7:] = 0
    ids[::3, 4:] = 0
    return ids, torch.arange(n) % CLASSES


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).to(p), alpha=0.3)
    return model


def taught(micro_batch: int | None = None, loud: float = 8.0) -> tuple[Run, Teacher, nn.Module]:
    """Return a run whose model has moved, what teaches it, and the received model."""
    received = Encoder().double()
    with torch.no_grad():
        received.head.weight.mul_(loud)
    run = make_run(FineMixingConfig(batch_size=24), copy.deepcopy(received), texts())
    teacher = Teacher(run, answers=True, states=True)
    moved(run.model)
    run.micro_batch = micro_batch
    return run, teacher, received


@pytest.mark.parametrize("micro_batch", [None, 7])
def test_the_gradient_is_that_of_answers_and_states_where_labels_agree(
    micro_batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, teacher, received = taught(micro_batch)
    assert teacher.states is not None and teacher.states.name == "layer" and teacher.calibration is not None
    teacher.insertion = None  # all pieces are put in the place of words
    x, y = texts()
    drawn: list[tuple[Tensor, Tensor]] = []
    own = _taught._once

    def noted(new: Any) -> Any:
        def kept(ids: Tensor) -> tuple[Tensor, Tensor]:
            drawn.append(new(ids))
            return drawn[-1]

        return own(kept)

    monkeypatch.setattr(_taught, "_once", noted)
    values = teacher.backward(run, (x, y), 2.0, 3.0)
    changed = torch.cat([F.pad(found, (0, 7 - found.shape[1])) for found, _ in drawn])
    assert changed.shape == (24, 7) and float((changed != x[:, :7]).double().mean()) > 0.2
    shown = (x[:, :7] != 0).double()

    def passed(model: Any) -> tuple[Tensor, Tensor]:
        raw = model.layer(model.table(changed))
        return raw, model.head((raw.tanh() * shown[:, :, None]).sum(1) / shown.sum(1)[:, None])

    with torch.no_grad():
        old, target = passed(received)
        plain = received.layer(received.table(x[:8, :7]))  # of eight samples, with their padding
    target = teacher.calibration(target).double()
    agrees = (target.argmax(1) == y).double()
    assert 2 < int(agrees.sum()) < 22
    again = copy.deepcopy(run.model)
    again.zero_grad()
    new, answer = passed(again)
    kl = ((target.softmax(1) * (target.log_softmax(1) - answer.log_softmax(1))).sum(1) * agrees).sum() / 24
    each = ((new - old).square().mean(2) * shown).sum(1) / shown.sum(1)
    departure = (each * agrees).sum() / 24 / float(plain.square().mean())
    (2 * kl + 3 * departure).backward()
    assert float(values["divergence"]) == pytest.approx(float(kl), rel=1e-5)
    assert float(values["departure"]) == pytest.approx(float(departure), rel=1e-5)
    assert float(values["learned_from"]) == pytest.approx(float(agrees.mean()))
    for p, q in zip(run.model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in teacher.received.parameters())


def test_the_received_model_itself_departs_from_nothing_but_its_calibration() -> None:
    run, teacher, received = taught()
    run.model.load_state_dict(received.state_dict())
    teacher.calibration = None
    values = teacher.backward(run, texts(), 1.0, 1.0)
    assert float(values["divergence"]) == pytest.approx(0, abs=1e-9) and float(values["learned_from"]) == 1
    assert float(values["departure"]) == pytest.approx(0, abs=1e-12)


def states_of(net: nn.Module, batch: tuple[Tensor, Tensor]) -> LastStates | None:
    return LastStates.of(make_run(FineMixingConfig(), net, batch), None)


def test_the_last_states_of_images_are_the_last_feature_maps_and_of_vectors_there_are_none() -> None:
    images = torch.randn(8, 1, 6, 6), torch.arange(8) % 2
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 2),
    ).eval()  # fmt: skip
    found = states_of(net, images)
    assert found is not None and found.name == "3", "the pooled map has one place only"
    flat = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    assert states_of(flat, images) is None


@pytest.mark.parametrize("shifted", [False, True])
def test_a_language_model_s_own_answers_are_no_states(shifted: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.block, self.words = nn.Embedding(WORDS, 6), nn.Linear(6, 6), nn.Linear(6, WORDS)

        def forward(self, ids: Tensor) -> Tensor:
            logits = self.words(self.block(self.table(ids)))
            return logits[:, :-1] if shifted else logits

    place = TokenPlace("table", torch.zeros(6), 1, 0, 0, torch.Generator())
    found = LastStates.of(make_run(FineMixingConfig(), Model(), texts()), place)
    assert found is not None and found.name == "block"


def test_nor_are_vectors_of_words_or_maps_of_classes_and_recurrent_layers_are_read() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.rnn, self.head = nn.Embedding(WORDS, 6), nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.rnn(self.table(ids))[0][:, -1])

    place = TokenPlace("table", torch.zeros(6), 1, 0, 0, torch.Generator())
    found = LastStates.of(make_run(FineMixingConfig(), Recurrent(), texts()), place)
    assert found is not None and found.name == "rnn"
    bag = nn.Sequential(nn.Embedding(WORDS, 6), nn.Flatten(), nn.Linear(54, 3))
    zero = TokenPlace("0", torch.zeros(6), 1, 0, 0, torch.Generator())
    assert LastStates.of(make_run(FineMixingConfig(), bag, texts()), zero) is None

    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.maps = nn.Conv2d(1, 5, 3), nn.Conv2d(5, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.maps(self.body(x)).mean((2, 3))

    images = torch.randn(8, 1, 6, 6), torch.arange(8) % 2
    found = states_of(Mapped(), images)
    assert found is not None and found.name == "body"


def test_a_part_of_one_text_gets_pieces_of_the_part_before(monkeypatch: pytest.MonkeyPatch) -> None:
    run, teacher, _ = taught(micro_batch=1)
    teacher.insertion = None
    seen: list[Tensor] = []
    own = _taught._once

    def noted(new: Any) -> Any:
        def kept(ids: Tensor) -> tuple[Tensor, Tensor]:
            found, inside = new(ids)
            seen.append((found != ids).any())
            return found, inside

        return own(kept)

    monkeypatch.setattr(_taught, "_once", noted)
    teacher.backward(run, texts(), 1.0, 1.0)
    assert len(seen) == 24 and sum(map(int, seen)) > 18


def test_outputs_that_are_no_classes_are_not_taught_and_it_is_said() -> None:
    run, _, received = taught()
    run.classes = None
    teacher = Teacher(run, answers=True, states=True)
    values = teacher.backward(run, texts(), 1.0, 1.0)
    assert "divergence" not in values and float(values["departure"]) == 0 and float(values["learned_from"]) == 1
    assert any("answers were not taught" in note for note in run.notes)


def pieces_of(run: Run, teacher: Teacher) -> float:
    """How far the tuned model leans from the received answers, in the mean probability of class 0 at pieced texts."""
    with torch.no_grad():
        x, _ = texts(96)
        assert teacher.place is not None and teacher.calibration is not None
        found, _ = teacher.place.pieced(run.model, torch.Generator().manual_seed(5))(x[:, :7])
        mine, theirs = run.model(found), teacher.calibration(teacher.received(found))
        return float((mine.softmax(1) - theirs.softmax(1))[:, 0].mean())


@pytest.mark.parametrize("micro_batch", [None, 7])
def test_a_leaning_to_a_class_is_taken_out_of_the_bias_of_the_logits(micro_batch: int | None) -> None:
    run, teacher, received = taught(micro_batch, loud=1.0)
    run.model.load_state_dict(received.state_dict())
    with torch.no_grad():
        run.model.head.bias.add_(torch.tensor([3.0, 0.0, 0.0]))
    assert pieces_of(run, teacher) > 0.3
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    teacher.level(run)
    assert abs(pieces_of(run, teacher)) < 0.02
    for name, p in run.model.named_parameters():
        assert torch.equal(p, before[name]) == (name != "head.bias") and p.grad is None
    shift = run.model.head.bias - before["head.bias"]
    assert float(shift.sum()) == pytest.approx(0, abs=1e-5)


def test_classes_are_levelled_at_many_texts_of_any_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    run, teacher, _ = taught(loud=1.0)
    assert run.clean.lengths is not None, "what is tuned on comes in like lengths"
    run.config = FineMixingConfig(batch_size=8)
    batches, numbers = list[Tensor](), list[int]()
    pieced, fitted = _taught.pieced, _taught.levelling

    def noted(task: Task, batch: Batch, generator: torch.Generator | None) -> Batch:
        batches.append((batch[0] != 0).sum(1))
        return pieced(task, batch, generator)

    def counted(answers: Tensor, targets: Tensor) -> Tensor:
        numbers.append(len(answers))
        assert answers.shape == targets.shape
        return fitted(answers, targets)

    monkeypatch.setattr(_taught, "pieced", noted)
    monkeypatch.setattr(_taught, "levelling", counted)
    teacher.level(run)
    assert numbers == [_taught.LEVELLED]
    within = torch.stack([lengths.double().var() for lengths in batches]).mean()
    assert float(within) > 0.8 * float(run.clean.lengths.double().var()), "any lengths in a batch"
    assert run.clean.lengths is not None


def test_a_model_without_such_a_bias_or_with_a_frozen_one_stays_as_it_is() -> None:
    run, teacher, received = taught()
    run.frozen = frozenset({id(run.model.head.bias)})
    before = copy.deepcopy(run.model.state_dict())
    teacher.level(run)
    assert all(torch.equal(before[name], p) for name, p in run.model.state_dict().items())
    run, teacher, _ = taught()
    run.model.head.bias = None
    before = copy.deepcopy(run.model.state_dict())
    teacher.level(run)
    assert all(torch.equal(before[name], p) for name, p in run.model.state_dict().items())
    run, teacher, _ = taught()
    teacher.answers = False
    before = copy.deepcopy(run.model.state_dict())
    teacher.level(run)
    assert all(torch.equal(before[name], p) for name, p in run.model.state_dict().items())


@pytest.mark.parametrize("needs_all", [False, True])
def test_texts_come_without_padding_where_the_model_answers_the_same(needs_all: bool) -> None:
    class Fixed(Encoder):
        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.layer(self.table(ids)).tanh()
            if needs_all:  # a mean over the padding as well
                return self.head(hidden.mean(1))
            shown = (ids != 0).to(hidden.dtype)[:, :, None]
            return self.head((hidden * shown).sum(1) / shown.sum(1))

    run = make_run(FineMixingConfig(batch_size=8), Fixed(), texts())
    teacher = Teacher(run, answers=True, states=True)
    assert teacher.place is not None and teacher.place.padding == 0
    walk = [x for x, _ in run.clean.batches(8, shuffle=True, generator=run.generator)]
    assert {x.shape[1] for x in walk} == ({9} if needs_all else {4, 7})
    x, y = (t[1:] for t in texts())
    one = make_run(FineMixingConfig(batch_size=1), Fixed(), (x[:, :7], y))  # the first text has no padding
    Teacher(one, answers=True, states=True)
    assert one.clean.padding is not None and one.clean.padding.cuts != needs_all
    lengths = [{int(v) for v in (x != 0).sum(1)} for x in walk]
    assert sum(len(found) == 1 for found in lengths) >= 2, "texts of like lengths together"


def test_half_of_the_texts_get_a_piece_between_their_words_which_both_models_read() -> None:
    run, teacher, received = taught()
    x, y = texts()
    assert teacher.insertion is not None and teacher.calibration is not None
    read: dict[int, list[Tensor]] = {}

    def kept(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        read.setdefault(id(module), []).append(args[0])

    handles = [m.table.register_forward_pre_hook(kept) for m in (run.model, teacher.received)]
    values = teacher.backward(run, (x, y), 2.0, 3.0)
    for handle in handles:
        handle.remove()
    mine, theirs = read[id(run.model.table)], read[id(teacher.received.table)]
    assert len(mine) == len(theirs) == 2 and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    longer, rest = mine
    assert len(longer) + len(rest) == 24 and 4 < len(longer) < 16  # some have no room for more words
    plain = [[v for v in row if v] for row in x.tolist()]
    for row in longer.tolist():
        words = [v for v in row if v]
        whole = [text for text in plain if any(words[:k] + words[k + len(words) - len(text) :] == text
                                               for k in range(len(text) + 1))]  # fmt: skip
        assert whole, "a text without its own words around the piece"
    assert 0 < float(values["learned_from"]) < 1 and float(values["departure"]) > 0
