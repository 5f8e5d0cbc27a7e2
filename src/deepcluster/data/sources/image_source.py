"""The contract of image sources: N images, H height, W width, C channels.

Everything about the images (features, clusters, distances) is an array of N rows; `name(index)` is what users see.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.text import count_of, printable
from deepcluster.data.sources.labels import in_order


def place_of(index: int, ends: Sequence[int]) -> tuple[int, int]:
    """Return the part that holds an image, and its index there; parts end before the indices `ends`."""
    if not 0 <= index < ends[-1]:
        raise IndexError(f"index {index} of {ends[-1]} images")
    part = bisect_right(ends, index)
    return part, index - (ends[part - 1] if part else 0)


class ImageSource(ABC):
    """An ordered, immutable collection of N images.

    It can be pickled, and read from many threads and processes, forked ones too.

    Attributes:
        labels_N: index into `class_names` of each image, -1 = unknown; None if no label is known. Labels serve diagnostics
            and evaluation only: training never reads them.
        class_names: names of the classes, sorted; as numbers where all are numbers.
        why_no_labels: why no label is known, or not of all images, where that is of interest.
        label_notes: what is wrong with files that give labels to the images of a folder.
        is_selection: whether labels are from a table beside a folder, which may name only some of its images on purpose.
    """

    why_no_labels = ""
    label_notes: tuple[str, ...] = ()
    is_selection = False

    def __init__(self, labels: Iterable[str] | None = None) -> None:
        """Take the class name of each image ("" = unknown), or None if no label is known."""
        self.labels_N: NDArray[np.int64] | None = None
        self.class_names: list[str] = []
        if labels is None:
            return
        labels = list(labels)
        names = in_order(set(labels) - {""})
        numbers = {"": -1} | {name: number for number, name in enumerate(names)}
        self.labels_N = np.fromiter((numbers[label] for label in labels), np.int64, len(labels))
        self.class_names = [printable(name) for name in names]

    @abstractmethod
    def __len__(self) -> int:
        """Return N."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the path of an image relative to the root, with forward slashes; unique in the source."""

    @abstractmethod
    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        """Return an image file, or an image as H x W or H x W x C uint8 if it is stored decoded; raises UnreadableImage."""

    @abstractmethod
    def stamp(self, index: int) -> str:
        """Return a text that changes with the content of an image, such as size and time of its file; "" if it is gone."""

    def content(self) -> str:
        """Return a text that changes with the content of all images, where their names say nothing of it; else ""."""
        return ""

    def changed(self) -> str | None:
        """Describe which images have come, changed or gone since the source was opened; None if none have."""
        return None

    def path(self, index: int) -> Path | None:
        """Return the absolute path of the image file, which may be gone by now; None if it is not a file of its own."""
        return None

    def holder(self, index: int) -> str:
        """Return the path, or the address, of the file that holds an image, such as an archive; "" of one in memory."""
        return str(self.path(index) or "")

    @abstractmethod
    def details(self) -> str:
        """Return what follows "N images" in `describe`."""

    def describe(self) -> str:
        """Return the opening line of a run: how many images of which kind, from where, and what was skipped."""
        return f"{count_of(len(self), 'image')} {self.details()}"
