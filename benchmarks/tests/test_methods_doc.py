"""docs/methods.md is what the registry says."""

from __future__ import annotations

import sys
from dataclasses import fields

from benchmarks import harness, methods_doc
from fastfip import methods
from fastfip.methods import MethodConfig


def test_the_document_is_up_to_date():
    text = methods_doc.FILE.read_text(encoding="utf-8")
    assert harness.spliced(text, "methods", methods_doc.registry()) == text, "python -m benchmarks.methods_doc"


def test_every_method_has_its_section_and_settings():
    text = methods_doc.registry()
    for name in methods_doc.own_methods():
        part = text.split(f"### {name}\n")[1].split("\n### ")[0]
        own = {item.name for item in fields(methods.get(name).Config)} - {item.name for item in fields(MethodConfig)}
        assert all(f"| `{setting}` |" in part for setting in own)
        assert len(part.split()) > 15
    assert "| `bn_mode` | eval |" in text.split("### fast_wfip\n")[1].split("\n### ")[0]  # a default of its own


def test_formulas_are_code_and_markup_is_escaped():
    parts = harness.markdown("Min |w| < 2 * a, `a | b`:\n\n    a = b\n      + c\n\nEnd.")
    assert parts == ["Min \\|w\\| &lt; 2 \\* a, `a | b`:", "```\na = b\n  + c\n```", "End."]


def test_a_new_method_is_in_every_document_by_one_command(monkeypatch):
    written = {}
    monkeypatch.setattr(harness, "splice", lambda path, mark, new: written.update({(path.name, mark): new}))
    monkeypatch.setattr(methods.base.REGISTRY, "_known", dict(methods.base.REGISTRY._known))
    monkeypatch.setattr(sys, "argv", ["methods_doc"])
    for name, module in (("nudge", "fastfip.methods.nudge"), ("foreign", "toybox")):
        kind = type(name.title(), (methods.get("fine_tune"),), {"name": name, "summary": "a toy", "__module__": module})
        monkeypatch.setitem(sys.modules, module, sys.modules[__name__])
        methods.register(kind)
    methods_doc.main()
    own = {("methods.md", mark) for mark in ("methods", "measured", "papers")}
    assert set(written) == own | {("README.md", "suite"), ("results.md", "real")}
    assert "### nudge\n" in written["methods.md", "methods"] and "`nudge`" in written["README.md", "suite"]
    assert not any("foreign" in text for text in written.values())
