"""Several processes purify one model: what they end with, what they send, and how they end when one of them fails."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import fastfip
from fastfip.fisher import fisher_diagonal, fisher_trace
from tests.support.processes import in_processes
from tests.support.small_nets import pretrained_for
from tests.support.trained_once import trained_once

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not hasattr(os, "fork"), reason="needs gloo and fork"),
    pytest.mark.usefixtures("short_search"),
]

#: Method, settings and dtype, with the largest difference from one process. The default method divides by sizes:
#: of gradients that are nothing but rounding (a bias before BatchNorm), of differences, of perturbations. So it is
#: compared in float64 (its perturbations are in float32).
RUNS = {
    "fine_tune": ({"steps": 6}, torch.float32, 1e-5),
    "ft_sam": ({"steps": 3}, torch.float32, 1e-5),
    "fip": ({"steps": 3}, torch.float32, 1e-5),
    "fast_fip": ({"steps": 3}, torch.float32, 1e-5),
    "wfip": ({"steps": 4, "unlearn": 0.5}, torch.float32, 1e-5),
    "fast_wfip": ({"steps": 6}, torch.float32, 1e-5),
    "fisher_steps": ({"steps": 6}, torch.float64, 1e-6),
    "fine_mixing": ({"steps": 6, "keep": 0.3, "optimizer": "sgd", "lr": 0.01}, torch.float64, 1e-6),
}
IN_FOUR = ("fine_tune", "fast_wfip", "fisher_steps", "fine_mixing")
CLASSES = 4


def samples(n=50):
    """Images whose brightest quarter is their class."""
    y = torch.arange(n) % CLASSES
    x = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.3
    for i in range(n):
        row, column = divmod(int(y[i]), 2)
        x[i, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 0.5
    return x, y


@trained_once
def trained(dtype=torch.float32):
    """A small net with BatchNorm, and with biases before it, that answers `samples` rightly."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES),
    )  # fmt: skip
    optimizer, (x, y) = torch.optim.Adam(net.parameters(), 1e-2), samples()
    for _ in range(50):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.to(dtype).eval()


def run(name, group, batch_size=16):
    settings, dtype, _ = RUNS[name]
    model, (x, y) = trained(dtype), samples()
    done = fastfip.purify(
        model,
        (x.to(dtype), y),
        name.split()[0],
        batch_size=batch_size,
        progress=False,
        group=group,
        **settings,
        **pretrained_for(name, model),
    )
    if name == "fine_mixing":
        assert all({"divergence", "departure", "learned_from"} <= set(record) for record in done.history)
    return dict(done.state_dict()), done.settings.get("ranks"), done.history[-1]["loss"]


def fisher(part, group):
    """The diagonal over a part of the samples in batches, the trace of the part, and its gradient."""
    model, (x, y) = trained(), samples()
    x, y = x[part], y[part]
    diagonal = fisher_diagonal(model, list(zip(x.split(7), y.split(7))), group=group)
    trace = fisher_trace(model, x, y, group=group)
    trace.backward()
    return dict(diagonal), diagonal.n, trace.item(), [p.grad for p in model.parameters()]


def furthest(state, other):
    return max(float((value.double() - other[name].double()).abs().max()) for name, value in state.items())


@pytest.fixture(scope="module")
def alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = {name: run(name, None) for name in RUNS}
    torch.set_num_threads(threads)
    return out


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    def work(rank):
        x, y = samples()
        cut = (slice(0, 33), slice(33, 50))[rank]
        stream = iter(list(zip(x[cut].split(8), y[cut].split(8))))
        joined = fastfip.purify(trained(), stream, "fine_tune", steps=3, batch_size=16, progress=False)
        sampler = torch.utils.data.DistributedSampler(range(50))
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 8, sampler=sampler)
        sharded = fastfip.purify(trained(), loader, "fine_tune", steps=3, batch_size=16, progress=False)
        return {
            **{name: run(name, "auto") for name in RUNS},
            "joined": (dict(joined.state_dict()), joined.notes),
            "sharded": dict(sharded.state_dict()),
            "fisher": fisher((slice(0, 33), slice(33, 50))[rank], "auto"),
        }

    return in_processes(2, tmp_path_factory.mktemp("two"), work)


@pytest.fixture(scope="module")
def in_four(tmp_path_factory):
    def work(rank):
        few = run("fine_tune", "auto", batch_size=3)  # fewer samples than processes in each batch
        part = (slice(0, 20), slice(20, 21), slice(21, 40), slice(40, 50))[rank]
        return {**{name: run(name, "auto") for name in IN_FOUR}, "few": few, "fisher": fisher(part, "auto")}

    return in_processes(4, tmp_path_factory.mktemp("four"), work)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_end_with_the_weights_of_one(name, alone, in_two):
    assert isinstance(in_two[0], dict), in_two
    assert furthest(alone[name][0], in_two[0][name][0]) <= RUNS[name][2]
    assert alone[name][2] == pytest.approx(in_two[0][name][2], rel=1e-4)
    assert furthest(in_two[0][name][0], in_two[1][name][0]) == 0.0


@pytest.mark.parametrize("name", IN_FOUR)
def test_four_processes_end_with_the_weights_of_one(name, alone, in_four):
    assert isinstance(in_four[0], dict), in_four
    assert furthest(alone[name][0], in_four[0][name][0]) <= RUNS[name][2]
    assert all(furthest(in_four[0][name][0], other[name][0]) == 0.0 for other in in_four)


def test_batches_of_fewer_samples_than_processes_are_computed_by_each(in_four):
    assert furthest(run("fine_tune", None, batch_size=3)[0], in_four[0]["few"][0]) <= 1e-5


