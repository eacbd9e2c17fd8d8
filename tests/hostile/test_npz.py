"""Damaged and hostile .npz files and images: one line each, no hang, no more memory than the file is worth."""

import io
import os
import struct
import zipfile

import numpy as np
import pytest
import torch

from fastfip.data.images import load, read_image
from fastfip.errors import DataError
from tests.support.peak_memory import in_child

X = np.arange(6 * 4 * 4 * 3, dtype=np.uint8).reshape(6, 4, 4, 3)
Y = np.arange(6) % 3


def array(header, data=b"", version=1, length=None):
    """An .npy as NumPy writes it, with a header of our own."""
    text = header if isinstance(header, bytes) else repr(header).encode()
    form = "<H" if version == 1 else "<I"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack(form, len(text) if length is None else length) + text + data


def write(path, x, how=zipfile.ZIP_DEFLATED):
    out = io.BytesIO()
    np.save(out, Y)
    with zipfile.ZipFile(path, "w", how) as archive:
        archive.writestr("x.npy", x)
        archive.writestr("y.npy", out.getvalue())
    return path


SHAPE = {"descr": "|u1", "fortran_order": False, "shape": (6, 4, 4, 3)}


def test_an_array_of_the_helper_is_read(tmp_path):
    data = load(write(tmp_path / "a.npz", array(SHAPE, X.tobytes())))
    assert len(data) == 6 and torch.equal(data.batch([1])[0][0, :, 0, 0] * 255, torch.tensor([48.0, 49, 50]))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        pytest.param(array(b"{'descr': ("), "damaged", id="a bracket that stays open (TokenError)"),
        pytest.param(array(b"(" * 9000), "nested too deep|damaged", id="brackets"),
        pytest.param(array(b"-" * 9000 + b"1"), "nested too deep|damaged", id="signs"),
        pytest.param(array(b"[1]"), "damaged", id="another type"),
        pytest.param(array(b"{'a': 1}"), "damaged", id="other keys"),
        pytest.param(array(b"", version=2, length=2**31), "header claims 2147483648", id="a header of 2 GB"),
        pytest.param(array(b" " * 60_000), "header claims 60000", id="a long header"),
        pytest.param(array({**SHAPE, "shape": (10**15,)}), "damaged|claims", id="a huge shape"),
        pytest.param(array({**SHAPE, "shape": (2**40, 4, 4, 3)}), "claims", id="a shape beyond the file"),
        pytest.param(array({**SHAPE, "shape": (10**300,) * 9}), "damaged", id="a shape beyond numbers"),
        pytest.param(array({**SHAPE, "shape": (-6, 4, 4, 3)}, X.tobytes()), "damaged", id="a negative shape"),
        pytest.param(array({**SHAPE, "shape": (True,)}, b"x"), "damaged", id="a shape of truths"),
        pytest.param(array({**SHAPE, "shape": 3}, b"xxx"), "damaged", id="a shape that is a number"),
        pytest.param(array({**SHAPE, "descr": "|O"}, b"x"), "objects", id="objects"),
        pytest.param(array({**SHAPE, "descr": [("a", "<f8")]}, b"x"), "objects or records", id="records"),
        pytest.param(array({**SHAPE, "descr": "<f8', evil"}, b"x"), "objects or records", id="a dtype with more in it"),
        pytest.param(array({**SHAPE, "descr": "<f3"}, X.tobytes()), "cannot be read", id="no such dtype"),
        pytest.param(array({**SHAPE, "descr": "<f16"}, bytes(288 * 16)), "float128|cannot be read", id="long doubles"),
        pytest.param(array({**SHAPE, "shape": ()}, b"x"), "no images", id="no sides"),
        pytest.param(array(SHAPE, X.tobytes()[:-1]), "claims 288 bytes and stores 287", id="short"),
        pytest.param(array(SHAPE, X.tobytes(), version=9), "not an array", id="version"),
        pytest.param(b"nothing", "cannot be read", id="no array"),
        pytest.param(b"", "too early", id="empty"),
    ],
)
def test_arrays_that_are_damaged_are_refused_in_one_line(tmp_path, content, match):
    path = write(tmp_path / "a.npz", content)
    with pytest.raises(DataError, match=match) as caught:
        load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["f2", "f4", "f8"])
