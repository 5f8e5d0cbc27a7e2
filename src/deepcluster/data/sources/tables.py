"""Tables with an image file per row, in Parquet files or saved Hugging Face data sets: columns, labels, names and rows."""

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from deepcluster.core.errors import InputError, UnreadableImage
from deepcluster.core.files import file_stamp
from deepcluster.core.kinds import BEGIN_BYTES, stand_in
from deepcluster.core.text import count_of, distinct, printable
from deepcluster.data.sources.image_source import ImageSource
from deepcluster.data.sources.joined import JoinedSource
from deepcluster.data.sources.labels import NoLabels, class_names
from deepcluster.data.storage import LocalFile, StoredFile

# Errors of pyarrow for damaged files: its own, and Python's for names that are not UTF-8 or belong to no column.
DAMAGES = (pa.ArrowException, OSError, ValueError, LookupError, OverflowError)
_BYTES = (pa.binary(), pa.large_binary(), pa.binary_view())
OURS = b"deepcluster"  # A key in the metadata of all tables that this program writes.
_TEXT = (pa.string(), pa.large_string(), pa.string_view())
_LABELS = ("label", "class", "target", "labels", "category", "class_name", "label_name")


class NoImageColumn(InputError):
    """A table without a column of images; `is_ours`: this program has written it, with features or clusters."""

    def __init__(self, message: str, *, is_ours: bool) -> None:
        super().__init__(message)
        self.is_ours = is_ours


class Columns(NamedTuple):
    """The columns of a table that are read."""

    image: str
    nested: bool  # Hugging Face's struct of `bytes` and perhaps `path`, instead of plain bytes
    with_path: bool
    label: str | None
    classes: list[str] | None  # of integer labels; None if the labels are the names
    label_fault: str = ""  # why the column with the usual name is not used

    def images(self, rows: pa.Table | pa.RecordBatch) -> Any:
        """Return the images of rows as large_binary."""
        column = rows.column(self.image)
        return _as_bytes(pc.struct_field(column, "bytes") if self.nested else column)


class Table(ImageSource):
    """The images in the rows of one file.

    Attributes:
        numbered: new names by row of the rows that repeat an earlier path.
        may_be_null: whether some row may hold no image, only the path of one.
    """

    def __init__(self, file: StoredFile, columns: Columns, rows: pa.Table) -> None:
        """Take paths and labels from `rows`, which need not hold the images; raises one of `DAMAGES`."""
        self.file, self.columns, self.may_be_null = file, columns, True
        self.label_fault = columns.label_fault
        labels = [] if columns.label is None else self._labels(rows[columns.label])
        super().__init__(labels if any(labels) else None)
        self._rows = len(rows)
        stored = _as_bytes(pc.struct_field(rows[columns.image], "path")).to_pylist() if columns.with_path else []
        paths = [_text((path or b"").replace(b"\\", b"/")) for path in stored]  # Windows writes backslashes.
        self._paths = pa.array(paths, pa.large_string()) if any(paths) else None
        self._named = bool(paths) and all(paths)
        names = distinct(paths) if self._named and len(set(paths)) < len(paths) else paths
        self.numbered = {row: name for row, name in enumerate(names) if name != paths[row]}

    def _labels(self, column: pa.ChunkedArray) -> list[str]:
        """Return the class name of each row; none, and why in `label_fault`, if these are no labels."""
        values, classes = (_as_bytes(column) if _plain(column.type) in _TEXT else column).to_pylist(), self.columns.classes
        if classes is not None:
            values = [None if value is None or value < 0 else "".join(classes[value : value + 1]) for value in values]
        try:
            labels = class_names(values)
            fault = "no labels" if labels and not any(labels) else ""
        except NoLabels as no_labels:
            labels, fault = [], str(no_labels)
        self.label_fault = f"column {printable(self.columns.label or '')} holds {fault}, and is not used" if fault else ""
        return labels

    def __len__(self) -> int:
        return self._rows

    @abstractmethod
    def stored(self, row: int) -> bytes | None:
        """Return the image in a row, None where it is null; raises UnreadableImage or InputError."""

    def _path(self, row: int) -> str:
        return "" if self._paths is None else str(self._paths[row].as_py())

    def name(self, index: int) -> str:
        number = f"{index:0{max(6, len(str(self._rows - 1)))}}"
        inner = self.numbered.get(index) or self._path(index) if self._named else number
        return f"{printable(self.file.name)}::{inner}"

    def read(self, index: int) -> bytes:
        path, what = self._path(index), "its row holds no image"
        try:
            stored = self.stored(index)
            if stored is not None:
                return stored
            if path and isinstance(self.file, LocalFile):
                what += f" but the path {path}"
                full = self.file.path.parent / path
                if full.is_file():
                    return full.read_bytes()
                what += f", and there is no file {full}"
            elif path:
                what += f" but the path {path}, which is looked up only for tables on this machine"
        except InputError as error:  # The file is gone, or the network.
            raise UnreadableImage(str(error)) from error
        except (OSError, ValueError) as error:
            raise UnreadableImage(f"{what}, which can't be read: {error}") from error
        raise UnreadableImage(what)

    def stamp(self, index: int) -> str:
        path = self._path(index) if self.may_be_null else ""
        beside = f":{file_stamp(self.file.path.parent / path)}" if path and isinstance(self.file, LocalFile) else ""
        return f"{self.file.stamp}:{index}{beside}"

    def holder(self, index: int) -> str:
        return self.file.where()

    def changed(self) -> str | None:
        now = self.file.now()
        what = "has been overwritten" if now else "is gone"
        return None if now == self.file.stamp else f"{printable(self.file.name)} {what}"

    def details(self) -> str:
        return f"in {printable(self.file.name)}"


