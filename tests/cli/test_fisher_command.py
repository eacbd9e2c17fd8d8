"""`fastfip fisher`: what it writes and prints, and how it ends."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from fastfip.checkpoint import load_checkpoint
from fastfip.cli import main
from fastfip.fisher import FisherDiagonal
from fastfip.testing.definitions import loop_diagonal, worst_error

ARCH = """
from torch import nn
def one():
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 1))
def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ELU(), nn.Flatten(), nn.Linear(64, 3))
def probabilities():
    return nn.Sequential(*net(), nn.Softmax(1))
"""
NET = ["--arch", "fisher_arch:net", "--data", "data.npz"]


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "fisher_arch.py").write_text(ARCH)
    scope: dict = {}
    exec(ARCH, scope)
    torch.manual_seed(0)
    model = scope["net"]().eval()
    torch.save(model.state_dict(), "in.pth")
    rng = np.random.default_rng(0)
    np.savez("data.npz", clean_x=rng.random((12, 3, 6, 6), dtype=np.float32), clean_y=np.arange(12) % 3)
    yield model
    sys.modules.pop("fisher_arch", None)


def images():
    with np.load("data.npz") as data:
        return torch.from_numpy(data["clean_x"]), torch.from_numpy(data["clean_y"])


def test_the_file_holds_the_diagonal(work, capsys):
    assert main(["fisher", "in.pth", "f.safetensors", *NET, "--batch-size", "5", "--json"]) == 0
    out, err = capsys.readouterr()
    said = json.loads(out)
    want = loop_diagonal(work, images(), 12)
    got = load_checkpoint("f.safetensors")
    assert err == "" and worst_error({k: got[k] for k in got}, want) < 1e-4
    assert said["n"] == 12 and said["kind"] == "empirical" and said["coverage"]["4.weight"] == "linear"
    assert said["trace"] == pytest.approx(float(sum(v.sum() for v in want.values())), rel=1e-4)
    assert said["traces"]["0.bias"] == pytest.approx(float(want["0.bias"].sum()), rel=1e-4)


def test_kinds_and_the_table(work, capsys):
    exact = ["--kind", "exact", "--limit", "4"]
    assert main(["fisher", "in.pth", "a.pth", *NET, *exact, "--top-k", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "in.pth" and lines[2].split()[:2] == ["0.weight", "4x3x3x3"] and "convolution" in lines[2]
    assert any(line.startswith("trace ") and "over 4 images, kind exact" in line for line in lines)
    assert main(["fisher", "in.pth", "b.pth", *NET, *exact]) == 0
    a, b = load_checkpoint("a.pth"), load_checkpoint("b.pth")
    assert worst_error({k: a[k] for k in a}, {k: b[k] for k in b}) < 1e-5
    assert main(["fisher", "in.pth", "c.pth", *NET, "--kind", "mc", "--limit", "4"]) == 0


def test_the_file_is_read_back_as_a_diagonal(work, capsys):
    assert main(["fisher", "in.pth", "f.safetensors", *NET, "--kind", "mc", "--limit", "4"]) == 0
    got = FisherDiagonal.load("f.safetensors")
    assert (got.n, got.kind, got.coverage["4.weight"]) == (4, "mc", "linear")


def test_likelihoods(work, capsys):
    assert main(["fisher", "in.pth", "a.pth", *NET, "--kind", "exact"]) == 0
    assert main(["fisher", "in.pth", "b.pth", *NET, "--kind", "exact", "--likelihood", "categorical"]) == 0
    a, b = load_checkpoint("a.pth"), load_checkpoint("b.pth")
    assert worst_error({k: b[k] for k in a}, {k: a[k] for k in a}) < 1e-5
    x, y = images()
    np.savez("two.npz", clean_x=x.numpy(), clean_y=(y == 0).long().numpy())
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 1))
    torch.save(model.state_dict(), "one.pth")
    net = ["--arch", "fisher_arch:one", "--data", "two.npz"]
    assert main(["fisher", "one.pth", "c.pth", *net, "--kind", "exact", "--likelihood", "bernoulli"]) == 0
    p = model(x).sigmoid().detach()
    want = (p * (1 - p) * x.flatten(1).square()).mean(0, keepdim=True)
    torch.testing.assert_close(load_checkpoint("c.pth")["1.weight"], want)
    capsys.readouterr()
    assert main(["fisher", "one.pth", "d.pth", *net, "--likelihood", "bernouli"]) == 5
    assert "did you mean 'bernoulli'" in capsys.readouterr().err


def test_a_softmax_inside_the_net(work, capsys):
    assert main(["fisher", "in.pth", "a.pth", *NET]) == 0
    assert main(["fisher", "in.pth", "b.pth", *NET[2:], "--arch", "fisher_arch:probabilities"]) == 0
    assert "softmax" in capsys.readouterr().out
    a, b = load_checkpoint("a.pth"), load_checkpoint("b.pth")
    assert worst_error({k: b[k] for k in a}, {k: a[k] for k in a}) < 1e-3


def test_errors(work, capsys):
    def fails(code, *arguments):
        assert main(["fisher", *arguments]) == code
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("fastfip: ") and err.count("\n") == 1
        return err

    assert "in.pth is the same file as IN" in fails(2, "in.pth", "in.pth", *NET)
    assert "kind must be" in fails(5, "in.pth", "f.pth", *NET, "--kind", "true")
    assert "top_k" in fails(5, "in.pth", "f.pth", *NET, "--top-k", "2")
    assert "suffix" in fails(4, "in.pth", "f.txt", *NET)
    torch.save(nn.Linear(2, 2).state_dict(), "f.pth")
    assert "--force" in fails(2, "in.pth", "f.pth", *NET)
    assert main(["fisher", "in.pth", "f.pth", *NET, "--force"]) == 0
