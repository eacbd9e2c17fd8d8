"""Models of which each process has a part: purified in place, with the weights of one process; and what is refused."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastfip
from fastfip.errors import CheckpointError, ConfigError, ModelError
from tests.purification.test_ranks import samples
from tests.support.processes import in_processes
from tests.support.sharded import SHARDINGS, OfParts, sharded, whole
from tests.support.trained_once import trained_once

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not hasattr(os, "fork"), reason="needs gloo and fork"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("short_search"),
]

METHODS = {
    "fine_tune": {"steps": 4}, "fast_wfip": {"steps": 3}, "wfip": {"steps": 2, "unlearn": 0.5},
    "fisher_steps": {"steps": 3},
}  # fmt: skip
CASES = [("fsdp", name) for name in METHODS] + [
    ("a part of it", "fine_tune"), ("a part of it", "fisher_steps"), ("tensor parallel", "fine_tune"),
]  # fmt: skip
#: What the result says of the cases that gather all weights; the others work on their parts.
GATHERED = {
    ("fsdp", "fast_wfip"): "fast_wfip needs whole weights",
    ("tensor parallel", "fine_tune"): "not all parts are those of FSDP2 over all processes",
}


@trained_once
def trained():
    """A net with BatchNorm that knows `samples`; its first layer has an odd number of rows, for parts of two sizes."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 7, 3, padding=1, stride=2), nn.BatchNorm2d(7), nn.ReLU(), nn.Flatten(),
        nn.Linear(112, 6), nn.ReLU(), nn.Linear(6, 4),
    )  # fmt: skip
    optimizer, (x, y) = torch.optim.Adam(net.parameters(), 1e-2), samples()
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return net.eval()


def run(model, method, **options):
    options = {"batch_size": 16, "progress": False, **METHODS[method], **options}
    return fastfip.purify(model, samples(), method, **options)


@pytest.fixture(scope="module")
def alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = {name: run(trained(), name) for name in METHODS}
    torch.set_num_threads(threads)
    return {name: (dict(done.state_dict()), done.model(samples()[0]).detach()) for name, done in out.items()}


def purified(how, method):
    """What one rank sees: the weights of all, what the model answers, and whether it is still the same sharded one."""
    model = sharded(trained(), how)
    model[0].register_forward_hook(lambda *_: None)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    layout = [(type(p).__name__, getattr(p, "placements", None), id(p)) for p in model.parameters()]
    kinds = [type(m) for m in model.modules()]
    done = run(model, method, inplace=True)
    assert done.model is model and kinds == [type(m) for m in model.modules()] and len(model[0]._forward_hooks) >= 1
    assert layout == [(type(p).__name__, getattr(p, "placements", None), id(p)) for p in model.parameters()]
    state = whole(done.state_dict())
    answers = model(samples()[0])
    answers.sum().backward()  # the training goes on: the parts still have hooks that share gradients
    optimizer.step()
    assert all(p.grad is not None for p in model.parameters())
    return state, answers.detach(), done.notes


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    def work(rank):
        return {case: purified(*case) for case in CASES}

    return in_processes(2, tmp_path_factory.mktemp("two"), work)


@pytest.mark.parametrize(("how", "method"), CASES)
def test_two_processes_that_have_parts_end_with_the_weights_of_one(how, method, alone, in_two):
    assert isinstance(in_two[0], dict), in_two
    weights, answers = alone[method]
    before = trained().state_dict()
    assert max(float((weights[name] - before[name]).abs().max()) for name in weights) > 1e-3
    for state, theirs, notes in (rank[how, method] for rank in in_two):
        assert max(float((state[name] - weights[name]).abs().max()) for name in weights) <= 1e-5
        torch.testing.assert_close(theirs, answers, rtol=1e-4, atol=1e-4)
        said = f"gathered all weights, and took its parts back: {GATHERED.get((how, method))}"
        said = said if (how, method) in GATHERED else "worked on its parts of the weights"
        assert f"each of 2 processes {said}" in notes


def test_four_processes_two_of_which_have_the_same_part(tmp_path, alone):
    def work(rank):
        cases = [(how, "fine_tune") for how, least in SHARDINGS.items() if least == 4] + [("hybrid", "fisher_steps")]
        return {case: purified(*case)[0] for case in cases}

    answers = in_processes(4, tmp_path, work)
    assert isinstance(answers[0], dict), answers
    for (_, method), found in (pair for rank in answers for pair in rank.items()):
        weights = alone[method][0]
        assert max(float((found[name] - weights[name]).abs().max()) for name in weights) <= 1e-5


