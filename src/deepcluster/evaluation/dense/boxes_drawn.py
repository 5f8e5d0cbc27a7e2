"""Boxes and masks of objects, drawn on a picture with their names.

M objects, h and w pixels of the picture.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from deepcluster.core.errors import InputError
from deepcluster.evaluation.datasets.dense import Detections, Objects
from deepcluster.evaluation.dense.palette import Colour, font_of, ink_on, shortened

LEAST_SCORE, SHOWN = 0.3, 20
LETTERS = 12
OPACITY = 0.45

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class _Drawn:
    """An object as it is drawn; `score` is None in the truth, `mask` anything that `_mask_of` reads."""

    box: Box
    label: int
    score: float | None
    mask: Any
    is_dashed: bool
    word: str = ""


def _chosen(objects: Detections | Objects, least_score: float, most: int) -> tuple[list[_Drawn], int]:
    """Return the objects to draw, the most important first, and how many there are."""
    if isinstance(objects, Detections):
        masks: Any = [None] * len(objects.labels_D) if objects.masks is None else objects.masks
        rows = zip(objects.boxes_D4.tolist(), objects.labels_D.tolist(), objects.scores_D.tolist(), masks, strict=True)
        found = [_Drawn(tuple(box), label, score, mask, False) for box, label, score, mask in rows if score >= least_score]
        found.sort(key=lambda one: -(one.score or 0.0))
    else:
        difficult, crowd = objects.difficult_M.tolist(), objects.crowd_M.tolist()
        masks = [None] * len(difficult) if objects.masks_MHW is None else objects.masks_MHW.cpu().numpy()
        truth = zip(objects.boxes_M4.tolist(), objects.labels_M.tolist(), masks, difficult, crowd, strict=True)
        found = [
            _Drawn(tuple(box), label, None, mask, is_hard or is_crowd, " crowd" * is_crowd + " difficult" * is_hard)
            for box, label, mask, is_hard, is_crowd in truth
        ]
        found.sort(key=lambda one: -(one.box[2] - one.box[0]) * (one.box[3] - one.box[1]))
    return found[:most], len(found)


def labels_in(objects: Detections | Objects, least_score: float, most: int) -> list[int]:
    """Return the class numbers of the objects that `draw_boxes` draws."""
    return [one.label for one in _chosen(objects, least_score, most)[0]]


def draw_boxes(
    photo: Image.Image,
    objects: Detections | Objects,
    size: tuple[int, ...],
    class_names: Sequence[str],
    colours: Mapping[int, Colour],
    least_score: float,
    most: int,
) -> Image.Image:
    """Return a picture with boxes, masks and names.

    Args:
        photo: the image at the size of the picture.
        size: H and W of the image itself, in whose pixels the boxes are.
        colours: by class number.
        least_score, most: as in `with_boxes`.
    """
    chosen, count = _chosen(objects, least_score, most)
    pixels_hw3 = np.asarray(photo, np.float32).copy()
    for one in reversed(chosen):
        if one.mask is not None:
            _tint(pixels_hw3, _mask_of(one.mask, photo.size), colours[one.label])
    picture = Image.fromarray(pixels_hw3.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    scale_x, scale_y = photo.width / size[1], photo.height / size[0]
    boxes = [(one.box[0] * scale_x, one.box[1] * scale_y, one.box[2] * scale_x, one.box[3] * scale_y) for one in chosen]
    for one, box in reversed([*zip(chosen, boxes, strict=True)]):
        _frame(draw, box, colours[one.label], is_dashed=one.is_dashed)
    taken: list[Box] = []
    for one, box in zip(chosen, boxes, strict=True):
        name = class_names[one.label] + one.word
        texts = [name] if one.score is None else [f"{name} {one.score:.2f}", f"{one.score:.2f}"]
        _write(draw, box, texts, colours[one.label], photo.size, taken)
    remark = _remark(objects, len(chosen), count, least_score)
    if remark:
        font = font_of(LETTERS)
        draw.rectangle((0, photo.height - 19, font.getlength(remark) + 12, photo.height), fill=(255, 255, 255))
        draw.text((6, photo.height - 9), remark, fill=(40, 40, 40), font=font, anchor="lm")
    return picture


def _remark(objects: Detections | Objects, drawn: int, count: int, least_score: float) -> str:
    if isinstance(objects, Detections):
        if not count:
            return f"nothing above {least_score:g}"
        return f"best {drawn} of {count} above {least_score:g}" if drawn < count else ""
    return f"largest {drawn} of {count}" if drawn < count else "" if count else "no objects"


def _mask_of(mask: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return a mask (h, w) at the size of the picture, from an array or COCO's run-length encoding."""
    if isinstance(mask, Mapping):
        try:
            from pycocotools import mask as coco
        except ImportError:
            raise InputError('masks are drawn by pycocotools: pip install "deepcluster[dense]"') from None
        encoding: Any = dict(mask)
        if isinstance(encoding["counts"], list):
            encoding = coco.frPyObjects(encoding, *encoding["size"])
        mask = coco.decode(encoding)
    large = Image.fromarray((np.asarray(mask) > 0).astype(np.uint8) * 255)
    return np.asarray(large.resize(size, Image.Resampling.BILINEAR)) >= 128


