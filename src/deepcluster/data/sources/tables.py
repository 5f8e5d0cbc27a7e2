"""Tables whose rows hold image files: which column holds them, which the labels, and how the rows are named.

N images, in the order of the files and of the rows in each. Shared by Parquet tables and saved Hugging Face datasets.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from deepcluster.core.errors import InputError, UnreadableImage
from deepcluster.core.text import count_of, distinct, printable
from deepcluster.data.sources.image_source import ImageSource, place_of
from deepcluster.data.storage import LocalFile, StoredFile, file_stamp

# What pyarrow raises for damaged files: its own errors, and Python's for names that are no UTF-8 or belong to no column.
DAMAGES: Final = (pa.ArrowException, OSError, ValueError, LookupError, OverflowError)
_STRUCT_NAMES: Final = ("image", "img", "jpg")
_BYTES_NAMES: Final = ("image", "jpg", "png", "bytes", "data", "content")
_LABEL_NAMES: Final = ("label", "class", "target", "labels")
_COLUMNS_NAMED: Final = 20
_FILES_NAMED: Final = 3


@dataclass(frozen=True)
class Columns:
    """What is read of a table.

    Attributes:
        image: name of the column of images.
        nested: whether it is Hugging Face's struct of `bytes` and perhaps `path`, not plain bytes.
        with_path: whether it has a `path`.
        label: name of the column of labels; None where there is none.
        classes: names of the classes that the labels number; None where the labels are the names.
    """

    image: str
    nested: bool
    with_path: bool
    label: str | None
    classes: tuple[str, ...] | None


@dataclass(frozen=True)
class Table:
    """One file of a source.

    Attributes:
        file: where it lies.
        rows: how many images it holds.
        columns: what is read of it.
        paths: the path of each row as bytes, null where there is none; None where no row has one.
        labels: class name of each row, "" = unknown.
        holes: whether rows may have no bytes but the path of a file.
    """

    file: StoredFile
    rows: int
    columns: Columns
    paths: pa.LargeBinaryArray | None
    labels: list[str]
    holes: bool


class TableSource(ImageSource):
    """Images in the rows of tables that have the same columns."""

    def __init__(self, tables: Sequence[Table], where: str, rows_N: NDArray[np.int64] | None = None) -> None:
        """Take at least one table, and how `details` says where they are, such as "in 3 Parquet files".

        `rows_N` says which row of all tables each image is; None = every row, in order.
        """
        self._ends = list(accumulate(table.rows for table in tables))
        self._rows_N = rows_N
        labels = [label for table in tables for label in table.labels]
        if rows_N is not None:
            labels = [labels[row] for row in rows_N.tolist()]
        super().__init__(labels if any(labels) else None)
        self._where = where
        self._columns = next((table.columns for table in tables if table.columns.label), tables[0].columns)
        self._files = [table.file for table in tables]
        self._holes = [table.holes for table in tables]
        self._names = [_RowNames(table.file.name, table.rows, table.paths) for table in tables]

    def __len__(self) -> int:
        return self._ends[-1] if self._rows_N is None else len(self._rows_N)

    @abstractmethod
    def _stored(self, table: int, row: int) -> bytes | None:
        """Return the bytes of an image, None where the row has none; raises UnreadableImage."""

    def _find(self, index: int) -> tuple[int, int]:
        """Return the number of the table that holds an image, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        return place_of(index if self._rows_N is None else int(self._rows_N[index]), self._ends)

    def name(self, index: int) -> str:
        table, row = self._find(index)
        return self._names[table].name(row)

    def read(self, index: int) -> bytes:
        table, row = self._find(index)
        stored = self._stored(table, row)
        return _read_beside(self._files[table], self._names[table].path(row)) if stored is None else stored

    def stamp(self, index: int) -> str:
        table, row = self._find(index)
        file = self._files[table]
        path = self._names[table].path(row) if self._holes[table] and isinstance(file, LocalFile) else ""
        beside = f":{file_stamp(file.path.parent / path)}" if path and isinstance(file, LocalFile) else ""
        return f"{file.stamp}:{row}{beside}"

    def changed(self) -> str | None:
        what = []
        for file in self._files:
            now = file.now()
            if now != file.stamp:
                what.append(f"{printable(file.name)} {'has been written anew' if now else 'is gone'}")
        more = [f"and {len(what) - _FILES_NAMED:,} more"] if len(what) > _FILES_NAMED else []
        return ", ".join([*what[:_FILES_NAMED], *more]) or None

    def details(self) -> str:
        parts = [f"{self._where} (column {printable(self._columns.image)})"]
        if self.labels_N is not None:
            column = printable(self._columns.label or "")
            classes = count_of(len(self.class_names), "class")
            parts.append(f"labels from {classes} of column {column} (used for diagnostics only)")
        numbered = sum(len(names.numbered) for names in self._names)
        parts += [f"{count_of(numbered, 'repeated name')} numbered"] if numbered else []
        return ", ".join(parts)


