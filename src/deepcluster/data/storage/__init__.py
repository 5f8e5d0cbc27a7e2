"""Files that are read by ranges, wherever they lie, from many threads at once; the folder of what is slow to make again."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deepcluster.core.errors import InputError

CACHE_VARIABLE = "DEEPCLUSTER_CACHE"
# Older files that were never renamed are of processes that were killed.
ABANDONED_SECONDS = 3600.0


class StoredFile(ABC):
    """One file that does not change while it is open.

    Attributes:
        name: the last part of its path or address, or its path below what was opened; as people see it.
        size: in bytes.
        stamp: changes when the content does: size and time of change, or what a server gives in their place.
    """

    name: str
    size: int
    stamp: str

    @abstractmethod
    def read(self, start: int, length: int) -> bytes:
        """Return `length` bytes from `start` on; fewer at the end of the file.

        Raises InputError where the file is gone or can't be read (any longer).
        """

    @abstractmethod
    def where(self) -> str:
        """Return its full path or address, for messages and as a key."""

    @abstractmethod
    def now(self) -> str:
        """Return the stamp that it has at this moment; "" if it is gone."""

    def as_file(self) -> io.BufferedReader:
        """Return it as a file with a position, for libraries that want one."""
        return io.BufferedReader(_RawReader(self), buffer_size=1 << 16)


class LocalFile(StoredFile):
    """A file on this machine. It is opened for each range, so that ten thousand shards need no ten thousand handles."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        """Take its path; raises InputError where there is no file."""
        self.path = path.absolute()
        self.name = path.name if name is None else name
        self.stamp = file_stamp(path)
        if not self.stamp:
            raise InputError(f"{path} does not exist, or is not a regular file")
        self.size = int(self.stamp.partition("-")[0])

    def read(self, start: int, length: int) -> bytes:
        try:
            check_regular(self.path)
            with self.path.open("rb", buffering=0) as file:
                file.seek(start)
                parts = []
                while length > 0 and (part := file.read(length)):  # One call gives 2 GiB at most.
                    parts.append(part)
                    length -= len(part)
                return b"".join(parts)
        except OSError as error:
            raise InputError(f"{self.path} can't be read: {(error.strerror or str(error)).lower()}") from error

    def where(self) -> str:
        return str(self.path)

    def now(self) -> str:
        return file_stamp(self.path)


def file_stamp(path: Path) -> str:
    """Return size and time of change of a regular file as `10871-1732250000000000000`; "" where there is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}" if stat.S_ISREG(status.st_mode) else ""


def check_regular(path: str | Path) -> None:
    """Raise OSError where `path` leads to a named pipe, a socket or a device: opening one may wait for ever.

    Folders pass: to open one fails at once.
    """
    mode = os.stat(path).st_mode  # noqa: PTH116 (pathlib takes twice as long)
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError("not a regular file")


class _RawReader(io.RawIOBase):
    """A position in a stored file."""

    def __init__(self, file: StoredFile) -> None:
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        # Without the two copies of `readinto`: half the time to read a row group of 1 GB.
        rest = max(0, self._file.size - self._position)
        found = self._file.read(self._position, rest if size is None or size < 0 else min(size, rest))
        self._position += len(found)
        return found

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        found = self.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)


def usual_cache_folder() -> Path:
    """`$DEEPCLUSTER_CACHE`, else `deepcluster` in `$XDG_CACHE_HOME`, else `~/.cache/deepcluster`; it need not exist."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepcluster"
    except RuntimeError:  # A container whose user has no home.
        return Path(tempfile.gettempdir()) / "deepcluster-cache"


def write_whole(path: Path, content: bytes) -> bool:
    """Write a file of the cache beside and rename it, so that other processes see all of it or nothing.

    Returns False where that is impossible (a full disk, a folder that is read-only): then the work continues without it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as beside:
            beside.write_bytes(content)
    except OSError:
        return False
    return True


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Give the name of a file that is renamed to `path` at the end, or deleted where that is not reached."""
    beside = beside_of(path)
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def beside_of(path: Path) -> Path:
    """The name under which this thread writes what will be renamed to `path`."""
    return path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")


def digest(text: str) -> str:
    """Return 32 hex digits that stand for a text, as in names of files of the cache."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
