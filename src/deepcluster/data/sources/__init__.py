"""Where images come from: folders, lists, tables, arrays, tar shards, Parquet, here or at an address, as one collection.

N images. Another kind of data is a module with an opener, and a line in `_Opener`.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from deepcluster.data.sources.arrays import ArraySource
from deepcluster.data.sources.files import IMAGE_ENDINGS, open_list, open_table
from deepcluster.data.sources.folders import NoImages, open_folder
from deepcluster.data.sources.image_source import ImageSource
from deepcluster.data.sources.parquet import open_parquet
from deepcluster.data.sources.remote_files import open_folder_at, open_list_at
from deepcluster.data.sources.saved_dataset import is_saved_dataset, open_saved_dataset
from deepcluster.data.sources.shards import open_shards
from deepcluster.data.storage import LocalFile, StoredFile
from deepcluster.data.storage.addresses import expand, host_of, is_address, path_of, pattern_start
from deepcluster.data.storage.blocks import BlockStore
from deepcluster.data.storage.cache_folder import usual_cache_folder
from deepcluster.data.storage.remote import find_files
from deepcluster.data.storage.retries import Patience
from deepcluster.data.wording import count_of, printable
from deepcluster.errors import InputError, did_you_mean

__all__ = ["ImageSource", "JoinedSource", "LimitedSource", "fingerprint", "open_source"]

SUPPORTED: Final = (
    "a folder of images, tar shards or Parquet files, a list (.txt, .lst) or table (.csv, .tsv) of paths, shards (.tar, "
    ".tar.gz), Parquet (.parquet), an array (.npz, .npy), a saved Hugging Face data set, or an address of any but arrays"
)
TARS: Final = (".tar", ".tar.gz", ".tgz")
# Files that hold many images.
HOLDERS: Final = (*TARS, ".parquet")


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

    def stamp(self, index: int) -> str:
        part, inner = self._find(index)
        return self._parts[part].stamp(inner)

    def changed(self) -> str | None:
        changes = (part.changed() for part in self._parts)
        named = [f"{name}: {change}" for name, change in zip(self._prefixes, changes, strict=True) if change]
        return "; ".join(named) or None

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

    def stamp(self, index: int) -> str:
        return self._source.stamp(int(self._indices[index]))

    def changed(self) -> str | None:
        return self._source.changed()

    def details(self) -> str:
        return self._source.details()

    def describe(self) -> str:
        return f"{len(self):,} of {count_of(len(self._source), 'image')} (--limit) {self.details()}"


def open_source(
    data: str | Path | Sequence[str | Path],
    limit: int | None = None,
    *,
    cache: Path | None = None,
    cache_bytes: int | None = None,
    on_found: Callable[[int], None] = lambda so_far: None,
    on_trouble: Callable[[str], None] = warnings.warn,
) -> ImageSource:
    """Open images, wherever they are (`SUPPORTED`, or several of these), and take `limit` of them spread evenly.

    No image is opened.

    Args:
        cache: folder for lists, indexes and copies of remote and compressed parts; None: the usual one.
        cache_bytes: bound on these copies; None: 20 GiB, or a quarter of what is free on that disk where that is less.
        on_found: told how many images have been found so far; may raise to stop.
        on_trouble: told, in a sentence, of what is waited for or gone on without.

    Raises:
        InputError: nothing is there, nothing is in it, or nothing that is known.
    """
    cache = cache or usual_cache_folder()
    opener = _Opener(cache, BlockStore(cache / "blocks", cache_bytes), on_found, Patience(on_trouble=on_trouble))
    if isinstance(data, str | Path):
        source = opener.open(data)
    elif not data:
        raise InputError(f"no data given; give {SUPPORTED}")
    elif len(data) == 1:
        source = opener.open(data[0])
    else:
        source = JoinedSource([(_name_of(one), opener.open(one)) for one in data])
    return source if limit is None or limit >= len(source) else LimitedSource(source, limit)


def fingerprint(source: ImageSource) -> str:
    """Return 16 hex digits that change with the number, the names and the order of the images."""
    digest = hashlib.sha256(f"{len(source)}".encode())
    names = map(source.name, range(len(source)))
    while some := list(islice(names, 10_000)):
        digest.update(("\0" + "\0".join(some)).encode())
    return digest.hexdigest()[:16]


def _name_of(data: str | Path) -> str:
    if is_address(str(data)):
        return path_of(str(data)).rstrip("/").rpartition("/")[2] or host_of(str(data))
    return Path(data).resolve().name or "root"


@dataclass(frozen=True)
class _Opener:
    """Opens one kind of data after the other, with what they share."""

    cache: Path
    blocks: BlockStore
    on_found: Callable[[int], None]
    patience: Patience

    def open(self, data: str | Path) -> ImageSource:
        text = str(data)
        if isinstance(data, Path) and not data.exists():  # which makes one slash of the two in an address
            text = re.sub(r"^([A-Za-z][\w+.-]+):/(?!/)", r"\1://", text)
        if is_address(text):
            return self._address(text)
        try:
            paths = [Path(one) for one in expand(os.path.expanduser(text))]  # noqa: PTH111 (it may hold braces)
            if len(paths) == 1:
                return self._path(text, paths[0])
            if any(path.is_dir() for path in paths):
                return JoinedSource([(_name_of(path), self._path(str(path), path)) for path in paths])
            return self._files(text, paths)
        except OSError as error:  # No permission on the way there, or a name that is too long.
            raise InputError(f"{data} can't be opened: {(error.strerror or str(error)).lower()}") from error

    def _path(self, data: str, path: Path) -> ImageSource:
        if path.is_dir():
            return open_saved_dataset(path, blocks=self.blocks) if is_saved_dataset(path) else self._folder(path)
        if not path.exists():
            raise InputError(f"{data} does not exist{_nearest_path(path)}; looked in {path.absolute().parent}")
        if path.suffix.lower()[1:] in IMAGE_ENDINGS:
            raise InputError(f"{data} is a single image; give its folder, or a list of images (.txt, .csv)")
        return self._files(data, [path])

    def _folder(self, folder: Path) -> ImageSource:
        """The images of a folder, or where it holds none, those of the shards and Parquet files in it."""
        try:
            return open_folder(folder, cache=self.cache, on_found=self.on_found)
        except NoImages as nothing:
            holders = sorted(path for path in folder.rglob("*") if path.name.lower().endswith(HOLDERS) and path.is_file())
            if not holders:
                raise InputError(str(nothing)) from None
            return self._files(str(folder), holders, below=folder)

    def _files(self, data: str, paths: list[Path], below: Path | None = None) -> ImageSource:
        """What lies in files of one kind; of several kinds, one after the other."""
        kinds: dict[str, list[Path]] = {}
        for path in paths:
            kinds.setdefault(_kind(path.name), []).append(path)
        if len(kinds) > 1:
            return JoinedSource([(_name_of(some[0].parent), self._files(data, some, below)) for some in kinds.values()])
        kind = next(iter(kinds))
        if kind in HOLDERS:
            root = below or Path(os.path.commonpath([path.absolute().parent for path in paths]))
            return self._holders(kind, [LocalFile(path, _below(root, path)) for path in paths])
        opened = [(_name_of(path), self._list_or_array(data, path)) for path in paths]
        return opened[0][1] if len(opened) == 1 else JoinedSource(opened)

    def _holders(self, kind: str, files: Sequence[StoredFile]) -> ImageSource:
        if kind == ".parquet":
            return open_parquet(files, blocks=self.blocks, on_found=self.on_found)
        return open_shards(files, cache=self.cache, on_found=self.on_found)

    def _list_or_array(self, data: str, path: Path) -> ImageSource:
        ending = path.suffix.lower()
        if ending in (".txt", ".lst"):
            return open_list(path, blocks=self.blocks)
        if ending in (".csv", ".tsv"):
            return open_table(path, blocks=self.blocks)
        if ending in (".npz", ".npy"):
            return ArraySource(path)
        raise InputError(f"{data}: files ending in {ending or 'nothing'} are not known as data; give {SUPPORTED}")

    def _address(self, address: str) -> ImageSource:
        name = path_of(address).lower()
        if name.endswith((".txt", ".lst", ".csv", ".tsv")):
            return open_list_at(address, self.blocks, self.patience)
        if name.endswith((".npz", ".npy")):
            raise InputError(f"{address}: arrays are read from this machine alone; copy the file here")
        try:
            files = find_files(address, HOLDERS, blocks=self.blocks, patience=self.patience)
        except InputError as nothing:
            if not name.endswith("/") and pattern_start(address) is None:
                raise
            try:
                return open_folder_at(address, sorted(IMAGE_ENDINGS), self.blocks, self.patience)
            except InputError:
                raise nothing from None
        kinds = sorted({_kind(file.name) for file in files})
        sources = [self._holders(kind, [file for file in files if _kind(file.name) == kind]) for kind in kinds]
        return sources[0] if len(sources) == 1 else JoinedSource([(_name_of(address), source) for source in sources])


def _kind(name: str) -> str:
    """`.tar` of all kinds of tar, else the ending."""
    lower = name.lower()
    return ".tar" if lower.endswith(TARS) else os.path.splitext(lower)[1]  # noqa: PTH122


def _below(root: Path, path: Path) -> str:
    return path.absolute().relative_to(root.absolute()).as_posix()


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
