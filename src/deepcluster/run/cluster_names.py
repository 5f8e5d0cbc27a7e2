"""Names that a user gave to clusters: `RUN/names.csv`, with the columns cluster and name."""

import csv
from pathlib import Path

from deepcluster.core.errors import InputError

FILE = "names.csv"


def read_names(folder: Path) -> dict[int, str]:
    """Return the name of each cluster that has one; none where `folder` has no `names.csv`.

    Raises:
        InputError: the file can't be read, or a line holds no number of a cluster.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    names = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file):
                number, name = (row.get("cluster") or "").strip(), (row.get("name") or "").strip()
                if not number.isdecimal():
                    raise InputError(f"{path}: {number!r} is no number of a cluster; it needs the columns cluster,name")
                if name:
                    names[int(number)] = name
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} can't be read: {error}") from None
    return names
