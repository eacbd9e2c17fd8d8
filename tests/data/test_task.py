"""What a batch is: the default meaning, the hooks, and every refusal."""

from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastfip.data import Task, check_labels, iter_batches, looks_like_probabilities
from fastfip.errors import DataError

X, Y = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])


class Named(nn.Module):
    """A net in Hugging Face style: inputs by name, logits in a field."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, input_ids, mask=None):
        logits = input_ids * 2.0 + (0 if mask is None else mask)
        return {"logits": logits} if self.kind == "dict" else SimpleNamespace(logits=logits)


def test_default_task_is_classification_of_x_y():
    net, task = nn.Linear(3, 4), Task.of()
    batch = (X, Y, torch.zeros(6), torch.ones(6), Y + 1)  # five-tuples: the second item is the label
    logits = task.forward(net, batch)
    assert torch.equal(logits, net(X))
    assert torch.equal(task.labels(batch), Y)
    torch.testing.assert_close(task.loss(logits, batch), F.cross_entropy(logits, Y, reduction="none"))
    assert task.size(batch) == 6
    assert torch.equal(task.relabel(batch, Y + 1)[1], Y + 1) and torch.equal(batch[1], Y)


@pytest.mark.parametrize("key", ["x", "image", "inputs"])
@pytest.mark.parametrize("label", ["labels", "y", "target"])
def test_dict_batch_by_position(key, label):
    net, batch, task = nn.Linear(3, 4), {key: X, label: Y, "id": Y}, Task()
    assert torch.equal(task.forward(net, batch), net(X))
    assert torch.equal(task.labels(batch), Y)
    assert torch.equal(task.relabel(batch, Y * 0)[label], Y * 0)


@pytest.mark.parametrize("kind", ["dict", "object"])
def test_dict_batch_by_name_without_labels(kind):
    batch = {"input_ids": X, "mask": torch.ones(6, 3), "labels": Y}
    assert torch.equal(Task().forward(Named(kind), batch), X * 2 + 1)


def test_hooks_replace_both_halves():
    task = Task.of(forward=lambda m, b: m(b["a"])[1], loss=lambda z, b: ((z - b["t"]) ** 2).sum(1))
    batch = {"a": X, "t": torch.ones(6, 3)}
    net = type("Two", (nn.Module,), {"forward": lambda self, x: (x, x * 3)})()
    out = task.forward(net, batch)
    assert torch.equal(out, X * 3)
    torch.testing.assert_close(task.loss(out, batch), ((X * 3 - 1) ** 2).sum(1))


def test_a_net_that_returns_a_tuple_names_the_remedy():
    net = type("Two", (nn.Module,), {"forward": lambda self, x: (x, x)})()
    with pytest.raises(DataError, match="pass forward="):
        Task().forward(net, (X, Y))


@pytest.mark.parametrize("hooks", [{"forward": 3}, {"loss": "ce"}])
def test_hooks_must_be_functions(hooks):
    with pytest.raises(DataError, match="must be a function"):
        Task.of(**hooks)


def test_a_mean_loss_is_refused():
    with pytest.raises(DataError, match=r"shape \[N\]"):
        Task.of(loss=lambda z, b: F.cross_entropy(z, b[1])).loss(X, (X, Y))


@pytest.mark.parametrize(
    ("y", "what"),
    [
        (torch.rand(6), "y.long"),
        (torch.rand(6, 4).softmax(1), "argmax"),
        (torch.eye(6, dtype=torch.long), "argmax"),
        (torch.zeros(6, 4, dtype=torch.long), "one loss for each sample"),
        (torch.zeros(6, 1, dtype=torch.long), "flatten"),
        (torch.tensor([0, 1, -1]), "from -1 to 1"),
    ],
)
def test_labels_that_are_no_class_indices(y, what):
    with pytest.raises(DataError, match=what):
        check_labels(y)


def test_labels_out_of_range():
    check_labels(Y, 3)
    with pytest.raises(DataError, match=r"0 to 2, outside 0\.\.1"):
        check_labels(Y, 2)
    with pytest.raises(DataError, match="outside"):
        Task().loss(torch.randn(6, 2), (X, Y))
    with pytest.raises(DataError, match="outside"):
        list(iter_batches([(X, Y)], classes=2))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_integer_labels_become_int64(dtype):
    assert Task().labels((X, Y.to(dtype))).dtype == torch.int64


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 2, 3)])
def test_logits_that_cross_entropy_cannot_use(shape):
    with pytest.raises(DataError, match="pass loss="):
        Task().loss(torch.randn(shape), (X, Y))


def test_rows_and_labels_must_match():
    with pytest.raises(DataError, match="6 labels for 12 rows"):
        Task().loss(torch.randn(12, 3), (X, Y))
    with pytest.raises(DataError, match="6 labels for inputs"):
        list(iter_batches([(X[:5], Y)]))


@pytest.mark.parametrize("empty", [[], iter(()), [(X[:0], Y[:0])]])
def test_empty_data(empty):
    with pytest.raises(DataError, match="no samples"):
        list(iter_batches(empty))


def test_a_generator_that_ran_out():
    data = ((X, Y) for _ in range(2))
    assert len(list(iter_batches(data))) == 2
    with pytest.raises(DataError, match="generator"):
        list(iter_batches(data))


def test_uint8_images_are_refused_unless_forward_scales_them():
    images = torch.zeros(6, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(DataError, match="uint8.*255"):
        list(iter_batches([(images, Y)]))
    task = Task.of(forward=lambda m, b: m(b[0].float() / 255))
    assert len(list(iter_batches([(images, Y)], task))) == 1


def test_every_form_of_data_gives_the_same_batches():
    forms = [
        (X, Y),
        [(X[:4], Y[:4]), (X[4:], Y[4:])],
        TensorDataset(X, Y),
        DataLoader(TensorDataset(X, Y), batch_size=2),
        [(X.numpy(), Y.numpy())],
        iter([(X, Y)]),
    ]
    for data in forms:
        batches = list(iter_batches(data))
        assert torch.equal(torch.cat([b[0] for b in batches]), X)
        assert torch.equal(torch.cat([b[1] for b in batches]), Y)
    (one,) = iter_batches({"x": X, "y": Y})
    assert torch.equal(one["x"], X)


def test_nested_batches_are_moved():
    pair = namedtuple("pair", "x y")
    batch = pair({"a": X, "b": [np.ones(6), "name"]}, Y)
    task = Task.of(forward=lambda m, b: m(b[0]["a"]))
    (out,) = iter_batches([batch], task, device="meta")
    assert out[0]["a"].device.type == "meta" and out[0]["b"][0].device.type == "meta" and out[0]["b"][1] == "name"


@pytest.mark.parametrize("bad", [X, 3, [X[0], 5], [("a", "b")], [{"z": X}]])
def test_what_is_no_data(bad):
    with pytest.raises(DataError):
        list(iter_batches(bad))


def test_probabilities_are_told_from_logits():
    assert looks_like_probabilities(X.softmax(1))
    assert not looks_like_probabilities(X) and not looks_like_probabilities(X.abs())
