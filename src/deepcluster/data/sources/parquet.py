"""Image files in the rows of Parquet tables, as Hugging Face's hub and many data pipelines keep them.

A row of a Parquet file can't be had by itself: its page has to be decompressed, and all pages of the row group before it.
So the image column of a row group is decoded once, into blocks that are kept on the disk (`BlockStore`) and of which any
part can be read. A large row group becomes several blocks, and small neighbours share one: such a stretch of row groups is a
run. A block of n rows is n pairs of int64, where the bytes of each image start and stop in the block (stop = -1: the row has
none), and then these bytes.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from deepcluster.core.errors import InputError, UnreadableImage
from deepcluster.core.text import count_of, printable
from deepcluster.data.sources.image_source import ImageSource
from deepcluster.data.sources.tables import (
    DAMAGES,
    Columns,
    Table,
    TableSource,
    as_bytes,
    features_in,
    find_columns,
    first_line,
    label_texts,
    row_paths,
    same_columns,
    written_anew,
)
from deepcluster.data.storage import LocalFile, StoredFile
from deepcluster.data.storage.blocks import BlockStore

# Of the size that the store holds several of in memory.
BLOCK_BYTES: Final = 4 << 20
BLOCK_ROWS: Final = 4096
_FORMAT: Final = 1
_PAIR: Final = struct.Struct("=qq")
_READ_BYTES: Final = 8 << 20
_READERS: Final = 8
_PAIRS_KEPT: Final = 4096
_LOCKS: Final = 64
_OPENERS: Final = 8


def open_parquet(
    files: Sequence[StoredFile], *, blocks: BlockStore, on_found: Callable[[int], None] | None = None
) -> ImageSource:
    """Open the images in one or several tables with the same columns; files without rows are left out.

    Reads what describes the tables, the paths and the labels, but no image. `on_found` gets the number of images found so
    far after each file; it may raise to stop. Raises InputError where a file is no Parquet file or damaged, holds no
    images or more columns of images than one, or where all are empty.
    """
    pool = ThreadPoolExecutor(min(_OPENERS, max(1, len(files))))
    opened: list[_ParquetTable] = []
    try:
        for one in pool.map(_open_one, files):
            opened += [one] if one.rows else []
            if on_found is not None:
                on_found(sum(each.rows for each in opened))
    finally:
        pool.shutdown(cancel_futures=True)
    if not opened:
        raise InputError(f"{', '.join(file.where() for file in files[:3])} has no rows, and so no images")
    same_columns(opened)
    return ParquetSource(opened, blocks)


class _Place(NamedTuple):
    """A block: the number of its file, of its run there, and of itself there."""

    file: int
    run: int
    block: int


@dataclass(frozen=True)
class _Runs:
    """How the row groups of a file become blocks.

    Attributes:
        rows: first row of each run, and the end of the last.
        groups: first row group of each run, and the end of the last.
        steps: rows of each block of a run but the last one, which may have fewer.
        bytes: size of all images.
    """

    rows: NDArray[np.int64]
    groups: NDArray[np.int64]
    steps: NDArray[np.int64]
    bytes: int

    def find(self, row: int) -> tuple[int, int, int]:
        """Return the run and the block in it that hold a row, and its place in the block."""
        run = int(self.rows.searchsorted(row, "right")) - 1
        block, inner = divmod(row - int(self.rows[run]), int(self.steps[run]))
        return run, block, inner

    def block_rows(self, run: int, block: int) -> tuple[int, int]:
        """Return the first row of a block, and their number."""
        first = int(self.rows[run]) + block * int(self.steps[run])
        return first, min(int(self.steps[run]), int(self.rows[run + 1]) - first)


@dataclass(frozen=True)
class _ParquetTable(Table):
    """An open file, and what only Parquet has."""

    metadata: pq.FileMetaData
    runs: _Runs


class ParquetSource(TableSource):
    """Images in the rows of Parquet files. Safe to read from many threads."""

    def __init__(self, opened: Sequence[_ParquetTable], blocks: BlockStore) -> None:
        """Take files of at least one row, and where to keep what is decoded of them."""
        super().__init__(opened, f"in {count_of(len(opened), 'Parquet file')}")
        self._image = opened[0].columns
        self._metadata = [one.metadata for one in opened]
        self._runs = [one.runs for one in opened]
        self._bytes = sum(one.runs.bytes for one in opened)
        self._blocks = blocks
        self._locks = [threading.Lock() for _ in range(_LOCKS)]
        self._readers: list[tuple[tuple[int, int], _RunReader]] = []
        self._readers_lock = threading.Lock()
        self._damaged: dict[tuple[int, int], tuple[int, str]] = {}
        self._pairs: dict[_Place, bytes] = {}  # The positions that blocks begin with: 16 bytes an image.

    def _stored(self, table: int, row: int) -> bytes | None:
        run, block, inner = self._runs[table].find(row)
        place = _Place(table, run, block)
        pairs = self._pairs.get(place)
        if pairs is None:
            pairs = self._part(place, 0, self._runs[table].block_rows(run, block)[1] * _PAIR.size)
            if len(self._pairs) >= _PAIRS_KEPT:
                self._pairs.clear()
            self._pairs[place] = pairs
        start, stop = _PAIR.unpack_from(pairs, inner * _PAIR.size)
        return self._part(place, start, stop) if stop >= 0 else None

    def _part(self, place: _Place, start: int, stop: int) -> bytes:
        """Return some bytes of a block; raises UnreadableImage."""
        try:
            return self._blocks.part(self._key(place), start, stop, _absent)
        except _Absent:
            return bytes(memoryview(self._made(place))[start:stop])

    def _key(self, place: _Place) -> str:
        file = self._files[place.file]
        first, count = self._runs[place.file].block_rows(place.run, place.block)
        return "\0".join(["parquet", str(_FORMAT), file.where(), file.stamp, self._image.image, str(first), str(count)])

    def _made(self, place: _Place) -> pa.Buffer:
        """Decode a block and give it to the store, with those before it in its run, and those after it where all find room.

        One thread at a time does so in a run, and the others find what they want when it is their turn.
        """
        with self._locks[hash(place[:2]) % _LOCKS]:
            first_damaged, reason = self._damaged.get(place[:2], (place.block + 1, ""))
            if place.block >= first_damaged:
                raise UnreadableImage(reason)
            found = self._blocks.find(self._key(place))
            if found is not None:
                return found
            reader = self._reader_before(place)
            try:
                while not reader.at_end() and (found is None or self._bytes <= self._blocks.room):
                    here, made = place._replace(block=reader.block), reader.next_block()
                    found = made if here == place else found
                    self._keep(here, made)
            except InputError as error:  # The file is gone, or the network.
                reason = str(error)
            except DAMAGES as error:
                runs, name = self._runs[place.file], printable(self._files[place.file].name)
                first, end = runs.block_rows(place.run, reader.block)[0], int(runs.rows[place.run + 1])
                reason = f"damaged: rows {first:,} to {end - 1:,} of {name} can't be decoded ({first_line(error)})"
                self._damaged[place[:2]] = (reader.block, reason)
            else:
                # For the next blocks of its run: reading in order decodes no run twice, even without a disk.
                if not reader.at_end():
                    with self._readers_lock:
                        self._readers = [*self._readers[1 - _READERS :], (place[:2], reader)]
        if found is None:
            raise UnreadableImage(reason)
        return found

    def _keep(self, place: _Place, made: pa.Buffer) -> None:
        """Give a block to the store."""
        kept = False
        while not kept:
            with suppress(_Absent):  # Another thread looked for it at that very moment, and the store told both.
                self._blocks.get(self._key(place), lambda: made)
                kept = True

    def _reader_before(self, place: _Place) -> _RunReader:
        """Return the reader of a run that is nearest before a block, taken out of the kept ones, or a new one."""
        with self._readers_lock:
            usable = [kept for kept in self._readers if kept[0] == place[:2] and kept[1].block <= place.block]
            if usable:
                nearest = max(usable, key=lambda kept: kept[1].block)
                self._readers.remove(nearest)
                return nearest[1]
        file = self._files[place.file]
        # One at an address notices by itself, and to ask its server costs as much as to read.
        if isinstance(file, LocalFile) and file.now() != file.stamp:
            raise written_anew(file)
        return _RunReader(file, self._metadata[place.file], self._image, self._runs[place.file], place.run)


class _RunReader:
    """The blocks of a run, made one after the other, with one piece of the file (or one page) in memory at a time.

    Attributes:
        block: number of the next block.
    """

    def __init__(self, file: StoredFile, metadata: pq.FileMetaData, columns: Columns, runs: _Runs, run: int) -> None:
        self.block = 0
        self._runs, self._run, self._columns = runs, run, columns
        parquet = pq.ParquetFile(
            file.as_file().detach(),
            metadata=metadata,
            pre_buffer=False,  # It would hold the whole row group.
            buffer_size=_READ_BYTES,
            page_checksum_verification=True,
        )
        rows, groups = int(runs.steps[run]), list(range(*runs.groups[run : run + 2].tolist()))
        self._batches: Iterator[pa.RecordBatch] = parquet.iter_batches(rows, groups, [_leaf(columns)], use_threads=False)
        self._rest = pa.array([], pa.large_binary())

    def at_end(self) -> bool:
        return self._runs.block_rows(self._run, self.block)[1] <= 0

    def next_block(self) -> pa.Buffer:
        """Decode the next block; raises one of `DAMAGES` where it is damaged."""
        missing = self._runs.block_rows(self._run, self.block)[1]
        parts = []
        while missing > 0:
            if not len(self._rest):
                batch = next(self._batches, None)
                if batch is None:
                    raise pa.ArrowInvalid("fewer rows than the file says")
                column = batch.column(self._columns.image)
                self._rest = as_bytes(pc.struct_field(column, "bytes") if self._columns.nested else column)
            parts.append(self._rest.slice(0, missing))
            self._rest = self._rest.slice(missing)
            missing -= len(parts[-1])
        self.block += 1
        return _packed(pa.concat_arrays(parts))


def _leaf(columns: Columns) -> str:
    return f"{columns.image}.bytes" if columns.nested else columns.image


def _packed(images: pa.LargeBinaryArray) -> pa.Buffer:
    """Return a block of images."""
    _, ends, data = images.buffers()
    ends_N = np.frombuffer(ends, np.int64, len(images) + 1, images.offset * 8)
    pairs_N2 = np.column_stack([ends_N[:-1], ends_N[1:]]) + len(images) * _PAIR.size - ends_N[0]
    if images.null_count:
        pairs_N2[images.is_null().to_numpy(zero_copy_only=False), 1] = -1
    held = b"" if data is None else data.slice(int(ends_N[0]), int(ends_N[-1] - ends_N[0]))
    return pa.py_buffer(b"".join([pairs_N2.tobytes(), memoryview(held)]))


class _Absent(Exception):
    """A block is not in the store."""


def _absent() -> pa.Buffer:
    raise _Absent


def _open_one(file: StoredFile) -> _ParquetTable:
    """Read what a file says of itself, its paths and its labels; raises InputError."""
    try:
        parquet = pq.ParquetFile(file.as_file().detach(), pre_buffer=True, page_checksum_verification=True)
        metadata, schema = parquet.metadata, parquet.schema_arrow
        columns = find_columns(schema, features_in((schema.metadata or {}).get(b"huggingface", b"{}")), file)
        rows: int = metadata.num_rows
        leaves = [f"{columns.image}.path"] * columns.with_path + [columns.label] * (columns.label is not None)
        small = parquet.read(leaves, use_threads=False) if leaves and rows else None
        if small is not None and len(small) != rows:
            raise pa.ArrowInvalid("fewer rows than the file says")
        runs, holes = _plan(metadata, _leaf(columns))
        if int(runs.rows[-1]) != rows:
            raise pa.ArrowInvalid("its row groups have other rows than the file says")
        paths = row_paths(small[columns.image]) if small is not None and columns.with_path else None
        labels = label_texts(small[columns.label], columns.classes) if small is not None and columns.label else [""] * rows
    except DAMAGES as error:
        raise InputError(_open_fault(file, error)) from error
    return _ParquetTable(file, rows, columns, paths, labels, holes, metadata, runs)


def _plan(metadata: pq.FileMetaData, leaf: str) -> tuple[_Runs, bool]:
    """Put small row groups together and say how large ones are cut; and whether some image may be null."""
    at = [metadata.schema.column(column).path for column in range(metadata.num_columns)].index(leaf)
    rows, groups, steps, holes = [0], [0], [], False
    end, held, total = 0, 0, 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        column = row_group.column(at)
        holes |= not (column.is_stats_set and column.statistics.has_null_count and column.statistics.null_count == 0)
        size = column.total_uncompressed_size
        if end > rows[-1] and (held + size > BLOCK_BYTES or end + row_group.num_rows - rows[-1] > BLOCK_ROWS):
            steps.append(_block_rows(end - rows[-1], held))
            rows.append(end)
            groups.append(group)
            held = 0
        end += row_group.num_rows
        held += size
        total += size
    if end > rows[-1]:
        steps.append(_block_rows(end - rows[-1], held))
        rows.append(end)
        groups.append(metadata.num_row_groups)
    return _Runs(np.array(rows, np.int64), np.array(groups, np.int64), np.array(steps, np.int64), total), holes


def _block_rows(rows: int, size: int) -> int:
    """Return how many rows a block has, of a run with `rows` rows of `size` bytes in all."""
    return max(1, min(rows, BLOCK_ROWS, BLOCK_BYTES * rows // max(size, 1)))


def _open_fault(file: StoredFile, error: Exception) -> str:
    """Say what is wrong with a file that can't be opened as Parquet."""
    where, start, end = file.where(), file.read(0, 24), file.read(max(0, file.size - 4), 4)
    if not file.size:
        return f"{where} is empty"
    if start.startswith(b"version https://git-lfs"):
        return f"{where} is a Git LFS pointer; fetch the table itself with `git lfs pull`"
    if end == b"PARE" or "encrypt" in str(error).lower() or "decrypt" in str(error).lower():
        return f"{where} is encrypted; write it without encryption"
    if not start.startswith(b"PAR1"):
        return f"{where} is not a Parquet file, whatever its name: it begins with {start[:12]!r}"
    if end != b"PAR1":
        return f"{where} is cut off: the end of the Parquet file is missing; copy or download it again"
    return f"{where} is damaged ({first_line(error)}); copy or download it again"
