"""A folder that was downloaded may hold packages with the names of dependencies: none of them is ever run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    "PIL",
    "safetensors",
    "rich",
    "matplotlib",
    "typer",
    "yaml",
    "numpy",
    "torch",
    "zipfile",
    "json",
    "pickletools",
]
NETS = """
import torch
from torch import nn

def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
"""
RUN = """
import sys
from fastfip.cli import main
sys.stdout.isatty = lambda: True
code = main(sys.argv[1:])
import matplotlib, yaml  # what a later command would import
sys.exit(code)
"""


@pytest.fixture
def downloaded(tmp_path):
    """A folder with an architecture, weights, images, and packages that nobody asked for."""
    folder = tmp_path / "downloaded"
    for name in NAMES:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\n")
    info = folder / "planted-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fastfip.methods]\nplanted = yaml:Nothing\n")
    (folder / "nets.py").write_text(NETS)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, folder / "w.safetensors")
    from PIL import Image

    for label in "ab":
        (folder / "images" / label).mkdir(parents=True)
        for i in range(4):
            picture = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy()
            Image.fromarray(picture).save(folder / "images" / label / f"{i}.png")
    return folder


def run(start, folder, arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*start, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("start", "command"), [("script", "evaluate"), ("-m", "evaluate"), ("script", "methods")])
def test_planted_packages_are_not_run(downloaded, tmp_path, start, command):
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "fastfip"
    script.write_text(RUN)
    arguments = [command]
    if command == "evaluate":
        arguments += ["w.safetensors", "--arch", "nets:small", "--test-data", "images"]
    done = run([sys.executable, *([str(script)] if start == "script" else ["-m", "fastfip"])], downloaded, arguments)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()
    assert "planted" not in done.stdout + done.stderr


def test_what_is_planted_would_run(downloaded, tmp_path):
    """What the test above would see: a process that searches the folder first."""
    run([sys.executable, "-c", "import yaml"], downloaded, [])
    assert (tmp_path / "ran").read_text() == "yaml"
