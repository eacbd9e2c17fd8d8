"""What purify finds out before it tunes anything: the memory layout, and whether model and data fit each other."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastfip
from fastfip import methods
from fastfip.errors import DataError
from fastfip.metrics.evaluation import binomial_tail, wilson
from tests.support.small_nets import CLASSES, conv_net, data, plain_net, same, settings_of, values


class Viewing(nn.Module):
    """Flattens as authors do, with activations in place and functional dropout; input [N, 2, 6, 6]."""

    def __init__(self, flatten=lambda x: x.view(x.size(0), -1)):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(72, CLASSES)
        self.flatten = flatten
        self.layouts = []

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.dropout(x, 0.2, training=self.training)
        x = F.max_pool2d(F.relu_(self.conv2(x)), 2)
        self.layouts.append(x.is_contiguous())
        return self.fc(self.flatten(x))


class ByMemory(torch.autograd.Function):
    """Flattens in the order of the memory: another order in another layout, and no error."""

    @staticmethod
    def forward(ctx, x):
        return x.as_strided((x.shape[0], x[0].numel()), (x[0].numel(), 1)).clone()

    @staticmethod
    def backward(ctx, g):
        return g.view(-1, 8, 3, 3)


@pytest.mark.parametrize("method", methods.names())
def test_a_model_that_flattens_with_a_view_is_purified_by_every_method(method):
    model = Viewing()
    before = values(model)
    result = fastfip.purify(model, data(24), method, steps=3, progress=False, **settings_of(method, model))
    assert same(values(model), before) and not same(result.state_dict(), before)
    assert all(p.is_contiguous() for p in result.model.parameters())


def test_a_layout_that_changes_values_is_taken_back():
    model = Viewing(ByMemory.apply)
    result = fastfip.purify(model, data(24), "fine_tune", steps=3, progress=False)
    assert all(result.model.layouts[-3:]) and not same(result.state_dict(), values(model))


def test_the_faster_layout_is_used_where_it_changes_nothing():
    model = Viewing(lambda x: x.flatten(1))
    result = fastfip.purify(model, data(24), "fine_tune", steps=3, progress=False)
    assert not any(result.model.layouts[-3:])


def trained(kind=conv_net):
    torch.manual_seed(0)
    model, (x, y) = kind(), data(60, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def good():
    return trained()


def refusal(model, clean, **options):
    before = values(model)
    with pytest.raises(DataError, match="force=True goes on") as caught:
        fastfip.purify(model, clean, "fine_tune", steps=1, progress=False, **options)
    assert "\n" not in str(caught.value) and same(values(model), before)
    return str(caught.value)


def notes(model, clean, **options):
    result = fastfip.purify(model, clean, "fine_tune", steps=1, progress=False, **options)
    return [note for note in result.notes if "received model" in note]


@pytest.mark.fit
@pytest.mark.parametrize("inplace", [False, True])
def test_labels_in_another_order_are_refused_with_what_to_look_at(good, inplace):
    x, y = data(60, seed=2)
    text = refusal(copy.deepcopy(good), (x, (y + 1) % CLASSES), inplace=inplace)
    assert (
        "0.0 % of 60 clean samples" in text
        and "guessing: 33.3 %" in text
        and "order of channels and of classes" in text
    )


@pytest.mark.fit
def test_images_on_another_scale_and_an_untrained_model_are_refused(good):
    x, y = data(60, seed=2)
    assert "how images are scaled" in refusal(good, (-40 * x + 20, y))
    torch.manual_seed(0)
    assert "is the trained one" in refusal(plain_net(), (x, y))


@pytest.mark.fit
def test_force_goes_on_and_says_so(good):
    x, y = data(60, seed=2)
    assert "do not fit each other" in notes(good, (x, (y + 1) % CLASSES), force=True)[0]


@pytest.mark.fit
def test_a_model_that_fits_is_purified_without_a_word(good):
    assert not notes(good, data(60, seed=2))
    assert not notes(good, data(3, seed=2))


@pytest.mark.fit
def test_a_few_wrong_answers_refuse_nothing(good):
    x, y = data(2, seed=2)
    assert "suspicious" in notes(good, (x, (y + 1) % CLASSES))[0]


class Weak(nn.Module):
    """Right on a given share of the samples, which carry their labels and numbers; input [N, 2]."""

    def __init__(self, share, classes, sharpness=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(sharpness))
        self.share, self.classes = share, classes

    def forward(self, x):
        label, number = x[:, 0].long(), x[:, 1]
        answer = torch.where(number < self.share, label, (label + 1) % self.classes)
        return self.scale * F.one_hot(answer, self.classes)


def numbered(n, classes):
    y = torch.arange(n) % classes
    return torch.stack([y.float(), (torch.randperm(n) + 0.5) / n], 1), y


@pytest.mark.fit
@pytest.mark.parametrize(
    ("share", "classes", "n", "sharpness", "verdict"),
    [
        (0.60, 2, 500, 0.5, "suspiciously bad"),  # weak, but no guess
        (0.50, 2, 500, 0.5, "refused"),
        (0.30, 100, 1000, 1.5, "suspiciously bad"),
        (0.30, 100, 1000, 20.0, "refused"),  # and as wrong as that: a loss far above ln C
        (0.70, 100, 1000, 30.0, "suspiciously bad"),  # over-confident, but right: the loss alone decides nothing
        (0.053, 43, 500, 30.0, "refused"),
        (0.02, 43, 500, 1.5, "refused"),
        (0.90, 10, 500, 4.0, ""),
        (0.70, 10, 500, 9.0, "99.9 % sure of itself"),
        (0.10, 10, 10, 1.5, "suspiciously bad"),
        (0.50, 2, 10, 0.5, ""),
    ],
)
def test_what_is_refused_what_is_said_and_what_passes(share, classes, n, sharpness, verdict):
    model, clean = Weak(share, classes, sharpness), numbered(n, classes)
    if verdict == "refused":
        refusal(model, clean)
        return
    said = notes(model, clean)
    assert (verdict in said[0]) if verdict else not said


@pytest.mark.fit
def test_with_a_loss_of_the_users_nothing_is_refused(good):
    x, y = data(60, seed=2)

    def loss(logits, batch):
        return F.cross_entropy(logits, (batch[1] - 1) % CLASSES, reduction="none")

    assert notes(good, (x, (y + 1) % CLASSES), loss=loss)
    result = fastfip.purify(
        nn.Sequential(good, nn.Linear(CLASSES, 1), nn.Flatten(0)), (x, y.float()), "fine_tune", steps=1, progress=False,
        loss=lambda out, batch: (out - batch[1]).pow(2),
    )  # fmt: skip
    assert not [note for note in result.notes if "received model" in note]


@pytest.mark.fit
def test_samples_that_are_sorted_by_class_are_asked_evenly():
    x, y = numbered(3000, 3)
    order = y.argsort(stable=True)
    model = Weak(0.9, 3, 3.0)
    assert not notes(model, (x[order], y[order]))


def test_the_intervals_and_tails_are_those_of_the_textbooks():
    low, high = wilson(0.5, 10)
    assert (low, high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert wilson(1.0, 1)[0] == pytest.approx(0.2065, abs=1e-4) and wilson(0.0, 5)[0] == 0 and wilson(1.0, 5)[1] == 1
    assert binomial_tail(0, 7, 0.3) == pytest.approx(1) and binomial_tail(7, 7, 0.3) == pytest.approx(0.3**7)
    assert binomial_tail(2, 3, 0.5) == pytest.approx(0.5) and binomial_tail(900, 1000, 0.001) < 1e-300
