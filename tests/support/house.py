"""The rules of the house, measured: a table of rule, limit, what it is now, and whether that is within the limit.

    python -m tests.support.house

exits with 1 where a rule is broken. Every function takes the root of a repository and returns what counts against the
limit, so that a rule says what breaks it.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
#: A docstring that only says where another one stands: the method is marked with `@override` instead.
REFERENCE = re.compile(r"(See|As for|Like)( also)? (:\w+:)?`*~?[\w.]+`*\.?")


def sources(folder: Path) -> Iterator[tuple[Path, ast.Module]]:
    """Every Python file below a folder, with what it says."""
    for path in sorted(folder.rglob("*.py")):
        yield path, parsed(path.read_text())


@functools.cache
def parsed(text: str) -> ast.Module:
    """What a text says; several rules ask for the same files."""
    return ast.parse(text)


def loose_files(root: Path) -> list[str]:
    """Python files at the top level of the package."""
    return sorted(path.name for path in (root / "fastfip").glob("*.py"))


def names_in_two_files(root: Path) -> list[str]:
    """Names of top-level classes and types, private ones too, that stand in more than one file of the package.

    A type is what is assigned to a name like one of a class.
    """
    files: dict[str, list[str]] = {}
    for path, tree in sources(root / "fastfip"):
        classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
        assigned = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
        types = {ast.unparse(target) for target in assigned if re.fullmatch(r"_?[A-Z]+[a-z]\w*", ast.unparse(target))}
        for name in classes | types:
            files.setdefault(name, []).append(str(path.relative_to(root)))
    return [f"{name}: {', '.join(where)}" for name, where in sorted(files.items()) if len(where) > 1]


def readme_words(root: Path) -> list[str]:
    """Words of the README, without what stands in code fences, HTML comments and rows of tables.

    A word is what white space parts and has a letter or a digit in it; addresses of links and HTML tags are none.
    """
    text = re.sub(r"<!--.*?-->", " ", (root / "README.md").read_text(), flags=re.DOTALL)
    text = re.sub(r"^ *(```|~~~).*?^ *\1 *$", " ", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)|</?[a-zA-Z][^>]*>", " ", text)
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("|")]
    return [word for line in lines for word in line.split() if re.search(r"\w", word)]


def layer_rows(root: Path) -> list[str]:
    """Parts of the package that the test of imports tells apart."""
    for node in ast.parse((root / "tests" / "test_imports.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYER":
            return list(ast.literal_eval(node.value))
    raise LookupError("tests/test_imports.py has no LAYER")


def relative_imports(root: Path) -> list[str]:
    """Imports that do not name the package."""
    return [
        f"{path.relative_to(root)}:{node.lineno}"
        for folder in ("fastfip", "tests", "benchmarks", "examples")
        for path, tree in sources(root / folder)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]


def empty_docstrings(root: Path) -> list[str]:
    """Docstrings that only say where another one stands."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        f"{path.relative_to(root)}: {node.name if hasattr(node, 'name') else 'the file'}"
        for path, tree in sources(root / "fastfip")
        for node in ast.walk(tree)
        if isinstance(node, kinds) and REFERENCE.fullmatch(" ".join((ast.get_docstring(node) or "").split()))
    ]


@functools.cache
def trip(root: Path, scene: str) -> dict[str, Any]:
    """What tests/support/trips.py sees in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.trips", scene]
    done = subprocess.run(command, cwd=root, env=environment, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def long_files(root: Path) -> list[str]:
    """Python files of the package that are too long to be of one trade."""
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (root / "fastfip").rglob("*.py")}
    return sorted(f"{path.relative_to(root)}: {lines}" for path, lines in lengths.items() if lines > 400)


def fine_tune_modules(root: Path) -> list[str]:
    """Modules of the package that `purify(..., "fine_tune")` enters, on a tiny model."""
    return list(trip(root, "fine_tune")["modules"])


def audit_stations(root: Path) -> list[str]:
    """Functions of the package that are handed the model of `audit`, or the copy of it, as an argument.

    What carries the model in a field (a subject, a search) is not counted.
    """
    return list(trip(root, "audit")["stations"])


class Rule(NamedTuple):
    """What is counted, and how many there may be."""

    what: str
    count: Callable[[Path], list[str]]
    limit: int


RULES = (
    Rule("loose files at the top level of fastfip/", loose_files, 8),
    Rule("names of classes and types in two files of fastfip/", names_in_two_files, 0),
    Rule("words of the README outside code, comments and tables", readme_words, 700),
    Rule("rows of LAYER in tests/test_imports.py", layer_rows, 21),
    Rule("files of fastfip/ with more than 400 lines", long_files, 0),
    Rule("relative imports", relative_imports, 0),
    Rule("docstrings that only say See ...", empty_docstrings, 0),
    Rule('modules that purify(..., "fine_tune") enters', fine_tune_modules, 20),
    Rule("functions that audit hands its model to", audit_stations, 19),
)


def main() -> int:
    """Print the table, and below it what breaks a rule."""
    broken = []
    width = max(len(rule.what) for rule in RULES)
    print(f"{'rule':{width}}  limit   now  ok")
    for rule in RULES:
        counted = rule.count(ROOT)
        kept = len(counted) <= rule.limit
        verdict = "yes" if kept else "no"
        print(f"{rule.what:{width}}  {rule.limit:5}  {len(counted):4}  {verdict}")
        if not kept:
            broken.append((rule, counted))
    for rule, counted in broken:
        if rule.count is not readme_words:
            print(f"\n{rule.what}:", *counted, sep="\n  ")
    for scene in ("fine_tune", "audit"):
        print(f"\n{scene}: {trip(ROOT, scene)['hand_overs']} calls from one module of the package to another")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
