"""The Fisher of networks that other people trained, against a loop over samples."""

import pytest
import torch

from benchmarks.purification import real_data
from fastfip.fisher import fisher_diagonal, fisher_trace
from fastfip.testing.definitions import loop_diagonal, loop_trace, worst_error


@pytest.mark.skipif(not real_data.available(), reason="no ../shared/data (FASTFIP_DATA)")
@pytest.mark.parametrize("name", [n for n in real_data.names() if "erased" not in n])
def test_real_networks(name):
    """The received nets, on images like theirs: the diagonal, and the gradient of the trace, to 1e-8."""
    model = real_data.load_model(name).double()
    if name == "badnets_mnist":  # it ends in a softmax, and the definitions here take outputs for logits
        model.fc2 = model.fc2[0]
    size = (1, 28, 28) if "mnist" in name else (3, 32, 32)
    torch.manual_seed(0)
    x, y = torch.rand(3, *size, dtype=torch.float64), torch.randint(0, 10, (3,))
    assert worst_error(fisher_diagonal(model, (x, y)), loop_diagonal(model, (x, y), 3), 1e-12) < 1e-8
    params = dict(model.named_parameters())
    mine, theirs = (
        dict(zip(params, torch.autograd.grad(value, list(params.values()))))
        for value in (fisher_trace(model, x, y), loop_trace(model, (x, y), 3))
    )
    assert worst_error(mine, theirs, 1e-12) < 1e-8
