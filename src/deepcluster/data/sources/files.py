"""Image files on this machine; `folders` finds those of a folder, `lists` those that a list or table names."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from deepcluster.core.errors import UnreadableImage
from deepcluster.core.files import file_stamp, read_regular
from deepcluster.core.names import PackedNames
from deepcluster.core.text import count_of, endings_of, printable
from deepcluster.data.sources.image_source import ImageSource

IMAGE_ENDINGS = frozenset(
    "jpg jpeg jpe jfif png webp bmp gif tif tiff ppm pgm pbm avif heic heif".split()  # noqa: SIM905 (a list of words)
)


class FileSource(ImageSource):
    """N image files below one folder; safe to read from many threads."""

    def __init__(self, root: Path, paths: PackedNames, labels: Iterable[str] | None, details: str) -> None:
        """Take paths relative to `root`, a class name for each ("" = unknown), and what `details` returns."""
        super().__init__(labels)
        self._root = root.absolute()
        self._prefix = os.path.join(self._root, "")  # noqa: PTH118 (with a slash at its end)
        self._paths = paths
        self._details = details

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return printable(self._paths[index])

    def path(self, index: int) -> Path:
        return self._root / self._paths[index]

    def read(self, index: int) -> bytes:
        try:
            return read_regular(self._prefix + self._paths[index])
        except OSError as error:
            raise UnreadableImage((error.strerror or str(error)).lower()) from error
        except ValueError as error:  # A null byte in a path out of a list.
            raise UnreadableImage(f"not a path: {error}") from error

    def stamp(self, index: int) -> str:
        return file_stamp(self._prefix + self._paths[index])

    def details(self) -> str:
        return self._details


def image_files(paths: list[Path]) -> FileSource:
    """Return image files of any folders as images."""
    places = [path.absolute() for path in paths]
    root = Path(os.path.commonpath([place.parent for place in places]))
    return FileSource(root, PackedNames(place.relative_to(root).as_posix() for place in places), None, "queries")


def count_endings(paths: Iterable[str]) -> Counter[str]:
    """Return how many of the paths have each ending; "" where the name has none."""
    names = (path.rpartition("/")[2] for path in paths)
    return Counter(name.rpartition(".")[2] if "." in name else "" for name in names)


def describe_files(folders: int, endings: Counter[str], notes: Iterable[str]) -> str:
    """Write `in 2 folders (.jpg 12), ` and the notes."""
    return ", ".join([f"in {count_of(folders, 'folder')} ({endings_of(endings)})", *notes])
