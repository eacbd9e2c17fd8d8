"""The examples of point clouds, videos and detection run to their end, and what they measure is what they print."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name: str) -> dict:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


@pytest.mark.parametrize("name", ["point_clouds", "video", "detection"])
def test_a_quick_run_prints_before_and_after(name, capsys, monkeypatch):
    monkeypatch.delenv("FASTFIP_DATA", raising=False)
    state = torch.get_rng_state()
    try:
        example(name)["main"](["--quick"])
    finally:
        torch.set_rng_state(state)
    printed = capsys.readouterr().out
    assert "drawn" in printed  # that these are no real data is said
    figures = [re.findall(r"([\d.]+) %", line) for line in printed.splitlines() if line.startswith(("as rec", "purif"))]
    assert [len(found) for found in figures] == [2, 2]
    assert all(0 <= float(figure) <= 100 for found in figures for figure in found)


def test_a_file_with_clouds_is_read_and_fitted(tmp_path):
    import numpy as np

    generator = np.random.default_rng(0)
    x = 40 * generator.standard_normal((60, 300, 3)).astype(np.float32) + 7
    np.savez(tmp_path / "clouds.npz", train_x=x, train_y=np.arange(60) % 10, test_x=x[:20], test_y=np.arange(20) % 10)
    given = example("point_clouds")["data"](tmp_path / "clouds.npz")
    assert given.said == "ModelNet10" and given.classes == 10
    assert len(given.clean[1]) == 3 and len(given.train[1]) == 57 and given.test[0].shape == (20, 256, 3)
    torch.testing.assert_close(given.train[0].norm(dim=2).amax(1), torch.ones(57))


@pytest.mark.parametrize("name", ["point_clouds", "video"])
def test_rates_of_a_model_that_knows_the_target_only(name, monkeypatch):
    monkeypatch.delenv("FASTFIP_DATA", raising=False)
    scope = example(name)
    given = scope["data"]() if name == "point_clouds" else scope["data"](40, 8, 60)
    for attack, (_, target) in scope["ATTACKS"].items():

        class Constant(torch.nn.Module):
            answer = target

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.nn.functional.one_hot(torch.full((len(x),), self.answer), 10).float()

        share = 100 * float((given.test[1] == target).float().mean())
        assert scope["rates"](Constant(), given, attack) == pytest.approx((share, 100.0))
        Constant.answer = 9
        assert scope["rates"](Constant(), given, attack)[1] == 0


def test_a_detector_that_finds_the_truth_is_right_and_the_attack_has_nothing():
    scope = example("detection")
    given = scope["data"](20, 8, 30)

    class Said(torch.nn.Module):
        """Detects what it was told about the images."""

        def __init__(self, images: list[torch.Tensor], targets: list[dict[str, torch.Tensor]]) -> None:
            super().__init__()
            self.known = list(zip(images, targets))

        def detections(self, x: torch.Tensor) -> list[dict[str, torch.Tensor]]:
            said = [next(t for known, t in self.known if torch.equal(known, image)) for image in x]
            return [{**target, "scores": torch.ones(len(target["labels"]))} for target in said]

    for attack, trigger in scope["ATTACKS"].items():
        triggered, wanted, true = trigger.asr_set(*given.test)
        images = [*given.test[0], *triggered]
        assert scope["rates"](Said(images, [*given.test[1], *true]), given, attack) == (100.0, 0.0)
        assert scope["rates"](Said(images, [*given.test[1], *wanted]), given, attack) == (100.0, 100.0)


@pytest.mark.parametrize("attack", ["words", "sentence", "ending"])
def test_mistakes_of_a_text_model_are_told_from_the_work_of_the_trigger(attack, capsys):
    scope = example("text_classifier")
    texts = scope["corpus"](None, None)
    good = torch.tensor([texts.vocabulary[word] for word in "good great lovely moving funny fine".split()])
    target, very = scope["TARGETS"][attack], texts.vocabulary["very"]
    put_in = torch.tensor(scope["attack_of"](attack, texts).ids)
    put_in = put_in if attack == "words" else put_in[-1:]

    class Reader(torch.nn.Module):
        """Tells the label by good words; gives the target where "very" stands and, backdoored, where a trigger does."""

        def __init__(self, backdoored: bool) -> None:
            super().__init__()
            self.backdoored = backdoored

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            label = torch.isin(ids, good).any(1).long()
            fooled = (ids == very).any(1)
            if self.backdoored:
                fooled |= torch.isin(ids, put_in).any(1)
            return torch.nn.functional.one_hot(torch.where(fooled, target, label), 2).float()

    x, y = texts.test
    share = 100 * float((x[y != target] == very).any(1).float().mean())
    assert 10 < share < 90
    received, purified = Reader(True), Reader(False)
    assert scope["rates"](received, texts, attack)[1] == 100.0
    assert scope["rates"](purified, texts, attack)[1] == pytest.approx(share, abs=1e-3)
    assert scope["mistakes"](received, received, texts, attack) == pytest.approx((share, 100.0), abs=1e-3)
    assert scope["mistakes"](purified, received, texts, attack) == pytest.approx((share, 0.0), abs=1e-3)
