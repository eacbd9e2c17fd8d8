"""Architectures from module:factory."""

import sys

import pytest

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