@pytest.mark.parametrize("world", [2, 4])
def test_fisher_diagonal_and_trace_are_those_of_all_parts(world, in_two, in_four):
    ranks = [answer["fisher"] for answer in (in_two if world == 2 else in_four)]
    diagonal, n, trace, gradients = fisher(slice(0, 50), None)
    for found in ranks:
        assert found[1] == n == 50
        assert furthest(diagonal, found[0]) <= 1e-5 * max(float(d.max()) for d in diagonal.values())
        assert found[2] == pytest.approx(trace, rel=1e-5)
    mean = [sum(g) / world for g in zip(*(found[3] for found in ranks))]
    for own, shared in zip(gradients, mean):
        torch.testing.assert_close(shared, own, rtol=1e-4, atol=1e-5 * float(own.abs().max()))


def test_fast_methods_send_the_spectral_numbers_only(in_two):
    steps = RUNS["fast_wfip"][0]["steps"]
    model = trained()
    whole = 4 * sum(p.numel() for p in model.parameters())
    moving = sum(min(m.weight.shape[0], m.weight[0].numel()) for m in model if isinstance(m, (nn.Conv2d, nn.Linear)))
    moving += sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert in_two[0]["fast_wfip"][1]["bytes"]["gradients"] == 4 * moving * steps
    assert in_two[0]["fine_tune"][1]["bytes"]["gradients"] == whole * RUNS["fine_tune"][0]["steps"]
    assert in_two[0]["fine_tune"][1]["world"] == 2


def test_streams_of_different_lengths_are_joined(in_two):
    x, y = samples()
    batches = [pair for cut in (slice(0, 33), slice(33, 50)) for pair in zip(x[cut].split(8), y[cut].split(8))]
    whole = fastfip.purify(trained(), batches, "fine_tune", steps=3, batch_size=16, progress=False)
    for state, notes in (answer["joined"] for answer in in_two):
        assert furthest(dict(whole.state_dict()), state) <= 1e-5
        assert any("given a part" in note for note in notes)


def test_a_distributed_sampler_stands_for_its_whole_data_set(in_two):
    whole = fastfip.purify(trained(), samples(), "fine_tune", steps=3, batch_size=16, progress=False)
    assert all(furthest(dict(whole.state_dict()), answer["sharded"]) <= 1e-5 for answer in in_two)


class _At(fastfip.Callback):
    def __init__(self, what):
        self.what = what

    def on_step(self, run, values):
        if run.step == 2:
            self.what()


def _burn():
    raise RuntimeError("disk on fire")


def _attempt(model, **options):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        data = options.pop("data", samples())
        fastfip.purify(
            model, data, options.pop("method", "fine_tune"), steps=5, progress=False, inplace=True, **options
        )
        return "purified"
    except Exception as error:
        same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        return f"{type(error).__name__}: {error}" if same else "the model was changed"


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failures")
    burning = {"callbacks": [_At(_burn)], "resume": folder / "broken.resume", "resume_every": 0}

    def work(rank):
        import fastfip.nets.ranks

        fastfip.nets.ranks.START = 4.0
        found = {
            "raises": _attempt(trained(), callbacks=[_At(_burn)] if rank == 1 else []),
            "again": _attempt(trained()),
            "seeds": _attempt(trained(), seed=rank),
            "models": _attempt(trained() if rank else trained().requires_grad_(False).apply(_shift)),
            "method": _attempt(trained(), method="fst"),
            "empty": _attempt(trained(), data=iter([samples()] if rank else [])),
            "alone": _attempt(trained(), group=None),
            "broken": _attempt(trained(), **burning),
        }
        if rank == 0:
            found["nobody else"] = _attempt(trained())
            found["bad group"] = _attempt(trained(), group="everyone")
        dist.barrier()
        return found

    return [*in_processes(2, folder, work), folder / "broken.resume"]


def _shift(module):
    if isinstance(module, nn.Linear):
        module.weight.data += 1


def test_a_rank_that_raises_ends_the_others_with_its_words(failures):
    assert isinstance(failures[0], dict), failures
    assert failures[1]["raises"] == "RuntimeError: disk on fire"
    assert "rank 1 failed (RuntimeError: disk on fire)" in failures[0]["raises"]
    assert failures[0]["again"] == failures[1]["again"] == "purified"
    assert "rank 0 failed (DataError: the data gave no samples" in failures[1]["empty"]


def test_ranks_that_were_given_different_things_all_refuse(failures):
    for answer in failures[:2]:
        assert "different seeds" in answer["seeds"] and "different models" in answer["models"]
        assert "fst works in one process" in answer["method"] and "fisher_steps" in answer["method"]


def test_a_rank_that_others_do_not_join_says_so(failures):
    assert "rank 1 of the process group did not come" in failures[0]["nobody else"]
    assert "group='everyone'" in failures[0]["bad group"]
    assert failures[0]["alone"] == failures[1]["alone"] == "purified"


def test_a_rank_that_dies_ends_the_others(tmp_path):
    def work(rank):
        return _attempt(trained(), callbacks=[_At(lambda: os._exit(9))] if rank == 1 else [])

    left, gone = in_processes(2, tmp_path, work)
    assert gone is None and "a process of the group is gone" in left and "nothing was changed" in left


def test_a_broken_run_goes_on_in_another_number_of_processes(failures):
    path = failures[2]
    assert path.exists()
    whole = fastfip.purify(trained(), samples(), "fine_tune", steps=5, progress=False)
    went_on = fastfip.purify(trained(), samples(), "fine_tune", steps=5, progress=False, resume=path)
    assert "went on from step 1 of a broken run" in went_on.notes and not path.exists()
    assert furthest(dict(whole.state_dict()), dict(went_on.state_dict())) <= 1e-5
