"""Class folders in a zip: the same images as in folders, and what is refused."""

import pickle
import zipfile

import pytest
import torch
from PIL import Image

from fastfip.data.images import load
from fastfip.data.scaling import Pixels
from fastfip.errors import DataError


def folders(root, classes=("cat", "dog", "10"), count=3, size=8):
    for place, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            color = (40 * place, 20 * number, 99)
            Image.new("RGB", (size, size), color).save(root / name / f"{number}.png")
    return root


def packed(root, path, inside=""):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(root.rglob("*")):
            archive.write(file, f"{inside}{file.relative_to(root)}")
    return path


def test_a_zip_holds_what_its_folders_hold(tmp_path):
    root = folders(tmp_path / "images")
    plain, zipped = load(root), load(packed(root, tmp_path / "images.zip"))
    assert zipped.classes == plain.classes and zipped.order == plain.order
    assert torch.equal(zipped.labels, plain.labels)
    assert torch.equal(zipped.batch(range(9))[0], plain.batch(range(9))[0])
    inner = packed(root, tmp_path / "deep.zip", "data/train/")
    assert torch.equal(load(f"{inner}:data/train").batch(range(9))[0], plain.batch(range(9))[0])
    small = load(f"{inner}:data/train", pixels=Pixels(size=(4, 4), channels=1))
    assert small.batch([1])[0].shape == (1, 1, 4, 4)
    again = pickle.loads(pickle.dumps(zipped))  # as workers of a loader get it
    assert torch.equal(again.batch([5])[0], plain.batch([5])[0])


def test_an_entry_without_a_name_is_passed_over(tmp_path):
    path = packed(folders(tmp_path / "images"), tmp_path / "images.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(".", b"")
    assert load(path).classes == load(tmp_path / "images").classes


def test_what_is_no_zip_of_class_folders(tmp_path):
    root = folders(tmp_path / "images")
    deep = packed(root, tmp_path / "deep.zip", "a/b/")
    for spec, said in ((deep, r"did you mean deep\.zip:a"), (f"{deep}:c", "no class folders")):
        with pytest.raises(DataError, match=said):
            load(spec)
    whole = packed(root, tmp_path / "whole.zip").read_bytes()
    for name, data in (("torn.zip", whole[:-30]), ("text.zip", b"no zip at all")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match="cannot be read as a zip"):
            load(tmp_path / name)


def test_entries_that_lie_are_refused_by_their_names(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat/../../x.png", b"")
        archive.writestr("cat/bomb\x1b[2J.png", b"\0" * 2**24)
        archive.writestr("dog/text.png", b"no picture")
    images = load(tmp_path / "a.zip")
    assert len(images) == 2
    with pytest.raises(DataError, match="bomb.*expands from") as error:
        images.batch([0])
    assert "\x1b" not in str(error.value)
    with pytest.raises(DataError, match=r"a\.zip:dog/text\.png: cannot be read as an image"):
        images.batch([1])


def test_a_forked_process_opens_the_zip_anew(tmp_path, monkeypatch):
    source = load(packed(folders(tmp_path / "images"), tmp_path / "images.zip")).source
    mine = source._archive()
    assert source._archive() is mine
    monkeypatch.setattr("os.getpid", lambda: -1)  # its place in the file would be shared with the other process
    assert source._archive() is not mine
