"""Random changes of images: what they are, what they leave alone, and that one generator decides them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastfip.data import Task
from fastfip.worst_case import changes
from fastfip.worst_case.changes import KINDS, changed, random_change
from fastfip.worst_case.pixels import PixelRange


def images(n: int = 64, channels: int = 3, height: int = 16, width: int = 12) -> Tensor:
    x = torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(0))
    return x * torch.arange(1, channels + 1).reshape(1, -1, 1, 1) - 0.5  # each channel with a range of its own


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(64, 3, 16, 12), (5, 1, 28, 28), (7, 4, 4, 5), (1, 3, 33, 9)])
def test_three_quarters_are_changed_within_the_range_and_the_rest_is_as_it_was(shape: tuple[int, ...]) -> None:
    x = images(*shape)
    before, known = x.clone(), PixelRange.of_inputs(x)
    shares = []
    for seed in range(1 + 600 // shape[0]):
        out = random_change(x, known, generator(seed))
        assert torch.equal(x, before) and out.shape == x.shape and out.dtype == x.dtype
        assert bool(torch.isfinite(out).all())
        assert bool((out >= known.low - 1e-5).all()) and bool((out <= known.high + 1e-5).all())
        shares.append(float((out != x).flatten(1).any(1).float().mean()))
    assert 0.6 < sum(shares) / len(shares) < 0.8  # a patch or a gamma may happen to change nothing


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_each_kind_changes_most_images_and_keeps_most_of_them(number: int) -> None:
    x = torch.nn.functional.interpolate(torch.rand(64, 3, 3, 3, generator=generator(5)), (16, 12))
    out = KINDS[number](x, x, generator()).clamp(0, 1)
    moved = (out - x).abs().flatten(1).mean(1)
    another = (x.roll(1, 0) - x).abs().mean()
    assert float((moved > 0).float().mean()) > 0.9
    assert float(moved.mean()) < 0.5 * float(another)  # what is shown is still there
    if KINDS[number] is not changes._toned:
        assert not torch.equal(out, KINDS[number](x, x, generator(2)).clamp(0, 1))


def test_one_seed_gives_one_change_and_nothing_else_is_drawn_from() -> None:
    x = images()
    known = PixelRange.of_inputs(x)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = (random_change(x, known, generator()) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, random_change(x, known, generator(2)))


def test_a_patch_is_a_rectangle_of_at_most_a_quarter_of_each_side() -> None:
    x = torch.full((3000, 1, 16, 16), 0.5)
    out = changes._patched(x, x, generator())
    for one in (out != 0.5)[:, 0]:
        rows, columns = (torch.nonzero(one.any(axis)).flatten() for axis in (1, 0))
        if len(rows):
            assert int(rows.max() - rows.min()) < 4 and int(columns.max() - columns.min()) < 4
    places = (out != 0.5).float().mean((0, 1))
    assert bool((places > 0).all()), "no place of the image is spared"


def test_scaling_of_the_inputs_does_not_matter() -> None:
    x = images()
    scaled = 7 * x - 2
    out, same = (random_change(t, PixelRange.of_inputs(t), generator()) for t in (x, scaled))
    assert torch.allclose(7 * out - 2, same, atol=1e-4)


def test_a_constant_channel_and_pixels_out_of_range_do_no_harm() -> None:
    x = images()
    x[:, 0] = 0.3
    known = PixelRange.of_inputs(x)
    shifted = x.clone()
    shifted[:, :, :4] = -9.0  # black ground of a crop below the range
    assert bool(torch.isfinite(random_change(shifted, known, generator())).all())


@pytest.mark.parametrize(
    "x", [torch.zeros(4, 8), torch.zeros(4, 3, 8), torch.zeros(4, 1, 2, 2), torch.ones(4, 8).long()]
)
def test_what_is_no_image_is_not_changed(x: Tensor) -> None:
    batch = (x, torch.zeros(4, dtype=torch.int64))
    known = PixelRange.of_inputs(x.float())
    assert changed(Task(), batch, known, generator()) is None


def test_labels_stay_with_their_images() -> None:
    x, y = images(), torch.arange(64)
    out = changed(Task(), (x, y), PixelRange.of_inputs(x), generator())
    assert out is not None and torch.equal(out[1], y)
    assert float((out[0] - x).abs().flatten(1).mean(1).median()) < 0.6


@pytest.mark.parametrize("layout", ["channels first", "frames first"])
def test_all_frames_of_a_clip_are_changed_alike(layout: str) -> None:
    still = images(64)
    axis = 2 if layout == "channels first" else 1
    x = still.unsqueeze(axis).repeat_interleave(5, axis)
    known = PixelRange.of_inputs(x)
    out, _ = changed(Task(), (x, torch.arange(64)), known, generator())  # type: ignore[misc]
    assert out.shape == x.shape and 0.5 < float((out != x).flatten(1).any(1).float().mean()) < 0.95
    first, *others = out.unbind(axis)
    assert all(torch.equal(first, other) for other in others)


def test_nothing_is_warped_where_labels_speak_of_places(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> Tensor:
        raise AssertionError("warped")

    monkeypatch.setattr(changes, "_warped", forbidden)
    monkeypatch.setattr(changes, "KINDS", (*(kind for kind in KINDS if kind.__name__ != "_warped"), forbidden))
    x = images(200)
    known = PixelRange.of_inputs(x)
    assert changed(Task(), (x, torch.arange(200)), known, generator(), moved=False) is not None
    with pytest.raises(AssertionError, match="warped"):
        changed(Task(), (x, torch.arange(200)), known, generator())
