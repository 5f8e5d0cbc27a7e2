"""All images of a folder, their class folders, and what has changed since the folder was opened."""

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, repeat
from pathlib import Path

from deepcluster.core.errors import InputError
from deepcluster.core.text import count_of, endings_of, printable
from deepcluster.data.sources.files import IMAGE_ENDINGS, FileSource, describe_files
from deepcluster.data.sources.image_source import ImageSource
from deepcluster.data.sources.scan import Listing, scan

_SPLIT = re.compile(
    r"(train|training|val|valid|validation|test|testing|dev|eval)([ _-]?(set|data|images|imgs))?", re.IGNORECASE
)
_NAMED = 3


class NoImages(InputError):
    """A folder without images.

    Attributes:
        holders: paths of the tar and Parquet files in it, relative to it.
    """

    def __init__(self, message: str, holders: Sequence[str]) -> None:
        super().__init__(message)
        self.holders = holders


class FolderSource(FileSource):
    """All image files below one folder."""

    def __init__(self, root: Path, listing: Listing) -> None:
        notes, labels = [], None
        classes, why = classes_of(listing.images)
        if not classes and listing.tables:  # As `images/` beside `labels.csv`.
            hint = f"{printable(listing.tables[0])} may have some: give it as DATA to use them"
            why = f"{why}; {hint}".removeprefix("; ")
        if classes:
            labels = chain.from_iterable(repeat(classes[folder], count) for folder, count in listing.images.items())
            notes.append(f"labels from {count_of(len(set(classes.values())), 'class folder')} (used for diagnostics only)")
        elif why:
            notes.append(f"no labels ({why})")
        if listing.others:
            notes.append(f"{count_of(listing.others.total(), 'other file')} skipped ({endings_of(listing.others)})")
        notes += left_out(listing)
        super().__init__(root, listing.names, labels, describe_files(len(listing.images), listing.endings, notes))
        self._listing = listing
        self.why_no_labels = why

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
        found += left_out(listing)
        found = ["looked for " + endings_of(IMAGE_ENDINGS), *(found or ["it is empty"])]
        raise NoImages(f"{folder} holds no images: {'; '.join(found)}", listing.holders)
    return FolderSource(folder, listing)


def left_out(listing: Listing) -> list[str]:
    """Return what was left out of a folder, in words: of the system, of this program, and what could not be opened."""
    folders = listing.system.copy()
    n_hidden = folders.pop(".*", 0)
    ranked = [f"{printable(name)}{f' {count:,}' if count > 1 else ''}" for name, count in folders.most_common(_NAMED)]
    ours = [printable(path) for path in listing.ours[:_NAMED]]
    n_ours = len(listing.ours)
    notes = {
        f"{count_of(folders.total(), 'hidden or system folder')} left out ({_first_of(ranked, len(folders))})": folders,
        f"{count_of(n_hidden, 'hidden file')} left out": n_hidden,
        f"{count_of(n_ours, 'folder')} that deepcluster wrote left out ({_first_of(ours, n_ours)})": ours,
        f"{count_of(listing.special, 'special file')} skipped (pipes, sockets or devices)": listing.special,
        f"{count_of(listing.closed, 'folder')} could not be opened": listing.closed,
    }
    return [note for note, applies in notes.items() if applies]


def _first_of(names: Sequence[str], count: int) -> str:
    return ", ".join([*names, *["..."] * (count > len(names))])


def class_folders(folders: Iterable[str]) -> dict[str, str] | None:
    """Return the class of the images in each folder, as `classes_of` does; None where the folders are no classes."""
    return classes_of(folders)[0]


def classes_of(folders: Iterable[str]) -> tuple[dict[str, str] | None, str]:
    """Return the class of the images in each folder, which is given by its path and a slash ("" = the top).

    A class is a folder of the first level with several, below those that are called train, val, test and so on.

    Returns:
        the class by folder, or None and why the folders are no classes ("": there are none).
    """
    parts = {folder: folder.split("/")[:-1] for folder in folders}
    depth, is_split = 0, False
    while all(len(part) > depth for part in parts.values()):
        names = {part[depth] for part in parts.values()}
        are_splits = not is_split and all(map(_SPLIT.fullmatch, names))
        if len(names) > 1 and not are_splits:
            return {folder: part[depth] for folder, part in parts.items()}, ""
        is_split |= are_splits
        depth += 1
    direct = [folder for folder, part in parts.items() if len(part) <= depth]
    deeper = [folder for folder, part in parts.items() if len(part) > depth]
    if deeper:
        where, beside = printable(direct[0]) or "the top folder", printable(parts[deeper[0]][depth])
        return None, f"images lie directly in {where}, beside folders such as {beside}"
    last = {part[-1] for part in parts.values() if part}
    one = len(last) == 1 and depth and not _SPLIT.fullmatch(min(last))
    return None, f"all images lie in one folder, {printable(min(last))}" if one else ""


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
