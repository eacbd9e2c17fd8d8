"""What every test file may use."""

import gc
import os

# Before torch: two workers share two cores, and sums must not depend on how many threads there are.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.support.short_search import one_short_search, short_search  # noqa: F401

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

for device in (torch.cuda, torch.xpu, torch.mtia):
    if not device.is_available():
        # Else torch keeps every seed, with a printed stack, until the device is there: 2 ms for each device.
        device.manual_seed_all = lambda seed: None

# Workers of a loader that an error has ended do not end by themselves: torch waits for each of them, else for 5 s.
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5


# Folders whose tests train or multiply, and files of others: what they find must not hang on the rounding of one CPU.
# Of the command line the demo alone: the others ask for words, files, exit codes. Comparisons say what `purify` says.
NUMERIC = {
    "attacks", "auditing", "fisher", "methods", "metrics", "ops", "purification", "spectral",
    "worst_case", "test_demo", "test_doc_examples", "test_outputs", "test_released_fip",
}  # fmt: skip
# What compiles for another machine, or runs CUDA code thread by thread, has no instruction set of this CPU in it.
# Several processes, and models in parts, add up what one process multiplies, with the kernels that other tests run.
ELSEWHERE = {"test_triton", "test_parts", "test_ranks", "test_ranks_in_parts", "test_ranks_of_texts", "test_sharded"}


def pytest_collectstart():
    """The same weights in what a file builds while it is imported: parameters of tests, constants.

    Next to nothing of what is imported is garbage, so that none is looked for.
    """
    gc.disable()
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """Mark the tests of `NUMERIC`."""
    for item in items:
        name = item.path.stem
        if NUMERIC & {name, item.path.parent.name} and name not in ELSEWHERE and not name.startswith("test_cuda_"):
            item.add_marker("numeric")


def pytest_collection_finish():
    """What is imported stays: it is not looked through again in each collection of garbage."""
    gc.enable()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    """The same numbers in every run and every order of the tests."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def untrained_models_pass(request, monkeypatch):
    """Most tests purify models that never learned anything, as if with `force=True`; those marked `fit` do not."""
    if request.node.get_closest_marker("fit") is None:
        from fastfip.purification import tuning

        check = tuning.check_fit
        monkeypatch.setattr(tuning, "check_fit", lambda *arguments: check(*arguments[:-1], force=True))


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
