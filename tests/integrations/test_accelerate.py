"""`fastfip.accelerate.purify`, against the real package (extra `accelerate`): `make zoo` installs it."""

import os

import pytest
import torch
import torch._dynamo  # seconds, which each process that is forked would otherwise spend again
import torch.nn.functional as F
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import fastfip
from fastfip.errors import ConfigError, ModelError
from tests.support.processes import environment, in_processes

accelerate = pytest.importorskip("accelerate", reason="no accelerate (pip install fastfip[accelerate])")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]


def samples(n=45):
    y = torch.arange(n) % 3
    return TensorDataset(
        F.one_hot(y, 6).float() + 0.3 * torch.randn(n, 6, generator=torch.Generator().manual_seed(1)), y
    )


def trained():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    optimizer, (x, y) = torch.optim.Adam(net.parameters(), 1e-2), samples().tensors
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


def prepared(sampler=None, **how):
    """What a training script has before it calls fastfip."""
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, **how)
    model = trained()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loader = DataLoader(samples(), 8, sampler=sampler, shuffle=sampler is None)
    return accelerator, *accelerator.prepare(model, optimizer, loader)


def by_hand(method="fine_tune", data=None, batch_size=8, **options):
    data = samples() if data is None else data
    return fastfip.purify(trained(), DataLoader(data, batch_size), method, steps=3, group=None, **options)


def furthest(got, right):
    pairs = zip(got.state_dict().values(), right.state_dict().values())
    return max(
        float(((a.full_tensor() if hasattr(a, "full_tensor") else a).double() - b.double()).abs().max())
        for a, b in pairs
    )


def in_one(work, folder):
    """An Accelerator keeps its state for the whole process: each test has one of its own, started without torchrun."""

    def alone(_):
        for name in environment(0, 1, 0):
            del os.environ[name]
        return (work(),)

    ((answer,),) = in_processes(1, folder, alone, group=False)
    return answer


def test_the_prepared_model_and_its_optimizer_go_on_with_the_new_weights(tmp_path):
    def work():
        accelerator, model, optimizer, loader = prepared()
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        result = fastfip.accelerate.purify(accelerator, model, loader, "fine_tune", steps=3)
        assert result.model is accelerator.unwrap_model(model) and held == [id(p) for p in model.parameters()]
        return furthest(model, by_hand().model), furthest(model, trained())

    apart, moved = in_one(work, tmp_path)
    assert apart < 1e-6 < 1e-3 < moved


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_mixed_precision_is_the_accelerators_unless_another_is_given(precision, tmp_path):
    def work():
        accelerator, model, _, loader = prepared(mixed_precision=precision)
        before = vars(model).get("forward")
        result = fastfip.accelerate.purify(accelerator, model, loader, "fine_tune", steps=1)
        other = fastfip.accelerate.purify(accelerator, model, loader, "fine_tune", steps=1, amp=False)
        return result.settings["amp"], other.settings["amp"], before == vars(model).get("forward")

    assert in_one(work, tmp_path) == ("bf16" if precision == "bf16" else False, False, True)


def test_a_prepared_loader_stands_for_the_samples_that_its_sampler_names(tmp_path):
    few = list(range(0, 45, 2))

    def work():
        accelerator, model, _, loader = prepared(sampler=SubsetRandomSampler(few))
        result = fastfip.accelerate.purify(accelerator, model, loader, "fine_tune", steps=3)
        return result.settings["clean_samples"]

    assert in_one(work, tmp_path) == len(few)


def test_figures_go_to_the_trackers_and_only_the_main_process_shows_a_bar(tmp_path):
    class Tracker(accelerate.tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "kept", False, None

        def __init__(self):
            super().__init__()
            self.said = {}

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None, **_):
            self.said.update(values)

    def work():
        tracker, lines = Tracker(), []
        accelerator, model, _, loader = prepared(log_with=tracker)
        accelerator.init_trackers("run")
        fastfip.accelerate.purify(
            accelerator, model, loader, "fine_tune", steps=2, prefix="clean", progress=lines.append
        )
        return sorted(tracker.said)

    said = in_one(work, tmp_path)
    assert {"clean/acc_before", "clean/acc_after", "clean/loss_after"} <= set(said)


def test_what_is_the_accelerators_matter_is_refused(tmp_path):
    def work():
        accelerator, model, _, loader = prepared()
        said = []
        for options in ({"inplace": True}, {"group": "auto"}):
            with pytest.raises(ConfigError) as error:
                fastfip.accelerate.purify(accelerator, model, loader, **options)
            said.append(str(error.value))
        with pytest.raises(ModelError) as error:
            kind = type("FullyShardedDataParallel", (nn.Sequential,), {})
            fastfip.accelerate.purify(accelerator, kind(model), loader)
        return [*said, str(error.value)]

    inplace, group, first = in_one(work, tmp_path)
    assert inplace.startswith("inplace: leave it out") and group.startswith("group: leave it out")
    assert first.startswith("FSDP1 gives each process a part of the weights: take FSDP2")


