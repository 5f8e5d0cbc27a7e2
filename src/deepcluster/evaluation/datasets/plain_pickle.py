"""Pickles as data: lists, tuples, dicts, strings, bytes, numbers, None and plain NumPy arrays; no code in them is ever run.

A pickle is a program. Its operations are scanned with the standard library's `pickletools`, and the few that plain data
need are carried out here: nothing is imported, nothing is called, and no memory is reserved because the file asks for it.
"""

import pickletools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.errors import InputError

DEEPEST = 100
# An empty array may have a long side, and its list of lists would then fill the memory.
LARGEST_EMPTY = 1 << 20
PLAIN = (str, int, float, bool, bytes, type(None), np.ndarray, np.generic)
# Boolean, integer, float and complex numbers by bytes, text by length: neither objects nor records nor dates.
PLAIN_DTYPE = re.compile(r"[<>=|]?(b1|[iu][1248]|f(2|4|8|16)|c(8|16|32)|[SU][1-9]\d{0,8})")
# Operations that push a value of their own; those that push their argument, as `pickletools` decodes it; and those that take
# a number of values from the stack (None: those after the last mark).
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
VALUE = re.compile(r"(BIN)?INT[12]?|LONG[14]?|(BIN)?FLOAT|(SHORT_|BIN)*(STRING|UNICODE|BYTES)8?|BYTEARRAY8")
TAKES: dict[str, int | None] = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2, "BUILD": 1}
TAKES |= {"EMPTY_LIST": 0, "EMPTY_DICT": 0, "REDUCE": 2, "STACK_GLOBAL": 2}
TAKES |= dict.fromkeys(("TUPLE", "LIST", "DICT", "APPENDS", "SETITEMS"))


class Refused(Exception):
    """The pickle asks for more than plain values."""


@dataclass(frozen=True)
class _Name:
    """A name of a module, such as `numpy.dtype`; nothing is imported for it."""

    name: str


@dataclass
class _Dtype:
    """The type of an array: its code, and its byte order once that is known."""

    code: str
    order: str = "="


@dataclass
class _Blank:
    """An array whose content comes later, and the places of the memo that stand for it."""

    places: list[int] = field(default_factory=list)


def read_plain_pickle(source: str | Path | bytes) -> Any:
    """Return the value of a pickle file (or of its bytes), of any protocol, of Python 2 or 3, without running code in it.

    Returns:
        lists, tuples, dicts, str, bytes, int, float, bool, None, and NumPy arrays and numbers of plain types. Strings of
        Python 2 are read as Latin-1.

    Raises:
        InputError: it is missing, truncated or damaged, or asks for anything else (which is named).
    """
    name = "the pickle" if isinstance(source, bytes) else str(source)
    try:
        value = _Reader().read(source if isinstance(source, bytes) else Path(source).read_bytes())
        _check_plain(value, {})
        return value
    except OSError as fault:
        raise InputError(f"{name} can't be read: {(fault.strerror or str(fault)).lower()}") from None
    except Refused as fault:
        raise InputError(
            f"{name} asks for {fault}, which is more than plain values and arrays; it is refused, and nothing in it was run"
        ) from None
    # A damaged pickle raises whatever its operations meet: wrong types, an empty stack, unknown places of the memo.
    except Exception as fault:
        reason = f"{type(fault).__name__}: {fault}"[:100]
        raise InputError(f"{name} can't be read: truncated, damaged or not a pickle ({reason})") from None