class TableSource(JoinedSource):
    """Images in the rows of tables that have the same columns. Safe to read from many threads and processes."""

    def __init__(self, tables: Sequence[Table], where: str) -> None:
        """Join tables, none of them empty; `where` opens `details`.

        Raises InputError if a table has its images in another column than the first one.
        """
        super().__init__([(table.file.name, table) for table in tables])
        self._tables, self._where = tables, where
        first = tables[0]
        for table in tables:
            if table.columns[:2] != first.columns[:2]:
                kinds = ("plain bytes", "a struct of bytes and path")
                own, other = (
                    f"column {printable(one.image)} ({kinds[one.nested]})" for one in (table.columns, first.columns)
                )
                raise InputError(
                    f"{table.file.where()} has its images in {own}, but {first.file.where()} in {other}; "
                    "give them as separate DATA, or write both the same way"
                )

    def details(self) -> str:
        columns = next((table.columns for table in self._tables if table.columns.label), self._tables[0].columns)
        parts = [f"{self._where} (column {printable(columns.image)})"]
        if self.labels_N is not None:
            classes = count_of(len(self.class_names), "class")
            parts.append(f"labels from {classes} of column {printable(columns.label or '')} (used for diagnostics only)")
            unknown = int((self.labels_N < 0).sum())
            parts += [f"{unknown:,} without a label"] * bool(unknown)
        parts += [table.label_fault for table in self._tables if table.label_fault][:1]
        numbered = sum(len(table.numbered) for table in self._tables)
        parts += [f"{count_of(numbered, 'repeated name')} numbered"] if numbered else []
        return ", ".join(parts)


def check_unchanged(file: StoredFile) -> None:
    """Raise UnreadableImage if a table is no longer the one that was opened."""
    # A file at an address notices by itself, and asking its server takes as long as reading.
    if isinstance(file, LocalFile) and file.now() != file.stamp:
        raise UnreadableImage(f"{printable(file.name)} has been overwritten, or is gone, since it was opened")


class MappedStream:
    """The columns of an uncompressed Arrow stream, mapped into memory by each process that reads them."""

    def __init__(self, file: LocalFile) -> None:
        """Take its file."""
        self.file = file
        self._columns: dict[str, pa.ChunkedArray] = {}

    def __reduce__(self) -> tuple[type["MappedStream"], tuple[LocalFile]]:
        return MappedStream, (self.file,)

    def read_all(self) -> pa.Table:
        """Return all columns, not validated; raises InputError."""
        where, end = self.file.where(), b"\xff\xff\xff\xff\0\0\0\0"
        try:
            with pa.memory_map(where) as mapped:
                table = pa.ipc.open_stream(mapped).read_all()
        except DAMAGES as error:
            what = f"{where} can't be read as an Arrow stream ({reason(error)})"
            if found := stand_in(self.file.read(0, BEGIN_BYTES)):
                raise InputError(f"{where} is not an Arrow file: it is {found}") from error
            raise InputError(f"{what}; save the dataset again") from error
        # A stream that is cut between two batches reads like a whole one.
        if self.file.read(0, 4) == end[:4] and self.file.read(self.file.size - len(end), len(end)) != end:
            raise InputError(f"{where} is cut off: the end of the Arrow stream is missing; copy or save it again")
        return table

    def __getitem__(self, name: str) -> pa.ChunkedArray:
        """Return a column; raises InputError if it is missing or damaged, UnreadableImage if the file has changed."""
        check_unchanged(self.file)  # Reading a mapped file that was truncated meanwhile would end the process.
        if name not in self._columns:
            try:
                column = self.read_all()[name]
                column.validate(full=True)  # Wrong offsets would end the process.
            except DAMAGES as error:
                raise damaged(self.file, error) from error
            self._columns[name] = column
        return self._columns[name]


