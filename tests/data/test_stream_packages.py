"""Data of webdataset and of Hugging Face's datasets, as these packages give them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import fastfip
from fastfip.data import iter_batches, scaled
from fastfip.errors import DataError
from tests.support.small_nets import same, values

N = 12
PIXELS = np.random.default_rng(0).integers(0, 255, (N, 6, 6, 3), dtype=np.uint8)
X = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float() / 255
Y = torch.arange(N) % 3


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(108, 3))


@pytest.fixture
def shard(tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="needs webdataset")
    path = str(tmp_path / "shard.tar")
    with webdataset.TarWriter(path) as writer:
        for i, (image, label) in enumerate(zip(PIXELS, Y.tolist())):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "png")
            writer.write({"__key__": f"{i:04}", "png": file.getvalue(), "cls": label})
    return lambda: webdataset.WebDataset(path, shardshuffle=False)


def check(make):
    """The same inputs and labels, and the same purified weights, as of the tensors."""
    task, batches = fastfip.data.Task(), list(iter_batches(make()))
    assert torch.allclose(torch.cat([task.inputs(b) for b in batches]), X, atol=1e-6)
    assert torch.equal(torch.cat([task.labels(b) for b in batches]), Y)
    results = [
        fastfip.purify(net(), data, "fine_tune", steps=2, batch_size=N, holdout=0.0, progress=False, test_loader=test)
        for data, test in ((make(), make()), ((X, Y), [(X, Y)]))
    ]
    got, want = (values(result.model) for result in results)
    assert all(torch.allclose(got[name], want[name], atol=1e-6) for name in want) and not same(got, values(net()))


def test_webdataset(shard):
    check(lambda: shard().decode("torchrgb"))
    check(lambda: shard().decode("torchrgb").to_tuple("png", "cls").batched(5))
    check(lambda: scaled(shard().decode("torchrgb8")))
    check(lambda: scaled(shard().decode("pil")))
    check(lambda: DataLoader(shard().decode("torchrgb"), batch_size=5, num_workers=1))
    with pytest.raises(DataError, match="images are bytes: decode them into tensors"):
        fastfip.evaluate(net(), shard())


def test_datasets():
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    pixels, images = datasets.Array3D((3, 6, 6), "uint8"), datasets.Image()
    label = datasets.Value("int64")
    rows = {"image": PIXELS.transpose(0, 3, 1, 2), "label": Y.numpy()}
    arrays = datasets.Dataset.from_dict(rows, features=datasets.Features(image=pixels, label=label))
    pictures = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(x) for x in PIXELS], "label": Y.numpy()},
        features=datasets.Features(image=images, label=label),
    )
    torches = arrays.with_format("torch")
    check(lambda: scaled(torches))
    check(lambda: scaled(pictures))
    check(lambda: scaled(DataLoader(torches, batch_size=5)))
    check(lambda: scaled(pictures.to_iterable_dataset()))
    check(lambda: scaled(torches.iter(batch_size=5)))
    assert scaled(DataLoader(torches, batch_size=5)).dataset is torches
