"""What the calls in a pickle give, as stand-ins: tensors, plain data, things that are harmless, and all others."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from fastfip.checkpoint.claims import (
    MOST_SIDES,
    Claim,
    Global,
    NumpyArray,
    NumpyType,
    Odd,
    Opaque,
    Ordered,
    Storage,
)
from fastfip.checkpoint.opcodes import Encoded, Skipped
from fastfip.errors import CheckpointError

if TYPE_CHECKING:
    from fastfip.checkpoint.scan import Machine

__all__ = ["PLAIN", "STORAGES", "note", "result", "shown", "take_array_state"]

PLAIN = (str, int, float, bool, bytes, complex, type(None))
#: Storage kind -> (dtype, bytes of a value).
STORAGES = {
    "Double": ("float64", 8), "Float": ("float32", 4), "Half": ("float16", 2), "BFloat16": ("bfloat16", 2),
    "Long": ("int64", 8), "Int": ("int32", 4), "Short": ("int16", 2), "Char": ("int8", 1), "Byte": ("uint8", 1),
    "Bool": ("bool", 1), "ComplexDouble": ("complex128", 16), "ComplexFloat": ("complex64", 8),
    "QUInt8": ("", 1), "QInt8": ("", 1), "QInt32": ("", 4), "QUInt4x2": ("", 1), "QUInt2x4": ("", 1),
    "Untyped": ("uint8", 1),
}  # fmt: skip
_DTYPE_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "complex32": 4, "complex64": 8, "complex128": 16,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8, "bool": 1,
    "float8_e5m2": 1, "float8_e4m3fn": 1, "float8_e5m2fnuz": 1, "float8_e4m3fnuz": 1, "float8_e8m0fnu": 1,
}  # fmt: skip
_ODD_TENSORS = {
    "_rebuild_qtensor": "quantised",
    "_rebuild_sparse_tensor": "sparse",
    "_rebuild_sparse_csr_tensor": "sparse",
    "_rebuild_meta_tensor_no_storage": "a meta tensor, which has no values",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_wrapper_subclass": "a tensor of a subclass",
    "_rebuild_device_tensor_from_numpy": "a tensor of another device's own format",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of another device's own format",
}
_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMPY_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
_NUMPY_TYPES = frozenset("b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 f12 f16 c8 c16 c24 c32".split())
# Beside the weights these are settings, paths, dates, counts and pictures. They are not built, only left out by name.
_HARMLESS = re.compile(
    r"(argparse|types)\.\w*Namespace|(pathlib|pathlib\._local|datetime|decimal|fractions|uuid|zoneinfo)\.\w+|"
    r"collections\.(Counter|defaultdict|deque|UserDict|ChainMap)|builtins\.(set|frozenset|slice|range|object)|"
    r"PIL(\.\w+)?\.\w*Image\w*|omegaconf(\.\w+)*|[\w.]+\.AttributeDict|(easydict\.EasyDict|addict(\.\w+)*\.Dict)|"
    r"([\w.]+\.)?yacs\.config\.CfgNode|numpy\.random(\.\w+)+|torch\.(device|dtype|torch_version\.TorchVersion)|"
    r"torch\.serialization\._get_layout"
)


def shown(value: Any) -> str:
    """Return a name to print; containers by their type, as one that holds itself twice, nested, has no end of text."""
    if isinstance(value, Opaque):
        return f"a {value.of.name}"
    return str(value) if isinstance(value, (Global, *PLAIN)) else f"a {type(value).__name__}"


def result(machine: Machine, of: Global, args: tuple[Any, ...], inner: bool = False) -> Any:
    """Return what a call gives; calls that no checkpoint of tensors and plain data needs are noted as foreign."""
    name = str(of)
    if of.module == "torch._utils":
        if of.name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return _rebuilt(machine, of.name.endswith("v3"), args)
        if of.name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return _as_tensor(args)  # attributes of parameters may hide its methods: they are not kept
        if of.name in _ODD_TENSORS:
            return _odd(machine, _ODD_TENSORS[of.name])
    elif name == "torch._tensor._rebuild_from_type_v2" and isinstance(args[0], Global) and not inner:
        if shown(args[1]) in ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter"):
            return result(machine, args[0], args[2], inner=True)
        return _odd(machine, f"a tensor of the subclass {shown(args[1])}")
    elif name == "torch.nn.parameter.Parameter" and args and isinstance(args[0], (Claim, Odd)):
        return _as_tensor(args)
    elif name == "collections.OrderedDict":
        return _ordered(machine, args)
    elif name == "torch.storage._load_from_bytes":  # what pickle.dump, not torch.save, makes of a tensor
        foreign(machine, of)
        return Odd("pickled without torch.save")
    elif name == "copyreg._reconstructor" and args and isinstance(args[0], Global):
        return foreign(machine, args[0])
    else:
        value = _plain(machine, of, name, args)
        if value is not None:
            return value
    return foreign(machine, of)


def foreign(machine: Machine, of: Global) -> Opaque:
    """Return the stand-in for what is not followed, and note it where it is not known to be harmless."""
    if "." in of.name or not _HARMLESS.fullmatch(str(of)):
        note(machine, machine.out.foreign, str(of))
        if of.module.startswith("torch.nn.modules."):
            note(machine, machine.out.modules, str(of))
    return Opaque(of)


def note(machine: Machine, into: dict[str, None], name: str) -> None:
    """Take note of a name; two short texts can be put together to very many."""
    if name not in into:
        machine.budget.spend(100 + sys.getsizeof(name))
        into[name] = None


def _plain(machine: Machine, of: Global, name: str, args: tuple[Any, ...]) -> Any:
    """Return what a call gives that makes plain data, or a NumPy value of them; None for other calls."""
    first = args[0] if args else None
    if name == "torch.Size" and isinstance(first, (list, tuple)):
        machine.budget.spend(60 + 10 * len(first))
        return tuple(first) if all(type(item) is int for item in first) else None
    if name == "builtins.complex" and len(args) == 2 and all(type(item) in (int, float) for item in args):
        return complex(*args)
    if name == "_codecs.encode" and args[1:] == ("latin1",):
        if isinstance(first, str):
            return _encoded(machine, first)
        return first if isinstance(first, Skipped) else None
    if name == "builtins.bytearray" and (not args or isinstance(first, (bytes, Encoded, Skipped))):
        return first if args else b""  # bytearray(n) would allocate whatever the file asks for
    if name == "numpy.dtype" and isinstance(first, str) and args[1:] in ((False, True), (False, False), (0, 1)):
        if first in _NUMPY_TYPES:
            return NumpyType(first)
        return Opaque(of) if re.fullmatch(r"[SUMmV]\d{1,6}", first) else None
    if of.module in _NUMPY and of.name == "scalar" and len(args) == 2:
        return _number(args[0], args[1])
    if of.module in _NUMPY and of.name == "_reconstruct" and len(args) == 3:
        return NumpyArray() if shown(args[0]) == "numpy.ndarray" and args[1] == (0,) else None
    if of.module in _NUMPY_NUMERIC and of.name == "_frombuffer" and len(args) == 4:
        return _array_of(*args)
    return None


def _encoded(machine: Machine, text: str) -> bytes | Encoded:
    """Return a text as bytes; long ones share its memory the first time, as pictures and arrays do."""
    window = machine.budget.window
    found = window.latest
    if found is not None and found.text is text:
        window.latest = None
        machine.budget.spend(120)
        text.encode("latin1")  # ValueError where it is none
        return found
    machine.budget.spend(60 + len(text))
    return text.encode("latin1")


def _as_tensor(args: tuple[Any, ...]) -> Claim | Odd:
    if not args or not isinstance(args[0], (Claim, Odd)):
        raise ValueError("a parameter is made from something that is not a tensor")
    return args[0]


def _ordered(machine: Machine, args: tuple[Any, ...]) -> Ordered:
    machine.budget.spend(120)
    machine.stack.append(Ordered())
    for pair in args[0] if args else ():
        machine.set_items(list(pair) if isinstance(pair, (list, tuple)) and len(pair) == 2 else [None])
    return machine.stack.pop()


def _odd(machine: Machine, what: str) -> Odd:
    odd = Odd(what)
    machine.out.tensors.append(odd)
    return odd


def _rebuilt(machine: Machine, typed: bool, args: tuple[Any, ...]) -> Claim | Odd:
    """Return the claim of a tensor: (storage, offset, size, stride, requires_grad, hooks, [dtype,] metadata)."""
    storage, offset, size, stride = args[:4]
    metadata = args[6 + typed] if len(args) > 6 + typed else None
    if isinstance(storage, Odd):
        return _odd(machine, storage.what)
    if not isinstance(storage, Storage) or not isinstance(size, (list, tuple)) or not isinstance(stride, (list, tuple)):
        raise ValueError("a tensor is made from something that is not a storage")
    if max(len(size), len(stride)) > MOST_SIDES:
        raise ValueError(f"a tensor has more than {MOST_SIDES} sides")
    if not all(type(v) is int for v in (offset, *size, *stride)):
        raise ValueError("a tensor has sides that are not numbers")
    if isinstance(metadata, dict) and metadata:
        return _odd(machine, "conjugated or negated, but not yet computed")
    dtype, width = STORAGES[storage.kind][0], storage.width
    if typed:
        given = args[6]
        if not isinstance(given, Global) or given.module != "torch" or given.name not in _DTYPE_BYTES:
            return _odd(machine, f"of the unknown dtype {shown(given)}")
        dtype, width = given.name, _DTYPE_BYTES[given.name]
    machine.budget.spend(1300)  # with the tensor that is made of it
    claim = Claim(storage, offset, tuple(size), tuple(stride), width, dtype)
    machine.out.tensors.append(claim)
    return claim


def _number(kind: Any, data: Any) -> Any:
    """Return a NumPy number as one of Python's; what is wider than those is not followed."""
    if isinstance(kind, Opaque):
        return Opaque(Global("numpy", "scalar"))
    if not isinstance(kind, NumpyType) or not kind.order or not isinstance(data, bytes) or len(data) != kind.width:
        raise CheckpointError("holds a NumPy number with more or fewer bytes than its dtype has")
    if kind.code == "b1":
        return data != b"\0"
    if kind.width > 8 and kind.code != "c16":
        return Opaque(Global("numpy", "scalar"))
    return np.frombuffer(data, np.dtype(kind.order + kind.code))[0].item()


