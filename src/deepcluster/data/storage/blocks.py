"""Parts of files that take long to get: made once and kept on the disk within a bound; the longest unused ones go first."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from pathlib import Path
from typing import Final

import pyarrow as pa

from deepcluster.data.storage import ABANDONED_SECONDS, digest, written_beside

MOST_BYTES: Final = 20 << 30
# Held in memory: a few blocks of 4 MiB for each of many threads. Files are read, not mapped: what another machine deletes
# from a shared folder would be a signal in a mapped file, and is an error, so a block to be made again, in a read one.
MEMORY_BYTES: Final = 64 << 20
_FREE_SHARE: Final = 4
_CHECK_BYTES: Final = 4
_LARGE_BYTES: Final = 1 << 20
# A look at all files takes up to a second for 100,000 of them. It is due after this share of the bound was written,
# since other processes write, too; then an eighth more than is needed goes, so that the next blocks find room.
_LOOK_SHARE: Final = 32
_SPARE_SHARE: Final = 8
_TOUCH_SECONDS: Final = 60.0
_TRY_AGAIN_SECONDS: Final = 300.0


class BlockStore:
    """Blocks of bytes by key, in files of a folder that several processes may share.

    Safe to use from many threads: each block is made by one of them while the others that want it wait, and get its block
    or its error. Two processes may both make a block; each file is complete or absent. A block that is damaged (a checksum
    tells, when a process first reads it) is made again.

    Where the folder can't be written to, or a block is larger than the bound, the last few blocks are kept in memory alone;
    of a folder, `complaint` says why, and every few minutes it is tried again.

    Attributes:
        complaint: why blocks are not kept on the disk; None while they are.
        most_bytes: the bound on the disk. Processes that share the folder look at all of it now and then, so that together
            they may pass the bound by 1/32 of it each.
    """

    def __init__(self, folder: Path, most_bytes: int | None = None) -> None:
        """Keep blocks in `folder`, made when it is needed, of at most `most_bytes` in all.

        Without a bound it is 20 GiB, or a quarter of what is free on that disk where that is less.
        """
        self.folder = folder
        self.most_bytes = _usual_bound(folder) if most_bytes is None else most_bytes
        self.complaint: str | None = None
        self._lock = threading.Lock()
        self._held: OrderedDict[str, pa.Buffer] = OrderedDict()
        self._held_bytes = 0
        self._making: dict[str, Future[pa.Buffer]] = {}
        # When the files whose checksum was right were last marked as used: what is in memory, and large blocks.
        self._touched: dict[str, float] = {}
        self._looking = threading.Lock()
        self._kept_bytes: int | None = None
        self._written_since = 0
        self._try_again_at = 0.0

    @property
    def room(self) -> int:
        """How many bytes can be kept for later."""
        return MEMORY_BYTES if self.complaint else max(MEMORY_BYTES, self.most_bytes)

    def get(self, key: str, make: Callable[[], bytes | pa.Buffer]) -> pa.Buffer:
        """Return the block of `key`, made by `make` where it is not there yet; what `make` raises is raised."""
        name = digest(key)
        while True:
            with self._lock:
                held = self._held.get(name)
                making = self._making.get(name)
                if held is None and making is None:
                    mine = self._making[name] = Future()
            if held is not None:
                self._note_use(name)
                return held
            if making is None:
                return self._fill(name, make, mine)
            with suppress(CancelledError):  # Its maker was interrupted: this thread may be the next.
                return making.result()

    def part(self, key: str, start: int, stop: int, make: Callable[[], bytes | pa.Buffer]) -> bytes:
        """Return the bytes `start` to `stop` of the block of `key`, of which only these are read once it was checked."""
        name = digest(key)
        if name in self._touched and name not in self._held:
            with suppress(OSError), self._path(name).open("rb", buffering=0) as file:
                file.seek(start)
                found = file.read(stop - start)
                if len(found) == stop - start:
                    self._note_use(name)
                    return found
        return bytes(memoryview(self.get(key, make))[start:stop])

    def find(self, key: str) -> pa.Buffer | None:
        """Return the block of `key` if it is there."""
        name = digest(key)
        with self._lock:
            held = self._held.get(name)
        if held is None and (held := self._from_disk(name)) is not None:
            self._hold(name, held)
        return held

    def _fill(self, name: str, make: Callable[[], bytes | pa.Buffer], mine: Future[pa.Buffer]) -> pa.Buffer:
        """Take the block from the disk or make it, and tell the threads that wait for `mine`."""
        try:
            content = self._from_disk(name)
            if content is None:
                content = pa.py_buffer(make())
                self._write(name, content)
            self._hold(name, content)
        except BaseException as error:
            with self._lock:
                del self._making[name]
            if isinstance(error, Exception):
                mine.set_exception(error)
            else:
                mine.cancel()
            raise
        with self._lock:
            del self._making[name]
        mine.set_result(content)
        return content

    def _hold(self, name: str, content: pa.Buffer) -> None:
        """Keep a block in memory in the place of those used longest ago."""
        with self._lock:
            self._drop(name)
            self._held[name] = content
            self._held_bytes += content.size
            self._touched[name] = time.monotonic()
            while self._held_bytes > MEMORY_BYTES and len(self._held) > 1:
                self._drop(next(iter(self._held)))

    def _drop(self, name: str) -> None:
        """Forget a block, but of a large one, of which parts may be read later, not that it was checked."""
        content = self._held.pop(name, None)
        if content is not None:
            self._held_bytes -= content.size
            if content.size < _LARGE_BYTES:
                del self._touched[name]

    def _note_use(self, name: str) -> None:
        """Mark a block as used, on the disk once a minute: what is used all the time must not look forgotten."""
        now = time.monotonic()
        with self._lock:
            if name in self._held:
                self._held.move_to_end(name)
            if now - self._touched.get(name, now) <= _TOUCH_SECONDS:
                return
            self._touched[name] = now
        with suppress(OSError):
            os.utime(self._path(name))

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name

    def _from_disk(self, name: str) -> pa.Buffer | None:
        path = self._path(name)
        try:
            whole = pa.py_buffer(path.read_bytes())
            content = whole.slice(0, max(0, whole.size - _CHECK_BYTES))
            if whole.slice(content.size).to_pybytes() != _checksum(name, content):
                path.unlink(missing_ok=True)
                return None
            with suppress(OSError):  # A folder of another person, that may only be read.
                os.utime(path)
        except OSError:
            return None
        return content

    def _write(self, name: str, content: pa.Buffer) -> None:
        """Write the file of a block where that is possible."""
        size = content.size + _CHECK_BYTES
        if size > self.most_bytes or time.monotonic() < self._try_again_at:
            return
        self._make_room(size)
        try:
            try:
                self._write_file(name, content)
            except FileNotFoundError:  # The folder was deleted meanwhile.
                self._write_file(name, content)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                there = sum(status.st_size for _, status in _files_below(self.folder))
                with self._looking:  # Others fill the disk: give them half of what is kept here.
                    self._kept_bytes, self._written_since = self._look_while_held(there // 2), 0
                self._write_file(name, content)
        except OSError as error:
            self.complaint = f"{self.folder} can't be written to ({(error.strerror or str(error)).lower()})"
            self._try_again_at = time.monotonic() + _TRY_AGAIN_SECONDS
        else:
            self.complaint = None

    def _write_file(self, name: str, content: pa.Buffer) -> None:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as beside, beside.open("wb") as file:
            file.write(content)
            file.write(_checksum(name, content))

    def _make_room(self, size: int) -> None:
        """Delete blocks where `size` more bytes would pass the bound."""
        with self._looking:
            self._written_since += size
            if self._kept_bytes is not None:
                self._kept_bytes += size
                if self._kept_bytes <= self.most_bytes and self._written_since <= self.most_bytes // _LOOK_SHARE:
                    return
            self._kept_bytes = self._look_while_held(self.most_bytes - size) + size
            self._written_since = 0

    def _look_while_held(self, bound: int) -> int:
        """Delete the blocks that were used longest ago if all are more than `bound` bytes; return how many are left."""
        found = []
        kept = 0
        abandoned = time.time() - ABANDONED_SECONDS
        for entry, status in _files_below(self.folder):
            if not entry.name.endswith(".part"):
                found.append((status.st_mtime_ns, status.st_size, entry))
            elif status.st_mtime < abandoned:  # Its process was killed while it wrote.
                with suppress(OSError):
                    os.unlink(entry.path)  # noqa: PTH108 (an entry is no Path, and there may be 100,000)
                continue
            kept += status.st_size
        if kept <= bound:
            return kept
        found.sort(key=lambda item: item[:2])
        for _, size, entry in found:
            if kept <= bound - bound // _SPARE_SHARE:
                break
            with suppress(FileNotFoundError):  # Another process was faster.
                try:
                    os.unlink(entry.path)  # noqa: PTH108
                except OSError:  # In use, on systems that mind.
                    continue
            kept -= size
        return kept


def _files_below(folder: Path) -> Iterator[tuple[os.DirEntry[str], os.stat_result]]:
    """Yield each file of a folder of blocks; other processes may make and delete some meanwhile."""
    with suppress(OSError):
        for inner in os.scandir(folder):
            with suppress(OSError):
                for entry in os.scandir(inner.path):
                    with suppress(OSError):
                        yield entry, entry.stat()


def _checksum(name: str, content: pa.Buffer) -> bytes:
    """Return the checksum of a block and its name: so a file of zeros, as crashes leave, is never valid."""
    return zlib.crc32(content, zlib.crc32(name.encode())).to_bytes(_CHECK_BYTES, "big")


def _usual_bound(folder: Path) -> int:
    for there in (folder, *folder.absolute().parents):
        with suppress(OSError):
            return min(MOST_BYTES, shutil.disk_usage(there).free // _FREE_SHARE)
    return MOST_BYTES
