"""COCO's instances: boxes and masks of objects in JSON files (Lin et al., ECCV 2014), and exports in the same format.

N images, M objects of an image, A objects of all images, C classes without the background.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.core.errors import InputError
from deepcluster.core.names import PackedNames
from deepcluster.core.text import count_of
from deepcluster.data.sources.files import FileSource
from deepcluster.data.sources.joined import ChosenImages
from deepcluster.evaluation.datasets.coco_json import (
    clipped,
    coco_tools,
    decoded_mask,
    encoded_mask,
    fault_of,
    load_instances,
    usable_mask,
)
from deepcluster.evaluation.datasets.dense import BACKGROUND, Objects, ObjectSet
from deepcluster.evaluation.datasets.labelled import contents_of, some

YEAR = "2017"
_PARTS = re.compile(r"instances_(train|val)(.*)\.json")
# Folders of exports for other tools (Roboflow), each with its images and this file.
_EXPORTED = "_annotations.coco.json"
_HELD_OUT = ("valid", "val", "test")
# In place of the id of a category, for the background.
NO_CATEGORY = -1


@dataclass(frozen=True)
class CocoPart:
    """The images to train on, or to test on.

    Attributes:
        name: "coco val2017".
        annotations: the JSON file.
        folders: where its images may be.
    """

    name: str
    annotations: Path
    folders: tuple[Path, ...]


@dataclass(frozen=True)
class CocoFolder:
    """The two parts of a folder."""

    root: Path
    train: CocoPart
    val: CocoPart


def open_coco(data: Path) -> CocoFolder:
    """Return the parts in a folder: `annotations/instances_{train,val}2017.json`, or those of another year or an export.

    Raises:
        InputError: there are none, or only one of the two.
    """
    found: dict[str, dict[str, Path]] = {}
    for file in sorted(data.glob("annotations/instances_*.json")):
        if match := _PARTS.fullmatch(file.name):
            found.setdefault(match[2], {})[match[1]] = file
    whole = sorted((year for year in found if len(found[year]) == 2), key=lambda year: (year == YEAR, year))
    name = data.resolve().name
    if whole:
        train, val = (_part(data, name, part + whole[-1], found[whole[-1]][part]) for part in ("train", "val"))
        return CocoFolder(data, train, val)
    exported = {part: data / part / _EXPORTED for part in ("train", *_HELD_OUT) if (data / part / _EXPORTED).is_file()}
    held_out = [part for part in _HELD_OUT if part in exported]
    if "train" in exported and held_out:
        parts = [CocoPart(f"{name} {part}", exported[part], (data / part,)) for part in ("train", held_out[0])]
        return CocoFolder(data, *parts)
    there = [file for parts in found.values() for file in parts.values()] or list(exported.values())
    only = f"only {some(str(file.relative_to(data)) for file in there)} of two parts; " if there else ""
    raise InputError(
        f"{data} has no COCO annotations: looked for annotations/instances_train{YEAR}.json and instances_val{YEAR}.json, "
        f"or of another year, and for train/{_EXPORTED} with valid/ or test/; {only}{contents_of(data)}"
    )


def _part(data: Path, name: str, part: str, file: Path) -> CocoPart:
    bare = part.rstrip("0123456789")
    folders = dict.fromkeys(data / inner / one for one in (part, bare, ".") for inner in (".", "images"))
    return CocoPart(f"{name} {part}", file, tuple(folders))


def is_coco(data: Path) -> bool:
    """Return whether `open_coco` finds two parts."""
    try:
        open_coco(data)
    except InputError:
        return False
    return True


def read_coco(part: CocoPart, *, masks: bool = True) -> ObjectSet:
    """Return the images of a part, in the order of the JSON file, with their objects.

    Boxes are clipped to their images. Objects that can't be used are left out with a note; images without objects stay.
    `coco` has the objects that are left, as the file has them, with new ids from 1 (0 would never match in the test).

    Args:
        masks: also read the masks. Where no object has one, the set has none; where some lack theirs, those are left out.

    Raises:
        InputError: the file has no instances, or does not fit the images.
    """
    content = load_instances(part.annotations)
    images = {one["id"]: one for one in content["images"]}
    classes = {one["id"]: number for number, one in enumerate(content["categories"], 1)}
    folder = _folder(part, [one["file_name"] for one in content["images"]])
    faults: Counter[str] = Counter()
    usable = []
    for one in content["annotations"]:
        fault = fault_of(one, images, classes)
        faults[fault or ""] += 1
        if not fault:
            usable.append(one)
    del faults[""]
    if masks:
        for one in usable:
            one["segmentation"] = usable_mask(one, images[one["image_id"]])
        having = [one for one in usable if one["segmentation"] is not None]
        masks = bool(having)
        if having and len(having) < len(usable):
            faults["without a mask that can be used"] += len(usable) - len(having)
            usable = having
    left_out = f"{part.name}: {count_of(sum(faults.values()), 'object')} left out, {_listed(faults)}"
    if not usable:
        raise InputError(f"{part.annotations}: no object can be used; {left_out}")
    coco = _index({**content, "annotations": usable}, images, masks=masks)
    return ObjectSet(
        part.name,
        FileSource(folder, PackedNames(one["file_name"] for one in content["images"]), None, f"of {part.name}"),
        (BACKGROUND, *(one["name"] for one in content["categories"])),
        _packed(coco, images, classes, masks=masks),
        has_masks=masks,
        coco=coco,
        category_ids=(NO_CATEGORY, *classes),
        notes=(left_out,) if faults else (),
    )


def _listed(faults: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {fault}" for fault, count in faults.items())


def _folder(part: CocoPart, names: Sequence[str]) -> Path:
    """Return the folder that has all images.

    A part of the images is refused: an unfinished download looks like that, and its numbers compare with no others.
    """
    listings: dict[str, set[str]] = {}

    def is_there(folder: Path, name: str) -> bool:
        inner, _, file = os.path.join(folder, name).rpartition("/")  # noqa: PTH118 (Path takes 5 µs)
        if inner not in listings:
            listings[inner] = set(os.listdir(inner)) if Path(inner).is_dir() else set()  # noqa: PTH208
        return file in listings[inner]

    missing = {folder: [name for name in names if not is_there(folder, name)] for folder in part.folders}
    best = min(missing, key=lambda folder: len(missing[folder]))
    if missing[best]:
        where = best if len(missing[best]) < len(names) else " and ".join(str(one) for one in part.folders if one.is_dir())
        raise InputError(
            f"{where} lacks {len(missing[best]):,} of the {count_of(len(names), 'image')} that {part.annotations} lists: "
            f"{some(missing[best])}; unpack the images again, or remove those from the file"
        )
    return best


def _index(content: Mapping[str, Any], images: Mapping[Any, Any], *, masks: bool) -> Any:
    """Return pycocotools' object of some annotations, with what its test needs of each."""
    module, _, tools = coco_tools()
    for number, one in enumerate(content["annotations"], 1):
        image = images[one["image_id"]]
        one.update(id=number, iscrowd=int(bool(one.get("iscrowd"))))
        if not isinstance(one.get("area"), int | float):
            area = one["bbox"][2] * one["bbox"][3]
            if masks:
                area = float(tools.area(encoded_mask(one["segmentation"], image["height"], image["width"])))
            one["area"] = area
    coco = module.COCO()
    coco.dataset = {"info": {}, **content}
    with redirect_stdout(StringIO()):
        coco.createIndex()
    return coco


