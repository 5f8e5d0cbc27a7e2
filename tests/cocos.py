"""COCO folders for tests: red discs and blue squares on noisy grey, their masks in each of COCO's three encodings."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

# Ids have gaps, as COCO's have, and are not in order; nothing shows a "never".
CATEGORIES = {90: "never", 7: "square", 3: "disc"}
COLOURS = {"disc": (210, 40, 40), "square": (40, 60, 210)}


def write_coco(
    root: Path,
    *,
    train: int = 4,
    val: int = 3,
    side: int = 64,
    objects: int = 2,
    seed: int = 0,
    masks: bool = True,
) -> Path:
    """A folder with train2017 and val2017; the last image of each part is empty, the first one has a crowd.

    Every other image has one object more than `objects`.
    """
    rng = np.random.default_rng(seed)
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for part, count in {"train2017": train, "val2017": val}.items():
        (root / part).mkdir(exist_ok=True)
        images, annotations = [], list[dict[str, Any]]()
        for number in range(count):
            height, width = side, side + 8 * (number % 3)
            name, image_id = f"{number:012}.png", 100 + 10 * number
            images.append({"id": image_id, "file_name": name, "height": height, "width": width})
            pixels, found = draw(rng, height, width, 0 if number == count - 1 else objects + number % 2, crowd=number == 0)
            Image.fromarray(pixels).save(root / part / name)
            for category, mask_HW, is_crowd in found:
                one = annotation(category, mask_HW, len(annotations), is_crowd=is_crowd)
                one.update(id=len(annotations), image_id=image_id)
                annotations.append(one if masks else {**one, "segmentation": []})
        categories = [{"id": number, "name": name, "supercategory": "shape"} for number, name in CATEGORIES.items()]
        write_json(root, part, {"images": images, "annotations": annotations, "categories": categories})
    return root


def file_of(root: Path, part: str) -> Path:
    """The JSON file of a part."""
    return root / "annotations" / f"instances_{part}.json"


def write_json(root: Path, part: str, content: object) -> None:
    """Write the JSON file of a part."""
    file_of(root, part).write_text(json.dumps(content))


def draw(
    rng: np.random.Generator, height: int, width: int, count: int, *, crowd: bool
) -> tuple[np.ndarray, list[tuple[int, np.ndarray, bool]]]:
    """Pixels, and category, mask and whether it is a crowd of each object; objects do not overlap."""
    image = Image.new("RGB", (width, height), (120, 120, 120))
    found = []
    wide = min(width // max(count + crowd, 1), height)
    for place in range(count + crowd):
        size = int(rng.integers(wide // 2, wide - 2))
        left, top = place * wide + int(rng.integers(0, wide - size)), int(rng.integers(0, height - size))
        box = [left, top, left + size - 1, top + size - 1]
        category = 3 if (place + count) % 2 else 7
        mask = Image.new("L", (width, height))
        for one, value in ((mask, 1), (image, COLOURS[CATEGORIES[category]])):
            pen = ImageDraw.Draw(one)
            (pen.ellipse if category == 3 else pen.rectangle)(box, fill=value)
        found.append((category, np.asarray(mask), crowd and place == count))
    pixels = np.clip(np.asarray(image) + rng.normal(0, 12, (height, width, 3)), 0, 255)
    return pixels.astype(np.uint8), found


def annotation(category: int, mask_HW: np.ndarray, kind: int, *, is_crowd: bool = False) -> dict[str, Any]:
    """An annotation of a mask: as a polygon where it is a rectangle and `kind` is even, else as runs, compressed or not."""
    from pycocotools import mask as tools

    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    left, top, right, bottom = (int(n) for n in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    packed = tools.encode(np.asfortranarray(mask_HW))
    if mask_HW[top:bottom, left:right].all() and not is_crowd:
        segmentation: Any = [[left, top, right, top, right, bottom, left, bottom]]
    elif kind % 2:
        segmentation = {"size": list(mask_HW.shape), "counts": packed["counts"].decode()}
    else:
        flat = np.concatenate([[0], mask_HW.T.ravel()])
        changes = np.flatnonzero(np.diff(flat))
        counts = np.diff(np.concatenate([[0], changes, [mask_HW.size]])).tolist()
        segmentation = {"size": list(mask_HW.shape), "counts": counts}
    box, area = [left, top, right - left, bottom - top], int(mask_HW.sum())
    return {"category_id": category, "bbox": box, "area": area, "iscrowd": int(is_crowd), "segmentation": segmentation}
