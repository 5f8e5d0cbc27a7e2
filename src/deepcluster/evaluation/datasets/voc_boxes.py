"""The objects of PASCAL VOC devkits: one, or several joined, such as VOC2007 and VOC2012.

VOC counts pixels from 1, and the last one belongs to the box: (xmin, ymin, xmax, ymax) is (xmin - 1, ymin - 1, xmax, ymax)
in the continuous pixels of `Objects`, of the same width and height.

An annotation that can't be read as such (no number, no box) is an error, as is a wrong flag. A box that does not fit its
image is a slip of an annotator or a tool, of which large sets have a few: one that sticks out is clipped to the image, one
that is empty or wholly outside is left out, and a note counts and names them.

N images, M objects.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import isfinite
from pathlib import Path
from xml.etree.ElementTree import Element

import torch
from PIL import ExifTags, Image
from torch import Tensor

from deepcluster.core.errors import InputError
from deepcluster.core.text import are, count_of
from deepcluster.data.sources.image_source import place_of
from deepcluster.data.sources.joined import JoinedSource
from deepcluster.evaluation.datasets.dense import BACKGROUND, Objects, ObjectSet
from deepcluster.evaluation.datasets.labelled import some
from deepcluster.evaluation.datasets.voc import CLASSES, Devkit, annotation, lists_for, note_on, objects_in

CLASS_NAMES = (BACKGROUND, *CLASSES)
SIDES = ("xmin", "ymin", "xmax", "ymax")

Box = tuple[float, float, float, float]


def splits_for(devkits: Sequence[Devkit], split: str) -> tuple[ObjectSet, ObjectSet]:
    """Return the objects to train and to test on: train and val, or trainval and test.

    All devkits are trained on. The test is on the first one that has it with annotations: VOC2007, since those of VOC2012's
    test images are not public.

    Args:
        split: train, trainval, or auto: trainval where the test images have annotations or there is no val, else train.

    Raises:
        InputError: a list is missing, or what `objects_of` raises.
    """
    if split == "auto":
        val_only = any({"train", "val"} <= set(one.lists()) for one in devkits)
        split = "train" if val_only and not any(one.has_answers("test") for one in devkits) else "trainval"
    held_out = {"train": "val", "trainval": "test"}[split]
    tested = next((one for one in devkits if one.has_answers(held_out)), devkits[0])
    train, held_out = lists_for(tested, split)
    return joined_objects(devkits, train), objects_of(tested, held_out)


def objects_of(devkit: Devkit, split: str) -> ObjectSet:
    """Return the images of a list (train, val, trainval or test) with their objects, difficult ones too.

    Raises:
        InputError: no such list, an image or annotation is missing, or an annotation can't be read as VOC's.
    """
    source, names, notes = devkit.images(split)
    found = _Found()
    for image in names:
        found.read(devkit.annotation(image), devkit.root / "JPEGImages" / f"{image}.jpg")
    return ObjectSet(
        devkit.title(split), source, CLASS_NAMES, found.objects(), notes=(*notes, *found.notes(devkit.title(split)))
    )


def joined_objects(devkits: Sequence[Devkit], split: str) -> ObjectSet:
    """Return the images of the lists of one name of several devkits, one after the other: `VOC2007/000005.jpg`.

    Raises:
        InputError: as `objects_of`.
    """
    parts = [objects_of(devkit, split) for devkit in devkits]
    if len(parts) == 1:
        return parts[0]
    source = JoinedSource([(devkit.root.name, part.source) for devkit, part in zip(devkits, parts, strict=True)])
    ends = tuple(accumulate(map(len, parts)))
    notes = [note for part in parts for note in part.notes]
    name = " + ".join(part.name for part in parts)
    return ObjectSet(name, source, CLASS_NAMES, _JoinedObjects(tuple(parts), ends), notes=tuple(notes))


@dataclass(frozen=True)
class _JoinedObjects:
    """`ObjectSet.read_objects` of several sets, one after the other; image i belongs to the first with i < end."""

    parts: tuple[ObjectSet, ...]
    ends: tuple[int, ...]

    def __call__(self, index: int, with_masks: bool = False) -> Objects:
        part, inner = place_of(index, self.ends)
        return self.parts[part].read_objects(inner, with_masks)


@dataclass(frozen=True)
class _ReadObjects:
    """`ObjectSet.read_objects` of a list: the objects of all images, those of image i from row starts_N[i] on."""

    starts_N: Tensor
    boxes_M4: Tensor
    labels_M: Tensor
    difficult_M: Tensor

    def __call__(self, index: int, with_masks: bool = False) -> Objects:
        rows = slice(int(self.starts_N[index]), int(self.starts_N[index + 1]))
        difficult_M = self.difficult_M[rows]
        return Objects(self.boxes_M4[rows], self.labels_M[rows], difficult_M, torch.zeros_like(difficult_M))


@dataclass
class _Found:
    """The objects of the annotations read so far, and what is wrong with them."""

    starts: list[int] = field(default_factory=lambda: [0])
    rows: list[tuple[Box, int, bool]] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)
    clipped: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def read(self, file: Path, image: Path) -> None:
        """Add the objects of an image, in the order of the file.

        Raises:
            InputError: the annotation can't be read as VOC's.
        """
        root = annotation(file)
        width, height = _stated_size(root)
        for element, name, difficult in objects_in(root, file, self.unknown):
            box = _box_of(element, name, file)
            if min(box[:2]) < 0 or box[2] > width or box[3] > height:
                # Sizes in annotations are missing or wrong more often than those of image files.
                width, height = _size_of(image)
            left, top, right, bottom = max(box[0], 0), max(box[1], 0), min(box[2], width), min(box[3], height)
            where = f"{file.name} ({name} {', '.join(f'{one:g}' for one in (box[0] + 1, box[1] + 1, *box[2:]))})"
            if left >= right or top >= bottom:
                self.left_out.append(where)
                continue
            if (left, top, right, bottom) != box:
                self.clipped.append(where)
            self.rows.append(((left, top, right, bottom), CLASS_NAMES.index(name), difficult))
        self.starts.append(len(self.rows))

    def objects(self) -> _ReadObjects:
        """Return all objects."""
        boxes, labels, difficult = zip(*self.rows, strict=True) if self.rows else ((), (), ())
        return _ReadObjects(
            torch.tensor(self.starts),
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            torch.tensor(labels, dtype=torch.int64),
            torch.tensor(difficult, dtype=torch.bool),
        )

    def notes(self, title: str) -> list[str]:
        """Return what a reader of the numbers must know of the objects that were read."""
        notes = note_on(self.unknown, title)
        if self.clipped:
            verb = "sticks out of its image and is" if len(self.clipped) == 1 else "stick out of their images and are"
            notes.append(f"{title}: {count_of(len(self.clipped), 'box')} {verb} clipped: {some(self.clipped)}")
        if self.left_out:
            number = are(len(self.left_out), "box")
            notes.append(f"{title}: {number} empty or outside the image, and left out: {some(self.left_out)}")
        return notes


def _box_of(element: Element, name: str, file: Path) -> Box:
    """Return the continuous box of an object; the tags of its parts, such as heads, are inside `part`."""
    numbers = []
    for side in SIDES:
        text = element.findtext(f"bndbox/{side}")
        if text is None:
            raise InputError(f"{file}: a {name} has no <{side}> in a <bndbox>; VOC's boxes have {', '.join(SIDES)}")
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if not isfinite(number):
            raise InputError(f"{file}: <{side}> of a {name} is {text.strip()!r}, which is no number of pixels")
        numbers.append(number)
    return numbers[0] - 1, numbers[1] - 1, numbers[2], numbers[3]


def _stated_size(root: Element) -> tuple[float, float]:
    """Return width and height as the annotation states them; 0 where it does not, so that the image is asked."""
    try:
        size = float(root.findtext("size/width") or 0), float(root.findtext("size/height") or 0)
    except ValueError:
        return 0.0, 0.0
    return size if all(map(isfinite, size)) else (0.0, 0.0)


def _size_of(image: Path) -> tuple[float, float]:
    """Return width and height of an image file, upright; no limit if it can't be read, which the loader will find."""
    try:
        with Image.open(image) as opened:
            turned = opened.getexif().get(ExifTags.Base.Orientation, 1) > 4
            return opened.size[::-1] if turned else opened.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return float("inf"), float("inf")