def take_array_state(target: NumpyType | NumpyArray, state: Any) -> None:
    """Check the state that a NumPy dtype or array is given.

    A dtype's flags and sizes are what NumPy's own code trusts: a dtype of integers that says it holds objects makes
    addresses of what it reads. So they must be those of the plain dtype.

    Raises:
        CheckpointError: they are not, or the array holds objects, or fewer bytes than its shape needs.
    """
    if isinstance(target, NumpyType):
        sound = isinstance(state, tuple) and len(state) in (8, 9) and not target.order
        sound = sound and type(state[0]) is int and state[0] == len(state) - 5  # version 3, or 4 with metadata
        sound = sound and isinstance(state[1], str) and state[1] in ("<", ">", "=", "|")
        sound = sound and all(part is None for part in (*state[2:5], *state[8:]))
        if not sound or not all(type(part) is int for part in state[5:8]) or state[5:8] != (-1, -1, 0):
            raise CheckpointError(
                f"holds a NumPy dtype {target.code} with a description that no dtype of plain numbers has"
            )
        target.order = state[1]
        return
    if not (isinstance(state, tuple) and len(state) == 5 and isinstance(state[2], (NumpyType, Opaque))):
        raise CheckpointError("holds a NumPy array of objects, which can run code when it is loaded")
    _, shape, kind, columns_first, data = state
    _fill(target, shape, kind, columns_first, data)


