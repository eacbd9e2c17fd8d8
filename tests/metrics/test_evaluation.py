import pytest
import torch
from torch import nn

from fastfip.errors import BackendError, ConfigError, DataError, ModelError
from fastfip.metrics import Evaluation, accuracy, attack_success_rate, der, evaluate, rir, robust_accuracy
from tests.support.small_nets import conv_net, data


class Says(nn.Module):
    """Answers what the first pixel says, of five classes."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled()
        return self.scale * nn.functional.one_hot(x.flatten(1)[:, 0].long(), 5).float()


def saying(answers):
    return torch.tensor(answers, dtype=torch.float32).view(-1, 1, 1, 1)


def test_right_answers_are_counted_by_class():
    """Over batches, and only of classes that have samples; nothing where there are no classes."""

    x, y = torch.tensor([0, 0, 1, 3, 3, 3])[:, None].float(), torch.tensor([0, 1, 1, 3, 3, 0])
    found = evaluate(Says(), [(x[:4], y[:4]), (x[4:], y[4:])])
    assert found.per_class == ((0, 1, 2), (1, 1, 2), (3, 2, 2)) and found.acc == pytest.approx(4 / 6)
    assert found.to_dict()["per_class"] == [[0, 1, 2], [1, 1, 2], [3, 2, 2]]
    other = evaluate(nn.Linear(1, 5), [(x, torch.rand(6, 5))], loss=lambda out, batch: (out - batch[1]).square().sum(1))
    assert other.per_class == ()


def test_accuracy_and_loss_over_batches_of_any_size():
    x, y = saying([0, 1, 2, 3, 4, 0, 1]), torch.tensor([0, 1, 2, 3, 0, 1, 1])
    model = Says()
    found = evaluate(model, [(x[:3], y[:3]), (x[3:], y[3:])])
    assert found.acc == pytest.approx(5 / 7) and found.n == 7
    expected = nn.functional.cross_entropy(10 * nn.functional.one_hot(x.flatten().long(), 5).float(), y)
    assert found.loss == pytest.approx(float(expected))
    assert found.asr is None and "no trigger given: ASR not measured" in found.notes
    assert accuracy(model, [(x, y)]) == pytest.approx(5 / 7)


TRUE = torch.tensor([0, 1, 2, 3, 3, 2])
ANSWERS = [2, 2, 2, 2, 3, 1]  # the target is 2: of the four other images 0, 1, 3 are caught, one is right


@pytest.mark.parametrize(
    "batch",
    [
        (saying(ANSWERS), torch.full((6,), 2), TRUE),
        (saying(ANSWERS), torch.full((6,), 2), torch.arange(6), torch.ones(6), TRUE),
        {"x": saying(ANSWERS), "labels": torch.full((6,), 2), "original_label": TRUE},
    ],
)
def test_images_of_the_target_class_never_count(batch):
    found = evaluate(Says(), None, [batch])
    assert (found.asr, found.ra, found.n_triggered) == (0.75, 0.25, 4)
    assert attack_success_rate(Says(), [batch]) == 0.75 and robust_accuracy(Says(), [batch]) == 0.25
    assert found.acc is None and found.loss is None


def test_a_target_turns_true_labels_into_an_attack():
    found = evaluate(Says(), None, [(saying(ANSWERS), TRUE)], target=2)
    assert (found.asr, found.ra, found.n_triggered) == (0.75, 0.25, 4)
    triples = [(saying(ANSWERS), torch.full((6,), 4), TRUE)]
    assert evaluate(Says(), None, triples, target=2).asr == 0.75


def test_pairs_without_true_labels_have_no_robust_accuracy():
    batch = (saying(ANSWERS), torch.full((6,), 2))
    found = evaluate(Says(), None, [batch])
    assert (found.asr, found.ra, found.n_triggered) == (4 / 6, None, 6)
    assert any("RA not measured" in note for note in found.notes)
    with pytest.raises(DataError, match="true labels"):
        robust_accuracy(Says(), [batch])


def test_five_with_indicator_zero_carry_no_trigger():
    indicator = torch.tensor([1, 0, 1, 1, 0, 1])
    found = evaluate(Says(), None, [(saying(ANSWERS), torch.full((6,), 2), torch.arange(6), indicator, TRUE)])
    assert (found.asr, found.n_triggered) == (1.0, 2)


def test_all_to_all():
    found = evaluate(Says(), None, [(saying([1, 2, 2]), torch.tensor([1, 2, 3]), torch.tensor([0, 1, 2]))])
    assert (found.asr, found.ra, found.n_triggered) == (2 / 3, 1 / 3, 3)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((saying([2]), torch.tensor([2]), torch.tensor([2])), "no triggered image counts"),
        ((saying([2]), torch.tensor([5]), torch.tensor([1])), "outside"),
        ((saying([2]), torch.tensor([2.0])), "labels are float32"),
        ((saying([2]), torch.tensor([2]), torch.tensor([0.5])), "labels are float32"),
        ((saying([2]), *[torch.tensor([2])] * 3), "a triggered batch of 4 items"),
        ((torch.zeros(1, 1, 1, 1, dtype=torch.uint8), torch.tensor([2])), "uint8"),
    ],
)
def test_triggered_data_that_cannot_be_used(batch, words):
    with pytest.raises(DataError, match=words):
        evaluate(Says(), None, [batch])


def test_test_data_that_cannot_be_used():
    for bad, words in (
        ([], "no samples"),
        ([(saying([1]), torch.tensor([7]))], "outside"),
        ([(saying([1]), torch.tensor([-1]))], "outside"),
    ):
        with pytest.raises(DataError, match=words):
            evaluate(Says(), bad)
    with pytest.raises((DataError, ModelError), match="outside"):
        evaluate(nn.Sequential(nn.Flatten(), nn.Linear(1, 1)), [(saying([1]), torch.tensor([2]))])


def test_the_model_is_left_as_it_was():
    model = conv_net()
    model[1].eval()
    flags = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    evaluate(model, [data(6)], [(*data(6), data(6)[1])], target=1)
    assert flags == [m.training for m in model.modules()]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with pytest.raises(DataError):
        evaluate(model, [(data(6)[0], data(6)[1] + 9)])
    assert flags == [m.training for m in model.modules()]


def test_hooks():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Says()

        def forward(self, x):
            return None, self.inner(x)

    batch = {"picture": saying([0, 1]), "y": torch.tensor([0, 0]), "true_label": torch.tensor([3, 1])}
    forward = lambda model, batch: model(batch["picture"])[1]  # noqa: E731
    found = evaluate(Pair(), [batch], [batch], forward=forward)
    assert (found.acc, found.asr, found.ra) == (0.5, 0.5, 0.5)
    found = evaluate(Says(), [(saying([1, 2]), torch.rand(2))], loss=lambda logits, batch: logits[:, 0] * 0 + batch[1])
    assert found.acc is None and found.loss is not None and any("ACC not measured" in note for note in found.notes)


def test_der_and_rir_by_their_formulas():
    before, after = Evaluation(acc=0.9182, asr=0.9379, ra=0.05), Evaluation(acc=0.9029, asr=0.0170, ra=0.80)
    assert der(before, after) == pytest.approx(0.9528, abs=1e-4)  # FT-SAM, table of CIFAR-10, BadNets-A2O, FT: 95.28
    assert rir(before, after) == pytest.approx((0.75 - 0.0153 + 1) / 2)
    # Lost accuracy lowers both; the released RIR raises it.
    worse = Evaluation(acc=0.80, asr=0.0170, ra=0.80)
    assert der(before, worse) < der(before, after) and rir(before, worse) < rir(before, after)
    # Nothing is gained by more accuracy, nothing lost by what was not there.
    better = Evaluation(acc=0.99, asr=0.0170, ra=0.80)
    assert der(before, better) == pytest.approx((0.9209 + 1) / 2)
    assert der(after, before) == rir(after, before) == 0.5
    assert rir(before, Evaluation(acc=0.9182, asr=0.9, ra=0.0)) == 0.5
    with pytest.raises(DataError, match="ASR was not measured: pass asr_loader="):
        der(Evaluation(acc=1.0), Evaluation(acc=1.0))
    with pytest.raises(DataError, match="ACC was not measured: pass test_loader="):
        der(Evaluation(asr=1.0), Evaluation(asr=1.0))


def test_an_evaluation_reads_well():
    assert str(Evaluation(acc=0.5, asr=0.25, loss=1.0)) == "ACC 50.00 %, ASR 25.00 %, loss 1.0000"
    assert str(Evaluation()) == "nothing measured"
    assert Evaluation(acc=0.5).to_dict()["acc"] == 0.5


def test_devices_that_cannot_be_used():
    batch = (saying(ANSWERS), TRUE)
    with pytest.raises(ConfigError, match="device='foo': give cpu"):
        evaluate(Says(), [batch], device="foo")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="'cuda' cannot be used here"):
            evaluate(Says(), [batch], device="cuda")
