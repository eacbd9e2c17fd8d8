"""What a Fisher diagonal can do: arithmetic, files, elastic weight consolidation's penalty, merging."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from fastfip.errors import CheckpointError, ConfigError, ModelError
from fastfip.fisher import FisherDiagonal, fisher_diagonal, merge


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).eval()


def data(n):
    return torch.randn(n, 3), torch.randint(0, 2, (n,))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and vars(a) == vars(b)


def test_two_data_sets_together(net):
    (x, y), (u, v) = data(5), data(8)
    a, b = fisher_diagonal(net, (x, y)), fisher_diagonal(net, (u, v), kind="mc")
    both = a + b
    assert both.n == 13 and both.kind == "empirical, mc" and both.coverage == a.coverage
    torch.testing.assert_close(both["0.weight"], a["0.weight"] + b["0.weight"])
    pooled = (a * a.n + fisher_diagonal(net, (u, v)) * 8) * (1 / 13)
    whole = fisher_diagonal(net, [(x, y), (u, v)])
    torch.testing.assert_close(pooled.to_vector(), whole.to_vector())
    torch.testing.assert_close(sum([a, a]).to_vector(), (2 * a).to_vector())
    assert isinstance(torch.tensor(2.0) * a["0.bias"], torch.Tensor) and isinstance(
        a * torch.tensor(2.0), FisherDiagonal
    )


def test_other_parameters_cannot_be_added(net):
    a = fisher_diagonal(net, data(5))
    with pytest.raises(ConfigError, match=r"'3\.weight' is not the same"):
        a + fisher_diagonal(
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).eval(), data(5)
        )
    with pytest.raises(TypeError):
        a + 1
    with pytest.raises(TypeError):
        a * "2"


def test_the_vector_is_in_the_order_of_the_parameters(net):
    a = fisher_diagonal(net, data(5))
    torch.testing.assert_close(a.to_vector(), nn.utils.parameters_to_vector([a[n] for n, _ in net.named_parameters()]))


def test_saved_and_loaded(net, tmp_path):
    a = fisher_diagonal(nn.DataParallel(net), data(5), kind="exact")  # every name begins with "module."
    assert all(name.startswith("module.") for name in a)
    assert same(FisherDiagonal.load(a.save(tmp_path / "f.safetensors")), a)
    with pytest.raises(CheckpointError, match="safetensors"):
        a.save(tmp_path / "f.pth")
    torch.save(net.state_dict(), tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match="no Fisher diagonal"):
        FisherDiagonal.load(tmp_path / "net.pth")


def test_torch_loads_what_it_saved_weights_only_and_without_this_package(net, tmp_path):
    a = fisher_diagonal(net, data(5))
    torch.save(a, tmp_path / "f.pt")
    got = torch.load(tmp_path / "f.pt", weights_only=True)
    assert got.keys() == a.keys() and torch.equal(got["0.weight"], a["0.weight"])
    assert (got.n, got.kind, got.coverage) == (5, "empirical", a.coverage)
    code = f"f = torch.load({str(tmp_path / 'f.pt')!r}); assert f.n == 5 and 'fastfip' not in sys.modules"
    subprocess.run([sys.executable, "-c", f"import sys, torch; {code}"], check=True)


def test_copies_stay_what_they_are(net):
    a = fisher_diagonal(net, data(5))
    shallow, deep = copy.copy(a), copy.deepcopy(a)
    assert same(shallow, a) and same(deep, a) and type(deep) is FisherDiagonal
    assert shallow["0.bias"] is a["0.bias"] and deep["0.bias"] is not a["0.bias"]


def test_the_penalty_of_elastic_weight_consolidation(net):
    a = fisher_diagonal(net, data(5))
    ewc = a.penalty(net)
    assert ewc() == 0
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))
    ewc().backward()
    want = sum((a[name] * (p.detach() - before[name]) ** 2).sum() for name, p in net.named_parameters()) / 2
    torch.testing.assert_close(ewc().detach(), want)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, a[name] * (p.detach() - before[name]))
    torch.testing.assert_close(ewc(copy.deepcopy(net)).detach(), want)
    with pytest.raises(ModelError, match="not this model's"):
        a.penalty(nn.Linear(3, 2))


def test_merging_takes_each_parameter_from_the_model_that_needs_it(net):
    other = copy.deepcopy(net)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    a, b = fisher_diagonal(net, data(5)), fisher_diagonal(other, data(5))
    merged, start = merge([net, other], [a, b]), copy.deepcopy(net.state_dict())
    for name, p in merged.named_parameters():
        f, g = a[name] + 1e-8, b[name] + 1e-8
        want = (f * net.get_parameter(name) + g * other.get_parameter(name)) / (f + g)
        torch.testing.assert_close(p, want)
    assert all(torch.equal(start[k], v) for k, v in net.state_dict().items())
    only = merge([net, other], [a, b], weights=[0, 1])
    torch.testing.assert_close(only.get_parameter("3.weight"), other.get_parameter("3.weight"))
    with pytest.raises(ConfigError, match="one for each model"):
        merge([net, other], [a])
    with pytest.raises(ConfigError, match="floor"):
        merge([net, other], [a, b], floor=0)
    with pytest.raises(ModelError, match="not this model's"):
        merge([net, nn.Linear(3, 2)], [a, b])


def test_tensors_in_place_of_names_are_one_short_line(net):
    with pytest.raises(ModelError) as error:
        fisher_diagonal(net, data(5), params=net[0].parameters())
    assert "named_parameters" in str(error.value) and len(str(error.value)) < 200 and "\n" not in str(error.value)
