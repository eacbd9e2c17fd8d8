"""The Fisher functions on models of which each process has a part: the values of one process, in the parts' layout."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastfip
from fastfip.errors import ConfigError, ModelError
from fastfip.fisher import FisherDiagonal, fisher_diagonal, fisher_trace, squared_norms
from fastfip.nets import shards
from fastfip.spectral import SpectralShifts
from tests.support.processes import in_processes
from tests.support.sharded import SHARDINGS, OfParts, sharded, whole

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not hasattr(os, "fork"), reason="needs gloo and fork"),
    pytest.mark.filterwarnings("ignore"),
]

N = 23
PARTS = (slice(0, 17), slice(17, N))  # four batches of 5 or fewer, and two: the last ones have 2 samples and 1


def net(special=None):
    """A net whose first layer has an odd number of rows, for parts of two sizes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 7, 3, padding=1), nn.BatchNorm2d(7), nn.ReLU(), nn.Flatten(), nn.Linear(112, 6), nn.LayerNorm(6),
        nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip
    if special == "normed":  # its weight is made of others: one sample after the other
        nn.utils.parametrizations.weight_norm(model[6])
    if special == "16 bits":  # torch's BatchNorm does not take them on a CPU where the statistics are float32
        model[1] = nn.Identity()
    if special == "checkpointed":  # its hooks and notes are of torch.distributed as well, and stay
        model[0] = checkpoint_wrapper(model[0])
    if special == "tied":
        model[8] = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
        model[8][0].weight = model[6].weight
    return model.eval()


def samples():
    return torch.randn(N, 3, 4, 4, generator=torch.Generator().manual_seed(1)), torch.arange(N) % 3


def batches(part):
    x, y = samples()
    return list(zip(x[part].split(5), y[part].split(5)))


def layouts(tensors):
    """How tensors are laid out over the processes, None for those that are whole."""
    return {name: getattr(t, "placements", None) for name, t in tensors.items()}


