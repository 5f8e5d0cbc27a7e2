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
from deepcluster.evaluation.dense.pictures.palette import PAPER, Colour, font_of, ink_on, shortened

LEAST_SCORE, MOST = 0.3, 20
LETTERS, DASH = 11, 5
OPACITY = 0.45
# Longest name beside a box, as a share of the picture; the legend has it whole.
LONGEST = 0.3

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Drawn:
    """An object as it is drawn.

    Attributes:
        score: None in the truth.
        mask: (H, W), not 0 in the object, or COCO's run-length encoding; None if there is none.
        is_dashed: the object is difficult, or a crowd.
    """

    box: Box
    label: int
    score: float | None
    mask: Any
    is_dashed: bool


@dataclass(frozen=True)
class Shown:
    """The objects of a picture, the most important first, and a remark on those that are not shown."""

    objects: list[Drawn]
    remark: str


def shown(objects: Detections | Objects, least_score: float, most: int) -> Shown:
    """Return the objects that are drawn: the best of some detections, or the largest of the truth."""
    if isinstance(objects, Detections):
        masks: Any = [None] * len(objects.labels_D) if objects.masks is None else objects.masks
        rows = zip(objects.boxes_D4.tolist(), objects.labels_D.tolist(), objects.scores_D.tolist(), masks, strict=True)
        found = [Drawn(tuple(box), label, score, mask, False) for box, label, score, mask in rows if score >= least_score]
        found.sort(key=lambda one: -(one.score or 0.0))
        remark = f"best {most} of {len(found)} above {least_score:g}" if found else f"nothing above {least_score:g}"
    else:
        dashed = (objects.difficult_M | objects.crowd_M).tolist()
        masks = [None] * len(dashed) if objects.masks_MHW is None else objects.masks_MHW.cpu().numpy()
        truth = zip(objects.boxes_M4.tolist(), objects.labels_M.tolist(), masks, dashed, strict=True)
        found = [Drawn(tuple(box), label, None, mask, is_dashed) for box, label, mask, is_dashed in truth]
        found.sort(key=lambda one: -(one.box[2] - one.box[0]) * (one.box[3] - one.box[1]))
        remark = f"largest {most} of {len(found)}" if found else "no objects"
    return Shown(found[:most], "" if 0 < len(found) <= most else remark)


def draw_boxes(
    photo: Image.Image, what: Shown, size: tuple[int, ...], class_names: Sequence[str], colours: Mapping[int, Colour]
) -> Image.Image:
    """Return a picture with boxes, masks and names.

    Args:
        photo: the image at the size of the picture.
        size: H and W of the image itself, in whose pixels the boxes are.
        colours: by class number.
    """
    pixels_hw3 = np.array(photo, np.float32)
    for one in reversed(what.objects):
        if one.mask is not None:
            opacity = OPACITY / 2 if one.is_dashed else OPACITY
            _tint(pixels_hw3, _mask_of(one.mask, photo.size), colours[one.label], opacity)
    picture = Image.fromarray(pixels_hw3.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    x, y = photo.width / size[1], photo.height / size[0]
    boxes = [(one.box[0] * x, one.box[1] * y, one.box[2] * x, one.box[3] * y) for one in what.objects]
    for one, box in reversed([*zip(what.objects, boxes, strict=True)]):
        draw_frame(draw, box, colours[one.label], is_dashed=one.is_dashed)
    taken: list[Box] = []
    for one, box in zip(what.objects, boxes, strict=True):
        score = "" if one.score is None else f"{one.score:.2f}"
        name = shortened(class_names[one.label], font_of(LETTERS), LONGEST * photo.width)
        texts = [f"{name} {score}".strip(), *([score] if score else [])]
        _write(draw, box, texts, colours[one.label], photo.size, taken)
    if what.remark:
        corner = (0.0, float(photo.height), 0.0, float(photo.height))
        _write(draw, corner, [what.remark], PAPER, photo.size, [])
    return picture


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


def _tint(pixels_hw3: NDArray[np.float32], mask_hw: NDArray[np.bool_], colour: Colour, opacity: float) -> None:
    """Mix a colour into the pixels of a mask, and draw its border in the colour itself."""
    pixels_hw3[mask_hw] = (1 - opacity) * pixels_hw3[mask_hw] + opacity * np.array(colour, np.float32)
    padded = np.pad(mask_hw, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    pixels_hw3[mask_hw & ~inner] = colour


def draw_frame(draw: ImageDraw.ImageDraw, box: Box, colour: Colour, *, is_dashed: bool) -> None:
    """Draw a frame of two pixels with a dark line around it, which shows on any photo."""
    left, top, right, bottom = (round(one) for one in box)
    right, bottom = max(right - 1, left), max(bottom - 1, top)
    for inset, ink in ((-1, (0, 0, 0)), (0, colour), (1, colour)):
        x0, y0, x1, y1 = left + inset, top + inset, right - inset, bottom - inset
        if x1 < x0 or y1 < y0:
            continue
        if not is_dashed:
            draw.rectangle((x0, y0, x1, y1), outline=ink)
            continue
        for x in range(x0, x1 + 1, 2 * DASH):
            draw.line((x, y0, min(x + DASH, x1), y0), fill=ink)
            draw.line((x, y1, min(x + DASH, x1), y1), fill=ink)
        for y in range(y0, y1 + 1, 2 * DASH):
            draw.line((x0, y, x0, min(y + DASH, y1)), fill=ink)
            draw.line((x1, y, x1, min(y + DASH, y1)), fill=ink)


def _write(
    draw: ImageDraw.ImageDraw, box: Box, texts: Sequence[str], colour: Colour, size: tuple[int, int], taken: list[Box]
) -> None:
    """Write the first text for which there is room at a corner of the box; nothing where all would hide another text.

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
        place = next((place for place in places if not any(_overlap(place, other) for other in taken)), None)
        if place is not None:
            taken.append(place)
            left, top, right, bottom = map(round, place)
            draw.rectangle((left, top, right - 1, bottom - 1), fill=colour)
            draw.text((place[0] + 4, place[1] + height / 2), text, fill=ink_on(colour), font=font, anchor="lm")
            return


def _overlap(one: Box, other: Box) -> bool:
    """Return whether two boxes share an area."""
    return max(one[0], other[0]) < min(one[2], other[2]) and max(one[1], other[1]) < min(one[3], other[3])
