"""Streams, samples without batches, uint8 images, and files that cannot be read: the same for every function."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import fastfip
from fastfip.data import iter_batches, reservoir, scaled
from fastfip.data.cleanset import CleanSet
from fastfip.data.images import load, loader
from fastfip.data.stores import Live
from fastfip.errors import ConfigError, DataError
from tests.support.small_nets import plain_net, same, values

N = 30
U = torch.randint(0, 256, (N, 2, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
COLUMN = torch.tensor([[0.5, 0.1], [1.0, 2.0]]).view(2, 2, 1, 1)
X, Y = U.float() / 255, torch.arange(N) % 3


class Samples(IterableDataset):
    """Samples one after the other; `form` makes them."""

    def __init__(self, form, n=N, length=None):
        self.form, self.n, self.length = form, n, length

    def __iter__(self):
        return (self.form(i) for i in range(self.n))

    def __len__(self):
        if self.length is None:
            raise TypeError
        return self.length


class Bytes(Dataset):
    """A dataset of uint8 images."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        return U[i], int(Y[i])


def pair(i):
    return X[i], int(Y[i])


def web(i):
    return {"__key__": f"{i:04}", "jpg": X[i], "cls": int(Y[i])}


def face(i):
    return {"image": X[i], "label": torch.tensor(i % 3)}


