"""What the site needs beyond the pages of this folder; mkdocs.yml names this file.

README, CONTRIBUTING, CHANGELOG, SECURITY and the code of conduct lie at the top of the repository and are pages of the
site as well. Links out of this folder lead to those pages or, for source files, to the address of the source.
"""

from __future__ import annotations

import importlib.metadata
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
#: Files at the top of the repository -> pages of the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
}
LINK = re.compile(r"(\]\()([^()\s]+)(\))")
CODE = re.compile(r"(^ *```.*?^ *```|`[^`\n]*`)", re.DOTALL | re.MULTILINE)


def addresses() -> dict[str, str]:
    """Return the project's addresses, by the names that pyproject.toml gives them."""
    lines = importlib.metadata.metadata("fastfip").get_all("Project-URL") or []
    return dict(line.split(", ", 1) for line in lines)


def led(text: str, folder: str) -> str:
    """Return a page with its links led to pages of the site, or to the source.

    Args:
        text: Markdown.
        folder: of the page, from the root of the repository; "" for the root.
    """

    def one(found: re.Match[str]) -> str:
        before, link, after = found.groups()
        path, mark, anchor = link.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return found[0]
        place = posixpath.normpath(posixpath.join(folder, path))
        if place in PAGES:
            target = posixpath.relpath(posixpath.join("docs", PAGES[place]), folder if folder else "docs")
        elif place.startswith("docs/") and (ROOT / place).is_file():
            target = posixpath.relpath(place, folder if folder else "docs")
        elif (ROOT / place).exists():
            target = f"{addresses()['Source']}/blob/main/{place}"
        else:
            return found[0]  # mkdocs says that it leads nowhere
        return f"{before}{target}{mark}{anchor}{after}"

    parts = CODE.split(text)
    return "".join(part if CODE.fullmatch(part) else LINK.sub(one, part) for part in parts)


def on_config(config: Any) -> Any:
    """Set the addresses, which are written in one place only."""
    config["site_url"] = addresses()["Homepage"]
    config["repo_url"] = addresses()["Source"]
    config["repo_name"] = "Source"
    config["edit_uri"] = ""
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie at the top of the repository."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=led((ROOT / source).read_text(encoding="utf-8"), "")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links out of docs/ to where a reader of the site finds them."""
    if page.file.src_uri in PAGES.values():
        return markdown
    return led(markdown, posixpath.dirname("docs/" + page.file.src_uri))
