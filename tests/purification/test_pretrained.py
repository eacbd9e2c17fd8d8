"""What `pretrained=` may be, how its names meet those of the model, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fastfip
from fastfip.errors import CheckpointError, ConfigError
from fastfip.purification.pretrained import pretrained_values
from tests.support.small_nets import conv_net, data, same, values


class Whole(nn.Module):
    def __init__(self, body: nn.Module, classes: int = 3) -> None:
        super().__init__()
        self.bert, self.head = body, nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.bert(x.flatten(1)))


def body(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(72, 8), nn.Tanh(), nn.Linear(8, 8))


def shifted(net: nn.Module) -> nn.Module:
    torch.manual_seed(9)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))
    return net


def test_modules_state_dicts_files_and_folders_are_the_same(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model, before = Whole(body(0)), body(1)
    state = before.state_dict()
    torch.save({"state_dict": {f"module.{name}": t for name, t in state.items()}}, tmp_path / "base.pth")
    (tmp_path / "folder").mkdir()
    save_file(state, tmp_path / "folder" / "model.safetensors")
    given = (
        before,
        nn.DataParallel(before),
        state,
        tmp_path / "base.pth",
        str(tmp_path / "base.pth"),
        tmp_path / "folder",
    )
    for one in given:
        found, said = pretrained_values(one, model)
        assert {name: t.tolist() for name, t in found.items()} == {f"bert.{n}": t.tolist() for n, t in state.items()}
        assert said.endswith("and not head.weight, head.bias") and "96.0 %" in said


def test_a_head_of_another_shape_is_left_out_and_another_head_of_the_same_is_not() -> None:
    model = Whole(body(0))
    assert "head.weight" not in pretrained_values(Whole(body(1), 5), model)[0]
    assert "head.weight" in pretrained_values(shifted(Whole(body(1))), model)[0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (3, "pretrained= is a int: give a module, a state dict, a checkpoint file or a folder"),
        (conv_net(), "has 0 of the 683 numbers.*its names are bert.0.weight"),
        ({}, "has 0 of the 683 numbers.*the others none"),
        (
            {name: t * float("nan") for name, t in body(1).state_dict().items()},
            "values that are not finite: bert.0.weight",
        ),
        (body(0), "pretrained= holds the received weights"),
    ],
)
def test_what_cannot_be_is_refused(given: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        pretrained_values(given, Whole(body(0)))
    with pytest.raises(ConfigError, match=words):
        fastfip.purify(Whole(body(0)), data(24), pretrained=given, progress=False, force=True)


def test_a_file_that_is_not_there_is_an_error_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no.pth"):
        pretrained_values(tmp_path / "no.pth", Whole(body(0)))


def test_neither_model_is_touched_and_the_result_says_what_was_given(tmp_path: Path) -> None:
    model, before = Whole(body(0)), body(1)
    both = values(model), values(before)
    options = {"steps": 2, "progress": False, "force": True}
    result = fastfip.purify(model, data(24), pretrained=before, **options)
    assert same(values(model), both[0]) and same(values(before), both[1])
    assert result.settings["arguments"] == {"force": "True", "pretrained": "pretrained"}
    torch.save(before.state_dict(), tmp_path / "base.pth")
    of_file = fastfip.purify(model, data(24), pretrained=tmp_path / "base.pth", **options)
    assert of_file.settings["arguments"]["pretrained"] == repr(str(tmp_path / "base.pth"))
    assert same(of_file.state_dict(), result.state_dict())


def test_low_precision_is_mixed_in_full_and_rounded_at_the_end() -> None:
    model, before, (x, y) = Whole(body(0)).bfloat16(), body(1), data(24)
    result = fastfip.purify(model, (x.bfloat16(), y), pretrained=before, steps=2, progress=False, force=True)
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    old = dict(before.named_parameters())
    for name, p in result.model.bert.named_parameters():
        assert float((p.float() - old[name]).abs().max()) < 0.02


def test_frozen_parts_do_not_count_and_are_named() -> None:
    model, before = Whole(body(0)), body(1)
    model.bert[0].requires_grad_(False)
    options = {"pretrained": before, "steps": 1, "progress": False, "force": True, "batch_size": 8}
    result = fastfip.purify(model, data(24), **options)
    assert torch.equal(result.model.bert[0].weight, model.bert[0].weight)
    assert any("frozen, and as received: bert.0.weight, bert.0.bias" in note for note in result.notes)
    model.bert.requires_grad_(False)
    with pytest.raises(ConfigError, match="has 0 of the 27 numbers that are tuned.*unless frozen='tune'"):
        fastfip.purify(model, data(24), **options)
    tuned = fastfip.purify(model, data(24), frozen="tune", **options)
    assert not any("frozen" in note for note in tuned.notes)


def test_nested_tied_meta_and_ambiguous_ones() -> None:
    model, before = Whole(body(0)), body(1)
    state = before.state_dict()
    found = pretrained_values({"state_dict": state, "epoch": 3}, model)[0]
    assert torch.equal(found["bert.0.weight"], state["0.weight"])
    with pytest.raises(ConfigError, match="pretrained= is on the meta device"):
        pretrained_values(body(1).to("meta"), model)
    twice = {f"{who}.bert.{name}": t for who in ("student", "teacher") for name, t in state.items()}
    heads = {f"{who}.head.{name}": t for who in ("student", "teacher") for name, t in model.head.state_dict().items()}
    with pytest.raises(ConfigError, match="pretrained= has the names of the model under 'student.' and 'teacher.'"):
        pretrained_values({**twice, **heads}, model)
    tied = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    tied[1].weight = tied[0].weight
    found, said = pretrained_values({"1.weight": torch.ones(8, 8)}, tied)
    assert set(found) == {"1.weight"} and "100.0 %" in said
    options = {"steps": 1, "lr": 1e-12, "progress": False, "force": True}
    purified = fastfip.purify(tied, (torch.rand(16, 8), torch.arange(16) % 8), pretrained=found, **options).model
    assert purified[0].weight is purified[1].weight and bool((purified[0].weight == 1).all())


def test_without_samples_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="pretrained= needs clean samples as well"):
        fastfip.purify(conv_net(), pretrained=conv_net())
