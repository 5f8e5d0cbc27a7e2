"""All images of a folder, their class folders, and what has changed since the folder was opened."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, repeat
from pathlib import Path

from deepcluster.core.errors import InputError
from deepcluster.core.text import count_of, endings_of, printable
from deepcluster.data.sources.class_folders import classes_of
from deepcluster.data.sources.files import IMAGE_ENDINGS, FileSource, describe_files
from deepcluster.data.sources.image_source import ImageSource
from deepcluster.data.sources.published_layouts import Beside, block, labels_beside, leave_out, named_classes
from deepcluster.data.sources.scan import Listing, scan

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
        beside = labels_beside(root, listing)
        self._left_out, n_left_out = beside.left_out, 0
        if beside.left_out:
            listing, n_left_out = leave_out(listing, beside.left_out)
        classes, why = classes_of(one for one in listing.images if not beside.covers(one))
        others = {label for some in beside.labels.values() for label in some} - {""}
        if classes and others and others.isdisjoint(classes.values()):  # As numbers in a list of Caffe.
            what = f"{' and '.join(beside.files)} has other classes than the class folders"
            beside.problems.append(f"{what}, such as {printable(min(others))}, and is not used")
            beside.labels, beside.files = {}, []
        if not classes and listing.tables:  # As `images/` beside `labels.csv`.
            hint = f"{printable(listing.tables[0])} may have some: give it as DATA to use them"
            why = f"{why}; {hint}".removeprefix("; ")
        labels, notes = _labels(root, listing, classes or {}, beside)
        if not labels and (why := "; ".join(filter(None, [*beside.problems, why]))):
            notes = [f"no labels ({why})"]
        elif beside.problems:
            notes.append("; ".join(beside.problems))
        if n_left_out:
            total = len(listing.names) + n_left_out
            notes.append(f"{n_left_out:,} of {count_of(total, 'image')} left out: those in {beside.left_out} have no labels")
        if listing.others:
            notes.append(f"{count_of(listing.others.total(), 'other file')} skipped ({endings_of(listing.others)})")
        notes += left_out(listing)
        super().__init__(root, listing.names, labels, describe_files(len(listing.images), listing.endings, notes))
        self._listing = listing
        self.label_notes, self.is_selection = tuple(beside.problems), beside.is_selection
        self.why_no_labels = "; ".join(beside.problems) if labels else why

    def changed(self) -> str | None:
        if self._listing.is_current(self._root):
            return None
        now = scan(self._root)
        if self._left_out:
            now, _ = leave_out(now, self._left_out)
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


def _labels(root: Path, listing: Listing, classes: Mapping[str, str], beside: Beside) -> tuple[list[str] | None, list[str]]:
    """Return the class of each image ("" = unknown; None if no class is known), and notes on where they are from."""
    if not classes and not beside.labels:
        return None, []
    # The images of a folder follow each other, as its subfolders do, but a class has a whole folder with all below it.
    labels = list(chain.from_iterable(repeat(classes.get(one, ""), count) for one, count in listing.images.items()))
    for folder, some in beside.labels.items():
        at = block(listing, folder)
        labels[at.start : at.stop] = some
    known = set(labels) - {""}
    names = named_classes(root, listing, known)
    origins = [*(count_of(len(set(classes.values()) - {""}), "class folder") for _ in range(bool(classes))), *beside.files]
    notes = [f"labels from {' and '.join(origins)} (used for diagnostics only)"]
    if beside.files:
        notes[0] = f"labels of {count_of(len(known), 'class')} from {' and '.join(origins)} (used for diagnostics only)"
    if unknown := labels.count(""):
        notes.append(f"{unknown:,} without a label")
    return [names.get(label, label) for label in labels] if names else labels, notes


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
