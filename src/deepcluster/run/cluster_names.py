"""Names that users give to clusters: `RUN/names.csv`, with the columns cluster and name, as any spreadsheet writes it."""

import csv
import io
import re
from collections.abc import Mapping
from pathlib import Path

from deepcluster.core.errors import InputError
from deepcluster.core.files import check_file, user_path, write_whole
from deepcluster.core.text import printable, visible
from deepcluster.data.sources.text_tables import TextTable, decode, of_windows, read_text_table

FILE = "names.csv"
# Makes Excel read UTF-8.
EXCEL_MARK = "\ufeff"


def read_names(folder: Path) -> dict[int, str]:
    """Return the names of clusters in a run folder, by number; none where nobody has named any.

    Raises:
        InputError: the file can't be read, or does not say which cluster has which name.
    """
    path = folder / FILE
    if not path.exists():
        return {}
    check_file(path)
    try:
        content = path.read_bytes()
    except OSError as fault:
        raise InputError(f"{path} can't be read: {(fault.strerror or str(fault)).lower()}") from None
    if not content.strip(b"\xef\xbb\xbf \t\r\n"):
        return {}
    table = read_text_table(decode(content, str(path)), str(path))
    names: dict[int, str] = {}
    for cell, text in _rows(table, path):
        name = clean_name(of_windows(text))
        number = _number(cell)
        if number is None:
            raise InputError(f"{path}: {visible(cell)!r} is not the number of a cluster, such as 3")
        if name and names.get(number, name) != name:
            raise InputError(f"{path} names cluster {number} twice, {names[number]!r} and {name!r}: delete one of the lines")
        if name:
            names[number] = name
    return names


def names_of_model(model: str) -> dict[int, str]:
    """Return the names of the clusters of a run folder, or of its `checkpoints/last.pt`; none for other models."""
    path = user_path(model)
    for folder in (path, path.parent.parent):
        if (folder / "config.json").is_file() and path in (folder, folder / "checkpoints" / "last.pt"):
            return read_names(folder)
    return {}


def _rows(table: TextTable, path: Path) -> list[tuple[str, str]]:
    """Return cluster and name of each row; the first line may hold the names of the columns, or a cluster."""
    columns = [name.strip().lower() for name in table.columns]
    if {"cluster", "name"} <= set(columns):
        at, name_at = columns.index("cluster"), columns.index("name")
        return [(str(row[at]), str(row[name_at])) for row in table.rows]
    if len(columns) == 2 and (not table.has_names or _number(columns[0]) is not None):
        rows = [*([table.columns] if table.has_names else []), *table.rows]
        return [(str(row[0]), str(row[1])) for row in rows]
    listed = ", ".join(map(visible, table.columns))
    raise InputError(f"{path} has no columns cluster and name: its first line is {listed}")


def _number(cell: str) -> int | None:
    """Return the number of a cluster; spreadsheets may write 3 as 3.0 or 3,0, and 3000 as 3,000."""
    match = re.fullmatch(r"\s*(\d{1,9})(?:[.,]0{0,2})?\s*", cell)  # Never three zeros: 1,000 is not 1.
    return int(match[1]) if match else None


def clean_name(name: str) -> str:
    """Return a name in one line, without control characters and spaces at its ends."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", printable(name)).split())


def write_names(folder: Path, names: Mapping[int, str]) -> Path:
    """Write the names of clusters into a run folder, and return the file; without names there is none."""
    path, text = folder / FILE, io.StringIO()
    rows = [(number, clean_name(name)) for number, name in sorted(names.items()) if clean_name(name)]
    if not rows:
        path.unlink(missing_ok=True)
        return path
    csv.writer(text).writerows([("cluster", "name"), *rows])
    write_whole(path, EXCEL_MARK + text.getvalue())
    return path
