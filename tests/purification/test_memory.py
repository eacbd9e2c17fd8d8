"""The memory model, what a pass takes by count, and the budget that chooses how many samples go together."""

import pytest
import torch
from torch import nn

import fastfip
from fastfip.data import Task
from fastfip.data.cleanset import CleanSet
from fastfip.errors import ConfigError
from fastfip.methods import get
from fastfip.methods.run import Run
from fastfip.nets.counting import tensor_peak
from fastfip.purification.memory import MemoryModel, fixed_memory, measured, parse_memory, searched

CPU = torch.device("cpu")


def mlp(wide: int = 300) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, wide), nn.ReLU(), nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, 4)
    )


def data(n: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 4


def test_a_size_is_read_as_it_is_meant():
    assert parse_memory("12GB") == 12 * 10**9 and parse_memory("1.5 GiB") == 3 * 2**29
    assert parse_memory("500m") == 5 * 10**8 and parse_memory(4096) == 4096
    for wrong in ("much", "", "-1GB", "0", 0, -5, True, 1.5, None, "12 GBit"):
        with pytest.raises(ConfigError, match="memory="):
            parse_memory(wrong)  # type: ignore[arg-type]


def test_the_peak_of_tensors_is_counted_with_what_is_freed_on_the_way():
    def call():
        a = torch.ones(1000)  # 4,000 bytes
        b = a * 2  # 8,000
        del a  # 4,000
        c = b.repeat(3)  # 16,000
        c.view(-1).add_(1)  # no memory of its own
        return (c[:10] + 1).sum()  # 16,044

    assert tensor_peak(call, CPU) == pytest.approx(16_044, abs=8)


def test_what_a_pass_keeps_for_its_backward_pass_is_counted():
    model, (x, y) = mlp(), data(8)
    small = [model[1].bias]

    def once(n):
        return lambda: torch.autograd.grad(nn.functional.cross_entropy(model(x[:n]), y[:n]), small)

    one, eight = tensor_peak(once(1), CPU), tensor_peak(once(8), CPU)
    kept = 4 * 300 * 2  # the outputs of two ReLUs; those of the layers before them are freed
    assert kept <= (eight - one) / 7 <= 4 * kept


def test_factors_and_buffers_are_those_of_the_shapes():
    model = mlp(300)
    numbers = sum(p.numel() for p in model.parameters())
    full = 4 * (192 * (192 + 300) + 300 * 600 + 4 * 304)
    spectral = fixed_memory(model, get("fast_wfip"))
    assert spectral.factors == full and spectral.copies == 0
    few = fixed_memory(model, get("fast_wfip"), rank=8)
    assert few.factors == 4 * (8 * 492 + 8 * 600 + 4 * 304)
    assert fixed_memory(model, get("fine_tune")).optimiser == 3 * 4 * numbers
    anew = fixed_memory(model, get("fine_mixing")).optimiser
    assert anew == 4 * 4 * numbers, "and the weights that tuning begins anew with"
    assert fixed_memory(model, get("fine_tune")).step == 4 * numbers
    best = fixed_memory(model, get("fine_tune"), best=True)
    assert (best.optimiser, best.step) == (4 * 4 * numbers, 0)
    assert fixed_memory(model, get("fisher_steps")).step == 2 * 4 * numbers
    assert fixed_memory(model, get("wfip"), optimizer="adam").optimiser == 4 * 4 * numbers
    half = fixed_memory(mlp(300).half(), get("fine_tune"))
    assert half.copies == 2 * numbers and half.optimiser == 3 * 4 * numbers
    frozen = frozenset(id(p) for p in model[3].parameters())
    assert fixed_memory(model, get("fine_tune"), frozen=frozen).optimiser == 12 * (numbers - 300 * 301)
    held = fixed_memory(model, get("fast_wfip"), classes=10, input_bytes=768, clean_bytes=1000)
    assert held.data == 4 * 10 * 768 + 2000 + 64 * 768


@pytest.mark.parametrize("dtype, name, copies", [
    (torch.float32, "fisher_steps", 0), (torch.float16, "fisher_steps", 2 + 4), (torch.float16, "wfip", 2 + 4),
    (torch.float16, "fine_tune", 2)])  # fmt: skip
def test_received_values_of_16_bits_are_kept_once_more_in_32(dtype, name, copies):
    model = mlp().to(dtype)
    x, y = data()
    run = Run(model, Task(), CleanSet.of((x.to(dtype), y)), get(name).Config(), CPU, torch.Generator(), classes=4)
    run.received = {key: p.detach() for key, p in model.named_parameters()}
    assert measured(run, get(name)).copies == copies * sum(p.numel() for p in model.parameters())


def test_of_very_many_classes_those_count_that_are_looked_at():
    assert searched(get("fisher_steps"), 1000) == 16 and searched(get("fisher_steps"), 64) == 64
    assert searched(get("fast_wfip"), 1000) == 1000


def test_a_model_without_numbers_has_the_same_terms():
    with torch.device("meta"):
        empty = mlp()
    assert fixed_memory(empty, get("fast_wfip")) == fixed_memory(mlp(), get("fast_wfip"))


def test_as_many_samples_are_chosen_as_the_budget_has_room_for():
    terms = MemoryModel(now=100, factors=50, decomposition=30, scratch=5, constant=5, per_sample=10)
    assert terms.fixed == 150 and terms.peak(1) == 180 and terms.peak(4) == 200
    assert terms.samples(200) == 4 and terms.samples(209) == 4 and terms.samples(210) == 5
    assert MemoryModel(now=100, step=90, decomposition=30, per_sample=10).peak(4) == 190
    assert MemoryModel(per_sample=10, least=2.2).peak(1) == 22
    assert terms.samples(180) == 2 and terms.samples(179) == 0


def test_a_budget_chooses_and_says_what_it_chose():
    x, y = data()
    options = {"steps": 3, "batch_size": 8, "force": True, "progress": False}
    result = fastfip.purify(mlp(), (x, y), "fast_wfip", memory="100GB", **options)
    assert result.settings["micro_batch"] == 64
    assert any(note.startswith("memory of 100.00 GB: micro_batch=64") for note in result.notes)
    with pytest.raises(ConfigError, match=r"1 sample in a pass .*give more"):
        fastfip.purify(mlp(), (x, y), "fast_wfip", memory="10MB", **options)
    with pytest.raises(ConfigError, match="give one"):
        fastfip.purify(mlp(), (x, y), "fast_wfip", memory="1GB", micro_batch=2, **options)
