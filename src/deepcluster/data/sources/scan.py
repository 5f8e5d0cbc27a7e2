"""What lies below a folder, and whether anything has changed there since; no file is opened or asked for its status."""

import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from deepcluster.core.files import MARK
from deepcluster.core.names import PackedNames
from deepcluster.data.sources.files import IMAGE_ENDINGS

Stamp = tuple[int, int, int, int]  # Device, inode, times of the last change of entries and of status, in ns.
# The coarsest file systems (FAT) count folder times in steps of 2 seconds: a file that is added within the same step as
# the folder's last change, but after it was read, leaves no trace.
_SETTLED_NS = 2 * 10**9
TABLES = (".csv", ".tsv", ".jsonl")
HOLDERS = (".tar", ".tar.gz", ".tgz", ".parquet")  # which hold many image files
# Bins, thumbnails and backups of systems and storage boxes, in small letters. Names that begin with a dot are left out, too.
SYSTEM_NAMES = frozenset(
    (  # noqa: SIM905 (a list of words)
        "@eadir|@tmp|#recycle|#snapshot|@recycle|@recently-snapshot|@snapshot|@sharesnap|$recycle.bin|recycler|recycled|"
        "system volume information|found.000|lost+found|__macosx|network trash folder|temporary items|~snapshot"
    ).split("|")
)
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
    holders: list[str] = field(default_factory=list)  # Paths of tar and Parquet files.
    tables: list[str] = field(default_factory=list)  # Names of tables at the top, which may hold labels.
    system: Counter[str] = field(default_factory=Counter)  # Names of `SYSTEM_NAMES` and of hidden folders, and ".*".
    ours: list[str] = field(default_factory=list)  # Paths of the folders that this program has written.
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
        stamp = _stamp(f"{root}/{path}")
        if stamp is None:
            listing.stamps[path] = None
            listing.closed += 1
            continue
        if stamp[:2] in above[path]:  # A link to a folder that holds it.
            listing.stamps[path] = stamp
            continue
        folder = _Folder()
        for n_images in folder.read(root / path):
            if time.monotonic() - reported > _REPORT_SECONDS:
                reported = time.monotonic()
                on_found(listing.endings.total() + n_images)
        if path and folder.is_ours():  # What changes in it changes nothing here.
            listing.ours.append(path.rstrip("/"))
            continue
        listing.stamps[path] = stamp
        listing.settled &= stamp[2] < begun_ns - _SETTLED_NS
        folder.add_to(listing, path)
        # A subfolder is sorted with the slash that follows it in all paths below it. No name begins with another one and
        # its slash, so this is the order of the whole paths.
        paths = [path + name for name in sorted(folder.names)]
        if folder.endings.total() == len(paths):  # The usual case.
            yield from paths
        else:
            above |= dict.fromkeys((one for one in paths if one[-1] == "/"), above[path] | {stamp[:2]})
            stack += reversed(paths)


class _Folder:
    """The entries of one folder."""

    def __init__(self) -> None:
        self.names: list[str] = []  # Of images and of subfolders, with a slash.
        self.endings, self.others, self.system = Counter[str](), Counter[str](), Counter[str]()
        self.holders: list[str] = []
        self.tables: list[str] = []
        self.links: list[str] = []  # Perhaps to disks that are not mounted at the moment.
        self.special = 0  # Number of pipes, sockets and devices that have the name of an image.
        self.is_closed = self.is_marked = self.has_config = False  # `has_config`: of a run

    def read(self, folder: Path) -> Iterator[int]:
        """Read the entries, and yield the number of images so far now and then."""
        try:
            with os.scandir(folder) as entries:
                for number, entry in enumerate(entries):
                    if number % _REPORT_ENTRIES == 0:
                        yield self.endings.total()
                    name = entry.name
                    try:
                        is_regular = entry.is_file()
                        is_folder = not is_regular and entry.is_dir()
                    except OSError:  # A link to itself, or to a place without permission.
                        is_regular = is_folder = False
                    _, dot, ending = name.rpartition(".")
                    if name[0] == ".":
                        self._add_hidden(name, is_folder=is_folder)
                    elif is_folder:
                        if name.lower() in SYSTEM_NAMES:
                            self.system[name] += 1
                        else:
                            self.names.append(name + "/")
                    elif dot and ending.lower() in IMAGE_ENDINGS:
                        if is_regular or entry.is_symlink():
                            self.names.append(name)
                            self.endings[ending] += 1
                        else:
                            self.special += 1
                    else:
                        self.others[ending if dot else ""] += 1
                        self._add_other(entry)
        except OSError:
            self.is_closed = True
        yield self.endings.total()

    def _add_hidden(self, name: str, *, is_folder: bool) -> None:
        if name == MARK:
            self.is_marked = True
        else:
            self.system[name if is_folder else ".*"] += 1

    def _add_other(self, entry: os.DirEntry[str]) -> None:
        if entry.name.lower().endswith(HOLDERS):
            self.holders.append(entry.name)
        if entry.name.lower().endswith(TABLES):
            self.tables.append(entry.name)
        self.has_config |= entry.name == "config.json"
        if entry.is_symlink():
            self.links.append(entry.name)

    def is_ours(self) -> bool:
        """Return whether this program has written the folder."""
        return self.is_marked or (self.has_config and {"checkpoints/", "assignments/"} <= set(self.names))

    def add_to(self, listing: Listing, path: str) -> None:
        """Count the entries, which are below `path`, in a listing."""
        if n_images := self.endings.total():
            listing.images[path] = n_images
        for counts, more in (
            (listing.endings, self.endings),
            (listing.others, self.others),
            (listing.system, self.system),
        ):
            counts.update(more)
        listing.holders += sorted(path + name for name in self.holders)
        listing.tables += [] if path else sorted(self.tables)
        listing.stamps.update(dict.fromkeys((path + name for name in self.links), None))
        listing.special += self.special
        listing.closed += self.is_closed


def _stamp(path: str) -> Stamp | None:
    """Return what changes with the entries of a folder; None where `path` leads to none.

    The time of its entries can be set back, as by programs that copy folders with their times; that of its status can't.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 (pathlib takes twice as long)
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns) if stat.S_ISDIR(status.st_mode) else None
