"""Pictures of predictions: masks and boxes on their image, and image, truth and prediction side by side.

H and W pixels of an image, h and w of its picture.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from deepcluster.evaluation.datasets.dense import IGNORED, Detections, Objects
from deepcluster.evaluation.dense.boxes_drawn import LEAST_SCORE, SHOWN, draw_boxes, labels_in
from deepcluster.evaluation.dense.palette import FAINT, INK, PAPER, Colour, colours_of, font_of, shortened

Pixels = NDArray[np.uint8]
# Longer side of a picture; three of them fill a common screen.
SIDE = 480
ACROSS = 3
GAP, CAPTION, LETTERS = 10, 22, 13


def with_boxes(
    image_HWC: Pixels,
    objects: Detections | Objects,
    class_names: Sequence[str],
    *,
    least_score: float = LEAST_SCORE,
    most: int = SHOWN,
    side: int = SIDE,
) -> Image.Image:
    """Return an image with the boxes (and masks) of its objects, each with its class, and its score where it has one.

    Args:
        objects: what was found, or the truth; a difficult or crowd object has a dashed frame.
        least_score: detections below it are not drawn.
        most: number of boxes drawn: those of highest score, or the largest ones of the truth.
        side: longer side of the picture in pixels; the image is enlarged or reduced to it.
    """
    photo = _photo(image_HWC, side)
    colours = colours_of(labels_in(objects, least_score, most), class_names)
    return draw_boxes(photo, objects, image_HWC.shape[:2], class_names, colours, least_score, most)


def with_mask(image_HWC: Pixels, mask_HW: Pixels, class_names: Sequence[str], *, side: int = SIDE) -> Image.Image:
    """Return an image under the colours of its classes: background pale, ignored pixels striped.

    Args:
        mask_HW: class numbers and `IGNORED`; of the image's size, or smaller or larger in the same ratio.
        side: longer side of the picture in pixels; the image is enlarged or reduced to it.
    """
    return _coloured(_photo(image_HWC, side), mask_HW, colours_of(np.unique(mask_HW).tolist(), class_names))


def compared(
    image_HWC: Pixels,
    panels: Mapping[str, Pixels | Detections | Objects],
    class_names: Sequence[str],
    *,
    title: str = "",
    least_score: float = LEAST_SCORE,
    most: int = SHOWN,
    side: int = SIDE,
    across: int = ACROSS,
) -> Image.Image:
    """Return an image, its truth and its predictions side by side, with captions above and the names of the colours below.

    Args:
        panels: masks (H, W), objects or detections by caption, such as "truth" and "prediction, mIoU 62.1 %".
        title: caption of the image itself, such as its name.
        least_score, most: as in `with_boxes`.
        side: longer side of each picture in pixels.
        across: most pictures in a row.
    """
    photo = _photo(image_HWC, side)
    colours = colours_of({one for panel in panels.values() for one in _classes(panel, least_score, most)}, class_names)
    pictures = [(title or "image", photo)]
    for caption, panel in panels.items():
        if isinstance(panel, np.ndarray):
            picture = _coloured(photo, panel, colours)
        else:
            picture = draw_boxes(photo, panel, image_HWC.shape[:2], class_names, colours, least_score, most)
        pictures.append((caption, picture))
    names = [(class_names[number], colour) for number, colour in colours.items()]
    is_striped = any(isinstance(panel, np.ndarray) and bool((panel == IGNORED).any()) for panel in panels.values())
    return _sheet(pictures, names, across, is_striped=is_striped)


def _photo(image_HWC: Pixels, side: int) -> Image.Image:
    height, width = image_HWC.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return Image.fromarray(np.ascontiguousarray(image_HWC)).resize(size, Image.Resampling.LANCZOS)


def _classes(panel: Pixels | Detections | Objects, least_score: float, most: int) -> Iterable[int]:
    return np.unique(panel).tolist() if isinstance(panel, np.ndarray) else labels_in(panel, least_score, most)


def _coloured(photo: Image.Image, mask_HW: Pixels, colours: Mapping[int, Colour]) -> Image.Image:
    """Return a picture under the colours of a mask, with white lines between classes."""
    mask_hw = np.asarray(Image.fromarray(mask_HW.astype(np.uint8)).resize(photo.size, Image.Resampling.NEAREST))
    colour_hw3 = np.asarray(photo, np.float32)
    grey_hw3 = np.asarray(photo.convert("L"), np.float32)[..., None].repeat(3, axis=2)
    result = 0.5 * (0.3 * colour_hw3 + 0.7 * grey_hw3) + 0.5 * 235
    for number, colour in colours.items():
        inside = mask_hw == number
        result[inside] = 0.35 * (60 + 0.7 * grey_hw3[inside]) + 0.65 * np.array(colour, np.float32)
    ignored = mask_hw == IGNORED
    result[ignored] = 0.35 * grey_hw3[ignored] + 0.65 * _stripes(mask_hw.shape)[ignored]
    result[_borders(mask_hw)] = 255
    return Image.fromarray(result.clip(0, 255).astype(np.uint8))


def _stripes(shape: tuple[int, ...]) -> NDArray[np.float32]:
    rows, columns = np.indices(shape)
    light: NDArray[np.float32] = np.where((rows + columns) // 4 % 2, 250.0, 165.0).astype(np.float32)
    return light[..., None].repeat(3, axis=2)


def _borders(mask_hw: Pixels) -> NDArray[np.bool_]:
    """Return the pixels beside a border of two classes, neither of which is `IGNORED`."""
    lines = np.zeros(mask_hw.shape, bool)
    for axis in (0, 1):
        before, after = (np.take(mask_hw, range(*ends), axis) for ends in _shifted(mask_hw.shape[axis]))
        differ = (before != after) & (before != IGNORED) & (after != IGNORED)
        first, second = (lines[:-1], lines[1:]) if axis == 0 else (lines[:, :-1], lines[:, 1:])
        first |= differ
        second |= differ
    return lines


def _shifted(length: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (0, length - 1), (1, length)


def _sheet(
    pictures: Sequence[tuple[str, Image.Image]], names: Sequence[tuple[str, Colour]], across: int, *, is_striped: bool
) -> Image.Image:
    """Return pictures of one size in rows, each under its caption, and a legend below."""
    width, height = pictures[0][1].size
    across = min(across, len(pictures))
    rows = ceil(len(pictures) / across)
    total = across * width + (across + 1) * GAP
    legend = _legend(names, total - 2 * GAP, is_striped=is_striped)
    top = rows * (CAPTION + height) + GAP
    sheet = Image.new("RGB", (total, top + (legend.height + GAP if legend else 0)), PAPER)
    draw, font = ImageDraw.Draw(sheet), font_of(LETTERS)
    for number, (caption, picture) in enumerate(pictures):
        row, column = divmod(number, across)
        x, y = GAP + column * (width + GAP), row * (CAPTION + height)
        draw.text((x, y + CAPTION / 2 + 1), shortened(caption, font, width), fill=INK, font=font, anchor="lm")
        sheet.paste(picture, (x, y + CAPTION))
    if legend:
        sheet.paste(legend, (GAP, top))
    return sheet


def _legend(names: Sequence[tuple[str, Colour]], width: int, *, is_striped: bool) -> Image.Image | None:
    """Return the names of colours in lines of a width."""
    font, square, line = font_of(LETTERS), LETTERS, LETTERS + 8
    entries: list[tuple[str, Any]] = [*names, *([("not counted", None)] if is_striped else [])]
    if not entries:
        return None
    places, x, y = [], 0.0, 0
    for name, colour in entries:
        text = shortened(name, font, width - square - 6)
        needed = square + 6 + font.getlength(text)
        if x and x + needed > width:
            x, y = 0.0, y + line
        places.append((round(x), y, text, colour))
        x += needed + 16
    legend = Image.new("RGB", (width, y + line), PAPER)
    draw = ImageDraw.Draw(legend)
    for left, upper, text, colour in places:
        box = (left, upper + 4, left + square - 1, upper + 4 + square - 1)
        if colour is None:
            legend.paste(Image.fromarray(_stripes((square, square)).astype(np.uint8)), box[:2])
            draw.rectangle(box, outline=FAINT)
        else:
            draw.rectangle(box, fill=colour)
        draw.text((left + square + 6, upper + line / 2), text, fill=INK, font=font, anchor="lm")
    return legend
