"""The backend for laplace-torch gives the diagonal of its own backend."""

import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastfip.fisher.laplace as module


def test_without_laplace_torch_it_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name == "laplace" or name.startswith("laplace.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "laplace", None)
    monkeypatch.delitem(vars(module), "FisherGGN", raising=False)
    with pytest.raises(ImportError, match="pip install laplace-torch"):
        _ = module.FisherGGN


def problem(likelihood):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
    y = torch.randn(10, 4) if likelihood == "regression" else torch.randint(0, 4, (10,))
    return model, DataLoader(TensorDataset(torch.randn(10, 3), y), batch_size=4)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("part", ["all", "last_layer"])
def test_the_curvature_is_that_of_its_own_backend(likelihood, part):
    laplace = pytest.importorskip("laplace", reason="no laplace-torch (pip install laplace-torch)")
    from fastfip.fisher.laplace import FisherGGN

    model, loader = problem(likelihood)
    fitted = []
    for backend in (None, FisherGGN):
        options = {} if backend is None else {"backend": backend}
        la = laplace.Laplace(model, likelihood, subset_of_weights=part, hessian_structure="diag", **options)
        la.fit(loader)
        fitted.append(la)
    own, ours = fitted
    torch.testing.assert_close(ours.H, own.H, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.loss, own.loss)
    torch.testing.assert_close(ours.log_marginal_likelihood(), own.log_marginal_likelihood())


def test_labels_drawn_from_the_model_give_it_on_average():
    laplace = pytest.importorskip("laplace", reason="no laplace-torch (pip install laplace-torch)")
    from fastfip.fisher.laplace import FisherGGN

    model, loader = problem("classification")
    exact, drawn = (
        laplace.Laplace(
            model, "classification", subset_of_weights="all", hessian_structure="diag", backend=FisherGGN,
            backend_kwargs=options,
        )
        for options in ({}, {"stochastic": True, "num_samples": 300})
    )  # fmt: skip
    exact.fit(loader), drawn.fit(loader)
    assert (drawn.H - exact.H).norm() < 0.15 * exact.H.norm()
