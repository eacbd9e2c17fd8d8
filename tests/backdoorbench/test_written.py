"""What BackdoorBench reads of us: defense_result.pt, bit by bit, and rows of its leaderboard's table."""

import csv
import math

import pytest
import torch

from fastfip import backdoorbench, load_checkpoint
from fastfip.errors import CheckpointError
from fastfip.metrics.evaluation import Evaluation
from fastfip.testing import nets
from tests.support.backdoorbench_files import CLASSES, attack_result
from tests.support.checkpoint_files import same, save


@pytest.fixture
def result(tmp_path):
    torch.manual_seed(0)
    net = nets.ResNet20(CLASSES)
    return backdoorbench.read(attack_result(tmp_path / "badnet_0_1", net.state_dict(), model_name="resnet20"))


def purified(result):
    """The network with other weights."""
    net = result.build()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))
    return net


@pytest.mark.parametrize("given", ["folder", "file"])
def test_a_defense_result_goes_round_bit_by_bit(tmp_path, result, given):
    net = purified(result)
    folder = result.path.parent
    path = backdoorbench.write_defense_result(net, folder if given == "folder" else folder / "d.pt", result)
    assert path == folder / ("defense_result.pt" if given == "folder" else "d.pt")
    theirs = torch.load(path, weights_only=True)
    assert list(theirs) == ["model_name", "num_classes", "model"]
    assert (theirs["model_name"], theirs["num_classes"]) == ("resnet20", CLASSES)
    assert same(theirs["model"], net.state_dict())
    assert same(torch.load(path, weights_only=False)["model"], net.state_dict())
    ours = backdoorbench.read(path)
    assert (ours.model_name, ours.num_classes, ours.clean_data, ours.poisoned()) == ("resnet20", CLASSES, None, None)
    assert same(ours.build().state_dict(), net.state_dict()) and same(load_checkpoint(path), net.state_dict())


@pytest.mark.parametrize("spelling", ["now", "0.12"])
def test_names_of_the_weights_are_those_that_came(tmp_path, spelling):
    net = torch.nn.Sequential(nets.Resize(8), nets.VisionTransformer(CLASSES, 8, 4, 8, 1, 2))
    state = net.state_dict()
    if spelling == "0.12":
        state = {k.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): v for k, v in state.items()}
    path = attack_result(tmp_path, {f"module.{name}": v.half() for name, v in state.items()}, model_name="my_vit")
    backdoorbench.write_defense_result(net.state_dict(), tmp_path, load_checkpoint(path, net, key="model"))
    written = torch.load(tmp_path / "defense_result.pt", weights_only=True)["model"]
    assert same(written, {f"module.{name}": v.half() for name, v in state.items()})


def test_what_does_not_fit_is_not_written(tmp_path, result):
    with pytest.raises(CheckpointError, match="the weights to save lack bn1.weight"):
        backdoorbench.write_defense_result(torch.nn.Linear(2, 2), tmp_path, result)
    other = load_checkpoint(save({"net": {"w": torch.ones(1)}}, tmp_path / "m.pth"))
    with pytest.raises(CheckpointError, match=r"m\.pth: is no result of BackdoorBench"):
        backdoorbench.write_defense_result({"w": torch.ones(1)}, tmp_path / "d.pt", other)
    assert not (tmp_path / "d.pt").exists() and not (tmp_path / "defense_result.pt").exists()


BEFORE, AFTER = Evaluation(acc=0.9132, asr=0.9503, ra=0.0467), Evaluation(acc=0.8996, asr=0.0148)


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_rows_have_the_columns_and_shares_of_the_leaderboard(tmp_path, result):
    rows = backdoorbench.leaderboard_rows(result, BEFORE, AFTER, "fast_wfip")
    path = backdoorbench.write_leaderboard(tmp_path / "results.csv", rows)
    assert path.read_text().splitlines() == [
        ",dataset,backbone,attack_name,defense_name,ratio,test_acc,test_asr,test_ra",
        "0,cifar10,resnet20,badnet,no defense,0.1,0.9132,0.9503,0.0467",
        "1,cifar10,resnet20,badnet,fast_wfip,0.1,0.8996,0.0148,",
    ]


def test_rows_are_added_and_take_the_place_of_older_ones_of_the_same_run(tmp_path, result):
    path = tmp_path / "results.csv"
    path.write_text(
        ",dataset,backbone,attack_name,defense_name,ratio,test_acc,test_asr,test_ra\n"
        "0,gtsrb,preactresnet18,badnet,ft,0.001,0.985114812850952,0.0049323788844048,0.9816229343414308\n"
        "1,cifar10,resnet20,badnet,no defense,0.10,0.5,0.5,0.5\n"
    )
    backdoorbench.write_leaderboard(path, backdoorbench.leaderboard_rows(result, BEFORE, AFTER, "ft"))
    rows = table(path)
    assert [row[""] for row in rows] == ["0", "1", "2"]
    assert [row["defense_name"] for row in rows] == ["ft", "no defense", "ft"]
    assert rows[0]["test_acc"] == "0.985114812850952" and rows[1]["test_acc"] == "0.9132"


@pytest.mark.parametrize(
    ("folder", "name", "ratio"),
    [
        ("badnet_0_1", "badnet", 0.1),
        ("cifar10_preactresnet18_inputaware_0_05", "inputaware", 0.05),
        ("tiny_vgg19_bn_ssba_0_001", "ssba", 0.001),
        ("my run", "", ""),
    ],
)
def test_attack_and_ratio_are_told_by_the_name_of_the_folder(tmp_path, folder, name, ratio):
    path = attack_result(tmp_path / folder, {"fc.weight": torch.ones(4, 2)})
    read = backdoorbench.read(path)
    row = backdoorbench.leaderboard_rows(read, BEFORE, AFTER, "ft")[1]
    assert (row["attack_name"], row["ratio"]) == (name, ratio)
    row = backdoorbench.leaderboard_rows(read, BEFORE, AFTER, "ft", attack_name="lf", ratio=0.2)[0]
    assert (row["attack_name"], row["ratio"]) == ("lf", 0.2) and math.isclose(row["test_ra"], 0.0467)


def test_another_table_is_left_as_it_is(tmp_path, result):
    path = tmp_path / "r.csv"
    for text in ("a,b\n1,2\n", "", "\0\1"):
        path.write_text(text)
        with pytest.raises(
            CheckpointError, match=r"r\.csv: (is no table|cannot be read as a table) of the leaderboard"
        ):
            backdoorbench.write_leaderboard(path, backdoorbench.leaderboard_rows(result, BEFORE, AFTER, "ft"))
        assert path.read_text() == text
    with pytest.raises(CheckpointError, match="cannot be written"):
        backdoorbench.write_leaderboard(tmp_path / "none" / "r.csv", [])
