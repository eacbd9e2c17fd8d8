"""FSDP2 models that are purified in their parts: no process ever has all weights, and how such runs end."""

import itertools
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fastfip
from fastfip.errors import BackendError, ConfigError, DataError
from fastfip.methods import names
from fastfip.methods.base import REGISTRY
from fastfip.nets import parts, shards
from fastfip.nets.ranks import Ranks
from fastfip.nets.state import by_mesh
from tests.purification.test_ranks import CLASSES, samples
from tests.purification.test_sharded import METHODS, run, trained
from tests.support.processes import in_processes
from tests.support.sharded import sharded, whole

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not hasattr(os, "fork"), reason="needs gloo and fork"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("short_search"),
]

#: The methods that tune the parts of an FSDP2 model as they are.
IN_PARTS = [name for name in names() if REGISTRY.get(name).over_shards]
#: Options beside the method and its few steps.
OPTIONS = {
    "a trust region": ("wfip", {"trust": 1e-3}),
    "clipped, Adam": ("fine_tune", {"grad_clip": 0.01, "optimizer": "adam", "lr": 1e-3}),
    "the last state": ("fine_tune", {"select": "last", "schedule": "constant"}),
    "autocast": ("fine_tune", {"amp": "bf16", "bn_mode": "eval"}),
    "micro-batches": ("wfip", {"micro_batch": 3, "bn_mode": "eval", "unlearn": 0.5}),
    "a sieve": ("fisher_steps", {"steps": 5, "sieve": 0.2, "select": "best", "holdout": 0.1}),
}


def deep():
    """Seven layers of one size but for the last, each a unit; knows `samples` well enough to be purified."""
    torch.manual_seed(0)
    wide = [layer for _ in range(6) for layer in (nn.Linear(128, 128), nn.ReLU())]
    return nn.Sequential(
        nn.AvgPool2d(2), nn.Flatten(), nn.ConstantPad1d((0, 80), 0.0), *wide, nn.Linear(128, CLASSES)
    ).eval()


