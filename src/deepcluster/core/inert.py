"""Files of torch that hold more than tensors: the tensors are read, and objects of other libraries beside them are inert.

Many programs keep their options, histories or random states beside the weights. Their classes are not imported, and nothing
of the file is called. Names of the standard library that are not types of data stand for code: such a file is refused.
"""

import os
import pickle
import sys
import tarfile
from functools import cache
from math import prod
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np

from deepcluster.core.pickles import (
    BASE,
    CALLS,
    PLAIN,
    SPARE_BYTES,
    Blank,
    Dtype,
    Operations,
    PlainUnpickler,
    Refused,
    full_name,
)

# Modules of the standard library whose objects are data, and names in them that are not.
DATA_MODULES = frozenset(
    (
        *("abc", "argparse", "array", "builtins", "collections", "copyreg", "dataclasses", "datetime", "decimal", "enum"),
        *("fractions", "functools", "logging", "numbers", "pathlib", "random", "re", "time", "types", "typing", "uuid"),
        "zoneinfo",
    )
)
RUNNING = frozenset(
    (
        *("builtins." + name for name in ("__import__", "breakpoint", "compile", "delattr", "eval", "exec", "getattr")),
        *("builtins." + name for name in ("globals", "help", "input", "locals", "open", "setattr", "vars")),
        *("types." + name for name in ("CodeType", "FunctionType", "LambdaType", "MethodType")),
    )
)
# A zip may hold a thousand times its size; weights do not get much smaller in it.
MOST_UNPACKED = 16
MOST_SIDES = 65
LARGEST_REPEATED = 1 << 28


class Inert:
    """An object of a class that was not imported: it has the name of the class, and what was to be its state.

    Attributes:
        class_name: such as "omegaconf.dictconfig.DictConfig".
        arguments: what the class was to be called with.
        state: what the object was to be set to; None if there is nothing.
    """

    def __init__(self, class_name: str, arguments: tuple[Any, ...] = ()) -> None:
        self.class_name, self.arguments, self.state = class_name, arguments, None

    def __repr__(self) -> str:
        return f"<{self.class_name}>"

    def keep(self, *_: Any) -> None:
        """Ignore what would be added."""

    append = extend = add = __setitem__ = keep


