"""The picture of docs/architecture.md shows the code as it is."""

import html
import re

import pytest

from tests.support import architecture
from tests.support.architecture import DOT, ROOT
from tests.test_imports import LAYER

REDRAW = "make picture"


def test_arrows_between_folders_are_those_of_the_imports():
    text = DOT.read_text()
    edges = architecture.imports()
    assert architecture.drawn(text) == architecture.reduced(edges), REDRAW
    assert architecture.spliced(text, architecture.reduced(edges)) == text, REDRAW
    for name in LAYER:  # nothing that the code can reach is lost with the arrows that are left out
        assert architecture.below(architecture.drawn(text), name) == architecture.below(edges, name)


def test_arrows_that_others_stand_for_are_left_out_and_no_others():
    edges = {("a", "b"), ("b", "c"), ("c", "d"), ("a", "c"), ("a", "d"), ("e", "d")}
    assert architecture.reduced(edges) == {("a", "b"), ("b", "c"), ("c", "d"), ("e", "d")}
    assert architecture.below(edges, "b") == {"c", "d"}
    text = f"x\n{architecture.BEGIN}old{architecture.END}y\n"
    assert architecture.drawn(architecture.spliced(text, {("cli", "data")})) == {("cli", "data")}


def test_the_svg_is_that_of_the_source():
    text, svg = DOT.read_text(), DOT.with_suffix(".svg").read_text()
    titles = [html.unescape(title).split("->") for title in re.findall(r"<title>(.*?)</title>", svg)]
    assert {tuple(ends) for ends in titles if len(ends) == 2 and set(ends) <= set(LAYER)} == (
        architecture.drawn(text)
    ), REDRAW
    labels = {line.strip() for label in re.findall(r'label="(.*?)"', text) for line in label.split(r"\n")}
    assert labels <= {html.unescape(shown).strip() for shown in re.findall(r">([^<>]+)</text>", svg)}, REDRAW


@pytest.mark.parametrize("path, name", architecture.steps(DOT.read_text()), ids=str)
def test_every_step_is_in_the_code(path, name):
    assert path.exists()
    assert not name or architecture.defines(path, name)


def test_a_name_that_is_not_there_is_noticed():
    path = ROOT / "fastfip" / "data" / "cleanset.py"
    assert architecture.defines(path, "CleanSet.split")
    assert not architecture.defines(path, "CleanSet.nothing") and not architecture.defines(path, "split")


def test_every_folder_is_described_and_every_layer_named():
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert not [name for name in LAYER if f"| `{name}`" not in text and not name.startswith("__")]
    (block,) = re.findall(r"^    0 errors(?:.|\n)*?(?=\n\n)", text, re.MULTILINE)
    said = {int(layer): set(names.split(", ")) for layer, names in re.findall(r"(\d+) (\w+(?:, \w+)*)", block)}
    assert said == {layer: {name for name in LAYER if LAYER[name] == layer} for layer in set(LAYER.values())}