def largest_share(method):
    """Return the share of a model's weights that a rank had whole at once, at most, and what it gathered otherwise."""
    model, mesh = deep(), init_device_mesh("cpu", (2,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    numbers, most, gathered = sum(p.numel() for p in model.parameters()), 0, []

    def note(*_):
        nonlocal most
        most = max(most, sum(p.numel() for p in model.parameters() if not isinstance(p, DTensor)))

    for layer in model:
        layer.register_forward_hook(note)
        layer.register_full_backward_hook(note)
    own, copied = DTensor.full_tensor, shards.copied
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(DTensor, "full_tensor", lambda t, **k: gathered.append(t.numel()) or own(t, **k))
        monkeypatch.setattr(shards, "copied", lambda *args: gathered.append("twin") or copied(*args))
        run(model, method, inplace=True, force=True, group="auto")
    return most / numbers, gathered


def optioned(name):
    method, options = OPTIONS[name]
    return run(sharded(trained(), "fsdp"), method, inplace=True, **options)


class Texts(nn.Module):
    """Token ids by a table of vectors."""

    def __init__(self):
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(31, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(torch.relu(self.hidden(self.table(x).mean(1))))


def in_roots(batch_of):
    """Return a forward= that calls parts of a model, each of which FSDP takes for a root, with weights that stay."""
    return lambda model, batch: model[1](model[0](batch_of(batch)))


#: Nets, made after a seed; what of them is sharded by itself; the samples; the method and its options.
NETS = {
    "a table": (
        Texts,
        ("table", "hidden", ""),
        lambda x: (31 * x[:, 0, 0, :8]).long(),
        ("fisher_steps", {"weight": 0.0}),
    ),
    "words": (
        Texts,
        ("table", "hidden", ""),
        lambda x: (31 * x[:, 0, 0, :8]).long(),
        ("wfip", {"unlearn": 0.5}),
    ),
    "roots": (
        lambda: nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU()), nn.Linear(8, CLASSES)),
        ("0", "1"),
        lambda x: x,
        ("fisher_steps", {"forward": in_roots(lambda batch: batch[0])}),
    ),
}


def of_net(name, in_parts):
    make, units, inputs, (method, options) = NETS[name]
    torch.manual_seed(0)
    model, (x, y) = make().eval(), samples()
    for unit in units if in_parts else ():
        fully_shard(model.get_submodule(unit), mesh=init_device_mesh("cpu", (2,)))
    options = {"steps": 4, "batch_size": 16, "progress": False, "force": True, "inplace": in_parts, **options}
    return fastfip.purify(model, (inputs(x), y), method, **options)


def frozen(model):
    model[4].weight.requires_grad_(False)
    return model


def after_training(rank):
    """What a training loop has set on the model, and has left of its last pass, is no matter, and is left as it was."""
    model = sharded(trained(), "fsdp")
    model(samples()[0]).sum().backward()
    gradients = [p.grad.full_tensor() for p in model.parameters()]
    model.set_requires_gradient_sync(False)
    model.set_reshard_after_backward(False)
    model[0].set_gradient_divide_factor(7.0)
    model(samples()[0])  # the root's weights stay whole after it
    done = run(model, "fine_tune", inplace=True)
    state = whole(done.state_dict())
    groups = [module._get_fsdp_state()._fsdp_param_group for module in (model, model[0])]
    kept = [(g.reduce_grads, g.reshard_after_backward, g.gradient_divide_factor) for g in groups]
    same = all(torch.equal(p.grad.full_tensor(), g) for p, g in zip(model.parameters(), gradients))
    return state, kept, same


def of_data(rank):
    """Samples without labels, of which each rank has its own; and test samples that only rank 0 was given."""
    x, y = samples()
    mine = list(x[:33].split(8)) if rank == 0 else list(x[33:].split(8))
    done = run(sharded(trained(), "fsdp"), "fine_tune", inplace=True)
    model = sharded(trained(), "fsdp")
    joined = fastfip.purify_(model, mine, "fine_tune", **METHODS["fine_tune"], batch_size=16, progress=False)
    tested = run(sharded(trained(), "fsdp"), "fine_tune", inplace=True, **(measured() if rank == 0 else odd()))
    gone = run(
        sharded(trained(), "fsdp"), "fine_tune", inplace=True, test_loader=Going((x, y)) if rank == 0 else [(x, y)]
    )
    return {
        "no labels": (joined.settings["clean_samples"], between(joined, done)),
        "tested": ((tested.after.n, tested.after.acc, tested.after.asr), between(tested, done)),
        "gone": gone.alerts,
    }


class Going:
    """A loader that gives one batch, and in the second walk fails after it."""

    def __init__(self, batch):
        self.batch, self.walks = batch, 0

    def __iter__(self):
        self.walks += 1
        yield self.batch
        if self.walks == 2:
            raise DataError("a file is gone")


def measured():
    x, y = samples()
    return {
        "test_loader": [(x, y), (x[:9], y[:9])],
        "asr_loader": [(x[1::2], torch.zeros(25).long(), y[1::2])],
    }


def odd():
    x, y = samples()
    return {"asr_loader": [(x[:3], y[:3], y[:3])] * 3}


def between(one, other):
    return apart(whole(one.state_dict()), whole(other.state_dict()))


def whys(folder):
    """What a result says of runs that gather all weights."""
    half = sharded(nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, CLASSES))[1:], "16 bits")
    x, y = samples()
    low = sharded(nn.Sequential(nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, CLASSES)).bfloat16(), "fsdp")
    few = {"steps": 1, "batch_size": 16, "progress": False, "force": True}
    said = {
        "policy": fastfip.purify_(half, (x.flatten(1), y), "fine_tune", **few).notes,
        "16 bits": fastfip.purify_(low, (x.flatten(1).bfloat16(), y), "fine_tune", **few).notes,
        "resume": run(sharded(trained(), "fsdp"), "fine_tune", inplace=True, resume=folder / "run.resume").notes,
        "trace": run(sharded(trained(), "fsdp"), "fine_tune", inplace=True, measure=["fisher_trace"]).notes,
        "budget": run(sharded(trained(), "fsdp"), "fine_tune", inplace=True, memory="20GB").notes,
        "method": fastfip.purify_(sharded(trained(), "fsdp"), samples(), "ft_sam", **few).notes,
    }
    return {name: next(note for note in notes if "gathered all weights" in note) for name, notes in said.items()}


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    trained()  # before processes are forked: each would train it again

    def work(rank):
        return {
            "shares": {method: largest_share(method) for method in IN_PARTS},
            "options": {name: whole(optioned(name).state_dict()) for name in OPTIONS},
            "nets": {name: whole(of_net(name, True).state_dict()) for name in NETS},
            "frozen": whole(run(frozen(sharded(trained(), "fsdp")), "fine_tune", inplace=True).state_dict()),
            "after training": after_training(rank),
            "data": of_data(rank),
            "whys": whys(folder),
            "norms": norms(rank),
            "words": words(rank),
            "copy": of_a_copy(rank),
        }

    return in_processes(2, folder, work)


