"""Results of BackdoorBench that mean harm are refused in one line, within bounds, before a picture is looked at."""

import os
import re
import struct
import zlib

import numpy as np
import pytest
import torch

from fastfip import backdoorbench
from fastfip.data.scaling import Pixels
from fastfip.errors import CheckpointError, DataError, ModelError
from fastfip.testing import nets
from tests.support.backdoorbench_files import CLASSES, TARGET, attack_result, poisoned_state, some_pictures
from tests.support.checkpoint_files import Call, Name, tensor, write_zip
from tests.support.peak_memory import in_child

MORE = 64 * 2**20
STATE = {"fc.weight": torch.ones(CLASSES, 3)}


def written(folder, **options):
    return attack_result(folder / "badnet_0_1", STATE, **options)


def entry_changed(folder, change):
    """A result on disk one of whose pictures says something else of itself."""
    x, y = some_pictures()
    state = poisoned_state(x, y, TARGET, "./record/x/bd_test_dataset", folder / "badnet_0_1" / "bd_test_dataset")
    change(state["bd_data_container"]["data_dict"][0])
    return written(folder, disk=True, bd_test=state)


HERE = "./record/x/bd_test_dataset"


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd.png",
        f"{HERE}/../../../secret.png",
        f"{HERE}/0/../../secret.png",
        f"{HERE}//etc/a.png",
        f"{HERE}/./0.png",
        f"{HERE}/0\\..\\secret.png",
        f"{HERE}/C:/a.png",
        f"{HERE}/0/a.png\0.txt",
        f"{HERE}/0/a.svg",
        f"{HERE}/0/",
        f"{HERE}elsewhere/0/0.png",
        f"{HERE}/{'x' * 300}.png",
        HERE,
        "",
        7,
        None,
        b"0.png",
        "x" * 100_000,
    ],
    ids=lambda path: repr(path)[:40],
)
def test_paths_that_leave_the_folder_of_the_pictures_are_refused(tmp_path, path):
    result = backdoorbench.read(entry_changed(tmp_path, lambda entry: entry.update(path=path)))
    with pytest.raises(CheckpointError, match=r"attack_result\.pt: bd_test has a picture 0 that ") as caught:
        result.poisoned()
    assert "\n" not in str(caught.value) and "\0" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize("folder", ["..", ".", "", "/", "a/..", "a\\..", "x" * 300, 7, "a\nb", "c:"])
def test_folders_that_do_not_lie_beside_the_file_are_refused(tmp_path, folder):
    state = poisoned_state(*some_pictures(), TARGET, "./x", tmp_path / "x")
    state["bd_data_container"]["save_folder_path"] = folder
    with pytest.raises(CheckpointError, match="bd_test has pictures in a folder that does not lie beside it"):
        backdoorbench.read(written(tmp_path, bd_test=state)).poisoned()


@pytest.mark.parametrize("what", ["picture", "folder of a class", "folder of all"])
def test_links_are_refused(tmp_path, what):
    path = written(tmp_path, disk=True)
    folder = path.parent / "bd_test_dataset"
    place = {"picture": folder / "0" / "0.png", "folder of a class": folder / "0", "folder of all": folder}[what]
    real = tmp_path / "real"
    place.rename(real)
    place.symlink_to(real)
    with pytest.raises(CheckpointError, match=r"its picture bd_test_dataset/0/0\.png is a link"):
        backdoorbench.read(path).triggered()


def test_a_result_behind_a_link_is_read(tmp_path):
    path = written(tmp_path, disk=True)
    (tmp_path / "link").symlink_to(path.parent)
    assert len(backdoorbench.read(tmp_path / "link" / path.name).triggered(Pixels())) == 18


def test_a_pipe_in_place_of_a_picture_does_not_hang(tmp_path):
    path = written(tmp_path, disk=True)
    picture = path.parent / "bd_test_dataset" / "0" / "0.png"
    picture.unlink()
    os.mkfifo(picture)
    with pytest.raises(CheckpointError, match="is missing"):
        backdoorbench.read(path).triggered()


def png(width, height):
    """A PNG that claims so many pixels and has none."""
    head = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


@pytest.mark.parametrize("data", [png(60_000, 60_000), png(2**31 - 1, 2**31 - 1), b"no picture", b""], ids=len)
def test_pictures_on_disk_that_are_bombs_or_none_are_refused_within_bounds(tmp_path, data):
    path = written(tmp_path, disk=True)
    (path.parent / "bd_test_dataset" / "0" / "0.png").write_bytes(data)

    def read():
        try:
            backdoorbench.read(path).triggered().batch([0])
        except DataError as error:
            return str(error)

    said, peak = in_child(read)
    assert said.startswith(str(path.parent)) and "0.png: cannot be read as an image" in said and "\n" not in said
    assert peak < MORE


