"""`trace_way` of the method fip: the same step by every way, said in the result."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastfip.errors import ConfigError
from fastfip.methods.fip import FIP, FastFIPConfig, FIPConfig
from fastfip.testing.definitions import relative_error
from tests.methods.test_fip import loop_objective
from tests.support.fip_runs import data, make_run


@pytest.mark.parametrize("way", ["auto", "exact", "perturb"])
def test_the_step_is_that_of_a_per_sample_loop(way):
    torch.manual_seed(0)
    x, y = data()
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 6), nn.GELU(), nn.Linear(6, int(y.max()) + 1))
    model = model.to(x.dtype).eval()
    anchor = copy.deepcopy(model)
    run, method = (
        make_run(FIPConfig(eta_f=0.3, eta_r=0.0, trace_way=way, bn_mode="eval"), model),
        FIP(),
    )
    method.setup(run)
    model.zero_grad()
    method.backward(run, (x, y))
    want = torch.autograd.grad(loop_objective(model, anchor, x, y, 0.3, 0.0), list(model.parameters()))
    plain = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    for p, e, without in zip(model.parameters(), want, plain):
        assert relative_error(p.grad, e) < (1e-4 if way == "perturb" else 1e-8)
        assert relative_error(without, e) > 1e-3
    used = "perturb" if way == "perturb" else "exact"
    assert any(note.startswith(f"gradient of the Fisher trace: {used}") for note in run.notes)


def test_fast_fip_has_a_trace_of_its_own():
    with pytest.raises(ConfigError, match="trace_way"):
        FastFIPConfig(trace_way="signs")
