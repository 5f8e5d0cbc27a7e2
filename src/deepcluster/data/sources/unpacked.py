"""What a gzip'd file holds, as a file that can be read by ranges: unpacked once, into the cache."""

import gzip
import os
import shutil
import tempfile
import time
import weakref
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, cast

from deepcluster.core.errors import InputError
from deepcluster.core.files import ABANDONED_SECONDS, digest, file_stamp, locked, written_beside
from deepcluster.core.text import printable
from deepcluster.data.sources.tar_index import Window
from deepcluster.data.storage import LocalFile, StoredFile

_PIECE_BYTES = 8 << 20
_PART_BYTES = 1 << 14  # At most as much is lost before a damaged place.


class UnpackedFile(StoredFile):
    """What a gzip'd file holds, by the name and stamp of that file.

    A temporary copy is deleted with this object, or when the process that made it ends. It has a name, so that forked and
    spawned processes can read it too.

    Attributes:
        problem: what is wrong with the packed file, to follow its name; "" = nothing, or not known.
    """

    def __init__(self, packed: StoredFile, path: Path, *, problem: str = "", is_temporary: bool = False) -> None:
        self._packed, self._copy = packed, LocalFile(path)
        self.name, self.stamp, self.size = packed.name, packed.stamp, self._copy.size
        self.problem, self.is_temporary = problem, is_temporary
        self._was_restored = False
        if is_temporary:
            weakref.finalize(self, _delete_own, path.parent, os.getpid())

    def read(self, start: int, length: int) -> bytes:
        return self._copy.read(start, length)

    def where(self) -> str:
        return self._packed.where()

    def now(self) -> str:
        return self._packed.now()

    def read_checked(self, start: int, length: int, crc: int) -> bytes:
        """Return a range of known CRC-32; where the copy is damaged or gone, unpack the file again, but only once.

        Raises InputError where that does not help.
        """
        content = self._read_if_whole(start, length, crc)
        if content is None:
            with locked(self._copy.path), suppress(OSError):
                content = self._read_if_whole(start, length, crc)  # Another process may have unpacked it meanwhile.
                if content is None and not self._was_restored and self.now() == self.stamp:
                    self._was_restored = True
                    _write(self._packed, self._copy.path, lambda: None)
                    content = self._read_if_whole(start, length, crc)
        if content is None:
            raise InputError(f"what was unpacked of {self.where()} into {self._copy.path} is damaged; delete that file")
        return content

    def _read_if_whole(self, start: int, length: int, crc: int) -> bytes | None:
        try:
            content = self.read(start, length)
        except InputError:
            return None
        return content if zlib.crc32(content) == crc and len(content) == length else None


def unpack(file: StoredFile, cache: Path, size: int | None, report: Callable[[], None]) -> UnpackedFile:
    """Return what a gzip'd file holds: the copy in `cache` if it has this size, a new one or, without room, a temporary one.

    Of a file that is cut short or damaged, what comes before is there. `report` is called now and then; it may raise.
    Raises InputError where nothing can be unpacked or there is room nowhere.
    """
    path = cache / f"{digest(file.where())}-{digest(file.stamp)}"
    if file_stamp(path).partition("-")[0] == str(size):
        return UnpackedFile(file, path)
    reasons: list[str] = []
    for folder in (cache, Path(tempfile.gettempdir())):
        target = path
        try:
            if reasons:
                target = Path(tempfile.mkdtemp(prefix="deepcluster-", dir=folder), "unpacked")
            unpacked = UnpackedFile(file, target, problem=_write(file, target, report), is_temporary=bool(reasons))
            for other in cache.glob(f"{digest(file.where())}-*"):  # Of the file as it was before.
                with suppress(OSError):
                    is_over = other.suffix != ".part" or time.time() - other.stat().st_mtime > ABANDONED_SECONDS
                    if is_over and other != path:
                        other.unlink()
            return unpacked
        except OSError as error:
            reasons.append(f"{folder}: {printable(error.strerror or str(error)).lower()}")
        finally:
            with suppress(OSError):  # Where nothing is in it.
                target.parent.rmdir()
    # Its last 4 bytes are its size unpacked, which starts from 0 again after each 4 GiB.
    size = int.from_bytes(file.read(file.size - 4, 4), "little")
    while 1.01 * size + 1000 < file.size:  # What can't be compressed grows a little.
        size += 1 << 32
    raise InputError(
        f"{file.where()} must be unpacked, and there is no room for about {size / 1e9:.1f} GB: {'; '.join(reasons)}; make "
        "room, or name a folder that has it in the environment variable DEEPCLUSTER_CACHE"
    )


def _write(file: StoredFile, path: Path, report: Callable[[], None]) -> str:
    """Write what a gzip'd file holds, and return what is wrong with the file."""
    size, problem = 0, ""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as beside, beside.open("wb") as target:
        stream = gzip.GzipFile(fileobj=cast(IO[bytes], Window(file, _PIECE_BYTES)))
        try:
            while part := stream.read1(_PART_BYTES):
                size += target.write(part)
                if size % _PIECE_BYTES < len(part):
                    report()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            problem = "is cut short" if isinstance(error, EOFError) else "is damaged"
        if problem and not size:
            raise InputError(f"{file.where()} {problem}: nothing of it can be unpacked; download it again")
    return problem


def _delete_own(folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
