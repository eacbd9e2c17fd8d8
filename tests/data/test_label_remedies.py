"""What an error about labels advises is what helps: class indices, loss=, or batches in place of single samples."""

import pytest
import torch

from fastfip.data import Task
from fastfip.data.task import check_labels, iter_batches
from fastfip.errors import DataError

N = 4


def said(y):
    with pytest.raises(DataError) as error:
        check_labels(y)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_one_hot_labels(dtype):
    assert "y.argmax(1)" in said(torch.eye(N).to(dtype))


def test_a_column_of_labels():
    assert "y.flatten()," in said(torch.arange(N)[:, None])
    assert "y.flatten().long()" in said(torch.arange(N)[:, None].float())
    assert "y.long()" in said(torch.arange(N).float())


@pytest.mark.parametrize("shape", [(N, 7), (N, 5, 5), (N, 1, 5, 5)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_labels_of_tokens_and_pixels_name_the_loss(shape, dtype):
    message = said(torch.randint(0, 9, shape).to(dtype))
    assert "loss=" in message and "argmax" not in message and "flatten" not in message


@pytest.mark.parametrize(
    "sample",
    [
        {"image": torch.rand(3, 8, 8), "label": 1},
        {"image": torch.rand(3, 8, 8), "label": torch.tensor(1)},
        {"input_ids": torch.arange(5), "labels": torch.tensor(1)},
        (torch.rand(3, 8, 8), 1),
    ],
)
def test_a_list_of_samples_is_put_into_batches(sample):
    (batch,) = iter_batches([sample] * 3, Task())
    assert Task().labels(batch).shape == (3,) and Task().inputs(batch).shape[0] == 3
