"""Image files in the rows of Parquet tables, as Hugging Face's hub and many data pipelines keep them.

A row of a Parquet file can't be read by itself: what precedes it in its row group must be decoded, too. So row groups are
decoded in order, and what was decoded last stays in memory: reading in order is as quick as from any file, and so is
reading at random from small row groups.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate, repeat

import pyarrow as pa
import pyarrow.parquet as pq

from deepcluster.core.errors import InputError, UnreadableImage
from deepcluster.core.kinds import BEGIN_BYTES, kind_of
from deepcluster.core.text import count_of, printable
from deepcluster.data.sources.image_source import ImageSource, place_of
from deepcluster.data.sources.tables import DAMAGES, NoImageColumn, Table, TableSource, check_unchanged, find_columns, reason
from deepcluster.data.storage import StoredFile

GROUP_BYTES = 128 << 20  # is held of a row group,
MEMORY_BYTES = 256 << 20  # and so much of all of them, in each process.
BATCH_BYTES = 4 << 20
READ_BYTES = 1 << 20


def open_parquet(
    files: Sequence[StoredFile], *, on_found: Callable[[int], None] = lambda _: None, without_ours: bool = False
) -> ImageSource:
    """Open the images in one or several tables with the same columns; files without rows are left out.

    So are, with `without_ours`, the tables of features and clusters that this program has written.

    Reads the footers, paths and labels, but no image. `on_found` is called with the number of images found so far, after
    each file; it may raise to stop.

    Raises:
        InputError: a file is damaged or not a Parquet file, its column of images is missing or ambiguous, or all are empty.
    """
    tables: list[ParquetTable] = []
    n_ours = 0
    pool = ThreadPoolExecutor(8)
    try:
        for table in pool.map(partial(_open, without_ours=without_ours), files):
            n_ours += table is None
            tables += [table] if table is not None and len(table) else []
            on_found(sum(map(len, tables)))
    finally:
        pool.shutdown(cancel_futures=True)
    if not tables:
        named = ", ".join(file.where() for file in files[:3])
        if n_ours:
            raise InputError(f"no images, only {count_of(n_ours, 'table')} that deepcluster wrote: {named}; give the images")
        raise InputError(f"{named} has no rows, and so no images")
    ours = f", {count_of(n_ours, 'table')} that deepcluster wrote left out" if n_ours else ""
    return TableSource(tables, f"in {count_of(len(tables), 'Parquet file')}{ours}")


def _open(file: StoredFile, *, without_ours: bool) -> "ParquetTable | None":
    """Return a table; None if it holds no images and this program has written it."""
    try:
        return ParquetTable(file)
    except NoImageColumn as fault:
        if without_ours and fault.is_ours:
            return None
        raise


class ParquetTable(Table):
    """One Parquet file."""

    def __init__(self, file: StoredFile) -> None:
        """Open it; raises InputError."""
        try:
            parquet = pq.ParquetFile(file.as_file().detach(), pre_buffer=True, page_checksum_verification=True)
            metadata = self._metadata = parquet.metadata
            columns = find_columns(parquet.schema_arrow, file)
            small = [f"{columns.image}.path"] * columns.with_path + [columns.label] * (columns.label is not None)
            super().__init__(file, columns, parquet.read(small, use_threads=False))
            self._leaf = f"{columns.image}.bytes" if columns.nested else columns.image
            at = [metadata.schema.column(number).path for number in range(metadata.num_columns)].index(self._leaf)
            groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
            chunks = [group.column(at) for group in groups]
            self.may_be_null = any(chunk.statistics is None or chunk.statistics.null_count != 0 for chunk in chunks)
            self._sizes = [chunk.total_uncompressed_size for chunk in chunks]
            self._counts = [group.num_rows for group in groups]
            self._ends = list(accumulate(self._counts))
            if not len(self) == metadata.num_rows == sum(self._counts):
                raise pa.ArrowInvalid("fewer rows than the file says")
        except DAMAGES as error:
            raise InputError(_open_fault(file, error)) from error

    def stored(self, row: int) -> bytes | None:
        group, inner = place_of(row, self._ends)
        found = _row_group(self.file.where(), self.file.stamp, group, self._sizes[group])
        return found.read(inner, partial(self._decode, group))

    def _decode(self, group: int) -> Iterator[pa.LargeBinaryArray | str]:
        """Yield the images of a row group in order; where the rest can't be decoded, the reason again and again."""
        done, rows, end = 0, self._counts[group], self._ends[group]
        try:
            parquet = pq.ParquetFile(
                self.file.as_file().detach(),
                metadata=self._metadata,
                pre_buffer=False,  # It would hold the whole row group.
                buffer_size=READ_BYTES,
                page_checksum_verification=True,
            )
            n_batch = max(1, min(rows, 4096, BATCH_BYTES * rows // max(1, self._sizes[group])))
            for batch in parquet.iter_batches(n_batch, [group], [self._leaf], use_threads=False):
                check_unchanged(self.file)
                yield self.columns.images(batch)
                done += len(batch)
            if done < rows:
                raise pa.ArrowInvalid("fewer rows than the file says")
        except DAMAGES as error:
            check_unchanged(self.file)
            what = f"rows {end - rows + done:,} to {end - 1:,} of {printable(self.file.name)} can't be decoded"
            yield from repeat(f"damaged: {what} ({reason(error)})")


class _RowGroup:
    """A row group, decoded in order as far as it is wanted, of which the last `GROUP_BYTES` are held."""

    def __init__(self, n_bytes: int) -> None:
        """Take how much its images will take in memory, more or less."""
        self.n_bytes = min(n_bytes, GROUP_BYTES)
        self._lock = threading.Lock()
        self._batches: Iterator[pa.LargeBinaryArray | str] | None = None
        self._held, self._start = pa.chunked_array([], pa.large_binary()), 0

    def read(self, row: int, decode: Callable[[], Iterator[pa.LargeBinaryArray | str]]) -> bytes | None:
        with self._lock:
            if self._batches is None or row < self._start:
                self._batches, self._held, self._start = decode(), pa.chunked_array([], pa.large_binary()), 0
            while row >= self._start + len(self._held):
                try:
                    batch = next(self._batches)
                except BaseException:  # The file or the network is gone, or the user has stopped it.
                    self._batches = None
                    raise
                if isinstance(batch, str):
                    raise UnreadableImage(batch)
                chunks = [*self._held.chunks, batch]
                while len(chunks) > 1 and sum(chunk.nbytes for chunk in chunks) > GROUP_BYTES:
                    self._start += len(chunks.pop(0))
                self._held = pa.chunked_array(chunks)
                self.n_bytes = max(self.n_bytes, self._held.nbytes)
            image: bytes | None = self._held[row - self._start].as_py()
            return image


_recent: dict[tuple[int, str, str, int], _RowGroup] = {}  # The last used one at the end.
_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # A forked process would inherit the lock as another thread holds it.
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def _row_group(file: str, stamp: str, number: int, n_bytes: int) -> _RowGroup:
    """Return a row group as this process has decoded it so far."""
    key = (os.getpid(), file, stamp, number)
    with _lock:
        found = _recent.pop(key, None)
        if found is None:
            found = _RowGroup(n_bytes)
            while sum(group.n_bytes for group in _recent.values()) + found.n_bytes > MEMORY_BYTES and _recent:
                del _recent[next(iter(_recent))]
        _recent[key] = found
        return found


def _open_fault(file: StoredFile, error: Exception) -> str:
    """Say what is wrong with a file that can't be opened as Parquet."""
    where, start, end = file.where(), file.read(0, BEGIN_BYTES), file.read(max(0, file.size - 4), 4)
    if not file.size:
        return f"{where} is empty"
    if end == b"PARE" or "encrypt" in str(error).lower() or "decrypt" in str(error).lower():
        return f"{where} is encrypted; write it without encryption"
    if not start.startswith(b"PAR1"):
        return f"{where} is not a Parquet file: it is {kind_of(start)}"
    if end != b"PAR1":
        return f"{where} is cut off: the end of the Parquet file is missing; copy or download it again"
    return f"{where} is damaged ({reason(error)}); copy or download it again"
