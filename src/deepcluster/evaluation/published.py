"""Numbers published by others, by protocol; each with its source. They are in `published.csv`, and in docs/evaluation.md.

All are in percent. Rows that are `checked` were read at their source, or where the source is quoted. The others are
remembered from a paper's table, and marked so wherever they are printed. `evaluate` prints those of the same data set and
network.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

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


# Number of classes of data sets, by their plain name.
CLASSES = {"imagenet": 1000, "imagenet1k": 1000, "places205": 205, "cifar10": 10, "cifar100": 100, "tinyimagenet": 200}
# Numbers of images to train (None: any) and to test on, of data sets whose folder may have any name: VOCdevkit, coco, ...
IMAGES = {
    "VOC07 test": (None, 4_952),
    "VOC07 test, trained on VOC07+12": (16_551, 4_952),
    "VOC12 val": (None, 1_449),
    "VOC12 val, trained on VOC12 aug": (10_582, 1_449),
    "VOC11 seg11valid": (None, 736),
    "COCO val2017": (None, 5_000),
    "Cityscapes val": (None, 500),
}


@cache
def published() -> tuple[Published, ...]:
    """Return all rows of the file."""
    text = (files("deepcluster.evaluation") / "published.csv").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = [*csv.DictReader(text.splitlines())]
    for row in rows:
        # Such as `conv1 13.4; conv2 32.3`.
        pairs = (one.rpartition(" ") for one in row["numbers"].split("; "))
        row["numbers"], row["checked"] = {name: float(value) for name, _, value in pairs}, row["checked"] == "yes"
    return tuple(Published(**row) for row in rows)


def published_for(protocol: str, data_name: str | None = None, arch: str | None = None) -> list[Published]:
    """Return the rows of a protocol; those of a data set, an architecture, or both, where these are named.

    Args:
        data_name: name of a data set; cifar10, CIFAR-10 and cifar_10 are the same. None: any.
        arch: as `train --arch` names it. None: any.
    """

    def fits(row: Published) -> bool:
        known = [_plain(name) for name in row.data.split(", ")]
        return (data_name is None or _plain(data_name) in known) and arch in (None, row.arch)

    return [row for row in published() if row.protocol == protocol and fits(row)]


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def comparable_table(protocol: str, data_name: str, arch: str, counts: Mapping[str, Any] | None = None) -> Table | None:
    """Return the rows of the same protocol, data set and architecture; None if there are none.

    Args:
        data_name: name of the folder. One that is named after a data set may be a part of it.
        counts: `Results.data`: its `classes`, `train_images` and `test_images`, where it has them, tell a data set from a
            part of it.
    """
    counts = counts or {}

    def has_its_size(data: str) -> bool:
        if data not in IMAGES:
            return counts.get("classes") in (None, CLASSES.get(_plain(data_name), counts.get("classes")))
        train, test = IMAGES[data]
        return counts.get("test_images") == test and train in (None, counts.get("train_images"))

    rows = published_for(protocol, None, arch)
    named = published_for(protocol, data_name, arch)
    return _table([row for row in rows if (row.data in IMAGES or row in named) and has_its_size(row.data)])


def published_table(protocol: str) -> Table | None:
    """Return all rows of a protocol as a table; None if nothing is known."""
    return _table(published_for(protocol))


def _table(rows: Sequence[Published]) -> Table | None:
    cells = []
    for row in rows:
        # With one decimal, or with the two that they were published with.
        numbers = (f"{name.replace('_', ' ')} {f'{value:.2f}'.removesuffix('0')}" for name, value in row.numbers.items())
        cells.append([row.system, row.data, row.arch, ", ".join(numbers), row.cited()])
    return Table(["system", "data", "network", "percent", "source"], cells) if cells else None
