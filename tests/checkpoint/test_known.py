"""Architectures are known by their names in BackdoorBench, or by the names and shapes of their weights."""

import importlib.util

import pytest
import torch

from fastfip.checkpoint import load_arch
from fastfip.checkpoint.known import KNOWN, OTHERS, known_arch
from fastfip.errors import CheckpointError, ModelError
from fastfip.testing import nets


def shapes(spec, arguments, prefix=""):
    with torch.device("meta"):
        return {prefix + k: tuple(v.shape) for k, v in load_arch(spec, arguments).state_dict().items()}


@pytest.mark.parametrize("name", KNOWN)
def test_weights_of_each_are_known_by_their_names_and_shapes(name):
    wanted = KNOWN[name].of(43)
    weights = shapes(*wanted, prefix="module.")
    assert known_arch(weights) == wanted == known_arch(weights, name, 43)


def test_both_spellings_of_a_vision_transformer_are_known():
    weights = shapes(*KNOWN["vit_b_16"].of(10))
    old = {k.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): v for k, v in weights.items()}
    assert old != weights and known_arch(old) == known_arch(old, "vit_b_16", 10) == KNOWN["vit_b_16"].of(10)


@pytest.mark.parametrize(
    ("name", "classes", "match"),
    [
        ("preactresnet18", 10, r"is a preactresnet18 of 10 classes, but it does not fit the model; "),
        ("resnet20", 10**5, r"resnet20 of 100000 classes, but it does not fit the model: linear.weight is \[10, 64\]"),
        ("resnet20", 10**12, "cannot be told what it is of: 1000000000000 classes"),
        ("resnet20", 0, "cannot be told what it is of: 0 classes"),
        ("resnet20", -3, "cannot be told what it is of: -3 classes"),
    ],
)
def test_a_name_that_the_weights_belie_is_refused_and_nothing_is_allocated(name, classes, match):
    with pytest.raises(CheckpointError, match=match):
        known_arch(shapes("fastfip.testing.nets:ResNet20", {}), name, classes)


def test_weights_of_nobody_are_named_with_all_that_are_known():
    with pytest.raises(
        CheckpointError, match="no architecture that is known by its names: name the code that builds it with arch"
    ):
        known_arch({"a.weight": (3, 4)})
    with pytest.raises(CheckpointError, match="0 classes"):
        known_arch({})


@pytest.mark.parametrize("name", OTHERS)
def test_networks_of_torchvision_are_its_own(name):
    if importlib.util.find_spec("torchvision") is None:
        with pytest.raises(ModelError, match=f"is a {name}: pip install torchvision, or name the code"):
            known_arch({"fc.weight": (10, 5)}, name, 10)
    else:
        weights = shapes(f"torchvision:{name}", {"num_classes": 10})
        assert known_arch(weights, name, 10) == (f"torchvision:{name}", {"num_classes": 10})


def test_no_torchvision_of_the_working_folder_is_run(tmp_path, monkeypatch):
    if importlib.util.find_spec("torchvision") is not None:
        pytest.skip("torchvision is installed, and comes first")
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise SystemExit('planted code ran')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="pip install torchvision"):
        known_arch({"fc.weight": (10, 5)}, "resnet18", 10)


def test_a_net_that_is_nearly_a_known_one_is_none():
    weights = {k: tuple(v.shape) for k, v in nets.ResNet20().state_dict().items()}
    weights["conv1.weight"] = (16, 1, 3, 3)
    with pytest.raises(CheckpointError, match="no architecture that is known"):
        known_arch(weights)
