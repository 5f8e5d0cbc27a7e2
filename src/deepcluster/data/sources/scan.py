"""What lies below a folder, and whether anything has changed there since; no file is opened or asked for its status."""

import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from deepcluster.core.names import PackedNames
from deepcluster.data.sources.files import IMAGE_ENDINGS

Stamp = tuple[int, int, int, int]  # Device, inode, times of the last change of entries and of status, in ns.
# The coarsest file systems (FAT) count folder times in steps of 2 seconds: a file that is added within the same step as
# the folder's last change, but after it was read, leaves no trace.
_SETTLED_NS = 2 * 10**9
_REPORT_SECONDS = 0.2
_REPORT_ENTRIES = 5_000


@dataclass
class Listing:
    """What lies below a folder at one moment."""

    names: PackedNames = field(default_factory=PackedNames)  # Relative paths of the images, sorted.
    # Number of images in each folder that has some, by its path and a slash ("" = the top); subfolders follow their folder.
    images: dict[str, int] = field(default_factory=dict)
    # What changes when an entry of a folder is added or removed, by its path; None = no folder.
    stamps: dict[str, Stamp | None] = field(default_factory=dict)
    endings: Counter[str] = field(default_factory=Counter)  # Of the images.
    others: Counter[str] = field(default_factory=Counter)  # Endings of the other files.
    special: int = 0  # Number of pipes, sockets and devices that have the name of an image.
    closed: int = 0  # Number of folders that could not be opened.
    settled: bool = True  # Whether any later change must show in the stamps.

    def is_current(self, root: Path) -> bool:
        """Return whether the stamps say that no entry was added or removed."""
        return self.settled and all(_stamp(f"{root}/{path}") == stamp for path, stamp in self.stamps.items())


def scan(root: Path, on_found: Callable[[int], None] = lambda so_far: None) -> Listing:
    """Return what lies below `root`.

    `on_found` gets the number of images so far, a few times per second and at the end; it may raise to stop.
    """
    listing = Listing()
    listing.names = PackedNames(_walk(root, listing, on_found))
    on_found(len(listing.names))
    return listing


def _walk(root: Path, listing: Listing, on_found: Callable[[int], None]) -> Iterator[str]:
    """Yield the paths of the images in their order, and fill in the rest of `listing`."""
    begun_ns, reported = time.time_ns(), time.monotonic()
    stack, above = [""], {"": frozenset[tuple[int, int]]()}  # Identities of the folders above each folder on the stack.
    while stack:
        path = stack.pop()
        if path not in above:
            yield path
            continue
        # Before its entries: what is added while they are read must show as a change.
        listing.stamps[path] = stamp = _stamp(f"{root}/{path}")
        if stamp is None:
            listing.closed += 1
            continue
        listing.settled &= stamp[2] < begun_ns - _SETTLED_NS
        if stamp[:2] in above[path]:  # A link to a folder that holds it.
            continue
        names: list[str] = []
        n_before = listing.endings.total()
        for some in _names(root / path, path, listing):
            names += some
            if time.monotonic() - reported > _REPORT_SECONDS:
                reported = time.monotonic()
                on_found(listing.endings.total())
        if n_images := listing.endings.total() - n_before:
            listing.images[path] = n_images
        # A subfolder is sorted with the slash that follows it in all paths below it. No name begins with another one and
        # its slash, so this is the order of the whole paths.
        paths = [path + name for name in sorted(names)]
        if n_images == len(paths):  # The usual case.
            yield from paths
        else:
            above |= dict.fromkeys((one for one in paths if one[-1] == "/"), above[path] | {stamp[:2]})
            stack += reversed(paths)


def _names(folder: Path, path: str, listing: Listing) -> Iterator[list[str]]:
    """Yield, in parts, the names of images and of subfolders, with a slash; count the other files that are not hidden."""
    names: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for number, entry in enumerate(entries):
                if number % _REPORT_ENTRIES == 0:
                    yield names
                    names = []
                name = entry.name
                if name[0] == "." or name == "__MACOSX":
                    continue
                _, dot, ending = name.rpartition(".")
                is_image = dot and ending.lower() in IMAGE_ENDINGS
                try:
                    is_regular = is_image and entry.is_file()
                    is_folder = not is_regular and entry.is_dir()
                except OSError:  # A link to itself, or to a place without permission.
                    is_regular = is_folder = False
                if is_folder:
                    names.append(name + "/")
                elif is_image and (is_regular or entry.is_symlink()):
                    names.append(name)
                    listing.endings[ending] += 1
                elif is_image:
                    listing.special += 1
                else:
                    listing.others[ending if dot else ""] += 1
                    if entry.is_symlink():  # Perhaps to a disk that is not mounted at the moment.
                        listing.stamps[path + name] = None
    except OSError:
        listing.closed += 1
    yield names


def _stamp(path: str) -> Stamp | None:
    """Return what changes with the entries of a folder; None where `path` leads to none.

    The time of its entries can be set back, as by programs that copy folders with their times; that of its status can't.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 (pathlib takes twice as long)
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns) if stat.S_ISDIR(status.st_mode) else None
