"""Files that would run something, bad zips, damage: one clear line, nothing run, nothing loaded."""

import io
import os
import pickle
import random
import struct
import time
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from fastfip.checkpoint import load_checkpoint
from fastfip.errors import CheckpointError, FastFIPError
from tests.support.checkpoint_files import (
    Call,
    Name,
    Net,
    encode,
    pickled,
    refused,
    save,
    small_state,
    tensor,
    torch_bytes,
    write_zip,
)

# ---------------------------------------------------------------- code


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_pickled_module(tmp_path, legacy, inside):
    value = {"state_dict": small_state(), "net": nn.Linear(4, 3)} if inside else nn.Linear(4, 3)
    path = save(value, tmp_path / "m.pth", _use_new_zipfile_serialization=not legacy)
    refused(path, r"pickled module \(torch\.nn\.modules\.\w+\.\w+\).*state_dict")


def test_pickled_module_of_the_users_own(tmp_path):
    refused(save(Net(), tmp_path / "m.pth"), r"pickled module \(.*Net\)|pickled module \(torch\.nn")


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_pickled_module_of_another_protocol(tmp_path, protocol):
    refused(save(Net(), tmp_path / "m.pth", pickle_protocol=protocol), "pickled module")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_pickle_that_runs_something(tmp_path, legacy, inside):
    trace = tmp_path / "ran"
    value = {"state_dict": small_state(), "x": Runs(str(trace))} if inside else Runs(str(trace))
    path = save(value, tmp_path / "m.pth", _use_new_zipfile_serialization=not legacy)
    refused(path, r"unsafe pickle: loading it would call (posix|nt)\.mkdir")
    assert not trace.exists()


def test_plain_pickle_that_runs_something(tmp_path):
    path = tmp_path / "m.pkl"
    path.write_bytes(pickle.dumps(Runs(str(tmp_path / "ran"))))
    refused(path, "unsafe pickle")
    assert not (tmp_path / "ran").exists()
    pickle.loads(path.read_bytes())  # what it would have done
    assert (tmp_path / "ran").exists()


