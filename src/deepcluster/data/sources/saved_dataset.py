"""Folders written by `save_to_disk` of Hugging Face's `datasets`: Arrow streams, mapped into memory where they are."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from deepcluster.core.errors import InputError
from deepcluster.core.files import read_regular
from deepcluster.core.text import count_of
from deepcluster.data.sources.image_source import ImageSource
from deepcluster.data.sources.joined import ChosenImages
from deepcluster.data.sources.tables import DAMAGES, MappedStream, Table, TableSource, damaged, find_columns
from deepcluster.data.storage import LocalFile

_STATE = "state.json"
_SPLITS = "dataset_dict.json"


def is_saved_dataset(folder: Path) -> bool:
    """Return whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` has written this folder."""
    return "_data_files" in _json(folder / _STATE) or "splits" in _json(folder / _SPLITS)


def open_saved_dataset(folder: Path) -> ImageSource:
    """Open the images of a saved data set, of all its splits in their order.

    Rows that an indices file leaves out are left out, and a row that it repeats counts once.

    Raises:
        InputError: a file is missing or damaged, or has no images.
    """
    splits = _json(folder / _SPLITS).get("splits")
    tables: list[SavedTable] = []
    rows: list[NDArray[np.int64]] = []
    start = 0
    for split in map(str, splits) if isinstance(splits, list) and splits else [""]:
        inner, prefix = folder / split, f"{split}/" if split else ""
        if "_data_files" not in _json(inner / _STATE):
            raise InputError(
                f"{inner / _STATE} is missing or damaged, so that the saved dataset can't be opened; save it again"
            )
        info = b""
        with suppress(OSError):
            info = read_regular(inner / "dataset_info.json")
        opened = [SavedTable(LocalFile(inner / name, prefix + name), info) for name in _listed(inner, "_data_files")]
        rows.append(start + _order(inner, sum(map(len, opened))))
        start += sum(map(len, opened))
        tables += [table for table in opened if len(table)]
    rows_N = np.concatenate(rows)
    if not len(rows_N):
        raise InputError(f"{folder} is a saved dataset without rows, and so without images")
    source = TableSource(tables, f"in {count_of(len(tables), 'Arrow file')} of a saved Hugging Face dataset")
    return source if np.array_equal(rows_N, np.arange(start)) else ChosenImages(source, rows_N)


class SavedTable(Table):
    """One Arrow file."""

    def __init__(self, file: LocalFile, info: bytes) -> None:
        """Open it; raises InputError."""
        self._stream = MappedStream(file)
        rows = self._stream.read_all()
        try:
            columns = find_columns(rows.schema, file, info)
            used = [columns.image] + [columns.label or ""] * (columns.label is not None)
            super().__init__(file, columns, pa.table({name: self._stream[name] for name in used}))
        except DAMAGES as error:
            raise damaged(file, error) from error
        self.may_be_null = columns.with_path and pc.struct_field(self._stream[columns.image], "bytes").null_count > 0

    def stored(self, row: int) -> bytes | None:
        image = self._stream[self.columns.image][row]
        found: bytes | None = (image["bytes"] if self.columns.nested else image).as_py()
        return found


def _json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; {} if there is none."""
    try:
        found = json.loads(read_regular(path))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _listed(folder: Path, kind: str) -> list[str]:
    """Return the names of the files of one kind in the state of a data set; old versions list whole paths."""
    listed = _json(folder / _STATE).get(kind)
    names = [entry.get("filename") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    return [Path(name).name for name in names if isinstance(name, str)]


def _order(folder: Path, count: int) -> NDArray[np.int64]:
    """Return which of its rows a data set consists of: all, unless it has an indices file, as old versions wrote."""
    files = [LocalFile(folder / name) for name in _listed(folder, "_indices_data_files")]
    if not files:
        return np.arange(count, dtype=np.int64)
    try:
        rows = np.concatenate([MappedStream(file)["indices"].to_numpy().astype(np.int64) for file in files])
    except DAMAGES as error:
        raise damaged(files[0], error) from error
    if len(rows) and not 0 <= rows.min() <= rows.max() < count:
        raise InputError(f"{files[0].path} names row {rows.max():,}, but the dataset has {count:,} rows; save it again")
    _, first = np.unique(rows, return_index=True)
    return rows[np.sort(first)]
