"""All images of a folder, their class folders, and what has changed since the folder was opened.

N images.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Final

from deepcluster.core.errors import InputError
from deepcluster.core.text import count_of, endings_of, printable
from deepcluster.data.sources.files import IMAGE_ENDINGS, FileSource, describe_files
from deepcluster.data.sources.image_source import ImageSource
from deepcluster.data.sources.scan import Listing, scan

_SPLITS: Final = frozenset({"train", "val", "test", "valid", "validation"})
_NAMED: Final = 3


class NoImages(InputError):
    """There is no image in a folder."""


class FolderSource(FileSource):
    """All image files below one folder."""

    def __init__(self, root: Path, listing: Listing) -> None:
        """Take what was found below `root`."""
        runs = class_runs(listing.names)
        notes = []
        if runs is not None:
            classes = len({label for label, _ in runs})
            notes.append(f"labels from {count_of(classes, 'class folder')} (used for diagnostics only)")
        if listing.others:
            notes.append(f"{count_of(listing.others.total(), 'other file')} skipped ({endings_of(listing.others)})")
        if listing.closed:
            notes.append(f"{count_of(listing.closed, 'folder')} could not be opened")
        labels = None if runs is None else chain.from_iterable(repeat(label, count) for label, count in runs)
        super().__init__(root, listing.names, labels, describe_files(listing.holding, listing.endings, notes))
        self._listing = listing

    def changed(self) -> str | None:
        if self._listing.still_true(self._root):
            return None
        now = scan(self._root)
        if now.names != self._listing.names:
            return difference(self._listing.names, now.names)
        self._listing = now  # So that the next look is a short one.
        return None


def open_folder(folder: Path, *, on_found: Callable[[int], None] | None = None) -> ImageSource:
    """Open all images below `folder`, in the order of their paths; folders of one class each give labels.

    `on_found` gets the number of images found so far, a few times a second and at the end; it may raise to stop.
    Raises NoImages where there are none.
    """
    listing = scan(folder.absolute(), on_found)
    if not listing.names:
        found = [f"found only {endings_of(listing.others)}"] if listing.others else []
        found += [f"{count_of(listing.closed, 'folder')} could not be opened"] if listing.closed else []
        what = "; ".join(found) or "it is empty"
        raise NoImages(f"{folder} holds no images: looked for {endings_of(IMAGE_ENDINGS)}; {what}")
    return FolderSource(folder, listing)


def class_runs(names: Sequence[str]) -> list[tuple[str, int]] | None:
    """Return the class folders in the order of the images, each with how many of these it holds in a row.

    None where the folders are no classes.
    """
    runs = _folder_runs(names, 1)
    if runs is None:
        return None
    tops = {top for top, _ in runs}
    if {top.lower() for top in tops} <= _SPLITS:
        return _folder_runs(names, 2)
    return runs if len(tops) > 1 else None


def _folder_runs(names: Sequence[str], depth: int) -> list[tuple[str, int]] | None:
    """Return the folders at `depth` (1 = the top), each with how many of the sorted names it holds in a row.

    None where a name lies higher.
    """
    runs = []
    start = 0
    while start < len(names):
        *above, _ = parts = names[start].split("/", depth)
        if len(parts) <= depth:
            return None
        # All that begins with these folders and "/" comes before them and "0", the next character.
        end = _first_not_below("/".join(above) + "0", names, start)
        runs.append((above[-1], end - start))
        start = end
    return runs


def _first_not_below(bound: str, names: Sequence[str], start: int) -> int:
    """Return the first position after `start` whose name is not below `bound`, in steps that double: most are near."""
    step = 1
    while start + step < len(names) and names[start + step] < bound:
        step *= 2
    return bisect_left(names, bound, start + step // 2, min(start + step, len(names)))


def difference(before: Iterable[str], now: Iterable[str]) -> str:
    """Say which of the sorted names have gone, and which are new."""
    parts: list[str] = []
    for names, what in ((_missing_from(now, before), "gone"), (_missing_from(before, now), "new")):
        first = [printable(name) for name in islice(names, _NAMED)]
        count = len(first) + sum(1 for _ in names)
        if count:
            number = f"{count:,}" if parts else count_of(count, "image")
            some = ", ".join([*first, "..."] if count > len(first) else first)
            parts.append(f"{number} {'is' if count == 1 else 'are'} {what} ({some})")
    return " and ".join(parts)


def _missing_from(others: Iterable[str], names: Iterable[str]) -> Iterator[str]:
    """Yield those of the sorted `names` that are not among the sorted `others`."""
    rest = iter(others)
    other = next(rest, None)
    for name in names:
        while other is not None and other < name:
            other = next(rest, None)
        if other != name:
            yield name
