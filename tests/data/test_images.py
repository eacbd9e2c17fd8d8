"""Folders and .npz files as data of the command line."""

import sys

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from fastfip.data import images as datasets
from fastfip.data import pictures
from fastfip.data.images import ImageSet, load, loader, same_classes
from fastfip.data.scaling import STATISTICS, Pixels, statistics
from fastfip.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (12, 5, 6, 3), dtype=np.uint8)
Y = np.arange(12) % 3


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def folder(path, classes=("cat", "ant", "bee"), count=2, size=(5, 6), mode="RGB"):
    from PIL import Image

    for c, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for i in range(count):
            shape = (*size, 3) if mode == "RGB" else size
            Image.fromarray(np.full(shape, (40 * c + i) % 256, np.uint8)).save(path / name / f"{i}.png")
    return path


@pytest.mark.parametrize(
    ("x", "shape"),
    [
        (X, (3, 5, 6)),
        (X.transpose(0, 3, 1, 2), (3, 5, 6)),
        (X[..., 0], (1, 5, 6)),
        (X[..., :1], (1, 5, 6)),
        (np.float32(X) / 255, (3, 5, 6)),
        (np.float64(X).transpose(0, 3, 1, 2) / 255, (3, 5, 6)),
        (np.float32(X[..., 0].reshape(12, -1)), (30,)),
        (RNG.normal(size=(12, 7, 3)), (7, 3)),  # a cloud of points
    ],
)
def test_arrays(tmp_path, x, shape):
    data = load(npz(tmp_path / "a.npz", x=x, y=Y.astype(np.uint8)))
    a, b = data.batch(range(12))
    assert len(data) == 12 and a.shape == (12, *shape) and a.dtype == torch.float32
    assert b.dtype == torch.int64 and b.tolist() == Y.tolist()
    want = torch.from_numpy(np.ascontiguousarray(X)).float().permute(0, 3, 1, 2) / 255
    if len(shape) == 3:
        torch.testing.assert_close(a, want[:, : shape[0]])


def test_items_and_batches_agree(tmp_path):
    data = load(npz(tmp_path / "a.npz", x=X, y=Y), pixels=Pixels(mean=(0.5,), std=(0.5,)))
    x, y = data.batch([3, 5])
    assert torch.equal(data[5][0], x[1]) and data[5][1] == y[1]
    batches = list(loader(data, 5))
    assert [len(b[1]) for b in batches] == [5, 5, 2]
    assert torch.equal(torch.cat([b[0] for b in batches]), data.batch(range(12))[0])
    assert isinstance(data.in_memory(), TensorDataset)


def test_large_sets_are_not_held_in_memory(tmp_path, monkeypatch):
    data = load(npz(tmp_path / "a.npz", x=X, y=Y))
    kept = [b[0] for b in loader(data, 5)]
    monkeypatch.setattr(datasets, "IN_MEMORY", 100)
    assert data.in_memory() is data
    assert all(torch.equal(a, b[0]) for a, b in zip(kept, loader(data, 5)))


