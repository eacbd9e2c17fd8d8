"""NumPy values in a checkpoint are numbers made of the bytes that are stored, or the file is refused."""

import math

import numpy as np
import pytest
import torch

from fastfip.checkpoint import load_checkpoint, save_checkpoint
from tests.hostile.generators import beside, numpy_dtype, numpy_number, sound_state
from tests.support.checkpoint_files import Call, Name, refused, write

KINDS = ["b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_their_bytes(tmp_path, kind, order):
    value = np.array([1], order + kind)[0] if kind == "b1" else np.array([3], order + kind)[0]
    data = np.array([value], order + kind).tobytes()
    beside(numpy_number(kind, sound_state(order=order), data))(tmp_path / "m.pth")
    read = load_checkpoint(tmp_path / "m.pth").extras["x"]
    assert read == value.item() and type(read) is type(value.item())


@pytest.mark.parametrize(
    "state",
    [
        pytest.param(sound_state(rest=(-1, -1, 4)), id="flags: its values are objects"),
        pytest.param(sound_state(rest=(-1, -1, 63)), id="all flags"),
        pytest.param(sound_state(rest=(64, -1, 0)), id="a longer item"),
        pytest.param(sound_state(rest=(0, 0, 0)), id="an item of no bytes"),
        pytest.param(sound_state(rest=(-1, 64, 0)), id="alignment"),
        pytest.param(sound_state(rest=(-1, -1, False)), id="flags of another type"),
        pytest.param(sound_state(rest=(-1.0, -1, 0)), id="numbers of another type"),
        pytest.param(sound_state(2), id="version"),
        pytest.param((3, "<", None, None, None, -1, -1, 0, None), id="version and length"),
        pytest.param(sound_state(order="@"), id="order"),
        pytest.param(sound_state(order=""), id="no order"),
        pytest.param(sound_state(order=0), id="order that is a number"),
        pytest.param(sound_state(sub=(Name("numpy", "dtype"), (4,))), id="parts"),
        pytest.param((3, "<"), id="short"),
    ],
)
@pytest.mark.parametrize("what", ["number", "array"])
def test_a_dtype_whose_state_is_not_that_of_plain_numbers_is_refused(tmp_path, state, what):
    """An integer of 8 bytes whose flags say that it is an object was read as an address of this process."""
    value = numpy_number("i8", state, bytes(8))
    if what == "array":
        value = numpy_array(numpy_dtype("i8", state), (1,), bytes(8))
    beside(value)(tmp_path / "m.pth")
    refused(tmp_path / "m.pth", "NumPy dtype i8 with a description that no dtype of plain numbers has")


def numpy_array(kind, shape, data):
    text = Call(Name("_codecs", "encode"), (data.decode("latin1"), "latin1"))
    start = Call(Name("_codecs", "encode"), ("b", "latin1"))
    call = Call(Name("numpy.core.multiarray", "_reconstruct"), (Name("numpy", "ndarray"), (0,), start))
    call.state = (1, shape, kind, False, text)
    return call


@pytest.mark.parametrize("kind", [*KINDS, "c32", "f16", "c24", "f12"])
@pytest.mark.parametrize("change", [-1, 1])
def test_bytes_that_are_not_as_many_as_the_dtype_takes_are_refused(tmp_path, kind, change):
    width = int(kind[1:])
    beside(numpy_number(kind, sound_state(), bytes(width + change)))(tmp_path / "m.pth")
    refused(tmp_path / "m.pth", "more or fewer bytes than its dtype has")
    beside(numpy_array(numpy_dtype(kind, sound_state()), (3,), bytes(3 * width + change)))(tmp_path / "m.pth")
    refused(tmp_path / "m.pth", f"needs {3 * width} bytes and stores {3 * width + change}")


def array_of(data, shape, order="C"):
    """An array as pickle protocol 5 describes it."""
    kind = numpy_dtype("i8", sound_state())
    return Call(Name("numpy._core.numeric", "_frombuffer"), (data, kind, shape, order))


LONG = bytes(80_000)  # passed over, as it is longer than 64 kB


@pytest.mark.parametrize(
    "make", [array_of, lambda data, shape: numpy_array(numpy_dtype("i8", sound_state()), shape, data)]
)
@pytest.mark.parametrize("data", [bytes(80), LONG], ids=["short", "long"])
def test_arrays_are_compared_with_their_shape_however_long_they_are(tmp_path, make, data):
    count = len(data) // 8
    for shape in [(count,), (2, count // 2), (count, 1, 1)]:
        beside(make(data, shape))(tmp_path / "m.pth")
        assert load_checkpoint(tmp_path / "m.pth").left_out == ["x"]
    for shape in [(2,), (2**40, 2**20), (count + 1,), (0,), (count, 0), ()]:
        beside(make(data, shape))(tmp_path / "m.pth")
        refused(tmp_path / "m.pth", f"needs {8 * math.prod(shape)} bytes and stores {len(data)}")


def test_a_long_text_may_have_two_bytes_for_each_that_it_stands_for(tmp_path):
    kind = numpy_dtype("i8", sound_state())
    for values in (b"\xff" * 80_000, b"\x01\xff" * 40_000):
        beside(numpy_array(kind, (10_000,), values))(tmp_path / "m.pth")
        assert load_checkpoint(tmp_path / "m.pth").left_out == ["x"]
    beside(numpy_array(kind, (9_999,), b"\xff" * 80_000))(tmp_path / "m.pth")
    refused(tmp_path / "m.pth", "needs 79992 bytes and stores 160000")


@pytest.mark.parametrize("order", ["??", "", "K", "f", None, True, ("C",)])
def test_an_order_that_no_array_has_is_refused(tmp_path, order):
    beside(array_of(bytes(16), (2,), order))(tmp_path / "m.pth")
    refused(tmp_path / "m.pth", "with an invalid order of values")


def test_a_dtype_without_or_with_two_states_is_refused(tmp_path):
    kind = Call(Name("numpy", "dtype"), ("i8", False, True))
    text = Call(Name("_codecs", "encode"), ("\0" * 8, "latin1"))
    beside(Call(Name("numpy.core.multiarray", "scalar"), (kind, text)))(tmp_path / "m.pth")
    refused(tmp_path / "m.pth", "more or fewer bytes than its dtype has")


@pytest.mark.parametrize("shape", [(-1,), (2**63,), (1,) * 65, ("x",), [2]])
def test_shapes_that_no_array_has_are_refused(tmp_path, shape):
    beside(numpy_array(numpy_dtype("i8", sound_state()), shape, bytes(16)))(tmp_path / "m.pth")
    refused(tmp_path / "m.pth", "invalid shape")


@pytest.mark.parametrize("version", [3, 4])
def test_both_versions_of_a_sound_state_are_read(tmp_path, version):
    beside(numpy_number("f4", sound_state(version), np.float32(0.5).tobytes()))(tmp_path / "m.pth")
    assert load_checkpoint(tmp_path / "m.pth").extras["x"] == 0.5


def test_numbers_wider_than_those_of_python_are_left_out(tmp_path):
    value = {
        "net": {"w": torch.ones(2)},
        "long": np.longdouble(1.5),
        "text": np.array(["a"]),
        "day": np.zeros(1, "M8[D]"),
    }
    loaded = load_checkpoint(write(value, tmp_path / "m.pth"))
    assert loaded.extras == {"net": None} and loaded.left_out == ["long", "text", "day"]


def test_what_was_a_numpy_number_is_written_as_one_of_python(tmp_path):
    """Plain torch.load takes our own output."""
    value = {
        "net": {"w": torch.ones(2)},
        "acc": np.float64(0.5),
        "epoch": np.int64(3),
        "log": [np.float32(1), np.bool_(True)],
    }
    loaded = load_checkpoint(write(value, tmp_path / "m.pth"))
    save_checkpoint(loaded, tmp_path / "out.pth", like=loaded)
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert {k: v for k, v in written.items() if k != "net"} == {"acc": 0.5, "epoch": 3, "log": [1.0, True]}
    assert [type(v) for v in (written["acc"], written["epoch"], *written["log"])] == [float, int, float, bool]
