"""Several sources as one, and a selection from one."""

from collections.abc import Sequence
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.errors import InputError
from deepcluster.core.text import count_of, distinct, printable
from deepcluster.data.sources.image_source import ImageSource, place_of


class JoinedSource(ImageSource):
    """Several sources, one after the other; each name begins with the name of its source."""

    def __init__(self, parts: Sequence[tuple[str, ImageSource]]) -> None:
        """Take each source with the name of its folder or file; equal names become `name`, `name-2`, ..."""
        self._parts = tuple(source for _, source in parts)
        self._names = [printable(name) for name, _ in parts]
        self._prefixes = distinct(self._names, before_ending=False)
        self._ends = list(accumulate(map(len, self._parts)))
        labels = chain.from_iterable(map(_label_names, self._parts))
        super().__init__(labels if any(source.labels_N is not None for source in self._parts) else None)

    def __len__(self) -> int:
        return self._ends[-1]

    def name(self, index: int) -> str:
        part, inner = place_of(index, self._ends)
        own, name = self._names[part], self._parts[part].name(inner)
        # Names of images inside a file have its name already (`digits.npz::000012`).
        return self._prefixes[part] + (name[len(own) :] if name.startswith(f"{own}::") else f"/{name}")

    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        part, inner = place_of(index, self._ends)
        return self._parts[part].read(inner)

    def path(self, index: int) -> Path | None:
        part, inner = place_of(index, self._ends)
        return self._parts[part].path(inner)

    def stamp(self, index: int) -> str:
        part, inner = place_of(index, self._ends)
        return self._parts[part].stamp(inner)

    def holder(self, index: int) -> str:
        part, inner = place_of(index, self._ends)
        return self._parts[part].holder(inner)

    def content(self) -> str:
        return " ".join(filter(None, (part.content() for part in self._parts)))

    def changed(self) -> str | None:
        changes = ((name, part.changed()) for name, part in zip(self._names, self._parts, strict=True))
        named = [text if text.startswith(name) else f"{name}: {text}" for name, text in changes if text]
        return "; ".join(named[:3] + [f"and {len(named) - 3:,} more"] * (len(named) > 3)) or None

    def details(self) -> str:
        parts = [f"{name}: {part.describe()}" for name, part in zip(self._prefixes, self._parts, strict=True)]
        return f"from {len(parts)} sources: {'; '.join(parts)}"


class ChosenImages(ImageSource):
    """The images of another source at some indices."""

    def __init__(self, source: ImageSource, indices_M: NDArray[np.int64], *, about: str = "") -> None:
        """Take the indices in the order of the images, and how `details` describes them."""
        self._source, self._indices, self._about = source, indices_M, about
        self.class_names = source.class_names
        self.labels_N = None if source.labels_N is None else source.labels_N[indices_M]

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))

    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        return self._source.read(int(self._indices[index]))

    def path(self, index: int) -> Path | None:
        return self._source.path(int(self._indices[index]))

    def stamp(self, index: int) -> str:
        return self._source.stamp(int(self._indices[index]))

    def holder(self, index: int) -> str:
        return self._source.holder(int(self._indices[index]))

    def content(self) -> str:
        return self._source.content()

    def changed(self) -> str | None:
        return self._source.changed()

    def details(self) -> str:
        return f"{self._about}, of {self._source.describe()}".removeprefix(", ")


class LimitedSource(ChosenImages):
    """`limit` images spread evenly over another source, so that every class folder keeps its share."""

    def __init__(self, source: ImageSource, limit: int) -> None:
        """Keep the images floor(i * N / limit) of N; raises InputError if limit < 1."""
        if limit < 1:
            raise InputError(f"limit={limit} leaves no images; use --limit 1 or more, or leave it out for all")
        super().__init__(source, np.arange(limit, dtype=np.int64) * len(source) // limit)

    def details(self) -> str:
        return self._source.details()

    def describe(self) -> str:
        return f"{len(self):,} of {count_of(len(self._source), 'image')} (--limit) {self.details()}"


def _label_names(source: ImageSource) -> list[str]:
    """Return the class name of each image, "" if it is unknown (-1, so the last one)."""
    names = [*source.class_names, ""]
    return [""] * len(source) if source.labels_N is None else [names[label] for label in source.labels_N.tolist()]
