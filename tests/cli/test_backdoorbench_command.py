"""`fastfip purify attack_result.pt` just works: the network, its images, its poisoned pictures, what is written."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch

from fastfip import backdoorbench
from fastfip.cli import main
from fastfip.testing import nets
from tests.support.backdoorbench_files import CLASSES, TARGET, attack_result, some_pictures
from tests.support.command_line import fails

RUN = ["--data", "clean.npz", "--test-data", "clean.npz", "--method", "fine_tune", "--steps", "2", "--quiet"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run of BackdoorBench in ./badnet_0_1, clean images in ./clean.npz."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    attack_result(tmp_path / "badnet_0_1", nets.ResNet20(CLASSES).state_dict(), True, model_name="resnet20")
    x, y = some_pictures(seed=1)
    np.savez("clean.npz", x=x, y=y)
    return tmp_path / "badnet_0_1"


@pytest.mark.parametrize("given", ["badnet_0_1/attack_result.pt", "badnet_0_1"])
def test_a_result_is_purified_in_one_command(folder, capsys, given):
    command = ["purify", given, *RUN, "--ignore-fit", "--report", "r.json", "--leaderboard", "board.csv"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "ASR" in out and "RA" in out
    written = torch.load(folder / "defense_result.pt", weights_only=True)
    assert list(written) == ["model_name", "num_classes", "model"]
    before = backdoorbench.read(folder).build().state_dict()
    assert list(written["model"]) == list(before)
    assert not torch.equal(written["model"]["conv1.weight"], before["conv1.weight"])
    report = json.loads((folder.parent / "r.json").read_text())
    assert report["before"]["n_triggered"] == 18 and report["before"]["ra"] is not None
    images = report["settings"]["images"]
    assert (images["mean"], images["std"]) == ([0.4914, 0.4822, 0.4465], [0.247, 0.243, 0.261])
    assert (images["size"], images["channels"]) == ([16, 16], 3)
    with open("board.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["defense_name"] for row in rows] == ["no defense", "fine_tune"]
    assert float(rows[0]["test_asr"]) == report["before"]["asr"] and rows[0]["ratio"] == "0.1"
    assert "badnet_0_1/defense_result.pt exists: --force" in fails(capsys, 2, *command).replace(str(folder.parent), "")


def test_figures_are_those_of_the_library(folder, capsys):
    assert main(["evaluate", "badnet_0_1", "--test-data", "clean.npz", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    result = backdoorbench.read(folder)
    model = result.build()
    hits, right = 0, 0
    for x, attack, true in result.asr_loader(7):
        answers = model(x).argmax(1)
        hits, right = hits + int((answers == attack).sum()), right + int((answers == true).sum())
    assert printed["asr"] == pytest.approx(hits / 18) and printed["ra"] == pytest.approx(right / 18)
    assert main(["evaluate", "badnet_0_1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["asr"] == printed["asr"]


def test_what_options_say_goes_before_what_the_file_says(folder, capsys):
    options = ["--mean", "0.5", "--std", "0.25", "--size", "8", "--channels", "3"]
    np.savez("triggered.npz", x=some_pictures(8)[0], y=np.arange(8) % CLASSES)
    triggered = ["--asr-data", "triggered.npz", "--target", str(TARGET)]
    assert main(["evaluate", "badnet_0_1", "--test-data", "clean.npz", *options, *triggered, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["n_triggered"] == 6
    assert (printed["images"]["mean"], printed["images"]["size"]) == ([0.5], [8, 8])


@pytest.mark.parametrize("command", ["compare", "audit", "sharpness"])
def test_other_commands_need_no_arch_either(folder, capsys, command):
    more = {
        "compare": ["--methods", "fine_tune", "--set", "fine_tune.steps=2", "--ignore-fit"],
        "audit": ["--steps", "2", "--no-sharpness", "--classes", "1"],
        "sharpness": ["--limit", "1"],
    }[command]
    assert main([command, "badnet_0_1", "--data", "clean.npz", "--quiet", "--json", *more]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.get("images", printed.get("settings", {}).get("images"))["size"] == [16, 16]
    if command == "compare":
        assert all(row["test_asr"] is not None for row in printed["rows"])


def test_a_defense_result_is_an_input_too(folder, capsys):
    assert main(["purify", "badnet_0_1", *RUN, "--ignore-fit"]) == 0
    capsys.readouterr()
    command = ["evaluate", "badnet_0_1/defense_result.pt", "--test-data", "clean.npz", "--mean", "0.5"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["acc"] is not None


def test_pictures_that_are_not_there_are_a_note(folder, capsys):
    shutil.rmtree(folder / "bd_test_dataset")
    assert main(["evaluate", "badnet_0_1", "--test-data", "clean.npz"]) == 0
    out = capsys.readouterr().out
    assert "note: ASR not measured: the folder bd_test_dataset, which has the triggered images, is not beside" in out
    assert "nothing to measure" in fails(capsys, 2, "evaluate", "badnet_0_1")
    assert main(["purify", "badnet_0_1", "out.pt", *RUN, "--ignore-fit"]) == 0
    assert "ASR not measured: the folder bd_test_dataset" in capsys.readouterr().out


def test_known_weights_of_other_files_need_no_arch(folder, capsys):
    torch.save({"state_dict": {f"module.{k}": v for k, v in nets.ResNet20(CLASSES).state_dict().items()}}, "m.th")
    assert main(["evaluate", "m.th", "--test-data", "clean.npz", "--json"]) == 0
    capsys.readouterr()
    torch.save({"a.weight": torch.ones(3, 4)}, "n.pth")
    err = fails(capsys, 2, "evaluate", "n.pth", "--test-data", "clean.npz")
    assert "--arch is missing, and n.pth is of no architecture that is known" in err
    err = fails(capsys, 2, "evaluate", "m.th", "--test-data", "clean.npz", "--arch-args", "{}")
    assert "--arch-args needs --arch" in err


def test_inspect_says_what_to_type_next(folder, capsys):
    assert main(["inspect", "badnet_0_1/attack_result.pt"]) == 0
    out = capsys.readouterr().out
    assert "fastfip purify badnet_0_1/attack_result.pt --data DIR" in out and "--arch" not in out
    attack_result(folder.parent / "s", {"w": torch.ones(2, 2)}, model_name="senet18")
    assert main(["inspect", "s/attack_result.pt"]) == 0
    assert "--arch MODULE:FACTORY" in capsys.readouterr().out


def test_mistakes_are_said_before_the_work(folder, capsys):
    torch.save(nets.ResNet20(CLASSES).state_dict(), "m.pth")
    assert "OUT is missing: give the file to write" in fails(capsys, 2, "purify", "m.pth", *RUN)
    err = fails(capsys, 2, "purify", "m.pth", "o.pth", *RUN, "--leaderboard", "b.csv")
    assert "--leaderboard works only on results of BackdoorBench" in err
    (folder.parent / "b.csv").write_text("a,b\n")
    err = fails(capsys, 4, "purify", "badnet_0_1", *RUN, "--leaderboard", "b.csv")
    assert "is no table of the leaderboard" in err and not (folder / "defense_result.pt").exists()
    assert "must end in .csv" in fails(capsys, 2, "purify", "badnet_0_1", *RUN, "--leaderboard", "b.txt")
    err = fails(capsys, 2, "purify", "badnet_0_1", *RUN, "--leaderboard", "clean.csv", "--epochs", "3")
    assert "give only one of them" in err
    attack_result(folder.parent / "s", {"w": torch.ones(2, 2)}, model_name="senet18")
    assert "is of 'senet18': name the code that builds it with arch (--arch)" in fails(capsys, 4, "purify", "s", *RUN)
    attack_result(folder.parent / "d", nets.ResNet20(4).state_dict(), model_name="resnet20", dataset="svhn")
    assert "'svhn' is no data set of BackdoorBench" in fails(capsys, 5, "purify", "d", *RUN)


def test_a_picture_that_leaves_its_folder_ends_the_command(folder, capsys):
    secret = folder.parent / "secret.png"
    (folder / "bd_test_dataset" / "0" / "0.png").rename(secret)
    (folder / "bd_test_dataset" / "0" / "0.png").symlink_to(secret)
    assert "is a link, which BackdoorBench never writes" in fails(capsys, 4, "purify", "badnet_0_1", *RUN)
    assert not (folder / "defense_result.pt").exists()
