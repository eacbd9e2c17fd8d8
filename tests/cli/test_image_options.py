"""How the options make inputs and labels of images, and what results say about it."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from fastfip.cli import app, image_options, main, options
from fastfip.data.scaling import STATISTICS
from tests.support.command_line import NET, PURIFY, TRIGGER, fails, work

__all__ = ["work"]


@pytest.fixture
def folders(work):
    """The images of the test data in class folders 0, 2 and 10."""
    from PIL import Image

    with np.load("data.npz") as data:
        for i, (x, y) in enumerate(zip(data["clean_x"], data["clean_y"])):
            into = work / "images" / ("0", "2", "10")[y]
            into.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x).save(into / f"{i}.png")
    return work


def test_the_mapping_of_classes_is_printed_and_written_to_the_report(folders, capsys):
    arguments = [*PURIFY[:-3], "images", "--method", "fine_tune", "--steps", "1", "--report", "r.json", "--force"]
    assert main(arguments) == 0
    assert "note: class folders are numbered by the numbers in their names: 0 0, 1 2, 2 10" in capsys.readouterr().out
    assert main([*arguments, "--class-order", "text", "--scale", "-11"]) == 0
    assert "letter by letter: 0 0, 1 10, 2 2" in capsys.readouterr().out
    images = json.loads((folders / "r.json").read_text())["settings"]["images"]
    assert images["classes"] == ["0", "10", "2"] and images["class_order"] == "text" and images["scale"] == "-11"
    for command in (
        ["evaluate", "in.pth", *NET, "--test-data", "images"],
        ["sharpness", "in.pth", *NET, "--data", "images", "--limit", "9"],
        ["fisher", "in.pth", "f.safetensors", *NET, "--data", "images"],
        ["compare", "in.pth", *NET, "--data", "images", "--methods", "fine_tune", "--set", "fine_tune.steps=1"],
    ):
        assert main([*command, "--json", "--mean", "cifar10"]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures["images"]["class_order"] == "number"
        assert (figures["images"]["mean"], figures["images"]["std"]) == tuple(map(list, STATISTICS["cifar10"]))
        assert any("1 2, 2 10" in note for note in figures["notes"])


def test_a_name_stands_for_mean_and_std_unless_the_other_is_given():
    mean, std = STATISTICS["imagenet"]
    made = [
        image_options.pixels(*pair, None, None)
        for pair in (("imagenet", None), (None, "ImageNet"), ("imagenet", "0.5"))
    ]
    assert [(p.mean, p.std) for p in made] == [(mean, std), (mean, std), (mean, (0.5,))]
    assert image_options.pixels("0.5", None, None, None).std == ()


def test_options_that_make_no_sense(work, capsys):
    for arguments, text in [
        (["--mean", "imagenett"], "--mean=imagenett: give numbers with commas between them, or a name: imagenet, cif"),
        (["--scale", "1"], "--scale=1: must be 01, -11, 255"),
        (["--scale", "255", "--mean", "mnist"], "--mean=mnist is for pixels from 0 to 1"),
        (["--class-order", "size"], "--class-order=size: must be number or text"),
    ]:
        assert text in fails(capsys, 2, *PURIFY, *arguments)


def test_defaults_are_shown():
    shown = " ".join(CliRunner().invoke(app, ["purify", "--help"]).output.replace("│", " ").split())
    for text in ("[default: (01; ", "[default: (0)]", "[default: (1)]", "[default: 128]", "[default: cpu]"):
        assert text in shown, text


def test_a_trigger_is_on_pixels_from_0_to_1_whatever_the_scale(work, capsys):
    seen = []
    for more in ([], ["--scale", "-11", "--mean", "-1", "--std", "2"], ["--scale", "255", "--std", "255"]):
        assert main(["evaluate", "in.pth", *NET, "--test-data", "data.npz", *TRIGGER, "--json", *more]) == 0
        figures = json.loads(capsys.readouterr().out)
        seen.append([figures["acc"], figures["asr"], round(figures["loss"], 4)])
    assert seen[0] == seen[1] == seen[2]


def test_an_unknown_attack_is_found_before_the_test_set_is_read(work, capsys, monkeypatch):
    monkeypatch.setattr(options.ImageReader, "load", lambda *args: pytest.fail("images were read"))
    known = ["evaluate", "in.pth", *NET, "--test-data", "data.npz", "--target", "1"]
    assert "did you mean 'badnets'" in fails(capsys, 5, *known, "--attack", "BadNet")
    assert "sice=2" in fails(capsys, 5, *known, "--attack", "badnets:sice=2")