class _Reader:
    """The stack and the memo of a pickle, and what its operations do with them."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def read(self, content: bytes) -> Any:
        """Carry out all operations, and return the value at the end."""
        operations: Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]] = pickletools.genops(content)
        for operation, argument, _ in operations:
            name: str = operation.name
            if name in CONSTANTS:
                self.stack.append(CONSTANTS[name])
            elif VALUE.fullmatch(name):
                self.stack.append(bytes(argument) if isinstance(argument, bytearray) else argument)
            elif name == "MARK":
                self.marks.append(len(self.stack))
            elif name in TAKES:
                self.act(name, self.take(TAKES[name]))
            elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                place = len(self.memo) if argument is None else argument
                self.memo[place] = top = self.stack[-1]
                if isinstance(top, _Blank):
                    top.places.append(place)
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[argument])
            elif name == "GLOBAL":
                self.stack.append(_known(*argument.split(" ", 1)))
            elif name not in ("PROTO", "FRAME", "STOP"):
                raise Refused(f"the operation {name.lower().replace('_', ' ')}")
        return self.stack.pop()

    def take(self, count: int | None) -> list[Any]:
        """Take the last values from the stack; None: those after the last mark."""
        first = self.marks.pop() if count is None else len(self.stack) - count
        if first < 0:
            raise IndexError("empty stack")
        items = self.stack[first:]
        del self.stack[first:]
        return items

    def act(self, name: str, items: list[Any]) -> None:
        """Carry out an operation on values that were taken from the stack."""
        if name.startswith("TUPLE"):
            self.stack.append(tuple(items))
        elif name in ("LIST", "EMPTY_LIST"):
            self.stack.append(items)
        elif name in ("DICT", "EMPTY_DICT"):
            self.stack.append(_filled({}, items))
        elif name.startswith("SETITEM"):
            _filled(self.stack[-1], items)
        elif name == "STACK_GLOBAL":
            self.stack.append(_known(*items))
        elif name == "REDUCE":
            self.stack.append(_called(*items))
        elif name == "BUILD":
            self.build(*items)
        elif type(self.stack[-1]) is list:
            self.stack[-1].extend(items)
        else:
            raise Refused("items of what is no list")

    def build(self, state: Any) -> None:
        """Set the byte order of a type, or the content of a blank array."""
        made = self.stack[-1]
        if isinstance(made, _Dtype):
            _, made.order, subarray, names, fields, *_ = state
            if made.order not in ("<", ">", "=", "|") or not subarray is names is fields is None:
                raise Refused("a NumPy array of records")
        elif isinstance(made, _Blank):
            _, shape, dtype, by_columns, data = state
            self.stack[-1] = _array(data, dtype, shape, "F" if by_columns else "C")
            self.memo |= dict.fromkeys(made.places, self.stack[-1])
        else:
            raise Refused("attributes of an object")


def _filled(found: Any, items: list[Any]) -> Any:
    """Put keys and values into a dict; keys are plain or flat tuples, as the hash of a deep tuple ends the process."""
    if type(found) is not dict:
        raise Refused("items of what is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not all(isinstance(part, PLAIN) for part in (key if isinstance(key, tuple) else (key,))):
            raise Refused(f"a dict with a key of type {type(key).__name__.lstrip('_').lower()}")
        found[key] = value
    return found


def _known(module: str, name: str) -> _Name:
    full = f"{module}.{name}".replace("numpy._core.", "numpy.core.").replace("__builtin__.", "builtins.")
    if full not in CALLS and full != "numpy.ndarray":
        raise Refused(f"{module}.{name}"[:100])
    return _Name(full)


def _called(function: Any, arguments: Any) -> Any:
    """Return what a call of a known name would give."""
    if not isinstance(function, _Name) or function.name not in CALLS or not isinstance(arguments, tuple):
        raise Refused(f"a call of {getattr(function, 'name', 'what is no function')}")
    return CALLS[function.name](*arguments)


def _dtype(code: Any, *_: Any) -> _Dtype:
    if not isinstance(code, str) or PLAIN_DTYPE.fullmatch(code) is None:
        raise Refused(f"a NumPy array of type {code!r:.40}")
    return _Dtype(code)


def _array(data: Any, dtype: _Dtype, shape: Any, order: Any, axes: Any = None) -> NDArray[Any]:
    if isinstance(data, list):
        raise Refused("a NumPy array of objects")
    if not len(data) and prod(side or 1 for side in shape) > LARGEST_EMPTY:
        raise Refused(f"an empty NumPy array of shape {shape!r:.40}")
    data = data.encode("latin1") if isinstance(data, str) else data  # Python 2 wrote bytes as text.
    kind = np.dtype(dtype.code).newbyteorder(dtype.order)  # type: ignore[arg-type]
    flat: NDArray[Any] = np.frombuffer(data, kind) if len(data) else np.empty(0, kind)
    if order == "K":
        return flat.reshape(shape).transpose(axes).copy()
    return flat.reshape(shape, order="F" if order == "F" else "C").copy(order="K")


def _encoded(text: Any, encoding: Any) -> bytes:
    """Return bytes, as protocols 0 to 2 of Python 3 write them."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Refused(f"_codecs.encode with {encoding!r:.40}")
    return text.encode("latin1")


# What a call of these names gives; an array by its content, or blank, to be built later.
CALLS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": _dtype,
    "numpy.core.multiarray._reconstruct": lambda *_: _Blank(),
    "numpy.core.multiarray.scalar": lambda dtype, data: _array(data, dtype, (), "C")[()],
    "numpy.core.numeric._frombuffer": _array,
    "_codecs.encode": _encoded,
    "builtins.bytes": lambda: b"",
}


def _check_plain(value: Any, heights: dict[int, int], depth: int = 0) -> int:
    """Return how deep a value is nested; refuse what is not plain, nested too deep, or holds itself."""
    if isinstance(value, PLAIN):
        return 0
    if not isinstance(value, list | tuple | dict):
        raise Refused(f"a value of type {type(value).__name__.lstrip('_').lower()}")
    # By identity: the same list may be in many places, and is looked into once.
    if id(value) not in heights:
        inner = value.values() if isinstance(value, dict) else value
        if depth <= DEEPEST:
            heights[id(value)] = 1 + max((_check_plain(one, heights, depth + 1) for one in inner), default=0)
    if heights.get(id(value), DEEPEST) >= DEEPEST:
        raise Refused(f"values nested over {DEEPEST} deep, or a list that holds itself")
    return heights[id(value)]
