"""A forward pass that is random or changes the model is noticed by running it, whatever its author called the parts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import fastfip
from fastfip.errors import ConfigError, DataError, ModelError
from fastfip.fisher import backward_with_fisher, fisher_diagonal, fisher_trace
from fastfip.fisher.sharpness import sharpness
from tests.support.fisher_problems import Lambda

N = 5


class DropPath(nn.Module):
    """As authors write it: a whole branch of a sample is left out now and then."""

    def __init__(self, p=0.4):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - self.p)
        return x * keep / (1 - self.p)


def attention():
    part = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    return Lambda(lambda m, x: m.head(m.a(x, x, x)[0][:, 0]), a=part, head=nn.Linear(8, 3))


def recurrent():
    return Lambda(lambda m, x: m.head(m.r(x)[0][:, -1]), r=nn.LSTM(8, 8, 2, dropout=0.5), head=nn.Linear(8, 3))


def functional():
    return Lambda(lambda m, x: m.head(F.dropout(x[:, 0], 0.5, m.training)), head=nn.Linear(8, 3))


def stochastic_depth():
    return Lambda(
        lambda m, x: m.head(x[:, 0] + m.drop(m.a(x[:, 0]))), a=nn.Linear(8, 8), drop=DropPath(), head=nn.Linear(8, 3)
    )


def spectral():
    return Lambda(lambda m, x: m.a(x[:, 0]), a=parametrizations.spectral_norm(nn.Linear(8, 3)))


RANDOM = {"attention": attention, "lstm": recurrent, "F.dropout": functional, "drop-path": stochastic_depth}
WAYS = {
    "diagonal": lambda model, x, y: fisher_diagonal(model, (x, y)),
    "trace": lambda model, x, y: fisher_trace(model, x, y),
}


def batch():
    return torch.randn(N, 4, 8), torch.randint(0, 3, (N,))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", RANDOM)
def test_a_random_forward_pass_is_one_line(name, way):
    model, (x, y) = RANDOM[name](), batch()
    with pytest.raises(ModelError, match=r"(random|dropout).*model\.eval\(\)") as error:
        WAYS[way](model, x, y)
    assert "\n" not in str(error.value)
    WAYS[way](model.eval(), x, y)


@pytest.mark.parametrize("way", WAYS)
def test_a_buffer_that_the_pass_changes_is_one_line_and_has_its_values_back(way):
    model, (x, y) = spectral(), batch()
    before = {name: b.clone() for name, b in model.named_buffers()}
    with pytest.raises(ModelError, match=r"changes the buffer 'a\.parametrizations.*model\.eval\(\)"):
        WAYS[way](model, x, y)
    assert before and all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    WAYS[way](model.eval(), x, y)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


class Always(nn.Module):
    """Dropout that its author forgot to switch off."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(F.dropout(x[:, 0], 0.02))  # so little that two passes are often the same


@pytest.mark.parametrize("seed", range(3))
def test_eval_mode_does_not_hide_it(seed):
    torch.manual_seed(seed)
    model, (x, y) = Always().eval(), batch()
    for call in (
        lambda: fisher_diagonal(model, (x, y)),
        lambda: sharpness(model, (x, y)),
        lambda: fastfip.FisherPenalty(model)(x, y),
    ):
        with pytest.raises(ModelError, match=r"random.*in eval mode too.*forward="):
            call()


def test_random_numbers_without_an_effect_are_none_of_our_business():
    model = Lambda(lambda m, x: m.head(x[:, 0] + 0 * torch.rand(1)), head=nn.Linear(8, 3)).eval()
    state = torch.get_rng_state()
    x, y = batch()
    torch.set_rng_state(state)
    fisher_diagonal(model, (x, y))
    after = torch.rand(1)
    torch.set_rng_state(state)
    model(x)
    torch.testing.assert_close(torch.rand(1), after)  # only the pass that counts has drawn


def test_the_pass_is_tried_once_for_a_model_and_its_modes():
    calls = []
    model = Lambda(lambda m, x: calls.append(1) or m.head(x[:, 0]), head=nn.Linear(8, 3)).eval()
    data = batch()
    counts = []
    for flag in (False, False, True, True, False):
        model.train(flag)
        calls.clear()
        fisher_diagonal(model, data)
        counts.append(len(calls))
    assert counts == [3, 1, 3, 1, 1]


def test_dropout_is_noticed_by_the_backward_pass_in_the_graph_too():
    (x, y) = batch()
    for make in (attention, recurrent):
        model = make()
        with pytest.raises(ModelError, match="dropout"):
            backward_with_fisher(F.cross_entropy(model(x), y, reduction="none"), model)


@pytest.mark.parametrize("way", WAYS)
def test_float64_data_for_a_float32_model_is_one_line(way):
    model, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(32, 3)), batch()
    for _ in range(2):
        with pytest.raises(DataError, match=r"data are float64.*float32.*x\.to\(torch\.float32\)"):
            WAYS[way](model, x.double(), y)
        WAYS[way](model, x, y)  # and the second time, when the model is known


def test_a_sharded_model_is_refused_at_every_door():
    """Its parameters have no values of their own here, and what was found of them was silently zero."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        x, y = torch.randn(N, 6), torch.arange(N) % 3
        for call in (lambda: fisher_diagonal(model, [(x, y)]), lambda: fisher_trace(model, x, y)):
            with pytest.raises(ConfigError, match="sharded over processes, and group=None is this process alone"):
                call()
        assert fisher_diagonal(model, [(x, y)], group="auto").n == N  # a group of one process
        for call in (
            lambda: backward_with_fisher(F.cross_entropy(model(x), y, reduction="none"), model),
            lambda: sharpness(model, [(x, y)]),
            *(lambda way=way: fastfip.FisherPenalty(model, way)(x, y) for way in ("auto", "exact", "perturb", "signs")),
        ):
            with pytest.raises(ModelError, match=r"sharded over processes: take it as it was before fully_shard.*\Z"):
                call()
    finally:
        dist.destroy_process_group()
