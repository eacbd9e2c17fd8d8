"""Shifts that save memory: neither W(delta) nor its gradient is kept, and the numbers are the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfip.spectral import SpectralShifts
from fastfip.spectral.weight import SMALL

SHAPES = [(300, 300), (520, 280), (280, 520)]


def net(singular: bool) -> nn.Module:
    """Layers wider than `SMALL`; singular ones have directions that nothing can be divided by."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(8, 150, 8), nn.Flatten(), nn.Linear(150, SHAPES[0][1])]
    for (o, i), (following, _) in zip(SHAPES, [(s[1], 0) for s in SHAPES[1:]] + [(5, 0)]):
        layers += [nn.Tanh(), nn.Linear(i, o), nn.Linear(o, following)]
    model = nn.Sequential(*layers).double().eval()
    if singular:
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() == 2 and min(p.shape) > 8:
                    u, s, vh = torch.linalg.svd(p, full_matrices=False)
                    p.copy_(u @ torch.diag(torch.where(torch.arange(len(s)) % 3 == 2, s * 1e-9, s)) @ vh)
    return model.requires_grad_(False)


def step(shifts: SpectralShifts, model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    x = x.clone().requires_grad_(True)
    shifts.refresh()
    out = model(x)
    F.cross_entropy(out, torch.arange(len(x)) % 5).backward()
    shifts.collect()
    assert x.grad is not None
    return out.detach(), [delta.grad.clone() for delta in shifts.deltas if delta.grad is not None], x.grad


@pytest.mark.parametrize("singular", [False, True])
@pytest.mark.parametrize("n", [2, 700])
def test_what_is_saved_changes_no_number(singular, n):
    model, x = net(singular), torch.randn(n, 8, 8, 8, dtype=torch.float64)
    shifts = SpectralShifts.of(model)
    generator = torch.Generator().manual_seed(1)
    for shift in shifts.shifts:
        moved = 0.3 * torch.rand(shift.delta.shape, generator=generator, dtype=torch.float64) * shift.sigma
        shift.delta.data.copy_(moved)
    usual = step(shifts, model, x)
    for delta in shifts.deltas:
        delta.grad = None
    shifts.frugal = True
    saving = step(shifts, model, x)
    torch.testing.assert_close(saving[0], usual[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(saving[2], usual[2], rtol=1e-7, atol=1e-14)
    assert len(saving[1]) == len(usual[1]) == len(shifts)
    for mine, right in zip(saving[1], usual[1]):
        assert float((mine - right).norm()) <= 1e-7 * float(right.norm())


def test_no_large_weight_is_made_in_passes_with_and_without_gradients():
    model, x = net(False), torch.randn(2, 8, 8, 8, dtype=torch.float64)
    shifts = SpectralShifts.of(model)
    step(shifts, model, x)
    large = [shift for shift in shifts.shifts if shift.weight.numel() > SMALL]
    assert any(shift.held or shift.value is not None for shift in large)
    shifts.frugal = True
    shifts.refresh()
    for shift in shifts.shifts:
        shift.value = None
    with torch.no_grad():
        first = model(x)
    second = model(x)
    torch.testing.assert_close(first, second, rtol=1e-12, atol=0)
    assert large and not any(shift.held or shift.value is not None for shift in large)


def test_the_models_own_weights_are_there_for_a_block_and_what_was_made_is_kept():
    model, x = net(False), torch.randn(3, 8, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        own = model(x)
    shifts = SpectralShifts.of(model)
    for shift in shifts.shifts:
        shift.delta.data.fill_(0.05)
    shifts.refresh()
    moved = model(x)
    made = [dict(shift.held) for shift in shifts.shifts]
    with shifts.aside(), torch.no_grad():
        assert torch.equal(model(x), own)
    assert torch.equal(model(x), moved) and not torch.equal(moved, own)
    assert [dict(shift.held) for shift in shifts.shifts] == made


def test_folding_apart_leaves_the_old_memory_as_it_is():
    model, x = net(False), torch.randn(3, 8, 8, 8, dtype=torch.float64)
    held = [p.detach() for p in model.parameters()]
    before = [p.clone() for p in held]
    shifts = SpectralShifts.of(model)
    for shift in shifts.shifts:
        shift.delta.data.fill_(0.05)
    shifts.refresh()
    moved = model(x)
    shifts.fold_apart()
    torch.testing.assert_close(model(x), moved.detach(), rtol=1e-9, atol=1e-12)
    assert all(torch.equal(now, then) for now, then in zip(held, before)) and not len(shifts)
