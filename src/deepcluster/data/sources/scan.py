"""What lies below a folder, and whether anything has changed there since.

N images. Folders are asked for their entries, files for nothing: a million files in a thousand folders take about a second.
"""

from __future__ import annotations

import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Final, NamedTuple

from deepcluster.data.sources.files import IMAGE_ENDINGS
from deepcluster.data.sources.names import PackedNames

# The coarsest file systems (FAT) count folder times in steps of 2 seconds: a file that is added within the same step as
# the folder's last change, but after it was looked at, leaves no trace.
_SETTLED_SECONDS: Final = 2
_TELL_SECONDS: Final = 0.2
_TELL_ENTRIES: Final = 5_000


@dataclass
class Listing:
    """What lies below a folder at one moment.

    Attributes:
        names: paths of the images relative to the folder, sorted.
        folders: relative paths of all folders that were looked at, each with a slash at its end ("" is the folder
            itself), and of links that are no folder yet.
        stamps: what changes when an entry comes to one of these or goes; "" = no folder.
        endings: of the images.
        others: endings of the other files.
        holding: number of folders that hold images themselves.
        closed: number of folders that could not be opened.
        settled: whether a change since then must show in the stamps.
    """

    names: PackedNames = field(default_factory=PackedNames)
    folders: PackedNames = field(default_factory=PackedNames)
    stamps: PackedNames = field(default_factory=PackedNames)
    endings: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    holding: int = 0
    closed: int = 0
    settled: bool = False

    def still_true(self, root: Path) -> bool:
        """Whether the stamps say that no entry has come or gone."""
        found = zip(self.folders, self.stamps, strict=True)
        return self.settled and all(_stamp(f"{root}/{folder}") == stamp for folder, stamp in found)


class _Folder(NamedTuple):
    prefix: str
    above: frozenset[tuple[int, int]]


def scan(root: Path, on_found: Callable[[int], None] | None = None) -> Listing:
    """Return what lies below `root`.

    `on_found` gets the number of images so far, a few times a second and at the end; it may raise to stop.
    """
    listing = _Scan(root, on_found).run()
    if on_found:
        on_found(len(listing.names))
    return listing


class _Scan:
    """One walk through all folders, in the order of the paths, so that names can be packed as they are found."""

    def __init__(self, root: Path, on_found: Callable[[int], None] | None) -> None:
        self.root = root
        self.on_found = on_found
        self.found = Listing()
        self.latest_ns = 0
        self.told = time.monotonic()

    def run(self) -> Listing:
        begun_ns = time.time_ns()
        stack: list[_Folder | Iterator[str]] = [_Folder("", frozenset())]
        while stack:
            item = stack.pop()
            if isinstance(item, _Folder):
                stack += reversed(self._look_into(item))
            else:
                self.found.names.extend(item)
        self.found.settled = self.latest_ns < begun_ns - _SETTLED_SECONDS * 10**9
        return self.found

    def _look_into(self, folder: _Folder) -> list[_Folder | Iterator[str]]:
        """Return what a folder holds, in order: the names of images, and its subfolders between them."""
        path = self.root / folder.prefix
        try:
            status = path.stat()
        except OSError:
            self._remember(folder.prefix, "")
            self.found.closed += 1
            return []
        # Before its entries: what comes while they are read must show as a change.
        self._remember(folder.prefix, _stamp_of(status))
        self.latest_ns = max(self.latest_ns, status.st_mtime_ns)
        here = (status.st_dev, status.st_ino)
        if here in folder.above:  # A link to a folder that holds it.
            return []
        keys: list[str] = []
        images = self.found.endings.total()
        entries = self._entries(path)
        while some := list(islice(entries, _TELL_ENTRIES)):
            self._sort_entries(some, folder.prefix, keys)
            if self.on_found and time.monotonic() - self.told > _TELL_SECONDS:
                self.told = time.monotonic()
                self.on_found(self.found.endings.total())
        self.found.holding += self.found.endings.total() > images
        # A subfolder is sorted with the slash that follows it in all paths below it. No name begins with another one and
        # its slash, so this gives the order of the whole paths.
        keys.sort()
        found: list[_Folder | Iterator[str]] = []
        for is_folder, group in groupby(keys, lambda key: key.endswith("/")):
            if is_folder:
                found += [_Folder(folder.prefix + key, folder.above | {here}) for key in group]
            else:
                found.append(map(folder.prefix.__add__, list(group)))
        return found

    def _entries(self, path: Path) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(path) as entries:
                yield from entries
        except OSError:
            self.found.closed += 1

    def _sort_entries(self, entries: Iterable[os.DirEntry[str]], prefix: str, keys: list[str]) -> None:
        """Put images and subfolders into `keys`, count what else there is; hidden entries are left out."""
        for entry in entries:
            name = entry.name
            if name[0] == "." or name == "__MACOSX":
                continue
            try:
                is_folder = entry.is_dir()
            except OSError:  # A link to itself, or to where one may not look.
                is_folder = False
            _, dot, ending = name.rpartition(".")
            if is_folder:
                keys.append(name + "/")
            elif dot and ending.lower() in IMAGE_ENDINGS:
                keys.append(name)
                self.found.endings[ending] += 1
            else:
                self.found.others[ending if dot else ""] += 1
                if entry.is_symlink():  # Perhaps to a disk that is not there at the moment.
                    self._remember(prefix + name, "")

    def _remember(self, folder: str, stamp: str) -> None:
        self.found.folders.extend([folder])
        self.found.stamps.extend([stamp])


def _stamp(folder: str) -> str:
    try:
        status = os.stat(folder)  # noqa: PTH116 (pathlib takes twice as long)
    except OSError:
        return ""
    return _stamp_of(status)


def _stamp_of(status: os.stat_result) -> str:
    """Return what changes with the entries of a folder; "" where it is none.

    The time of its entries can be set back, as by programs that copy folders with their times; that of its status can't.
    """
    if not stat.S_ISDIR(status.st_mode):
        return ""
    return f"{status.st_dev}-{status.st_ino}-{status.st_mtime_ns}-{status.st_ctime_ns}"
