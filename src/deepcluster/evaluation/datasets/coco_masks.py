"""COCO's panoptic annotations as one class per pixel: 80 things and 53 kinds of stuff (Kirillov et al., CVPR 2019).

A PNG has the number of a segment in each pixel, R + 256 G + 65,536 B, 0 for none; a JSON file has the category of each
segment. N images, S segments of all of them.
"""

import json
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.errors import InputError
from deepcluster.core.files import read_regular
from deepcluster.core.names import PackedNames
from deepcluster.core.text import count_of
from deepcluster.data.sources import ImageSource
from deepcluster.data.sources.files import FileSource
from deepcluster.evaluation.datasets.dense import IGNORED, MaskSet
from deepcluster.evaluation.datasets.labelled import some
from deepcluster.evaluation.datasets.mask_files import Mask, check_files, check_size, packed, read_png

ANNOTATIONS = "annotations"


def is_coco_panoptic(data: Path) -> bool:
    """Return whether panoptic_*.json is in the annotations of a folder."""
    return any((data / ANNOTATIONS).glob("panoptic_*.json"))


@dataclass(frozen=True)
class PanopticMasks:
    """Reads the mask of an image from its PNG: `MaskSet.read_mask`.

    Attributes:
        paths: of the PNG of each image.
        starts: of each image's segments among all, and S; (N + 1,).
        segments_S: their numbers in the PNG, sorted within an image.
        classes_S: their classes; `IGNORED` of crowds.
    """

    source: ImageSource
    paths: PackedNames
    starts: NDArray[np.int64]
    segments_S: NDArray[np.int64]
    classes_S: Mask

    def __call__(self, index: int) -> Mask:
        """Return the mask of an image.

        Raises:
            InputError: it can't be read, has another size than its image, or a segment that the JSON file does not have.
        """
        path = Path(self.paths[index])
        colours, mode = read_png(path)
        if mode != "RGB":
            raise InputError(f"{path} has no colours: a panoptic PNG has the number of a segment in red, green and blue")
        check_size(self.source, index, colours.shape[:2], path)
        own = slice(*self.starts[index : index + 2].tolist())
        segments = np.concatenate([[0], self.segments_S[own]])
        classes: Mask = np.append(np.uint8(IGNORED), self.classes_S[own])
        numbers_HW = packed(colours)
        at_HW = np.searchsorted(segments, numbers_HW).clip(max=len(segments) - 1)
        unknown_HW = segments[at_HW] != numbers_HW
        if unknown_HW.any():
            found = some(map(str, np.unique(numbers_HW[unknown_HW])))
            raise InputError(f"{path} has the segment {found}, which its JSON file does not have for this image")
        mask_HW: Mask = classes[at_HW]
        return mask_HW


@dataclass(frozen=True)
class CocoPanoptic:
    """A folder with annotations/panoptic_PART.json, their PNG files in annotations/panoptic_PART, and images in PART."""

    root: Path

    def names(self) -> list[str]:
        """Return the names of the parts: train2017, val2017."""
        found = sorted((self.root / ANNOTATIONS).glob("panoptic_*.json"))
        return [path.stem.removeprefix("panoptic_") for path in found]

    def open(self, part: str) -> MaskSet:
        """Return the images of a part that have an annotation.

        Raises:
            InputError: a file is missing, or the JSON file is not COCO's panoptic format.
        """
        file = self.root / ANNOTATIONS / f"panoptic_{part}.json"
        try:
            return self._open(file, part, json.loads(read_regular(file)))
        except OSError as error:
            raise InputError(f"{file} can't be read: {(error.strerror or str(error)).lower()}") from error
        except ValueError as error:
            raise InputError(f"{file} does not parse as JSON: {error}") from error
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(
                f"{file} is not in COCO's panoptic format ({what}); instances_*.json is another file"
            ) from error

    def _open(self, file: Path, part: str, content: dict[str, Any]) -> MaskSet:
        categories = {int(one["id"]): number for number, one in enumerate(content["categories"])}
        if not 0 < len(categories) <= IGNORED:
            raise InputError(f"{file} has {len(categories)} categories; a mask can have 1 to {IGNORED}")
        images = {one["id"]: str(one["file_name"]) for one in content["images"]}
        rows = sorted(content["annotations"], key=lambda row: row["image_id"])
        if not rows:
            raise InputError(f"{file} has no annotations")
        folder = self._folder(part)
        pictures = file.with_suffix("")
        names, masks = [images[row["image_id"]] for row in rows], [str(row["file_name"]) for row in rows]
        check_files(folder, names, f"images that {file} lists", "unpack COCO's images again")
        check_files(pictures, masks, f"masks that {file} lists", "unpack panoptic_annotations again, and the archives in it")
        segments: list[tuple[int, int]] = []
        for row in rows:
            own = [
                (int(one["id"]), IGNORED if one.get("iscrowd") else categories[one["category_id"]])
                for one in row["segments_info"]
            ]
            segments += sorted(own)
        pairs = np.array(segments, np.int64).reshape(-1, 2)
        starts = np.array([*accumulate((len(row["segments_info"]) for row in rows), initial=0)])
        name = f"COCO {part}"
        source = FileSource(folder, PackedNames(names), None, f"of {name}")
        paths = PackedNames(str((pictures / one).absolute()) for one in masks)
        read = PanopticMasks(source, paths, starts, pairs[:, 0], pairs[:, 1].astype(np.uint8))
        without = len(images) - len(rows)
        notes = [f"{count_of(without, 'image')} of {part} without annotation left out"] if without > 0 else []
        return MaskSet(name, source, tuple(str(one["name"]) for one in content["categories"]), read, notes=tuple(notes))

    def _folder(self, part: str) -> Path:
        folders = [self.root / part, self.root / "images" / part]
        found = next((folder for folder in folders if folder.is_dir()), None)
        if found is None:
            raise InputError(f"{folders[0]} does not exist: the images of annotations/panoptic_{part}.json should be there")
        return found

    def parts(self, lists: str) -> tuple[MaskSet, MaskSet]:
        """Return the images to train on, and those to test on: the part whose name begins with val, or with `lists`.

        Raises:
            InputError: as `open`, there is no such part, or the categories of the two differ.
        """
        wanted = ("train", "val" if lists == "auto" else lists)
        names = [next((name for name in self.names() if name.startswith(one)), None) for one in wanted]
        missing = [one for one, name in zip(wanted, names, strict=True) if name is None]
        if missing:
            there = ", ".join(f"panoptic_{name}.json" for name in self.names())
            raise InputError(f"{self.root / ANNOTATIONS} has no panoptic_{missing[0]}*.json; there are {there}")
        train, test = (self.open(name) for name in names if name is not None)
        if train.class_names != test.class_names:
            differing = sorted(set(train.class_names) ^ set(test.class_names)) or ["their order"]
            raise InputError(
                f"{self.root / ANNOTATIONS}: the categories of {' and '.join(map(str, names))} differ: {some(differing)}"
            )
        return train, test