FORMS = {
    "stream of pairs": lambda: Samples(pair),
    "loader of a stream": lambda: DataLoader(Samples(pair), batch_size=10),
    "loader of a stream, by a worker": lambda: DataLoader(Samples(pair, length=N), batch_size=10, num_workers=1),
    "loader of single samples": lambda: DataLoader(Samples(pair), batch_size=None),
    "webdataset's samples": lambda: Samples(web),
    "webdataset's batches": lambda: ({"jpg": X[i : i + 10], "cls": Y[i : i + 10]} for i in (0, 10, 20)),
    "Hugging Face's samples": lambda: Samples(face),
    "Hugging Face's batches": lambda: [{"image": X[i : i + 10], "label": Y[i : i + 10]} for i in (0, 10, 20)],
    "generator of samples": lambda: (pair(i) for i in range(N)),
    "list of samples": lambda: [pair(i) for i in range(N)],
    "arrays": lambda: ((np.asarray(X[i]), np.int64(Y[i])) for i in range(N)),
    "uint8 loader": lambda: scaled(DataLoader(Bytes(), batch_size=10)),
    "uint8 loader, by a worker": lambda: scaled(DataLoader(Bytes(), batch_size=10, num_workers=1)),
    "uint8 dataset": lambda: scaled(Bytes()),
    "uint8 stream": lambda: scaled(Samples(lambda i: {"jpg": U[i], "cls": int(Y[i])})),
    "uint8 batch": lambda: scaled((U, Y)),
    "part of a stream": lambda: reservoir(Samples(pair), N),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_samples(form):
    batches = list(iter_batches(FORMS[form]()))
    task = fastfip.data.Task()
    assert torch.allclose(torch.cat([task.inputs(b) for b in batches]), X)
    assert torch.equal(torch.cat([task.labels(b) for b in batches]), Y)


@pytest.mark.parametrize("form", FORMS)
def test_every_function_takes_every_form(form):
    model = plain_net().eval()
    make = FORMS[form]
    result = fastfip.purify(
        model, make(), "fine_tune", steps=2, test_loader=make(), progress=False, holdout=0.0, batch_size=30
    )
    want = fastfip.purify(model, (X, Y), "fine_tune", steps=2, progress=False, holdout=0.0, batch_size=30)
    got, expected = values(result.model), values(want.model)
    assert all(torch.allclose(got[name], expected[name], atol=1e-5) for name in expected)
    assert not same(got, values(model)) and result.after.n == N
    assert fastfip.evaluate(model, make()) == fastfip.evaluate(model, [(X, Y)])
    diagonal = fastfip.fisher_diagonal(model, make())
    assert torch.allclose(diagonal["0.weight"], fastfip.fisher_diagonal(model, [(X, Y)])["0.weight"], rtol=1e-4)


@pytest.mark.parametrize("in_loader", [False, True])
def test_no_sample_of_a_stream_that_is_there_once_is_lost(in_loader):
    class Once(IterableDataset):
        def __init__(self):
            self.walk = (pair(i) for i in range(N))

        def __iter__(self):
            return self.walk

    data = DataLoader(Once(), batch_size=10) if in_loader else Once()
    result = fastfip.purify(plain_net(), data, "fine_tune", steps=1, progress=False)
    assert result.settings["clean_samples"] == N


def test_audit_takes_a_stream_and_uint8_images():
    model = plain_net().eval()
    for form in ("webdataset's samples", "uint8 loader"):
        assert fastfip.audit(model, FORMS[form](), progress=False).to_dict()
        assert fastfip.margins(model, FORMS[form]()).to_dict()


def test_uint8_images_are_refused_with_a_remedy_that_works():
    with pytest.raises(DataError, match=r"images are uint8 .* fastfip.data.scaled\(data, '01'\)"):
        fastfip.evaluate(plain_net(), DataLoader(Bytes(), batch_size=10))
    assert fastfip.evaluate(plain_net(), scaled(DataLoader(Bytes(), batch_size=10))).n == N
    with pytest.raises(DataError, match="images are float32, not uint8"):
        scaled((X, Y))


@pytest.mark.parametrize(
    "options, want",
    [
        ({"scale": "-11"}, U.float() / 127.5 - 1),
        ({"scale": "255"}, U.float()),
        ({"mean": 0.5, "std": 0.25}, (X - 0.5) / 0.25),
        ({"mean": (0.5, 0.1), "std": (1.0, 2.0)}, (X - COLUMN[0]) / COLUMN[1]),
        ({"mean": "mnist"}, (X - 0.1307) / 0.3081),
    ],
)  # fmt: skip
def test_scales(options, want):
    assert torch.allclose(scaled((U, Y), **options)[0], want, atol=1e-4)
    stream = next(iter_batches(scaled(Samples(lambda i: (U[i], int(Y[i]))), **options)))
    assert torch.allclose(stream[0], want, atol=1e-4)


def test_pictures_and_channels_last_are_scaled_too():
    rgb = torch.randint(0, 256, (4, 5, 6, 3), dtype=torch.uint8)
    (batch,) = iter_batches(scaled([{"image": Image.fromarray(x.numpy()), "label": 1} for x in rgb]))
    want = rgb.permute(0, 3, 1, 2).float() / 255
    assert torch.equal(batch["image"], want)
    assert torch.equal(scaled({"image": rgb, "label": torch.ones(4).long()})["image"], want)
    with pytest.raises(ConfigError, match="scale"):
        scaled((U, Y), "1")
    with pytest.raises(DataError, match="pictures of pillow: decode them"):
        next(iter_batches([{"image": Image.fromarray(rgb[0].numpy()), "label": 1}]))
    with pytest.raises(DataError, match="images are bytes: decode them"):
        next(iter_batches(Samples(lambda i: {"jpg": b"\xff\xd8", "cls": 0})))


def test_samples_of_different_sizes_do_not_fit():
    with pytest.raises(DataError, match="samples do not fit into one batch"):
        next(iter_batches(Samples(lambda i: (torch.zeros(1, 4 + i, 4), 0))))


# ------------------------------------------------------------------------------------------------- parts of streams


def test_a_reservoir_is_a_fair_part_of_a_stream_and_holds_no_more():
    held = []

    def stream():
        for start in range(0, 400, 20):
            x = torch.arange(start, start + 20.0).view(20, 1)
            held.append(x)
            yield x, torch.zeros(20, dtype=torch.int64)

    counts = torch.zeros(400)
    for seed in range(50):
        (batch,) = reservoir(stream(), 40, seed=seed)
        assert len(batch[0]) == 40 == len(batch[0].unique())
        counts[batch[0].long().flatten()] += 1
        assert all(batch[0].untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for x in held)
        held.clear()
    quarters = counts.view(4, 100).sum(1)  # 500 each are expected, with a standard deviation of 18
    assert bool(((quarters - 500).abs() < 90).all())
    again = [reservoir(stream(), 40, seed=3)[0][0] for _ in range(2)]
    assert torch.equal(*again)
    with pytest.raises(ConfigError, match="limit=0"):
        reservoir(stream(), 0)


def test_a_set_too_large_for_memory_is_kept_in_part(monkeypatch):
    class Large(Dataset):
        def __len__(self):
            return 100

        def __getitem__(self, i):
            return torch.full((10,), float(i)), i % 2

    from fastfip.data import cleanset

    clean = CleanSet.of(DataLoader(Large(), batch_size=10))
    assert clean.in_memory().n == 100
    monkeypatch.setattr(cleanset, "half_of_memory", lambda: 4 * 20 * 48)  # 20 samples of 40 bytes and a label of 8
    part = clean.in_memory()
    assert part.n == 20 and not part.live and part.labels.unique().tolist() == [0, 1]
    seen = torch.cat([batch[0][:, 0] for batch in part.batches()])
    assert (seen.min(), seen.max()) == (0, 99)


# ---------------------------------------------------------------------------------------------- what does not go on


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_ends_early_is_an_error(workers):
    data = DataLoader(Samples(pair, n=15, length=N), batch_size=10, num_workers=workers)
    with pytest.raises(DataError, match="ended after 2 of 3 batches"):
        fastfip.evaluate(plain_net(), data)


def test_what_was_tuned_is_not_lost_where_the_test_data_give_out():
    class Once:
        """An iterable whose second walk is empty."""

        def __init__(self):
            self.walk = iter([(X, Y)])

        def __iter__(self):
            return self.walk

    model = plain_net()

    class Hidden:
        def __init__(self, once):
            self.once = once

        def __iter__(self):
            yield from self.once

    result = fastfip.purify(model, (X, Y), "fine_tune", steps=2, test_loader=Hidden(Once()), progress=False)
    assert result.before.acc is not None and result.after.acc is None
    assert "WAS NOT MEASURED: the data gave no samples" in result.title
    assert not same(values(result.model), values(model))


@pytest.fixture
def folders(tmp_path):
    """Class folders of images, one of them broken, as folders and in a zip."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for label in "01":
            (tmp_path / "images" / label).mkdir(parents=True)
            for i in range(6):
                file = io.BytesIO()
                Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).save(file, "png")
                data = file.getvalue()
                data = data[: len(data) // 2] if (label, i) == ("1", 2) else data
                (tmp_path / "images" / label / f"{i}.png").write_bytes(data)
                archive.writestr(f"{label}/{i}.png", data)
    return tmp_path


def rgb_net():
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 2))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["images", "images.zip"])
def test_a_broken_image_is_named_in_one_line(folders, name, workers):
    images = load(folders / name)
    model = rgb_net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    data = DataLoader(images, batch_size=4, num_workers=workers)
    for call in (
        lambda: fastfip.purify(model, data, "fine_tune", inplace=True, progress=False),
        lambda: fastfip.evaluate(model, data),
    ):
        with pytest.raises(DataError, match=r"1/2\.png: cannot be read as an image") as caught:
            call()
        assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    assert same(values(model), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_of_the_users_own_dataset_is_named_too(folders, workers):
    class Folder(Dataset):
        """As torchvision's ImageFolder: files with their classes, opened when they are asked for."""

        def __init__(self):
            self.samples = [(str(path), int(path.parent.name)) for path in sorted((folders / "images").glob("*/*.png"))]

        def __len__(self):
            return len(self.samples)

        def __getitem__(self, i):
            path, label = self.samples[i]
            with open(path, "rb") as file:
                return torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1) / 255, label

    data = DataLoader(Folder(), batch_size=4, num_workers=workers)
    for call in (
        lambda: fastfip.purify(rgb_net(), data, "fine_tune", progress=False),
        lambda: fastfip.fisher_diagonal(rgb_net(), data),
    ):
        with pytest.raises(DataError, match=r"cannot be read, sample 8 \(.*1/2\.png\): .*OSError") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_errors_of_the_users_own_stay_as_they_are():
    def broken(i):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        list(iter_batches(Samples(broken)))


