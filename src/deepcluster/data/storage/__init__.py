"""Files that are read by ranges, on this machine or elsewhere."""

import io
from abc import ABC, abstractmethod
from pathlib import Path

from deepcluster.core.errors import InputError
from deepcluster.core.files import file_stamp, read_regular


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
