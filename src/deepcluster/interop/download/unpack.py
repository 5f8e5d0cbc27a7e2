"""Archives (zip, tar, gzip'd tar) from strangers: plain files in one folder, within limits; else nothing is accepted.

No path leads out of the folder, no links, devices or sparse files, no more bytes or files than are expected; permissions,
owners and times of the archive are ignored.
"""

import gzip
import os
import re
import stat
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from deepcluster.core.errors import InputError
from deepcluster.core.files import begin_of
from deepcluster.core.kinds import kind_of
from deepcluster.core.progress import Reporter
from deepcluster.core.text import count_of, size
from deepcluster.interop.download.disk import disk_fault

# The parts of a path in the archive → those in the folder; none: the file is left out.
Place = Callable[[tuple[str, ...]], tuple[str, ...]]
_PIECE_BYTES = 1 << 20
# No header of a tar is longer; what is asked for in one piece is held in memory.
_LONGEST_READ = 4 << 20
_LONGEST_NAME, _LONGEST_PATH, _DEEPEST = 255, 1000, 32
# Names that systems add: they hold no data.
_DEBRIS = re.compile(r"\._.*|\.DS_Store|__MACOSX|Thumbs\.db")
_DAMAGES = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, gzip.BadGzipFile, NotImplementedError)
_TAR_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
_MODES = {stat.S_IFLNK: "a symbolic link", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFIFO: "a pipe"}


class UnsafeArchive(InputError):
    """An archive holds what it should not, and is not unpacked."""


@dataclass(frozen=True)
class Limits:
    """What an archive may hold.

    Attributes:
        bytes: of all files together.
        files: number of files and folders.
        ratio: bytes for each byte of the archive.
    """

    bytes: int
    files: int
    ratio: float = 30.0


