"""The command line on a published network, start to end: a model as its authors write it, class folders 0 to 42."""

from __future__ import annotations

import contextlib
import json
import sys

import numpy as np
import pytest

from benchmarks.purification import real_data
from fastfip.cli import main
from fastfip.data.pictures import read_image
from tests.support.short_search import short_search  # noqa: F401

pytestmark = [
    pytest.mark.skipif(not real_data.available(), reason="no ../shared/data (FASTFIP_DATA)"),
    pytest.mark.usefixtures("short_search"),
]

#: The checkpoint's names and shapes, flattened as its authors flatten, in place where they work in place.
MODEL = """
from torch import nn

class SignNet(nn.Module):
    def __init__(self, num_classes=43):
        super().__init__()
        layers, before = [], 3
        for width, share in ((32, 0.3), (64, 0.4), (128, 0.4)):
            for _ in range(2):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ELU(inplace=True)]
                before = width
            layers += [nn.MaxPool2d(2, 2), nn.Dropout(share)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(2048, num_classes)

    def forward(self, x):
        out = self.features(x)
        out = out.view(out.size(0), -1)
        return self.classifier(out)
"""
CLEAN = 5  # images a class
TEST = 12  # every twelfth image of the test set
NET = ["net.pth", "--arch", "sign_net:SignNet"]
TRIGGER = ["--attack", "badnets:size=4,margin=1", "--target", "8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the checkpoint, the code of its model, and images as PNGs in class folders."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("signs")
    (folder / "sign_net.py").write_text(MODEL)
    (folder / "net.pth").symlink_to(real_data.data_dir() / "checkpoints" / "ibau_gtsrb_badnets.pth")
    with np.load(real_data.data_dir() / "gtsrb32.npz") as data:
        for part in ("clean", "test"):
            x, y = data[f"{part}_x"], data[f"{part}_y"]
            for c in range(43):
                (folder / part / str(c)).mkdir(parents=True)
                mine = np.flatnonzero(y == c)
                mine = np.random.default_rng(c).permutation(mine)[:CLEAN] if part == "clean" else mine[mine % TEST == 0]
                for i in mine:
                    Image.fromarray(x[i]).save(folder / part / str(c) / f"{i}.png")
    with contextlib.chdir(folder):
        yield folder
    sys.modules.pop("sign_net", None)


def figures(capsys, *arguments):
    code = main([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def test_inspect_names_the_scaling_and_the_order_of_classes(place, capsys):
    found = figures(capsys, "inspect", *NET, "--data", "clean")
    assert found["fits"] and found["key"] == "net" and found["guesses"] == {"classes": 43, "channels": 3}
    best = found["accuracy"]["best"]
    assert best["acc"] > 0.976 and (best["scale"], best["mean"], best["class_order"]) == ("01", [], "number")
    assert found["next"][0].startswith("fastfip purify net.pth net-purified.pth --arch sign_net:SignNet --data clean")
    assert found["next"][0].endswith("--data clean")
    for wrong in (["--scale", "255"], ["--mean", "imagenet"], ["--class-order", "text"]):
        found = figures(capsys, "inspect", *NET, "--data", "clean", "--limit", "100", *wrong)
        assert found["accuracy"]["given"]["acc"] < found["accuracy"]["best"]["acc"] - 0.03
        assert "does not fit as given" in found["accuracy"]["words"][0]
        assert "x/255, classes by number gives ACC" in found["accuracy"]["words"][0]
        right = " --class-order number" if "text" in wrong else ""
        assert found["next"][0].endswith(f"--data clean{right}")


def test_evaluate(place, capsys):
    found = figures(capsys, "evaluate", *NET, "--test-data", "test", *TRIGGER)
    assert found["acc"] >= 0.976 and found["asr"] > 0.97
    assert found["images"]["class_order"] == "number" and found["images"]["classes"][10] == "10"
    assert "class folders 0 to 42 are the classes of these numbers" in found["notes"]
    assert figures(capsys, "evaluate", *NET, "--test-data", "test", "--class-order", "text")["acc"] < 0.1


def test_purify(place, capsys):
    more = ["--test-data", "test", *TRIGGER, "--steps", "6", "--report", "r.json", "--force"]
    code = main(["purify", NET[0], "out.pth", *NET[1:], "--data", "clean", *more, "--quiet"])
    out, err = capsys.readouterr()
    assert code == 0, err
    report = json.loads((place / "r.json").read_text())
    assert report["before"]["acc"] >= 0.976 and report["settings"]["images"]["class_order"] == "number"
    assert "class folders 0 to 42 are the classes of these numbers" in out


def test_purify_refuses_a_wrong_order_of_classes_and_a_wrong_scaling(place, capsys):
    for wrong in (["--class-order", "text"], ["--scale", "255"]):
        code = main(["purify", NET[0], "bad.pth", *NET[1:], "--data", "clean", *wrong, "--steps", "1", "--quiet"])
        err = capsys.readouterr().err
        assert code == 3 and not (place / "bad.pth").exists(), err
        assert "--ignore-fit goes on, fastfip inspect tries the usual scalings and class orders" in err


def test_audit(place, capsys):
    found = figures(
        capsys,
        "audit",
        *NET,
        "--data",
        "clean",
        "--steps",
        "3",
        "--classes",
        "0,1,2,3,4,8",
        "--limit",
        "200",
        "--no-sharpness",
        "--quiet",
    )
    assert found["settings"]["images"]["class_order"] == "number" and found["received"]["verdict"]


def test_the_images_in_the_folders_are_those_of_the_set(place):
    paths = sorted((place / "clean" / "10").iterdir())
    with np.load(real_data.data_dir() / "gtsrb32.npz") as data:
        want = data["clean_x"][int(paths[0].stem)]
    assert np.allclose(read_image(paths[0]).permute(1, 2, 0).numpy() * 255, want)