def find_columns(schema: pa.Schema, file: StoredFile, info: bytes = b"") -> Columns:
    """Choose the columns of images and of labels; `info` is Hugging Face's description of them, if not in the schema.

    Raises InputError if no column of `file` holds images, or several do and none has one of the usual names.
    """
    features = _features(info) or _features((schema.metadata or {}).get(b"huggingface", b""))
    counts = Counter(schema.names)
    fields = {field.name: field.type for field in schema if counts[field.name] == 1}
    kinds = {name: features.get(name, {}).get("_type") for name in fields}
    # Sounds are stored in the same layout; only Hugging Face's description tells them apart.
    images = [name for name in fields if kinds[name] == "Image"] or fields
    structs = [name for name in images if _holds_files(fields[name])]
    found = structs or [name for name in fields if _plain(fields[name]) in _BYTES]
    if not found:
        columns = [f"{printable(field.name)} ({str(field.type)[:80]})" for field in schema]
        raise NoImageColumn(
            f"{file.where()} has no column of image files: its columns are "
            f"{', '.join(columns[:20] + ['...'] * (len(columns) > 20)) or 'none'}; "
            "store the bytes of the image files in a binary column called image",
            is_ours=OURS in (schema.metadata or {}),
        )
    usual = ("image", "img", "jpg") if structs else ("image", "jpg", "png", "bytes", "data", "content")
    image = _first(usual, found) or (found[0] if len(found) == 1 else None)
    if image is None:
        raise InputError(
            f"{file.where()} has {len(found)} columns that may hold the images: {', '.join(map(printable, found))}; "
            "rename the right one to image"
        )
    usable = [name for name, kind in fields.items() if name != image and _may_be_label(kind)]
    declared = [name for name in usable if kinds[name] == "ClassLabel"]
    label, fault = _first(_LABELS, usable) or (declared[0] if len(declared) == 1 else None), ""
    if label is None and (other := _first(_LABELS, [name for name in fields if name != image])) is not None:
        fault = f"column {printable(other)} holds {str(fields[other])[:80]}, and is not used"
    names = features.get(label, {}).get("names") if label is not None and pa.types.is_integer(fields[label]) else None
    with_path = bool(structs) and fields[image].get_field_index("path") >= 0
    classes = list(map(str, names)) if isinstance(names, list) else None
    return Columns(image, bool(structs), with_path, label, classes, fault)


def _as_bytes(column: pa.Array | pa.ChunkedArray) -> Any:
    """Return bytes or text in any layout as large_binary."""
    return column.cast(_plain(column.type)).cast(pa.large_binary())


def reason(error: Exception) -> str:
    """Return a message of pyarrow without its stack of C++ functions."""
    return str(error).partition("\n")[0].strip().rstrip(".")[:200]


def damaged(file: StoredFile, error: Exception) -> InputError:
    """Return the error for a damaged file of a saved data set."""
    return InputError(f"{file.where()} is damaged ({reason(error)}); save the dataset again")


def _first(usual: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the first of the usual names that is among `names`, in upper or lower case."""
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in usual if name in lower), None)


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _may_be_label(kind: pa.DataType) -> bool:
    """Return whether a column may hold labels: no files, such as masks, and no structures."""
    kind = _plain(kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = _plain(kind.value_type)
    return not pa.types.is_nested(kind) and kind not in _BYTES


def _holds_files(kind: pa.DataType) -> bool:
    """Return whether it is a struct with `bytes`, and a `path` that is text or missing."""
    inner = {field.name: _plain(field.type) for field in kind} if pa.types.is_struct(kind) else {}
    return inner.get("bytes") in _BYTES and inner.get("path", pa.string()) in _TEXT


def _text(stored: bytes) -> str:
    r"""Return UTF-8 as text; other bytes become `\xe9`."""
    return stored.decode("utf-8", "backslashreplace")


def _features(info: bytes) -> dict[str, Any]:
    """Return what the JSON of Hugging Face's `info` says of each column; {} if it says nothing."""
    try:
        found = json.loads(info)
        features = found.get("info", found)["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}
