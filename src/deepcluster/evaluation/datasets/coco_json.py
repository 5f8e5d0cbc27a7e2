"""The content of COCO's JSON files of instances: what it must have, and which objects can be used."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.errors import InputError
from deepcluster.core.files import read_regular
from deepcluster.core.kinds import BEGIN_BYTES, kind_of
from deepcluster.core.text import count_of
from deepcluster.evaluation.datasets.labelled import some

# Boxes with a shorter side in pixels are taken for mistakes.
LEAST_SIDE = 0.01
_LISTS = ("images", "annotations", "categories")
_OTHERS = {"segments_info": "panoptic segmentations", "caption": "captions"}
_WANTED = "instances_train2017.json and instances_val2017.json have the boxes and masks of objects"

Json = Mapping[str, Any]


def coco_tools() -> tuple[Any, Any, Any]:
    """Return pycocotools' modules coco, cocoeval and mask. They print: catch it with `redirect_stdout`.

    Raises:
        InputError: pycocotools is not installed.
    """
    try:
        from pycocotools import coco, cocoeval, mask
    except ImportError:
        raise InputError('COCO annotations need pycocotools: pip install "deepcluster[dense]"') from None
    return coco, cocoeval, mask


def load_instances(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the lists images, annotations and categories of a file, categories by id.

    Raises:
        InputError: it is no JSON file, or not of instances; images or categories can't be told apart.
    """
    try:
        text = read_regular(file)
    except OSError as error:
        raise InputError(f"{file} can't be read: {(error.strerror or str(error)).lower()}") from error
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        kind = f"it is {kind_of(text[:BEGIN_BYTES])}" if text[:1] not in (b"{", b"[") else f"{error}"
        raise InputError(f"{file} does not parse as JSON: {kind}; unpack the annotations again") from error
    lists = {name: content.get(name) if isinstance(content, dict) else None for name in _LISTS}
    missing = [name for name, one in lists.items() if not _are_objects(one)]
    first = (lists["annotations"] or [{}])[0] if "annotations" not in missing else {}
    other = next((words for key, words in _OTHERS.items() if key in first), None)
    if other or missing:
        what = f"it has {other}" if other else f"it has no list of {' and no list of '.join(missing)}"
        raise InputError(f"{file} has no instances of COCO: {what}; {_WANTED}")
    empty = [name for name, one in lists.items() if not one]
    if empty:
        raise InputError(f"{file}: the list of {empty[0]} is empty; {_WANTED}")
    _check_images(file, lists["images"])  # type: ignore[arg-type]
    return {**lists, "categories": _checked_categories(file, lists["categories"])}  # type: ignore[arg-type,dict-item]


def _are_objects(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def _check_images(file: Path, images: list[dict[str, Any]]) -> None:
    for number, one in enumerate(images):
        sides = (one.get("height"), one.get("width"))
        named = isinstance(one.get("file_name"), str) and isinstance(one.get("id"), int | str)
        if not named or not all(isinstance(side, int) and side > 0 for side in sides):
            raise InputError(f"{file}: image {number + 1} of the list needs id, file_name, height and width: {_short(one)}")
    for key in ("id", "file_name"):
        twice = _repeated(one[key] for one in images)
        if twice:
            raise InputError(f"{file}: {count_of(len(twice), 'image')} of the list have the {key} of another: {some(twice)}")


def _checked_categories(file: Path, categories: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for number, one in enumerate(categories):
        if not isinstance(one.get("id"), int) or not isinstance(one.get("name"), str):
            raise InputError(f"{file}: category {number + 1} of the list needs a number id and a name: {_short(one)}")
    for key in ("id", "name"):
        twice = _repeated(one[key] for one in categories)
        if twice:
            raise InputError(f"{file}: the {key} {twice[0]} is of two categories; give each its own")
    return sorted(categories, key=lambda one: int(one["id"]))


def _repeated(values: Any) -> list[str]:
    seen: set[Any] = set()
    return [str(value) for value in values if value in seen or seen.add(value)]  # type: ignore[func-returns-value]


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "…"


def fault_of(one: Json, images: Mapping[Any, Json], categories: Collection[Any]) -> str | None:
    """Return why an annotation can't be used, to follow "3"; None if it can."""
    image = images.get(_key(one.get("image_id")))
    if image is None:
        return "of images that are not listed"
    if _key(one.get("category_id")) not in categories:
        return "of categories that are not listed"
    box = one.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_finite(side) for side in box):
        return "without a box of four numbers"
    left, top, right, bottom = clipped(box, image)
    return "with an empty box, or one outside of the image" if min(right - left, bottom - top) < LEAST_SIDE else None


def _key(value: object) -> object:
    """Return an id, or what is equal to none."""
    return value if isinstance(value, int | str) else object()


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e9


def clipped(box: list[float], image: Json) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of a box (x, y, width, height) in continuous pixels, inside of its image."""
    x, y, width, height = box
    (right, bottom), (wide, high) = (x + width, y + height), (image["width"], image["height"])
    return min(max(x, 0), wide), min(max(y, 0), high), min(max(right, 0), wide), min(max(bottom, 0), high)


def usable_mask(one: Json, image: Json) -> Any:
    """Return the segmentation of an annotation without polygons of less than three points; None if none can be used."""
    segmentation, size = one.get("segmentation"), [image["height"], image["width"]]
    if isinstance(segmentation, list):
        # Far outside, a polygon would cost memory by its length in pixels.
        low, high = -max(size), 2 * max(size)
        return [
            polygon
            for polygon in segmentation
            if isinstance(polygon, list)
            and len(polygon) >= 6
            and len(polygon) % 2 == 0
            and all(isinstance(value, int | float) and low <= value <= high for value in polygon)
        ] or None
    if not isinstance(segmentation, dict) or segmentation.get("size") != size:
        return None
    counts = segmentation.get("counts")
    runs = _runs(counts) if isinstance(counts, str) else counts
    fits = (
        isinstance(runs, list) and all(isinstance(run, int) and run >= 0 for run in runs) and sum(runs) == size[0] * size[1]
    )
    return segmentation if fits else None


def _runs(counts: str) -> list[int]:
    """Return the lengths of the runs of a compressed encoding; pycocotools would not notice that runs are missing.

    Five bits per character, the lowest first, and one that says that more follow; from the fourth run on, the difference
    from the run before the last.
    """
    runs: list[int] = []
    value = shift = 0
    for code in counts.encode("ascii", "replace"):
        bits = code - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs


def decoded_mask(segmentation: Any, height: int, width: int) -> NDArray[np.uint8]:
    """Return the mask (H, W) of what `usable_mask` returned."""
    _, _, tools = coco_tools()
    mask_HW: NDArray[np.uint8] = np.ascontiguousarray(tools.decode(encoded_mask(segmentation, height, width)))
    return mask_HW


def encoded_mask(segmentation: Any, height: int, width: int) -> Any:
    """Return COCO's compressed run-length encoding of what `usable_mask` returned."""
    _, _, tools = coco_tools()
    if isinstance(segmentation, list):
        return tools.merge(tools.frPyObjects(segmentation, height, width))
    return tools.frPyObjects(segmentation, height, width) if isinstance(segmentation["counts"], list) else segmentation
