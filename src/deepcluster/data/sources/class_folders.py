"""Folders whose images are of one class each: which they are, and why others are not."""

import re
from collections.abc import Iterable

from deepcluster.core.text import printable

SPLIT = re.compile(
    r"(train|training|val|valid|validation|test|testing|dev|eval|unlabell?ed)([ _-]?(set|data|images|imgs|\d{4}))?",
    re.IGNORECASE,
)
# Folders of all images of a part, or of what goes with them: masks and annotations may be image files, too.
_IMAGES = frozenset(("images", "imgs", "img", "jpegimages"))
_OTHERS = frozenset(
    ("annotations", "masks", "labels", "segmentations", "segmentationclass", "segmentationobject", "trimaps")
)


def class_folders(folders: Iterable[str]) -> dict[str, str] | None:
    """Return the class of the images in each folder, as `classes_of` does; None where the folders are no classes."""
    return classes_of(folders)[0]


def classes_of(folders: Iterable[str]) -> tuple[dict[str, str] | None, str]:
    """Return the class of the images in each folder, which is given by its path and a slash ("" = the top).

    A class is a folder of the first level with several, below those that are called train, val, test and so on. Beside
    such classes, a part that has all its images in `images/` gives them none.

    Returns:
        the class by folder ("" = unknown), or None and why the folders are no classes ("": there are none).
    """
    parts = {folder: folder.split("/")[:-1] for folder in folders}
    depth, is_split = 0, False
    while parts and all(len(part) > depth for part in parts.values()):
        names = {part[depth] for part in parts.values()}
        are_splits = not is_split and all(map(SPLIT.fullmatch, names))
        if len(names) > 1 and not are_splits:
            if {name.lower() for name in names} <= _IMAGES | _OTHERS:
                return None, f"folders such as {printable(min(names))} and {printable(max(names))} are no classes"
            unknown = {name for name in names if is_split and name.lower() in _IMAGES}
            if len(names - unknown) > 1:
                return {folder: "" if part[depth] in unknown else part[depth] for folder, part in parts.items()}, ""
        is_split |= are_splits
        depth += 1
    direct = [folder for folder, part in parts.items() if len(part) <= depth]
    deeper = [folder for folder, part in parts.items() if len(part) > depth]
    if deeper:
        where, beside = printable(direct[0]) or "the top folder", printable(parts[deeper[0]][depth])
        return None, f"images lie directly in {where}, beside folders such as {beside}"
    last = {part[-1] for part in parts.values() if part}
    one = len(last) == 1 and depth and not SPLIT.fullmatch(min(last))
    return None, f"all images lie in one folder, {printable(min(last))}" if one else ""