def _array_of(data: Any, kind: Any, shape: Any, order: Any) -> NumpyArray:
    """Return the stand-in of an array of pickle protocol 5, which brings its bytes along."""
    if not isinstance(kind, (NumpyType, Opaque)):
        raise CheckpointError("holds a NumPy array of objects, which can run code when it is loaded")
    if order not in ("C", "F"):
        raise CheckpointError("holds a NumPy array with an invalid order of values")
    out = NumpyArray()
    _fill(out, shape, kind, order == "F", data)
    return out


def _fill(target: NumpyArray, shape: Any, kind: NumpyType | Opaque, columns_first: Any, data: Any) -> None:
    """Check what an array claims; let the stand-in have it where its numbers are plain ones."""
    if not isinstance(data, (bytes, Encoded, Skipped)):
        raise CheckpointError("holds a NumPy array of objects, which can run code when it is loaded")
    sides = shape if isinstance(shape, tuple) and len(shape) <= MOST_SIDES else (None,)
    if not all(type(side) is int and 0 <= side < 2**63 for side in sides):
        raise CheckpointError("holds a NumPy array with an invalid shape")
    if isinstance(kind, NumpyType):
        needed = kind.width
        for side in sides:
            needed *= side
        stored = data.length if isinstance(data, Skipped) else len(data)
        if not (data.could_be(needed) if isinstance(data, Skipped) else stored == needed):
            raise CheckpointError(f"holds a NumPy array that needs {needed} bytes and stores {stored}")
    if isinstance(kind, NumpyType) and kind.order and isinstance(columns_first, bool):
        target.shape, target.kind, target.columns_first, target.data = sides, kind, columns_first, data
