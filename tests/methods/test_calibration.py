"""What is fitted to logits: temperatures and shifts for labels, shifts for other answers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastfip.methods import _calibration
from fastfip.methods._calibration import Calibration, levelling

CLASSES = 3


def test_calibration_is_the_best_scale_and_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(400, CLASSES, generator=generator, dtype=torch.float64)
    y = torch.multinomial((truth + torch.tensor([0.8, 0.0, -0.3])).softmax(1), 1, generator=generator)[:, 0]
    found = Calibration.of((4 * truth).float(), y)
    assert found.scale == pytest.approx(0.25, abs=0.05) and float(found.shift.sum()) == pytest.approx(0, abs=1e-5)
    assert (found.shift - torch.tensor([0.63, -0.17, -0.47])).abs().max() < 0.2
    scale = torch.tensor(found.scale, dtype=torch.float64, requires_grad=True)
    shift = found.shift.double().requires_grad_()
    loss = F.cross_entropy(scale * 4 * truth + shift, y)
    loss = loss + _calibration.RIDGE / 2 * ((scale - 1).square() + shift.square().sum())
    assert all(float(g.abs().max()) < 1e-4 for g in torch.autograd.grad(loss, [scale, shift]))
    assert torch.equal(found(truth), found.scale * truth.float() + found.shift)


def test_calibration_never_makes_answers_louder_and_shifts_nothing_without_an_end() -> None:
    y = torch.arange(40) % 2
    quiet = Calibration.of(F.one_hot(y, 3).float() * 0.1, y)
    assert quiet.scale == 1.0 and float(quiet.shift.abs().max()) < 10
    assert Calibration.of(torch.randn(40, 2, generator=torch.Generator().manual_seed(0)) * 100, y).scale == 0.05
    many = Calibration.of(torch.randn(50, 500, generator=torch.Generator().manual_seed(0)), torch.arange(50))
    assert bool(many.shift.isfinite().all()) and len(many.shift) == 500


def test_levelling_is_the_shift_by_which_each_class_is_as_likely_as_in_the_targets() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = 2 * torch.randn(500, 4, generator=generator)
    answers = targets + torch.tensor([1.0, 0.0, -2.0, 0.5]) + 0.5 * torch.randn(500, 4, generator=generator)
    shift = levelling(answers, targets)
    assert shift.dtype == torch.float32 and float(shift.sum()) == pytest.approx(0, abs=1e-5)
    due = torch.tensor([-1.0, 0.0, 2.0, -0.5]) - 0.125
    assert (shift - due).abs().max() < 0.15
    # The derivative of the mean KL in the shift is the difference of the mean probabilities, and that of the weight.
    rest = ((answers + shift).double().softmax(1) - targets.double().softmax(1)).mean(0)
    assert float((rest + _calibration.RIDGE * shift.double()).abs().max()) < 1e-3
    assert float(levelling(targets, targets).abs().max()) < 1e-4
