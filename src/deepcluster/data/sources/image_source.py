"""What an image source is: an ordered, immutable collection, and how its images and labels are named to people.

N images, H height, W width, C channels. A source never changes while it is open: whatever is known of its images
(features, clusters, distances) is an array of N rows at the same index, and `name(index)` is what people see.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.text import count_of, printable


def place_of(index: int, ends: Sequence[int]) -> tuple[int, int]:
    """Return the part of a source in which an image lies, and its index there; `ends` are those of the parts."""
    if not 0 <= index < ends[-1]:
        raise IndexError(f"index {index} of {ends[-1]} images")
    part = bisect_right(ends, index)
    return part, index - (ends[part - 1] if part else 0)


class ImageSource(ABC):
    """An ordered, immutable collection of N images.

    `labels_N` holds an index into `class_names` for each image, -1 = unknown; None where nothing is known. Labels serve
    diagnostics and evaluation only: training never reads them.
    """

    def __init__(self, labels: Iterable[str] | None = None) -> None:
        """Take the class name of each image ("" = unknown), or None where nothing is known."""
        self.labels_N: NDArray[np.int64] | None = None
        self.class_names: list[str] = []
        if labels is None:
            return
        labels = list(labels)
        names = sorted(set(labels) - {""})
        if all(name.isdecimal() for name in names):
            names.sort(key=int)
        numbers = {"": -1, **{name: number for number, name in enumerate(names)}}
        self.labels_N = np.fromiter((numbers[label] for label in labels), np.int64, len(labels))
        self.class_names = [printable(name) for name in names]

    @abstractmethod
    def __len__(self) -> int:
        """Return N."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the path relative to the root, with forward slashes; unique in the source."""

    @abstractmethod
    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        """Return the bytes of an image file, or an H x W or H x W x C uint8 array where it is stored decoded.

        Raises UnreadableImage where the file is gone or can't be read.
        """

    @abstractmethod
    def stamp(self, index: int) -> str:
        """Return what changes when the content of an image does, such as size and time of its file; "" if it is gone."""

    def changed(self) -> str | None:
        """Return in words which images have come or gone since the source was opened, or None: it is as it was."""
        return None

    def path(self, index: int) -> Path | None:
        """Return the absolute path of the image file, or None where the image is not a file of its own.

        The file may have gone since the source was opened.
        """
        return None

    @abstractmethod
    def details(self) -> str:
        """Return what follows "N images" in `describe`."""

    def describe(self) -> str:
        """Return the line that opens a run: how many images of which kind, from where, and what was skipped."""
        return f"{count_of(len(self), 'image')} {self.details()}"
