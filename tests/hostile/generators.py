"""Makes files that mean harm: those that take memory or time, and those that make a reader trust what it must not."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from tests.support.checkpoint_files import Call, Name, encode, pickled, small_state, tensor, torch_bytes, write_zip

LATIN = encode("latin1")
STATE = Call(Name("numpy", "dtype"), ("i8", False, True), (3, "<", None, None, None, -1, -1, 0))


class Hostile(NamedTuple):
    """A file, and what is said of it; "" where it may be read within the bounds."""

    name: str
    write: Callable[[Path], None]
    match: str
    suffix: str = ".pth"


def zipped(body: bytes) -> Callable[[Path], None]:
    """A sound zip around a pickle."""
    return lambda path: write_zip(path, None, data=b"\x80\x02" + body)


def put(index: int) -> bytes:
    return b"r" + struct.pack("<I", index)


def get(index: int) -> bytes:
    return b"j" + struct.pack("<I", index)


def repeated_encode(length: int, times: int) -> bytes:
    """`_codecs.encode` of one long text, again and again: a few bytes each, and a copy of the text each."""
    return repeated_call("_codecs", "encode", encode("x" * length) + LATIN + b"\x86", times)


def repeated_call(module: str, name: str, arguments: bytes, times: int) -> bytes:
    """A call that copies its argument, again and again."""
    start = b"}" + encode("a") + b"](" + encode(Name(module, name)) + put(0) + arguments + put(1)
    return start + (get(0) + get(1) + b"R") * times + b"es."


def numbers(count: int) -> bytes:
    return b"](" + b"K\x01" * count + b"e"


def table(count: int) -> bytes:
    return b"}(" + b"".join(b"J" + struct.pack("<i", i) + b"K\x01" for i in range(count)) + b"u"


def pairs(count: int) -> bytes:
    return b"](" + b"".join(b"J" + struct.pack("<i", i) + b"K\1\x86" for i in range(count)) + b"e"


def long_keys(times: int) -> bytes:
    """One dict entry set again and again under two equal texts, which are compared each time."""
    first, second = encode("x" * 60_000), encode("x" * 60_000)
    start = first + put(0) + b"0" + second + put(1) + b"0}"
    return start + (get(0) + b"Ns" + get(1) + b"Ns") * times + b"."


def listed(body: bytes) -> bytes:
    """A dict (noted as 0) with a list of what `body` gives, under "a" (noted as 1): all of it is kept."""
    return b"}q\0" + encode("a") + b"q\1](" + body + b"es."


def kept(module: str, name: str, arguments: bytes, times: int, state: bytes = b"") -> bytes:
    """The results of many equal calls, all of them kept."""
    start = encode(Name(module, name)) + put(0) + arguments + put(1)
    return start + b"}" + encode("a") + b"](" + (b"h\0h\1R" + state) * times + b"es."


def with_a_bad_tensor(body: bytes) -> bytes:
    """The same beside a tensor that claims more than there is, whose name has to be found."""
    return listed(body)[:-1] + encode("w") + encode(tensor((400,))) + b"s."


def encoded_texts(count: int) -> bytes:
    """Texts of nearly 64 kB that stand for bytes, all of them kept."""
    encode_name = encode(Name("_codecs", "encode"))
    return b"".join(encode_name + encode(f"{i:08d}" + "x" * 64_990) + LATIN + b"\x86R" for i in range(count))


def put_together(modules: int, names: int) -> bytes:
    """Calls of all names of all modules, each put together from two texts that are in the file once."""
    texts = [f"{i:03d}" + "x" * 497 for i in range(modules + names)]
    start = b"".join(encode(text) + put(i) + b"0" for i, text in enumerate(texts))
    calls = (get(i) + get(modules + j) + b"\x93)R0" for i in range(modules) for j in range(names))
    return b"\x80\x05" + start + b"".join(calls) + b"}."


def long_modules(count: int) -> bytes:
    """Persistent modules whose names are bytes, of which each takes four characters to show."""
    names = (b"B" + struct.pack("<II", 65_000, i) + b"\1" * 64_996 for i in range(count))
    return b"\x80\x05" + b"".join(b"(" + encode("module") + name + b"tQ0" for name in names) + b"}."


def safetensors(entries: object, data: bytes = b"") -> Callable[[Path], None]:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return lambda path: path.write_bytes(struct.pack("<Q", len(text)) + text + data) and None


def many_entries(count: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("a/data.pkl", "a/version", *(f"a/data/{i}" for i in range(count))):
                archive.writestr(zipfile.ZipInfo(name), pickled({}) if name.endswith("pkl") else b"")

    return write


def many_views(count: int, values: int) -> Callable[[Path], None]:
    """Tensors that overlap in one block: each is looked at in full."""
    claims = {f"w{i}": tensor((values - i,), numel=values) for i in range(count)}
    return lambda path: write_zip(path, claims, {"0": bytes(4 * values)})


def nested_rebuilds(depth: int) -> bytes:
    """`_rebuild_from_type_v2` of itself of itself ..."""
    name = encode(Name("torch._tensor", "_rebuild_from_type_v2"))
    inner = b"(" + name + encode(Name("torch", "Tensor")) + b")Nt" + put(0)
    step = b"(" + get(1) + get(2) + get(0) + b"Nt" + put(0) + b"0"
    return (
        name
        + put(1)
        + b"0"
        + encode(Name("torch", "Tensor"))
        + put(2)
        + b"0"
        + inner
        + b"0"
        + step * depth
        + (get(1) + get(0) + b"R.")
    )


WIDE = encode(Call(Name("numpy", "dtype"), ("f16", False, True), (3, "<", *[None] * 3, -1, -1, 0)))
WIDE += encode(Call(Name("_codecs", "encode"), ("\0" * 16, "latin1"))) + b"\x86"
MANY = "many times its size"
ODD = "in a way that torch.save never does"
SLOW = [
    Hostile("encode of 1 MB", zipped(repeated_encode(10**6, 11_000)), "no state dict"),
    Hostile("encode of 60 kB", zipped(repeated_encode(60_000, 90_000)), MANY),
    Hostile(
        "Counter", zipped(repeated_call("collections", "Counter", table(20_000) + b"\x85", 30_000)), "no state dict"
    ),
    Hostile("torch.Size", zipped(repeated_call("torch", "Size", numbers(60_000) + b"\x85", 9_000)), MANY),
    Hostile("set", zipped(repeated_call("builtins", "set", numbers(60_000) + b"\x85", 40_000)), "no state dict"),
    Hostile(
        "OrderedDict",
        zipped(repeated_call("collections", "OrderedDict", pairs(9_000) + b"\x85", 9_000)),
        MANY,
    ),
    Hostile("empty dicts", zipped(b"}" * 40_000_000), MANY),
    Hostile("marks", zipped(b"(" * 1_000_000), MANY),
    Hostile("nothing, often", zipped(b"N" + b"20" * 1_600_000 + b"}."), "more than 3000000 instructions"),
    Hostile("long keys", zipped(long_keys(50_000)), "twice in one dict"),
    Hostile(
        "long names", zipped(encode("x" * 60_000) + put(0) + (get(0) + get(0) + b"\x930") * 9_000 + b"}."), "followed"
    ),
    Hostile("names remembered", zipped(b"\x80\x05N" + b"\x94" * 2_900_000 + b"0}."), ODD),
    Hostile(
        "frozen sets",
        zipped(b"\x80\x05" + (numbers(60_000) + put(0) + (b"(" + get(0) + b"\x910") * 400_000) + b"}."),
        MANY,
    ),
    Hostile("sets", zipped(b"\x80\x05\x8f" + (b"(" + b"K\1" * 60 + b"\x90") * 20_000 + b"0}."), ODD),
    Hostile("sets, kept", zipped(b"\x80\x05" + b"\x8f" * 700_000 + b"}."), MANY),
    Hostile("frozen sets, kept", zipped(b"\x80\x05" + b"(\x91" * 650_000 + b"}."), MANY),
    Hostile("texts for bytes, kept", zipped(listed(encoded_texts(1_400))), MANY),
    Hostile("dtypes, kept", zipped(kept("numpy", "dtype", encode(("i8", False, True)), 900_000)), MANY),
    Hostile("wide numbers, kept", zipped(kept("numpy.core.multiarray", "scalar", WIDE, 900_000)), MANY),
    Hostile(
        "arrays, kept",
        zipped(
            kept("numpy.core.multiarray", "_reconstruct", encode((Name("numpy", "ndarray"), (0,), "b")), 900_000),
        ),
        MANY,
    ),
    Hostile("OrderedDicts, kept", zipped(kept("collections", "OrderedDict", b")", 900_000, b"Nb")), MANY),
    Hostile("odd tensors, kept", zipped(kept("torch._utils", "_rebuild_qtensor", b")", 900_000)), MANY),
    Hostile("names put together", zipped(put_together(400, 220)), MANY),
    Hostile("modules with long names", zipped(long_modules(600)), MANY),
    Hostile(
        "calls of long names",
        zipped(b"".join(b"c%08d" % i + b"m" * 490 + b"\n" + b"n" * 498 + b"\n)R" for i in range(80_000)) + b"}."),
        MANY,
    ),
    Hostile("tuples, kept", zipped(listed(b"K\1\x85" * 330_000)), "no state dict"),
    Hostile("tuples in tuples, kept", zipped(listed(b"K\1\x85\x85" * 200_000)), MANY),
    Hostile("empty lists, kept", zipped(listed(b"]" * 600_000)), "no state dict"),
    Hostile("lists, kept", zipped(listed(b"]h\0a" * 365_000)), MANY),
    Hostile("dicts, kept", zipped(listed(b"}h\1h\0s" * 220_000)), MANY),
    Hostile("a bad tensor after a long list", zipped(with_a_bad_tensor(b"h\1" * 2_900_000)), "w claims 400 values"),
    Hostile("a bad tensor after many lists", zipped(with_a_bad_tensor(b"]h\0a" * 340_000)), "w claims 400 values"),
    Hostile("a bad tensor after many dicts", zipped(with_a_bad_tensor(b"}h\1h\0s" * 210_000)), "w claims 400 values"),
    Hostile("a text of many bytes", zipped(b"\x80\x05\x8d" + struct.pack("<Q", 2**60) + b"abc"), "followed"),
    Hostile("frames", zipped(b"\x80\x05" + b"\x95" + bytes(8) * 2_000_000), "followed|instructions"),
    Hostile("one long line", zipped(b"c" + b"x" * 5_000_000), "followed"),
    Hostile("a text that claims more", zipped(b"X\xff\xff\xff\x7fabc"), "followed"),
    Hostile(
        "long number", zipped(b"\x8b" + struct.pack("<I", 60_000) + b"\x7f" * 60_000 + b"."), "holds an int|protocol"
    ),
    Hostile("nested lists", zipped(b"}" + encode("a") + b"]" * 100_000 + b"a" * 99_999 + b"s."), "no state dict"),
    Hostile("nested rebuilds", zipped(nested_rebuilds(20_000)), "subclass|unsafe pickle"),
    Hostile("sides without end", zipped(encode({"w": tensor((2**62,) * 60, (1,) * 60)}) + b"."), "claims"),
    Hostile("numbers beyond 64 bits", zipped(encode({"w": tensor((2**900,), (2**900,))}) + b"."), "64 bits"),
    Hostile("tensors of many sides", zipped(encode({"w": tensor((1,) * 900, (1,) * 900)}) + b"."), "sides"),
    Hostile("10^5 entries", many_entries(100_000), "far more entries"),
    Hostile("30,000 views", many_views(30_000, 2**20), MANY),
    Hostile("3,000 views", many_views(3_000, 2**20), "views of the same values"),
    Hostile(
        "shape",
        safetensors({"w": {"dtype": "F32", "shape": [10**300] * 30_000, "data_offsets": [0, 0]}}),
        "header takes|damaged entry",
        ".safetensors",
    ),
    Hostile(
        "shape of a few",
        safetensors({"w": {"dtype": "F32", "shape": [10**300] * 60, "data_offsets": [0, 0]}}),
        "truncated or damaged",
        ".safetensors",
    ),
    Hostile("brackets", safetensors(b'{"w": ' + b"[" * 900_000), "nested too deep|header cannot", ".safetensors"),
    Hostile("lists", safetensors(b'{"w": [' + b"[]," * 300_000 + b"1]}"), "damaged entry", ".safetensors"),
    Hostile(
        "names",
        safetensors(b"{" + b",".join(b'"%d":1' % i for i in range(90_000)) + b"}"),
        "damaged entry",
        ".safetensors",
    ),
    Hostile("long header", safetensors(b'{"w": [' + b"1," * 3_000_000 + b"1]}"), "header takes", ".safetensors"),
    Hostile(
        "packed",
        safetensors({"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, b"12"),
        "packed",
        ".safetensors",
    ),
    Hostile(
        "dtype that is a list",
        safetensors({"w": {"dtype": [], "shape": [4], "data_offsets": [0, 2]}}, b"12"),
        "damaged entry",
        ".safetensors",
    ),
]


def numpy_dtype(code: str, state: tuple[object, ...]) -> Call:
    return Call(Name("numpy", "dtype"), (code, False, True), state)


def numpy_number(code: str, state: tuple[object, ...], data: bytes) -> Call:
    """A NumPy number as a pickle of protocol 2 describes it."""
    text = Call(Name("_codecs", "encode"), (data.decode("latin1"), "latin1"))
    return Call(Name("numpy.core.multiarray", "scalar"), (numpy_dtype(code, state), text))


def sound_state(version: int = 3, order: object = "<", sub: object = None, rest: tuple[object, ...] = (-1, -1, 0)):
    more = (None,) if version == 4 else ()
    return (version, order, sub, None, None, *rest, *more)


def beside(value: object) -> Callable[[Path], None]:
    """A checkpoint with a value beside its weights."""
    return lambda path: write_zip(path, {"net": {"w": tensor()}, "x": value})


def of_protocol(protocol: int, legacy: bool) -> bytes:
    """A sound file with what protocols 3 to 5 have instructions of their own for."""
    import numpy as np

    values = {"raw": b"\xffraw", "bytes": bytearray(b"b" * 300), "set": {1, 2}, "frozen": frozenset({3}), "big": 2**80}
    arrays = {"loss": np.float64(0.5), "index": np.arange(6).reshape(2, 3), "columns": np.ones((3, 2), order="F")}
    return torch_bytes({"net": small_state(), "acc": 0.5, **values, **arrays}, legacy, protocol)


SOUND = {
    "zip": torch_bytes({"net": small_state(), "acc": 0.5, "seen": torch.arange(5)}),
    "legacy": torch_bytes({"net": small_state(), "acc": 0.5}, legacy=True),
    **{
        f"{'legacy' if legacy else 'zip'}, protocol {protocol}": of_protocol(protocol, legacy)
        for protocol in (3, 4, 5)
        for legacy in (False, True)
    },
}


def sound_safetensors() -> bytes:
    from safetensors.torch import save

    return save({name: value.contiguous() for name, value in small_state().items()})


def sound_npz(compressed: bool = True) -> bytes:
    import numpy as np

    out = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(out, x=np.zeros((6, 4, 4, 3), np.uint8), y=np.arange(6) % 3)
    return out.getvalue()


def weights_with_numpy() -> dict[str, object]:
    import numpy as np

    return {"net": {"w": torch.ones(3)}, "acc": np.float64(0.5), "epoch": np.int64(3), "index": np.arange(4)}
