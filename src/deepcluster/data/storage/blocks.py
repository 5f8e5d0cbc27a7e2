"""Parts of remote files, fetched once and kept on disk within a bound; the least recently used are deleted first."""

import errno
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from pathlib import Path
from weakref import WeakSet

from deepcluster.core.files import ABANDONED_SECONDS, digest, read_regular, written_beside

MOST_BYTES = 20 << 30
MEMORY_BYTES = 64 << 20  # of blocks that can't be written
_CHECK_BYTES = 4
_TOUCH_SECONDS = 60.0


class BlockStore:
    """Blocks of bytes by key, in files of a folder that several processes may share; it can be pickled and forked.

    One thread of a process makes a block while the others that want it wait for its block or its error. A file is complete
    or absent, and damage is noticed by a checksum. The last blocks that can't be written are held in memory.

    Attributes:
        complaint: why blocks are not kept on disk; None while they are.
        most_bytes: the bound on disk; each process that shares the folder may exceed it by 1/32.
    """

    def __init__(self, folder: Path, most_bytes: int | None = None) -> None:
        """Keep at most `most_bytes` in `folder`, made when needed; None: 20 GiB or a quarter of the free disk, if less."""
        if most_bytes is None:
            there = next(each for each in (folder, *folder.absolute().parents) if os.path.exists(each))  # noqa: PTH110
            most_bytes = min(MOST_BYTES, shutil.disk_usage(there).free // 4)
        self.folder, self.most_bytes = folder, most_bytes
        self._start()

    def _start(self) -> None:
        """Begin with what belongs to one process."""
        self.complaint: str | None = None
        self._lock = threading.Lock()
        self._making: dict[str, Future[bytes]] = {}
        self._held: dict[str, bytes] = {}
        self._checked: set[str] = set()  # Names of files whose checksum was right.
        self._left = -1  # Bytes that may be written before the folder is searched.
        _stores.add(self)

    def __reduce__(self) -> tuple[type["BlockStore"], tuple[Path, int]]:
        return BlockStore, (self.folder, self.most_bytes)

    def get(self, key: str, make: Callable[[], bytes]) -> bytes:
        """Return the block of `key`, made by `make` if it is not there yet; what `make` raises is raised."""
        name, mine = digest(key), Future[bytes]()
        while (making := self._making.setdefault(name, mine)) is not mine:
            with suppress(CancelledError):  # Its maker was interrupted: this thread may be the next.
                return making.result()
        try:
            content = self._held.get(name)
            if content is None:
                content = self._from_disk(name)
            if content is None:
                content = make()
                self._keep(name, content)
            mine.set_result(content)
            return content
        except Exception as error:
            mine.set_exception(error)
            raise
        finally:
            del self._making[name]
            mine.cancel()  # After an interruption; it does nothing to a result.

    def part(self, key: str, start: int, stop: int, make: Callable[[], bytes]) -> bytes:
        """Return the bytes `start` to `stop` of the block of `key`; only these are read once the block was checked."""
        name = digest(key)
        if name in self._checked:
            with suppress(OSError):
                found = read_regular(self._path(name), start, stop - start)
                self._mark_used(name)
                if len(found) == stop - start:
                    return found
        whole = self.get(key, make)
        if name not in self._held:
            self._checked.add(name)
        return whole[start:stop]

    def _path(self, name: str) -> str:
        return f"{self.folder}/{name[:2]}/{name}"

    def _mark_used(self, name: str) -> None:
        with suppress(OSError):  # A folder that may only be read.
            if time.time() - os.stat(self._path(name)).st_mtime > _TOUCH_SECONDS:  # noqa: PTH116
                os.utime(self._path(name))

    def _from_disk(self, name: str) -> bytes | None:
        """Return a block if its file is there, and its checksum right."""
        try:
            whole = read_regular(self._path(name))
            content = whole[:-_CHECK_BYTES]
            if whole[-_CHECK_BYTES:] != _checksum(name, content):
                os.unlink(self._path(name))  # noqa: PTH108
                return None
        except OSError:
            return None
        self._mark_used(name)
        return content

    def _keep(self, name: str, content: bytes) -> None:
        """Write the file of a block, or hold it in memory if that is impossible."""
        path, size = Path(self._path(name)), len(content) + _CHECK_BYTES
        for scarce in (False, True):
            if size > self.most_bytes or self.complaint is not None:
                break
            try:
                self._make_room(size, scarce)
                path.parent.mkdir(parents=True, exist_ok=True)
                with written_beside(path) as beside:
                    beside.write_bytes(content + _checksum(name, content))
                return
            except OSError as error:
                if scarce or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOENT):  # Others fill or empty it.
                    self.complaint = f"{self.folder} can't be written to ({(error.strerror or str(error)).lower()})"
        with self._lock:
            self._held[name] = content
            while len(self._held) > 1 and sum(map(len, self._held.values())) > MEMORY_BYTES:
                del self._held[next(iter(self._held))]

    def _make_room(self, size: int, scarce: bool) -> None:
        """Delete the least recently used blocks if `size` bytes more would pass the bound; half of all if `scarce`."""
        with self._lock:
            self._left -= size
            if self._left >= 0 and not scarce:
                return
            files = []
            for folder, _, names in os.walk(self.folder):
                for path in (os.path.join(folder, name) for name in names):  # noqa: PTH118 (there may be 100,000)
                    with suppress(OSError):  # Other processes delete some meanwhile.
                        status = os.stat(path)  # noqa: PTH116
                        files.append((status.st_mtime, status.st_size, path))
            kept = sum(length for _, length, _ in files)
            bound = kept // 2 if scarce else self.most_bytes - size
            if kept > bound:
                bound -= bound // 8  # So that the next blocks find room.
            for used, length, path in sorted(files):
                if kept <= bound:
                    break
                if not path.endswith(".part") or used < time.time() - ABANDONED_SECONDS:
                    with suppress(OSError):  # Deleted by another process, or in use on a system that minds.
                        os.unlink(path)  # noqa: PTH108
                    kept -= length
            self._left = min(max(0, self.most_bytes - size - kept), self.most_bytes // 32)


def _checksum(name: str, content: bytes) -> bytes:
    """Return the checksum of a block and its name: a file of zeros, as crashes leave, is never valid."""
    return zlib.crc32(content, zlib.crc32(name.encode())).to_bytes(_CHECK_BYTES, "big")


_stores: WeakSet[BlockStore] = WeakSet()
if hasattr(os, "register_at_fork"):  # Another thread may have held a lock.
    os.register_at_fork(after_in_child=lambda: list(map(BlockStore._start, list(_stores))))
