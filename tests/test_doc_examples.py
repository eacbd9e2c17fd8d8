"""What the documents show runs as it is: the Python of docs/fisher.md, examples of the README and of CONTRIBUTING."""

import dataclasses
import re
import runpy
import shlex
import sys
import time
from pathlib import Path

import pytest
import torch

from fastfip import purify
from fastfip.cli import main
from fastfip.cli.many.rows import ManyRow, read_manifest
from fastfip.testing import nets
from tests.support.backdoorbench_files import CLASSES, attack_result, some_pictures

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def test_fisher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "fisher.md").read_text(), re.DOTALL)
    assert len(blocks) >= 7
    torch.manual_seed(0)
    scope: dict = {"__name__": "docs"}
    for block in blocks:
        start = time.perf_counter()
        exec(compile(block, "docs/fisher.md", "exec"), scope)
        print(f"{time.perf_counter() - start:.2f} s: {block.strip().splitlines()[0]}")


def blocks_of(kind, document="README.md"):
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)
    return [text for word, text in fences if word == kind]


def rows(text):
    """The rows of figures in a printed result: name -> before, after."""
    return dict(re.findall(r"^(ACC|ASR|RA|loss) +(.*?) *$", text, re.MULTILINE))


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """The folder in which somebody ran examples/backdoored_digits.py, with the path of the examples."""
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "examples")])
    runpy.run_path(str(ROOT / "examples" / "backdoored_digits.py"), run_name="__main__")
    return tmp_path


def _form(text: str) -> list[str]:
    """Return the lines with zeros for numbers and one space where columns are as wide as these need."""
    lines = (line for line in text.splitlines() if "peak memory" not in line)
    return [re.sub(r" +", " ", re.sub(r"[\d.]+", "0", line)) for line in lines]


def test_readme(examples, capsys):
    (block,) = blocks_of("python")
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    assert (examples / "clean.safetensors").exists()
    # The README shows what is printed. Other machines add in other orders and clean this small net a bit differently.
    (shown,) = [text for text in blocks_of("") if text.startswith("fast_wfip on")]
    assert _form(shown) == _form(printed)
    for name in ("ACC", "ASR", "RA"):
        for said, found in zip(*(re.findall(r"([\d.]+) %", rows(text)[name]) for text in (shown, printed))):
            assert abs(float(said) - float(found)) < 20, f"{name}: {printed}"
    # The command below it does the same.
    (command,) = [text for text in blocks_of("") if text.startswith("fastfip purify")]
    arguments = shlex.split(command.replace("\\\n", " ").replace("clean.safetensors", "again.safetensors"))[1:]
    assert main([*arguments, "--quiet"]) == 0
    assert rows(capsys.readouterr().out) == rows(printed)


def test_backdoorbench(tmp_path, monkeypatch, capsys):
    """The command and the script of docs/backdoorbench.md, on a small run of a net of its own; fewer steps."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    folder = tmp_path / "record" / "badnet_0_1"
    attack_result(folder, nets.ResNet20(CLASSES).state_dict(), True, model_name="resnet20")
    for name, seed in (("clean", 1), ("test", 2)):
        for i, (x, y) in enumerate(zip(*some_pictures(seed=seed), strict=True)):
            (tmp_path / name / str(y)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(x).save(tmp_path / name / str(y) / f"{i}.png")
    (command,) = [text for text in blocks_of("", "docs/backdoorbench.md") if text.startswith("fastfip purify")]
    few = ["--method", "fine_tune", "--steps", "2", "--ignore-fit", "--quiet"]
    assert main([*shlex.split(command)[1:], *few]) == 0
    assert {"ACC", "ASR", "RA"} <= set(rows(capsys.readouterr().out))
    first = (folder / "defense_result.pt").read_bytes()
    (block,) = blocks_of("python", "docs/backdoorbench.md")
    block = block.replace('"fast_wfip", ', '"fine_tune", steps=2, force=True, progress=False, ')
    exec(compile(block, "docs/backdoorbench.md", "exec"), {"__name__": "docs"})
    assert (folder / "defense_result.pt").read_bytes()[:100] == first[:100]
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines[1].startswith("0,cifar10,resnet20,badnet,no defense,0.1,") and len(lines) == 3


def test_figures_that_stand_twice_in_the_results_are_the_same():
    """Where `make real` has written other ones into the tables, those beside the papers' have to follow."""
    text = (DOCS / "results.md").read_text()
    measured, _, papers = text.partition("## What the papers report")
    table = measured.partition("5% clean images:")[2].partition("1% clean images:")[0]
    column = [cell.strip() for cell in re.search(r"^\| ACC / ASR .*$", table, re.M)[0].split("|")]
    place = column.index("nad_cifar10_wrn16_1_badnets")
    for name in ("as received", "`ft_sam`", "`i_bau`", "`anp`"):
        here, there = (re.search(rf"^\| {name} .*$", part, re.M)[0].split("|") for part in (table, papers))
        assert here[place].strip() == there[-2].strip(), name


