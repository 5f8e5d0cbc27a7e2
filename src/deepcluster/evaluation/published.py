"""Numbers published by others, by protocol, to print beside ours; each with its source. They are in `published.csv`.

All are in percent. Rows that are `checked` were read at their source, or where the source is quoted. The others are
remembered from a paper's table and are printed with a mark that says so: check them before you cite them.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from deepcluster.evaluation.results import Table


@dataclass(frozen=True)
class Published:
    """One row of a published table.

    Attributes:
        protocol: a name in `deepcluster.evaluation.options.PROTOCOLS`.
        data: the data set, and which part of it.
        arch: as `train --arch` names it, or as its authors do.
        system: the method, with details that matter.
        numbers: in percent, by stage, number of neighbours, split, ...: named as ours are where there is the same.
        source: repository and file, or paper and table.
        checked: the number was read there; if not, it is remembered.
    """

    protocol: str
    data: str
    arch: str
    system: str
    numbers: Mapping[str, float]
    source: str
    checked: bool

    def cited(self) -> str:
        """Return the source as it is printed."""
        return self.source if self.checked else f"from memory of {self.source}, not checked"


@cache
def published() -> tuple[Published, ...]:
    """Return all rows of the file."""
    text = (files("deepcluster.evaluation") / "published.csv").read_text(encoding="utf-8")
    return tuple(
        Published(**{**row, "numbers": _numbers(row["numbers"]), "checked": row["checked"] == "yes"})  # type: ignore[arg-type]
        for row in csv.DictReader(text.splitlines())
    )


def _numbers(text: str) -> dict[str, float]:
    """Return the numbers of a text such as `conv1 13.4; conv2 32.3`."""
    pairs = (one.rpartition(" ") for one in text.split("; "))
    return {name: float(value) for name, _, value in pairs}


def published_for(protocol: str, data_name: str | None = None, arch: str | None = None) -> list[Published]:
    """Return the rows of a protocol: those of the same data set first, and among these those of the same architecture.

    Args:
        data_name: name of a data set; cifar10, CIFAR-10 and cifar_10 are the same. None: any.
        arch: as `train --arch` names it.
    """
    wanted = _plain(data_name or "")

    def difference(row: Published) -> tuple[bool, bool]:
        known = [_plain(name) for name in row.data.split(", ")]
        return bool(wanted) and wanted not in known, arch is not None and row.arch != arch

    return sorted((row for row in published() if row.protocol == protocol), key=difference)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def published_table(protocol: str, data_name: str | None = None, arch: str | None = None) -> Table | None:
    """Return `published_for` as a table; None if nothing is known."""
    rows = published_for(protocol, data_name, arch)
    if not rows:
        return None
    return Table(["system", "data", "network", "percent", "source"], [_cells(row) for row in rows])


def _cells(row: Published) -> Sequence[str]:
    """Return the cells of a row; numbers with one decimal, or with the two that they were published with."""
    percent = {name.replace("_", " "): f"{value:.2f}".removesuffix("0") for name, value in row.numbers.items()}
    return [row.system, row.data, row.arch, ", ".join(f"{name} {value}" for name, value in percent.items()), row.cited()]
