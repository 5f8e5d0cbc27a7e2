"""What lies in the cache folder, for users to see and to delete."""

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.core.files import ABANDONED_SECONDS
from deepcluster.core.text import count_of, printable, size
from deepcluster.data.cache import ENDING
from deepcluster.data.pack import about_pack

_NAME = "[0-9a-f]{32}"
# The files of each kind: where they lie below its subfolder, and what they are.
KINDS = {
    "lists": (rf"{_NAME}\.npz", "listings of folders, which version 0.1.0 kept"),
    "shards": (_NAME, "where the images of tar files lie"),
    "unpacked": (rf"{_NAME}-{_NAME}(\.lock)?", "what gzip'd tar files hold"),
    "blocks": (f"[0-9a-f]{{2}}/{_NAME}", "parts of remote files"),
    "features": (rf"{_NAME}\.npy", "features of images, for `evaluate`"),
    "unfinished": (rf"{_NAME}(\.pt|/part-\d+\.pt)", "evaluations that were stopped, to be continued"),
    "images": (rf"[0-9a-f]{{16}}({re.escape(ENDING)}|/layout\.json|/images-\d+-\d+\.pixels)", "decoded images"),
}
_BEING_WRITTEN = r"(\.\d+-\d+\.part)?"


@dataclass(frozen=True)
class KeptThing:
    """What is kept of one kind; of decoded images, one pack.

    Attributes:
        kind: name of its subfolder (`KINDS`).
        path: its folder, or the pack.
        bytes: what its files take on the disk.
        files: how many there are.
        last_used: when one of them was last written or read, as far as the disk tells; seconds since 1970.
        about: what it is, in words.
    """

    kind: str
    path: Path
    bytes: int
    files: int
    last_used: float
    about: str

    def describe(self) -> str:
        """Return a line such as `images      1.2 GB in 1 file, used 2024-11-22: decoded images of /data/photos`."""
        day = time.strftime("%Y-%m-%d", time.localtime(self.last_used))
        return f"{self.kind:<10}  {size(self.bytes)} in {count_of(self.files, 'file')}, used {day}: {self.about}"


def kept(folder: Path) -> list[KeptThing]:
    """Return what this program keeps in a cache folder; nothing where there is none."""
    things = []
    for kind, (_, about) in KINDS.items():
        by_place: dict[Path, list[os.stat_result]] = {}
        for path, status in _files(folder, kind):
            is_pack = path.suffix == ENDING
            by_place.setdefault(path if is_pack else folder / kind, []).append(status)
        for place, states in sorted(by_place.items()):
            n_bytes = sum(status.st_size for status in states)
            # Each run that opens a pack sets its time of change; to read what it holds, as below, is no use of it.
            last_used = max(max(one.st_mtime, 0 if place.suffix == ENDING else one.st_atime) for one in states)
            what = printable(about_pack(place)) if place.suffix == ENDING else ""
            things.append(KeptThing(kind, place, n_bytes, len(states), last_used, what or about))
    return things


def clear(folder: Path, kinds: Sequence[str] = ()) -> int:
    """Delete what this program keeps in a cache folder, or some kinds of it, and return how many bytes that frees.

    Nothing else in it is touched, and links are not followed. Files that are being written stay. A run
    in progress makes again what it misses, but for what it has unpacked, which it can't read any more.

    Raises:
        InputError: there is no such kind.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"nothing called {kind!r} is kept{did_you_mean(kind, KINDS)}; there are {', '.join(KINDS)}")
    freed = 0
    for kind in kinds or KINDS:
        folders = {folder / kind}
        for path, status in list(_files(folder, kind)):
            if path.suffix == ".part" and time.time() - status.st_mtime < ABANDONED_SECONDS:
                continue
            with suppress(OSError):
                path.unlink()
                freed += status.st_size
            folders.add(path.parent)
        for emptied in sorted(folders, reverse=True):
            if not emptied.is_symlink():
                with suppress(OSError):  # Not empty, or not there.
                    emptied.rmdir()
    return freed


def _files(folder: Path, kind: str) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the files of a kind, by their names: any others are not this program's."""
    ours = re.compile(KINDS[kind][0] + _BEING_WRITTEN)
    for path, status in _walk(folder / kind, depth=KINDS[kind][0].count("/")):
        if ours.fullmatch(path.relative_to(folder / kind).as_posix()):
            yield path, status


def _walk(folder: Path, depth: int) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the files up to `depth` folders below a folder; no links, be they files or folders."""
    if folder.is_symlink():
        return
    with suppress(OSError):
        for entry in os.scandir(folder):
            with suppress(OSError):  # Deleted meanwhile.
                if depth and entry.is_dir(follow_symlinks=False):
                    yield from _walk(Path(entry.path), depth - 1)
                elif entry.is_file(follow_symlinks=False):
                    yield Path(entry.path), entry.stat(follow_symlinks=False)
