"""What libraries of models say about images, read: stand-ins here, the libraries themselves in `make zoo`."""

import json
import sys
import types

import numpy as np
import pytest
import torch

from fastfip.checkpoint.preprocessing import own_pixels
from fastfip.cli import main
from fastfip.data.scaling import STATISTICS
from fastfip.errors import ConfigError, ModelError
from tests.support.command_line import fails

MEAN, STD = STATISTICS["imagenet"]
SAID = {"interpolation": "bicubic", "mean": MEAN, "std": STD}
TIMM = {"input_size": (3, 224, 224), "crop_pct": 0.9, "crop_mode": "center", **SAID}


def timm(**said):
    model = torch.nn.Linear(1, 1)
    model.pretrained_cfg = {**TIMM, **said}
    return own_pixels("timm:net", model)


def test_what_timm_says_is_read():
    pixels = timm()
    assert (pixels.size, pixels.resize, pixels.interpolation) == ((224, 224), 248, "bicubic")
    assert (pixels.mean, pixels.std, pixels.channels, pixels.of) == (MEAN, STD, 3, "timm:net")
    assert timm(crop_pct=1.0).resize == 224  # the shorter side, so that the rest is cut off
    assert timm(crop_mode="squash", crop_pct=0.95).resize == (235, 235)
    assert timm(crop_mode="squash", crop_pct=1.0).resize is None
    assert timm(input_size=(1, 28, 28)).channels == 1
    model = torch.nn.Linear(1, 1)
    assert own_pixels("timm:net", model) is None and own_pixels("nets:net", model) is None
    model.pretrained_cfg = TIMM
    small = own_pixels("timm:net", model, {"img_size": 64, "num_classes": 3})
    assert (small.size, small.resize, small.mean) == ((64, 64), None, MEAN)


def test_what_has_no_counterpart_is_one_line_that_names_the_options():
    with pytest.raises(ConfigError, match="arch 'timm:net': its crop_mode is 'border' for 224 x 224: give --size"):
        timm(crop_mode="border")
    with pytest.raises(ConfigError, match="'center' for 224 x 160"):
        timm(input_size=(3, 224, 160))
    with pytest.raises(ModelError, match="its preprocessing cannot be understood"):
        timm(mean=None)


def hf(folder, name="preprocessor_config.json", **said):
    folder.mkdir(exist_ok=True)
    given = {
        "do_resize": True,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "resample": 3,
        **said,
    }
    (folder / name).write_text(json.dumps(given if name.startswith("pre") else {"image_processor": given}))
    return own_pixels(f"hf:{folder}", torch.nn.Linear(1, 1))


def test_what_transformers_says_is_read(tmp_path):
    vit = hf(tmp_path / "vit", size={"height": 32, "width": 48})
    assert (vit.size, vit.resize, vit.interpolation, vit.mean) == ((32, 48), None, "bicubic", MEAN)
    clip = {"size": {"shortest_edge": 24}, "crop_size": {"height": 20, "width": 20}, "do_center_crop": True}
    for name in ("preprocessor_config.json", "processor_config.json"):
        pixels = hf(tmp_path / name, name, **clip, resample=1)
        assert (pixels.size, pixels.resize, pixels.interpolation) == ((20, 20), 24, "lanczos")
    assert hf(tmp_path / "old", size=224, resample=2).size == (224, 224)
    convnext = hf(tmp_path / "convnext", size={"shortest_edge": 224}, crop_pct=0.875)
    assert (convnext.size, convnext.resize) == ((224, 224), 256)
    assert hf(tmp_path / "convnext", size={"shortest_edge": 384}, crop_pct=0.875).resize is None
    plain = hf(tmp_path / "plain", size={"height": 8, "width": 8}, do_normalize=False)
    assert (plain.mean, plain.std, plain.scale) == ((), (), None)
    assert hf(tmp_path / "whole", size={"height": 8, "width": 8}, do_rescale=False).scale == "255"
    (tmp_path / "text").mkdir()
    assert own_pixels(f"hf:{tmp_path / 'text'}", torch.nn.Linear(1, 1)) is None


