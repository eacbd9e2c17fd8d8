"""Checkpoints that torch goes backward through only once (selective, composable): kept for a pass, or one line."""

import functools
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastfip
from fastfip.errors import ModelError
from fastfip.fisher import backward_with_fisher, fisher_diagonal, fisher_trace
from fastfip.fisher.sharpness import sharpness
from fastfip.nets.process import checkpoints_kept, keeping_activations
from fastfip.testing.definitions import loop_diagonal, worst_error

N = 6


def policy(_, operation, *args, **kwargs):
    saved = operation is torch.ops.aten.addmm.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.runs = nn.Linear(4, 6), nn.Linear(6, 6), []

    def forward(self, x):
        self.runs.append(threading.get_ident())
        return torch.tanh(self.b(torch.tanh(self.a(x))))


class Net(nn.Module):
    def __init__(self, selective=False):
        super().__init__()
        self.block, self.head, self.selective = Block(), nn.Linear(6, 3), selective

    def forward(self, x):
        if not self.selective:
            return self.head(self.block(x))
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return self.head(checkpoint(self.block, x, use_reentrant=False, context_fn=contexts))


def composable():
    module = pytest.importorskip("torch.distributed._composable", reason="torch is built without distributed")
    net = Net()
    module.checkpoint(net.block)
    return net


KINDS = {"selective": lambda: Net(selective=True), "composable": composable}


@pytest.fixture(params=KINDS)
def setting(request):
    """A checkpointed model, the same without, and data."""
    torch.manual_seed(0)
    model, plain = KINDS[request.param]().double().eval(), Net().double().eval()
    plain.load_state_dict(model.state_dict())
    return model, plain, torch.randn(N, 4, dtype=torch.float64), torch.arange(N) % 3


def test_diagonal_trace_and_sharpness_are_those_without_checkpoints(setting):
    model, plain, x, y = setting
    want = loop_diagonal(plain, (x, y), N)
    for data in ([(x, y)], [(x[:4], y[:4]), (x[4:], y[4:])]):
        assert worst_error(fisher_diagonal(model, data), want) < 1e-12
    total = sum(float(value.sum()) for value in want.values())
    with torch.no_grad():
        assert float(fisher_trace(model, x, y)) == pytest.approx(total)
    traces = [(fisher_trace(net, x, y), net) for net in (model, plain)]
    torch.testing.assert_close(*(torch.autograd.grad(trace, list(net.parameters())) for trace, net in traces))
    options = {"iterations": 2, "probes": 2}
    found, right = (sharpness(net, [(x, y)], **options).to_dict() for net in (model, plain))
    assert found == pytest.approx(right)


def test_a_graph_that_can_be_read_once_is_one_line(setting):
    model, _, x, y = setting
    with pytest.raises(ModelError, match=r"^a part of the model is checkpointed .*: turn the checkpointing off"):
        backward_with_fisher(F.cross_entropy(model(x), y, reduction="none"), model)


def test_purification_works_or_is_one_line(setting):
    model, plain, x, y = setting
    results = [fastfip.purify(net, (x, y), "fip", steps=2, progress=False, force=True) for net in (model, plain)]
    torch.testing.assert_close(*(result.state_dict() for result in results))
    with pytest.raises(ModelError, match="gradient checkpointing cannot follow: turn it off"):
        fastfip.purify(model, (x, y), "fast_wfip", steps=2, progress=False, force=True)


class Checkpointed(Net):
    """As models of libraries do it, where `reentrant` is not None."""

    reentrant = None

    def forward(self, x):
        if self.reentrant is None:
            return super().forward(x)
        return self.head(checkpoint(self.block, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("method", ["fast_wfip", "fisher_steps"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_plain_gradient_checkpointing_changes_no_purification(method, reentrant):
    torch.manual_seed(0)
    net, data = Checkpointed().double(), (torch.randn(N, 4, dtype=torch.float64), torch.arange(N) % 3)
    plain = fastfip.purify(net, data, method, steps=2, progress=False, force=True).state_dict()
    net.reentrant = reentrant
    result = fastfip.purify(net, data, method, steps=2, progress=False, force=True)
    torch.testing.assert_close(result.state_dict(), plain)
    assert not torch.equal(plain["head.weight"], net.head.weight) and result.model.reentrant is reentrant


def test_checkpoints_that_are_switched_on_later_have_the_diagonal_and_the_trace_of_the_model():
    """What is known of the graph without them is not taken for theirs, which looks the same and can be read once."""
    torch.manual_seed(0)
    net, data = Checkpointed().double().eval(), (torch.randn(N, 4, dtype=torch.float64), torch.arange(N) % 3)
    net.block = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh()).double().eval()
    want = loop_diagonal(net, data, N)
    for reentrant in (None, False, None, False):
        net.reentrant = reentrant
        assert worst_error(fisher_diagonal(net, [data]), want) < 1e-12
        with torch.no_grad():
            assert float(fisher_trace(net, *data)) == pytest.approx(sum(float(value.sum()) for value in want.values()))


def test_a_fault_of_the_models_own_is_not_taken_for_one_of_checkpointing():
    def broken(h):
        raise ValueError("mine")

    net = Net()
    net.block.forward = broken
    with pytest.raises(ValueError, match="mine"):
        fastfip.purify(net, (torch.randn(N, 4), torch.arange(N) % 3), "fine_tune", forward=lambda m, b: checkpoint(
            m.block, b[0], use_reentrant=False), progress=False)  # fmt: skip


def test_another_thread_goes_on_checkpointing_and_is_not_counted():
    block, x = Block(), torch.randn(2, 4)
    before = checkpoints_kept()

    def theirs():
        checkpoint(block, x, use_reentrant=False).sum().backward()

    with keeping_activations():
        other = threading.Thread(target=theirs)
        other.start()
        other.join()
        assert len(block.runs) == 2 and checkpoints_kept() == before
        checkpoint(block, x, use_reentrant=False).sum().backward()
    assert len(block.runs) == 3 and checkpoints_kept() == before + 1


def test_what_others_put_in_torchs_place_is_there_again_afterwards(monkeypatch):
    real, calls = torch.utils.checkpoint._checkpoint_without_reentrant_generator, []

    def counted(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.utils.checkpoint, "_checkpoint_without_reentrant_generator", counted)
    with keeping_activations(every=False):
        checkpoint(Block(), torch.randn(2, 4), use_reentrant=False).sum().backward()
    assert calls and torch.utils.checkpoint._checkpoint_without_reentrant_generator is counted
