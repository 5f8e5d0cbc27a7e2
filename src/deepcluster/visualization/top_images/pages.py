"""Pictures of the best images: whole with a frame around what the unit sees, and that part alone.

H and W pixels, K images of a channel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, sqrt

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from deepcluster.visualization.grid import PAPER, picture_grid
from deepcluster.visualization.top_images.photos import Box

# Nine pairs of this side fill the width of a common screen (1,826 px).
TILE = 96
ACROSS = 9
CHANNELS_A_PAGE = 32
# A channel's block is this wide, whatever the number of its images; so many are on a line.
BLOCK_SIDE = 216
BLOCKS_ACROSS = 8
SMALLEST_TILE = 24
FRAME, FRAME_EDGE = (255, 200, 0), (0, 0, 0)
MISSING = (225, 225, 225)
# Beside a patch that is not square, so that the tile it stands in is seen.
MAT = (240, 240, 240)


@dataclass(frozen=True)
class Shown:
    """An image of a channel as it is drawn, (TILE, TILE, 3) each.

    Attributes:
        whole: the view, with a frame where the unit sees a part of it.
        plain: the view alone.
        patch: what the unit sees.
        caption: score and name.
    """

    whole: NDArray[np.uint8]
    plain: NDArray[np.uint8]
    patch: NDArray[np.uint8]
    caption: str


def show(photo_HWC: NDArray[np.uint8] | None, view: Box, part: Box, caption: str) -> Shown:
    """An image from its photo; grey where there is none any more.

    Args:
        view, part: boxes in the photo, of the view and of what the unit sees of it.
    """
    if photo_HWC is None:
        blank = np.full((TILE, TILE, 3), MISSING, np.uint8)
        return Shown(blank, blank, blank, caption)
    photo = Image.fromarray(photo_HWC)
    plain = _cut(photo, view)
    whole = plain.copy()
    if part != view:
        _frame(whole, view, part)
    return Shown(np.asarray(whole), np.asarray(plain), np.asarray(_cut(photo, part)), caption)


def _cut(photo: Image.Image, box: Box) -> Image.Image:
    """A part of a photo, its longer side at TILE; one that the border cuts is not square, and is put in the middle."""
    left, top = max(0.0, box[0]), max(0.0, box[1])
    right, bottom = min(float(photo.width), box[2]), min(float(photo.height), box[3])
    scale = TILE / max(right - left, bottom - top)
    sides = max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))
    # Cut out before it is scaled, which would mix in what is around it.
    x, y = floor(left), floor(top)
    part = photo.crop((x, y, ceil(right), ceil(bottom)))
    cut = part.resize(sides, Image.Resampling.BICUBIC, box=(left - x, top - y, right - x, bottom - y))
    if sides == (TILE, TILE):
        return cut
    tile = Image.new("RGB", (TILE, TILE), MAT)
    tile.paste(cut, ((TILE - sides[0]) // 2, (TILE - sides[1]) // 2))
    return tile


def _frame(whole: Image.Image, view: Box, part: Box) -> None:
    """Draw where `part` is in the picture of `view`: a bright line between dark ones shows on every photo."""
    scale_x, scale_y = TILE / (view[2] - view[0]), TILE / (view[3] - view[1])
    left, right = (round((x - view[0]) * scale_x) for x in (part[0], part[2]))
    top, bottom = (round((y - view[1]) * scale_y) for y in (part[1], part[3]))
    draw = ImageDraw.Draw(whole)
    for grown, colour in ((1, FRAME_EDGE), (0, FRAME), (-1, FRAME), (-2, FRAME_EDGE)):
        corners = [left - grown, top - grown, right - 1 + grown, bottom - 1 + grown]
        if corners[0] <= corners[2] and corners[1] <= corners[3]:
            draw.rectangle(corners, outline=colour)


def pairs_page(channels: Sequence[int], shown: Sequence[Sequence[Shown]], *, patches: bool) -> Image.Image:
    """A line a channel: each image whole, and beside it what the unit sees; nine a line.

    Args:
        patches: whether what a unit sees is less than the view.
    """
    count = max(len(images) for images in shown)
    across = min(ACROSS, count)
    lines = ceil(count / across)
    blank = np.full((TILE, 2 * TILE + 2 if patches else TILE, 3), PAPER, np.uint8)
    pictures, captions, titles = [], [], []
    for channel, images in zip(channels, shown, strict=True):
        pairs = [_beside(one.whole, one.patch) if patches else one.plain for one in images]
        empty = lines * across - len(images)
        pictures += pairs + [blank] * empty
        captions += [one.caption for one in images] + [""] * empty
        titles += [f"channel {channel}"] + [""] * (lines - 1)
    return picture_grid(pictures, across=across, gap=6, captions=captions, row_titles=titles)


def blocks_page(shown: Sequence[Sequence[Shown]], captions: Sequence[str]) -> Image.Image:
    """A square of images a channel, as in the paper's figures: nine are 3 x 3."""
    side = ceil(sqrt(max(len(images) for images in shown)))
    tile = max(SMALLEST_TILE, BLOCK_SIDE // side)
    blank = np.full((tile, tile, 3), PAPER, np.uint8)
    blocks = []
    for images in shown:
        tiles = [_scaled(one.plain, tile) for one in images]
        block = picture_grid(tiles + [blank] * (side**2 - len(tiles)), across=side, gap=1)
        blocks.append(np.asarray(block))
    return picture_grid(blocks, across=BLOCKS_ACROSS, gap=8, captions=captions)


def _beside(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.concatenate([one, np.full((len(one), 2, 3), PAPER, np.uint8), other], axis=1)


def _scaled(picture: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))