def test_normalisation_by_channel(tmp_path):
    pixels = Pixels(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    x = load(npz(tmp_path / "a.npz", x=X, y=Y), pixels=pixels).batch([0])[0][0]
    raw = torch.from_numpy(X[0]).permute(2, 0, 1).float() / 255
    for c in range(3):
        torch.testing.assert_close(x[c], (raw[c] - pixels.mean[c]) / pixels.std[c])
    with pytest.raises(DataError, match=r"3 numbers for mean or std, the images are \[1, 5, 6\]"):
        load(npz(tmp_path / "b.npz", x=X[..., 0], y=Y), pixels=pixels).batch([0])


@pytest.mark.parametrize("bad", [{"std": (0.0,)}, {"channels": 2}, {"size": (0, 3)}])
def test_settings_of_pixels(bad):
    with pytest.raises(ConfigError):
        Pixels(**bad)


def test_names_in_an_npz_by_role(tmp_path):
    path = npz(tmp_path / "a.npz", clean_x=X, clean_y=Y, test_x=X[:4], test_y=Y[:4], other=X[:3], mine=Y[:3])
    assert len(load(path)) == 12 and len(load(path, "test")) == 4
    assert len(load(f"{path}:other,mine")) == 3
    assert len(load(f"{path}:other, mine", "test")) == 3
    only = npz(tmp_path / "b.npz", clean_x=X, clean_y=Y)
    with pytest.raises(DataError, match=r"holds clean_x, clean_y; say which .*b\.npz:x,y"):
        load(only, "test")  # never silently the clean images


@pytest.mark.parametrize("size", [(8, 9), (3, 4)])
def test_resizing_arrays(tmp_path, size):
    x = np.full((2, 5, 6, 3), 100, np.uint8)
    out = load(npz(tmp_path / "a.npz", x=x, y=Y[:2]), pixels=Pixels(size=size)).batch([0, 1])[0]
    assert out.shape == (2, 3, *size)
    torch.testing.assert_close(out, torch.full_like(out, 100 / 255))


def test_folders(tmp_path):
    data = load(folder(tmp_path / "d"))
    (tmp_path / "d" / ".hidden").mkdir()
    (tmp_path / "d" / "ant" / "notes.txt").write_text("x")
    assert load(tmp_path / "d").classes == data.classes == ["ant", "bee", "cat"]
    x, y = data.batch(range(6))
    assert y.tolist() == [0, 0, 1, 1, 2, 2] and x.shape == (6, 3, 5, 6)
    torch.testing.assert_close(x[:, 0, 0, 0] * 255, torch.tensor([40.0, 41, 80, 81, 0, 1]))
    grey = load(tmp_path / "d", pixels=Pixels(channels=1, size=(4, 4))).batch([0])[0]
    assert grey.shape == (1, 1, 4, 4)


def test_folders_of_different_sizes(tmp_path):
    folder(tmp_path / "d")
    folder(tmp_path / "d", classes=("dog",), size=(7, 8))
    data = load(tmp_path / "d")
    with pytest.raises(DataError, match=r"6x5 and 8x7 .*dog.*give --size"):
        data.batch(range(8))
    assert load(tmp_path / "d", pixels=Pixels(size=(5, 6))).batch(range(8))[0].shape == (8, 3, 5, 6)


def test_class_folders_must_agree(tmp_path):
    first, second = load(folder(tmp_path / "a")), load(folder(tmp_path / "b", classes=("ant", "bee", "dog")))
    same_classes(first, first)
    with pytest.raises(DataError, match="cat, dog"):
        same_classes(first, second)


def test_pillow_is_named_where_it_is_missing(tmp_path, monkeypatch):
    data = load(folder(tmp_path / "d"))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match="pip install pillow"):
        data.batch([0])


def test_random_parts(tmp_path):
    data = load(npz(tmp_path / "a.npz", x=np.repeat(X, 10, 0), y=np.repeat(Y, 10)))
    part = data.sample(limit=7, seed=1)
    assert len(part) == 7 and torch.equal(part.index, part.index.sort().values)
    assert torch.equal(part.index, data.sample(limit=7, seed=1).index)
    assert not torch.equal(part.index, data.sample(limit=7, seed=2).index)
    even = data.sample(per_class=3, seed=1)
    assert even.labels.bincount().tolist() == [3, 3, 3]
    assert len(data.sample(limit=4, per_class=3)) == 4 and data.sample() is data
    assert data.sample(limit=10**6).labels.tolist() == data.labels.tolist()
    torch.testing.assert_close(part.batch(range(7))[0], data.batch(part.index)[0])
    for bad in ({"limit": 0}, {"per_class": -1}):
        with pytest.raises(ConfigError, match="at least 1"):
            data.sample(**bad)


def test_triggered_images_leave_out_the_target_class_and_come_before_normalising(tmp_path):
    data = load(npz(tmp_path / "a.npz", x=X, y=Y), "test", Pixels(mean=(0.5,), std=(0.25,)))
    seen = []

    def trigger(x):
        seen.append((float(x.min()) >= 0, float(x.max()) <= 1))
        x = x.clone()
        x[:, :, 0, 0] = 1
        return x

    bad = data.triggered(trigger, torch.full((12,), 1))
    x, attack, true = bad.batch(range(len(bad)))
    assert len(bad) == 8 and set(true.tolist()) == {0, 2} and set(attack.tolist()) == {1}
    assert torch.equal(x[:, :, 0, 0], torch.full((8, 3), 2.0)) and seen == [(True, True)]
    assert len(next(iter(loader(bad.sample(limit=3))))) == 3
    with pytest.raises(DataError, match="is the attacker's class"):
        data.with_attack(data.labels)
    floats = load(npz(tmp_path / "b.npz", x=np.float32(X) - 9, y=Y))
    with pytest.raises(DataError, match=r"in \[0, 1\]"):
        floats.triggered(trigger, torch.full((12,), 1)).batch([0])