def written_anew(file: StoredFile) -> UnreadableImage:
    """Return the fault of images whose table is no longer the one that was opened."""
    return UnreadableImage(f"{printable(file.name)} has been written anew, or is gone, since it was opened")


def _read_beside(file: StoredFile, path: str) -> bytes:
    """Return the bytes of the image file that a row names instead of holding them."""
    if not path:
        raise UnreadableImage("its row holds no image")
    if not isinstance(file, LocalFile):
        raise UnreadableImage(
            f"its row holds no image but the path {path}, which is looked up for tables on this machine alone"
        )
    full = file.path.parent / path
    try:
        if not full.is_file():
            raise UnreadableImage(f"its row holds no image but the path {path}, and there is no file {full}")
        return full.read_bytes()
    except (OSError, ValueError) as error:
        raise UnreadableImage(f"its row holds no image but the path {path}, which can't be read: {error}") from error


class _RowNames:
    """Names of the rows of one file: their paths where every row has one, else their numbers.

    Attributes:
        numbered: new names by row, of rows whose path was met before.
    """

    def __init__(self, file_name: str, rows: int, paths: pa.LargeBinaryArray | None) -> None:
        self._prefix = f"{printable(file_name)}::"
        self._digits = max(6, len(str(rows - 1)))
        self._paths = paths
        self._named = paths is not None and pc.min(pc.fill_null(pc.binary_length(paths), 0)).as_py() > 0
        self.numbered: dict[int, str] = {}
        if self._named and paths is not None and len(pc.unique(paths)) < rows:
            texts = [_text(path) for path in paths.to_pylist()]
            renamed = enumerate(zip(texts, distinct(texts), strict=True))
            self.numbered = {row: new for row, (text, new) in renamed if new != text}

    def path(self, row: int) -> str:
        """Return what the path of a row says, with forward slashes; "" where there is none."""
        return "" if self._paths is None else _text(self._paths[row].as_py() or b"")

    def name(self, row: int) -> str:
        inner = self.numbered.get(row) or self.path(row) if self._named else f"{row:0{self._digits}}"
        return self._prefix + inner


def _text(stored: bytes) -> str:
    r"""Return UTF-8 as text; bytes that are none become `\xe9`."""
    return stored.decode("utf-8", "backslashreplace")


def find_columns(schema: pa.Schema, features: Mapping[str, Any], file: StoredFile) -> Columns:
    """Choose the columns of images and of labels; `features` is what Hugging Face says of the columns.

    Raises InputError where no column holds images, or several do and none has one of the usual names.
    """
    counts = Counter(schema.names)
    fields = {field.name: field.type for field in schema if counts[field.name] == 1}
    images = {name for name in fields if features.get(name, {}).get("_type") == "Image"}
    # Sounds are stored in the same layout; only what Hugging Face says of the columns tells them apart.
    structs = [name for name, kind in fields.items() if _holds_files(kind) and (not images or name in images)]
    plain = [name for name, kind in fields.items() if _is_bytes(kind)]
    image = _choose(structs, _STRUCT_NAMES, file) if structs else _choose(plain, _BYTES_NAMES, file)
    if image is None:
        named = [f"{printable(field.name)} ({str(field.type)[:80]})" for field in islice(schema, _COLUMNS_NAMED)]
        more = ["..."] if len(schema) > _COLUMNS_NAMED else []
        raise InputError(
            f"{file.where()} has no column of image files: its columns are {', '.join([*named, *more]) or 'none'}; "
            "store the bytes of the image files in a binary column called image"
        )
    kind = fields[image]
    with_path = bool(structs) and kind.get_field_index("path") >= 0
    usable = {name for name, kind in fields.items() if pa.types.is_integer(kind) or _is_text(kind)}
    lower = {name.lower(): name for name in usable}
    label = next((lower[name] for name in _LABEL_NAMES if name in lower), None)
    declared = [name for name in usable if features.get(name, {}).get("_type") == "ClassLabel"]
    if label is None and len(declared) == 1:
        label = declared[0]
    names = None if label is None else features.get(label, {}).get("names")
    classes = None
    if label is not None and pa.types.is_integer(fields[label]) and isinstance(names, list):
        classes = tuple(map(str, names))
    return Columns(image, bool(structs), with_path, label, classes)


