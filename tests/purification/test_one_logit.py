"""One logit with the binary cross-entropy is two classes, and several labels a sample have an accuracy too."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import fastfip
from fastfip.data.cleanset import CleanSet
from fastfip.data.outputs import two_columns
from fastfip.data.task import Task
from fastfip.errors import DataError
from tests.support.small_nets import data

pytestmark = pytest.mark.usefixtures("short_search")


class OneLogit(nn.Module):
    """A classifier of two classes with one output; input [N, 2, 6, 6]."""

    def __init__(self, sigmoid=False, column=True):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 8, 3), nn.Linear(128, 1)
        self.sigmoid, self.column = sigmoid, column

    def forward(self, x):
        x = F.relu(self.conv(x))
        z = self.fc(x.view(x.size(0), -1))
        z = torch.sigmoid(z) if self.sigmoid else z
        return z if self.column else z.squeeze(1)


def binary(n=40):
    return data(n, classes=2)


def with_logits(out, batch):
    return F.binary_cross_entropy_with_logits(out.reshape(-1), batch[1].float().reshape(-1), reduction="none")


def with_probabilities(out, batch):
    return F.binary_cross_entropy(out.reshape(-1), batch[1].float().reshape(-1), reduction="none")


def made(**options):
    torch.manual_seed(0)
    return OneLogit(**options)


class TwoColumns(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return two_columns(self.inner(x))


def test_the_two_columns_have_the_same_loss():
    z, y = torch.randn(9, 1, dtype=torch.float64), torch.arange(9) % 2
    right = F.binary_cross_entropy_with_logits(z[:, 0], y.double(), reduction="none")
    torch.testing.assert_close(F.cross_entropy(two_columns(z), y, reduction="none"), right)
    torch.testing.assert_close(F.cross_entropy(two_columns(z.sigmoid(), True), y, reduction="none"), right)


@pytest.mark.parametrize("form", ["float column", "float", "long", "bool", "live"])
@pytest.mark.parametrize("method", ["fast_wfip", "wfip", "fine_tune"])
def test_one_logit_is_purified_as_the_two_columns_are(method, form):
    x, y = binary()
    labels = {"float column": y.float()[:, None], "float": y.float(), "bool": y.bool()}.get(form, y)
    clean = (x, labels)
    if form == "live":
        clean = DataLoader([(x[i], float(y[i])) for i in range(len(y))], batch_size=len(y))
    options = {"steps": 4, "progress": False}
    result = fastfip.purify(made(), clean, method, loss=with_logits, **options)
    expected = fastfip.purify(TwoColumns(made()), (x, y), method, **options)
    if form != "live":  # whose batches are of another size
        for name, value in result.state_dict().items():
            torch.testing.assert_close(value, expected.state_dict()[f"inner.{name}"], rtol=1e-4, atol=1e-6)
    assert result.before.acc == expected.before.acc and not result.alerts
    assert any("as two classes" in note for note in result.notes)


@pytest.mark.parametrize("column", [False, True])
def test_without_a_loss_whole_labels_are_enough(column):
    x, y = binary()
    a = fastfip.purify(made(column=column), (x, y), "fine_tune", steps=4, progress=False)
    b = fastfip.purify(made(), (x, y), "fine_tune", steps=4, loss=with_logits, progress=False)
    assert all(torch.equal(a.state_dict()[k], b.state_dict()[k]) for k in a.state_dict())
    with pytest.raises(DataError, match=r"y\.long\(\)"):
        fastfip.purify(made(), (x, y.float()), "fine_tune")


def test_a_sigmoid_inside_the_model_is_known_by_its_loss():
    x, y = binary()
    a = fastfip.purify(
        made(sigmoid=True), (x, y.float()), "fast_wfip", steps=4, loss=with_probabilities, progress=False
    )
    b = fastfip.purify(made(), (x, y), "fast_wfip", steps=4, progress=False)
    for name, value in a.state_dict().items():
        torch.testing.assert_close(value, b.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_another_loss_keeps_its_own_sense():
    x, y = binary()
    result = fastfip.purify(
        made(), (x, y.float()), "fine_tune", steps=2, progress=False,
        loss=lambda out, batch: (out.reshape(-1) - batch[1]).pow(2),
    )  # fmt: skip
    assert result.after.acc is None and not any("two classes" in note for note in result.notes)


def test_accuracy_and_attack_success_of_one_logit():
    x, y = binary()
    model = made().eval()
    right = float(((model(x)[:, 0] > 0) == y.bool()).float().mean())
    hit = float((model(x)[:, 0] > 0)[y == 0].float().mean())
    triggered = [(x, torch.ones_like(y), y)]
    for labels, loss in ((y, None), (y.float()[:, None], with_logits)):
        measured = fastfip.evaluate(model, [(x, labels)], triggered, loss=loss)
        assert measured.acc == pytest.approx(right) and measured.asr == pytest.approx(hit) and measured.n == len(y)
        assert measured.loss == pytest.approx(float(with_logits(model(x), (x, y)).mean().detach()), rel=1e-5)
    sigmoid = fastfip.evaluate(made(sigmoid=True), [(x, y.float())], loss=with_probabilities)
    assert sigmoid.acc == pytest.approx(right)
    result = fastfip.purify(
        made(), (x, y.float()[:, None]), "fine_tune", steps=1, loss=with_logits, progress=False,
        test_loader=[(x, y.float()[:, None])], asr_loader=triggered,
    )  # fmt: skip
    assert result.before.acc == pytest.approx(right) and result.before.asr == pytest.approx(hit)


def test_labels_that_turn_out_to_be_no_two_classes_are_named():
    x, y = binary()
    clean = CleanSet.of([(x[:20], y[:20].float()), (x[20:], y[20:] + 0.5)], Task(loss_hook=with_logits))
    with pytest.raises(DataError, match="labels must be 0 or 1"):
        clean.of_two_classes()


def test_several_labels_a_sample_have_an_accuracy_and_a_worst_case():
    x, _ = data(24)
    torch.manual_seed(1)
    y = (torch.rand(24, 4) > 0.5).float()
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)).eval()
    right = float(((model(x) > 0) == y.bool()).float().mean())

    def loss(out, batch):
        return F.binary_cross_entropy_with_logits(out, batch[1], reduction="none").mean(1)

    assert fastfip.evaluate(model, [(x, y)], loss=loss).acc == pytest.approx(right)
    squares = fastfip.evaluate(model, [(x, y)], loss=lambda out, batch: (out - batch[1]).pow(2).mean(1))
    assert squares.acc is None
    result = fastfip.purify(model, (x, y), "fast_wfip", steps=2, loss=loss, test_loader=[(x, y)], progress=False)
    assert result.before.acc == pytest.approx(right) and not result.alerts and "worst_case_loss" in result.history[0]
    assert any("share of labels" in note for note in result.notes)
