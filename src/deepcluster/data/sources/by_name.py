"""Rows of a table as images: those of a source that have the same names. N rows."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.errors import InputError, UnreadableImage
from deepcluster.data.sources.image_source import ImageSource


class NamedPictures(ImageSource):
    """Row `i` of a table as image `i`: that of another source, or none.

    Attributes:
        n_found: rows that have a picture.
    """

    def __init__(self, names: Sequence[str], source: ImageSource, index_N: NDArray[np.int64]) -> None:
        """Take the index of the image of each row in the source, -1 where it has none."""
        super().__init__()
        self._names, self._source, self._index_N = names, source, index_N
        self.n_found = int((index_N >= 0).sum())
        self.class_names = source.class_names
        if source.labels_N is not None:
            self.labels_N = np.where(index_N >= 0, source.labels_N[index_N], -1)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        if self._index_N[index] < 0:
            raise UnreadableImage("no image has its name")
        return self._source.read(int(self._index_N[index]))

    def path(self, index: int) -> Path | None:
        return self._source.path(int(self._index_N[index])) if self._index_N[index] >= 0 else None

    def stamp(self, index: int) -> str:
        return self._source.stamp(int(self._index_N[index])) if self._index_N[index] >= 0 else ""

    def holder(self, index: int) -> str:
        return self._source.holder(int(self._index_N[index])) if self._index_N[index] >= 0 else ""

    def details(self) -> str:
        return f"of a table, {self.n_found:,} of them found {self._source.details()}"


def pictures_by_name(names: Sequence[str], source: ImageSource) -> NamedPictures:
    """Return the images of a source that have the names of the rows.

    Where no name is that of an image as it stands, a common beginning is ignored, such as that of an absolute path.

    Raises:
        InputError: no name is that of an image.
    """
    index = {source.name(number): number for number in range(len(source))}
    index_N = np.fromiter((index.get(name, -1) for name in names), np.int64, len(names))
    if not (index_N >= 0).any():
        # The folders before the first name that is an image's without them.
        parts = (name.split("/") for name in names)
        cuts = (("/".join(one[:depth]) + "/", "/".join(one[depth:])) for one in parts for depth in range(1, len(one)))
        start = next((before for before, after in cuts if after in index), "")
        found = (index.get(name[len(start) :], -1) if name.startswith(start) else -1 for name in names)
        index_N = np.fromiter(found, np.int64, len(names))
    if not (index_N >= 0).any():
        raise InputError(
            f"none of the table's {len(names):,} names, such as {names[0]}, is that of an image of --data, such as "
            f"{source.name(0)}; give the folder that the names are relative to"
        )
    return NamedPictures(names, source, index_N)
