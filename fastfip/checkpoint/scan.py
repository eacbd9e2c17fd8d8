"""What a pickle would do, found out by following it on stand-ins: nothing is imported, called or allocated.

torch.load(weights_only=True) already refuses code. But it inflates compressed entries, makes a tensor of a million
values of one that is stored, allocates what an old file asks for before it has looked whether it is there, and does not
say in one line which tensor is wrong. So a file is followed here first.
"""

from __future__ import annotations

import os
import pickletools
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from fastfip.checkpoint.claims import Claim, Global, Odd, Opaque, Storage
from fastfip.errors import CheckpointError

__all__ = ["Scan", "scan"]

# What the restricted unpickler of torch 2.10 to 2.13 understands; other instructions come from other pickle protocols.
_TORCH_READS = frozenset(
    "PROTO STOP GLOBAL NEWOBJ REDUCE BUILD APPEND APPENDS SETITEM SETITEMS MARK TUPLE TUPLE1 TUPLE2 TUPLE3 NONE "
    "NEWFALSE NEWTRUE EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET BININT BININT1 BININT2 BINFLOAT BINUNICODE "
    "SHORT_BINSTRING BINPERSID BINGET LONG_BINGET BINPUT LONG_BINPUT LONG1".split()
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
    "EMPTY_TUPLE": tuple,
}
_STORAGE_BYTES = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1,
    "ComplexDouble": 16, "ComplexFloat": 8, "QUInt8": 1, "QInt8": 1, "QInt32": 4, "QUInt4x2": 1, "QUInt2x4": 1,
    "Untyped": 1,
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
_PLAIN = (str, int, float, bool, bytes, type(None))
_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")


@dataclass(frozen=True)
class _Numpy:
    """A NumPy dtype (`array` False), scalar or array of a plain numeric dtype."""

    dtype: str = ""
    array: bool = False


@dataclass
class Scan:
    """What a pickle holds: its result with stand-ins, the storages it needs, and what speaks against it."""

    root: Any = None
    storages: dict[str, Storage] = field(default_factory=dict)
    tensors: list[Claim | Odd] = field(default_factory=list)
    foreign: dict[str, None] = field(default_factory=dict)  # calls of what no checkpoint needs, in order
    modules: dict[str, None] = field(default_factory=dict)  # classes of pickled nn.Modules
    numpy: dict[str, None] = field(default_factory=dict)  # NumPy names that are needed to read it
    numpy_dtypes: dict[str, None] = field(default_factory=dict)
    unread: str | None = None  # the first instruction that torch's unpickler does not know
    protocol: int = 0

    def refuse(self) -> None:
        """Raise the CheckpointError that the pickle deserves, if any."""
        if self.modules:
            raise CheckpointError(
                f"holds a pickled module ({next(iter(self.modules))}), and loading it would run its code: "
                "in the project it comes from, save torch.save(model.state_dict(), ...) and give that file"
            )
        if self.foreign:
            names = ", ".join(list(self.foreign)[:5])
            raise CheckpointError(
                f"is an unsafe pickle: loading it would call {names}; "
                "where you trust it, load it and save only its state dict"
            )
        if self.unread:
            raise CheckpointError(
                f"uses pickle protocol {self.protocol} ({self.unread}), which weights-only loading does not read: "
                "save it with torch.save(state_dict, path)"
            )


def scan(file: BinaryIO) -> Scan:
    """Follow the pickle that starts at the position of `file`, up to its end; the position is then behind it.

    Raises:
        CheckpointError: it is truncated or damaged. (What else speaks against it is in the result.)
    """
    machine = _Machine()
    try:
        for code, arg, _ in pickletools.genops(_Bounded(file)):  # type: ignore[arg-type]
            machine.step(code.name, arg)
        machine.out.root = machine.stack.pop()
    except CheckpointError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, EOFError) as error:
        raise CheckpointError(f"is truncated or damaged: its pickle cannot be followed ({error})") from None
    return machine.out


class _Bounded:
    """A file that is never asked for more than it has: its read(n) would allocate n bytes first."""

    def __init__(self, file: BinaryIO) -> None:
        here = file.tell()
        self.size = file.seek(0, os.SEEK_END)
        file.seek(here)
        self.file, self.tell, self.readline = file, file.tell, file.readline

    def read(self, count: int) -> bytes:
        return self.file.read(min(count, self.size) if count > 64 else count)