def as_it_is(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Keep the paths of the archive."""
    return parts


def without_top(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Leave out the folder that holds everything."""
    return parts[1:]


def into(folder: str, *endings: str) -> Place:
    """Put the files that have one of `endings` (all: none is given) into one folder, without the folders they were in."""

    def place(parts: tuple[str, ...]) -> tuple[str, ...]:
        return (folder, parts[-1]) if not endings or parts[-1].lower().endswith(endings) else ()

    return place


def unpack_archive(
    archive: Path, folder: Path, limits: Limits, *, place: Place = as_it_is, reporter: Reporter | None = None
) -> int:
    """Unpack an archive into a folder, which may hold what other archives gave, and return the number of files.

    What is unpacked stays there after an error: give a folder that is deleted then. A file that is there with the same
    content, as in two parts of a data set, is left alone.

    Raises:
        UnsafeArchive: it holds a path that leads elsewhere, a link, a device, names that differ only in capital letters,
            or more than `limits` allow.
        InputError: it is damaged or no archive.
        NoRoom: the disk is full.
    """
    work = _Unpacking(archive, folder, limits, place)
    begin = begin_of(archive)
    try:
        with (reporter or Reporter(quiet=True)).track(f"unpack {archive.name}", None, "files") as meter:
            if begin.startswith(b"PK"):
                work.unzip(meter)
            else:
                work.untar(meter, packed=begin.startswith(b"\x1f\x8b"))
    except _DAMAGES as fault:
        what = "damaged or cut short" if begin.startswith((b"PK", b"\x1f\x8b")) or b"ustar" in begin else "no archive"
        kind = f" ({fault})" if what != "no archive" else f": it is {kind_of(begin)}"
        raise InputError(f"{archive} is {what}{kind}; delete it to download it again") from fault
    except OSError as fault:
        raise disk_fault(fault, f"{fault.filename or folder} can't be written", "make room, then unpack it again") from fault
    return work.files


class _Unpacking:
    """One archive on its way into a folder."""

    def __init__(self, archive: Path, folder: Path, limits: Limits, place: Place) -> None:
        self.archive, self.folder, self.limits, self.place = archive, folder, limits, place
        packed = archive.stat().st_size
        self.most_bytes = min(limits.bytes, int(packed * limits.ratio) + (1 << 20))
        self.files = self.entries = self.bytes = 0
        self.spelled: dict[str, str] = {}
        self.folders = set[tuple[str, ...]]()

    def refuse(self, what: str) -> UnsafeArchive:
        return UnsafeArchive(f"{self.archive} is not unpacked: {what}")

    def unzip(self, meter: Callable[[int], None]) -> None:
        with zipfile.ZipFile(self.archive) as zipped:
            for info in zipped.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)
                if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise self.refuse(f"{info.filename} is {_MODES.get(kind, 'no regular file')}")
                if info.flag_bits & 1:
                    raise self.refuse(f"{info.filename} is encrypted")
                target = self.enter(info.filename, info.file_size, is_folder=info.is_dir())
                if target is not None:
                    with zipped.open(info) as content:
                        self.write(target, content, info.file_size)
                meter(1)

    def untar(self, meter: Callable[[int], None], *, packed: bool) -> None:
        with self.archive.open("rb") as raw:
            # Headers and padding add two blocks or so for each entry.
            most = self.most_bytes + 4096 * self.limits.files + (1 << 20)
            stream = _Bounded(gzip.GzipFile(fileobj=raw) if packed else raw, most, self.refuse)
            with tarfile.open(fileobj=stream, mode="r:", errorlevel=2) as tar:  # type: ignore[call-overload]
                while (member := tar.next()) is not None:
                    if not member.isdir() and (not member.isreg() or member.issparse()):
                        kind = "a sparse file" if member.isreg() else _TAR_KINDS.get(member.type, "no regular file")
                        raise self.refuse(f"{member.name} is {kind}")
                    target = self.enter(member.name, member.size, is_folder=member.isdir())
                    if target is not None:
                        self.write(target, stream, member.size)
                    tar.members.clear()  # It would keep all of them.
                    meter(1)
                if stream.last != bytes(tarfile.BLOCKSIZE):  # Where a header is damaged or missing, tarfile ends silently.
                    raise tarfile.ReadError("its end is missing")
                while stream.read(_PIECE_BYTES):  # To the checksum of gzip.
                    pass

    def enter(self, name: str, n_bytes: int, *, is_folder: bool) -> Path | None:
        """Check an entry, make its folder, and return where its content goes: None for a folder or one that is left out."""
        self.entries += 1
        if self.entries > self.limits.files:
            raise self.refuse(f"it holds more than the {count_of(self.limits.files, 'file')} that are expected")
        if n_bytes < 0 or self.bytes + n_bytes > self.most_bytes:
            raise self.refuse(f"it holds more than the {size(self.most_bytes)} that are expected")
        parts = self.parts(name)
        if any(_DEBRIS.fullmatch(part) for part in parts):
            return None
        parts = self.place(parts) if parts and not is_folder else ()
        if not parts:
            return None
        is_new = parts[:-1] not in self.folders
        for depth in range(1 if is_new else len(parts), len(parts) + 1):
            path = "/".join(parts[:depth])
            known = self.spelled.setdefault(unicodedata.normalize("NFC", path).casefold(), path)
            if known != path:
                raise self.refuse(f"{known} and {path} are the same file on many disks")
        target = self.folder.joinpath(*parts)
        if is_new:
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise self.refuse(f"{name} is in a folder that is also a file") from None
            self.folders.add(parts[:-1])
        return target

    def parts(self, name: str) -> tuple[str, ...]:
        """Return the parts of a path that stays in the folder."""
        parts = tuple(part for part in name.split("/") if part not in ("", "."))
        if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in parts or "\\" in name:
            raise self.refuse(f"{name!r} leads out of its folder")
        if re.search(r"[\x00-\x1f\x7f]", name):
            raise self.refuse(f"the name {name!r} has control characters")
        too_long = len(name) > _LONGEST_PATH or len(parts) > _DEEPEST
        if too_long or any(len(os.fsencode(part)) > _LONGEST_NAME for part in parts):
            raise self.refuse(f"the name {name[:60]!r}… is too long")
        return parts

    def write(self, target: Path, content: Any, n_bytes: int) -> None:
        """Write a file, or compare it with the one that is there."""
        self.files += 1
        left = n_bytes
        file: IO[bytes]
        try:
            file = target.open("xb")
        except FileExistsError:
            if target.is_dir():
                raise self.refuse(f"{target.relative_to(self.folder)} is a file and a folder") from None
            file = target.open("rb")
        with file:
            while left:
                piece = content.read(min(left, _PIECE_BYTES))
                if not piece:
                    raise EOFError(f"{target.name} ends after {n_bytes - left:,} of {n_bytes:,} bytes")
                left -= len(piece)
                self.bytes += len(piece)
                self.put(file, piece, target)
            if file.readable() and file.read(1):
                raise self.refuse(f"it holds two different files {target.relative_to(self.folder)}")

    def put(self, file: IO[bytes], piece: bytes, target: Path) -> None:
        if not file.readable():
            file.write(piece)
        elif file.read(len(piece)) != piece:
            raise self.refuse(f"it holds two different files {target.relative_to(self.folder)}")


class _Bounded:
    """A stream that is read forwards, to a limit, and never by much at once: a header may claim any size."""

    def __init__(self, stream: Any, most: int, refuse: Callable[[str], UnsafeArchive]) -> None:
        self.stream, self.most, self.refuse, self.name = stream, most, refuse, None
        self.last = b""

    def read(self, count: int) -> bytes:
        if not 0 <= count <= _LONGEST_READ:
            raise self.refuse(f"a header of it claims {size(abs(count))}")
        self.check(self.tell() + count)
        self.last = self.stream.read(count)
        return self.last

    def check(self, position: int) -> None:
        """Raise unless a position is within the limit, with the last block that a reader asks for."""
        if position > self.most + _LONGEST_READ:
            raise self.refuse(f"it holds more than the {size(self.most)} that are expected")

    def tell(self) -> int:
        return int(self.stream.tell())

    def seek(self, position: int) -> int:
        if position < self.tell():
            raise self.refuse("a header of it leads back")
        self.check(position)
        return int(self.stream.seek(position))
