"""A pack: the decoded images of one source in one file, each with a checksum, filled by any number of processes.

N images, M of a part, H height, W width. The file is a header, a row of `ROW` for each image, and pixels in any order.
A process that fills a part claims its rows, decodes what is missing, appends the pixels, and writes the rows last. So the
file is valid at every moment: after a crash, filling continues where it ended, and what was torn does not fit its checksum
and is decoded again. Locks are those of the operating system, which end with their process.
"""

import errno
import fcntl
import mmap
import os
import sys
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.shared_memory import SharedFile
from deepcluster.core.text import size

Pixels = NDArray[np.uint8]

# Where the pixels of an image start, its height and width (0: it is missing), what its file was like, and the checksum.
ROW = np.dtype([("start", "<i8"), ("height", "<i4"), ("width", "<i4"), ("stamp", "<u8"), ("sum", "<u4"), ("spare", "<u4")])
# The first page: mark, N, and what the pack holds, in words. Rows follow.
_HEADER = np.dtype([("mark", "S8"), ("count", "<i8"), ("about", "S4080")])
_MARK = b"DCPACK1"
_PAGE = 4096
_WRITTEN_TOGETHER = 16 << 20
# Left free on a disk, for checkpoints and tables.
DISK_RESERVE = 1 << 30
# A mapping that may be written to, as torch wants arrays to be, without reserving memory for it. Nothing writes to it.
_PRIVATE = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if hasattr(os, "memfd_create") else 0)


