"""The arrows of docs/pictures/architecture.dot, from the imports of the code.

    python -m tests.support.architecture

writes them between the marks of the file. An arrow is left out where others lead the same way: `cli` imports `errors`,
but so does everything that it imports. So the picture has few arrows, and what can reach what is that of the code.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.test_imports import FILES, LAYER, ROOT, imported, module_name, part

DOT = ROOT / "docs" / "pictures" / "architecture.dot"
BEGIN, END = "// imports:begin\n", "// imports:end\n"
Edges = set[tuple[str, str]]


def imports() -> Edges:
    """Which part of the package imports which other one."""
    pairs = {(part(module_name(path)), part(name)) for path in FILES for name in imported(path)}
    return {(a, b) for a, b in pairs if a != b and b in LAYER}


def below(edges: Edges, start: str) -> set[str]:
    """Return all parts that one reaches by its imports."""
    found: set[str] = set()
    left = [start]
    while left:
        new = {b for a, b in edges if a == left[0]} - found
        found |= new
        left = [*left[1:], *sorted(new)]
    return found


def reduced(edges: Edges) -> Edges:
    """Leave out every arrow that a longer way stands for (the imports have no circle)."""
    return {(a, b) for a, b in edges if not any(b in below(edges, c) for x, c in edges if x == a and c != b)}


def arrows(edges: Edges) -> str:
    """Return what stands between the marks: a line for each part, those of one layer beside each other."""
    parts = sorted(LAYER, key=lambda name: (-LAYER[name], name))
    lines = [f'"{name}"' for name in parts]
    lines += [f'"{a}" -> "{b}"' for a, b in sorted(edges, key=lambda e: (parts.index(e[0]), parts.index(e[1])))]
    return "".join(f"        {line}\n" for line in lines)


def spliced(text: str, edges: Edges) -> str:
    """Return the text of the picture with these arrows between its marks."""
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}{arrows(edges)}        {END}{rest.partition(END)[2]}"


def drawn(text: str) -> Edges:
    """Return the arrows between folders in the text of a picture."""
    between = text.partition(BEGIN)[2].partition(END)[0]
    return set(re.findall(r'^ *"(\w+)" -> "(\w+)"$', between, re.MULTILINE))


def steps(text: str) -> list[tuple[Path, str]]:
    """Return the file and the name in it of every step that the picture shows."""
    return [(ROOT / file, name) for file, name in re.findall(r'comment="(\S+?)(?: ([\w.]+))?"', text)]


def defines(path: Path, name: str) -> bool:
    """Whether a Python file defines a function, or a class and a method of it."""
    body: list[ast.stmt] = ast.parse(path.read_text()).body
    for piece in name.split("."):
        found = [n for n in body if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name == piece]
        if not found:
            return False
        body = found[0].body
    return True


if __name__ == "__main__":
    DOT.write_text(spliced(DOT.read_text(), reduced(imports())))
