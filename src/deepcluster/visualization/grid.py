"""Many pictures of one size in one image, as on a contact sheet.

H and W pixels.
"""

from collections.abc import Iterator, Sequence
from math import ceil

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

PAPER, INK = (255, 255, 255), (40, 40, 40)
# Letters of 11 px can be read, and four digits of them are narrower than a picture of 32 px.
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
    """Pictures line by line on white, each with its caption under it.

    Args:
        pictures: (H, W, 3) each, all of one size.
        across: pictures a line.
        gap: white pixels between pictures, and around all of them.
        captions: one a picture; letters that have no room are cut off, with an ellipsis.
        row_titles: one a line of pictures, left of it.

    Raises:
        ValueError: no pictures, pictures of several sizes, or another number of captions or titles than there is need of.
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
            text = _fitting(captions[number], font, width)
            draw.text((x + width / 2, y + height + LINE / 2), text, fill=INK, font=font, anchor="mm")
    for row, title in enumerate(row_titles or ()):
        draw.text((left - MARGIN, gap + row * step_y + height / 2), title, fill=INK, font=font, anchor="rm")
    return sheet


def _check(
    pictures: Sequence[NDArray[np.uint8]], across: int, captions: Sequence[str] | None, row_titles: Sequence[str] | None
) -> None:
    if not pictures or across < 1:
        raise ValueError(f"a grid of {len(pictures)} pictures, {across} a line, can't be drawn")
    shapes = {picture.shape for picture in pictures}
    if len(shapes) > 1 or len(pictures[0].shape) != 3 or pictures[0].shape[2] != 3:
        raise ValueError(f"pictures of one size (H, W, 3) are wanted, not {sorted(shapes)}")
    if captions is not None and len(captions) != len(pictures):
        raise ValueError(f"{len(captions)} captions for {len(pictures)} pictures")
    rows = ceil(len(pictures) / across)
    if row_titles is not None and len(row_titles) != rows:
        raise ValueError(f"{len(row_titles)} titles for {rows} lines of pictures")


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text on one line, cut off where it is wider than `width` pixels."""
    text = " ".join(text.split())
    return next((shorter for shorter in _shorter(text) if font.getlength(shorter) <= width), "")


def _shorter(text: str) -> Iterator[str]:
    yield text
    yield from (text[:end].rstrip() + "…" for end in range(len(text) - 1, 0, -1))
