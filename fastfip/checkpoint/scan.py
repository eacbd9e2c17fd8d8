"""What a pickle would do, found out by following it on stand-ins: nothing is imported, called or allocated.

A pickle is a program. Here it is followed, never run: names stay names, tensors are what the file claims of them, calls
give stand-ins. What it may take is bounded by `opcodes.py`, what calls give is said in `calls.py`.
"""

from __future__ import annotations

import struct
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from fastfip.checkpoint.calls import PLAIN, STORAGES, note, result, shown, take_array_state
from fastfip.checkpoint.claims import Claim, Global, NumpyArray, NumpyType, Odd, Opaque, Ordered, Storage
from fastfip.checkpoint.opcodes import Budget, Encoded, Skipped, Window, instructions
from fastfip.errors import CheckpointError, printable

__all__ = ["Machine", "Scan", "scan"]

# The instructions of protocol 2, in which torch.save writes unless it is told otherwise, and what protocols 3 to 5 have
# in their place. Those of protocols 0 and 1, and buffers outside of the file, are in no file of torch.save.
_READ = frozenset(
    "PROTO STOP GLOBAL NEWOBJ REDUCE BUILD APPEND APPENDS SETITEM SETITEMS MARK TUPLE TUPLE1 TUPLE2 TUPLE3 NONE "
    "NEWFALSE NEWTRUE EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET BININT BININT1 BININT2 BINFLOAT BINUNICODE "
    "SHORT_BINSTRING BINPERSID BINGET LONG_BINGET BINPUT LONG_BINPUT LONG1 "
    "SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8 SHORT_BINUNICODE BINUNICODE8 FRAME MEMOIZE STACK_GLOBAL NEWOBJ_EX "
    "FROZENSET ADDITEMS".split()
)
#: What puts its argument, a number, text or bytes, on the stack.
_VALUES = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 "
    "BYTEARRAY8 NEXT_BUFFER UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 FLOAT BINFLOAT EXT1 EXT2 EXT4".split()
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}
_SETS = {"EMPTY_SET": Global("builtins", "set"), "FROZENSET": Global("builtins", "frozenset")}
#: What a stand-in takes, by any Python that is served.
_STAND_IN = 200
#: No name of a class, module or storage is longer.
_LONGEST_NAME = 500


@dataclass
class Scan:
    """What a pickle holds: its result with stand-ins, the storages it needs, and what speaks against it."""

    budget: Budget  # what it may still take
    root: Any = None
    storages: dict[str, Storage] = field(default_factory=dict)
    tensors: list[Claim | Odd] = field(default_factory=list)
    foreign: dict[str, None] = field(default_factory=dict)  # calls of what no checkpoint needs, in order
    modules: dict[str, None] = field(default_factory=dict)  # classes of pickled nn.Modules
    unread: str | None = None  # the first instruction that is not read
    protocol: int = 0
    instructions: int = 0

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
                "if you trust it, load it and save only its state dict"
            )
        if self.unread:
            raise CheckpointError(
                f"uses pickle protocol {self.protocol} in a way that torch.save never does ({self.unread}): "
                "save it with torch.save(state_dict, path)"
            )


def scan(file: BinaryIO, size: int | None = None) -> Scan:
    """Follow the pickle that starts at the position of `file`, up to its end; the position is then behind it.

    Args:
        file: where it stands.
        size: bytes that it has; None: up to the end of the file.

    Raises:
        CheckpointError: it is truncated or damaged, or takes more than it may. (What else speaks against it is in the
            result.)
    """
    window = Window(file, size)
    machine = Machine(Budget(window))
    try:
        for name, arg in instructions(window, machine.budget):
            machine.step(name, arg)
        machine.out.root = machine.stack.pop()
    except CheckpointError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, ArithmeticError, EOFError) as error:
        raise CheckpointError(f"is truncated or damaged: its pickle cannot be followed ({error})") from None
    except struct.error:
        raise CheckpointError("is truncated or damaged: its pickle ends in the middle of an instruction") from None
    machine.out.instructions = machine.budget.steps
    return machine.out