def _tint(pixels_hw3: NDArray[np.float32], mask_hw: NDArray[np.bool_], colour: Colour) -> None:
    """Mix a colour into the pixels of a mask, and draw its border in the colour itself."""
    pixels_hw3[mask_hw] = (1 - OPACITY) * pixels_hw3[mask_hw] + OPACITY * np.array(colour, np.float32)
    padded = np.pad(mask_hw, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    pixels_hw3[mask_hw & ~inner] = colour


def _frame(draw: ImageDraw.ImageDraw, box: Box, colour: Colour, *, is_dashed: bool) -> None:
    """Draw a frame of two pixels with a dark line on either side, which shows on any photo."""
    left, top, right, bottom = (round(one) for one in box)
    right, bottom = max(right - 1, left), max(bottom - 1, top)
    for inset, ink in ((-1, (0, 0, 0)), (2, (0, 0, 0)), (0, colour), (1, colour)):
        corners = (left + inset, top + inset, right - inset, bottom - inset)
        if corners[2] < corners[0] or corners[3] < corners[1]:
            continue
        if not is_dashed:
            draw.rectangle(corners, outline=ink)
            continue
        for x in range(corners[0], corners[2] + 1, 10):
            for y in (corners[1], corners[3]):
                draw.line((x, y, min(x + 5, corners[2]), y), fill=ink)
        for y in range(corners[1], corners[3] + 1, 10):
            for x in (corners[0], corners[2]):
                draw.line((x, y, x, min(y + 5, corners[3])), fill=ink)


def _write(
    draw: ImageDraw.ImageDraw, box: Box, texts: Sequence[str], colour: Colour, size: tuple[int, int], taken: list[Box]
) -> None:
    """Write the first text for which there is room at a corner of the box; the last one in any case.

    Args:
        size: of the picture.
        taken: places of the texts written so far, to which this one is added.
    """
    font, height = font_of(LETTERS), LETTERS + 5
    for text in texts:
        text = shortened(text, font, size[0] - 10)
        width = font.getlength(text) + 8
        lefts = [min(max(x, 0.0), max(size[0] - width, 0.0)) for x in (box[0] - 1, box[2] + 1 - width)]
        tops = [box[1] - height, box[1] + 2, box[3] - height - 2, box[3]]
        tops = [min(max(y, 0.0), max(size[1] - height, 0.0)) for y in tops]
        places = [(left, top, left + width, top + height) for top in tops for left in lefts]
        free = [place for place in places if not any(_overlap(place, other) for other in taken)]
        if free:
            break
    else:
        free = [min(places, key=lambda place: sum(_overlap(place, other) for other in taken))]
    place = free[0]
    taken.append(place)
    draw.rectangle(tuple(round(one) for one in place), fill=colour)
    draw.text((place[0] + 4, place[1] + height / 2), text, fill=ink_on(colour), font=font, anchor="lm")


def _overlap(one: Box, other: Box) -> float:
    """Return the area that two boxes share."""
    width, height = min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)
