"""docs/attacks.md is what the registries of attacks say."""

import sys
from dataclasses import dataclass, fields
from typing import ClassVar

import pytest

from benchmarks import attacks_doc, harness
from fastfip import attacks
from fastfip.attacks import Attack, detection

TOY = '''"""Dim: half the light. Somebody et al., arXiv 2401.00001.

More of | it.
"""'''


def test_the_document_is_up_to_date():
    text = attacks_doc.FILE.read_text(encoding="utf-8")
    for mark, made in (("attacks", attacks_doc.registered()), ("detection", attacks_doc.of_detectors())):
        assert harness.spliced(text, mark, made) == text, "python -m benchmarks.attacks_doc"


def test_every_attack_has_its_row_source_and_settings_with_their_meaning():
    for text, registry in ((attacks_doc.registered(), attacks), (attacks_doc.of_detectors(), detection)):
        for kind in attacks_doc.own(registry):
            assert f"| [`{kind.name}`](#{kind.name}) | " in text
            assert len(attacks_doc.source(kind)) > 10, f"{kind.__module__}: no source after the first sentence"
            said = attacks_doc.meaning_of_fields(kind)
            assert not {item.name for item in fields(kind)} - set(said), f"{kind.name}: no meaning under Attributes"
            part = text.split(f"### {kind.name}\n")[1].split("\n### ")[0]
            assert all(f"| `{item.name}` |" in part for item in attacks_doc.settings(kind))
            assert len(part.split()) > 15


def test_what_an_attack_finds_first_is_no_setting():
    rows = {line.split("`")[1]: line for line in attacks_doc.registered().splitlines() if line.startswith("| [")}
    assert "| kept | `classifier`, `target` |" in rows["clb"] and "| changed | `pattern` |" in rows["trojannet"]
    assert "| images | changed | - | 10% |" in rows["badnets"] and "| tokens | changed | - |" in rows["words"]
    assert "`size=3`" in rows["badnets"] and "[arXiv 1708.06733](https://arxiv.org/abs/1708.06733)" in rows["badnets"]
    clb = attacks_doc.registered().split("### clb\n")[1].split("\n### ")[0]
    assert "| `eps` |" in clb and "| `classifier` |" not in clb
    assert "| `mask` |" in attacks_doc.registered().split("### trojannet\n")[1].split("\n### ")[0]


@pytest.fixture
def dim(monkeypatch):
    """An attack of the package that the document does not have yet, and one of somebody else's."""
    monkeypatch.setattr(attacks.base.REGISTRY, "_known", dict(attacks.base.REGISTRY._known))
    module = type(sys)("fastfip.attacks.dim")
    module.__doc__ = TOY.strip('"')
    monkeypatch.setitem(sys.modules, "fastfip.attacks.dim", module)

    @dataclass(frozen=True)
    class Dim(Attack):
        """Darken the picture.

        Attributes:
            by: a factor. of: what is
                meant.
        """

        __module__ = "fastfip.attacks.dim"
        name: ClassVar[str] = "dim"
        summary: ClassVar[str] = "half the light"
        by: float = 0.5
        of: int | None = None

        def trigger(self, x):
            return x

    attacks.register(Dim)
    attacks.register(type("Foreign", (Dim,), {"name": "foreign", "__module__": "toybox"}))


def test_a_new_attack_is_in_the_document_by_one_command(dim, tmp_path, monkeypatch):
    monkeypatch.setattr(attacks_doc, "FILE", tmp_path / "attacks.md")
    marks = [f"<!-- {mark}:{end} -->\n" for mark in ("attacks", "detection") for end in ("begin", "end")]
    attacks_doc.FILE.write_text("By hand.\n" + "".join(marks))
    monkeypatch.setattr(sys, "argv", ["attacks_doc", "--check"])
    with pytest.raises(SystemExit, match="out of date"):
        attacks_doc.main()
    monkeypatch.setattr(sys, "argv", ["attacks_doc"])
    attacks_doc.main()
    text = attacks_doc.FILE.read_text()
    assert text.startswith("By hand.\n") and "foreign" not in text and "### baddet\n" in text
    arxiv = "[arXiv 2401.00001](https://arxiv.org/abs/2401.00001)"
    assert (
        f"| [`dim`](#dim) | half the light | images | changed | - | 10% | Somebody et al., {arxiv} | `by=0.5` |" in text
    )
    part = text.split("### dim\n")[1].split("\n### ")[0]
    assert "Darken the picture.\n\nMore of \\| it.\n\n| setting |" in part
    assert "| `by` | `0.5` | a factor. |\n| `of` | none | what is meant. |" in part
    monkeypatch.setattr(sys, "argv", ["attacks_doc", "--check"])
    with pytest.raises(SystemExit) as end:
        attacks_doc.main()
    assert end.value.code == 0