def test_attacks(capsys):
    torch.manual_seed(0)
    scope: dict = {"__name__": "docs"}
    blocks = blocks_of("python", "docs/attacks.md")
    for block in blocks:
        exec(compile(block, "docs/attacks.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert len(blocks) == 3 and "wanet" in printed and "badnets" in printed
    assert scope["triggered"].shape == (150, 32) and len(scope["places"]) == 4
    assert all(len(scope["changed"][i]["boxes"]) == 2 for i in scope["places"].tolist())


def test_report(tmp_path, monkeypatch):
    """The lines of docs/report.md, on a small model of a test; every name of a field that its table has is one."""
    import json

    import fastfip

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    clean = [(torch.rand(12, 3, 8, 8), torch.arange(12) % 3)]
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
    (block,) = blocks_of("python", "docs/report.md")
    block = block.replace("test_loader)", 'test_loader, method="fine_tune", steps=2, force=True)')
    scope = {"fastfip": fastfip, "model": model, "clean_loader": clean, "test_loader": clean}
    exec(compile(block, "docs/report.md", "exec"), scope)
    document = json.loads(Path("report.json").read_text())
    assert "<h1>Purification report</h1>" in Path("report.html").read_text()
    table = (DOCS / "report.md").read_text().partition("| section |")[2].partition("\n\n")[0]
    named = [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.rpartition(" | ")[2])]
    assert len(named) > 12 and set(named) - {"model"} <= set(document)


def test_data(capsys):
    (block,) = blocks_of("python", "docs/data.md")
    exec(compile(block, "docs/data.md", "exec"), {"__name__": "docs"})
    assert capsys.readouterr().out == "48 48\n"


def test_many(tmp_path):
    """The manifest of docs/many.md is one, and its table has every column."""
    (manifest,) = blocks_of("csv", "docs/many.md")
    (tmp_path / "m.csv").write_text(manifest)
    rows = read_manifest(tmp_path / "m.csv")
    assert len(rows) == 4 and rows[0].arch_args == '{"classes": 43}' and rows[3].method == "auto"
    table = (DOCS / "many.md").read_text().partition("| column |")[2].partition("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert set(re.findall(r"`(\w+)`", " ".join(cells))) == {field.name for field in dataclasses.fields(ManyRow)}


def test_contributing():
    (block,) = blocks_of("python", "CONTRIBUTING.md")
    scope: dict = {"__name__": "contributing"}
    exec(compile(block, "CONTRIBUTING.md", "exec"), scope)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 3))
    clean = torch.rand(24, 1, 6, 6), torch.arange(24) % 3
    after = purify(net, clean, scope["Biases"], epochs=1, progress=False).state_dict()
    before = net.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["1.bias"]
    triggered = scope["Stripe"](row=2).asr_set(*clean, target=0)[0]
    assert triggered.shape == (16, 1, 6, 6) and bool((triggered[..., 2, :] == 1).all())
