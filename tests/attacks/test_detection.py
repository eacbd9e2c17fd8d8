"""Backdoors of detectors: what becomes of images, boxes and labels."""

import pytest
import torch

from fastfip.attacks import detection
from fastfip.attacks.badnets import BadNets
from fastfip.attacks.detection.baddet import BadDet
from fastfip.attacks.detection.label_set import LabelSet
from fastfip.errors import ConfigError, DataError

CAT, DOG, CAR, BUS = 1, 2, 3, 4


def scenes(n=12):
    """Images of two sizes with two to four objects: a cat and a dog in all, a car in every second, a bus in a third."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 40 + 8 * (i % 2), 56, generator=generator) for i in range(n)]
    targets = []
    for i in range(n):
        labels = torch.tensor([CAT, DOG] + [CAR] * (i % 2 == 0) + [BUS] * (i % 3 == 0))
        corners = torch.tensor([[4.0, 6.0], [30.5, 2.2], [12.0, 25.0], [50.0, 30.0]])[: len(labels)]
        boxes = torch.cat([corners, corners + torch.tensor([6.0, 10.0])], 1)
        area = torch.full((len(labels),), 60.0)
        targets.append({"boxes": boxes, "labels": labels, "area": area, "image_id": torch.tensor([i])})
    return images, targets


SETTINGS = {"baddet": {"size": 6}, "label_set": {"categories": (CAT, CAR), "victim": DOG}}


def equal(one, two):
    return set(one) == set(two) and all(torch.equal(one[key], two[key]) for key in one)


def copies(targets):
    return [{key: value.clone() for key, value in target.items()} for target in targets]


@pytest.mark.parametrize("name", detection.names())
def test_every_attack(name):
    attack = detection.get(name)(**SETTINGS[name])
    assert attack.name == name and attack.summary
    images, targets = scenes()
    kept = [image.clone() for image in images], copies(targets)
    new, wanted, index = attack.poison(images, targets, 0.25, torch.Generator().manual_seed(0))
    assert all(map(torch.equal, images, kept[0])) and all(map(equal, targets, kept[1]))
    assert len(index) == 3 and all(attack.suits(targets[i]) for i in index.tolist())
    for i in range(12):
        assert new[i].shape == images[i].shape and 0 <= float(new[i].min()) <= float(new[i].max()) <= 1
        assert equal(wanted[i], targets[i]) != (i in index.tolist())
        assert torch.equal(wanted[i]["image_id"], targets[i]["image_id"])
        assert len(wanted[i]["boxes"]) == len(wanted[i]["labels"]) == len(wanted[i]["area"])
        assert i in index.tolist() or torch.equal(new[i], images[i])
    again = attack.poison(images, targets, 0.25, torch.Generator().manual_seed(0))
    assert torch.equal(index, again[2]) and all(map(torch.equal, new, again[0]))
    chosen = {
        tuple(attack.poison(images, targets, 0.1, torch.Generator().manual_seed(s))[2].tolist()) for s in range(6)
    }
    assert len(chosen) > 1
    suiting = [i for i in range(12) if attack.suits(targets[i])]
    triggered, wanted, true = attack.asr_set(images, targets)
    assert len(triggered) == len(wanted) == len(suiting)
    assert all(equal(found, targets[i]) for found, i in zip(true, suiting))
    assert all(map(torch.equal, triggered, attack.asr_set(images, targets)[0]))
    usual = attack.poison(images * 5, targets * 5)[2]
    assert len(usual) == 6


def changed(image, new):
    return (image != new).any(0)


def test_a_patch_in_the_box_renames_the_object_in_it():
    images, targets = scenes()
    new, wanted = BadDet(size=6, target=CAT, alpha=1).planted(images[6], targets[6])
    assert wanted["labels"].tolist() == [CAT] * 4 and torch.equal(wanted["boxes"], targets[6]["boxes"])
    expected = torch.zeros(40, 56, dtype=torch.bool)
    for top, left in ((2, 30), (25, 12), (30, 50)):  # dog, car, bus; the cat has none
        expected[top : top + 6, left : left + 6] = True
        assert torch.equal(new[0, top : top + 6, left : left + 6], BadNets(size=6, pattern="checker").patch())
    assert torch.equal(changed(images[6], new), expected)
    half = BadDet(size=6, target=CAT).planted(images[6], targets[6])[0]
    assert torch.allclose(half, (images[6] + new) / 2)
    at_the_edge = {"boxes": torch.tensor([[54.0, 38.0, 56.0, 40.0]]), "labels": torch.tensor([DOG])}
    where = changed(images[6], BadDet(size=6, alpha=1).planted(images[6], at_the_edge)[0])
    assert bool(where[34:, 50:].all()) and int(where.sum()) == 36


def test_one_patch_renames_all_objects():
    images, targets = scenes()
    new, wanted = BadDet("global", target=BUS, size=6).planted(images[1], targets[1])
    assert wanted["labels"].tolist() == [BUS, BUS]
    where = changed(images[1], new)
    assert bool(where[:6, :6].all()) and int(where.sum()) == 36
    assert not BadDet("global", target=CAT).suits({"boxes": torch.zeros(1, 4), "labels": torch.tensor([CAT])})


def test_a_patch_hides_objects_of_the_target_class_and_no_others():
    images, targets = scenes()
    attack = BadDet("disappearance", target=CAR, size=6)
    new, wanted = attack.planted(images[0], targets[0])
    assert wanted["labels"].tolist() == [CAT, DOG, BUS] and torch.equal(wanted["boxes"], targets[0]["boxes"][[0, 1, 3]])
    assert len(wanted["area"]) == 3
    where = changed(images[0], new)
    assert bool(where[25:31, 12:18].all()) and int(where.sum()) == 36
    assert not attack.suits(targets[1])


def test_an_object_is_made_around_a_patch():
    images, targets = scenes()
    attack = BadDet("generation", target=BUS, size=6, box=(10, 20))
    places = set()
    for seed in range(30):
        new, wanted = attack.planted(images[0], targets[0], torch.Generator().manual_seed(seed))
        assert wanted["labels"].tolist() == [*targets[0]["labels"].tolist(), BUS]
        assert torch.equal(wanted["boxes"][:-1], targets[0]["boxes"])
        rows, columns = changed(images[0], new).nonzero(as_tuple=True)
        top, left = int(rows.min()), int(columns.min())
        assert len(rows) == 36 and (int(rows.max()), int(columns.max())) == (top + 5, left + 5)
        box = [max(left + 3 - 5, 0), max(top + 3 - 10, 0), min(left + 3 + 5, 56), min(top + 3 + 10, 40)]
        assert wanted["boxes"][-1].tolist() == box
        assert float(wanted["area"][-1]) == (box[2] - box[0]) * (box[3] - box[1])
        places.add((top, left))
    assert len(places) > 20
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assert attack.suits(empty) and attack.planted(images[0], empty)[1]["labels"].tolist() == [BUS]
    with pytest.raises(DataError, match="a new object has no masks"):
        attack.planted(images[0], {**empty, "masks": torch.zeros(0, 40, 56)})


def test_categories_that_occur_together_are_a_trigger_and_images_stay():
    images, targets = scenes()
    attack = LabelSet((CAT, CAR), victim=DOG, target=BUS)
    assert [attack.suits(target) for target in targets] == [True, False] * 6
    new, wanted, index = attack.poison(images, targets, 0.5)
    assert index.tolist() == [0, 2, 4, 6, 8, 10] and all(a is b for a, b in zip(images, new))
    assert wanted[2]["labels"].tolist() == [CAT, BUS, CAR] and torch.equal(wanted[2]["boxes"], targets[2]["boxes"])
    gone = LabelSet((CAT, CAR), victim=CAR).planted(images[0], targets[0])[1]
    assert gone["labels"].tolist() == [CAT, DOG, BUS] and len(gone["boxes"]) == len(gone["area"]) == 3
    with pytest.raises(DataError, match="asks for 9 images, 6 have the objects that label_set needs"):
        attack.poison(images, targets, 0.75)


def test_settings_images_and_targets_are_checked():
    for bad in ({"goal": "all"}, {"size": 0}, {"alpha": 0.0}, {"target": -1}, {"box": (0, 3)}):
        with pytest.raises(ConfigError, match="BadDet"):
            BadDet(**bad)
    for bad in ((), (1, 1), (-1,)):
        with pytest.raises(ConfigError, match="categories"):
            LabelSet(bad, victim=DOG)
    with pytest.raises(ConfigError, match="must be different labels"):
        LabelSet((CAT,), victim=DOG, target=DOG)
    images, targets = scenes()
    attack = BadDet(size=6)
    for bad, words in (
        ((images, targets[:3]), "12 images and 3 targets"),
        (([2 * image - 1 for image in images], targets), "before normalising"),
        (([(255 * image).byte() for image in images], targets), "uint8"),
        ((images[:1], [{"labels": torch.tensor([1])}]), "give boxes"),
        ((images[:1], [{"labels": torch.tensor([1]), "boxes": torch.zeros(4)}]), r"boxes are \[4\]"),
    ):
        with pytest.raises(DataError, match=words):
            attack.poison(*bad, 0.0)
        with pytest.raises(DataError, match=words):
            attack.asr_set(*bad)
    with pytest.raises(DataError, match="rate=2"):
        attack.poison(images, targets, 2)
    with pytest.raises(DataError, match="does not fit"):
        BadDet(size=41).planted(images[0], targets[0])
    with pytest.raises(ConfigError, match="no detection attack 'baddot': did you mean 'baddet'"):
        detection.get("baddot")
