"""Data sets as they are published: images whose classes are in a file beside their folder, and images without any.

N images. Only a few names per folder are looked up, and no image is.

| layout | images | their classes |
|---|---|---|
| Tiny-ImageNet | `val/images/val_0.JPEG` | `val/val_annotations.txt` |
| ImageNet | `val/ILSVRC2012_val_00000001.JPEG` | `LOC_val_solution.csv` or the development kit, beside `val/` or above |
| any | `val/...` (or `train`, `test`) | a table or list of that name beside the folder |
"""

import os
import posixpath
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path

from deepcluster.core.text import count_of, printable
from deepcluster.data.sources.annotations import (
    GROUND_TRUTH,
    WNID,
    WORDS,
    Annotations,
    devkit,
    disagreement,
    kaggle_solution,
    read_words,
    user_table,
    val_annotations,
)
from deepcluster.data.sources.class_folders import SPLIT, classes_of
from deepcluster.data.sources.files import count_endings
from deepcluster.data.sources.scan import Listing

_IMAGENET_VAL = re.compile(r"ILSVRC2012_val_\d{8}\.\w+", re.IGNORECASE)
_VAL = "val"
_KAGGLE = "LOC_val_solution.csv"
_TABLES = (".csv", ".tsv", ".jsonl", ".txt")
# Folders that may hold the ground truth, and the archive that does; Kaggle's CSV is four levels above val/.
_DEVKIT = "ILSVRC2012_devkit_t12"
_DEVKITS = ("", "data", "devkit", "devkit/data", f"{_DEVKIT}/data", f"{_DEVKIT}/{_DEVKIT}/data")
_DEVKIT_TAR = f"{_DEVKIT}.tar.gz"
_LEVELS = 4


