"""Builds checkpoint files, bad ones too: an assembler for pickles, and zips as torch.save writes them bar one thing."""

from __future__ import annotations

import io
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from fastfip.checkpoint import load_checkpoint
from fastfip.errors import CheckpointError


@dataclass
class Name:
    """A GLOBAL of a pickle."""

    module: str
    name: str


@dataclass
class Call:
    """A REDUCE of a pickle: `function(*args)`, followed by a BUILD if there is a state."""

    function: Name
    args: tuple[Any, ...] = ()
    state: Any = None


@dataclass
class Pid:
    """A persistent object, i.e. a storage."""

    ident: tuple[Any, ...]


def encode(value: Any) -> bytes:
    """Return the instructions of pickle protocol 2 that push a value; of protocol 3 for bytes."""
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        if -(2**31) <= value < 2**31:
            return b"J" + struct.pack("<i", value)
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, bytes):
        return b"B" + struct.pack("<I", len(value)) + value
    if isinstance(value, tuple):
        return b"(" + b"".join(map(encode, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(encode, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(encode(k) + encode(v) for k, v in value.items()) + b"u"
    if isinstance(value, Name):
        return f"c{value.module}\n{value.name}\n".encode()
    if isinstance(value, Call):
        state = b"" if value.state is None else encode(value.state) + b"b"
        return encode(value.function) + encode(value.args) + b"R" + state
    if isinstance(value, Pid):
        return encode(value.ident) + b"Q"
    raise TypeError(type(value))


def pickled(value: Any) -> bytes:
    return b"\x80\x02" + encode(value) + b"."


FLOATS = Name("torch", "FloatStorage")
HOOKS = Call(Name("collections", "OrderedDict"))


def tensor(size=(4,), stride=(1,), offset=0, numel=4, key="0", kind=FLOATS, location="cpu", legacy=False) -> Call:
    """A tensor as torch.save describes it."""
    ident = ("storage", kind, key, location, numel, *((None,) if legacy else ()))
    return Call(Name("torch._utils", "_rebuild_tensor_v2"), (Pid(ident), offset, size, stride, False, HOOKS))


def write_zip(path, root, storages=None, extra=None, compress=(), data=None, order=b"little") -> None:
    """A file like torch.save's: `root` is what it holds (see `encode`), `storages` {key: bytes}."""
    storages = {"0": struct.pack("<4f", 1, 2, 3, 4)} if storages is None else storages
    entries = {"archive/data.pkl": pickled(root) if data is None else data, "archive/byteorder": order}
    entries |= {f"archive/data/{key}": value for key, value in storages.items()}
    entries |= {"archive/version": b"3\n", **(extra or {})}
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in entries.items():
            how = zipfile.ZIP_DEFLATED if name in compress else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name), value, compress_type=how)


def write_legacy(path, root, storages=None, numel=4) -> None:
    """A file as torch.save wrote it before 1.6."""
    storages = {"0": struct.pack("<4f", 1, 2, 3, 4)} if storages is None else storages
    sizes = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    with open(path, "wb") as file:
        for value in (0x1950A86A20F9469CFC6C, 1001, sizes, root, list(storages)):
            file.write(pickled(value))
        for value in storages.values():
            file.write(struct.pack("<q", numel) + value)


def torch_bytes(value: Any, legacy: bool = False, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def small_state() -> OrderedDict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return OrderedDict(
        {
            "fc.weight": torch.randn(3, 4, generator=generator),
            "fc.bias": torch.randn(3, generator=generator),
            "bn.num_batches_tracked": torch.tensor(7),
        }
    )


class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.fc = nn.Linear(4, classes)
        self.bn = nn.BatchNorm1d(classes, affine=False)
        del self.bn.running_mean, self.bn.running_var


def bare():
    net = Net()
    assert list(net.state_dict()) == list(small_state())
    return net


def refused(path, match, model=None, **kwargs):
    """The file is refused with one line that names it and matches; a model is left as it was."""
    model = bare() if model is None else model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for net in (None, model):
        if net is None and "model" in match:
            continue
        with pytest.raises(CheckpointError, match=match) as caught:
            load_checkpoint(path, net, **kwargs)
        text = str(caught.value)
        assert text.startswith(str(path)) and "\n" not in text and len(text) < 700
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def save(value, path, **kwargs):
    torch.save(value, path, **kwargs)
    return path


def make_net():
    return nn.Sequential(OrderedDict(fc=nn.Linear(4, 3), bn=nn.BatchNorm1d(3)))


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def write(value, path, how="zip"):
    if how == "safetensors":
        from safetensors.torch import save_file

        save_file(value, path)
    else:
        torch.save(value, path, _use_new_zipfile_serialization=how == "zip")
    return path