@pytest.mark.parametrize("name", ["images", "images.zip"])
def test_broken_images_can_be_left_out_and_are_counted(folders, name):
    images = load(folders / name).without_broken()
    assert len(images) == 11 and images.labels.bincount().tolist() == [6, 5]
    assert "1 images were left out: " in images.words()[-1] and "1/2.png" in images.words()[-1]
    assert images.to_dict()["broken"] == 1 and images.subset(torch.arange(3)).to_dict()["broken"] == 1
    assert sum(len(batch[1]) for batch in loader(images, 4)) == 11
    (folders / "bad" / "0").mkdir(parents=True)
    (folders / "bad" / "0" / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="none of 1 images can be read"):
        load(folders / "bad").without_broken()


@pytest.mark.parametrize("name", ["images", "images.zip"])
def test_workers_decode_what_they_are_asked_for_and_live_on(folders, name):
    images = load(folders / name).without_broken()  # the zip is open here when workers are forked
    want = torch.cat([batch[0] for batch in loader(images, 4)])
    data = loader(images, 4, workers=2)
    clean = CleanSet.of(data)
    assert clean.live and data.num_workers == 2 and data.persistent_workers
    for _ in range(3):
        assert torch.equal(torch.cat([batch[0] for batch in clean.batches()]), want)
    store = clean._store
    assert isinstance(store, Live)
    processes = [w.pid for w in store._lasting._iterator._workers]
    list(clean.batches())
    assert [w.pid for w in store._lasting._iterator._workers] == processes
    clean.close()
    with pytest.raises(ConfigError, match="workers=-1"):
        loader(images, 4, workers=-1)


def test_a_loader_keeps_its_settings_when_it_is_scaled():
    sampler = torch.utils.data.SubsetRandomSampler([3, 1])
    data = DataLoader(TensorDataset(U, Y), batch_size=1, sampler=sampler, drop_last=True)
    made = scaled(data)
    assert made.sampler is sampler and made.drop_last and len(made) == 2
    assert CleanSet.of(made).labels.tolist() == [1, 0]
    chunks = DataLoader(TensorDataset(U, Y), batch_sampler=[[0, 1], [2]])
    assert [len(batch[1]) for batch in scaled(chunks)] == [2, 1]
    assert len(scaled(DataLoader(Samples(pair, length=N), batch_size=10))) == 3
