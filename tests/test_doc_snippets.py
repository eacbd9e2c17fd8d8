"""Every Python block and every command of the documents is run or read by a test, here where no other test does it."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer

import fastfip
from fastfip.cli import app

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")] + sorted(
    ROOT.glob("docs/**/*.md")
)
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMANDS = typer.main.get_command(app).commands
#: Documents whose Python blocks other tests run: tests/test_doc_examples.py, integrations/test_guide.py and
#: fisher/test_penalty.py.
ELSEWHERE = {
    "README.md", "CONTRIBUTING.md", "docs/attacks.md", "docs/backdoorbench.md", "docs/data.md", "docs/fisher.md",
    "docs/integrations.md", "docs/report.md", "docs/trace.md",
}  # fmt: skip
HERE = {"docs/audit.md", "docs/checkpoints.md", "docs/compare.md", "docs/kernels.md", "docs/quickstart.md"}
#: What a block needs that is not here: it is compiled, and its names are looked up.
NAMES_ONLY = {"docs/gpu.md"}
IDS = {"ids": lambda path: str(path.relative_to(ROOT))}


def blocks(path, kind="python"):
    """The blocks of one language in a document; the commands and outputs have none."""
    return [text for word, text in FENCE.findall(path.read_text(encoding="utf-8")) if word.split()[:1] == kind.split()]


def commands(text):
    """The lines of a block that begin with `fastfip`, without comments; usage lines with placeholders are left out."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("fastfip ")]
    return [words for words in found if "[OPTIONS]" not in words]


@pytest.mark.parametrize("path", DOCUMENTS, **IDS)
def test_the_command_line_reads_every_command(path):
    for text in blocks(path, ""):
        for _, name, *rest in commands(text):
            COMMANDS[name].make_context(name, rest)  # an option that is not there, or a missing one, ends it


@pytest.mark.parametrize("path", DOCUMENTS, **IDS)
def test_commands_within_sentences_have_these_options(path):
    prose = FENCE.sub("", path.read_text(encoding="utf-8"))
    for name, rest in re.findall(r"`(?:[^`]*-m )?fastfip ([a-z][a-z-]*)((?: [^`]*)?)`", prose):
        known = {option for one in COMMANDS[name].params for option in (*one.opts, *one.secondary_opts)} | {"--help"}
        assert set(re.findall(r"(?<!\S)--[a-z][a-z-]*", rest)) <= known, f"fastfip {name}{rest}"


def test_a_wrong_command_is_seen(tmp_path):
    path = tmp_path / "a.md"
    path.write_text(
        "```\nfastfip purify in.pth out.pth --dta x   # a comment\n```\nand `fastfip audit in.pth --piture`\n"
    )
    (words,) = [one for text in blocks(path, "") for one in commands(text)]
    assert words == ["fastfip", "purify", "in.pth", "out.pth", "--dta", "x"]
    with pytest.raises(Exception, match="--dta"):
        COMMANDS["purify"].make_context("purify", words[2:])
    with pytest.raises(AssertionError, match="--piture"):
        test_commands_within_sentences_have_these_options(path)


def test_extras_that_documents_install_are_there():
    declared = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) *=", declared, re.MULTILINE))
    for path in DOCUMENTS:
        named = re.findall(r"pip install ['\"]?(?:fastfip|\.)\[(\w+)\]", path.read_text(encoding="utf-8"))
        assert set(named) <= extras, path.name


def test_every_document_with_python_has_a_test_that_runs_it():
    with_python = {str(path.relative_to(ROOT)) for path in DOCUMENTS if blocks(path)}
    assert with_python == ELSEWHERE | HERE | NAMES_ONLY


@pytest.mark.parametrize("name", sorted(NAMES_ONLY))
def test_names_of_blocks_that_cannot_run_here(name):
    for text in blocks(ROOT / name):
        compile(text, name, "exec")
        for called in re.findall(r"(?:fastfip\.)?\b([a-z_]+)\(", text):
            assert hasattr(fastfip, called) or hasattr(fastfip.ops, called), called


def run(name, scope, change=lambda text: text):
    """Run the Python blocks of a document, one after the other."""
    for text in blocks(ROOT / name):
        exec(compile(change(text), name, "exec"), scope)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A model and data like those that the blocks speak of, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5)).eval()
    clean = [(torch.rand(20, 3, 4, 4), torch.arange(20) % 5)]
    triggered = [(torch.rand(8, 3, 4, 4), torch.zeros(8, dtype=torch.int64), torch.ones(8, dtype=torch.int64))]
    return {"fastfip": fastfip, "model": model, "clean_loader": clean, "test": clean, "triggered": triggered}


def test_quickstart(small):
    fastfip.save_checkpoint(small["model"], "downloaded.pth")
    run("docs/quickstart.md", small, lambda text: text.replace("(model, clean_loader)",
        '(model, clean_loader, "fine_tune", steps=2, force=True)'))  # fmt: skip
    assert Path("purified.pth").stat().st_size > 0


def test_checkpoints(small):
    fastfip.save_checkpoint(small["model"], "net.pth")
    run("docs/checkpoints.md", small)
    assert set(fastfip.load_checkpoint("clean.pth")) == set(small["weights"])


def test_compare(small):
    pytest.importorskip("matplotlib")
    methods = '[("fine_tune", {"steps": 2}), ("clp", {})]'
    run("docs/compare.md", small, lambda text: re.sub(r'\["fast_wfip".*?\)\]', methods, text).replace(
        "seeds=[0, 1, 2]", "seeds=[0, 1], force=True"))  # fmt: skip
    assert all(Path(f"compare.{end}").exists() for end in ("csv", "png", "html"))


def quick(text):
    """A block of docs/audit.md with a search that takes no time."""
    return re.sub(r"(audit\(model, clean_loader)", r"\1, steps=3, sharpness=False", text)


def test_audit(small):
    pytest.importorskip("matplotlib")
    small["result"] = type("Result", (), {"model": small["model"]})
    run("docs/audit.md", small, quick)
    assert Path("audit.png").exists() and isinstance(small["found"].score, float)


def test_kernels():
    """Each block without the lines that need bfloat16 or a convolution; the first result is that of its formula."""
    rows = {"g": torch.rand(4, 5, 6), "a": torch.rand(4, 5, 7), "weight_grad": torch.zeros(6, 7)}
    scope = dict(rows)
    first, second, third = blocks(ROOT / "docs" / "kernels.md")
    lines = [line for line in first.splitlines() if "native_bf16" not in line and "_conv(" not in line]
    exec("\n".join(lines), scope)
    expected = torch.einsum("nto,nti->noi", rows["g"], rows["a"]).square().sum(0)
    assert torch.allclose(scope["out"], 2 * expected)  # the second call adds
    u, v, s = torch.rand(1, 6, 2), torch.rand(1, 7, 2), torch.ones(1, 2)
    scope = {"g": rows["g"], "x": rows["a"], "u": u, "v": v, "s": s, "p": rows["a"] @ v[0]}
    exec("\n".join(line for line in second.splitlines() if "shape)" not in line), scope)
    layer = {"weight": torch.rand(6, 7), "moved": torch.rand(6, 7), "bias": torch.zeros(6)}
    shifts = {"u": u, "v": v, "sigma": torch.ones(1, 2), "delta": torch.zeros(1, 2)}
    scope = {"x": torch.rand(3, 7), "g": torch.rand(3, 6), **layer, **shifts}
    exec(third, scope)
    assert scope["y"].shape == (3, 6) and scope["p"].shape[-1] == 2
