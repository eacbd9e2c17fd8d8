"""Write what docs/attacks.md says of the attacks, from their registries.

    python -m benchmarks.attacks_doc            # rewrite the tables and sections in docs/attacks.md
    python -m benchmarks.attacks_doc --check    # exit code 1 if they are not what the registries say

What an attack is stands in the docstrings of its module and class; the rest of the file is written by hand.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from typing import Any

from benchmarks import harness
from fastfip import attacks
from fastfip.attacks import detection

FILE = harness.DOCS / "attacks.md"
#: Fields that `fit` sets beside what it finds.
NOTES = ("found", "steps")


def own(registry: Any = attacks) -> list[Any]:
    """Return the attacks of the package; those that other packages add are in no document."""
    kinds = [registry.get(name) for name in registry.names()]
    return [kind for kind in kinds if kind.__module__.startswith("fastfip.")]


def registered() -> str:
    """Return a table of the attacks on classifiers, then a section for each."""
    head = ["attack", "trigger", "for", "labels", "found or trained first", "rate", "source", "defaults"]
    rows = []
    for kind in own():
        labels = "kept" if kind.clean_label else "changed"
        found = ", ".join(f"`{item.name}`" for item in found_first(kind) if item.name not in NOTES) or "-"
        rows.append([
            _link(kind), harness.inline(kind.summary), kind.modality, labels, found, f"{kind.usual_rate:.0%}",
            source(kind), defaults(kind),
        ])  # fmt: skip
    return "\n".join([harness.table(head, rows), "", *map(section, own())]).rstrip()


def of_detectors() -> str:
    """Return a table of the attacks on detectors, then a section for each."""
    kinds = own(detection)
    rows = [[_link(kind), harness.inline(kind.summary), source(kind), defaults(kind)] for kind in kinds]
    table = harness.table(["attack", "trigger", "source", "defaults"], rows)
    return "\n".join([table, "", *map(section, kinds)]).rstrip()


def _link(kind: Any) -> str:
    return f"[`{kind.name}`](#{kind.name})"


def found_first(kind: Any) -> list[dataclasses.Field[Any]]:
    """Return the fields that `fit` sets, which no repr shows: what an attack finds or trains before it poisons."""
    return [item for item in dataclasses.fields(kind) if not item.repr]


def settings(kind: Any) -> list[dataclasses.Field[Any]]:
    """Return the fields that are the user's to set."""
    return [item for item in dataclasses.fields(kind) if item not in found_first(kind)]


def defaults(kind: Any) -> str:
    """Return the settings that have a value by default, as they are written in Python."""
    known = (item for item in settings(kind) if item.default not in (None, dataclasses.MISSING))
    return ", ".join(f"`{item.name}={item.default!r}`" for item in known) or "-"


def source(kind: Any) -> str:
    """Return what the docstring of an attack's module says of its source, with links."""
    text = _said(sys.modules[kind.__module__])[0].partition(". ")[2].rstrip(".")
    text = re.sub(r"arXiv (\d+\.\d+)", r"[arXiv \1](https://arxiv.org/abs/\1)", harness.inline(text))
    return re.sub(r"(?<![/\w])openreview\.net\S+", r"[OpenReview](https://\g<0>)", text)


def section(kind: Any) -> str:
    """Return what the docstrings say of an attack, and a table of its settings."""
    more = _said(sys.modules[kind.__module__])[1:]
    said = inspect.getdoc(kind) or ""
    text, _, listed = said.partition("\nAttributes:\n")
    parts = [
        f"### {kind.name}",
        *harness.markdown(text.rstrip()),
        *(line for part in more for line in harness.markdown(part)),
    ]
    meanings = meaning_of_fields(kind)
    rows = [[f"`{item.name}`", _shown(item), meanings.get(item.name, "")] for item in settings(kind)]
    if rows:
        parts.append(harness.table(["setting", "default", "meaning"], rows))
    return "\n\n".join(parts) + "\n"


def meaning_of_fields(kind: Any) -> dict[str, str]:
    """Return what an attack's class, or one that it is made of, says of each field."""
    out: dict[str, str] = {}
    names = "|".join(item.name for item in dataclasses.fields(kind))
    for cls in reversed(kind.__mro__):
        listed = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")[2]
        text = " ".join(listed.split())
        parts = re.split(rf"(?:^|(?<=[.;] ))({names}): ", text)
        out.update({name: harness.inline(said.strip()) for name, said in zip(parts[1::2], parts[2::2])})
    return out


def _said(thing: Any) -> list[str]:
    """Return the paragraphs of a docstring, each as it stands."""
    return re.split(r"\n\s*\n", inspect.getdoc(thing) or "")


def _shown(item: dataclasses.Field[Any]) -> str:
    if item.default is dataclasses.MISSING:
        return "to be given"
    return "none" if item.default is None else f"`{item.default!r}`"


def main() -> None:
    """Rewrite or check the file."""
    parser = harness.Parser(__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse().check
    old = new = FILE.read_text(encoding="utf-8")
    for mark, text in (("attacks", registered()), ("detection", of_detectors())):
        new = harness.spliced(new, mark, text)
    if check:
        sys.exit(0 if new == old else "docs/attacks.md is out of date: python -m benchmarks.attacks_doc")
    FILE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
