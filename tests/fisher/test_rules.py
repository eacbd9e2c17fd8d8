"""Every rule, option and use against a loop over samples, in float64: diagonal, trace, gradient of the trace."""

import pytest
import torch

from fastfip.fisher import fisher_diagonal, fisher_trace
from fastfip.fisher.graph.recipe import RULES
from fastfip.testing.definitions import loop_diagonal, loop_trace, worst_error
from tests.support.fisher_problems import LAYERS, ONLY_FUSED, N, build
from tests.support.fisher_uses import USES

PROBLEMS = {**LAYERS, **USES}


def hooks(task):
    return {"loss": task.loss_hook, "forward": task.forward_hook}


def gradients(value, model):
    params = dict(model.named_parameters())
    got = torch.autograd.grad(value, list(params.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(params.items(), got)}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", PROBLEMS)
def test_diagonal(name):
    problem = build(PROBLEMS[name])
    want = loop_diagonal(problem.model, problem.batch, N, problem.task)
    got = fisher_diagonal(problem.model, problem.batch, **hooks(problem.task))
    assert worst_error(got, want, 1e-10) < 1e-10
    assert got.n == N and set(got.coverage) == set(got)
    slower = {k for k, how in got.coverage.items() if "loop" in how or "one sample" in how}
    assert not {k for k in slower if not any(part in k for part in problem.slow)}, got.coverage
    for part in problem.slow:
        assert any(part in k for k in slower), f"{part} is covered by a rule now: take it from the list"


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", [name for name in PROBLEMS if name not in ONLY_FUSED])
def test_trace_and_its_gradient(name):
    problem = build(PROBLEMS[name])
    want = loop_trace(problem.model, problem.batch, N, problem.task)
    got = fisher_trace(problem.model, problem.batch, **hooks(problem.task))
    assert abs(got - want) <= 1e-10 * want
    assert worst_error(gradients(got, problem.model), gradients(want, problem.model), 1e-10) < 1e-8
    with torch.no_grad():
        alone = fisher_trace(problem.model, problem.batch, **hooks(problem.task))
    assert not alone.requires_grad and abs(alone - want) <= 1e-10 * want


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", PROBLEMS)
def test_float32_is_as_good_as_torch_itself(name):
    """Summed over draws: in one of them a few roundings that cancel, on one side alone, are a factor of two."""
    ours = theirs = 0.0
    for seed in range(4):
        problem = build(PROBLEMS[name], seed=seed)
        want = loop_diagonal(problem.model, problem.batch, N, problem.task)
        x, *rest = problem.batch
        batch, model = (x.float() if x.is_floating_point() else x, *rest), problem.model.float()
        loop = worst_error(loop_diagonal(model, batch, N, problem.task), want, 1e-6)
        theirs += max(loop, torch.finfo(torch.float32).eps)
        ours += worst_error(fisher_diagonal(model, batch, **hooks(problem.task)), want, 1e-6)
    assert ours <= 2 * theirs, (ours, theirs)


def used_rules():
    """The names of the operations that the problems above go through."""
    seen = set()
    for make in PROBLEMS.values():
        problem = build(make)
        logits = problem.task.forward(problem.model, problem.batch)
        stack, done = [logits.grad_fn], set()
        while stack:
            node = stack.pop()
            if node is None or node in done:
                continue
            done.add(node)
            seen.add(node.name())
            stack += [below for below, _ in node.next_functions]
    return seen


NOT_ON_A_CPU = {
    "ConvolutionOverrideableBackward0",
    "CudnnBatchNormBackward0",
    "MiopenBatchNormBackward0",
    "FusedRmsNormBackward0",
}


def test_every_rule_has_a_problem():
    of_torch = {name for name in RULES if not name.startswith("_")}  # our own operations have tests where they are made
    assert of_torch - used_rules() <= NOT_ON_A_CPU