def test_triggered_images_in_a_file(tmp_path):
    both = load(npz(tmp_path / "a.npz", x=X, y=Y, attack_y=np.full(12, 2)), "triggered")
    assert len(both) == 8 and both[0][1] == 2
    assert load(tmp_path / "a.npz").attack is None


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"x": X, "y": Y[:5]}, "12 images and 5 labels"),
        ({"x": X[:0], "y": Y[:0]}, "no images"),
        ({"x": X, "y": Y - 1}, "-1 to 1"),
        ({"x": X, "y": Y / 1}, "y.long"),
        ({"x": X, "y": np.eye(12)}, "argmax"),
        ({"x": X, "y": Y.astype(str)}, "class indices"),
        ({"x": X.astype(np.int64), "y": Y}, "images are int64"),
        ({"x": X.astype(str), "y": Y}, "images are"),
        ({"x": X, "y": Y.astype(object)}, "cannot be read"),  # would need a pickle
        ({"a": X}, "holds a; say which"),
    ],
)
def test_arrays_that_are_refused(tmp_path, arrays, match):
    path = npz(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=match) as caught:
        load(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_paths_that_are_refused(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"nothing")
    (tmp_path / "b.zip").write_bytes(b"PK")
    (tmp_path / "b.tar").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "cat").mkdir(parents=True)
    folder(tmp_path / "deep" / "train")
    (tmp_path / "torn" / "a").mkdir(parents=True)
    (tmp_path / "torn" / "a" / "x.png").write_bytes(b"no image")
    for name, match in [
        ("none", "no such"),
        ("a.npz", "cannot be read"),
        ("b.zip", "cannot be read as a zip"),
        ("b.tar", "a .zip of them"),
        ("empty", "no class folders"),
        ("hollow", "no images"),
        ("deep", r"no images .*did you mean .*train"),
        ("a.npz:x", "cannot be read|no images and labels"),
    ]:
        with pytest.raises(DataError, match=match):
            load(tmp_path / name)
    with pytest.raises(DataError, match=r"x\.png: cannot be read as an image"):
        load(tmp_path / "torn").batch([0])
    with pytest.raises(DataError, match="no images and labels under x, z"):
        load(f"{npz(tmp_path / 'c.npz', x=X, y=Y)}:x,z")
    assert isinstance(load(tmp_path / "c.npz"), ImageSet)


def test_names_that_are_numbers_are_ordered_by_value(tmp_path):
    data = load(folder(tmp_path / "d", classes=[str(i) for i in range(12)], count=1))
    assert data.classes == [str(i) for i in range(12)] and data.order == "number"
    x, y = data.batch(range(12))
    assert y.tolist() == list(range(12))
    torch.testing.assert_close(x[:, 0, 0, 0] * 255, (40.0 * torch.arange(12)) % 256)  # folder i is class i
    assert data.words() == ["class folders 0 to 11 are the classes of these numbers"]
    text = load(tmp_path / "d", order="text")
    assert text.classes == sorted(map(str, range(12))) and text.order == "text"
    assert "2 10, 3 11, 4 2" in text.words()[0]
    assert text.sample(limit=3).to_dict()["classes"] == text.classes
    with pytest.raises(DataError, match="class folders differ|numbered differently"):
        same_classes(data, text)


@pytest.mark.parametrize(
    ("names", "order", "want"),
    [
        (["10", "9", "1"], None, ["1", "9", "10"]),
        (["010", "9", "1"], None, ["1", "9", "010"]),
        (["10", "9", "a"], None, ["10", "9", "a"]),  # mixed names: as torchvision's ImageFolder
        (["c10", "c9"], None, ["c10", "c9"]),
        (["c10", "c9", "4"], "number", ["4", "c9", "c10"]),
        (["²", "10", "9"], None, ["10", "9", "²"]),  # a digit for Python, no number
    ],
)
def test_the_order_of_classes(names, order, want):
    assert pictures.class_order(names, order)[0] == want


def test_numbers_that_are_missing_among_the_folders_are_named():
    words = pictures.order_words(["0", "1", "3", "10"], "number")
    assert words[0] == "class folders are numbered by the numbers in their names: 0 0, 1 1, 2 3, 3 10"
    assert "no class folder is called 2, 4, 5, 6, 7, ..." in words[1] and "folder 3 is class 2" in words[1]
    assert len(pictures.order_words(["1001", "1005"], "number")) == 1  # identifiers, no class numbers
    with pytest.raises(ConfigError, match="must be one of number, text"):
        pictures.class_order(["a"], "size")


