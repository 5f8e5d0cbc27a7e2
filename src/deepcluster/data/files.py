"""Image files on disk: all of a folder, or the ones that a list or a table names.

N images. Folders are asked for their entries, files for nothing: no image is opened before it is read.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from deepcluster.data.image_source import ImageSource, count_of, endings_of, printable
from deepcluster.errors import InputError, UnreadableImage, did_you_mean

IMAGE_ENDINGS: Final = frozenset(
    "jpg jpeg jpe jfif png webp bmp gif tif tiff ppm pgm pbm avif".split()  # noqa: SIM905 (a list of words)
)
NOT_YET: Final = {".tar": "tar shards", ".tar.gz": "tar shards", ".tgz": "tar shards", ".parquet": "Parquet tables"}
_PATH_COLUMNS: Final = ("path", "file", "filename", "file_name", "image", "image_path", "name")
_LABEL_COLUMNS: Final = ("label", "class", "target")
_SPLITS: Final = frozenset({"train", "val", "test", "valid", "validation"})
_CHECK_ALL: Final = 10_000
_CHECK_SAMPLE: Final = 1_000
_MISSING_SHARE: Final = 0.1


class FileSource(ImageSource):
    """Image files below one folder."""

    def __init__(self, root: Path, paths: list[str], labels: Sequence[str] | None, notes: Sequence[str]) -> None:
        """Take paths relative to `root`, a class name for each ("" = unknown), and remarks for `describe`."""
        super().__init__(labels)
        self._root = root.absolute()
        self._paths = paths
        self._notes = tuple(notes)

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return printable(self._paths[index])

    def path(self, index: int) -> Path:
        return self._root / self._paths[index]

    def read(self, index: int) -> bytes:
        try:
            return self.path(index).read_bytes()
        except OSError as error:
            raise UnreadableImage((error.strerror or str(error)).lower()) from error
        except ValueError as error:  # A null byte in a path out of a list.
            raise UnreadableImage(f"not a path: {error}") from error

    def details(self) -> str:
        folders = len({path.rpartition("/")[0] for path in self._paths})
        endings = Counter(path.rpartition(".")[2] if "." in path else "" for path in self._paths)
        return ", ".join([f"in {count_of(folders, 'folder')} ({endings_of(endings)})", *self._notes])


def open_folder(folder: Path) -> ImageSource:
    """Open all images below `folder`, in the order of their paths; folders of one class each give labels.

    Raises InputError where there are none.
    """
    names, others, closed = _scan(folder)
    if not names:
        raise InputError(_no_images(folder, others, closed))
    names.sort()
    labels = _folder_labels(names)
    notes = []
    if labels is not None:
        notes.append(f"labels from {count_of(len(set(labels)), 'class folder')} (used for diagnostics only)")
    if others:
        notes.append(f"{count_of(others.total(), 'other file')} skipped ({endings_of(others)})")
    if closed:
        notes.append(f"{count_of(closed, 'folder')} could not be opened")
    return FileSource(folder, names, labels, notes)


def _no_images(folder: Path, others: Counter[str], closed: int) -> str:
    found = [f"found only {endings_of(others)}"] if others else []
    found += [f"{count_of(closed, 'folder')} could not be opened"] if closed else []
    found += sorted({f"{kind} are not supported yet" for ending, kind in NOT_YET.items() if others[ending[1:]]})
    return f"{folder} holds no images: looked for {endings_of(IMAGE_ENDINGS)}; {'; '.join(found) or 'it is empty'}"


def _scan(root: Path) -> tuple[list[str], Counter[str], int]:
    """Return the paths of all images below `root`, the endings of other files, and the number of closed folders.

    Asks the system for each folder, never for each file: a million files take about a second on a local disk.
    """
    names: list[str] = []
    others: Counter[str] = Counter()
    closed = 0
    stack: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while stack:
        prefix, above = stack.pop()
        folder = root / prefix
        try:
            status = folder.stat()
            here = (status.st_dev, status.st_ino)
            if here in above:  # A link to a folder that holds it.
                continue
            with os.scandir(folder) as entries:
                inner = _sort_entries(entries, prefix, names, others)
        except OSError:
            closed += 1
            continue
        stack += [(f"{prefix}{name}/", above | {here}) for name in inner]
    return names, others, closed


def _sort_entries(entries: Iterable[os.DirEntry[str]], prefix: str, names: list[str], others: Counter[str]) -> list[str]:
    """Put the files of one folder into `names` or `others`, and return its subfolders; hidden ones are left out."""
    inner = []
    for entry in entries:
        name = entry.name
        if name[0] == "." or name == "__MACOSX":
            continue
        if entry.is_dir():
            inner.append(name)
            continue
        _, dot, ending = name.rpartition(".")
        if ending.lower() in IMAGE_ENDINGS and dot:
            names.append(prefix + name)
        else:
            others[ending if dot else ""] += 1
    return inner


def _folder_labels(names: list[str]) -> list[str] | None:
    """Return the class folder of each image, or None where the folders are no classes."""
    tops = [name.partition("/")[0] for name in names if "/" in name]
    if len(tops) < len(names):
        return None
    if {top.lower() for top in set(tops)} <= _SPLITS:
        inner = [name.split("/", 2)[1:] for name in names]
        return [parts[0] for parts in inner] if all(len(parts) == 2 for parts in inner) else None
    return tops if len(set(tops)) > 1 else None


def open_list(file: Path) -> ImageSource:
    """Open the images that `file` names, one path a line, in that order; lines that start with # are remarks.

    Raises InputError where it names none, or where more than a tenth are missing.
    """
    lines = (line.strip() for line in _read_text(file).split("\n"))
    return _open_paths(file, [(line, "") for line in lines if line and not line.startswith("#")], [])


def open_table(file: Path) -> ImageSource:
    """Open the images that a table with a header line names, with the labels of its label column where it has one.

    Raises InputError where it has no column of paths or names no images, or where more than a tenth are missing.
    """
    text = _read_text(file)
    header_line = text.partition("\n")[0]
    delimiter = "\t" if file.suffix.lower() == ".tsv" else max(",;\t", key=header_line.count)
    try:
        rows = list(csv.reader(io.StringIO(text), delimiter=delimiter))
    except csv.Error as error:
        raise InputError(f"{file} can't be read as a table: {error}") from error
    header = [column.strip() for column in rows[0]] if rows else []
    lower = [column.lower() for column in header]
    path_at = next((lower.index(column) for column in _PATH_COLUMNS if column in lower), None)
    if path_at is None:
        found = f"its first line names {', '.join(header)}" if header else "it is empty"
        hint = next(filter(None, (did_you_mean(column, _PATH_COLUMNS) for column in lower)), "")
        raise InputError(f"{file} has no column of image paths: {found}{hint}; name one of the columns path")
    label_at = next((lower.index(column) for column in _LABEL_COLUMNS if column in lower), len(header))
    cells = ([cell.strip() for cell in row] + [""] * len(header) + [""] for row in rows[1:])
    pairs = [(row[path_at], "" if row[label_at] == "-1" else row[label_at]) for row in cells if row[path_at]]
    classes = len({label for _, label in pairs if label})
    return _open_paths(file, pairs, [f"{count_of(classes, 'class')} from column {header[label_at]}"] if classes else [])


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} can't be read as UTF-8 text: {error}") from error


def _open_paths(file: Path, pairs: list[tuple[str, str]], notes: list[str]) -> ImageSource:
    """Return the images that a list or table names, each with its label ("" = unknown)."""
    if not pairs:
        raise InputError(f"{file} names no images; write the path of one image a line")
    base = file.absolute().parent
    _check_exist(file, base, [path for path, _ in pairs])
    root, paths = _below_one_root(base, [path for path, _ in pairs])
    labels = dict(zip(reversed(paths), (label for _, label in reversed(pairs)), strict=True))  # The first one wins.
    once = list(dict.fromkeys(paths))
    if len(once) < len(paths):
        notes = [*notes, f"{count_of(len(paths) - len(once), 'repeated line')} skipped"]
    named = [labels[path] for path in once]
    return FileSource(root, once, named if any(named) else None, [f"listed in {file.name}", *notes])


def _check_exist(file: Path, base: Path, paths: list[str]) -> None:
    """Refuse a list of which more than a tenth is missing, going by a sample; fewer are reported as they are read."""
    count = len(paths) if len(paths) <= _CHECK_ALL else _CHECK_SAMPLE
    sample = [paths[index * len(paths) // count] for index in range(count)]
    # Unlike `Path.exists`, this is False for what can't be a path at all, such as a line of prose.
    missing = [path for path in sample if not os.path.exists(os.path.join(base, path))]  # noqa: PTH110, PTH118
    if len(missing) > _MISSING_SHARE * count:
        first = ", ".join(path[:100] for path in missing[:3]) + (", ..." if len(missing) > 3 else "")
        what = f"{len(missing):,} of the {count:,} paths checked in {file} do not exist: {first}"
        # As in the lists that come with ImageNet: `n01440764/a.JPEG 0`.
        hint = "; put labels in a table (.csv) with the columns path,label" if re.search(r"\s\d+$", missing[0]) else ""
        raise InputError(f"{what}; paths must be absolute, or relative to the list's folder {base}{hint}")


def _below_one_root(base: Path, paths: list[str]) -> tuple[Path, list[str]]:
    """Return a folder that holds all of `paths`, and the paths relative to it: the list's own folder where it does."""
    full = [os.path.normpath(os.path.join(base, path)) for path in paths]  # noqa: PTH118 (pathlib takes 5 times as long)
    root = os.path.normpath(base)
    if not all(path.startswith(root.rstrip(os.sep) + os.sep) for path in full):
        try:
            root = os.path.commonpath([os.path.dirname(path) for path in full])  # noqa: PTH120
        except ValueError as error:
            raise InputError(f"the images of one list must lie on one drive ({error}); make a list for each") from error
    skip = len(root.rstrip(os.sep)) + 1
    return Path(root), [path[skip:].replace(os.sep, "/") for path in full]
