"""Imports run one way. Found by reading the sources, so an import inside a function counts as well."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastfip"

# A part may import itself and parts of a smaller number; parts of one number do not know each other.
LAYER = {
    "errors": 0,
    "registry": 1,
    "nets": 1,
    "reporting": 1,
    "data": 2,
    "ops": 2,
    "checkpoint": 3,
    "metrics": 3,
    "env": 3,
    "attacks": 4,
    "backdoorbench": 4,
    "fisher": 4,
    "worst_case": 4,
    "spectral": 5,
    "methods": 6,
    "purification": 7,
    "auditing": 8,
    "comparison": 8,
    "integrations": 8,
    "testing": 9,
    "cli": 9,
}
LEAVES = {
    "attacks": {"cli", "testing"},
    "testing": set(),
}


def part(module: str) -> str:
    pieces = module.split(".")
    name = pieces[1] if len(pieces) > 1 else ""
    return "cli" if name == "__main__" else name  # `python -m fastfip` is the command line


def module_name(path: Path) -> str:
    pieces = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(pieces[:-1] if pieces[-1] == "__init__" else pieces)


def imported(path: Path) -> set[str]:
    """Full names of what a file imports (`from fastfip import data` counts as fastfip.data)."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *(node.module.split(".") if node.module else [])])
            names |= {stem} | {f"{stem}.{alias.name}" for alias in node.names}
    return names


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path))
def test_imports_run_one_way(path):
    mine = part(module_name(path))
    assert mine in LAYER, f"{mine} has no layer: add it to LAYER in this file"
    for name in imported(path):
        other = part(name)
        if not name.startswith("fastfip.") or other == mine or other not in LAYER:
            continue
        allowed = LAYER[other] < LAYER[mine]
        assert allowed, f"{module_name(path)} imports {name}: {other} is not below {mine}"
        if other in LEAVES:
            assert mine in LEAVES[other], f"{module_name(path)} imports {name}, which is a leaf"
        launcher = name.startswith("fastfip.ops.") and {"backends", "native", "triton", "cuda"} & set(name.split("."))
        assert not (mine == "methods" and launcher), f"{module_name(path)}: methods never import a backend of an op"


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").rglob("*.py")), ids=module_name)
def test_ops_know_no_modules(path):
    assert not {name for name in imported(path) if name.startswith("torch.nn") and "functional" not in name}


def test_nothing_of_the_package_imports_tests_or_benchmarks():
    for path in FILES:
        assert not {name for name in imported(path) if name.split(".")[0] in ("tests", "benchmarks")}, path


def test_tests_do_not_import_benchmarks():
    for path in sorted((ROOT / "tests").rglob("*.py")):
        assert not {name for name in imported(path) if name.split(".")[0] == "benchmarks"}, path


def test_the_reader_of_imports_sees_every_form(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "fastfip" / "ops" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import fastfip.cli\nfrom fastfip import purification\nfrom ..methods import base\n"
        "def f():\n    from .. import demo\n    import torch.nn as nn\n"
    )
    found = {part(name) for name in imported(file) if name.startswith("fastfip.")}
    assert found == {"cli", "purification", "methods", "demo"}
    assert "torch.nn" in imported(file)
