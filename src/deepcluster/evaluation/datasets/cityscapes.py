"""Cityscapes: street images in leftImg8bit, the class of each pixel in gtFine (Cordts et al., CVPR 2016)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from deepcluster.core.errors import InputError
from deepcluster.core.names import PackedNames
from deepcluster.data.sources.files import FileSource
from deepcluster.evaluation.datasets.dense import IGNORED, MaskSet
from deepcluster.evaluation.datasets.labelled import contents_of, some
from deepcluster.evaluation.datasets.mask_files import Mask, MaskFiles, check_classes, read_png

IMAGES, MASKS = "leftImg8bit", "gtFine"
# By labelId, of the 19 classes that count, in the order of their trainIds.
NAMES = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
CLASS_NAMES = tuple(NAMES.values())
LABEL_IDS = 34


def is_cityscapes(data: Path) -> bool:
    """Return whether leftImg8bit and gtFine are in a folder."""
    return (data / IMAGES).is_dir() and (data / MASKS).is_dir()


@cache
def _train_ids() -> Mask:
    """Return the trainId of each labelId, `IGNORED` for the 15 that do not count."""
    table = np.full(256, IGNORED, np.uint8)
    table[list(NAMES)] = np.arange(len(NAMES))
    return table


def read_label_ids(path: Path) -> Mask:
    """Return the class of each pixel, from a file of labelIds.

    Raises:
        InputError: it can't be read, or has a value that is no labelId.
    """
    return _train_ids()[check_classes(read_png(path)[0], LABEL_IDS, path)]


def read_train_ids(path: Path) -> Mask:
    """Return the class of each pixel, from a file of labelTrainIds.

    Raises:
        InputError: it can't be read, or has a value that is no trainId.
    """
    return check_classes(read_png(path)[0], len(NAMES), path)


def read_ids(path: Path) -> Mask:
    """Return the class of each pixel, from either."""
    return (read_train_ids if path.name.endswith("labelTrainIds.png") else read_label_ids)(path)


@dataclass(frozen=True)
class Cityscapes:
    """The folder with leftImg8bit and gtFine."""

    root: Path

    def open(self, part: str) -> MaskSet:
        """Return the images of train or val; the masks of test are not public.

        Raises:
            InputError: there is no such part, or an image has no mask of labelIds or labelTrainIds.
        """
        folder = self.root / IMAGES / part
        if not folder.is_dir():
            raise InputError(f"{folder} does not exist; {self.root / IMAGES}: {contents_of(self.root / IMAGES)}")
        ending = f"_{IMAGES}.png"
        images = sorted(path for path in folder.glob(f"*/*{ending}") if not path.name.startswith("."))
        if not images:
            raise InputError(f"{folder} has no images named CITY/*{ending}: {contents_of(folder)}")
        masks, missing = [], []
        there = set(self._masks(part))
        for image in images:
            stem = f"{image.parent.name}/{image.name.removesuffix(ending)}_gtFine"
            found = next((name for kind in ("labelTrainIds", "labelIds") if (name := f"{stem}_{kind}.png") in there), None)
            masks.append(str((self.root / MASKS / part / (found or "")).absolute()))
            missing += [f"{stem}_labelIds.png"] * (found is None)
        if missing:
            raise InputError(
                f"{self.root / MASKS / part} lacks the masks of {len(missing):,} of {len(images):,} images: {some(missing)}"
                "; they are in gtFine_trainvaltest.zip"
            )
        name = f"Cityscapes {part}"
        names = PackedNames(f"{path.parent.name}/{path.name}" for path in images)
        source = FileSource(folder, names, None, f"of {name}")
        return MaskSet(name, source, CLASS_NAMES, MaskFiles(source, PackedNames(masks), read_ids))

    def _masks(self, part: str) -> Iterator[str]:
        for path in (self.root / MASKS / part).glob("*/*Ids.png"):
            yield f"{path.parent.name}/{path.name}"

    def parts(self, lists: str) -> tuple[MaskSet, MaskSet]:
        """Return train, and val to test on.

        Raises:
            InputError: as `open`, or another part is asked for.
        """
        if lists not in ("auto", "val"):
            raise InputError(f"Cityscapes is tested on val, not on {lists}: the masks of its test images are not public")
        return self.open("train"), self.open("val")