def test_a_folder_of_transformers_that_cannot_be_understood_is_one_line(tmp_path):
    with pytest.raises(
        ConfigError, match="keeps the proportions of images, so that they have no one size: give --size"
    ):
        hf(tmp_path / "a", size={"shortest_edge": 224})
    with pytest.raises(ConfigError, match=r"it multiplies pixels by 0.5: give --scale"):
        hf(tmp_path / "b", size=8, rescale_factor=0.5)
    with pytest.raises(ModelError, match="cannot be understood"):
        hf(tmp_path / "c", size={"height": "wide", "width": 3})
    (tmp_path / "c" / "preprocessor_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"its preprocessor_config.json cannot be read"):
        own_pixels(f"hf:{tmp_path / 'c'}", torch.nn.Linear(1, 1))


# ------------------------------------------------------------------------------------------------- on the command line


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A checkpoint of a stand-in for timm, which wants images of 8 x 8 cut from 10, and pictures of 12 x 14."""
    from PIL import Image

    class Timm(types.ModuleType):
        def is_model(self, name):
            return name == "tiny"

        def create_model(self, model_name, num_classes=3, channels=3):
            layers = [torch.nn.Conv2d(channels, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten()]
            net = torch.nn.Sequential(*layers, torch.nn.Linear(4 * 6 * 6, num_classes))
            net.pretrained_cfg = {**TIMM, "input_size": (3, 8, 8), "crop_pct": 0.8}
            return net

    monkeypatch.setitem(sys.modules, "timm", Timm("timm"))
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(12):
        x = rng.integers(0, 100, (12, 14, 3), dtype=np.uint8)
        x[..., i % 3] += 120
        (tmp_path / "images" / str(i % 3)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(x).save(tmp_path / "images" / str(i % 3) / f"{i}.png")
    torch.save(Timm("timm").create_model("tiny").state_dict(), "in.pth")
    return tmp_path


EVALUATE = ["evaluate", "in.pth", "--arch", "timm:tiny", "--test-data", "images", "--json"]


def images_of(capsys, *options):
    assert main([*EVALUATE, *options]) == 0
    figures = json.loads(capsys.readouterr().out)
    return figures["images"], figures["notes"]


def test_images_are_made_as_the_model_wants_them_unless_options_say_otherwise(work, capsys):
    images, notes = images_of(capsys)
    assert (images["size"], images["resize"], images["mean"]) == ([8, 8], 10, list(MEAN))
    assert any("images are made as timm:tiny says: shorter side 10, the middle 8 x 8" in note for note in notes)
    images, _ = images_of(capsys, "--mean", "0.5", "--std", "0.25")
    assert (images["size"], images["resize"], images["mean"], images["std"]) == ([8, 8], 10, [0.5], [0.25])
    images, _ = images_of(capsys, "--size", "8")
    assert (images["size"], images["resize"], images["mean"]) == ([8, 8], None, list(MEAN))
    images, notes = images_of(capsys, "--size", "8", "--scale", "-11")
    assert (images["scale"], images["mean"]) == ("-11", []) and "of" not in images
    assert not any("images are made as" in note for note in notes)


def test_pictures_that_were_made_so_by_hand_give_the_same_loss(work, capsys):
    from PIL import Image

    for path in (work / "images").rglob("*.png"):
        (work / "made" / path.parent.name).mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            small = image.resize((11, 10), Image.Resampling.BICUBIC).crop((2, 1, 10, 9))
        small.save(work / "made" / path.parent.name / path.name)
    losses = []
    for data, options in (
        ("images", []),
        ("made", ["--size", "8", "--mean", "imagenet"]),
        ("made", ["--size", "8", "--mean", "gtsrb"]),
    ):
        assert main([*EVALUATE[:5], data, "--json", *options]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0] != pytest.approx(losses[2], rel=1e-3)


def test_inspect_tries_the_model_on_images_as_it_wants_them_and_need_not_repeat_that(work, capsys):
    assert main(["inspect", "in.pth", "--arch", "timm:tiny", "--data", "images", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"]["given"]["of"] == "timm:tiny" and "--size" not in " ".join(found["next"])


def test_arrays_that_are_normalised_already_are_not_normalised_again(work, capsys):
    x, y = np.random.default_rng(0).normal(size=(9, 3, 8, 8)).astype(np.float32), np.arange(9) % 3
    np.savez("normal.npz", x=x, y=y)
    said = fails(capsys, 3, *EVALUATE[:5], "normal.npz")
    assert "normalised already: give --mean 0" in said
    assert main([*EVALUATE[:5], "normal.npz", "--mean", "0"]) == 0
