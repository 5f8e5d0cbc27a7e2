"""Tables and lists as text, as other programs write them: encodings, delimiters, names of columns.

N rows.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.data.sources.files import IMAGE_ENDINGS

# Usual names of columns in small letters, without what is no letter or digit and without the s of a plural.
PATHS = (  # noqa: SIM905 (a list of words)
    "path file filename imagepath imgpath filepath fullpath relativepath fname image img imagefile imgfile imagename "
    "imgname picture photo name imageid imgid imageindex uri url imageurl imageuri id key"
).split(" ")
LABELS = ["label", "class", "target", "category", "classname", "labelname", "categoryname", "classlabel", "findinglabel"]
_ENDING = rf"\.(?:{'|'.join(sorted(IMAGE_ENDINGS))})"
_IS_IMAGE = re.compile(rf"{_ENDING}(?:[?#].*)?[\"']?\s*$", re.IGNORECASE)
# `n01440764/a.JPEG 0`: a path, and what follows it.
_LABELLED = re.compile(rf"(?P<quote>[\"']?)(?P<path>.+?{_ENDING})(?P=quote)(?:\s*[,;|]\s*|\s+)(?P<rest>\S.*)", re.IGNORECASE)
_DELIMITERS = ",;\t|"
_NEVER = "\x1f"  # A delimiter that no table has.
_SAMPLE = 1_000
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # Which begins like that of UTF-16.
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass(frozen=True)
class TextTable:
    """A table as text.

    Attributes:
        columns: their names; `column 1`, ... where the table has no line of names.
        rows: a cell per column; shorter rows are filled with "".
        has_names: whether the columns have names.
        lines: number of the line of each row in the file, from 1; empty for JSON lines.
    """

    columns: list[str]
    rows: list[list[Any]]
    has_names: bool = True
    lines: Sequence[int] = ()

    def find(self, usual: Sequence[str], columns: Iterable[int] | None = None) -> int | None:
        """Return the column with the first of some usual names, among all or some columns."""
        some = range(len(self.columns)) if columns is None else columns
        known = {key: at for at in reversed(list(some)) for key in keys_of(self.columns[at])}
        return next((known[name] for name in usual if name in known), None)


def decode(content: bytes, file: str) -> str:
    """Return text in UTF-8, UTF-16 or UTF-32; bytes that are none of these become surrogates (`of_windows`).

    Raises:
        InputError: it claims to be UTF-16 or UTF-32, and is not.
    """
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "")
    start = content[:_SAMPLE]
    if not encoding and b"\0" in start:  # Letters and digits of UTF-16 have a zero before or after them.
        zeros = [start[first::2].count(0) for first in (0, 1)]
        if max(zeros) > len(start) // 4 and not min(zeros):
            encoding = "utf-16-be" if zeros[0] else "utf-16-le"
    try:
        return content.decode(encoding or "utf-8", "strict" if encoding.startswith("utf-16") else "surrogateescape")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} can't be read as text: {error}") from error


def of_windows(text: str) -> str:
    """Return text whose bytes were not UTF-8 as Windows-1252, which older programs of Windows write."""
    if text.isascii() or not any("\udc80" <= letter <= "\udcff" for letter in text):
        return text
    return text.encode("utf-8", "surrogateescape").decode("cp1252", "replace")


def read_text_table(text: str, file: str) -> TextTable:
    """Return a table, called `file`, with commas, semicolons, tabs or bars between its cells, or of JSON lines.

    Blank lines are left out, and so are `sep=;`, which Excel writes and reads, and names of columns that are none.

    Raises:
        InputError: it is empty, or can't be read as a table.
    """
    if file.lower().endswith(".jsonl"):
        return _of_json(text, file)
    n_lines = _line_breaks(text)
    text = re.sub(r"\A\ufeff?(?:[ \t]*(?:\r\n|\r|\n))*", "", text)
    delimiter = "\t" if file.lower().endswith(".tsv") else ""
    if match := re.match(r"\"?sep=(.)\"?[ \t]*(?:\r\n|\r|\n|$)", text, re.IGNORECASE):
        delimiter, text = match[1], text[match.end() :].lstrip("\r\n")
    first = re.match(r"[^\r\n]*", text)
    bare = re.sub(r'"[^"]*"', "", first[0] if first else "")
    most = max(_DELIMITERS, key=bare.count)
    delimiter = delimiter or (most if most in bare else _NEVER)
    try:
        reader, skipped = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), n_lines - _line_breaks(text)
        numbered = [(skipped + reader.line_num, row) for row in reader if any(map(str.strip, row))]
    except csv.Error as error:
        raise InputError(f"{file} can't be read as a table: {error}") from error
    if not numbered:
        raise InputError(f"{file} has no rows: it is empty")
    lines, rows = map(list, zip(*numbered, strict=True))
    names = [of_windows(name).strip() for name in rows[0]]
    has_names = not any(map(is_image, names)) or TextTable(names, []).find(PATHS) is not None
    if delimiter == _NEVER:  # What follows a path in a table of one column is not part of it.
        rows = [[match["path"] if (match := _LABELLED.fullmatch(row[0])) else row[0]] for row in rows]
    rows = rows[has_names:]
    if rows and all(len(row) == len(names) + 1 and row[-1].strip() for row in rows) and not is_image(names[0]):
        names = ["", *names]  # R leaves out the name of the column of row numbers.
    width = len(names)
    filled = [(_joined_path(row, width, delimiter) + [""] * width)[:width] for row in rows]
    return TextTable(
        names if has_names else [f"column {at + 1}" for at in range(width)], filled, has_names, lines[has_names:]
    )


def _line_breaks(text: str) -> int:
    return len(re.findall(r"\r\n|\r|\n", text))


def _joined_path(row: list[str], width: int, delimiter: str) -> list[str]:
    """Return a row that has too many cells with the parts of a path, such as `a, b.jpg`, as one cell."""
    more = len(row) - width
    for at in range(width if more > 0 else 0):
        path = delimiter.join(row[at : at + more + 1])
        if is_image(path) and not is_image(row[at]):
            return [*row[:at], path, *row[at + more + 1 :]]
    return row


def pairs_of(table: TextTable, file: str) -> tuple[list[tuple[str, Any]], str]:
    """Return the path of an image and its label in each row that has a path, and the column of labels ("": there is none).

    The paths are in the column whose cells end as image files do; if none or several do, in that with a usual name.

    Raises:
        InputError: no column can be chosen.
    """
    sample = table.rows[:_SAMPLE]
    shares = [sum(is_image(str(row[at])) for row in sample) for at in range(len(table.columns))]
    likely = [at for at, count in enumerate(shares) if 2 * count > len(sample)]
    path_at = table.find(PATHS, likely or None)
    if path_at is None and len(likely) == 1:
        path_at = likely[0]
    if path_at is None:
        listed = ", ".join(table.columns)
        if likely:
            some = ", ".join(table.columns[at] for at in likely)
            raise InputError(f"{file} has several columns of image paths: {some}; name the right one path")
        hint = next(filter(None, (did_you_mean(column.lower(), PATHS[:12]) for column in table.columns)), "")
        raise InputError(
            f"{file} has no column of image paths: its first line names {listed}{hint}; name one of the columns path"
        )
    others = [at for at in range(len(table.columns)) if at != path_at]
    label_at = table.find(LABELS, others) if table.has_names else others[0] if len(others) == 1 else None
    pairs = [(str(row[path_at]).strip(), "" if label_at is None else row[label_at]) for row in table.rows]
    return [pair for pair in pairs if pair[0]], "" if label_at is None else table.columns[label_at]


def labelled_lines(lines: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Return path and label of the lines of a list, and a note; labels follow the paths in most lines, or in none."""
    matches = [None if is_image(line) else _LABELLED.fullmatch(line) for line in lines]
    if 2 * sum(match is not None for match in matches) <= len(lines):
        return [(line, "") for line in lines], []
    rests = ["" if match is None else match["rest"].strip("\"'") for match in matches]
    paths = [line if match is None else match["path"] for line, match in zip(lines, matches, strict=True)]
    if any(re.search(r"[\s,;|]", rest) for rest in rests):
        return [(path, "") for path in paths], ["what follows the paths is no single label, and not used"]
    return list(zip(paths, rests, strict=True)), []


def is_image(path: str) -> bool:
    """Return whether a path or an address ends as image files do."""
    return _IS_IMAGE.search(path) is not None


def keys_of(column: str) -> tuple[str, str]:
    """Return the name of a column as `PATHS` and `LABELS` have it, and without the s of a plural."""
    key = re.sub(r"[^0-9a-z]+", "", column.lower())
    return key, re.sub(r"(?<=ss)es$|s$", "", key)


def _of_json(text: str, file: str) -> TextTable:
    """Return the objects of JSON lines as a table."""
    objects = []
    for number, line in enumerate(text.lstrip("\ufeff").split("\n"), 1):
        if line.strip():
            try:
                objects.append(json.loads(line))
            except ValueError as error:
                raise InputError(f"{file} can't be read as JSON lines: line {number}: {error}") from error
            if not isinstance(objects[-1], dict):
                raise InputError(f'{file}: line {number} is no JSON object such as {{"file_name": "a.jpg"}}')
    if not objects:
        raise InputError(f"{file} has no rows: it is empty")
    columns = list(dict.fromkeys(key for one in objects for key in one))
    return TextTable(columns, [[one.get(column) for column in columns] for one in objects])