class _Machine:
    """The stack machine of pickle, with stand-ins for all that is not plain data."""

    def __init__(self) -> None:
        self.out = Scan()
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def step(self, op: str, arg: Any) -> None:
        if op not in _TORCH_READS:
            self.out.unread = self.out.unread or op
        stack = self.stack
        if op in _CONSTANTS:
            stack.append(_CONSTANTS[op]())
        elif op == "GLOBAL":
            self._push_global(*arg.split(" ", 1))
        elif op == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            self._push_global(_text(module), _text(name))
        elif op in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            if op == "NEWOBJ_EX":
                stack.pop()  # its keyword arguments
            self._call(stack.pop())
        elif op in ("OBJ", "INST"):
            items = self._pop_mark()
            if op == "INST":
                self._push_global(*arg.split(" ", 1))
            else:
                self.stack.append(items.pop(0))
            self._call(tuple(items))
        elif op == "BUILD":
            self._build(stack.pop())
        elif op in ("BINPERSID", "PERSID"):
            stack.append(self._persistent(stack.pop() if op == "BINPERSID" else arg))
        elif op == "MARK":
            self.marks.append(stack)
            self.stack = []
        elif op in ("TUPLE", "LIST", "FROZENSET"):
            items = self._pop_mark()
            self.stack.append(items if op == "LIST" else tuple(items))
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            n = int(op[-1])
            stack[-n:] = [tuple(stack[len(stack) - n :])]
        elif op in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if op == "APPEND" else self._pop_mark()
            if isinstance(self.stack[-1], list):
                self.stack[-1].extend(items)
        elif op in ("SETITEM", "SETITEMS", "DICT"):
            if op == "SETITEM":
                items = [stack.pop(-2), stack.pop()]
            else:
                items = self._pop_mark()
            if op == "DICT":
                self.stack.append({})
            self._set_items(items)
        elif op in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[arg] = stack[-1]
        elif op == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif op in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[arg])
        elif op == "PROTO":
            self.out.protocol = arg
        elif op == "POP":
            stack.pop()
        elif op == "POP_MARK":
            self._pop_mark()
        elif op == "DUP":
            stack.append(stack[-1])
        elif op not in ("STOP", "FRAME", "READONLY_BUFFER"):
            stack.append(arg)  # numbers, strings and bytes

    def _pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def _push_global(self, module: str, name: str) -> None:
        if (module, name) in NAME_MAPPING:
            module, name = NAME_MAPPING[module, name]
        self.stack.append(Global(IMPORT_MAPPING.get(module, module), name))

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            return
        for key, value in zip(items[::2], items[1::2], strict=True):
            flat = key if isinstance(key, tuple) else (key,)
            # A key is hashed when it is set, and nested tuples that share their parts take exponential time for it.
            if not all(isinstance(part, _PLAIN) for part in flat):
                raise CheckpointError(f"has a dict key that is no plain value ({type(key).__name__})")
            target[key] = value

    def _persistent(self, ident: Any) -> Any:
        if isinstance(ident, tuple) and ident and _text(ident[0]) == "module":
            self.out.modules[_shown(ident[1])] = None
            return ident[1]
        if not isinstance(ident, tuple) or len(ident) not in (5, 6) or _text(ident[0]) != "storage":
            raise ValueError("unknown kind of persistent object")
        _, of, key, location, numel, *rest = ident
        key, location = _text(key), _text(location)
        kind = of.name.removesuffix("Storage") if isinstance(of, Global) else ""
        if kind not in _STORAGE_BYTES or of.module.split(".")[0] != "torch" or type(numel) is not int or numel < 0:
            raise ValueError(f"unknown storage {_shown(of)} of {_shown(numel)} values")
        if location == "meta":
            return Odd("a meta tensor, which has no values")
        if kind.startswith("Q"):
            return Odd("quantised")
        storage = Storage(key, kind, _STORAGE_BYTES[kind], numel)
        known = self.out.storages.setdefault(key, storage)
        if known != storage:
            raise CheckpointError(f"describes its storage {key} twice, with different sizes or dtypes")
        if rest and rest[0] is not None:  # files of torch < 0.4 keep views of a storage as storages of their own
            _, start, length = rest[0]
            if type(start) is not int or type(length) is not int or start < 0 or length < 0 or start + length > numel:
                raise CheckpointError(f"claims values {start} to {start + length} of a storage of {numel} values")
            storage = Storage(key, kind, storage.width, length)
        return storage

    def _odd(self, what: str) -> Odd:
        odd = Odd(what)
        self.out.tensors.append(odd)
        return odd

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, dtype: Any = None) -> Claim | Odd:
        if isinstance(storage, Odd):
            return self._odd(storage.what)
        numbers = (offset, *size, *stride)
        if not isinstance(storage, Storage) or not all(type(v) is int for v in numbers):
            raise ValueError("a tensor is built of something that is no storage")
        width = storage.width
        if dtype is not None:
            if not isinstance(dtype, Global) or dtype.name not in _DTYPE_BYTES:
                return self._odd(f"of the unknown dtype {_shown(dtype)}")
            width = _DTYPE_BYTES[dtype.name]
        elif storage.kind == "Untyped":
            width = 1
        claim = Claim(storage, offset, tuple(size), tuple(stride), width)
        self.out.tensors.append(claim)
        return claim

    def _call(self, args: Any) -> None:
        function = self.stack.pop()
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise ValueError("a call of something that is no function")
        self.stack.append(self._result(function, args))

    def _result(self, of: Global, args: tuple[Any, ...]) -> Any:
        """Return what a call gives; calls that no checkpoint of tensors and plain data needs are noted as foreign."""
        name, plain = str(of), all(isinstance(arg, _PLAIN) for arg in args)
        if of.module == "torch._utils":
            if of.name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
                return self._tensor(*args[:4])
            if of.name == "_rebuild_tensor_v3":
                storage, offset, size, stride, _, _, dtype = args[:7]
                return self._tensor(storage, offset, size, stride, dtype)
            if of.name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
                return args[0]
            if of.name in _ODD_TENSORS:
                return self._odd(_ODD_TENSORS[of.name])
        elif name == "torch._tensor._rebuild_from_type_v2" and isinstance(args[0], Global):
            if _shown(args[1]) in ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter"):
                return self._result(args[0], args[2])
            return self._odd(f"a tensor of the subclass {_shown(args[1])}")
        elif name == "torch.nn.parameter.Parameter" and args and isinstance(args[0], (Claim, Odd)):
            return args[0]
        elif name == "collections.OrderedDict":
            return self._ordered(args)
        elif name == "collections.Counter" and (not args or isinstance(args[0], dict)):
            return dict(*args)
        elif name == "torch.Size" or (name == "builtins.set" and args and isinstance(args[0], list)):
            if all(isinstance(item, _PLAIN) for arg in args for item in arg):
                return list(*args)
        elif name == "torch.serialization._get_layout" and plain:
            return of
        elif name in ("torch.device", "builtins.complex") and plain:
            return name
        elif name == "_codecs.encode" and plain and args[1:] == ("latin1",):
            return args[0].encode("latin1")
        elif name == "builtins.bytearray" and (not args or isinstance(args[0], bytes)):
            return bytes(*args)  # bytearray(n) would allocate whatever the file asks for
        elif name == "copyreg._reconstructor" and args and isinstance(args[0], Global):
            return self._foreign(args[0])
        elif name == "torch.storage._load_from_bytes":  # what pickle.dump, not torch.save, makes of a tensor
            self._foreign(of)
            return Odd("pickled without torch.save")
        elif of.module in _NUMPY or name == "numpy.dtype":
            value = self._numpy(of, args)
            if value is not None:
                self.out.numpy[name] = None
                return value
        return self._foreign(of)

    def _ordered(self, args: tuple[Any, ...]) -> dict[Any, Any]:
        out: dict[Any, Any] = {}
        self.stack.append(out)
        for pair in args[0] if args else ():
            self._set_items(list(pair))
        return self.stack.pop()

    def _numpy(self, of: Global, args: tuple[Any, ...]) -> _Numpy | None:
        """Follow NumPy numbers and arrays of numbers: an accuracy or a list of poisoned indices beside the weights."""
        if of.name == "dtype" and args and isinstance(args[0], str) and re.fullmatch(r"[biufc]\d{1,2}", args[0]):
            self.out.numpy_dtypes[args[0]] = None
            return _Numpy(args[0])
        if of.name == "scalar" and len(args) == 2 and isinstance(args[0], _Numpy) and isinstance(args[1], bytes):
            return _Numpy(args[0].dtype, True)
        if of.name == "_reconstruct" and len(args) == 3 and _shown(args[0]) == "numpy.ndarray" and args[1] == (0,):
            self.out.numpy["numpy.ndarray"] = None
            return _Numpy("", True)
        return None

    def _foreign(self, of: Global) -> Opaque:
        self.out.foreign[str(of)] = None
        if of.module.startswith("torch.nn.modules."):
            self.out.modules[str(of)] = None
        return Opaque(of)

    def _build(self, state: Any) -> None:
        target = self.stack[-1]
        if isinstance(target, Opaque):
            target.state = state
            if isinstance(state, dict) and "_modules" in state and "_parameters" in state:
                self.out.modules.setdefault(str(target.of))
        elif isinstance(target, _Numpy):
            sound = isinstance(state, tuple) and len(state) in (5, 8, 9)
            if sound and target.array:  # version, shape, dtype, order, bytes
                sound = isinstance(state[2], _Numpy) and not state[2].array and isinstance(state[4], bytes)
            elif sound:  # version, order, subdtype, names, fields, ...
                sound = state[2] is None and state[3] is None and state[4] is None
            if not sound:
                raise CheckpointError("holds a NumPy array of objects, which can run code when it is loaded")
        elif not isinstance(target, (dict, Odd)):  # for a tensor it would replace what it was built of
            raise ValueError(f"state for a {type(target).__name__}, which takes none")


def _text(value: Any) -> str:
    """Return an internal name as text; files written by Python 2 hold it as bytes."""
    if not isinstance(value, (str, bytes, int)):
        raise ValueError(f"a {type(value).__name__} where a name belongs")
    return value.decode("ascii") if isinstance(value, bytes) else str(value)


def _shown(value: Any) -> str:
    """Return a name to print; containers by their type, as one that holds itself twice, nested, has no end of text."""
    return str(value) if isinstance(value, (Global, *_PLAIN)) else f"a {type(value).__name__}"