@dataclass
class Beside:
    """What files beside folders of images say of these.

    Attributes:
        labels: class of each image ("" = unknown) of some folders, by the path of the folder and a slash ("" = the top).
        files: names of the files that the labels are from.
        problems: what is wrong with them, in words.
        left_out: folder, with a slash, whose images have no labels and are left out; "" if there is none.
        is_selection: whether a table of the user gives labels: it may name only some of the images on purpose.
    """

    labels: dict[str, list[str]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left_out: str = ""
    is_selection: bool = False

    def covers(self, folder: str) -> bool:
        """Return whether a folder is in one of those with labels."""
        return any(map(folder.startswith, self.labels))


def labels_beside(root: Path, listing: Listing) -> Beside:
    """Return what files in, beside and above the folders of a listing of `root` say of the classes of their images.

    Folders with class folders in them have no need of it.
    """
    found = Beside()
    above = _above_all(listing)
    base = above[-1]
    tops = {folder[len(base) :].partition("/")[0] for folder in listing.images} - {""}
    parts = {f"{base}{name}/" for name in tops if SPLIT.fullmatch(name) or _VAL in _words(name)}
    for folder in [*above, *sorted(parts)]:
        if not found.covers(folder):
            _add(found, root, folder, listing)
    test, train = f"{base}test/", f"{base}train/"
    if not found.is_selection and {train, test} <= parts and not found.covers(test) and parts & found.labels.keys():
        inner = {one for one in listing.images if one.startswith(test)}
        found.left_out = test if inner <= {test, f"{test}images/"} else ""
    return found


def leave_out(listing: Listing, folder: str) -> tuple[Listing, int]:
    """Return a listing without the images of a folder, given by its path and a slash, and their number."""
    some = block(listing, folder)
    endings = count_endings(islice(listing.names, some.start, some.stop))
    images = {one: count for one, count in listing.images.items() if not one.startswith(folder)}
    names = listing.names.without(some.start, some.stop)
    return replace(listing, names=names, images=images, endings=listing.endings - endings), len(some)


def block(listing: Listing, folder: str) -> range:
    """Return the indices of the images in a folder, given by its path and a slash ("" = the top)."""
    if not folder:
        return range(len(listing.names))
    return range(bisect_left(listing.names, folder), bisect_left(listing.names, f"{folder[:-1]}0"))  # "0" follows "/".


def named_classes(root: Path, listing: Listing, classes: Collection[str]) -> dict[str, str]:
    """Return `n01443537 goldfish` by number, if all classes are numbers of WordNet and a table of its words is at hand."""
    if not all(map(WNID.fullmatch, classes)):
        return {}
    for folder in [*(root / one for one in _above_all(listing)), *_and_above(root)]:
        for file in map(folder.joinpath, WORDS):
            if _is_file(file) and (words := read_words(file, classes)):
                return {wnid: f"{wnid} {word}" for wnid, word in words.items()}
    return {}


def _add(found: Beside, root: Path, folder: str, listing: Listing) -> None:
    """Add what is known of the images of one folder."""
    some, place = block(listing, folder), Path(os.path.normpath(root / folder))
    first = listing.names[some.start][len(folder) :] if some else ""
    files = list(_files(place, first)) if some else []
    if files and classes_of(one[len(folder) :] for one in listing.images if one.startswith(folder))[0]:
        tables = [path.name for path, read in files if read is user_table]
        found.problems += [f"{name} is not read, since {place.name}/ has class folders" for name in tables]
        return
    names = [name[len(folder) :] for name in islice(listing.names, some.start, some.stop)] if files else []
    used: list[tuple[Annotations, list[str], list[str]]] = []
    for one in (read(path) for path, read in files):
        found.problems += one.problems
        labels, notes = one.match(names)
        if not any(labels):
            found.problems += notes
            continue
        for other, others, _ in used:
            if differing := disagreement(others, labels):
                at = differing[0]
                found.problems.append(
                    f"{other.file} and {one.file} give different classes to {count_of(len(differing), 'image')} of "
                    f"{len(names):,}, such as {printable(names[at])}: {others[at]} and {labels[at]}; remove the wrong file"
                )
                return
        used.append((one, labels, notes))
    if used:
        one, found.labels[folder], notes = used[0]
        found.problems += notes
        found.files.append(one.file)
        found.is_selection |= one.is_table
    elif _IMAGENET_VAL.fullmatch(first) and not found.problems:
        found.problems.append(
            f"ImageNet's validation images, but neither {_DEVKIT_TAR}, {GROUND_TRUTH} nor {_KAGGLE} is beside them or above"
        )


def _files(place: Path, first: str) -> Iterator[tuple[Path, Callable[[Path], Annotations]]]:
    """Yield the files that may give classes to the images of a folder, one of which is `first`, and how to read them."""
    for folder in (place, *[place.parent] * (place.name == "images")):
        if _is_file(file := folder / "val_annotations.txt"):
            yield file, val_annotations
    if _IMAGENET_VAL.fullmatch(first):
        for folder in _and_above(place):
            if _is_file(file := folder / _KAGGLE):
                yield file, kaggle_solution
            if _is_file(file := folder / _DEVKIT_TAR):
                yield file, devkit
            yield from ((folder / one, devkit) for one in _DEVKITS if _is_file(folder / one / GROUND_TRUTH))
    if SPLIT.fullmatch(place.name):
        for ending in _TABLES:
            if _is_file(file := place.parent / f"{place.name}{ending}"):
                yield file, user_table


def _above_all(listing: Listing) -> list[str]:
    """Return the folders that hold all images, from the top ("") down to the deepest one, as paths with a slash."""
    parts = posixpath.commonpath(listing.images).split("/")
    return ["", *("/".join(parts[: depth + 1]) + "/" for depth in range(len(parts)) if parts[depth])]


def _and_above(place: Path) -> list[Path]:
    """Return a folder and the nearest ones that hold it, also where a link leads to it."""
    ways = ([path, *path.parents][: _LEVELS + 1] for path in (Path(os.path.normpath(place)), place.resolve()))
    return list(dict.fromkeys(chain.from_iterable(ways)))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # No permission above a folder.
        return False


def _words(name: str) -> list[str]:
    return re.split(r"[^a-z]+", name.lower())
