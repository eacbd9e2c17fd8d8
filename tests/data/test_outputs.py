import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfip
from fastfip.data import Task
from fastfip.data.outputs import logits_task
from tests.support.small_nets import data, plain_net

X, Y = data(8)


class Ends(nn.Module):
    """A net whose logits end in `end`."""

    def __init__(self, end):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.end = plain_net(), end

    def forward(self, x):
        return self.end(self.net(x))


def found(model, task=None):
    task = Task() if task is None else task
    return logits_task(model, task, (X, Y), task.forward(model, (X, Y)).detach())


ENDS = {
    "module": nn.Softmax(-1),
    "functional": lambda z: F.softmax(z, dim=1),
    "functional_by_name": lambda z: F.softmax(input=z, dim=1),
    "function": lambda z: torch.softmax(z, 1),
    "method": lambda z: z.softmax(1),
    "special": lambda z: torch.special.softmax(z, 1),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=list(ENDS))
def test_what_goes_into_the_softmax_is_taken(end):
    model = Ends(end)
    task, said = found(model)
    assert "what goes into it" in said
    assert torch.equal(task.forward(model, (X, Y)), model.net(X))
    assert torch.equal(task.forward(model, (X[:3], Y[:3])), model.net(X[:3]))
    loss = task.loss(task.forward(model, (X, Y)), (X, Y))
    assert torch.equal(loss, F.cross_entropy(model.net(X), Y, reduction="none"))


ELSEWHERE = {
    "arithmetic_after_it": lambda z: z.softmax(1) * 1.0,
    "no_softmax": lambda z: z.exp() / z.exp().sum(1, keepdim=True),
    "a_mean_of_two": lambda z: (z.softmax(1) + z.flip(1).softmax(1)) / 2,
}


@pytest.mark.parametrize("end", ELSEWHERE.values(), ids=list(ELSEWHERE))
def test_probabilities_from_elsewhere_give_their_logarithm(end):
    model = Ends(end)
    task, said = found(model)
    assert "logarithm" in said
    assert torch.equal(task.forward(model, (X, Y)), model(X).log())


@pytest.mark.parametrize("way", ["scripted", "compiled"])
def test_code_that_cannot_be_watched_gives_the_logarithm(way):
    model = Ends(nn.Softmax(1))
    received = torch.jit.trace(model, X) if way == "scripted" else torch.compile(model, backend="eager")
    task, said = found(received)
    assert "logarithm" in said
    torch.testing.assert_close(task.forward(received, (X, Y)), model(X).log())


def test_logits_stay_as_they_are():
    model, task = Ends(nn.Identity()), Task()
    assert found(model, task) == (task, None)
    attention = Ends(lambda z: (z[:, :, None] * z[:, :, None].softmax(1))[:, :, 0])  # a softmax inside, none at the end
    assert found(attention, task) == (task, None)
    hooked = Task.of(lambda net, batch: net(batch[0]))
    assert found(Ends(nn.Softmax(1)), hooked) == (hooked, None)


def test_the_hooks_of_the_task_are_kept():
    model, loss = Ends(nn.Softmax(1)), lambda logits, batch: logits.sum(1)
    task, _ = found(model, Task.of(loss=loss))
    assert task.loss_hook is loss and torch.equal(task.forward(model, (X, Y)), model.net(X))


def test_a_branch_that_is_taken_for_other_inputs_falls_back_to_the_logarithm():
    model = Ends(lambda z: z.softmax(1) if len(z) > 2 else z.softmax(1) * 1.0)
    task, _ = found(model)
    assert torch.equal(task.forward(model, (X[:2], Y[:2])), model(X[:2]).log())


def test_derivatives_of_a_net_that_is_sure_of_itself():
    """In logarithms a probability of 0 has no gradient, and a small one a second derivative that overflows."""
    model = Ends(nn.Softmax(1))
    with torch.no_grad():
        model.net[-1].weight.mul_(300)
    exact = copy.deepcopy(model)
    exact.end = nn.Identity()
    task, _ = found(model)

    def derivatives(net, how):
        x = X.clone().requires_grad_(True)
        loss = how.loss(how.forward(net, (x, Y)), (x, Y)).mean()
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return slope.detach(), torch.autograd.grad(slope.square().sum(), x)[0]

    for mine, right in zip(derivatives(model, task), derivatives(exact, Task())):
        assert torch.equal(mine, right) and right.isfinite().all() and right.abs().max() > 0


def test_bfloat16_keeps_the_gradient_of_a_sure_answer():
    model = Ends(nn.Softmax(1))
    task, _ = found(model)
    with torch.no_grad():
        model.net[-1].weight.mul_(60)
    y = model(X).argmax(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task.loss(task.forward(model, (X, y)), (X, y))
    sure = (model(X).amax(1) > 0.9985) & (model(X).amax(1) < 0.99999)
    assert sure.any() and (loss[sure] > 0).all()


class Masked(nn.Module):
    """Its last class is masked."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        masked = torch.tensor([False, False, False, True])
        return self.net(x).masked_fill(masked, -torch.inf).softmax(1)


def test_a_masked_class_leaves_every_term_finite() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(40, 3, 8, 8), torch.arange(40) % 3
    result = fastfip.purify(Masked(), (x, y), "fast_wfip", steps=10, progress=False)
    assert not any("not finite" in note for note in result.notes)
    assert any("kl" in r for r in result.history) and any("worst_case_loss" in r for r in result.history)


@pytest.mark.parametrize("where", ["result", "input"])
def test_arithmetic_in_place_is_seen(where: str) -> None:
    class Changed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = x + 1
            p = z.softmax(1)
            if where == "result":
                return p.mul_(0.5).add_(0.125)
            z.zero_()
            return p

    model, batch = Changed(), (torch.randn(5, 4), torch.zeros(5, dtype=torch.int64))
    task, _ = logits_task(model, Task(), batch, model(batch[0]))
    torch.testing.assert_close(task.forward(model, batch).softmax(1), model(batch[0]))
