"""Tables as files of several formats, written a few rows at a time."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from deepcluster.core.files import written_beside
from deepcluster.run.cluster_names import EXCEL_MARK

ENDINGS = (".parquet", ".csv", ".jsonl")
# Rows that are Python objects at once.
ROWS_AT_ONCE = 1024


def writer_of(ending: str, file: BinaryIO, schema: Any) -> Any:
    """Return an object with `write_table` and `close` that writes tables of a schema into a file of a format."""
    import pyarrow.parquet as pq

    if ending == ".parquet":
        return pq.ParquetWriter(file, schema)
    return _CsvWriter(file) if ending == ".csv" else _JsonWriter(file)


def write_rows(columns: Mapping[str, Any], target: Path) -> None:
    """Write a table that is in memory, of columns by name."""
    import pyarrow as pa

    # Texts that are all missing have no type of their own.
    missing = {name for name, values in columns.items() if isinstance(values, list) and all(one is None for one in values)}
    columns = {name: pa.array(values, pa.string()) if name in missing else values for name, values in columns.items()}
    table = pa.table(columns, metadata={"deepcluster": "{}"})
    with written_beside(target, durable=True) as beside, beside.open("wb") as file:
        writer = writer_of(target.suffix, file, table.schema)
        writer.write_table(table)
        writer.close()


class _CsvWriter:
    """Text for spreadsheets and everything else: UTF-8 with its mark, text in quotes, empty cells for missing values.

    A column of lists becomes a column per number: embedding_0, embedding_1, ...
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self._writer: Any = None
        file.write(EXCEL_MARK.encode())

    def write_table(self, table: Any) -> None:
        """Write rows."""
        from pyarrow import csv

        table = _plain(table)
        if self._writer is None:
            self._writer = csv.CSVWriter(self.file, table.schema)
        self._writer.write_table(table)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


def _plain(table: Any) -> Any:
    """Return a table with a column per number instead of lists, and with null instead of NaN."""
    import pyarrow as pa

    columns: dict[str, Any] = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if width := getattr(column.type, "list_size", 0):
            rows = column.flatten().to_numpy().reshape(-1, width)
            columns |= {f"{name}_{number}": pa.array(rows[:, number], from_pandas=True) for number in range(width)}
        else:
            columns[name] = _without_nan(column)
    return pa.table(columns)


def _without_nan(column: Any) -> Any:
    """Return a column with null instead of NaN."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.if_else(pc.is_nan(column), None, column) if pa.types.is_floating(column.type) else column


class _JsonWriter:
    """A JSON object per line; null for missing and infinite values."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def write_table(self, table: Any) -> None:
        """Write rows."""
        for start in range(0, len(table), ROWS_AT_ONCE):
            some = table.slice(start, ROWS_AT_ONCE)
            columns = [_values(some[name].combine_chunks()) for name in some.column_names]
            for row in zip(*columns, strict=True):
                line = dict(zip(some.column_names, row, strict=True))
                self.file.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        """Nothing is left to be written."""


def _values(column: Any) -> list[Any]:
    """Return Python's values of a column; float32 numbers become those with the fewest digits that stand for them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if width := getattr(column.type, "list_size", 0):
        numbers = _values(column.flatten())
        return [numbers[start : start + width] for start in range(0, len(numbers), width)]
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_finite(column), column, None).cast(pa.string()).cast(pa.float64())
    values: list[Any] = column.to_pylist()
    return values
