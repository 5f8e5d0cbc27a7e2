"""Pickles as data: lists, tuples, dicts, strings, bytes, numbers, None and plain NumPy arrays; no code in them is ever run.

A pickle is a program. The standard library's interpreter of such programs (the one in Python) is left the operations that
plain data need: nothing is imported, nothing of the file is called, and no memory is reserved because the file asks for it.
"""

import io
import pickle
import pickletools
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.errors import InputError

DEEPEST = 100
# An empty array may have a long side, and its list of lists would then fill the memory.
LARGEST_EMPTY = 1 << 20
# Bytes that calls may make beside those that are in the file, where each is read once.
SPARE_BYTES = 1 << 24
PLAIN = (str, int, float, bool, bytes, type(None), np.ndarray, np.generic)
# Boolean, integer, float and complex numbers by bytes, text by length: neither objects nor records nor dates.
PLAIN_DTYPE = re.compile(r"[<>=|]?(b1|[iu][1248]|f(2|4|8|16)|c(8|16|32)|[SU][1-9]\d{0,8})")
# Operations that are carried out as they are; `PlainUnpickler` has those that need care, and all others are refused.
HARMLESS = re.compile(
    r"PROTO|FRAME|STOP|MARK|NONE|NEWTRUE|NEWFALSE|(BIN)?INT[12]?|LONG[14]?|(BIN)?FLOAT|(SHORT_|BIN)*(STRING|UNICODE|BYTES)8?|"
    r"EMPTY_(TUPLE|LIST|DICT)|TUPLE[123]?|LIST|APPENDS?|(STACK_)?GLOBAL|((LONG_)?BIN)?[PG][UE]T|MEMOIZE"
)


class Refused(Exception):
    """The pickle asks for more than plain values."""


@dataclass
class Dtype:
    """The type of an array: its code, and its byte order once that is known."""

    code: str
    order: str = "="


class Blank:
    """An array whose content comes later."""


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
        value = PlainUnpickler(source if isinstance(source, bytes) else Path(source).read_bytes()).load()
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


BASE: dict[int, Callable[[Any], None]] = pickle._Unpickler.dispatch


class Operations(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> Callable[[Any], None]:
        name = next(op.name for op in pickletools.opcodes if op.code == chr(code))
        raise Refused(f"the operation {name.lower().replace('_', ' ')}")


class PlainUnpickler(pickle._Unpickler):
    """The interpreter: in its stack and its memo are plain values, and what stands for names, types and arrays to come."""

    stack: list[Any]
    memo: dict[int, Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="latin1")
        self.bytes_left = 2 * len(content) + SPARE_BYTES

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        """Return our own function for a known name; nothing is imported."""
        full = full_name(module, name)
        if full not in CALLS:
            raise Refused(f"{module}.{name}"[:100])
        return CALLS[full]

    def _call(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]
        if not isinstance(function, FunctionType) or not isinstance(arguments, tuple):
            raise Refused("a call of what is no function")
        self.stack[-1] = self._counted(function(*arguments))

    def _counted(self, made: Any) -> Any:
        """Return what a call made; refuse copies of the same content again and again, which would fill the memory."""
        if isinstance(made, str | bytes | list | tuple | dict | np.ndarray | np.generic):
            self.bytes_left -= made.nbytes if isinstance(made, np.ndarray | np.generic) else len(made)
        if self.bytes_left < 0:
            raise MemoryError("it makes more of its content than it holds")
        return made

    def _build(self) -> None:
        """Set the byte order of a type, or the content of a blank array."""
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, Dtype):
            _, made.order, subarray, names, fields, *_ = state
            if made.order not in ("<", ">", "=", "|") or not subarray is names is fields is None:
                raise Refused("a NumPy array of records")
        elif isinstance(made, Blank):
            _, shape, dtype, by_columns, data = state
            self.stack[-1] = self._counted(_array(data, dtype, shape, "F" if by_columns else "C"))
            # The blank is in the memo, too, shortly before the parts of its state.
            places = [place for place in islice(reversed(self.memo), 64) if self.memo[place] is made]
            self.memo |= dict.fromkeys(places, self.stack[-1])
        else:
            raise Refused("attributes of an object")

    def _fill(self, items: list[Any]) -> None:
        """Put keys and values into a dict; keys are plain or flat tuples, as the hash of a deep tuple ends the process."""
        if type(self.stack[-1]) is not dict:
            raise Refused("items of what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not all(isinstance(part, PLAIN) for part in (key if isinstance(key, tuple) else (key,))):
                raise Refused(f"a dict with a key of type {type(key).__name__.lstrip('_').lower()}")
            self.stack[-1][key] = value

    def _new_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._fill(items)

    dispatch = Operations({ord(op.code): BASE[ord(op.code)] for op in pickletools.opcodes if HARMLESS.fullmatch(op.name)})
    dispatch |= {
        pickle.REDUCE[0]: _call,
        pickle.BUILD[0]: _build,
        pickle.DICT[0]: _new_dict,
        pickle.SETITEMS[0]: lambda self: self._fill(self.pop_mark()),
        pickle.SETITEM[0]: lambda self: self._fill([self.stack.pop() for _ in range(2)][::-1]),
        # As bytes: the interpreter would reserve the memory first.
        pickle.BYTEARRAY8[0]: BASE[pickle.BINBYTES8[0]],
    }


def _dtype(code: Any, *_: Any) -> Dtype:
    if not isinstance(code, str) or PLAIN_DTYPE.fullmatch(code) is None:
        raise Refused(f"a NumPy array of type {code!r:.40}")
    return Dtype(code)


def _array(data: Any, dtype: Dtype, shape: Any, order: Any, axes: Any = None) -> NDArray[Any]:
    if isinstance(data, list):
        raise Refused("a NumPy array of objects")
    if not all(type(side) is int and side >= 0 for side in shape):
        raise Refused("a NumPy array of no shape")
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


def _ndarray(*_: Any) -> Any:
    raise Refused("a call of numpy.ndarray")


# What stands for these names: an array is made of its content, or blank, to be built later.
CALLS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": _dtype,
    "numpy.ndarray": _ndarray,
    "numpy.core.multiarray._reconstruct": lambda *_: Blank(),
    "numpy.core.multiarray.scalar": lambda dtype, data: _array(data, dtype, (), "C")[()],
    "numpy.core.numeric._frombuffer": _array,
    "_codecs.encode": _encoded,
    "builtins.bytes": lambda: b"",
}


def full_name(module: str, name: str) -> str:
    """Return the present name of what a pickle of any Python and NumPy names."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}".replace("numpy._core.", "numpy.core.")


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