def check_same_classes(train: ObjectSet, val: ObjectSet) -> None:
    """Raise `InputError` unless the two parts have the same categories."""
    if (train.class_names, train.category_ids) != (val.class_names, val.category_ids):
        differing = sorted(set(train.class_names) ^ set(val.class_names))
        which = f"only one of them has {some(differing)}" if differing else "the ids differ"
        raise InputError(f"the categories of {train.name} and {val.name} are not the same: {which}")


@dataclass(frozen=True)
class PackedObjects:
    """The objects of all images in a few pieces of memory, which worker processes share.

    Attributes:
        starts_N, ends_N: rows of the objects of each image: from the one up to the other.
        masks: COCO's segmentation of each object as JSON; None where they were not read.
        sizes_N2: height and width of each image, as the file has them.
    """

    starts_N: NDArray[np.int64]
    ends_N: NDArray[np.int64]
    boxes_A4: NDArray[np.float32]
    labels_A: NDArray[np.int64]
    crowd_A: NDArray[np.bool_]
    masks: PackedNames | None
    sizes_N2: NDArray[np.int64]

    def __call__(self, index: int, masks: bool = False) -> Objects:
        """Return the objects of an image, with their masks if asked for.

        Raises:
            InputError: masks are asked for, and there are none.
        """
        rows = slice(int(self.starts_N[index]), int(self.ends_N[index]))
        labels_M = torch.from_numpy(self.labels_A[rows].copy())
        return Objects(
            torch.from_numpy(self.boxes_A4[rows].copy()),
            labels_M,
            torch.zeros(len(labels_M), dtype=torch.bool),
            torch.from_numpy(self.crowd_A[rows].copy()),
            self._masks(index, rows) if masks else None,
        )

    def _masks(self, index: int, rows: slice) -> Tensor:
        if self.masks is None:
            raise InputError("these objects have boxes only: no masks were read")
        height, width = map(int, self.sizes_N2[index])
        found = [decoded_mask(json.loads(self.masks[row]), height, width) for row in range(rows.start, rows.stop)]
        return torch.from_numpy(np.stack(found)) if found else torch.zeros(0, height, width, dtype=torch.uint8)


