"""Decoded images in files: some hundred in each, checked when they are first read, made anew if damaged or out of date."""

import json
import os
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from deepcluster.data.pixel_files import DamagedShard, Known, Row, Shard, open_shard, write_shard
from deepcluster.data.sources.image_source import ImageSource
from deepcluster.data.storage import ABANDONED_SECONDS, beside_of

FORMAT: Final = 1
SHARD_BYTES: Final = 64 << 20
MOST_IN_SHARD: Final = 8192
# Shards that are being filled, and as many times SHARD_BYTES; more would be of images in no order, of which none gets full.
MOST_PENDING: Final = 12
# Left free on the disk, for checkpoints and tables.
DISK_RESERVE: Final = 1 << 30
LAYOUT: Final = "layout.json"
ENDING: Final = ".pixels"
_STRIPES: Final = 64


class ImageShards:
    """The decoded images of one source at one size; safe for many threads, and for several runs at once.

    Attributes:
        complaint: why no more images are written (a full disk, a folder that is read-only); None while they are.
        n_damaged: shards that were found damaged and dropped.
        unreadable: reasons by index of images that will not be asked for again, since they are known to be unreadable.
    """

    def __init__(self, folder: Path, source: ImageSource, about: dict[str, Any], expected_bytes: int = 0) -> None:
        """Read and fill `folder`, which is for this source and size alone; `about` says to people what it holds.

        `expected_bytes` is what all images may take; without it they are expected to be as large as the first that comes.
        """
        self.folder = folder
        self.complaint: str | None = None
        self.n_damaged = 0
        self.unreadable: dict[int, str] = {}
        self._source = source
        self._about = about
        self._expected_bytes = expected_bytes
        self._lock = threading.RLock()
        self._opening = [threading.Lock() for _ in range(_STRIPES)]
        self._open: dict[int, Shard | None] = {}
        self._reasons: dict[int, tuple[str, str]] = {}
        self._pending: dict[int, dict[int, Row]] = {}
        self._pending_bytes: dict[int, int] = {}
        self._is_swept = False
        self._in_shard = self._read_layout()
        if self._in_shard is not None:
            with suppress(OSError):
                os.utime(folder / LAYOUT)  # It tells when the folder was last of use.

    def get(self, index: int) -> Known | None:
        """The image, or why it can't be decoded; None where nothing is known of it."""
        if self._in_shard is None:
            return None
        number, row = divmod(index, self._in_shard)
        try:
            shard = self._open[number]
        except KeyError:
            with self._opening[number % _STRIPES]:  # In one thread: what each image was decoded from is looked at.
                if number not in self._open:
                    self._open[number] = self._opened(number)
                shard = self._open[number]
        if shard is None:
            return None
        try:
            return shard.read(row)
        except DamagedShard:
            self._forget(number, shard, is_damaged=True)
        except FileNotFoundError:
            self._forget(number, shard)
        except OSError:  # No handle is free, say: it may be read the next time.
            pass
        return None

    def put(self, index: int, known: Known | None, stamp: str | None = None) -> None:
        """Remember what is known of an image; a shard is written when all of its images are.

        Args:
            known: None where it could not be read this time; whoever asks the next time finds nothing known of it.
            stamp: that of the source before it was read; None: the present one.
        """
        if self.complaint is not None:
            return
        row = (self._source.stamp(index) if stamp is None else stamp, known)
        if isinstance(known, str):
            self._reasons[index] = row[0], known
        if self._in_shard is None and not self._fix_layout(known):
            return
        number = index // (self._in_shard or 1)
        if self._open.get(number) is not None:
            return  # An image that could not be read when its shard was written.
        rows = self._add(number, index, row)
        if rows is not None:
            self._write(number, rows)

    def _indices(self, number: int) -> range:
        in_shard = self._in_shard or 1
        return range(number * in_shard, min((number + 1) * in_shard, len(self._source)))

    def _path(self, indices: range) -> Path:
        # First and last image: shards of folders that were once divided in another way are not mixed up.
        return self.folder / f"images-{indices[0]:09d}-{indices[-1]:09d}{ENDING}"

    def _opened(self, number: int) -> "Shard | None":
        """The shard, if it is there, whole, and of the images as they are now."""
        indices = self._indices(number)
        try:
            shard, stamps = open_shard(self._path(indices), indices)
        except DamagedShard:
            self._delete(number)
            return None
        except OSError:  # Not there, or not to be read.
            return None
        return shard if stamps == [self._source.stamp(index) for index in indices] else None

    def _forget(self, number: int, shard: Shard, *, is_damaged: bool = False) -> None:
        """Look for a shard anew at the next image; a damaged one is deleted, and not looked for until it is made anew."""
        with self._opening[number % _STRIPES]:
            if self._open.get(number) is not shard:
                return
            if is_damaged:
                self._delete(number)
                self._open[number] = None
            else:
                del self._open[number]

    def _delete(self, number: int) -> None:
        with suppress(OSError):
            self._path(self._indices(number)).unlink(missing_ok=True)
        with self._lock:
            self.n_damaged += 1

    def _add(self, number: int, index: int, row: Row) -> list[Row] | None:
        """Add an image to its shard; all of them if it is full now."""
        indices = self._indices(number)
        with self._lock:
            if number not in self._pending:
                # Images that will not come, with why they can't be decoded, if it is that.
                reasons, unreadable = self._reasons, self.unreadable
                is_few = len(reasons) + len(unreadable) < len(indices)
                bad = {*reasons.copy(), *unreadable.copy()} if is_few else indices
                self._pending[number] = {
                    index: reasons.get(index) or (self._source.stamp(index), None)
                    for index in bad
                    if index in indices and (index in reasons or index in unreadable)
                }
                self._pending_bytes[number] = 0
            pending = self._pending[number]
            if not isinstance(pending.get(index, ("", None))[1], Tensor):
                pending[index] = row
                self._pending_bytes[number] += row[1].nbytes if isinstance(row[1], Tensor) else 0
            if len(pending) == len(indices):
                del self._pending[number], self._pending_bytes[number]
                return [pending[index] for index in indices]
            while len(self._pending) > MOST_PENDING or sum(self._pending_bytes.values()) > MOST_PENDING * SHARD_BYTES:
                oldest = next(iter(self._pending))
                del self._pending[oldest], self._pending_bytes[oldest]
        return None

    def _write(self, number: int, rows: list[Row]) -> None:
        indices = self._indices(number)
        needed = sum(known.nbytes for _, known in rows if isinstance(known, Tensor))
        try:
            layout = self._read_layout() or self._keep_layout(self._in_shard or 1)
            if layout is not None and layout != self._in_shard:
                self._complain(f"{self.folder} was divided in another way meanwhile, by another run")
            elif shutil.disk_usage(self.folder).free < needed + DISK_RESERVE:
                self._complain(f"the disk of {self.folder} is nearly full")
            elif self._opened(number) is None:  # Else another run was faster.
                self._sweep()
                write_shard(self._path(indices), indices, rows)
        except OSError as error:
            self._complain_of(error)
        with self._opening[number % _STRIPES]:
            self._open.pop(number, None)

    def _complain_of(self, error: OSError) -> None:
        is_deleted = isinstance(error, FileExistsError) and not self.folder.is_file()
        if not is_deleted and not isinstance(error, FileNotFoundError):  # Else someone deletes the folder at this moment.
            self._complain(f"{self.folder} can't be written to ({(error.strerror or str(error)).lower()})")

    def _complain(self, complaint: str) -> None:
        with self._lock:
            self.complaint = complaint
            self._pending.clear()
            self._pending_bytes.clear()

    def _sweep(self) -> None:
        """Delete what killed processes have left, once."""
        with self._lock:
            if self._is_swept:
                return
            self._is_swept = True
        for path in self.folder.glob("*.part"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()

    def _read_layout(self) -> int | None:
        """How many images a shard of this folder has; None where there is none yet."""
        try:
            layout = json.loads((self.folder / LAYOUT).read_bytes())
            in_shard = layout["images_in_a_shard"] if layout["format"] == FORMAT else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return in_shard if type(in_shard) is int and 1 <= in_shard <= MOST_IN_SHARD else None

    def _fix_layout(self, known: Known | None) -> bool:
        """Fix how many images a shard has, if it can be told by now; what another run has fixed meanwhile counts."""
        image_bytes = self._expected_bytes // len(self._source) or (known.nbytes if isinstance(known, Tensor) else 0)
        if not image_bytes:
            return False
        with self._lock:
            if self._in_shard is None:
                in_shard = max(1, min(MOST_IN_SHARD, SHARD_BYTES // image_bytes))
                try:
                    self._in_shard = self._read_layout() or self._keep_layout(in_shard)
                except OSError as error:
                    self._complain_of(error)
        return self._in_shard is not None

    def _keep_layout(self, in_shard: int) -> int | None:
        """Write the layout; of several runs that begin at once, that of the first counts, and is returned."""
        layout = {"format": FORMAT, "images_in_a_shard": in_shard, **self._about}
        path = self.folder / LAYOUT
        beside = beside_of(path)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_bytes(json.dumps(layout, indent=2).encode())
            try:
                os.link(beside, path)
            except OSError:  # It is there, or a disk knows no links.
                if self._read_layout() is None:
                    beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        return self._read_layout()
