"""The members of a tar file, by its headers alone, and where it is cut short or damaged."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from typing import IO, Final, cast

from deepcluster.core.errors import DeepClusterError, InputError
from deepcluster.data.storage import StoredFile

_BLOCK: Final = tarfile.BLOCKSIZE
_LARGEST_HEADER: Final = 1 << 24  # Names and PAX records; a damaged length must not fill the memory.

# What people really have under the name of a tar file, by how it begins.
_NOT_TARS: Final = (
    (rb"BZh", "is compressed with bzip2, which is not supported; unpack it with bunzip2, or use gzip"),
    (rb"\xfd7zXZ", "is compressed with xz, which is not supported; unpack it with unxz, or use gzip"),
    (rb"\x28\xb5\x2f\xfd", "is compressed with zstd, which is not supported; unpack it with unzstd, or use gzip"),
    (rb"PK\x03\x04", "is a ZIP archive, no tar file; unpack it and give the folder"),
    (rb"version https://git-lfs", "is a Git LFS pointer, no tar file; fetch the data with `git lfs pull`"),
    (rb"\s*<(!doctype html|html|head|body)", "holds HTML, no tar file: perhaps the error page of a download"),
    (rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP", "is a single image, no tar file; give its folder, or a list of images"),
)


class TarMembers:
    """What a tar file holds, in its order; to be gone through once.

    Attributes:
        problem: after the last member, what is wrong with the file, to follow its name; "" = nothing.
    """

    def __init__(self, file: StoredFile, piece: int) -> None:
        """Open a tar file; raises InputError where it is none.

        `piece` is the number of bytes that are worth reading at once: as many as come in the time of two requests or so.
        """
        if not file.size:
            raise InputError(f"{file.where()} is empty (0 bytes); download it again")
        self.problem = ""
        self._file = file
        self._window = _Window(file, piece)
        try:
            window = cast(IO[bytes], self._window)
            self._tar = tarfile.TarFile(fileobj=window, encoding="utf-8", errors="surrogateescape")
        except (DeepClusterError, MemoryError):  # Nothing is wrong with the tar.
            raise
        except Exception as error:  # As below.
            begin = file.read(0, 512)
            known = (what for pattern, what in _NOT_TARS if re.match(pattern, begin, re.IGNORECASE | re.DOTALL))
            unknown = f"is no tar file, or damaged where it begins ({error}); download or make it again"
            raise InputError(f"{file.where()} {next(known, unknown)}") from error
        self._tar.offset = 0

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        while (member := self._next()) is not None:
            if has_content(member) and member.offset_data + member.size > self._file.size:
                self.problem = "is cut short"
                return
            yield member

    def content(self, member: tarfile.TarInfo) -> bytes:
        """Return what a small member holds."""
        self._window.seek(member.offset_data)
        return self._window.read(member.size)

    def _next(self) -> tarfile.TarInfo | None:
        """Return the member whose header is next; None at the end, and where there is no such header."""
        here = self._window.after_zeros(self._tar.offset)
        if here is None:
            self.problem = "" if self._tar.offset < self._file.size else "has no end mark, so it may be cut short"
            return None
        self._window.seek(here)
        try:
            # Not `next()` of the tar: it keeps all members, and takes a damaged header for the end.
            member = tarfile.TarInfo.fromtarfile(self._tar)
        except (DeepClusterError, MemoryError):
            raise
        # Not a list of types: on spoiled headers `tarfile` was seen to raise several.
        except Exception:
            self.problem = "is cut short" if self._window.met_the_end else "is damaged"
            return None
        # Sizes may be negative in this format, and lead round in circles.
        self.problem = "is damaged" if self._tar.offset <= here or member.size < 0 else ""
        return None if self.problem else member


def has_content(member: tarfile.TarInfo) -> bool:
    """Whether the content of a member lies behind its header as it is: not of links, devices and sparse files."""
    return member.isreg() and not member.issparse()


class _Window:
    """A position in a stored file, as `tarfile` wants one, over a piece of it in memory.

    Small members come in large pieces; a large member is hopped over.
    """

    def __init__(self, file: StoredFile, piece: int) -> None:
        self._file = file
        self._piece = piece
        self._position = self._start = 0
        self._held = b""
        self.met_the_end = False

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        self._position = position

    def read(self, length: int) -> bytes:
        if not 0 <= length <= _LARGEST_HEADER:
            raise tarfile.HeaderError(f"{length} bytes")
        offset = self._position - self._start
        if not 0 <= offset <= len(self._held) - length:
            # Behind a large member there may be another one.
            hopped = offset - len(self._held) > self._piece // 2
            wanted = min(max(length, self._piece // 32 if hopped else self._piece), self._file.size - self._position)
            self._start, offset = self._position, 0
            self._held = self._file.read(self._start, wanted) if wanted > 0 else b""
        found = self._held[offset : offset + length]
        self.met_the_end |= len(found) < length
        self._position += len(found)
        return found

    def after_zeros(self, start: int) -> int | None:
        """Return where the first block lies that is not all zeros, from `start` on; None at the end of the file.

        Two blocks of zeros are the end, but for tars that were put one behind the other.
        """
        self.seek(start)
        while block := self.read(_BLOCK):
            if block.strip(b"\0"):
                return self._position - len(block)
        return None
