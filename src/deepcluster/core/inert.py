"""Files of torch that hold more than tensors: the tensors are read, and objects of other libraries beside them are inert.

Many programs keep their options, histories or random states beside the weights. Their classes are not imported, and nothing
of the file is called. Names of the standard library that are not types of data stand for code: such a file is refused.
"""

import pickle
import sys
from functools import lru_cache
from types import FunctionType
from typing import Any

import numpy as np

from deepcluster.core.pickles import BASE, CALLS, PLAIN, Blank, Dtype, Operations, PlainUnpickler, Refused, full_name

# Modules of the standard library whose objects are data, and names in them that are not.
DATA_MODULES = frozenset(
    (
        *("abc", "argparse", "array", "builtins", "collections", "copyreg", "dataclasses", "datetime", "decimal", "enum"),
        *("fractions", "functools", "numbers", "pathlib", "random", "types", "typing", "uuid", "zoneinfo"),
    )
)
RUNNING = frozenset(
    (
        *("builtins." + name for name in ("__import__", "breakpoint", "compile", "delattr", "eval", "exec", "getattr")),
        *("builtins." + name for name in ("globals", "help", "input", "locals", "open", "setattr", "vars")),
        *("types." + name for name in ("CodeType", "FunctionType", "LambdaType", "MethodType")),
    )
)


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

    def find_class(self, module: str, name: str) -> Any:
        """Return our own function for a name; nothing is imported."""
        full = full_name(module, name)
        known = {**CALLS, **_torch_calls()}
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
                return function(*arguments)
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

    def _set(self) -> None:
        items = self.pop_mark()  # Puts another stack in the place of `self.stack`.
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
        pickle.BINPERSID[0]: BASE[pickle.BINPERSID[0]],
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
        """Return the value of the next pickle of a file."""
        return InertUnpickler(file).load()


@lru_cache
def _torch_calls() -> dict[str, Any]:
    """Return what stands for the names that torch writes: functions that make tensors of storages, and types of numbers."""
    import torch

    def rebuilt(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Any:
        if not isinstance(storage, torch.TypedStorage):
            raise Refused("a tensor without storage")
        return torch._utils._rebuild_tensor(storage, offset, tuple(size), tuple(stride))

    def rebuilt_untyped(
        storage: Any, offset: Any, size: Any, stride: Any, _: Any, hooks: Any, dtype: Any, *more: Any
    ) -> Any:
        if not isinstance(storage, torch.TypedStorage | torch.UntypedStorage) or not isinstance(dtype, torch.dtype):
            raise Refused("a tensor without storage")
        return torch._utils._rebuild_tensor_v3(storage, offset, tuple(size), tuple(stride), False, {}, dtype)

    def of_type(function: Any, _type: Any, arguments: Any, _state: Any) -> Any:
        return function(*arguments) if function in (rebuilt, rebuilt_untyped) else Inert("torch.Tensor")

    dtypes = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    return {
        **dtypes,
        "torch.storage.UntypedStorage": torch.UntypedStorage,
        "torch._utils._rebuild_tensor": rebuilt,
        "torch._utils._rebuild_tensor_v2": rebuilt,
        "torch._utils._rebuild_tensor_v3": rebuilt_untyped,
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
        "torch.nn.parameter.Parameter": lambda tensor=None, *_: tensor,
        "torch._tensor._rebuild_from_type_v2": of_type,
        "torch.Size": lambda sides=(): tuple(sides),
        "collections.OrderedDict": lambda pairs=(): dict(pairs),
        "collections.defaultdict": lambda *_: {},
        "numpy.core.multiarray.scalar": lambda *parts: CALLS["numpy.core.multiarray.scalar"](*parts).item(),
        "builtins.set": lambda items=(): list(items),
        "builtins.bytearray": lambda content=b"", *_: content,
    }
