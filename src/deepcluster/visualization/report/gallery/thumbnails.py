"""Small square pictures, many in one file: a page of thousands of image elements would not be usable, one of sheets is.

T thumbnails.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Final

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.errors import UnreadableImage
from deepcluster.core.work import Advance, no_advance
from deepcluster.data.decode import decode
from deepcluster.data.loader import image_threads
from deepcluster.data.sources import ImageSource
from deepcluster.visualization.report.page import Blob

# Side in pixels by the number of clusters: each cluster should show at least its nearest image. 16 where there are more.
SIDES: Final = ((5_000, 64), (15_000, 32))
LEAST_SIDE: Final = 16
# Sides for sets that are small enough for all their images; an open image has a picture of its own (`whole.py`).
LARGER_SIDES: Final = (96, 128)
SIDES_READ: Final = 9  # Images that are read to see how large they are.
# Bytes of all thumbnails in the page, about; and of one of a photo, by its pixels and by its side (measured on imagenette
# at 16 … 96 pixels), with its number.
ALL_BYTES, BYTES_PER_PIXEL, BYTES_PER_SIDE, NUMBER_BYTES = 6.4e6, 0.18, 5.0, 8.0
WITH_WHOLE_BYTES: Final = 9.0e6  # Of thumbnails and whole pictures together.
ACROSS: Final = 16  # Thumbnails side by side in a sheet; and in a whole sheet.
A_SHEET: Final = 256
QUALITY: Final = 72
# Of 0 … 6: 4 makes sheets of photos a seventh smaller than 0, in 0.5 ms per thumbnail (0.2 by 0, 1.3 by 6).
METHOD: Final = 4
MEDIA_TYPE: Final = "image/webp"


@dataclass(frozen=True)
class Thumbnails:
    """Sheets of square thumbnails; thumbnail t is tile `t % 256` of sheet `t // 256`, tiles lie line by line.

    Attributes:
        side: of a thumbnail, in pixels.
        indices_T: image of each thumbnail, in the order in which they were wanted.
        sheets: WebP files, 16 tiles wide; the last one may be lower.
        unreadable: reasons by index, of images that were wanted and could not be read.
    """

    side: int
    indices_T: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    sheets: Sequence[Blob] = ()
    unreadable: dict[int, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """T."""
        return len(self.indices_T)

    @property
    def bytes_left(self) -> float:
        """Bytes that the page has for whole pictures."""
        return WITH_WHOLE_BYTES - sum(len(sheet.content) for sheet in self.sheets)

    def numbers_of(self, indices_R: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return numbers of images' thumbnails, -1 where they have none."""
        numbers = {index: number for number, index in enumerate(self.indices_T.tolist())}
        return np.fromiter((numbers.get(index, -1) for index in indices_R.tolist()), np.int64, len(indices_R))


def thumbnail_side(n_clusters: int) -> int:
    """Return the side of thumbnails in pixels: smaller where many clusters have to show an image each."""
    return next((side for most, side in SIDES if n_clusters <= most), LEAST_SIDE)


def sharpest_side(least: int, images: ImageSource, indices: NDArray[np.int64]) -> int:
    """Return the largest side at which all images have a thumbnail within the page's size, and `least` at the least.

    Not larger than the images: half of a few of them have no shorter side below it.
    """
    fitting = [side for side in LARGER_SIDES if side > least and most_thumbnails(side) >= len(indices)]
    if not fitting:
        return least
    few = indices[:: max(1, len(indices) // SIDES_READ)][:SIDES_READ].tolist()
    tiles = [image for index in few if not isinstance(image := _decoded(images, index, max(fitting)), str)]
    shorter = float(np.median([min(image_HWC.shape[:2]) for image_HWC in tiles])) if tiles else 0.0
    return max((side for side in fitting if side <= shorter), default=least)


def most_thumbnails(side: int) -> int:
    """Return how many thumbnails of a side a page has at most: 6,007 of 64 pixels, 18,165 of 32, 47,732 of 16."""
    return int(ALL_BYTES / (BYTES_PER_PIXEL * side**2 + BYTES_PER_SIDE * side + NUMBER_BYTES))


def make_thumbnails(
    images: ImageSource, indices: NDArray[np.int64], *, side: int, workers: int, advance: Advance = no_advance
) -> Thumbnails:
    """Return thumbnails of images, in the order of `indices`; memory is that of a sheet and its images.

    The shorter side is scaled to `side`, and the centre is cut out. Smaller images are enlarged.

    Args:
        indices: unique indices of images, the most important first.
        advance: called after each image; may raise to stop.
    """
    from PIL import Image

    unreadable: dict[int, str] = {}
    made: list[int] = []
    sheets: list[Blob] = []
    with image_threads(max(1, workers)) as pool:

        def tiles() -> Iterator[NDArray[np.uint8]]:
            for first in range(0, len(indices), A_SHEET):
                some = indices[first : first + A_SHEET].tolist()
                for index, tile in zip(some, pool.map(partial(thumbnail, images, side=side), some), strict=True):
                    advance(1)
                    if isinstance(tile, str):
                        unreadable[index] = tile
                    else:
                        made.append(index)
                        yield tile

        following = tiles()
        while tiles_of_sheet := list(islice(following, A_SHEET)):
            sheet = Image.new("RGB", (ACROSS * side, -(-len(tiles_of_sheet) // ACROSS) * side))
            for number, tile in enumerate(tiles_of_sheet):
                sheet.paste(Image.fromarray(tile), (number % ACROSS * side, number // ACROSS * side))
            file = io.BytesIO()
            sheet.save(file, "WEBP", quality=QUALITY, method=METHOD)
            sheets.append(Blob(file.getvalue(), MEDIA_TYPE))
    return Thumbnails(side, np.array(made, dtype=np.int64), sheets, unreadable)


def thumbnail(images: ImageSource, index: int, *, side: int) -> NDArray[np.uint8] | str:
    """Return the thumbnail (side, side, 3) of an image, or why it can't be read."""
    from PIL import Image

    image_HWC = _decoded(images, index, side)
    if isinstance(image_HWC, str):
        return image_HWC
    height, width, _ = image_HWC.shape
    shorter = min(height, width)
    top, left = (height - shorter) // 2, (width - shorter) // 2
    square = image_HWC[top : top + shorter, left : left + shorter]
    if shorter == side:
        return square
    # Pixels of tiny images stay visible as squares; enlarged a little, such squares would be of different sizes.
    way = Image.Resampling.NEAREST if 2 * shorter <= side else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(np.ascontiguousarray(square)).resize((side, side), way))


def _decoded(images: ImageSource, index: int, side: int) -> NDArray[np.uint8] | str:
    """Return an image, its shorter side reduced to `side`, or why it can't be read."""
    try:
        return decode(images.read(index), shorter_side=side)
    except (UnreadableImage, OSError) as error:
        return str(error)