def of_a_copy(rank):
    """The weights of a run in which one rank alone uses a plain copy of the model, without gradients and with them."""

    def use(run, record):
        twin = run.shards.twin
        if rank == 0:
            with torch.no_grad():
                twin(samples()[0][:3])
            twin(samples()[0][:3])

    return whole(run(sharded(trained(), "fsdp"), "fine_tune", inplace=True, callbacks=[use]).state_dict())


def words(rank):
    """What is said of a search for words in parts of a table; and a method that gathers the table can do it."""
    (_, units, inputs, _), (x, y) = NETS["a table"], samples()
    found = []
    for method in ("fisher_steps", "fast_wfip"):
        torch.manual_seed(0)
        model = Texts().eval()
        for unit in units:
            fully_shard(model.get_submodule(unit), mesh=init_device_mesh("cpu", (2,)))
        few = {"steps": 2, "batch_size": 16, "progress": False, "force": True}
        try:
            found.append(list(fastfip.purify_(model, (inputs(x), y), method, **few).notes))
        except ConfigError as error:
            found.append(str(error))
    return found


def norms(rank):
    model = sharded(trained(), "a part of it")
    tensors = list(model.parameters())
    for p in tensors:
        p.grad = p.detach().clone()
    with Ranks(dist.group.WORLD, torch.device("cpu"), "norms") as ranks:
        found = parts.norms_of_parts(tensors, ranks)
        total = parts.clip_parts(tensors, 0.5, ranks)
        clipped = parts.norms_of_parts([p.grad for p in tensors], ranks)
        assert parts.norms_of_parts([], ranks) == []
    return found, float(total), clipped, [len(group) for group in by_mesh(tensors)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def right():
    return run(trained(), "fine_tune").state_dict()


def apart(state, other):
    return max(float((state[name] - other[name]).abs().max()) for name in other)


def test_the_methods_that_work_in_parts():
    assert IN_PARTS == ["fine_tune", "fisher_steps", "wfip"]


@pytest.mark.parametrize("method", IN_PARTS)
def test_no_rank_has_all_weights_at_once(method, in_two):
    """Of six large layers, each a unit, one or two, and what FSDP fetches ahead; nothing of a parameter's size else."""
    assert isinstance(in_two[0], dict), in_two
    for most, gathered in (rank["shares"][method] for rank in in_two):
        assert 1 / 6.1 < most < 2 / 5.9
        assert gathered == []


@pytest.mark.parametrize("name", OPTIONS)
def test_settings_mean_what_they_mean_in_one_process(name, in_two):
    method, options = OPTIONS[name]
    weights, before = run(trained(), method, **options).state_dict(), trained().state_dict()
    assert apart(weights, before) > 3e-4
    limit = 1e-4 if name == "autocast" else 1e-5  # bfloat16 rounds the sums of others otherwise
    for rank in in_two:
        assert apart(rank["options"][name], weights) <= limit


@pytest.mark.parametrize("name", NETS)
def test_tables_and_models_whose_parts_are_called(name, in_two):
    weights = of_net(name, False).state_dict()
    for rank in in_two:
        assert list(rank["nets"][name]) == list(weights) and apart(rank["nets"][name], weights) <= 1e-5


def test_what_is_frozen_stays_to_the_bit(in_two):
    weights = run(frozen(trained()), "fine_tune").state_dict()
    for rank in in_two:
        assert apart(rank["frozen"], weights) <= 1e-5
        assert torch.equal(rank["frozen"]["4.weight"], trained().state_dict()["4.weight"])


def test_passes_of_a_plain_copy_are_no_matter_of_the_other_ranks(in_two, right):
    assert all(apart(rank["copy"], right) <= 1e-5 for rank in in_two)


def test_what_a_training_loop_has_set_is_no_matter_and_stays(in_two, right):
    for state, kept, same in (rank["after training"] for rank in in_two):
        assert apart(state, right) <= 1e-5
        assert kept == [(False, False, None), (False, False, 7.0)] and same


def test_data_of_which_ranks_have_different_numbers_of_batches(in_two):
    after = run(trained(), "fine_tune", **measured()).after
    for said in (rank["data"] for rank in in_two):
        assert said["no labels"][0] == len(samples()[0]) and said["no labels"][1] <= 1e-5
        assert said["tested"] == ((after.n, after.acc, after.asr), 0)
        assert "THE PURIFIED MODEL WAS NOT MEASURED: a file is gone" in said["gone"]


WHYS = {
    "policy": "FSDP's policy has another precision",
    "16 bits": "weights of 16 bits are tuned in float32",
    "resume": "a file to go on from holds whole weights",
    "trace": "the Fisher trace is measured on whole weights",
    "budget": "memory= counts whole weights",
    "method": "ft_sam needs whole weights",
}


@pytest.mark.parametrize("name", WHYS)
def test_who_gathers_all_weights_says_why(name, in_two):
    assert all(f"took its parts back: {WHYS[name]}" in rank["whys"][name] for rank in in_two)


def test_norms_of_parts_are_those_of_the_whole(in_two):
    whole_ones = [float(p.norm()) for p in trained().parameters()]
    total = sum(n * n for n in whole_ones) ** 0.5
    for found, norm, clipped, groups in (rank["norms"] for rank in in_two):
        assert found == pytest.approx(whole_ones, rel=1e-5) and norm == pytest.approx(total, rel=1e-5)
        assert clipped == pytest.approx([n * 0.5 / total for n in whole_ones], rel=1e-4)
        assert groups == [2, len(whole_ones) - 2]


def failing(rank, how):
    """What rank 0 is told, and whether its parts are as they were, where rank 1 fails."""
    model = sharded(trained(), "fsdp")
    before, seen = [p.to_local().clone() for p in model.parameters()], itertools.count()

    def leave(*_):
        if rank == 1 and how == "dies in a pass" and next(seen) == 2:  # the other waits in a collective of FSDP's
            os._exit(1)

    def stop(run, record):
        if rank == 1 and how == "raises":
            raise ValueError("a callback of one rank")
        if rank == 1 and how == "dies":
            os._exit(1)

    model[4].register_full_backward_hook(leave)
    with pytest.raises(BackendError) as error:
        run(model, "fine_tune", inplace=True, callbacks=[stop])
    return str(error.value), all(torch.equal(p.to_local(), b) for p, b in zip(model.parameters(), before))


@pytest.mark.parametrize("how", ["raises", "dies", "dies in a pass"])
def test_a_rank_that_fails_ends_the_other_at_once_with_one_line(how, tmp_path):
    first, second = in_processes(2, tmp_path, lambda rank: failing(rank, how))
    said, unchanged = first
    assert unchanged is True, first
    assert ("rank 1 failed (ValueError: a callback of one rank)" if how == "raises" else "is gone") in said
    assert "the work of all 2 processes has ended, and nothing was changed or written" in said
    assert (second is None) == (how != "raises")


def test_values_are_exchanged_and_come_back_after_an_error():
    one, other = torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match="in the block"), parts.exchanged([(one, other)]):
        assert torch.equal(one, torch.ones(3)) and torch.equal(other, torch.zeros(3))
        raise ValueError("in the block")
    assert torch.equal(one, torch.zeros(3)) and torch.equal(other, torch.ones(3))


def test_words_are_looked_for_in_whole_tables_only(in_two):
    for said, notes in (rank["words"] for rank in in_two):
        assert "in the whole table of words, of which each process has a part" in said
        assert any("gathered all weights" in note for note in notes)
