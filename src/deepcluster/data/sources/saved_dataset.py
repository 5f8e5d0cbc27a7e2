"""Folders that `save_to_disk` of Hugging Face's `datasets` has written: streams of Arrow, read where they lie.

Rows are not compressed there, so that each is a slice of a file that is mapped into memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from deepcluster.core.errors import InputError
from deepcluster.core.text import count_of
from deepcluster.data.sources.image_source import ImageSource
from deepcluster.data.sources.tables import (
    DAMAGES,
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
from deepcluster.data.storage import LocalFile, StoredFile, check_regular

_STATE: Final = "state.json"
_SPLITS: Final = "dataset_dict.json"
_STREAM_END: Final = b"\xff\xff\xff\xff\0\0\0\0"


def is_saved_dataset(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` has written this folder."""
    return "_data_files" in _json(folder / _STATE) or "splits" in _json(folder / _SPLITS)


def open_saved_dataset(folder: Path) -> ImageSource:
    """Open the images of a saved dataset, of all its splits in the order that it gives.

    Rows that the dataset leaves out are left out, and of rows that it repeats the first one counts.
    Raises InputError where a file is missing or damaged, or has no images.
    """
    splits = _json(folder / _SPLITS).get("splits")
    names = [str(split) for split in splits] if isinstance(splits, list) else []
    opened: list[_SavedTable] = []
    rows: list[NDArray[np.int64]] = []
    start = 0
    for prefix, inner in [(f"{name}/", folder / name) for name in names] or [("", folder)]:
        found = _open_split(inner, prefix)
        count = sum(one.rows for one in found)
        rows.append(start + _order(inner, count))
        start += count
        opened += found
    if not opened or not sum(map(len, rows)):
        raise InputError(f"{folder} is a saved dataset without rows, and so without images")
    same_columns(opened)
    rows_N = np.concatenate(rows)
    return SavedDataset(opened, None if np.array_equal(rows_N, np.arange(start)) else rows_N)


@dataclass(frozen=True)
class _SavedTable(Table):
    """An open file, and the images, which lie in the file itself."""

    images: pa.ChunkedArray


class SavedDataset(TableSource):
    """Images in the rows of Arrow streams. Safe to read from many threads."""

    def __init__(self, opened: Sequence[_SavedTable], rows_N: NDArray[np.int64] | None) -> None:
        """Take at least one file, and which row of them all each image is; None = every row, in order."""
        where = f"in {count_of(len(opened), 'Arrow file')} of a saved Hugging Face dataset"
        super().__init__(opened, where, rows_N)
        self._images = [one.images for one in opened]

    def _stored(self, table: int, row: int) -> bytes | None:
        file = self._files[table]
        # A microsecond or two; without it, a file that was cut short meanwhile would end the process.
        if file.now() != file.stamp:
            raise written_anew(file)
        stored: bytes | None = self._images[table][row].as_py()
        return stored


def _json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; {} where there is none."""
    try:
        check_regular(path)
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _file_names(folder: Path, kind: str) -> list[str]:
    """Return the names of the files of one kind that the state of a dataset lists; old versions give whole paths."""
    listed = _json(folder / _STATE).get(kind)
    entries = [entry.get("filename") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    return [Path(name).name for name in entries if isinstance(name, str)]


def _open_split(folder: Path, prefix: str) -> list[_SavedTable]:
    """Open the files of one dataset, those without rows left out."""
    if "_data_files" not in _json(folder / _STATE):
        raise InputError(
            f"{folder / _STATE} is missing or damaged, so that the saved dataset can't be opened; save it again"
        )
    try:
        check_regular(folder / "dataset_info.json")
        features = features_in((folder / "dataset_info.json").read_bytes())
    except OSError:
        features = {}
    files = [LocalFile(folder / name, prefix + name) for name in _file_names(folder, "_data_files")]
    opened = (_open_table(file, features) for file in files)
    return [one for one in opened if one.rows]


def _open_table(file: LocalFile, features: dict[str, Any]) -> _SavedTable:
    whole = _read_stream(file)
    rows, labels = len(whole), [""] * len(whole)
    try:
        features = features or features_in((whole.schema.metadata or {}).get(b"huggingface", b"{}"))
        columns = find_columns(whole.schema, features, file)
        images = whole[columns.image]
        images.validate(full=True)  # Wrong offsets in a damaged file would end the process.
        paths = row_paths(images) if columns.with_path else None
        images = pc.struct_field(images, "bytes") if columns.nested else images
        if not (pa.types.is_binary(images.type) or pa.types.is_large_binary(images.type)):
            images = as_bytes(images)
        if columns.label is not None:
            whole[columns.label].validate(full=True)
            labels = label_texts(whole[columns.label], columns.classes)
    except DAMAGES as error:
        raise InputError(f"{file.where()} is damaged ({first_line(error)}); save the dataset again") from error
    return _SavedTable(file, rows, columns, paths, labels, images.null_count > 0, images)


def _read_stream(file: StoredFile) -> pa.Table:
    """Map an Arrow stream into memory; raises InputError where it is none, or is cut off."""
    try:
        with pa.memory_map(file.where()) as mapped:
            table = pa.ipc.open_stream(mapped).read_all()
    except DAMAGES as error:
        what = f"{file.where()} can't be read as an Arrow stream ({first_line(error)})"
        raise InputError(f"{what}; save the dataset again") from error
    # A stream that is cut between two batches reads like one that is whole.
    if file.read(0, 4) == _STREAM_END[:4] and file.read(file.size - len(_STREAM_END), len(_STREAM_END)) != _STREAM_END:
        raise InputError(f"{file.where()} is cut off: the end of the Arrow stream is missing; copy or save it again")
    return table


def _order(folder: Path, count: int) -> NDArray[np.int64]:
    """Return which of its rows a dataset consists of: all, but for an indices file, which old versions wrote."""
    names = _file_names(folder, "_indices_data_files")
    if not names:
        return np.arange(count, dtype=np.int64)
    tables = [_read_stream(LocalFile(folder / name)) for name in names]
    try:
        rows = np.concatenate([table["indices"].to_numpy().astype(np.int64) for table in tables])
    except DAMAGES as error:
        raise InputError(f"{folder / names[0]} holds no column of row numbers called indices; save it again") from error
    if len(rows) and not 0 <= rows.min() <= rows.max() < count:
        raise InputError(f"{folder / names[0]} names row {rows.max():,}, but the dataset has {count:,} rows; save it again")
    _, first = np.unique(rows, return_index=True)
    return rows[np.sort(first)]