def refusals(rank):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    said = {}

    def told(name, kind, call):
        with pytest.raises(kind) as error:
            call()
        said[name] = str(error.value)

    model = sharded(trained(), "fsdp")
    before = whole(model.state_dict())
    told("copy", ConfigError, lambda: run(model, "fine_tune"))
    told("alone", ConfigError, lambda: run(model, "fine_tune", inplace=True, group=None))
    told("group", ConfigError, lambda: run(model, "fine_tune", inplace=True, group="data"))
    told("method", ConfigError, lambda: fastfip.purify_(model, samples(), "clp"))
    own = fully_shard(trained(), mesh=_own_mesh())
    told("file", CheckpointError, lambda: fastfip.save_checkpoint(model, os.devnull + ".pt"))
    told("mesh", ConfigError, lambda: run(own, "fine_tune", inplace=True))
    with torch.device("meta"):
        empty = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 6), nn.ReLU(), nn.Linear(6, 4))
    told("meta", ModelError, lambda: run(sharded(empty, "fsdp"), "fine_tune", inplace=True))
    flat = FullyShardedDataParallel(trained(), device_id=torch.device("cpu"))
    told("fsdp1", ModelError, lambda: run(flat, "fine_tune", inplace=True))
    torch.manual_seed(rank)
    odd = sharded(trained(), "a part of it")
    with torch.no_grad():
        odd[4].bias.add_(rank)
    told("differing", ConfigError, lambda: run(odd, "fine_tune", inplace=True))
    told("of parts", ModelError, lambda: run(OfParts(192, 4).parallelised(), "fine_tune", inplace=True))

    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    half = sharded(copy.deepcopy(plain)[1:], "16 bits")
    x, y = samples()
    flat_data = {"steps": 4, "batch_size": 16, "progress": False, "force": True}
    fastfip.purify_(half, (x.flatten(1), y), "fine_tune", **flat_data)
    right = fastfip.purify(plain[1:], (x.flatten(1), y), "fine_tune", group=None, **flat_data).state_dict()
    said["16 bits"] = max(float((t - right[name]).abs().max()) for name, t in whole(half.state_dict()).items())

    def stop(run, record):
        raise ValueError("a callback of the user's")

    told("failed", ValueError, lambda: run(model, "fine_tune", inplace=True, callbacks=[stop]))
    after = whole(model.state_dict())
    said["unchanged"] = all(torch.equal(before[name], after[name]) for name in before)
    return said


def test_whole_weights_are_saved_as_the_page_says(tmp_path, alone):
    def work(rank):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        result = run(sharded(trained(), "fsdp"), "fine_tune", inplace=True)
        weights = get_model_state_dict(result.model, options=StateDictOptions(full_state_dict=True))
        if rank == 0:
            fastfip.save_checkpoint(weights, tmp_path / "clean.safetensors")
        return None

    assert in_processes(2, tmp_path, work) == [None, None]
    saved, (right, _) = fastfip.load_checkpoint(tmp_path / "clean.safetensors"), alone["fine_tune"]
    assert set(saved) == set(right)
    assert max(float((saved[name] - right[name]).abs().max()) for name in right) <= 1e-5


def _own_mesh():
    """A mesh of this process alone: making it is a matter of all processes."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2, 1), mesh_dim_names=("one", "other"))["other"]


EXPECTED = {
    "copy": "cannot be copied: purify it with inplace=True on every rank",
    "alone": "group=None is this process alone: make the call on every rank with group='auto'",
    "group": "group='data': give 'auto' or the process group",
    "method": "or the model as it was before it was sharded",
    "file": "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))",
    "mesh": "the group has [0, 1]: give group= a process group of all ranks that have parts",
    "meta": "is on the meta device, without weights: model.to_empty(device=...)",
    "fsdp1": "FullyShardedDataParallel, which keeps flat parts of its weights: use fully_shard (FSDP2)",
    "differing": "were given different models",
    "of parts": "with whole weights the model answers otherwise than in its parts",
    "failed": "a callback of the user's",
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    return in_processes(2, tmp_path_factory.mktemp("refused"), refusals)


@pytest.mark.parametrize("name", EXPECTED)
def test_what_cannot_be_purified_is_one_line_with_what_to_do(name, refused):
    for rank in refused:
        assert isinstance(rank, dict), refused
        assert EXPECTED[name] in rank[name]


def test_a_policy_of_fsdp_has_no_part_in_a_purification(refused):
    assert all(rank["16 bits"] < 1e-5 for rank in refused)


def test_after_an_error_every_part_is_as_it_was(refused):
    assert all(rank["unchanged"] for rank in refused)
