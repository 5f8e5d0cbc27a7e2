"""Pages of the best images: each image with a frame around the receptive field, and beside it the patch in the frame.

H and W pixels.
"""

from collections.abc import Sequence
from math import ceil, floor

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from deepcluster.visualization.grid import PAPER, picture_grid
from deepcluster.visualization.top_images.photos import Box

# Nine pairs of this side fill the width of a common screen (1,826 px).
TILE = 96
GAP = 2
ACROSS = 9
ROWS_PER_PAGE = 32
FRAME, FRAME_EDGE = (255, 200, 0), (0, 0, 0)
MISSING = (225, 225, 225)
# Background of a patch that is not square.
MAT = (240, 240, 240)


def image_tile(photo_HWC: NDArray[np.uint8] | None, view: Box, part: Box, *, patch: bool) -> NDArray[np.uint8]:
    """Return an image as it is shown: the view, and with `patch` a frame in it and the framed part beside it.

    Args:
        photo_HWC: the photo; None if it can't be read any more, for grey.
        view, part: boxes in the photo, of the view and of the receptive field.
        patch: whether the receptive field is smaller than the view.
    """
    if photo_HWC is None:
        whole = cut = np.full((TILE, TILE, 3), MISSING, np.uint8)
        return _beside(whole, cut) if patch else whole
    photo = Image.fromarray(photo_HWC)
    picture = _cut(photo, view)
    if not patch:
        return np.asarray(picture)
    if part != view:
        _draw_frame(picture, view, part)
    return _beside(np.asarray(picture), np.asarray(_cut(photo, part)))


def _beside(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.concatenate([one, np.full((len(one), GAP, 3), PAPER, np.uint8), other], axis=1)


def _cut(photo: Image.Image, box: Box) -> Image.Image:
    """Return a part of a photo, resized to TILE along its longer side, in the middle of a square tile."""
    left, top = max(0.0, box[0]), max(0.0, box[1])
    right, bottom = min(float(photo.width), box[2]), min(float(photo.height), box[3])
    scale = TILE / max(right - left, bottom - top)
    sides = max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))
    # Crop before resizing, which would mix in pixels around the box.
    x, y = floor(left), floor(top)
    part = photo.crop((x, y, ceil(right), ceil(bottom)))
    cut = part.resize(sides, Image.Resampling.BICUBIC, box=(left - x, top - y, right - x, bottom - y))
    if sides == (TILE, TILE):
        return cut
    tile = Image.new("RGB", (TILE, TILE), MAT)
    tile.paste(cut, ((TILE - sides[0]) // 2, (TILE - sides[1]) // 2))
    return tile


def _draw_frame(picture: Image.Image, view: Box, part: Box) -> None:
    """Draw the edges of `part` into the picture of `view`: a bright line between dark ones is visible on every photo."""
    scale_x, scale_y = TILE / (view[2] - view[0]), TILE / (view[3] - view[1])
    left, right = (round((x - view[0]) * scale_x) for x in (part[0], part[2]))
    top, bottom = (round((y - view[1]) * scale_y) for y in (part[1], part[3]))
    draw = ImageDraw.Draw(picture)
    for grown, colour in ((1, FRAME_EDGE), (0, FRAME), (-1, FRAME), (-2, FRAME_EDGE)):
        corners = [left - grown, top - grown, right - 1 + grown, bottom - 1 + grown]
        if corners[0] <= corners[2] and corners[1] <= corners[3]:
            draw.rectangle(corners, outline=colour)


def page_of(
    channels: Sequence[int], tiles: Sequence[Sequence[NDArray[np.uint8]]], captions: Sequence[Sequence[str]]
) -> Image.Image:
    """Return a page of the tiles and captions of each channel, nine per row, each channel on rows of its own."""
    count = max(map(len, tiles))
    across = min(ACROSS, count)
    rows = ceil(count / across)
    blank = np.full_like(tiles[0][0], 255)
    pictures, texts, titles = [], [], []
    for channel, of_channel, their_captions in zip(channels, tiles, captions, strict=True):
        empty = rows * across - len(of_channel)
        pictures += [*of_channel, *[blank] * empty]
        texts += [*their_captions, *[""] * empty]
        titles += [f"channel {channel}", *[""] * (rows - 1)]
    return picture_grid(pictures, across=across, gap=6, captions=texts, row_titles=titles)
