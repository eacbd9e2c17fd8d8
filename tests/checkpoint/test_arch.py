"""Architectures from module:factory."""

import importlib.util
import sys
import types

import pytest
import torch

from fastfip.checkpoint import load_arch
from fastfip.errors import ConfigError, ModelError

ARCH = """
from torch import nn
class Net(nn.Linear):
    @classmethod
    def small(cls):
        return cls(2, 2)
def make(classes=3): return nn.Linear(4, classes)
def number(): return 3
def broken(): raise RuntimeError("no weights")
net = nn.Linear(1, 1)
text = "x"
"""


@pytest.fixture
def arch(tmp_path, monkeypatch):
    (tmp_path / "my_archs.py").write_text(ARCH)
    (tmp_path / "my_bad_arch.py").write_text("import nowhere_at_all")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("my_archs", "my_bad_arch"):
        sys.modules.pop(name, None)


def test_load_arch(arch):
    assert load_arch("my_archs:make").out_features == 3
    assert load_arch("my_archs:make", {"classes": 7}).out_features == 7
    assert load_arch("my_archs:Net.small").in_features == 2
    assert load_arch("torch.nn:Linear", {"in_features": 1, "out_features": 2}).out_features == 2


@pytest.mark.parametrize(
    ("spec", "error", "match"),
    [
        ("my_archs", ConfigError, "module:factory"),
        (":make", ConfigError, "module:factory"),
        ("my_archs:", ConfigError, "module:factory"),
        ("my_archs:a b", ConfigError, "module:factory"),
        ("sub/my_archs.py:make", ConfigError, "not a file: sub.my_archs:make"),
        ("my_nothing:make", ModelError, "cannot be imported: there is none here"),
        ("my_bad_arch:make", ModelError, "cannot be imported: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("my_archs:none", ModelError, "has no none"),
        ("my_archs:text", ModelError, "is a str, not a function"),
        ("my_archs:number", ModelError, "returned a int"),
        ("my_archs:broken", ModelError, "failed: RuntimeError: no weights"),
        ("my_archs:Net", ConfigError, "does not take {}"),
    ],
)
def test_load_arch_refuses(arch, spec, error, match):
    with pytest.raises(error, match=match):
        load_arch(spec)


def test_load_arch_refuses_arguments(arch):
    with pytest.raises(ConfigError, match=r"does not take {'klasses': 3}"):
        load_arch("my_archs:make", {"klasses": 3})


def test_what_to_install_is_said_where_a_library_is_missing(arch, monkeypatch, tmp_path):
    for name in ("torchvision", "timm", "transformers"):
        for known in [known for known in sys.modules if known.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, known)
    find = importlib.util.find_spec
    monkeypatch.setattr(sys, "meta_path", [Blind(), *sys.meta_path])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in Blind.names else find(name))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "my_bad_arch.py").write_text("from timm.layers import Mlp")
    for spec, package in (
        ("torchvision.models:resnet18", "torchvision"),
        ("torchvision:resnet18", "torchvision"),
        ("timm:resnet18.a1_in1k", "timm"),
        (f"hf:{tmp_path}", "transformers"),
        ("my_bad_arch:net", "timm"),
    ):
        with pytest.raises(ModelError, match=f"{package} is not installed: pip install {package}$"):
            load_arch(spec)


class Blind:
    """Finds none of three libraries, wherever they are."""

    names = ("torchvision", "timm", "transformers")

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture
def libraries(monkeypatch):
    """Stand-ins with the functions of timm and torchvision that are used."""

    class Timm(types.ModuleType):
        def is_model(self, name):
            return name.split(".")[0] in self.list_models()

        def list_models(self):
            return ["resnet18", "vit_tiny"]

        def create_model(self, model_name, num_classes=5):
            assert model_name in ("resnet18.a1_in1k", "resnet18")
            return torch.nn.Linear(2, num_classes)

    class Models(types.ModuleType):
        def list_models(self):
            return ["resnet18"]

        def get_model(self, name, weights=None):
            return torch.nn.Linear(3, 3)

        def resnet18(self, weights=None):
            return torch.nn.Linear(3, 4)

    vision = types.ModuleType("torchvision")
    vision.models = Models("torchvision.models")
    for module in (Timm("timm"), vision, vision.models):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_models_of_libraries_by_their_name(libraries):
    assert load_arch("timm:resnet18.a1_in1k").out_features == 5
    assert load_arch("timm:resnet18", {"num_classes": 7}).out_features == 7
    assert load_arch("timm:create_model", {"model_name": "resnet18"}).out_features == 5  # module:factory, as ever
    assert load_arch("torchvision:resnet18").out_features == 3
    assert load_arch("torchvision.models:resnet18").out_features == 4
    with pytest.raises(ModelError, match=r"timm has no model 'resnet8': did you mean 'resnet18'\?$"):
        load_arch("timm:resnet8")
    with pytest.raises(ModelError, match="torchvision has no model 'resnet_18'"):
        load_arch("torchvision:resnet_18")
    with pytest.raises(ConfigError, match="does not take"):
        load_arch("timm:resnet18", {"klasses": 3})


def test_a_folder_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (make zoo)")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=8, patch_size=4
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    net = load_arch(f"hf:{tmp_path / 'vit'}", {"num_labels": 4})
    assert net(torch.zeros(2, 3, 8, 8)).logits.shape == (2, 4)
    (tmp_path / "vit" / "config.json").write_text('{"model_type": "nothing", "auto_map": {"AutoConfig": "evil.C"}}')
    (tmp_path / "vit" / "evil.py").write_text("raise SystemExit('code was run')")
    with pytest.raises(ModelError, match="cannot be used"):
        load_arch(f"hf:{tmp_path / 'vit'}")


def test_a_real_model_of_timm():
    pytest.importorskip("timm", reason="timm is not installed (make zoo)")
    assert load_arch("timm:resnet10t", {"num_classes": 3}).num_classes == 3


def test_a_folder_for_transformers_needs_its_config(tmp_path):
    with pytest.raises(ModelError, match=r"give a folder with a config\.json"):
        load_arch(f"hf:{tmp_path}")
