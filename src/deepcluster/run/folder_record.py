"""The record of a folder of links and copies: what was put there, so that no more than this is ever replaced."""

import filecmp
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepcluster.core.errors import InputError
from deepcluster.core.files import MARK, file_stamp, read_table, write_table
from deepcluster.core.text import count_of, visible
from deepcluster.data.sources import ImageSource

RECORD = ".images.parquet"
# In an unfinished folder: what it will hold.
PLAN = ".plan"
# A copy that is not complete.
COPYING = ".copying.part"
_HIDDEN = (MARK, RECORD, f"{RECORD}.part", PLAN, COPYING)
_FACTS = b"deepcluster_folders"
# FAT counts times in steps of 2 seconds, and exFAT of 10 milliseconds.
_FAT_STEP_NS, _EXFAT_STEP_NS = 2 * 10**9, 10**7


@dataclass
class Record:
    """What was put into a folder, one row per image.

    Attributes:
        facts: the clusters it is of, and whether names have ranks.
        rows: by column: `file` relative to the folder, `cluster`, `distance`, `name` relative to its data, `path` relative
            to the folder (`Entries.where`), `stamp` of the image, and `own_stamp` of the file that was put there, "" of a
            link.
    """

    facts: dict[str, str] = field(default_factory=dict)
    rows: dict[str, list[Any]] = field(
        default_factory=lambda: {name: [] for name in ("file", "cluster", "distance", "name", "path", "stamp", "own_stamp")}
    )

    @classmethod
    def of(cls, folder: Path) -> "Record | None":
        """Return the record of a folder; None if it has none."""
        import pyarrow as pa

        try:
            table = read_table(folder / RECORD)
            return cls(_facts(table.schema), {name: table[name].to_pylist() for name in cls().rows})
        except (OSError, pa.ArrowException, KeyError, ValueError):
            return None

    @classmethod
    def facts_of(cls, folder: Path) -> dict[str, str]:
        """Return only the facts; none where there is no record."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return _facts(pq.read_schema(folder / RECORD))
        except (OSError, pa.ArrowException, KeyError, ValueError):
            return {}

    def write(self, folder: Path) -> None:
        """Write the record into its folder."""
        import pyarrow as pa

        columns: dict[str, Any] = {**self.rows, "distance": pa.array(self.rows["distance"], pa.float32())}
        text = "\n".join(f"{name}={value}" for name, value in self.facts.items())
        write_table(columns, folder / RECORD, {_FACTS.decode(): text})

    def known(self, place: Path) -> Callable[[str, str, str], bool]:
        """Return whether an image of a name, a stamp and a path was put into this folder before.

        It was if one of this path was, or one of this name and stamp whose file has been moved since.
        """
        places = {hash(path) for path in self.rows["path"] if path}
        paths: dict[int, list[str]] = {}
        for name, stamp, path in zip(*(self.rows[column] for column in ("name", "stamp", "path")), strict=True):
            if stamp:
                paths.setdefault(hash((name, stamp)), []).append(path)

        def is_known(name: str, stamp: str, path: str) -> bool:
            if path and hash(path) in places:
                return True
            same = paths.get(hash((name, stamp)), ()) if stamp else ()
            return any(not one or not _file_of(place, one).exists() for one in same)

        return is_known


def _facts(schema: Any) -> dict[str, str]:
    return dict(part.split("=", 1) for part in schema.metadata[_FACTS].decode().split("\n"))


def check_deletable(folder: Path, what: str, source: ImageSource) -> None:
    """Raise `InputError` if anything that is nowhere else is lost with a folder."""
    paths = ((index, source.path(index)) for index in range(len(source)))
    outside = ((index, path) for index, path in paths if path is None or not is_within(path, folder))
    given = {hash((source.name(index), stamp)): path for index, path in outside if (stamp := source.stamp(index))}
    changed, only = _lost_with(folder, Record.of(folder) or Record(), given)
    if changed or only:
        files = changed or only
        some = ", ".join(map(visible, files[:3])) + (", ..." if len(files) > 3 else "")
        why = (
            f"{count_of(len(files), 'file')} that deepcluster did not put there, or that changed since"
            if changed
            else f"the only known copies of {count_of(len(files), 'image')}, whose files are gone or changed"
        )
        raise InputError(f"{what} holds {why} ({some}): move them out first, or name another folder")


def is_within(path: Path, folder: Path) -> bool:
    """Return whether a path, without links on its way, is in a folder or is the folder."""
    return Path(os.path.realpath(path)).is_relative_to(folder)


def _lost_with(place: Path, record: Record, given: Mapping[int, Path | None]) -> tuple[list[str], list[str]]:
    """Return what is lost if a folder is deleted: files that are not as the record says, and the only copies of images.

    Args:
        given: paths of images that are elsewhere, None if within an archive, by the hash of name and stamp.
    """
    rows = {file: row for row, file in enumerate(record.rows["file"])}
    there = {path.relative_to(place).as_posix(): path for path in _files(place)}
    inner = Counter((status.st_dev, status.st_ino) for path in there.values() if (status := path.lstat()).st_nlink > 1)
    changed, only = [], []
    for file, path in there.items():
        status, row = path.lstat(), rows.get(file)
        if row is None:
            changed.append(file)
        elif path.is_symlink() or status.st_nlink > inner[status.st_dev, status.st_ino] > 0:
            continue  # The image itself is elsewhere.
        elif not _same_stamp(record.rows["own_stamp"][row], file_stamp(path)):
            changed.append(file)
        elif not _is_elsewhere(place, path, given, *(record.rows[column][row] for column in ("name", "stamp", "path"))):
            only.append(file)
    return sorted(changed), sorted(only)


def _files(place: Path) -> list[Path]:
    """Return all files and links in a folder but those that are not shown."""
    found = []
    for folder, folders, names in os.walk(place):
        hidden = _HIDDEN if folder == str(place) else ()
        links = [name for name in folders if Path(folder, name).is_symlink()]
        found += [Path(folder, name) for name in [*names, *links] if name not in hidden]
    return found


def _is_elsewhere(place: Path, copy: Path, given: Mapping[int, Path | None], name: str, stamp: str, path: str) -> bool:
    """Return whether an image that was put into a folder is still elsewhere, as it was."""
    original, (was, *details) = Path(os.path.realpath(_file_of(place, path))), stamp.rstrip(":").split(":")
    # Where there are more details, another file beside a table may hold the image.
    if len(details) < 2 and not original.is_relative_to(place) and _same_stamp(was, file_stamp(original)):
        return True
    moved = given.get(hash((name, stamp)), copy)
    return moved is None or (moved != copy and filecmp.cmp(copy, moved, shallow=False))


def _file_of(place: Path, path: str) -> Path:
    """Return the file that a recorded path names, or the one that holds this image."""
    return full if (full := place / path).exists() else place / path.partition("::")[0]


def _same_stamp(was: str, now: str) -> bool:
    """Return whether a file is as it was: with one size, and one time as far as its disk keeps it."""
    (old_size, _, old_time), (size, _, time) = was.partition("-"), now.partition("-")
    if was == now or not (old_time.isdecimal() and time.isdecimal()):
        return was == now != ""
    is_coarse = int(time) % _EXFAT_STEP_NS == 0 and abs(int(time) - int(old_time)) <= _FAT_STEP_NS
    return old_size == size and is_coarse
