"""`fastfip train-backdoor`: from scratch and from a clean network, what it writes, what it refuses."""

import json
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastfip.attacks.badnets import BadNets
from fastfip.cli import main
from fastfip.cli.triggers import make_attack
from fastfip.errors import ConfigError

ARCH = """
from torch import nn
def net():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(432, 4)
    )
"""
OWN = """
import dataclasses
from fastfip.attacks import Attack
@dataclasses.dataclass(frozen=True)
class Bright(Attack):
    name = "bright"
    summary = "one bright row"
    row: int = 0
    def trigger(self, x):
        out = x.clone()
        out[..., self.row, :] = 1
        return out
"""
TRAIN = [
    "train-backdoor",
    "bad.pth",
    "--arch",
    "backdoor_arch:net",
    "--batch-size",
    "32",
    "--augment",
    "none",
    "--quiet",
]


def quarters(n, seed):
    """Bright quarters: four classes that a small net learns in seconds."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 80, (n, 12, 12, 3), dtype=np.uint8), np.arange(n) % 4
    for i, c in enumerate(y):
        x[i, 6 * (c // 2) : 6 * (c // 2) + 5, 6 * (c % 2) : 6 * (c % 2) + 5] += 120
    return x, y


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with an architecture, an attack of the user's, training and test images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "backdoor_arch.py").write_text(ARCH)
    (tmp_path / "backdoor_own.py").write_text(OWN)
    for name, n, seed in (("train", 240, 0), ("test", 80, 1)):
        x, y = quarters(n, seed)
        np.savez(f"{name}.npz", x=x, y=y)
    yield tmp_path
    for name in ("backdoor_arch", "backdoor_own"):
        sys.modules.pop(name, None)


def test_a_network_from_scratch_and_what_other_commands_find_in_it(work, capsys):
    ends = ["--data", "train.npz", "--test-data", "test.npz", "--mean", "0.5", "--std", "0.25", "--epochs", "6"]
    attack = ["--attack", "badnets:size=2", "--target", "1", "--asr-out", "bad.npz", "--report", "bad.json"]
    assert main([*TRAIN, *ends, *attack, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((work / "bad.json").read_text())
    (backdoor,) = told["backdoors"]
    assert told["clean"]["acc"] > 0.9 and backdoor["asr"] > 0.9 and backdoor["poisoned"] == 24
    scale = ["--mean", "0.5", "--std", "0.25", "--json"]
    net = ["evaluate", "bad.pth", "--arch", "backdoor_arch:net", "--test-data", "test.npz"]
    assert main([*net, "--asr-data", "bad.npz", *scale]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["asr"] == pytest.approx(backdoor["asr"]) and found["acc"] == pytest.approx(told["clean"]["acc"])
    assert main([*net, "--attack", "badnets:size=2", "--target", "1", *scale]) == 0
    assert json.loads(capsys.readouterr().out)["asr"] == pytest.approx(backdoor["asr"])


def test_several_backdoors_into_a_clean_network_with_images_of_a_zip(work, capsys):
    with zipfile.ZipFile("images.zip", "w") as archive:
        for name in ("train", "test"):
            with np.load(f"{name}.npz") as held:
                for i, (x, c) in enumerate(zip(held["x"], held["y"])):
                    Image.fromarray(x).save("one.png")
                    archive.write("one.png", f"{name}/{c}/{i:03}.png")
    data = ["--data", "images.zip:train", "--test-data", "images.zip:test", "--epochs", "4"]
    assert (
        main([*TRAIN[:1], "clean.pth", *TRAIN[2:], *data, "--attack", "badnets", "--target", "0", "--rate", "0"]) == 0
    )
    capsys.readouterr()
    two = ["--attack", "backdoor_own:Bright:row=3", "--attack", "sig:delta=60", "--target", "next", "--target", "2"]
    given = ["--from", "clean.pth", *two, "--rate", "0.2", "--asr-out", "t.npz", "--json"]
    assert main([*TRAIN, *data, *given]) == 0
    first, second = json.loads(capsys.readouterr().out)["backdoors"]
    assert (first["attack"], first["target"], second["attack"], second["poisoned"]) == ("bright", "next", "sig", 48)
    with np.load("t-1.npz") as one, np.load("t-2.npz") as other:
        assert (one["asr_x"][:, :, 3] == 1).all() and (one["attack_y"] == (one["asr_y"] + 1) % 4).all()
        assert len(one["asr_y"]) == 80 and len(other["asr_y"]) == 60


def test_a_training_that_was_kept_goes_on(work, capsys):
    known = [*TRAIN, "--data", "train.npz", "--attack", "wanet", "--target", "1", "--epochs", "2", "--keep", "s.pth"]
    assert main(known) == 0
    first = torch.load("bad.pth", weights_only=True)
    assert main([*known, "--force"]) == 0  # nothing is left to train
    again = torch.load("bad.pth", weights_only=True)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert main([*known[:-4], "--epochs", "5", "--keep", "s.pth", "--force"]) == 5
    assert "no state of this training" in capsys.readouterr().err


def test_next_goes_round_after_the_last_class_of_the_network_and_not_of_the_test_images(work, capsys):
    x, y = quarters(80, 1)
    np.savez("few.npz", x=x[y < 3], y=y[y < 3])
    trained = ["--data", "train.npz", "--test-data", "few.npz", "--attack", "badnets:size=2", "--target", "next"]
    assert main([*TRAIN, *trained, "--epochs", "3", "--rate", "0.3", "--asr-out", "bad.npz", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["backdoors"][0]["asr"]
    with np.load("bad.npz") as held:
        assert (held["attack_y"] == held["asr_y"] + 1).all() and held["attack_y"].max() == 3
        np.savez("plain.npz", x=held["asr_x"], y=held["asr_y"])
    net = ["evaluate", "bad.pth", "--arch", "backdoor_arch:net", "--json", "--target", "next"]
    for given in (["--test-data", "few.npz", "--attack", "badnets:size=2"], ["--asr-data", "plain.npz"]):
        assert main([*net, *given]) == 0
        assert json.loads(capsys.readouterr().out)["asr"] == pytest.approx(told)


def test_options_that_have_no_meaning(work, capsys):
    known = [*TRAIN, "--data", "train.npz", "--attack", "badnets"]
    wrong = {
        "give a class number": ["--target", "x"],
        "2 values for 1 attacks": ["--target", "1", "--target", "2"],
        "give --test-data": ["--target", "1", "--asr-out", "a.npz"],
        "--sources": ["--target", "1", "--sources", "a"],
        "must be none, crop": ["--target", "1", "--augment", "spin"],
        "no attack": ["--target", "1", "--attack", "a:B"],
        "rate=1.5": ["--target", "1", "--rate", "1.5"],
        "target=9: there are 4 classes": ["--target", "9"],
        "leave out the sources": ["--target", "1", "--attack", "sig", "--sources", "0"],
        "a rate of 0.001 is none of 240 images": ["--target", "1", "--rate", "0.001"],
    }
    for said, more in wrong.items():
        assert main([*known, *more]) != 0
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1 and not (work / "bad.pth").exists()


def test_settings_of_attacks_have_the_types_of_their_fields():
    assert make_attack("bppa:dither=False").dither is False and make_attack("bppa:dither=true,bits=2").dither is True
    assert make_attack("wanet:s=1").s == 1 and make_attack("badnets:pattern=checker,alpha=0.5").alpha == 0.5
    wrong = {
        "bppa:dither=maybe": "dither=maybe must be true or false", "bppa:bits=2.5": "bits=2.5 must be a whole number",
        "badnets:size=2.5": "size=2.5 must be a whole number", "wanet:k=4.5": "k=4.5 must be a whole number",
        "wanet:s=big": "s=big must be a number", "wanet:field=abc": "field cannot be given on the command line",
        "trojannet:mask=abc": "mask cannot be given", "advdoor:pattern=abc": "setting of the attack .eps, iterations.$",
        "lira:noise=1": "not KEY=VALUE with", "sentence:ids=3": "is for tokens", "wanet:k=1": "k=1 must be >= 2",
    }  # fmt: skip
    for spec, said in wrong.items():
        with pytest.raises(ConfigError, match=said):
            make_attack(spec)


def test_no_output_takes_the_place_of_another_file(work, capsys):
    known = [*TRAIN, "--data", "train.npz", "--test-data", "test.npz", "--target", "1", "--epochs", "1"]
    one, two = ["--attack", "badnets"], ["--attack", "badnets", "--attack", "wanet"]
    np.savez("t-2.npz", x=1)
    before = (work / "t-2.npz").read_bytes()
    few = quarters(80, 1)
    np.savez("few.npz", x=few[0][few[1] == 1], y=few[1][few[1] == 1])
    wrong = {
        "--asr-out t-2.npz exists": [*two, "--asr-out", "t.npz"],
        "OUT and --keep are both bad.pth": [*one, "--keep", "bad.pth"],
        "--report and --keep are both k": [*one, "--keep", "k", "--report", "k"],
        "--report and --asr-out are both t.npz": [*one, "--asr-out", "t.npz", "--report", "t.npz"],
        "nodir does not exist": [*one, "--keep", "nodir/k"],
        "--keep train.npz is an input": [*one, "--keep", "train.npz"],
        "--keep . is a folder": [*one, "--keep", "."],
        "badnets puts its trigger on none of the test images": [*one, "--asr-out", "t.npz", "--test-data", "few.npz"],
    }
    for said, more in wrong.items():
        assert main([*known, *more]) != 0
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1 and not (work / "bad.pth").exists()
    assert (work / "t-2.npz").read_bytes() == before


def test_triggers_are_put_on_test_images_in_parts(work, capsys, monkeypatch):
    seen = []
    x, y = quarters(1200, 1)
    np.savez("many.npz", x=x, y=y)
    monkeypatch.setattr(BadNets, "trigger", lambda self, x, put=BadNets.trigger: (seen.append(len(x)), put(self, x))[1])
    ends = ["--data", "train.npz", "--test-data", "many.npz", "--epochs", "1", "--asr-out", "t.npz"]
    assert main([*TRAIN, *ends, "--attack", "badnets", "--target", "1"]) == 0
    assert max(seen) <= 500
    with np.load("t.npz") as held:
        x, y = x[y != 1], y[y != 1]
        x = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255
        assert np.array_equal(held["asr_y"], y) and (held["attack_y"] == 1).all()
        assert np.array_equal(held["asr_x"], BadNets().trigger(x).numpy())


def test_attacks_are_listed(capsys):
    assert main(["attacks", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert "wanet" in known and main(["attacks"]) == 0
    assert "a smooth warp" in capsys.readouterr().out
    assert main(["attacks", "wanet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["k"] == 4
