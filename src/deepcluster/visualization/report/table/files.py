"""Tables of embeddings as they lie in files: read in batches, whatever their format.

N rows, B rows of a batch, D numbers of an embedding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from deepcluster.core.errors import InputError

FORMATS = ".parquet, .npy, .npz, .csv or .tsv, or a folder of Parquet files"
# A batch of rows holds about so many numbers; and no more rows than this.
BATCH_NUMBERS, BATCH_ROWS = 1 << 22, 65_536
# What pyarrow and NumPy raise for damaged files.
DAMAGES = (pa.ArrowException, OSError, ValueError, KeyError, EOFError)


@dataclass(frozen=True)
class TableFile:
    """A table that is read in batches.

    Attributes:
        path: as the person named it.
        schema: its columns.
        rows: N.
        batches: gives the batches of the columns that are named, in the order of the rows.
    """

    path: Path
    schema: pa.Schema
    rows: int
    batches: Callable[[Sequence[str]], Iterator[pa.RecordBatch]]


def open_table(path: Path) -> TableFile:
    """Open a table; of its rows nothing is read yet, but of text files.

    Raises:
        InputError: it is missing, damaged, empty, or no table.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist")
    try:
        table = _opened(path)
    except DAMAGES as fault:
        raise InputError(f"{path} can't be read as a table: {_first_line(fault)}") from None
    if not table.rows:
        raise InputError(f"{path} has no rows")
    return table


def read_batches(table: TableFile, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The batches of some columns.

    Raises:
        InputError: the file is damaged.
    """
    try:
        yield from table.batches(columns)
    except DAMAGES as fault:
        raise InputError(f"{table.path} is damaged: {_first_line(fault)}") from None


def is_embedding(kind: pa.DataType) -> bool:
    """Whether a column holds lists of numbers."""
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return False
    return bool(pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))


def _opened(path: Path) -> TableFile:
    if path.is_dir():
        files = sorted(path.rglob("*.parquet"))
        if not files:
            raise InputError(f"{path} is a folder without Parquet files; give a table: {FORMATS}")
        return _parquet(path, files)
    ending = path.suffix.lower()
    if ending == ".parquet":
        return _parquet(path, [path])
    if ending in (".npy", ".npz"):
        return _arrays(path, _loaded(path))
    if ending in (".csv", ".tsv"):
        return _text(path, "\t" if ending == ".tsv" else ",")
    raise InputError(f"{path} is no table that is known; give {FORMATS}")


def _parquet(path: Path, files: Sequence[Path]) -> TableFile:
    footers = [pq.read_metadata(file) for file in files]
    schema = pq.read_schema(files[0])
    for file in files[1:]:
        other = pq.read_schema(file)
        if not other.remove_metadata().equals(schema.remove_metadata()):
            raise InputError(f"{file} has other columns than {files[0]}: {_listed(other)}, not {_listed(schema)}")
    rows = sum(footer.num_rows for footer in footers)
    # A row's size, from what the numbers take when they are unpacked.
    row_bytes = sum(
        footer.row_group(group).total_byte_size for footer in footers for group in range(footer.num_row_groups)
    ) / max(1, rows)
    batch_rows = max(1, min(BATCH_ROWS, int(4 * BATCH_NUMBERS / max(1.0, row_bytes))))

    def batches(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for file in files:
            # Mapped and not read ahead: a row group may be as large as the whole table.
            with pq.ParquetFile(file, memory_map=True, pre_buffer=False) as opened:
                yield from opened.iter_batches(batch_rows, columns=list(columns), use_threads=False)

    return TableFile(path, schema, rows, batches)


def _loaded(path: Path) -> dict[str, NDArray[Any]]:
    """Arrays by name: those of an .npz; of an .npy its rows, and the names beside it as `embed` writes them."""
    if path.suffix.lower() == ".npz":
        with np.load(path, allow_pickle=False) as held:
            return {name: held[name] for name in held.files}
    rows = np.load(path, mmap_mode="r", allow_pickle=False)
    beside = path.with_suffix(".names.txt")
    if not beside.is_file():
        return {"embedding": rows}
    names = beside.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if len(names) != len(rows):
        raise InputError(f"{beside} has {len(names):,} names, but {path} has {len(rows):,} rows")
    return {"name": np.array(names, dtype=object), "embedding": rows}


def _arrays(path: Path, arrays: dict[str, NDArray[Any]]) -> TableFile:
    """Arrays of as many rows: those of two dimensions are lists of numbers."""
    arrays = {name: array for name, array in arrays.items() if array.ndim in (1, 2)}
    lengths = {len(array) for array in arrays.values()}
    if len(lengths) != 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "none"
        raise InputError(f"{path} should hold arrays of one or two dimensions with as many rows each; it has {shapes}")
    rows = lengths.pop()
    width = max((array.shape[1] for array in arrays.values() if array.ndim == 2), default=1)
    batch_rows = max(1, min(BATCH_ROWS, BATCH_NUMBERS // max(1, width)))

    def column(array: NDArray[Any]) -> pa.Array:
        array = np.ascontiguousarray(array)
        if array.ndim == 1:
            return pa.array(array.tolist() if array.dtype.kind in "OU" else array)
        return pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), array.shape[1])

    def batches(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for start in range(0, rows, batch_rows):
            part = {name: column(arrays[name][start : start + batch_rows]) for name in columns}
            yield pa.RecordBatch.from_pydict(part)

    schema = pa.schema([(name, column(array[:1]).type) for name, array in arrays.items()])
    return TableFile(path, schema, rows, batches)


def _text(path: Path, delimiter: str) -> TableFile:
    from pyarrow import csv

    table = csv.read_csv(path, parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True))
    return TableFile(
        path, table.schema, len(table), lambda columns: iter(table.select(list(columns)).to_batches(BATCH_ROWS))
    )


def _listed(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def _first_line(fault: BaseException) -> str:
    return next(iter(str(fault).splitlines()), type(fault).__name__)
