"""docs/methods.md is what the registry says."""

from __future__ import annotations

from dataclasses import fields

from benchmarks import harness, methods_doc
from fastfip import methods
from fastfip.methods import MethodConfig


def test_the_document_is_up_to_date():
    text = methods_doc.FILE.read_text(encoding="utf-8")
    assert harness.spliced(text, "methods", methods_doc.registry()) == text, "python -m benchmarks.methods_doc"


def test_every_method_has_its_section_and_settings():
    text = methods_doc.registry()
    for name in methods.names():
        part = text.split(f"### {name}\n")[1].split("\n### ")[0]
        own = {item.name for item in fields(methods.get(name).Config)} - {item.name for item in fields(MethodConfig)}
        assert all(f"| `{setting}` |" in part for setting in own)
        assert len(part.split()) > 15
    assert "| `bn_mode` | eval |" in text.split("### fast_wfip\n")[1].split("\n### ")[0]  # a default of its own


def test_formulas_are_code_and_markup_is_escaped():
    parts = methods_doc._markdown("Min |w| < 2 * a, `a | b`:\n\n    a = b\n      + c\n\nEnd.")
    assert parts == ["Min \\|w\\| &lt; 2 \\* a, `a | b`:", "```\na = b\n  + c\n```", "End."]
