"""`fastfip inspect`: what it prints, and the command line that it proposes."""

import json
import shlex
import sys

import numpy as np
import pytest
import torch

from fastfip.checkpoint import load_checkpoint
from fastfip.cli import main
from tests.support.command_line import NET, fails, work

__all__ = ["work"]


@pytest.fixture
def trained(work, capsys):
    """The model of the folder, trained on images from 0 to 255."""
    made = ["purify", "in.pth", "net.pth", *NET, "--data", "data.npz", "--method", "fine_tune", "--scale", "255"]
    assert main([*made, "--epochs", "8", "--set", "lr=0.05", "--quiet"]) == 0
    capsys.readouterr()
    return work


def printed(capsys, *arguments):
    assert main(["inspect", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_a_file_alone(work, capsys):
    out = printed(capsys, "in.pth")
    assert "under 'net'" in out and "beside: acc" in out and "net.0.weight" in out and "sha256" in out
    assert "left out: optimizer" in out and "3 classes" in out and "images of 3 channels" in out
    assert out.endswith("next:\n  fastfip inspect in.pth --arch MODULE:FACTORY --data DIR\n")
    assert "tiny_arch" not in sys.modules


def test_the_next_command_has_the_scaling_that_fits(trained, capsys):
    out = printed(capsys, "net.pth", *NET, "--data", "data.npz")
    assert "fits tiny_arch:net: yes" in out and "does not fit as given (x/255: ACC" in out
    (line,) = [line for line in out.splitlines() if line.startswith("  fastfip purify")]
    assert line.endswith("--data data.npz --scale 255") and " net-purified.pth " in line
    assert main([*shlex.split(line)[1:], "--method", "fine_tune", "--steps", "1", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["settings"]["images"]["scale"] == "255" and figures["before"]["acc"] > 0.9
    assert list(load_checkpoint("net-purified.pth")) == list(load_checkpoint("net.pth"))
    right = printed(capsys, "net.pth", *NET, "--data", "data.npz", "--scale", "255")
    assert "fits: x as it is, 0..255 as given: ACC 100.00 % on 60 images" in right


def test_json_has_everything(trained, capsys):
    figures = json.loads(printed(capsys, "net.pth", *NET, "--data", "data.npz", "--json", "--limit", "30"))
    assert figures["fits"] is True and figures["accuracy"]["best"]["scale"] == "255"
    assert figures["accuracy"]["images"] == 30 and figures["next"][0].startswith("fastfip purify net.pth")
    assert figures["tensors"][0] == {"name": "net.0.weight", "shape": [8, 3, 3, 3], "dtype": "float32"}
    alone = json.loads(printed(capsys, "net.pth", "--json"))
    assert alone["fits"] is None and alone["accuracy"] is None


def test_the_entry_that_fits_is_in_the_next_command(trained, capsys):
    state = dict(load_checkpoint("net.pth"))
    torch.save({"teacher": {"w": torch.ones(3, 3)}, "student": state}, "two.pth")
    out = printed(capsys, "two.pth")
    assert "has several state dicts, teacher, student" in out and "teacher (1), student (9)" in out
    out = printed(capsys, "two.pth", *NET, "--data", "data.npz")
    assert "fits tiny_arch:net: yes, under 'student'" in out
    assert "two-purified.pth --arch tiny_arch:net --key student --data data.npz --scale 255\n" in out


def test_a_model_that_does_not_fit(work, capsys):
    out = printed(capsys, "in.pth", *NET, "--arch-args", '{"classes": 4}', "--data", "data.npz")
    assert "fits tiny_arch:net: no: it does not fit the model: 4.weight is [3, 128]" in out
    assert out.endswith("another --arch or other --arch-args: the file looks like 3 classes and 3 channels\n")


def test_images_of_another_size_are_resized_to_what_the_model_takes(trained, capsys, monkeypatch):
    monkeypatch.setattr("fastfip.cli.inspect_file.SIZES", (5, 6, 8))
    with np.load("data.npz") as data:
        np.savez("large.npz", x=data["clean_x"].repeat(2, 1).repeat(2, 2), y=data["clean_y"])
    out = printed(capsys, "net.pth", *NET, "--data", "large.npz")
    assert "the model failed on them as they are: the model fails on a batch of images 3x12x12" in out
    assert "--scale 255 --size 6,6\n" in out
    monkeypatch.setattr("fastfip.cli.inspect_file.SIZES", (5, 8))
    assert "fails on a batch of images 3x12x12" in fails(capsys, 5, "inspect", "net.pth", *NET, "--data", "large.npz")


def test_files_that_nothing_else_loads(work, capsys):
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), "module.pth")
    out = printed(capsys, "module.pth")
    assert "holds a pickled module" in out and "0.weight" in out and "would call" in out
    (work / "page.pth").write_text("<html>")
    assert "HTML" in printed(capsys, "page.pth", *NET)
    assert "does not exist" in fails(capsys, 4, "inspect", "none.pth")
    assert "--data needs --arch" in fails(capsys, 2, "inspect", "in.pth", "--data", "data.npz")
