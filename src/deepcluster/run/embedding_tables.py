"""Tables of embeddings as `embed` writes them, read in blocks: Parquet (a file, or a folder of them), or an .npy array.

N rows, B of a block, D numbers of an embedding.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.core.errors import InputError
from deepcluster.core.files import arrow_file, check_file, user_path
from deepcluster.core.text import count_of, of_line, printable

PARQUET, ARRAY = ".parquet", ".npy"
# Column names that `embed` writes. Another column of embeddings is used if it is the only one.
EMBEDDING, NAME, PATH = "embedding", "name", "path"
# Rows that are read at once.
BLOCK_ROWS = 8_192
# Rows by which a table is recognised.
COMPARED_ROWS = 1_024
NO_NUMBERS = "its embedding is missing, or holds values that are not finite numbers"


def is_table(model: object) -> bool:
    """Return whether what was given as a model is a table: a .parquet or .npy file, or a folder of Parquet files."""
    if not isinstance(model, str | Path):
        return False
    path = user_path(model)
    if path.is_dir():
        return not (path / "config.json").exists() and any(path.glob(f"*{PARQUET}"))
    return path.suffix in (PARQUET, ARRAY)


def open_table(path: str | Path, limit: int | None = None) -> "EmbeddingTable":
    """Return a table of embeddings, or `limit` of its rows, spread evenly; they are not read yet.

    Raises:
        InputError: it can't be read, or has no embeddings.
    """
    path = user_path(path)
    table = ArrayTable(path) if path.suffix == ARRAY else ParquetTable(path)
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit} leaves no rows; use --limit 1 or more, or leave it out for all")
    return table if limit is None or limit >= len(table) else SomeRows(table, limit)


def table_of_run(run: Path, clustered: Mapping[str, Any], limit: int | None = None) -> "EmbeddingTable":
    """Return the table that a run was made of, or `limit` of its rows.

    Args:
        run: its folder.
        clustered: what the run notes of the table.

    Raises:
        InputError: it is gone, or holds other rows by now.
    """
    table = open_table(clustered["model"])
    made_of = clustered.get("table")  # Earlier versions did not note it.
    if made_of is not None and made_of != table.facts():
        before, now = (f"{one['rows']:,} rows of {one['dim']:,} numbers" for one in (made_of, table.facts()))
        now = f"other {now}" if before == now else now
        raise InputError(
            f"{table.path} has changed since {run} was made of it: it held {before}, and holds {now}. Restore it, or give "
            "the table itself instead of the run"
        )
    return open_table(clustered["model"], limit)


@dataclass(frozen=True)
class EmbeddingTable:
    """Embeddings with names.

    Attributes:
        path: the file or folder.
    """

    path: Path

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def dim(self) -> int:
        """D, the width of the embeddings."""
        raise NotImplementedError

    def names(self) -> list[str]:
        """Return the name of each row; "row 0", … where the table has none."""
        raise NotImplementedError

    def paths(self) -> list[str | None] | None:
        """Return the path of the image of each row, None for a row without one; None where the table has no paths."""
        return None

    def read(self, part: slice, at_once: int) -> Iterator[Tensor]:
        """Yield rows (B, D), float32, of a part of the table: `at_once` of them, fewer at the end; NaN where missing."""
        raise NotImplementedError

    def take(self, rows_M: Tensor) -> Tensor:
        """Return some rows (M, D), ascending."""
        found, first = list[Tensor](), 0
        for rows_BD in self.read(slice(0, len(self)), BLOCK_ROWS):
            found.append(rows_BD[rows_M[(rows_M >= first) & (rows_M < first + len(rows_BD))] - first])
            first += len(rows_BD)
        return torch.cat(found)

    def facts(self) -> dict[str, Any]:
        """Return what tells it from others: numbers of rows and columns, and a digest of the first rows."""
        first = next(self.read(slice(0, min(len(self), COMPARED_ROWS)), COMPARED_ROWS))
        return {"rows": len(self), "dim": self.dim, "digest": sha256(first.numpy().tobytes()).hexdigest()[:16]}

    def describe(self) -> str:
        """Return what it is, in words."""
        return f"{count_of(len(self), 'embedding')} of {self.dim:,} numbers in {self.path}"


class SomeRows(EmbeddingTable):
    """Some rows of a table, spread evenly."""

    def __init__(self, table: EmbeddingTable, limit: int) -> None:
        super().__init__(table.path)
        self._table, self.rows_N = table, torch.arange(limit) * len(table) // limit

    def __len__(self) -> int:
        return len(self.rows_N)

    @property
    def dim(self) -> int:
        return self._table.dim

    def names(self) -> list[str]:
        names = self._table.names()
        return [names[row] for row in self.rows_N.tolist()]

    def paths(self) -> list[str | None] | None:
        paths = self._table.paths()
        return None if paths is None else [paths[row] for row in self.rows_N.tolist()]

    def facts(self) -> dict[str, Any]:
        return self._table.facts()

    def read(self, part: slice, at_once: int) -> Iterator[Tensor]:
        return _in_blocks(self._pieces(self.rows_N[part]), at_once)

    def _pieces(self, rows_M: Tensor) -> Iterator[NDArray[np.float32]]:
        first = int(rows_M[0]) if len(rows_M) else 0
        stop = int(rows_M[-1]) + 1 if len(rows_M) else 0
        for rows_BD in self._table.read(slice(first, stop), BLOCK_ROWS):
            wanted = rows_M[(rows_M >= first) & (rows_M < first + len(rows_BD))] - first
            yield rows_BD[wanted].numpy()
            first += len(rows_BD)

    def describe(self) -> str:
        return f"{len(self):,} of {self._table.describe()} (--limit)"


def _in_blocks(pieces: Iterable[NDArray[np.float32]], at_once: int) -> Iterator[Tensor]:
    """Yield rows, which come in pieces of any length, `at_once` at a time, fewer at the end."""
    waiting: list[NDArray[np.float32]] = []
    n_waiting = 0
    for rows_BD in pieces:
        waiting.append(rows_BD)
        n_waiting += len(rows_BD)
        while n_waiting >= at_once:
            joined_ND = waiting[0] if len(waiting) == 1 else np.concatenate(waiting)
            yield torch.from_numpy(joined_ND[:at_once])
            waiting, n_waiting = [joined_ND[at_once:]], n_waiting - at_once
    if n_waiting:
        yield torch.from_numpy(np.concatenate(waiting))


class ArrayTable(EmbeddingTable):
    """An .npy file with one row per image, and the names of the images beside it in `.names.txt`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        check_file(path)
        try:
            self.rows_ND: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as fault:
            raise InputError(f"{path} can't be read as a NumPy array: {str(fault).splitlines()[0]}") from None
        if getattr(self.rows_ND, "ndim", 0) != 2 or self.rows_ND.dtype.kind not in "fiu" or not self.rows_ND.size:
            shape = " x ".join(map(str, getattr(self.rows_ND, "shape", ()))) or "nothing"
            raise InputError(f"{path} holds an array of {shape}; embeddings are one row of numbers per image")

    def __len__(self) -> int:
        return len(self.rows_ND)

    @property
    def dim(self) -> int:
        return int(self.rows_ND.shape[1])

    def names(self) -> list[str]:
        path = self.path.with_suffix(".names.txt")
        if not path.is_file():
            return [f"row {row}" for row in range(len(self))]
        lines = [of_line(line) for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
        if len(lines) != len(self):
            raise InputError(f"{path} has {count_of(len(lines), 'line')}, but {self.path} has {count_of(len(self), 'row')}")
        return lines

    def read(self, part: slice, at_once: int) -> Iterator[Tensor]:
        for start in range(part.start, part.stop, at_once):
            rows_BD = self.rows_ND[start : min(start + at_once, part.stop)]
            yield torch.from_numpy(np.array(rows_BD, np.float32))  # A copy: pages of the file are not kept.


def _is_embedding(kind: Any) -> bool:
    import pyarrow as pa

    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)))


