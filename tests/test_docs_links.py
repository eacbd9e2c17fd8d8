"""What the documents point to is there: files, headings, modules to run, paths, targets of the Makefile."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md")),
    *ROOT.glob("docs/**/*.md"),
]
FOLDERS = "benchmarks|csrc|docs|examples|fastfip|tests"


def prose(text):
    """The text without fenced code, in which brackets and hashes mean something else."""
    return re.sub(r"^ *(```|~~~).*?^ *\1 *$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text):
    """What GitHub calls the headings of a document."""
    headings = re.findall(r"^#+ +(.*?) *$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text):
    """Targets of links and pictures."""
    return re.findall(r"\]\(([^()\s]+)\)", prose(text)) + re.findall(r'<(?:a|img)\s[^>]*(?:href|src)="([^"]+)"', text)


def broken_links(document):
    found = []
    for link in links(document.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path) if path else document
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            found.append(link)
    return found


def missing_modules(text, root=ROOT):
    """Modules of benchmarks and tests that are named and are no file."""
    names = re.findall(r"(?<![\w/.])(?:benchmarks|tests)(?:\.\w+)+", text)
    places = {name: root / name.replace(".", "/") for name in names}
    return [name for name, place in places.items() if not (place.is_dir() or place.with_suffix(".py").exists())]


def missing_paths(text, root=ROOT):
    """Paths in backticks from the root of the repository; those with a placeholder are passed over.

    What git ignores counts as missing: it lies here by chance, and a fresh clone has none of it.
    """
    paths = re.findall(rf"`((?:{FOLDERS})/[\w./*-]+)`", text)
    found = {path: {str(place) for place in root.glob(path.rstrip("/"))} for path in paths}
    left_out = ignored_by_git(set().union(*found.values()), root)
    return [path for path in paths if not found[path] - left_out]


def ignored_by_git(places, root):
    """Those of the places that git ignores; none where there is no repository, as in an unpacked archive."""
    command = ["git", "-C", str(root), "check-ignore", "--stdin"]
    done = subprocess.run(command, input="\n".join(places), capture_output=True, text=True, check=False)
    return set(done.stdout.splitlines())


def targets(text):
    """Targets of make that code shows."""
    code = re.findall(r"`(make [^`]*)`", text) + re.findall(r"^ *(make .*)$", text, re.MULTILINE)
    return {re.split(r"[^\w-]", line)[1] for line in code}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_points_to_is_there(document):
    text = document.read_text()
    assert not broken_links(document)
    assert not missing_modules(text)
    assert not missing_paths(text)
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets(text) <= known


def test_every_page_can_be_reached_from_the_readme():
    seen, left = set(), [ROOT / "README.md"]
    while left:
        document = left.pop()
        if document in seen or document.suffix != ".md":
            continue
        seen.add(document)
        paths = [link.partition("#")[0] for link in links(document.read_text()) if not re.match(r"[a-z]+:", link)]
        left += [(document.parent / path).resolve() for path in paths if path]
    assert not set((ROOT / "docs").rglob("*.md")) - seen


def test_what_is_not_there_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One, `two`!\n[a](other.md) [b](#one-two) [c](#three) [d](https://x.y/z)\n```\n[e](f)\n```\n![p](no.png)"
    )
    assert broken_links(page) == ["other.md", "#three", "no.png"]
    assert missing_modules("`python -m benchmarks.nothing.here`, tests.support.house", ROOT) == [
        "benchmarks.nothing.here"
    ]
    assert missing_paths("`docs/nothing.md` `docs/*.md` `tests/ops/test_<op>.py` `fastfip/none/`") == [
        "docs/nothing.md", "fastfip/none/",
    ]  # fmt: skip
    assert targets("`make test-lesser`, we make do\n\n    make gpu ARGS=1\n") == {"test-lesser", "gpu"}


def test_what_git_ignores_is_missing_in_a_document(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text("left/\n")
    for name in ("left", "kept"):
        (tmp_path / "docs" / name).mkdir(parents=True)
        (tmp_path / "docs" / name / "file").write_text("")
    assert missing_paths("`docs/left/file` `docs/left` `docs/kept/file` `docs/kept`", tmp_path) == [
        "docs/left/file", "docs/left",
    ]  # fmt: skip
