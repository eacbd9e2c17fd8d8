"""Every name of the package that a document or a docstring gives is there, the folders from `import fastfip` alone."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = sorted((ROOT / "fastfip").rglob("*.py"))
NAME = re.compile(r"(?<![\w./-])fastfip(?:\.[A-Za-z_]\w*)+")
#: Files and other packages' names that look like one: docs/notes tells of names of the past.
NO_NAMES = ("fastfip.h", "fastfip.egg", "fastfip.png", "fastfip._native", "fastfip.py", "fastfip.toml")


def resolve(name):
    """Follow a dotted name by attributes; below the package's folders modules are imported as a user would."""
    head, *rest = name.split(".")
    value, path = importlib.import_module(head), head
    rest = rest[1:] if rest[:1] == ["integrations"] and rest[1:] else rest
    if rest and rest[0] in value._EXTRAS:  # importing it asks for a package that need not be here
        return defined(ROOT / "fastfip" / "integrations" / f"{rest[0]}.py", rest[1:])
    for part in rest:
        path = f"{path}.{part}"
        if path.count(".") > 1 and not hasattr(value, part):
            importlib.import_module(path)
        value = getattr(value, part)
    return value


def defined(path, names):
    """The statement that defines a name in a file, which is not imported, or one in that; the file itself for none."""
    found = ast.parse(path.read_text(encoding="utf-8"))
    for name in names:
        inner = [node for node in found.body if getattr(node, "name", None) == name]
        if not inner:
            raise AttributeError(f"{path.name} defines no {'.'.join(names)}")
        found = inner[0]
    return found


def names_in(text):
    return sorted({name for name in NAME.findall(text) if not name.startswith(NO_NAMES)})


@pytest.mark.parametrize("path", [*DOCUMENTS, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_names_are_there(path):
    if "notes" in path.parts:
        pytest.skip("the notes tell of what was")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":  # in the code mypy sees them
        text = "\n".join(re.findall(r'"""(.*?)"""', text, re.S) + re.findall(r"#.*", text))
    wrong = []
    for name in names_in(text):
        try:
            resolve(name)
        except (ImportError, AttributeError) as error:
            wrong.append(f"{name} ({error})")
    assert not wrong, f"{path.name}: {wrong}"


def test_a_name_that_is_not_there_is_seen():
    assert names_in("see `fastfip.purify` and fastfip.nowhere.at_all, not x/fastfip.csv") == [
        "fastfip.nowhere.at_all", "fastfip.purify",
    ]  # fmt: skip
    with pytest.raises(AttributeError):
        resolve("fastfip.nowhere.at_all")
    with pytest.raises(ImportError):
        resolve("fastfip.fisher.nowhere")
    with pytest.raises(AttributeError, match="hf.py defines no FIPTrainer.nothing"):
        resolve("fastfip.hf.FIPTrainer.nothing")
    assert resolve("fastfip.purification.callbacks.Callback").__name__ == "Callback"
