"""The benchmark of the search: what it compares with, and what it says where it cannot run. No ImageNet is needed."""

import subprocess
import sys

import torch
from torch import nn

from benchmarks import harness
from benchmarks.purification import bench_search
from fastfip.data.task import Task
from fastfip.worst_case import universal


def test_the_passes_it_compares_with_are_those_of_a_step(monkeypatch):
    x, y, seen = torch.rand(10, 3, 4, 4), torch.arange(10), []
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 20)).requires_grad_(False)
    net.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    monkeypatch.setattr(universal, "PASS_BYTES", 4 * x[0].nbytes)
    bench_search.passes(net, x, y + 1)
    mine = list(seen)
    seen.clear()
    universal.Perturbations.of(x, 20, torch.Generator()).improve(net, Task(), (x, y), y + 1)
    assert mine == seen == [4, 3, 3]


def test_without_its_packages_or_images_it_is_skipped(tmp_path):
    command = [sys.executable, "-m", "benchmarks.purification.bench_search"]
    done = subprocess.run(
        command, cwd=harness.ROOT, env={"FASTFIP_DATA": str(tmp_path), "PATH": ""}, text=True, capture_output=True
    )
    assert done.returncode == 0 and done.stdout.startswith("skipped: "), done.stderr


def test_the_table_is_that_of_the_rows():
    assert bench_search.show() in (harness.DOCS / "performance.md").read_text()
