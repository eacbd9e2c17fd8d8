"""What a type checker finds in a user's script: `py.typed` promises that the package's types are there."""

import ast
import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import fastfip
from fastfip.methods import get, names
from fastfip.methods.overrides import Overrides

ROOT = Path(__file__).resolve().parent.parent

RIGHT = """
import torch
import fastfip
from fastfip import PurifyResult, evaluate

def clean(model: torch.nn.Module, loader: torch.utils.data.DataLoader) -> PurifyResult:
    result = fastfip.purify(model, loader, "fast_wfip", steps=100, lr=0.02, kl=0.5, seed=1, progress=False)
    fastfip.purify_(model, loader, "fip", epochs=2, eta_f=1.0)
    fastfip.save_checkpoint(result.model, "clean.safetensors")
    print(evaluate(result.model, loader).acc, fastfip.methods.names(), fastfip.fisher_trace(model, loader))
    return result
"""
WRONG = {
    "fastfip.purifyy(model, loader)": 'has no attribute "purifyy"',
    "fastfip.purify(model, loader, step=100)": 'Unexpected keyword argument "step"',
    "fastfip.purify(model, loader, learning_rate=0.1)": 'Unexpected keyword argument "learning_rate"',
    "fastfip.purify_(model, loader, epoch=1)": 'Unexpected keyword argument "epoch"',
    'fastfip.purify(model, loader, lr="small")': 'Argument "lr" to "purify" has incompatible type "str"',
    "fastfip.evaluate(model, loader, triggered=loader)": 'Unexpected keyword argument "triggered"',
    "fastfip.fishers": 'has no attribute "fishers"',
}


def mypy(tmp_path, **scripts):
    """What mypy says of scripts that a user wrote beside an installed package.

    The package's own settings forbid implicit exports, and what `make lint` has found out of torch is in the cache.
    """
    pytest.importorskip("mypy")
    for name, script in scripts.items():
        (tmp_path / f"{name}.py").write_text(script)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        ROOT / "pyproject.toml",
        "--cache-dir",
        ROOT / ".mypy_cache",
    ]
    command += [f"{name}.py" for name in scripts]
    environment = {"MYPYPATH": str(ROOT), "PATH": ""}
    return subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True).stdout


@pytest.mark.slow
def test_mypy_passes_what_is_right_and_finds_what_is_wrong_in_a_users_script(tmp_path):
    head = "import torch\nimport fastfip\n"
    head += "def use(model: torch.nn.Module, loader: torch.utils.data.DataLoader) -> None:\n"
    said = mypy(tmp_path, right=RIGHT, wrong=head + "".join(f"    {line}\n" for line in WRONG)).splitlines()
    assert not [text for text in said if not text.startswith(("wrong.py:", "Found "))], said
    for number, (line, error) in enumerate(WRONG.items(), 4):
        assert any(f"wrong.py:{number}:" in text and error in text for text in said), (line, said)


def test_a_type_checker_sees_every_public_name_where_it_is():
    tree = ast.parse((ROOT / "fastfip" / "__init__.py").read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    seen = {a.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert seen == {**dict.fromkeys(fastfip._MODULES, "fastfip"), **fastfip._WHERE, **fastfip._EXTRAS}


def test_the_settings_that_a_type_checker_knows_are_those_of_the_methods():
    own = {}
    for name in names():
        config = get(name).Config
        if config.__module__.startswith("fastfip."):
            for field in dataclasses.fields(config):
                own.setdefault(field.name, set()).update(parts(field.type))
    for name in ("steps", "epochs"):
        assert name in inspect.signature(fastfip.purify).parameters and own.pop(name)
    assert {name: parts(kind.__forward_arg__) for name, kind in Overrides.__annotations__.items()} == own


def parts(annotation):
    """The members of a union, from its text."""
    node, out = ast.parse(annotation, mode="eval").body, set()
    while isinstance(node, ast.BinOp):
        out.add(ast.unparse(node.right))
        node = node.left
    return out | {ast.unparse(node)}
