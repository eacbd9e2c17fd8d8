"""The site: every page is in its table of contents, every public name in its reference; notebooks have no outputs."""

import json
import re
from pathlib import Path

import pytest
import yaml

import fastfip

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
NOTEBOOKS = sorted(DOCS.glob("tutorials/*.ipynb"))


class AnyTag(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags only mkdocs knows."""


AnyTag.add_multi_constructor("", lambda loader, tag, node: None)


@pytest.fixture(scope="module")
def config():
    return yaml.load((ROOT / "mkdocs.yml").read_text(), AnyTag)


def leaves(nav):
    """The pages of a table of contents."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in leaves(part)]


def test_every_page_is_in_the_table_of_contents(config):
    pages = {str(path.relative_to(DOCS)) for path in [*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")]}
    generated = {"index.md", "contributing.md", "changelog.md", "security.md", "conduct.md"}
    assert set(leaves(config["nav"])) == pages | generated


def test_warnings_of_the_site_are_errors(config):
    assert config["strict"] is True
    assert {kind for part in config["validation"].values() for kind in part.values()} == {"warn"}


def test_nothing_of_the_site_comes_from_other_servers(config):
    assert config["theme"]["font"] is False
    assert not config.get("extra_javascript") and not config.get("extra_css")


def test_every_public_name_is_in_the_reference():
    text = "".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    assert {f"fastfip.{name}" for name in fastfip._WHERE} <= shown
    assert {f"fastfip.ops.{name}" for name in fastfip.ops.__all__} - shown == {
        "fastfip.ops.OPS", "fastfip.ops.Backend", "fastfip.ops.Op",
    }  # fmt: skip


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs_and_writes_nothing_beside_itself(path):
    cells = json.loads(path.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert code and not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    for text in code:
        compile(re.sub(r"^[%!].*$", "", text, flags=re.MULTILINE), path.name, "exec")
        assert not re.findall(r"(?:save_checkpoint\(\w+, |out=|plot\()[\"']", text)


def test_there_are_four_tutorials():
    assert len(NOTEBOOKS) == 4