def picture(width=4, height=4, mode="RGB", data=None, state=None):
    """The state of an image of pillow as a pickle of protocol 2 has it."""
    data = bytes(48) if data is None else data
    text = Call(Name("_codecs", "encode"), (data.decode("latin1"), "latin1")) if isinstance(data, bytes) else data
    state = [{}, mode, (width, height), None, text] if state is None else state
    return Call(Name("PIL.Image", "Image"), (), state)


def integers(values, code="i8", shape=None, data=None):
    """A NumPy array as a pickle of protocol 2 has it."""
    kind = Call(Name("numpy", "dtype"), (code, False, True), (3, "<", None, None, None, -1, -1, 0))
    data = np.asarray(values, f"<{code}").tobytes() if data is None else data
    text = Call(Name("_codecs", "encode"), (data.decode("latin1"), "latin1"))
    empty = (Name("numpy", "ndarray"), (0,), b"b".decode())
    state = (1, (len(values),) if shape is None else shape, kind, False, text)
    return Call(Name("numpy._core.multiarray", "_reconstruct"), empty, state)


def in_memory(path, entries=None, order=None, marked=None, **changes):
    """A result in memory mode, assembled by hand."""
    held = {0: (picture(), 1, 0)} if entries is None else entries
    container = {"save_folder_path": None, "data_dict": held, "save_file_format": ".png"}
    state = {
        "bd_data_container": container,
        "getitem_all": True,
        "original_index_array": integers([0]) if order is None else order,
        "poison_indicator": integers([1, 0], "f8") if marked is None else marked,
        "save_folder_path": None,
    }
    value = {"model_name": "resnet20", "num_classes": 4, "model": {"w": tensor()}, "data_path": "x"}
    value |= {"img_size": (4, 4, 3), "clean_data": "cifar10", "bd_train": None, "bd_test": state, **changes}
    write_zip(path, value)
    return path


def test_a_result_that_is_assembled_by_hand_is_read(tmp_path):
    found = backdoorbench.read(in_memory(tmp_path / "attack_result.pt")).triggered(Pixels())
    assert found.batch([0])[0].shape == (1, 3, 4, 4)


HUGE = 2**40
WRONG = {
    "more pixels than values": ({0: (picture(HUGE, HUGE), 1, 0)}, "other values than it needs"),
    "one value less": ({0: (picture(data=bytes(47)), 1, 0)}, "other values than it needs"),
    "a long text of fewer values": ({0: (picture(400, 400, data=bytes(200_000)), 1, 0)}, "other values than it needs"),
    "values that are a number": ({0: (picture(data=7), 1, 0)}, "other values than it needs"),
    "no size": ({0: (picture(0, 4), 1, 0)}, "of no size"),
    "size less than nothing": ({0: (picture(-4, -4), 1, 0)}, "of no size"),
    "size of texts": ({0: (picture("4", 4), 1, 0)}, "of no size"),
    "a mode of its own": ({0: (picture(mode="P\x1b[31m"), 1, 0)}, r"of the mode P\?\[31m"),
    "no state": ({0: (picture(state=()), 1, 0)}, "without values"),
    "a state of numbers": ({0: (picture(state={"a": 1}), 1, 0)}, "without values"),
    "another class than pillow's": (
        {0: (Call(Name("argparse", "Namespace"), (), [{}, "RGB", (4, 4), None, 0]), 1, 0)},
        "no picture with its two labels",
    ),
    "no labels": ({0: (picture(),)}, "no picture with its two labels"),
    "a label beyond the classes": ({0: (picture(), 4, 0)}, "without two labels of 4 classes"),
    "a label below": ({0: (picture(), 1, -1)}, "without two labels of 4 classes"),
    "a label that is a text": ({0: (picture(), "1", 0)}, "without two labels of 4 classes"),
    "labels that are tensors": ({0: (picture(), 1, tensor((), ()))}, "labels are tensors, as those of CelebA"),
    "another picture": ({1: (picture(), 1, 0)}, "marks picture 0 as poisoned, which its container lacks"),
    "no dict": ([1], "no container of pictures"),
}