def most_at_once():
    """Return the share of a model's weights that a rank had whole at once, at most, while the diagonal was taken."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 48), *(nn.Linear(48, 48) for _ in range(5))).eval()
    for layer in model[1:]:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    numbers, most = sum(p.numel() for p in model.parameters()), 0

    def note(*_):
        nonlocal most
        whole_ones = [p.numel() for p in model.parameters() if not hasattr(p, "placements")]
        most = max(most, sum(whole_ones))

    for layer in model[1:]:
        layer.register_forward_hook(note)
        layer.register_full_backward_hook(note)
    fisher_diagonal(model, [samples()], group="auto")
    return most / numbers


#: What is taken of which model: how it is sharded, the kind of the Fisher and other options, and whether all weights
#: are gathered for it.
CASES = {
    "units": ("fsdp", {}, False),
    "a unit, and a rest that is whole": ("a part of it", {}, False),
    "some parameters": ("fsdp", {"params": ["4.weight", "5.bias"]}, False),
    "a temperature": ("fsdp", {"temperature": 2.0}, False),
    "drawn labels": ("fsdp", {"kind": "mc", "sample": lambda outputs, batch, generator: outputs.argmax(1)}, False),
    "all labels": ("fsdp", {"kind": "exact"}, True),
    "tied": ("fsdp", {}, False),
    "normed": ("fsdp", {}, True),
    "checkpointed": ("fsdp", {"kind": "exact"}, True),
    "tensor parallel": ("tensor parallel", {}, True),
}


def measured(rank, case):
    how, options, _ = CASES[case]
    made, copied, model = [], shards.copied, sharded(net(case), how)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(shards, "copied", lambda *args: made.append(1) or copied(*args))
        got = fisher_diagonal(model, batches(PARTS[rank]), group="auto", **options)
    own = dict(model.named_parameters())
    assert layouts(got) == layouts({name: own[name] for name in got})
    local = {name: getattr(t, "to_local", lambda t=t: t)() for name, t in got.items()}
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in local.values())  # no view of a whole one
    return whole(got), got.n, got.coverage, len(made)


def penalised(fisher, model):
    """Return the penalty of a model that has moved away; its gradient is in the parameters."""
    penalty = fisher.penalty(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    cost = penalty()
    cost.backward()
    return cost.detach()


def others(rank, folder):
    """What else is done with a sharded model and its diagonal."""
    x, y = samples()
    part, model = PARTS[rank], sharded(net(), "fsdp")
    said = {"layout": layouts(dict(model.named_parameters()))}
    fisher = fisher_diagonal(model, batches(part), group="auto")
    said["trace of the diagonal"] = float(fisher.trace())
    said["vector"] = fisher.to_vector()
    if rank == 0:
        fisher.save(folder / "fisher.safetensors")
    else:
        fisher.save(folder / "other.safetensors")
    cost = penalised(fisher, model)
    said["penalty"] = float(cost), whole({name: p.grad for name, p in model.named_parameters()})
    model = sharded(net(), "fsdp")
    model(x).sum().backward()  # leaves weights of the root whole
    model.zero_grad()
    trace = fisher_trace(model, x[part], y[part], group="auto")
    trace.backward()
    said["trace"] = float(trace.detach()), whole({name: p.grad for name, p in model.named_parameters()})
    said["only one"] = [name for name, p in _of_one(model, x[part], y[part]).items() if p is not None]
    model.zero_grad()
    model(x).sum().backward()
    said["training"] = whole({name: p.grad for name, p in model.named_parameters()})
    said["16 bits"] = whole(fisher_diagonal(sharded(net("16 bits"), "16 bits"), batches(part), group="auto"))
    return said


def _of_one(model, x, y):
    model.zero_grad()
    fisher_trace(model, x, y, params=["8.bias"], group="auto").backward()
    return {name: p.grad for name, p in model.named_parameters()}


def refusals(rank):
    (x, y), model, said = samples(), sharded(net(), "fsdp"), {}

    def told(name, kind, call):
        with pytest.raises(kind) as error:
            call()
        said[name] = str(error.value)

    told("diagonal alone", ConfigError, lambda: fisher_diagonal(model, [(x, y)]))
    told("trace alone", ConfigError, lambda: fisher_trace(model, x, y))
    told("tensors", ConfigError, lambda: fisher_trace(model, x, y, params=dict(model.named_parameters()), group="auto"))
    told("shifts", ModelError, lambda: SpectralShifts.of(model))
    told("penalty", ModelError, lambda: fastfip.FisherPenalty(model)(x, y))
    params = dict(model.named_parameters())
    told("norms", ModelError, lambda: squared_norms(nn.functional.cross_entropy(model(x), y, reduction="none"), params))
    model.train()
    told("train", ModelError, lambda: fisher_diagonal(model, [(x, y)], group="auto"))
    model.eval()
    odd = OfParts(48, 3).parallelised()
    told("diagonal of parts", ModelError, lambda: fisher_diagonal(odd, [(x, y)], group="auto"))
    trace = fisher_trace(model, x, y, group="auto")
    trace.backward(retain_graph=True)
    told("trace twice", ModelError, trace.backward)
    told("trace of parts", ModelError, lambda: fisher_trace(odd, x, y, group="auto"))
    mine = [(x, y)] if rank == 0 else []
    told("empty", Exception, lambda: fisher_diagonal(model, mine, group="auto"))
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def in_two(tmp_path_factory, folder):
    def work(rank):
        return {
            **{case: measured(rank, case) for case in CASES},
            "most at once": most_at_once(),
            "others": others(rank, folder),
            "refusals": refusals(rank),
        }

    fisher_diagonal(net(), [samples()])  # imports what the processes need
    return in_processes(2, tmp_path_factory.mktemp("two"), work)


def same(got, right):
    assert list(got) == list(right)
    for name in right:
        torch.testing.assert_close(got[name], right[name], rtol=1e-5, atol=1e-5 * float(right[name].abs().max()) + 1e-9)


@pytest.mark.parametrize("case", CASES)
def test_a_diagonal_over_two_processes_is_that_of_one(case, in_two):
    assert isinstance(in_two[0], dict), in_two
    _, options, gathered = CASES[case]
    right = fisher_diagonal(net(case), [samples()], **options)
    for values, n, coverage, made in (rank[case] for rank in in_two):
        same(values, right)
        assert n == N and coverage == right.coverage and bool(made) == gathered


def test_in_an_fsdp2_model_no_pass_has_all_weights_at_once(in_two):
    """Of six layers of one size, each a unit, one or two."""
    assert all(1 / 6.1 < rank["most at once"] < 2 / 5.9 for rank in in_two)


def test_four_processes_two_of_which_have_the_same_part(tmp_path):
    def work(rank):
        part = (slice(0, 9), slice(9, 10), slice(10, 17), slice(17, N))[rank]
        out = {}
        for how in (how for how, least in SHARDINGS.items() if least == 4):
            out[how] = whole(fisher_diagonal(sharded(net(), how), batches(part), group="auto"))
        return out

    right, answers = fisher_diagonal(net(), [samples()]), in_processes(4, tmp_path, work)
    assert isinstance(answers[0], dict), answers
    for values in (values for rank in answers for values in rank.values()):
        same(values, right)


def test_what_is_made_of_a_diagonal_in_parts_is_made_of_the_whole(in_two, folder):
    right, model = fisher_diagonal(net(), [samples()]), net()
    cost = penalised(right, model)
    for said in (rank["others"] for rank in in_two):
        assert said["trace of the diagonal"] == pytest.approx(float(right.trace()), rel=1e-5)
        torch.testing.assert_close(said["vector"], right.to_vector(), rtol=1e-4, atol=1e-7)
        assert said["penalty"][0] == pytest.approx(cost.item(), rel=1e-5)
        same(said["penalty"][1], {name: p.grad for name, p in model.named_parameters()})
    saved = FisherDiagonal.load(folder / "fisher.safetensors")
    same({name: saved[name] for name in right}, right)


def test_the_trace_and_its_gradient_are_those_of_one_process(in_two):
    model, plain, (x, y) = net(), net(), samples()
    trace = fisher_trace(model, x, y)
    trace.backward()
    plain(x).sum().backward()
    for said in (rank["others"] for rank in in_two):
        assert said["trace"][0] == pytest.approx(trace.item(), rel=1e-5)
        same(said["trace"][1], {name: p.grad for name, p in model.named_parameters()})
        assert said["only one"] == ["8.bias"]
        same(said["training"], {name: p.grad for name, p in plain.named_parameters()})  # it goes on as before


def test_with_a_policy_of_fsdp_the_diagonal_is_of_the_model_in_its_precision(in_two):
    right = fisher_diagonal(net("16 bits"), [samples()]).to_vector()
    for got in (torch.cat([t.reshape(-1) for t in rank["others"]["16 bits"].values()]) for rank in in_two):
        assert got.dtype == torch.float32 and 1e-4 < float((got - right).norm() / right.norm()) < 5e-2


EXPECTED = {
    "diagonal alone": "group=None is this process alone: make the call on every rank with group='auto'",
    "trace alone": "group=None is this process alone: make the call on every rank with group='auto'",
    "tensors": "takes names, not tensors",
    "shifts": "take it as it was before fully_shard",
    "penalty": "take it as it was before fully_shard",
    "norms": "take fisher_diagonal or fisher_trace with group=",
    "train": "call model.eval()",
    "diagonal of parts": "with whole weights the model answers otherwise than in its parts",
    "trace twice": "the backward pass of a sharded trace runs once: call fisher_trace again",
    "trace of parts": "with whole weights the model answers otherwise than in its parts",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_what_cannot_be_taken_is_one_line_with_what_to_do(name, in_two):
    assert all(EXPECTED[name] in rank["refusals"][name] for rank in in_two)


def test_a_rank_without_samples_ends_the_others(in_two):
    first, second = (rank["refusals"]["empty"] for rank in in_two)
    assert "rank 1 failed (DataError" in first and "rank 1" not in second
