"""Tables of embeddings or clusters in text and NumPy files, as Arrow tables. N rows, D numbers of an embedding."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from deepcluster.core.errors import InputError
from deepcluster.core.files import check_regular, read_regular
from deepcluster.core.text import count_of, of_line
from deepcluster.data.sources.scan import TABLES
from deepcluster.data.sources.text_tables import decode, keys_of, of_windows, read_text_table

TEXTS, ARRAYS = (*TABLES, ".txt"), (".npy", ".npz")
# Stems of numbered columns that are an embedding; others are taken where no stem is among these.
_STEMS = ("embedding", "emb", "feature", "feat", "vector", "vec", "f", "x", "v", "dim", "d", "component", "pc", "")
_N_CLEAR = 6  # The first ones can't mean anything else.
_NUMBERED = re.compile(r"(?P<stem>.*?)[ _.\-\[(]*(?P<number>\d+)[\])]?")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf(inity)?", re.IGNORECASE)
_MISSING = frozenset({"", "nan", "none", "null", "na", "n/a", "<na>", "#n/a"})


def read_file(path: Path) -> pa.Table:
    """Return the table in a text or NumPy file.

    Raises:
        InputError: it can't be read, or is no table.
    """
    try:
        if path.suffix.lower() in TEXTS:
            return with_vectors(_text_table(path))
        check_regular(path)
        return _arrays(path)
    except OSError as fault:
        raise InputError(f"{path} can't be read: {(fault.strerror or str(fault)).lower()}") from None


def with_vectors(table: pa.Table) -> pa.Table:
    """Return a table with its numbered columns as one column of embeddings."""
    names = numbered_columns(table.schema)
    if not names:
        return table
    rows_ND = np.stack([table[name].cast(pa.float64()).to_numpy() for name in names], axis=1)
    title = "embedding" if "embedding" not in table.column_names else "embedding of numbered columns"
    return table.drop_columns(names).append_column(title, _lists(rows_ND))


def numbered_columns(schema: pa.Schema) -> list[str]:
    """Return the columns of numbers f0, f1, ... or embedding_0, ..., in the order of their numbers; [] if there are none."""
    numbered: dict[str, dict[int, str]] = {}
    for field in schema:
        match = _NUMBERED.fullmatch(field.name)
        if match and (pa.types.is_floating(field.type) or pa.types.is_integer(field.type)):
            numbered.setdefault(match["stem"], {})[int(match["number"])] = field.name
    whole = {
        stem: columns
        for stem, columns in numbered.items()
        # Two alone, such as x1 and x2, may be anything.
        if len(columns) == max(columns) - min(columns) + 1 > (1 if keys_of(stem)[1] in _STEMS[:_N_CLEAR] else 2)
    }
    if not whole:
        return []
    usual = [stem for known in _STEMS for stem in whole if known in keys_of(stem)]
    columns = whole[usual[0] if usual else max(whole, key=lambda stem: len(whole[stem]))]
    return [columns[number] for number in sorted(columns)]


def _text_table(path: Path) -> pa.Table:
    table = read_text_table(decode(read_regular(path), str(path)), path.name)
    cells = {name: [row[at] for row in table.rows] for at, name in enumerate(table.columns)}
    return pa.table({name: _typed(column, f"{path}: column {name}") for name, column in cells.items()})


def _typed(cells: list[Any], what: str) -> pa.Array:
    """Return the cells of a column as numbers, lists of numbers or text."""
    if any(cell is not None and not isinstance(cell, str) for cell in cells):  # Of JSON.
        try:
            return pa.array(cells)
        except pa.ArrowException as fault:
            raise InputError(f"{what} holds values of several types ({str(fault).splitlines()[0]})") from None
    words = [None if cell is None or cell.strip().lower() in _MISSING else cell.strip() for cell in cells]
    known = [word for word in words if word is not None]
    if known and all(map(_NUMBER.fullmatch, known)):
        if all(word.lstrip("+-").isdecimal() and len(word) < 18 for word in known):
            return pa.array([None if word is None else int(word) for word in words])
        return pa.array([None if word is None else float(word) for word in words])
    if known and all(word[0] == "[" and word[-1] == "]" for word in known):
        if any("..." in word for word in known):
            raise InputError(f"{what} holds shortened lists such as {known[0][:40]}; save the table as Parquet")
        try:
            lists = [None if word is None else [float(part) for part in _parts(word)] for word in words]
            return pa.array(lists, pa.list_(pa.float64()))
        except ValueError as fault:
            raise InputError(f"{what} holds lists that are not all of numbers: {fault}") from None
    return pa.array([None if word is None else of_windows(word) for word in words], pa.large_string())


def _parts(text: str) -> list[str]:
    """Return the numbers in `[1, 2]` of JSON or in `[1. 2.]` of NumPy."""
    return [part.replace("null", "nan") for part in re.split(r"[,\s]+", text.strip("[] \n\r\t")) if part]


def _arrays(path: Path) -> pa.Table:
    """Return the arrays of a file that have one row per image as columns."""
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = {"embedding": loaded} if path.suffix.lower() == ".npy" else dict(loaded)
    except Exception as fault:  # Damaged archives raise a dozen types, from zipfile, zlib, struct and NumPy.
        if "pickle" in str(fault):
            raise InputError(
                f"{path} holds Python objects, which could run code when loaded; save numbers and text"
            ) from None
        raise InputError(f"{path} can't be read as a NumPy file: {fault}") from None
    shapes = ", ".join(f"{key} {' x '.join(map(str, array.shape)) or 'single'}" for key, array in arrays.items())
    rows = [array for array in arrays.values() if array.ndim == 2 and array.dtype.kind in "fiu"]
    longest = len(rows[0]) if rows else max((len(array) for array in arrays.values() if array.ndim == 1), default=0)
    columns = {
        key: _lists(array) if array.ndim == 2 else pa.array(array.tolist())
        for key, array in arrays.items()
        if array.ndim in (1, 2) and len(array) == longest and (array.ndim == 1 or array.dtype.kind in "fiu")
    }
    names = path.with_suffix(".names.txt")
    if path.suffix.lower() == ".npy":
        if not rows:
            raise InputError(f"{path} holds an array of {shapes}; wanted one row of numbers per image")
        if names.is_file():
            lines = [of_line(line) for line in names.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
            if len(lines) != longest:
                raise InputError(f"{names} has {count_of(len(lines), 'line')}, but {path} has {count_of(longest, 'row')}")
            columns["name"] = pa.array(lines)
    if not columns:
        raise InputError(f"{path} holds no array of embeddings (N x D numbers) or of clusters: {shapes or 'nothing'}")
    return pa.table(columns)


def _lists(rows_ND: NDArray[Any]) -> pa.Array:
    rows_ND = rows_ND.astype(np.float32 if rows_ND.dtype == np.float16 else rows_ND.dtype)
    return pa.FixedSizeListArray.from_arrays(pa.array(rows_ND.ravel()), rows_ND.shape[1])