def test_scales(tmp_path):
    path = npz(tmp_path / "a.npz", x=X, y=Y)
    unit = load(path).batch(range(12))[0]
    for scale, want in (("01", unit), ("-11", 2 * unit - 1), ("255", 255 * unit)):
        torch.testing.assert_close(load(path, pixels=Pixels(scale=scale)).batch(range(12))[0], want)
    imagenet = Pixels(*STATISTICS["imagenet"])
    torch.testing.assert_close(load(path, pixels=imagenet).batch(range(12))[0][:, 2], (unit[:, 2] - 0.406) / 0.225)
    assert [str(Pixels()), str(Pixels(scale="-11")), str(imagenet)] == [
        "x/255", "x/127.5 - 1", "(x/255 - mean) / std of imagenet",
    ]  # fmt: skip
    assert str(Pixels((0.5,), (0.25, 0.5))) == "(x/255 - [0.5]) / [0.25, 0.5]"
    with pytest.raises(ConfigError, match="did you mean 'imagenet'"):
        statistics("imagnet")


def test_floats_of_0_to_255_are_not_taken_for_scaled_ones(tmp_path):
    """A network for [0, 1] would be purified on inputs that it never saw."""
    raw = npz(tmp_path / "raw.npz", x=np.float32(X), y=Y)
    with pytest.raises(DataError, match=r"raw\.npz: float images run from 0 to 25\d: give --scale 01, -11 or 255"):
        load(raw)
    unit = npz(tmp_path / "unit.npz", x=np.float32(X) / 255, y=Y)
    want = load(npz(tmp_path / "a.npz", x=X, y=Y)).batch([0])[0]
    for path in (raw, unit):
        for scale, factor in (("01", 1), ("255", 255)):
            torch.testing.assert_close(load(path, pixels=Pixels(scale=scale)).batch([0])[0], factor * want)
    normal = npz(tmp_path / "n.npz", x=np.float32(X) / 64 - 2, y=Y)
    assert float(load(normal).batch([0])[0].min()) < 0
    with pytest.raises(DataError, match="they are already scaled"):
        load(normal, pixels=Pixels(scale="01"))


def test_channels_of_arrays_as_of_files(tmp_path):
    from PIL import Image

    (tmp_path / "d" / "a").mkdir(parents=True)
    Image.fromarray(X[0]).save(tmp_path / "d" / "a" / "x.png")
    files = load(tmp_path / "d", pixels=Pixels(channels=1)).batch([0])[0]
    path = npz(tmp_path / "a.npz", x=X, y=Y)
    assert torch.equal(load(path, pixels=Pixels(channels=1)).batch([0])[0], files)
    floats = npz(tmp_path / "f.npz", x=np.float32(X) / 255, y=Y)
    torch.testing.assert_close(load(floats, pixels=Pixels(channels=1)).batch([0])[0], files, atol=0.003, rtol=0)
    one = npz(tmp_path / "g.npz", x=X[..., 0], y=Y)
    assert load(one, pixels=Pixels(channels=3)).batch([0])[0].shape == (1, 3, 5, 6)
    cloud = npz(tmp_path / "c.npz", x=RNG.normal(size=(12, 7, 3)), y=Y)
    with pytest.raises(DataError, match="--channels is for images"):
        load(cloud, pixels=Pixels(channels=1)).batch([0])


def test_deep_images_are_not_cut_off_at_255(tmp_path):
    from PIL import Image

    deep = (np.arange(30).reshape(5, 6) * 2184).astype(np.uint16)  # up to 63336
    Image.fromarray(deep).save(tmp_path / "deep.png")
    want = torch.from_numpy(deep.astype(np.float32) / 65535)
    torch.testing.assert_close(pictures.read_image(tmp_path / "deep.png"), want.expand(3, 5, 6))
    assert pictures.read_image(tmp_path / "deep.png", 1, (4, 4)).shape == (1, 4, 4)
    Image.fromarray(want.numpy()).save(tmp_path / "float.tif")
    torch.testing.assert_close(pictures.read_image(tmp_path / "float.tif", 1), want[None])
    for name, array, match in (
        ("far.tif", want.numpy() * 255, "its floats run from 0 to 246"),
        ("int.tif", deep.astype(np.int32) * 99, "its integers run from 0 to"),
        ("nan.tif", np.full((2, 2), np.nan, np.float32), "its floats run from nan"),
    ):
        Image.fromarray(array).save(tmp_path / name)
        with pytest.raises(DataError, match=match) as caught:
            pictures.read_image(tmp_path / name)
        assert name in str(caught.value)


def test_a_photograph_is_turned_as_its_exif_data_say(tmp_path):
    from PIL import Image

    lying = np.zeros((4, 6, 3), np.uint8)
    lying[:, :3] = 255
    image = Image.fromarray(lying)
    exif = image.getexif()
    exif[0x0112] = 6  # turn by a quarter, clockwise
    image.save(tmp_path / "x.png", exif=exif)
    x = pictures.read_image(tmp_path / "x.png")
    assert x.shape == (3, 6, 4) and bool((x[:, :3] == 1).all()) and bool((x[:, 3:] == 0).all())