class InertUnpickler(PlainUnpickler):
    """The interpreter of such a file's pickle, in the form that `torch.load` wants."""

    def __init__(self, file: Any, **_: Any) -> None:
        pickle._Unpickler.__init__(self, file, encoding="latin1")
        place = file.tell()
        self.bytes_left = 2 * file.seek(0, os.SEEK_END) + SPARE_BYTES
        file.seek(place)

    def find_class(self, module: str, name: str) -> Any:
        """Return our own function for a name; nothing is imported."""
        full = full_name(module, name)
        known = _calls()
        if full in known:
            return known[full]
        root = full.partition(".")[0]
        # A dot in the name leads to a method.
        if root in sys.stdlib_module_names and (root not in DATA_MODULES or full in RUNNING or "." in name):
            raise Refused(f"{module}.{name}"[:100])

        def inert(*arguments: Any, **_: Any) -> Inert:
            return Inert(full, arguments)

        return inert

    def _call(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]
        self.stack[-1] = self._made(function, arguments)

    def _made(self, function: Any, arguments: Any) -> Any:
        """Return what one of our own functions makes; the result of any other call is inert, as are odd arrays."""
        if isinstance(function, FunctionType) and isinstance(arguments, tuple):
            try:
                return self._counted(function(*arguments))
            except (Refused, AttributeError, TypeError, ValueError):
                return Inert("array")
        return Inert("call")

    def _build(self) -> None:
        made = self.stack[-2]
        if isinstance(made, Dtype | Blank):
            try:
                super()._build()
            except (Refused, AttributeError, TypeError, ValueError):
                self.stack[-1] = Inert("array")
            return
        state = self.stack.pop()
        if isinstance(made, Inert):
            made.state = state

    def _fill(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is dict:
            keys, values = items[::2], items[1::2]
            simple = [isinstance(key, PLAIN) and not isinstance(key, np.ndarray) for key in keys]
            items = [part for key, value, good in zip(keys, values, simple, strict=True) if good for part in (key, value)]
            super()._fill(items)

    def _new_object(self, n_arguments: int) -> None:
        parts = [self.stack.pop() for _ in range(n_arguments + 1)][::-1]
        self.stack.append(self._made(parts[0], parts[1]))

    def _old_object(self, function: Any, arguments: list[Any]) -> None:
        self.stack.append(self._made(function, tuple(arguments)))

    def _obj(self) -> None:
        function, *arguments = self.pop_mark()
        self._old_object(function, arguments)

    def _inst(self) -> None:
        module, name = ((self.readline()[:-1]).decode("ascii", "replace") for _ in range(2))  # type: ignore[attr-defined]
        self._old_object(self.find_class(module, name), self.pop_mark())

    def _reference(self) -> None:
        """Put the storage that the file refers to on the stack, if the reference is one that torch writes.

        Its keys are looked up in a dict, and the hash of a deep tuple ends the process. The source of a module, which old
        files keep beside its class, is not compared.
        """
        parts = self.stack.pop()
        match parts:
            case ("module", function, *_):
                self.stack.append(function)
                return
            case ("storage", _, str() | int(), str(), int(), *view):
                if view in ([], [None]) or [type(one) for one in view[0]] == [str, int, int]:
                    self.stack.append(self.persistent_load(parts))
                    return
        raise ValueError("a reference to no storage")

    def _set(self) -> None:
        items = self.pop_mark()  # Replaces `self.stack`.
        self.stack.append(items)

    dispatch = Operations(PlainUnpickler.dispatch)
    dispatch |= {
        pickle.REDUCE[0]: _call,
        pickle.BUILD[0]: _build,
        pickle.NEWOBJ[0]: lambda self: self._new_object(1),
        pickle.NEWOBJ_EX[0]: lambda self: self._new_object(2),
        pickle.OBJ[0]: _obj,
        pickle.INST[0]: _inst,
        pickle.FROZENSET[0]: _set,
        pickle.EMPTY_SET[0]: lambda self: self.stack.append([]),
        pickle.ADDITEMS[0]: BASE[pickle.APPENDS[0]],
        pickle.BINPERSID[0]: _reference,
        pickle.POP[0]: BASE[pickle.POP[0]],
        pickle.POP_MARK[0]: BASE[pickle.POP_MARK[0]],
        pickle.DUP[0]: BASE[pickle.DUP[0]],
    }


class InertPickle:
    """What `torch.load` takes as its `pickle_module`."""

    __name__ = "inert"
    Unpickler = InertUnpickler

    @staticmethod
    def load(file: Any, **_: Any) -> Any:
        """Return the next pickle of a file without zip: numbers, facts of the system, then the keys of all storages."""
        value = InertUnpickler(file).load()
        if not isinstance(value, int | dict | list) or (
            isinstance(value, list) and not all(isinstance(key, str | int) for key in value)
        ):
            raise ValueError("keys of no storage")
        return value


def read_torch_file(path: Path, *, mapped: bool) -> Any:
    """Return the content of a file of torch, on the CPU.

    Args:
        mapped: tensors stay in the file.

    Raises:
        Refused: it holds code.
        Exception: it is damaged; torch and the interpreter raise a dozen types.
    """
    import torch

    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            file.seek(0)
            records = torch._C.PyTorchFileReader(file)
            names = records.get_all_records()
            if "constants.pkl" in names:  # torch.load would hand it on to torch.jit.load, which runs it.
                raise RuntimeError("TorchScript")
            if sum(map(records.get_record_size, names)) > MOST_UNPACKED * path.stat().st_size:
                raise RuntimeError(f"unpacked it would be over {MOST_UNPACKED} times as large")
        elif tarfile.is_tarfile(path):  # torch.load would unpack it: links and all.
            raise RuntimeError("an archive of torch 0.1")
        file.seek(0)
        # Only a file with a name can be mapped.
        place: Any = path if mapped else file
        options: dict[str, Any] = {"map_location": "cpu", "mmap": mapped}
        if os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "").lower() in ("1", "y", "yes", "true"):
            return torch.load(place, weights_only=True, **options)  # torch takes no other reader then.
        return torch.load(place, weights_only=False, pickle_module=InertPickle, **options)


