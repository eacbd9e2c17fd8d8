"""Turns of phrases in a run: of many classes each has the same chance, and the steps go on from the search."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastfip
from fastfip.worst_case.phrases import LENGTHS, Phrases


def run_of(classes: int, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> tuple[list[int], str]:
    """Return the phrases that were improved, in their order, and the result in words."""
    turns: list[int] = []
    monkeypatch.setattr(Phrases, "improve", lambda self, model, task, batch, number: turns.append(number))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 4), nn.Flatten(), nn.Linear(20, classes))
    ids = torch.randint(1, 30, (16, 5))
    result = fastfip.purify(
        model, [(ids, torch.arange(16) % classes)], "fisher_steps", steps=20, seed=seed, force=True, progress=False
    )
    return turns, str(result)


def test_up_to_twenty_classes_have_their_turns_as_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    turns, said = run_of(20, monkeypatch)
    assert turns[:60] == list(range(60)) and turns[60:] == list(range(len(turns) - 60)) and len(turns) > 60
    assert "NOT SEARCHED" not in said


def test_of_many_classes_each_has_a_turn_and_the_steps_go_on_from_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    turns, said = run_of(40, monkeypatch)
    classes = [turn // len(LENGTHS) for turn in turns]
    assert sorted(classes[:40]) == list(range(40)) and len(set(classes[40:])) == len(turns) - 40
    assert len(turns) > 60 and len(set(turns)) == len(turns), "no phrase has a second turn"
    assert {turn % len(LENGTHS) for turn in turns[:40]} == set(range(len(LENGTHS)))
    assert turns != run_of(40, monkeypatch, seed=1)[0] and "NOT SEARCHED" not in said


def test_the_result_says_how_many_classes_had_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    turns, said = run_of(90, monkeypatch)
    left = 90 - len({turn // len(LENGTHS) for turn in turns})
    assert left == 90 - len(turns) > 0
    assert f"{left} of 90 classes, drawn at random, WERE NOT SEARCHED for phrases" in said