class Machine:
    """The stack machine of pickle, with stand-ins for all that is not plain data.

    Attributes:
        out: what is found.
        budget: what it may still take.
        stack: values since the last mark.
    """

    def __init__(self, budget: Budget) -> None:
        self.out, self.budget = Scan(budget), budget
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: list[Any] = []
        self.scattered: dict[int, Any] = {}  # what is not noted in turn

    def step(self, op: str, arg: Any) -> None:
        """Follow one instruction."""
        if op not in _READ:
            self.out.unread = self.out.unread or op
        stack = self.stack
        if op in _VALUES:  # what is frequent comes first
            self.budget.spend(sys.getsizeof(arg))
            stack.append(arg)
        elif op in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._note(len(self.memo) + len(self.scattered) if op == "MEMOIZE" else arg, stack[-1])
        elif op in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[arg] if 0 <= arg < len(self.memo) else self.scattered[arg])
        elif op == "MARK":
            self.budget.spend(80)
            self.marks.append(stack)
            self.stack = []
        elif op in ("TUPLE", "LIST"):
            items = self._pop_mark()
            self.budget.spend(60 + 8 * len(items))
            self.stack.append(items if op == "LIST" else tuple(items))
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            n = int(op[-1])
            self.budget.spend(60)
            stack[-n:] = [tuple(stack[len(stack) - n :])]
        elif op in _CONSTANTS:
            self.budget.spend(60)
            stack.append(_CONSTANTS[op]())
        elif op in _SETS:  # what is in one is not looked at
            if op == "FROZENSET":
                self._pop_mark()
            self.budget.spend(_STAND_IN)
            self.stack.append(Opaque(_SETS[op]))
        elif op == "GLOBAL":
            self._push_global(*map(_text, arg.split(" ", 1)))
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
                self._push_global(*map(_text, arg.split(" ", 1)))
            else:
                self.stack.append(items.pop(0))
            self._call(tuple(items))
        elif op == "BUILD":
            self._build(stack.pop())
        elif op in ("BINPERSID", "PERSID"):
            stack.append(self._persistent(stack.pop() if op == "BINPERSID" else arg))
        elif op in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if op == "APPEND" else self._pop_mark()
            self.budget.spend(40 + 10 * len(items))
            if isinstance(self.stack[-1], list):
                self.stack[-1].extend(items)
        elif op in ("SETITEM", "SETITEMS", "DICT"):
            if op == "SETITEM":
                items = [stack.pop(-2), stack.pop()]
            else:
                items = self._pop_mark()
            if op == "DICT":
                self.budget.spend(60)
                self.stack.append({})
            self.set_items(items)
        elif op == "PROTO":
            self.out.protocol = arg
        elif op == "POP":
            stack.pop()
        elif op == "POP_MARK":
            self._pop_mark()
        elif op == "DUP":
            stack.append(stack[-1])
        elif op == "FRAME":
            if arg > self.budget.window.left:
                raise ValueError(f"{arg} bytes are expected, and {self.budget.window.left} are left")
        elif op not in ("STOP", "READONLY_BUFFER"):  # one that a later Python has
            self.budget.spend(sys.getsizeof(arg))
            stack.append(arg)

    def _pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        self.budget.spend(-80)
        return items

    def _note(self, place: int, value: Any) -> None:
        if place == len(self.memo) and place not in self.scattered:  # as every pickler does
            self.budget.spend(12)
            self.memo.append(value)
        elif 0 <= place < len(self.memo):
            self.memo[place] = value
        else:
            self.budget.spend(90)
            self.scattered[place] = value

    def _push_global(self, module: str, name: str) -> None:
        self.budget.spend(300 + sys.getsizeof(module) + sys.getsizeof(name))
        if (module, name) in NAME_MAPPING:
            module, name = NAME_MAPPING[module, name]
        self.stack.append(Global(IMPORT_MAPPING.get(module, module), name))

    def set_items(self, items: list[Any]) -> None:
        """Put keys and values, in turns, into the dict on top of the stack."""
        target = self.stack[-1]
        if not isinstance(target, dict):
            return
        small = max(0, 5 - len(target))  # so many more have room in what a dict takes at first
        self.budget.spend(110 * max(0, len(items) // 2 - small) + (0 if target else 140))
        for key, value in zip(items[::2], items[1::2], strict=True):
            key = self._key(key)
            if key in target:
                raise CheckpointError(f"sets {printable(shown(key), 80)} twice in one dict, which pickle never writes")
            target[key] = value

    def _key(self, key: Any) -> Any:
        """Return a key as it is if it is plain, else a stand-in for it.

        A key is hashed when it is set, and nested tuples that share their parts take exponential time for it.
        """
        if isinstance(key, (list, dict)):
            raise ValueError(f"a {type(key).__name__} as a key")
        if isinstance(key, Encoded):
            key = bytes(key)
        for part in key if isinstance(key, tuple) else (key,):
            if not isinstance(part, PLAIN):
                self.budget.spend(2 * _STAND_IN)
                return Opaque(Global("builtins", "long text" if isinstance(key, Skipped) else type(key).__name__))
            if not isinstance(part, str):  # a text keeps its hash, and was counted when it was read
                self.budget.spend(sys.getsizeof(part) if not isinstance(part, (float, complex)) else 30)
        return key

    def _persistent(self, ident: Any) -> Any:
        if isinstance(ident, tuple) and ident and _text(ident[0]) == "module":
            note(self, self.out.modules, shown(ident[1]))
            return ident[1]
        if not isinstance(ident, tuple) or len(ident) not in (5, 6) or _text(ident[0]) != "storage":
            raise ValueError("unknown kind of persistent object")
        _, of, key, location, numel, *rest = ident
        key, location = _text(key), _text(location)
        kind = of.name.removesuffix("Storage") if isinstance(of, Global) else ""
        if kind not in STORAGES or of.module.split(".")[0] != "torch" or type(numel) is not int or numel < 0:
            raise ValueError(f"unknown storage {shown(of)} of {shown(numel)} values")
        if numel >= 2**63:
            raise ValueError("a storage of more values than there are addresses")
        self.budget.spend(350 + len(key))
        if location == "meta":
            return Odd("a meta tensor, which has no values")
        if kind.startswith("Q"):
            return Odd("quantised")
        storage = Storage(key, kind, STORAGES[kind][1], numel)
        if key not in self.out.storages:
            self.budget.store(storage.numel * storage.width)
        known = self.out.storages.setdefault(key, storage)
        if known != storage:
            raise CheckpointError(f"describes its storage {key} twice, with different sizes or dtypes")
        if rest and rest[0] is not None:  # files of torch < 0.4 keep views of a storage as storages of their own
            _, start, length = rest[0]
            if type(start) is not int or type(length) is not int or start < 0 or length < 0 or start + length > numel:
                raise CheckpointError(f"claims values {start} to {start + length} of a storage of {numel} values")
            storage = Storage(key, kind, storage.width, length, start)
        return storage

    def _call(self, args: Any) -> None:
        function = self.stack.pop()
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise ValueError("a call of something that is no function")
        self.budget.spend(8 * len(args))
        made = result(self, function, args)
        if isinstance(made, (Opaque, NumpyType, NumpyArray, Odd)):
            self.budget.spend(_STAND_IN)
        self.stack.append(made)

    def _build(self, state: Any) -> None:
        target = self.stack[-1]
        if isinstance(target, Opaque):
            target.state = state
            if isinstance(state, dict) and "_modules" in state and "_parameters" in state:
                note(self, self.out.modules, str(target.of))
        elif isinstance(target, (NumpyType, NumpyArray)):
            take_array_state(target, state)
        elif isinstance(target, Ordered):
            self.budget.spend(_STAND_IN)  # it had no attributes before
            target._metadata = state.get("_metadata") if isinstance(state, dict) else None
        elif not isinstance(target, (dict, Odd)):  # for a tensor it would replace what it was built of
            raise ValueError(f"state for a {type(target).__name__}, which takes none")


def _text(value: Any) -> str:
    """Return an internal name as text; files written by Python 2 hold it as bytes."""
    if not isinstance(value, (str, bytes, int)) or (not isinstance(value, int) and len(value) > _LONGEST_NAME):
        raise ValueError(f"a {type(value).__name__} where a name belongs")
    return value.decode("ascii") if isinstance(value, bytes) else str(value)