def _check_bounds(storage: Any, offset: Any, size: Any, stride: Any, item_bytes: int) -> None:
    """Raise an error unless a tensor lies in its storage: torch may enlarge the storage instead."""
    if not all(isinstance(one, tuple | list) and len(one) < MOST_SIDES for one in (size, stride)):
        raise RuntimeError("a tensor of no shape")
    if not all(type(one) is int and 0 <= one < 1 << 62 for one in (offset, *size, *stride)):
        raise RuntimeError("a tensor of no shape")
    held = storage._untyped_storage.nbytes()
    end = offset + 1 + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
    if all(size) and end * item_bytes > held:
        raise RuntimeError("a tensor reaches beyond its storage")
    # A step of 0 repeats numbers, which takes no memory until the tensor is copied.
    if prod(size) * item_bytes > max(held, LARGEST_REPEATED):
        raise RuntimeError("a tensor is larger than its storage")


@cache
def _calls() -> dict[str, Any]:
    """Return what stands for the names that torch writes: functions that make tensors of storages, and types of numbers."""
    import torch

    def rebuilt(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Any:
        if not isinstance(storage, torch.TypedStorage):
            raise Refused("a tensor without storage")
        _check_bounds(storage, offset, size, stride, storage.dtype.itemsize)
        return torch._utils._rebuild_tensor(storage, offset, tuple(size), tuple(stride))

    def rebuilt_untyped(
        storage: Any, offset: Any, size: Any, stride: Any, _: Any, hooks: Any, dtype: Any, *more: Any
    ) -> Any:
        if not isinstance(storage, torch.TypedStorage) or not isinstance(dtype, torch.dtype):
            raise Refused("a tensor without storage")
        _check_bounds(storage, offset, size, stride, dtype.itemsize)
        return torch._utils._rebuild_tensor_v3(storage, offset, tuple(size), tuple(stride), False, {}, dtype)

    def of_type(function: Any, _type: Any, arguments: Any, _state: Any) -> Any:
        return function(*arguments) if function is rebuilt or function is rebuilt_untyped else Inert("torch.Tensor")

    dtypes = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    return {
        **CALLS,
        **dtypes,
        "torch.storage.UntypedStorage": torch.UntypedStorage,
        "torch._utils._rebuild_tensor": rebuilt,
        "torch._utils._rebuild_tensor_v2": rebuilt,
        "torch._utils._rebuild_tensor_v3": rebuilt_untyped,
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
        "torch.nn.parameter.Parameter": lambda tensor=None, *_: tensor,
        "torch._tensor._rebuild_from_type_v2": of_type,
        "torch.Size": lambda sides=(): tuple(sides) if isinstance(sides, tuple | list) else (),
        "collections.OrderedDict": _dict_of,
        "collections.defaultdict": lambda *_: {},
        "numpy.core.multiarray.scalar": lambda *parts: CALLS["numpy.core.multiarray.scalar"](*parts).item(),
        "builtins.set": lambda items=(): list(items) if isinstance(items, tuple | list) else [],
        "builtins.bytearray": lambda content=b"", *_: content,
    }


def _dict_of(pairs: Any = ()) -> dict[Any, Any]:
    """Return a dict of pairs, as Python 2 wrote an OrderedDict, with plain keys only."""
    items = pairs if isinstance(pairs, tuple | list) else ()
    return {key: value for key, value in items if isinstance(key, PLAIN)}