def same_columns(tables: Sequence[Table]) -> None:
    """Raise InputError where a table has its images in another column than the first one."""
    first = tables[0]
    for table in tables:
        if (table.columns.image, table.columns.nested) != (first.columns.image, first.columns.nested):
            raise InputError(
                f"{table.file.where()} has its images in {_layout(table.columns)}, but {first.file.where()} in "
                f"{_layout(first.columns)}; give them as separate DATA, or write them alike"
            )


def _layout(columns: Columns) -> str:
    return f"column {printable(columns.image)} ({'a struct of bytes and path' if columns.nested else 'plain bytes'})"


def _choose(names: Sequence[str], usual: Sequence[str], file: StoredFile) -> str | None:
    lower = {name.lower(): name for name in reversed(names)}
    found = next((lower[name] for name in usual if name in lower), None)
    if found is None and len(names) > 1:
        raise InputError(
            f"{file.where()} has {len(names)} columns that may hold the images: {', '.join(map(printable, names))}; "
            "rename the right one to image"
        )
    return found or next(iter(names), None)


def _is_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _holds_files(kind: pa.DataType) -> bool:
    """Whether it is a struct with `bytes`, and a `path` that is text or missing."""
    if not pa.types.is_struct(kind):
        return False
    inner = {field.name: field.type for field in kind}
    return "bytes" in inner and _is_bytes(inner["bytes"]) and _is_text(inner.get("path", pa.string()))


def label_texts(column: pa.ChunkedArray, classes: Sequence[str] | None) -> list[str]:
    """Return the class name of each row: null, numbers below 0 and numbers that are no class become ""."""
    if _is_text(column.type):
        stored = [b"" if value == b"-1" else value or b"" for value in as_bytes(column).to_pylist()]
        text_of = {value: _text(value) for value in set(stored)}  # One object a class, not one a row.
        return [text_of[value] for value in stored]
    values = [-1 if value is None else value for value in column.to_pylist()]
    texts = {value: "" if value < 0 else str(value) for value in set(values)}
    if classes is not None:
        texts = {value: classes[value] if 0 <= value < len(classes) else "" for value in texts}
    return [texts[value] for value in values]


def as_bytes(column: pa.ChunkedArray | pa.Array) -> Any:
    """Return bytes or text of any layout as large_binary."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(pa.large_binary())


def row_paths(column: pa.ChunkedArray) -> pa.LargeBinaryArray | None:
    """Return the `path` of a column of structs, with forward slashes; None where no row has one."""
    paths = as_bytes(pc.struct_field(column, "path"))
    if paths.null_count == len(paths):
        return None
    # As tables that were made on Windows have them.
    turned = pc.replace_substring(paths, b"\\", b"/").combine_chunks()
    return turned if isinstance(turned, pa.Array) else pa.concat_arrays(turned.chunks)


def features_in(text: bytes | str) -> dict[str, Any]:
    """Return what Hugging Face says of the columns, from the JSON of its `info`; {} where it says nothing."""
    try:
        info = json.loads(text)
    except ValueError:
        return {}
    info = info.get("info", info) if isinstance(info, dict) else {}
    features = info.get("features") if isinstance(info, dict) else {}
    found = features.items() if isinstance(features, dict) else ()
    return {name: feature for name, feature in found if isinstance(feature, dict)}


def first_line(error: Exception) -> str:
    """Return what pyarrow says of a fault, without its stack of C++ functions."""
    return str(error).partition("\n")[0].strip().rstrip(".")[:200]