@pytest.mark.parametrize("method", ["fine_tune", "fast_wfip", "clp"])
def test_two_processes_end_with_the_weights_of_one(method, tmp_path):
    """`clp` cannot be shared: each process does all of it."""

    def work(rank):
        accelerator, model, _, loader = prepared()
        assert isinstance(model, nn.parallel.DistributedDataParallel)
        result = fastfip.accelerate.purify(
            accelerator, model, loader, method, **({} if method == "clp" else {"steps": 3})
        )
        return (
            furthest(result.model, right),
            result.settings.get("ranks", {}).get("world"),
            result.settings["clean_samples"],
        )

    options = {} if method == "clp" else {"steps": 3}
    right = fastfip.purify(trained(), DataLoader(samples(), 16), method, **options).model
    for apart, world, n in in_processes(2, tmp_path, work, group=False):
        assert apart < 1e-5 and world == (None if method == "clp" else 2) and n == 45


def bag_of_words():
    torch.manual_seed(0)
    return nn.Sequential(nn.EmbeddingBag(20, 8), nn.Linear(8, 3)).eval()


def test_processes_share_the_worst_case_of_token_ids(tmp_path):
    ids = torch.randint(0, 20, (24, 5), generator=torch.Generator().manual_seed(0))
    data = TensorDataset(ids, ids[:, 0] % 3)

    def work(rank):
        accelerator = prepared()[0]
        model, loader = accelerator.prepare(bag_of_words(), DataLoader(data, 8))
        result = fastfip.accelerate.purify(accelerator, model, loader, "wfip", steps=2, force=True)
        return result.settings["ranks"]["world"], dict(accelerator.unwrap_model(model).state_dict())

    (world, first), (_, second) = in_processes(2, tmp_path, work, group=False)
    alone = fastfip.purify(
        bag_of_words(), DataLoader(data, 16), "wfip", steps=2, force=True, progress=False
    ).state_dict()
    assert world == 2 and all(torch.equal(first[name], second[name]) for name in first)
    assert max(float((first[name] - alone[name]).abs().max()) for name in alone) < 1e-5
    assert any(not torch.equal(first[name], value) for name, value in bag_of_words().state_dict().items())


class Chosen:
    """A batch sampler without `.sampler`: batches of some samples only, in an order that it draws."""

    batch_size = 8

    def __len__(self):
        return 4

    def __iter__(self):
        few = torch.randperm(45)[:30].tolist()
        yield from (few[i : i + 8] for i in range(0, 30, 8))


def _workers_begin(worker):
    pass


@pytest.mark.parametrize("kind", ["batches", "drawn", "shuffled", "at once"])
@pytest.mark.parametrize("labelled", [True, False])
def test_processes_that_are_seeded_differently_read_the_samples_of_the_first(kind, labelled, tmp_path):
    """Of a sampler that draws, each process would have others: `purify` would take these for parts, or refuse them."""
    data = samples() if labelled else TensorDataset(samples().tensors[0])

    def work(rank):
        accelerator, net = prepared()[0], trained()
        torch.manual_seed(rank)  # the last thing that seeds, before the sampler gets a generator of its own
        how = {
            "batches": {"batch_sampler": Chosen()},
            "drawn": {"batch_size": 8, "sampler": WeightedRandomSampler([1.0] * 45, 30, replacement=False)},
            "shuffled": {"batch_size": 8, "shuffle": True, "drop_last": True},
            "at once": {"batch_size": None, "sampler": BatchSampler(RandomSampler(data), 8, drop_last=False)},
        }[kind]
        model, loader = accelerator.prepare(net, DataLoader(data, **how))
        result = fastfip.accelerate.purify(accelerator, model, loader, "fine_tune", steps=2)
        return result.settings["clean_samples"], dict(result.model.state_dict())

    (first, here), (second, there) = in_processes(2, tmp_path, work, group=False)
    assert first == second == (45 if kind in ("shuffled", "at once") else 30)
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_a_prepared_loader_is_read_as_the_users_own_is(tmp_path):
    def work():
        accelerator = prepared()[0]
        how = {"num_workers": 1, "timeout": 50.0, "worker_init_fn": _workers_begin, "prefetch_factor": 3}
        made = accelerator.prepare(DataLoader(samples(), batch_sampler=Chosen(), **how))
        read = fastfip.accelerate._whole(made, 2)
        return [len(read.dataset), read.batch_size, *(getattr(read, name) == value for name, value in how.items())]

    assert in_one(work, tmp_path) == [30, 16, True, True, True, True]


def test_a_model_of_fsdp2_gets_its_parts_back(tmp_path):
    """On CPUs Accelerate passes a plugin for FSDP over: it is told afterwards, and prepares the model itself."""

    def work(rank):
        accelerator, said = prepared()[0], []
        accelerator.state.fsdp_plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=10, cpu_ram_efficient_loading=False
        )
        accelerator.state.distributed_type = accelerate.DistributedType.FSDP
        model = trained()
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
        for method, options in (("clp", {}), ("fast_wfip", {"group": None})):
            with pytest.raises(ConfigError) as error:
                fastfip.accelerate.purify(accelerator, model, DataLoader(samples(), 8), method, **options)
            said.append(str(error.value))
        result = fastfip.accelerate.purify(accelerator, model, DataLoader(samples(), 8), "fast_wfip", steps=3)
        assert result.model is model and all(type(p).__name__ == "DTensor" for p in model.parameters())
        assert [id(p) for p in model.parameters()] == [id(p) for p in optimizer.param_groups[0]["params"]]
        return furthest(model, right), *said

    right = by_hand("fast_wfip").model
    for apart, method, group in in_processes(2, tmp_path, work, group=False):
        assert apart < 1e-5
        assert method.startswith("clp works in one process") and method.endswith("as it was before it was sharded")
        assert group.startswith("group: leave it out, the model is sharded")