class Pack:
    """Decoded images by index; safe to use in many processes at once.

    Args:
        place: path of the file, which is made where it is missing or is no pack of `count` images; or memory of the machine.
        count: N.
        about: what it holds, for `cache info`.
        most_bytes: of a pack in memory, size of the pixels above which no more images are added; None on a disk.

    Attributes:
        complaint: why no more images can be added; "" while they can.
        n_damaged: number of images that did not fit their checksum, as far as this process has met them.
    """

    def __init__(self, place: Path | SharedFile, count: int, about: str = "", most_bytes: int | None = None) -> None:
        self.count = count
        self.most_bytes = sys.maxsize if most_bytes is None and isinstance(place, SharedFile) else most_bytes
        self.path = Path(place.path) if isinstance(place, SharedFile) else place
        # The checksums that images were found to fit, by any of the processes.
        checked = SharedFile(4 * max(1, count))
        self._checked_path, self._alive = checked.path, (place, checked)
        self._first = -(-(_HEADER.itemsize + count * ROW.itemsize) // _PAGE) * _PAGE
        self._create(place, about)
        self._open()
        with suppress(OSError):  # The last use, which `cache info` shows.
            os.utime(self._file)

    def __getstate__(self) -> dict[str, object]:
        own = ("count", "most_bytes", "path", "_checked_path", "_first")
        return {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._open()

    def __len__(self) -> int:
        return self.count

    def get(self, index: int, stamp: Callable[[int], str] | None = None) -> Pixels | None:
        """Return an image (H, W, 3), which shares the memory of the pack; None where it is missing or damaged.

        Args:
            stamp: as for `fill`; None is also returned where the file has changed since. Looked at for the first time only.
        """
        start, height, width, stamped, checksum, _ = self._rows[index].item()
        if not height:
            return None
        stop = start + height * width * 3
        if stop > len(self._bytes):
            self._map()
        pixels = self._bytes[start:stop]
        if not checksum or self._checked_N[index] != checksum:
            is_inside = min(height, width) > 0 and self._first <= start and stop <= len(self._bytes)
            if not is_inside or _checksum(pixels, height, width) != checksum:
                with suppress(OSError):  # Now it counts as missing, and is counted once.
                    os.pwrite(self._file, bytes(ROW.itemsize), self._place_of(index))
                    self.n_damaged += 1
                return None
            if stamp is not None and _numbers([stamp(index)])[0] != stamped:
                return None
            self._checked_N[index] = checksum
        return pixels.reshape(height, width, 3)

    def gather(
        self, indices_B: NDArray[np.int64], most_side: int, stamp: Callable[[int], str] | None = None
    ) -> Pixels | None:
        """Return copies of images (B, H, W, 3), if they are all there and of one size with sides up to `most_side`."""
        rows_B = self._rows[indices_B]
        sides_B2 = np.stack([rows_B["height"], rows_B["width"]], 1)
        if not len(rows_B) or not 0 < sides_B2[0].max() <= most_side or (sides_B2 != sides_B2[0]).any():
            return None
        new_B = (rows_B["sum"] == 0) | (self._checked_N[indices_B] != rows_B["sum"])
        if any(self.get(index, stamp) is None for index in indices_B[new_B].tolist()):
            return None
        shape = int(sides_B2[0, 0]), int(sides_B2[0, 1]), 3
        n_bytes = shape[0] * shape[1] * 3
        if int(rows_B["start"].max()) + n_bytes > len(self._bytes):
            self._map()
        places_B, rest_B = np.divmod(rows_B["start"] - self._first, n_bytes)
        if rest_B.any():  # Images of other sizes lie between them.
            return np.stack([self._bytes[start : start + n_bytes].reshape(shape) for start in rows_B["start"].tolist()])
        stop = len(self._bytes) - (len(self._bytes) - self._first) % n_bytes
        return self._bytes[self._first : stop].reshape(-1, *shape)[places_B]

    @property
    def sizes_N2(self) -> NDArray[np.int32]:
        """Height and width of each image; 0 where it is missing."""
        return np.stack([self._rows["height"], self._rows["width"]], 1)

    @property
    def starts_N(self) -> NDArray[np.int64]:
        """Where in `pixels` each image begins."""
        return self._rows["start"] - self._first

    @property
    def pixels(self) -> Pixels:
        """The pixels of all images in one piece, which shares the memory of the pack."""
        self._map()
        return self._bytes[self._first : len(self._bytes) - (len(self._bytes) - self._first) % 3]

    def fill(
        self, indices: range, stamp: Callable[[int], str], decode: Callable[[int], Pixels | None], *, wait: bool = True
    ) -> bool:
        """Add the images of a part that are missing, or whose files have changed since.

        Args:
            stamp: returns what changes with the file of an image.
            decode: returns the image (H, W, 3), uint8; None where it can't be read.
            wait: wait where another process fills this part at the moment.

        Returns:
            False where another process fills this part, and was not waited for.
        """
        part = slice(indices.start, indices.stop)
        stamps_M = _numbers(map(stamp, indices))
        if ((self._rows["height"][part] > 0) & (self._rows["stamp"][part] == stamps_M)).all():
            return True
        with _locked(self._file, self._place_of(indices.start), len(indices) * ROW.itemsize, wait=wait) as is_mine:
            if not is_mine:
                return False
            rows_M = self._rows[part].copy()
            rows_M[(rows_M["height"] > 0) & (rows_M["stamp"] != stamps_M)] = 0
            added: list[tuple[int, Pixels]] = []
            n_bytes = 0
            for number in np.flatnonzero(rows_M["height"] == 0).tolist():
                image_HWC = decode(indices[number])
                if image_HWC is not None:
                    added.append((number, image_HWC))
                    n_bytes += image_HWC.nbytes
                if n_bytes >= _WRITTEN_TOGETHER:
                    self._add(added, rows_M, stamps_M)
                    added, n_bytes = [], 0
            self._add(added, rows_M, stamps_M)
            with suppress(OSError):
                os.pwrite(self._file, rows_M.tobytes(), self._place_of(indices.start))
        return True

    def _add(self, images: list[tuple[int, Pixels]], rows_M: NDArray[np.void], stamps_M: NDArray[np.uint64]) -> None:
        """Write images of a part and note where they are in its rows; set `complaint` where there is no room for them."""
        content = memoryview(b"".join(np.ascontiguousarray(image_HWC).data for _, image_HWC in images))
        needed = len(content)
        if not needed:
            return
        if self._fault:
            self.complaint = self._fault
            return
        try:
            with _locked(self._file, 0, 1, wait=True):
                start = max(self._first, os.fstat(self._file).st_size)
                start += -(start - self._first) % 3  # Whole pixels, though the file was cut somewhere.
                if self.most_bytes is not None:
                    if start - self._first + needed > self.most_bytes:
                        self.complaint = f"the {size(self.most_bytes)} of memory for them are full"
                        return
                elif (disk := os.fstatvfs(self._file)).f_bavail * disk.f_frsize < needed + DISK_RESERVE:
                    raise OSError(errno.ENOSPC, "the disk is nearly full")
                os.pwrite(self._file, b"\0", start + needed - 1)  # Reserves the place, and never makes the file shorter.
            done = 0
            while done < needed:
                done += os.pwrite(self._file, content[done:], start + done)
        except OSError as fault:
            self.complaint = f"{self.path} can't be written to ({(fault.strerror or str(fault)).lower()})"
            return
        for number, image_HWC in images:
            height, width, _ = image_HWC.shape
            rows_M[number] = (start, height, width, stamps_M[number], _checksum(image_HWC, height, width), 0)
            start += image_HWC.nbytes

    def _place_of(self, index: int) -> int:
        return _HEADER.itemsize + index * ROW.itemsize

    def _create(self, place: Path | SharedFile, about: str) -> None:
        """Make the file where it is missing or is not a pack of so many images."""
        header = np.array([(_MARK, self.count, about.encode("utf-8", "replace"))], _HEADER).tobytes()

        def is_whole(file: int) -> bool:
            return os.pread(file, 16, 0) == header[:16] and os.fstat(file).st_size >= self._first

        with suppress(OSError), self.path.open("rb") as there:
            if is_whole(there.fileno()):
                return
        if isinstance(place, Path):
            place.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # In its place and not beside it: of several processes that begin at once, all must have the same file.
            with _locked(file, 0, 1, wait=True):
                if not is_whole(file):
                    os.ftruncate(file, 0)
                    os.ftruncate(file, self._first)
                    os.pwrite(file, header, 0)
        finally:
            os.close(file)

    def _open(self) -> None:
        self.complaint, self.n_damaged = "", 0
        self._file: int
        self._fault: str = ""
        try:
            self._file = os.open(self.path, os.O_RDWR)
        except OSError as fault:
            self._file = os.open(self.path, os.O_RDONLY)
            self._fault = f"{self.path} can't be written to ({(fault.strerror or str(fault)).lower()})"
        weakref.finalize(self, os.close, self._file)
        with Path(self._checked_path).open("r+b") as file:
            self._checked_N = np.frombuffer(mmap.mmap(file.fileno(), 0), "<u4")
        end = _HEADER.itemsize + self.count * ROW.itemsize
        rows = mmap.mmap(self._file, end, mmap.MAP_SHARED, mmap.PROT_READ)
        self._rows = np.frombuffer(rows, ROW, self.count, _HEADER.itemsize)
        self._map()

    def _map(self) -> None:
        self._bytes = np.frombuffer(mmap.mmap(self._file, 0, _PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE), np.uint8)


@contextmanager
def _locked(file: int, start: int, length: int, *, wait: bool) -> Iterator[bool]:
    """Lock some bytes of a file for this process; yield False where another process has them."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), length, start)
    except OSError as fault:
        # A disk without locks is used without them: several processes may decode the same part, or write over each other,
        # which does not fit the checksums.
        yield fault.errno not in (errno.EACCES, errno.EAGAIN)
        return
    try:
        yield True
    finally:
        fcntl.lockf(file, fcntl.LOCK_UN, length, start)


def about_pack(path: Path) -> str:
    """Return what a pack holds, as it says; "" where that can't be read."""
    with suppress(OSError, ValueError):
        header = np.fromfile(path, _HEADER, 1)
        if len(header) and header["mark"][0] == _MARK:
            return bytes(header["about"][0]).decode("utf-8", "replace")
    return ""


def _checksum(pixels: Pixels, height: int, width: int) -> int:
    return zlib.crc32(np.ascontiguousarray(pixels).data, height << 16 ^ width)


def _numbers(stamps: Iterable[str]) -> NDArray[np.uint64]:
    """Return a number for each text."""
    digests = [blake2b(stamp.encode("utf-8", "surrogatepass"), digest_size=8).digest() for stamp in stamps]
    return np.frombuffer(b"".join(digests), "<u8")
