"""The package as a user meets it: what importing it costs, what it says about itself."""

import functools
import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastfip
from fastfip import env
from fastfip.errors import BackendError
from fastfip.ops.backends import native

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, **variables: str) -> str:
    """What a fresh interpreter prints; asserts that it ends well."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def first_use() -> dict[str, Any]:
    """What a fresh interpreter has loaded after the import, after all names, and whether CUDA was started meanwhile."""
    code = """
import sys, json, torch
before = set(sys.modules)
import fastfip
said = {"import": [sorted(set(sys.modules) - before), torch.cuda.is_initialized()]}
for name in fastfip.__all__:
    if ".cli." not in fastfip._WHERE.get(name, ""):
        getattr(fastfip, name)
said["names"] = [sorted(set(sys.modules) - before), torch.cuda.is_initialized()]
from fastfip import env
env.collect()
said["report"] = torch.cuda.is_initialized()
print(json.dumps(said))
"""
    return dict(json.loads(python(code)))


def test_import_adds_nothing_to_torch_and_leaves_cuda_alone():
    # one small file: far under the promised 100 ms
    assert first_use()["import"] == [["fastfip"], False]


def test_using_the_library_loads_no_tool_of_the_command_line():
    heavy = {"triton", "matplotlib", "rich", "typer", "sklearn", "scipy", "pandas", "transformers", "PIL"}
    loaded, cuda = first_use()["names"]
    assert not heavy & set(loaded) and "fastfip.purification.purify" in loaded
    assert cuda is False


def test_every_public_name_resolves_and_is_not_hidden_by_its_module():
    for name, where in fastfip._WHERE.items():
        value = getattr(importlib.import_module(where), name)
        assert callable(value), f"fastfip.{name} is {value!r}"
        assert getattr(fastfip, name) is value
    assert set(fastfip.__all__) <= set(dir(fastfip))
    with pytest.raises(AttributeError, match="no attribute 'purfy'"):
        _ = fastfip.purfy


def test_native_is_there_or_says_why():
    if native.available():
        assert native.reason() == ""
        assert native.isa() in ("portable", "avx2", "avx512", "avx512_bf16")
    else:
        assert native.reason()
        with pytest.raises(BackendError, match="native kernels: "):
            native.module()


def test_native_can_be_switched_off_and_says_so():
    code = "from fastfip.ops.backends import native; print(native.available(), native.reason())"
    assert python(code, FASTFIP_NATIVE="0").strip() == "False switched off by FASTFIP_NATIVE=0"


def test_a_native_module_that_does_not_load_is_a_reason_not_an_error(tmp_path):
    """As after an upgrade of Python or on a CPU of another kind: the file is there but cannot be loaded."""
    code = (
        "import sys; from importlib.machinery import EXTENSION_SUFFIXES as s, PathFinder; import fastfip, pathlib; "
        f"d = pathlib.Path({str(tmp_path)!r}); (d / ('_native' + s[0])).write_bytes(b'not a library'); "
        "fastfip.__path__ = [str(d), *fastfip.__path__]; from fastfip.ops.backends import native; "
        "print(native.available(), native.reason())"
    )
    assert python(code).startswith("False does not load: ")


def test_environment_report():
    values = env.collect()
    assert values["torch"] == torch.__version__
    assert values["fastfip"] == fastfip.__version__
    for backend in ("native", "triton", "cuda"):
        assert values[backend].startswith(("yes (", "no: ")), values[backend]
    assert values["native"].startswith("yes") == native.available()
    text = env.text(values)
    assert all(name in text for name in values)
    assert first_use()["report"] is False


def test_the_citation_names_this_version_and_addresses_stand_in_one_place_each():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == fastfip.__version__ and {"cff-version", "message", "title", "authors"} <= set(
        citation
    )
    named = {
        str(path.relative_to(ROOT))
        for pattern in ("*.md", "*.cff", "*.toml", "docs/**/*.md", "fastfip/**/*.py")
        for path in ROOT.glob(pattern)
        if "fastfip.example" in path.read_text()
    }
    assert named == {"SECURITY.md", "pyproject.toml"}  # one has the address for reports, one the others


def test_make_real_names_where_its_data_is_expected():
    for name in ("README.md", "docs/results.md", "Makefile"):
        assert "FASTFIP_DATA" in (ROOT / name).read_text(), name


def test_version_and_typing_marker_are_packaged():
    assert (ROOT / "fastfip" / "py.typed").exists()
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{fastfip.__version__}"' in pyproject
    build = pyproject.split("[project]")[0]
    assert '"torch' not in build  # building must never need torch


@pytest.mark.parametrize(
    "version, why",
    [
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n", "no CUDA build"),
        ("__version__ = '2.13.0'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", ""),
        (None, "no torch"),
    ],
)
def test_cuda_kernels_are_compiled_only_beside_a_torch_that_has_cuda(version, why, tmp_path, monkeypatch):
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    setup = runpy.run_path(str(ROOT / "setup.py"))
    if version is not None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "version.py").write_text(version)
    said = setup["no_cuda_torch"]([str(tmp_path)])
    assert why in said and bool(why) == bool(said)
    assert bool(setup["no_cuda_torch"]()) == (torch.version.cuda is None)
    assert not re.search(r"^\s*(import|from) torch", (ROOT / "setup.py").read_text(), re.MULTILINE)
