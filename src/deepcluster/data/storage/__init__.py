"""Files that are read by ranges, on this machine or elsewhere; the cache folder and how files are written into it."""

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
# Older files that were never renamed belong to processes that were killed.
ABANDONED_SECONDS = 3600.0
# A named pipe is opened without waiting for its writer.
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class StoredFile(ABC):
    """One file that does not change while it is open; it can be pickled and read from many threads.

    Attributes:
        name: the last part of its path or address, or its path below what was opened, as shown to the user.
        size: in bytes.
        stamp: changes when the content does: size and modification time, or what a server gives instead.
    """

    name: str
    size: int
    stamp: str

    @abstractmethod
    def read(self, start: int, length: int) -> bytes:
        """Return `length` bytes from `start` on; fewer at the end of the file.

        Raises:
            InputError: the file is gone, has changed or can't be read.
        """

    @abstractmethod
    def where(self) -> str:
        """Return its full path or address, for messages and as a key."""

    @abstractmethod
    def now(self) -> str:
        """Return its present stamp; "" if it is gone."""

    def as_file(self) -> io.BufferedReader:
        """Return it as a file with a position, for libraries that want one."""
        return io.BufferedReader(_RawReader(self), buffer_size=1 << 16)


class LocalFile(StoredFile):
    """A file on this machine. It is opened for each range: ten thousand shards need no ten thousand handles."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        """Raise InputError where there is no regular file at `path`."""
        self.path = path.absolute()
        self.name = path.name if name is None else name
        self.stamp = file_stamp(path)
        if not self.stamp:
            raise InputError(f"{path} does not exist, or is not a regular file")
        self.size = int(self.stamp.partition("-")[0])

    def read(self, start: int, length: int) -> bytes:
        try:
            return read_regular(self.path, start, max(0, min(length, self.size - start)))
        except OSError as error:
            raise InputError(f"{self.path} can't be read: {(error.strerror or str(error)).lower()}") from error

    def where(self) -> str:
        return str(self.path)

    def now(self) -> str:
        return file_stamp(self.path)


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


def read_regular(path: str | Path, start: int = 0, length: int | None = None) -> bytes:
    """Return `length` bytes of a file from `start` on, or all; raise OSError as `check_regular`, or if it can't be read."""
    try:
        handle = os.open(path, _OPEN_FLAGS)
    except OSError:
        check_regular(path)  # A socket can't be opened.
        raise
    try:
        status = os.fstat(handle)
        _check_mode(status.st_mode)
        left = status.st_size if length is None else length
        if start:
            os.lseek(handle, start, os.SEEK_SET)
        content = os.read(handle, left)
        while len(content) < left and (more := os.read(handle, left - len(content))):  # One call gives 2 GiB at most.
            content += more
        return content
    finally:
        os.close(handle)


def check_regular(path: str | Path) -> None:
    """Raise OSError for a named pipe, a socket or a device: opening one may wait for ever."""
    _check_mode(os.stat(path).st_mode)  # noqa: PTH116 (pathlib takes twice as long)


def _check_mode(mode: int) -> None:
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # To read a folder fails at once.
        raise OSError("not a regular file")


def file_stamp(path: str | Path) -> str:
    """Return size and modification time of a regular file as `10871-1732250000000000000`; "" where there is none."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}" if stat.S_ISREG(status.st_mode) else ""


def usual_cache_folder() -> Path:
    """Return `$DEEPCLUSTER_CACHE`, else `deepcluster` in `$XDG_CACHE_HOME` or `~/.cache`; it need not exist."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepcluster"
    except RuntimeError:  # A container whose user has no home.
        return Path(tempfile.gettempdir()) / "deepcluster-cache"


def write_whole(path: Path, content: bytes) -> bool:
    """Write a file so that other processes see all of it or nothing; return False where it can't be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as beside:
            beside.write_bytes(content)
    except OSError:
        return False
    return True


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Yield the name of a file that is renamed to `path` at the end, or deleted after an error."""
    beside = beside_of(path)
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def beside_of(path: Path) -> Path:
    """Return the name under which this thread writes what will be renamed to `path`."""
    return path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")


def digest(text: str) -> str:
    """Return 32 hex digits that stand for a text, as in names of files of the cache."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
