"""Files of every pickle protocol: the same is read, left out and refused."""

import argparse
import collections
import os
import pathlib
import struct

import numpy as np
import pytest
import torch

from fastfip.checkpoint import load_checkpoint
from tests.support.checkpoint_files import refused, save, small_state, write_zip

PROTOCOLS = [2, 3, 4, 5]


def beside():
    return {
        "acc": 0.5,
        "loss": np.float64(2.5),
        "name": "x" * 300,
        "big": 2**80,
        "tags": ("a", 1, None),
        "set": {1, 2},
        "empty": set(),
        "frozen": frozenset({1}),
        "args": argparse.Namespace(lr=1),
        "array": np.arange(6.0).reshape(2, 3),
        "by column": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "text array": np.array(["a", "b"]),
        "picture": bytearray(b"q" * 70_000),
        "log": "y" * 100_000,
        "path": pathlib.PurePosixPath("a/b"),
        "count": collections.Counter("aab"),
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_same_is_read_and_left_out(tmp_path, protocol, legacy):
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": not legacy}
    found = load_checkpoint(save({"net": small_state(), **beside()}, tmp_path / "m.pth", **options))
    assert found.format == ("legacy" if legacy else "zip")
    assert all(torch.equal(found[name], value) for name, value in small_state().items())
    plain = {name: found.extras[name] for name in ("acc", "loss", "name", "big", "tags")}
    assert plain == {"acc": 0.5, "loss": 2.5, "name": "x" * 300, "big": 2**80, "tags": ("a", 1, None)}
    assert set(beside()) - set(plain) <= set(found.left_out), found.left_out


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Made:
    """Made by a call with keywords, which has an instruction of its own from protocol 4 on."""

    def __new__(cls, *, name):
        return super().__new__(cls)

    def __getnewargs_ex__(self):
        return (), {"name": "x"}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("what", ["call", "class", "objects"])
def test_what_would_run_code_is_refused(tmp_path, protocol, legacy, what):
    value = {
        "call": Runs(str(tmp_path / "ran")),
        "class": Made(name="x"),
        "objects": np.array([Runs(str(tmp_path / "ran"))], dtype=object),
    }[what]
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": not legacy}
    path = save({"net": small_state(), "x": value}, tmp_path / "m.pth", **options)
    refused(path, r"unsafe pickle: loading it would call .*(mkdir|Made|partial)|NumPy array of objects|no function")
    assert not (tmp_path / "ran").exists()


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


@pytest.mark.parametrize(
    ("instructions", "said"),
    [
        (short("posix") + short("system") + b"\x93" + short("true") + b"\x85R", r"would call posix\.system"),
        (short("torch") + short("_utils._rebuild_tensor_v2") + b"\x93)R", r"would call torch\._utils"),
        (short("collections") + short("OrderedDict.fromkeys") + b"\x93)R", "would call collections"),
        (b"\x95" + struct.pack("<Q", 2**62) + b"N", "bytes are expected"),
        (b"\x8d" + struct.pack("<Q", 2**63) + b"N", "bytes are expected"),
        (b"\x8e" + struct.pack("<Q", 2**63) + b"N", "bytes are expected"),
        (b"\x96" + struct.pack("<Q", 2**63) + b"N", "bytes are expected"),
        (b"\x97", r"in a way that torch\.save never does \(NEXT_BUFFER\)|cannot be followed"),
        (b"I1\n", r"in a way that torch\.save never does \(INT\)"),
        (b"N" + short("x") + b"\x93", "cannot be followed"),
        (b"(K\1\x91", "not a state dict|an object"),
    ],
)
def test_hostile_instructions_of_the_later_protocols(tmp_path, instructions, said):
    write_zip(tmp_path / "m.pth", {}, {}, data=b"\x80\x05" + instructions + b".")
    refused(tmp_path / "m.pth", said)
