"""Which scaling and numbering of classes a model wants, found out from its accuracy on images."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from fastfip.data.images import load
from fastfip.data.scaling import STATISTICS, Pixels
from fastfip.errors import DataError, ModelError
from fastfip.metrics.scalings import try_scalings

CLASSES = 12


class Levels(nn.Module):
    """Class c wants images of the brightness (c + 0.5) / 12, in [0, 1], after its own scaling is taken back."""

    def __init__(self, wants: Pixels, numbers=range(CLASSES)):
        super().__init__()
        self.wants, self.numbers = wants, torch.tensor(list(numbers))
        self.levels = nn.Parameter((torch.arange(CLASSES) + 0.5) / CLASSES)

    def forward(self, x):
        zero, one = (self.wants.normalise(torch.full((1, 3, 1, 1), v)) for v in (0.0, 1.0))
        level = ((x - zero) / (one - zero)).mean((1, 2, 3))
        out = torch.empty(len(x), CLASSES)
        out[:, self.numbers] = -400 * (level[:, None] - self.levels) ** 2
        return out


@pytest.fixture
def images(tmp_path):
    """60 images in class folders 0 to 11, each class of its own brightness."""
    from PIL import Image

    for c in range(CLASSES):
        (tmp_path / "d" / str(c)).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(np.full((4, 4, 3), 21 * c + 8 + i, np.uint8)).save(tmp_path / "d" / str(c) / f"{i}.png")
    return tmp_path / "d"


@pytest.mark.parametrize(
    "wants",
    [Pixels(), Pixels(scale="-11"), Pixels(scale="255"), *(Pixels(*STATISTICS[n]) for n in ("imagenet", "mnist"))],
    ids=str,
)
def test_the_scaling_that_the_model_was_made_for_is_the_best(images, wants):
    model = Levels(wants).train()
    found = try_scalings(model, load(images))
    assert found.best.pixels == wants and found.best.acc == 1 and found.best.order == "number"
    assert model.training and found.n == 60 and found.classes == CLASSES
    assert found.given.pixels == Pixels() and (found.given is found.best) == (wants == Pixels())
    words = "\n".join(found.words())
    assert ("fits: x/255, classes by number as given: ACC 100.00 %" in words) == (wants == Pixels())
    assert ("does not fit as given (x/255" in words) == (wants != Pixels()) and str(wants) in words
    asked = try_scalings(model, load(images, pixels=wants))
    assert asked.given is asked.best
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_order_of_class_folders_that_the_model_was_made_for_is_found(images):
    ranks = [sorted(map(str, range(CLASSES))).index(str(c)) for c in range(CLASSES)]  # as by torchvision's ImageFolder
    model = Levels(Pixels(), ranks)
    found = try_scalings(model, load(images))
    assert found.best.order == "text" and found.best.acc == 1 and found.given.acc < 0.5
    assert "x/255, classes by text gives ACC 100.00 %" in found.words()[0]
    assert try_scalings(model, load(images, order="text")).given.acc == 1


def test_classes_in_an_order_of_their_own_are_named(images):
    numbers = [5, 3, 0, 1, 2, 4, 11, 10, 9, 8, 7, 6]
    words = "\n".join(try_scalings(Levels(Pixels(), numbers), load(images)).words())
    assert "the classes are numbered differently, 100 % of the images agree on 0 -> 5, 1 -> 3, 2 -> 0" in words


def test_images_that_the_model_knows_nothing_of_are_said_to_be_so(images):
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, CLASSES))
    nn.init.zeros_(model[1].weight)
    words = "\n".join(try_scalings(model, load(images)).words())
    assert "does not fit: ACC 8.33 % at best, chance is 8.33 %" in words and "numbered differently" not in words


class Fragile(Levels):
    """Overflows for pixels above 2."""

    def forward(self, x):
        return super().forward(x) * torch.where(x.max() > 2, torch.inf, 1.0)


def test_a_scaling_that_the_model_cannot_take_is_passed_over(images):
    found = try_scalings(Fragile(Pixels()), load(images))
    assert found.best.acc == 1 and "note: under x as it is, 0..255 the model gives no finite outputs" in found.words()
    with pytest.raises(ModelError, match="NaN or Inf"):
        try_scalings(Fragile(Pixels()), load(images, pixels=Pixels(scale="255")))


def test_a_softmax_inside_the_model_is_said_and_taken_out(images):
    found = try_scalings(nn.Sequential(Levels(Pixels()), nn.Softmax(1)), load(images))
    assert found.best.acc == 1 and any("softmax inside it" in word for word in found.words())
    assert found.best.loss == pytest.approx(try_scalings(Levels(Pixels()), load(images)).best.loss, rel=1e-3)


def test_inputs_that_are_no_images_in_0_to_1_are_measured_as_they_are(tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 3, 4, 4)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(20) % 4)
    found = try_scalings(nn.Sequential(nn.Flatten(), nn.Linear(48, 4)), load(tmp_path / "a.npz"))
    assert len(found.trials) == 1 and found.given.order == "as given"
    assert "no other scaling was tried" in found.words()[-1]
    with pytest.raises(DataError, match="labels run to 3, and the model has 3 classes"):
        try_scalings(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), load(tmp_path / "a.npz"))
    with pytest.raises(ModelError, match="fails on a batch of images 3x4x4 under x/255"):
        try_scalings(nn.Linear(3, 3), load(tmp_path / "a.npz"))