def test_safe_globals_of_the_process_do_not_count(tmp_path):
    with torch.serialization.safe_globals([os.mkdir]):
        refused(save(Runs(str(tmp_path / "ran")), tmp_path / "m.pth"), "unsafe pickle")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (Name("builtins", "eval"), ("1",)),
        (Name("builtins", "bytearray"), (10**12,)),
        (Name("torch", "FloatTensor"), (10**12,)),
        (Name("_codecs", "encode"), ("x", "rot13")),
        (Name("torch", "load"), ("x",)),
        (Name("argparse", "ArgumentParser"), ()),
        (Name("numpy", "dtype"), ("O8", False, True)),
    ],
)
def test_calls_that_no_checkpoint_needs(tmp_path, function, args):
    write_zip(tmp_path / "m.pth", {"state_dict": {"w": tensor()}, "x": Call(function, args)})
    refused(tmp_path / "m.pth", rf"unsafe pickle: loading it would call {function.module}\.{function.name}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(tmp_path):
    path = tmp_path / "m.pt"
    torch.jit.save(torch.jit.trace(nn.Linear(4, 3), torch.zeros(1, 4)), path)
    refused(path, "TorchScript")


def test_attributes_that_replace_what_a_tensor_is_built_of(tmp_path):
    """BUILD on a tensor calls its __setstate__, which may point it at another storage."""
    parameter = Call(
        Name("torch._utils", "_rebuild_parameter"), (tensor(), True, Call(Name("collections", "OrderedDict")))
    )
    parameter.state = (tensor((10**6,)), 0, (10**6,), (1,))
    write_zip(tmp_path / "m.pth", {"w": parameter})
    refused(tmp_path / "m.pth", "claims|takes none")


# ---------------------------------------------------------------- the zip


def test_a_sound_zip_of_the_helper_is_read(tmp_path):
    """The other zips here differ from this one in one thing."""
    write_zip(tmp_path / "m.pth", {"w": tensor((2, 2), (2, 1))})
    assert load_checkpoint(tmp_path / "m.pth")["w"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("name", ["archive/data.pkl", "archive/data/0"])
def test_compressed_entries(tmp_path, name):
    write_zip(tmp_path / "m.pth", {"w": tensor((2**20,), numel=2**20)}, {"0": bytes(2**22)}, compress=(name,))
    refused(tmp_path / "m.pth", f"entry {name} is compressed")


def test_entries_that_expand_beyond_the_file(tmp_path):
    path = tmp_path / "m.pth"
    write_zip(path, {"w": tensor()})
    data = bytearray(path.read_bytes())
    place = data.rindex(b"archive/data/0") - 46  # in the central directory
    assert data[place : place + 4] == b"PK\x01\x02"
    data[place + 24 : place + 28] = struct.pack("<L", 2**31)
    path.write_bytes(data)
    refused(path, "archive/data/0 claims to expand from 16 to 2147483648")


def test_entries_that_share_their_bytes(tmp_path):
    path = tmp_path / "m.pth"
    write_zip(path, {"w": tensor(), "v": tensor(key="1")}, {"0": bytes(16), "1": bytes(16)})
    data = bytearray(path.read_bytes())
    first, second = (data.rindex(f"archive/data/{i}".encode()) - 46 for i in (0, 1))
    data[second + 42 : second + 46] = data[first + 42 : first + 46]  # where its local header is
    path.write_bytes(data)
    refused(path, "overlaps")


def test_local_header_that_differs_from_the_directory(tmp_path):
    path = tmp_path / "m.pth"
    write_zip(path, {"w": tensor()})
    good = path.read_bytes()
    place = good.index(b"archive/data/0") - 30
    for offset, value in ((8, b"\x08\x00"), (22, struct.pack("<L", 99)), (30, b"b")):
        data = bytearray(good)
        data[place + offset : place + offset + len(value)] = value
        path.write_bytes(data)
        refused(path, "two headers that differ")


@pytest.mark.parametrize("name", ["archive/data.pkl", "archive/DATA/0", "archive/Data.pkl"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_entries_of_one_name(tmp_path, name):
    with open(tmp_path / "m.pth", "wb") as file:
        write_zip(file, {"w": tensor()})
    with zipfile.ZipFile(tmp_path / "m.pth", "a") as archive:
        archive.writestr(name, pickled(3))
    refused(tmp_path / "m.pth", "two entries of the same name")


def test_entries_outside_the_folder(tmp_path):
    write_zip(tmp_path / "m.pth", {"w": tensor()}, extra={"other/data/1": b""})
    refused(tmp_path / "m.pth", "entries outside archive/")


def test_bytes_after_the_zip_or_a_comment(tmp_path):
    path = tmp_path / "m.pth"
    write_zip(path, {"w": tensor()})
    good = path.read_bytes()
    path.write_bytes(good + b"x")
    refused(path, "does not end as a zip")
    path.write_bytes(good[:-2] + b"\x01\x00x")
    refused(path, "does not end as a zip")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.8, 0.99])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated(tmp_path, kind, keep):
    from safetensors.torch import save as safetensors_bytes

    state = {f"w{i}": torch.randn(50) for i in range(10)}
    data = safetensors_bytes(state) if kind == "safetensors" else torch_bytes(state, legacy=kind == "legacy")
    path = tmp_path / "m.bin"
    path.write_bytes(data[: int(len(data) * keep)])
    refused(path, "truncated|is empty|claims")


def test_zips_that_are_something_else(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    refused(tmp_path / "a.npz", "NumPy archive")
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as archive:
        archive.writestr("model/weights.bin", "x")
    refused(tmp_path / "b.pth", "torch.save did not write")


# ---------------------------------------------------------------- damage at random, and files made to be slow


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.filterwarnings("ignore")
def test_damage_at_random_is_refused_or_harmless(tmp_path, kind):
    from safetensors.torch import save as safetensors_bytes

    good = safetensors_bytes(small_state()) if kind == "safetensors" else torch_bytes(small_state(), kind == "legacy")
    path, rng = tmp_path / "m.bin", random.Random(0)
    refusals = 0
    for _ in range(150):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 3))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            loaded = load_checkpoint(path)
        except FastFIPError as error:
            assert "\n" not in str(error)
            refusals += 1
        else:
            assert all(torch.isfinite(v.double()).all() for v in loaded.values())
    assert refusals > 30


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.filterwarnings("ignore")
def test_damaged_pickles_are_refused_or_harmless(tmp_path, seed):
    """The same inside a sound zip, where no checksum helps."""
    with zipfile.ZipFile(io.BytesIO(torch_bytes({"net": small_state(), "acc": 0.5}))) as archive:
        entries = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    storages = {name[5:]: value for name, value in entries.items() if name.startswith("data/")}
    path, rng = tmp_path / "m.pth", random.Random(seed)
    refusals = 0
    for _ in range(60):
        data = bytearray(entries["data.pkl"])
        for _ in range(rng.choice((1, 1, 3))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        write_zip(path, None, storages, data=bytes(data))
        try:
            loaded = load_checkpoint(path)
        except FastFIPError as error:
            assert "\n" not in str(error)
            refusals += 1
        else:
            assert all(torch.isfinite(v.double()).all() for v in loaded.values())
    assert refusals > 20


def nested(op: bytes, depth: int = 60) -> bytes:
    """A tuple of two of a tuple of two ...: 2^depth parts in a few bytes."""
    return encode("x") + b"".join(b"r" + struct.pack("<I", i) + b"j" + struct.pack("<I", i) + op for i in range(depth))


@pytest.mark.parametrize(
    "body",
    [
        b"}" + nested(b"\x86") + b"Ns.",  # as a key: hashing it takes 2^60 steps
        b"}X\1\0\0\0a" + nested(b"\x86") + b"s.",  # as a value: plain data that may not be written out
        b"ctorch\nFloatStorage\n" + nested(b"\x86") + b"R.",
        nested(b"\x86") + b"Q.",  # as a persistent id
        b"}X\1\0\0\0wc torch._utils\n_rebuild_tensor_v3\n" + nested(b"\x86") + b"Rs.",
    ],
)
def test_nested_sharing_takes_no_exponential_time(tmp_path, body):
    write_zip(tmp_path / "m.pth", None, data=b"\x80\x02" + body)
    start = time.process_time()
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "m.pth")
    assert time.process_time() - start < 20  # not a measurement: 2^60 steps never end


def test_plain_data_that_holds_itself(tmp_path):
    loop: dict = {"net": small_state(), "epoch": 3}
    loop["self"] = loop
    shared = ("x",)
    for _ in range(60):
        shared = (shared, shared)
    loop["shared"] = shared
    loaded = load_checkpoint(save(loop, tmp_path / "m.pth"))
    assert loaded.extras["epoch"] == 3 and loaded.left_out == ["self"] and len(loaded) == 3
    assert isinstance(loaded, OrderedDict | dict)
