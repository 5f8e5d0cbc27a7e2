"""What lies in the cache folder, for people to see and to delete."""

import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Final

from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.core.text import count_of, printable, size
from deepcluster.data.image_shards import LAYOUT
from deepcluster.data.storage import ABANDONED_SECONDS

_NAME: Final = "[0-9a-f]{32}"
# The files of each kind: where they lie below its subfolder, and what they are.
KINDS: Final = {
    "lists": (rf"{_NAME}\.npz", "listings of folders, which version 0.1.0 kept"),
    "shards": (_NAME, "where the images of tar files lie"),
    "unpacked": (f"{_NAME}-{_NAME}", "what gzip'd tar files hold"),
    "blocks": (f"[0-9a-f]{{2}}/{_NAME}", "parts of remote and of compressed files"),
    "features": (rf"{_NAME}\.npy", "features of images, for `evaluate`"),
    "unfinished": (rf"{_NAME}\.pt", "evaluations that were stopped, to be gone on with"),
    "images": (rf"[0-9a-f]{{16}}/({re.escape(LAYOUT)}|images-\d+-\d+\.pixels)", "decoded images"),
}
_BEING_WRITTEN: Final = r"(\.\d+-\d+\.part)?"


@dataclass(frozen=True)
class KeptThing:
    """What is kept of one kind; of decoded images, of one set of data at one size.

    Attributes:
        kind: name of its subfolder (`KINDS`).
        path: its folder.
        bytes: what its files take.
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
        """The line that people read: `images      1.2 GB in 20 files, used 2024-11-22: decoded images of /data/photos`."""
        day = time.strftime("%Y-%m-%d", time.localtime(self.last_used))
        return f"{self.kind:<10}  {size(self.bytes)} in {count_of(self.files, 'file')}, used {day}: {self.about}"


def kept(folder: Path) -> list[KeptThing]:
    """What this program keeps in a cache folder; nothing where there is none."""
    things = []
    for kind, (_, about) in KINDS.items():
        # Decoded images by the folder that is theirs alone.
        files = sorted(_files(folder, kind), key=lambda file: file[0].parent if kind == "images" else folder / kind)
        for path, group in groupby(files, key=lambda file: file[0].parent if kind == "images" else folder / kind):
            states = [status for _, status in group]
            n_bytes = sum(status.st_size for status in states)
            last_used = max(max(status.st_mtime, status.st_atime) for status in states)
            what = _about_images(path) if kind == "images" else about
            things.append(KeptThing(kind, path, n_bytes, len(states), last_used, what))
    return things


def clear(folder: Path, kinds: Sequence[str] = ()) -> int:
    """Delete what this program keeps in a cache folder, or some kinds of it, and return how many bytes that frees.

    Nothing else in it is touched, and links are not followed. Files that are being written stay. A run that is going on
    makes anew what it misses, but for what it has unpacked: that can't be read any more by a run that uses it.
    Raises InputError where there is no such kind.
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
    """The files of a kind, by their names: any others are not this program's."""
    ours = re.compile(KINDS[kind][0] + _BEING_WRITTEN)
    for path, status in _walk(folder / kind, depth=KINDS[kind][0].count("/")):
        if ours.fullmatch(path.relative_to(folder / kind).as_posix()):
            yield path, status


def _walk(folder: Path, depth: int) -> Iterator[tuple[Path, os.stat_result]]:
    """The files `depth` folders below a folder; no links, be they files or folders."""
    if folder.is_symlink():
        return
    with suppress(OSError):
        for entry in os.scandir(folder):
            with suppress(OSError):  # Deleted meanwhile.
                if depth and entry.is_dir(follow_symlinks=False):
                    yield from _walk(Path(entry.path), depth - 1)
                elif not depth and entry.is_file(follow_symlinks=False):
                    yield Path(entry.path), entry.stat(follow_symlinks=False)


def _about_images(folder: Path) -> str:
    """What a layout says of the decoded images beside it."""
    try:
        layout = json.loads((folder / LAYOUT).read_bytes())
        data, reduce_to = [str(one) for one in layout["data"]], int(layout["reduce_to"])
    except (OSError, ValueError, KeyError, TypeError):
        return "decoded images of unknown data"
    at_most = f", at most {reduce_to} pixels on the shorter side" if reduce_to else ""
    return printable(f"decoded images of {', '.join(data)}{at_most}")
