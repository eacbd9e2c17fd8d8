"""Nothing of the size of samples times parameters is ever made, nor copies of feature maps for a bias."""

import pytest
import torch
from torch import nn

from fastfip.fisher import fisher_diagonal
from tests.support.fisher_problems import Lambda, logits

N = 16


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(20_000, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.table(x).mean(1))


NETS = {
    "embedding": (Words, lambda: torch.randint(0, 20_000, (N, 12)), 20_000 * 16),
    "linear": (
        lambda: nn.Sequential(nn.Linear(600, 500), nn.Tanh(), nn.Linear(500, 3)), lambda: torch.randn(N, 600), 300_000
    ),
    "linear-of-tokens": (
        lambda: Lambda(lambda m, x: logits(m.a(x)), a=nn.Linear(600, 500)), lambda: torch.randn(N, 4, 600), 300_000
    ),
    "conv-bias": (
        lambda: Lambda(lambda m, x: logits(m.a(x)), a=nn.Conv2d(4, 8, 3, padding=1)), lambda: torch.randn(N, 4, 48, 48),
        N * 8 * 48 * 48,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_no_allocation_is_much_larger_than_the_largest_parameter_or_map(name):
    torch.manual_seed(0)
    make, inputs, largest = NETS[name]
    model, x, y = make().eval(), inputs(), torch.randint(0, 3, (N,))
    fisher_diagonal(model, (x, y))  # verified
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fisher_diagonal(model, (x, y))
    worst = max(event.self_cpu_memory_usage for event in profile.events())
    assert worst <= 4 * 1.1 * largest, f"{worst / 4 / largest:.1f} times {largest} numbers"