@pytest.mark.parametrize(("entries", "match"), WRONG.values(), ids=WRONG)
def test_pictures_that_are_not_what_they_say_are_refused_within_bounds(tmp_path, entries, match):
    path = in_memory(tmp_path / "attack_result.pt", entries)
    _refused(path, match)


ARRAYS = {
    "an index out of bounds": ({"order": integers([2])}, "leads out of its poison_indicator"),
    "an index below": ({"order": integers([-1])}, "leads out of its poison_indicator"),
    "one picture twice": ({"order": integers([0, 0])}, "with a picture twice"),
    "floats for indices": ({"order": integers([0.0], "f8")}, "of the dtype f8"),
    "complex marks": ({"marked": integers([1, 0], "c16")}, "of the dtype c16"),
    "two axes": ({"order": integers([0], shape=(1, 1))}, "no array of one axis"),
    "more than any data set": ({"marked": integers([], "i1", (5_000_000,), bytes(5_000_000))}, "more than any data"),
    "fewer values than it says": ({"marked": integers([], "i8", (20_000,), bytes(80_000))}, "needs 160000 bytes"),
    "a dict": ({"order": {}}, "no array of one axis"),
    "a list of texts": ({"order": ["0"]}, "no array of one axis"),
}


@pytest.mark.parametrize(("changes", "match"), ARRAYS.values(), ids=ARRAYS)
def test_arrays_that_are_not_what_they_say_are_refused_within_bounds(tmp_path, changes, match):
    _refused(in_memory(tmp_path / "attack_result.pt", **changes), match)


SETTINGS = {
    "images of a size that no memory has": ({"img_size": (10**6, 10**6, 3)}, "not height, width"),
    "images of four channels": ({"img_size": (4, 4, 4)}, "not height, width"),
    "images of texts": ({"img_size": "4,4"}, "its images are a str"),
    "true classes": ({"num_classes": True}, "of another kind than BackdoorBench writes"),
    "a name that is a number": ({"model_name": 7}, "of another kind than BackdoorBench writes"),
    "a data set that is a list": ({"clean_data": ["cifar10"]}, "by something that is no text"),
    "a call beside the weights": ({"x": Call(Name("os", "system"), ("true",))}, "unsafe pickle.* os.system"),
    "a call among the pictures": (
        {"bd_train": {"bd_data_container": Call(Name("builtins", "eval"), ("1",))}}, "unsafe pickle.* builtins.eval"
    ),
    "a picture's class with a dot": ({"x": Call(Name("PIL.Image", "open.system"), ("x",))}, "unsafe pickle"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "match"), SETTINGS.values(), ids=SETTINGS)
def test_settings_that_no_run_has_are_refused(tmp_path, changes, match):
    _refused(in_memory(tmp_path / "attack_result.pt", **changes), match)


def _refused(path, match):
    def read():
        try:
            backdoorbench.read(path).poisoned()
        except CheckpointError as error:
            return str(error)

    said, peak = in_child(read)
    assert said is not None and re.search(match, said), said
    assert said.startswith(f"{path}: ") and said.isprintable() and len(said) < 700
    assert peak <= path.stat().st_size + MORE


@pytest.mark.parametrize("classes", [10**5, 10**6, 10**15])
def test_a_number_of_classes_that_the_weights_belie_takes_no_memory(tmp_path, classes):
    path = attack_result(tmp_path, nets.ResNet20(4).state_dict(), model_name="vgg19_bn", num_classes=classes)

    def build():
        try:
            backdoorbench.read(path).build()
        except CheckpointError as error:
            return str(error)

    said, peak = in_child(build)
    assert "does not fit the model" in said or "cannot be told" in said
    assert peak <= path.stat().st_size + MORE


def test_a_text_that_is_changed_after_it_was_read_is_noticed(tmp_path):
    x, y = some_pictures(6, 160)
    path = written(tmp_path, pictures=(x, y), dataset="tiny")
    images = backdoorbench.read(path).triggered()
    assert images.batch([0])[0].shape == (1, 3, 160, 160)
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(DataError, match="is no longer the file that was read"):
        images.batch([0])


@pytest.mark.parametrize("name", ["preactresnet18", "\x1b]0;x\x07", "densenet161"])
def test_names_of_weights_and_networks_do_nothing_to_a_terminal(tmp_path, name):
    path = in_memory(tmp_path / "attack_result.pt", model={"w\x1b[31m\n": tensor()}, model_name=name)
    with pytest.raises((CheckpointError, ModelError)) as caught:
        backdoorbench.read(path).build()
    assert str(caught.value).isprintable() and str(caught.value).startswith(str(path))
