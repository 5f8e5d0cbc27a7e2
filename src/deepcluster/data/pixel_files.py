"""Files of decoded images: their pixels one after the other, then an Arrow table with a row for each image.

The table has height and width (0 where there are no pixels), the checksum of the pixels, the stamp of what they were decoded
from, and why there are none; at the end of the file are the table's size and checksum. It is written beside and renamed, and
never changed: other runs, and a crash, find all of it or nothing.

Files are read, not mapped: on a folder that several machines share, a file that another one deletes or replaces is an error
in a read one, so an image to be decoded again; in a mapped one it is a signal that ends the process, as is a bad sector. It
adds 20 µs to the 120 that a training view of 256 x 340 pixels takes. Each read opens the file: thousands need no handles.
"""

import io
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from zlib import crc32

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.data.storage import written_beside

# What is known of an image: its pixels (H, W, 3), or why it can't be decoded.
Known = Tensor | str
# What an image was decoded from, and what is known of it; None where it could not even be read.
Row = tuple[str, Known | None]

_MARK: Final = b"DCI1"
_TRAILER: Final = struct.Struct("<QI4s")


class DamagedShard(Exception):
    """A shard that is not as it was written."""


class Shard:
    """Where the images of a shard lie in its file."""

    def __init__(self, path: Path, identity: tuple[int, ...], places_N4: NDArray[np.int64], reasons: dict[int, str]) -> None:
        """Take start, height, width and checksum of each image, and the reasons by row."""
        self._path = str(path)
        self._identity = identity
        self._places_N4 = places_N4
        self._reasons = reasons
        self._checked_N = np.zeros(len(places_N4), dtype=bool)

    def read(self, row: int) -> Known | None:
        """An image; raises FileNotFoundError where the file is not the one that was opened, DamagedShard, or OSError."""
        start, height, width, checksum = self._places_N4[row].tolist()
        if not height:
            return self._reasons.get(row)
        with io.FileIO(self._path) as file:
            if _identity_of(file) != self._identity:
                raise FileNotFoundError(self._path)
            pixels = _read(file, start, height * width * 3)
        if not self._checked_N[row]:
            if crc32(pixels.data) != checksum:
                raise DamagedShard(f"{self._path}: row {row}")
            self._checked_N[row] = True
        return torch.from_numpy(pixels.reshape(height, width, 3))


def open_shard(path: Path, indices: range) -> tuple[Shard, list[str]]:
    """A shard, and the stamps of its images; raises DamagedShard or OSError."""
    with io.FileIO(path) as file:
        identity = _identity_of(file)
        end = file.seek(0, os.SEEK_END) - _TRAILER.size
        if end < 0:
            raise DamagedShard(f"{path} is cut short")
        n_bytes, checksum, mark = _TRAILER.unpack(_read(file, end, _TRAILER.size).data)
        if mark != _MARK or n_bytes > end:
            raise DamagedShard(f"{path} has no table")
        content = _read(file, end - n_bytes, n_bytes)
    # Arrow trusts its files; the checksum says that this one is as it was written.
    if crc32(content.data) != checksum:
        raise DamagedShard(f"{path}: the table")
    table = pa.ipc.open_stream(pa.py_buffer(content)).read_all()
    numbers_N4 = np.stack([table[name].to_numpy() for name in ("index", "height", "width", "checksum")], 1).astype(np.int64)
    ends_N = np.cumsum(numbers_N4[:, 1] * numbers_N4[:, 2] * 3)
    if numbers_N4[:, 0].tolist() != list(indices) or ends_N[-1] != end - n_bytes:
        raise DamagedShard(f"{path} is of other images")
    numbers_N4[:, 0] = np.concatenate([[0], ends_N[:-1]])
    reasons = {row: _decoded(reason) for row, reason in enumerate(table["reason"].to_pylist()) if reason is not None}
    return Shard(path, identity, numbers_N4, reasons), list(map(_decoded, table["stamp"].to_pylist()))


def write_shard(path: Path, indices: range, rows: Sequence[Row]) -> None:
    """Write a shard beside and rename it; raises OSError."""
    images = [known if isinstance(known, Tensor) else None for _, known in rows]
    sums = []
    with written_beside(path) as beside, beside.open("wb") as file:
        for image_HWC in images:
            pixels = b"" if image_HWC is None else np.ascontiguousarray(image_HWC.numpy()).data
            sums.append(crc32(pixels))
            file.write(pixels)
        columns = {
            "index": pa.array(indices, pa.int64()),
            "height": pa.array([0 if image is None else image.shape[0] for image in images], pa.int32()),
            "width": pa.array([0 if image is None else image.shape[1] for image in images], pa.int32()),
            "checksum": pa.array(sums, pa.uint32()),
            "stamp": pa.array([_encoded(stamp) for stamp, _ in rows], pa.binary()),
            "reason": pa.array([_encoded(known) if isinstance(known, str) else None for _, known in rows], pa.binary()),
        }
        batch = pa.RecordBatch.from_pydict(columns)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        content = sink.getvalue()
        file.write(content)
        file.write(_TRAILER.pack(content.size, crc32(content), _MARK))


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _decoded(content: bytes) -> str:
    return content.decode("utf-8", "surrogatepass")


def _identity_of(file: io.FileIO) -> tuple[int, ...]:
    """What tells a file from one that has come in its place."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read(file: io.FileIO, start: int, count: int) -> NDArray[np.uint8]:
    """`count` bytes from `start` on; raises DamagedShard where the file ends before."""
    found = np.empty(count, np.uint8)
    rest = found.data
    file.seek(start)
    while rest:
        got = file.readinto(rest)
        if not got:
            raise DamagedShard("cut short")
        rest = rest[got:]
    return found
