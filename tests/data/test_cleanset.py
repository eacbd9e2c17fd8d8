import pytest
import torch
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from fastfip.data import Task
from fastfip.data.cleanset import CleanSet
from fastfip.errors import DataError
from tests.support.small_nets import data, loader


class Counting(Dataset):
    """Gives its index as the image; counts how often it is read."""

    def __init__(self, n=10, classes=2):
        self.n, self.classes, self.reads = n, classes, 0

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.reads += 1
        return torch.full((1, 2, 2), float(i)), i % self.classes


def images(batches):
    """The index images of batches, in order."""
    return [int(v) for batch in batches for v in batch[0].flatten(1)[:, 0]]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_loader_stays_live():
    dataset = Counting()
    clean = CleanSet.of(DataLoader(dataset, batch_size=4, shuffle=True))
    assert (clean.n, clean.batch_size, clean.labels.tolist()) == (10, 4, [0, 1] * 5)
    before = dataset.reads
    assert images(clean.batches()) == list(range(10))
    assert dataset.reads == before + 10


def test_the_seed_alone_decides_the_order():
    orders = []
    for shuffle in (True, False):
        torch.rand(3)
        clean = CleanSet.of(DataLoader(Counting(), batch_size=4, shuffle=shuffle))
        orders.append(images(clean.batches(shuffle=True, generator=generator())))
    assert orders[0] == orders[1] != list(range(10))
    assert sorted(orders[0]) == list(range(10))
    again = images(clean.batches(shuffle=True, generator=generator(1)))
    assert again != orders[0]


def test_the_collate_function_is_the_users():
    def collate(items):
        return torch.stack([x for x, _ in items]) + 100, torch.tensor([y for _, y in items])

    clean = CleanSet.of(DataLoader(Counting(), batch_size=5, collate_fn=collate))
    assert images(clean.batches()) == list(range(100, 110))


def test_samplers_of_the_user_choose_the_samples():
    clean = CleanSet.of(DataLoader(Counting(), batch_size=2, sampler=SubsetRandomSampler([7, 1, 3])))
    assert images(clean.batches()) == [1, 3, 7]
    weighted = WeightedRandomSampler([0, 0, 1, 1, 0, 0, 0, 0, 0, 0], num_samples=40)
    assert images(CleanSet.of(DataLoader(Counting(), batch_size=2, sampler=weighted)).batches()) == [2, 3]
    clean = CleanSet.of(DataLoader(Counting(), batch_sampler=[[4, 5, 6], [0]]))
    assert (images(clean.batches()), clean.batch_size) == ([0, 4, 5, 6], 3)


def test_workers():
    clean = CleanSet.of(DataLoader(Counting(6), batch_size=3, num_workers=1))
    assert images(clean.batches(shuffle=True, generator=generator())) != images(clean.batches())
    assert sorted(images(clean.batches())) == list(range(6))


def test_a_tensor_dataset_is_indexed_in_memory_also_in_subsets():
    x, y = torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10) % 2
    dataset = torch.utils.data.Subset(torch.utils.data.Subset(TensorDataset(x, y), [9, 8, 7, 6]), [0, 2, 3])
    clean = CleanSet.of(DataLoader(dataset, batch_size=2))
    assert images(clean.batches()) == [9, 7, 6]
    assert clean.labels.tolist() == [1, 1, 0]
    assert images([clean.tensors()]) == [9, 7, 6]


def test_a_generator_is_read_once_and_batched_anew():
    x, y = data(10)
    clean = CleanSet.of((x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8))
    assert (clean.n, clean.batch_size) == (10, 4)
    for _ in range(2):
        batches = list(clean.batches(5))
        assert [len(batch[1]) for batch in batches] == [5, 5]
        assert torch.equal(torch.cat([batch[0] for batch in batches]), x)


def test_five_tuples_and_dicts_keep_their_fields():
    x, y = data(6)
    words = list("abcdef")
    five = [
        (x[:4], y[:4], torch.arange(4), torch.zeros(4), y[:4]),
        (x[4:], y[4:], torch.arange(4, 6), torch.zeros(2), y[4:]),
    ]
    out = next(iter(CleanSet.of(five).batches(6, shuffle=True, generator=generator())))
    assert len(out) == 5 and torch.equal(x[out[2]], out[0]) and torch.equal(y[out[2]], out[4])
    dicts = [{"x": x[:4], "labels": y[:4], "name": words[:4]}, {"x": x[4:], "labels": y[4:], "name": words[4:]}]
    out = next(iter(CleanSet.of(dicts).batches(6, shuffle=True, generator=generator())))
    places = [words.index(word) for word in out["name"]]
    assert places != sorted(places) and torch.equal(x[places], out["x"]) and torch.equal(y[places], out["labels"])


def test_samples_of_differing_shapes_never_share_a_batch():
    batches = [(torch.full((4, length), float(length)), torch.arange(4) % 2) for length in (3, 5, 3)]
    clean = CleanSet.of(batches)
    seen = list(clean.batches(3, shuffle=True, generator=generator()))
    assert sorted(len(batch[1]) for batch in seen) == [1, 2, 3, 3, 3]
    assert sum(len(batch[1]) for batch in seen if batch[0].shape[1] == 3) == 8
    assert all(bool((batch[0] == batch[0].shape[1]).all()) for batch in seen)
    with pytest.raises(DataError, match="differ in shape"):
        clean.tensors()


