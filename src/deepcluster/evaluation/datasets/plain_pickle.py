"""Pickles as data: lists, tuples, dicts, strings, bytes, numbers, None and plain NumPy arrays, and no code of theirs is run.

A pickle is a program; here it can do nothing but put such values together. The standard library's reader in Python is used,
not the one in C: that one gives memory for 2 billion objects where a file of 8 bytes asks for it, and ends the process at
the hash of a tuple nested a million deep.
"""

import io
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.errors import InputError

DEEPEST = 100
ATOMS = (str, int, float, bool, bytes, type(None))
# Boolean, integer, float and complex numbers by bytes, text by length: neither objects nor records nor dates.
PLAIN_DTYPE = re.compile(r"[<>=|]?(b1|[iu][1248]|f(2|4|8|16)|c(8|16|32)|[SU][1-9]\d{0,8})")
# Operations that have no place in plain data: objects of classes, registered extensions, persistent names, sets, buffers.
REFUSED = {
    **dict.fromkeys((pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX), "an object of a class"),
    **dict.fromkeys((pickle.EXT1, pickle.EXT2, pickle.EXT4), "a registered extension"),
    **dict.fromkeys((pickle.PERSID, pickle.BINPERSID), "an object outside the file"),
    **dict.fromkeys((pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET), "a set"),
    **dict.fromkeys((pickle.NEXT_BUFFER, pickle.READONLY_BUFFER), "a buffer outside the file"),
}


class Refused(Exception):
    """The pickle asks for more than plain values."""


def read_plain_pickle(source: str | Path | bytes) -> Any:
    """The value of a pickle file (or of its bytes), of any protocol, of Python 2 or 3; no code in it is ever run.

    Returns:
        lists, tuples, dicts, str, bytes, int, float, bool, None, and NumPy arrays and numbers of plain types. Strings of
        Python 2 are read as Latin-1.

    Raises:
        InputError: it is missing, truncated or damaged, or asks for anything else (which is named).
    """
    name = "the pickle" if isinstance(source, bytes) else str(source)
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        return _Plain().of(_Reader(content).load())
    except OSError as fault:
        raise InputError(f"{name} can't be read: {(fault.strerror or str(fault)).lower()}") from None
    except Refused as fault:
        raise InputError(
            f"{name} asks for {fault}, which is more than plain values and arrays; it is refused, and nothing in it was run"
        ) from None
    # A damaged pickle raises whatever its operations meet: wrong types, an empty stack, unknown names in the memo.
    except Exception as fault:
        reason = "it ends too early" if isinstance(fault, EOFError) else f"{type(fault).__name__}: {fault}"[:100]
        raise InputError(f"{name} can't be read: truncated, damaged or not a pickle ({reason})") from None


class _Maker:
    """What stands for a known name of a module: makes one of our values of arguments, and has nothing that can be set."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)


class _Dtype:
    """A NumPy type, as far as it is plain."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or PLAIN_DTYPE.fullmatch(code) is None:
            raise Refused(f"a NumPy array of type {code!r:.40}")
        self.code = code
        self.order: Any = "="

    def set_state(self, state: Any) -> None:
        _, order, subarray, names, fields, *_ = state
        if order not in ("<", ">", "=", "|") or not subarray is names is fields is None:
            raise Refused("a NumPy array of records")
        self.order = order

    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.code).newbyteorder(self.order)


class _Array:
    """A NumPy array, or a number (`scalar`), that is being put together."""

    __slots__ = ("axes", "data", "dtype", "order", "scalar", "shape")

    def __init__(
        self, dtype: Any, data: Any, shape: Any, *, order: str = "C", axes: Any = None, scalar: bool = False
    ) -> None:
        self.dtype, self.data, self.shape = dtype, data, shape
        self.order, self.axes, self.scalar = order, axes, scalar

    def set_state(self, state: Any) -> None:
        _, self.shape, self.dtype, by_columns, self.data = state
        self.order = "F" if by_columns else "C"

    def value(self) -> Any:
        if isinstance(self.data, list):
            raise Refused("a NumPy array of objects")
        # Python 2 wrote bytes as text.
        data = self.data.encode("latin1") if isinstance(self.data, str) else self.data
        dtype = self.dtype.dtype()
        flat: NDArray[Any] = np.frombuffer(data, dtype) if len(data) else np.empty(0, dtype)
        if self.scalar:
            return flat.reshape(())[()]
        if self.order == "K":
            return flat.reshape(self.shape).transpose(self.axes).copy()
        return flat.reshape(self.shape, order="F" if self.order == "F" else "C").copy(order="K")


