"""Where images come from: a folder, a list, a table or an array, or several of these, as one ordered collection.

N images. Another kind of data is a module with an opener, and one line in `_OPENERS`.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from deepcluster.data.arrays import ArraySource
from deepcluster.data.files import IMAGE_ENDINGS, NOT_YET, open_folder, open_list, open_table
from deepcluster.data.image_source import ImageSource, count_of, printable
from deepcluster.errors import InputError, did_you_mean

__all__ = ["ImageSource", "JoinedSource", "LimitedSource", "fingerprint", "open_source"]

SUPPORTED: Final = "a folder of images, a list of paths (.txt, .lst), a table of paths (.csv, .tsv) or an array (.npz, .npy)"


class JoinedSource(ImageSource):
    """Several sources, one after the other; each name begins with the name of its source."""

    def __init__(self, parts: Sequence[tuple[str, ImageSource]]) -> None:
        """Take sources with the names of their folders or files; equal names become `name`, `name-2`, ..."""
        self._parts = tuple(source for _, source in parts)
        self._names = [printable(name) for name, _ in parts]
        self._prefixes = _distinct(self._names)
        self._ends = list(accumulate(len(source) for source in self._parts))
        known = any(source.labels_N is not None for source in self._parts)
        super().__init__(chain.from_iterable(map(_label_names, self._parts)) if known else None)

    def __len__(self) -> int:
        return self._ends[-1]

    def _find(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        part = bisect_right(self._ends, index)
        return part, index - self._ends[part] + len(self._parts[part])

    def name(self, index: int) -> str:
        part, inner = self._find(index)
        own, name = self._names[part], self._parts[part].name(inner)
        # What lies inside a file says so itself (`digits.npz::000012`).
        return self._prefixes[part] + (name[len(own) :] if name.startswith(f"{own}::") else f"/{name}")

    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        part, inner = self._find(index)
        return self._parts[part].read(inner)

    def path(self, index: int) -> Path | None:
        part, inner = self._find(index)
        return self._parts[part].path(inner)

    def details(self) -> str:
        parts = zip(self._prefixes, self._parts, strict=True)
        return f"from {len(self._parts)} sources: " + "; ".join(f"{name}: {part.describe()}" for name, part in parts)


class LimitedSource(ImageSource):
    """`limit` images spread evenly over another source, so that every class folder keeps its share."""

    def __init__(self, source: ImageSource, limit: int) -> None:
        """Keep the images floor(i * N / limit); raises InputError where limit < 1."""
        if limit < 1:
            raise InputError(f"limit={limit} leaves no images; use --limit 1 or more, or leave it out for all")
        super().__init__()
        self._source = source
        self._indices = np.arange(limit, dtype=np.int64) * len(source) // limit
        self.class_names = source.class_names
        self.labels_N = None if source.labels_N is None else source.labels_N[self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))

    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        return self._source.read(int(self._indices[index]))

    def path(self, index: int) -> Path | None:
        return self._source.path(int(self._indices[index]))

    def details(self) -> str:
        return self._source.details()

    def describe(self) -> str:
        return f"{len(self):,} of {count_of(len(self._source), 'image')} (--limit) {self.details()}"


def open_source(data: str | Path | Sequence[str | Path], limit: int | None = None) -> ImageSource:
    """Open a folder, list, table or array, or a sequence of these, and take `limit` images spread evenly over it.

    No image is opened. Raises InputError where there is nothing there, nothing in it, or nothing that is known.
    """
    if isinstance(data, str | Path):
        source = _open_one(data)
    elif not data:
        raise InputError(f"no data given; give {SUPPORTED}")
    elif len(data) == 1:
        source = _open_one(data[0])
    else:
        source = JoinedSource([(Path(one).resolve().name or "root", _open_one(one)) for one in data])
    return source if limit is None or limit >= len(source) else LimitedSource(source, limit)


def fingerprint(source: ImageSource) -> str:
    """Return 16 hex digits that change with the number, the names and the order of the images."""
    digest = hashlib.sha256(f"{len(source)}".encode())
    names = map(source.name, range(len(source)))
    while some := list(islice(names, 10_000)):
        digest.update(("\0" + "\0".join(some)).encode())
    return digest.hexdigest()[:16]


def _open_one(data: str | Path) -> ImageSource:
    try:
        return _open_path(data, Path(data).expanduser())
    except OSError as error:  # No permission on the way there, or a name that is too long.
        raise InputError(f"{data} can't be opened: {(error.strerror or str(error)).lower()}") from error


def _open_path(data: str | Path, path: Path) -> ImageSource:
    if path.is_dir():
        return open_folder(path)
    # `Path` makes one slash of two in an address.
    if re.match(r"[A-Za-z][\w+.-]+:/", str(data)) and not path.exists():
        raise InputError(f"{data}: remote addresses are not supported yet; copy the images here and give {SUPPORTED}")
    for ending, kind in NOT_YET.items():
        if path.name.lower().endswith(ending):
            raise InputError(f"{data}: {kind} are not supported yet; give {SUPPORTED}")
    if not path.exists():
        raise InputError(f"{data} does not exist{_nearest_path(path)}; looked in {path.absolute().parent}")
    ending = path.suffix.lower()
    if ending[1:] in IMAGE_ENDINGS:
        raise InputError(f"{data} is a single image; give its folder, or a list of images (.txt, .csv)")
    if ending not in _OPENERS:
        raise InputError(f"{data}: files ending in {ending or 'nothing'} are not known as data; give {SUPPORTED}")
    return _OPENERS[ending](path)


def _nearest_path(path: Path) -> str:
    try:
        return did_you_mean(path.name, (near.name for near in islice(path.parent.iterdir(), 1000)))
    except OSError:
        return ""


def _label_names(source: ImageSource) -> Iterator[str]:
    """Yield the class name of each image, "" where it is unknown."""
    if source.labels_N is None:
        yield from [""] * len(source)
    else:
        yield from (source.class_names[label] if label >= 0 else "" for label in source.labels_N.tolist())


def _distinct(names: Sequence[str]) -> list[str]:
    """Return the names, repeated ones with -2, -3, ... at the end."""
    taken = set(names)
    seen: set[str] = set()
    result = []
    for name in names:
        new, number = name, 2
        while new in seen or (new != name and new in taken):
            new, number = f"{name}-{number}", number + 1
        seen.add(new)
        result.append(new)
    return result


_OPENERS: Final[dict[str, Callable[[Path], ImageSource]]] = {
    ".txt": open_list,
    ".lst": open_list,
    ".csv": open_table,
    ".tsv": open_table,
    ".npz": ArraySource,
    ".npy": ArraySource,
}
