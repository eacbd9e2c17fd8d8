"""Clean samples without labels: the received model's answers are taken, in every form that data may have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fastfip
from fastfip.data.task import Task
from fastfip.errors import DataError
from fastfip.purification.door import with_answers

X = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))


class _Images(Dataset):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> Tensor:
        return X[i]


class _Restarting:
    """Begins anew when it is asked for an iterator, and is its own, as loaders of other libraries are."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        self.rest = list(self.batches)
        return self

    def __next__(self) -> Any:
        if not self.rest:
            raise StopIteration
        return self.rest.pop(0)


def _model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)).train()


def _answered(model: nn.Module, data: Any) -> tuple[Any, bool]:
    return with_answers(model, data, Task(), torch.device("cpu"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: X,
        lambda: (X,),
        lambda: _Images(),
        lambda: TensorDataset(X),
        lambda: DataLoader(_Images(), batch_size=7, shuffle=True),
        lambda: DataLoader(TensorDataset(X), batch_size=7),
        lambda: (part for part in X.split(7)),
        lambda: _Restarting([(part,) for part in X.split(7)]),
        lambda: list(X.split(7)),
        lambda: X.numpy(),
        lambda: [(part,) for part in X.split(7)],
        lambda: [{"x": part} for part in X.split(7)],
        lambda: {"x": X},
    ],
)
def test_the_answers_in_eval_mode_become_the_labels(make: Any) -> None:
    model = _model()
    batches, without = _answered(model, make())
    assert without and model.training and model[3].training
    x = torch.cat([batch["x"] if isinstance(batch, dict) else batch[0] for batch in batches])
    y = torch.cat([batch["labels"] if isinstance(batch, dict) else batch[1] for batch in batches])
    assert torch.equal(x, X)  # each once, in the order of the dataset
    assert torch.equal(y, model.eval()(X).argmax(1))


@pytest.mark.parametrize(
    "data",
    [
        (X, torch.arange(20) % 3),
        [(X, torch.arange(20) % 3)],
        DataLoader(TensorDataset(X, torch.arange(20) % 3), batch_size=4),
        {"x": X, "label": torch.arange(20) % 3},
        {"x": X, "fine_label": torch.arange(20) % 3},
        (X.numpy(), (torch.arange(20) % 3).numpy()),
        [],
        torch.arange(4),
    ],
)
def test_what_has_labels_or_is_no_data_is_left(data: Any) -> None:
    out, without = _answered(_model(), data)
    assert not without and (out is data or out == [data])


def test_a_generator_with_labels_loses_nothing() -> None:
    batches, without = _answered(_model(), ((part, torch.zeros(len(part)).long()) for part in X.split(7)))
    assert not without and torch.equal(torch.cat([batch[0] for batch in batches]), X)


def test_purify_takes_images_alone_and_says_so() -> None:
    model = _model().eval()
    labels = model(X).argmax(1)
    alone = fastfip.purify(model, X, "fine_tune", steps=5, batch_size=8, progress=False)
    both = fastfip.purify(model, list(zip(X.split(128), labels.split(128))), "fine_tune", steps=5, batch_size=8)
    for a, b in zip(alone.model.parameters(), both.model.parameters()):
        assert torch.equal(a, b)
    assert any("no labels were given" in note for note in alone.notes)
    assert not any("no labels were given" in note for note in both.notes)


def test_one_logit_gives_labels_0_and_1_and_other_outputs_give_an_error() -> None:
    model = nn.Linear(6, 1)
    batches, _ = _answered(model, X)
    assert torch.equal(batches[0][1], (model(X)[:, 0] > 0).long())
    with pytest.raises(DataError, match="a logit or a probability"):
        _answered(nn.Sequential(nn.Linear(6, 1), nn.Sigmoid()), X)
    with pytest.raises(DataError, match="none can be read off outputs of shape"):
        _answered(nn.Unflatten(1, (1, 2, 3)), X)


def test_labelled_batches_of_what_begins_anew_are_counted_once() -> None:
    batches = list(zip(X.split(7), (torch.arange(20) % 3).split(7)))
    result = fastfip.purify(_model().eval(), _Restarting(batches), "fine_tune", steps=2, progress=False, force=True)
    assert result.settings["clean_samples"] == 20


def test_images_of_uint8_get_the_same_word_as_with_labels() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(DataError, match=r"uint8 .*scale them as the model expects"):
        fastfip.purify(model, torch.zeros(8, 1, 4, 4, dtype=torch.uint8), progress=False)
