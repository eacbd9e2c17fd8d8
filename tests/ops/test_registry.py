"""The name of an op is its address: what has a table of backends is where its name says, and in OPS."""

import ast
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def tables():
    """Names of ops as the sources write them, by the folder that they stand in."""
    found = {}
    for path in sorted((ROOT / "fastfip" / "ops").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Op":
                found[ast.literal_eval(node.args[0])] = path.parent.name
    return found


def test_every_table_is_in_ops_by_importing_the_folder():
    code = "import json; from fastfip.ops import OPS; print(json.dumps(list(OPS)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    missing = set(tables()) - set(json.loads(done.stdout))
    assert tables() and not missing, f"import {sorted(missing)} in fastfip/ops/__init__.py"


def test_every_op_has_its_folder_and_its_tests():
    for name, folder in tables().items():
        assert name.startswith(folder), f"{name} stands in {folder}"
        assert (ROOT / "tests" / "ops" / f"test_{folder}.py").exists(), f"{name} has no tests/ops/test_{folder}.py"
