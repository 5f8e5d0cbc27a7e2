"""All images of a folder, their class folders, and what has changed since the folder was opened."""

from collections.abc import Callable, Iterable
from itertools import chain, repeat
from pathlib import Path

from deepcluster.core.errors import InputError
from deepcluster.core.text import count_of, endings_of, printable
from deepcluster.data.sources.files import IMAGE_ENDINGS, FileSource, describe_files
from deepcluster.data.sources.image_source import ImageSource
from deepcluster.data.sources.scan import Listing, scan

_SPLITS = {"train", "val", "test", "valid", "validation"}
_NAMED = 3


class NoImages(InputError):
    """A folder without images."""


class FolderSource(FileSource):
    """All image files below one folder."""

    def __init__(self, root: Path, listing: Listing) -> None:
        notes, labels = [], None
        if classes := class_folders(listing.images):
            labels = chain.from_iterable(repeat(classes[folder], count) for folder, count in listing.images.items())
            notes.append(f"labels from {count_of(len(set(classes.values())), 'class folder')} (used for diagnostics only)")
        if listing.others:
            notes.append(f"{count_of(listing.others.total(), 'other file')} skipped ({endings_of(listing.others)})")
        if listing.special:
            notes.append(f"{count_of(listing.special, 'special file')} skipped (pipes, sockets or devices)")
        if listing.closed:
            notes.append(f"{count_of(listing.closed, 'folder')} could not be opened")
        super().__init__(root, listing.names, labels, describe_files(len(listing.images), listing.endings, notes))
        self._listing = listing

    def changed(self) -> str | None:
        if self._listing.is_current(self._root):
            return None
        now = scan(self._root)
        if now.names != self._listing.names:
            return difference(self._listing.names, now.names)
        self._listing = now  # So that the next check is quick.
        return None


def open_folder(folder: Path, *, on_found: Callable[[int], None] = lambda so_far: None) -> ImageSource:
    """Open all images below `folder`, sorted by path; folders with the images of one class each give labels.

    `on_found` gets the number of images so far, a few times per second and at the end; it may raise to stop.
    Raises NoImages where there are none.
    """
    listing = scan(folder.absolute(), on_found)
    if not len(listing.names):
        found = [f"found only {endings_of(listing.others)}"] if listing.others else []
        found += [f"{count_of(listing.special, 'special file')} (pipes, sockets or devices)"] if listing.special else []
        found += [f"{count_of(listing.closed, 'folder')} could not be opened"] if listing.closed else []
        found = ["looked for " + endings_of(IMAGE_ENDINGS), *(found or ["it is empty"])]
        raise NoImages(f"{folder} holds no images: {'; '.join(found)}")
    return FolderSource(folder, listing)


def class_folders(folders: Iterable[str]) -> dict[str, str] | None:
    """Return the class of the images in each folder, which is given by its path and a slash ("" = the top).

    None where the folders are no classes.
    """
    parts = {folder: folder.split("/") for folder in folders}
    tops = {part[0] for part in parts.values()}
    depth = int({top.lower() for top in tops} <= _SPLITS)
    if any(len(part) < depth + 2 for part in parts.values()) or (not depth and len(tops) < 2):
        return None
    return {folder: part[depth] for folder, part in parts.items()}


def difference(before: Iterable[str], now: Iterable[str]) -> str:
    """Return which names are gone and which are new, in words; "" where there are none."""
    before, now = set(before), set(now)
    parts: list[str] = []
    for names, what in ((before - now, "gone"), (now - before, "new")):
        if names:
            number = f"{len(names):,}" if parts else count_of(len(names), "image")
            some = [printable(name) for name in sorted(names)[:_NAMED]] + ["..."] * (len(names) > _NAMED)
            parts.append(f"{number} {'is' if len(names) == 1 else 'are'} {what} ({', '.join(some)})")
    return " and ".join(parts)
