"""Pictures of predictions: masks and boxes on their image, and image, truth and prediction side by side.

H and W pixels of an image, h and w of its picture.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import ceil

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from deepcluster.evaluation.datasets.dense import IGNORED, Detections, Objects
from deepcluster.evaluation.dense.pictures.boxes import LEAST_SCORE, MOST, Shown, draw_boxes, draw_frame, shown
from deepcluster.evaluation.dense.pictures.palette import FAINT, INK, PAPER, Colour, colours_of, font_of, shortened

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
    most: int = MOST,
    side: int = SIDE,
) -> Image.Image:
    """Return an image with the boxes (and masks) of its objects, each with its class, and its score where it has one.

    Args:
        objects: what was found, or the truth; a difficult or crowd object has a dashed frame.
        least_score: detections below it are not drawn.
        most: number of boxes drawn: those of highest score, or the largest ones of the truth.
        side: longer side of the picture in pixels; the image is enlarged or reduced to it.
    """
    what = shown(objects, least_score, most)
    colours = colours_of((one.label for one in what.objects), class_names)
    return draw_boxes(_photo(image_HWC, side), what, image_HWC.shape[:2], class_names, colours)


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
    most: int = MOST,
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
    drawn: dict[str, Pixels | Shown] = {
        caption: panel if isinstance(panel, np.ndarray) else shown(panel, least_score, most)
        for caption, panel in panels.items()
    }
    colours = colours_of({number for one in drawn.values() for number in _classes(one)}, class_names)
    pictures = [(title or "image", photo)]
    names: list[tuple[str, Colour | str]] = [(class_names[number], colour) for number, colour in colours.items()]
    for caption, one in drawn.items():
        if isinstance(one, np.ndarray):
            pictures.append((caption, _coloured(photo, one, colours)))
        else:
            pictures.append((caption, draw_boxes(photo, one, image_HWC.shape[:2], class_names, colours)))
    if any(isinstance(one, np.ndarray) and bool((one == IGNORED).any()) for one in drawn.values()):
        names.append(("not counted", "striped"))
    if any(isinstance(one, Shown) and any(box.is_dashed for box in one.objects) for one in drawn.values()):
        names.append(("difficult or crowd: not counted", "dashed"))
    return _sheet(pictures, names, across)


def _photo(image_HWC: Pixels, side: int) -> Image.Image:
    height, width = image_HWC.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return Image.fromarray(np.ascontiguousarray(image_HWC)).resize(size, Image.Resampling.LANCZOS)


def _classes(one: Pixels | Shown) -> Iterable[int]:
    return np.unique(one).tolist() if isinstance(one, np.ndarray) else [box.label for box in one.objects]


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
    """Return the pixels below or right of a border of two classes, neither of which is `IGNORED`."""
    lines = np.zeros(mask_hw.shape, bool)
    for before, after, line in (
        (mask_hw[:-1], mask_hw[1:], lines[1:]),
        (mask_hw[:, :-1], mask_hw[:, 1:], lines[:, 1:]),
    ):
        line |= (before != after) & (before != IGNORED) & (after != IGNORED)
    return lines


def _sheet(
    pictures: Sequence[tuple[str, Image.Image]], names: Sequence[tuple[str, Colour | str]], across: int
) -> Image.Image:
    """Return pictures of one size in rows, each under its caption, and a legend below."""
    width, height = pictures[0][1].size
    across = min(across, len(pictures))
    rows = ceil(len(pictures) / across)
    total = across * width + (across + 1) * GAP
    top = rows * (CAPTION + height) + GAP
    legend = _legend(names, total - 2 * GAP) if names else Image.new("RGB", (1, 0))
    sheet = Image.new("RGB", (total, top + legend.height + GAP * bool(names)), PAPER)
    draw, font = ImageDraw.Draw(sheet), font_of(LETTERS)
    for number, (caption, picture) in enumerate(pictures):
        row, column = divmod(number, across)
        x, y = GAP + column * (width + GAP), row * (CAPTION + height)
        draw.text((x, y + CAPTION / 2 + 1), shortened(caption, font, width), fill=INK, font=font, anchor="lm")
        sheet.paste(picture, (x, y + CAPTION))
    sheet.paste(legend, (GAP, top))
    return sheet


def _legend(names: Sequence[tuple[str, Colour | str]], width: int) -> Image.Image:
    """Return names, each beside its colour (or what is "striped" or "dashed"), in lines of a width."""
    font, square, line = font_of(LETTERS), LETTERS, LETTERS + 8
    places, x, y = [], 0.0, 0
    for name, look in names:
        text = shortened(name, font, width - square - 6)
        needed = square + 6 + font.getlength(text)
        if x and x + needed > width:
            x, y = 0.0, y + line
        places.append((round(x), y, text, look))
        x += needed + 16
    legend = Image.new("RGB", (width, y + line), PAPER)
    draw = ImageDraw.Draw(legend)
    for left, upper, text, look in places:
        box = (left, upper + 4, left + square - 1, upper + 3 + square)
        if look == "striped":
            legend.paste(Image.fromarray(_stripes((square, square)).astype(np.uint8)), box[:2])
            draw.rectangle(box, outline=FAINT)
        elif look == "dashed":
            draw_frame(draw, (left, upper + 4, left + square, upper + 4 + square), FAINT, is_dashed=True)
        else:
            draw.rectangle(box, fill=look)
        draw.text((left + square + 6, upper + line / 2), text, fill=INK, font=font, anchor="lm")
    return legend
