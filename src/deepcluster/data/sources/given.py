"""Data as Python code gives it: paths and addresses of any kind, one or several; images in memory."""

import os
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from deepcluster.core.addresses import whole_address
from deepcluster.core.errors import InputError
from deepcluster.data.sources.image_source import ImageSource
from deepcluster.data.sources.memory import is_image, memory_image, memory_images

# Stands for images in memory in the configuration of a run.
IN_MEMORY = "images in memory"
Data = str | Path | ImageSource | list[str | Path]


def given_data(data: Any, what: str = "data") -> Data:
    """Return one path or address, a list of the paths that a collection, an array or a generator holds, or images.

    Args:
        what: name of the argument, for errors.

    Raises:
        InputError: there are other things than paths and images.
    """
    if data is None:
        return []
    if isinstance(data, ImageSource):
        return data
    if hasattr(data, "columns"):
        raise InputError(f"{what} is a table, not a path: save it as .csv or .parquet, and give the file")
    if is_image(data):
        return memory_image(data)
    if hasattr(data, "tolist") and not isinstance(data, str):
        data = data.tolist()
    if isinstance(data, str | bytes | os.PathLike):
        return _path(data, what)
    if isinstance(data, Iterable) and not isinstance(data, Mapping):
        given = list(data)
        if any(map(is_image, given)):
            return memory_images(given)
        some = [_path(one, what) for one in given]
        return sorted(some, key=str) if isinstance(data, Set) else some  # A set has no order of its own.
    return _path(data, what)


def addresses_of(data: Any) -> list[str]:
    """Return what finds the data again from any folder; of images in memory, a text that stands for them."""
    given = given_data(data)
    if isinstance(given, ImageSource):
        return [IN_MEMORY]
    return [whole_address(one) for one in (given if isinstance(given, list) else [given])]


def _path(one: Any, what: str) -> str | Path:
    if isinstance(one, str | bytes | os.PathLike):
        text = str.__str__(os.fsdecode(one))  # NumPy has a text type of its own.
        return text if isinstance(one, str | bytes) else Path(text)
    package = type(one).__module__.partition(".")[0]
    name = type(one).__name__ if package == "builtins" else f"{package} {type(one).__name__}"
    raise InputError(f"{what} is or holds a value of type {name}, not a path or an image: give files, folders, or images")
