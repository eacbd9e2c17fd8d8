import pytest
import torch
import torch.nn.functional as F

import fastfip
from fastfip.data import Task
from fastfip.data.augment import augmented, mirrored, movable, pieced, shifted
from fastfip.methods.fine_tune import FineTune
from tests.support.small_nets import conv_net, data, plain_net


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mirror", [False, True])
def test_a_shift_is_a_crop_of_the_padded_image(mirror, layout):
    x = torch.randn(9, 2, 6, 5, generator=seed()).to(memory_format=layout)
    down, right = (torch.tensor(v) for v in ([0, 1, 2, -1, -2, 0, 0, 2, -1], [0, 0, 1, 0, -1, 2, -2, -2, 1]))
    mirrored = torch.full((9,), mirror)
    found = shifted(x, down, right, mirrored)
    for n in range(9):
        source = x[n].flip(2) if mirror else x[n]
        for c in range(2):
            padded = F.pad(source[c], (2, 2, 2, 2), value=float(x[:, c].min()))
            top, left = 2 - int(down[n]), 2 - int(right[n])
            assert torch.equal(found[n, c], padded[top : top + 6, left : left + 5])


def test_images_move_by_an_eighth_at_most_and_are_mirrored_in_half_the_cases():
    x = torch.zeros(400, 1, 32, 16)
    x[:, :, 16, 6] = 1
    task = Task()
    for flip in (False, True):
        moved, y = augmented(task, (x, torch.zeros(400)), flip, seed())
        assert torch.equal(y, torch.zeros(400)) and float(x.sum()) == 400
        places = moved.flatten(1).argmax(1)
        rows, columns = places // 16, places % 16
        assert set(rows.tolist()) == set(range(12, 21))
        home, mirrored = ((columns - c).abs() <= 2 for c in (6, 9))
        assert bool((home | mirrored).all()) and bool(home.all()) != flip
        if flip:
            assert 80 < int((columns <= 6).sum()) < 160  # half of them, moved to four, five or six


def test_the_generator_decides_and_dicts_are_batches_too():
    x, y = data()
    task = Task()
    first, again, other = (augmented(task, {"image": x, "label": y}, True, seed(n)) for n in (1, 1, 2))
    assert torch.equal(first["image"], again["image"]) and not torch.equal(first["image"], other["image"])
    assert first["label"] is y


@pytest.mark.parametrize("x", [torch.randn(4, 3), torch.randint(0, 9, (4, 1, 6, 6)), torch.randn(4, 2, 6)])
def test_what_is_no_image_is_left_alone(x):
    assert augmented(Task(), (x, torch.zeros(4)), True, seed()) is None


class Seen(FineTune):
    name = "seen"
    images: list = []

    def backward(self, run, batch):
        Seen.images.append(run.task.inputs(batch).clone())
        return super().backward(run, batch)


@pytest.mark.parametrize("how", ["none", "crop", "crop_flip"])
def test_the_loop_augments_what_is_tuned_on(how):
    x, y = data()
    results = []
    for _ in range(2):
        Seen.images = []
        results.append(fastfip.purify(plain_net(), (x, y), Seen, epochs=2, augment=how, batch_size=8, progress=False))
        received = {tuple(image.flatten().tolist()) for image in x}
        same = [tuple(image.flatten().tolist()) in received for batch in Seen.images for image in batch]
        assert len(same) > 30 and all(same) == (how == "none")


def test_augmented_runs_are_reproducible():
    torch.manual_seed(0)
    model, (x, y) = conv_net(), data()
    runs = [fastfip.purify(model, (x, y), "ft_sam", epochs=2, augment="crop_flip", progress=False) for _ in range(2)]
    for a, b in zip(*(run.model.state_dict().values() for run in runs)):
        assert torch.equal(a, b)


def test_a_note_says_that_nothing_was_augmented():
    x, y = torch.randn(24, 5, generator=seed()), torch.arange(24) % 3
    result = fastfip.purify(torch.nn.Linear(5, 3), (x, y), "fine_tune", epochs=1, augment="crop", progress=False)
    assert any("not augmented" in note for note in result.notes)


@pytest.mark.parametrize("axis", [1, 2])
def test_all_frames_of_a_clip_move_alike(axis):
    x = torch.rand(40, 3, 8, 8, generator=seed()).unsqueeze(axis).repeat_interleave(4, axis)
    moved, _ = augmented(Task(), (x, torch.zeros(40)), True, seed())
    assert moved.shape == x.shape and not torch.equal(moved, x)
    first, *others = moved.unbind(axis)
    assert all(torch.equal(first, other) for other in others)
    turned, _ = mirrored(Task(), (x, torch.zeros(40)), torch.arange(40) < 20)
    assert torch.equal(turned[:20], x[:20].flip(-1)) and torch.equal(turned[20:], x[20:])


def test_images_whose_labels_speak_of_places_are_not_moved():
    x, boxes = torch.rand(8, 3, 8, 8, generator=seed()), torch.rand(8, 2, 5, generator=seed())
    own = Task(None, lambda out, batch: out.flatten(1).mean(1))
    assert movable(Task(), (x, torch.arange(8)), 8)
    assert movable(own, (x, torch.ones(8, 4)), None)  # several labels of each image
    assert not movable(own, (x, boxes), None) and not movable(own, (x, torch.rand(8)), None)
    net = torch.nn.Conv2d(3, 1, 1)
    seen = []
    result = fastfip.purify(
        net, (x, boxes), "fine_tune", augment="crop", steps=2, progress=False,
        forward=lambda model, batch: seen.append(batch[0]) or model(batch[0]), loss=own.loss_hook,
    )  # fmt: skip
    assert all((image == x).flatten(1).all(1).any() for batch in seen for image in batch)
    assert any("places" in note for note in result.notes)


@pytest.mark.parametrize("shape", [(40, 2, 12, 9), (40, 2, 3, 12, 9)])
def test_images_are_pieced_together_of_a_rectangle_of_the_next_one(shape):
    x = torch.arange(40.0).reshape(-1, *[1] * (len(shape) - 1)).expand(shape).clone()
    areas, corners = [], set()
    for number in range(30):
        found, y = pieced(Task(), (x, torch.arange(40)), seed(number))
        assert torch.equal(y, torch.arange(40))
        for n in range(40):
            assert set(found[n].unique().tolist()) <= {float(n), float((n - 1) % 40)}
            other = found[n] == (n - 1) % 40
            flat = other.flatten(0, -3)
            assert bool((flat == flat[0]).all()), "all channels and frames alike"
            rows, columns = flat[0].any(1), flat[0].any(0)
            assert torch.equal(flat[0], rows[:, None] & columns), "a rectangle"
            areas.append(float(flat[0].float().mean()))
            if areas[-1]:
                corners.add((int(rows.int().argmax()), int(columns.int().argmax())))
    assert min(areas) < 0.02 and max(areas) == 1 and 0.47 < sum(areas) / len(areas) < 0.53
    assert len(corners) > 40
    same = torch.rand(4, 7), torch.arange(4)
    assert pieced(Task(), same, seed()) is same, "no images"
