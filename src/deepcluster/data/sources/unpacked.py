"""What a gzip'd file holds, as a file that can be read by ranges: unpacked once, into the cache."""

from __future__ import annotations

import json
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

from deepcluster.core.errors import InputError
from deepcluster.core.text import printable
from deepcluster.data.storage import ABANDONED_SECONDS, LocalFile, StoredFile, digest, written_beside

_PIECE: Final = 8 << 20
_SLICE: Final = 1 << 14  # It holds 17 MB at most (gzip saves a factor of 1,032), and so much at once is in memory.
_ABOUT_BYTES: Final = 4


class UnpackedFile(StoredFile):
    """What a gzip'd file holds, by the name and stamp of that file."""

    def __init__(self, packed: StoredFile, size: int, *, content: StoredFile | IO[bytes], problem: str) -> None:
        """Take the file that was unpacked, and the number of bytes that `content` holds of it.

        `problem` says what is wrong with the packed file, to follow its name; "" = nothing.
        """
        self.name, self.stamp, self.size = packed.name, packed.stamp, size
        self.problem = problem
        self.is_temporary = not isinstance(content, StoredFile)
        self._packed = packed
        self._content = content
        self._lock = threading.Lock()

    def read(self, start: int, length: int) -> bytes:
        length = max(0, min(length, self.size - start))
        if isinstance(self._content, StoredFile):
            return self._content.read(start, length)
        try:
            with self._lock:
                self._content.seek(start)
                return self._content.read(length)
        except OSError as error:
            raise InputError(f"what {self.where()} holds can't be read: {_reason(error)}") from error

    def where(self) -> str:
        return self._packed.where()

    def now(self) -> str:
        return self._packed.now()


def unpack(file: StoredFile, cache: Path, tell: Callable[[], None]) -> UnpackedFile:
    """Return what a gzip'd file holds: of one that is cut short or damaged, what comes before.

    It is kept in `cache`, and checked when it is taken from there; where that can't be written to, it becomes a temporary
    file without a name. `tell` is called now and then; it may raise to stop.
    Raises InputError where there is room nowhere.
    """
    path = cache / "unpacked" / f"{digest(file.where())}-{digest(file.stamp)}"
    kept = _kept(file, path, tell)
    if kept is not None:
        return kept
    try:
        return _unpack_to_cache(file, path, tell)
    except OSError as error:
        first = error
    try:
        scratch = tempfile.TemporaryFile()  # noqa: SIM115 (it is open as long as the source)
        size, _, problem = _write_unpacked(file, scratch, tell)
        scratch.flush()
    except OSError as error:
        # Its last 4 bytes are its size unpacked, which counts from 0 again each 4 GiB.
        size = int.from_bytes(file.read(file.size - 4, 4), "little")
        while 1.01 * size + 1000 < file.size:  # What can't be compressed grows a little.
            size += 1 << 32
        raise InputError(
            f"{file.where()} must be unpacked, and there is no room for about {size / 1e9:.1f} GB: "
            f"{path.parent}: {_reason(first)}; {tempfile.gettempdir()}: {_reason(error)}; make room, or name "
            "a folder that has it in the environment variable DEEPCLUSTER_CACHE"
        ) from error
    return UnpackedFile(file, size, content=scratch, problem=problem)


def _kept(file: StoredFile, path: Path, tell: Callable[[], None]) -> UnpackedFile | None:
    """Return what lies in the cache if it is as it was written: its last bytes say size and checksum."""
    try:
        with path.open("rb") as kept:
            kept.seek(-_ABOUT_BYTES, 2)
            end = kept.tell()
            length = int.from_bytes(kept.read(_ABOUT_BYTES), "big")
            kept.seek(end - length)
            about = json.loads(kept.read(length))
            size, crc, problem = int(about["size"]), 0, str(about["problem"])
            if size != end - length:
                return None
            kept.seek(0)
            while size and (part := kept.read(min(_PIECE, size))):
                crc, size = zlib.crc32(part, crc), size - len(part)
                tell()
        return UnpackedFile(file, end - length, content=LocalFile(path), problem=problem) if crc == about["crc"] else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, InputError):
        return None


def _unpack_to_cache(file: StoredFile, path: Path, tell: Callable[[], None]) -> UnpackedFile:
    """Write beside and rename; then what was unpacked of the file as it was before goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as beside, beside.open("wb") as target:
        size, crc, problem = _write_unpacked(file, target, tell)
        about = json.dumps({"size": size, "crc": crc, "problem": problem}).encode()
        target.write(about + len(about).to_bytes(_ABOUT_BYTES, "big"))
    for other in path.parent.glob(f"{digest(file.where())}-*"):
        with suppress(OSError):
            # Another process may be writing the same at this moment.
            if other != path and not (other.suffix == ".part" and time.time() - other.stat().st_mtime < ABANDONED_SECONDS):
                other.unlink()
    return UnpackedFile(file, size, content=LocalFile(path), problem=problem)


def _write_unpacked(file: StoredFile, target: IO[bytes], tell: Callable[[], None]) -> tuple[int, int, str]:
    """Return the number of bytes written, their checksum, and what is wrong with the file."""
    size = crc = 0
    problem = ""
    try:
        for part in _inflated(file):
            target.write(part)
            if size // _PIECE < (size + len(part)) // _PIECE:
                tell()
            size, crc = size + len(part), zlib.crc32(part, crc)
    except EOFError:
        problem = "is cut short"
    except zlib.error:
        problem = "is damaged"
    return size, crc, problem


def _inflated(file: StoredFile) -> Iterator[bytes]:
    """Yield what a gzip'd file holds, part by part; raises EOFError where it is cut short, zlib.error where damaged."""
    inflater = zlib.decompressobj(wbits=31)
    inside = True
    for start in range(0, file.size, _PIECE):
        piece = file.read(start, _PIECE)
        for first in range(0, len(piece), _SLICE):
            rest = piece[first : first + _SLICE]
            # Parts that were compressed one by one may follow each other, and zeros may fill up the file.
            while rest := rest if inside else rest.lstrip(b"\0"):
                inside = True
                before = inflater.copy()
                try:
                    part = inflater.decompress(rest)
                except zlib.error:  # Byte by byte, so that all that comes before is there when it is raised again.
                    yield from (before.decompress(rest[place : place + 1]) for place in range(len(rest)))
                    raise
                yield part
                rest = inflater.unused_data
                if inflater.eof:
                    inflater, inside = zlib.decompressobj(wbits=31), False
    if inside:
        yield inflater.flush()
        raise EOFError


def _reason(error: OSError) -> str:
    return printable(error.strerror or str(error)).lower()