def image_sizes(data: ObjectSet) -> NDArray[np.int64]:
    """Return height and width (N, 2) of the images of a set from `read_coco`, as they were annotated."""
    return cast(PackedObjects, data.read_objects).sizes_N2


def with_objects(data: ObjectSet) -> ObjectSet:
    """Return the images of a set from `read_coco` that have objects, with a note on the others.

    Crowds do not count. It has no `coco`, which needs much memory.
    """
    packed = cast(PackedObjects, data.read_objects)
    before_A = np.concatenate([[0], (~packed.crowd_A).cumsum()])
    chosen_M = np.flatnonzero(before_A[packed.ends_N] > before_A[packed.starts_N])
    starts_M, ends_M, sizes_M2 = (one[chosen_M] for one in (packed.starts_N, packed.ends_N, packed.sizes_N2))
    objects = replace(packed, starts_N=starts_M, ends_N=ends_M, sizes_N2=sizes_M2)
    without = len(data) - len(chosen_M)
    notes = [f"{data.name}: {count_of(without, 'image')} without objects left out"] if without else []
    source = ChosenImages(data.source, chosen_M, about="with objects")
    return replace(data, source=source, read_objects=objects, coco=None, notes=(*data.notes, *notes))


def crowds(data: ObjectSet) -> int:
    """Return how many crowds a set from `read_coco` has."""
    return int(cast(PackedObjects, data.read_objects).crowd_A.sum())


def _packed(coco: Any, images: Mapping[Any, Any], classes: Mapping[Any, int], *, masks: bool) -> PackedObjects:
    by_image = [coco.imgToAnns.get(image, []) for image in images]
    every = [one for objects in by_image for one in objects]
    counts_N = np.fromiter(map(len, by_image), np.int64, len(by_image))
    ends_N = counts_N.cumsum()
    return PackedObjects(
        ends_N - counts_N,
        ends_N,
        np.array([clipped(one["bbox"], images[one["image_id"]]) for one in every], np.float32),
        np.array([classes[one["category_id"]] for one in every], np.int64),
        np.array([bool(one["iscrowd"]) for one in every], np.bool_),
        PackedNames(json.dumps(one["segmentation"]) for one in every) if masks else None,
        np.array([(one["height"], one["width"]) for one in images.values()], np.int64),
    )
