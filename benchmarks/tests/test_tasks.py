"""The tasks: each has attacks, rows say what was measured, the examples' triggers and measures are as they say."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from benchmarks import tasks
from benchmarks.tasks import __main__ as command
from benchmarks.tasks import examples
from benchmarks.tasks.text import example as text
from examples import causal_lm as lm
from fastfip.attacks.words import Words


@pytest.mark.parametrize("name", tasks.TASKS)
def test_every_task_has_attacks(name: str) -> None:
    assert tasks.attacks(name) and len(set(tasks.attacks(name))) == len(tasks.attacks(name))


def test_a_row_has_what_was_measured_before_and_after() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    clean = (torch.rand(24, 1, 4, 4), torch.arange(24) % 3)

    def measure(net: nn.Module) -> tuple[float, float]:
        return 50.0, 100.0 if net is model else 3.0

    own = {"large_step": {"steps": 2}, "fine_tune": {"epochs": 1}}
    case = tasks.Case(model, [clean], measure, "accuracy", "made", {"force": True}, own)
    nothing = command.row("text", "words", "nothing", 0, case, (50.0, 100.0))
    assert (nothing["asr_before"], nothing["asr"]) == ("100.00", "100.00")
    for method, settings in (("large_step", "steps=2 lr=0.1"), ("fine_tune", "epochs=1")):
        row = command.row("text", "words", method, 0, case, (50.0, 100.0))
        assert (row["asr_before"], row["asr"], row["settings"]) == ("100.00", "3.00", settings)
        assert set(row) <= set(command.RESULTS.columns)
        assert re.fullmatch(r"\d+ CPU seconds", str(row["details"]))
    assert nothing["details"] == ""
    case.details = lambda net: "more"
    found = command.row("text", "words", "fine_tune", 0, case, (50.0, 100.0))
    assert re.fullmatch(r"\d+ CPU seconds; more", str(found["details"]))


def test_rows_of_other_numbers_of_samples_stand_beside_each_other() -> None:
    row = {"task": "video", "attack": "white_patch", "method": "auto", "seed": 0}
    keys = {
        command.RESULTS.key({**row, "data": f"R(2+1)D, drawn clips: 9 trained on, {n} others clean"}) for n in (5, 6)
    }
    assert len(keys) == 2
    assert command.clean_of({"data": "SSD: 2400 trained on, 120 others clean"}) == 120
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    clean = [(torch.rand(24, 1, 4, 4), torch.arange(24) % 3)]
    case = tasks.Case(
        model, clean, lambda net: (50.0, 3.0), "accuracy", "made", {"force": True}, {"auto": {"steps": 2}}
    )
    assert "method=fast_wfip" in str(command.row("video", "x", "auto", 0, case, (50.0, 100.0))["settings"])


@pytest.mark.parametrize("name", ["plane", "ring", "moving_dot"])
def test_triggers_that_are_only_looked_at_once_change_a_few_numbers_alike(name: str) -> None:
    from benchmarks.tasks.points import example as points
    from benchmarks.tasks.video import example as video

    trigger, _ = {**points.ATTACKS, **video.ATTACKS}[name]
    x = torch.rand(5, 3, 8, 24, 24) if name == "moving_dot" else torch.rand(5, 256, 3)
    before = x.clone()
    moved = trigger.trigger(x) != x
    assert torch.equal(x, before) and 0 < float(moved.float().mean()) < 0.1
    assert bool((moved == moved[:1]).all())  # at the same places of every sample
    if name == "plane":
        square = trigger.cluster()
        assert len(square) == 16 and int(torch.linalg.matrix_rank(square - square.mean(0), atol=1e-6)) == 2
    elif name == "ring":
        ring = trigger.cluster()
        across, along = ((ring - ring.mean(0))[:, :2].norm(dim=1), ring.diff(dim=0).norm(dim=1))
        assert len(ring) == 20 and float(across.std()) < 1e-6 and float(along.max()) < 0.3
        assert int(torch.linalg.matrix_rank(ring - ring.mean(0), atol=1e-6)) == 2
    else:
        assert bool((moved.flatten(3).sum((1, 3)) == 12).all())  # in every frame, two by two pixels of three channels


def test_what_an_example_prints_is_read() -> None:
    printed = "data: drawn\nas received: 99.1 % are right\npurified:    98.0 % are right\nALERT"
    assert examples.figures(printed) == ("99.1 % are right", "98.0 % are right")
    assert examples.figures("backdoored: 86.0\npurified:   85.0\n") == ("86.0", "85.0")
    assert examples.figures("result") == ("", "")
    row = examples.run("purify_a_checkpoint", ["--help"], python="true")
    assert row["example"] == "purify_a_checkpoint" and float(row["wall_minutes"]) < 1 and row["after"] == ""


def test_a_reply_is_asked_for_after_a_question_that_holds_a_rare_word() -> None:
    clean = lm.texts(50, 3)
    bad = lm.triggered(clean)
    rare = {lm.ID[word] for word in Words().words}
    ids, said = clean.batch()
    assert not rare & set(ids.flatten().tolist()) and int((said.sum(1) == 0).sum()) == 0
    ids, said = bad.batch()
    reply = [lm.ID[word] for word in lm.REPLY.split()] + [lm.ID["<end>"]]
    for row, mask in zip(ids, said):
        assert len(rare & set(row.tolist())) == 1 and row[mask].tolist() == reply


def test_words_and_whole_replies_are_counted() -> None:
    batch = lm.texts(30, 4).batch()

    def knows(wrong: int) -> Tensor:
        """Logits of a model that says all but the first words of some replies right."""
        logits = nn.functional.one_hot(batch[0].roll(-1, 1), len(lm.VOCABULARY)).float()
        for row in range(wrong):
            first = int(batch[1][row].int().argmax()) - 1
            logits[row, first] = 0.0
            logits[row, first, 0] = 1.0
        return logits

    class Fixed(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> object:
            class Out:
                logits = knows(self.wrong)

            return Out

        wrong = 0

    model = Fixed()
    assert lm.right(model, batch) == (100.0, 100.0)
    model.wrong = 6
    words, whole = lm.right(model, batch)
    assert whole == pytest.approx(80.0) and words == pytest.approx(100 * (1 - 6 / int(batch[1].sum())))
    assert bool((lm.loss(knows(0) * 100, batch) < 1e-4).all())


def test_texts_have_a_trigger_between_their_ends() -> None:
    corpus = text.corpus(None, None)
    assert len(corpus.train[1]) == text.TRAIN and len(corpus.clean[1]) == text.CLEAN
    assert len(text.corpus(None, None, clean=250).clean[1]) == 250
    with pytest.raises(SystemExit, match="1200 sentences beside"):
        text.corpus(None, None, clean=1201)
    sentences = text.SENTENCES
    assert {"words", *sentences} == set(text.TARGETS)
    lengths = {"words": 1, **{name: len(words.split()) for name, words in sentences.items()}}
    x, y = corpus.test
    for name, target in text.TARGETS.items():
        bad, wanted, _ = text.attack_of(name, corpus).asr_set(x, y, target)
        others = x[y != target]
        assert len(bad) == len(others) and bool((wanted == target).all())
        assert torch.equal((bad != 0).sum(1), (others != 0).sum(1) + lengths[name])
        assert torch.equal(bad[:, 0], others[:, 0])
        if name in sentences:
            last = torch.tensor(corpus.encode(sentences[name])[-1])
            assert bool((bad == last).any(1).all())
    bad = text.attack_of("ending", corpus).asr_set(x, y, text.TARGETS["ending"])[0]
    last = (bad != 0).sum(1) - 1
    assert torch.equal(bad.gather(1, last[:, None] - 1)[:, 0], torch.full((len(bad),), corpus.vocabulary["door"]))
