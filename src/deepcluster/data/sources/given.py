"""Data as Python code gives it: paths and addresses of any kind, one or several."""

import os
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from deepcluster.core.errors import InputError

Data = str | Path | list[str | Path]


def given_data(data: Any) -> Data:
    """Return one path or address, or a list of the paths that a collection, an array or a generator holds.

    Raises:
        InputError: there are other things than paths, such as images.
    """
    if data is None:
        return []
    if hasattr(data, "columns"):
        raise InputError("data is a table, not a path: save it as .csv or .parquet, and give the file")
    shape = tuple(getattr(data, "shape", ()))
    kind = getattr(getattr(data, "dtype", None), "kind", "O" if not shape else "")
    if kind not in tuple("OSTU") and not isinstance(data, str | bytes):  # Text or objects, in terms of NumPy.
        raise InputError(
            f"data is an array of {' x '.join(map(str, shape))} numbers, not a path: save images as uint8 with "
            "numpy.save('images.npy', array), and give 'images.npy'"
        )
    if hasattr(data, "tolist") and not isinstance(data, str):
        data = data.tolist()
    if isinstance(data, str | bytes | os.PathLike):
        return _path(data)
    if isinstance(data, Iterable) and not isinstance(data, Mapping):
        some = [_path(one) for one in data]
        return sorted(some, key=str) if isinstance(data, Set) else some  # A set has no order of its own.
    return _path(data)


def _path(one: Any) -> str | Path:
    if isinstance(one, str | bytes | os.PathLike):
        text = str.__str__(os.fsdecode(one))  # NumPy has a text type of its own.
        return text if isinstance(one, str | bytes) else Path(text)
    package = type(one).__module__.partition(".")[0]
    name = type(one).__name__ if package == "builtins" else f"{package} {type(one).__name__}"
    raise InputError(f"data is or holds a value of type {name}, not a path: give files or folders")
