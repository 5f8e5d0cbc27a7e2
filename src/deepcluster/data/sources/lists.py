"""The text of lists and tables of images: pairs of a path, or an address, and a label."""

from __future__ import annotations

import csv
import io
from typing import Final

from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.core.text import count_of

_PATH_COLUMNS: Final = ("path", "file", "filename", "file_name", "image", "image_path", "name")
_LABEL_COLUMNS: Final = ("label", "class", "target")


def parse_list(text: str) -> list[tuple[str, str]]:
    """Return the path and the label of each line of a list: labels are unknown, "", since a list has none."""
    lines = (line.strip() for line in text.split("\n"))
    return [(line, "") for line in lines if line and not line.startswith("#")]


def parse_table(text: str, file: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the path and the label ("" = unknown) of each row of a table, and notes on what was found in it.

    Raises InputError, which calls the table `file`, where it has no column of paths.
    """
    header_line = text.partition("\n")[0]
    delimiter = "\t" if file.lower().endswith(".tsv") else max(",;\t", key=header_line.count)
    rows = csv.reader(io.StringIO(text), delimiter=delimiter)
    try:
        header = [column.strip() for column in next(rows, [])]
        path_at, label_at = _find_columns(header, file)
        cells = ((_cell(row, path_at), _cell(row, label_at)) for row in rows)
        pairs = [(path, "" if label == "-1" else label) for path, label in cells if path]
    except csv.Error as error:
        raise InputError(f"{file} can't be read as a table: {error}") from error
    classes = len({label for _, label in pairs if label})
    if label_at is None or not classes:
        return pairs, []
    return pairs, [f"{count_of(classes, 'class')} from column {header[label_at]}"]


def _find_columns(header: list[str], file: str) -> tuple[int, int | None]:
    """Return the columns of the paths and of the labels, the latter None where there is none."""
    lower = [column.lower() for column in header]
    path_at = next((lower.index(column) for column in _PATH_COLUMNS if column in lower), None)
    if path_at is None:
        found = f"its first line names {', '.join(header)}" if header else "it is empty"
        hint = next(filter(None, (did_you_mean(column, _PATH_COLUMNS) for column in lower)), "")
        raise InputError(f"{file} has no column of image paths: {found}{hint}; name one of the columns path")
    return path_at, next((lower.index(column) for column in _LABEL_COLUMNS if column in lower), None)


def _cell(row: list[str], column: int | None) -> str:
    return row[column].strip() if column is not None and column < len(row) else ""
