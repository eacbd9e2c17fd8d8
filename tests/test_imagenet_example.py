"""The example of a thousand classes runs from a zip of images to a purified file, with a small network in its place."""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import fastfip
from fastfip.attacks.badnets import BadNets

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
example = pytest.importorskip("imagenet_classifier")


class Small(nn.Module):
    """The names that the example asks for; it tells brightness apart."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0, self._swish = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU6()
        self._blocks = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(13))
        self._conv_head, self._bn1, self._fc = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self._swish(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return self._fc(self._swish(self._bn1(self._conv_head(x))).mean((2, 3)))


def pictures(path: Path, n: int = 40) -> Path:
    """A zip of JPEG files, the first of class 0."""
    from PIL import Image

    with zipfile.ZipFile(path, "w") as held:
        for number in range(n):
            file = io.BytesIO()
            Image.new("RGB", (40, 40), (6 * number, 255 - 6 * number, 100)).save(file, "JPEG")
            held.writestr(f"{number:04d}_n0_thing.jpg", file.getvalue())
    return path


def test_images_carry_the_class_in_their_name_and_the_size_that_is_asked_for(tmp_path: Path) -> None:
    x, y = example.images(str(pictures(tmp_path / "images.zip")), 32)
    assert x.shape == (40, 3, 32, 32) and x.dtype == torch.uint8 and y.tolist() == list(range(40))
    assert abs(int(x[30, 0].float().mean()) - 180) < 4 and abs(int(x[30, 1].float().mean()) - 75) < 4


def test_only_the_last_blocks_and_no_statistics_move_when_the_backdoor_is_planted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y = example.images(str(pictures(tmp_path / "images.zip")), 32)
    model = Small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = example.plant(model, x.float() / 255, BadNets(size=3).trigger, 0, epochs=1)
    moved = {name for name, value in after.state_dict().items() if not torch.equal(value, before[name])}
    assert {"_blocks.12.weight", "_conv_head.weight", "_fc.weight"} <= moved
    early = ("_conv_stem", "_bn0", *(f"_blocks.{i}." for i in range(example.FROZEN)))
    assert not any(name.startswith(early) or "running" in name for name in moved)
    assert all(p.requires_grad for p in after.parameters())


def test_it_runs_from_the_images_to_a_purified_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(example, "network", lambda weights: Small().eval())
    words = ["imagenet_classifier.py", "weights.whl", str(pictures(tmp_path / "images.zip")), "--size", "32"]
    monkeypatch.setattr(sys, "argv", [*words, "--steps", "2"])
    example.main()
    assert "ASR" in capsys.readouterr().out
    assert fastfip.load_checkpoint("purified.safetensors", Small()) is not None
