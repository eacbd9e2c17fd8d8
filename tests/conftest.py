"""What every test file may use."""

import os

# Before torch: two workers share two cores, and sums must not depend on how many threads there are.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


# Folders and files whose tests train or multiply: what they find must not hang on the rounding of one CPU.
NUMERIC = {
    "ops", "fisher", "spectral", "methods", "test_audit", "test_compare", "test_curvature", "test_demo", "test_metrics",
    "test_native_grad_norm_squared", "test_native_isa", "test_native_sum_grad_squared", "test_purify", "test_softmax",
    "test_training", "test_worst_case",
}  # fmt: skip


def pytest_collection_modifyitems(items):
    """Mark the tests of `NUMERIC`."""
    for item in items:
        if NUMERIC & {item.path.stem, item.path.parent.name}:
            item.add_marker("numeric")


@pytest.fixture(autouse=True)
def seed():
    """The same numbers in every run and every order of the tests."""
    torch.manual_seed(0)


@pytest.fixture
def nan_empty(monkeypatch):
    """Fill what torch.empty and its kind return with NaN (integers: the largest value): an unwritten element shows."""

    def filled(function):
        def call(*args, **kwargs):
            out = function(*args, **kwargs)
            if out.is_floating_point() or out.is_complex():
                return out.fill_(float("nan"))
            return out if out.dtype == torch.bool else out.fill_(torch.iinfo(out.dtype).max)

        return call

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, filled(getattr(torch.Tensor, name)))
