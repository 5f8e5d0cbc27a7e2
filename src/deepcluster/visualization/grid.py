"""Contact sheets: many pictures of one size in one image.

H and W pixels.
"""

from collections.abc import Sequence
from math import ceil

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

PAPER, INK = (255, 255, 255), (40, 40, 40)
# Letters of 11 px are legible, and four digits are narrower than a picture of 32 px.
LETTERS = 11
LINE = LETTERS + 4
MARGIN = 4


def picture_grid(
    pictures: Sequence[NDArray[np.uint8]],
    *,
    across: int,
    gap: int = 2,
    captions: Sequence[str] | None = None,
    row_titles: Sequence[str] | None = None,
) -> Image.Image:
    """Return pictures in rows on white, each with its caption below it.

    Args:
        pictures: (H, W, 3) each, all of one size.
        across: pictures per row.
        gap: white pixels between pictures, and around all of them.
        captions: one per picture; cut off with an ellipsis where it is wider than the picture.
        row_titles: one per row, left of it.

    Raises:
        ValueError: no pictures, pictures of several sizes, or a wrong number of captions or titles.
    """
    _check(pictures, across, captions, row_titles)
    height, width = pictures[0].shape[:2]
    font = ImageFont.load_default(LETTERS)
    left = ceil(max(map(font.getlength, row_titles))) + 2 * MARGIN if row_titles else 0
    across = min(across, len(pictures))
    step_y, step_x = height + gap + (LINE if captions else 0), width + gap
    sheet = Image.new("RGB", (left + gap + across * step_x, gap + ceil(len(pictures) / across) * step_y), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, across)
        x, y = left + gap + column * step_x, gap + row * step_y
        sheet.paste(Image.fromarray(np.ascontiguousarray(picture)), (x, y))
        if captions:
            text = _shortened(captions[number], font, width)
            draw.text((x + width / 2, y + height + LINE / 2), text, fill=INK, font=font, anchor="mm")
    for row, title in enumerate(row_titles or ()):
        draw.text((left - MARGIN, gap + row * step_y + height / 2), title, fill=INK, font=font, anchor="rm")
    return sheet


def _check(
    pictures: Sequence[NDArray[np.uint8]], across: int, captions: Sequence[str] | None, row_titles: Sequence[str] | None
) -> None:
    if not pictures or across < 1:
        raise ValueError(f"a grid of {len(pictures)} pictures, {across} per row, can't be drawn")
    shapes = {picture.shape for picture in pictures}
    if len(shapes) > 1 or len(pictures[0].shape) != 3 or pictures[0].shape[2] != 3:
        raise ValueError(f"pictures of one size (H, W, 3) are expected, not {sorted(shapes)}")
    if captions is not None and len(captions) != len(pictures):
        raise ValueError(f"{len(captions)} captions for {len(pictures)} pictures")
    rows = ceil(len(pictures) / across)
    if row_titles is not None and len(row_titles) != rows:
        raise ValueError(f"{len(row_titles)} titles for {rows} rows of pictures")


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Return the text on one line, cut off with an ellipsis where it is wider than `width` pixels."""
    text = " ".join(text.split())
    shorter = (text[:end].rstrip() + "…" for end in range(len(text) - 1, 0, -1))
    return text if font.getlength(text) <= width else next((one for one in shorter if font.getlength(one) <= width), "")
