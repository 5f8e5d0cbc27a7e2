"""The record of a folder of links and copies: what was put there, so that no more than this is ever replaced."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepcluster.core.files import MARK, file_stamp, read_table, write_table

RECORD = ".images.parquet"
# In an unfinished folder: what it will hold.
PLAN = ".plan"
_FACTS = b"deepcluster_folders"
_FAT_STEP_NS = 2 * 10**9


@dataclass
class Record:
    """What was put into a folder, one row per image.

    Attributes:
        facts: the clusters it is of, and whether names have ranks.
        rows: by column: `file` relative to the folder, `cluster`, `distance`, `name` relative to its data, `path` relative
            to the folder, and `stamp` of the image file.
    """

    facts: dict[str, str] = field(default_factory=dict)
    rows: dict[str, list[Any]] = field(
        default_factory=lambda: {name: [] for name in ("file", "cluster", "distance", "name", "path", "stamp")}
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

    def known(self) -> set[int]:
        """Return what tells the images apart, as hashes: where they are, and their names and stamps."""
        places = (hash(path) for path in self.rows["path"] if path)
        stamps = (hash(pair) for pair in zip(self.rows["name"], self.rows["stamp"], strict=True) if pair[1])
        return {*places, *stamps}


def _facts(schema: Any) -> dict[str, str]:
    return dict(part.split("=", 1) for part in schema.metadata[_FACTS].decode().split("\n"))


def strangers(place: Path, record: Record) -> list[str]:
    """Return the files in a folder that are not as the record says."""
    ours, found = dict(zip(record.rows["file"], record.rows["stamp"], strict=True)), []
    for folder, folders, names in os.walk(place):
        for name in [*names, *(one for one in folders if Path(folder, one).is_symlink())]:
            path = Path(folder, name)
            file = path.relative_to(place).as_posix()
            if folder == str(place) and name in (MARK, RECORD, PLAN):
                continue
            stamp = ours.get(file)
            # Nothing is lost with a link. What else is not as it was put there is work of the user.
            is_link = path.is_symlink() or path.stat().st_nlink > 1
            if stamp is None or not (is_link or _same_stamp(stamp, file_stamp(path))):
                found.append(file)
    return sorted(found)


def _same_stamp(one: str, other: str) -> bool:
    """Return whether two stamps have one size, and times that differ by at most the 2 seconds in which FAT counts."""
    (size_of_one, _, time_of_one), (size_of_other, _, time_of_other) = one.partition("-"), other.partition("-")
    if not (time_of_one.isdecimal() and time_of_other.isdecimal()):
        return not time_of_one.isdecimal()  # An image of an archive, whose file has a stamp of its own.
    return size_of_one == size_of_other and abs(int(time_of_one) - int(time_of_other)) <= _FAT_STEP_NS