def test_floats_of_both_byte_orders_are_read(tmp_path, order, kind):
    x = (X / 255).astype(order + kind)
    np.savez(tmp_path / "a.npz", x=x, y=Y.astype(order + "i2"))
    data = load(tmp_path / "a.npz")
    torch.testing.assert_close(data.batch([2])[0][0], torch.from_numpy(x[2].astype("f4")).permute(2, 0, 1))
    assert data.labels.tolist() == Y.tolist()


def test_arrays_in_the_order_of_fortran_are_read(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.asfortranarray(X), y=Y)
    np.savez(tmp_path / "b.npz", x=X, y=Y)
    assert torch.equal(load(tmp_path / "a.npz").batch([3])[0], load(tmp_path / "b.npz").batch([3])[0])


def test_damage_at_random_is_refused_or_harmless(tmp_path):
    rng = np.random.default_rng(0)
    np.savez_compressed(tmp_path / "a.npz", x=X, y=Y)
    good, refusals = (tmp_path / "a.npz").read_bytes(), 0
    for _ in range(300):
        data = bytearray(good)
        for _ in range(int(rng.integers(1, 4))):
            data[rng.integers(len(data))] = rng.integers(256)
        (tmp_path / "a.npz").write_bytes(data)
        try:
            load(tmp_path / "a.npz").batch([0])
        except DataError as error:
            assert "\n" not in str(error)
            refusals += 1
    assert refusals > 150


@pytest.mark.parametrize("how", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressions_that_numpy_does_not_write(tmp_path, how):
    with pytest.raises(DataError, match="compressed in a way"):
        load(write(tmp_path / "a.npz", array(SHAPE, X.tobytes()), how))


def test_a_single_array_under_the_name_of_an_npz(tmp_path):
    np.save(tmp_path / "a.npy", X)
    os.rename(tmp_path / "a.npy", tmp_path / "a.npz")
    with pytest.raises(DataError, match=r"one array \(\.npy\): write images and labels with np\.savez"):
        load(tmp_path / "a.npz")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.npz")
    with pytest.raises(DataError, match="not a plain file"):
        load(tmp_path / "a.npz")
    with pytest.raises(DataError, match="not a plain file"):
        read_image(tmp_path / "a.npz")


def test_names_of_files_that_no_system_takes():
    for name in ("x" * 5000, "a\0b", "x" * 300 + ".npz"):
        with pytest.raises(DataError):
            load(name)


def bomb(path, size):
    head = array({**SHAPE, "shape": (size // 3072, 32, 32, 3)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        with archive.open("x.npy", "w", force_zip64=True) as entry:
            entry.write(head)
            for _ in range(size // 3072 // 1024):
                entry.write(bytes(3072 * 1024))
        archive.writestr("y.npy", array({**SHAPE, "descr": "|u1", "shape": (size // 3072,)}, bytes(size // 3072)))
    return path


def many(path):
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(40_000):
            archive.writestr(zipfile.ZipInfo(f"{i}.npy"), b"")
    return path


@pytest.mark.parametrize(
    ("make", "match"),
    [(lambda path: bomb(path, 3072 * 1024 * 100), "expands from .* np.savez instead"), (many, "far more entries")],
    ids=["300 MB of 300 kB", "40,000 entries"],
)
def test_bombs_are_refused_within_their_memory(tmp_path, make, match):
    path = make(tmp_path / "a.npz")

    def read():
        try:
            load(path)
        except DataError as error:
            return str(error)

    said, peak = in_child(read)
    with pytest.raises(DataError, match=match):
        raise DataError(said)
    assert peak < path.stat().st_size + 64 * 2**20


@pytest.mark.parametrize("side", [9000, 3000])
def test_images_of_too_many_pixels_are_refused_within_their_memory(tmp_path, side):
    from PIL import Image

    path = tmp_path / "a.png"
    Image.new("1", (side, side)).save(path)
    assert path.stat().st_size < 2**17

    def read():
        try:
            read_image(path)
        except DataError as error:
            return str(error)

    said, peak = in_child(read)
    assert f"{side} x {side} pixels" in said and peak < 64 * 2**20


def test_large_images_are_read(tmp_path):
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (2100, 2100), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 1).shape == (1, 2100, 2100)