@pytest.mark.parametrize("index", [torch.arange(12), torch.tensor([9, 1, 6, 5, 2, 11])])
def test_places_are_those_of_an_unshuffled_walk(index):
    batches = [(torch.arange(4.0)[:, None].repeat(1, length), torch.arange(4) % 2) for length in (3, 5, 3)]
    clean = CleanSet.of([(x + 4 * k, y) for k, (x, y) in enumerate(batches)]).subset(index)
    walked = torch.cat([batch[0][:, 0] for batch in clean.batches(3)])
    assert sorted(clean.places().tolist()) == list(range(len(index)))
    assert walked.tolist() == index[clean.places()].tolist()
    walked = [batch[0][:, 0] for batch in clean.subset(clean.places()[:2]).batches(3)]
    assert sorted(torch.cat(walked).tolist()) == sorted(index[clean.places()[:2]].tolist())


def test_the_split_is_balanced_complete_and_seeded():
    x, _ = data(100)
    y = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    clean = CleanSet.of(DataLoader(TensorDataset(x, y), batch_size=10))
    tuned, held = clean.split(0.1, 0)
    assert held.labels.bincount().tolist() == [6, 3, 1]
    assert (tuned.n, held.n) == (90, 10)
    both = torch.cat([tuned.tensors()[0], held.tensors()[0]])
    assert sorted(v.sum().item() for v in both) == sorted(v.sum().item() for v in x)
    assert torch.equal(held.tensors()[0], clean.split(0.1, 0)[1].tensors()[0])
    assert not torch.equal(held.tensors()[0], clean.split(0.1, 1)[1].tensors()[0])


@pytest.mark.parametrize("counts", [[1, 1, 5], [2, 1, 1], [9, 9], [2, 2, 2, 2], [1, 30]])
def test_the_last_sample_of_a_class_is_never_held_out(counts):
    y = torch.tensor([c for c, n in enumerate(counts) for _ in range(n)])
    for holdout in (0.1, 0.5):
        tuned, held = CleanSet.of((torch.rand(len(y), 3), y)).split(holdout, 0)
        assert held is not None and held.n >= 1
        assert tuned.labels.unique().tolist() == list(range(len(counts)))
        limit = sum(n - 1 for n in counts)
        assert held.n == min(max(1, round(holdout * len(y))), limit)


def test_one_sample_a_class_holds_nothing_out_and_says_so():
    clean = CleanSet.of((torch.rand(5, 3), torch.arange(5)))
    tuned, held = clean.split(0.1, 0)
    assert held is None and tuned is clean
    assert "none is held out" in clean.notes[0]
    clean = CleanSet.of((torch.rand(50, 3), torch.arange(50) % 5))
    assert clean.split(0.0, 0) == (clean, None) and clean.notes == []


@pytest.mark.parametrize(
    ("size", "smallest", "expected"), [(4, 2, [4, 5]), (4, 1, [4, 4, 1]), (1, 2, [2, 2, 2, 3]), (20, 2, [9])]
)
def test_a_last_batch_of_one_is_joined_to_the_one_before(size, smallest, expected):
    clean = CleanSet.of((torch.rand(9, 3), torch.arange(9) % 3))
    assert [len(batch[1]) for batch in clean.batches(size, smallest=smallest)] == expected


def test_in_memory_keeps_what_augmentation_drew():
    class Noisy(Counting):
        def __getitem__(self, i):
            return torch.rand(1, 2, 2), i % 2

    live = CleanSet.of(DataLoader(Noisy(), batch_size=4)).split(0.5, 0)[1]
    assert not torch.equal(live.tensors()[0], live.tensors()[0])
    kept = live.in_memory()
    assert torch.equal(kept.tensors()[0], kept.tensors()[0])
    assert torch.equal(kept.labels, live.labels) and kept.in_memory() is kept


def test_labels_are_checked_and_missing_classes_are_a_note():
    clean = CleanSet.of(loader(9))
    clean.check(5)
    assert clean.notes == ["2 of 5 classes have no clean sample: 3, 4"]
    with pytest.raises(DataError, match=r"labels run from 0 to 2, outside 0\.\.1"):
        clean.check(2)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([], "no samples"),
        (DataLoader(TensorDataset(torch.rand(0, 3), torch.zeros(0).long())), "no samples"),
        (DataLoader(Counting(), sampler=[], batch_size=2), "no samples"),
        ([(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2).long())], "uint8"),
        (loader(4).dataset.tensors[0], "single tensor"),
        ((torch.rand(4, 3), torch.rand(4)), "labels are float32"),
        ((torch.rand(4, 3), -torch.ones(4).long()), "outside"),
        (7, "must be an iterable"),
    ],
)
def test_data_that_cannot_be_used(bad, words):
    with pytest.raises(DataError, match=words):
        CleanSet.of(bad)


def test_with_a_loss_of_ones_own_labels_may_be_anything():
    task = Task.of(None, lambda logits, batch: (logits[:, 0] - batch[1]).square())
    clean = CleanSet.of((torch.rand(10, 3), torch.rand(10)), task)
    assert clean.labels is None
    clean.check(3)
    tuned, held = clean.split(0.1, 0)
    assert (tuned.n, held.n) == (9, 1)


def test_a_default_device_of_the_users_does_not_matter():
    with torch.device("meta"):
        x, y = torch.zeros(8, 3, device="cpu"), torch.arange(8, device="cpu") % 2
        clean = CleanSet.of((x, y))
        tuned, held = clean.split(0.25, generator())
        assert len(list(tuned.batches(2, shuffle=True, generator=generator()))) == 3 and held.n == 2
