"""Contact sheets: many pictures of one size in one image; and tiles of images with a frame around the receptive field.

H and W pixels. A box is left, top, right, bottom: edges of pixels, so that (0, 0, 1, 1) is the first pixel.
"""

from collections.abc import Mapping, Sequence
from math import ceil, floor

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from deepcluster.data.views import ClusterView

PAPER, INK = (255, 255, 255), (40, 40, 40)
# Letters of 11 px are legible, and four digits are narrower than a picture of 32 px.
LETTERS, LINE, MARGIN = 11, 15, 4
# Nine pairs of tiles of this side fill the width of a common screen (1,826 px).
TILE, GAP, ACROSS = 96, 2, 9
FRAME, FRAME_EDGE = (255, 200, 0), (0, 0, 0)
# Colour of photos that are gone, and background of a patch that is not square.
MISSING, MAT = (225, 225, 225), (240, 240, 240)

Box = tuple[float, float, float, float]


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
    if not pictures or across < 1:
        raise ValueError(f"a grid of {len(pictures)} pictures, {across} per row, can't be drawn")
    shapes, across = {picture.shape for picture in pictures}, min(across, len(pictures))
    if len(shapes) > 1 or len(pictures[0].shape) != 3 or pictures[0].shape[2] != 3:
        raise ValueError(f"pictures of one size (H, W, 3) are expected, not {sorted(shapes)}")
    if captions is not None and len(captions) != len(pictures):
        raise ValueError(f"{len(captions)} captions for {len(pictures)} pictures")
    rows = ceil(len(pictures) / across)
    if row_titles is not None and len(row_titles) != rows:
        raise ValueError(f"{len(row_titles)} titles for {rows} rows of pictures")
    height, width = pictures[0].shape[:2]
    font = ImageFont.load_default(LETTERS)
    left = ceil(max(map(font.getlength, row_titles))) + 2 * MARGIN if row_titles else 0
    step_y, step_x = height + gap + (LINE if captions else 0), width + gap
    sheet = Image.new("RGB", (left + gap + across * step_x, gap + rows * step_y), PAPER)
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


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Return the text on one line, cut off with an ellipsis where it is wider than `width` pixels."""
    text = " ".join(text.split())
    shorter = (text[:end].rstrip() + "…" for end in range(len(text) - 1, 0, -1))
    return text if font.getlength(text) <= width else next((one for one in shorter if font.getlength(one) <= width), "")


def page_of(images: Mapping[int, Sequence[tuple[NDArray[np.uint8], str]]]) -> Image.Image:
    """Return a page of the tiles and captions of each channel, nine per row, each channel on rows of its own."""
    count = max(map(len, images.values()))
    across = min(ACROSS, count)
    rows = ceil(count / across)
    shown: list[tuple[NDArray[np.uint8], str]] = []
    for of_channel in images.values():
        blank = np.full_like(of_channel[0][0], 255), ""
        shown += [*of_channel, *[blank] * (rows * across - len(of_channel))]
    tiles, captions = zip(*shown, strict=True)
    titles = [title for channel in images for title in (f"channel {channel}", *[""] * (rows - 1))]
    return picture_grid(tiles, across=across, gap=6, captions=captions, row_titles=titles)


def image_tile(photo_HWC: NDArray[np.uint8] | None, view: Box, part: Box, *, patch: bool) -> NDArray[np.uint8]:
    """Return an image as it is shown: the view, and with `patch` a frame in it and the framed part beside it.

    Args:
        photo_HWC: the photo; None if it can't be read any more, for grey.
        view, part: boxes in the photo, of the view and of the receptive field.
        patch: whether the receptive field is smaller than the view.
    """
    if photo_HWC is None:
        whole = cut = Image.new("RGB", (TILE, TILE), MISSING)
    else:
        photo = Image.fromarray(photo_HWC)
        whole = _cut(photo, view)
        cut = _cut(photo, part) if patch else whole
        if patch and part != view:
            _draw_frame(whole, view, part)
    if not patch:
        return np.asarray(whole)
    return np.concatenate([np.asarray(whole), np.full((TILE, GAP, 3), PAPER, np.uint8), np.asarray(cut)], axis=1)


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


def photo_box(view_box: Box, view: ClusterView, height: int, width: int, *, reduce_to: int = 0) -> Box:
    """Return the box in a photo of `height` x `width` pixels that corresponds to a box in its centre view.

    Args:
        view: how the view was cut out.
        reduce_to: shorter side to which a larger photo was reduced before the view was made; 0: not reduced.
    """

    def place(at: float, side: int, other: int) -> float:
        """Return the place along a side that `decode` reduced, and `ClusterView` cut to its middle, resized and cropped."""
        shorter, small, small_other = min(side, other), side, other
        if 0 < reduce_to < shorter:
            small, small_other = side * reduce_to // shorter, other * reduce_to // shorter
        cut = view.windows(np.array([[small, small_other]]))
        (middle, _, part, _), resized, crop = cut.boxes_B4[0].tolist(), int(cut.grids_B2[0, 0]), int(cut.places_B2[0, 0])
        return float(((at + crop) * (part / resized) + middle) * (side / small))

    left, top, right, bottom = view_box
    return place(left, width, height), place(top, height, width), place(right, width, height), place(bottom, height, width)