def _reconstruct(*_: Any) -> _Array:
    return _Array(None, None, ())


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> _Array:
    return _Array(dtype, data, shape, order=order, axes=axes)


def _scalar(dtype: Any, data: Any) -> _Array:
    return _Array(dtype, data, (), scalar=True)


def _encoded(text: Any, encoding: Any) -> bytes:
    """Bytes, as protocols 0 to 2 of Python 3 write them."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Refused(f"_codecs.encode with {encoding!r:.40}")
    return text.encode("latin1")


def _empty_bytes(*arguments: Any) -> bytes:
    if arguments:
        raise Refused("bytes with arguments")
    return b""


def _nothing(*_: Any) -> Any:
    raise Refused("an object of numpy.ndarray, made directly")


MAKERS: Mapping[tuple[str, str], Callable[..., Any]] = {
    **{
        (f"numpy.{core}.{module}", name): make
        for core in ("core", "_core")
        for module, name, make in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _nothing,
    ("_codecs", "encode"): _encoded,
    ("__builtin__", "bytes"): _empty_bytes,
    ("builtins", "bytes"): _empty_bytes,
}


class _Reader(pickle._Unpickler):
    """Python's own reader, in which a name gives one of `MAKERS` or ends the reading, and nothing else can be called."""

    # By operation, as in the class above.
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in MAKERS:
            raise Refused(f"{module}.{name}"[:100])
        return _Maker(MAKERS[module, name])

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        if not isinstance(self.stack[-1], _Maker) or not isinstance(arguments, tuple):
            raise Refused("a call of what is no function")
        self.stack[-1] = self.stack[-1](*arguments)

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Dtype | _Array):
            raise Refused("attributes of an object")
        self.stack[-1].set_state(state)

    def load_bytearray8(self) -> None:
        self.stack.append(self.read(int.from_bytes(self.read(8), "little")))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _into(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        _into(self.stack[-1], items)

    def load_dict(self) -> None:
        items = self.pop_mark()
        found: dict[Any, Any] = {}
        _into(found, items)
        self.stack.append(found)


def _refuse(what: str) -> Callable[[Any], None]:
    def refused(_: Any) -> None:
        raise Refused(what)

    return refused


for _name in ("reduce", "build", "bytearray8", "setitem", "setitems", "dict"):
    _Reader.dispatch[getattr(pickle, _name.upper())[0]] = getattr(_Reader, f"load_{_name}")
for _code, _what in REFUSED.items():
    _Reader.dispatch[_code[0]] = _refuse(_what)


def _into(found: Any, items: list[Any]) -> None:
    """Put keys and values into a dict; keys are atoms or flat tuples of them, whose hash can't run deep."""
    if type(found) is not dict:
        raise Refused("items of what is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        plain_key = key.value() if isinstance(key, _Array) and key.scalar else key
        parts = plain_key if isinstance(plain_key, tuple) else (plain_key,)
        if not all(isinstance(part, (*ATOMS, np.generic)) for part in parts):
            raise Refused(f"a dict with a key of type {type(key).__name__.lstrip('_').lower()}")
        found[plain_key] = value


class _Plain:
    """Puts arrays where they are being made, and refuses what is nested too deep or holds itself."""

    def __init__(self) -> None:
        # By identity, since the same list may be in many places; None while it is being looked at.
        self._seen: dict[int, Any] = {}
        # What is in `_seen` must live on, so that no other gets its identity.
        self._kept: list[Any] = []

    def of(self, value: Any, depth: int = 0) -> Any:
        """The plain value."""
        if isinstance(value, ATOMS):
            return value
        if not isinstance(value, list | tuple | dict | _Array):
            raise Refused(f"a value of type {type(value).__name__.lstrip('_').lower()}")
        if id(value) in self._seen:
            if self._seen[id(value)] is None:
                raise Refused("a list or dict that holds itself")
            return self._seen[id(value)]
        if depth > DEEPEST:
            raise Refused(f"values nested over {DEEPEST} deep")
        self._kept.append(value)
        self._seen[id(value)] = None
        self._seen[id(value)] = plain = self._inside(value, depth)
        return plain

    def _inside(self, value: Any, depth: int) -> Any:
        if isinstance(value, _Array):
            return value.value()
        if isinstance(value, dict):
            for key, one in value.items():
                value[key] = self.of(one, depth + 1)
            return value
        if isinstance(value, tuple):
            return tuple(self.of(one, depth + 1) for one in value)
        for place, one in enumerate(value):
            if not isinstance(one, ATOMS):
                value[place] = self.of(one, depth + 1)
        return value