class ParquetTable(EmbeddingTable):
    """A Parquet file, or a folder of them, with a column of lists of numbers."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        super().__init__(path)
        paths = sorted(path.glob(f"*{PARQUET}")) if path.is_dir() else [path]
        self.files: list[Any] = []
        for file in paths:
            check_file(file)
            try:
                self.files.append(pq.ParquetFile(arrow_file(file), pre_buffer=False))
            except Exception as fault:  # Arrow raises several types for damaged files.
                raise InputError(f"{file} can't be read as Parquet: {str(fault).splitlines()[0]}") from None
        self.column = self._embeddings(self.files[0].schema_arrow)
        self.name_column = NAME if NAME in self.files[0].schema_arrow.names else None
        self._check_columns(paths)
        self._dim = self._width()
        if not self._dim:
            raise InputError(f"{path} holds no embeddings: column {self.column} is empty")

    def _check_columns(self, paths: list[Path]) -> None:
        """Raise `InputError` unless all files have the columns that are read of the first one."""
        first, *others = (file.schema_arrow for file in self.files)
        used = [name for name in (self.column, NAME, PATH) if name in first.names]
        for path, schema in zip(paths[1:], others, strict=True):
            for name in used:
                if name not in schema.names or (name == self.column and not _is_embedding(schema.field(name).type)):
                    raise InputError(
                        f"{path} has no column {name} as {paths[0]} has it: a folder of Parquet files is one table. Put "
                        "other files elsewhere"
                    )

    def _width(self) -> int:
        """Return D: the length of the first embedding; 0 if there is none."""
        import pyarrow.compute as pc

        batches = (batch for file in self.files for batch in file.iter_batches(1024, columns=[self.column]))
        longest = (pc.max(pc.list_value_length(batch.column(0))).as_py() or 0 for batch in batches)
        return next((length for length in longest if length), 0)

    def _embeddings(self, schema: Any) -> str:
        fitting = [field.name for field in schema if _is_embedding(field.type)]
        if EMBEDDING in fitting:
            return EMBEDDING
        if len(fitting) == 1:
            return str(fitting[0])
        columns = ", ".join(f"{printable(field.name)} ({field.type})" for field in schema)
        several = f"{len(fitting)} columns hold lists of numbers" if fitting else "no column holds lists of numbers"
        raise InputError(f"{self.path}: {several}; embeddings are expected in a column {EMBEDDING}. It has {columns}")

    def __len__(self) -> int:
        return sum(file.metadata.num_rows for file in self.files)

    @property
    def dim(self) -> int:
        return self._dim

    def names(self) -> list[str]:
        if self.name_column is None:
            return [f"row {row}" for row in range(len(self))]
        return [str(name) for file in self.files for name in file.read(columns=[self.name_column])[0].to_pylist()]

    def paths(self) -> list[str | None] | None:
        import pyarrow as pa

        schema = self.files[0].schema_arrow
        if PATH not in schema.names or not pa.types.is_string(schema.field(PATH).type):
            return None
        return [path for file in self.files for path in file.read(columns=[PATH])[0].to_pylist()]

    def read(self, part: slice, at_once: int) -> Iterator[Tensor]:
        return _in_blocks(self._pieces(part, at_once), at_once)

    def _pieces(self, part: slice, at_once: int) -> Iterator[NDArray[np.float32]]:
        """Yield the rows of a part as they lie in the files: only the groups of rows that are needed are read."""
        first = 0
        for file in self.files:
            wanted, before = list[int](), None
            for group in range(file.metadata.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if first < part.stop and first + count > part.start:
                    wanted.append(group)
                    before = first if before is None else before
                first += count
            if before is None:
                continue
            for batch in file.iter_batches(at_once, row_groups=wanted, columns=[self.column], use_threads=False):
                low, high = max(part.start - before, 0), min(part.stop - before, len(batch))
                if low < high:
                    yield self._rows(batch.column(0).slice(low, high - low), before + low)
                before += len(batch)
                if before >= part.stop:
                    return

    def _rows(self, column: Any, first: int) -> NDArray[np.float32]:
        """Return rows (B, D) of a column, whose first one is row `first` of the table; NaN where an embedding is missing."""
        import pyarrow.compute as pc

        length_B = np.nan_to_num(pc.list_value_length(column).to_numpy(zero_copy_only=False)).astype(np.int64)
        there = np.flatnonzero(length_B)
        if len(other := there[length_B[there] != self.dim]):
            raise InputError(
                f"{self.path}: the embedding of row {first + other[0]:,} has {length_B[other[0]]:,} numbers, others have "
                f"{self.dim:,}; leave out one kind"
            )
        values_BD = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, self.dim)
        if len(there) == len(length_B):
            return np.array(values_BD, np.float32)
        rows_BD = np.full((len(length_B), self.dim), np.nan, np.float32)
        rows_BD[there] = values_BD
        return rows_BD
